//! A blocking client for OpenAI-compatible chat completions.
//!
//! One call is one answer or one error: attempts, pauses and the few things that servers differ in (the name of the token
//! limit, whether a temperature may be given) are settled here. What changes the messages (no structured answers, a
//! context that is too short) is handed back to the caller. The key is sent in one header and shown nowhere.

use std::fmt;
use std::io::Read as _;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value, json};

use crate::backoff::{RetryPolicy, retry_after};
use crate::error::{ApiError, Error, Result};
use crate::journal::Reply;

/// The longest answer that is read.
const MAX_BODY: u64 = 8 << 20;
/// Characters of a server's message that are shown.
const SHOWN: usize = 300;

/// A secret that cannot be printed.
#[derive(Clone)]
pub struct ApiKey(String);

impl fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ApiKey(…)")
    }
}

impl ApiKey {
    /// # Errors
    ///
    /// If it is empty or holds what cannot stand in a header.
    pub fn new(key: &str) -> Result<Self> {
        let key = key.trim();
        if key.is_empty() || !key.bytes().all(|byte| byte.is_ascii_graphic()) {
            let message = "the API key is empty, or holds spaces, line breaks or letters outside ASCII";
            return Err(ApiError::Setup(message.into()).into());
        }
        Ok(Self(key.to_owned()))
    }

    /// The key from `file` if one is given, else from `OPENAI_API_KEY` if that is set.
    ///
    /// # Errors
    ///
    /// If the file cannot be read, or what was found cannot be a key.
    pub fn find(file: Option<&Path>) -> Result<Option<Self>> {
        if let Some(path) = file {
            let mut content = String::new();
            let read = std::fs::File::open(path).and_then(|file| file.take(64 << 10).read_to_string(&mut content));
            read.map_err(Error::io("read the API key from", path))?;
            return Self::new(&content).map(Some);
        }
        match std::env::var("OPENAI_API_KEY") {
            Ok(key) if !key.trim().is_empty() => Self::new(&key).map(Some),
            _ => Ok(None),
        }
    }
}

#[derive(Clone, Debug)]
pub struct ClientOptions {
    /// The address up to and including `/v1`.
    pub api_base: String,
    pub key: Option<ApiKey>,
    pub connect_timeout: Duration,
    /// For one attempt, from the first byte sent to the last byte read.
    pub timeout: Duration,
    pub retry: RetryPolicy,
    /// Decides the jitter of the pauses.
    pub seed: u64,
}

impl Default for ClientOptions {
    fn default() -> Self {
        Self {
            api_base: "https://api.openai.com/v1".into(),
            key: None,
            connect_timeout: Duration::from_secs(10),
            timeout: Duration::from_secs(120),
            retry: RetryPolicy::default(),
            seed: 0,
        }
    }
}

#[derive(Clone, Debug, PartialEq)]
pub struct Message {
    pub role: &'static str,
    pub content: String,
}

#[derive(Clone, Debug, PartialEq)]
pub struct ChatRequest {
    pub model: String,
    pub messages: Vec<Message>,
    pub temperature: f64,
    pub max_tokens: u32,
    pub response_format: Option<Value>,
}

impl ChatRequest {
    /// An upper estimate of the tokens of the prompt: three bytes a token, and a few for each message.
    pub fn estimated_prompt_tokens(&self) -> u64 {
        self.messages.iter().map(|message| message.content.len() as u64 / 3 + 8).sum()
    }
}

/// An attempt that failed.
#[derive(Clone, Debug, PartialEq)]
pub struct Failure {
    pub attempt: u32,
    pub problem: String,
    /// The server may have worked for it, so it may be charged for.
    pub costly: bool,
    /// How long until the next attempt; `None` if there is none.
    pub pause: Option<Duration>,
}

/// Why there is no answer.
#[derive(Clone, Debug, PartialEq)]
pub enum CallError {
    /// The same request may succeed later.
    GaveUp(ApiError),
    /// No request like this one can succeed.
    Fatal(ApiError),
    /// The server does not take `response_format`.
    NoResponseFormat,
    /// The messages are longer than the model's context.
    ContextTooLong(ApiError),
    /// The caller asked to stop.
    Cancelled,
}

/// See the module. Shared between threads.
pub struct ChatClient {
    agent: ureq::Agent,
    url: String,
    options: ClientOptions,
    /// The server wants `max_completion_tokens`.
    new_token_limit: AtomicBool,
    /// The server takes no temperature.
    no_temperature: AtomicBool,
    /// Nobody asks before this: what a 429 tells one thread holds for all.
    not_before: Mutex<Option<Instant>>,
    cancelled: AtomicBool,
}

impl fmt::Debug for ChatClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChatClient").field("url", &self.url).field("options", &self.options).finish_non_exhaustive()
    }
}

impl ChatClient {
    /// # Errors
    ///
    /// If the address is none, or belongs to OpenAI and there is no key.
    pub fn new(options: ClientOptions) -> Result<Self> {
        let base = options.api_base.trim().trim_end_matches('/').trim_end_matches("/chat/completions");
        let authority = base.strip_prefix("https://").or_else(|| base.strip_prefix("http://")).unwrap_or_default();
        let host = authority.split('/').next().unwrap_or_default();
        if host.is_empty() || base.contains(char::is_whitespace) {
            let message = format!(
                "{:?} is no address of a server\n  hint: --api-base https://api.openai.com/v1, or http://localhost:11434/v1",
                options.api_base
            );
            return Err(ApiError::Setup(message).into());
        }
        if host.contains('@') {
            let message = "the address holds a user name or password\n  hint: use OPENAI_API_KEY or --api-key-file";
            return Err(ApiError::Setup(message.into()).into());
        }
        if options.key.is_none() && host.ends_with("openai.com") {
            let message = "no API key\n  hint: set OPENAI_API_KEY, name a file with --api-key-file, or ask another server \
                           with --api-base";
            return Err(ApiError::Setup(message.into()).into());
        }
        let config = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .timeout_connect(Some(options.connect_timeout))
            .timeout_global(Some(options.timeout))
            .user_agent(concat!("cashtag/", env!("CARGO_PKG_VERSION")))
            .build();
        Ok(Self {
            agent: config.into(),
            url: format!("{base}/chat/completions"),
            options,
            new_token_limit: AtomicBool::new(false),
            no_temperature: AtomicBool::new(false),
            not_before: Mutex::new(None),
            cancelled: AtomicBool::new(false),
        })
    }

    pub fn url(&self) -> &str {
        &self.url
    }

    /// Makes all calls end soon, those that are waiting at once.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }

    /// One answer. `number` tells requests apart for the jitter; `on_failure` hears of every attempt that failed and
    /// returns whether to go on.
    ///
    /// # Errors
    ///
    /// See [`CallError`].
    pub fn complete(
        &self,
        request: &ChatRequest,
        number: u64,
        on_failure: &dyn Fn(&Failure) -> bool,
    ) -> Result<Reply, CallError> {
        let mut attempt = 1;
        loop {
            self.wait_for_turn()?;
            let (problem, costly, asked) = match self.attempt(request) {
                Ok(reply) => return Ok(reply),
                Err(Attempt::Adapted) => continue,
                Err(Attempt::Final(error)) => return Err(error),
                Err(Attempt::Failed { problem, costly, retry_after }) => (problem, costly, retry_after),
            };
            let policy = &self.options.retry;
            let too_long = asked.is_some_and(|asked| asked > policy.longest_retry_after);
            let last = attempt >= policy.attempts || too_long;
            let pause = (!last).then(|| {
                let own = policy.pause(attempt, self.options.seed, number);
                asked.map_or(own, |asked| if asked.is_zero() { own } else { asked })
            });
            let go_on = on_failure(&Failure { attempt, problem: problem.clone(), costly, pause });
            let Some(pause) = pause.filter(|_| go_on) else {
                let message = match asked {
                    Some(asked) if too_long => {
                        format!(
                            "{problem}\n  hint: the server asks to wait {} s; run the same command then",
                            asked.as_secs()
                        )
                    }
                    _ => problem,
                };
                return Err(CallError::GaveUp(ApiError::GaveUp { url: self.url.clone(), attempts: attempt, message }));
            };
            if asked.is_some() {
                let mut not_before = self.not_before.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                let until = Instant::now() + pause;
                *not_before = Some(not_before.map_or(until, |known| known.max(until)));
            } else {
                self.sleep_until(Instant::now() + pause)?;
            }
            attempt += 1;
        }
    }

    fn wait_for_turn(&self) -> Result<(), CallError> {
        loop {
            let until = *self.not_before.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            match until {
                Some(until) if until > Instant::now() => self.sleep_until(until)?,
                _ => return if self.cancelled.load(Ordering::Relaxed) { Err(CallError::Cancelled) } else { Ok(()) },
            }
        }
    }

    fn sleep_until(&self, until: Instant) -> Result<(), CallError> {
        loop {
            if self.cancelled.load(Ordering::Relaxed) {
                return Err(CallError::Cancelled);
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            std::thread::sleep(left.min(Duration::from_millis(50)));
        }
    }

    fn body(&self, request: &ChatRequest) -> Value {
        let messages: Vec<Value> =
            request.messages.iter().map(|message| json!({"role": message.role, "content": message.content})).collect();
        let mut body = Map::new();
        body.insert("model".into(), request.model.as_str().into());
        body.insert("messages".into(), messages.into());
        if !self.no_temperature.load(Ordering::Relaxed) {
            body.insert("temperature".into(), request.temperature.into());
        }
        let limit = if self.new_token_limit.load(Ordering::Relaxed) { "max_completion_tokens" } else { "max_tokens" };
        body.insert(limit.into(), request.max_tokens.into());
        if let Some(format) = &request.response_format {
            body.insert("response_format".into(), format.clone());
        }
        body.into()
    }

    fn attempt(&self, request: &ChatRequest) -> Result<Reply, Attempt> {
        let mut call = self.agent.post(&self.url).header("content-type", "application/json");
        if let Some(key) = &self.options.key {
            call = call.header("authorization", format!("Bearer {}", key.0));
        }
        let body = self.body(request).to_string();
        let mut response = call.send(body.as_bytes()).map_err(|error| {
            // A request that never reached the server costs nothing; for one that was not answered we cannot know.
            let costly = matches!(&error, ureq::Error::Timeout(timeout) if !matches!(timeout, ureq::Timeout::Connect | ureq::Timeout::Resolve))
                || matches!(&error, ureq::Error::Io(source) if source.kind() != std::io::ErrorKind::ConnectionRefused)
                || matches!(&error, ureq::Error::Protocol(_));
            Attempt::failed(self.said(&error), costly)
        })?;
        let status = response.status().as_u16();
        let header = |name: &str| response.headers().get(name).and_then(|value| value.to_str().ok()).map(str::to_owned);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |now| now.as_secs_f64());
        let asked = header("retry-after").and_then(|value| retry_after(&value, header("date").as_deref(), now));
        let success = (200..300).contains(&status);
        let content = response
            .body_mut()
            .with_config()
            .limit(MAX_BODY)
            .read_to_vec()
            .map_err(|error| Attempt::failed(format!("the answer broke off: {}", self.said(&error)), success))?;
        let value: Option<Value> = serde_json::from_slice(&content).ok();
        if !success {
            return Err(self.refused(status, value.as_ref(), &content, asked, request));
        }
        let Some(value) = value else {
            let start = self.clean(&String::from_utf8_lossy(&content[..content.len().min(80)]));
            return Err(Attempt::failed(format!("the answer is not JSON; it begins {start:?}"), true));
        };
        if let Some(error) = value.get("error").filter(|error| !error.is_null()) {
            return Err(Attempt::failed(format!("the server reports {}", self.clean(&message_of(error))), true));
        }
        reply_of(&value, request).map(|reply| self.without_key(reply)).ok_or_else(|| {
            let start = self.clean(&value.to_string());
            Attempt::failed(format!("the answer is no chat completion: {start}"), true)
        })
    }

    fn refused(
        &self,
        status: u16,
        value: Option<&Value>,
        content: &[u8],
        asked: Option<Duration>,
        request: &ChatRequest,
    ) -> Attempt {
        let error = value.and_then(|value| value.get("error")).or(value);
        let message = match error {
            Some(error) => message_of(error),
            None => String::from_utf8_lossy(&content[..content.len().min(4 * SHOWN)]).into_owned(),
        };
        let folded = message.to_lowercase();
        let code = error.and_then(|error| error.get("code")).and_then(Value::as_str).unwrap_or_default();
        let message = self.clean(if message.trim().is_empty() { "no message" } else { &message });
        let url = self.url.clone();
        let refused = |hint: &str| {
            let hint = if hint.is_empty() { String::new() } else { format!("\n  hint: {hint}") };
            ApiError::Refused { url: url.clone(), status, message: message.clone(), hint }
        };
        match status {
            401 | 403 => Attempt::Final(CallError::Fatal(ApiError::Unauthorised {
                url: url.clone(),
                status,
                message: message.clone(),
            })),
            429 if code == "insufficient_quota" || folded.contains("insufficient_quota") => Attempt::Final(
                CallError::Fatal(refused("the account has no credit left: top it up and run the same command")),
            ),
            408 | 409 | 429 | 500.. => {
                Attempt::Failed { problem: format!("{status}: {message}"), costly: false, retry_after: asked }
            }
            300..400 => {
                Attempt::Final(CallError::Fatal(refused("the server has moved: give its address to --api-base")))
            }
            404 => Attempt::Final(CallError::Fatal(refused("check --api-base (it usually ends in /v1) and --model"))),
            400 | 422 if !self.new_token_limit.load(Ordering::Relaxed) && folded.contains("max_completion_tokens") => {
                self.new_token_limit.store(true, Ordering::Relaxed);
                Attempt::Adapted
            }
            400 | 422 if !self.no_temperature.load(Ordering::Relaxed) && folded.contains("'temperature'") => {
                self.no_temperature.store(true, Ordering::Relaxed);
                Attempt::Adapted
            }
            400 | 413 | 422 if is_context_problem(code, &folded) => {
                Attempt::Final(CallError::ContextTooLong(refused("the model's context is too short for this request")))
            }
            // Servers word this in many ways; one request without it tells.
            400 | 422 if request.response_format.is_some() => Attempt::Final(CallError::NoResponseFormat),
            _ => Attempt::Final(CallError::Fatal(refused(""))),
        }
    }

    /// What kept a request from being answered.
    fn said(&self, error: &ureq::Error) -> String {
        match error {
            ureq::Error::Timeout(ureq::Timeout::Connect) => "timeout: the server took no connection".into(),
            ureq::Error::Timeout(_) => format!("timeout: no answer within {} s", self.options.timeout.as_secs_f64()),
            error => self.clean(&error.to_string()),
        }
    }

    /// A server that repeats what it was sent may put the key into an answer, and answers are kept.
    fn without_key(&self, mut reply: Reply) -> Reply {
        if let Some(key) = &self.options.key {
            for text in [&mut reply.content, &mut reply.refusal, &mut reply.finish_reason, &mut reply.model] {
                if let Some(text) = text.as_mut().filter(|text| text.contains(&key.0)) {
                    *text = text.replace(&key.0, "[key]");
                }
            }
        }
        reply
    }

    /// A server's words, fit to be shown: one line, no controls, no key, not too long.
    fn clean(&self, text: &str) -> String {
        let mut text: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
        if let Some(key) = &self.options.key {
            text = text.replace(&key.0, "[key]");
        }
        let words = text.split_whitespace().collect::<Vec<_>>().join(" ");
        match words.char_indices().nth(SHOWN) {
            Some((end, _)) => format!("{}…", &words[..end]),
            None => words,
        }
    }
}

enum Attempt {
    Failed {
        problem: String,
        costly: bool,
        retry_after: Option<Duration>,
    },
    Final(CallError),
    /// The same request, written differently, may be taken.
    Adapted,
}

impl Attempt {
    fn failed(problem: String, costly: bool) -> Self {
        Self::Failed { problem, costly, retry_after: None }
    }
}

fn is_context_problem(code: &str, message: &str) -> bool {
    code == "context_length_exceeded"
        || ["context length", "context window", "context size", "maximum context", "prompt is too long"]
            .iter()
            .any(|words| message.contains(words))
}

fn message_of(error: &Value) -> String {
    let text = |value: &Value| value.as_str().map(str::to_owned);
    ["message", "detail", "error"]
        .iter()
        .find_map(|name| error.get(name))
        .and_then(text)
        .or_else(|| text(error))
        .unwrap_or_else(|| error.to_string())
}

/// `None` if the value has no `choices`.
fn reply_of(value: &Value, request: &ChatRequest) -> Option<Reply> {
    let choices = value.get("choices")?.as_array()?;
    let choice = choices.first();
    let message = choice.and_then(|choice| choice.get("message"));
    let text =
        |name: &str| message.and_then(|message| message.get(name)).and_then(text_of).filter(|text| !text.is_empty());
    let content = text("content").or_else(|| choice.and_then(|choice| choice.get("text")).and_then(text_of));
    let usage = |name: &str| value.get("usage").and_then(|usage| usage.get(name)).and_then(Value::as_u64);
    let estimated = usage("prompt_tokens").is_none() || usage("completion_tokens").is_none();
    let answer_bytes = content.as_ref().map_or(0, |content| content.len() as u64);
    Some(Reply {
        refusal: text("refusal"),
        finish_reason: choice.and_then(|choice| choice.get("finish_reason")).and_then(Value::as_str).map(str::to_owned),
        prompt_tokens: usage("prompt_tokens").unwrap_or_else(|| request.estimated_prompt_tokens()),
        completion_tokens: usage("completion_tokens").unwrap_or(answer_bytes / 3 + 1),
        estimated,
        model: value.get("model").and_then(Value::as_str).map(str::to_owned),
        content,
    })
}

/// Text as a string, or as a list of parts.
fn text_of(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Array(parts) => {
            Some(parts.iter().filter_map(|part| part.get("text").and_then(Value::as_str)).collect::<Vec<_>>().concat())
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_key_is_shown_nowhere() {
        let key = ApiKey::new("sk-very-secret\n").unwrap();
        let client = ChatClient::new(ClientOptions { key: Some(key), ..ClientOptions::default() }).unwrap();
        let shown = format!("{client:?} {:?}", client.options);
        assert!(shown.contains("ApiKey(…)") && !shown.contains("secret"), "{shown}");
        assert_eq!(client.clean("wrong key:\n sk-very-secret \u{1b}[31m"), "wrong key: [key] [31m");
        assert!(ApiKey::new("two words").is_err() && ApiKey::new(" ").is_err());
    }

    #[test]
    fn addresses() {
        let client = |base: &str| ChatClient::new(ClientOptions { api_base: base.into(), ..ClientOptions::default() });
        assert_eq!(client("http://localhost:1/v1/").unwrap().url(), "http://localhost:1/v1/chat/completions");
        assert_eq!(client("https://x.y/v1/chat/completions").unwrap().url(), "https://x.y/v1/chat/completions");
        for (wrong, reason) in [
            ("localhost:11434", "no address"),
            ("", "no address"),
            ("https://", "no address"),
            ("https://api.openai.com/v1", "no API key"),
            ("http://me:pw@host/v1", "password"),
        ] {
            let error = client(wrong).unwrap_err().to_string();
            assert!(error.contains(reason) && error.contains("hint"), "{wrong}: {error}");
        }
    }

    #[test]
    fn replies() {
        let request = ChatRequest {
            model: "m".into(),
            messages: vec![Message { role: "user", content: "x".repeat(30) }],
            temperature: 0.5,
            max_tokens: 10,
            response_format: None,
        };
        let reply = |value: Value| reply_of(&value, &request);
        assert_eq!(reply(json!({})), None);
        assert_eq!(reply(json!({"choices": []})).unwrap().content, None);
        let parts = json!({"choices": [{"message": {"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}}]});
        let parts = reply(parts).unwrap();
        assert_eq!((parts.content.as_deref(), parts.estimated, parts.prompt_tokens), (Some("ab"), true, 18));
        let full = json!({"model": "m-1", "usage": {"prompt_tokens": 3, "completion_tokens": 4},
            "choices": [{"finish_reason": "stop", "message": {"content": null, "refusal": "no"}}]});
        let full = reply(full).unwrap();
        assert_eq!((full.refusal.as_deref(), full.estimated, full.completion_tokens), (Some("no"), false, 4));
    }
}
