//! Arbitrary JSON to every route of `cashtag serve`: only answers that `/openapi.json` has are accepted.

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use serde_json::{Map, Value, json};

use super::serving::{ADMIN, KEY, Serving};

/// What is wrong with a value, by the part of JSON Schema that the document uses; a word that is not known here is an error.
fn fault(document: &Value, schema: &Value, value: &Value) -> Option<String> {
    let rules = schema.as_object().ok_or("no schema").ok()?;
    let is_a = |kind: &Value| match kind.as_str() {
        Some("null") => value.is_null(),
        Some("boolean") => value.is_boolean(),
        Some("integer") => value.is_i64() || value.is_u64(),
        Some("number") => value.is_number(),
        Some("string") => value.is_string(),
        Some("array") => value.is_array(),
        Some("object") => value.is_object(),
        _ => false,
    };
    for (rule, says) in rules {
        let holds = match rule.as_str() {
            "$ref" => {
                let pointer = says.as_str()?.trim_start_matches('#');
                let Some(meant) = document.pointer(pointer) else { return Some(format!("{says} leads nowhere")) };
                if let Some(fault) = fault(document, meant, value) {
                    return Some(fault);
                }
                true
            }
            "type" => says.as_array().map_or_else(|| is_a(says), |kinds| kinds.iter().any(is_a)),
            "const" => says == value,
            "enum" => says.as_array()?.contains(value),
            "oneOf" => says.as_array()?.iter().filter(|one| fault(document, one, value).is_none()).count() == 1,
            "required" => says.as_array()?.iter().all(|name| value.get(name.as_str().unwrap_or_default()).is_some()),
            "properties" => {
                for (name, schema) in says.as_object()? {
                    if let Some(fault) = value.get(name).and_then(|v| fault(document, schema, v)) {
                        return Some(format!("{name}: {fault}"));
                    }
                }
                true
            }
            "additionalProperties" => {
                value.as_object().is_none_or(|o| o.values().all(|v| fault(document, says, v).is_none()))
            }
            "items" => {
                for item in value.as_array().into_iter().flatten() {
                    if let Some(fault) = fault(document, says, item) {
                        return Some(format!("item: {fault}"));
                    }
                }
                true
            }
            "minItems" => value.as_array().is_none_or(|a| a.len() as u64 >= says.as_u64().unwrap_or(0)),
            "maxItems" => value.as_array().is_none_or(|a| a.len() as u64 <= says.as_u64().unwrap_or(0)),
            _ => return Some(format!("a schema has {rule:?}, which this test does not know")),
        };
        if !holds {
            return Some(format!("{rule} {says} does not hold for {value}"));
        }
    }
    None
}

#[test]
fn the_validator_finds_faults() {
    let document = json!({"a": {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}});
    let schema = json!({"$ref": "#/a"});
    assert_eq!(fault(&document, &schema, &json!({"n": 1, "more": true})), None);
    for wrong in [json!({}), json!({"n": "1"}), json!({"n": 1.5}), json!([]), Value::Null] {
        assert!(fault(&document, &schema, &wrong).is_some(), "{wrong}");
    }
    let one = json!({"oneOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "maxItems": 1}]});
    assert!(fault(&document, &one, &json!(["a"])).is_none() && fault(&document, &one, &json!(["a", "b"])).is_some());
    assert!(fault(&document, &json!({"pattern": "x"}), &json!("x")).is_some());
}

/// Arbitrary JSON, with the names and values that mean something often among it.
fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        ".{0,12}".prop_map(Value::from),
        prop_oneof!["tuned", "user", "text", "json_schema", "right"].prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 16, 4, |inner| {
        let name = prop_oneof!["role", "content", "type", "choice", "json_schema", "schema", "enum", ".{0,4}"];
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::vec((name, inner), 0..4)
                .prop_map(|pairs| Value::from(pairs.into_iter().collect::<Map<_, _>>())),
        ]
    })
}

/// Bodies that would be right, for routes that take one.
fn right(path: &str) -> Value {
    match path {
        "/v1/classify" => json!({"input": "a", "model": "tuned", "truncate_prompt_tokens": -1}),
        "/predict" => json!({"inputs": "a", "truncate": true, "raw_scores": false}),
        "/v1/chat/completions" => json!({
            "messages": [{"role": "user", "content": "a"}], "max_tokens": 1, "stop": "x", "response_format": null,
            "stream": false, "stream_options": {"include_usage": true},
        }),
        "/v1/completions" => {
            json!({"prompt": "a", "max_tokens": 1, "temperature": 0, "structured_outputs": {"choice": ["a", "b"]}, "stream": true})
        }
        "/v1/load_lora_adapter" => json!({"lora_name": "x", "lora_path": "none"}),
        "/v1/unload_lora_adapter" => json!({"lora_name": "none"}),
        _ => Value::Null,
    }
}

fn percent_encoded(text: &str) -> String {
    text.bytes().map(|b| format!("%{b:02x}")).collect()
}

/// Every route that the document has, with the text of its answers.
pub(crate) fn only_documented_answers(s: &Serving) {
    let document = s.get("/openapi.json").json();
    let operations = |(path, methods): (&String, &Value)| {
        methods.as_object().unwrap().keys().map(|method| (path.clone(), method.clone())).collect::<Vec<_>>()
    };
    let routes: Vec<(String, String)> = document["paths"].as_object().unwrap().iter().flat_map(operations).collect();
    assert_eq!(routes.len(), 12, "{routes:?}");
    let strategy = (
        prop::sample::select(routes),
        prop::collection::vec(any_json(), 1..3),
        any::<prop::sample::Index>(),
        0..6u8,
        prop_oneof![4 => Just(ADMIN), 1 => Just(KEY), 1 => Just("none")],
    );
    let mut runner =
        TestRunner::new(Config { cases: 240, failure_persistence: None, max_shrink_iters: 20, ..Config::default() });
    let outcome = runner.run(&strategy, |((path, method), values, index, kind, key)| {
        // A body that would be right, in which a field or two are anything; or just anything.
        let mut body = right(&path);
        match body.as_object_mut() {
            Some(fields) if kind > 0 => {
                let names: Vec<String> = fields.keys().cloned().collect();
                for (i, value) in values.iter().enumerate() {
                    fields.insert(names[(index.index(names.len()) + i) % names.len()].clone(), value.clone());
                }
            }
            _ => body = values[0].clone(),
        }
        let target = path.replace("{id}", &percent_encoded(values[0].as_str().unwrap_or("tuned")));
        let answer = s.send(&method.to_uppercase(), &target, key, body.to_string().as_bytes());
        let told = format!("{method} {target} {body}: {} {}", answer.head, answer.body);
        let known = &document["paths"][&path][&method]["responses"][answer.status.to_string()];
        prop_assert!(known.is_object(), "not documented: {}", told);
        prop_assert!(answer.status < 500, "{}", told);
        let kind = answer.header("content-type").unwrap_or_default().split(';').next().unwrap_or_default();
        let content = &known["content"][kind];
        prop_assert!(content.is_object(), "{} is not documented: {}", kind, told);
        prop_assert_eq!(answer.status == 429, answer.header("retry-after").is_some(), "{}", told);
        let check = |schema: &Value, text: &str| {
            let Ok(value) = serde_json::from_str(text) else { return Some("no JSON".to_owned()) };
            fault(&document, schema, &value)
        };
        match kind {
            "application/json" => prop_assert_eq!(check(&content["schema"], &answer.body), None, "{}", told),
            "text/event-stream" => {
                let chunk = json!({"$ref": "#/components/schemas/Chunk"});
                // Transfer-encoding: chunked has its sizes between the events.
                let events: Vec<&str> = answer.body.lines().filter_map(|l| l.strip_prefix("data: ")).collect();
                prop_assert_eq!(events.last(), Some(&"[DONE]"), "{}", told);
                for event in &events[..events.len() - 1] {
                    prop_assert_eq!(check(&chunk, event), None, "{}", told);
                }
            }
            _ => {}
        }
        Ok(())
    });
    outcome.unwrap_or_else(|e| panic!("{e}"));
}
