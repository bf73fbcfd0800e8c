//! Files as streams of rows, with every column they have.
//!
//! A [`RowReader`] hands out [`Chunk`]s of at most [`CHUNK_ROWS`] rows in the file's own representation (CSV records, JSON
//! objects, Arrow batches), so that a [`RowWriter`](super::RowWriter) of the same format can put back exactly what was
//! read. Memory is bounded by one chunk: about [`CHUNK_BYTES`] for CSV and JSONL, where one record may take
//! [`MAX_RECORD`]; for Parquet by the file's own pages.

use std::borrow::Cow;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use arrow_array::RecordBatch;
use arrow_schema::SchemaRef;
use serde_json::{Map, Value};

use super::format::Format;
use super::formula;
use super::json_array::ArrayLines;
use super::parquet_io::ParquetRows;
use crate::error::{Error, Result};

/// Rows in a chunk, at most.
pub const CHUNK_ROWS: usize = 1024;
/// Bytes of CSV or JSONL after which a chunk ends.
pub const CHUNK_BYTES: u64 = 8 << 20;
/// The longest record of a CSV or JSONL file that is read.
pub const MAX_RECORD: u64 = 16 << 20;

/// What a column holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ColumnKind {
    Text,
    Integer,
    Number,
    Boolean,
}

/// Some rows of a file. Row numbers count from 1; for CSV and JSON lines they are line numbers.
#[derive(Clone, Debug)]
pub struct Chunk {
    pub(crate) lines: Vec<u64>,
    pub(crate) body: Body,
}

#[derive(Clone, Debug)]
pub(crate) enum Body {
    Csv { header: Arc<Vec<String>>, records: Vec<csv::StringRecord> },
    Json(Vec<Map<String, Value>>),
    Arrow(RecordBatch),
}

impl Chunk {
    pub fn len(&self) -> usize {
        self.lines.len()
    }

    pub fn is_empty(&self) -> bool {
        self.lines.is_empty()
    }

    /// The line (row, for Parquet) of the file that row `index` of the chunk stands in.
    pub fn line(&self, index: usize) -> u64 {
        self.lines.get(index).copied().unwrap_or_default()
    }

    /// The cells of a column as text, one a row: `None` where there is none. Numbers and nested values as JSON writes
    /// them.
    ///
    /// # Errors
    ///
    /// A message, if an Arrow column has a type that has no text form.
    pub fn texts(&self, column: &str) -> Result<Vec<Option<Cow<'_, str>>>, String> {
        match &self.body {
            Body::Csv { header, records } => {
                let index = header.iter().position(|name| name == column);
                Ok(records
                    .iter()
                    .map(|record| index.and_then(|index| record.get(index)).map(|cell| formula::restore(cell).into()))
                    .collect())
            }
            Body::Json(rows) => Ok(rows
                .iter()
                .map(|row| match row.get(column) {
                    None | Some(Value::Null) => None,
                    Some(Value::String(text)) => Some(Cow::Borrowed(text.as_str())),
                    Some(other) => Some(Cow::Owned(other.to_string())),
                })
                .collect()),
            Body::Arrow(batch) => match batch.column_by_name(column) {
                None => Ok(vec![None; batch.num_rows()]),
                Some(array) => super::arrow_values::texts(array, column),
            },
        }
    }

    /// The cells of a column as JSON values (strings, for CSV).
    ///
    /// # Errors
    ///
    /// As [`Chunk::texts`].
    pub fn values(&self, column: &str) -> Result<Vec<Value>, String> {
        match &self.body {
            Body::Json(rows) => Ok(rows.iter().map(|row| row.get(column).cloned().unwrap_or_default()).collect()),
            Body::Csv { .. } => Ok(self
                .texts(column)?
                .into_iter()
                .map(|cell| cell.map_or(Value::Null, |cell| Value::String(cell.into_owned())))
                .collect()),
            Body::Arrow(batch) => match batch.column_by_name(column) {
                None => Ok(vec![Value::Null; batch.num_rows()]),
                Some(array) => super::arrow_values::values(array, column),
            },
        }
    }

    /// The rows as ordered maps, every column in its order.
    ///
    /// # Errors
    ///
    /// As [`Chunk::texts`].
    pub fn rows(&self) -> Result<Vec<Map<String, Value>>, String> {
        let names: Vec<String> = match &self.body {
            Body::Json(rows) => return Ok(rows.clone()),
            Body::Csv { header, .. } => header.to_vec(),
            Body::Arrow(batch) => batch.schema().fields().iter().map(|field| field.name().clone()).collect(),
        };
        let mut rows = vec![Map::new(); self.len()];
        for name in names {
            for (row, value) in rows.iter_mut().zip(self.values(&name)?) {
                row.insert(name.clone(), value);
            }
        }
        Ok(rows)
    }
}

/// Reads a file chunk by chunk: an iterator over `Result<Chunk>` that ends after the first error.
pub struct RowReader {
    path: PathBuf,
    format: Format,
    inner: Inner,
    read: Arc<AtomicU64>,
    size: u64,
    failed: bool,
}

enum Inner {
    Csv {
        reader: csv::Reader<Counted>,
        header: Arc<Vec<String>>,
        first: Option<csv::StringRecord>,
        mark: Arc<AtomicU64>,
    },
    Lines {
        reader: BufReader<Box<dyn Read + Send>>,
        line: u64,
        json: bool,
    },
    Parquet(ParquetRows),
}

impl RowReader {
    /// # Errors
    ///
    /// If the file cannot be read, is not of a known format, or its beginning is not what the format asks for.
    pub fn open(path: &Path) -> Result<Self> {
        Self::open_as(path, Format::detect(path)?)
    }

    /// # Errors
    ///
    /// As [`RowReader::open`].
    pub fn open_as(path: &Path, format: Format) -> Result<Self> {
        let file = File::open(path).map_err(Error::io("read", path))?;
        let size = file.metadata().map_err(Error::io("read", path))?.len();
        if format == Format::Parquet {
            let inner = Inner::Parquet(ParquetRows::open(path, file)?);
            return Ok(Self { path: path.into(), format, inner, read: Arc::default(), size, failed: false });
        }
        Self::from_reader(path, Box::new(file), size, format)
    }

    /// Reads from a stream such as standard input, which messages call `name`. Not for Parquet, which must be seekable.
    ///
    /// # Errors
    ///
    /// If the beginning is not what the format asks for.
    pub fn from_stream(name: &str, stream: Box<dyn Read + Send>, format: Format) -> Result<Self> {
        Self::from_reader(Path::new(name), stream, 0, format)
    }

    fn from_reader(path: &Path, source: Box<dyn Read + Send>, size: u64, format: Format) -> Result<Self> {
        let read = Arc::new(AtomicU64::new(0));
        let mark = Arc::new(AtomicU64::new(0));
        let guard = matches!(format, Format::Csv { .. }).then(|| mark.clone());
        let counted = Counted { source, read: read.clone(), mark: guard, head: Some(Vec::new()) };
        let inner = match format {
            Format::Csv { delimiter } => open_csv(path, counted, delimiter, mark)?,
            Format::Jsonl | Format::Text => {
                let json = format == Format::Jsonl;
                let mut reader = BufReader::with_capacity(1 << 16, counted);
                let head = reader.fill_buf().map_err(Error::io("read", path))?;
                let array = head.iter().find(|byte| !byte.is_ascii_whitespace()) == Some(&b'[');
                let source: Box<dyn Read + Send> =
                    if json && array { Box::new(ArrayLines::new(reader)) } else { Box::new(reader) };
                Inner::Lines { reader: BufReader::with_capacity(1 << 16, source), line: 0, json }
            }
            Format::Parquet => {
                return Err(Error::file(path, None, "Parquet cannot be read from a stream\n  hint: give a file"));
            }
        };
        Ok(Self { path: path.into(), format, inner, read, size, failed: false })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn format(&self) -> Format {
        self.format
    }

    /// The columns, where the file declares them: the header of a CSV file, the schema of a Parquet file.
    pub fn declared_columns(&self) -> Option<Vec<String>> {
        match &self.inner {
            Inner::Csv { header, .. } => Some(header.to_vec()),
            Inner::Parquet(rows) => Some(rows.schema().fields().iter().map(|field| field.name().clone()).collect()),
            Inner::Lines { json: false, .. } => Some(vec!["text".into()]),
            Inner::Lines { .. } => None,
        }
    }

    /// All columns and what they hold. For JSONL this reads the whole file once more: its rows may differ.
    ///
    /// # Errors
    ///
    /// If the file cannot be read a second time.
    pub fn columns(&self) -> Result<Vec<(String, ColumnKind)>> {
        if let Some(names) = self.declared_columns() {
            return Ok(names.into_iter().map(|name| (name, ColumnKind::Text)).collect());
        }
        let mut kinds: Map<String, Value> = Map::new();
        for chunk in RowReader::open_as(&self.path, self.format)? {
            if let Body::Json(rows) = chunk?.body {
                for (name, value) in rows.into_iter().flatten() {
                    merge_kind(&mut kinds, name, &value);
                }
            }
        }
        let kind = |value: &Value| match value.as_str() {
            Some("i") => ColumnKind::Integer,
            Some("n") => ColumnKind::Number,
            Some("b") => ColumnKind::Boolean,
            _ => ColumnKind::Text,
        };
        Ok(kinds.iter().map(|(name, value)| (name.clone(), kind(value))).collect())
    }

    pub(crate) fn arrow_schema(&self) -> Option<SchemaRef> {
        match &self.inner {
            Inner::Parquet(rows) => Some(rows.schema()),
            _ => None,
        }
    }

    /// Share of the file read so far, 0 to 1; `None` for a stream of unknown length.
    pub fn progress(&self) -> Option<f64> {
        match &self.inner {
            Inner::Parquet(rows) => Some(rows.progress()),
            _ if self.size == 0 => None,
            _ => Some((self.read.load(Ordering::Relaxed) as f64 / self.size as f64).min(1.0)),
        }
    }

    fn next_chunk(&mut self) -> Result<Option<Chunk>> {
        match &mut self.inner {
            Inner::Csv { reader, header, first, mark } => csv_chunk(&self.path, reader, header, first, mark),
            Inner::Lines { reader, line, json } => line_chunk(&self.path, reader, line, *json),
            Inner::Parquet(rows) => rows.next_chunk(),
        }
    }
}

impl Iterator for RowReader {
    type Item = Result<Chunk>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.failed {
            return None;
        }
        let next = self.next_chunk().transpose();
        self.failed = matches!(next, Some(Err(_)));
        next
    }
}

fn merge_kind(kinds: &mut Map<String, Value>, name: String, value: &Value) {
    let kind = match value {
        Value::Null => "",
        Value::Bool(_) => "b",
        Value::Number(number) if number.is_i64() => "i",
        Value::Number(number) if number.is_u64() => "t",
        Value::Number(_) => "n",
        _ => "t",
    };
    let known = kinds.entry(name).or_insert_with(|| Value::String(String::new()));
    let merged = match (known.as_str().unwrap_or("t"), kind) {
        ("", kind) | (kind, "") => kind,
        (known, kind) if known == kind => known,
        ("i", "n") | ("n", "i") => "n",
        _ => "t",
    };
    *known = Value::String(merged.to_owned());
}

fn open_csv(path: &Path, counted: Counted, delimiter: u8, mark: Arc<AtomicU64>) -> Result<Inner> {
    let mut reader = csv::ReaderBuilder::new()
        .delimiter(delimiter)
        .has_headers(false)
        .flexible(true)
        .buffer_capacity(1 << 16)
        .from_reader(counted);
    let mut record = csv::StringRecord::new();
    let any = reader.read_record(&mut record).map_err(|error| csv_error(path, &error))?;
    if !any {
        return Err(Error::file(path, None, "the file is empty"));
    }
    // A first row with one label among its cells, and no name that a text column would have, is data: no header.
    let labels = record.iter().filter(|cell| crate::labels::canonical_label(cell).is_some()).count();
    let headless = labels == 1 && record.len() > 1 && !record.iter().any(super::columns::is_text_name);
    let header: Vec<String> = if headless {
        (1..=record.len()).map(|number| format!("column_{number}")).collect()
    } else {
        record.iter().map(|name| formula::restore(name.trim()).to_owned()).collect()
    };
    for (index, name) in header.iter().enumerate() {
        if header[..index].contains(name) {
            return Err(Error::file(path, 1, format!("two columns are called {name:?}\n  hint: rename one of them")));
        }
    }
    Ok(Inner::Csv { reader, header: Arc::new(header), first: headless.then_some(record), mark })
}

fn csv_chunk(
    path: &Path,
    reader: &mut csv::Reader<Counted>,
    header: &Arc<Vec<String>>,
    first: &mut Option<csv::StringRecord>,
    mark: &AtomicU64,
) -> Result<Option<Chunk>> {
    let (mut lines, mut records) = (Vec::new(), Vec::new());
    if let Some(record) = first.take() {
        lines.push(1);
        records.push(record);
    }
    let start = reader.position().byte();
    while records.len() < CHUNK_ROWS && reader.position().byte() - start < CHUNK_BYTES {
        mark.store(reader.position().byte(), Ordering::Relaxed);
        let mut record = csv::StringRecord::new();
        let any = reader.read_record(&mut record).map_err(|error| csv_error(path, &error))?;
        if !any {
            break;
        }
        let line = record.position().map_or(0, csv::Position::line);
        if record.len() == 1 && record.get(0).is_some_and(|cell| cell.trim().is_empty()) && header.len() > 1 {
            continue;
        }
        if record.len() != header.len() {
            return Err(Error::file(
                path,
                line,
                format!(
                    "expected {} cells as in the header, found {}\n  hint: texts with commas or line breaks must be quoted",
                    header.len(),
                    record.len()
                ),
            ));
        }
        lines.push(line);
        records.push(record);
    }
    if records.is_empty() {
        return Ok(None);
    }
    Ok(Some(Chunk { lines, body: Body::Csv { header: header.clone(), records } }))
}

fn csv_error(path: &Path, error: &csv::Error) -> Error {
    let line = error.position().map(csv::Position::line);
    match error.kind() {
        csv::ErrorKind::Utf8 { .. } => Error::file(path, line, NOT_UTF8),
        csv::ErrorKind::Io(source) => match source.get_ref() {
            Some(inner) if inner.is::<TooLong>() => Error::file(path, line, TooLong.to_string()),
            _ => Error::file(path, line, format!("cannot read: {source}")),
        },
        _ => Error::file(path, line, error.to_string()),
    }
}

const NOT_UTF8: &str = "the text is not UTF-8\n  hint: convert the file, for example with iconv -f latin1 -t utf-8";

fn line_chunk(
    path: &Path,
    reader: &mut BufReader<Box<dyn Read + Send>>,
    line: &mut u64,
    json: bool,
) -> Result<Option<Chunk>> {
    let (mut lines, mut rows, mut bytes) = (Vec::new(), Vec::new(), 0u64);
    let mut buffer = Vec::new();
    while rows.len() < CHUNK_ROWS && bytes < CHUNK_BYTES {
        buffer.clear();
        let length = reader
            .by_ref()
            .take(MAX_RECORD + 1)
            .read_until(b'\n', &mut buffer)
            .map_err(|error| Error::file(path, *line + 1, format!("cannot read: {error}")))?
            as u64;
        if length == 0 {
            break;
        }
        *line += 1;
        if length > MAX_RECORD {
            return Err(Error::file(path, *line, TooLong.to_string()));
        }
        bytes += length;
        let text = std::str::from_utf8(&buffer).map_err(|_| Error::file(path, *line, NOT_UTF8))?.trim();
        if text.is_empty() {
            continue;
        }
        lines.push(*line);
        rows.push(if json { parse_object(path, *line, text)? } else { Map::from_iter([("text".into(), text.into())]) });
    }
    if rows.is_empty() {
        return Ok(None);
    }
    Ok(Some(Chunk { lines, body: Body::Json(rows) }))
}

fn parse_object(path: &Path, line: u64, text: &str) -> Result<Map<String, Value>> {
    match serde_json::from_str(text) {
        Ok(Value::Object(row)) => Ok(row),
        Ok(_) => Err(Error::file(path, line, "expected a JSON object, found another JSON value")),
        Err(error) => Err(Error::file(path, line, format!("expected a JSON object: {error}"))),
    }
}

#[derive(Debug, thiserror::Error)]
#[error("a record is longer than 16 MiB\n  hint: look for a quote that is never closed, or cut the text")]
struct TooLong;

/// A source that counts what it hands out, drops a byte-order mark, and for CSV refuses to go on when one record has
/// grown past [`MAX_RECORD`] (a quote that is never closed would otherwise swallow the file).
struct Counted {
    source: Box<dyn Read + Send>,
    read: Arc<AtomicU64>,
    /// Where the current record began.
    mark: Option<Arc<AtomicU64>>,
    /// The first bytes, until it is known whether they are a byte-order mark.
    head: Option<Vec<u8>>,
}

impl Read for Counted {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        if let Some(mut head) = self.head.take() {
            (&mut self.source).take(3).read_to_end(&mut head)?;
            if head == b"\xef\xbb\xbf" {
                head.clear();
            }
            if !head.is_empty() {
                let length = head.len().min(buffer.len());
                buffer[..length].copy_from_slice(&head[..length]);
                if length < head.len() {
                    self.head = Some(head.split_off(length));
                }
                self.read.fetch_add(length as u64, Ordering::Relaxed);
                return Ok(length);
            }
        }
        if let Some(mark) = &self.mark {
            let pending = self.read.load(Ordering::Relaxed).saturating_sub(mark.load(Ordering::Relaxed));
            if pending > MAX_RECORD + (1 << 17) {
                return Err(std::io::Error::other(TooLong));
            }
        }
        let length = self.source.read(buffer)?;
        self.read.fetch_add(length as u64, Ordering::Relaxed);
        Ok(length)
    }
}
