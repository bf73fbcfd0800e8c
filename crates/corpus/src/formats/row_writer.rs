//! Writes the rows of a [`RowReader`] with further columns, in the same format or another, in bounded memory.
//!
//! Every column of the input is kept in its order and with its values: Parquet to Parquet keeps the types, JSONL to JSONL
//! the values, CSV to CSV the cells. New columns follow. A column of the input that has the name of a new one is replaced
//! by it. The file appears under its name when [`RowWriter::finish`] has returned, so it may be the input itself.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow_array::{ArrayRef, BooleanArray, Float64Array, Int64Array, RecordBatch, StringArray};
use arrow_schema::{DataType, Field, Schema, SchemaRef};
use parquet::arrow::ArrowWriter;
use parquet::basic::{Compression, ZstdLevel};
use parquet::file::properties::WriterProperties;
use serde_json::{Map, Value};

use super::atomic::AtomicFile;
use super::format::Format;
use super::formula;
use super::rows::{Body, Chunk, ColumnKind, RowReader};
use crate::error::{Error, Result};

/// A column that is added to the rows.
#[derive(Clone, Debug, PartialEq)]
pub struct NewColumn {
    pub name: String,
    pub kind: ColumnKind,
}

impl NewColumn {
    pub fn text(name: impl Into<String>) -> Self {
        Self { name: name.into(), kind: ColumnKind::Text }
    }

    pub fn number(name: impl Into<String>) -> Self {
        Self { name: name.into(), kind: ColumnKind::Number }
    }
}

/// A row group is held until it is complete: by bytes, too, so that long texts do not make it a large one.
const ROW_GROUP_BYTES: usize = 16 << 20;

enum Sink {
    File(AtomicFile),
    Stream(Box<dyn Write + Send>),
}

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        match self {
            Self::File(file) => file.write(bytes),
            Self::Stream(stream) => stream.write(bytes),
        }
    }

    fn flush(&mut self) -> std::io::Result<()> {
        match self {
            Self::File(file) => file.flush(),
            Self::Stream(stream) => stream.flush(),
        }
    }
}

enum Output {
    Csv(Box<csv::Writer<Sink>>),
    Jsonl(Sink),
    Parquet(Box<ArrowWriter<AtomicFile>>, SchemaRef),
}

/// See the module.
pub struct RowWriter {
    path: PathBuf,
    output: Output,
    /// The input's columns that are kept.
    kept: Vec<(String, ColumnKind)>,
    new: Vec<NewColumn>,
    rows: u64,
}

impl RowWriter {
    /// Starts the file at `path`, in the format of its name (`.csv`, `.tsv`, `.jsonl`, `.parquet`; the input's own format
    /// for any other name), for the rows of `input` with the columns `new` added.
    ///
    /// # Errors
    ///
    /// If the file cannot be created, two new columns share a name, or the input's columns cannot be found out.
    pub fn create(path: &Path, input: &RowReader, new: &[NewColumn]) -> Result<Self> {
        let format = match (Format::of_name(path), input.format()) {
            (None | Some(Format::Text), Format::Text) => Format::Jsonl,
            (None | Some(Format::Text), own) => own,
            (Some(Format::Csv { .. }), Format::Csv { delimiter }) => Format::Csv { delimiter },
            (Some(format), _) => format,
        };
        let file = AtomicFile::create(path)?;
        Self::new(path, format, input, new, Sink::File(file))
    }

    /// Writes CSV or JSONL to a stream such as standard output, which messages call `name`.
    ///
    /// # Errors
    ///
    /// If the format is Parquet, or the input's columns cannot be found out.
    pub fn to_stream(
        name: &str,
        stream: Box<dyn Write + Send>,
        format: Format,
        input: &RowReader,
        new: &[NewColumn],
    ) -> Result<Self> {
        Self::new(Path::new(name), format, input, new, Sink::Stream(stream))
    }

    fn new(path: &Path, format: Format, input: &RowReader, new: &[NewColumn], sink: Sink) -> Result<Self> {
        for (index, column) in new.iter().enumerate() {
            if new[..index].iter().any(|other| other.name == column.name) {
                return Err(Error::usage(format!("two new columns are called {:?}", column.name)));
            }
        }
        let replaced = |name: &str| new.iter().any(|column| column.name == name);
        // JSONL rows carry their own names; the other formats must know all columns before the first row.
        let mut kept = if format == Format::Jsonl { Vec::new() } else { input.columns()? };
        kept.retain(|(name, _)| !replaced(name));
        let output = match (format, sink) {
            (Format::Csv { delimiter }, sink) => {
                let mut writer = csv::WriterBuilder::new().delimiter(delimiter).from_writer(sink);
                let names = kept.iter().map(|(name, _)| name).chain(new.iter().map(|column| &column.name));
                writer
                    .write_record(names.map(|name| formula::neutralise(name).into_owned()))
                    .map_err(|error| csv_failure(path, error))?;
                Output::Csv(Box::new(writer))
            }
            (Format::Parquet, Sink::File(file)) => {
                let schema = Arc::new(parquet_schema(input, &kept, new));
                Output::Parquet(Box::new(arrow_writer(path, file, schema.clone())?), schema)
            }
            (Format::Parquet, Sink::Stream(_)) => {
                return Err(Error::file(path, None, "Parquet cannot be written to a stream\n  hint: give a file"));
            }
            (Format::Jsonl | Format::Text, sink) => Output::Jsonl(sink),
        };
        Ok(Self { path: path.into(), output, kept, new: new.to_vec(), rows: 0 })
    }

    /// Writes the rows of `chunk`; `added` holds, per new column, one value a row (null where there is none).
    ///
    /// # Errors
    ///
    /// If the file cannot be written, or `added` does not fit the chunk.
    pub fn write(&mut self, chunk: &Chunk, added: &[Vec<Value>]) -> Result<()> {
        if added.len() != self.new.len() || added.iter().any(|column| column.len() != chunk.len()) {
            return Err(Error::usage(format!(
                "{} new columns of {} rows were promised, found {} of {:?}",
                self.new.len(),
                chunk.len(),
                added.len(),
                added.iter().map(Vec::len).collect::<Vec<_>>()
            )));
        }
        let path = self.path.clone();
        let unsupported = |message: String| Error::file(&path, None, message);
        match &mut self.output {
            Output::Jsonl(sink) => {
                for (index, mut row) in chunk.rows().map_err(unsupported)?.into_iter().enumerate() {
                    for (column, values) in self.new.iter().zip(added) {
                        // Removed first, so that a replaced column stands where the new ones stand.
                        row.shift_remove(&column.name);
                        row.insert(column.name.clone(), values[index].clone());
                    }
                    write_json_line(sink, &row).map_err(Error::io("write", &path))?;
                }
            }
            Output::Csv(writer) => {
                let columns = self
                    .kept
                    .iter()
                    .map(|(name, _)| chunk.texts(name))
                    .collect::<Result<Vec<_>, _>>()
                    .map_err(unsupported)?;
                for index in 0..chunk.len() {
                    let kept = columns.iter().map(|column| column[index].as_deref().unwrap_or_default().to_owned());
                    let new = added.iter().map(|column| match &column[index] {
                        Value::Null => String::new(),
                        Value::String(text) => text.clone(),
                        other => other.to_string(),
                    });
                    let cells = kept.chain(new).map(|cell| formula::neutralise(&cell).into_owned());
                    writer.write_record(cells).map_err(|error| csv_failure(&path, error))?;
                }
            }
            Output::Parquet(writer, schema) => {
                let mut arrays: Vec<ArrayRef> = Vec::with_capacity(schema.fields().len());
                match &chunk.body {
                    Body::Arrow(batch) => {
                        for field in batch.schema().fields() {
                            if self.kept.iter().any(|(name, _)| name == field.name())
                                && let Some(array) = batch.column_by_name(field.name())
                            {
                                arrays.push(array.clone());
                            }
                        }
                    }
                    _ => {
                        for (name, kind) in &self.kept {
                            arrays.push(array_of(*kind, &chunk.values(name).map_err(unsupported)?));
                        }
                    }
                }
                arrays.extend(self.new.iter().zip(added).map(|(column, values)| array_of(column.kind, values)));
                let batch = RecordBatch::try_new(schema.clone(), arrays)
                    .map_err(|error| Error::file(&path, None, format!("rows do not fit the columns: {error}")))?;
                writer.write(&batch).map_err(|error| parquet_failure(&path, error))?;
            }
        }
        self.rows += chunk.len() as u64;
        Ok(())
    }

    /// Completes the file and puts it under its name; the number of rows written.
    ///
    /// # Errors
    ///
    /// If what is buffered cannot be written.
    pub fn finish(self) -> Result<u64> {
        let path = self.path;
        match self.output {
            Output::Csv(writer) => finish_sink(
                writer
                    .into_inner()
                    .map_err(|error| Error::io("write", &path)(std::io::Error::other(error.to_string())))?,
                &path,
            )?,
            Output::Jsonl(sink) => finish_sink(sink, &path)?,
            Output::Parquet(writer, _) => {
                writer.into_inner().map_err(|error| parquet_failure(&path, error))?.commit()?;
            }
        }
        Ok(self.rows)
    }
}

fn finish_sink(sink: Sink, path: &Path) -> Result<()> {
    match sink {
        Sink::File(file) => file.commit(),
        Sink::Stream(mut stream) => stream.flush().map_err(Error::io("write", path)),
    }
}

pub(crate) fn write_json_line(sink: &mut impl Write, row: &Map<String, Value>) -> std::io::Result<()> {
    serde_json::to_writer(&mut *sink, row)?;
    sink.write_all(b"\n")
}

fn array_of(kind: ColumnKind, values: &[Value]) -> ArrayRef {
    match kind {
        ColumnKind::Boolean => Arc::new(values.iter().map(Value::as_bool).collect::<BooleanArray>()),
        ColumnKind::Integer => Arc::new(values.iter().map(Value::as_i64).collect::<Int64Array>()),
        ColumnKind::Number => Arc::new(values.iter().map(Value::as_f64).collect::<Float64Array>()),
        ColumnKind::Text => Arc::new(
            values
                .iter()
                .map(|value| match value {
                    Value::Null => None,
                    Value::String(text) => Some(text.clone()),
                    other => Some(other.to_string()),
                })
                .collect::<StringArray>(),
        ),
    }
}

fn parquet_schema(input: &RowReader, kept: &[(String, ColumnKind)], new: &[NewColumn]) -> Schema {
    let data_type = |kind: ColumnKind| match kind {
        ColumnKind::Text => DataType::Utf8,
        ColumnKind::Integer => DataType::Int64,
        ColumnKind::Number => DataType::Float64,
        ColumnKind::Boolean => DataType::Boolean,
    };
    let own = input.arrow_schema();
    let mut fields: Vec<Arc<Field>> = match &own {
        Some(schema) => {
            let is_kept = |field: &&Arc<Field>| kept.iter().any(|(name, _)| name == field.name());
            schema.fields().iter().filter(is_kept).cloned().collect()
        }
        None => kept.iter().map(|(name, kind)| Arc::new(Field::new(name, data_type(*kind), true))).collect(),
    };
    fields.extend(new.iter().map(|column| Arc::new(Field::new(&column.name, data_type(column.kind), true))));
    let mut metadata = own.map(|schema| schema.metadata().clone()).unwrap_or_default();
    // It lists the columns, and the `datasets` library refuses a file whose columns are others.
    metadata.remove("huggingface");
    Schema::new_with_metadata(fields, metadata)
}

pub(crate) fn arrow_writer(path: &Path, file: AtomicFile, schema: SchemaRef) -> Result<ArrowWriter<AtomicFile>> {
    let properties = WriterProperties::builder()
        .set_compression(Compression::ZSTD(ZstdLevel::default()))
        .set_max_row_group_row_count(Some(128 * 1024))
        .set_max_row_group_bytes(Some(ROW_GROUP_BYTES))
        .build();
    ArrowWriter::try_new(file, schema, Some(properties)).map_err(|error| parquet_failure(path, error))
}

pub(crate) fn parquet_failure(path: &Path, error: parquet::errors::ParquetError) -> Error {
    Error::io("write", path)(match error {
        parquet::errors::ParquetError::External(source) => match source.downcast::<std::io::Error>() {
            Ok(source) => *source,
            Err(source) => std::io::Error::other(source),
        },
        other => std::io::Error::other(other),
    })
}

pub(crate) fn csv_failure(path: &Path, error: csv::Error) -> Error {
    let message = error.to_string();
    Error::io("write", path)(match error.into_kind() {
        csv::ErrorKind::Io(source) => source,
        _ => std::io::Error::other(message),
    })
}
