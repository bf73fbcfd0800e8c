//! Signals: the overview of the page, the newest of each series, the history of one.

use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use axum::response::Response;
use cashtag_http::Problem;
use serde_json::{Value, json};
use std::sync::PoisonError;

use super::{Api, Parameters, count, moment, ok, read, scope, shown, window};
use crate::state::Snapshot;
use crate::time::Millis;
use crate::windows::{MARKET, Scope, Signal, Window};

const MOVERS: usize = 20;

pub(super) async fn overview(State(api): State<Api>, Query(q): Parameters) -> Result<Response, Problem> {
    let window = window(&q)?;
    // Nothing here asks the store: while it is down, the page says so and shows what it had.
    let shared = &api.shared;
    let (as_of, market, movers, sectors) = {
        let snapshot = shared.snapshot();
        let market = snapshot.get(window, Scope::Market, MARKET).map(|s| snapshot.show(s));
        let show = |signals: Vec<&Signal>| signals.into_iter().map(|s| snapshot.show(s)).collect::<Vec<Value>>();
        let movers = show(movers(&snapshot, window));
        let sectors = show(snapshot.all(window, Scope::Sector).map(|s| &**s).collect());
        (shown(snapshot.latest), market, movers, sectors)
    };
    let lag = shared.delays.lock().unwrap_or_else(PoisonError::into_inner).to_json();
    Ok(ok(&json!({
        "window": window, "as_of": as_of, "market": market, "movers": movers, "sectors": sectors,
        "sources": shared.inlet.board().to_json(), "store": shared.store.to_json(), "lag": lag,
        "model": shared.model.to_json(), "dead_letters": shared.dead_letters(), "bus": shared.bus(),
    })))
}

/// The tickers whose score moved most, by |momentum| · mentions; a window that is long over moves nobody.
fn movers(snapshot: &Snapshot, window: Window) -> Vec<&Signal> {
    let recent = window.start(snapshot.latest).saturating_sub(window.size());
    let strength = |s: &Signal| s.values.momentum.unwrap_or(0.0).abs() * s.values.mentions as f64;
    let mut all: Vec<&Signal> = snapshot
        .all(window, Scope::Ticker)
        .map(|s| &**s)
        .filter(|s| s.start >= recent && s.values.momentum.is_some())
        .collect();
    all.sort_by(|a, b| strength(b).total_cmp(&strength(a)).then_with(|| a.key.cmp(&b.key)));
    all.truncate(MOVERS);
    all
}

pub(super) async fn list(State(api): State<Api>, Query(q): Parameters) -> Result<Response, Problem> {
    let (window, scope) = (window(&q)?, scope(&q)?);
    let (limit, offset) = (count(&q, "limit", 100, 1_000)?, count(&q, "offset", 0, 1_000_000)?);
    let snapshot = api.shared.snapshot();
    let mut all: Vec<&Signal> = snapshot.all(window, scope).map(|s| &**s).collect();
    // The busiest of the newest windows first.
    all.sort_by(|a, b| {
        let order = b.start.cmp(&a.start).then(b.values.mentions.cmp(&a.values.mentions));
        order.then_with(|| a.key.cmp(&b.key))
    });
    let total = all.len();
    let signals: Vec<Value> = all.into_iter().skip(offset).take(limit).map(|s| snapshot.show(s)).collect();
    let value = json!({"window": window, "as_of": shown(snapshot.latest), "count": total, "signals": signals});
    drop(snapshot);
    Ok(ok(&value))
}

pub(super) async fn history(
    State(api): State<Api>,
    Path(key): Path<String>,
    Query(q): Parameters,
) -> Result<Response, Problem> {
    let (window, scope) = (window(&q)?, scope(&q)?);
    let limit = count(&q, "limit", 500, 5_000)?;
    let range = (moment(&q, "from", Millis::MIN)?, moment(&q, "to", Millis::MAX)?);
    let key = match scope {
        Scope::Ticker => key.trim_start_matches('$').to_uppercase(),
        Scope::Sector | Scope::Market => key,
    };
    let newest = api.shared.snapshot().get(window, scope, &key).cloned();
    let wanted = key.clone();
    let stored = read(&api, move |r| r.history(scope, &wanted, window, range, limit)).await?;
    if newest.is_none() && stored.is_empty() {
        let message = format!("no posts about {} {key:?} so far", scope.name());
        return Err(Problem::new(StatusCode::NOT_FOUND, "unknown_key", message));
    }
    let snapshot = api.shared.snapshot();
    let signals: Vec<Value> = stored
        .iter()
        .map(|signal| {
            let mut value = snapshot.show(signal);
            // The newest one has its sparkline; the others are each other's.
            if let Some(newest) = newest.as_ref().filter(|n| n.start == signal.start) {
                value["sparkline"] = json!(newest.sparkline);
            }
            value
        })
        .collect();
    drop(snapshot);
    Ok(ok(&json!({"key": key, "scope": scope, "window": window, "signals": signals})))
}
