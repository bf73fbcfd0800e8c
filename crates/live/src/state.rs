//! What the API shows without asking the store: the newest signal of each series, delays, counts.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard};

use serde_json::{Value, json};
use tokio::sync::oneshot;

use crate::hub::{Hub, Kind};
use crate::inlet::Inlet;
use crate::scorer::ModelInfo;
use crate::store::Readers;
use crate::time::{self, Millis};
use crate::windows::{Scope, Signal, Window};

/// Delays that percentiles are taken over.
const DELAYS: usize = 4_096;

/// Texts that somebody wants classified, by the thread of the pipeline.
pub struct Question {
    pub texts: Vec<String>,
    pub answer: oneshot::Sender<Result<Vec<Vec<f32>>, String>>,
}

/// The newest signals.
#[derive(Default)]
pub struct Snapshot {
    newest: BTreeMap<(Window, Scope), BTreeMap<Arc<str>, Arc<Signal>>>,
    pub watermark: Millis,
    pub latest: Millis,
    pub allowed_lateness: Millis,
}

impl Snapshot {
    /// Puts a signal in, unless a newer window is there.
    pub fn update(&mut self, signal: &Arc<Signal>) {
        let series = self.newest.entry((signal.window, signal.scope)).or_default();
        match series.get(&signal.key) {
            Some(known) if known.start > signal.start => {}
            _ => {
                series.insert(signal.key.clone(), signal.clone());
            }
        }
    }

    pub fn get(&self, window: Window, scope: Scope, key: &str) -> Option<&Arc<Signal>> {
        self.newest.get(&(window, scope))?.get(key)
    }

    pub fn all(&self, window: Window, scope: Scope) -> impl Iterator<Item = &Arc<Signal>> {
        self.newest.get(&(window, scope)).into_iter().flat_map(BTreeMap::values)
    }

    /// Whether a window is final is a matter of the watermark now, not of when the signal was made.
    pub fn show(&self, signal: &Signal) -> Value {
        let mut value = serde_json::to_value(signal).unwrap_or_default();
        value["final"] = self.is_final(signal).into();
        value
    }

    pub fn is_final(&self, signal: &Signal) -> bool {
        signal.end.saturating_add(self.allowed_lateness) <= self.watermark
    }
}

/// The last delays, for percentiles.
#[derive(Default)]
pub struct Delays {
    event_to_received: VecDeque<Millis>,
    received_to_visible: VecDeque<Millis>,
}

impl Delays {
    pub fn add(&mut self, event_to_received: Option<Millis>, received_to_visible: Millis) {
        let push = |queue: &mut VecDeque<Millis>, value: Millis| {
            queue.push_back(value.max(0));
            if queue.len() > DELAYS {
                queue.pop_front();
            }
        };
        if let Some(delay) = event_to_received {
            push(&mut self.event_to_received, delay);
        }
        push(&mut self.received_to_visible, received_to_visible);
    }

    pub fn to_json(&self) -> Value {
        json!({
            "event_to_received_ms_p50": percentile(&self.event_to_received, 50),
            "received_to_visible_ms_p50": percentile(&self.received_to_visible, 50),
            "received_to_visible_ms_p99": percentile(&self.received_to_visible, 99),
        })
    }
}

/// The smallest value that so many per cent do not exceed.
fn percentile(values: &VecDeque<Millis>, percent: usize) -> Option<Millis> {
    let mut sorted: Vec<Millis> = values.iter().copied().collect();
    sorted.sort_unstable();
    let rank = (sorted.len() * percent).div_ceil(100);
    sorted.get(rank.saturating_sub(1)).copied()
}

#[derive(Default)]
pub struct Counters {
    pub scored: AtomicU64,
    pub duplicates: AtomicU64,
    pub too_late: AtomicU64,
    pub copies: AtomicU64,
    pub damped: AtomicU64,
    pub dead_letters: AtomicU64,
    pub checkpoints: AtomicU64,
    pub store_failures: AtomicU64,
    pub bus_failures: AtomicU64,
    pub windows_in_memory: AtomicU64,
    pub log_bytes: AtomicU64,
}

impl Counters {
    pub(crate) fn add(counter: &AtomicU64, n: usize) {
        counter.fetch_add(n as u64, Ordering::Relaxed);
    }

    /// Name, what it is, type, value; as Prometheus wants to know it.
    pub fn all(&self) -> [(&'static str, &'static str, &'static str, u64); 11] {
        let of = |c: &AtomicU64| c.load(Ordering::Relaxed);
        [
            ("posts_scored_total", "Posts scored and counted", "counter", of(&self.scored)),
            ("posts_duplicate_total", "Posts that were counted already", "counter", of(&self.duplicates)),
            (
                "posts_too_late_total",
                "Posts that came after one of their windows was final",
                "counter",
                of(&self.too_late),
            ),
            ("posts_copy_total", "Copies and retweets", "counter", of(&self.copies)),
            ("posts_damped_total", "Posts of a burst of one author", "counter", of(&self.damped)),
            ("dead_letters_total", "What could not be taken", "counter", of(&self.dead_letters)),
            ("checkpoints_total", "Transactions of the store", "counter", of(&self.checkpoints)),
            (
                "store_failures_total",
                "Transactions that failed and were tried again",
                "counter",
                of(&self.store_failures),
            ),
            ("bus_failures_total", "Publications that failed and were tried again", "counter", of(&self.bus_failures)),
            ("windows_in_memory", "Windows that are not final", "gauge", of(&self.windows_in_memory)),
            ("log_bytes", "Size of the log", "gauge", of(&self.log_bytes)),
        ]
    }
}

/// Whether the store takes what is written.
pub struct StoreHealth {
    pub kind: &'static str,
    down: Mutex<Option<(Millis, String)>>,
}

impl StoreHealth {
    pub fn new(kind: &'static str) -> Self {
        Self { kind, down: Mutex::default() }
    }

    pub fn to_json(&self) -> Value {
        let down = self.down.lock().unwrap_or_else(PoisonError::into_inner);
        match &*down {
            None => json!({"kind": self.kind, "state": "connected", "since": null, "detail": ""}),
            Some((since, why)) => {
                json!({"kind": self.kind, "state": "unavailable", "since": time::rfc3339(*since), "detail": why})
            }
        }
    }

    /// Notes how it went; true if that is news.
    fn note(&self, trouble: Option<String>) -> bool {
        let mut down = self.down.lock().unwrap_or_else(PoisonError::into_inner);
        match (&mut *down, trouble) {
            (None, None) => false,
            (Some((_, known)), Some(why)) if *known == why => false,
            (Some((_, known)), Some(why)) => {
                *known = why;
                true
            }
            (down, trouble) => {
                *down = trouble.map(|why| (time::now(), why));
                true
            }
        }
    }
}

/// What the API and the pipeline share.
pub struct Shared {
    pub hub: Hub,
    pub store: StoreHealth,
    /// Dead letters of the processes before.
    pub dead_letters_before: u64,
    pub inlet: Inlet,
    pub readers: Readers,
    pub model: ModelInfo,
    pub snapshot: RwLock<Snapshot>,
    pub delays: Mutex<Delays>,
    pub counters: Counters,
    pub questions: std::sync::mpsc::SyncSender<Question>,
    /// `metrics.json` of the run that the adapter comes from.
    pub quality: Value,
    pub tickers: Arc<dyn crate::tickers::Tickers>,
    /// Workers, partitions and what waits on the bus; null without one.
    pub bus: Mutex<Value>,
    /// Alerts that a webhook has taken, to be marked by the thread that writes the store.
    pub delivered: Mutex<Vec<i64>>,
}

impl Shared {
    pub fn snapshot(&self) -> RwLockReadGuard<'_, Snapshot> {
        self.snapshot.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many dead letters there ever were.
    pub fn dead_letters(&self) -> u64 {
        self.dead_letters_before + self.counters.dead_letters.load(Ordering::Relaxed)
    }

    /// The store took something, or did not, for this reason; whoever watches is told.
    pub(crate) fn note_store(&self, trouble: Option<String>) {
        if self.store.note(trouble) {
            self.hub.publish(Kind::Store, self.store.to_json());
        }
    }

    pub(crate) fn bus(&self) -> Value {
        self.bus.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn take_delivered(&self) -> Vec<i64> {
        std::mem::take(&mut *self.delivered.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// # Errors
    /// The model is busy with other questions, or fails on these texts.
    pub async fn classify(&self, texts: Vec<String>) -> Result<Vec<Vec<f32>>, ClassifyError> {
        let (answer, answered) = oneshot::channel();
        self.questions.try_send(Question { texts, answer }).map_err(|_| ClassifyError::Busy)?;
        answered.await.map_err(|_| ClassifyError::Busy)?.map_err(ClassifyError::Failed)
    }
}

#[derive(Debug)]
pub enum ClassifyError {
    Busy,
    Failed(String),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles() {
        let values: VecDeque<Millis> = (1..=200).rev().collect();
        assert_eq!((percentile(&values, 50), percentile(&values, 99)), (Some(100), Some(198)));
        assert_eq!(percentile(&VecDeque::from([7]), 99), Some(7));
        assert_eq!(percentile(&VecDeque::new(), 50), None);
    }
}
