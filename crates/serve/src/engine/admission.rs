//! Who may come in: counted at the door, before a text costs anything.
//!
//! Two bounds. The number of texts that are in ([`EngineConfig::max_concurrent_requests`]) bounds memory. The time that they
//! will take bounds waiting: a text whose turn would come after its deadline is refused now, while its client can still go
//! elsewhere. The time is estimated from the texts' bytes and from how long a row has taken lately.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::{EngineConfig, Failure};

pub(crate) struct Admission {
    texts: Arc<Semaphore>,
    background: Arc<Semaphore>,
    writes: Arc<Semaphore>,
    /// Rows that wait or are being computed, estimated.
    rows: Arc<AtomicU64>,
    /// Bits of an f64.
    seconds_per_row: AtomicU64,
}

/// Part of the deadline that the queue may take; the rest is for the batch itself and for estimates that were low.
const SHARE: f64 = 0.6;
/// How fast the estimate of a row's time follows when rows take longer, and when they take less: who is let in too early is late, who
/// is refused too early comes again, so the estimate is quick to rise and slow to fall.
const RISE: f64 = 0.4;
const FALL: f64 = 0.1;

/// A place for one text, given back when dropped.
pub(crate) struct Ticket {
    rows: u64,
    total: Arc<AtomicU64>,
    _permit: OwnedSemaphorePermit,
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.total.fetch_sub(self.rows, Ordering::Relaxed);
    }
}

impl Admission {
    pub(crate) fn new(config: &EngineConfig) -> Self {
        let of = |n: usize| Arc::new(Semaphore::new(n.clamp(1, Semaphore::MAX_PERMITS)));
        Self {
            texts: of(config.max_concurrent_requests),
            background: of(config.max_background_texts),
            writes: of(config.max_num_seqs + config.max_queued_generations),
            rows: Arc::default(),
            seconds_per_row: AtomicU64::new(0),
        }
    }

    fn seconds_per_row(&self) -> f64 {
        f64::from_bits(self.seconds_per_row.load(Ordering::Relaxed))
    }

    /// How long the queue takes, as far as is known.
    pub(crate) fn wait(&self) -> Duration {
        let seconds = self.rows.load(Ordering::Relaxed) as f64 * self.seconds_per_row();
        Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)
    }

    /// A batch of `rows` took this long.
    pub(crate) fn learn(&self, rows: usize, time: Duration) {
        let now = time.as_secs_f64() / rows.max(1) as f64;
        let old = self.seconds_per_row();
        let follow = if now > old { RISE } else { FALL };
        let new = if old == 0.0 { now } else { old + follow * (now - old) };
        self.seconds_per_row.store(new.to_bits(), Ordering::Relaxed);
    }

    /// Places for texts of the given (estimated) rows, all or none, at once.
    pub(crate) fn enter(&self, rows: &[u64], timeout: Duration) -> Result<Vec<Ticket>, Failure> {
        let wait = self.wait();
        let own = rows.iter().sum::<u64>() as f64 * self.seconds_per_row();
        let retry_after =
            || Failure::Overloaded { retry_after: (wait.as_secs_f64() * 0.5).ceil().clamp(1.0, 60.0) as u64 };
        // An idle engine takes what it can get: nobody else would be served better.
        if !wait.is_zero() && wait.as_secs_f64() + own > SHARE * timeout.as_secs_f64() {
            return Err(retry_after());
        }
        let count = u32::try_from(rows.len()).unwrap_or(u32::MAX);
        let permit = self.texts.clone().try_acquire_many_owned(count).map_err(|_| retry_after())?;
        Ok(self.tickets(permit, rows))
    }

    /// The same, but waiting for room.
    pub(crate) async fn enter_background(&self, rows: u64) -> Result<Ticket, Failure> {
        let permit = self.background.clone().acquire_owned().await.map_err(|_| Failure::Ended)?;
        self.tickets(permit, &[rows]).pop().ok_or(Failure::Ended)
    }

    pub(crate) fn enter_write(&self) -> Result<OwnedSemaphorePermit, Failure> {
        self.writes.clone().try_acquire_owned().map_err(|_| Failure::Overloaded { retry_after: 5 })
    }

    fn tickets(&self, mut permit: OwnedSemaphorePermit, rows: &[u64]) -> Vec<Ticket> {
        self.rows.fetch_add(rows.iter().sum(), Ordering::Relaxed);
        let place = |&rows| {
            // `permit` holds one for each text: the last place takes what is left of it.
            let one = permit.split(1);
            one.map(|_permit| Ticket { rows, total: self.rows.clone(), _permit })
        };
        rows.iter().filter_map(place).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn admission(texts: usize) -> Admission {
        Admission::new(&EngineConfig {
            max_concurrent_requests: texts,
            max_background_texts: 1,
            ..EngineConfig::default()
        })
    }

    #[test]
    fn all_or_none_and_given_back() {
        let door = admission(3);
        let limit = Duration::from_secs(1);
        let two = door.enter(&[5, 5], limit).unwrap();
        assert!(matches!(door.enter(&[5, 5], limit), Err(Failure::Overloaded { .. })));
        let one = door.enter(&[5], limit).unwrap();
        assert!(door.enter(&[5], limit).is_err());
        drop(two);
        assert_eq!(door.enter(&[5, 5], limit).unwrap().len(), 2);
        drop(one);
        assert_eq!(door.rows.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn what_would_be_late_is_refused() {
        let door = admission(1000);
        door.learn(100, Duration::from_secs(1));
        // An idle engine takes anything.
        let first = door.enter(&[500], Duration::from_secs(1)).unwrap();
        // Five seconds of work wait: too late for one, early enough for another.
        assert_eq!(door.enter(&[10], Duration::from_secs(6)).err(), Some(Failure::Overloaded { retry_after: 3 }));
        assert!(door.enter(&[10], Duration::from_secs(10)).is_ok());
        drop(first);
        assert!(door.enter(&[10], Duration::from_secs(1)).is_ok());
    }
}
