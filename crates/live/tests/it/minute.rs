//! A store that is down for a whole minute under load: nothing that was acknowledged is lost or counted twice.
//!
//! They take two minutes, so they are asked for: `cargo test … -- --ignored minute:: --nocapture`.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use cashtag_live::sources::file::{Replay, Speed};
use cashtag_live::store::Location;

use crate::disk::SmallDisk;
use crate::kill::{patient, send};
use crate::oracle::{compare, expect, found, lines, stream};
use crate::pg::Server;
use crate::place::Place;
use crate::rig::{Rig, run_to_end, write};

const DOWN: Duration = Duration::from_secs(60);

/// 100 posts a second from a file and as many over HTTP, while the store goes and comes back.
fn a_minute_without(place: &Place, down: impl FnOnce(), up: impl FnOnce()) {
    let replayed = stream(9_000, 61);
    let mut posted = stream(12_000, 62);
    // The same days, other posts.
    let shift = replayed[0].time - posted[0].time;
    posted.iter_mut().for_each(|p| p.time += shift);
    let path = write(place.dir.path(), "day.jsonl", &lines(&replayed));
    // A post each 700 ms.
    let replay = Replay::file(path.clone(), Speed::Times(70.0));
    let rig = Rig::start(patient(place.listening()), vec![Box::new(replay)]);
    let stop = AtomicBool::new(false);
    let (url, all) = (rig.url.clone(), posted.clone());
    let sent = std::thread::scope(|scope| {
        let sender = scope.spawn(|| {
            let mut sent = 0;
            while !stop.load(Ordering::SeqCst) && sent < all.len() {
                sent = send(&url, &all, sent, Instant::now() + Duration::from_millis(1));
                std::thread::sleep(Duration::from_millis(70));
            }
            sent
        });
        rig.until("some are counted", |r| r.scored() > 500);
        let (taken, failures) =
            (rig.shared.inlet.board().all(), rig.shared.counters.store_failures.load(Ordering::Relaxed));
        let before: u64 = taken.values().map(|s| s.posts_total).sum();
        down();
        let began = Instant::now();
        let mut noticed = 0;
        while began.elapsed() < DOWN {
            std::thread::sleep(Duration::from_secs(1));
            noticed += usize::from(rig.shared.store.to_json()["state"] == "unavailable");
        }
        let after: u64 = rig.shared.inlet.board().all().values().map(|s| s.posts_total).sum();
        let waiting = rig.shared.inlet.backlog();
        up();
        let back = Instant::now();
        rig.until("it goes on", |r| {
            r.shared.store.to_json()["state"] == "connected" && r.shared.inlet.backlog() < 1_000
        });
        let tries = rig.shared.counters.store_failures.load(Ordering::Relaxed) - failures;
        println!(
            "{} posts were taken in {} s without the store, {waiting} waited, {tries} tries failed; counted {:.1} s after",
            after - before,
            DOWN.as_secs(),
            back.elapsed().as_secs_f64()
        );
        assert!(noticed > 45, "the page said so for {noticed} s");
        assert!(after - before > 6_000 && waiting > 6_000 && tries > 5, "{} {waiting} {tries}", after - before);
        stop.store(true, Ordering::SeqCst);
        sender.join().unwrap()
    });
    posted.truncate(sent);
    drop(rig);
    run_to_end(patient(place.options()), vec![Box::new(Replay::file(path, Speed::Fastest))]).unwrap();
    let mut given = replayed;
    given.extend(posted);
    compare(&found(place), &expect(&given));
}

#[test]
#[ignore = "takes two minutes"]
fn sqlite_locked_by_somebody_else() {
    let place = Place::sqlite().unwrap();
    let file = place.data.join("live.sqlite");
    let other = std::cell::OnceCell::new();
    let lock = || {
        let db = rusqlite::Connection::open(&file).unwrap();
        db.busy_timeout(Duration::from_secs(10)).unwrap();
        db.execute_batch("BEGIN EXCLUSIVE").unwrap();
        assert!(other.set(db).is_ok());
    };
    a_minute_without(&place, lock, || other.get().unwrap().execute_batch("ROLLBACK").unwrap());
}

#[test]
#[ignore = "takes two minutes"]
fn sqlite_on_a_full_disk_and_the_log_on_another() {
    let Some(disk) = SmallDisk::new(64_000) else { return };
    let mut place = Place::sqlite().unwrap();
    let log = place.dir.path().join("log");
    place.data = disk.path().join("data");
    place.location = Location::Sqlite(place.data.clone());
    std::fs::create_dir_all(&log).unwrap();
    std::fs::create_dir_all(&place.data).unwrap();
    std::os::unix::fs::symlink(&log, place.data.join("log")).unwrap();
    let filler = disk.path().join("filler");
    let fill = || {
        // Whole pages, then what is left.
        let full = std::fs::write(&filler, vec![1u8; 80 << 20]);
        assert!(full.is_err(), "the disk is not full");
    };
    a_minute_without(&place, fill, || {
        std::fs::remove_file(&filler).unwrap();
        disk.grow(400_000);
    });
}

#[test]
#[ignore = "takes two minutes"]
fn a_stopped_server() {
    let Some(server) = Server::start(&[]) else { return };
    let place = Place::with(Some(server.database().1));
    let server = std::cell::RefCell::new(server);
    a_minute_without(&place, || server.borrow_mut().crash(), || server.borrow_mut().go_on());
}
