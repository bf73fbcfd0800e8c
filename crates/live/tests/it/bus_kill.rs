//! SIGKILL of any process at any moment, nats-server among them: every acknowledged post is counted exactly once.
//!
//! The front, two scorers and two owners of windows are processes of their own (this test's own executable).
//! `CASHTAG_LIVE_KILLS=100` kills more often.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use cashtag_live::bus::{BusOptions, WorkerOptions, work};
use cashtag_live::scorer::{ModelInfo, Scorer};
use cashtag_live::sources::file::{Replay, Speed};

use crate::bus::is_done;
use crate::kill::{patient, send};
use crate::nats::Nats;
use crate::oracle::{assert_same, compare, expect, found, lines, stream};
use crate::rig::{Pure, Rig, announced, listening, write};

fn told(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

fn options(url: String) -> BusOptions {
    let ack_wait = told("CASHTAG_LIVE_ACK_WAIT").and_then(|ms| ms.parse().ok()).unwrap_or(2_000);
    BusOptions { ack_wait: Duration::from_millis(ack_wait), partitions: 6, ..BusOptions::new(url) }
}

/// A model that some text kills.
struct Mortal(Pure);

impl Scorer for Mortal {
    fn info(&self) -> ModelInfo {
        self.0.info()
    }
    fn batch(&self) -> usize {
        self.0.batch()
    }
    fn score(&mut self, texts: &[&str]) -> Result<Vec<Vec<f32>>, String> {
        if texts.iter().any(|t| t.contains("deadly")) {
            std::process::abort();
        }
        self.0.score(texts)
    }
}

#[test]
#[ignore = "runs for ever: the test below starts it in a process of its own"]
fn the_front() {
    let (Some(dir), Some(url)) = (told("CASHTAG_LIVE_DIR"), told("CASHTAG_LIVE_NATS")) else { return };
    let dir = Path::new(&dir);
    let mut live = patient(listening(&dir.join("data")));
    live.bus = Some(options(url));
    live.pipeline.checkpoint_every = Duration::from_millis(50);
    live.pipeline.exit_when_done = told("CASHTAG_LIVE_EXIT").is_some();
    live.log.segment_bytes = 200_000;
    let replay = Replay::file(dir.join("day.jsonl"), Speed::Fastest);
    let outcome = cashtag_live::run(live, vec![Box::new(replay)], &mut Pure::default(), Arc::default(), |started| {
        println!("\nlistening {}", started.url.unwrap());
    });
    outcome.unwrap();
}

#[test]
#[ignore = "runs for ever: the test below starts it in a process of its own"]
fn the_worker() {
    let (Some(role), Some(url)) = (told("CASHTAG_LIVE_ROLE"), told("CASHTAG_LIVE_NATS")) else { return };
    let mut model = Mortal(Pure { pause: Duration::from_millis(20), batch: 16 });
    let scorer = (role == "scorer").then_some(&mut model as &mut dyn Scorer);
    let options = WorkerOptions { bus: options(url), windows: role == "owner" };
    work(&options, scorer, Arc::default(), |_| println!("\nlistening")).unwrap();
}

struct Process {
    child: Child,
    url: String,
}

impl Process {
    fn start(test: &str, environment: &[(&str, &str)]) -> Self {
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", test, "--nocapture"])
            .envs(environment.iter().copied())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut process = Self { child, url: String::new() };
        process.url = announced(&mut process.child);
        process
    }

    /// SIGKILL; whether that is what ended it.
    fn kill(&mut self) -> bool {
        use std::os::unix::process::ExitStatusExt;
        self.child.kill().unwrap();
        self.child.wait().unwrap().signal() == Some(9)
    }

    fn ends_within(&mut self, time: Duration) -> bool {
        let began = Instant::now();
        while began.elapsed() < time {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.success();
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        false
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn every_acknowledged_post_is_counted_once_whoever_is_killed() {
    let Some(mut nats) = Nats::start() else { return };
    let kills: usize = told("CASHTAG_LIVE_KILLS").and_then(|n| n.parse().ok()).unwrap_or(10);
    let dir = tempfile::tempdir().unwrap();
    let replayed = stream(kills * 400, 71);
    let mut posted = stream(kills * 100, 72);
    let shift = replayed[0].time - posted[0].time;
    posted.iter_mut().for_each(|p| p.time += shift);
    std::fs::write(dir.path().join("day.jsonl"), lines(&replayed)).unwrap();
    let (path, url) = (dir.path().to_str().unwrap().to_owned(), nats.url());
    let front = || Process::start("bus_kill::the_front", &[("CASHTAG_LIVE_DIR", &path), ("CASHTAG_LIVE_NATS", &url)]);
    let worker = |role: &str| {
        Process::start("bus_kill::the_worker", &[("CASHTAG_LIVE_ROLE", role), ("CASHTAG_LIVE_NATS", &url)])
    };
    let mut state = 0x9e37_79b9u64;
    let mut random = move |n: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % n
    };
    let mut scorers: Vec<Process> = (0..2).map(|_| worker("scorer")).collect();
    let mut owners: Vec<Process> = (0..2).map(|_| worker("owner")).collect();
    let (mut running, mut sent, mut fired) = (front(), 0, BTreeMap::<&str, usize>::new());
    for i in 0..kills {
        let until = Instant::now() + Duration::from_millis(20 + random(300));
        sent = send(&running.url, &posted, sent, until);
        std::thread::sleep(until.saturating_duration_since(Instant::now()));
        // Each in turn, so that also a few kills hit all; which of two, and when, is chance.
        let which = random(2) as usize;
        let (what, killed) = match i % 4 {
            0 => ("scorer", scorers[which].kill()),
            1 => ("nats-server", nats.kill()),
            2 => ("owner", owners[which].kill()),
            _ => ("front", running.kill()),
        };
        *fired.entry(what).or_default() += usize::from(killed);
        std::thread::sleep(Duration::from_millis(random(200)));
        match what {
            "scorer" => scorers[which] = worker(what),
            "nats-server" => nats.begin(),
            "owner" => owners[which] = worker(what),
            _ => running = front(),
        }
    }
    println!("killed: {fired:?}");
    assert_eq!(fired.values().sum::<usize>(), kills);
    assert!(kills < 4 || fired.len() == 4, "{fired:?}");
    // The rest, without kills.
    let deadline = Instant::now() + Duration::from_secs(60);
    assert_eq!(send(&running.url, &posted, sent, deadline), posted.len());
    assert!(running.kill());
    let exit = [("CASHTAG_LIVE_DIR", &*path), ("CASHTAG_LIVE_NATS", &*url), ("CASHTAG_LIVE_EXIT", "1")];
    let mut last = Process::start("bus_kill::the_front", &exit);
    assert!(last.ends_within(Duration::from_secs(120)), "it does not come to an end");
    let mut all = replayed;
    all.extend(posted);
    compare(&found(&dir.path().join("data")), &expect(&all));
}

#[test]
fn a_text_that_kills_its_scorers_becomes_a_dead_letter_and_the_others_count() {
    let Some(nats) = Nats::start() else { return };
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    let posts = stream(400, 73);
    let mut text = lines(&posts[..200]);
    text += "{\"id\": \"d\", \"author\": \"eve\", \"created_at\": 1764320500000, \"text\": \"$AAA is deadly\"}\n";
    text += &lines(&posts[200..]);
    let mut live = listening(&data);
    live.bus = Some(options(nats.url()));
    let replay = Replay::file(write(dir.path(), "day.jsonl", &text), Speed::Fastest);
    let rig = Rig::start(live, vec![Box::new(replay)]);
    let url = nats.url();
    let environment =
        |role| [("CASHTAG_LIVE_ROLE", role), ("CASHTAG_LIVE_NATS", &*url), ("CASHTAG_LIVE_ACK_WAIT", "300")];
    let (_owner, mut scorer) = (
        Process::start("bus_kill::the_worker", &environment("owner")),
        Process::start("bus_kill::the_worker", &environment("scorer")),
    );
    let mut deaths = 0;
    rig.until("the text is a dead letter", |r| {
        if scorer.child.try_wait().unwrap().is_some() {
            deaths += 1;
            scorer = Process::start("bus_kill::the_worker", &environment("scorer"));
        }
        r.get("/v1/dead-letters").to_string().contains("given up after 9 tries")
    });
    assert!((3..=9).contains(&deaths), "{deaths} scorers died");
    rig.until("the others are counted", |r| r.scored() == 400 && is_done(r));
    rig.stop();
    assert_same(&data, &posts);
}
