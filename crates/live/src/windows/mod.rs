//! Event-time windows: 1 minute, 5 minutes, 1 hour and 1 day, for each ticker, each sector and the market.
//!
//! ```text
//!            start         end                end + allowed lateness
//!  ────────────┼────────────┼──────────────────────────┼──────────▶ watermark
//!              open         closed (revision 1)        final
//!                           late posts correct it      later posts are kept, marked too late, and change nothing
//! ```
//!
//! The watermark says up to when posts are believed to have come: the smallest, over the sources that are heard from, of
//! the newest event time less the allowed disorder. It never goes back.
//!
//! What holds: a window is a function of the posts in it, in the order of the log. Nothing here reads the clock. What a
//! restart needs is in the store: posts that are not final are added again ([`Windows::restore`]), histories and baselines
//! come from the stored signals.

mod accumulator;
mod authors;
mod baseline;
pub(crate) mod partition;
mod series;
mod signal;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use accumulator::Accumulator;
pub(crate) use baseline::DAYS as BASELINE_DAYS;
use series::AllSeries;
pub use signal::{SPARKLINE, Signal, Thin, Trend, Values};

use crate::id::Id;
use crate::post::ScoredPost;
use crate::scorer::Polarity;
use crate::tickers::Tickers;
use crate::time::{DAY, HOUR, MINUTE, Millis, SECOND};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Window {
    #[serde(rename = "1m")]
    M1,
    #[serde(rename = "5m")]
    M5,
    #[serde(rename = "1h")]
    H1,
    #[serde(rename = "1d")]
    D1,
}

impl Window {
    pub const ALL: [Self; 4] = [Self::M1, Self::M5, Self::H1, Self::D1];

    pub fn size(self) -> Millis {
        match self {
            Self::M1 => MINUTE,
            Self::M5 => 5 * MINUTE,
            Self::H1 => HOUR,
            Self::D1 => DAY,
        }
    }

    pub fn name(self) -> &'static str {
        ["1m", "5m", "1h", "1d"][self as usize]
    }

    pub fn of_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|w| w.name() == name)
    }

    /// Where the window of a moment begins. Days are UTC days.
    pub fn start(self, time: Millis) -> Millis {
        time.div_euclid(self.size()) * self.size()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Scope {
    Ticker,
    Sector,
    Market,
}

impl Scope {
    pub const ALL: [Self; 3] = [Self::Ticker, Self::Sector, Self::Market];

    pub fn name(self) -> &'static str {
        ["ticker", "sector", "market"][self as usize]
    }

    pub fn of_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|s| s.name() == name)
    }
}

/// The key of the market's only series.
pub const MARKET: &str = "market";

#[derive(Clone, Debug)]
pub struct WindowOptions {
    /// How long after its end a window takes posts.
    pub allowed_lateness: Millis,
    /// How far a source may be out of order without its posts being late.
    pub allowed_disorder: Millis,
    pub thin: Thin,
    /// Tickers beyond so many get no series of their own; their posts still count for sectors and the market.
    pub max_series: usize,
}

impl Default for WindowOptions {
    fn default() -> Self {
        Self { allowed_lateness: 10 * MINUTE, allowed_disorder: 10 * SECOND, thin: Thin::default(), max_series: 20_000 }
    }
}

/// All windows of one kind that begin at one moment, by series.
#[derive(Default)]
struct Group {
    closed: bool,
    sums: HashMap<u32, Box<Accumulator>>,
}

pub struct Windows {
    options: WindowOptions,
    polarity: Polarity,
    series: AllSeries,
    groups: BTreeMap<(Window, Millis), Group>,
    /// What changed since the last [`Windows::take_changes`].
    dirty: BTreeSet<(Window, Millis, u32)>,
    /// The newest event time of each source that is heard from.
    sources: BTreeMap<String, Millis>,
    watermark: Millis,
    latest: Millis,
}

impl Windows {
    pub fn new(options: WindowOptions, polarity: Polarity) -> Self {
        let series = AllSeries::new(options.max_series);
        let (groups, dirty, sources) = Default::default();
        Self { options, polarity, series, groups, dirty, sources, watermark: Millis::MIN, latest: Millis::MIN }
    }

    pub fn options(&self) -> &WindowOptions {
        &self.options
    }

    pub fn watermark(&self) -> Millis {
        self.watermark
    }

    /// The newest event time of all.
    pub fn latest(&self) -> Millis {
        self.latest
    }

    pub(crate) fn sources(&self) -> &BTreeMap<String, Millis> {
        &self.sources
    }

    /// Whether no post can change a window any more.
    pub fn is_final(&self, window: Window, start: Millis) -> bool {
        start.saturating_add(window.size() + self.options.allowed_lateness) <= self.watermark
    }

    /// Posts from this time on belong to windows that are not final.
    pub fn oldest_needed(&self) -> Millis {
        let oldest = |w: Window| w.start(self.watermark.saturating_sub(w.size() + self.options.allowed_lateness));
        if self.watermark == Millis::MIN { Millis::MIN } else { Window::ALL.into_iter().map(oldest).min().unwrap_or(0) }
    }

    /// Counts a post in all its windows; true if it came too late for one of them.
    pub fn add(&mut self, post: &ScoredPost, tickers: &dyn Tickers) -> bool {
        self.latest = self.latest.max(post.post.event_time);
        self.count(post, tickers, true)
    }

    /// Counts a stored post again after a restart.
    pub fn restore(&mut self, post: &ScoredPost, tickers: &dyn Tickers) {
        self.count(post, tickers, false);
    }

    fn count(&mut self, post: &ScoredPost, tickers: &dyn Tickers, is_new: bool) -> bool {
        let time = post.post.event_time;
        let author = u64::from_str_radix(&post.post.author, 16).unwrap_or(0);
        let id_of_post = Id::from(&*post.post.id);
        let ids = self.series.of_post(post, tickers);
        let mut too_late = false;
        for window in Window::ALL {
            let start = window.start(time);
            if self.is_final(window, start) {
                too_late = true;
                continue;
            }
            let group = self.groups.entry((window, start)).or_default();
            for id in &ids {
                group.sums.entry(*id).or_default().add(post, &id_of_post, self.polarity, author);
                if is_new {
                    self.dirty.insert((window, start, *id));
                    if window == Window::H1 {
                        self.series.get_mut(*id).baseline.add(time, 1);
                    }
                }
            }
        }
        too_late
    }

    /// A source was heard from with this event time.
    pub fn heard(&mut self, source: &str, time: Millis) {
        match self.sources.get_mut(source) {
            Some(newest) => *newest = time.max(*newest),
            None => {
                self.sources.insert(source.to_owned(), time);
            }
        }
    }

    /// A source is idle or done: the watermark waits for it no longer.
    pub fn silent(&mut self, source: &str) {
        self.sources.remove(source);
    }

    /// Moves the watermark as far as the sources allow, closes windows, and forgets final ones.
    pub fn advance(&mut self) {
        if let Some(slowest) = self.sources.values().min() {
            self.advance_to(slowest.saturating_sub(self.options.allowed_disorder));
        }
    }

    /// Moves the watermark; it never goes back.
    pub fn advance_to(&mut self, watermark: Millis) {
        if watermark <= self.watermark {
            return;
        }
        let before = std::mem::replace(&mut self.watermark, watermark);
        // All windows end on a minute.
        if before.div_euclid(MINUTE) == watermark.div_euclid(MINUTE) {
            return;
        }
        for window in Window::ALL {
            let last = (window, watermark.saturating_sub(window.size()));
            for (key, group) in self.groups.range_mut((window, Millis::MIN)..=last) {
                close(*key, group, &mut self.dirty);
            }
        }
    }

    /// Closes all windows whatever the watermark: no source will bring more for now. Later posts still correct them.
    pub fn close_all(&mut self) {
        for (key, group) in &mut self.groups {
            close(*key, group, &mut self.dirty);
        }
    }

    /// The signals that changed, older windows first. Final windows are forgotten after this.
    pub fn take_changes(&mut self) -> Vec<Arc<Signal>> {
        let mut changed = Vec::with_capacity(self.dirty.len());
        for (window, start, id) in std::mem::take(&mut self.dirty) {
            let is_final = self.is_final(window, start);
            let Some(group) = self.groups.get_mut(&(window, start)) else { continue };
            let Some(sums) = group.sums.get_mut(&id) else { continue };
            if group.closed {
                sums.revision = sums.revision.saturating_add(1);
            }
            let passed = (self.latest.saturating_sub(start)) as f64 / window.size() as f64;
            let elapsed = if group.closed { 1.0 } else { passed.clamp(0.1, 1.0) };
            let series = self.series.get_mut(id);
            let attention = series.baseline.attention(window, start, elapsed, sums.mentions);
            let history = &mut series.histories[window as usize];
            let values = signal::values(sums, start, attention, history, self.options.thin);
            history.set(start, values.sentiment_score);
            let signal = Arc::new(Signal {
                key: series.key.clone(),
                scope: series.scope,
                name: series.name.clone(),
                window,
                start,
                end: start + window.size(),
                is_final,
                revision: sums.revision,
                sparkline: history.sparkline(window, start),
                values,
            });
            changed.push(signal);
        }
        let (watermark, lateness) = (self.watermark, self.options.allowed_lateness);
        self.groups.retain(|(window, start), _| start.saturating_add(window.size() + lateness) > watermark);
        changed
    }

    /// Whether [`Windows::take_changes`] would give any.
    pub fn has_changes(&self) -> bool {
        !self.dirty.is_empty()
    }

    /// How many windows are in memory.
    pub fn in_memory(&self) -> usize {
        self.groups.values().map(|g| g.sums.len()).sum()
    }

    pub(crate) fn restore_times(&mut self, watermark: Millis, latest: Millis, sources: BTreeMap<String, Millis>) {
        self.watermark = watermark;
        self.latest = latest;
        self.sources = sources;
    }

    /// A stored signal: its revision, its score in the history, its mentions in the baseline.
    pub(crate) fn restore_signal(&mut self, signal: &Signal) {
        let Some(id) = self.series.id(signal.scope, &signal.key, || signal.name.clone()) else { return };
        let series = self.series.get_mut(id);
        series.histories[signal.window as usize].set(signal.start, signal.values.sentiment_score);
        if signal.window == Window::H1 {
            series.baseline.add(signal.start, signal.values.mentions.try_into().unwrap_or(u32::MAX));
        }
        if let Some(group) = self.groups.get_mut(&(signal.window, signal.start)) {
            group.closed |= signal.revision > 0;
            if let Some(sums) = group.sums.get_mut(&id) {
                sums.revision = signal.revision;
            }
        }
    }

    pub(crate) fn sparkline(&self, signal: &Signal) -> Vec<Option<f64>> {
        let id = self.series.find(signal.scope, &signal.key);
        id.map_or_else(Vec::new, |id| {
            self.series.get(id).histories[signal.window as usize].sparkline(signal.window, signal.start)
        })
    }
}

fn close((window, start): (Window, Millis), group: &mut Group, dirty: &mut BTreeSet<(Window, Millis, u32)>) {
    if !std::mem::replace(&mut group.closed, true) {
        dirty.extend(group.sums.keys().map(|id| (window, start, *id)));
    }
}
