//! Events for whoever watches: numbered, kept for a while so that a reader who was cut off can go on, and never waited for.
//!
//! Numbers grow across restarts (they begin with the time of the start), so a reader from before a restart is told to load
//! everything again instead of missing something.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use serde_json::Value;
use tokio::sync::broadcast;

use crate::windows::Window;

/// Events that are kept for readers who come back.
const KEPT: usize = 8_192;
/// Events that a slow reader may be behind before it is told to load everything again.
const BEHIND: usize = 4_096;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Signal(Window),
    Post,
    Source,
    Store,
    Alert,
}

impl Kind {
    pub fn name(self) -> &'static str {
        match self {
            Self::Signal(_) => "signal",
            Self::Post => "post",
            Self::Source => "source",
            Self::Store => "store",
            Self::Alert => "alert",
        }
    }

    /// Whether a reader of this window wants it.
    pub fn concerns(self, window: Window) -> bool {
        !matches!(self, Self::Signal(other) if other != window)
    }
}

#[derive(Clone, Debug)]
pub struct Event {
    pub id: u64,
    pub kind: Kind,
    pub data: Arc<str>,
}

#[derive(Clone)]
pub struct Hub(Arc<Inner>);

struct Inner {
    kept: Mutex<Kept>,
    sender: broadcast::Sender<Event>,
}

struct Kept {
    events: VecDeque<Event>,
    next: u64,
    first: u64,
}

/// What a reader gets at first.
pub struct Subscription {
    /// Events since its last one; `None`: they are gone, it must load everything again.
    pub missed: Option<Vec<Event>>,
    pub receiver: broadcast::Receiver<Event>,
    /// The newest number when it came.
    pub last: u64,
}

impl Default for Hub {
    fn default() -> Self {
        Self::starting_at(u64::try_from(crate::time::now()).unwrap_or(0).saturating_mul(1_000))
    }
}

impl Hub {
    fn starting_at(first: u64) -> Self {
        let kept = Mutex::new(Kept { events: VecDeque::new(), next: first, first });
        Self(Arc::new(Inner { kept, sender: broadcast::channel(BEHIND).0 }))
    }

    pub fn publish(&self, kind: Kind, data: Value) {
        let data: Arc<str> = data.to_string().into();
        let mut kept = self.0.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.next += 1;
        let event = Event { id: kept.next, kind, data };
        kept.events.push_back(event.clone());
        if kept.events.len() > KEPT {
            kept.events.pop_front();
        }
        // Sent under the lock, so that nobody sees them out of order. Nobody listening is no error.
        let _ = self.0.sender.send(event);
    }

    /// Everything from now on, and what came after `last`.
    pub fn subscribe(&self, last: Option<u64>) -> Subscription {
        let kept = self.0.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let receiver = self.0.sender.subscribe();
        let missed = match last {
            None => Some(Vec::new()),
            // The event after `last` must still be there.
            Some(last) => {
                let oldest = kept.events.front().map_or(kept.next + 1, |e| e.id);
                let known = last >= kept.first && last <= kept.next && last + 1 >= oldest;
                known.then(|| kept.events.iter().filter(|e| e.id > last).cloned().collect())
            }
        };
        Subscription { missed, receiver, last: kept.next }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(events: &[Event]) -> Vec<u64> {
        events.iter().map(|e| e.id).collect()
    }

    #[test]
    fn readers_go_on_where_they_were_or_start_again() {
        let hub = Hub::starting_at(1_000);
        for i in 0..3 {
            hub.publish(Kind::Post, i.into());
        }
        let missed = |last| hub.subscribe(last).missed.map(|e| ids(&e));
        assert_eq!(missed(Some(1_001)), Some(vec![1_002, 1_003]));
        assert_eq!(missed(Some(1_003)), Some(vec![]));
        assert_eq!(missed(Some(1_000)), Some(vec![1_001, 1_002, 1_003]));
        assert_eq!(missed(None), Some(vec![]));
        // From before the start, and from another life.
        assert_eq!(missed(Some(7)), None);
        assert_eq!(missed(Some(9_999)), None);
        for i in 0..KEPT {
            hub.publish(Kind::Post, i.into());
        }
        assert_eq!(missed(Some(1_002)), None);
        assert_eq!(missed(Some(1_003)).map(|m| m.len()), Some(KEPT));
    }

    #[test]
    fn a_slow_reader_is_told_and_holds_nobody_up() {
        let hub = Hub::starting_at(0);
        let mut receiver = hub.subscribe(None).receiver;
        for i in 0..=BEHIND {
            hub.publish(Kind::Post, i.into());
        }
        assert!(matches!(receiver.try_recv(), Err(broadcast::error::TryRecvError::Lagged(_))));
    }

    #[test]
    fn signals_concern_readers_of_their_window() {
        assert!(Kind::Signal(Window::M5).concerns(Window::M5) && !Kind::Signal(Window::M1).concerns(Window::M5));
        assert!(Kind::Alert.concerns(Window::D1));
    }
}
