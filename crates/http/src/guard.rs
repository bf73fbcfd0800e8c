//! What happens to every request before and after its route: who asks, how much, how long, and what is told about it.
//!
//! ```text
//! request id ─ host ─ origin ─ key ─ whole body, bounded ─ route (a panic is a 500) ─ shape of errors ─ headers ─ log
//! ```
//!
//! Routes find the [`RequestId`] and the [`Identity`] among the request's extensions, and the body read.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::{Body, HttpBody as _};
use axum::extract::{MatchedPath, Request};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};
use base64::Engine as _;
use bytes::{Bytes, BytesMut};
use futures_util::FutureExt as _;
use http_body_util::BodyExt as _;
use serde_json::Value;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tower::ServiceExt as _;

use crate::bind::is_local_name;
use crate::keys::{Identity, Keys, Role, hex, random};
use crate::log::{Level, Log};
use crate::metrics::{Histograms, Numbers, Registry, seconds};
use crate::problem::{Problem, json_response};
use crate::server::Limits;

/// Who may ask, and how errors look.
pub struct Guard {
    /// With none in force everybody who reaches the service may ask; nobody is an admin then.
    pub keys: Keys,
    /// Paths that need no key: health checks.
    pub open: Vec<&'static str>,
    /// Origins whose pages may call the service (`https://app.example`), or `*`. None: no page but its own.
    pub cors_origins: Vec<String>,
    /// Names, besides those of loopback, by which a service without keys may be called.
    pub allowed_hosts: Vec<String>,
    /// The JSON of an error answer on a path.
    pub shape: fn(&str, &Problem) -> Value,
}

impl Default for Guard {
    fn default() -> Self {
        Self {
            keys: Keys::default(),
            open: vec!["/health"],
            cors_origins: Vec::new(),
            allowed_hosts: Vec::new(),
            shape: |_, problem| problem.openai(),
        }
    }
}

/// Names a request in logs and in the header `x-request-id`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RequestId(pub Arc<str>);

const REQUEST_ID: &str = "x-request-id";

/// What all connections share.
pub(crate) struct Shared {
    pub(crate) guard: Guard,
    pub(crate) limits: Limits,
    pub(crate) log: Log,
    /// Only loopback, or named hosts, may be asked for.
    pub(crate) local_only: bool,
    pub(crate) tls: bool,
    body_budget: Arc<Semaphore>,
    requests: Numbers,
    durations: Histograms,
}

/// Bodies are accounted for in pieces of this many bytes.
const PIECE: usize = 1024;

impl Shared {
    pub(crate) fn new(
        guard: Guard,
        limits: Limits,
        log: Log,
        registry: &Registry,
        local_only: bool,
        tls: bool,
    ) -> Self {
        let pieces = (limits.bodies_bytes / PIECE).clamp(1, Semaphore::MAX_PERMITS);
        Self {
            body_budget: Arc::new(Semaphore::new(pieces)),
            requests: registry.counters(
                "cashtag_http_requests_total",
                "Requests answered, by route and status.",
                &["method", "route", "status"],
            ),
            durations: registry.histograms(
                "cashtag_http_request_duration_seconds",
                "From the head of a request to the head of its answer.",
                &["route"],
                seconds(),
            ),
            guard,
            limits,
            log,
            local_only,
            tls,
        }
    }

    /// Answers one request.
    pub(crate) async fn answer<B>(self: Arc<Self>, router: Router, request: axum::http::Request<B>) -> Response
    where
        B: axum::body::HttpBody<Data = Bytes> + Send + Unpin + 'static,
        B::Error: std::fmt::Display,
    {
        let started = Instant::now();
        let id = request_id(request.headers());
        let path = request.uri().path().to_owned();
        let mut told = Told {
            shared: &self,
            started,
            id: id.clone(),
            method: method_name(request.method()),
            path: path.clone(),
            key: None,
            outcome: None,
        };
        let origin = request.headers().get(header::ORIGIN).cloned();
        let mut response = match self.admit(request, &id, &mut told.key).await {
            Ok(Admitted::Answer(response)) => response,
            Ok(Admitted::Request(request, _permits)) => {
                match AssertUnwindSafe(router.oneshot(request)).catch_unwind().await {
                    Ok(Ok(response)) => response,
                    Ok(Err(never)) => match never {},
                    Err(_) => Problem::new(
                        StatusCode::INTERNAL_SERVER_ERROR,
                        "internal_error",
                        "a bug in the service stopped this request",
                    )
                    .into_response(),
                }
            }
            Err(problem) => problem.into_response(),
        };
        self.dress(&mut response, &id, &path, origin.as_ref());
        let route = response.extensions().get::<MatchedPath>().map_or("none", |m| m.as_str()).to_owned();
        told.outcome = Some((response.status(), route));
        response
    }

    /// Checks in the order of what they cost.
    async fn admit<B>(
        &self,
        request: axum::http::Request<B>,
        id: &RequestId,
        key: &mut Option<Arc<str>>,
    ) -> Result<Admitted, Problem>
    where
        B: axum::body::HttpBody<Data = Bytes> + Send + Unpin + 'static,
        B::Error: std::fmt::Display,
    {
        let (mut parts, body) = request.into_parts();
        if self.local_only && !self.knows_host(&parts.headers) {
            return Err(Problem::new(
                StatusCode::MISDIRECTED_REQUEST,
                "unknown_host",
                "without keys this service answers to localhost only; name other hosts with --allowed-host",
            ));
        }
        if let Some(answer) = self.preflight(&parts.method, &parts.headers) {
            return Ok(Admitted::Answer(answer));
        }
        if !parts.method.is_safe() && !self.may_come_from(&parts.headers) {
            return Err(Problem::new(
                StatusCode::FORBIDDEN,
                "cross_origin",
                "pages of another origin may not use this service; allow theirs with --cors-allow-origin",
            ));
        }
        let anonymous = Identity { name: "".into(), role: Role::User };
        let identity = if self.guard.keys.is_empty() || self.guard.open.contains(&parts.uri.path()) {
            anonymous
        } else {
            match presented(&parts.headers).and_then(|k| self.guard.keys.verify(&k)) {
                Some(identity) => {
                    *key = Some(identity.name.clone());
                    identity
                }
                None => return Ok(Admitted::Answer(unauthorized(&parts.headers))),
            }
        };
        let (body, permits) = self.whole_body(&parts.headers, body).await?;
        parts.extensions.insert(identity);
        parts.extensions.insert(id.clone());
        Ok(Admitted::Request(Request::from_parts(parts, Body::from(body)), permits))
    }

    fn knows_host(&self, headers: &HeaderMap) -> bool {
        // HTTP/1.0 knows no Host; no browser speaks it.
        let Some(host) = headers.get(header::HOST) else { return true };
        let Ok(host) = host.to_str() else { return false };
        let name = host.rsplit_once(':').map_or(host, |(name, _)| name);
        is_local_name(host)
            || self.guard.allowed_hosts.iter().any(|h| h.eq_ignore_ascii_case(host) || h.eq_ignore_ascii_case(name))
    }

    fn allows_origin(&self, origin: &HeaderValue) -> bool {
        self.guard.cors_origins.iter().any(|o| o == "*" || o.as_bytes() == origin.as_bytes())
    }

    /// Browsers say where a page comes from; its own origin and allowed ones may send.
    fn may_come_from(&self, headers: &HeaderMap) -> bool {
        match headers.get(header::ORIGIN) {
            Some(origin) if self.allows_origin(origin) => true,
            Some(origin) => {
                let (Some(host), Ok(origin)) = (headers.get(header::HOST), origin.to_str()) else { return false };
                origin.split_once("://").is_some_and(|(_, o)| o.as_bytes() == host.as_bytes())
            }
            None => headers.get("sec-fetch-site").is_none_or(|site| site != "cross-site"),
        }
    }

    fn preflight(&self, method: &Method, headers: &HeaderMap) -> Option<Response> {
        let origin = headers.get(header::ORIGIN)?;
        headers.get(header::ACCESS_CONTROL_REQUEST_METHOD)?;
        if method != Method::OPTIONS || !self.allows_origin(origin) {
            return None;
        }
        let mut response = StatusCode::NO_CONTENT.into_response();
        let set = response.headers_mut();
        set.insert(header::ACCESS_CONTROL_ALLOW_METHODS, HeaderValue::from_static("GET, POST, DELETE"));
        set.insert(
            header::ACCESS_CONTROL_ALLOW_HEADERS,
            HeaderValue::from_static("authorization, content-type, x-api-key, x-request-id"),
        );
        set.insert(header::ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static("600"));
        Some(response)
    }

    /// Reads the body within the limits of one request, of all requests together, and of time.
    async fn whole_body<B>(
        &self,
        headers: &HeaderMap,
        mut body: B,
    ) -> Result<(Bytes, Vec<OwnedSemaphorePermit>), Problem>
    where
        B: axum::body::HttpBody<Data = Bytes> + Send + Unpin + 'static,
        B::Error: std::fmt::Display,
    {
        let limit = self.limits.body_bytes;
        let too_large = || {
            Problem::new(
                StatusCode::PAYLOAD_TOO_LARGE,
                "payload_too_large",
                format!("the body has more than {limit} bytes; send fewer texts at a time"),
            )
        };
        let declared = headers.get(header::CONTENT_LENGTH).and_then(|v| v.to_str().ok()).and_then(|v| v.parse().ok());
        if declared.is_some_and(|n: u64| n > limit as u64) || body.size_hint().lower() > limit as u64 {
            discard(body).await;
            return Err(too_large());
        }
        let (mut read, mut permits, mut paid) = (BytesMut::new(), Vec::new(), 0);
        let reading = async {
            while let Some(frame) = body.frame().await {
                let frame = frame.map_err(|e| {
                    Problem::new(StatusCode::BAD_REQUEST, "bad_body", format!("the body cannot be read: {e}"))
                })?;
                let Ok(data) = frame.into_data() else { continue };
                if read.len() + data.len() > limit {
                    return Err(too_large());
                }
                let pieces = (read.len() + data.len()).div_ceil(PIECE);
                if pieces > paid {
                    let more = self.body_budget.clone().try_acquire_many_owned((pieces - paid) as u32);
                    permits.push(more.map_err(|_| {
                        Problem::new(StatusCode::TOO_MANY_REQUESTS, "overloaded", "too many large requests at once")
                            .retry_after(1)
                    })?);
                    paid = pieces;
                }
                read.extend_from_slice(&data);
            }
            Ok(())
        };
        match tokio::time::timeout(self.limits.body, reading).await {
            Ok(Ok(())) => {}
            Ok(Err(problem)) => {
                discard(body).await;
                return Err(problem);
            }
            Err(_) => {
                let seconds = self.limits.body.as_secs_f64();
                let message = format!("the body did not arrive within {seconds} s");
                return Err(Problem::new(StatusCode::REQUEST_TIMEOUT, "request_timeout", message));
            }
        }
        Ok((read.freeze(), permits))
    }

    /// Error answers get their shape, and every answer its headers.
    fn dress(&self, response: &mut Response, id: &RequestId, path: &str, origin: Option<&HeaderValue>) {
        let status = response.status();
        let problem = response.extensions().get::<Problem>().cloned().or_else(|| {
            let is_bare = status.as_u16() >= 400 && response.body().size_hint().exact() == Some(0);
            is_bare.then(|| bare(status))
        });
        if let Some(problem) = problem {
            let shaped = json_response(status, &(self.guard.shape)(path, &problem));
            let (parts, body) = shaped.into_parts();
            response.headers_mut().extend(parts.headers);
            response.headers_mut().remove(header::CONTENT_LENGTH);
            *response.body_mut() = body;
            // What is left of a request that was refused early would have to be read first.
            if matches!(status, StatusCode::PAYLOAD_TOO_LARGE | StatusCode::REQUEST_TIMEOUT) {
                response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
            }
        }
        let headers = response.headers_mut();
        if let Ok(id) = HeaderValue::from_str(&id.0) {
            headers.insert(REQUEST_ID, id);
        }
        for (name, value) in [
            (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
            (header::X_FRAME_OPTIONS, "DENY"),
            (header::REFERRER_POLICY, "no-referrer"),
            (header::CONTENT_SECURITY_POLICY, "default-src 'none'; frame-ancestors 'none'"),
            (header::CACHE_CONTROL, "no-store"),
        ] {
            headers.entry(name).or_insert(HeaderValue::from_static(value));
        }
        if self.tls {
            let value = HeaderValue::from_static("max-age=31536000");
            headers.entry(header::STRICT_TRANSPORT_SECURITY).or_insert(value);
        }
        if !self.guard.cors_origins.is_empty() {
            headers.append(header::VARY, HeaderValue::from_static("origin"));
            if let Some(origin) = origin.filter(|o| self.allows_origin(o)) {
                headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin.clone());
                headers.insert(
                    header::ACCESS_CONTROL_EXPOSE_HEADERS,
                    HeaderValue::from_static("x-request-id, retry-after"),
                );
            }
        }
    }
}

/// Reads some of what is not wanted: a connection that is closed with unread bytes is reset, and its client may never see
/// the answer.
async fn discard<B>(mut body: B)
where
    B: axum::body::HttpBody<Data = Bytes> + Send + Unpin + 'static,
{
    const MOST: usize = 32 << 20;
    let reading = async {
        let mut read = 0;
        while let Some(Ok(frame)) = body.frame().await {
            read += frame.data_ref().map_or(0, Bytes::len);
            if read > MOST {
                return;
            }
        }
    };
    let _ = tokio::time::timeout(Duration::from_secs(1), reading).await;
}

enum Admitted {
    Request(Request, Vec<OwnedSemaphorePermit>),
    Answer(Response),
}

/// A request in the log and the metrics, also if its client leaves before it is answered.
struct Told<'a> {
    shared: &'a Shared,
    started: Instant,
    id: RequestId,
    method: &'static str,
    path: String,
    key: Option<Arc<str>>,
    outcome: Option<(StatusCode, String)>,
}

/// As nginx counts a client that left.
const CLIENT_LEFT: u16 = 499;

impl Drop for Told<'_> {
    fn drop(&mut self) {
        let elapsed = self.started.elapsed();
        let (status, route) = match self.outcome.take() {
            Some((status, route)) => (status.as_u16(), route),
            None => (CLIENT_LEFT, "none".into()),
        };
        self.shared.requests.with(&[self.method, &route, &status.to_string()]).inc();
        self.shared.durations.with(&[&route]).observe(elapsed.as_secs_f64());
        let level = if status >= 500 { Level::Warn } else { Level::Info };
        if !self.shared.log.is_on(level) {
            return;
        }
        self.shared.log.event(
            level,
            "request",
            &[
                ("id", Value::from(&*self.id.0)),
                ("method", self.method.into()),
                ("path", self.path.chars().take(200).collect::<String>().into()),
                ("status", status.into()),
                ("ms", milliseconds(elapsed)),
                ("key", self.key.as_deref().map_or(Value::Null, Value::from)),
            ],
        );
    }
}

/// Milliseconds with three decimals.
pub fn milliseconds(time: Duration) -> Value {
    Value::from((time.as_secs_f64() * 1e6).round() / 1e3)
}

/// Makes the route's pattern known to what stands around the router.
pub(crate) async fn note_route(request: Request, next: Next) -> Response {
    let route = request.extensions().get::<MatchedPath>().cloned();
    let mut response = next.run(request).await;
    if let Some(route) = route {
        response.extensions_mut().insert(route);
    }
    response
}

/// The client's own id if it is a plain word, else a new one.
fn request_id(headers: &HeaderMap) -> RequestId {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.' | b':');
    let given = headers.get(REQUEST_ID).and_then(|v| v.to_str().ok());
    match given.filter(|v| !v.is_empty() && v.len() <= 128 && v.bytes().all(plain)) {
        Some(id) => RequestId(id.into()),
        // An id without entropy is better than no service.
        None => RequestId(hex(&random::<12>().unwrap_or_default()).into()),
    }
}

/// `Authorization: Bearer KEY`, `X-API-Key: KEY`, or the password of `Authorization: Basic`, which browsers ask for.
fn presented(headers: &HeaderMap) -> Option<String> {
    if let Some(key) = headers.get("x-api-key") {
        return key.to_str().ok().map(str::to_owned);
    }
    let (scheme, value) = headers.get(header::AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    let value = value.trim();
    if scheme.eq_ignore_ascii_case("bearer") {
        return Some(value.to_owned());
    }
    if scheme.eq_ignore_ascii_case("basic") {
        let decoded = base64::engine::general_purpose::STANDARD.decode(value).ok()?;
        let pair = String::from_utf8(decoded).ok()?;
        return pair.split_once(':').map(|(_, password)| password.to_owned());
    }
    None
}

fn unauthorized(headers: &HeaderMap) -> Response {
    let mut response = Problem::new(
        StatusCode::UNAUTHORIZED,
        "invalid_api_key",
        "a valid API key is needed: Authorization: Bearer KEY",
    )
    .into_response();
    let is_browser = headers
        .get(header::ACCEPT)
        .and_then(|v| v.to_str().ok())
        .is_some_and(|accept| accept.split(',').any(|t| t.trim().starts_with("text/html")));
    let challenge = if is_browser { "Basic realm=\"cashtag\", charset=\"UTF-8\"" } else { "Bearer realm=\"cashtag\"" };
    response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static(challenge));
    response
}

/// For answers that carry nothing but a status, as the router's own do.
fn bare(status: StatusCode) -> Problem {
    match status {
        StatusCode::NOT_FOUND => Problem::new(status, "not_found", "there is no such route"),
        StatusCode::METHOD_NOT_ALLOWED => {
            Problem::new(status, "method_not_allowed", "this route does not take this method")
        }
        _ => Problem::new(status, "error", status.canonical_reason().unwrap_or("the request failed")),
    }
}

fn method_name(method: &Method) -> &'static str {
    ["GET", "POST", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH"]
        .into_iter()
        .find(|name| method.as_str() == *name)
        .unwrap_or("other")
}
