//! `cashtag live` with the real model: a file in, signals out, and a kill in between.

use std::io::{BufRead, BufReader};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::context::Context;
use crate::model_commands::context;

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
