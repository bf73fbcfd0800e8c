//! OpenBB Workspace: add this service's address as a backend, and its tables appear as widgets.
//!
//! The Workspace is a page of another origin: it needs `--cors-allow-origin https://pro.openbb.co`.

use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use axum::response::Response;
use cashtag_http::Problem;
use serde_json::{Value, json};

use super::{Api, Parameters, ok, read, window};
use crate::store::PostFilter;
use crate::windows::{Scope, Signal};

pub(super) async fn widgets() -> Response {
    let window = json!({"paramName": "window", "label": "Window", "type": "text", "value": "5m", "description": "Length of a window",
        "options": [{"label": "1 minute", "value": "1m"}, {"label": "5 minutes", "value": "5m"},
                    {"label": "1 hour", "value": "1h"}, {"label": "1 day", "value": "1d"}]});
    let number = |field: &str, header: &str| json!({"field": field, "headerName": header, "cellDataType": "number", "renderFn": "greenRed"});
    let plain = |field: &str, header: &str| json!({"field": field, "headerName": header, "cellDataType": "number"});
    let text = |field: &str, header: &str| json!({"field": field, "headerName": header, "cellDataType": "text"});
    let signal_columns = json!([
        text("key", "Key"),
        text("name", "Name"),
        number("sentiment_score", "Sentiment"),
        plain("mentions", "Mentions"),
        plain("unique_authors", "Authors"),
        plain("bullish_pct", "Bullish %"),
        plain("bearish_pct", "Bearish %"),
        plain("buzz_score", "Buzz"),
        plain("attention", "Attention"),
        number("momentum", "Momentum"),
        text("trend", "Trend"),
        text("start", "Window")
    ]);
    let table = |name: &str, description: &str, endpoint: &str, columns: &Value, parameters: Value| {
        json!({"name": name, "description": description, "category": "Sentiment", "type": "table", "endpoint": endpoint,
               "gridData": {"w": 20, "h": 9}, "source": "cashtag", "params": parameters,
               "data": {"table": {"showAll": true, "columnsDefs": columns}}})
    };
    let ticker = json!({"paramName": "ticker", "label": "Ticker", "type": "text", "value": "", "description": "A symbol, or empty for all"});
    ok(&json!({
        "cashtag_tickers": table("Ticker sentiment", "Newest window of each ticker", "openbb/ticker", &signal_columns, json!([window])),
        "cashtag_sectors": table("Sector sentiment", "Newest window of each sector", "openbb/sector", &signal_columns, json!([window])),
        "cashtag_market": table("Market sentiment", "Newest window of the market", "openbb/market", &signal_columns, json!([window])),
        "cashtag_posts": table("Scored posts", "The newest posts with their scores", "openbb/posts",
            &json!([text("event_time", "Time"), text("text", "Text"), text("label", "Label"), number("sentiment_score", "Score"),
                    plain("confidence", "Confidence"), text("source", "Source")]), json!([ticker])),
    }))
}

pub(super) async fn apps() -> Response {
    let place = |id: &str, x: u32, y: u32, w: u32, h: u32| json!({"i": id, "x": x, "y": y, "w": w, "h": h});
    ok(&json!([{
        "name": "cashtag", "description": "Live sentiment of tickers, sectors and the market", "img": "", "allowCustomization": true,
        "tabs": {"overview": {"id": "overview", "name": "Overview", "layout": [
            place("cashtag_market", 0, 0, 40, 5), place("cashtag_tickers", 0, 5, 24, 16),
            place("cashtag_sectors", 24, 5, 16, 16), place("cashtag_posts", 0, 21, 40, 12)]}},
        "groups": [],
    }]))
}

/// Rows for a table: flat objects.
pub(super) async fn table(
    State(api): State<Api>,
    Path(name): Path<String>,
    Query(q): Parameters,
) -> Result<Response, Problem> {
    if name == "posts" {
        let ticker = q.get("ticker").filter(|t| !t.is_empty()).map(|t| t.trim_start_matches('$').to_uppercase());
        let filter = PostFilter { ticker, limit: 100, ..PostFilter::default() };
        let posts = read(&api, move |r| r.posts(&filter)).await?;
        return Ok(ok(&Value::Array(posts)));
    }
    let Some(scope) = Scope::of_name(&name) else {
        return Err(Problem::new(
            StatusCode::NOT_FOUND,
            "unknown_table",
            "tables are ticker, sector, market and posts",
        ));
    };
    let window = window(&q)?;
    let snapshot = api.shared.snapshot();
    let mut all: Vec<&Signal> = snapshot.all(window, scope).map(|s| &**s).collect();
    all.sort_by_key(|s| (std::cmp::Reverse(s.start), std::cmp::Reverse(s.values.mentions)));
    let rows: Vec<Value> = all
        .into_iter()
        .map(|s| {
            let mut row = snapshot.show(s);
            if let Some(fields) = row.as_object_mut() {
                fields.remove("sparkline");
                fields.remove("top_posts");
            }
            row
        })
        .collect();
    drop(snapshot);
    Ok(ok(&Value::Array(rows)))
}
