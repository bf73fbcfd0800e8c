//! Values as they stand in a recipe or behind a flag, and the types that settings have.
//!
//! A [`Raw`] is what was written; a [`Setting`] is a type that can be read from one and written back. Reading what was
//! written gives the same value: the saved configuration of a run is a recipe for the same run.

use std::fmt;
use std::path::PathBuf;

/// A value without a type yet.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Raw {
    Text(String),
    Integer(i128),
    Float(f64),
    Boolean(bool),
    List(Vec<Raw>),
    /// In the order of the file: the order of labels has a meaning.
    Table(Vec<(String, Raw)>),
}

impl fmt::Display for Raw {
    /// As TOML.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Raw::Text(text) => write_string(f, text),
            Raw::Integer(v) => write!(f, "{v}"),
            Raw::Float(v) if *v == 0.0 || (1e-3..1e9).contains(&v.abs()) => write!(f, "{v:?}"),
            Raw::Float(v) if v.is_finite() => write!(f, "{v:e}"),
            Raw::Float(v) => write!(f, "{v}"),
            Raw::Boolean(v) => write!(f, "{v}"),
            Raw::List(values) => {
                f.write_str("[")?;
                for (i, value) in values.iter().enumerate() {
                    write!(f, "{}{value}", if i > 0 { ", " } else { "" })?;
                }
                f.write_str("]")
            }
            Raw::Table(entries) => {
                f.write_str("{")?;
                for (i, (key, value)) in entries.iter().enumerate() {
                    f.write_str(if i > 0 { ", " } else { " " })?;
                    let bare = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
                    if !key.is_empty() && key.chars().all(bare) {
                        f.write_str(key)?
                    } else {
                        write_string(f, key)?
                    }
                    write!(f, " = {value}")?;
                }
                f.write_str(" }")
            }
        }
    }
}

fn write_string(f: &mut fmt::Formatter<'_>, text: &str) -> fmt::Result {
    f.write_str("\"")?;
    for c in text.chars() {
        match c {
            '"' => f.write_str("\\\"")?,
            '\\' => f.write_str("\\\\")?,
            '\n' => f.write_str("\\n")?,
            '\t' => f.write_str("\\t")?,
            '\r' => f.write_str("\\r")?,
            c if (c as u32) < 0x20 || c == '\u{7f}' => write!(f, "\\u{:04X}", c as u32)?,
            c => write!(f, "{c}")?,
        }
    }
    f.write_str("\"")
}

/// What a flag's text means where the type does not say it: `true`, `3`, `2e-4`, `["a", "b"]`, else text.
pub(crate) fn guess(text: &str) -> Raw {
    let trimmed = text.trim();
    if trimmed.starts_with(['[', '{'])
        && let Some(value) = super::file::parse_value(trimmed)
    {
        return value;
    }
    match trimmed.to_ascii_lowercase().as_str() {
        "true" => return Raw::Boolean(true),
        "false" => return Raw::Boolean(false),
        _ => {}
    }
    if let Ok(v) = trimmed.parse() {
        return Raw::Integer(v);
    }
    match trimmed.parse::<f64>() {
        Ok(v) if v.is_finite() => Raw::Float(v),
        _ => Raw::Text(text.to_string()),
    }
}

/// `a,b,c` and `a=b,c=d` as a list and a table; anything else as [`guess`] has it.
pub(crate) fn guess_list(text: &str) -> Raw {
    let trimmed = text.trim();
    if trimmed.is_empty() || trimmed.starts_with(['[', '{']) {
        return guess(text);
    }
    let parts: Vec<&str> = trimmed.split(',').map(str::trim).filter(|p| !p.is_empty()).collect();
    let pairs: Option<Vec<_>> = parts.iter().map(|p| p.split_once('=')).collect();
    match pairs {
        Some(pairs) if !pairs.is_empty() => {
            Raw::Table(pairs.into_iter().map(|(k, v)| (k.trim().to_string(), guess(v.trim()))).collect())
        }
        _ => Raw::List(parts.into_iter().map(guess).collect()),
    }
}

/// A type that a key of the configuration can have.
pub(crate) trait Setting: Sized {
    /// What the help shows in the place of the value.
    const PLACEHOLDER: &'static str;
    const IS_BOOL: bool = false;

    /// What is allowed, to stand after "expected".
    fn allowed() -> String;

    fn from_raw(raw: &Raw) -> Option<Self>;

    fn to_raw(&self) -> Raw;

    /// What the text behind a flag means for this type.
    fn read(text: &str) -> Raw {
        guess(text)
    }
}

impl Setting for String {
    const PLACEHOLDER: &'static str = "TEXT";

    fn allowed() -> String {
        "a text".into()
    }
    fn from_raw(raw: &Raw) -> Option<Self> {
        if let Raw::Text(text) = raw { Some(text.clone()) } else { None }
    }
    fn to_raw(&self) -> Raw {
        Raw::Text(self.clone())
    }
    fn read(text: &str) -> Raw {
        Raw::Text(text.to_string())
    }
}

impl Setting for PathBuf {
    const PLACEHOLDER: &'static str = "PATH";

    fn allowed() -> String {
        "a path".into()
    }
    fn from_raw(raw: &Raw) -> Option<Self> {
        String::from_raw(raw).filter(|s| !s.is_empty()).map(PathBuf::from)
    }
    fn to_raw(&self) -> Raw {
        Raw::Text(self.to_string_lossy().into_owned())
    }
    fn read(text: &str) -> Raw {
        Raw::Text(text.to_string())
    }
}

impl Setting for bool {
    const PLACEHOLDER: &'static str = "true|false";
    const IS_BOOL: bool = true;

    fn allowed() -> String {
        "true or false".into()
    }
    fn from_raw(raw: &Raw) -> Option<Self> {
        if let Raw::Boolean(v) = raw { Some(*v) } else { None }
    }
    fn to_raw(&self) -> Raw {
        Raw::Boolean(*self)
    }
}

impl Setting for f64 {
    const PLACEHOLDER: &'static str = "NUMBER";

    fn allowed() -> String {
        "a number".into()
    }
    fn from_raw(raw: &Raw) -> Option<Self> {
        match raw {
            Raw::Float(v) if v.is_finite() => Some(*v),
            // Beyond 2^53 an integer would not come back as it was written.
            Raw::Integer(v) if v.unsigned_abs() <= 1 << 53 => Some(*v as f64),
            _ => None,
        }
    }
    fn to_raw(&self) -> Raw {
        Raw::Float(*self)
    }
}

macro_rules! integers {
    ($($ty:ty => $allowed:literal),*) => {$(
        impl Setting for $ty {
            const PLACEHOLDER: &'static str = "N";

            fn allowed() -> String {
                $allowed.into()
            }
            fn from_raw(raw: &Raw) -> Option<Self> {
                if let Raw::Integer(v) = raw { (*v).try_into().ok() } else { None }
            }
            fn to_raw(&self) -> Raw {
                Raw::Integer(*self as i128)
            }
        }
    )*};
}
integers!(usize => "a whole number from 0", u64 => "a whole number from 0", i64 => "a whole number");

/// `none` stands for no value: TOML has no other word for it.
impl<T: Setting> Setting for Option<T> {
    const PLACEHOLDER: &'static str = T::PLACEHOLDER;
    const IS_BOOL: bool = T::IS_BOOL;

    fn allowed() -> String {
        format!("{}, or none", T::allowed())
    }
    fn from_raw(raw: &Raw) -> Option<Self> {
        if *raw == Raw::Text("none".into()) { Some(None) } else { T::from_raw(raw).map(Some) }
    }
    fn to_raw(&self) -> Raw {
        self.as_ref().map_or_else(|| Raw::Text("none".into()), T::to_raw)
    }
    fn read(text: &str) -> Raw {
        if text.trim() == "none" { Raw::Text("none".into()) } else { T::read(text) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_written_so_that_a_reader_likes_them() {
        let shown = |v: f64| Raw::Float(v).to_string();
        assert_eq!(shown(2e-4), "2e-4");
        assert_eq!(shown(0.1), "0.1");
        assert_eq!(shown(3.0), "3.0");
        assert_eq!(shown(1e-8), "1e-8");
        assert_eq!(shown(0.0), "0.0");
        assert_eq!(shown(1e12), "1e12");
    }

    #[test]
    fn the_text_of_a_flag() {
        assert_eq!(guess("2e-4"), Raw::Float(2e-4));
        assert_eq!(guess("-1"), Raw::Integer(-1));
        assert_eq!(guess("False"), Raw::Boolean(false));
        assert_eq!(guess("nan"), Raw::Text("nan".into()));
        assert_eq!(guess("[1, 2]"), Raw::List(vec![Raw::Integer(1), Raw::Integer(2)]));
        assert_eq!(guess_list("a, b"), Raw::List(vec![Raw::Text("a".into()), Raw::Text("b".into())]));
        assert_eq!(guess_list("a=b"), Raw::Table(vec![("a".into(), Raw::Text("b".into()))]));
        assert_eq!(String::read("3"), Raw::Text("3".into()));
    }

    #[test]
    fn none_is_a_word() {
        assert_eq!(Option::<usize>::from_raw(&Raw::Text("none".into())), Some(None));
        assert_eq!(Option::<usize>::from_raw(&Raw::Integer(3)), Some(Some(3)));
        assert_eq!(Option::<usize>::from_raw(&Raw::Integer(-3)), None);
        assert_eq!(None::<usize>.to_raw().to_string(), "\"none\"");
    }
}
