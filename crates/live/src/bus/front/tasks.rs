//! The tasks beside the pipeline's thread. Each works until the runtime ends, whatever the server does.

use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::Instant;

use futures_util::{StreamExt, TryStreamExt};
use tokio::sync::mpsc;

use super::{Common, Event, LOOK, lock, replaced};
use crate::bus::Kind;
use crate::bus::connection::{Bus, backoff};
use crate::bus::members::BEAT;
use crate::bus::publish::Outgoing;
use crate::bus::tail::Tail;
use crate::bus::wire::{Answer, Presence, Sums, decode, encode};

/// Texts that are published together.
const TOGETHER: usize = 512;

/// Publishes texts until they are in the stream.
pub(super) async fn ask(
    bus: Bus,
    mut texts: mpsc::UnboundedReceiver<(u64, Outgoing)>,
    out: Sender<Event>,
    common: Arc<Common>,
) {
    let (mut waiting, mut failures) = (Vec::with_capacity(TOGETHER), 0);
    loop {
        if waiting.is_empty() && texts.recv_many(&mut waiting, TOGETHER).await == 0 {
            return;
        }
        let messages: Vec<Outgoing> = waiting.iter().map(|w| w.1.clone()).collect();
        let outcomes = bus.publish(Kind::Tasks, &messages).await;
        let (mut asked, mut again, mut complaint) = (Vec::new(), Vec::new(), None);
        for (text, outcome) in waiting.drain(..).zip(outcomes) {
            match outcome {
                Ok(at) => asked.push((text.0, at)),
                Err(what) => {
                    complaint = Some(what);
                    again.push(text);
                }
            }
        }
        if out.send(Event::Asked(asked)).is_err() {
            return;
        }
        waiting = again;
        let failed = complaint.is_some();
        *lock(&common.complaint) = complaint;
        if failed {
            tokio::time::sleep(backoff(failures)).await;
            failures += 1;
        } else {
            failures = 0;
        }
    }
}

/// Reads all answers that are in the stream, from its beginning on.
pub(super) async fn hear_answers(bus: Bus, out: Sender<Event>) {
    let (send, mut read) = mpsc::channel(1_024);
    tokio::spawn(Tail { bus, kind: Kind::Scored, filter: String::new(), next: 0 }.run(send));
    while let Some(message) = read.recv().await {
        let Some(message) = message else { continue };
        if let Some(answer) = decode::<Answer>(&message.payload)
            && out.send(Event::Answer(message.sequence, answer)).is_err()
        {
            return;
        }
    }
}

/// Hears the sums of owners; they are answered when they are in the store.
pub(super) async fn hear_sums(bus: Bus, out: Sender<Event>) {
    let mut failures = 0;
    loop {
        if let Ok(mut heard) = bus.client.subscribe(bus.names.sums()).await {
            failures = 0;
            while let Some(message) = heard.next().await {
                if let Some(sums) = decode::<Sums>(&message.payload)
                    && out.send(Event::Sums(sums, message.reply)).is_err()
                {
                    return;
                }
            }
        }
        tokio::time::sleep(backoff(failures)).await;
        failures += 1;
    }
}

pub(super) async fn hear_workers(bus: Bus, common: Arc<Common>) {
    let mut failures = 0;
    loop {
        if let Ok(mut heard) = bus.client.subscribe(bus.names.worker()).await {
            failures = 0;
            while let Some(message) = heard.next().await {
                if let Some(presence) = decode::<Presence>(&message.payload) {
                    lock(&common.members).heard(presence, Instant::now());
                }
            }
        }
        tokio::time::sleep(backoff(failures)).await;
        failures += 1;
    }
}

/// Says that the front is there, and who owns what.
pub(super) async fn beat(bus: Bus, partitions: u32, common: Arc<Common>) {
    let mut every = tokio::time::interval(BEAT);
    every.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        every.tick().await;
        let owners = {
            let mut members = lock(&common.members);
            members.forget_the_gone(Instant::now());
            members.owners(partitions)
        };
        let payload = {
            let mut beat = lock(&common.beat);
            beat.owners = owners;
            encode(&*beat)
        };
        // Lost while there is no connection; the next one follows.
        let _ = tokio::time::timeout(LOOK, bus.client.publish(bus.names.front(), payload)).await;
    }
}

/// Looks how many tasks wait, and whether all streams are still there.
pub(super) async fn look(bus: Bus, version: String, out: Sender<Event>, common: Arc<Common>) {
    let mut gone = 0;
    loop {
        tokio::time::sleep(LOOK).await;
        let mut missing = None;
        for kind in Kind::ALL {
            if let Ok(None) = bus.stream(kind).await {
                missing = Some(bus.names.stream(kind));
            }
        }
        // A server that has just started does not know its streams yet.
        gone = if missing.is_some() { gone + 1 } else { 0 };
        if let Some(stream) = missing.filter(|_| gone >= 5) {
            let what = replaced(&stream).to_string();
            let _ = out.send(Event::Fatal(what));
            return;
        }
        let Ok(stream) = bus.context.get_stream_no_info(bus.names.stream(Kind::Tasks)).await else { continue };
        let Ok(info) = stream.consumer_info(bus.names.scorers(&version)).await else { continue };
        *lock(&common.lag) = (info.num_pending, info.num_ack_pending as u64);
        if info.num_pending == 0 && info.num_ack_pending == 0 && out.send(Event::Idle).is_err() {
            return;
        }
    }
}

impl Bus {
    /// Removes the consumers of models that are not asked any more.
    pub(super) async fn forget_other_scorers(&self, version: &str) {
        let Ok(Some(stream)) = self.stream(Kind::Tasks).await else { return };
        let Ok(names) = stream.consumer_names().try_collect::<Vec<String>>().await else { return };
        let ours = self.names.scorers(version);
        for name in names.into_iter().filter(|n| n.starts_with("scorers-") && *n != ours) {
            // One that stays does no harm.
            let _ = stream.delete_consumer(&name).await;
        }
    }
}
