//! A worker process: scores, owns windows, or both; comes and goes as it likes.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures_util::StreamExt;
use tokio::sync::watch;

use super::connection::{Bus, backoff, shown};
use super::members::PRESENCE;
use super::owner::Owned;
use super::scorer::{Progress, Scoring};
use super::wire::{Beat, Presence, decode, encode};
use super::{BusOptions, random};
use crate::error::{Error, Result};
use crate::scorer::Scorer;

/// How long a stop may wait for what is on its way.
const LAST_WORDS: Duration = Duration::from_secs(2);

pub struct WorkerOptions {
    pub bus: BusOptions,
    /// Whether it takes partitions of windows.
    pub windows: bool,
}

/// Works until `stop` is set. `scorer`: `None` for a worker of windows only. `started` is told the worker's name and what
/// it does.
///
/// # Errors
/// No server, no JetStream.
pub fn work(
    options: &WorkerOptions,
    scorer: Option<&mut dyn Scorer>,
    stop: Arc<AtomicBool>,
    started: impl FnOnce(&str),
) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("bus")
        .enable_all()
        .build()
        .map_err(|e| Error::Invalid(format!("no threads: {e}")))?;
    let id = format!("{:016x}", random()?);
    let bus = runtime.block_on(Bus::connect(&options.bus, &format!("cashtag live worker {id}")))?;
    let info = scorer.as_ref().map(|s| s.info());
    let version = info.as_ref().map(|i| i.version());
    let progress = Arc::new(Progress::default());
    let presence =
        Presence { id: id.clone(), version: version.clone(), windows: options.windows, ..Presence::default() };
    let (beats, heard) = watch::channel(None);
    runtime.spawn(hear_front(bus.clone(), beats));
    let members = runtime.spawn(be_there(bus.clone(), presence.clone(), heard, progress.clone()));
    let does = match (&version, options.windows) {
        (Some(v), true) => format!("scores with {v} and takes windows"),
        (Some(v), false) => format!("scores with {v}"),
        (None, _) => "takes windows".into(),
    };
    started(&format!("worker {id} {does}; {}", shown(&options.bus.url)));
    match (scorer, info) {
        (Some(scorer), Some(info)) => {
            let (labels, version) = (info.labels.len(), info.version());
            let (handle, options) = (runtime.handle().clone(), &options.bus);
            Scoring { bus: bus.clone(), handle, options, version, labels, progress, stop }.run(scorer);
        }
        _ => {
            while !stop.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(50));
            }
        }
    }
    members.abort();
    runtime.block_on(async {
        // Who leaves says so; who cannot is missed after three seconds.
        let goodbye = async {
            let _ = bus.client.publish(bus.names.worker(), encode(&Presence { leaving: true, ..presence })).await;
            let _ = bus.client.flush().await;
        };
        let _ = tokio::time::timeout(LAST_WORDS, goodbye).await;
    });
    runtime.shutdown_timeout(LAST_WORDS);
    Ok(())
}

async fn hear_front(bus: Bus, beats: watch::Sender<Option<Beat>>) {
    let mut failures = 0;
    loop {
        if let Ok(mut heard) = bus.client.subscribe(bus.names.front()).await {
            failures = 0;
            while let Some(message) = heard.next().await {
                if let Some(beat) = decode::<Beat>(&message.payload)
                    && beats.send(Some(beat)).is_err()
                {
                    return;
                }
            }
        }
        tokio::time::sleep(backoff(failures)).await;
        failures += 1;
    }
}

/// Says that the worker is there, and takes the partitions that the front gives it.
async fn be_there(bus: Bus, mut presence: Presence, mut beats: watch::Receiver<Option<Beat>>, progress: Arc<Progress>) {
    let mut owned = Owned::default();
    let mut every = tokio::time::interval(PRESENCE);
    every.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            changed = beats.changed() => if changed.is_err() { return },
            _ = every.tick() => {
                presence.scored = progress.scored.load(Ordering::Relaxed);
                presence.failed = progress.failed.load(Ordering::Relaxed);
                presence.partitions = owned.sizes();
                let said = bus.client.publish(bus.names.worker(), encode(&presence));
                let _ = tokio::time::timeout(PRESENCE, said).await;
            }
        }
        if presence.windows {
            owned.follow(&bus, &presence.id, &beats);
        }
    }
}
