//! Files as streams of examples: which columns, which labels, and what is wrong with a row.

use std::borrow::Cow;
use std::collections::VecDeque;
use std::path::Path;

use arrow_schema::SchemaRef;
use serde_json::Value;

use super::columns::{Columns, choose};
use super::format::Format;
use super::parquet_io::class_names;
use super::rows::{Body, Chunk, RowReader};
use crate::error::{Error, Result};
use crate::example::Example;
use crate::labels::LabelMap;
use crate::parse;

/// The longest text file that is read as a whole.
const MAX_TEXT_FILE: u64 = 64 << 20;

#[derive(Clone, Debug)]
pub struct ReadOptions {
    /// Column of the text; guessed if not given.
    pub text_column: Option<String>,
    /// Column of the label; guessed if not given.
    pub label_column: Option<String>,
    /// What foreign labels mean.
    pub label_map: LabelMap,
    /// Whether a file without labels is an error. If not, examples without one have an empty label.
    pub require_label: bool,
}

impl Default for ReadOptions {
    fn default() -> Self {
        Self { text_column: None, label_column: None, label_map: LabelMap::default(), require_label: true }
    }
}

/// One row of a file: where it stands, and the example or what is wrong with it.
#[derive(Clone, Debug)]
pub struct Record {
    /// Line (CSV, JSONL, txt) or row (Parquet), from 1.
    pub line: u64,
    pub example: Result<Example, String>,
}

/// Iterates over the records of a file. Errors of the file itself end it; errors of a row are in the [`Record`].
pub struct ExampleReader {
    source: Source,
    columns: Columns,
    label_map: LabelMap,
    require_label: bool,
    ready: VecDeque<Record>,
    /// A chunk that was read ahead to learn what the columns and labels are.
    pending: Option<Chunk>,
}

enum Source {
    Rows(Box<RowReader>),
    /// Everything has been parsed already.
    Done,
}

impl ExampleReader {
    /// # Errors
    ///
    /// If the file cannot be read, or its columns cannot be told.
    pub fn open(path: &Path, options: &ReadOptions) -> Result<Self> {
        let format = Format::detect(path)?;
        if format == Format::Text && options.require_label {
            return Self::open_text(path, options);
        }
        let mut rows = RowReader::open_as(path, format)?;
        let Some(first) = rows.next().transpose()? else {
            return Err(Error::file(path, None, "there are no rows in it"));
        };
        let names = rows.declared_columns().unwrap_or_else(|| names_of(&first));
        let mut options = options.clone();
        if names.iter().all(|name| name.starts_with("column_")) && matches!(first.body, Body::Csv { .. }) {
            guess_headless(&first, &names, &mut options);
        }
        let mut columns =
            choose(&names, options.text_column.as_deref(), options.label_column.as_deref(), options.require_label)
                .map_err(|message| Error::file(path, None, message))?;
        let cells = first.values(&columns.text).map_err(|message| Error::file(path, None, message))?;
        if options.label_column.is_none() && cells.iter().any(|cell| chat_turn(cell).is_ok()) {
            columns = Columns {
                text: columns.text,
                chat: true,
                guessed: options.text_column.is_none(),
                ..Columns::default()
            };
        }
        let mut label_map = options.label_map;
        if let (Some(label), false) = (&columns.label, label_map.is_explicit()) {
            if let Some(map) = rows.arrow_schema().and_then(|schema: SchemaRef| class_names(&schema, label)) {
                label_map = label_map.with_class_names(&map);
            }
            let labels = first.texts(label).map_err(|message| Error::file(path, None, message))?;
            label_map.learn(labels.iter().flatten().map(Cow::as_ref));
        }
        Ok(Self {
            source: Source::Rows(Box::new(rows)),
            columns,
            label_map,
            require_label: options.require_label,
            ready: VecDeque::new(),
            pending: Some(first),
        })
    }

    /// A labelled text file: `---` blocks, or `label: tweet` lines.
    fn open_text(path: &Path, options: &ReadOptions) -> Result<Self> {
        let size = std::fs::metadata(path).map_err(Error::io("read", path))?.len();
        if size > MAX_TEXT_FILE {
            let message =
                format!("a text file of {size} bytes, expected at most {MAX_TEXT_FILE}\n  hint: use CSV or JSONL");
            return Err(Error::file(path, None, message));
        }
        let bytes = std::fs::read(path).map_err(Error::io("read", path))?;
        let content = std::str::from_utf8(&bytes)
            .map_err(|_| Error::file(path, None, "the text is not UTF-8\n  hint: convert it with iconv"))?;
        let ready: VecDeque<Record> = parse::parse_document(content, &options.label_map)
            .into_iter()
            .map(|(line, example)| Record { line, example })
            .collect();
        if ready.is_empty() {
            let message =
                "no labelled text found\n  hint: write `label: tweet` lines, or tweet, a line `---`, and the label";
            return Err(Error::file(path, None, message));
        }
        let columns = Columns { text: "text".into(), label: Some("label".into()), ..Columns::default() };
        Ok(Self {
            source: Source::Done,
            columns,
            label_map: options.label_map.clone(),
            require_label: true,
            ready,
            pending: None,
        })
    }

    /// Which columns are read, and whether they were guessed.
    pub fn columns(&self) -> &Columns {
        &self.columns
    }

    /// Share of the file read so far, 0 to 1.
    pub fn progress(&self) -> f64 {
        match &self.source {
            Source::Rows(rows) => rows.progress().unwrap_or(0.0),
            Source::Done => 1.0,
        }
    }

    fn fill(&mut self) -> Result<()> {
        while self.ready.is_empty() {
            let chunk = match (self.pending.take(), &mut self.source) {
                (Some(chunk), _) => chunk,
                (None, Source::Rows(rows)) => match rows.next().transpose()? {
                    Some(chunk) => chunk,
                    None => return Ok(()),
                },
                (None, Source::Done) => return Ok(()),
            };
            let path = match &self.source {
                Source::Rows(rows) => rows.path(),
                Source::Done => Path::new(""),
            };
            let records = if self.columns.chat { self.chat_records(&chunk) } else { self.plain_records(&chunk) };
            self.ready.extend(records.map_err(|message| Error::file(path, None, message))?);
        }
        Ok(())
    }

    fn plain_records(&self, chunk: &Chunk) -> Result<Vec<Record>, String> {
        let texts = chunk.texts(&self.columns.text)?;
        let labels = match &self.columns.label {
            Some(label) => chunk.texts(label)?,
            None => vec![None; chunk.len()],
        };
        let fields = self
            .columns
            .fields
            .iter()
            .map(|(field, column)| Ok((*field, chunk.texts(column)?)))
            .collect::<Result<Vec<_>, String>>()?;
        let mut records = Vec::with_capacity(chunk.len());
        for (index, (text, label)) in texts.iter().zip(&labels).enumerate() {
            let mut example = self.labelled(text.as_deref(), label.as_deref());
            if let Ok(example) = &mut example {
                for (field, cells) in &fields {
                    if let Some(cell) = &cells[index] {
                        example.set_optional_field(field, cell.trim().to_owned());
                    }
                }
            }
            records.push(Record { line: chunk.line(index), example });
        }
        Ok(records)
    }

    fn chat_records(&self, chunk: &Chunk) -> Result<Vec<Record>, String> {
        let values = chunk.values(&self.columns.text)?;
        Ok(values
            .iter()
            .enumerate()
            .map(|(index, messages)| {
                let example = chat_turn(messages).and_then(|(user, answer)| self.labelled(Some(user), answer));
                Record { line: chunk.line(index), example }
            })
            .collect())
    }

    fn labelled(&self, text: Option<&str>, label: Option<&str>) -> Result<Example, String> {
        let text = text.unwrap_or_default();
        if text.trim().is_empty() {
            return Err("the text is empty".into());
        }
        let raw = label.unwrap_or_default();
        match self.label_map.map(raw) {
            Some(label) => Ok(Example::new(text, label)),
            None if !self.require_label => Ok(Example::new(text, "")),
            None => Err(self.label_map.complaint(raw)),
        }
    }
}

impl Iterator for ExampleReader {
    type Item = Result<Record>;

    fn next(&mut self) -> Option<Self::Item> {
        match self.fill() {
            Ok(()) => self.ready.pop_front().map(Ok),
            Err(error) => {
                self.source = Source::Done;
                Some(Err(error))
            }
        }
    }
}

/// The last user message and the assistant's answer to it. Both spellings of chat data are known: `role`/`content` and
/// `from`/`value`.
fn chat_turn(messages: &Value) -> Result<(&str, Option<&str>), String> {
    let messages = messages.as_array().ok_or("expected a list of messages")?;
    let field = |message: &'_ Value, names: [&str; 2]| -> Option<String> {
        names.iter().find_map(|name| message.get(name)).and_then(Value::as_str).map(str::to_owned)
    };
    let (mut user, mut answer) = (None, None);
    for message in messages {
        let content = ["content", "value"].iter().find_map(|name| message.get(name)).and_then(Value::as_str);
        match field(message, ["role", "from"]).unwrap_or_default().as_str() {
            "user" | "human" => (user, answer) = (content, None),
            "assistant" | "gpt" => answer = content,
            _ => {}
        }
    }
    Ok((user.ok_or("there is no user message")?, answer))
}

fn names_of(chunk: &Chunk) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    if let Body::Json(rows) = &chunk.body {
        for name in rows.iter().flat_map(|row| row.keys()) {
            if !names.contains(name) {
                names.push(name.clone());
            }
        }
    }
    names
}

/// In a file without a header: the label column is the one whose cells are labels, the text the longest other.
fn guess_headless(chunk: &Chunk, names: &[String], options: &mut ReadOptions) {
    let cells = |name: &String| chunk.texts(name).unwrap_or_default();
    let is_label = |name: &&String| {
        let cells = cells(name);
        cells.iter().all(|cell| cell.as_deref().is_some_and(|cell| options.label_map.map(cell).is_some()))
    };
    let label = options.label_column.clone().or_else(|| names.iter().find(is_label).cloned());
    let length = |name: &&String| -> usize { cells(name).iter().flatten().map(|cell| cell.len()).sum() };
    let text = names.iter().filter(|name| Some(*name) != label.as_ref()).max_by_key(length).cloned();
    options.label_column = label;
    options.text_column = options.text_column.take().or(text);
}

/// All examples of a file; the first bad row is an error that names its line.
///
/// # Errors
///
/// Those of [`ExampleReader`], and every row that is no example.
pub fn read_examples(path: &Path, options: &ReadOptions) -> Result<Vec<Example>> {
    read_examples_reported(path, options).map(|(examples, _)| examples)
}

/// [`read_examples`], with the columns that were used (to be shown to the user where they were guessed).
///
/// # Errors
///
/// As [`read_examples`].
pub fn read_examples_reported(path: &Path, options: &ReadOptions) -> Result<(Vec<Example>, Columns)> {
    let reader = ExampleReader::open(path, options)?;
    let columns = reader.columns().clone();
    let mut examples = Vec::new();
    for record in reader {
        let record = record?;
        examples.push(record.example.map_err(|message| Error::file(path, record.line, message))?);
    }
    Ok((examples, columns))
}
