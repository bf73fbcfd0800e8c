//! Reading a request's fields, with errors that name the field, what was expected and what was found.

use axum::http::StatusCode;
use cashtag_http::Problem;
use serde_json::{Map, Value};

pub(crate) struct Fields(Map<String, Value>);

pub(crate) fn wrong(field: &str, expected: &str, found: &Value) -> Problem {
    let kind = match found {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    };
    invalid(field, format!("{field}: expected {expected}, found {kind}"))
}

pub(crate) fn invalid(field: &str, message: impl Into<String>) -> Problem {
    Problem::new(StatusCode::UNPROCESSABLE_ENTITY, "invalid_request", message.into()).param(field.to_owned())
}

impl Fields {
    /// # Errors
    /// 400 for what is no JSON (also for what is nested too deeply), 422 for JSON that is no object.
    pub(crate) fn parse(body: &[u8]) -> Result<Self, Problem> {
        // serde_json gives up at 128 levels, so depth cannot exhaust the stack.
        match serde_json::from_slice(body) {
            Ok(Value::Object(map)) => Ok(Self(map)),
            Ok(other) => Err(wrong("body", "an object", &other)),
            Err(e) => {
                let what =
                    format!("the body is no valid JSON: {} at line {}, column {}", category(&e), e.line(), e.column());
                Err(Problem::new(StatusCode::BAD_REQUEST, "invalid_json", what))
            }
        }
    }

    /// The value of a field; null is as good as none.
    pub(crate) fn get(&self, name: &str) -> Option<&Value> {
        self.0.get(name).filter(|v| !v.is_null())
    }

    pub(crate) fn take(&mut self, name: &str) -> Option<Value> {
        self.0.remove(name).filter(|v| !v.is_null())
    }

    pub(crate) fn string(&self, name: &str) -> Result<Option<&str>, Problem> {
        self.get(name).map(|v| v.as_str().ok_or_else(|| wrong(name, "a string", v))).transpose()
    }

    pub(crate) fn boolean(&self, name: &str) -> Result<Option<bool>, Problem> {
        self.get(name).map(|v| v.as_bool().ok_or_else(|| wrong(name, "true or false", v))).transpose()
    }

    pub(crate) fn whole(&self, name: &str, least: u64) -> Result<Option<u64>, Problem> {
        let read = |v: &Value| match v.as_u64() {
            Some(n) if n >= least => Ok(n),
            Some(n) => Err(invalid(name, format!("{name}: expected a whole number from {least}, found {n}"))),
            None => Err(wrong(name, &format!("a whole number from {least}"), v)),
        };
        self.get(name).map(read).transpose()
    }

    pub(crate) fn number(&self, name: &str, least: f64, most: f64) -> Result<Option<f64>, Problem> {
        let read = |v: &Value| match v.as_f64() {
            Some(x) if (least..=most).contains(&x) => Ok(x),
            Some(x) => Err(invalid(name, format!("{name}: expected a number from {least} to {most}, found {x}"))),
            None => Err(wrong(name, &format!("a number from {least} to {most}"), v)),
        };
        self.get(name).map(read).transpose()
    }

    /// Refuses a field that would change the answer, unless it says what is done anyway.
    pub(crate) fn only(&self, name: &str, allowed: &[Value]) -> Result<(), Problem> {
        match self.get(name) {
            Some(value)
                if !allowed.contains(value)
                    && value.as_f64().is_none_or(|x| !allowed.iter().any(|a| a.as_f64() == Some(x))) =>
            {
                Err(invalid(name, format!("{name} is not supported by this service")))
            }
            _ => Ok(()),
        }
    }
}

fn category(error: &serde_json::Error) -> &'static str {
    match error.classify() {
        serde_json::error::Category::Eof => "it ends too early",
        serde_json::error::Category::Syntax if error.to_string().contains("recursion") => "it is nested too deeply",
        _ => "it is malformed",
    }
}
