//! A small chat-completions server for the tests: one thread a connection, answers decided by a closure, every request
//! kept. It speaks just enough HTTP to be talked to, and can break every rule of it.

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use cashtag_corpus::RetryPolicy;
use cashtag_corpus::chat_api::{ApiKey, ChatClient, ClientOptions};
use serde_json::{Value, json};

pub(crate) enum Answer {
    /// Status, further headers, body.
    Full(u16, Vec<(String, String)>, Vec<u8>),
    /// A good status and length, and half of the body.
    Half(Vec<u8>),
    /// Nothing for so long, then the connection is closed.
    Silence(Duration),
    /// The connection is closed at once.
    HangUp,
}

pub(crate) struct Request {
    /// The number of the request, from 0.
    pub(crate) number: usize,
    pub(crate) head: String,
    pub(crate) body: Value,
}

impl Request {
    pub(crate) fn messages(&self) -> &[Value] {
        self.body["messages"].as_array().map(Vec::as_slice).unwrap_or_default()
    }

    pub(crate) fn user(&self) -> &str {
        self.messages().last().and_then(|message| message["content"].as_str()).unwrap_or_default()
    }

    /// The label that the request asks for; Neutral if it leaves it open.
    pub(crate) fn label(&self) -> &str {
        let asked = self.user().split("Label: ").nth(1).and_then(|rest| rest.split('.').next());
        asked.unwrap_or("Neutral")
    }

    /// This is the second call of the recipe.
    pub(crate) fn wants_system_message(&self) -> bool {
        self.body["max_tokens"] == 500
    }
}

pub(crate) struct Server {
    pub(crate) base: String,
    requests: Arc<Mutex<Vec<Value>>>,
    served: Arc<AtomicUsize>,
    stop: Arc<AtomicBool>,
    address: std::net::SocketAddr,
}

impl Server {
    pub(crate) fn start(handler: impl Fn(&Request) -> Answer + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let (requests, stop) = (Arc::new(Mutex::new(Vec::new())), Arc::new(AtomicBool::new(false)));
        let (handler, served) = (Arc::new(handler), Arc::new(AtomicUsize::new(0)));
        let (kept, stopped, done) = (requests.clone(), stop.clone(), served.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                if stopped.load(Ordering::Relaxed) {
                    return;
                }
                let (handler, kept, done) = (handler.clone(), kept.clone(), done.clone());
                std::thread::spawn(move || {
                    if let Ok(stream) = stream {
                        serve(stream, handler.as_ref(), &kept, &done);
                    }
                });
            }
        });
        Self { base: format!("http://{address}/v1"), requests, served, stop, address }
    }

    /// The bodies of all requests so far.
    pub(crate) fn requests(&self) -> Vec<Value> {
        self.requests.lock().unwrap().clone()
    }

    /// How many answers have been written out in full.
    pub(crate) fn served(&self) -> usize {
        self.served.load(Ordering::Relaxed)
    }

    pub(crate) fn options(&self) -> ClientOptions {
        ClientOptions {
            api_base: self.base.clone(),
            key: Some(ApiKey::new("sk-secret-of-the-test").unwrap()),
            timeout: Duration::from_secs(20),
            // The pauses of the recipe, a thousand times shorter.
            retry: RetryPolicy {
                shortest: Duration::from_millis(4),
                longest: Duration::from_millis(70),
                ..RetryPolicy::default()
            },
            ..ClientOptions::default()
        }
    }

    pub(crate) fn client(&self) -> ChatClient {
        ChatClient::new(self.options()).unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = TcpStream::connect(self.address);
    }
}

fn serve(mut stream: TcpStream, handler: &dyn Fn(&Request) -> Answer, kept: &Mutex<Vec<Value>>, done: &AtomicUsize) {
    let mut bytes = Vec::new();
    let mut buffer = [0u8; 4096];
    let (head, length) = loop {
        let Ok(read @ 1..) = stream.read(&mut buffer) else { return };
        bytes.extend_from_slice(&buffer[..read]);
        if let Some(end) = bytes.windows(4).position(|window| window == b"\r\n\r\n") {
            let head = String::from_utf8_lossy(&bytes[..end]).into_owned();
            let length = head
                .lines()
                .filter_map(|line| line.split_once(':'))
                .find(|(name, _)| name.eq_ignore_ascii_case("content-length"))
                .and_then(|(_, value)| value.trim().parse::<usize>().ok())
                .unwrap_or(0);
            bytes.drain(..end + 4);
            break (head, length);
        }
    };
    while bytes.len() < length {
        let Ok(read @ 1..) = stream.read(&mut buffer) else { return };
        bytes.extend_from_slice(&buffer[..read]);
    }
    let body: Value = serde_json::from_slice(&bytes).unwrap_or_default();
    let number = {
        let mut kept = kept.lock().unwrap();
        kept.push(body.clone());
        kept.len() - 1
    };
    let written = match handler(&Request { number, head, body }) {
        Answer::Full(status, headers, body) => {
            let headers: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
            let length = body.len();
            let head = format!("HTTP/1.1 {status} X\r\ncontent-length: {length}\r\nconnection: close\r\n{headers}\r\n");
            stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(&body))
        }
        Answer::Half(body) => {
            let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n", body.len());
            stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(&body[..body.len() / 2]))
        }
        Answer::Silence(time) => {
            std::thread::sleep(time);
            return;
        }
        Answer::HangUp => return,
    };
    if written.is_ok() {
        done.fetch_add(1, Ordering::Relaxed);
    }
}

pub(crate) fn status(status: u16, body: Value) -> Answer {
    Answer::Full(status, vec![("content-type".into(), "application/json".into())], body.to_string().into_bytes())
}

/// A good completion, with a usage of 100 and 20 tokens.
pub(crate) fn completion(content: &str) -> Value {
    json!({
        "id": "chatcmpl-1", "object": "chat.completion", "model": "test-model",
        "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120}
    })
}

pub(crate) fn say(content: &str) -> Answer {
    status(200, completion(content))
}

/// A tweet of random words for a number: the same for the same number, unlike any other.
pub(crate) fn tweet(number: u64) -> String {
    let mut rng = cashtag_corpus::Rng::new(number);
    let mut word = || -> String { (0..3 + rng.below(5)).map(|_| (b'a' + rng.below(26) as u8) as char).collect() };
    (0..12).map(|_| word()).collect::<Vec<_>>().join(" ")
}

/// A number for a request that depends on nothing but its content.
pub(crate) fn fingerprint(request: &Request) -> u64 {
    request
        .body
        .to_string()
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

/// A model that does what it is told.
pub(crate) fn good_answer(request: &Request) -> Answer {
    if request.wants_system_message() {
        return say("Given a tweet, answer Positive, Neutral or Negative.");
    }
    let text = tweet(fingerprint(request));
    if request.body["response_format"].is_null() {
        say(&format!("{text}\n---\n{}", request.label()))
    } else {
        say(&json!({"tweet": text, "label": request.label()}).to_string())
    }
}
