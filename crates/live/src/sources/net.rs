//! A small HTTP client: one connection a request, with a limit on every wait and every size.
//!
//! A stream that stays open for days needs a limit on the time between two pieces, which general clients do not offer; with
//! that, what is left of HTTP here is little.

use std::future::Future;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::header::{HOST, USER_AGENT};
use hyper::{HeaderMap, Method, Request, StatusCode, Uri};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

pub const AGENT: &str = concat!("cashtag/", env!("CARGO_PKG_VERSION"));
const CONNECT: Duration = Duration::from_secs(10);
const ANSWER: Duration = Duration::from_secs(30);
/// The longest answer that is read as a whole.
const MAX_ANSWER: usize = 8 << 20;

#[derive(Debug, thiserror::Error)]
pub enum NetError {
    #[error("{0} is no address\n  hint: expected https://host/path")]
    Address(String),
    #[error("no connection to {host}: {why}")]
    Connect { host: String, why: String },
    #[error("{host} said nothing for {} s", after.as_secs())]
    Silence { host: String, after: Duration },
    #[error("the connection to {host} ended: {why}")]
    Ended { host: String, why: String },
    #[error("{host} sent more than {MAX_ANSWER} bytes")]
    TooLong { host: String },
}

/// A byte stream, encrypted or not.
pub trait Io: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

/// Connects to the host of an address, with TLS for `https` and `wss`.
///
/// # Errors
/// No such address, no connection, or a certificate that is not believed.
pub async fn connect(uri: &Uri) -> Result<Box<dyn Io>, NetError> {
    let host = uri.host().ok_or_else(|| NetError::Address(uri.to_string()))?.trim_matches(['[', ']']).to_owned();
    let encrypted = match uri.scheme_str() {
        Some("https" | "wss") => true,
        Some("http" | "ws") => false,
        _ => return Err(NetError::Address(uri.to_string())),
    };
    let port = uri.port_u16().unwrap_or(if encrypted { 443 } else { 80 });
    let failed = |why: String| NetError::Connect { host: host.clone(), why };
    let tcp = within(CONNECT, &host, TcpStream::connect((host.as_str(), port))).await?;
    let tcp = tcp.map_err(|e| failed(e.to_string()))?;
    // Requests are small and wait for answers.
    tcp.set_nodelay(true).map_err(|e| failed(e.to_string()))?;
    if !encrypted {
        return Ok(Box::new(tcp));
    }
    let name = ServerName::try_from(host.clone()).map_err(|e| failed(e.to_string()))?;
    let tls = within(CONNECT, &host, tls().connect(name, tcp)).await?.map_err(|e| failed(e.to_string()))?;
    Ok(Box::new(tls))
}

async fn within<T>(limit: Duration, host: &str, work: impl Future<Output = T>) -> Result<T, NetError> {
    let waited = tokio::time::timeout(limit, work).await;
    waited.map_err(|_| NetError::Silence { host: host.to_owned(), after: limit })
}

/// Believes the certificate authorities of the system; those built in only where it has none.
fn tls() -> TlsConnector {
    static CONFIG: OnceLock<Arc<ClientConfig>> = OnceLock::new();
    let config = CONFIG.get_or_init(|| {
        let provider = Arc::new(tokio_rustls::rustls::crypto::ring::default_provider());
        let builder = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("ring offers TLS 1.2 and 1.3");
        Arc::new(builder.with_root_certificates(system_roots()).with_no_client_auth())
    });
    TlsConnector::from(config.clone())
}

pub(crate) fn system_roots() -> RootCertStore {
    const BUNDLES: [&str; 4] = [
        "/etc/ssl/certs/ca-certificates.crt",
        "/etc/pki/tls/certs/ca-bundle.crt",
        "/etc/ssl/ca-bundle.pem",
        "/etc/ssl/cert.pem",
    ];
    let named = std::env::var("SSL_CERT_FILE").ok();
    let mut roots = RootCertStore::empty();
    for path in named.as_deref().into_iter().chain(BUNDLES) {
        let Ok(found) = CertificateDer::pem_file_iter(Path::new(path)) else { continue };
        let (added, _) = roots.add_parsable_certificates(found.flatten());
        if added > 0 {
            break;
        }
    }
    if roots.is_empty() {
        roots.extend(webpki_roots::TLS_SERVER_ROOTS.iter().cloned());
    }
    roots
}

pub struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Body,
}

impl Answer {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }
}

/// The rest of an answer, piece by piece.
pub struct Body {
    body: Incoming,
    host: String,
}

impl Body {
    /// The next piece; `None` at the end.
    ///
    /// # Errors
    /// Nothing came for so long, or the connection broke.
    pub async fn next(&mut self, silence: Duration) -> Result<Option<Bytes>, NetError> {
        loop {
            let ended = |why: String| NetError::Ended { host: self.host.clone(), why };
            match within(silence, &self.host, self.body.frame()).await? {
                None => return Ok(None),
                Some(Err(e)) => return Err(ended(e.to_string())),
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        return Ok(Some(data));
                    }
                }
            }
        }
    }

    /// All of it.
    ///
    /// # Errors
    /// As for [`Body::next`], and if there is too much.
    pub async fn all(mut self) -> Result<Vec<u8>, NetError> {
        let mut all = Vec::new();
        while let Some(piece) = self.next(ANSWER).await? {
            if all.len() + piece.len() > MAX_ANSWER {
                return Err(NetError::TooLong { host: self.host });
            }
            all.extend_from_slice(&piece);
        }
        Ok(all)
    }
}

/// Sends a request; JSON, if there is a body.
///
/// # Errors
/// No connection, or no answer in time. Every status is an answer.
pub async fn request(
    method: Method,
    address: &str,
    bearer: Option<&str>,
    json: Option<Vec<u8>>,
) -> Result<Answer, NetError> {
    let uri: Uri = address.parse().map_err(|_| NetError::Address(address.to_owned()))?;
    let authority = uri.authority().ok_or_else(|| NetError::Address(address.to_owned()))?;
    let host = authority.host().to_owned();
    let path = uri.path_and_query().map_or("/", |p| p.as_str());
    let mut builder = Request::builder()
        .method(method)
        .uri(path)
        .header(HOST, authority.host_and_port())
        .header(USER_AGENT, AGENT)
        .header("accept", "application/json");
    if let Some(bearer) = bearer {
        builder = builder.header("authorization", format!("Bearer {bearer}"));
    }
    if json.is_some() {
        builder = builder.header("content-type", "application/json");
    }
    let body = Full::new(Bytes::from(json.unwrap_or_default()));
    // Only a key with odd characters in it can be refused here; it is not repeated.
    let request = builder
        .body(body)
        .map_err(|_| NetError::Connect { host: host.clone(), why: "the key is no header value".into() })?;
    let io = TokioIo::new(connect(&uri).await?);
    let ended = |e: hyper::Error| NetError::Ended { host: host.clone(), why: e.to_string() };
    let handshake = hyper::client::conn::http1::handshake(io);
    let (mut sender, connection) = within(CONNECT, &host, handshake).await?.map_err(ended)?;
    // It ends with the body that is read from it.
    tokio::spawn(connection);
    let answer = within(ANSWER, &host, sender.send_request(request)).await?.map_err(ended)?;
    let (parts, body) = answer.into_parts();
    let body = Body { body, host: host.clone() };
    Ok(Answer { status: parts.status, headers: parts.headers, body })
}

/// `host` or `host:port` as the address has it.
trait HostAndPort {
    fn host_and_port(&self) -> String;
}

impl HostAndPort for hyper::http::uri::Authority {
    fn host_and_port(&self) -> String {
        match self.port_u16() {
            Some(port) => format!("{}:{port}", self.host()),
            None => self.host().to_owned(),
        }
    }
}

/// Percent-encodes a value of a query.
pub fn encode(value: &str) -> String {
    let mut out = String::with_capacity(value.len());
    for byte in value.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            out += &format!("%{byte:02X}");
        }
    }
    out
}
