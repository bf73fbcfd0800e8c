//! The first pass: inputs as batches of records, and what can be said of a row on its own.

use std::path::Path;

use super::{BATCH, PrepareOptions, SplitBy};
use crate::clean::{clean_text, normalised_key};
use crate::dedup::Features;
use crate::error::Result;
use crate::example::Example;
use crate::formats::{ExampleReader, ReadOptions, Record};
use crate::journal;
use crate::judged::judged_near_key;
use crate::minhash::Sketch;
use crate::split::parse_time;
use crate::spool::{Row, encode};

/// A row that has been looked at.
pub(super) enum Looked {
    Fine { encoded: Vec<u8>, features: Box<Features>, time: f64, row: Row },
    Bad { line: u64, reason: String, example: Option<Example> },
}

/// Everything about a row that needs no other row.
pub(super) fn look(options: &PrepareOptions, file: u32, record: Record) -> Looked {
    let line = record.line;
    let bad = |reason: String, example: Option<Example>| Looked::Bad { line, reason, example };
    let mut example = match record.example {
        Ok(example) => example,
        Err(reason) => return bad(reason, None),
    };
    // Cleaning takes memory of the text's size and more: a text that is far too long is not cleaned first.
    if example.text.len() > options.max_characters.saturating_mul(16) {
        let kept: String = example.text.chars().take(200).collect();
        return bad(too_long(options), Some(Example { text: kept, ..example }));
    }
    example.text = clean_text(&example.text, &options.clean);
    let key = normalised_key(&example.text);
    if key.is_empty() {
        return bad("nothing is left of the text but links, names and punctuation".into(), Some(example));
    }
    if example.text.chars().count() > options.max_characters {
        return bad(too_long(options), Some(example));
    }
    let sketch = Sketch::of_key(&key);
    if judged_near_key(&key, &sketch).is_some() {
        return bad("copies one of the sentences that models are judged by".into(), Some(example));
    }
    let time = match options.split_by {
        SplitBy::Seed => 0.0,
        SplitBy::Time => match example.time.as_deref().and_then(parse_time) {
            Some(time) => time,
            None => return bad("no usable time, and the split is by time".into(), Some(example)),
        },
    };
    let features = Box::new(Features::of(&key, &sketch));
    let row = Row { file, line, example };
    Looked::Fine { encoded: encode(&row), features, time, row }
}

fn too_long(options: &PrepareOptions) -> String {
    format!("longer than {} characters", options.max_characters)
}

/// An input as batches of records.
pub(super) enum Batches {
    File(Box<ExampleReader>),
    Journal { records: std::vec::IntoIter<Record>, total: usize, system_message: Option<String> },
}

impl Batches {
    pub(super) fn open(path: &Path, read: &ReadOptions) -> Result<Self> {
        if !journal::is_journal(path) {
            let read = ReadOptions { require_label: true, ..read.clone() };
            return Ok(Self::File(Box::new(ExampleReader::open(path, &read)?)));
        }
        let harvest = journal::harvest(path)?;
        let records: Vec<Record> = harvest
            .examples
            .into_iter()
            .enumerate()
            .map(|(index, example)| Record { line: index as u64 + 1, example: Ok(example) })
            .collect();
        let total = records.len();
        Ok(Self::Journal { records: records.into_iter(), total, system_message: harvest.system_message })
    }

    pub(super) fn columns(&self) -> String {
        match self {
            Self::File(reader) => reader.columns().to_string(),
            Self::Journal { .. } => "a journal of accepted answers".into(),
        }
    }

    pub(super) fn progress(&self) -> f64 {
        match self {
            Self::File(reader) => reader.progress(),
            Self::Journal { records, total, .. } => 1.0 - records.len() as f64 / (*total).max(1) as f64,
        }
    }

    pub(super) fn next_batch(&mut self) -> Result<Option<Vec<Record>>> {
        let batch: Vec<Record> = match self {
            Self::File(reader) => reader.by_ref().take(BATCH).collect::<Result<_>>()?,
            Self::Journal { records, .. } => records.by_ref().take(BATCH).collect(),
        };
        Ok((!batch.is_empty()).then_some(batch))
    }
}
