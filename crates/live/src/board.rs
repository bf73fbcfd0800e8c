//! How the sources are: what the page shows of each, and what the watermark asks of them.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde_json::{Value, json};

use crate::hub::{Hub, Kind};
use crate::time::{self, Millis, rfc3339};

/// How a source stands to time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pace {
    /// Its posts are written now: when it says nothing, time passes all the same.
    Live,
    /// Its posts are from another time, and it ends.
    Replay,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    Connected,
    Reconnecting,
    Stopped,
    Done,
}

impl State {
    pub fn name(self) -> &'static str {
        ["connected", "reconnecting", "stopped", "done"][self as usize]
    }
}

#[derive(Clone, Debug)]
pub struct SourceStatus {
    pub kind: &'static str,
    pub pace: Pace,
    pub state: State,
    pub since: Millis,
    pub posts_total: u64,
    pub last_post_at: Option<Millis>,
    pub lag: Option<Millis>,
    pub reconnects: u64,
    pub detail: String,
    /// Log records of this source are all below this.
    pub end_seq: u64,
    rate: f64,
    rate_at: Millis,
}

impl SourceStatus {
    fn to_json(&self, name: &str) -> Value {
        let idle = (time::now() - self.rate_at).max(0) as f64 / 1000.0;
        json!({
            "name": name, "kind": self.kind, "state": self.state.name(), "since": rfc3339(self.since),
            "posts_total": self.posts_total, "posts_per_s": (self.rate * (-idle / 10.0).exp() * 100.0).round() / 100.0,
            "last_post_at": self.last_post_at.map(rfc3339), "lag_ms": self.lag, "reconnects": self.reconnects,
            "detail": self.detail,
        })
    }
}

#[derive(Clone)]
pub struct Board {
    sources: Arc<Mutex<BTreeMap<String, SourceStatus>>>,
    hub: Hub,
}

impl Board {
    pub fn new(hub: Hub) -> Self {
        Self { sources: Arc::default(), hub }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, SourceStatus>> {
        self.sources.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A source begins, or is there again.
    pub fn register(&self, name: &str, kind: &'static str, pace: Pace) {
        let now = time::now();
        let status = SourceStatus {
            kind,
            pace,
            state: State::Reconnecting,
            since: now,
            posts_total: 0,
            last_post_at: None,
            lag: None,
            reconnects: 0,
            detail: String::new(),
            end_seq: 0,
            rate: 0.0,
            rate_at: now,
        };
        self.lock().entry(name.to_owned()).or_insert(status);
    }

    /// A source has another state, or another thing to say; the page is told.
    pub fn set(&self, name: &str, state: State, detail: impl Into<String>) {
        let detail = detail.into();
        let mut sources = self.lock();
        let Some(source) = sources.get_mut(name) else { return };
        if source.state == state && source.detail == detail {
            return;
        }
        if source.state != state {
            source.since = time::now();
            source.reconnects += u64::from(state == State::Reconnecting);
        }
        source.state = state;
        source.detail = detail;
        let shown = source.to_json(name);
        drop(sources);
        self.hub.publish(Kind::Source, shown);
    }

    /// A source has delivered posts; they are in the log below `end_seq`.
    pub fn delivered(&self, name: &str, posts: usize, newest: Millis, end_seq: u64) {
        let now = time::now();
        let mut sources = self.lock();
        let Some(source) = sources.get_mut(name) else { return };
        source.posts_total += posts as u64;
        source.last_post_at = Some(now);
        source.lag = (source.pace == Pace::Live).then_some((now - newest).max(0));
        source.end_seq = source.end_seq.max(end_seq);
        // A mean over about the last ten seconds.
        let passed = (now - source.rate_at).max(1) as f64 / 1000.0;
        let keep = (-passed / 10.0).exp();
        source.rate = source.rate * keep + posts as f64 / passed * (1.0 - keep);
        source.rate_at = now;
    }

    pub fn to_json(&self) -> Value {
        self.lock().iter().map(|(name, source)| source.to_json(name)).collect()
    }

    pub fn all(&self) -> BTreeMap<String, SourceStatus> {
        self.lock().clone()
    }
}
