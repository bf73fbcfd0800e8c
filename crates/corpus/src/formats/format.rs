//! Which format a file has.

use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use crate::error::{Error, Result};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Csv {
        delimiter: u8,
    },
    /// One JSON object a line, or an array of JSON objects.
    Jsonl,
    Parquet,
    /// One text a line.
    Text,
}

impl Format {
    /// The format that a file name asks for: `.csv`, `.tsv`, `.jsonl`, `.ndjson`, `.json`, `.parquet`, `.txt`.
    pub fn of_name(path: &Path) -> Option<Self> {
        Some(match path.extension()?.to_str()?.to_ascii_lowercase().as_str() {
            "csv" => Self::Csv { delimiter: b',' },
            "tsv" | "tab" => Self::Csv { delimiter: b'\t' },
            "jsonl" | "ndjson" | "json" => Self::Jsonl,
            "parquet" | "pq" => Self::Parquet,
            "txt" | "text" | "md" => Self::Text,
            _ => return None,
        })
    }

    /// The format of an existing file, by its content where that is beyond doubt, else by its name, else by its first
    /// character.
    ///
    /// # Errors
    ///
    /// If the file cannot be read, or is compressed.
    pub fn detect(path: &Path) -> Result<Self> {
        let mut head = Vec::with_capacity(8192);
        let file = File::open(path).map_err(Error::io("read", path))?;
        file.take(8192).read_to_end(&mut head).map_err(Error::io("read", path))?;
        let compressed = [&b"\x1f\x8b"[..], b"\x28\xb5\x2f\xfd", b"PK\x03\x04", b"BZh", b"\xfd7zXZ"];
        if head.starts_with(b"PAR1") {
            return Ok(Self::Parquet);
        }
        if compressed.iter().any(|magic| head.starts_with(magic)) {
            return Err(Error::file(path, None, "the file is compressed\n  hint: unpack it first"));
        }
        let head = head.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&head);
        let first = head.iter().copied().find(|byte| !byte.is_ascii_whitespace());
        let by_name = Self::of_name(path);
        Ok(match by_name {
            Some(Self::Csv { delimiter: b',' }) => Self::Csv { delimiter: guess_delimiter(head) },
            Some(format) => format,
            None if matches!(first, Some(b'{' | b'[')) => Self::Jsonl,
            None => Self::Csv { delimiter: guess_delimiter(head) },
        })
    }
}

/// The separator that occurs most in the first line; a comma if there is none.
fn guess_delimiter(head: &[u8]) -> u8 {
    let line = head.split(|byte| *byte == b'\n').next().unwrap_or_default();
    let count = |wanted: u8| line.iter().filter(|byte| **byte == wanted).count();
    let best = [b',', b'\t', b';', b'|'].into_iter().rev().max_by_key(|byte| count(*byte)).unwrap_or(b',');
    if count(best) == 0 { b',' } else { best }
}
