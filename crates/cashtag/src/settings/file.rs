//! Reading a recipe: TOML with the line of every value, so that a message can name it.

use std::path::Path;

use toml::de::{DeTable, DeValue};

use super::error::SettingsError;
use super::value::Raw;

/// A recipe is a page of text; anything larger is something else.
const MAX_BYTES: u64 = 1 << 20;
/// Deepest nesting of a value; no key needs more than a table of texts.
const MAX_DEPTH: usize = 8;

/// One `name = value` of a recipe.
#[derive(Debug)]
pub(crate) struct Entry {
    /// `None`: it stands above the first `[section]`.
    pub(crate) section: Option<String>,
    pub(crate) name: String,
    pub(crate) value: Raw,
    /// Lines are counted from 1.
    pub(crate) line: usize,
    /// Where the section begins.
    pub(crate) section_line: usize,
}

pub(crate) fn read(path: &Path) -> Result<String, SettingsError> {
    let fail = |what: String| SettingsError::file(path, what);
    let size = std::fs::metadata(path).map_err(|e| fail(plain(&e)))?.len();
    if size > MAX_BYTES {
        return Err(fail(format!("{size} bytes are too many for a recipe (at most {MAX_BYTES})")));
    }
    let bytes = std::fs::read(path).map_err(|e| fail(plain(&e)))?;
    String::from_utf8(bytes).map_err(|e| {
        let line = 1 + e.as_bytes()[..e.utf8_error().valid_up_to()].iter().filter(|b| **b == b'\n').count();
        SettingsError::at(path, line, "not valid UTF-8".into())
    })
}

/// What the operating system said, without its error number.
fn plain(e: &std::io::Error) -> String {
    match e.kind() {
        std::io::ErrorKind::NotFound => "no such file".into(),
        std::io::ErrorKind::PermissionDenied => "permission denied".into(),
        std::io::ErrorKind::IsADirectory => "is a directory".into(),
        _ => e.to_string(),
    }
}

/// All entries of a recipe in the order of the file; `name` stands for it in messages.
pub(crate) fn parse(name: &Path, text: &str) -> Result<Vec<Entry>, SettingsError> {
    let line_of = |offset: usize| 1 + text.as_bytes().iter().take(offset).filter(|b| **b == b'\n').count();
    let document = DeTable::parse(text).map_err(|e| {
        let line = e.span().map_or(1, |s| line_of(s.start));
        SettingsError::at(name, line, format!("not valid TOML: {}", e.message().lines().next().unwrap_or_default()))
    })?;
    let mut found = Vec::new();
    let mut push = |section: Option<(&str, usize)>, key: &str, at: usize, value: &DeValue<'_>| {
        let (section, section_at) = section.map_or((None, at), |(name, at)| (Some(name), at));
        let value = raw(value, 0).ok_or_else(|| {
            let place = section.map_or_else(|| key.to_string(), |s| format!("{s}.{key}"));
            SettingsError::at(name, line_of(at), format!("{place} is of a kind that no setting has"))
        })?;
        let (section, section_line) = (section.map(str::to_string), line_of(section_at));
        found.push((at, Entry { section, name: key.into(), value, line: line_of(at), section_line }));
        Ok::<_, SettingsError>(())
    };
    for (key, value) in document.get_ref() {
        match value.get_ref() {
            DeValue::Table(section) => {
                for (name, value) in section {
                    push(Some((key.get_ref(), key.span().start)), name.get_ref(), name.span().start, value.get_ref())?;
                }
                if section.is_empty() {
                    // Only its name can be wrong.
                    push(Some((key.get_ref(), key.span().start)), "", key.span().start, value.get_ref())?;
                }
            }
            other => push(None, key.get_ref(), key.span().start, other)?,
        }
    }
    found.sort_by_key(|(at, _)| *at);
    Ok(found.into_iter().map(|(_, entry)| entry).collect())
}

/// The value of a flag that is written as TOML.
pub(crate) fn parse_value(text: &str) -> Option<Raw> {
    let document = format!("v = {text}");
    let document = DeTable::parse(&document).ok()?;
    let table = document.get_ref();
    if table.len() != 1 {
        return None;
    }
    table.iter().next().and_then(|(_, value)| raw(value.get_ref(), 0))
}

/// `None`: dates and times, numbers that overflow, too deep nesting.
fn raw(value: &DeValue<'_>, depth: usize) -> Option<Raw> {
    if depth > MAX_DEPTH {
        return None;
    }
    Some(match value {
        DeValue::String(text) => Raw::Text(text.to_string()),
        DeValue::Integer(v) => Raw::Integer(i128::from_str_radix(v.as_str(), v.radix()).ok()?),
        DeValue::Float(v) => Raw::Float(v.as_str().parse().ok()?),
        DeValue::Boolean(v) => Raw::Boolean(*v),
        DeValue::Array(values) => Raw::List(values.iter().map(|v| raw(v.get_ref(), depth + 1)).collect::<Option<_>>()?),
        DeValue::Table(entries) => {
            let mut entries: Vec<_> = entries.iter().collect();
            entries.sort_by_key(|(key, _)| key.span().start);
            let entries =
                entries.into_iter().map(|(k, v)| Some((k.get_ref().to_string(), raw(v.get_ref(), depth + 1)?)));
            Raw::Table(entries.collect::<Option<_>>()?)
        }
        DeValue::Datetime(_) => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entries(text: &str) -> Vec<(Option<String>, String, String, usize)> {
        let entries = parse(Path::new("r.toml"), text).unwrap();
        entries.into_iter().map(|e| (e.section, e.name, e.value.to_string(), e.line)).collect()
    }

    #[test]
    fn entries_come_with_their_lines_in_the_order_of_the_file() {
        let found = entries("seed = 1\n[b]\n# words\nz = 0x10\n\na = 1_000.5\n[a.t]\ny = 'q'\nx = \"p\"\n");
        let some = |s: &str| Some(s.to_string());
        let want = [
            (None, "seed".into(), "1".into(), 1),
            (some("b"), "z".into(), "16".into(), 4),
            (some("b"), "a".into(), "1000.5".into(), 6),
            (some("a"), "t".into(), "{ y = \"q\", x = \"p\" }".into(), 7),
        ];
        assert_eq!(found, want);
    }

    #[test]
    fn what_is_not_toml_is_named_with_its_line() {
        let error = |text: &str| parse(Path::new("r.toml"), text).unwrap_err().to_string();
        assert!(error("[a]\nb = \n").starts_with("r.toml:2: not valid TOML"), "{}", error("[a]\nb = \n"));
        assert!(error("[a]\nb = 1\nb = 2\n").starts_with("r.toml:3: not valid TOML: duplicate key"));
        assert_eq!(error("[a]\nb = 1979-05-27\n"), "r.toml:2: a.b is of a kind that no setting has");
        let deep = format!("[a]\nb = {}{}\n", "[".repeat(5000), "]".repeat(5000));
        assert!(error(&deep).starts_with("r.toml:2: "), "{}", error(&deep));
    }

    #[test]
    fn a_file_that_is_no_recipe() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("r.toml");
        std::fs::write(&path, b"[a]\nb = \"\xff\"\n").unwrap();
        assert!(read(&path).unwrap_err().to_string().ends_with("r.toml:2: not valid UTF-8"));
        std::fs::write(&path, vec![b'#'; (1 << 20) + 1]).unwrap();
        assert!(read(&path).unwrap_err().to_string().contains("1048577 bytes are too many for a recipe"));
        assert!(read(&dir.path().join("none.toml")).unwrap_err().to_string().ends_with("none.toml: no such file"));
    }
}
