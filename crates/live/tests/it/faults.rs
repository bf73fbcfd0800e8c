//! A store that is down, a disk that is full, times that cannot be.

use std::sync::atomic::Ordering;
use std::time::Duration;

use cashtag_live::sources::file::{Replay, Speed};
use cashtag_live::windows::Window;
use serde_json::json;

use crate::disk::SmallDisk;
use crate::oracle::{assert_same, lines, stream};
use crate::rig::{Pure, Rig, listening, options, run_to_end, write};

#[test]
fn a_store_that_is_down_for_a_while_loses_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    let posts = stream(4_000, 21);
    let path = write(dir.path(), "day.jsonl", &lines(&posts));
    let model = Pure { pause: Duration::from_millis(20), batch: 50 };
    let mut options = listening(&data);
    options.pipeline.exit_when_done = true;
    let rig = Rig::start_with(options, vec![Box::new(Replay::file(path, Speed::Fastest))], model);
    rig.until("some are counted", |r| r.scored() > 200);
    // Somebody else takes the store for longer than it waits (five seconds).
    let other = rusqlite::Connection::open(data.join("live.sqlite")).unwrap();
    other.execute_batch("BEGIN EXCLUSIVE").unwrap();
    rig.until("a checkpoint fails", |r| r.shared.counters.store_failures.load(Ordering::Relaxed) > 0);
    // Meanwhile posts are still taken.
    let (status, answer) = rig.post("/v1/ingest", &json!({"id": "x", "author": "x", "text": "no ticker"}).to_string());
    assert_eq!((status, &answer["accepted"]), (202, &json!(1)));
    other.execute_batch("ROLLBACK").unwrap();
    drop(other);
    rig.until("everything is counted", |r| r.scored() == 4_001);
    rig.until("everything is written", |r| r.shared.inlet.backlog() == 0);
    rig.stop();
    // The one post without a ticker is of now: another day's market.
    let mut found = crate::oracle::found_unchecked(&data);
    let day = Window::D1.start(posts[0].time);
    found.retain(|key, _| key.3 >= day && key.3 < day + 2 * Window::D1.size());
    crate::oracle::compare(&found, &crate::oracle::expect(&posts));
}

#[test]
fn a_full_disk_makes_sources_wait_and_room_lets_them_go_on() {
    let Some(disk) = SmallDisk::new(1_500) else { return };
    let dir = tempfile::tempdir().unwrap();
    let posts = stream(6_000, 22);
    let path = write(dir.path(), "day.jsonl", &lines(&posts));
    let data = disk.path().join("data");
    let rig = Rig::start(listening(&data), vec![Box::new(Replay::file(path, Speed::Fastest))]);
    let failures = |r: &Rig| r.shared.counters.store_failures.load(Ordering::Relaxed);
    let waits = |r: &Rig| r.shared.inlet.board().to_json()[0]["detail"].as_str().is_some_and(|d| d.contains("waiting"));
    rig.until("it notices", |r| failures(r) > 0 || waits(r));
    // A full disk refuses posts; it does not lose them.
    let mut attempt = 0;
    rig.until("posts are refused", |r| {
        attempt += 1;
        let body: String = (0..200)
            .map(|i| json!({"id": format!("{attempt}-{i}"), "text": "x".repeat(5_000)}).to_string() + "\n")
            .collect();
        r.post("/v1/ingest?source=filler", &body).0 == 503
    });
    disk.grow(200_000);
    rig.until("all are counted", |r| {
        r.get("/v1/overview").to_string().contains("\"state\":\"done\"") && r.shared.inlet.backlog() == 0
    });
    rig.stop();
    let mut found = crate::oracle::found_unchecked(&data);
    let day = Window::D1.start(posts[0].time);
    found.retain(|key, _| key.3 >= day && key.3 < day + 2 * Window::D1.size());
    crate::oracle::compare(&found, &crate::oracle::expect(&posts));
}

#[test]
fn posts_from_the_future_and_the_far_past_close_nothing_and_stop_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let rig = Rig::start(listening(&dir.path().join("data")), Vec::new());
    for (id, time) in
        [("1", "9999-12-31T23:59:59Z"), ("2", "0001-01-01T00:00:00Z"), ("3", "2038-01-19T03:14:08Z"), ("4", "1e16")]
    {
        let (status, answer) =
            rig.post("/v1/ingest", &json!({"id": id, "text": "$AAA up", "created_at": time}).to_string());
        assert_eq!((status, &answer["accepted"]), (202, &json!(1)), "{answer}");
    }
    rig.until("they are counted", |r| r.get("/v1/posts")["posts"].as_array().unwrap().len() == 4);
    let latest = rig.get("/v1/overview")["as_of"].as_str().unwrap().to_owned();
    assert!(cashtag_live::time::parse(&latest).unwrap() <= cashtag_live::time::now());
    // A post of now is in a window of now.
    rig.post("/v1/ingest", &json!({"id": "5", "text": "$BBB up"}).to_string());
    rig.until("now is counted", |r| r.ask("GET", "/v1/signals/BBB?window=1m", None).0 == 200);
}

#[test]
fn a_log_of_another_store_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    let posts = stream(300, 23);
    let path = write(dir.path(), "day.jsonl", &lines(&posts));
    run_to_end(options(&data), vec![Box::new(Replay::file(path, Speed::Fastest))]).unwrap();
    assert_same(&data, &posts);
    std::fs::remove_dir_all(data.join("log")).unwrap();
    let error = run_to_end(options(&data), Vec::new()).err().unwrap().to_string();
    assert!(error.contains("counted 300 records") && error.contains("hint:"), "{error}");
}
