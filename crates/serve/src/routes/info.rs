//! What is served: `/v1/models`, `/info`.

use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State as Shared};
use axum::http::StatusCode;
use axum::response::Response;
use cashtag_http::Problem;
use cashtag_http::problem::json_response;
use serde_json::{Map, Value, json};

use super::Service;
use crate::engine::{Failure, Served};

fn card(served: &Served) -> Value {
    json!({
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "cashtag",
        // The name, not the directory: where files lie is nobody's business.
        "root": served.parent.as_deref().unwrap_or(&served.name),
        "parent": served.parent,
        "max_model_len": served.max_seq_length(),
        "labels": served.labels,
    })
}

pub(super) async fn models(Shared(service): Shared<Service>) -> Result<Response, Problem> {
    service.engine.check_ready()?;
    let data: Vec<Value> = service.engine.models().iter().map(|m| card(m)).collect();
    Ok(json_response(StatusCode::OK, &json!({"object": "list", "data": data})))
}

pub(super) async fn model(
    Shared(service): Shared<Service>,
    id: Result<Path<String>, PathRejection>,
) -> Result<Response, Problem> {
    // What is no UTF-8 is nobody's name.
    let id = id.map(|Path(id)| id).unwrap_or_default();
    Ok(json_response(StatusCode::OK, &card(&*service.engine.find(Some(&id))?)))
}

/// text-embeddings-inference's fields.
pub(super) async fn info(Shared(service): Shared<Service>) -> Result<Response, Problem> {
    let served = service.engine.find(None)?;
    let base = service.engine.inner.base.get().ok_or(Failure::Loading)?;
    let config = service.engine.config();
    let names = || served.labels.iter().enumerate();
    let id2label: Map<String, Value> = names().map(|(i, l)| (i.to_string(), json!(l))).collect();
    let label2id: Map<String, Value> = names().map(|(i, l)| (l.clone(), json!(i))).collect();
    Ok(json_response(
        StatusCode::OK,
        &json!({
            "model_id": base.name,
            "model_sha": null,
            "model_dtype": base.dtype,
            "served_model_name": served.name,
            "model_type": {"classifier": {"id2label": id2label, "label2id": label2id}},
            "max_concurrent_requests": config.max_concurrent_requests,
            "max_input_length": served.max_seq_length(),
            "max_batch_tokens": base.max_batch_tokens,
            "max_batch_requests": null,
            "max_client_batch_size": config.max_client_batch_size,
            "auto_truncate": config.auto_truncate,
            "tokenization_workers": 1,
            "max_model_len": base.max_model_len,
            "device": base.device,
            "version": env!("CARGO_PKG_VERSION"),
            "sha": null,
            "docker_label": null,
        }),
    ))
}
