//! Whether memory stays where it is: a process that takes posts without end, watched from outside.
//!
//! `CASHTAG_LIVE_SOAK=3600 CASHTAG_LIVE_RATE=100` make it an hour at 100 posts a second; without them it is a few seconds as
//! fast as it goes, in which only the counting is checked. Windows are open for ten minutes after their end and fill memory for
//! as long; `CASHTAG_LIVE_LATENESS=3600` (seconds) makes that an hour.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use cashtag_live::board::Pace;
use cashtag_live::inlet::Inlet;
use cashtag_live::post::Incoming;
use cashtag_live::sources::{Running, Source};
use cashtag_live::time::{self, MINUTE};

use crate::rig::{Pure, announced, listening};

/// Posts of now about so many tickers, so many a second (or as many as are taken), until the process stops.
pub(crate) struct Hose {
    pub(crate) rate: Option<f64>,
    pub(crate) tickers: usize,
}

/// `AAA`, `AAB`, … of capital letters.
pub(crate) fn ticker(n: usize) -> String {
    [n / 676 % 26, n / 26 % 26, n % 26].iter().map(|d| char::from(b'A' + *d as u8)).collect()
}

impl Hose {
    fn post(&self, n: u64) -> Incoming {
        let mood = ["goes up", "goes down", "moves sideways"][(n % 3) as usize];
        // Spread over the alphabet, some more often than others.
        let which = (n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as usize % self.tickers;
        let which = if n.is_multiple_of(4) { which / 10 } else { which };
        let symbol = ticker(which * 17_576 / self.tickers);
        Incoming {
            id: n.to_string(),
            author: format!("author {}", n % 50_021),
            text: format!(
                "${symbol} {mood}, says note {n}, which is as long as such notes are on most days of the year"
            ),
            event_time: Some(time::now()),
            ..Incoming::default()
        }
    }
}

impl Source for Hose {
    fn name(&self) -> String {
        "hose".into()
    }
    fn kind(&self) -> &'static str {
        "test"
    }
    fn pace(&self) -> Pace {
        Pace::Live
    }
    fn run(self: Box<Self>, inlet: Inlet) -> Running {
        Box::pin(async move {
            let work = move || -> cashtag_live::Result<()> {
                let (began, mut sent) = (Instant::now(), 0u64);
                while !inlet.stopping() {
                    let due = match self.rate {
                        Some(rate) => ((began.elapsed().as_secs_f64() * rate) as u64).saturating_sub(sent).min(1_000),
                        None => 500,
                    };
                    if due == 0 {
                        std::thread::sleep(Duration::from_millis(5));
                        continue;
                    }
                    inlet.wait_for_room()?;
                    inlet.take("hose", (sent..sent + due).map(|n| self.post(n)).collect())?;
                    sent += due;
                }
                Ok(())
            };
            tokio::task::spawn_blocking(work).await.map_err(|_| cashtag_live::Error::Stopped)?
        })
    }
}

fn number(name: &str) -> Option<f64> {
    std::env::var(name).ok()?.parse().ok()
}

#[test]
#[ignore = "runs until its standard input ends: the test below starts it in a process of its own"]
fn the_process() {
    let Some(dir) = std::env::var_os("CASHTAG_LIVE_DIR").map(std::path::PathBuf::from) else { return };
    let mut options = listening(&dir.join("data"));
    // What is kept for an hour or a day otherwise is kept for a minute, so that minutes show what hours would.
    if number("CASHTAG_LIVE_RATE").is_none() {
        options.windows.allowed_lateness = MINUTE;
        options.pipeline.retention = Some(Duration::from_secs(60));
        options.pipeline.log_retention = Duration::from_secs(60);
    }
    if let Some(seconds) = number("CASHTAG_LIVE_LATENESS") {
        options.windows.allowed_lateness = (seconds * 1_000.0) as i64;
    }
    let hose = Hose { rate: number("CASHTAG_LIVE_RATE"), tickers: 500 };
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let flag = stop.clone();
    std::thread::spawn(move || {
        let _ = std::io::stdin().read(&mut [0]);
        flag.store(true, std::sync::atomic::Ordering::SeqCst);
    });
    let ended = cashtag_live::run(options, vec![Box::new(hose)], &mut Pure::default(), stop, |started| {
        println!("\nlistening {}", started.url.unwrap());
    });
    ended.unwrap();
}

/// Resident memory of a process, in MB.
fn resident(process: u32) -> f64 {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:"));
    line.and_then(|l| l.trim().trim_end_matches(" kB").trim().parse::<f64>().ok()).unwrap_or(0.0) / 1024.0
}

fn metric(url: &str, name: &str) -> f64 {
    let agent = ureq::Agent::new_with_config(ureq::Agent::config_builder().proxy(None).build());
    let text = agent.get(&format!("{url}/metrics")).call().unwrap().body_mut().read_to_string().unwrap();
    let line = text.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(' ').map(str::to_owned));
    line.and_then(|v| v.parse().ok()).unwrap_or(0.0)
}

#[test]
fn memory_stays_where_it_is() {
    let asked = number("CASHTAG_LIVE_SOAK");
    let seconds = asked.unwrap_or(6.0);
    let dir = tempfile::tempdir().unwrap();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "soak::the_process", "--nocapture"])
        .env("CASHTAG_LIVE_DIR", dir.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let url = announced(&mut child);
    // Two readers, one of which never reads on: neither may hold anything up or be kept waiting for in memory.
    let watch = |path: &str| {
        let mut socket = TcpStream::connect(url.trim_start_matches("http://")).unwrap();
        write!(socket, "GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
        socket
    };
    let _asleep = watch("/v1/stream?window=1m");
    let mut awake = watch("/v1/stream?window=5m");
    std::thread::spawn(move || std::io::copy(&mut awake, &mut std::io::sink()));
    let began = Instant::now();
    let (mut samples, mut shown) = (Vec::new(), 0.0);
    while began.elapsed().as_secs_f64() < seconds {
        std::thread::sleep(Duration::from_millis(500));
        let passed = began.elapsed().as_secs_f64();
        samples.push((passed, resident(child.id())));
        if passed >= shown + (seconds / 12.0).clamp(1.0, 60.0) {
            shown = passed;
            let (scored, windows) =
                (metric(&url, "cashtag_live_posts_scored_total"), metric(&url, "cashtag_live_windows_in_memory"));
            println!(
                "{passed:6.0} s: {:7.0} MB, {scored:10.0} posts, {windows:7.0} windows in memory",
                resident(child.id())
            );
        }
    }
    let scored = metric(&url, "cashtag_live_posts_scored_total");
    drop(child.stdin.take());
    let ended = (0..300).find_map(|_| {
        std::thread::sleep(Duration::from_millis(100));
        child.try_wait().unwrap()
    });
    if ended.is_none() {
        child.kill().unwrap();
    }
    assert!(ended.is_some_and(|s| s.success()), "it did not stop: {ended:?}");
    let most = |from: f64, to: f64| {
        samples.iter().filter(|(t, _)| (from..to).contains(&(t / seconds))).map(|(_, mb)| *mb).fold(0.0, f64::max)
    };
    let (first, second, third) = (most(0.0, 1.0 / 3.0), most(1.0 / 3.0, 2.0 / 3.0), most(2.0 / 3.0, 1.1));
    println!(
        "{:.0} posts/s; at most {first:.0}, {second:.0}, {third:.0} MB in the three parts of {seconds} s",
        scored / seconds
    );
    assert!(scored > 1_000.0 || number("CASHTAG_LIVE_RATE").is_some(), "{scored}");
    // Caches fill in the first part; from the second to the third nothing may grow.
    assert!(asked.is_none_or(|s| s < 300.0) || third < 1.1 * second, "{first:.0}, {second:.0}, {third:.0} MB");
}
