//! The page on the real server under the load of docs/live.md: 500 tickers, 100 posts a second.

#[path = "../../../cashtag/tests/it/page.rs"]
mod chromium;

use serde_json::json;

use crate::rig::{Rig, listening};
use crate::soak::{Hose, ticker};

#[test]
fn the_page_stays_smooth_with_500_tickers_and_100_posts_a_second() {
    let dir = tempfile::tempdir().unwrap();
    let hose = Hose { rate: Some(100.0), tickers: 500 };
    let rig = Rig::start(listening(&dir.path().join("data")), vec![Box::new(hose)]);
    let page = rig.ask("GET", "/", None).1;
    if !page.as_str().is_some_and(|p| p.contains("/assets/main-")) {
        println!("skipped: the page is not in this build (make web)");
        return;
    }
    // Each ticker once at the start: at 100 posts a second it would take a quarter of a minute until all had come.
    let first = |n: usize| {
        let text = format!("${} goes up, says a note of its own", ticker(n * 17_576 / 500));
        json!({"id": format!("first {n}"), "author": format!("first {n}"), "text": text}).to_string()
    };
    rig.post("/v1/ingest", &(0..500).map(first).collect::<Vec<_>>().join("\n"));
    rig.until("most tickers were written about", |r| {
        r.get("/v1/signals?window=5m&limit=1")["count"].as_u64().is_some_and(|n| n > 450)
    });
    // Without a browser nobody stays for the load to come.
    if chromium::try_in_chromium(&rig.url, "frames") {
        assert!(rig.scored() > 1_000, "the load was there");
    }
}
