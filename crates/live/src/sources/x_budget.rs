//! Posts of X cost money: how many came today, across restarts, and how many may.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};

use crate::time::{self, DAY, Millis};

/// Posts after which the count is written: what a kill at the wrong moment forgets at most.
const WRITE_EACH: u64 = 20;

#[derive(Debug)]
pub(super) struct Budget {
    path: PathBuf,
    limit: Option<u64>,
    date: String,
    posts: u64,
    written: u64,
}

impl Budget {
    pub(super) fn open(path: &Path, limit: Option<u64>) -> Self {
        let saved: Value = std::fs::read(path).ok().and_then(|b| serde_json::from_slice(&b).ok()).unwrap_or_default();
        let date = time::date(time::now());
        let posts = if saved["date"] == *date { saved["posts"].as_u64().unwrap_or(0) } else { 0 };
        Self { path: path.to_owned(), limit, date, posts, written: posts }
    }

    /// Counts posts that were read.
    pub(super) fn spend(&mut self, posts: u64) {
        self.roll(time::now());
        self.posts += posts;
        if self.posts >= self.written + WRITE_EACH || self.left() == Some(0) {
            self.save();
        }
    }

    /// Posts that may still be read today.
    pub(super) fn left(&self) -> Option<u64> {
        Some(self.limit?.saturating_sub(self.posts))
    }

    /// How long to wait if nothing is left.
    pub(super) fn wait(&mut self, now: Millis) -> Option<Duration> {
        self.roll(now);
        (self.left() == Some(0)).then(|| Duration::from_millis((DAY - now.rem_euclid(DAY)) as u64))
    }

    pub(super) fn spent(&self) -> u64 {
        self.posts
    }

    pub(super) fn save(&mut self) {
        let text = json!({"date": self.date, "posts": self.posts}).to_string();
        // A count that cannot be written is counted on in memory.
        if cashtag_corpus::formats::write_atomically(&self.path, text.as_bytes()).is_ok() {
            self.written = self.posts;
        }
    }

    fn roll(&mut self, now: Millis) {
        let today = time::date(now);
        if today != self.date {
            self.date = today;
            self.posts = 0;
            self.written = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counted_across_restarts_until_midnight() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("budget.json");
        let mut budget = Budget::open(&path, Some(50));
        budget.spend(30);
        let mut again = Budget::open(&path, Some(50));
        assert_eq!((again.spent(), again.left(), again.wait(time::now())), (30, Some(20), None));
        again.spend(25);
        let wait = again.wait(time::now()).unwrap();
        assert!(wait <= Duration::from_secs(86_400) && Budget::open(&path, Some(50)).left() == Some(0));
        assert_eq!(again.wait(time::now() + DAY), None, "tomorrow");
        assert_eq!(Budget::open(&path, None).left(), None);
    }
}
