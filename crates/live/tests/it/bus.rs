//! Scoring and windows spread over processes by a real nats-server: workers that come, leave and are killed, a server that
//! is killed, filled, emptied. Every number is the oracle's.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::thread::JoinHandle;
use std::time::Duration;

use cashtag_live::LiveOptions;
use cashtag_live::bus::{BusOptions, WorkerOptions, work};
use cashtag_live::scorer::{ModelInfo, Scorer};
use cashtag_live::sources::Source;
use cashtag_live::sources::file::{Replay, Speed};
use cashtag_live::windows::Window;
use serde_json::{Value, json};

use crate::nats::Nats;
use crate::oracle::{Given, assert_same, compare, expect, found_unchecked, lines, stream};
use crate::rig::{Pure, Rig, listening, write};

fn bus(nats: &Nats) -> BusOptions {
    BusOptions { ack_wait: Duration::from_secs(2), ..BusOptions::new(nats.url()) }
}

fn on_bus(nats: &Nats, data: &std::path::Path) -> LiveOptions {
    LiveOptions { bus: Some(bus(nats)), ..listening(data) }
}

fn replay(dir: &std::path::Path, posts: &[Given]) -> Vec<Box<dyn Source>> {
    vec![Box::new(Replay::file(write(dir, "day.jsonl", &lines(posts)), Speed::Fastest))]
}

/// A worker in a thread; it leaves in good order when it is dropped.
struct Worker {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    fn start(bus: BusOptions, scorer: Option<Box<dyn Scorer + Send>>, windows: bool) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (flag, (tell, told)) = (stop.clone(), channel());
        let thread = std::thread::spawn(move || {
            let options = WorkerOptions { bus, windows };
            let mut scorer = scorer;
            let scorer = scorer.as_mut().map(|s| &mut **s as &mut dyn Scorer);
            work(&options, scorer, flag, |said| tell.send(said.to_owned()).unwrap()).unwrap();
        });
        told.recv_timeout(Duration::from_secs(20)).expect("the worker starts");
        Self { stop, thread: Some(thread) }
    }

    fn both(bus: BusOptions) -> Self {
        Self::start(bus, Some(Box::new(Pure { batch: 32, ..Pure::default() })), true)
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn status(rig: &Rig) -> Value {
    rig.get("/v1/overview")["bus"].take()
}

fn is_behind(rig: &Rig) -> bool {
    status(rig)["partitions"].as_array().is_some_and(|p| p.iter().any(|p| p["behind"] != 0))
}

/// Everything is told, stored and closed.
pub(crate) fn is_done(rig: &Rig) -> bool {
    let open = ["ticker", "sector", "market"].iter().any(|scope| {
        ["1m", "5m", "1h", "1d"].iter().any(|window| {
            let newest = rig.get(&format!("/v1/signals?scope={scope}&window={window}&limit=1000"));
            newest["signals"].as_array().unwrap().iter().any(|s| s["revision"] == 0)
        })
    });
    let done = rig.get("/v1/overview").to_string().contains("\"state\":\"done\"");
    !is_behind(rig) && !open && done && rig.shared.inlet.backlog() == 0
}

/// How many partitions each worker owns.
fn shares(rig: &Rig) -> Vec<usize> {
    let status = status(rig);
    let workers = status["workers"].as_array().cloned().unwrap_or_default();
    let mut shares: Vec<usize> = workers.iter().map(|w| w["partitions"].as_array().unwrap().len()).collect();
    shares.sort_unstable();
    shares
}

#[test]
fn workers_come_and_leave_and_each_post_counts_once() {
    let Some(nats) = Nats::start() else { return };
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    let posts = stream(6_000, 61);
    let rig = Rig::start(on_bus(&nats, &data), replay(dir.path(), &posts));
    rig.until("it says what it lacks", |r| status(r)["detail"].as_str().unwrap_or("").contains("cashtag live worker"));
    let slow = || Some(Box::new(Pure { pause: Duration::from_millis(20), batch: 16 }) as Box<dyn Scorer + Send>);
    let first = Worker::start(bus(&nats), slow(), true);
    rig.until("one worker owns everything", |r| shares(r) == [8]);
    rig.until("some are counted", |r| r.scored() > 300);
    let second = Worker::start(bus(&nats), slow(), true);
    let windows_only = Worker::start(bus(&nats), None, true);
    rig.until("three share", |r| shares(r).iter().sum::<usize>() == 8 && shares(r).len() == 3);
    assert!(rig.scored() < 6_000, "there was work left when they came");
    drop(first);
    rig.until("two share what the first left", |r| shares(r).iter().sum::<usize>() == 8 && shares(r).len() == 2);
    drop(windows_only);
    let _third = Worker::both(bus(&nats));
    rig.until("all is counted", |r| r.scored() == 6_000 && is_done(r));
    // The overview is a picture that is taken now and then.
    rig.until("the overview says that all is well and nothing is out", |r| {
        let status = status(r);
        status["state"] == "connected" && status["detail"] == "" && status["unanswered"] == 0
    });
    drop(second);
    rig.stop();
    assert_same(&data, &posts);
}

/// Fails on "poison", and ends its process (here: its thread) on "deadly".
#[test]
fn a_text_that_cannot_be_scored_is_set_aside_alone() {
    let Some(nats) = Nats::start() else { return };
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    let posts = stream(200, 62);
    let rig = Rig::start(on_bus(&nats, &data), replay(dir.path(), &posts));
    let _worker = Worker::both(bus(&nats));
    let body = json!({"id": "p", "author": "eve", "text": "$AAA is poison"}).to_string();
    assert_eq!(rig.post("/v1/ingest", &body).0, 202);
    rig.until("the others are counted", |r| r.scored() == 200);
    rig.until("it is a dead letter", |r| r.get("/v1/dead-letters").to_string().contains("it tastes bad"));
    rig.until("nothing is left", |r| r.shared.inlet.backlog() == 0);
}

/// A worker with another model gets no texts, and the front says why nothing moves.
struct Other(Pure);

impl Scorer for Other {
    fn info(&self) -> ModelInfo {
        ModelInfo { model_hash: "other".into(), ..self.0.info() }
    }
    fn score(&mut self, _: &[&str]) -> Result<Vec<Vec<f32>>, String> {
        Err("it must not be asked".into())
    }
}

#[test]
fn a_worker_with_another_model_is_not_asked() {
    let Some(nats) = Nats::start() else { return };
    let dir = tempfile::tempdir().unwrap();
    let rig = Rig::start(on_bus(&nats, &dir.path().join("data")), replay(dir.path(), &stream(50, 63)));
    let _other = Worker::start(bus(&nats), Some(Box::new(Other(Pure::default()))), true);
    rig.until("it says so", |r| status(r)["detail"].as_str().unwrap_or("").contains("another model"));
    assert_eq!(rig.scored(), 0);
    let _worker = Worker::both(bus(&nats));
    rig.until("the right one scores", |r| r.scored() == 50);
}

#[test]
fn a_server_that_is_full_makes_the_pipeline_wait_and_more_room_lets_it_go_on() {
    let Some(nats) = Nats::start() else { return };
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    let posts = stream(2_000, 64);
    let mut options = on_bus(&nats, &data);
    options.bus = Some(BusOptions { max_bytes: 150_000, ..bus(&nats) });
    let rig = Rig::start(options, replay(dir.path(), &posts));
    let _worker = Worker::both(bus(&nats));
    rig.until("windows that are not final fill a stream", |r| {
        status(r)["detail"].as_str().is_some_and(|d| d.contains("the stream of counted is full"))
    });
    // Posts are taken all the same: the log is here.
    let line = json!({"id": "x", "author": "x", "text": "no ticker"}).to_string();
    assert_eq!(rig.post("/v1/ingest?source=other", &line).0, 202);
    assert!(rig.shared.inlet.backlog() > 0);
    rig.stop();
    let rig = Rig::start(on_bus(&nats, &data), replay(dir.path(), &posts));
    rig.until("all is counted", |r| {
        let days = r.ask("GET", "/v1/signals/market?scope=market&window=1d", None).1;
        let all = days["signals"].as_array().is_some_and(|d| d.iter().any(|day| day["mentions"] == 2_000));
        all && r.shared.inlet.backlog() == 0 && !is_behind(r)
    });
    rig.stop();
    // The one post without a ticker is of now: another day's market.
    let mut found = found_unchecked(&data);
    let day = Window::D1.start(posts[0].time);
    found.retain(|key, _| key.3 >= day && key.3 < day + Window::D1.size());
    compare(&found, &expect(&posts));
}

#[test]
fn a_server_that_lost_everything_is_given_it_again() {
    let Some(mut nats) = Nats::start() else { return };
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    let posts = stream(3_000, 65);
    for part in [1_000, 2_000, 3_000] {
        let rig = Rig::start(on_bus(&nats, &data), replay(dir.path(), &posts[..part]));
        let worker = Worker::both(bus(&nats));
        rig.until("all are counted", |r| {
            r.get("/v1/signals?scope=market&window=1d")["signals"][0]["mentions"] == part && is_done(r)
        });
        drop(worker);
        rig.stop();
        // The last time without a loss: what the streams have is enough as well.
        if part == 1_000 {
            nats.lose_everything();
        }
    }
    assert_same(&data, &posts);
}

#[test]
fn what_is_wrong_with_a_server_is_said_in_words() {
    let Some(nats) = Nats::start() else { return };
    let dir = tempfile::tempdir().unwrap();
    let refused = |options: LiveOptions| {
        let outcome = cashtag_live::run(options, Vec::new(), &mut Pure::default(), Arc::new(true.into()), |_| {});
        outcome.err().map(|e| e.to_string()).unwrap_or_default()
    };
    assert_eq!(refused(on_bus(&nats, &dir.path().join("data"))), "");
    let said = refused(on_bus(&nats, &dir.path().join("another")));
    assert!(
        said.contains("belongs to another data directory") && said.contains("hint: give another --bus-name"),
        "{said}"
    );
    let mut options = on_bus(&nats, &dir.path().join("data"));
    options.bus = Some(BusOptions { partitions: 5, ..bus(&nats) });
    let said = refused(options);
    assert!(said.contains("has 8 partitions, expected 5") && said.contains("hint:"), "{said}");
    let Some(plain) = Nats::without_jetstream() else { return };
    let said = refused(on_bus(&plain, &dir.path().join("plain")));
    assert!(said.contains("has no JetStream") && said.contains("hint: nats-server --jetstream"), "{said}");
    let gone = plain.url();
    drop(plain);
    let mut options = on_bus(&nats, &dir.path().join("gone"));
    options.bus = Some(BusOptions::new(gone.clone()));
    let said = refused(options);
    assert!(said.contains(&format!("no NATS server at {gone}")) && said.lines().count() == 2, "{said}");
}
