//! The corpus that ships inside: `corpus/*.jsonl`, embedded when the crate is built.

use std::path::Path;

use crate::error::{Error, Result};
use crate::example::Example;
use crate::split::{Split, SplitOptions, split_examples};

include!(concat!(env!("OUT_DIR"), "/builtin_files.rs"));

/// The share of the built-in corpus that is never trained on.
pub const HELD_OUT_SHARE: f64 = 0.12;

/// All texts of the built-in corpus, in file-name and line order. `source` is left empty.
///
/// # Errors
///
/// If a line is not a JSON object with the fields of [`Example`]; names the file and the line.
pub fn builtin() -> Result<Vec<Example>> {
    let mut examples = Vec::new();
    for (name, content) in FILES {
        for (index, line) in content.lines().enumerate() {
            if line.trim().is_empty() {
                continue;
            }
            let example: Example = serde_json::from_str(line).map_err(|error| {
                Error::file(&Path::new("corpus").join(name), index as u64 + 1, format!("not an example: {error}"))
            })?;
            examples.push(example);
        }
    }
    Ok(examples)
}

/// The built-in corpus with its fixed held-out part: [`HELD_OUT_SHARE`] of every kind and label, decided by the texts
/// themselves. Flip pairs and near copies are never torn apart.
pub fn builtin_split() -> Result<Split> {
    split_examples(&builtin()?, &SplitOptions { held_out: HELD_OUT_SHARE, seed: 0 })
}
