//! The description of the routes, as `/openapi.json` answers it. A test asks every route and takes only what stands here.

use serde_json::{Map, Value, json};

fn reference(name: &str) -> Value {
    json!({"$ref": format!("#/components/schemas/{name}")})
}

/// An operation with its answers: the good one, and the errors that it may have.
fn operation(what: &str, request: Option<&str>, (kind, answer): (&str, Value), errors: &[u16], error: &str) -> Value {
    let mut responses = Map::new();
    responses.insert("200".into(), json!({"description": "The answer.", "content": {kind: {"schema": answer}}}));
    for status in EVERYWHERE.iter().chain(errors) {
        let description = match status {
            400 => "The body is no valid JSON, or cannot be read.",
            401 => "No valid API key.",
            403 => "The key may not do this, or the page of another origin may not ask.",
            404 => "There is no such model or adapter.",
            408 => "The body did not arrive in time.",
            409 => "The name is taken, there are too many, or it must stay.",
            413 => "The body, or the number of texts, is too large.",
            421 => "Without keys the service answers to localhost only.",
            422 => "A field is wrong, or not supported.",
            429 => {
                "No room, or no answer within the deadline to be expected: try again after the seconds of `retry-after`."
            }
            500 => "The model could not be run, or a bug.",
            503 => "Not ready yet, or ending.",
            _ => "No answer within the deadline.",
        };
        let content = json!({"application/json": {"schema": reference(error)}});
        responses.insert(status.to_string(), json!({"description": description, "content": content}));
    }
    let mut operation = json!({"summary": what, "responses": responses});
    if let Some(request) = request {
        operation["requestBody"] =
            json!({"required": true, "content": {"application/json": {"schema": reference(request)}}});
    }
    operation
}

/// The good answer may come as server-sent events too; each of them is a `Chunk`, or `[DONE]`, or at last an `Error`.
fn streamed(mut operation: Value) -> Value {
    operation["responses"]["200"]["content"]["text/event-stream"] = json!({"schema": {"type": "string"}});
    operation
}

/// A body is read before a route is asked, whichever it is.
const EVERYWHERE: &[u16] = &[400, 408, 413, 421, 429, 500];
const ASK: &[u16] = &[401, 403, 404, 422, 503, 504];
const LOOK: &[u16] = &[401, 503];
const CHANGE: &[u16] = &[401, 403, 404, 409, 422, 503];

/// The document.
pub fn document() -> Value {
    let json = |schema: &str| ("application/json", reference(schema));
    let text = |kind| (kind, json!({"type": "string"}));
    json!({
        "openapi": "3.1.0",
        "info": {"title": "cashtag", "version": env!("CARGO_PKG_VERSION"), "description": "Classification of texts about stocks, with a probability for every label."},
        "components": {
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            "schemas": schemas(),
        },
        "security": [{"key": []}, {}],
        "paths": {
            "/v1/classify": {"post": operation("Classify texts (vLLM's shape)", Some("ClassifyRequest"), json("ClassifyResponse"), ASK, "Error")},
            "/predict": {"post": operation("Classify texts (text-embeddings-inference's shape)", Some("PredictRequest"), json("PredictResponse"), ASK, "PredictError")},
            "/v1/chat/completions": {"post": streamed(operation("Answer a conversation (OpenAI's shape; server-sent events with stream)", Some("ChatRequest"), json("Completion"), ASK, "Error"))},
            "/v1/completions": {"post": streamed(operation("Go on with a text (OpenAI's shape; server-sent events with stream)", Some("CompletionRequest"), json("Completion"), ASK, "Error"))},
            "/v1/models": {"get": operation("What is served", None, json("Models"), LOOK, "Error")},
            "/v1/models/{id}": {"get": operation("One of them", None, json("Model"), &[401, 404, 503], "Error")},
            "/v1/load_lora_adapter": {"post": operation("Load an adapter (role admin)", Some("LoadRequest"), json("Changed"), CHANGE, "Error")},
            "/v1/unload_lora_adapter": {"post": operation("Unload an adapter (role admin)", Some("UnloadRequest"), json("Changed"), CHANGE, "Error")},
            "/health": {"get": operation("Whether it answers", None, json("Health"), &[503], "Error")},
            "/metrics": {"get": operation("Figures for Prometheus", None, text("text/plain"), &[401], "Error")},
            "/info": {"get": operation("Model and limits", None, json("Info"), LOOK, "Error")},
            "/openapi.json": {"get": operation("This document", None, ("application/json", json!({"type": "object"})), &[401], "Error")},
        },
    })
}

fn object(properties: Value, required: &[&str]) -> Value {
    json!({"type": "object", "properties": properties, "required": required})
}

fn schemas() -> Value {
    let (string, number, whole, boolean) =
        (json!({"type": "string"}), json!({"type": "number"}), json!({"type": "integer"}), json!({"type": "boolean"}));
    let strings = json!({"type": "array", "items": string});
    let one_or_more = json!({"oneOf": [string, strings]});
    let usage = object(
        json!({"prompt_tokens": whole, "completion_tokens": whole, "total_tokens": whole}),
        &["prompt_tokens", "total_tokens"],
    );
    let sampling = json!({
        "model": string, "max_tokens": whole, "max_completion_tokens": whole, "temperature": number, "top_p": number, "top_k": whole,
        "seed": whole, "stop": one_or_more, "stream": boolean, "stream_options": {"type": "object"},
        "response_format": {"type": "object"}, "structured_outputs": object(json!({"choice": strings}), &["choice"]),
    });
    let with = |name: &str, value: Value| {
        let mut all = sampling.clone();
        all[name] = value;
        object(all, &[name])
    };
    let message = object(
        json!({"role": {"enum": ["system", "developer", "user", "assistant"]}, "content": {}}),
        &["role", "content"],
    );
    let datum = object(
        json!({
            "index": whole, "label": string, "probs": {"type": "array", "items": number}, "num_classes": whole,
            "probabilities": {"type": "object", "additionalProperties": number}, "confidence": number,
            "tickers": {"type": "array", "items": {"type": "object"}},
        }),
        &["index", "label", "probs", "num_classes", "probabilities", "confidence"],
    );
    let scores =
        json!({"type": "array", "items": object(json!({"score": number, "label": string}), &["score", "label"])});
    let model = object(
        json!({"id": string, "object": string, "created": whole, "owned_by": string, "parent": {"type": ["string", "null"]}, "max_model_len": whole, "labels": strings}),
        &["id", "object", "created", "owned_by"],
    );
    let error = object(
        json!({"message": string, "type": string, "param": {"type": ["string", "null"]}, "code": string}),
        &["message", "type", "code"],
    );
    json!({
        "ClassifyRequest": object(json!({"model": string, "input": one_or_more, "truncate_prompt_tokens": {"const": -1}}), &["input"]),
        "ClassifyResponse": object(json!({"id": string, "object": string, "created": whole, "model": string, "data": {"type": "array", "items": datum}, "usage": usage}), &["id", "object", "created", "model", "data", "usage"]),
        "PredictRequest": object(json!({"inputs": {"oneOf": [string, {"type": "array", "items": {"type": "array", "items": string, "minItems": 1, "maxItems": 1}}]}, "truncate": boolean, "raw_scores": boolean}), &["inputs"]),
        "PredictResponse": {"oneOf": [scores, {"type": "array", "items": scores}]},
        "PredictError": object(json!({"error": string, "error_type": {"enum": ["Unhealthy", "Backend", "Overloaded", "Validation"]}}), &["error", "error_type"]),
        "ChatRequest": with("messages", json!({"type": "array", "items": message})),
        "CompletionRequest": with("prompt", string.clone()),
        "Completion": object(json!({"id": string, "object": string, "created": whole, "model": string, "choices": {"type": "array", "items": {"type": "object"}}, "usage": usage}), &["id", "object", "created", "model", "choices", "usage"]),
        "Chunk": object(json!({"id": string, "object": string, "created": whole, "model": string, "choices": {"type": "array", "items": {"type": "object"}}, "usage": usage}), &["id", "object", "created", "model", "choices"]),
        "Model": model,
        "Models": object(json!({"object": string, "data": {"type": "array", "items": reference("Model")}}), &["object", "data"]),
        "LoadRequest": object(json!({"lora_name": string, "lora_path": string}), &["lora_name", "lora_path"]),
        "UnloadRequest": object(json!({"lora_name": string}), &["lora_name"]),
        "Changed": object(json!({"status": {"enum": ["loaded", "unloaded"]}, "lora_name": string}), &["status", "lora_name"]),
        "Health": object(json!({"status": {"const": "ok"}}), &["status"]),
        "Info": object(json!({"model_id": string, "served_model_name": string, "model_type": {"type": "object"}, "max_input_length": whole, "version": string}), &["model_id", "served_model_name", "model_type", "max_input_length", "version"]),
        "Error": object(json!({"error": error}), &["error"]),
    })
}
