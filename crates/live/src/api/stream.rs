//! Server-sent events: what changes, as it changes.
//!
//! A reader that was cut off sends `Last-Event-ID` and gets what it missed; if that is gone, or it reads too slowly, it gets
//! one `resync` event and loads its snapshots again. The pipeline never waits for a reader.

use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{Query, State};
use axum::http::{HeaderMap, HeaderValue, header};
use axum::response::Response;
use cashtag_http::Problem;
use futures_util::stream;
use tokio::sync::broadcast::error::RecvError;

use super::{Api, Parameters, window};
use crate::hub::{Event, Subscription};
use crate::windows::Window;

const KEEP_ALIVE: Duration = Duration::from_secs(10);

pub(super) async fn stream(
    State(api): State<Api>,
    Query(q): Parameters,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let window = window(&q)?;
    let last =
        headers.get("last-event-id").and_then(|v| v.to_str().ok()).or(q.get("last_event_id").map(String::as_str));
    let has_been_here = last.is_some_and(|l| !l.is_empty());
    // A number that is none is one that is not known: everything anew.
    let last = has_been_here.then(|| last.and_then(|l| l.parse().ok()).unwrap_or(0));
    let Subscription { missed, receiver, last } = api.shared.hub.subscribe(last);
    let mut first = String::from(": cashtag live\nretry: 1000\n\n");
    match missed {
        Some(events) => events.iter().filter(|e| e.kind.concerns(window)).for_each(|e| first += &frame(e)),
        None => first += &resync(last),
    }
    let reader = Reader { window, receiver, api, first: Some(first) };
    let body = Body::from_stream(stream::unfold(reader, |mut reader| async move {
        let piece = reader.next().await?;
        Some((Ok::<_, std::convert::Infallible>(Bytes::from(piece)), reader))
    }));
    let mut response = Response::new(body);
    let set = response.headers_mut();
    set.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
    set.insert("x-accel-buffering", HeaderValue::from_static("no"));
    Ok(response)
}

struct Reader {
    window: Window,
    receiver: tokio::sync::broadcast::Receiver<Event>,
    api: Api,
    first: Option<String>,
}

impl Reader {
    /// The next piece; `None` when the service ends.
    async fn next(&mut self) -> Option<String> {
        if let Some(first) = self.first.take() {
            return Some(first);
        }
        let mut piece = String::new();
        loop {
            let received = tokio::select! {
                received = tokio::time::timeout(KEEP_ALIVE, self.receiver.recv()) => received,
                () = self.api.shutdown.draining() => return None,
            };
            match received {
                Err(_) => return Some(": keep-alive\n\n".into()),
                Ok(Err(RecvError::Closed)) => return None,
                Ok(Err(RecvError::Lagged(_))) => return Some(resync(self.api.shared.hub.subscribe(None).last)),
                Ok(Ok(event)) if event.kind.concerns(self.window) => piece += &frame(&event),
                Ok(Ok(_)) => continue,
            }
            // What waits already goes in the same piece.
            while piece.len() < 64 << 10 {
                match self.receiver.try_recv() {
                    Ok(event) if event.kind.concerns(self.window) => piece += &frame(&event),
                    Ok(_) => {}
                    Err(_) => break,
                }
            }
            return Some(piece);
        }
    }
}

/// JSON has no line breaks, so one `data` line is enough.
fn frame(event: &Event) -> String {
    format!("id: {}\nevent: {}\ndata: {}\n\n", event.id, event.kind.name(), event.data)
}

fn resync(id: u64) -> String {
    format!("id: {id}\nevent: resync\ndata: {{}}\n\n")
}
