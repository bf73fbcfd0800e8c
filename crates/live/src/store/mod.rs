//! Where posts, windows and the place in the log are kept: SQLite in the data directory, or a PostgreSQL server.
//!
//! What holds for both, and is tested with the same tests on both: posts, windows, alerts and the checkpoint (place in the
//! log, watermark, cursors of the sources) change in one transaction. Whatever moment the process or the server dies at, the
//! store is at a checkpoint, and the log has everything after it. Writing twice is writing once: a post is keyed by
//! (source, id, model), a window by its place, an alert by its occasion.

pub mod location;
pub mod postgres;
pub mod sqlite;

use std::collections::{BTreeMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

pub use location::Location;
pub use sqlite::{SqliteReader, SqliteStore};

use crate::error::Result;
use crate::post::ScoredPost;
use crate::scorer::ModelInfo;
use crate::time::{Millis, rfc3339};
use crate::windows::{Scope, Signal, Values, Window};

/// Dead letters that are kept.
pub(crate) const MAX_DEAD_LETTERS: i64 = 10_000;
/// Characters of what could not be taken that are kept.
pub(crate) const MAX_RAW: usize = 500;
/// Bytes of texts after which [`Reader::posts_of_day`] ends: rows alone are no bound, a text may have 100 kB.
pub(crate) const MAX_READ: i64 = 8 << 20;

/// Something that could not be taken, and why.
#[derive(Clone, Debug, PartialEq)]
pub struct DeadLetter {
    pub at: Millis,
    pub source: String,
    pub reason: String,
    pub raw: String,
}

impl DeadLetter {
    pub fn new(source: &str, reason: impl Into<String>, raw: &str) -> Self {
        let raw = raw.chars().take(MAX_RAW).map(|c| if c == '\0' { '\u{fffd}' } else { c }).collect();
        Self { at: crate::time::now(), source: source.to_owned(), reason: reason.into(), raw }
    }
}

/// A rule that has come true.
#[derive(Clone, Debug, PartialEq)]
pub struct Alert {
    pub at: Millis,
    pub rule: String,
    pub key: String,
    pub window: crate::windows::Window,
    pub start: Millis,
    pub values: Value,
    pub text: String,
}

impl Alert {
    pub fn to_json(&self) -> Value {
        serde_json::json!({
            "at": crate::time::rfc3339(self.at), "rule": self.rule, "key": self.key, "window": self.window,
            "start": crate::time::rfc3339(self.start), "values": self.values, "text": self.text,
        })
    }
}

/// Where a restart goes on.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Checkpoint {
    /// The first record of the log that is not in the store.
    pub seq: u64,
    pub watermark: Millis,
    pub latest: Millis,
    pub sources: BTreeMap<String, SourceState>,
}

#[derive(Clone, Debug, Default, PartialEq)]
pub struct SourceState {
    pub cursor: Option<String>,
    pub newest: Option<Millis>,
}

/// One step of the pipeline: all of it or nothing.
#[derive(Default)]
pub struct Batch {
    pub posts: Vec<ScoredPost>,
    /// As many as posts: see [`crate::copies::fingerprint`].
    pub fingerprints: Vec<u64>,
    pub signals: Vec<Arc<Signal>>,
    pub alerts: Vec<Alert>,
    pub dead_letters: Vec<DeadLetter>,
    pub checkpoint: Checkpoint,
    pub available_at: Millis,
}

#[derive(Clone, Copy, Debug)]
pub struct StoreOptions {
    /// Keep the text of posts, or only its fingerprint.
    pub with_text: bool,
    /// Alerts wait for a webhook to take them.
    pub webhook: bool,
    /// SQLite's cache of pages, in MB.
    pub cache_mb: u32,
}

impl Default for StoreOptions {
    fn default() -> Self {
        Self { with_text: true, webhook: false, cache_mb: 16 }
    }
}

/// The one writer.
pub trait Store {
    /// Whether texts are stored, and so shown.
    fn keeps_text(&self) -> bool;

    /// Which of these posts are counted already with this model.
    ///
    /// # Errors
    /// The store cannot be read.
    fn known(&mut self, identities: &[u128]) -> Result<HashSet<u128>>;

    /// Writes all of a batch or nothing. The same batch again changes nothing.
    ///
    /// # Errors
    /// The store cannot be written, or nobody knows whether it was: then the same batch is to be committed again.
    fn commit(&mut self, batch: &Batch) -> Result<()>;

    /// A webhook has taken these alerts.
    ///
    /// # Errors
    /// The store cannot be written.
    fn delivered(&mut self, ids: &[i64]) -> Result<()>;

    /// Where a restart goes on; `None`: nothing was ever written.
    ///
    /// # Errors
    /// The store cannot be read.
    fn checkpoint(&mut self) -> Result<Option<Checkpoint>>;

    /// Posts of this model from an event time on, in the order of the log, with their fingerprints.
    ///
    /// # Errors
    /// The store cannot be read.
    fn posts_since(&mut self, time: Millis, each: &mut dyn FnMut(ScoredPost, u64)) -> Result<()>;

    /// The signals that histories and baselines are made from again, older ones of a series first.
    ///
    /// # Errors
    /// The store cannot be read.
    fn recent_signals(&mut self, latest: Millis, each: &mut dyn FnMut(Signal)) -> Result<()>;

    /// Removes posts, windows, alerts and dead letters that came or last changed before `cutoff`, for at most `time`.
    /// Returns whether it was all.
    ///
    /// # Errors
    /// The store cannot be written.
    fn forget(&mut self, cutoff: Millis, time: Duration) -> Result<bool>;
}

/// Which posts are asked for.
#[derive(Clone, Debug, Default)]
pub struct PostFilter {
    pub ticker: Option<String>,
    pub sector: Option<String>,
    /// Only posts with a smaller number.
    pub before: Option<u64>,
    pub limit: usize,
}

/// A stored post with the number of its model, for exports.
#[derive(Clone, Debug, PartialEq)]
pub struct StoredPost {
    pub model: i64,
    pub post: ScoredPost,
    pub has_text: bool,
}

/// One revision of a closed window.
#[derive(Clone, Debug, PartialEq)]
pub struct Bar {
    pub scope: Scope,
    pub key: String,
    pub start: Millis,
    pub revision: u32,
    pub available_at: Millis,
    pub values: Values,
}

/// Reads whole checkpoints while the pipeline writes; each reader has a connection of its own.
///
/// Every method fails if the store cannot be read.
#[allow(clippy::missing_errors_doc)]
pub trait Reader: Send {
    /// Posts as `/v1/posts` shows them, newest first.
    fn posts(&self, filter: &PostFilter) -> Result<Vec<Value>>;

    /// All series that there ever were.
    fn series(&self) -> Result<Vec<(Scope, String)>>;

    /// The windows of one series, oldest first; the newest `limit` of those in the range.
    fn history(
        &self,
        scope: Scope,
        key: &str,
        window: Window,
        range: (Millis, Millis),
        limit: usize,
    ) -> Result<Vec<Signal>>;

    /// Newest first.
    fn alerts(&self, limit: usize) -> Result<Vec<Value>>;

    /// Alerts that no webhook has taken yet, oldest first, with their numbers.
    fn undelivered(&self, limit: usize) -> Result<Vec<(i64, Alert)>>;

    /// Newest first.
    fn dead_letters(&self, limit: usize) -> Result<Vec<Value>>;

    /// How many dead letters there ever were.
    fn dead_letter_count(&self) -> Result<u64>;

    /// How many posts there are.
    fn post_count(&self) -> Result<u64>;

    /// Which of these posts the store has with this version of the model.
    fn known(&self, identities: &[u128], version: &str) -> Result<HashSet<u128>>;

    /// The models that posts were scored with, by their numbers.
    fn models(&self) -> Result<Vec<(i64, ModelInfo)>>;

    /// The days (their first moments) that have posts, from `since` on.
    fn post_days(&self, since: Millis) -> Result<Vec<Millis>>;

    /// Posts of a day with a number above `after`, in its order: `limit` of them, or fewer where texts are long, but never
    /// none as long as there are some.
    fn posts_of_day(&self, day: Millis, after: i64, limit: usize) -> Result<Vec<StoredPost>>;

    /// The days that have closed windows of this length, from `since` on.
    fn bar_days(&self, window: Window, since: Millis) -> Result<Vec<Millis>>;

    /// Closed windows that began on a day, in the order of scope, key, start and revision, those behind `after` only.
    fn bars_of_day(&self, window: Window, day: Millis, after: Option<&Bar>, limit: usize) -> Result<Vec<Bar>>;
}

/// A few readers for many requests.
#[derive(Clone)]
pub struct Readers {
    location: Location,
    pool: Arc<Mutex<Pool>>,
}

#[derive(Default)]
struct Pool {
    idle: Vec<Box<dyn Reader>>,
    /// The last attempt to open one failed then, for this reason.
    failed: Option<(Instant, String)>,
}

impl Readers {
    pub fn new(location: Location) -> Self {
        Self { location, pool: Arc::default() }
    }

    fn pool(&self) -> std::sync::MutexGuard<'_, Pool> {
        self.pool.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads with an idle connection, or a new one. Blocks. While a store cannot be reached, one request in a second tries;
    /// the others fail at once, so that no queue of waiting threads grows.
    ///
    /// # Errors
    /// Whatever reading gives.
    pub fn with<T>(&self, read: impl FnOnce(&dyn Reader) -> Result<T>) -> Result<T> {
        let idle = {
            let mut pool = self.pool();
            match (pool.idle.pop(), &pool.failed) {
                (None, Some((when, why))) if when.elapsed() < Duration::from_secs(1) => {
                    return Err(crate::Error::Invalid(why.clone()));
                }
                // The others wait for what this one finds.
                (None, Some((_, why))) => {
                    let why = why.clone();
                    pool.failed = Some((Instant::now(), why));
                    None
                }
                (idle, _) => idle,
            }
        };
        let reader = match idle {
            Some(reader) => reader,
            None => match self.location.reader() {
                Ok(reader) => {
                    self.pool().failed = None;
                    reader
                }
                Err(e) => {
                    self.pool().failed = Some((Instant::now(), e.to_string()));
                    return Err(e);
                }
            },
        };
        let outcome = read(&*reader);
        let mut pool = self.pool();
        if outcome.is_err() {
            // A connection that failed is not used again, and its siblings have most likely lost theirs, too.
            pool.idle.clear();
        } else if pool.idle.len() < 8 {
            pool.idle.push(reader);
        }
        outcome
    }
}

/// How a model is written into the store.
fn model_json(model: &ModelInfo) -> Value {
    json!({
        "name": model.name, "adapter": model.adapter, "labels": model.labels, "temperature": model.temperature,
        "model": model.model_hash, "adapter_hash": model.adapter_hash, "prompt": model.prompt_hash,
    })
}

/// The labels and hashes that a stored post was made with.
fn model_of(info: &str) -> ModelInfo {
    let info: Value = serde_json::from_str(info).unwrap_or_default();
    let text = |key: &str| info[key].as_str().map(str::to_owned);
    let labels = info["labels"].as_array().map(|l| l.iter().filter_map(|l| Some(l.as_str()?.to_owned())).collect());
    ModelInfo {
        name: text("name").unwrap_or_default(),
        adapter: text("adapter"),
        labels: labels.unwrap_or_default(),
        temperature: info["temperature"].as_f64().unwrap_or(1.0) as f32,
        model_hash: text("model").unwrap_or_default(),
        adapter_hash: text("adapter_hash"),
        prompt_hash: text("prompt").unwrap_or_default(),
    }
}

fn scope_of(number: i64) -> Scope {
    usize::try_from(number).ok().and_then(|n| Scope::ALL.get(n)).copied().unwrap_or(Scope::Ticker)
}

fn window_of(number: i64) -> Window {
    usize::try_from(number).ok().and_then(|n| Window::ALL.get(n)).copied().unwrap_or(Window::M5)
}

/// How far back signals of a window are read again at a start.
fn span_of(window: Window) -> Millis {
    use crate::windows::{BASELINE_DAYS, SPARKLINE};
    let baseline = if window == Window::H1 { (BASELINE_DAYS + 2) * crate::time::DAY } else { 0 };
    (2 * SPARKLINE as i64 * window.size()).max(baseline)
}

/// A window as it is stored, as a signal.
fn stored_signal(
    (scope, key, name): (Scope, &str, Option<&str>),
    window: Window,
    start: Millis,
    revision: u32,
    data: &str,
) -> Signal {
    Signal {
        key: Arc::from(key),
        scope,
        name: name.map(str::to_owned),
        window,
        start,
        end: start + window.size(),
        is_final: false,
        revision,
        values: serde_json::from_str(data).unwrap_or_default(),
        sparkline: Vec::new(),
    }
}

impl DeadLetter {
    fn to_json(&self) -> Value {
        json!({"at": rfc3339(self.at), "source": self.source, "reason": self.reason, "raw": self.raw})
    }
}
