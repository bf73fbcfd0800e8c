//! What others ask over HTTP: `docs/live-api.md` is the contract.
//!
//! Routes only; keys, limits, TLS and error shapes are the business of `cashtag-http`. Whatever reads the store runs on a
//! thread of its own, so that a slow disk holds up no other request.

mod classify;
mod ingest;
mod openbb;
pub mod page;
mod posts;
mod signals;
mod stream;

use std::collections::HashMap;
use std::sync::Arc;

use axum::Router;
use axum::extract::{Query, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use cashtag_http::problem::json_response;
use cashtag_http::{Problem, Shutdown};
use serde_json::{Value, json};

use crate::error::Error;
use crate::state::Shared;
use crate::store::Reader;
use crate::time::{self, Millis};
use crate::windows::{Scope, Window};

type Api = Arc<Context>;
type Parameters = Query<HashMap<String, String>>;

/// What the routes need.
pub struct Context {
    pub shared: Arc<Shared>,
    pub shutdown: Shutdown,
}

pub fn router(shared: Arc<Shared>, shutdown: Shutdown) -> Router {
    let api = Router::new()
        .route("/v1/overview", get(signals::overview))
        .route("/v1/signals", get(signals::list))
        .route("/v1/signals/{key}", get(signals::history))
        .route("/v1/posts", get(posts::list))
        .route("/v1/alerts", get(posts::alerts))
        .route("/v1/dead-letters", get(posts::dead_letters))
        .route("/v1/stream", get(stream::stream))
        .route("/v1/quality", get(quality))
        .route("/v1/classify", post(classify::classify))
        .route("/v1/ingest", post(ingest::ingest))
        .route("/health", get(health))
        .route("/metrics", get(metrics))
        .route("/widgets.json", get(openbb::widgets))
        .route("/apps.json", get(openbb::apps))
        .route("/openbb/{table}", get(openbb::table))
        .with_state(Arc::new(Context { shared, shutdown }));
    page::routes().merge(api)
}

fn ok(value: &Value) -> Response {
    json_response(StatusCode::OK, value)
}

fn bad(code: &'static str, message: impl Into<String>) -> Problem {
    Problem::new(StatusCode::BAD_REQUEST, code, message.into())
}

/// Reads the store on a thread that may block.
async fn read<T: Send + 'static>(
    api: &Api,
    work: impl FnOnce(&dyn Reader) -> crate::Result<T> + Send + 'static,
) -> Result<T, Problem> {
    let readers = api.shared.readers.clone();
    let outcome = tokio::task::spawn_blocking(move || readers.with(work)).await;
    let failed = |_: Error| {
        Problem::new(StatusCode::SERVICE_UNAVAILABLE, "store_unavailable", "the store cannot be read at the moment")
            .retry_after(1)
    };
    outcome
        .map_err(|_| Problem::new(StatusCode::INTERNAL_SERVER_ERROR, "internal_error", "reading was given up"))?
        .map_err(failed)
}

fn window(q: &HashMap<String, String>) -> Result<Window, Problem> {
    let Some(name) = q.get("window") else { return Ok(Window::M5) };
    Window::of_name(name).ok_or_else(|| bad("bad_window", "window is one of 1m, 5m, 1h, 1d").param("window"))
}

fn scope(q: &HashMap<String, String>) -> Result<Scope, Problem> {
    let Some(name) = q.get("scope") else { return Ok(Scope::Ticker) };
    Scope::of_name(name).ok_or_else(|| bad("bad_scope", "scope is one of ticker, sector, market").param("scope"))
}

fn count(q: &HashMap<String, String>, name: &'static str, default: usize, most: usize) -> Result<usize, Problem> {
    let Some(text) = q.get(name).filter(|t| !t.is_empty()) else { return Ok(default) };
    match text.parse::<usize>() {
        Ok(n) => Ok(n.min(most)),
        Err(_) => Err(bad("bad_number", format!("{name} is a number from 0 to {most}")).param(name)),
    }
}

fn moment(q: &HashMap<String, String>, name: &'static str, default: Millis) -> Result<Millis, Problem> {
    let Some(text) = q.get(name).filter(|t| !t.is_empty()) else { return Ok(default) };
    time::parse(text)
        .ok_or_else(|| bad("bad_time", format!("{name} is a time such as 2026-11-28T09:00:00Z")).param(name))
}

async fn health(State(api): State<Api>) -> Response {
    let snapshot = api.shared.snapshot();
    let value = json!({"status": "ok", "backlog": api.shared.inlet.backlog(), "latest": shown(snapshot.latest),
        "store": api.shared.store.to_json()["state"]});
    drop(snapshot);
    ok(&value)
}

async fn quality(State(api): State<Api>) -> Response {
    ok(&api.shared.quality)
}

async fn metrics(State(api): State<Api>) -> Response {
    let shared = &api.shared;
    let mut text = String::new();
    let mut line = |name: &str, help: &str, kind: &str, values: &[(String, String)]| {
        text += &format!("# HELP cashtag_live_{name} {help}.\n# TYPE cashtag_live_{name} {kind}\n");
        for (labels, value) in values {
            text += &format!("cashtag_live_{name}{labels} {value}\n");
        }
    };
    for (name, help, kind, value) in shared.counters.all() {
        line(name, help, kind, &[(String::new(), value.to_string())]);
    }
    line(
        "backlog_posts",
        "Posts in the log that are not counted yet",
        "gauge",
        &[(String::new(), shared.inlet.backlog().to_string())],
    );
    let up = u8::from(shared.store.to_json()["state"] == "connected");
    line("store_up", "1 if the store takes what is written", "gauge", &[(String::new(), up.to_string())]);
    for (name, help) in [
        ("unanswered", "Posts that are out for scoring"),
        ("tasks_waiting", "Texts that no worker has taken"),
        ("tasks_taken", "Texts that workers have not answered yet"),
    ] {
        if let Some(value) = shared.bus()[name].as_u64() {
            line(&format!("bus_{name}"), help, "gauge", &[(String::new(), value.to_string())]);
        }
    }
    let delays = shared.delays.lock().unwrap_or_else(std::sync::PoisonError::into_inner).to_json();
    for (name, value) in delays.as_object().into_iter().flatten().filter(|(_, v)| v.is_number()) {
        line(name, "Delay in milliseconds", "gauge", &[(String::new(), value.to_string())]);
    }
    let sources = shared.inlet.board().all();
    let each = |value: &dyn Fn(&crate::board::SourceStatus) -> String| -> Vec<(String, String)> {
        sources.iter().map(|(name, s)| (format!("{{source=\"{}\"}}", label(name)), value(s))).collect()
    };
    line("source_posts_total", "Posts delivered", "counter", &each(&|s| s.posts_total.to_string()));
    line("source_reconnects_total", "Connections that were lost", "counter", &each(&|s| s.reconnects.to_string()));
    line(
        "source_up",
        "1 if connected",
        "gauge",
        &each(&|s| u8::from(s.state == crate::board::State::Connected).to_string()),
    );
    ([(header::CONTENT_TYPE, cashtag_http::metrics::CONTENT_TYPE)], text).into_response()
}

/// A label's value as Prometheus escapes it.
fn label(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

/// A time, or null where there is none yet.
fn shown(time: Millis) -> Value {
    if time == Millis::MIN { Value::Null } else { time::rfc3339(time).into() }
}
