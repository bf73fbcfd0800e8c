//! Which files a path means: itself, or the data files of a directory.

use std::path::{Path, PathBuf};

use super::format::Format;
use crate::error::{Error, Result};

/// Folders below a directory that are looked into.
const DEPTH: usize = 6;
/// Files of a directory, at most.
const MAX_FILES: usize = 10_000;

/// The data files that `path` means, sorted by name. A file is itself. Of a directory (a data set of the hub) the CSV,
/// JSON-lines and Parquet files below it; if some of them are called after the training split, only those, so that nobody
/// trains on a test set by naming a directory. Of a directory that `prepare` wrote, its `dataset.csv`.
///
/// # Errors
///
/// If the directory cannot be read or has no data files.
pub fn data_files(path: &Path) -> Result<Vec<PathBuf>> {
    if !path.is_dir() {
        return Ok(vec![path.to_path_buf()]);
    }
    let prepared = path.join("dataset.csv");
    if path.join("prepare.json").is_file() && prepared.is_file() {
        return Ok(vec![prepared]);
    }
    let mut files = Vec::new();
    gather(path, DEPTH, &mut files)?;
    files.sort();
    let is_train = |file: &PathBuf| {
        let below = file.strip_prefix(path).unwrap_or(file).to_string_lossy().to_lowercase();
        below.split(['/', '\\', '.', '-', '_']).any(|part| matches!(part, "train" | "training"))
    };
    if files.iter().any(is_train) {
        files.retain(is_train);
    }
    if files.is_empty() {
        let message = "no data files in this directory\n  hint: expected .csv, .tsv, .jsonl or .parquet files";
        return Err(Error::file(path, None, message));
    }
    Ok(files)
}

fn gather(folder: &Path, depth: usize, files: &mut Vec<PathBuf>) -> Result<()> {
    for entry in std::fs::read_dir(folder).map_err(Error::io("read the directory", folder))? {
        let path = entry.map_err(Error::io("read the directory", folder))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if name.starts_with('.') || name == "rejected.jsonl" {
            continue;
        }
        if path.is_dir() {
            if depth > 0 {
                gather(&path, depth - 1, files)?;
            }
        } else if is_data(&path) {
            if files.len() == MAX_FILES {
                return Err(Error::file(
                    folder,
                    None,
                    format!("more than {MAX_FILES} data files\n  hint: name some of them"),
                ));
            }
            files.push(path);
        }
    }
    Ok(())
}

/// Text and plain JSON files beside data are descriptions of it, as a rule.
fn is_data(path: &Path) -> bool {
    let json = path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("json"));
    !json && matches!(Format::of_name(path), Some(Format::Csv { .. } | Format::Jsonl | Format::Parquet))
}
