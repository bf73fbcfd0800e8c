//! The foundation over real sockets: what a client sees, and what a hostile one does not get.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Bytes;
use axum::routing::{get, post};
use cashtag_http::log::{Format, Level};
use cashtag_http::{Config, Guard, Identity, Keys, Limits, Listen, Log, Role, Server, Shutdown, TlsFiles};

const KEY: &str = "ctk_0123456789abcdef";

struct Running {
    address: SocketAddr,
    shutdown: Shutdown,
    runtime: Option<tokio::runtime::Runtime>,
    done: tokio::task::JoinHandle<bool>,
    log: Arc<Mutex<String>>,
}

fn routes() -> Router {
    Router::new()
        .route("/health", get(|| async { "ok" }))
        .route("/echo", post(|body: Bytes| async move { body }))
        .route(
            "/who",
            get(
                |axum::Extension(who): axum::Extension<Identity>| async move { format!("{} {:?}", who.name, who.role) },
            ),
        )
        .route(
            "/bug",
            get(|| async {
                if true {
                    panic!("on purpose")
                }
            }),
        )
        .route(
            "/slow",
            get(|| async {
                tokio::time::sleep(Duration::from_millis(400)).await;
                "slow"
            }),
        )
        .route("/large", get(|| async { "x".repeat(64 << 20) }))
}

fn start(change: impl FnOnce(&mut Config)) -> Running {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let log = Arc::new(Mutex::new(String::new()));
    let into = log.clone();
    let mut config = Config {
        listen: Listen { port: 0, ..Listen::default() },
        log: Log::to(Some(Level::Info), Format::Json, move |line| into.lock().unwrap().push_str(line)),
        limits: Limits { body_bytes: 10_000, ..Limits::default() },
        ..Config::default()
    };
    change(&mut config);
    let server = runtime.block_on(Server::bind(config)).unwrap();
    let (address, shutdown) = (server.local_addr(), server.shutdown());
    let done = runtime.spawn(server.run(routes(), std::future::pending()));
    Running { address, shutdown, runtime: Some(runtime), done, log }
}

impl Running {
    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        stream
    }

    /// Sends bytes and reads until the server closes.
    fn raw(&self, request: &[u8]) -> String {
        let mut stream = self.connect();
        let _ = stream.write_all(request);
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        String::from_utf8_lossy(&answer).into_owned()
    }

    fn request(&self, method: &str, path: &str, headers: &str, body: &str) -> String {
        let length = body.len();
        self.raw(
            format!("{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: {length}\r\n{headers}\r\n{body}")
                .as_bytes(),
        )
    }

    fn get(&self, path: &str, headers: &str) -> String {
        self.request("GET", path, headers, "")
    }

    fn logged(&self) -> String {
        std::thread::sleep(Duration::from_millis(50));
        self.log.lock().unwrap().clone()
    }

    fn stop(mut self) -> bool {
        self.shutdown.begin();
        self.runtime.take().unwrap().block_on(self.done).unwrap()
    }
}

fn status(answer: &str) -> u16 {
    answer.get(9..12).and_then(|s| s.parse().ok()).unwrap_or(0)
}

fn with_keys(config: &mut Config) {
    let mut keys = Keys::default();
    keys.add("test", "ci", Role::User, KEY).unwrap();
    keys.add("test", "boss", Role::Admin, "ctk_fedcba9876543210").unwrap();
    config.guard = Guard { keys, ..Guard::default() };
}

#[test]
fn every_answer_has_an_id_and_security_headers() {
    let server = start(|_| {});
    let answer = server.get("/health", "x-request-id: abc-1\r\n");
    assert_eq!(status(&answer), 200);
    for header in [
        "x-request-id: abc-1",
        "x-content-type-options: nosniff",
        "x-frame-options: DENY",
        "referrer-policy: no-referrer",
        "content-security-policy: default-src 'none'; frame-ancestors 'none'",
        "cache-control: no-store",
    ] {
        assert!(answer.contains(&format!("{header}\r\n")), "{header}\n{answer}");
    }
    assert!(!answer.contains("access-control") && !answer.contains("strict-transport"));
    // An id that could forge a log line is replaced.
    let answer = server.get("/health?secret=hunter2", "x-request-id: a b\"\r\nauthorization: Bearer hunter2\r\n");
    let id = answer.split("x-request-id: ").nth(1).unwrap().split("\r\n").next().unwrap();
    assert!(id.len() == 24 && id.bytes().all(|b| b.is_ascii_hexdigit()), "{id}");
    let log = server.logged();
    assert!(log.contains(&format!("\"id\":\"{id}\",\"method\":\"GET\",\"path\":\"/health\",\"status\":200")), "{log}");
    assert!(!log.contains("hunter2"));
    assert!(server.get("/none", "").contains(r#""code":"not_found""#));
    assert_eq!(status(&server.request("POST", "/health", "", "")), 405);
}

#[test]
fn keys() {
    let server = start(with_keys);
    assert_eq!(status(&server.get("/health", "")), 200);
    let refused = server.get("/who", "");
    assert_eq!(status(&refused), 401);
    assert!(refused.contains("www-authenticate: Bearer") && refused.contains("invalid_api_key"), "{refused}");
    assert_eq!(status(&server.get("/who", "authorization: Bearer ctk_wrong0123456789\r\n")), 401);
    assert!(server.get("/who", &format!("authorization: Bearer {KEY}\r\n")).ends_with("ci User"));
    assert!(server.get("/who", &format!("x-api-key: {KEY}\r\n")).ends_with("ci User"));
    // As a browser sends what its user typed: any name, the key as password.
    assert!(server.get("/who", "accept: text/html\r\n").contains("www-authenticate: Basic"));
    assert!(server.get("/who", "authorization: Basic eDpjdGtfZmVkY2JhOTg3NjU0MzIxMA==\r\n").ends_with("boss Admin"));
    let log = server.logged();
    assert!(log.contains("\"key\":\"ci\"") && !log.contains(KEY), "{log}");
}

#[test]
fn pages_of_other_origins_are_kept_out() {
    let server = start(|_| {});
    let send = |headers: &str| status(&server.request("POST", "/echo", headers, "x"));
    assert_eq!(send(""), 200);
    assert_eq!(send("origin: http://localhost\r\n"), 200);
    assert_eq!(send("origin: http://evil.example\r\n"), 403);
    assert_eq!(send("origin: null\r\n"), 403);
    assert_eq!(send("sec-fetch-site: cross-site\r\n"), 403);
    // A name of the attacker's that leads to this machine.
    let rebound = b"GET /health HTTP/1.1\r\nhost: evil.example\r\nconnection: close\r\n\r\n";
    assert_eq!(status(&server.raw(rebound)), 421);

    let server = start(|c| c.guard.cors_origins = vec!["https://app.example".into()]);
    let preflight = "origin: https://app.example\r\naccess-control-request-method: POST\r\n";
    let answer = server.request("OPTIONS", "/echo", preflight, "");
    assert_eq!(status(&answer), 204);
    assert!(answer.contains("access-control-allow-origin: https://app.example"), "{answer}");
    let answer = server.request("POST", "/echo", "origin: https://app.example\r\n", "x");
    assert!(status(&answer) == 200 && answer.contains("access-control-allow-origin: https://app.example"));
    assert_eq!(status(&server.request("POST", "/echo", "origin: https://other.example\r\n", "x")), 403);
}

#[test]
fn sizes_are_bounded() {
    let server = start(|c| c.limits.bodies_bytes = 12_000);
    assert_eq!(status(&server.request("POST", "/echo", "", &"x".repeat(10_000))), 200);
    assert_eq!(status(&server.request("POST", "/echo", "", &"x".repeat(10_001))), 413);
    // Without a length, piece by piece.
    let piece = format!("1000\r\n{}\r\n", "x".repeat(4096));
    let head = "POST /echo HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n";
    assert_eq!(status(&server.raw(format!("{head}{}", piece.repeat(3)).as_bytes())), 413);
    // A length that nobody sends.
    let huge = b"POST /echo HTTP/1.1\r\nhost: localhost\r\ncontent-length: 18446744073709551615\r\n\r\n";
    assert!([400, 413, 431].contains(&status(&server.raw(huge))));
    let large = b"POST /echo HTTP/1.1\r\nhost: localhost\r\ncontent-length: 99999999999999\r\n\r\n";
    assert_eq!(status(&server.raw(large)), 413);
    // Bodies of all requests together: two that have sent most of theirs leave no room.
    let hold: Vec<_> = (0..1)
        .map(|_| {
            let mut stream = server.connect();
            let head = "POST /echo HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9000\r\n\r\n";
            stream.write_all(format!("{head}{}", "x".repeat(8000)).as_bytes()).unwrap();
            stream
        })
        .collect();
    std::thread::sleep(Duration::from_millis(100));
    let answer = server.request("POST", "/echo", "", &"x".repeat(8000));
    assert!(status(&answer) == 429 && answer.contains("retry-after: 1"), "{answer}");
    drop(hold);
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(status(&server.request("POST", "/echo", "", &"x".repeat(8000))), 200);
    // Heads.
    let many: String = (0..100).map(|i| format!("x-{i}: 1\r\n")).collect();
    assert_eq!(status(&server.get("/health", &many)), 431);
    assert_eq!(status(&server.get("/health", &format!("x: {}\r\n", "y".repeat(100_000)))), 431);
    assert!(matches!(status(&server.get(&format!("/{}", "y".repeat(100_000)), "")), 414 | 431));
    for garbage in [
        &b"\0\xff\xfe\r\n\r\n"[..],
        b"GET\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ] {
        let answer = server.raw(&[garbage, b"\r\n\r\n"].concat());
        assert!(matches!(status(&answer), 0 | 400..=499), "{answer}");
    }
    assert_eq!(status(&server.get("/health", "")), 200);
}

#[test]
fn time_is_bounded() {
    let server = start(|c| {
        c.limits.head = Duration::from_millis(300);
        c.limits.body = Duration::from_millis(300);
        c.limits.write = Duration::from_millis(300);
    });
    // A byte at a time.
    let mut slow = server.connect();
    let started = Instant::now();
    for byte in "GET /health HTTP/1.1\r\nhost: localhost\r\nx: ".bytes() {
        if slow.write_all(&[byte]).is_err() || started.elapsed() > Duration::from_secs(5) {
            break;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    let _ = slow.read_to_end(&mut Vec::new());
    assert!(started.elapsed() < Duration::from_secs(3), "{:?}", started.elapsed());
    // A body that never comes.
    let started = Instant::now();
    let answer = server.raw(b"POST /echo HTTP/1.1\r\nhost: localhost\r\ncontent-length: 5\r\n\r\nab");
    assert!(status(&answer) == 408 && started.elapsed() < Duration::from_secs(3), "{answer}");
    // An idle connection.
    let mut idle = server.connect();
    idle.write_all(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n").unwrap();
    let started = Instant::now();
    idle.read_to_end(&mut Vec::new()).unwrap();
    assert!(started.elapsed() < Duration::from_secs(3));
    // A peer that asks for 64 MB and does not read.
    let mut deaf = server.connect();
    deaf.write_all(b"GET /large HTTP/1.1\r\nhost: localhost\r\n\r\n").unwrap();
    std::thread::sleep(Duration::from_millis(900));
    let mut got = Vec::new();
    let _ = deaf.read_to_end(&mut got);
    assert!(got.len() < 60 << 20, "{} bytes", got.len());
}

#[test]
fn places_are_bounded_and_given_back() {
    let server = start(|c| c.limits.connections = 2);
    let held = [server.connect(), server.connect()];
    std::thread::sleep(Duration::from_millis(100));
    let answer = server.get("/health", "");
    assert!(status(&answer) == 503 && answer.contains("retry-after: 1"), "{answer}");
    // Half closed: a client that says it will send no more is gone.
    held[0].shutdown(std::net::Shutdown::Write).unwrap();
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(status(&server.get("/health", "")), 200);
}

#[test]
fn a_panic_is_an_answer() {
    let server = start(|_| {});
    let answer = server.get("/bug", "");
    assert!(status(&answer) == 500 && answer.contains("internal_error") && !answer.contains("on purpose"), "{answer}");
    assert_eq!(status(&server.get("/health", "")), 200);
}

#[test]
fn what_has_begun_is_answered_at_the_end() {
    let server = start(|_| {});
    let mut waiting = server.connect();
    waiting.write_all(b"GET /slow HTTP/1.1\r\nhost: localhost\r\n\r\n").unwrap();
    let _idle = server.connect();
    std::thread::sleep(Duration::from_millis(100));
    let address = server.address;
    let started = Instant::now();
    assert!(server.stop());
    assert!(started.elapsed() < Duration::from_secs(3));
    let mut answer = String::new();
    waiting.read_to_string(&mut answer).unwrap();
    assert!(status(&answer) == 200 && answer.ends_with("slow"), "{answer}");
    assert!(TcpStream::connect(address).is_err());
    // What takes longer than the time that is given is cut off.
    let server = start(|c| c.limits.drain = Duration::from_millis(50));
    let mut waiting = server.connect();
    waiting.write_all(b"GET /slow HTTP/1.1\r\nhost: localhost\r\n\r\n").unwrap();
    std::thread::sleep(Duration::from_millis(100));
    assert!(!server.stop());
}

#[test]
fn tls() {
    let dir = tempfile::tempdir().unwrap();
    let made = rcgen::generate_simple_self_signed(["localhost".to_string()]).unwrap();
    let files = TlsFiles { certificate: dir.path().join("cert.pem"), key: dir.path().join("key.pem") };
    std::fs::write(&files.certificate, made.cert.pem()).unwrap();
    std::fs::write(&files.key, "no key").unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let config = |files: &TlsFiles| Config {
        listen: Listen { port: 0, ..Listen::default() },
        tls: Some(files.clone()),
        ..Config::default()
    };
    let error = runtime.block_on(Server::bind(config(&files))).err().unwrap().to_string();
    assert!(error.contains("key.pem: no private key"), "{error}");
    std::fs::write(&files.key, made.signing_key.serialize_pem()).unwrap();

    let server = start(|c| c.tls = Some(files));
    use tokio_rustls::rustls;
    let mut roots = rustls::RootCertStore::empty();
    roots.add(made.cert.der().clone()).unwrap();
    let client = rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let mut session = rustls::ClientConnection::new(Arc::new(client), "localhost".try_into().unwrap()).unwrap();
    let mut socket = server.connect();
    let mut stream = rustls::Stream::new(&mut session, &mut socket);
    stream.write_all(b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n").unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    let answer = String::from_utf8(answer).unwrap();
    assert!(status(&answer) == 200 && answer.contains("strict-transport-security: max-age=31536000"), "{answer}");
    // Plain HTTP to a TLS port is no reason to stop.
    assert_eq!(status(&server.get("/health", "")), 0);
}
