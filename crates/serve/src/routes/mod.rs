//! The HTTP routes, in the shapes that clients of vLLM, text-embeddings-inference and OpenAI know.
//!
//! A body that is no JSON is a 400, a field that is wrong a 422, too much of it a 413; fields that are not known are ignored,
//! as those servers do, but a field that would change the answer and is not supported is refused.

mod adapters;
mod chat;
mod classify;
mod constraint;
mod fields;
mod info;
mod openapi;
mod predict;
mod write;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::extract::State as Shared;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use axum::routing::{get, post};
use cashtag_http::problem::json_response;
use cashtag_http::{Log, Problem, Shutdown};
use serde_json::{Value, json};

use crate::engine::{ClassifyRequest, Engine, Failure, Scored, Served, State};

pub use self::openapi::document;

/// Finds symbols in a text and says them as JSON, for the field `tickers`.
pub type Tickers = Arc<dyn Fn(&str) -> Value + Send + Sync>;

/// What the routes know.
#[derive(Clone)]
pub struct Service {
    pub engine: Engine,
    pub log: Log,
    /// Where adapters may be loaded from while it runs; nowhere if `None`.
    pub lora_dir: Option<PathBuf>,
    pub tickers: Option<Tickers>,
    pub shutdown: Shutdown,
}

impl Service {
    pub fn router(self) -> Router {
        Router::new()
            .route("/v1/classify", post(classify::classify))
            .route("/predict", post(predict::predict))
            .route("/v1/chat/completions", post(chat::chat))
            .route("/v1/completions", post(chat::complete))
            .route("/v1/models", get(info::models))
            .route("/v1/models/{*id}", get(info::model))
            .route("/v1/load_lora_adapter", post(adapters::load))
            .route("/v1/unload_lora_adapter", post(adapters::unload))
            .route("/health", get(health))
            .route("/metrics", get(metrics))
            .route("/info", get(info::info))
            .route("/openapi.json", get(|| async { json_response(StatusCode::OK, &document()) }))
            .with_state(self)
    }
}

/// The shape of an error on a path: text-embeddings-inference's on its own route, OpenAI's elsewhere.
pub fn error_shape(path: &str, problem: &Problem) -> Value {
    if path == "/predict" { predict::error(problem) } else { problem.openai() }
}

impl From<Failure> for Problem {
    fn from(failure: Failure) -> Self {
        let message = failure.to_string();
        match failure {
            Failure::Overloaded { retry_after } => {
                Problem::new(StatusCode::TOO_MANY_REQUESTS, "overloaded", message).retry_after(retry_after)
            }
            Failure::Loading => Problem::new(StatusCode::SERVICE_UNAVAILABLE, "loading", message).retry_after(2),
            Failure::Ended => Problem::new(StatusCode::SERVICE_UNAVAILABLE, "ending", message).retry_after(2),
            Failure::NoSuchModel { .. } => {
                Problem::new(StatusCode::NOT_FOUND, "model_not_found", message).param("model")
            }
            Failure::Deadline { .. } => Problem::new(StatusCode::GATEWAY_TIMEOUT, "deadline_exceeded", message),
            Failure::TooManyTexts(..) => Problem::new(StatusCode::PAYLOAD_TOO_LARGE, "too_many_texts", message),
            Failure::Invalid(_) => Problem::new(StatusCode::UNPROCESSABLE_ENTITY, "invalid_request", message),
            Failure::Conflict(_) => Problem::new(StatusCode::CONFLICT, "conflict", message),
            Failure::Device(_) => Problem::new(StatusCode::INTERNAL_SERVER_ERROR, "engine_error", message),
        }
    }
}

async fn health(Shared(service): Shared<Service>) -> Result<Response, Problem> {
    if service.shutdown.is_draining() {
        return Err(Failure::Ended.into());
    }
    match service.engine.state() {
        State::Ready => Ok(json_response(StatusCode::OK, &json!({"status": "ok"}))),
        State::Loading => Err(Failure::Loading.into()),
        State::Ended => Err(Failure::Ended.into()),
    }
}

async fn metrics(Shared(service): Shared<Service>) -> Response {
    let kind = HeaderValue::from_static(cashtag_http::metrics::CONTENT_TYPE);
    ([(header::CONTENT_TYPE, kind)], service.engine.inner.registry.text()).into_response()
}

/// Classifies within the deadline, to the moment.
async fn classify_in_time(service: &Service, request: ClassifyRequest) -> Result<(Arc<Served>, Vec<Scored>), Failure> {
    let limit = request.timeout.unwrap_or(service.engine.config().timeout);
    match tokio::time::timeout(limit, service.engine.classify(request)).await {
        Ok(outcome) => outcome,
        Err(_) => Err(Failure::Deadline { seconds: limit.as_secs_f64() }),
    }
}

/// The headers by which text-embeddings-inference says what an answer cost, in milliseconds.
fn add_costs(response: &mut Response, service: &Service, started: Instant, characters: usize, scored: &[Scored]) {
    let longest = |of: fn(&Scored) -> Duration| scored.iter().map(of).max().unwrap_or_default().as_millis() as u64;
    let total = started.elapsed().as_millis() as u64;
    let numbers = [
        ("x-compute-time", longest(|s| s.inference)),
        ("x-compute-characters", characters as u64),
        ("x-compute-tokens", scored.iter().map(|s| s.prompt_tokens as u64).sum()),
        ("x-total-time", total),
        ("x-tokenization-time", longest(|s| s.tokenization)),
        ("x-queue-time", longest(|s| s.queue)),
        ("x-inference-time", longest(|s| s.inference)),
    ];
    for (name, value) in numbers {
        response.headers_mut().insert(name, HeaderValue::from(value));
    }
    let device =
        service.engine.inner.base.get().map_or("cpu", |b| if b.device.contains("NVIDIA") { "gpu" } else { "cpu" });
    response.headers_mut().insert("x-compute-type", HeaderValue::from_static(device));
}

/// The shortest decimal number that is the same f32: 0.9, not 0.8999999761581421.
fn shortest(p: f32) -> Value {
    p.to_string().parse::<f64>().map_or(Value::Null, Value::from)
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}
