//! `POST /v1/classify`: the model that scores the stream answers a text of one's own.

use axum::body::Bytes;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use cashtag_http::Problem;
use serde_json::{Map, Value, json};

use super::{Api, bad, ok};
use crate::scorer::best;
use crate::state::ClassifyError;

/// Texts in one request: they wait for one another.
const MAX_TEXTS: usize = 32;
const MAX_TEXT: usize = 10_000;

pub(super) async fn classify(State(api): State<Api>, body: Bytes) -> Result<Response, Problem> {
    let texts = texts(&body)?;
    let answers = match api.shared.classify(texts.clone()).await {
        Ok(answers) => answers,
        Err(ClassifyError::Busy) => {
            let message = "the model is busy with other questions";
            return Err(Problem::new(StatusCode::TOO_MANY_REQUESTS, "overloaded", message).retry_after(1));
        }
        Err(ClassifyError::Failed(reason)) => {
            return Err(Problem::new(StatusCode::UNPROCESSABLE_ENTITY, "not_classified", reason));
        }
    };
    let model = &api.shared.model;
    let data: Vec<Value> = texts
        .iter()
        .zip(&answers)
        .enumerate()
        .map(|(index, (text, p))| {
            let top = best(p);
            let named: Map<String, Value> = model.labels.iter().zip(p).map(|(l, p)| (l.clone(), json!(p))).collect();
            json!({
                "index": index, "label": model.labels.get(top), "probs": p, "num_classes": p.len(), "probabilities": named,
                "confidence": p.get(top), "tickers": api.shared.tickers.find(text),
            })
        })
        .collect();
    Ok(ok(&json!({"object": "list", "model": model.adapter.as_ref().unwrap_or(&model.name), "data": data})))
}

fn texts(body: &[u8]) -> Result<Vec<String>, Problem> {
    let value: Value =
        serde_json::from_slice(body).map_err(|e| bad("bad_json", format!("the body is no JSON: {e}")))?;
    let texts = match &value["input"] {
        Value::String(text) => vec![text.clone()],
        Value::Array(all) => {
            let texts: Option<Vec<String>> = all.iter().map(|t| t.as_str().map(str::to_owned)).collect();
            texts.ok_or_else(|| bad("bad_input", "input is a text or an array of texts").param("input"))?
        }
        _ => return Err(bad("bad_input", "input is a text or an array of texts").param("input")),
    };
    if texts.is_empty() || texts.len() > MAX_TEXTS {
        return Err(bad(
            "bad_input",
            format!("1 to {MAX_TEXTS} texts at a time; the service (cashtag serve) takes more"),
        )
        .param("input"));
    }
    if texts.iter().any(|t| t.trim().is_empty() || t.len() > MAX_TEXT) {
        return Err(bad("bad_input", format!("a text has 1 to {MAX_TEXT} bytes")).param("input"));
    }
    Ok(texts)
}
