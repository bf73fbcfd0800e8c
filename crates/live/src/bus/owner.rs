//! The window half of a worker: one task for each partition of keys that it owns.
//!
//! A task reads its partition from the beginning of the stream and so has the same sums as whoever owned it before. It tells
//! the front what changed and holds it for untold until the front says that it is in the store; a front that was started
//! again is told everything.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use std::collections::{BTreeMap, VecDeque};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use super::Kind;
use super::connection::Bus;
use super::tail::{Read, Tail};
use super::wire::{Beat, Chunk, Sums, decode, encode};
use crate::time::Millis;
use crate::windows::partition::Partition;

/// Windows in one message.
const ROWS: usize = 500;
/// How long the front may take to write them.
const ANSWER: Duration = Duration::from_secs(10);
/// While an owner catches up it tells what it has this often.
const MEANWHILE: Duration = Duration::from_millis(500);
const TICK: Duration = Duration::from_millis(100);
const PURGE: Duration = Duration::from_secs(5);

/// Partitions of a worker, and how many windows each has in memory.
#[derive(Default)]
pub(super) struct Owned(BTreeMap<u32, (JoinHandle<()>, Arc<AtomicU64>)>);

impl Owned {
    /// Takes and gives up partitions as the front says.
    pub(super) fn follow(&mut self, bus: &Bus, id: &str, beats: &watch::Receiver<Option<Beat>>) {
        let wanted: Vec<u32> = match &*beats.borrow() {
            // Without a front nothing changes.
            None => return,
            Some(beat) => {
                (beat.owners.iter().zip(0..)).filter(|(o, _)| o.as_deref() == Some(id)).map(|o| o.1).collect()
            }
        };
        self.0.retain(|partition, (task, _)| {
            let keep = wanted.contains(partition) && !task.is_finished();
            if !keep {
                task.abort();
            }
            keep
        });
        for partition in wanted {
            self.0.entry(partition).or_insert_with(|| {
                let count = Arc::new(AtomicU64::new(0));
                let owner = Owner {
                    bus: bus.clone(),
                    id: id.to_owned(),
                    index: partition,
                    beats: beats.clone(),
                    count: count.clone(),
                    windows: Partition::default(),
                    watermark: Millis::MIN,
                    read: VecDeque::new(),
                    epoch: 0,
                    told: None,
                    purged: Instant::now(),
                };
                (tokio::spawn(owner.run()), count)
            });
        }
    }

    pub(super) fn sizes(&self) -> Vec<(u32, u64)> {
        self.0.iter().map(|(p, (_, count))| (*p, count.load(Ordering::Relaxed))).collect()
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        self.0.values().for_each(|(task, _)| task.abort());
    }
}

struct Owner {
    bus: Bus,
    id: String,
    index: u32,
    beats: watch::Receiver<Option<Beat>>,
    count: Arc<AtomicU64>,
    windows: Partition,
    /// Behind the last message.
    watermark: Millis,
    /// Messages that were read: place in the stream, newest event time.
    read: VecDeque<(u64, Millis)>,
    /// The front that is told.
    epoch: u64,
    /// What it was told last.
    told: Option<(u64, Millis)>,
    purged: Instant,
}

impl Owner {
    async fn run(mut self) {
        let (send, mut messages) = mpsc::channel(64);
        let filter = self.bus.names.counted(self.index);
        let tail = Tail { bus: self.bus.clone(), kind: Kind::Counted, filter, next: 0 };
        let reading = tokio::spawn(tail.run(send));
        let _stop = AbortOnDrop(reading);
        let (mut behind, mut told_at) = (true, Instant::now());
        loop {
            match tokio::time::timeout(TICK, messages.recv()).await {
                Err(_) => {}
                Ok(None) => return,
                Ok(Some(first)) => {
                    let mut next = Some(first);
                    while let Some(message) = next {
                        behind = message.as_ref().is_some_and(|m| m.pending > 0);
                        message.into_iter().for_each(|m| self.take(&m));
                        next = messages.try_recv().ok();
                    }
                }
            }
            self.count.store(self.windows.in_memory() as u64, Ordering::Relaxed);
            let Some(beat) = self.beats.borrow_and_update().clone() else { continue };
            self.follow(&beat);
            if behind && told_at.elapsed() < MEANWHILE {
                continue;
            }
            if self.windows.has_changes() || self.told != Some(self.place()) {
                self.tell().await;
                told_at = Instant::now();
            }
            self.forget(&beat).await;
        }
    }

    fn place(&self) -> (u64, Millis) {
        (self.windows.through(), self.watermark)
    }

    fn take(&mut self, message: &Read) {
        // Not from our front: nothing can be made of it.
        let Some(chunk) = decode::<Chunk>(&message.payload) else { return };
        chunk.posts.iter().for_each(|post| self.windows.count(post));
        self.windows.came_to(chunk.through);
        self.watermark = self.watermark.max(chunk.watermark);
        let newest = chunk.posts.iter().map(|p| p.time).max().unwrap_or(Millis::MIN);
        self.read.push_back((message.sequence, newest));
    }

    fn follow(&mut self, beat: &Beat) {
        if beat.epoch != self.epoch {
            self.epoch = beat.epoch;
            self.told = None;
            self.windows.tell_all();
        }
    }

    async fn tell(&mut self) {
        loop {
            let place = self.place();
            let rows = self.windows.take_changes(ROWS);
            let last = !self.windows.has_changes();
            let sums = Sums {
                owner: self.id.clone(),
                partition: self.index,
                epoch: self.epoch,
                through: last.then_some(place),
                rows,
            };
            let request = self.bus.client.request(self.bus.names.sums(), encode(&sums));
            let answer = tokio::time::timeout(ANSWER, request).await;
            let beat = answer.ok().and_then(Result::ok).and_then(|a| decode::<Beat>(&a.payload));
            match beat {
                Some(beat) if beat.epoch == self.epoch => {}
                // Nobody there, or another one: it is told again.
                _ => {
                    self.windows.give_back(sums.rows);
                    tokio::time::sleep(TICK).await;
                    return;
                }
            }
            if last {
                self.told = Some(place);
                return;
            }
        }
    }

    /// Lets go of what is final in the store, and of the messages that it was made from.
    async fn forget(&mut self, beat: &Beat) {
        if self.purged.elapsed() < PURGE || beat.closed == Millis::MIN || self.windows.has_changes() {
            return;
        }
        self.purged = Instant::now();
        self.windows.forget(beat.closed, beat.allowed_lateness);
        let mut below = None;
        while let Some((sequence, newest)) = self.read.front()
            && Partition::is_over(*newest, beat.closed, beat.allowed_lateness)
        {
            below = Some(sequence + 1);
            self.read.pop_front();
        }
        if let Some(below) = below {
            self.bus.purge(Kind::Counted, Some(self.bus.names.counted(self.index)), below).await;
        }
    }
}

struct AbortOnDrop(JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}
