//! What the final windows must be, computed from the input alone by the plainest means: nothing of the pipeline is used but
//! the names of windows and scopes.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use cashtag_live::store::Location;
use cashtag_live::windows::Window;
use serde_json::json;

use crate::place::Place;
use crate::rig::{probabilities, sector, symbols};

/// A post of the input.
#[derive(Clone, Debug)]
pub(crate) struct Given {
    pub(crate) id: String,
    pub(crate) author: String,
    pub(crate) time: i64,
    pub(crate) text: String,
}

impl Given {
    pub(crate) fn line(&self) -> String {
        json!({"id": self.id, "author": self.author, "created_at": self.time, "text": self.text}).to_string()
    }
}

/// Posts that differ in everything, in an order that is not quite that of time. Texts are long and all different, and no
/// author is in a hurry, so that each counts in full.
pub(crate) fn stream(count: usize, seed: u64) -> Vec<Given> {
    let mut state = seed | 1;
    let mut next = move |n: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % n
    };
    let start = 1_764_320_400_000 + (seed % 1_000) as i64 * 60_000;
    (0..count)
        .map(|i| {
            let names = ["AAA", "BBB", "CCC", "XXX", "YYY"];
            let (first, second) = (names[next(5) as usize], names[next(5) as usize]);
            let mood = ["up", "down", "sideways"][next(3) as usize];
            let text =
                format!("${first} and ${second} number {i} go {mood} after a long note about seed {seed} of the day");
            let time = start + i as i64 * 700 + next(4_000) as i64;
            Given { id: format!("{seed}-{i}"), author: format!("author {seed} {}", i % 997), time, text }
        })
        .collect()
}

pub(crate) type Key = (&'static str, &'static str, String, i64);

#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Want {
    mentions: u64,
    positive: u64,
    negative: u64,
    authors: u64,
    score: Option<f64>,
}

impl Want {
    pub(crate) fn mentions(&self) -> u64 {
        self.mentions
    }
}

/// Every window of every key. Each post counts once however often it is given.
pub(crate) fn expect(posts: &[Given]) -> BTreeMap<Key, Want> {
    let mut sums: BTreeMap<Key, (Want, BTreeSet<&str>, f64)> = BTreeMap::new();
    let mut seen = BTreeSet::new();
    for post in posts.iter().filter(|p| seen.insert(&p.id)) {
        let p = probabilities(&post.text);
        let mut keys: BTreeSet<(&str, String)> = BTreeSet::from([("market", "market".to_string())]);
        for mention in symbols(&post.text) {
            keys.insert(("sector", sector(&mention.symbol).to_string()));
            keys.insert(("ticker", mention.symbol));
        }
        for (name, size) in [("1m", 60_000), ("5m", 300_000), ("1h", 3_600_000), ("1d", 86_400_000)] {
            for (scope, key) in &keys {
                let (want, authors, sum) = sums.entry((name, scope, key.clone(), post.time / size * size)).or_default();
                want.mentions += 1;
                want.positive += u64::from(p[0] > 0.5);
                want.negative += u64::from(p[2] > 0.5);
                *sum += f64::from(p[0]) - f64::from(p[2]);
                authors.insert(&post.author);
            }
        }
    }
    let finish = |(mut want, authors, sum): (Want, BTreeSet<&str>, f64)| {
        want.authors = authors.len() as u64;
        want.score = (want.mentions >= 5 && want.authors >= 3).then(|| sum / want.mentions as f64);
        want
    };
    sums.into_iter().map(|(key, sums)| (key, finish(sums))).collect()
}

/// What the store has, in the same form; every window must be closed.
pub(crate) fn found(data: &impl At) -> BTreeMap<Key, Want> {
    read(data, true)
}

pub(crate) fn found_unchecked(data: &impl At) -> BTreeMap<Key, Want> {
    read(data, false)
}

/// A data directory with its SQLite, or any store.
pub(crate) trait At {
    fn location(&self) -> Location;
}

impl<P: AsRef<Path>> At for P {
    fn location(&self) -> Location {
        Location::Sqlite(self.as_ref().to_owned())
    }
}

impl At for Place {
    fn location(&self) -> Location {
        self.location.clone()
    }
}

fn read(data: &impl At, closed: bool) -> BTreeMap<Key, Want> {
    let reader = data.location().reader().unwrap();
    let mut all = BTreeMap::new();
    for (scope, key) in reader.series().unwrap() {
        for window in Window::ALL {
            for signal in reader.history(scope, &key, window, (i64::MIN, i64::MAX), usize::MAX >> 1).unwrap() {
                let v = &signal.values;
                let want = Want {
                    mentions: v.mentions,
                    positive: v.positive_count,
                    negative: v.negative_count,
                    authors: v.unique_authors,
                    score: v.sentiment_score,
                };
                assert!(!closed || signal.revision > 0, "{key} {} {} is not closed", window.name(), signal.start);
                all.insert((window.name(), scope.name(), key.clone(), signal.start), want);
            }
        }
    }
    all
}

#[track_caller]
pub(crate) fn assert_same(data: &impl At, posts: &[Given]) {
    compare(&found(data), &expect(posts));
}

#[track_caller]
pub(crate) fn compare(found: &BTreeMap<Key, Want>, want: &BTreeMap<Key, Want>) {
    assert_eq!(found.keys().collect::<Vec<_>>(), want.keys().collect::<Vec<_>>(), "windows");
    for (key, want) in want {
        let found = &found[key];
        let close = match (found.score, want.score) {
            (Some(a), Some(b)) => (a - b).abs() < 1e-6,
            (a, b) => a.is_none() && b.is_none(),
        };
        // Above 1,024 authors are estimated, by 1.6 % (one standard error).
        let authors = if want.authors > 1024 {
            want.authors.abs_diff(found.authors) * 20 <= want.authors
        } else {
            want.authors == found.authors
        };
        assert!(
            close && authors && Want { score: want.score, authors: want.authors, ..found.clone() } == *want,
            "{key:?}: found {found:?}, expected {want:?}"
        );
    }
}

pub(crate) fn lines(posts: &[Given]) -> String {
    posts.iter().map(|p| p.line() + "\n").collect()
}
