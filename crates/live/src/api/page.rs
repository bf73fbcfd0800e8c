//! The page at `/`: files of the crate `cashtag-web`, with the headers that keep a post from running on it.

use axum::Router;
use axum::body::Body;
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;

/// Paths that need no key: the page asks for one, and shows nothing without.
pub fn open_paths() -> Vec<&'static str> {
    cashtag_web::assets().iter().map(|asset| asset.path).chain(["/", "/health"]).collect()
}

pub(super) fn routes<S: Clone + Send + Sync + 'static>() -> Router<S> {
    cashtag_web::assets().iter().fold(Router::new(), |router, asset| router.route(asset.path, get(answer)))
}

async fn answer(uri: Uri, headers: HeaderMap) -> Response {
    let header = |name: HeaderName| headers.get(name).and_then(|v| v.to_str().ok());
    let found = cashtag_web::answer(uri.path(), header(header::ACCEPT_ENCODING), header(header::IF_NONE_MATCH));
    let Some(found) = found else { return StatusCode::NOT_FOUND.into_response() };
    let mut response = Response::new(Body::from(found.body));
    *response.status_mut() = StatusCode::from_u16(found.status).unwrap_or(StatusCode::OK);
    for (name, value) in found.headers {
        if let Ok(value) = HeaderValue::from_str(&value) {
            response.headers_mut().insert(HeaderName::from_static(name), value);
        }
    }
    response
}
