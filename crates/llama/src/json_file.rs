//! JSON files beside the weights, read with a bound on what they may become in memory.
//!
//! A parsed object takes up to sixty times its text (`{"a":0}`), so the size of a file alone bounds little: the values are
//! counted while they are built.

use std::cell::Cell;
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde::de::{self, DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// Largest companion file. `tokenizer_config.json` with 256 added tokens has 50 kB.
const MAX_FILE: u64 = 8 << 20;
/// Values of one file; an added token has eight.
const MAX_VALUES: u32 = 100_000;

/// Reads a file of at most `limit` bytes.
pub(crate) fn read_limited(path: &Path, limit: u64) -> Result<Vec<u8>> {
    let file = File::open(path).map_err(Error::io(path))?;
    let mut bytes = Vec::new();
    file.take(limit + 1).read_to_end(&mut bytes).map_err(Error::io(path))?;
    if bytes.len() as u64 > limit {
        return Err(Error::file(path, format!("larger than {} MiB, not believed", limit >> 20)));
    }
    Ok(bytes)
}

/// Reads a JSON file if it exists.
pub(crate) fn read_companion(path: &Path) -> Result<Option<Value>> {
    if !path.is_file() {
        return Ok(None);
    }
    let bytes = read_limited(path, MAX_FILE)?;
    let malformed = |error: serde_json::Error| Error::file(path, error.to_string());
    let mut deserializer = serde_json::Deserializer::from_slice(&bytes);
    let value = bounded(&mut deserializer).map_err(malformed)?;
    deserializer.end().map_err(malformed)?;
    Ok(Some(value))
}

/// Any JSON value of at most [`MAX_VALUES`] values; for `#[serde(deserialize_with)]`.
pub(crate) fn bounded<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Value, D::Error> {
    let left = Cell::new(MAX_VALUES);
    Counted { left: &left }.deserialize(deserializer)
}

/// The string of a token in `tokenizer_config.json`: bare, or the `content` of an object.
pub(crate) fn token_text(value: &Value) -> Option<&str> {
    value.as_str().or_else(|| value.get("content")?.as_str())
}

#[derive(Clone, Copy)]
struct Counted<'a> {
    left: &'a Cell<u32>,
}

impl<'de> DeserializeSeed<'de> for Counted<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        match self.left.get().checked_sub(1) {
            Some(left) => self.left.set(left),
            None => return Err(de::Error::custom(format!("more than {MAX_VALUES} values, not believed"))),
        }
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Counted<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut all = Vec::new();
        while let Some(value) = seq.next_element_seed(self)? {
            all.push(value);
        }
        Ok(Value::Array(all))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut all = Map::new();
        while let Some(key) = map.next_key::<String>()? {
            let value = map.next_value_seed(self)?;
            all.insert(key, value);
        }
        Ok(Value::Object(all))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> serde_json::Result<Value> {
        bounded(&mut serde_json::Deserializer::from_str(text))
    }

    #[test]
    fn values_are_what_serde_json_makes_of_them() {
        let text = r#"{"b":[1,-2,2.5,true,null,"x\u00e9"],"a":{"c":{}},"n":18446744073709551615}"#;
        assert_eq!(parse(text).unwrap(), serde_json::from_str::<Value>(text).unwrap());
        assert!(parse("{").is_err());
    }

    #[test]
    fn floods_end() {
        let flood = format!("[{}0]", "{},".repeat(MAX_VALUES as usize));
        let error = parse(&flood).unwrap_err().to_string();
        assert!(error.starts_with("more than 100000 values, not believed at line 1"), "{error}");
    }
}
