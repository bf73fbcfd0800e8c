//! Checkpoints, what readers are told after one, and tidying up.

use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime};

use super::Pipeline;
use crate::board::Pace;
use crate::error::Result;
use crate::hub::Kind;
use crate::post::Post;
use crate::state::Counters;
use crate::store::Batch;
use crate::time::{self, Millis};

/// Posts of one checkpoint that are sent to readers; in a replay nobody can read more.
const SHOWN: usize = 200;
/// The same for signals of one window.
const SHOWN_SIGNALS: usize = 2_000;
const TIDY_EVERY: Duration = Duration::from_secs(60);

impl Pipeline<'_> {
    /// Writes everything up to here in one transaction, for as long as it takes.
    pub(super) fn checkpoint(&mut self) -> Result<()> {
        if !self.send_counted()? {
            return Ok(());
        }
        self.batch.signals = self.counted_windows().take_changes();
        self.batch.alerts = self.alerts.check(self.batch.signals.iter().map(|s| &**s));
        let letters = self.shared.inlet.take_dead_letters();
        self.batch.dead_letters.extend(letters);
        let position = self.position();
        let checkpoint = &mut self.batch.checkpoint;
        checkpoint.seq = position;
        checkpoint.watermark = self.windows.watermark();
        checkpoint.latest = self.windows.latest();
        let heard = self.windows.sources();
        for (name, state) in &mut checkpoint.sources {
            state.newest = heard.get(name).copied();
        }
        for (name, newest) in heard {
            checkpoint.sources.entry(name.clone()).or_default().newest = Some(*newest);
        }
        let mut written = std::mem::take(&mut self.batch);
        self.with_store(|store| {
            written.available_at = time::now();
            store.commit(&written)
        })?;
        self.written_at = Instant::now();
        self.unwritten.clear();
        self.batch.checkpoint = written.checkpoint.clone();
        if let Some(spread) = &mut self.spread {
            self.unwritten.extend(spread.front.pending().map(Post::identity));
            spread.front.committed(spread.windows.watermark());
        }
        self.shared.inlet.set_done(written.checkpoint.seq);
        self.tell(&written);
        Ok(())
    }

    fn tell(&self, written: &Batch) {
        let shared = &self.shared;
        Counters::add(&shared.counters.checkpoints, 1);
        Counters::add(&shared.counters.dead_letters, written.dead_letters.len());
        let windows = self.spread.as_ref().map_or(&self.windows, |s| &s.windows);
        shared.counters.windows_in_memory.store(windows.in_memory() as u64, Ordering::Relaxed);
        shared.counters.log_bytes.store(self.log.bytes(), Ordering::Relaxed);
        {
            let mut snapshot = shared.snapshot.write().unwrap_or_else(PoisonError::into_inner);
            snapshot.watermark = windows.watermark();
            snapshot.latest = written.checkpoint.latest;
            written.signals.iter().for_each(|s| snapshot.update(s));
        }
        {
            let sources = shared.inlet.board().all();
            let is_live = |name: &str| sources.get(name).is_some_and(|s| s.pace == Pace::Live);
            let mut delays = shared.delays.lock().unwrap_or_else(PoisonError::into_inner);
            let visible = time::now();
            for post in written.posts.iter().rev().take(1_000).map(|p| &p.post) {
                let event = is_live(&post.source).then(|| post.received_at - post.event_time);
                delays.add(event, visible - post.received_at);
            }
        }
        for alert in &written.alerts {
            shared.hub.publish(Kind::Alert, alert.to_json());
        }
        let snapshot = shared.snapshot();
        let mut shown = [0; 4];
        // The newest window of each series is what a page shows; of the others a reader asks the history.
        for signal in written.signals.iter().rev() {
            let newest =
                snapshot.get(signal.window, signal.scope, &signal.key).is_some_and(|s| s.start == signal.start);
            let count = &mut shown[signal.window as usize];
            if newest && *count < SHOWN_SIGNALS {
                *count += 1;
                shared.hub.publish(Kind::Signal(signal.window), snapshot.show(signal));
            }
        }
        drop(snapshot);
        for post in &written.posts[written.posts.len().saturating_sub(SHOWN)..] {
            let mut post = post.clone();
            post.available_at = written.available_at;
            shared.hub.publish(Kind::Post, post.to_json(&shared.model, self.store.keeps_text()));
        }
    }

    /// Forgets what is old, a little at a time.
    pub(super) fn tidy(&mut self) {
        if self.tidied_at.elapsed() < TIDY_EVERY {
            return;
        }
        self.tidied_at = Instant::now();
        let before = SystemTime::now().checked_sub(self.options.log_retention).unwrap_or(SystemTime::UNIX_EPOCH);
        // What cannot be removed now is tried again in a minute.
        let _ = self.log.remove(self.batch.checkpoint.seq, before);
        if let Some(retention) = self.options.retention {
            let age = Millis::try_from(retention.as_millis()).unwrap_or(Millis::MAX);
            let cutoff = time::now().saturating_sub(age);
            if self.store.forget(cutoff, Duration::from_millis(200)).is_err() {
                Counters::add(&self.shared.counters.store_failures, 1);
            }
        }
    }
}
