//! `POST /v1/classify`: vLLM's and SGLang's shape, with the probabilities by name, and the tickers, beside it.

use std::time::Instant;

use axum::Extension;
use axum::body::Bytes;
use axum::extract::State as Shared;
use axum::http::StatusCode;
use axum::response::Response;
use cashtag_http::problem::json_response;
use cashtag_http::{Problem, RequestId};
use serde_json::{Map, Value, json};

use super::fields::{Fields, invalid, wrong};
use super::{Service, Tickers, add_costs, classify_in_time, now, shortest};
use crate::engine::{ClassifyRequest, Failure, Lane, Scored, Served};

pub(super) async fn classify(
    Shared(service): Shared<Service>,
    Extension(id): Extension<RequestId>,
    body: Bytes,
) -> Result<Response, Problem> {
    let started = Instant::now();
    let mut fields = Fields::parse(&body)?;
    let texts = texts(fields.take("input"))?;
    let model = fields.string("model")?.map(str::to_owned);
    let truncate = match fields.get("truncate_prompt_tokens") {
        None => None,
        Some(v) if v.as_i64() == Some(-1) => Some(true),
        Some(_) => {
            return Err(invalid(
                "truncate_prompt_tokens",
                "truncate_prompt_tokens: only -1 (as far as needed) is supported",
            ));
        }
    };
    fields.only("use_activation", &[json!(true)])?;
    fields.only("messages", &[])?;
    let characters = texts.iter().map(|t| t.chars().count()).sum();
    // Looked through when there is an answer: a request that is refused costs nothing.
    let looked_through = service.tickers.as_ref().map(|find| (find.clone(), texts.clone()));
    let request = ClassifyRequest { model, texts, truncate, timeout: None, lane: Lane::Interactive };
    let (served, scored) = classify_in_time(&service, request).await?;
    let tickers = match looked_through {
        Some((find, texts)) => Some(tickers(find, texts).await?),
        None => None,
    };
    let tokens: usize = scored.iter().map(|s| s.prompt_tokens).sum();
    let cached: usize = scored.iter().map(|s| s.cached_tokens).sum();
    let mut data: Vec<Value> = scored.iter().enumerate().map(|(i, s)| datum(i, &served, s)).collect();
    for (datum, tickers) in data.iter_mut().zip(tickers.into_iter().flatten()) {
        datum["tickers"] = tickers;
    }
    let answer = json!({
        "id": format!("classify-{}", id.0),
        "object": "list",
        "created": now(),
        "model": served.name,
        "data": data,
        "usage": {
            "prompt_tokens": tokens,
            "total_tokens": tokens,
            "completion_tokens": 0,
            "prompt_tokens_details": {"cached_tokens": cached},
        },
    });
    let mut response = json_response(StatusCode::OK, &answer);
    add_costs(&mut response, &service, started, characters, &scored);
    Ok(response)
}

async fn tickers(find: Tickers, texts: Vec<String>) -> Result<Vec<Value>, Problem> {
    /// More bytes than this take milliseconds, which the threads of connections have no time for.
    const QUICK: usize = 32 << 10;
    let is_quick = texts.iter().map(String::len).sum::<usize>() <= QUICK;
    let found = move || texts.iter().map(|text| find(text)).collect();
    if is_quick {
        return Ok(found());
    }
    tokio::task::spawn_blocking(found).await.map_err(|_| Failure::Ended.into())
}

fn texts(input: Option<Value>) -> Result<Vec<String>, Problem> {
    const EXPECTED: &str = "a text or a list of texts";
    match input {
        Some(Value::String(text)) => Ok(vec![text]),
        Some(Value::Array(list)) if list.is_empty() => Err(invalid("input", "input: the list has no texts")),
        Some(Value::Array(list)) => list
            .into_iter()
            .map(|item| match item {
                Value::String(text) => Ok(text),
                other => Err(wrong("input", EXPECTED, &other)),
            })
            .collect(),
        Some(other) => Err(wrong("input", EXPECTED, &other)),
        None => Err(invalid("input", format!("input is missing, expected {EXPECTED}"))),
    }
}

fn datum(index: usize, served: &Served, scored: &Scored) -> Value {
    let best = best(&scored.probabilities);
    let by_name: Map<String, Value> =
        served.labels.iter().cloned().zip(scored.probabilities.iter().map(|p| shortest(*p))).collect();
    json!({
        "index": index,
        "label": served.labels.get(best),
        "probs": scored.probabilities.iter().map(|p| shortest(*p)).collect::<Vec<_>>(),
        "num_classes": served.labels.len(),
        "probabilities": by_name,
        "confidence": scored.probabilities.get(best).map(|p| shortest(*p)),
    })
}

/// Position of the most probable label; the first of equals.
pub(super) fn best(probabilities: &[f32]) -> usize {
    (0..probabilities.len()).reduce(|a, b| if probabilities[b] > probabilities[a] { b } else { a }).unwrap_or(0)
}
