//! Connecting, and the streams as they must be.

use std::time::Duration;

use async_nats::ConnectOptions;
use async_nats::client::RequestErrorKind;
use async_nats::jetstream::stream::{Config, DiscardPolicy, Info, RetentionPolicy, StorageType, Stream};
use async_nats::jetstream::{Context, ContextBuilder, ErrorCode};

use super::{BusOptions, Kind, Names};
use crate::error::{Error, Result};

const CONNECT: Duration = Duration::from_secs(5);
const REQUEST: Duration = Duration::from_secs(5);
/// How long the server recognises a message that is sent again by its id.
const DUPLICATES: Duration = Duration::from_secs(120);
/// Publications that wait for their acknowledgement.
const IN_FLIGHT: usize = 2_048;

/// A connection that comes back by itself.
#[derive(Clone)]
pub(super) struct Bus {
    pub(super) client: async_nats::Client,
    pub(super) context: Context,
    pub(super) names: Names,
}

impl Bus {
    /// # Errors
    /// Nobody answers there, or not JetStream.
    pub(super) async fn connect(options: &BusOptions, who: &str) -> Result<Self> {
        options.check()?;
        let url = &options.url;
        let servers = url.split(',').map(|u| u.trim().parse::<async_nats::ServerAddr>()).collect::<Result<Vec<_>, _>>();
        let servers = servers.map_err(|_| {
            let hint = "hint: nats://host:4222, nats://user:password@host or tls://host";
            Error::Invalid(format!("--bus: {} is no address of a NATS server\n  {hint}", shown(url)))
        })?;
        let client = ConnectOptions::new()
            .name(who)
            .connection_timeout(CONNECT)
            .request_timeout(Some(REQUEST))
            .ping_interval(Duration::from_secs(10))
            .reconnect_delay_callback(|attempt| backoff(attempt as u32))
            .max_reconnects(None::<usize>)
            .connect(&servers[..])
            .await
            .map_err(|e| {
                let hint = "hint: nats-server --jetstream --store_dir DIR";
                Error::Invalid(format!("no NATS server at {}: {e}\n  {hint}", shown(url)))
            })?;
        let context = ContextBuilder::new()
            .timeout(REQUEST)
            .ack_timeout(REQUEST)
            .max_ack_inflight(IN_FLIGHT)
            .backpressure_on_inflight(true)
            .build(client.clone());
        has_jetstream(&client, &shown(url)).await?;
        Ok(Self { client, context, names: Names(options.name.clone()) })
    }

    /// Makes the streams, or makes sure that they are ours.
    ///
    /// # Errors
    /// Streams of another data directory or with other partitions; a server that does not take them.
    pub(super) async fn ensure(&self, options: &BusOptions, log: &str) -> Result<()> {
        for kind in Kind::ALL {
            let config = Config {
                name: self.names.stream(kind),
                subjects: vec![self.names.all(kind)],
                description: Some(describe(log, options.partitions)),
                retention: RetentionPolicy::Limits,
                discard: DiscardPolicy::New,
                storage: StorageType::File,
                max_bytes: options.max_bytes,
                duplicate_window: DUPLICATES,
                num_replicas: 1,
                ..Config::default()
            };
            let refused = |e: &dyn std::fmt::Display| {
                let name = self.names.stream(kind);
                Error::Invalid(format!("the NATS server does not make the stream {name}: {e}"))
            };
            let found = self.context.get_or_create_stream(config.clone()).await.map_err(|e| refused(&e))?;
            let info = found.cached_info();
            is_ours(info, log, options.partitions)?;
            // More room is how a full stream goes on.
            if info.config.max_bytes != options.max_bytes {
                self.context.update_stream(config).await.map_err(|e| refused(&e))?;
            }
        }
        Ok(())
    }

    /// `None`: it is not there.
    ///
    /// # Errors
    /// The server does not answer.
    pub(super) async fn stream(&self, kind: Kind) -> Result<Option<Stream>, String> {
        use async_nats::jetstream::context::GetStreamErrorKind;
        match self.context.get_stream(self.names.stream(kind)).await {
            Ok(stream) => Ok(Some(stream)),
            Err(e) => match e.kind() {
                GetStreamErrorKind::JetStream(inner) if inner.error_code() == ErrorCode::STREAM_NOT_FOUND => Ok(None),
                _ => Err(e.to_string()),
            },
        }
    }

    /// Removes messages that are of no use any more. What fails is tried again with the next ones.
    pub(super) async fn purge(&self, kind: Kind, filter: Option<String>, below: u64) {
        let Ok(stream) = self.context.get_stream_no_info(self.names.stream(kind)).await else { return };
        let purge = stream.purge().sequence(below);
        let _ = match filter {
            Some(subject) => purge.filter(subject).await,
            None => purge.await,
        };
    }
}

/// Asked and read by hand: the client's own type of the answer wants fields that servers have from 2.10 on.
async fn has_jetstream(client: &async_nats::Client, url: &str) -> Result<()> {
    let none = || {
        let hint = "hint: nats-server --jetstream --store_dir DIR";
        Error::Invalid(format!("the NATS server at {url} has no JetStream\n  {hint}"))
    };
    let answer = match client.request("$JS.API.INFO", "".into()).await {
        Ok(answer) => answer,
        Err(e) if e.kind() == RequestErrorKind::NoResponders => return Err(none()),
        Err(e) => return Err(Error::Invalid(format!("the NATS server at {url} does not answer: {e}"))),
    };
    let answer: serde_json::Value = serde_json::from_slice(&answer.payload).unwrap_or_default();
    if answer["limits"].is_object() { Ok(()) } else { Err(none()) }
}

/// 50 ms, twice as much each time, at most 2 s.
pub(super) fn backoff(attempt: u32) -> Duration {
    Duration::from_millis(50 << attempt.min(5)).min(Duration::from_secs(2))
}

fn describe(log: &str, partitions: u32) -> String {
    format!("cashtag live, log {log}, {partitions} partitions")
}

/// The number of partitions that a stream of ours was made with.
pub(super) fn partitions(info: &Info) -> Option<u32> {
    let (_, rest) = info.config.description.as_deref()?.split_once("cashtag live, log ")?;
    rest.split_once(", ")?.1.split_once(' ')?.0.parse().ok()
}

fn is_ours(info: &Info, log: &str, wanted: u32) -> Result<()> {
    let (name, found) = (&info.config.name, info.config.description.as_deref().unwrap_or_default());
    if found == describe(log, wanted) {
        return Ok(());
    }
    let bus = name.rsplit_once('_').map_or("", |(bus, _)| bus);
    Err(Error::Invalid(match partitions(info) {
        Some(n) if found == describe(log, n) => format!(
            "the stream {name} has {n} partitions, expected {wanted}\n  \
             hint: --bus-partitions {n}, or stop everything and remove the three streams {bus}_*: they are made again"
        ),
        Some(_) => format!(
            "the stream {name} belongs to another data directory ({found})\n  hint: give another --bus-name, or its --data"
        ),
        None => format!("the stream {name} is not one of cashtag live\n  hint: give another --bus-name"),
    }))
}

/// An address without its password.
pub(super) fn shown(url: &str) -> String {
    let hide = |one: &str| match (one.find("://"), one.rfind('@')) {
        (Some(scheme), Some(at)) if at > scheme => format!("{}{}", &one[..scheme + 3], &one[at + 1..]),
        _ => one.to_owned(),
    };
    url.split(',').map(|one| hide(one.trim())).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passwords_are_not_shown() {
        assert_eq!(shown("nats://ann:secret@host:4222, tls://b"), "nats://host:4222,tls://b");
        assert_eq!(shown("nats://host"), "nats://host");
    }

    #[test]
    fn waits_grow_to_two_seconds() {
        assert_eq!([0, 1, 5, 60].map(|n| backoff(n).as_millis()), [50, 100, 1_600, 1_600]);
    }
}
