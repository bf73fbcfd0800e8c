//! SIGKILL at any moment: every acknowledged post is counted exactly once.
//!
//! The process is this test's own executable, running the pipeline as a user's process does: log, store and API in a
//! directory, posts from a file and over HTTP at once. The oracle knows the input only. `CASHTAG_LIVE_KILLS=100` kills more
//! often. With PostgreSQL the server crashes now and then, too.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use cashtag_live::LiveOptions;
use cashtag_live::sources::file::{Replay, Speed};
use cashtag_live::store::Location;
use cashtag_live::time::DAY;
use serde_json::Value;

use crate::oracle::{Given, compare, expect, found, lines, stream};
use crate::pg::Server;
use crate::place::Place;
use crate::rig::{Pure, announced, listening, run_to_end};

/// The process that is killed. Its directory comes by the environment.
#[test]
#[ignore = "runs for ever: the test below starts it in a process of its own"]
fn the_process() {
    let Some(dir) = std::env::var_os("CASHTAG_LIVE_DIR").map(std::path::PathBuf::from) else { return };
    let replay = Replay::file(dir.join("day.jsonl"), Speed::Fastest);
    // Slow enough that kills hit it at work.
    let mut model = Pure { pause: Duration::from_millis(12), batch: 32 };
    let mut options = patient(listening(&dir.join("data")));
    let url = std::env::var("CASHTAG_LIVE_STORE").ok();
    options.location = Location::of(url.as_deref(), &dir.join("data")).unwrap();
    options.pipeline.checkpoint_every = Duration::from_millis(20);
    options.log.segment_bytes = 200_000;
    let started = cashtag_live::run(options, vec![Box::new(replay)], &mut model, Default::default(), |started| {
        println!("\nlistening {}", started.url.unwrap());
    });
    started.unwrap();
}

/// The two sources are hours apart, and nothing may be too late.
pub(crate) fn patient(mut options: LiveOptions) -> LiveOptions {
    options.windows.allowed_lateness = 3 * DAY;
    options
}

struct Process {
    child: Child,
    url: String,
}

impl Process {
    fn start(place: &Place) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "kill::the_process", "--nocapture"])
            .env("CASHTAG_LIVE_DIR", place.dir.path())
            .envs(place.url.iter().map(|url| ("CASHTAG_LIVE_STORE", url)))
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let url = announced(&mut child);
        Self { child, url }
    }

    /// SIGKILL; whether the process was really killed by it.
    fn kill(mut self) -> bool {
        use std::os::unix::process::ExitStatusExt;
        self.child.kill().unwrap();
        self.child.wait().unwrap().signal() == Some(9)
    }
}

/// Sends posts until the time is over; returns how many were acknowledged. What was not answered is sent again next time.
pub(crate) fn send(url: &str, posts: &[Given], from: usize, until: Instant) -> usize {
    let agent = ureq::Agent::new_with_config(ureq::Agent::config_builder().proxy(None).build());
    let mut sent = from;
    while sent < posts.len() && Instant::now() < until {
        let to = (sent + 7).min(posts.len());
        let Ok(mut answer) = agent.post(&format!("{url}/v1/ingest")).send(&lines(&posts[sent..to])) else { break };
        let Ok(text) = answer.body_mut().read_to_string() else { break };
        let answer: Value = serde_json::from_str(&text).unwrap();
        let taken = answer["accepted"].as_u64().unwrap() + answer["duplicates"].as_u64().unwrap();
        assert_eq!(taken as usize, to - sent, "{answer}");
        sent = to;
    }
    sent
}

#[test]
fn every_acknowledged_post_is_counted_once_whenever_the_process_is_killed() {
    kill_and_count(&Place::sqlite().unwrap(), &mut || 0);
}

#[test]
fn also_with_a_server_that_crashes_beside_it() {
    let Some(mut server) = Server::start(&[]) else { return };
    let place = Place::with(Some(server.database().1));
    kill_and_count(&place, &mut || {
        server.crash();
        server.go_on();
        1
    });
}

/// `crash` brings the store down and up again while the process runs, and says how often it did.
fn kill_and_count(place: &Place, crash: &mut dyn FnMut() -> usize) {
    let kills: usize = std::env::var("CASHTAG_LIVE_KILLS").ok().and_then(|n| n.parse().ok()).unwrap_or(10);
    let dir = &place.dir;
    let replayed = stream(kills * 400, 31);
    // The same days, other posts.
    let mut posted = stream(kills * 100, 32);
    let shift = replayed[0].time - posted[0].time;
    posted.iter_mut().for_each(|p| p.time += shift);
    std::fs::write(dir.path().join("day.jsonl"), lines(&replayed)).unwrap();
    let (mut fired, mut crashed, mut acknowledged, mut state) = (0, 0, 0, 0x9e37_79b9u64);
    while fired < kills {
        let process = Process::start(place);
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let until = Instant::now() + Duration::from_micros(20_000 + (state >> 33) % 300_000);
        acknowledged = send(&process.url, &posted, acknowledged, until);
        std::thread::sleep(until.saturating_duration_since(Instant::now()));
        if fired % 3 == 1 {
            crashed += crash();
            acknowledged = send(&process.url, &posted, acknowledged, Instant::now() + Duration::from_millis(300));
        }
        fired += usize::from(process.kill());
    }
    let between = found_any(place);
    println!(
        "{fired} kills, {crashed} crashes of the server; the market had {between} of {} posts when the last one hit",
        replayed.len() + posted.len()
    );
    assert_eq!(fired, kills);
    // The rest, without kills; what was acknowledged last may be all of it.
    let process = Process::start(place);
    let deadline = Instant::now() + Duration::from_secs(60);
    assert_eq!(send(&process.url, &posted, acknowledged, deadline), posted.len());
    assert!(process.kill());
    run_to_end(patient(place.options()), vec![Box::new(Replay::file(dir.path().join("day.jsonl"), Speed::Fastest))])
        .unwrap();
    let mut all = replayed;
    all.extend(posted);
    let (found, want) = (found(place), expect(&all));
    assert!(want.len() > 100);
    compare(&found, &want);
}

/// Mentions of the market's days so far.
fn found_any(place: &Place) -> u64 {
    let found = crate::oracle::found_unchecked(place);
    found.iter().filter(|(key, _)| key.0 == "1d" && key.1 == "market").map(|(_, want)| want.mentions()).sum()
}
