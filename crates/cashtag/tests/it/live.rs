//! `cashtag live` with the real model: a file in, signals out, and a kill in between.

use std::io::{BufRead, BufReader};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::context::Context;
use crate::model_commands::context;

#[path = "../../../live/tests/it/disk.rs"]
mod disk;
#[path = "../../../live/tests/it/pg.rs"]
mod pg;

/// A few minutes of an invented market; every text once.
pub(crate) fn day(posts: usize) -> String {
    let said = ["beats on earnings and raises its outlook", "misses and cuts its outlook", "will report on Tuesday"];
    let line = |i: usize| {
        let (ticker, text) = (["NVDA", "AAPL"][i % 2], said[i % 3]);
        let time = format!("2026-11-17T14:{:02}:{:02}.000Z", 30 + i / 60, i % 60);
        format!(
            "{{\"id\": \"{i}\", \"author\": \"a{}\", \"created_at\": \"{time}\", \"text\": \"${ticker} {text}, says note {i} of the day\"}}\n",
            i % 50
        )
    };
    (0..posts).map(line).collect()
}

/// A running pipeline.
struct Live {
    child: Child,
    url: String,
}

impl Live {
    fn start(context: &Context, args: &[&str]) -> Self {
        let all = [&["live", "--port", "0"], args].concat();
        let mut child = context.command(&all).stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
        let mut reader = BufReader::new(child.stderr.take().unwrap());
        let mut said = String::new();
        let url = loop {
            let before = said.len();
            assert!(reader.read_line(&mut said).unwrap() > 0, "it ended: {said}");
            if let Some(at) = said[before..].find("http://") {
                break said[before + at..].split_whitespace().next().unwrap().to_owned();
            }
        };
        // Somebody must read on, or it would wait.
        std::thread::spawn(move || std::io::copy(&mut reader, &mut std::io::sink()));
        Self { child, url }
    }

    fn get(&self, path: &str) -> Value {
        let agent = ureq::Agent::new_with_config(ureq::Agent::config_builder().proxy(None).build());
        let text = agent.get(&format!("{}{path}", self.url)).call().unwrap().body_mut().read_to_string().unwrap();
        serde_json::from_str(&text).unwrap()
    }

    #[track_caller]
    fn until(&self, what: &str, mut holds: impl FnMut(&Self) -> bool) {
        let began = Instant::now();
        while !holds(self) {
            assert!(began.elapsed() < Duration::from_secs(60), "never: {what}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn mentions(live: &Live, key: &str) -> u64 {
    let scope = if key == "market" { "market" } else { "ticker" };
    let found = live.get(&format!("/v1/signals?scope={scope}&window=1d"));
    let signals = found["signals"].as_array().unwrap();
    signals.iter().find(|s| s["key"] == key).map_or(0, |s| s["mentions"].as_u64().unwrap())
}

#[test]
fn a_day_is_scored_across_kills_and_exported() {
    let Some(context) = context() else { return };
    const POSTS: usize = 150;
    context.write("day.jsonl", day(POSTS));
    for wanted in [1, 60] {
        let live = Live::start(&context, &["--replay", "day.jsonl"]);
        live.until("some are counted", |l| mentions(l, "market") >= wanted);
        live.kill();
    }
    let live = Live::start(&context, &["--replay", "day.jsonl"]);
    live.until("all are counted", |l| mentions(l, "market") >= POSTS as u64);
    live.until("it is done", |l| l.get("/v1/overview")["sources"][0]["state"] == "done");
    assert_eq!(mentions(&live, "market"), POSTS as u64);
    assert_eq!((mentions(&live, "NVDA"), mentions(&live, "AAPL")), (POSTS as u64 / 2, POSTS as u64 / 2));
    let nvda = live.get("/v1/signals/NVDA?window=1d");
    assert!(nvda["signals"][0]["name"].as_str().is_some_and(|n| n.to_lowercase().contains("nvidia")), "{nvda}");
    let post = &live.get("/v1/posts?limit=1")["posts"][0];
    let sum: f64 = post["probabilities"].as_object().unwrap().values().map(|p| p.as_f64().unwrap()).sum();
    assert!((sum - 1.0).abs() < 1e-3 && post["model"].as_str().unwrap().len() == 16, "{post}");
    drop(live);
    let said = context.run(&["live", "export", "--data", "live-data", "--out", "parquet"]);
    assert!(said.contains("exit code 0") && said.contains(&format!("{POSTS} posts")), "{said}");
    assert!(context.path("parquet/scores/date=2026-11-17/scores.parquet").exists());
}

#[test]
fn wrong_usage_is_said_before_a_model_is_loaded() {
    let context = Context::new();
    for (args, what) in [
        (&["--replay", "none.jsonl"][..], "there is no file none.jsonl"),
        (&["--speed", "fast", "--stdin"], "--speed takes a number"),
        (&["--alert", "mentions > many"], "expected a number"),
        (&["--retention", "5 weeks"], "expected a time such as"),
        (&["--x-stream"], "--watch-list"),
        (&["--fsync", "sometimes"], "--fsync"),
    ] {
        let said = context.run(&[&["live"], args].concat());
        assert!(said.starts_with("exit code 2") && said.contains(what), "{said}");
    }
    context.write("list", "AAPL\n");
    let said = context.run(&["live", "--x-stream", "--watch-list", "list"]);
    assert!(said.starts_with("exit code 2") && said.contains("X_BEARER_TOKEN"), "{said}");
}

#[test]
fn the_demo_needs_nothing_but_the_model() {
    let Some(context) = context() else { return };
    // A demo that is killed leaves its directory: here, where it is cleared away.
    let here = context.path("").display().to_string();
    let context = context.env("TMPDIR", here);
    let live = Live::start(&context, &["--demo", "--speed", "2000"]);
    live.until("its first posts", |l| mentions(l, "market") > 30);
    assert_eq!(live.get("/v1/overview")["sources"][0]["name"], "demo");
    assert!(live.get("/v1/signals?window=1d")["signals"].as_array().unwrap().iter().any(|s| s["name"].is_string()));
    drop(live);
    assert!(!context.path("live-data").exists());
}

/// Live updates, keyboard, accessibility, a phone, hostile posts: on the real server, not on the one for development.
#[test]
fn the_page_works_in_a_browser() {
    let Some(context) = context() else { return };
    let here = context.path("").display().to_string();
    let context = context.env("TMPDIR", here);
    let live = Live::start(&context, &["--demo", "--speed", "60"]);
    let agent = ureq::Agent::new_with_config(ureq::Agent::config_builder().proxy(None).build());
    let page = agent.get(&live.url).call().unwrap().body_mut().read_to_string().unwrap();
    if !page.contains("/assets/main-") {
        println!("skipped: the page is not in this build (make web)");
        return;
    }
    live.until("its first posts", |l| mentions(l, "market") > 30);
    super::page::try_in_chromium(&live.url, "live,keyboard,axe,phone,hostile");
}

fn post(live: &Live, path: &str, body: &str) -> (u16, Value) {
    let config = ureq::Agent::config_builder().proxy(None).http_status_as_error(false).build();
    let mut answer = ureq::Agent::new_with_config(config).post(&format!("{}{path}", live.url)).send(body).unwrap();
    let status = answer.status().as_u16();
    let text = answer.body_mut().read_to_string().unwrap();
    (status, serde_json::from_str(&text).unwrap_or(Value::Null))
}

fn note(n: usize) -> String {
    serde_json::json!({"id": n.to_string(), "author": format!("a{n}"), "text": format!("$NVDA beats estimates, says note {n} of the day")})
        .to_string()
}

#[test]
fn the_store_may_be_a_server_that_is_away_for_a_while() {
    let Some(context) = context() else { return };
    let Some(mut server) = pg::Server::start(&[]) else { return };
    // As users keep it: the address without the password, which comes by the environment.
    let url = server.database().1;
    let address = url.replace(&url[url.find("cashtag:").unwrap() + 7..url.find('@').unwrap()], "");
    context.write("day.jsonl", day(60));
    let context = context.env("PGPASSWORD", pg::Server::password());
    let args = ["--replay", "day.jsonl", "--store", &address];
    let live = Live::start(&context, &args);
    live.until("some are counted", |l| mentions(l, "market") > 0);
    server.crash();
    // A post is taken and waits; the process neither ends nor begins again.
    assert_eq!(post(&live, "/v1/ingest", &note(0)).0, 202);
    live.until("the page says it", |l| l.get("/v1/overview")["store"]["state"] == "unavailable");
    assert_eq!(live.get("/health")["store"], "unavailable");
    server.go_on();
    live.until("it goes on", |l| l.get("/v1/overview")["store"]["state"] == "connected");
    live.kill();
    let live = Live::start(&context, &args);
    live.until("all are counted", |l| mentions(l, "AAPL") == 30 && l.get("/v1/posts?limit=1")["posts"][0]["id"] == "0");
    assert_eq!(live.get("/v1/posts?limit=100")["posts"].as_array().unwrap().len(), 61);
    let said = context.run(&["live", "--store", &address, "--no-http"]);
    assert!(said.contains("in use by another process") && !said.contains(pg::Server::password()), "{said}");
    drop(live);
    let said = context.run(&["live", "export", "--store", &address, "--out", "parquet"]);
    assert!(said.contains("exit code 0") && said.contains("61 posts"), "{said}");
    // Nothing of it is in SQLite, and no password in any file.
    assert!(!context.path("live-data/live.sqlite").exists());
    for file in crate::context::files(&context.path("live-data")) {
        let bytes = std::fs::read(context.path("live-data").join(&file)).unwrap();
        let secret = pg::Server::password().as_bytes();
        assert!(!bytes.windows(secret.len()).any(|w| w == secret), "{file}");
    }
    let wrong = context.env("PGPASSWORD", "wrong-one");
    let said = wrong.run(&["live", "--store", &address, "--no-http"]);
    assert!(said.contains("hint: the password may come from PGPASSWORD") && !said.contains("wrong-one"), "{said}");
}

#[test]
fn a_full_disk_refuses_posts_and_room_lets_them_in() {
    let Some(context) = context() else { return };
    let Some(disk) = disk::SmallDisk::new(8_000) else { return };
    let data = disk.path().join("data").display().to_string();
    let live = Live::start(&context, &["--data", &data]);
    (0..5).for_each(|n| assert_eq!(post(&live, "/v1/ingest", &note(n)).0, 202));
    live.until("they are counted", |l| mentions(l, "NVDA") == 5);
    let filler = disk.path().join("filler");
    let full = std::io::copy(&mut std::io::repeat(7), &mut std::fs::File::create(&filler).unwrap()).unwrap_err();
    assert_eq!(full.kind(), std::io::ErrorKind::StorageFull);
    // What fits into the block that the log has begun is still taken; then no more.
    let mut taken = 5;
    let refused = (5..200).find(|n| {
        let (status, answer) = post(&live, "/v1/ingest", &note(*n));
        assert!(status == 202 || (status == 503 && answer["error"]["code"] == "log_unavailable"), "{status} {answer}");
        taken += usize::from(status == 202);
        status == 503
    });
    assert!(refused.is_some(), "a full disk takes no posts");
    let source = live.get("/v1/overview")["sources"].to_string();
    assert!(source.contains("hint") || source.contains("space"), "the page says why: {source}");
    std::fs::remove_file(&filler).unwrap();
    for n in taken..taken + 5 {
        live.until("there is room again", |l| post(l, "/v1/ingest", &note(n)).0 == 202);
    }
    live.until("all that were taken are counted, once", |l| mentions(l, "NVDA") == taken as u64 + 5);
    live.kill();
    let live = Live::start(&context, &["--data", &data]);
    assert_eq!(mentions(&live, "NVDA"), taken as u64 + 5);
}

#[test]
fn page_and_api_need_the_keys_of_the_service_and_bodies_are_bounded() {
    let Some(context) = context() else { return };
    let context = context.env("CASHTAG_API_KEY", "a-key-of-sixteen-or-more");
    let live = Live::start(&context, &[]);
    let config = ureq::Agent::config_builder().proxy(None).http_status_as_error(false).build();
    let agent = ureq::Agent::new_with_config(config);
    let status = |path: &str, key: Option<&str>| {
        let request = agent.get(&format!("{}{path}", live.url));
        let request = match key {
            Some(key) => request.header("authorization", &format!("Bearer {key}")),
            None => request,
        };
        request.call().unwrap().status().as_u16()
    };
    for path in
        ["/v1/overview", "/v1/signals", "/v1/posts", "/v1/dead-letters", "/v1/stream", "/metrics", "/widgets.json"]
    {
        assert_eq!((status(path, None), status(path, Some("another-key-of-sixteen"))), (401, 401), "{path}");
    }
    assert_eq!(status("/v1/overview", Some("a-key-of-sixteen-or-more")), 200);
    assert_eq!((status("/", None), status("/health", None)), (200, 200));
    assert_eq!(post(&live, "/v1/ingest", &note(0)).0, 401);
    let endless = agent
        .post(&format!("{}/v1/ingest", live.url))
        .header("authorization", "Bearer a-key-of-sixteen-or-more")
        .send(&"x".repeat(3 << 20))
        .unwrap();
    assert_eq!(endless.status().as_u16(), 413);
}

#[test]
fn lines_of_standard_input_are_posts() {
    let Some(context) = context() else { return };
    let mut child = context
        .command(&["live", "--stdin", "--no-http", "--exit-when-done"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), (day(40) + "no post\n").as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let said = context.shown(&output);
    assert!(said.starts_with("exit code 0") && said.contains("stdin: 40 posts, done"), "{said}");
    let said = context.run(&["live", "export", "--out", "parquet"]);
    assert!(said.contains("40 posts"), "{said}");
}
