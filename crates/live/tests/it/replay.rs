//! Files in, windows out.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use arrow_array::{ArrayRef, RecordBatch, StringArray, TimestampMillisecondArray};

use cashtag_live::sources::Source;
use cashtag_live::sources::file::{Replay, Speed};
use cashtag_live::store::PostFilter;
use cashtag_live::windows::{Scope, Window};
use parquet::arrow::ArrowWriter;

use crate::oracle::{Given, assert_same, lines, stream};
use crate::place::{Place, on_both};
use crate::rig::{options, run_to_end, write};

fn replay(path: std::path::PathBuf) -> Vec<Box<dyn Source>> {
    vec![Box::new(Replay::file(path, Speed::Fastest))]
}

on_both!(
    windows_of_a_file_are_what_the_file_says,
    a_file_that_grew_goes_on_behind_what_was_read,
    lines_that_are_none_become_dead_letters_and_the_rest_counts,
    what_is_later_than_ten_minutes_is_kept_and_marked,
);

fn windows_of_a_file_are_what_the_file_says(place: &Place) {
    let posts = stream(3_000, 1);
    let path = write(place.dir.path(), "day.jsonl", &lines(&posts));
    run_to_end(place.options(), replay(path.clone())).unwrap();
    assert_same(place, &posts);
    // The same again, and the same file under another name: nothing is counted twice, and other ids are other posts.
    run_to_end(place.options(), replay(path)).unwrap();
    assert_same(place, &posts);
}

fn a_file_that_grew_goes_on_behind_what_was_read(place: &Place) {
    let posts = stream(2_000, 2);
    for part in [500, 501, 2_000] {
        let path = write(place.dir.path(), "grows.jsonl", &lines(&posts[..part]));
        let summary = run_to_end(place.options(), replay(path)).unwrap();
        assert!(summary.sources["grows"].posts_total <= 1_499);
    }
    assert_same(place, &posts);
}

#[test]
fn csv_and_parquet_are_read_like_json() {
    let dir = tempfile::tempdir().unwrap();
    let posts = stream(300, 3);
    let mut csv = String::from("Tweet ID,User,Date,Text\n");
    for p in &posts {
        csv += &format!("{},{},{},\"{}\"\n", p.id, p.author, p.time, p.text);
    }
    let data = dir.path().join("data");
    run_to_end(options(&data), replay(write(dir.path(), "day.csv", &csv))).unwrap();
    assert_same(&data, &posts);
    // Times as Parquet has them, and as text.
    let text = |of: fn(&Given) -> String| -> ArrayRef { Arc::new(StringArray::from_iter_values(posts.iter().map(of))) };
    let times = TimestampMillisecondArray::from_iter_values(posts.iter().map(|p| p.time)).with_timezone("UTC");
    for (name, time) in [("day", Arc::new(times) as ArrayRef), ("texts", text(|p| cashtag_live::time::rfc3339(p.time)))]
    {
        let batch = RecordBatch::try_from_iter([
            ("id", text(|p| p.id.clone())),
            ("author", text(|p| p.author.clone())),
            ("created_at", time),
            ("text", text(|p| p.text.clone())),
        ])
        .unwrap();
        let path = dir.path().join(format!("{name}.parquet"));
        let mut writer = ArrowWriter::try_new(std::fs::File::create(&path).unwrap(), batch.schema(), None).unwrap();
        writer.write(&batch).unwrap();
        writer.close().unwrap();
        let data = dir.path().join(name);
        run_to_end(options(&data), replay(path)).unwrap();
        assert_same(&data, &posts);
    }
}

fn lines_that_are_none_become_dead_letters_and_the_rest_counts(place: &Place) {
    let posts = stream(50, 4);
    let mut text = lines(&posts[..25]);
    text += "{\"id\": 1, \"text\": \n\n[]\n{\"id\": 2}\n{\"text\": \"$AAA x\", \"created_at\": \"soon\"}\n\u{0}\n";
    text += &format!("{{\"text\": \"{}\"}}\n", "x".repeat(2 << 20));
    text += &lines(&posts[25..]);
    // What the model cannot take is set aside, alone.
    text += "{\"id\": \"bad\", \"author\": \"z\", \"created_at\": 1764320400000, \"text\": \"$AAA poison\"}\n";
    run_to_end(place.options(), replay(write(place.dir.path(), "day.jsonl", &text))).unwrap();
    assert_same(place, &posts);
    let letters = place.location.reader().unwrap().dead_letters(100).unwrap();
    let reasons: Vec<&str> = letters.iter().rev().map(|l| l["reason"].as_str().unwrap()).collect();
    assert_eq!(reasons.len(), 7, "{reasons:#?}");
    for (number, what) in
        [(26, "EOF"), (28, "invalid type"), (29, "no text"), (30, "no time"), (31, ""), (32, "longer than")]
    {
        let place = format!("day.jsonl:{number}: ");
        assert!(reasons.iter().any(|r| r.contains(&place) && r.contains(what)), "{place}{what} in {reasons:#?}");
    }
    assert!(reasons.iter().any(|r| r.contains("tastes bad")));
    assert!(letters.iter().all(|l| l["raw"].as_str().unwrap().chars().count() <= 500));
}

/// With what is allowed unless one says otherwise: ten minutes after a window's end, ten seconds of disorder.
fn what_is_later_than_ten_minutes_is_kept_and_marked(place: &Place) {
    const MINUTE: i64 = 60_000;
    let start = 1_764_320_400_000; // of an hour
    let given = |id: &str, minute: i64| Given {
        id: id.to_owned(),
        author: format!("author of {id}"),
        time: start + minute * MINUTE,
        text: format!("$AAA goes up, says note {id}, which is nobody's copy"),
    };
    let mut posts: Vec<Given> = (0..30).map(|m| given(&format!("in time {m}"), m)).collect();
    posts.extend([given("late", 18), given("too late for its minute", 17), given("and its five", 1)]);
    let path = write(place.dir.path(), "day.jsonl", &lines(&posts));
    let summary = run_to_end(place.options(), replay(path)).unwrap();
    assert_eq!(summary.shared.counters.too_late.load(Ordering::Relaxed), 2);
    let reader = place.location.reader().unwrap();
    let kept = reader.posts(&PostFilter { limit: 100, ..PostFilter::default() }).unwrap();
    assert_eq!(kept.len(), 33);
    let mut marked: Vec<&str> =
        kept.iter().filter(|p| p["too_late"] == true).map(|p| p["id"].as_str().unwrap()).collect();
    marked.sort_unstable();
    assert_eq!(marked, ["and its five", "too late for its minute"]);
    for (window, minute, mentions) in [
        (Window::M1, 18, 2),
        (Window::M1, 17, 1),
        (Window::M1, 1, 1),
        (Window::M5, 15, 7),
        (Window::M5, 0, 5),
        (Window::H1, 0, 33),
    ] {
        let at = start + minute * MINUTE;
        let found = reader.history(Scope::Ticker, "AAA", window, (at, at + 1), 9).unwrap();
        let found: Vec<_> = found.iter().map(|s| (s.start, s.values.mentions)).collect();
        assert_eq!(found, [(at, mentions)], "{} of minute {minute}", window.name());
    }
}

#[test]
fn a_replay_keeps_time() {
    let dir = tempfile::tempdir().unwrap();
    // 21 posts over 21 seconds: at 20 times the speed a second, and a little.
    let mut posts = stream(30, 5);
    posts.sort_by_key(|p| p.time);
    let span = (posts[29].time - posts[0].time) as f64 / 20_000.0;
    let path = write(dir.path(), "day.jsonl", &lines(&posts));
    let began = Instant::now();
    let data = dir.path().join("data");
    run_to_end(options(&data), vec![Box::new(Replay::file(path, Speed::Times(20.0)))]).unwrap();
    let took = began.elapsed().as_secs_f64();
    assert!(took > span && took < span + 5.0, "{took} s for {span} s");
    assert_same(&data, &posts);
}

/// The figure of docs/live.md: from file to closed windows, the model being a pure function. Printed, and asserted only with
/// CASHTAG_LIVE_BENCH, because other tests run beside it.
#[test]
fn throughput_without_the_model() {
    let bench = std::env::var_os("CASHTAG_LIVE_BENCH").is_some();
    let count = if bench { 400_000 } else { 20_000 };
    let dir = tempfile::tempdir().unwrap();
    let posts = stream(count, 6);
    let path = write(dir.path(), "day.jsonl", &lines(&posts));
    let data = dir.path().join("data");
    let began = Instant::now();
    let summary = run_to_end(options(&data), replay(path)).unwrap();
    let rate = count as f64 / began.elapsed().as_secs_f64();
    println!("{rate:.0} posts/s from a file to closed windows, the model being a pure function ({count} posts)");
    assert_eq!(summary.shared.counters.scored.load(Ordering::Relaxed), count as u64);
    assert!(!bench || rate > 20_000.0, "{rate}");
}
