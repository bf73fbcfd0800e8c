//! Sends alerts to an address, each at least once.
//!
//! The store says which are waiting; one that was taken is marked by the thread that writes the store. A kill in between
//! sends it again: receivers can tell by `rule`, `key`, `window` and `start`.

use std::collections::HashSet;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use hyper::Method;

use crate::sources::net;
use crate::state::Shared;

const TOGETHER: usize = 50;
const LOOK: Duration = Duration::from_millis(500);
const MAX_PAUSE: Duration = Duration::from_secs(60);

/// Delivers for as long as the process runs.
pub(crate) async fn deliver(shared: Arc<Shared>, address: String) {
    let mut taken: HashSet<i64> = HashSet::new();
    let mut pause = LOOK;
    while !shared.inlet.stopping() {
        tokio::time::sleep(pause).await;
        let readers = shared.readers.clone();
        let waiting = tokio::task::spawn_blocking(move || readers.with(|r| r.undelivered(TOGETHER))).await;
        let Ok(Ok(waiting)) = waiting else { continue };
        taken.retain(|id| waiting.iter().any(|(waits, _)| waits == id));
        pause = LOOK;
        for (id, alert) in waiting {
            if taken.contains(&id) {
                continue;
            }
            let body = alert.to_json().to_string().into_bytes();
            match net::request(Method::POST, &address, None, Some(body)).await {
                Ok(answer) if answer.status.is_success() => {
                    taken.insert(id);
                    shared.delivered.lock().unwrap_or_else(PoisonError::into_inner).push(id);
                }
                // In order: the next ones wait with it.
                _ => {
                    pause = (pause * 2).min(MAX_PAUSE);
                    break;
                }
            }
        }
    }
}
