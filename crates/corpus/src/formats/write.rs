//! Data sets as files: a table with all fields, a table for Arrow readers, and chat lines for fine-tuning.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow_array::{ArrayRef, RecordBatch, StringArray};
use arrow_schema::{DataType, Field, Schema, SchemaRef};
use parquet::arrow::ArrowWriter;
use serde::Serialize;

use super::atomic::AtomicFile;
use super::formula;
use super::row_writer::{arrow_writer, csv_failure, parquet_failure};
use crate::error::{Error, Result};
use crate::example::Example;

/// Rows buffered for one Parquet batch.
const BATCH: usize = 4096;

/// `dataset.csv`: columns `text`, `label`, those of [`FIELDS`] that are asked for, and `split` if asked for. Cells that a
/// spreadsheet would run are neutralised.
pub struct CsvDataset {
    path: PathBuf,
    fields: Vec<&'static str>,
    writer: csv::Writer<AtomicFile>,
}

/// The optional columns of a data set, in their order.
pub const FIELDS: [&str; 8] = ["kind", "register", "sector", "event", "pair", "id", "time", "source"];

impl CsvDataset {
    /// # Errors
    ///
    /// If the file cannot be created.
    pub fn create(path: &Path, fields: &[&'static str], with_split: bool) -> Result<Self> {
        let mut writer = csv::Writer::from_writer(AtomicFile::create(path)?);
        let header = ["text", "label"].into_iter().chain(fields.iter().copied());
        let header = header.chain(with_split.then_some("split"));
        writer.write_record(header).map_err(|error| csv_failure(path, error))?;
        Ok(Self { path: path.into(), fields: fields.to_vec(), writer })
    }

    /// # Errors
    ///
    /// If the file cannot be written.
    pub fn write(&mut self, example: &Example, split: Option<&str>) -> Result<()> {
        let optional = example.optional_fields();
        let value = |name: &&'static str| {
            optional.iter().find(|(field, _)| field == name).and_then(|(_, value)| *value).unwrap_or_default()
        };
        let cells = [example.text.as_str(), example.label.as_str()].into_iter().chain(self.fields.iter().map(value));
        for cell in cells.chain(split) {
            self.writer
                .write_field(formula::neutralise(cell).as_ref())
                .map_err(|error| csv_failure(&self.path, error))?;
        }
        self.writer.write_record(None::<&[u8]>).map_err(|error| csv_failure(&self.path, error))
    }

    /// # Errors
    ///
    /// If what is buffered cannot be written.
    pub fn finish(self) -> Result<()> {
        let Self { path, writer, .. } = self;
        let file = writer.into_inner().map_err(|error| {
            let error = error.into_error();
            Error::io("write", &path)(std::io::Error::new(error.kind(), error.to_string()))
        })?;
        file.commit()
    }
}

/// `fine_tune_dataset.jsonl`: `{"messages": [system, user, assistant]}` a line, as OpenAI's fine-tuning and TRL take it.
pub struct ChatDataset {
    path: PathBuf,
    system_message: String,
    file: AtomicFile,
}

#[derive(Serialize)]
struct ChatLine<'a> {
    messages: [ChatMessage<'a>; 3],
}

#[derive(Serialize)]
struct ChatMessage<'a> {
    role: &'static str,
    content: &'a str,
}

impl ChatDataset {
    /// # Errors
    ///
    /// If the file cannot be created.
    pub fn create(path: &Path, system_message: &str) -> Result<Self> {
        Ok(Self { path: path.into(), system_message: system_message.into(), file: AtomicFile::create(path)? })
    }

    /// # Errors
    ///
    /// If the file cannot be written.
    pub fn write(&mut self, example: &Example) -> Result<()> {
        let line = ChatLine {
            messages: [
                ChatMessage { role: "system", content: &self.system_message },
                ChatMessage { role: "user", content: &example.text },
                ChatMessage { role: "assistant", content: &example.label },
            ],
        };
        serde_json::to_writer(&mut self.file, &line)
            .map_err(std::io::Error::from)
            .and_then(|()| self.file.write_all(b"\n"))
            .map_err(Error::io("write", &self.path))
    }

    /// # Errors
    ///
    /// If what is buffered cannot be written.
    pub fn finish(self) -> Result<()> {
        self.file.commit()
    }
}

/// The table of [`CsvDataset`] as Parquet, all columns text (zstd).
pub struct ParquetDataset {
    path: PathBuf,
    schema: SchemaRef,
    writer: ArrowWriter<AtomicFile>,
    columns: Vec<Vec<Option<String>>>,
}

impl ParquetDataset {
    /// # Errors
    ///
    /// If the file cannot be created.
    pub fn create(path: &Path, fields: &[&'static str]) -> Result<Self> {
        let names = ["text", "label"].into_iter().chain(fields.iter().copied());
        let schema =
            Arc::new(Schema::new(names.map(|name| Field::new(name, DataType::Utf8, true)).collect::<Vec<_>>()));
        let writer = arrow_writer(path, AtomicFile::create(path)?, schema.clone())?;
        let columns = vec![Vec::new(); schema.fields().len()];
        Ok(Self { path: path.into(), schema, writer, columns })
    }

    /// # Errors
    ///
    /// If the file cannot be written.
    pub fn write(&mut self, example: &Example) -> Result<()> {
        let optional = example.optional_fields();
        for (column, field) in self.columns.iter_mut().zip(self.schema.fields()) {
            column.push(match field.name().as_str() {
                "text" => Some(example.text.clone()),
                "label" => Some(example.label.clone()),
                name => {
                    optional.iter().find(|(field, _)| *field == name).and_then(|(_, value)| value.map(str::to_owned))
                }
            });
        }
        if self.columns[0].len() >= BATCH { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> Result<()> {
        let take =
            |column: &mut Vec<Option<String>>| -> ArrayRef { Arc::new(StringArray::from(std::mem::take(column))) };
        let arrays = self.columns.iter_mut().map(take).collect();
        let batch = RecordBatch::try_new(self.schema.clone(), arrays)
            .map_err(|error| Error::file(&self.path, None, format!("rows do not fit the columns: {error}")))?;
        self.writer.write(&batch).map_err(|error| parquet_failure(&self.path, error))
    }

    /// # Errors
    ///
    /// If what is buffered cannot be written.
    pub fn finish(mut self) -> Result<()> {
        self.flush()?;
        self.writer.into_inner().map_err(|error| parquet_failure(&self.path, error))?.commit()
    }
}

/// The optional fields that at least one example has.
pub(crate) fn fields_in_use(examples: &[Example]) -> Vec<&'static str> {
    let used = |field: &&'static str| {
        examples.iter().any(|e| e.optional_fields().iter().any(|(name, value)| name == field && value.is_some()))
    };
    FIELDS.into_iter().filter(|field| used(field)).collect()
}

/// Writes [`CsvDataset`] in one go, with the optional columns that are in use.
///
/// # Errors
///
/// If the file cannot be written.
pub fn write_dataset_csv(path: &Path, examples: &[Example]) -> Result<()> {
    let mut dataset = CsvDataset::create(path, &fields_in_use(examples), false)?;
    examples.iter().try_for_each(|example| dataset.write(example, None))?;
    dataset.finish()
}

/// Writes [`ChatDataset`] in one go.
///
/// # Errors
///
/// If the file cannot be written.
pub fn write_chat_jsonl(path: &Path, examples: &[Example], system_message: &str) -> Result<()> {
    let mut dataset = ChatDataset::create(path, system_message)?;
    examples.iter().try_for_each(|example| dataset.write(example))?;
    dataset.finish()
}

/// Writes [`ParquetDataset`] in one go, with the optional columns that are in use.
///
/// # Errors
///
/// If the file cannot be written.
pub fn write_parquet(path: &Path, examples: &[Example]) -> Result<()> {
    let mut dataset = ParquetDataset::create(path, &fields_in_use(examples))?;
    examples.iter().try_for_each(|example| dataset.write(example))?;
    dataset.finish()
}
