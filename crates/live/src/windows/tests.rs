use super::*;
use crate::post::Post;
use crate::tickers::TickerMention;

pub(crate) struct NoNames;

impl Tickers for NoNames {
    fn find(&self, _: &str) -> Vec<TickerMention> {
        Vec::new()
    }
    fn sector(&self, _: &str) -> Option<String> {
        None
    }
    fn name(&self, symbol: &str) -> Option<String> {
        Some(format!("{symbol} Inc."))
    }
}

const POLARITY: Polarity = Polarity { positive: 0, negative: 2 };

fn post(seq: u64, time: Millis, symbols: &[&str]) -> ScoredPost {
    let score = (seq % 5) as f64 / 4.0;
    let mention = |s: &&str| TickerMention { symbol: (*s).into(), start: 0, end: 1 };
    ScoredPost {
        seq,
        post: Post {
            source: "s".into(),
            id: seq.to_string(),
            author: format!("{:016x}", seq % 7),
            event_time: time,
            received_at: time,
            text: "x".into(),
            url: None,
            copy_of: None,
            cursor: None,
        },
        scored_at: time,
        available_at: time,
        tickers: symbols.iter().map(mention).collect(),
        sectors: vec!["technology".into()],
        probabilities: vec![score as f32, 1.0 - score as f32, 0.0],
        label: if score > 0.5 { 0 } else { 1 },
        score,
        weight: 1.0,
        is_copy_of: None,
        damped: false,
        too_late: false,
    }
}

fn windows() -> Windows {
    let options = WindowOptions { allowed_lateness: 10 * MINUTE, allowed_disorder: 0, ..Default::default() };
    Windows::new(options, POLARITY)
}

fn feed(windows: &mut Windows, seq: u64, time: Millis, symbols: &[&str]) -> bool {
    let late = windows.add(&post(seq, time, symbols), &NoNames);
    windows.heard("s", time);
    windows.advance();
    late
}

fn find(changes: &[Arc<Signal>], key: &str, window: Window, start: Millis) -> Arc<Signal> {
    let found = changes.iter().find(|s| &*s.key == key && s.window == window && s.start == start);
    found.unwrap_or_else(|| panic!("no {key} {} {start}", window.name())).clone()
}

#[test]
fn a_post_counts_once_for_each_of_its_tickers_its_sector_and_the_market() {
    let mut windows = windows();
    feed(&mut windows, 0, 30 * SECOND, &["AAA", "BBB", "AAA"]);
    let changes = windows.take_changes();
    assert_eq!(changes.len(), 4 * 4);
    for key in ["AAA", "BBB", "technology", MARKET] {
        assert_eq!(find(&changes, key, Window::M1, 0).values.mentions, 1, "{key}");
    }
    assert_eq!(find(&changes, "AAA", Window::D1, 0).name.as_deref(), Some("AAA Inc."));
    assert!(windows.take_changes().is_empty());
}

#[test]
fn windows_open_close_are_corrected_and_become_final() {
    let mut windows = windows();
    feed(&mut windows, 0, 0, &["AAA"]);
    assert_eq!(find(&windows.take_changes(), "AAA", Window::M1, 0).revision, 0);
    feed(&mut windows, 1, MINUTE, &["AAA"]);
    let changes = windows.take_changes();
    assert_eq!(find(&changes, "AAA", Window::M1, 0).revision, 1);
    assert_eq!(find(&changes, "AAA", Window::M1, MINUTE).revision, 0);
    assert_eq!(find(&changes, "AAA", Window::M5, 0).revision, 0);
    // Late, but allowed.
    assert!(!feed(&mut windows, 2, 59_999, &["AAA"]));
    let corrected = find(&windows.take_changes(), "AAA", Window::M1, 0);
    assert_eq!((corrected.revision, corrected.values.mentions, corrected.is_final), (2, 2, false));
    // A ticker that had no window then gets one that is closed at once.
    feed(&mut windows, 3, 1, &["BBB"]);
    assert_eq!(find(&windows.take_changes(), "BBB", Window::M1, 0).revision, 1);
    // Eleven minutes: final for the minute, not for the hour.
    feed(&mut windows, 4, 11 * MINUTE, &["AAA"]);
    windows.take_changes();
    assert!(windows.is_final(Window::M1, 0) && !windows.is_final(Window::M5, 0));
    assert!(feed(&mut windows, 5, 2, &["AAA"]), "too late");
    let changes = windows.take_changes();
    assert!(changes.iter().all(|s| s.window != Window::M1));
    assert_eq!(find(&changes, "AAA", Window::H1, 0).values.mentions, 5);
}

#[test]
fn the_slowest_source_holds_the_watermark_until_it_is_silent() {
    let mut windows = windows();
    windows.heard("slow", 10 * SECOND);
    feed(&mut windows, 0, HOUR, &["AAA"]);
    assert_eq!(windows.watermark(), 10 * SECOND);
    windows.silent("slow");
    windows.advance();
    assert_eq!(windows.watermark(), HOUR);
    windows.heard("slow", 20 * SECOND);
    windows.advance();
    assert_eq!(windows.watermark(), HOUR, "it never goes back");
}

#[test]
fn final_windows_are_forgotten() {
    let mut windows = windows();
    let mut most = 0;
    for i in 0..5_000 {
        feed(&mut windows, i, i as Millis * MINUTE, &["AAA"]);
        windows.take_changes();
        most = most.max(windows.in_memory());
    }
    assert!(most < 3 * (12 + 4 + 3 + 3), "{most}");
}

#[test]
fn strangers_beyond_the_limit_count_for_the_market_only() {
    let options = WindowOptions { max_series: 3, ..Default::default() };
    let mut windows = Windows::new(options, POLARITY);
    for (i, symbol) in ["AAA", "BBB", "CCC", "DDD"].into_iter().enumerate() {
        feed(&mut windows, i as u64, 0, &[symbol]);
    }
    let changes = windows.take_changes();
    assert!(!changes.iter().any(|s| &*s.key == "DDD"));
    assert_eq!(find(&changes, MARKET, Window::D1, 0).values.mentions, 4);
}

#[test]
fn a_restart_in_the_middle_changes_no_number() {
    let stream: Vec<(Millis, &str)> =
        (0..3_000).map(|i| (i * 1_700 + (i * 37 % 90) * SECOND, ["AAA", "BBB", "CCC"][i as usize % 3])).collect();
    let last = |stop: Option<usize>| {
        let mut windows = windows();
        let mut rows: BTreeMap<(Window, Millis, Scope, String), Arc<Signal>> = BTreeMap::new();
        let mut posts = Vec::new();
        for (i, (time, symbol)) in stream.iter().enumerate() {
            let mut p = post(i as u64, *time, &[symbol]);
            p.too_late = windows.add(&p, &NoNames);
            windows.heard("s", *time);
            windows.advance();
            posts.push(p);
            if i % 50 == 49 {
                for s in windows.take_changes() {
                    rows.insert((s.window, s.start, s.scope, s.key.to_string()), s);
                }
            }
            if stop.is_some_and(|stop| i % stop == stop - 1) && i % 50 == 49 {
                let mut again = self::windows();
                again.restore_times(windows.watermark(), windows.latest(), windows.sources().clone());
                let oldest = again.oldest_needed();
                posts.iter().filter(|p| p.post.event_time >= oldest).for_each(|p| again.restore(p, &NoNames));
                rows.values().for_each(|s| again.restore_signal(s));
                windows = again;
            }
        }
        rows
    };
    let want = last(None);
    for stop in [50, 350, 1_000] {
        let found = last(Some(stop));
        assert_eq!(found.len(), want.len());
        for (key, signal) in &want {
            assert_eq!(found[key], *signal, "restarts each {stop} posts");
        }
    }
}
