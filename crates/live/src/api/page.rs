//! The page: built files of `web/`, embedded, with the headers that keep a tweet from running on it.

use axum::Router;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;

/// Path and content of each file of `web/dist`.
static FILES: &[(&str, &[u8])] = include!(concat!(env!("OUT_DIR"), "/page.rs"));

/// No script, style, image or connection but the page's own; markup that came with a post could not run even if it were
/// put into the page as such, which it is not.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; \
                      font-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

const WITHOUT: &str = "<!doctype html><html lang=en><meta charset=utf-8><title>cashtag live</title>\
                       <p>This build has no page. <code>make page build</code> builds it in; the API is there all the same: \
                       <code>/v1/overview</code>.";

/// Whether the page is in this build.
pub fn is_there() -> bool {
    find("/index.html").is_some()
}

/// Paths that need no key: the page asks for one, and shows nothing without.
pub fn open_paths() -> Vec<&'static str> {
    FILES.iter().map(|(path, _)| *path).chain(["/", "/health"]).collect()
}

pub(super) fn routes<S: Clone + Send + Sync + 'static>() -> Router<S> {
    let mut router = Router::new().route("/", get(|headers: HeaderMap| async move { answer("/index.html", &headers) }));
    for (path, _) in FILES.iter().filter(|(path, _)| !path.ends_with(".gz") && !path.ends_with(".br")) {
        router = router.route(path, get(move |headers: HeaderMap| async move { answer(path, &headers) }));
    }
    router
}

fn find(path: &str) -> Option<&'static [u8]> {
    FILES.iter().find(|(name, _)| *name == path).map(|(_, bytes)| *bytes)
}

fn answer(path: &'static str, headers: &HeaderMap) -> Response {
    let Some(plain) = find(path) else {
        return ([(header::CONTENT_TYPE, "text/html; charset=utf-8")], WITHOUT).into_response();
    };
    let accepts = headers.get(header::ACCEPT_ENCODING).and_then(|v| v.to_str().ok()).unwrap_or("");
    let takes = |name: &str| accepts.split(',').any(|part| part.trim().split(';').next() == Some(name));
    let packed = [("br", ".br"), ("gzip", ".gz")]
        .into_iter()
        .filter(|(name, _)| takes(name))
        .find_map(|(name, ending)| Some((name, find(&format!("{path}{ending}"))?)));
    // Hashed names never change their content.
    let is_hashed = path.starts_with("/assets/");
    let mut response = packed.map_or(plain, |(_, bytes)| bytes).into_response();
    *response.status_mut() = StatusCode::OK;
    let set = response.headers_mut();
    set.insert(header::CONTENT_TYPE, HeaderValue::from_static(kind(path)));
    set.insert(header::VARY, HeaderValue::from_static("accept-encoding"));
    set.insert(header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(POLICY));
    let caching = if is_hashed { "public, max-age=31536000, immutable" } else { "no-cache" };
    set.insert(header::CACHE_CONTROL, HeaderValue::from_static(caching));
    if let Some((name, _)) = packed {
        set.insert(header::CONTENT_ENCODING, HeaderValue::from_static(name));
    }
    response
}

fn kind(path: &str) -> &'static str {
    match path.rsplit('.').next() {
        Some("html") => "text/html; charset=utf-8",
        Some("js") => "text/javascript; charset=utf-8",
        Some("css") => "text/css; charset=utf-8",
        Some("svg") => "image/svg+xml",
        Some("json" | "map") => "application/json",
        Some("png") => "image/png",
        Some("woff2") => "font/woff2",
        _ => "application/octet-stream",
    }
}
