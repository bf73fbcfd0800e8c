//! Answers that must be one of a list: `structured_outputs.choice`, and JSON schemas that come down to one.

use cashtag_http::Problem;
use serde_json::{Map, Value};

use super::fields::{Fields, invalid, wrong};

/// Most answers to choose among, and bytes of all of them.
const MAX_CHOICES: usize = 64;
const MAX_BYTES: usize = 4096;

/// The texts that the answer must be one of; `None` where it is free.
pub(super) fn choices(fields: &Fields) -> Result<Option<Vec<String>>, Problem> {
    let found = match (fields.get("structured_outputs"), fields.get("response_format")) {
        (Some(outputs), _) => {
            let field = "structured_outputs";
            let outputs = outputs.as_object().ok_or_else(|| wrong(field, "an object", outputs))?;
            match outputs.get("choice") {
                Some(Value::Array(list)) => list
                    .iter()
                    .map(|c| c.as_str().map(str::to_owned).ok_or_else(|| wrong(field, "choice: a list of texts", c)))
                    .collect::<Result<Vec<_>, _>>()?,
                _ => return Err(invalid(field, "structured_outputs: only choice, a list of texts, is supported")),
            }
        }
        (None, Some(format)) => match format.get("type").and_then(Value::as_str) {
            Some("text") => return Ok(None),
            Some("json_schema") => {
                let schema = format.pointer("/json_schema/schema").or(format.pointer("/schema"));
                schema.and_then(texts_of).ok_or_else(|| {
                    invalid(
                        "response_format",
                        "response_format: only schemas with a list of answers are supported: an enum of strings, or an object whose required properties are such",
                    )
                })?
            }
            _ => return Err(invalid("response_format", "response_format: expected the type text or json_schema")),
        },
        (None, None) => return Ok(None),
    };
    let is_empty = found.is_empty() || found.iter().any(String::is_empty);
    if is_empty || found.len() > MAX_CHOICES || found.iter().map(String::len).sum::<usize>() > MAX_BYTES {
        let what = format!("expected 1 to {MAX_CHOICES} answers with a text each, {MAX_BYTES} bytes in all");
        return Err(invalid("structured_outputs", what));
    }
    Ok(Some(found))
}

fn strings(schema: &Value) -> Option<Vec<&str>> {
    if let Some(one) = schema.get("const") {
        return one.as_str().map(|s| vec![s]);
    }
    schema.get("enum")?.as_array()?.iter().map(Value::as_str).collect()
}

/// Every JSON text that a schema allows, where they can be counted.
fn texts_of(schema: &Value) -> Option<Vec<String>> {
    if let Some(all) = strings(schema) {
        return Some(all.into_iter().map(|s| Value::from(s).to_string()).collect());
    }
    let properties = schema.get("properties")?.as_object()?;
    let mut objects = vec![Map::new()];
    for (name, property) in properties {
        let values = strings(property)?;
        if objects.len().saturating_mul(values.len()) > MAX_CHOICES {
            return None;
        }
        objects = objects
            .iter()
            .flat_map(|object| {
                values.iter().map(move |value| {
                    let mut object = object.clone();
                    object.insert(name.clone(), Value::from(*value));
                    object
                })
            })
            .collect();
    }
    (!properties.is_empty()).then(|| objects.into_iter().map(|o| Value::from(o).to_string()).collect())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn of(body: Value) -> Result<Option<Vec<String>>, String> {
        choices(&Fields::parse(body.to_string().as_bytes()).unwrap()).map_err(|p| p.message.into_owned())
    }

    #[test]
    fn lists_of_answers() {
        assert_eq!(of(json!({})), Ok(None));
        assert_eq!(of(json!({"response_format": {"type": "text"}})), Ok(None));
        assert_eq!(of(json!({"structured_outputs": {"choice": ["a", "b"]}})), Ok(Some(vec!["a".into(), "b".into()])));
        let schema = |schema: Value| json!({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}});
        assert_eq!(of(schema(json!({"enum": ["a"]}))), Ok(Some(vec!["\"a\"".into()])));
        let two = json!({"type": "object", "properties": {"s": {"enum": ["a", "b"]}, "t": {"const": "c"}}, "required": ["s", "t"]});
        assert_eq!(of(schema(two)), Ok(Some(vec![r#"{"s":"a","t":"c"}"#.into(), r#"{"s":"b","t":"c"}"#.into()])));
        for refused in [
            schema(json!({"type": "object", "properties": {"s": {"type": "string"}}})),
            schema(json!({})),
            json!({"response_format": {"type": "json_object"}}),
            json!({"response_format": 3}),
            json!({"structured_outputs": {"regex": "a+"}}),
            json!({"structured_outputs": {"choice": []}}),
            json!({"structured_outputs": {"choice": [""]}}),
            json!({"structured_outputs": {"choice": vec!["x"; 65]}}),
            json!({"structured_outputs": []}),
        ] {
            assert!(of(refused.clone()).is_err(), "{refused}");
        }
    }
}
