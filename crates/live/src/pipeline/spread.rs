//! The pipeline with a bus: workers score and sum, this thread keeps the order of the log and writes the store.
//!
//! ```text
//! log ─▶ twice? ─▶ out for scoring ─▶ tickers, copies, bursts ─▶ partitions by key ─▶ one transaction
//!        skip      any order back     in the order of the log    acknowledged first   posts, sums so far, place in the log
//! ```
//!
//! What holds: a post is in its partitions before it is in the store, so a crash between the two sends it again and an owner
//! passes over it. A window closes when the watermark has passed it in its partition as well as here.

use std::time::Duration;

use super::{Pipeline, WAIT};
use crate::bus::front::Front;
use crate::bus::wire::Counted;
use crate::error::Result;
use crate::post::ScoredPost;
use crate::scorer::Polarity;
use crate::state::Counters;
use crate::store::DeadLetter;
use crate::tickers::Tickers;
use crate::time::{self, Millis};
use crate::windows::{Scope, Signal, Window, Windows};

/// Posts that are read and sent at a time.
const TOGETHER: usize = 512;
const PAUSE: Duration = Duration::from_millis(100);

pub(super) struct Spread {
    pub(super) front: Front,
    /// Told by the owners of partitions. The pipeline's own windows know times only.
    pub(super) windows: Windows,
    polarity: Polarity,
}

impl Spread {
    pub(super) fn new(front: Front, windows: Windows, polarity: Polarity) -> Self {
        front.set_lateness(windows.options().allowed_lateness);
        Self { front, windows, polarity }
    }

    /// Gives a counted post to the partitions of its keys.
    pub(super) fn put(&mut self, scored: &ScoredPost, open: [bool; 4], watermark: Millis, tickers: &dyn Tickers) {
        if open == [false; 4] {
            return;
        }
        let post = Counted {
            seq: scored.seq,
            id: scored.post.id.clone(),
            time: scored.post.event_time,
            author: u64::from_str_radix(&scored.post.author, 16).unwrap_or(0),
            score: scored.score,
            weight: scored.weight,
            positive: scored.label == self.polarity.positive,
            negative: scored.label == self.polarity.negative,
            copy: scored.is_copy_of.is_some(),
            damped: scored.damped,
            windows: open,
            keys: self.windows.keys_of(scored, tickers),
        };
        self.front.put(post);
        self.front.seal_full(scored.seq, watermark);
    }
}

impl Pipeline<'_> {
    /// Sends texts out, counts what is answered, takes the sums that came.
    pub(super) fn spread_work(&mut self) -> Result<()> {
        let Some(spread) = &mut self.spread else { return Ok(()) };
        let room = spread.front.room();
        let more = room > 0 && self.reader.position() < self.log.end();
        let told = spread.front.hear(if more { Duration::ZERO } else { WAIT / 4 })?;
        if let Some(status) = spread.front.status() {
            *self.shared.bus.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = status;
        }
        spread.front.clear_tasks();
        let readers = self.shared.readers.clone();
        let stored = |scope: Scope, key: &str, window: Window, start: Millis| -> Result<Option<(u32, u64)>> {
            let found: Vec<Signal> = readers.with(|r| r.history(scope, key, window, (start, start), 1))?;
            Ok(found.first().map(|s| (s.revision, s.values.mentions)))
        };
        for mut sums in told {
            let rows = std::mem::take(&mut sums.rows);
            let taken = rows.into_iter().try_for_each(|row| {
                let (scope, key, window, start) = (row.scope, row.key.clone(), row.window, row.start);
                spread.windows.told(row, &*self.tickers, || stored(scope, &key, window, start))
            });
            match taken {
                Ok(()) => spread.front.note(&sums),
                // A store that is away: it is all told again.
                Err(_) => spread.front.refuse(),
            }
        }
        if more {
            let posts = self.read(room.min(TOGETHER))?;
            if let Some(spread) = &mut self.spread {
                self.finished &= posts.is_empty();
                posts.into_iter().for_each(|(seq, post)| spread.front.ask(seq, post));
            }
        }
        let scored_at = time::now();
        while self.batch.posts.len() < super::MAX_UNWRITTEN
            && let Some((seq, post, answer)) = self.spread.as_mut().and_then(|s| s.front.next_scored())
        {
            match answer {
                Ok(probabilities) if crate::scorer::check(&probabilities, self.labels).is_ok() => {
                    self.count_one(seq, post, probabilities, scored_at);
                }
                other => {
                    let reason = other.err().unwrap_or_else(|| "the worker gave no probabilities".into());
                    let letter = DeadLetter::new(&post.source, format!("cannot be scored: {reason}"), &post.text);
                    self.batch.dead_letters.push(letter);
                }
            }
        }
        self.tidy();
        Ok(())
    }

    /// Before a transaction: its posts go to their partitions, for as long as it takes. False: told to stop meanwhile.
    pub(super) fn send_counted(&mut self) -> Result<bool> {
        let position = self.position();
        let watermark = self.windows.watermark();
        if let Some(spread) = &mut self.spread {
            spread.front.seal(position, watermark);
        }
        while let Some(spread) = &mut self.spread
            && !spread.front.flush()?
        {
            if self.stop.load(std::sync::atomic::Ordering::Relaxed) {
                return Ok(false);
            }
            Counters::add(&self.shared.counters.bus_failures, 1);
            if let Some(status) = spread.front.status() {
                *self.shared.bus.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = status;
            }
            self.answer_questions();
            std::thread::sleep(PAUSE);
        }
        self.close_what_is_told();
        Ok(true)
    }

    /// Closes windows as far as their sums are here.
    pub(super) fn close_what_is_told(&mut self) {
        let (watermark, latest) = (self.windows.watermark(), self.windows.latest());
        if let Some(spread) = &mut self.spread {
            spread.windows.saw(latest);
            spread.windows.advance_to(spread.front.closing(watermark));
        }
    }

    /// Whether the sums of all that was counted are here.
    pub(super) fn is_told(&self) -> bool {
        self.spread.as_ref().is_none_or(|s| self.batch.posts.is_empty() && s.front.is_settled())
    }
}
