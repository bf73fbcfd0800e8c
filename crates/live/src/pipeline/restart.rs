//! Standing where the last process stopped: windows, copies and histories are made again from the store.

use std::collections::HashSet;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::Receiver;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use super::spread::Spread;
use super::{Clock, Pipeline, PipelineOptions};
use crate::alerts::Alerts;
use crate::bus::front::Front;
use crate::copies::{Copies, remembered_since};
use crate::error::{Error, Result};
use crate::log::Log;
use crate::post::Post;
use crate::scorer::{Polarity, Scorer};
use crate::state::{Question, Shared};
use crate::store::{Batch, Checkpoint, Store};
use crate::time::Millis;
use crate::windows::{WindowOptions, Windows};

/// What a pipeline is made of.
pub struct Parts<'a> {
    pub shared: Arc<Shared>,
    pub log: Log,
    pub store: Box<dyn Store>,
    pub scorer: &'a mut dyn Scorer,
    pub questions: Receiver<Question>,
    pub alerts: Alerts,
    pub windows: WindowOptions,
    pub options: PipelineOptions,
    pub(crate) bus: Option<Front>,
    pub stop: Arc<AtomicBool>,
}

impl<'a> Pipeline<'a> {
    /// Reads what the store has and opens the log behind it.
    ///
    /// # Errors
    /// A store or log that cannot be read, or that do not belong together; labels without a good and a bad one.
    pub fn resume(parts: Parts<'a>) -> Result<Self> {
        let Parts { shared, log, mut store, scorer, questions, alerts, windows, options, bus, stop } = parts;
        let polarity = Polarity::of(&shared.model.labels)?;
        let found = store.checkpoint()?;
        let mut spread = bus.map(|front| Spread::new(front, Windows::new(windows.clone(), polarity), polarity));
        let mut windows = Windows::new(windows, polarity);
        let mut copies = Copies::new(options.remembered_texts);
        if let Some(checkpoint) = &found {
            check_log(checkpoint, &log)?;
            let heard = checkpoint.sources.iter().filter_map(|(name, s)| Some((name.clone(), s.newest?))).collect();
            windows.restore_times(checkpoint.watermark, checkpoint.latest, heard);
            if let Some(spread) = &mut spread {
                spread.windows.restore_times(checkpoint.watermark, checkpoint.latest, Default::default());
            }
            let for_windows = windows.oldest_needed();
            let for_copies =
                if checkpoint.latest == Millis::MIN { Millis::MIN } else { remembered_since(checkpoint.latest) };
            store.posts_since(for_windows.min(for_copies), &mut |post, fingerprint| {
                let p = &post.post;
                if p.event_time >= for_copies {
                    copies.observe(fingerprint, &p.source, &p.id, &p.author, None, p.event_time);
                }
                if p.event_time >= for_windows {
                    match &mut spread {
                        None => windows.restore(&post, &*shared.tickers),
                        // Its partitions may have lost it, or never had it.
                        Some(spread) => {
                            spread.put(&post, windows.place(p.event_time), checkpoint.watermark, &*shared.tickers)
                        }
                    }
                }
            })?;
            let mut signals = Vec::new();
            store.recent_signals(checkpoint.latest, &mut |signal| {
                match &mut spread {
                    None => windows.restore_signal(&signal),
                    Some(spread) => spread.windows.restore_signal(&signal),
                }
                signals.push(signal);
            })?;
            let mut snapshot = shared.snapshot.write().unwrap_or_else(PoisonError::into_inner);
            for mut signal in signals {
                let histories = spread.as_ref().map_or(&windows, |s| &s.windows);
                signal.sparkline = histories.sparkline(&signal);
                snapshot.update(&Arc::new(signal));
            }
            snapshot.watermark = checkpoint.watermark;
            snapshot.latest = checkpoint.latest;
        }
        {
            let mut snapshot = shared.snapshot.write().unwrap_or_else(PoisonError::into_inner);
            snapshot.allowed_lateness = windows.options().allowed_lateness;
        }
        let checkpoint =
            found.unwrap_or(Checkpoint { watermark: Millis::MIN, latest: Millis::MIN, ..Default::default() });
        for (name, state) in &checkpoint.sources {
            if let Some(cursor) = &state.cursor {
                shared.inlet.set_cursor(name, cursor.clone());
            }
        }
        shared.inlet.set_done(checkpoint.seq);
        remember_unscored(&shared, &log, checkpoint.seq)?;
        if let Some(spread) = &mut spread {
            spread.front.starts_at(checkpoint.seq);
        }
        let reader = log.reader(checkpoint.seq);
        let tickers = shared.tickers.clone();
        let labels = shared.model.labels.len();
        Ok(Self {
            shared,
            log,
            reader,
            store,
            windows,
            copies,
            alerts,
            tickers,
            scorer,
            polarity,
            labels,
            questions,
            options,
            spread,
            stop,
            batch: Batch { checkpoint, ..Batch::default() },
            unwritten: HashSet::new(),
            written_at: Instant::now(),
            tidied_at: Instant::now() - Duration::from_secs(1),
            clock: Clock::start(),
            finished: false,
        })
    }
}

/// A log that ends before the checkpoint is another log: its posts would be taken for counted.
fn check_log(checkpoint: &Checkpoint, log: &Log) -> Result<()> {
    if log.end() >= checkpoint.seq {
        return Ok(());
    }
    let (end, seq) = (log.end(), checkpoint.seq);
    Err(Error::Invalid(format!(
        "the store has counted {seq} records of the log, the log has {end}\n  \
         hint: log and store belong together; restore both, or give an empty --data"
    )))
}

/// Posts that were acknowledged but not scored are known when they come again, and their cursors are the newest.
fn remember_unscored(shared: &Shared, log: &Log, seq: u64) -> Result<()> {
    let mut reader = log.reader(seq);
    while let Some((_, record)) = reader.next_record()? {
        if let Ok(post) = serde_json::from_slice::<Post>(&record) {
            shared.inlet.remember(post.identity());
            if let Some(cursor) = post.cursor {
                shared.inlet.set_cursor(&post.source, cursor);
            }
        }
    }
    Ok(())
}
