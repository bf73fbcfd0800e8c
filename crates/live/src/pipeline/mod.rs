//! From the log to the store: read, recognise, score, count, write a checkpoint. One thread, in the order of the log.
//!
//! ```text
//! log ─▶ twice? ─▶ tickers ─▶ copies, bursts ─▶ model ─▶ windows ─▶ one transaction ─▶ events for readers
//!        skip                                   fails: dead letter   posts, windows, alerts, place in the log
//! ```
//!
//! What holds: a post changes windows once, whenever the process dies: either its transaction is in the store and the
//! checkpoint lies behind it, or neither is and the log has it again. A store that cannot be written is tried again while
//! sources go on filling the log.

mod commit;
mod restart;
mod spread;

pub use restart::Parts;

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use crate::alerts::Alerts;
use crate::board::{Pace, State};
use crate::copies::{Copies, fingerprint};
use crate::error::{Error, Result};
use crate::log::{Log, Reader};
use crate::post::{Post, ScoredPost};
use crate::scorer::{Polarity, Scorer, best, score_each};
use crate::state::{Counters, Question, Shared};
use crate::store::{Batch, DeadLetter, SourceState, Store};
use crate::tickers::Tickers;
use crate::time::{self, MINUTE, Millis, SECOND};
use crate::windows::Windows;

/// Posts after which a checkpoint is written even if it is early.
const MAX_UNWRITTEN: usize = 20_000;
/// With so many posts waiting nobody sees the newest anyway. Checkpoints are then four times as far apart: a page of an index
/// that several posts change is written once.
const FAR_BEHIND: u64 = 5_000;
/// A live source that has said nothing for so long does not hold the watermark.
const IDLE: Millis = 30 * SECOND;
/// With live sources only, the watermark follows the clock at this distance.
const BEHIND_CLOCK: Millis = MINUTE;
/// A source that is not connected for longer does not keep the clock from closing windows.
const PATIENCE: Millis = 5 * MINUTE;
const WAIT: Duration = Duration::from_millis(20);

#[derive(Clone, Debug)]
pub struct PipelineOptions {
    /// Time between checkpoints while posts come.
    pub checkpoint_every: Duration,
    /// End when all sources are done and everything is counted.
    pub exit_when_done: bool,
    /// Posts and windows are kept for so long.
    pub retention: Option<Duration>,
    /// Records of the log are kept for so long after they are in the store.
    pub log_retention: Duration,
    /// Texts that are remembered to recognise copies: 32 bytes each and 6 for authors, taken at the start.
    pub remembered_texts: usize,
}

impl Default for PipelineOptions {
    fn default() -> Self {
        Self {
            checkpoint_every: Duration::from_millis(250),
            exit_when_done: false,
            retention: None,
            log_retention: Duration::from_secs(24 * 3600),
            remembered_texts: 1_000_000,
        }
    }
}

pub struct Pipeline<'a> {
    shared: Arc<Shared>,
    log: Log,
    reader: Reader,
    store: Box<dyn Store>,
    windows: Windows,
    copies: Copies,
    alerts: Alerts,
    tickers: Arc<dyn Tickers>,
    scorer: &'a mut dyn Scorer,
    polarity: Polarity,
    labels: usize,
    questions: Receiver<Question>,
    options: PipelineOptions,
    /// Workers that score and sum.
    spread: Option<spread::Spread>,
    stop: Arc<AtomicBool>,
    /// What the next checkpoint writes.
    batch: Batch,
    /// Identities in it.
    unwritten: HashSet<u128>,
    written_at: Instant,
    tidied_at: Instant,
    clock: Clock,
    /// No source will bring more, and all windows were closed.
    finished: bool,
}

impl Pipeline<'_> {
    /// Works until it is told to stop, or everything is done and that is asked for.
    ///
    /// # Errors
    /// A damaged log, or a model that cannot answer at all.
    pub fn run(&mut self) -> Result<()> {
        while !self.stop.load(Ordering::Relaxed) {
            self.answer_questions();
            if self.spread.is_some() {
                self.spread_work()?;
            } else {
                let posts = self.read(self.scorer.batch())?;
                if !posts.is_empty() {
                    self.finished = false;
                    self.count(posts)?;
                }
            }
            let caught_up = self.position() >= self.log.end();
            let behind = self.log.end().saturating_sub(self.position()) > FAR_BEHIND;
            let due = self.written_at.elapsed() >= self.options.checkpoint_every * if behind { 4 } else { 1 };
            if self.batch.posts.len() >= MAX_UNWRITTEN || (due && self.has_news()) {
                self.checkpoint()?;
            }
            if caught_up {
                if self.follow_time() {
                    if self.finished {
                        self.counted_windows().close_all();
                    }
                    self.checkpoint()?;
                }
                if self.finished && self.options.exit_when_done {
                    return Ok(());
                }
                self.note_deliveries()?;
                self.tidy();
                if self.spread.is_none() {
                    self.log.wait(self.reader.position(), WAIT);
                }
            }
        }
        if self.has_news() { self.checkpoint() } else { Ok(()) }
    }

    fn has_news(&self) -> bool {
        let spread = self.spread.as_ref().is_some_and(|s| s.front.has_news() || s.windows.has_changes());
        spread || self.position() > self.batch.checkpoint.seq
    }

    /// Records before this were counted, or need not be.
    fn position(&self) -> u64 {
        let out = self.spread.as_ref().and_then(|s| s.front.first_pending());
        out.unwrap_or_else(|| self.reader.position())
    }

    /// The windows that signals are made of.
    fn counted_windows(&mut self) -> &mut Windows {
        self.spread.as_mut().map_or(&mut self.windows, |s| &mut s.windows)
    }

    /// Up to so many posts that are not counted yet.
    fn read(&mut self, want: usize) -> Result<Vec<(u64, Post)>> {
        let want = want.max(1);
        let mut posts = Vec::with_capacity(want);
        let mut fresh: Vec<(u128, u64, Post)> = Vec::with_capacity(want);
        loop {
            let full = posts.len() + fresh.len() >= want;
            let record = if full { None } else { self.reader.next_record()? };
            let Some((seq, record)) = record else {
                if fresh.is_empty() {
                    return Ok(posts);
                }
                // All at once: the store may be on another machine.
                let identities: Vec<u128> = fresh.iter().map(|(identity, ..)| *identity).collect();
                let known = self.with_store(|store| store.known(&identities))?;
                Counters::add(&self.shared.counters.duplicates, known.len());
                let new = fresh.drain(..).filter(|(identity, ..)| !known.contains(identity));
                posts.extend(new.map(|(_, seq, post)| (seq, post)));
                continue;
            };
            let post: Post = match serde_json::from_slice(&record) {
                Ok(post) => post,
                Err(e) => {
                    let raw = String::from_utf8_lossy(&record);
                    self.batch.dead_letters.push(DeadLetter::new("log", format!("record {seq}: {e}"), &raw));
                    continue;
                }
            };
            if let Some(cursor) = &post.cursor {
                self.source(&post.source).cursor = Some(cursor.clone());
            }
            let identity = post.identity();
            if self.unwritten.insert(identity) {
                fresh.push((identity, seq, post));
            } else {
                Counters::add(&self.shared.counters.duplicates, 1);
            }
        }
    }

    /// Works with the store for as long as it takes: while it is down the log goes on taking posts, questions are answered,
    /// and the page says what is wrong.
    fn with_store<T>(&mut self, mut work: impl FnMut(&mut dyn Store) -> Result<T>) -> Result<T> {
        let mut pause = Duration::from_millis(50);
        loop {
            let trouble = match work(&mut *self.store) {
                Ok(value) => {
                    self.shared.note_store(None);
                    return Ok(value);
                }
                // Asked to stop and nowhere to write: the log has it all for the next start.
                Err(e) if self.stop.load(Ordering::Relaxed) || matches!(e, Error::StoreChanged { .. }) => {
                    return Err(e);
                }
                Err(Error::Store { why, .. } | Error::StoreAway { why, .. }) => why,
                Err(e) => e.to_string(),
            };
            Counters::add(&self.shared.counters.store_failures, 1);
            self.shared.note_store(Some(trouble.lines().next().unwrap_or_default().to_owned()));
            let until = Instant::now() + pause;
            while Instant::now() < until && !self.stop.load(Ordering::Relaxed) {
                self.answer_questions();
                std::thread::sleep(WAIT.min(pause));
            }
            pause = (pause * 2).min(Duration::from_secs(2));
        }
    }

    fn source(&mut self, name: &str) -> &mut SourceState {
        self.batch.checkpoint.sources.entry(name.to_owned()).or_default()
    }

    fn count(&mut self, posts: Vec<(u64, Post)>) -> Result<()> {
        let texts: Vec<&str> = posts.iter().map(|(_, p)| p.text.as_str()).collect();
        let answers = score_each(&mut *self.scorer, &texts, self.labels);
        let scored_at = time::now();
        for ((seq, post), answer) in posts.into_iter().zip(answers) {
            match answer {
                Ok(probabilities) => self.count_one(seq, post, probabilities, scored_at),
                Err(reason) => {
                    let letter = DeadLetter::new(&post.source, format!("cannot be scored: {reason}"), &post.text);
                    self.batch.dead_letters.push(letter);
                }
            }
        }
        Ok(())
    }

    fn count_one(&mut self, seq: u64, post: Post, probabilities: Vec<f32>, scored_at: Millis) {
        let tickers = self.tickers.find(&post.text);
        let mut sectors: Vec<String> = tickers.iter().filter_map(|t| self.tickers.sector(&t.symbol)).collect();
        sectors.sort_unstable();
        sectors.dedup();
        let fingerprint = fingerprint(&post);
        let told = post.copy_of.as_deref();
        let verdict = self.copies.observe(fingerprint, &post.source, &post.id, &post.author, told, post.event_time);
        let (label, score) = (best(&probabilities), self.polarity.score(&probabilities));
        let mut scored = ScoredPost {
            seq,
            post,
            scored_at,
            available_at: scored_at,
            tickers,
            sectors,
            probabilities,
            label,
            score,
            weight: verdict.weight,
            is_copy_of: verdict.is_copy_of,
            damped: verdict.damped,
            too_late: false,
        };
        scored.too_late = match &mut self.spread {
            None => self.windows.add(&scored, &*self.tickers),
            Some(spread) => {
                let open = self.windows.place(scored.post.event_time);
                spread.put(&scored, open, self.windows.watermark(), &*self.tickers);
                open.contains(&false)
            }
        };
        self.windows.heard(&scored.post.source, scored.post.event_time);
        self.windows.advance();
        let counters = &self.shared.counters;
        Counters::add(&counters.scored, 1);
        Counters::add(&counters.copies, scored.is_copy_of.is_some().into());
        Counters::add(&counters.damped, scored.damped.into());
        Counters::add(&counters.too_late, scored.too_late.into());
        self.batch.posts.push(scored);
        self.batch.fingerprints.push(fingerprint);
    }

    /// With everything counted: lets go of sources that are idle or done, lets the clock move the watermark, and closes the
    /// windows when nothing more will come. True if there is something to write.
    fn follow_time(&mut self) -> bool {
        let now = self.clock.now();
        let sources = self.shared.inlet.board().all();
        let (mut replaying, mut live, mut behind) = (false, false, false);
        for (name, source) in &sources {
            let ended = matches!(source.state, State::Done | State::Stopped);
            // What it delivered last may not have been read yet.
            let over = ended && source.end_seq <= self.position();
            let quiet = now - source.last_post_at.unwrap_or(source.since) > IDLE;
            if over || (source.pace == Pace::Live && quiet) {
                self.windows.silent(name);
            }
            match source.pace {
                Pace::Replay => replaying |= !over,
                Pace::Live if ended => {}
                Pace::Live => {
                    live = true;
                    behind |= match source.state {
                        State::Connected => !quiet && source.lag.is_none_or(|lag| lag > 2 * MINUTE),
                        _ => now - source.since < PATIENCE,
                    };
                }
            }
        }
        if sources.is_empty() || replaying {
            return false;
        }
        if live {
            // Not while a source catches up with what it missed.
            if !behind {
                self.windows.advance_to(now - BEHIND_CLOCK);
            }
            self.close_what_is_told();
            return self.counted_windows().has_changes() && self.written_at.elapsed() >= Duration::from_secs(1);
        }
        self.is_told() && !std::mem::replace(&mut self.finished, true)
    }

    /// Alerts that a webhook has taken are marked in the store.
    fn note_deliveries(&mut self) -> Result<()> {
        let ids = self.shared.take_delivered();
        if ids.is_empty() { Ok(()) } else { self.with_store(|store| store.delivered(&ids)) }
    }

    /// Questions of the API come before posts, but only those that wait now: neither starves the other.
    fn answer_questions(&mut self) {
        let waiting: Vec<Question> = self.questions.try_iter().take(16).collect();
        for question in waiting {
            if question.answer.is_closed() {
                continue;
            }
            let texts: Vec<&str> = question.texts.iter().map(String::as_str).collect();
            let answers: Result<Vec<_>, _> = score_each(&mut *self.scorer, &texts, self.labels).into_iter().collect();
            // Who asked may have left.
            let _ = question.answer.send(answers);
        }
    }
}

/// The time of day at the start and the steady clock since: when somebody sets the clock forward, windows do not close.
struct Clock {
    wall: Millis,
    steady: Instant,
}

impl Clock {
    fn start() -> Self {
        Self { wall: time::now(), steady: Instant::now() }
    }

    fn now(&self) -> Millis {
        let passed = i64::try_from(self.steady.elapsed().as_millis()).unwrap_or(0);
        (self.wall + passed).min(time::now())
    }
}
