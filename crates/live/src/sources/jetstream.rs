//! Bluesky's public posts over Jetstream: a WebSocket, no key, no cost.
//!
//! Spoken is the first version of the protocol (`/subscribe`), which its servers go on serving. A connection that was lost
//! goes on a few seconds before the last post that was seen; what comes twice is recognised. Posts without a ticker are
//! passed over unless all are asked for.

use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use serde_json::Value;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_tungstenite::tungstenite::{Error as WsError, Message};

use super::backoff::{Backoff, Failure};
use super::feeder::Feeder;
use super::{Running, Source, net};
use crate::board::{Pace, State};
use crate::error::{Error, Result};
use crate::inlet::Inlet;
use crate::post::Incoming;
use crate::store::DeadLetter;
use crate::tickers::Tickers;
use crate::time::{self, DAY, MINUTE, Millis};

pub const URL: &str = "wss://jetstream2.us-east.bsky.network/subscribe";
const COLLECTION: &str = "app.bsky.feed.post";
/// Cursors are inclusive, and differ a little between servers.
const REWIND_US: i64 = 5_000_000;
const MAX_MESSAGE: usize = 1 << 20;

#[derive(Clone)]
pub struct JetstreamOptions {
    pub url: String,
    /// Deliver posts without a ticker, too.
    pub all: bool,
    /// Nothing for so long is a dead connection: all of Bluesky is never that quiet.
    pub silence: Duration,
    /// 1; tests wait less.
    pub time_scale: f64,
}

impl Default for JetstreamOptions {
    fn default() -> Self {
        Self { url: URL.into(), all: false, silence: Duration::from_secs(30), time_scale: 1.0 }
    }
}

pub struct Jetstream {
    options: JetstreamOptions,
    tickers: std::sync::Arc<dyn Tickers>,
}

impl Jetstream {
    pub fn new(options: JetstreamOptions, tickers: std::sync::Arc<dyn Tickers>) -> Self {
        Self { options, tickers }
    }
}

impl Source for Jetstream {
    fn name(&self) -> String {
        "bluesky".into()
    }

    fn kind(&self) -> &'static str {
        "bluesky"
    }

    fn pace(&self) -> Pace {
        Pace::Live
    }

    fn run(self: Box<Self>, inlet: Inlet) -> Running {
        Box::pin(async move {
            let mut cursor = inlet.cursor("bluesky").and_then(|c| c.parse::<i64>().ok());
            let mut backoff = Backoff::new(self.options.time_scale);
            while !inlet.stopping() {
                let feeder = Feeder::start(inlet.clone(), "bluesky".into());
                let began_at = cursor;
                let ended = self.connection(&inlet, &feeder, &mut cursor).await;
                feeder.finish().await?;
                let why = match ended {
                    Err(Ended::Stopped) => return Err(Error::Stopped),
                    Err(Ended::Because(why)) => why,
                    Ok(()) => "the server closed the connection".into(),
                };
                let failure = if cursor == began_at {
                    Failure::Network
                } else {
                    backoff.reset();
                    Failure::Lost
                };
                inlet.board().set("bluesky", State::Reconnecting, why);
                tokio::time::sleep(backoff.after(failure)).await;
            }
            Err(Error::Stopped)
        })
    }
}

enum Ended {
    Stopped,
    Because(String),
}

impl From<WsError> for Ended {
    fn from(e: WsError) -> Self {
        Self::Because(e.to_string())
    }
}

impl Jetstream {
    async fn connection(&self, inlet: &Inlet, feeder: &Feeder, cursor: &mut Option<i64>) -> Result<(), Ended> {
        let separator = if self.options.url.contains('?') { '&' } else { '?' };
        let mut address = format!("{}{separator}wantedCollections={COLLECTION}", self.options.url);
        if let Some(cursor) = cursor {
            address += &format!("&cursor={}", (*cursor - REWIND_US).max(0));
        }
        let request = address.as_str().into_client_request()?;
        let io = net::connect(request.uri()).await.map_err(|e| Ended::Because(e.to_string()))?;
        let config = WebSocketConfig::default().max_message_size(Some(MAX_MESSAGE)).max_frame_size(Some(MAX_MESSAGE));
        let silence = self.options.silence;
        let silent = || Ended::Because(format!("nothing came for {} s", silence.as_secs_f32()));
        let handshake = tokio_tungstenite::client_async_with_config(request, io, Some(config));
        let (mut socket, _) = tokio::time::timeout(silence, handshake).await.map_err(|_| silent())??;
        inlet.board().set("bluesky", State::Connected, "");
        loop {
            let message = match tokio::time::timeout(silence, socket.next()).await {
                Err(_) => return Err(silent()),
                Ok(None) => return Ok(()),
                Ok(Some(message)) => message?,
            };
            if inlet.stopping() {
                return Err(Ended::Stopped);
            }
            match message {
                Message::Text(text) => {
                    let post = match read(&text, time::now()) {
                        Ok((at, post)) => {
                            *cursor = (*cursor).max(at);
                            post
                        }
                        Err(reason) => {
                            inlet.dead_letter(DeadLetter::new("bluesky", reason, &text));
                            None
                        }
                    };
                    if let Some(post) = post.filter(|p| self.options.all || !self.tickers.find(&p.text).is_empty()) {
                        feeder.feed(post).await.map_err(|_| Ended::Stopped)?;
                    }
                }
                Message::Ping(data) => socket.send(Message::Pong(data)).await?,
                Message::Close(_) => return Ok(()),
                _ => {}
            }
        }
    }
}

/// The time of an event, and the post if it is a new one.
fn read(text: &str, now: Millis) -> Result<(Option<i64>, Option<Incoming>), String> {
    let event: Value = serde_json::from_str(text).map_err(|e| format!("no JSON: {e}"))?;
    let time_us = event["time_us"].as_i64().filter(|t| *t > 0);
    let commit = &event["commit"];
    if event["kind"] != "commit" || commit["operation"] != "create" || commit["collection"] != COLLECTION {
        // Accounts, names, deletions: everybody gets them.
        return Ok((time_us, None));
    }
    let field = |value: &Value, name: &str| {
        value[name].as_str().map(str::to_owned).ok_or_else(|| format!("a post without {name}"))
    };
    let record = &commit["record"];
    let (did, rkey, text) = (field(&event, "did")?, field(commit, "rkey")?, field(record, "text")?);
    if text.trim().is_empty() {
        // A picture.
        return Ok((time_us, None));
    }
    let received = time_us.map_or(now, |t| t / 1_000);
    // Whoever writes says when; what cannot be is replaced by when the server saw it.
    let said = record["createdAt"].as_str().and_then(time::parse);
    let event_time = said.filter(|t| *t > received - DAY && *t < received + MINUTE).unwrap_or(received);
    Ok((
        time_us,
        Some(Incoming {
            url: Some(format!("https://bsky.app/profile/{did}/post/{rkey}")),
            id: format!("{did}/{rkey}"),
            author: did,
            text,
            event_time: Some(event_time),
            copy_of: None,
            cursor: time_us.map(|t| t.to_string()),
        }),
    ))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn event(created_at: &str) -> String {
        json!({"did": "did:plc:abc", "time_us": 1_725_911_162_329_308_i64, "kind": "commit", "commit": {
            "operation": "create", "collection": COLLECTION, "rkey": "3l3q", "cid": "bafy",
            "record": {"$type": COLLECTION, "createdAt": created_at, "text": "$XYZ up", "langs": ["en"]}}})
        .to_string()
    }

    #[test]
    fn a_post_and_when_it_was_written() {
        let (at, post) = read(&event("2024-09-09T19:46:02.102Z"), 0).unwrap();
        let post = post.unwrap();
        assert_eq!((at, &*post.id), (Some(1_725_911_162_329_308), "did:plc:abc/3l3q"));
        assert_eq!(post.event_time, time::parse("2024-09-09T19:46:02.102Z"));
        // From 1970 and from next year.
        for wrong in ["1970-01-01T00:00:00Z", "2025-09-09T19:46:02Z", "soon"] {
            assert_eq!(read(&event(wrong), 0).unwrap().1.unwrap().event_time, Some(1_725_911_162_329));
        }
    }

    #[test]
    fn what_is_no_new_post_is_passed_over_and_what_is_nothing_is_said() {
        for other in
            [r#"{"kind":"account","time_us":5}"#, r#"{"kind":"commit","time_us":5,"commit":{"operation":"delete"}}"#]
        {
            assert_eq!(read(other, 0).unwrap(), (Some(5), None));
        }
        assert!(read("{", 0).unwrap_err().contains("no JSON"));
        let nameless = event("").replace("\"rkey\"", "\"r\"");
        assert_eq!(read(&nameless, 0).unwrap_err(), "a post without rkey");
    }
}
