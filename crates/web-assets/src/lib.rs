//! The built page (`web/dist`), embedded in the binary, and the headers it is served with.
//!
//! Knows no HTTP library: [`answer`] takes a path and two request headers and returns a status, headers and bytes that any
//! server can send. What holds:
//!
//! - Only paths of embedded files are answered; no file system is touched at run time.
//! - Every answer carries [`CONTENT_SECURITY_POLICY`] and the other [`SECURITY_HEADERS`]: no inline script or style, nothing
//!   from another host, and no string may become markup (trusted types with no policy allowed).
//! - Without a built page the crate still compiles, and `/` says how to build it.

mod negotiate;

use negotiate::{accepts, etag_matches};

include!(concat!(env!("OUT_DIR"), "/assets.rs"));

/// What the page may do: run its own script and style, and talk to the server it came from.
pub const CONTENT_SECURITY_POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; \
    connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; \
    require-trusted-types-for 'script'; trusted-types 'none'";

/// Headers of every answer of the page.
pub const SECURITY_HEADERS: &[(&str, &str)] = &[
    ("content-security-policy", CONTENT_SECURITY_POLICY),
    ("x-content-type-options", "nosniff"),
    ("referrer-policy", "no-referrer"),
    ("cross-origin-opener-policy", "same-origin"),
    ("cross-origin-resource-policy", "same-origin"),
    ("permissions-policy", "camera=(), geolocation=(), microphone=()"),
];

/// One file of the page.
#[derive(Debug)]
pub struct Asset {
    /// As in the request: `/`, `/assets/main-….js`.
    pub path: &'static str,
    pub content_type: &'static str,
    /// Without quotes; of the uncompressed content.
    pub etag: &'static str,
    /// The name changes with the content, so the file never does.
    pub immutable: bool,
    pub identity: &'static [u8],
    pub gzip: Option<&'static [u8]>,
    pub brotli: Option<&'static [u8]>,
}

/// What to send.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: Vec<(&'static str, String)>,
    pub body: &'static [u8],
}

/// Sent instead of the page by a binary that was built without it.
static NOT_BUILT: &[Asset] = &[
    Asset {
        path: "/",
        content_type: "text/html; charset=utf-8",
        etag: "not-built-1",
        immutable: false,
        identity: include_bytes!("not_built.html"),
        gzip: None,
        brotli: None,
    },
    Asset {
        path: "/not-built.css",
        content_type: "text/css; charset=utf-8",
        etag: "not-built-1",
        immutable: false,
        identity: include_bytes!("not_built.css"),
        gzip: None,
        brotli: None,
    },
];

/// Whether the page was there when this binary was built.
#[must_use]
pub fn is_built() -> bool {
    !BUILT.is_empty()
}

/// All files, the page itself at `/`.
#[must_use]
pub fn assets() -> &'static [Asset] {
    if is_built() { BUILT } else { NOT_BUILT }
}

/// The answer to `GET path`, or `None` where the page has no such file. `accept_encoding` and `if_none_match` are the
/// request's headers of these names, as they came.
#[must_use]
pub fn answer(path: &str, accept_encoding: Option<&str>, if_none_match: Option<&str>) -> Option<Answer> {
    let path = if path == "/index.html" { "/" } else { path };
    let asset = assets().iter().find(|a| a.path == path)?;
    let wanted = accept_encoding.unwrap_or("");
    let (encoding, body) = match (asset.brotli, asset.gzip) {
        (Some(bytes), _) if accepts(wanted, "br") => (Some("br"), bytes),
        (_, Some(bytes)) if accepts(wanted, "gzip") => (Some("gzip"), bytes),
        _ => (None, asset.identity),
    };
    // Each encoding is a representation of its own and has its own strong tag.
    let etag = match encoding {
        Some(name) => format!("\"{}-{name}\"", asset.etag),
        None => format!("\"{}\"", asset.etag),
    };
    let caching = if asset.immutable { "public, max-age=31536000, immutable" } else { "no-cache" };
    let mut headers: Vec<(&'static str, String)> =
        SECURITY_HEADERS.iter().map(|(name, value)| (*name, (*value).to_string())).collect();
    headers.push(("cache-control", caching.to_string()));
    headers.push(("vary", "accept-encoding".to_string()));
    let fresh = if_none_match.is_some_and(|tags| etag_matches(tags, &etag));
    headers.push(("etag", etag));
    if fresh {
        return Some(Answer { status: 304, headers, body: &[] });
    }
    headers.push(("content-type", asset.content_type.to_string()));
    if let Some(name) = encoding {
        headers.push(("content-encoding", name.to_string()));
    }
    Some(Answer { status: 200, headers, body })
}
