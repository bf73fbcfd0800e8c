//! Where sources deliver: checks, recognises what came twice, writes the log, and answers when it is durable.

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::board::{Board, State};
use crate::error::{Error, Result};
use crate::log::Log;
use crate::post::{AuthorKey, Incoming, Post};
use crate::store::{DeadLetter, Readers};
use crate::time;

/// Posts that are remembered to recognise what comes again before the store has it.
/// More than a replay may have waiting and a checkpoint takes; a store that has them recognises the others.
const REMEMBERED: usize = 100_000;
/// Dead letters that wait for the next checkpoint.
const MAX_WAITING: usize = 10_000;
/// Posts in the log that are not in the store yet, at which a replay waits: more than two checkpoints take.
const REPLAY_BACKLOG: u64 = 50_000;

/// What became of a delivery.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Delivered {
    /// In the log, durably.
    pub accepted: usize,
    /// Were there already.
    pub duplicates: usize,
    /// Index in the delivery, and why.
    pub rejected: Vec<(usize, String)>,
}

#[derive(Clone)]
pub struct Inlet(Arc<Inner>);

struct Inner {
    log: Log,
    readers: Readers,
    names: AuthorKey,
    /// Of the model: a post is known if it was counted with this one.
    version: String,
    board: Board,
    recent: Mutex<Recent>,
    dead: Mutex<Vec<DeadLetter>>,
    /// Where each source goes on.
    cursors: Mutex<BTreeMap<String, String>>,
    /// Records before this are in the store.
    done: AtomicU64,
    stop: Arc<AtomicBool>,
}

struct Recent {
    order: VecDeque<u128>,
    known: HashSet<u128>,
}

impl Default for Recent {
    fn default() -> Self {
        // A set that is at most half full cleans up in its place; a fuller one would take twice as much one day.
        Self { order: VecDeque::with_capacity(REMEMBERED + 1), known: HashSet::with_capacity(2 * REMEMBERED) }
    }
}

impl Recent {
    fn add(&mut self, identity: u128) {
        if self.known.insert(identity) {
            self.order.push_back(identity);
        }
        while self.order.len() > REMEMBERED {
            if let Some(oldest) = self.order.pop_front() {
                self.known.remove(&oldest);
            }
        }
    }
}

impl Inlet {
    pub fn new(
        log: Log,
        readers: Readers,
        names: AuthorKey,
        version: String,
        board: Board,
        stop: Arc<AtomicBool>,
    ) -> Self {
        let (recent, dead, cursors, done) = Default::default();
        Self(Arc::new(Inner { log, readers, names, version, board, recent, dead, cursors, done, stop }))
    }

    pub fn board(&self) -> &Board {
        &self.0.board
    }

    pub fn stopping(&self) -> bool {
        self.0.stop.load(Ordering::Relaxed)
    }

    /// Posts in the log that are not in the store yet.
    pub fn backlog(&self) -> u64 {
        self.0.log.end().saturating_sub(self.0.done.load(Ordering::Relaxed))
    }

    pub(crate) fn set_done(&self, seq: u64) {
        self.0.done.store(seq, Ordering::Relaxed);
    }

    /// Takes posts: when this returns, the accepted ones are in the log. Blocks; in async code use [`Inlet::deliver`].
    ///
    /// # Errors
    /// The log cannot be written: then none of them was taken, and the source may try again.
    pub fn take(&self, source: &str, posts: Vec<Incoming>) -> Result<Delivered> {
        let now = time::now();
        let mut delivered = Delivered::default();
        let mut fresh: Vec<(u128, Post)> = Vec::with_capacity(posts.len());
        let mut seen = HashSet::new();
        for (index, incoming) in posts.into_iter().enumerate() {
            let raw: String = incoming.text.chars().take(crate::store::MAX_RAW).collect();
            match Post::check(source, incoming, now, &self.0.names) {
                Ok(post) => {
                    let identity = post.identity();
                    if seen.insert(identity) {
                        fresh.push((identity, post));
                    } else {
                        delivered.duplicates += 1;
                    }
                }
                Err(reason) => {
                    self.dead_letter(DeadLetter::new(source, reason.clone(), &raw));
                    delivered.rejected.push((index, reason));
                }
            }
        }
        let known = self.known(&fresh);
        fresh.retain(|(identity, _)| !known.contains(identity));
        delivered.duplicates += known.len();
        if fresh.is_empty() {
            return Ok(delivered);
        }
        let newest = fresh.iter().map(|(_, p)| p.event_time).max().unwrap_or(now);
        let records = fresh.iter().map(|(_, post)| serde_json::to_vec(post)).collect::<Result<Vec<_>, _>>();
        let records = records.map_err(|e| Error::Invalid(format!("a post cannot be written as JSON: {e}")))?;
        let count = records.len();
        let first = self.0.log.append(records)?;
        if let Some(cursor) = fresh.iter().rev().find_map(|(_, post)| post.cursor.clone()) {
            self.set_cursor(source, cursor);
        }
        let mut recent = self.recent();
        for (identity, _) in fresh {
            recent.add(identity);
        }
        drop(recent);
        self.0.board.delivered(source, count, newest, first + count as u64);
        delivered.accepted = count;
        Ok(delivered)
    }

    /// [`Inlet::take`] for async code; tries for as long as it takes if the log cannot be written (a full disk).
    ///
    /// # Errors
    /// The process stops.
    pub async fn deliver(&self, source: &str, posts: Vec<Incoming>) -> Result<Delivered> {
        let mut pause = Duration::from_millis(100);
        loop {
            let (inlet, name, batch) = (self.clone(), source.to_owned(), posts.clone());
            let outcome = tokio::task::spawn_blocking(move || inlet.take(&name, batch)).await;
            match outcome.map_err(|_| Error::Stopped)? {
                Ok(delivered) => return Ok(delivered),
                Err(Error::Stopped) => return Err(Error::Stopped),
                Err(e) => self.0.board.set(source, State::Connected, format!("waiting: {}", first_line(&e))),
            }
            if self.stopping() {
                return Err(Error::Stopped);
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_secs(5));
        }
    }

    /// Waits while so much is unscored that a replay had better not add to it.
    ///
    /// # Errors
    /// The process stops.
    pub fn wait_for_room(&self) -> Result<()> {
        while self.backlog() > REPLAY_BACKLOG {
            if self.stopping() {
                return Err(Error::Stopped);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    pub fn dead_letter(&self, letter: DeadLetter) {
        let mut dead = self.0.dead.lock().unwrap_or_else(PoisonError::into_inner);
        if dead.len() < MAX_WAITING {
            dead.push(letter);
        }
    }

    pub(crate) fn take_dead_letters(&self) -> Vec<DeadLetter> {
        std::mem::take(&mut *self.0.dead.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Posts that are in the log but not in the store yet are known, too.
    pub(crate) fn remember(&self, identity: u128) {
        self.recent().add(identity);
    }

    /// Where a source left off: behind everything of it that is in the log.
    pub fn cursor(&self, source: &str) -> Option<String> {
        self.0.cursors.lock().unwrap_or_else(PoisonError::into_inner).get(source).cloned()
    }

    pub(crate) fn set_cursor(&self, source: &str, cursor: String) {
        self.0.cursors.lock().unwrap_or_else(PoisonError::into_inner).insert(source.to_owned(), cursor);
    }

    fn recent(&self) -> MutexGuard<'_, Recent> {
        self.0.recent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Those that came before. In doubt a post is new: the pipeline looks again before it counts.
    fn known(&self, posts: &[(u128, Post)]) -> HashSet<u128> {
        let (mut known, mut rest) = (HashSet::new(), Vec::new());
        {
            let recent = self.recent();
            for (identity, _) in posts {
                if recent.known.contains(identity) {
                    known.insert(*identity);
                } else {
                    rest.push(*identity);
                }
            }
        }
        if !rest.is_empty() {
            known.extend(self.0.readers.with(|r| r.known(&rest, &self.0.version)).unwrap_or_default());
        }
        known
    }
}

pub(crate) fn first_line(error: &Error) -> String {
    error.to_string().lines().next().unwrap_or_default().to_owned()
}
