//! Integration tests of the readers: real files against what the reference tools say about them.
//!
//! Fixtures lie in `tests/fixtures`, each beside the script that makes it. The real model is found through
//! `CASHTAG_TEST_MODEL` or in the product's cache; tests that need it fail with a hint where it is missing.

mod checkpoint;
mod dequantize;
mod generate;
mod hostile;
mod templates;
mod tokenizer;

use std::path::{Path, PathBuf};

use serde_json::Value;

const MODEL: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

fn golden(name: &str) -> Value {
    let path = fixture(name);
    let text = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_slice(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The base model's GGUF.
fn model() -> PathBuf {
    let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let path = match variable("CASHTAG_TEST_MODEL") {
        Some(path) => path,
        None => variable("CASHTAG_CACHE")
            .or_else(|| variable("XDG_CACHE_HOME").map(|cache| cache.join("cashtag")))
            .or_else(|| variable("HOME").map(|home| home.join(".cache/cashtag")))
            .unwrap_or_default()
            .join(MODEL),
    };
    assert!(
        path.is_file(),
        "{} is not here\n  hint: `make test` fetches it, or set CASHTAG_TEST_MODEL to where {MODEL} lies",
        path.display()
    );
    path
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().expect("an array of ids").iter().map(|id| id.as_u64().expect("an id") as u32).collect()
}

fn text(value: &Value) -> &str {
    value.as_str().expect("a text")
}

fn list(value: &Value) -> &[Value] {
    value.as_array().expect("an array")
}
