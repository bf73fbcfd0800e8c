//! What goes over the bus, as JSON. Every message can come twice, and every number in it says which of two is the newer.

use bytes::Bytes;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::time::Millis;
use crate::windows::{Scope, Window};

/// A text to score: `<name>.tasks.<version>.<partition>`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Task {
    /// The post's place in the log: what the answer is matched by.
    pub(crate) seq: u64,
    pub(crate) text: String,
}

/// What a scorer says of it: `<name>.scored.<partition>`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Answer {
    pub(crate) seq: u64,
    /// Of model, adapter and prompt.
    pub(crate) version: String,
    /// Probabilities in the order of the labels, or why there are none.
    pub(crate) outcome: Result<Vec<f32>, String>,
}

/// Posts that count for keys of one partition, in the order of the log: `<name>.counted.<partition>`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Chunk {
    pub(crate) posts: Vec<Counted>,
    /// All records of the log before this were sent to this partition, as far as they concern it.
    pub(crate) through: u64,
    /// The watermark behind these posts.
    pub(crate) watermark: Millis,
}

/// A post as windows see it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Counted {
    pub(crate) seq: u64,
    pub(crate) id: String,
    pub(crate) time: Millis,
    pub(crate) author: u64,
    pub(crate) score: f64,
    pub(crate) weight: f64,
    pub(crate) positive: bool,
    pub(crate) negative: bool,
    pub(crate) copy: bool,
    pub(crate) damped: bool,
    /// Which of the four windows were not final when it came.
    pub(crate) windows: [bool; 4],
    pub(crate) keys: Vec<(Scope, String)>,
}

/// The sums of windows that changed, from their owner to the front: a request to `<name>.sums`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Sums {
    pub(crate) owner: String,
    pub(crate) partition: u32,
    /// The front that has been told everything since it began.
    pub(crate) epoch: u64,
    /// Set in the last of several messages: everything before this record is in what was told.
    pub(crate) through: Option<(u64, Millis)>,
    pub(crate) rows: Vec<Row>,
}

/// The sums of one window of one key.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Row {
    pub(crate) window: Window,
    pub(crate) scope: Scope,
    pub(crate) key: String,
    pub(crate) start: Millis,
    pub(crate) mentions: u64,
    pub(crate) positive: u64,
    pub(crate) negative: u64,
    pub(crate) copies: u64,
    pub(crate) damped: u64,
    /// Σw, Σw², Σws, Σws², Σw of the positive and of the negative.
    pub(crate) weights: [f64; 6],
    pub(crate) authors: u64,
    /// Rank, place in the log and id of the most decided posts.
    pub(crate) top: Vec<(f64, u64, String)>,
}

/// The front's answer to [`Sums`] once they are in the store, and what it says four times a second: `<name>.front`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Beat {
    /// Another one: the front was started again, and knows no sums.
    pub(crate) epoch: u64,
    /// The data directory it writes.
    pub(crate) log: String,
    /// Windows are closed in the store up to this watermark.
    pub(crate) closed: Millis,
    pub(crate) allowed_lateness: Millis,
    /// Which worker owns each partition of keys.
    pub(crate) owners: Vec<Option<String>>,
}

/// What a worker says of itself twice a second: `<name>.worker`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Presence {
    pub(crate) id: String,
    /// The model it scores with; `None`: it does not score.
    pub(crate) version: Option<String>,
    /// Whether it takes partitions of windows.
    pub(crate) windows: bool,
    pub(crate) scored: u64,
    pub(crate) failed: u64,
    /// Partitions, and how many windows it has of each.
    pub(crate) partitions: Vec<(u32, u64)>,
    pub(crate) leaving: bool,
}

pub(crate) fn encode<T: Serialize>(message: &T) -> Bytes {
    // These types have string keys and no fallible parts; an empty message would be refused as one that cannot be read.
    serde_json::to_vec(message).unwrap_or_default().into()
}

/// `None` for what is no such message: somebody else's, and no reason to stop.
pub(crate) fn decode<T: DeserializeOwned>(payload: &[u8]) -> Option<T> {
    serde_json::from_slice(payload).ok()
}
