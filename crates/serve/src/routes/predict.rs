//! `POST /predict`: text-embeddings-inference's shape.
//!
//! There a flat list is one pair of texts, and a batch is a list of lists. This classifier takes no pairs, so a flat list is
//! refused with a hint rather than taken for either.

use std::time::Instant;

use axum::body::Bytes;
use axum::extract::State as Shared;
use axum::http::StatusCode;
use axum::response::Response;
use cashtag_http::Problem;
use cashtag_http::problem::json_response;
use serde_json::{Value, json};

use super::fields::{Fields, invalid, wrong};
use super::{Service, add_costs, classify_in_time, shortest};
use crate::engine::{ClassifyRequest, Lane};

/// `{"error", "error_type"}`.
pub(super) fn error(problem: &Problem) -> Value {
    let kind = match problem.status.as_u16() {
        429 => "Overloaded",
        500 | 504 => "Backend",
        503 => "Unhealthy",
        _ => "Validation",
    };
    json!({"error": problem.message, "error_type": kind})
}

pub(super) async fn predict(Shared(service): Shared<Service>, body: Bytes) -> Result<Response, Problem> {
    let started = Instant::now();
    let mut fields = Fields::parse(&body)?;
    let (texts, is_batch) = texts(fields.take("inputs"))?;
    let truncate = fields.boolean("truncate")?;
    let raw = fields.boolean("raw_scores")?.unwrap_or(false);
    fields.only("truncation_direction", &[json!("right"), json!("Right")])?;
    let characters = texts.iter().map(|t| t.chars().count()).sum();
    let request = ClassifyRequest { model: None, texts, truncate, timeout: None, lane: Lane::Interactive };
    let (served, scored) = classify_in_time(&service, request).await?;
    let mut answers: Vec<Value> = scored
        .iter()
        .map(|s| {
            let scores = if raw { &s.log_probabilities } else { &s.probabilities };
            let mut pairs: Vec<(&String, f32)> = served.labels.iter().zip(scores.iter().copied()).collect();
            pairs.sort_by(|a, b| b.1.total_cmp(&a.1));
            pairs.into_iter().map(|(label, score)| json!({"score": shortest(score), "label": label})).collect()
        })
        .collect();
    let answer = if is_batch { Value::from(answers) } else { answers.pop().unwrap_or_default() };
    let mut response = json_response(StatusCode::OK, &answer);
    add_costs(&mut response, &service, started, characters, &scored);
    Ok(response)
}

fn texts(inputs: Option<Value>) -> Result<(Vec<String>, bool), Problem> {
    const EXPECTED: &str = "\"text\" or [[\"text\"], [\"text\"]]";
    match inputs {
        Some(Value::String(text)) => Ok((vec![text], false)),
        Some(Value::Array(list)) if list.is_empty() => Err(invalid("inputs", "inputs: the list has no texts")),
        Some(Value::Array(list)) => list
            .into_iter()
            .map(|item| match item {
                Value::Array(one) => match <[Value; 1]>::try_from(one) {
                    Ok([Value::String(text)]) => Ok(text),
                    _ => Err(invalid("inputs", format!("inputs: pairs are not supported, expected {EXPECTED}"))),
                },
                Value::String(_) => Err(invalid(
                    "inputs",
                    "inputs: a flat list means one pair in this API, and pairs are not supported; a batch is [[\"text\"], [\"text\"]]",
                )),
                other => Err(wrong("inputs", EXPECTED, &other)),
            })
            .collect::<Result<_, _>>()
            .map(|texts| (texts, true)),
        Some(other) => Err(wrong("inputs", EXPECTED, &other)),
        None => Err(invalid("inputs", format!("inputs is missing, expected {EXPECTED}"))),
    }
}
