//! A hub on localhost that speaks real HTTP and misbehaves on demand: the tests' stand-in for the Hugging Face hub.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use sha2::{Digest, Sha256};

pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

#[derive(Clone, Debug)]
pub struct Request {
    pub method: String,
    /// With the query.
    pub path: String,
    /// Names in lower case.
    pub headers: HashMap<String, String>,
}

impl Request {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }
}

#[derive(Clone, Debug, Default)]
pub struct Answer {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
    /// Close the connection after so many bytes of the body, whatever was announced.
    pub cut: Option<usize>,
    /// Send the body in pieces of so many bytes, with a pause before each.
    pub slow: Option<(usize, Duration)>,
    /// After so many bytes say nothing more for a while, then close.
    pub stall: Option<(usize, Duration)>,
}

impl Answer {
    pub fn status(status: u16) -> Self {
        Self { status, ..Self::default() }
    }

    pub fn ok(body: impl Into<Vec<u8>>) -> Self {
        Self { status: 200, body: body.into(), ..Self::default() }
    }

    pub fn header(mut self, name: &str, value: impl Into<String>) -> Self {
        self.headers.push((name.into(), value.into()));
        self
    }

    pub fn redirect(to: impl Into<String>) -> Self {
        Self::status(302).header("Location", to)
    }
}

/// What a server answers to a request; the number says how many requests for this path came before.
type Handler = dyn Fn(&Request, usize) -> Answer + Send + Sync;

pub struct Server {
    pub url: String,
    requests: Arc<Mutex<Vec<Request>>>,
}

impl Server {
    pub fn start(handler: impl Fn(&Request, usize) -> Answer + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://127.0.0.1:{}", listener.local_addr().unwrap().port());
        let requests = Arc::new(Mutex::new(Vec::new()));
        let (seen, handler): (_, Arc<Handler>) = (requests.clone(), Arc::new(handler));
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (seen, handler) = (seen.clone(), handler.clone());
                std::thread::spawn(move || serve(stream, &seen, &*handler));
            }
        });
        Self { url, requests }
    }

    pub fn requests(&self) -> Vec<Request> {
        self.requests.lock().unwrap().clone()
    }

    /// Requests whose path contains this.
    pub fn requests_for(&self, part: &str) -> Vec<Request> {
        self.requests().into_iter().filter(|r| r.path.contains(part)).collect()
    }
}

fn serve(mut stream: TcpStream, seen: &Mutex<Vec<Request>>, handler: &Handler) -> Option<()> {
    let mut lines = BufReader::new(stream.try_clone().ok()?).lines();
    let first = lines.next()?.ok()?;
    let mut words = first.split(' ');
    let (method, path) = (words.next()?.to_string(), words.next()?.to_string());
    let mut headers = HashMap::new();
    for line in lines {
        let line = line.ok()?;
        let Some((name, value)) = line.split_once(':') else { break };
        headers.insert(name.to_ascii_lowercase(), value.trim().to_string());
    }
    let request = Request { method, path, headers };
    let before = {
        let mut seen = seen.lock().ok()?;
        seen.push(request.clone());
        seen.iter().filter(|r| r.path == request.path && r.method == request.method).count() - 1
    };
    let answer = handler(&request, before);
    let mut head = format!("HTTP/1.1 {} Said\r\nConnection: close\r\n", answer.status);
    for (name, value) in &answer.headers {
        head += &format!("{name}: {value}\r\n");
    }
    if !answer.headers.iter().any(|(n, _)| n.eq_ignore_ascii_case("content-length")) {
        head += &format!("Content-Length: {}\r\n", answer.body.len());
    }
    stream.write_all((head + "\r\n").as_bytes()).ok()?;
    if request.method == "HEAD" {
        return Some(());
    }
    let end = answer.cut.or(answer.stall.map(|(n, _)| n)).unwrap_or(usize::MAX).min(answer.body.len());
    let (piece, pause) = answer.slow.unwrap_or((1 << 16, Duration::ZERO));
    for chunk in answer.body[..end].chunks(piece.max(1)) {
        std::thread::sleep(pause);
        stream.write_all(chunk).ok()?;
    }
    if let Some((_, silence)) = answer.stall {
        std::thread::sleep(silence);
    }
    Some(())
}

/// A repository with some files; what is not about a test's point behaves as the real hub does.
#[derive(Clone)]
pub struct Repository {
    pub id: String,
    pub files: Vec<(String, Vec<u8>)>,
}

impl Repository {
    /// The smallest thing that is a checkpoint: one large file and three small ones, and files that nobody needs.
    pub fn tiny() -> Self {
        let files = [
            (".gitattributes", b"*.safetensors filter=lfs".to_vec()),
            ("README.md", b"# Tiny".to_vec()),
            ("config.json", b"{\"model_type\": \"llama\"}".to_vec()),
            ("model.safetensors", weights()),
            ("pytorch_model.bin", b"a pickle".to_vec()),
            ("tokenizer.json", b"{\"version\": \"1.0\"}".to_vec()),
            ("tokenizer_config.json", b"{}".to_vec()),
        ];
        Self { id: "test/tiny".into(), files: files.map(|(n, b)| (n.to_string(), b)).to_vec() }
    }

    pub fn listing(&self) -> Answer {
        let siblings: Vec<String> = self.files.iter().map(|(name, bytes)| self.listed(name, bytes)).collect();
        Answer::ok(format!(
            "{{\"id\": \"{}\", \"sha\": \"{COMMIT}\", \"siblings\": [{}]}}",
            self.id,
            siblings.join(", ")
        ))
        .header("Content-Type", "application/json")
    }

    fn listed(&self, name: &str, bytes: &[u8]) -> String {
        let size = bytes.len();
        let lfs = match is_large(name) {
            true => format!(", \"lfs\": {{\"sha256\": \"{}\", \"size\": {size}, \"pointerSize\": 134}}", sha256(bytes)),
            false => String::new(),
        };
        format!("{{\"rfilename\": {name:?}, \"size\": {size}, \"blobId\": \"{}\"{lfs}}}", blob_id(bytes))
    }

    /// What a well-behaved hub answers.
    pub fn answer(&self, request: &Request) -> Answer {
        let path = request.path.trim_start_matches("/api/models/").trim_start_matches("/api/datasets/");
        if path != request.path {
            let known = path.starts_with(&format!("{}/revision/", self.id));
            return if known { self.listing() } else { Answer::status(404).header("X-Error-Code", "RepoNotFound") };
        }
        let resolve = format!("{}/resolve/{COMMIT}/", self.id);
        let file = path.split_once(&resolve).and_then(|(_, name)| self.files.iter().find(|(n, _)| n == name));
        let Some((name, bytes)) = file else {
            return Answer::status(404).header("X-Error-Code", "EntryNotFound");
        };
        let etag = if is_large(name) { sha256(bytes) } else { blob_id(bytes) };
        part(request, bytes).header("ETag", format!("\"{etag}\"")).header("X-Repo-Commit", COMMIT)
    }
}

/// The bytes that a request asks for.
pub fn part(request: &Request, bytes: &[u8]) -> Answer {
    let from = request.header("range").and_then(|r| r.strip_prefix("bytes=")?.split('-').next()?.parse().ok());
    match from {
        None => Answer::ok(bytes),
        Some(from) if from < bytes.len() => Answer { status: 206, body: bytes[from..].to_vec(), ..Answer::default() }
            .header("Content-Range", format!("bytes {from}-{}/{}", bytes.len() - 1, bytes.len())),
        Some(_) => Answer::status(416).header("Content-Range", format!("bytes */{}", bytes.len())),
    }
}

/// 300 kB that do not repeat.
pub fn weights() -> Vec<u8> {
    let mut state = 1u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    };
    (0..300_000).map(|_| next()).collect()
}

fn is_large(name: &str) -> bool {
    [".safetensors", ".parquet", ".bin"].iter().any(|ending| name.ends_with(ending))
}

pub fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

/// Stands for the hash that git has for a small file: 40 digits that depend on the content.
pub fn blob_id(bytes: &[u8]) -> String {
    sha256(bytes)[..40].to_string()
}
