//! Posts behind the numbers, alerts, and what could not be taken.

use axum::extract::{Query, State};
use axum::response::Response;
use cashtag_http::Problem;
use serde_json::{Value, json};

use super::{Api, Parameters, bad, count, ok, read};
use crate::store::PostFilter;

pub(super) async fn list(State(api): State<Api>, Query(q): Parameters) -> Result<Response, Problem> {
    let before = match q.get("before").filter(|b| !b.is_empty()) {
        None => None,
        Some(text) => {
            Some(text.parse::<u64>().map_err(|_| bad("bad_number", "before is the seq of a post").param("before"))?)
        }
    };
    let given = |name: &str| q.get(name).filter(|v| !v.is_empty()).cloned();
    let ticker = given("ticker").map(|t| t.trim_start_matches('$').to_uppercase());
    let limit = count(&q, "limit", 50, 500)?;
    let filter = PostFilter { ticker, sector: given("sector"), before, limit };
    let posts = read(&api, move |r| r.posts(&filter)).await?;
    // A page that is not full is the last one.
    let next = if posts.len() == limit { posts.last().map_or(Value::Null, |p| p["seq"].clone()) } else { Value::Null };
    Ok(ok(&json!({"posts": posts, "next_before": next})))
}

pub(super) async fn alerts(State(api): State<Api>, Query(q): Parameters) -> Result<Response, Problem> {
    let limit = count(&q, "limit", 50, 500)?;
    let items = read(&api, move |r| r.alerts(limit)).await?;
    Ok(ok(&json!({"items": items})))
}

pub(super) async fn dead_letters(State(api): State<Api>, Query(q): Parameters) -> Result<Response, Problem> {
    let limit = count(&q, "limit", 50, 500)?;
    let items = read(&api, move |r| r.dead_letters(limit)).await?;
    Ok(ok(&json!({"items": items})))
}
