//! Reads a stream from a place on, in order and without gaps, for as long as it takes.
//!
//! The place is kept here, not on the server: the consumer is thrown away and made again behind the last message whenever
//! anything is odd (the server was restarted, a message is missing, it says nothing).

use std::time::Duration;

use async_nats::jetstream::Message;
use async_nats::jetstream::consumer::pull::Config;
use async_nats::jetstream::consumer::{AckPolicy, DeliverPolicy, PullConsumer};
use futures_util::StreamExt;
use tokio::sync::mpsc;

use super::Kind;
use super::connection::{Bus, backoff};

/// Messages that are asked for at a time.
const TOGETHER: usize = 256;
/// How long one request waits for them.
const EXPIRES: Duration = Duration::from_millis(1_000);
/// A consumer that nobody asks is removed by the server.
const INACTIVE: Duration = Duration::from_secs(30);
/// Requests without an answer after which the consumer is looked at.
const SILENT: u32 = 3;

/// A message of the stream.
pub(super) struct Read {
    pub(super) sequence: u64,
    /// How many are behind it.
    pub(super) pending: u64,
    pub(super) payload: bytes::Bytes,
}

pub(super) struct Tail {
    pub(super) bus: Bus,
    pub(super) kind: Kind,
    /// The subject; empty: all.
    pub(super) filter: String,
    /// The first message that was not handed out.
    pub(super) next: u64,
}

impl Tail {
    /// Hands out messages for as long as somebody takes them; `None` when there is nothing for the moment.
    pub(super) async fn run(mut self, out: mpsc::Sender<Option<Read>>) {
        let mut failures = 0;
        while !out.is_closed() {
            if self.read(&out, &mut failures).await.is_ok() {
                return;
            }
            tokio::time::sleep(backoff(failures)).await;
            failures += 1;
        }
    }

    async fn consumer(&self) -> Result<PullConsumer, ()> {
        let stream = self.bus.context.get_stream_no_info(self.bus.names.stream(self.kind)).await.map_err(|_| ())?;
        let config = Config {
            deliver_policy: DeliverPolicy::ByStartSequence { start_sequence: self.next.max(1) },
            ack_policy: AckPolicy::None,
            filter_subject: self.filter.clone(),
            inactive_threshold: INACTIVE,
            memory_storage: true,
            ..Config::default()
        };
        stream.create_consumer(config).await.map_err(|_| ())
    }

    /// `Ok`: nobody takes them any more.
    async fn read(&mut self, out: &mpsc::Sender<Option<Read>>, failures: &mut u32) -> Result<(), ()> {
        let mut consumer = self.consumer().await?;
        if consumer.cached_info().num_pending == 0 && out.send(None).await.is_err() {
            return Ok(());
        }
        let (mut delivered, mut silent) = (0, 0);
        loop {
            let request = consumer.batch().max_messages(TOGETHER).expires(EXPIRES);
            let asked = tokio::time::timeout(3 * EXPIRES, request.messages()).await;
            let mut messages = asked.map_err(|_| ())?.map_err(|_| ())?;
            let mut any = false;
            loop {
                let message: Message = match tokio::time::timeout(3 * EXPIRES, messages.next()).await {
                    Ok(Some(Ok(message))) => message,
                    Ok(None) => break,
                    Ok(Some(Err(_))) | Err(_) => return Err(()),
                };
                let info = message.info().map_err(|_| ())?;
                delivered += 1;
                if info.consumer_sequence != delivered {
                    return Err(());
                }
                let (sequence, pending) = (info.stream_sequence, info.pending);
                any = true;
                *failures = 0;
                if sequence < self.next {
                    continue;
                }
                self.next = sequence + 1;
                let read = Read { sequence, pending, payload: message.payload.clone() };
                if out.send(Some(read)).await.is_err() {
                    return Ok(());
                }
            }
            if any {
                silent = 0;
                continue;
            }
            if out.send(None).await.is_err() {
                return Ok(());
            }
            silent += 1;
            if silent % SILENT == 0 {
                // Nothing to read, or nobody there?
                let info = tokio::time::timeout(3 * EXPIRES, consumer.info()).await;
                info.map_err(|_| ())?.map_err(|_| ())?;
            }
        }
    }
}
