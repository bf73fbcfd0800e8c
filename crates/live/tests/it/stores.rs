//! What a store promises, on both.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use cashtag_live::post::{Post, ScoredPost};
use cashtag_live::scorer::Scorer;
use cashtag_live::store::location::Opening;
use cashtag_live::store::{Alert, Batch, Checkpoint, DeadLetter, PostFilter, Reader, SourceState, Store, StoreOptions};
use cashtag_live::tickers::TickerMention;
use cashtag_live::time::DAY;
use cashtag_live::windows::{Scope, Signal, Values, Window};
use serde_json::json;

use crate::place::{Place, on_both};
use crate::rig::Pure;

on_both!(
    a_batch_is_there_as_a_whole_and_once,
    one_post_that_is_there_already_keeps_no_other_out,
    a_restart_finds_what_it_needs,
    hostile_texts_come_back_as_they_were,
    forgetting_takes_what_is_old_and_nothing_else,
    alerts_wait_for_their_webhook,
    dead_letters_are_counted_and_bounded,
);

fn open(place: &Place) -> Box<dyn Store> {
    let model = Pure::default().info();
    let opening = Opening {
        model: &model,
        options: StoreOptions { webhook: true, ..StoreOptions::default() },
        log: "this log".into(),
        stop: &AtomicBool::new(false),
        waiting: &|why| panic!("it waits: {why}"),
    };
    std::fs::create_dir_all(&place.data).unwrap();
    place.location.open(&opening).unwrap()
}

fn reader(place: &Place) -> Box<dyn Reader> {
    place.location.reader().unwrap()
}

pub(crate) fn post(seq: u64, text: &str) -> ScoredPost {
    let time = 1_764_320_400_000 + seq as i64;
    ScoredPost {
        seq,
        post: Post {
            source: "test".into(),
            id: format!("id {seq}"),
            author: "00112233aabbccdd".into(),
            event_time: time,
            received_at: time + 1,
            text: text.into(),
            url: seq.is_multiple_of(2).then(|| "https://example.org/1".into()),
            copy_of: None,
            cursor: None,
        },
        scored_at: time + 2,
        available_at: 0,
        tickers: vec![TickerMention { symbol: "AAA".into(), start: 0, end: 4 }],
        sectors: vec!["technology".into()],
        probabilities: vec![0.1, 0.2, 0.7],
        label: 2,
        score: -0.600_000_000_000_000_1,
        weight: 0.2,
        is_copy_of: seq.is_multiple_of(3).then(|| "id 0".into()),
        damped: seq % 2 == 1,
        too_late: false,
    }
}

fn signal(key: &str, window: Window, start: i64, revision: u32, mentions: u64) -> Arc<Signal> {
    let values = Values {
        mentions,
        sentiment_score: Some(0.1 + 0.2),
        ci_low: None,
        top_posts: vec!["id 1".into(), "a \"b\" \\ c".into()],
        ..Values::default()
    };
    Arc::new(Signal {
        key: key.into(),
        scope: Scope::Ticker,
        name: Some(format!("{key} Corporation")),
        window,
        start,
        end: start + window.size(),
        is_final: false,
        revision,
        values,
        sparkline: Vec::new(),
    })
}

fn batch(posts: Vec<ScoredPost>, signals: Vec<Arc<Signal>>, seq: u64) -> Batch {
    let fingerprints = posts.iter().map(|p| u64::MAX - p.seq).collect();
    let checkpoint = Checkpoint { seq, watermark: -5, latest: 7, sources: BTreeMap::new() };
    Batch { posts, fingerprints, signals, checkpoint, available_at: 99, ..Batch::default() }
}

fn alert(n: i64) -> Alert {
    Alert {
        at: n,
        rule: "mentions > 1".into(),
        key: "AAA".into(),
        window: Window::M5,
        start: n,
        values: json!({"mentions": 2}),
        text: "AAA: mentions 2".into(),
    }
}

fn a_batch_is_there_as_a_whole_and_once(place: &Place) {
    let mut store = open(place);
    let posts: Vec<ScoredPost> = (0..10).map(|n| post(n, &format!("$AAA {n}"))).collect();
    // The same window in two states: the last one counts, and each revision of a closed one is kept.
    let signals = vec![
        signal("AAA", Window::D1, 0, 0, 1),
        signal("AAA", Window::M1, 60_000, 0, 1),
        signal("AAA", Window::M1, 60_000, 1, 2),
        signal("AAA", Window::M1, 60_000, 2, 3),
        signal("BBB", Window::M1, -60_000, 1, 4),
    ];
    let mut first = batch(posts.clone(), signals, 10);
    let mut seen = Vec::new();
    for round in 0..2 {
        first.available_at = 99;
        store.commit(&first).unwrap();
        let reader = reader(place);
        let all = PostFilter { limit: 100, ..PostFilter::default() };
        let ticker = PostFilter { ticker: Some("AAA".into()), before: Some(5), limit: 3, ..PostFilter::default() };
        let sector = PostFilter { sector: Some("technology".into()), limit: 100, ..PostFilter::default() };
        let none = PostFilter { ticker: Some("A\0A".into()), limit: 3, ..PostFilter::default() };
        assert_eq!(reader.posts(&none).unwrap(), Vec::<serde_json::Value>::new());
        let few: Vec<u64> = reader.posts(&ticker).unwrap().iter().map(|p| p["seq"].as_u64().unwrap()).collect();
        assert_eq!(few, [4, 3, 2]);
        let history = reader.history(Scope::Ticker, "AAA", Window::M1, (0, i64::MAX), 10).unwrap();
        assert_eq!(
            (history.len(), history[0].revision, &history[0].values),
            (1, 2, &signal("AAA", Window::M1, 60_000, 2, 3).values)
        );
        assert_eq!(history[0].name.as_deref(), Some("AAA Corporation"));
        assert!(reader.history(Scope::Ticker, "AAA", Window::M1, (60_001, i64::MAX), 10).unwrap().is_empty());
        let bars = reader.bars_of_day(Window::M1, 0, None, 10).unwrap();
        assert_eq!(
            bars.iter().map(|b| (b.revision, b.values.mentions, b.available_at)).collect::<Vec<_>>(),
            [(1, 2, 99), (2, 3, 99)]
        );
        let rest = reader.bars_of_day(Window::M1, 0, Some(&bars[0]), 10).unwrap();
        assert_eq!(rest, bars[1..]);
        // A day before 1970 is a day.
        assert_eq!(reader.bar_days(Window::M1, i64::MIN).unwrap(), [-DAY, 0]);
        assert_eq!(reader.bar_days(Window::M1, 0).unwrap(), [0]);
        let day = Window::D1.start(posts[0].post.event_time);
        assert_eq!(reader.post_days(i64::MIN).unwrap(), [day]);
        let stored = reader.posts_of_day(day, 3, 4).unwrap();
        let want: Vec<ScoredPost> = posts[4..8].iter().map(|p| ScoredPost { available_at: 99, ..p.clone() }).collect();
        assert_eq!(stored.into_iter().map(|s| s.post).collect::<Vec<_>>(), want);
        let shown = (
            reader.posts(&all).unwrap(),
            reader.posts(&sector).unwrap(),
            reader.series().unwrap(),
            reader.post_count().unwrap(),
            reader.models().unwrap().len(),
        );
        assert_eq!((shown.3, shown.4, &shown.2), (10, 1, &vec![(Scope::Ticker, "AAA".to_owned())]));
        seen.push(shown);
        // Again, with other numbers in the log: the first ones stay.
        for p in &mut first.posts {
            p.seq += 100 * (round + 1);
        }
    }
    assert!(seen[0] == seen[1], "{seen:#?}");
    let identities: Vec<u128> = posts.iter().map(|p| p.post.identity()).collect();
    let asked: Vec<u128> = identities.iter().copied().chain([1, 2]).collect();
    let known: HashSet<u128> = identities.into_iter().collect();
    assert_eq!(store.known(&asked).unwrap(), known);
    let version = Pure::default().info().version();
    assert_eq!(reader(place).known(&asked, &version).unwrap(), known);
    assert!(reader(place).known(&asked, "another").unwrap().is_empty());
}

fn one_post_that_is_there_already_keeps_no_other_out(place: &Place) {
    let mut store = open(place);
    store.commit(&batch(vec![post(2, "$AAA first")], Vec::new(), 3)).unwrap();
    // More than one statement takes, one of them known by its number, one by its id; and one with the same ticker twice.
    let mut many: Vec<ScoredPost> = (10..6_010).map(|n| post(n, "$AAA later")).collect();
    many[2_500].seq = 2;
    many[5_700].post.id = "id 2".into();
    let twice = many[0].tickers[0].clone();
    many[0].tickers.push(twice);
    store.commit(&batch(many, Vec::new(), 6_010)).unwrap();
    let reader = reader(place);
    assert_eq!(reader.post_count().unwrap(), 5_999);
    let filter =
        |before| PostFilter { ticker: Some("AAA".into()), before: Some(before), limit: 2, ..PostFilter::default() };
    for (before, want) in [(11, [10, 2]), (2_511, [2_509, 2_508]), (5_711, [5_709, 5_708]), (9_999, [6_009, 6_008])] {
        let found: Vec<u64> =
            reader.posts(&filter(before)).unwrap().iter().map(|p| p["seq"].as_u64().unwrap()).collect();
        assert_eq!(found, want, "before {before}");
    }
    let first = &reader.posts(&filter(3)).unwrap()[0];
    assert_eq!((first["id"].as_str(), first["text"].as_str()), (Some("id 2"), Some("$AAA first")));
    // The next one goes the short way again.
    store.commit(&batch(vec![post(7_000, "$AAA last")], Vec::new(), 7_001)).unwrap();
    assert_eq!(reader.post_count().unwrap(), 6_000);
}

fn a_restart_finds_what_it_needs(place: &Place) {
    let mut store = open(place);
    assert_eq!(store.checkpoint().unwrap(), None);
    let mut first = batch(vec![post(3, "late"), post(1, "early")], Vec::new(), 4);
    let state = |cursor: Option<&str>, newest| SourceState { cursor: cursor.map(str::to_owned), newest };
    first.checkpoint.sources =
        BTreeMap::from([("a".into(), state(Some("12"), None)), ("b".into(), state(None, Some(-3)))]);
    first.signals = vec![
        signal("AAA", Window::D1, 0, 1, 1),
        signal("BBB", Window::D1, 400 * DAY, 0, 2),
        signal("BBB", Window::M1, 400 * DAY, 0, 2),
        signal("BBB", Window::M1, 400 * DAY - 60_000, 1, 3),
        signal("BBB", Window::M1, 0, 1, 4),
    ];
    store.commit(&first).unwrap();
    drop(store);
    let mut store = open(place);
    assert_eq!(store.checkpoint().unwrap().as_ref(), Some(&first.checkpoint));
    let mut found = Vec::new();
    store.posts_since(i64::MIN, &mut |post, fingerprint| found.push((post, fingerprint))).unwrap();
    assert_eq!(found.iter().map(|(p, f)| (p.seq, u64::MAX - f)).collect::<Vec<_>>(), [(1, 1), (3, 3)]);
    assert_eq!(found[0].0, ScoredPost { available_at: 99, ..post(1, "early") });
    let mut later = 0;
    store.posts_since(found[1].0.post.event_time, &mut |_, _| later += 1).unwrap();
    assert_eq!(later, 1);
    // Of each series the newest window however old, and what lies within reach; older ones first.
    let mut signals = Vec::new();
    store.recent_signals(400 * DAY, &mut |s| signals.push((s.key.to_string(), s.window, s.start))).unwrap();
    signals.sort_by_key(|(key, window, _)| (key.clone(), *window as u8));
    assert_eq!(
        signals,
        [
            ("AAA".to_owned(), Window::D1, 0),
            ("BBB".to_owned(), Window::M1, 400 * DAY - 60_000),
            ("BBB".to_owned(), Window::M1, 400 * DAY),
            ("BBB".to_owned(), Window::D1, 400 * DAY)
        ]
    );
}

fn hostile_texts_come_back_as_they_were(place: &Place) {
    let mut store = open(place);
    let long = "\u{1F680}".repeat(25_000);
    let texts = [
        "'; DROP TABLE posts; --",
        "\\N\t\\.\n{\"a\": [NULL]}",
        "\u{202e}\u{feff}\u{10ffff} é",
        &*long,
        "$1 $2 %s \u{1}",
    ];
    let mut posts: Vec<ScoredPost> = texts.iter().enumerate().map(|(n, text)| post(n as u64, text)).collect();
    posts[1].post.id = "'\"\\ \u{1F680}".into();
    posts[1].tickers[0].symbol = "A'\"\\".into();
    store.commit(&batch(posts, vec![signal("A'\"\\{},", Window::D1, 0, 1, 1)], 5)).unwrap();
    let reader = reader(place);
    let found = reader.posts(&PostFilter { limit: 10, ..PostFilter::default() }).unwrap();
    let found: Vec<&str> = found.iter().rev().map(|p| p["text"].as_str().unwrap()).collect();
    assert_eq!(found, texts);
    let one = PostFilter { ticker: Some("A'\"\\".into()), limit: 10, ..PostFilter::default() };
    assert_eq!(reader.posts(&one).unwrap()[0]["id"], "'\"\\ \u{1F680}");
    assert_eq!(reader.history(Scope::Ticker, "A'\"\\{},", Window::D1, (0, 1), 1).unwrap().len(), 1);
}

fn forgetting_takes_what_is_old_and_nothing_else(place: &Place) {
    let mut store = open(place);
    let posts: Vec<ScoredPost> = (0..12_000).map(|n| post(n, "$AAA")).collect();
    let cutoff = posts[11_000].post.received_at;
    let mut all = batch(posts, Vec::new(), 12_000);
    let windows = [(0, 10), (60_000, 10), (cutoff + 60_000, 10), (120_000, cutoff + 1)];
    for (start, available_at) in windows {
        let mut one =
            batch(Vec::new(), vec![signal("AAA", Window::D1, 0, 0, 1), signal("AAA", Window::M1, start, 1, 1)], 0);
        one.available_at = available_at;
        store.commit(&one).unwrap();
    }
    all.alerts = vec![alert(1), alert(cutoff)];
    let letter = |at| DeadLetter { at, ..DeadLetter::new("test", "why", "raw") };
    all.dead_letters = vec![letter(1), letter(cutoff)];
    all.available_at = cutoff;
    store.commit(&all).unwrap();
    let mut rounds = 0;
    // A limit of no time: it does a piece, and says that there is more.
    while !store.forget(cutoff, Duration::ZERO).unwrap() {
        rounds += 1;
        assert!(rounds < 100);
    }
    assert!(rounds > 0);
    let reader = reader(place);
    assert_eq!(reader.post_count().unwrap(), 1_000);
    let keyed = PostFilter { ticker: Some("AAA".into()), limit: 20_000, ..PostFilter::default() };
    assert_eq!(reader.posts(&keyed).unwrap().len(), 1_000);
    let starts: Vec<i64> = reader
        .history(Scope::Ticker, "AAA", Window::M1, (i64::MIN, i64::MAX), 100)
        .unwrap()
        .iter()
        .map(|s| s.start)
        .collect();
    assert_eq!(starts, [120_000, cutoff + 60_000], "what changed lately is not old");
    assert_eq!((reader.alerts(9).unwrap().len(), reader.dead_letters(9).unwrap().len()), (1, 1));
    assert_eq!(reader.dead_letter_count().unwrap(), 2, "how many there ever were");
    assert!(store.forget(cutoff, Duration::ZERO).unwrap(), "nothing is left to do");
}

fn alerts_wait_for_their_webhook(place: &Place) {
    let mut store = open(place);
    let with = |alerts| Batch { alerts, ..batch(Vec::new(), Vec::new(), 0) };
    store.commit(&with(vec![alert(1), alert(2), alert(1)])).unwrap();
    store.commit(&with(vec![alert(2), alert(3)])).unwrap();
    let reader = reader(place);
    let waiting = reader.undelivered(10).unwrap();
    assert_eq!(waiting.iter().map(|(_, a)| a.clone()).collect::<Vec<_>>(), [alert(1), alert(2), alert(3)]);
    store.delivered(&[waiting[0].0, waiting[2].0]).unwrap();
    let rest = reader.undelivered(10).unwrap();
    assert_eq!(rest.iter().map(|(_, a)| a.at).collect::<Vec<_>>(), [2]);
    let shown: Vec<_> = reader.alerts(2).unwrap().iter().map(|a| a["start"].clone()).collect();
    assert_eq!(shown, ["1970-01-01T00:00:00.003Z", "1970-01-01T00:00:00.002Z"]);
}

fn dead_letters_are_counted_and_bounded(place: &Place) {
    let mut store = open(place);
    for round in 0..3 {
        let letters = (0..4_000).map(|n| DeadLetter::new("test", format!("{round} {n}"), "a\0b")).collect();
        store.commit(&Batch { dead_letters: letters, ..batch(Vec::new(), Vec::new(), 0) }).unwrap();
    }
    let reader = reader(place);
    let kept = reader.dead_letters(20_000).unwrap();
    assert_eq!((kept.len(), reader.dead_letter_count().unwrap()), (10_000, 12_000));
    assert_eq!((&kept[0]["reason"], &kept[0]["raw"]), (&json!("2 3999"), &json!("a\u{fffd}b")));
}
