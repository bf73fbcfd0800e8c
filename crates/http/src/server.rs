//! The accept loop: how many connections, how long a head may take, TLS, and the end.
//!
//! HTTP/1.1 only: it is what clients of such services speak, and a proxy in front can speak the rest. At the end
//! ([`Shutdown`]) the listener is closed first, requests that have begun are answered, idle connections are closed, and after
//! [`Limits::drain`] what is left is cut off.

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::DefaultBodyLimit;
use axum::{Router, middleware};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::timeout;

use crate::bind::Listen;
use crate::error::{Error, Result};
use crate::guard::{Guard, Shared, note_route};
use crate::io::WriteLimit;
use crate::log::Log;
use crate::metrics::{Number, Registry};
use crate::tls::{Tls, TlsFiles};

/// What a client may take of the machine.
#[derive(Clone, Debug, PartialEq)]
pub struct Limits {
    /// Connections at a time; more are told to come later.
    pub connections: usize,
    /// Bytes of a request's line and headers.
    pub head_bytes: usize,
    /// Number of headers.
    pub headers: usize,
    /// Bytes of a body.
    pub body_bytes: usize,
    /// Bytes of the bodies of all requests that are being answered.
    pub bodies_bytes: usize,
    /// For a head to arrive, from the first moment of waiting: also how long an idle connection is kept.
    pub head: Duration,
    /// For a body to arrive.
    pub body: Duration,
    /// For a peer to take the next bytes of its answer.
    pub write: Duration,
    /// For requests to end once the service is asked to.
    pub drain: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 1024,
            head_bytes: 32 << 10,
            headers: 64,
            body_bytes: 2_000_000,
            bodies_bytes: 128 << 20,
            head: Duration::from_secs(30),
            body: Duration::from_secs(30),
            write: Duration::from_secs(30),
            drain: Duration::from_secs(30),
        }
    }
}

/// Everything that a server is made from.
pub struct Config {
    pub listen: Listen,
    pub tls: Option<TlsFiles>,
    pub guard: Guard,
    pub limits: Limits,
    pub log: Log,
    pub metrics: Registry,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            listen: Listen::default(),
            tls: None,
            guard: Guard::default(),
            limits: Limits::default(),
            log: Log::off(),
            metrics: Registry::default(),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Phase {
    Running,
    Draining,
    Aborted,
}

/// Tells the parts of a service that it ends. Clones are the same.
#[derive(Clone)]
pub struct Shutdown(Arc<watch::Sender<Phase>>);

impl Default for Shutdown {
    fn default() -> Self {
        Self(Arc::new(watch::Sender::new(Phase::Running)))
    }
}

impl Shutdown {
    /// Asks the service to end.
    pub fn begin(&self) {
        self.raise(Phase::Draining);
    }

    pub fn is_draining(&self) -> bool {
        *self.0.borrow() >= Phase::Draining
    }

    /// Waits until the service is asked to end; endless streams stop then.
    pub async fn draining(&self) {
        self.reached(Phase::Draining).await;
    }

    fn raise(&self, phase: Phase) {
        self.0.send_if_modified(|now| {
            let is_later = phase > *now;
            *now = phase.max(*now);
            is_later
        });
    }

    async fn reached(&self, phase: Phase) {
        // The sender lives as long as `self`.
        let _ = self.0.subscribe().wait_for(|now| *now >= phase).await;
    }
}

/// Waits for SIGINT or SIGTERM.
pub async fn signals() {
    let interrupt = async {
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending::<()>().await;
        }
    };
    #[cfg(unix)]
    let terminate = async {
        match tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()) {
            Ok(mut signal) => drop(signal.recv().await),
            Err(_) => std::future::pending().await,
        }
    };
    #[cfg(not(unix))]
    let terminate = std::future::pending::<()>();
    tokio::select! {
        () = interrupt => {}
        () = terminate => {}
    }
}

/// A service that listens, but does not answer yet.
pub struct Server {
    listener: TcpListener,
    address: SocketAddr,
    shared: Arc<Shared>,
    tls: Option<Arc<Tls>>,
    shutdown: Shutdown,
    open: Arc<Number>,
    warnings: Vec<String>,
}

impl Server {
    /// # Errors
    /// An address that is taken or must not be listened on without a key; TLS files that cannot be used.
    pub async fn bind(config: Config) -> Result<Self> {
        let Config { listen, tls, guard, limits, log, metrics } = config;
        let tls = tls.map(Tls::open).transpose()?.map(Arc::new);
        let has_keys = !guard.keys.is_empty();
        let listener = listen.bind(has_keys).await?;
        let failed = |source| Error::Bind { address: listen.host.clone(), source };
        let address = listener.local_addr().map_err(failed)?;
        let is_local = address.ip().is_loopback();
        let mut warnings = Vec::new();
        if !is_local && !has_keys {
            warnings.push(format!("everyone who reaches {address} can use this service: there is no key"));
        }
        if !is_local && has_keys && tls.is_none() {
            warnings
                .push("keys and texts travel unencrypted: use --tls-cert and --tls-key, or a proxy that does".into());
        }
        let open = metrics.gauges("cashtag_http_connections", "Connections that are open.", &[]).one();
        let local_only = is_local && !has_keys;
        let shared = Arc::new(Shared::new(guard, limits, log, &metrics, local_only, tls.is_some()));
        Ok(Self { listener, address, shared, tls, shutdown: Shutdown::default(), open, warnings })
    }

    pub fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// `http://127.0.0.1:8000`
    pub fn url(&self) -> String {
        format!("{}://{}", if self.tls.is_some() { "https" } else { "http" }, self.address)
    }

    /// What the user should know about how it listens.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    pub fn shutdown(&self) -> Shutdown {
        self.shutdown.clone()
    }

    /// Answers requests until `stop` (or [`Shutdown::begin`]), and then those that have begun. Says whether all of them were
    /// answered in time.
    pub async fn run(self, router: Router, stop: impl Future<Output = ()>) -> bool {
        let Self { listener, shared, tls, shutdown, open, .. } = self;
        // The guard has bounded the body already.
        let router = router.layer(middleware::from_fn(note_route)).layer(DefaultBodyLimit::disable());
        let limits = shared.limits.clone();
        let places = Arc::new(Semaphore::new(limits.connections));
        tokio::pin!(stop);
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = &mut stop => break,
                () = shutdown.draining() => break,
            };
            let stream = match accepted {
                Ok((stream, _)) => stream,
                Err(e) => {
                    // Out of descriptors, mostly: closing connections mends it.
                    shared.log.warn("cannot accept", &[("error", e.to_string().into())]);
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
            };
            let Ok(place) = places.clone().try_acquire_owned() else {
                tokio::spawn(turn_away(stream, tls.is_some()));
                continue;
            };
            let connection = Connection {
                shared: shared.clone(),
                router: router.clone(),
                shutdown: shutdown.clone(),
                open: OpenCount::new(&open),
                _place: place,
            };
            tokio::spawn(connection.serve(stream, tls.clone()));
        }
        drop(listener);
        shutdown.raise(Phase::Draining);
        let all = limits.connections.min(u32::MAX as usize) as u32;
        let is_done = timeout(limits.drain, places.acquire_many(all)).await.is_ok();
        if !is_done {
            shutdown.raise(Phase::Aborted);
            // Connections are dropped at their next step.
            let _ = timeout(Duration::from_secs(1), places.acquire_many(all)).await;
        }
        is_done
    }
}

/// Counts a connection while it lives.
struct OpenCount(Arc<Number>);

impl OpenCount {
    fn new(number: &Arc<Number>) -> Self {
        number.inc();
        Self(number.clone())
    }
}

impl Drop for OpenCount {
    fn drop(&mut self) {
        self.0.add(u64::MAX); // wraps: minus one
    }
}

struct Connection {
    shared: Arc<Shared>,
    router: Router,
    shutdown: Shutdown,
    #[expect(dead_code, reason = "counts while it lives")]
    open: OpenCount,
    _place: OwnedSemaphorePermit,
}

impl Connection {
    async fn serve(self, stream: TcpStream, tls: Option<Arc<Tls>>) {
        let _ = stream.set_nodelay(true);
        let limits = &self.shared.limits;
        let stream = WriteLimit::new(stream, limits.write);
        let Some(tls) = tls else { return self.http(stream).await };
        let (acceptor, failed) = tls.acceptor();
        if let Some(error) = failed {
            self.shared.log.error("the changed certificate is not used", &[("error", error.to_string().into())]);
        }
        let handshake = tokio::select! {
            handshake = timeout(limits.head, acceptor.accept(stream)) => handshake,
            () = self.shutdown.draining() => return,
        };
        if let Ok(Ok(stream)) = handshake {
            self.http(stream).await;
        }
    }

    async fn http(self, stream: impl AsyncRead + AsyncWrite + Unpin) {
        let limits = &self.shared.limits;
        let answer = service_fn(|request: hyper::Request<Incoming>| {
            let answer = self.shared.clone().answer(self.router.clone(), request);
            async move { Ok::<_, std::convert::Infallible>(answer.await) }
        });
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(limits.head)
            .max_buf_size(limits.head_bytes.max(8192))
            .max_headers(limits.headers)
            .serve_connection(TokioIo::new(stream), answer);
        tokio::pin!(connection);
        // Errors are the peer's: a reset, a head that is none or comes too late.
        tokio::select! {
            _ = connection.as_mut() => return,
            () = self.shutdown.draining() => connection.as_mut().graceful_shutdown(),
        }
        tokio::select! {
            _ = connection => {}
            () = self.shutdown.reached(Phase::Aborted) => {}
        }
    }
}

/// Says that there is no place, where that can be said without a handshake.
async fn turn_away(mut stream: TcpStream, tls: bool) {
    if !tls {
        const BODY: &str = r#"{"error":{"message":"too many connections","type":"service_unavailable_error","param":null,"code":"overloaded"}}"#;
        let answer = format!(
            "HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\ncontent-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{BODY}",
            BODY.len()
        );
        let say = async {
            stream.write_all(answer.as_bytes()).await?;
            stream.shutdown().await
        };
        let _ = timeout(Duration::from_secs(1), say).await;
    }
}
