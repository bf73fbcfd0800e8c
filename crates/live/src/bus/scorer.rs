//! The scoring half of a worker: takes tasks, answers them, acknowledges them when the answers are in their stream.
//!
//! A worker that dies leaves its tasks to the others. A text that kills whoever scores it must not take the others with it:
//! a worker begins with one task at a time and takes twice as many with each success, a task that comes for the third time
//! is scored alone, and after [`GIVE_UP`] deliveries it is answered unscored (a dead letter).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use async_nats::jetstream::consumer::pull::Config;
use async_nats::jetstream::consumer::{AckPolicy, DeliverPolicy, PullConsumer};
use async_nats::jetstream::{AckKind, Message};
use futures_util::StreamExt;
use tokio::runtime::Handle;

use super::connection::{Bus, backoff};
use super::publish::Outgoing;
use super::wire::{Answer, Task, decode, encode};
use super::{BusOptions, Kind};
use crate::scorer::{Scorer, score_each};

const ALONE: i64 = 3;
const GIVE_UP: i64 = 10;
/// Tasks that all scorers together may have at a time.
const MAX_ACK_PENDING: i64 = 8_192;
const EXPIRES: Duration = Duration::from_millis(500);

/// What a worker says of its scoring.
#[derive(Default)]
pub(super) struct Progress {
    pub(super) scored: AtomicU64,
    pub(super) failed: AtomicU64,
}

pub(super) struct Scoring<'a> {
    pub(super) bus: Bus,
    pub(super) handle: Handle,
    pub(super) options: &'a BusOptions,
    pub(super) version: String,
    pub(super) labels: usize,
    pub(super) progress: Arc<Progress>,
    pub(super) stop: Arc<AtomicBool>,
}

struct Taken {
    task: Task,
    partition: u32,
    id: String,
    delivered: i64,
    message: Message,
}

impl Scoring<'_> {
    /// Works on this thread (a model may be bound to it) until it is told to stop.
    pub(super) fn run(&self, scorer: &mut dyn Scorer) {
        let (mut failures, mut together) = (0, 1);
        while !self.stopping() {
            let Ok(consumer) = self.handle.block_on(self.consumer()) else {
                std::thread::sleep(backoff(failures));
                failures += 1;
                continue;
            };
            let mut silent = 0;
            while !self.stopping() {
                let most = scorer.batch().clamp(1, together);
                let Ok(taken) = self.handle.block_on(self.take(&consumer, most)) else { break };
                if taken.is_empty() {
                    silent += 1;
                    if silent % 8 == 0 && self.handle.block_on(consumer.get_info()).is_err() {
                        break;
                    }
                    continue;
                }
                (silent, failures) = (0, 0);
                if self.answer(scorer, taken) {
                    together = (together * 2).min(1_024);
                }
            }
            std::thread::sleep(backoff(failures));
            failures += 1;
        }
    }

    fn stopping(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    async fn consumer(&self) -> Result<PullConsumer, ()> {
        let stream = self.bus.stream(Kind::Tasks).await.map_err(|_| ())?.ok_or(())?;
        let name = self.bus.names.scorers(&self.version);
        let config = Config {
            durable_name: Some(name.clone()),
            deliver_policy: DeliverPolicy::All,
            ack_policy: AckPolicy::Explicit,
            ack_wait: self.options.ack_wait,
            max_ack_pending: MAX_ACK_PENDING,
            filter_subject: self.bus.names.tasks_of(&self.version),
            ..Config::default()
        };
        stream.get_or_create_consumer(&name, config).await.map_err(|_| ())
    }

    /// Up to `most` tasks; waits a moment for the first.
    async fn take(&self, consumer: &PullConsumer, most: usize) -> Result<Vec<Taken>, ()> {
        let mut taken = self.collect(consumer.fetch().max_messages(most).messages().await.map_err(|_| ())?).await?;
        if taken.is_empty() {
            let wait = consumer.batch().max_messages(1).expires(EXPIRES);
            taken = self.collect(wait.messages().await.map_err(|_| ())?).await?;
        }
        Ok(taken)
    }

    async fn collect(&self, mut messages: async_nats::jetstream::consumer::pull::Batch) -> Result<Vec<Taken>, ()> {
        let mut taken = Vec::new();
        loop {
            let message = match tokio::time::timeout(6 * EXPIRES, messages.next()).await {
                Ok(Some(Ok(message))) => message,
                Ok(None) => return Ok(taken),
                // What came already is scored all the same.
                _ if !taken.is_empty() => return Ok(taken),
                _ => return Err(()),
            };
            let delivered = message.info().map_err(|_| ())?.delivered;
            let partition = message.subject.rsplit('.').next().and_then(|p| p.parse().ok());
            let id = message.headers.as_ref().and_then(|h| h.get("Nats-Msg-Id")).map(|id| id.as_str().to_owned());
            match (decode::<Task>(&message.payload), partition, id) {
                (Some(task), Some(partition), Some(id)) => {
                    taken.push(Taken { task, partition, id, delivered, message })
                }
                // Not from our front.
                _ => {
                    let _ = message.ack_with(AckKind::Term).await;
                }
            }
        }
    }

    /// Scores, answers, acknowledges; whether all went well.
    fn answer(&self, scorer: &mut dyn Scorer, taken: Vec<Taken>) -> bool {
        let (alone, together): (Vec<_>, Vec<_>) = taken.into_iter().partition(|t| t.delivered >= ALONE);
        let mut good = together.is_empty() || self.answer_together(scorer, &together);
        for one in alone {
            good &= self.answer_together(scorer, std::slice::from_ref(&one));
        }
        good
    }

    fn answer_together(&self, scorer: &mut dyn Scorer, taken: &[Taken]) -> bool {
        // Others must not be given these while the model takes its time.
        let replies: Vec<_> = taken.iter().filter_map(|t| t.message.reply.clone()).collect();
        let (client, pause) = (self.bus.client.clone(), self.options.ack_wait / 3);
        let keep = self.handle.spawn(async move {
            loop {
                tokio::time::sleep(pause).await;
                for reply in &replies {
                    let _ = client.publish(reply.clone(), "+WPI".into()).await;
                }
            }
        });
        let given_up = taken.len() == 1 && taken[0].delivered >= GIVE_UP;
        let outcomes = if given_up {
            vec![Err(format!("given up after {} tries, none of which was answered", taken[0].delivered - 1))]
        } else {
            score_each(scorer, &taken.iter().map(|t| t.task.text.as_str()).collect::<Vec<_>>(), self.labels)
        };
        let failed = outcomes.iter().filter(|o| o.is_err()).count() as u64;
        self.progress.scored.fetch_add(outcomes.len() as u64 - failed, Ordering::Relaxed);
        self.progress.failed.fetch_add(failed, Ordering::Relaxed);
        let answers: Vec<Outgoing> = taken
            .iter()
            .zip(outcomes)
            .map(|(t, outcome)| Outgoing {
                subject: self.bus.names.scored(t.partition),
                id: t.id.clone(),
                payload: encode(&Answer { seq: t.task.seq, version: self.version.clone(), outcome }),
            })
            .collect();
        let mut done = true;
        self.handle.block_on(async {
            for (sent, t) in self.bus.publish(Kind::Scored, &answers).await.iter().zip(taken) {
                // Without an acknowledgement it comes again, to whoever asks next.
                let kind = if sent.is_ok() { AckKind::Ack } else { AckKind::Nak(Some(Duration::from_secs(1))) };
                done &= t.message.ack_with(kind).await.is_ok() && sent.is_ok();
            }
        });
        keep.abort();
        done
    }
}
