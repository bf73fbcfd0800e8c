//! Talking to the hub: requests with retries, redirects followed by hand, and every refusal with its mend.
//!
//! Redirects are followed here and not by the HTTP library for two reasons: what the hub says about a large file (its sha256)
//! stands in the answer that redirects, and the token must never reach the host that is redirected to.

use std::io::Read as _;
use std::time::{Duration, Instant};

use anyhow::{anyhow, bail};
use serde::Deserialize;
use ureq::http::header::{ACCEPT_ENCODING, AUTHORIZATION, LOCATION, RANGE, RETRY_AFTER};
use ureq::http::{HeaderMap, Method, Request, Response, Uri};

use super::name::{Kind, Repository, is_inside};
use super::select::{Listed, Listing};
use super::{certificates, layout};
use crate::exit::{Usage, check_stop};
use crate::output;

const HUB: &str = "https://huggingface.co";
/// A listing is a few kB; one with 100,000 files is 20 MB.
const MAX_LISTING: u64 = 64 << 20;
const MAX_FILES: usize = 100_000;
const MAX_REDIRECTS: usize = 10;

/// How patient the client is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Patience {
    /// Tries without any progress before giving up.
    pub(crate) tries: u32,
    /// Before the second try; doubled for each further one.
    pub(crate) pause: Duration,
    /// A connection on which nothing comes for so long is given up.
    pub(crate) silence: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self { tries: 5, pause: Duration::from_secs(1), silence: Duration::from_secs(30) }
    }
}

pub(crate) struct Client {
    agent: ureq::Agent,
    /// Without a slash at the end.
    endpoint: String,
    origin: Origin,
    token: Option<String>,
    patience: Patience,
}

/// An answer with status 200 or 206, and the headers of the first answer if it was redirected.
pub(crate) struct Reply {
    pub(crate) first: HeaderMap,
    pub(crate) response: Response<ureq::Body>,
}

/// Why a request failed, and whether trying again may help.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) message: String,
    /// `None`: it would fail again. Zero: after the usual pause.
    pub(crate) retry: Option<Duration>,
}

impl Failure {
    pub(crate) fn last(message: impl Into<String>) -> Self {
        Self { message: message.into(), retry: None }
    }

    pub(crate) fn passing(message: impl Into<String>) -> Self {
        Self { message: message.into(), retry: Some(Duration::ZERO) }
    }
}

/// Scheme, host and port: what a token belongs to.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Origin(String, String, u16);

impl Origin {
    fn of(uri: &Uri) -> Option<Self> {
        let scheme = uri.scheme_str()?.to_ascii_lowercase();
        let port = match scheme.as_str() {
            "https" => 443,
            "http" => 80,
            _ => return None,
        };
        let host = uri.host().filter(|h| !h.is_empty())?.to_ascii_lowercase();
        Some(Self(scheme, host, uri.port_u16().unwrap_or(port)))
    }
}

impl Client {
    /// With `HF_ENDPOINT`, and the token of `HF_TOKEN` or of the file `token` in `HF_HOME` (which `hf auth login` writes).
    ///
    /// # Errors
    /// A variable that holds no address, or no token.
    pub(crate) fn from_env() -> anyhow::Result<Self> {
        let endpoint = std::env::var("HF_ENDPOINT").ok().filter(|v| !v.trim().is_empty());
        let saved = || layout::home().and_then(|home| std::fs::read_to_string(home.join("token")).ok());
        let token = std::env::var("HF_TOKEN").ok().or_else(saved);
        Self::new(endpoint.as_deref().unwrap_or(HUB), token.as_deref(), Patience::default())
    }

    /// # Errors
    /// As [`from_env`](Self::from_env).
    pub(crate) fn new(endpoint: &str, token: Option<&str>, patience: Patience) -> anyhow::Result<Self> {
        let endpoint = endpoint.trim().trim_end_matches('/');
        let origin = endpoint.parse().ok().and_then(|uri| Origin::of(&uri));
        let Some(origin) = origin else {
            bail!(Usage(format!("HF_ENDPOINT is \"{endpoint}\": not an http(s) address\n  hint: for example {HUB}")));
        };
        let token = token.map(str::trim).filter(|t| !t.is_empty()).map(str::to_string);
        if token.as_ref().is_some_and(|t| !t.bytes().all(|b| b.is_ascii_graphic())) {
            bail!(Usage(
                "HF_TOKEN holds characters that no token has\n  hint: copy it anew; it looks like hf_…".into()
            ));
        }
        let tls = ureq::tls::TlsConfig::builder().root_certs(certificates::roots()).build();
        let agent = ureq::Agent::config_builder()
            .tls_config(tls)
            .http_status_as_error(false)
            .max_redirects(0)
            .user_agent(concat!("cashtag/", env!("CARGO_PKG_VERSION")))
            .timeout_connect(Some(patience.silence))
            .timeout_recv_response(Some(2 * patience.silence))
            .timeout_per_read(Some(patience.silence))
            .timeout_per_write(Some(patience.silence))
            .build()
            .new_agent();
        Ok(Self { agent, endpoint: endpoint.into(), origin, token, patience })
    }

    /// Where a file of a repository is fetched from.
    pub(crate) fn file_url(&self, repository: &Repository, commit: &str, path: &str) -> String {
        let kind = if repository.kind == Kind::Dataset { "datasets/" } else { "" };
        format!("{}/{kind}{}/resolve/{commit}/{}", self.endpoint, repository.id(), encode(path, true))
    }

    /// What files a repository has at its revision, and which commit that is.
    ///
    /// # Errors
    /// No such repository or revision, no access, no connection, an answer that is none.
    pub(crate) fn listing(&self, repository: &Repository) -> anyhow::Result<Listing> {
        let kind = if repository.kind == Kind::Dataset { "datasets" } else { "models" };
        let revision = encode(&repository.revision, false);
        let url = format!("{}/api/{kind}/{}/revision/{revision}?blobs=true", self.endpoint, repository.id());
        let bytes = self.retrying(|| {
            let reply = self.request(Method::GET, &url, None, repository)?;
            let mut bytes = Vec::new();
            let reader = reply.response.into_body().into_with_config().limit(MAX_LISTING).reader();
            reader.take(MAX_LISTING).read_to_end(&mut bytes).map_err(|e| Failure::passing(broken(&e)))?;
            Ok(bytes)
        })?;
        parse_listing(repository, &bytes)
    }

    /// Headers of a file, for hubs whose listing does not say what the file's etag is.
    ///
    /// # Errors
    /// As [`listing`](Self::listing).
    pub(crate) fn head(&self, url: &str, repository: &Repository) -> anyhow::Result<HeaderMap> {
        self.retrying(|| {
            let reply = self.request(Method::HEAD, url, None, repository)?;
            // The length is that of the last answer, the rest is said by the hub itself.
            let mut headers = reply.first;
            if let Some(length) = reply.response.headers().get("content-length") {
                headers.insert("content-length", length.clone());
            }
            Ok(headers)
        })
    }

    /// Tries again as long as it may help.
    fn retrying<T>(&self, mut request: impl FnMut() -> Result<T, Failure>) -> anyhow::Result<T> {
        let mut tries = 0;
        loop {
            match request() {
                Ok(value) => return Ok(value),
                Err(failure) => {
                    tries += 1;
                    self.pause(tries, failure)?;
                }
            }
        }
    }

    /// Waits before the next try, or says why there is none. `tries` without progress have failed.
    ///
    /// # Errors
    /// The failure would come again, there were enough tries, or the user asked to stop.
    pub(crate) fn pause(&self, tries: u32, failure: Failure) -> anyhow::Result<()> {
        check_stop()?;
        let Some(asked) = failure.retry else { bail!(failure.message) };
        if tries >= self.patience.tries {
            let (message, hint) = failure.message.split_once("\n  hint: ").unwrap_or((&failure.message, ""));
            let hint = if hint.is_empty() { "try again later: what was fetched stays" } else { hint };
            bail!("{message} ({tries} tries)\n  hint: {hint}");
        }
        let usual = self.patience.pause * 2u32.saturating_pow(tries.saturating_sub(1));
        // What a server asks for is heard within reason.
        let pause = asked.clamp(usual, usual.max(60 * self.patience.pause));
        output::detail(format!(
            "{}; next try in {:.1} s",
            failure.message.lines().next().unwrap_or(""),
            pause.as_secs_f64()
        ));
        let until = Instant::now() + pause;
        while let Some(left) = until.checked_duration_since(Instant::now()).filter(|d| !d.is_zero()) {
            std::thread::sleep(left.min(Duration::from_millis(100)));
            check_stop()?;
        }
        Ok(())
    }

    /// One request, redirects followed. `from`: the first byte that is wanted.
    ///
    /// # Errors
    /// Anything but an answer with status 200 or 206 (or 416, which a download has to see).
    pub(crate) fn request(
        &self,
        method: Method,
        url: &str,
        from: Option<u64>,
        repository: &Repository,
    ) -> Result<Reply, Failure> {
        let mut uri: Uri = url.parse().map_err(|_| Failure::last(format!("{url} is no address")))?;
        let mut first = None;
        for _ in 0..=MAX_REDIRECTS {
            // Compressed content could not be continued in its middle.
            let mut request = Request::builder().method(method.clone()).uri(&uri).header(ACCEPT_ENCODING, "identity");
            if let Some(from) = from {
                request = request.header(RANGE, format!("bytes={from}-"));
            }
            let at_home = Origin::of(&uri).as_ref() == Some(&self.origin);
            if let Some(token) = self.token.as_ref().filter(|_| at_home) {
                request = request.header(AUTHORIZATION, format!("Bearer {token}"));
            }
            let request = request.body(()).map_err(|e| Failure::last(format!("{}: {e}", shown(&uri))))?;
            let response = self.agent.run(request).map_err(|e| transport(&uri, &e))?;
            let status = response.status().as_u16();
            let headers = first.get_or_insert_with(|| response.headers().clone());
            match status {
                200 | 206 | 416 => {
                    let first = std::mem::take(headers);
                    return Ok(Reply { first, response });
                }
                301 | 302 | 303 | 307 | 308 => {
                    let location = response.headers().get(LOCATION).and_then(|l| l.to_str().ok());
                    uri = location
                        .and_then(|l| join(&uri, l))
                        .ok_or_else(|| Failure::last(format!("{} redirects to nowhere", shown(&uri))))?;
                }
                _ => return Err(self.refusal(status, response.headers(), &uri, repository)),
            }
        }
        Err(Failure::last(format!("{} redirects more than {MAX_REDIRECTS} times", shown(&uri))))
    }

    /// What a status means for the user.
    fn refusal(&self, status: u16, headers: &HeaderMap, uri: &Uri, repository: &Repository) -> Failure {
        let page = match repository.kind {
            Kind::Model => format!("{}/{}", self.endpoint, repository.id()),
            Kind::Dataset => format!("{}/datasets/{}", self.endpoint, repository.id()),
        };
        let code = headers.get("x-error-code").and_then(|v| v.to_str().ok()).unwrap_or_default();
        let with_token = self.token.is_some();
        let licence = format!("accept its licence at {page}, then set HF_TOKEN to a token that may read it");
        match (status, code) {
            (401 | 403, "GatedRepo") => Failure::last(format!("{repository} is gated ({status})\n  hint: {licence}")),
            (401, _) if with_token => Failure::last(format!(
                "the hub does not accept the token, or {repository} does not exist (401)\n  hint: check the name, and HF_TOKEN: it may have expired"
            )),
            (401, _) => Failure::last(format!(
                "{repository} does not exist, or is private or gated (401)\n  hint: check the name; if it is gated, {licence}"
            )),
            (403, _) => Failure::last(format!("no access to {repository} (403)\n  hint: if it is gated, {licence}")),
            (404, "EntryNotFound") => {
                Failure::last(format!("{repository} has no such file (404)\n  hint: it may have changed; try again"))
            }
            (404, "RevisionNotFound") => Failure::last(format!(
                "{} has no revision {} (404)\n  hint: {page}/tree/main lists its branches and tags",
                repository.id(),
                repository.revision
            )),
            (404, _) => Failure::last(format!(
                "{repository} does not exist (404)\n  hint: check the name and the revision at {page}"
            )),
            (408 | 429 | 500 | 502 | 503 | 504, _) => {
                let seconds =
                    headers.get(RETRY_AFTER).and_then(|v| v.to_str().ok()).and_then(|v| v.trim().parse().ok());
                let what = if status == 429 { "has had too many requests" } else { "is not able to answer" };
                let host = uri.host().unwrap_or_default();
                let mut failure = Failure::passing(format!("{host} {what} ({status})"));
                if status == 429 && !with_token {
                    failure.message += "\n  hint: with HF_TOKEN set more requests are allowed; or try again later";
                }
                failure.retry = Some(Duration::from_secs(seconds.unwrap_or(0).min(3600)));
                failure
            }
            _ => Failure::last(format!("{} answered with status {status}", shown(uri))),
        }
    }
}

fn parse_listing(repository: &Repository, bytes: &[u8]) -> anyhow::Result<Listing> {
    #[derive(Deserialize)]
    struct Answer {
        sha: String,
        #[serde(default)]
        siblings: Vec<Listed>,
    }
    let no_listing = |what: String| {
        anyhow!(
            "the hub's answer about {repository} is not what a hub says: {what}\n  hint: check HF_ENDPOINT, and whether a proxy answers in its place"
        )
    };
    let answer: Answer = serde_json::from_slice(bytes).map_err(|e| no_listing(e.to_string()))?;
    if !layout::is_commit(&answer.sha) {
        return Err(no_listing("it names no commit".into()));
    }
    if answer.siblings.len() > MAX_FILES {
        return Err(no_listing(format!("{} files", answer.siblings.len())));
    }
    if let Some(bad) = answer.siblings.iter().find(|f| !is_inside(&f.path)) {
        let name: String = bad.path.chars().take(80).collect();
        bail!("{repository} has a file named {name:?}, which would lie outside of the cache: nothing was fetched");
    }
    Ok(Listing { commit: answer.sha.to_ascii_lowercase(), files: answer.siblings })
}

/// Percent-encodes a path for a URL.
fn encode(path: &str, keep_slashes: bool) -> String {
    let mut encoded = String::with_capacity(path.len());
    for byte in path.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => encoded.push(byte as char),
            b'/' if keep_slashes => encoded.push('/'),
            _ => encoded += &format!("%{byte:02X}"),
        }
    }
    encoded
}

/// An address for messages: without the query, which may hold a signature.
fn shown(uri: &Uri) -> String {
    format!("{}://{}{}", uri.scheme_str().unwrap_or("?"), uri.authority().map_or("?", |a| a.as_str()), uri.path())
}

/// The address that a `Location` header means; `None` if it is none, or leads from https to http.
fn join(base: &Uri, location: &str) -> Option<Uri> {
    let scheme = base.scheme_str()?;
    let authority = base.authority()?.as_str();
    let absolute = if location.contains("://") {
        location.to_string()
    } else if location.starts_with("//") {
        format!("{scheme}:{location}")
    } else if location.starts_with('/') {
        format!("{scheme}://{authority}{location}")
    } else {
        let folder = base.path().rsplit_once('/').map_or("", |(folder, _)| folder);
        format!("{scheme}://{authority}{folder}/{location}")
    };
    let without_fragment = absolute.split('#').next().unwrap_or_default();
    let uri: Uri = without_fragment.parse().ok()?;
    let origin = Origin::of(&uri)?;
    let downgraded = scheme == "https" && origin.0 != "https";
    (!downgraded && uri.authority().is_some_and(|a| !a.as_str().contains('@'))).then_some(uri)
}

/// A request that got no answer.
fn transport(uri: &Uri, error: &ureq::Error) -> Failure {
    let host = uri.host().unwrap_or("?");
    let mend = "check the connection, or set HF_ENDPOINT to a mirror; behind a proxy set HTTPS_PROXY";
    let said = error.to_string().to_lowercase();
    if said.contains("certificate") {
        let mend = "behind a proxy that reads along, set SSL_CERT_FILE to a file with its certificate";
        return Failure::last(format!("{host} cannot prove who it is: {said}\n  hint: {mend}"));
    }
    match error {
        ureq::Error::HostNotFound => Failure::passing(format!("no address is known for {host}\n  hint: {mend}")),
        ureq::Error::Timeout(_) => Failure::passing(format!("{host} does not answer\n  hint: {mend}")),
        ureq::Error::Io(e) => Failure::passing(format!("no connection to {host}: {}\n  hint: {mend}", plain(e))),
        ureq::Error::ConnectionFailed => Failure::passing(format!("no connection to {host}\n  hint: {mend}")),
        other => Failure::last(format!("{host}: {other}\n  hint: {mend}")),
    }
}

/// An answer that broke off.
pub(crate) fn broken(e: &std::io::Error) -> String {
    format!("the connection broke off: {}", plain(e))
}

/// What the operating system said, without its error number.
fn plain(e: &std::io::Error) -> String {
    let text = e.to_string();
    text.split(" (os error").next().unwrap_or_default().to_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        assert_eq!(encode("data/a b#é.csv", true), "data/a%20b%23%C3%A9.csv");
        assert_eq!(encode("refs/pr/1", false), "refs%2Fpr%2F1");
        let joined = |base: &str, to: &str| join(&base.parse().unwrap(), to).map(|u| u.to_string());
        let base = "https://hub.example/a/b?c=d";
        assert_eq!(joined(base, "https://x.example/y?z#f").unwrap(), "https://x.example/y?z");
        assert_eq!(joined(base, "//x.example/y").unwrap(), "https://x.example/y");
        assert_eq!(joined(base, "/y").unwrap(), "https://hub.example/y");
        assert_eq!(joined(base, "y").unwrap(), "https://hub.example/a/y");
        for bad in ["http://x.example/", "ftp://x.example/", "https://user@x.example/", "https://", "https:// x/"] {
            assert_eq!(joined(base, bad), None, "{bad}");
        }
        assert_eq!(shown(&"https://h:1/p?signature=s".parse().unwrap()), "https://h:1/p");
    }

    #[test]
    fn an_origin_is_scheme_host_and_port() {
        let origin = |text: &str| Origin::of(&text.parse().unwrap());
        assert_eq!(origin("https://HUB.example/x"), origin("https://hub.example:443"));
        for other in
            ["http://hub.example", "https://hub.example:444", "https://hub.example.evil", "https://evil.hub.example"]
        {
            assert_ne!(origin(other), origin("https://hub.example"), "{other}");
        }
    }

    #[test]
    fn variables_are_checked() {
        let error = |endpoint: &str, token: &str| {
            Client::new(endpoint, Some(token), Patience::default()).err().unwrap().to_string()
        };
        for bad in ["hub", "ftp://x", "", "http://"] {
            assert!(error(bad, "").starts_with("HF_ENDPOINT is "), "{bad}");
        }
        let said = error("https://x", "hf_secret\nX-Evil: 1");
        assert!(said.starts_with("HF_TOKEN holds") && !said.contains("secret"), "{said}");
    }
}
