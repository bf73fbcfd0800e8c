//! Parquet through the Arrow reader of the `parquet` crate, with its panics on damaged files turned into errors.

use std::cell::Cell;
use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use arrow_schema::SchemaRef;
use parquet::arrow::arrow_reader::{ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder};
use serde_json::Value;

use super::rows::{Body, CHUNK_ROWS, Chunk};
use crate::error::{Error, Result};

pub(crate) struct ParquetRows {
    path: PathBuf,
    reader: ParquetRecordBatchReader,
    schema: SchemaRef,
    row: u64,
    total: u64,
}

impl ParquetRows {
    pub(crate) fn open(path: &Path, file: File) -> Result<Self> {
        let opened = guarded(path, || {
            let builder = ParquetRecordBatchReaderBuilder::try_new(file)?;
            let schema = builder.schema().clone();
            let total = builder.metadata().file_metadata().num_rows();
            Ok((builder.with_batch_size(CHUNK_ROWS).build()?, schema, total))
        })?;
        let (reader, schema, total) = opened;
        Ok(Self { path: path.into(), reader, schema, row: 0, total: total.try_into().unwrap_or(0) })
    }

    pub(crate) fn schema(&self) -> SchemaRef {
        self.schema.clone()
    }

    pub(crate) fn progress(&self) -> f64 {
        if self.total == 0 { 1.0 } else { (self.row as f64 / self.total as f64).min(1.0) }
    }

    pub(crate) fn next_chunk(&mut self) -> Result<Option<Chunk>> {
        let (path, reader) = (&self.path, &mut self.reader);
        let batch = guarded(path, || Ok(reader.next().transpose()?))?;
        Ok(batch.filter(|batch| batch.num_rows() > 0).map(|batch| {
            let lines = (1..=batch.num_rows() as u64).map(|row| self.row + row).collect();
            self.row += batch.num_rows() as u64;
            Chunk { lines, body: Body::Arrow(batch) }
        }))
    }
}

thread_local! {
    static GUARDED: Cell<bool> = const { Cell::new(false) };
}

/// Whether a panic of this thread would be caught and become an error about a damaged file. A panic hook asks this before
/// it reports a bug.
pub fn panic_is_caught() -> bool {
    GUARDED.get()
}

fn guarded<T>(path: &Path, work: impl FnOnce() -> Result<T, parquet::errors::ParquetError>) -> Result<T> {
    let damaged = |what: String| {
        Error::file(path, None, format!("not a readable Parquet file: {what}\n  hint: fetch or write it again"))
    };
    GUARDED.set(true);
    let outcome = catch_unwind(AssertUnwindSafe(work));
    GUARDED.set(false);
    match outcome {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(damaged(error.to_string())),
        Err(_) => Err(damaged("its structure is damaged".into())),
    }
}

/// The class names that the `datasets` library of Hugging Face stores for a column of numbers.
pub(crate) fn class_names(schema: &SchemaRef, column: &str) -> Option<Vec<String>> {
    let info: Value = serde_json::from_str(schema.metadata().get("huggingface")?).ok()?;
    let names = info.get("info")?.get("features")?.get(column)?.get("names")?.as_array()?;
    names.iter().map(|name| name.as_str().map(str::to_owned)).collect()
}
