//! What only a server can do: be away, come back, refuse us, lose an answer, serve somebody else.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use cashtag_live::scorer::Scorer;
use cashtag_live::sources::file::{Replay, Speed};
use cashtag_live::store::location::Opening;
use cashtag_live::store::{Batch, Location, StoreOptions};
use serde_json::json;

use crate::oracle::{assert_same, lines, stream};
use crate::pg::Server;
use crate::place::Place;
use crate::rig::{Pure, Rig, run_to_end, write};

fn open(location: &Location, log: &str) -> cashtag_live::Result<Box<dyn cashtag_live::store::Store>> {
    let model = Pure::default().info();
    let (options, stop) = (StoreOptions::default(), AtomicBool::new(true));
    location.open(&Opening { model: &model, options, log: log.into(), stop: &stop, waiting: &|_| {} })
}

fn refused(location: &Location, log: &str) -> String {
    open(location, log).err().expect("it is refused").to_string()
}

#[test]
fn a_server_that_is_away_for_a_while_loses_nothing_and_the_page_says_it() {
    let Some(mut server) = Server::start(&[]) else { return };
    let place = Place::with(Some(server.database().1));
    let posts = stream(4_000, 51);
    let path = write(place.dir.path(), "day.jsonl", &lines(&posts));
    let model = Pure { pause: Duration::from_millis(20), batch: 50 };
    let rig = Rig::start_with(place.listening(), vec![Box::new(Replay::file(path, Speed::Fastest))], model);
    let store = |r: &Rig| r.get("/v1/overview")["store"].clone();
    rig.until("some are shown", |r| !r.get("/v1/signals?window=1d")["signals"].as_array().unwrap().is_empty());
    assert_eq!(store(&rig)["state"], "connected");
    for _ in 0..2 {
        let before = rig.scored();
        server.crash();
        rig.until("it is noticed", |r| store(r)["state"] == "unavailable");
        let said = store(&rig);
        assert!(said["since"].is_string() && !said["detail"].as_str().unwrap().is_empty(), "{said}");
        assert_eq!(rig.get("/health")["store"], "unavailable");
        assert!(!said.to_string().contains(Server::password()));
        // What does not need the store goes on: posts are taken, questions answered, signals shown.
        let line = json!({"id": "x", "author": "x", "text": "no ticker", "created_at": posts[0].time - 999_999_999});
        let (status, answer) = rig.post("/v1/ingest?source=other", &line.to_string());
        assert_eq!((status, answer["accepted"].as_u64().unwrap() + answer["duplicates"].as_u64().unwrap()), (202, 1));
        assert_eq!(rig.post("/v1/classify", r#"{"input": "up"}"#).1["data"][0]["label"], "Positive");
        assert!(!rig.get("/v1/signals?window=1d")["signals"].as_array().unwrap().is_empty());
        let (status, answer) = rig.ask("GET", "/v1/posts", None);
        assert_eq!((status, &answer["error"]["code"]), (503, &json!("store_unavailable")));
        std::thread::sleep(Duration::from_secs(2));
        server.go_on();
        rig.until("it goes on", |r| store(r)["state"] == "connected" && r.scored() > before);
    }
    rig.until("everything is counted", |r| {
        r.scored() == 4_001
            && r.get("/v1/overview")["sources"].to_string().contains("\"done\"")
            && r.shared.inlet.backlog() == 0
    });
    assert!(rig.shared.counters.store_failures.load(Ordering::Relaxed) > 2);
    rig.stop();
    let mut found = crate::oracle::found_unchecked(&place);
    let day = cashtag_live::windows::Window::D1.start(posts[0].time);
    found.retain(|key, _| key.3 >= day);
    crate::oracle::compare(&found, &crate::oracle::expect(&posts));
}

#[test]
fn a_start_waits_for_the_server() {
    let Some(mut server) = Server::start(&[]) else { return };
    let place = Place::with(Some(server.database().1));
    server.crash();
    let posts = stream(300, 52);
    let path = write(place.dir.path(), "day.jsonl", &lines(&posts));
    let (tell, told) = channel();
    let mut options = place.options();
    options.waiting = Box::new(move |why| tell.send(why.to_owned()).unwrap());
    let running =
        std::thread::spawn(move || run_to_end(options, vec![Box::new(Replay::file(path, Speed::Fastest))]).map(|_| ()));
    let why = told.recv_timeout(Duration::from_secs(30)).unwrap();
    assert!(why.contains("cannot be reached") && !why.contains(Server::password()), "{why}");
    std::thread::sleep(Duration::from_millis(500));
    assert!(!running.is_finished());
    server.go_on();
    running.join().unwrap().unwrap();
    assert_same(&place, &posts);
}

/// Between us and the server: each connection is cut when the answer to a COMMIT comes, for as long as there are cuts left.
fn cutter(port: u16, cuts: usize) -> (u16, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let (own, done) = (listener.local_addr().unwrap().port(), Arc::new(AtomicUsize::new(0)));
    let counter = done.clone();
    std::thread::spawn(move || {
        for client in listener.incoming().flatten() {
            let Ok(server) = TcpStream::connect(("127.0.0.1", port)) else { continue };
            let (committing, counter) = (Arc::new(AtomicBool::new(false)), counter.clone());
            let (mut from, mut to) = (client.try_clone().unwrap(), server.try_clone().unwrap());
            let flag = committing.clone();
            std::thread::spawn(move || {
                let mut piece = [0; 65_536];
                while let Ok(n @ 1..) = from.read(&mut piece) {
                    if piece[..n].windows(6).any(|w| w == b"COMMIT") {
                        flag.store(true, Ordering::SeqCst);
                    }
                    if to.write_all(&piece[..n]).is_err() {
                        break;
                    }
                }
                let _ = to.shutdown(Shutdown::Both);
            });
            let (mut from, mut to) = (server, client);
            std::thread::spawn(move || {
                let mut piece = [0; 65_536];
                while let Ok(n @ 1..) = from.read(&mut piece) {
                    if committing.swap(false, Ordering::SeqCst) && counter.load(Ordering::SeqCst) < cuts {
                        counter.fetch_add(1, Ordering::SeqCst);
                        break;
                    }
                    if to.write_all(&piece[..n]).is_err() {
                        break;
                    }
                }
                let _ = to.shutdown(Shutdown::Both);
                let _ = from.shutdown(Shutdown::Both);
            });
        }
    });
    (own, done)
}

#[test]
fn a_checkpoint_whose_answer_is_lost_is_not_written_twice() {
    let Some(server) = Server::shared() else { return };
    let (_, url) = server.database();
    // The first COMMIT is that of the migration: it is repeated, too.
    let (port, cuts) = cutter(server.port(), 6);
    let through = url.replace(&format!(":{}/", server.port()), &format!(":{port}/"));
    let mut place = Place::with(Some(through));
    let posts = stream(2_000, 53);
    let mut text = lines(&posts[..1_000]);
    text += "this is no post\nnor is this\n";
    text += &lines(&posts[1_000..]);
    let path = write(place.dir.path(), "day.jsonl", &text);
    let mut options = place.options();
    options.pipeline.checkpoint_every = Duration::from_millis(20);
    options.pipeline.exit_when_done = true;
    let mut model = Pure { pause: Duration::from_millis(5), batch: 50 };
    let replay: Vec<Box<dyn cashtag_live::sources::Source>> = vec![Box::new(Replay::file(path, Speed::Fastest))];
    cashtag_live::run(options, replay, &mut model, Arc::default(), |_| {}).unwrap();
    assert_eq!(cuts.load(Ordering::SeqCst), 6, "answers that were lost");
    place.location = Location::of(Some(&url), &place.data).unwrap();
    assert_same(&place, &posts);
    let reader = place.location.reader().unwrap();
    assert_eq!((reader.post_count().unwrap(), reader.dead_letter_count().unwrap()), (2_000, 2));
    assert_eq!(reader.dead_letters(9).unwrap().len(), 2);
}

#[test]
fn one_writer_one_log_one_version() {
    let Some(server) = Server::shared() else { return };
    let (database, url) = server.database();
    let location = |url: &str| Location::of(Some(url), std::path::Path::new("unused")).unwrap();
    let here = location(&url);
    assert!(here.reader().err().unwrap().to_string().contains("there is no store"));
    let mut first = open(&here, "one").unwrap();
    let second = refused(&here, "one");
    assert!(second.contains("in use by another process") && second.contains("hint:"), "{second}");
    // Beside it, under another name.
    let beside = open(&location(&format!("{url}?schema=beside")), "two").unwrap();
    drop(beside);
    first.commit(&Batch::default()).unwrap();
    // Somebody restored a backup under our hands: nothing is added to that.
    server.sql(&database, "UPDATE cashtag.meta SET value = 0 WHERE key = 'commits'");
    let changed = first.commit(&Batch::default()).unwrap_err().to_string();
    assert!(changed.contains("changed by somebody else") && changed.contains("hint:"), "{changed}");
    drop(first);
    let other = refused(&here, "another");
    assert!(other.contains("belongs to another data directory"), "{other}");
    // A store of the version before.
    let versions = || server.sql(&database, "SELECT array_agg(version) FROM cashtag.schema_version");
    let checks = || server.sql(&database, "SELECT count(*) FROM pg_constraint WHERE conname = 'posts_model_fkey'");
    let before = "ALTER TABLE cashtag.posts ADD CONSTRAINT posts_model_fkey FOREIGN KEY (model) REFERENCES cashtag.models; \
                  DELETE FROM cashtag.schema_version WHERE version = 2";
    server.sql(&database, before);
    assert_eq!((&*versions(), &*checks()), ("{1}", "1"));
    drop(open(&here, "one").unwrap());
    assert_eq!((&*versions(), &*checks()), ("{1,2}", "0"));
    server.sql(&database, "INSERT INTO cashtag.schema_version VALUES (99)");
    for newer in [refused(&here, "one"), here.reader().err().unwrap().to_string()] {
        assert!(newer.contains("version 2 or older, found 99"), "{newer}");
    }
}

#[test]
fn a_server_that_refuses_us_is_an_error_with_a_hint_and_without_the_password() {
    let Some(server) = Server::shared() else { return };
    let (database, url) = server.database();
    let wrong = url.replace("sesame", "barley");
    let nobody = url.replace("cashtag:", "nobody:");
    let none = server.url("no_such_database");
    for (url, what) in [(&wrong, "28P01"), (&nobody, "28P01"), (&none, "3D000")] {
        let location = Location::of(Some(url), std::path::Path::new("unused")).unwrap();
        let message = refused(&location, "one");
        assert!(message.contains(what) && message.contains("hint:"), "{message}");
        assert!(!message.contains("sesame") && !message.contains("barley"), "{message}");
        assert!(!format!("{location:?} {location}").contains("sesame"));
    }
    // Views for people.
    let place = Place::with(Some(url));
    let posts = stream(100, 54);
    let path = write(place.dir.path(), "day.jsonl", &lines(&posts));
    run_to_end(place.options(), vec![Box::new(Replay::file(path, Speed::Fastest))]).unwrap();
    assert_eq!(
        server.sql(
            &database,
            "SELECT count(*) FROM cashtag.scores WHERE event_time > '2025-01-01' AND cardinality(tickers) > 0"
        ),
        "100"
    );
    let market = "SELECT sum(mentions) FROM cashtag.signals WHERE \"window\" = '1d' AND scope = 'market'";
    assert_eq!(server.sql(&database, market), "100");
}

#[test]
fn the_connection_may_be_encrypted_and_certificates_checked() {
    let Some(mut server) = Server::start(&[]) else { return };
    let key = server.put("server.key", b"");
    let made = Command::new("openssl")
        .args(["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"])
        .args(["-addext", "subjectAltName=IP:127.0.0.1", "-addext", "basicConstraints=critical,CA:FALSE", "-out", "-"])
        .arg("-keyout")
        .arg(&key)
        .output();
    let Some(made) = made.ok().filter(|o| o.status.success()) else {
        println!("skipped: no openssl to make a certificate with (apt install openssl)");
        return;
    };
    server.put("server.crt", &made.stdout);
    server.crash();
    server.set(&["ssl=on"]);
    server.go_on();
    let (_, url) = server.database();
    let place = Place::with(None);
    let root = write(place.dir.path(), "root.crt", &String::from_utf8(made.stdout).unwrap());
    let at = |query: &str| Location::of(Some(&format!("{url}?{query}")), &place.data).unwrap();
    for query in ["sslmode=prefer", "sslmode=require", &format!("sslmode=verify-full&sslrootcert={}", root.display())] {
        drop(open(&at(query), "one").unwrap_or_else(|e| panic!("{query}: {e}")));
    }
    let unknown = refused(&at("sslmode=verify-full"), "one");
    assert!(unknown.contains("certificate"), "{unknown}");
    // A server without it, and a client that wants it.
    let Some(plain) = Server::shared() else { return };
    let url = plain.database().1 + "?sslmode=require";
    let message = refused(&Location::of(Some(&url), &place.data).unwrap(), "one");
    assert!(message.to_lowercase().contains("tls"), "{message}");
}

/// Printed for docs/live.md; asserted only that it ends.
#[test]
fn throughput_with_a_server() {
    let Some(place) = Place::postgres() else { return };
    let count = if std::env::var_os("CASHTAG_LIVE_BENCH").is_some() { 200_000 } else { 10_000 };
    let posts = stream(count, 55);
    let path = write(place.dir.path(), "day.jsonl", &lines(&posts));
    let began = Instant::now();
    run_to_end(place.options(), vec![Box::new(Replay::file(path, Speed::Fastest))]).unwrap();
    let rate = count as f64 / began.elapsed().as_secs_f64();
    println!(
        "{rate:.0} posts/s from a file to closed windows in PostgreSQL, the model being a pure function ({count} posts)"
    );
    assert_eq!(place.location.reader().unwrap().post_count().unwrap(), count as u64);
}
