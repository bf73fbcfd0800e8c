//! The windows of some of the keys, in a process of their own, and what the others are told of them.
//!
//! A partition sums; it knows no names, no histories and no watermark of its own. What a sum means (the interval, momentum,
//! attention, revisions) is for [`Windows`] to say, which is told the sums: [`Windows::told`]. Sums only grow, so of two for
//! the same window the one with more mentions is the newer.

use std::collections::{BTreeMap, BTreeSet};

use super::accumulator::Accumulator;
use super::authors::Authors;
use super::{Scope, Window, Windows};
use crate::bus::wire::{Counted, Row};
use crate::id::Id;
use crate::tickers::Tickers;
use crate::time::{MINUTE, Millis};

type Place = (Window, Millis, Scope, String);

/// Windows stay for so long after they are final and stored: the store's last transactions may be lost in a power cut.
const GRACE: Millis = 10 * MINUTE;

#[derive(Default)]
pub(crate) struct Partition {
    sums: BTreeMap<Place, Accumulator>,
    dirty: BTreeSet<Place>,
    /// The first record of the log that was not counted.
    through: u64,
}

impl Partition {
    /// Counts a post, unless it was counted already.
    pub(crate) fn count(&mut self, post: &Counted) {
        if post.seq < self.through {
            return;
        }
        self.through = post.seq + 1;
        let id = Id::from(&*post.id);
        for window in Window::ALL.into_iter().filter(|w| post.windows[*w as usize]) {
            for (scope, key) in &post.keys {
                let place = (window, window.start(post.time), *scope, key.clone());
                let sums = self.sums.entry(place.clone()).or_default();
                sums.authors.add(post.author);
                sums.copies += u64::from(post.copy);
                sums.damped += u64::from(post.damped);
                sums.add_score(post.seq, &id, post.score, post.weight, post.positive, post.negative);
                self.dirty.insert(place);
            }
        }
    }

    /// Records before this were counted or do not concern it.
    pub(crate) fn came_to(&mut self, through: u64) {
        self.through = self.through.max(through);
    }

    pub(crate) fn through(&self) -> u64 {
        self.through
    }

    pub(crate) fn has_changes(&self) -> bool {
        !self.dirty.is_empty()
    }

    pub(crate) fn in_memory(&self) -> usize {
        self.sums.len()
    }

    /// Everything is to be told again, to somebody who knows nothing.
    pub(crate) fn tell_all(&mut self) {
        self.dirty = self.sums.keys().cloned().collect();
    }

    /// What changed, up to `most` windows. Those that were not taken are to be given back.
    pub(crate) fn take_changes(&mut self, most: usize) -> Vec<Row> {
        let mut rows = Vec::with_capacity(most.min(self.dirty.len()));
        while rows.len() < most
            && let Some(place) = self.dirty.pop_first()
        {
            if let Some(sums) = self.sums.get(&place) {
                rows.push(row(place, sums));
            }
        }
        rows
    }

    pub(crate) fn give_back(&mut self, rows: Vec<Row>) {
        self.dirty.extend(rows.into_iter().map(|r| (r.window, r.start, r.scope, r.key)));
    }

    /// Forgets windows that are final and told, when windows were closed in the store up to `closed`.
    pub(crate) fn forget(&mut self, closed: Millis, allowed_lateness: Millis) {
        let dirty = &self.dirty;
        self.sums.retain(|place, _| !is_over(place.0, place.1, closed, allowed_lateness) || dirty.contains(place));
    }

    /// Whether no window of a moment is needed any more.
    pub(crate) fn is_over(time: Millis, closed: Millis, allowed_lateness: Millis) -> bool {
        Window::ALL.into_iter().all(|w| is_over(w, w.start(time), closed, allowed_lateness))
    }
}

fn is_over(window: Window, start: Millis, closed: Millis, allowed_lateness: Millis) -> bool {
    start.saturating_add(window.size() + allowed_lateness + GRACE) <= closed
}

fn row((window, start, scope, key): Place, s: &Accumulator) -> Row {
    Row {
        window,
        scope,
        key,
        start,
        mentions: s.mentions,
        positive: s.positive,
        negative: s.negative,
        copies: s.copies,
        damped: s.damped,
        weights: [
            s.weight,
            s.weight_squares,
            s.weighted_score,
            s.weighted_square,
            s.positive_weight,
            s.negative_weight,
        ],
        authors: s.authors.count(),
        top: s.top.iter().map(|t| (t.rank, t.seq, t.id.to_string())).collect(),
    }
}

impl Windows {
    /// Takes note of a post whose sums are made elsewhere: which of its windows take it, and all keys that it counts for.
    pub(crate) fn place(&mut self, time: Millis) -> [bool; 4] {
        self.latest = self.latest.max(time);
        Window::ALL.map(|w| !self.is_final(w, w.start(time)))
    }

    /// The series that a post counts for, as keys.
    pub(crate) fn keys_of(&mut self, post: &crate::post::ScoredPost, tickers: &dyn Tickers) -> Vec<(Scope, String)> {
        let ids = self.series.of_post(post, tickers);
        ids.into_iter().map(|id| self.series.get(id)).map(|s| (s.scope, s.key.to_string())).collect()
    }

    pub(crate) fn saw(&mut self, latest: Millis) {
        self.latest = self.latest.max(latest);
    }

    /// Takes the sums of a window that were made elsewhere, if they are newer than what is known. `stored` says with which
    /// revision and how many mentions the store has the window.
    ///
    /// # Errors
    /// What `stored` says is wrong; nothing was taken then.
    pub(crate) fn told<E>(
        &mut self,
        row: Row,
        tickers: &dyn Tickers,
        stored: impl FnOnce() -> Result<Option<(u32, u64)>, E>,
    ) -> Result<(), E> {
        let Some(id) = self.series.id(row.scope, &row.key, || match row.scope {
            Scope::Ticker => tickers.name(&row.key),
            Scope::Sector | Scope::Market => None,
        }) else {
            return Ok(());
        };
        let place = (row.window, row.start);
        let known = self.groups.get(&place).and_then(|g| g.sums.get(&id)).map(|s| (s.revision, s.mentions, true));
        let (revision, mentions, in_memory) = match known {
            Some(known) => known,
            None => match stored()? {
                Some((revision, mentions)) => (revision, mentions, false),
                None => (0, 0, false),
            },
        };
        let newer = row.mentions > mentions;
        if !newer && in_memory {
            return Ok(());
        }
        let over = row.start.saturating_add(row.window.size()) <= self.watermark;
        if !newer && revision > 0 && self.is_final(row.window, row.start) {
            return Ok(());
        }
        if row.window == Window::H1 && newer {
            let more = u32::try_from(row.mentions - mentions).unwrap_or(u32::MAX);
            self.series.get_mut(id).baseline.add(row.start, more);
        }
        let group = self.groups.entry(place).or_default();
        if over && !group.closed {
            super::close(place, group, &mut self.dirty);
        }
        group.closed |= revision > 0;
        // A window that closed while nobody knew its sums closes now.
        if newer || (group.closed && revision == 0) {
            self.dirty.insert((row.window, row.start, id));
        }
        group.sums.insert(id, Box::new(Accumulator { revision, ..accumulator(row) }));
        Ok(())
    }
}

fn accumulator(row: Row) -> Accumulator {
    let [weight, weight_squares, weighted_score, weighted_square, positive_weight, negative_weight] = row.weights;
    Accumulator {
        mentions: row.mentions,
        positive: row.positive,
        negative: row.negative,
        copies: row.copies,
        damped: row.damped,
        weight,
        weight_squares,
        weighted_score,
        weighted_square,
        positive_weight,
        negative_weight,
        authors: Authors::Told(row.authors),
        top: row
            .top
            .into_iter()
            .map(|(rank, seq, id)| super::accumulator::Top { rank, seq, id: Id::from(&*id) })
            .collect(),
        revision: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scorer::Polarity;
    use crate::time::HOUR;
    use crate::windows::WindowOptions;

    struct Nobody;

    impl Tickers for Nobody {
        fn find(&self, _: &str) -> Vec<crate::tickers::TickerMention> {
            Vec::new()
        }
        fn sector(&self, _: &str) -> Option<String> {
            None
        }
        fn name(&self, _: &str) -> Option<String> {
            None
        }
    }

    fn post(seq: u64, time: Millis) -> Counted {
        Counted {
            seq,
            id: seq.to_string(),
            time,
            author: seq.wrapping_mul(0x9e37_79b9_7f4a_7c15),
            score: if seq.is_multiple_of(3) { -0.5 } else { 0.5 },
            weight: 1.0,
            positive: !seq.is_multiple_of(3),
            negative: seq.is_multiple_of(3),
            copy: false,
            damped: false,
            windows: [true; 4],
            keys: vec![(Scope::Ticker, "XYZ".into()), (Scope::Market, "market".into())],
        }
    }

    fn windows() -> Windows {
        Windows::new(WindowOptions::default(), Polarity { positive: 0, negative: 2 })
    }

    fn tell(windows: &mut Windows, rows: Vec<Row>) {
        for row in rows {
            windows.told(row, &Nobody, || Ok::<_, ()>(None)).unwrap();
        }
    }

    #[test]
    fn what_comes_twice_counts_once_on_both_sides() {
        let mut partition = Partition::default();
        let posts: Vec<Counted> = (0..40).map(|i| post(i, i as i64 * 1_000)).collect();
        posts[..25].iter().for_each(|p| partition.count(p));
        // The same again and some more, as after a restart of who sends them.
        posts[10..].iter().for_each(|p| partition.count(p));
        let mut windows = windows();
        let rows = partition.take_changes(usize::MAX);
        tell(&mut windows, rows.clone());
        tell(&mut windows, rows);
        windows.saw(39_000);
        let signals = windows.take_changes();
        assert_eq!(signals.len(), 8, "four windows of two keys");
        for signal in &signals {
            assert_eq!((signal.values.mentions, signal.values.unique_authors, signal.revision), (40, 40, 0));
            assert_eq!(signal.values.top_posts.len(), 5);
        }
        // An older message that was late changes nothing.
        let mut old = Partition::default();
        posts[..25].iter().for_each(|p| old.count(p));
        tell(&mut windows, old.take_changes(usize::MAX));
        assert!(!windows.has_changes());
    }

    #[test]
    fn a_window_closes_when_its_sums_come_late_and_once() {
        let mut partition = Partition::default();
        (0..6).for_each(|i| partition.count(&post(i, i as i64)));
        let mut windows = windows();
        windows.advance_to(HOUR / 2);
        tell(&mut windows, partition.take_changes(usize::MAX));
        let closed = windows.take_changes();
        assert!(closed.iter().all(|s| s.revision == u32::from(s.window.size() < HOUR)), "1m and 5m are over");
        // A restarted front knows revision 1 from its store and nothing is written anew.
        partition.tell_all();
        let mut again = super::tests::windows();
        again.advance_to(HOUR / 2);
        for row in partition.take_changes(usize::MAX) {
            let revision = u32::from(row.window.size() < HOUR);
            again.told(row, &Nobody, || Ok::<_, ()>(Some((revision, 6)))).unwrap();
        }
        assert!(!again.has_changes());
        again.advance_to(HOUR + 1);
        assert_eq!(
            again.take_changes().iter().map(|s| (s.window, s.revision)).collect::<Vec<_>>(),
            [(Window::H1, 1), (Window::H1, 1)]
        );
    }

    #[test]
    fn what_is_final_and_told_is_forgotten() {
        let mut partition = Partition::default();
        partition.count(&post(0, 0));
        let closed = HOUR + MINUTE + GRACE;
        partition.forget(closed, HOUR);
        assert_eq!(partition.in_memory(), 8, "nothing was told yet");
        partition.take_changes(usize::MAX);
        partition.forget(closed, HOUR);
        assert_eq!(partition.in_memory(), 6, "the minute is over");
        assert!(!Partition::is_over(0, closed, HOUR) && Partition::is_over(0, 30 * HOUR, HOUR));
    }
}
