//! More than one machine: scoring and windows are spread over worker processes by NATS JetStream.
//!
//! ```text
//!           front (`cashtag live --bus`)                                workers (`cashtag live worker`), any number
//! sources ─▶ log ─▶ read, twice? ── tasks.<version>.<p> ──────────────▶ score        one consumer shared by all,
//!                                                                         │          acknowledged when answered
//!            in the order of the log ◀── scored.<p> ──────────────────────┘
//!            tickers, copies, bursts
//!                 └── counted.<k>, k by key ──────────────────────────▶ windows      each partition has an owner
//!            store ◀── sums, answered when they are in the store ─────────┘
//! ```
//!
//! What holds:
//! - A post is acknowledged by the front's own synced log, not by NATS (which syncs every two minutes). Everything on the bus
//!   can be made from log and store again.
//! - Scoring is at least once; the front takes the first answer for each place in the log and goes on in the order of the log.
//! - A partition of `counted` has its posts in the order of the log: the next message is sent when the one before is
//!   acknowledged, and an owner passes over what it has seen. So sums are a function of the stream. Two owners of a partition
//!   are no harm; an owner that starts reads the stream from its beginning.
//! - The front counts a post as done when it is in `counted` and in the store. Sums are the newer the more posts they have.
//! - Messages leave the streams when they are of no use: tasks that were answered, answers that are in the store, posts of
//!   windows that are final.

mod connection;
pub(crate) mod front;
mod members;
mod owner;
mod publish;
mod scorer;
mod tail;
pub(crate) mod wire;
mod worker;

pub use worker::{WorkerOptions, work};

use std::time::Duration;

use crate::error::{Error, Result};

/// Where the bus is and how it is divided.
#[derive(Clone, Debug)]
pub struct BusOptions {
    /// `nats://host:4222`, several with commas; `nats://user:password@host`, `tls://host`.
    pub url: String,
    /// What subjects and streams begin with: several pipelines may share a server.
    pub name: String,
    /// Of posts for scoring, and of keys for windows. Fixed when the streams are made.
    pub partitions: u32,
    /// A task that was not answered for so long goes to another scorer.
    pub ack_wait: Duration,
    /// Bytes that each stream may take on the server's disk.
    pub max_bytes: i64,
}

/// More would be more messages without more workers to take them.
const MAX_PARTITIONS: u32 = 256;

impl BusOptions {
    pub fn new(url: String) -> Self {
        let (name, partitions) = ("cashtag".into(), 8);
        Self { url, name, partitions, ack_wait: Duration::from_secs(15), max_bytes: 4 << 30 }
    }

    /// # Errors
    /// A name that is no token of a subject, or a number of partitions that cannot be.
    pub fn check(&self) -> Result<()> {
        let is_token = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        if self.name.is_empty() || self.name.len() > 32 || !self.name.chars().all(is_token) {
            let found = &self.name;
            return Err(Error::Invalid(format!("the bus's name takes letters, digits, - and _, found {found:?}")));
        }
        if self.partitions == 0 || self.partitions > MAX_PARTITIONS {
            let found = self.partitions;
            return Err(Error::Invalid(format!("expected 1 to {MAX_PARTITIONS} partitions, found {found}")));
        }
        Ok(())
    }
}

/// The three streams.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Tasks,
    Scored,
    Counted,
}

impl Kind {
    const ALL: [Self; 3] = [Self::Tasks, Self::Scored, Self::Counted];

    fn word(self) -> &'static str {
        ["tasks", "scored", "counted"][self as usize]
    }
}

/// Names of streams and subjects.
#[derive(Clone, Debug)]
struct Names(String);

impl Names {
    fn stream(&self, kind: Kind) -> String {
        format!("{}_{}", self.0, kind.word())
    }

    fn all(&self, kind: Kind) -> String {
        format!("{}.{}.>", self.0, kind.word())
    }

    fn task(&self, version: &str, partition: u32) -> String {
        format!("{}.tasks.{version}.{partition}", self.0)
    }

    fn tasks_of(&self, version: &str) -> String {
        format!("{}.tasks.{version}.*", self.0)
    }

    fn scored(&self, partition: u32) -> String {
        format!("{}.scored.{partition}", self.0)
    }

    fn counted(&self, partition: u32) -> String {
        format!("{}.counted.{partition}", self.0)
    }

    fn scorers(&self, version: &str) -> String {
        format!("scorers-{version}")
    }

    fn sums(&self) -> String {
        format!("{}.sums", self.0)
    }

    fn front(&self) -> String {
        format!("{}.front", self.0)
    }

    fn worker(&self) -> String {
        format!("{}.worker", self.0)
    }
}

/// A random name for a process.
fn random() -> Result<u64> {
    let mut bytes = [0; 8];
    getrandom::fill(&mut bytes).map_err(|e| Error::Invalid(format!("no random numbers: {e}")))?;
    Ok(u64::from_le_bytes(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_tokens_and_partitions_are_some() {
        let with = |name: &str, partitions| {
            let options = BusOptions { name: name.into(), partitions, ..BusOptions::new(String::new()) };
            options.check().is_ok()
        };
        assert!(with("cashtag", 8) && with("a-b_1", 1));
        for (name, partitions) in [("", 8), ("a.b", 8), ("a b", 8), (">", 8), ("a", 0), ("a", 257)] {
            assert!(!with(name, partitions), "{name} {partitions}");
        }
    }
}
