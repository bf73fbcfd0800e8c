//! Parquet for DuckDB, polars and pandas: hive-partitioned by day, with the times that a backtest needs.
//!
//! ```text
//! OUT/scores/date=2026-11-28/scores.parquet              a row for each post
//! OUT/bars/interval=5m/date=2026-11-28/bars.parquet      a row for each revision of each closed window
//! ```
//!
//! Point in time: at moment T exactly the rows with `available_at <= T` were known; of a window, the one with the highest
//! revision among them. A day's file is written anew as a whole, so an export may be repeated at any time.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow_array::builder::{
    BooleanBuilder, Float64Builder, Int64Builder, ListBuilder, StringBuilder, TimestampMillisecondBuilder,
    UInt32Builder,
};
use arrow_array::{ArrayRef, RecordBatch};
use cashtag_corpus::formats::AtomicFile;
use parquet::arrow::ArrowWriter;
use parquet::basic::{Compression, ZstdLevel};
use parquet::file::properties::WriterProperties;

use crate::error::{Error, Result};
use crate::scorer::ModelInfo;
use crate::store::{Bar, Location, Reader, StoredPost};
use crate::time::{self, Millis};
use crate::windows::{Scope, Values, Window};

/// Read at a time; fewer where texts are long.
const ROWS: usize = 8_192;
/// A row group is in memory until it is written: it ends at so many encoded bytes, too.
const GROUP_BYTES: usize = 16 << 20;

/// What was written.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Exported {
    pub posts: u64,
    pub bars: u64,
    pub files: Vec<PathBuf>,
}

/// Writes everything that a store has, from a day on if one is given.
///
/// # Errors
/// A store that cannot be read, or a directory that cannot be written.
pub fn export(store: &Location, out: &Path, since: Option<Millis>) -> Result<Exported> {
    let reader = store.reader()?;
    let since = since.map_or(Millis::MIN, |t| Window::D1.start(t));
    let mut exported = Exported::default();
    let models = reader.models()?;
    for day in reader.post_days(since)? {
        let path = out.join(format!("scores/date={}/scores.parquet", time::date(day)));
        exported.posts += write_scores(&*reader, &models, day, &path)?;
        exported.files.push(path);
    }
    for window in Window::ALL {
        for day in reader.bar_days(window, since)? {
            let path = out.join(format!("bars/interval={}/date={}/bars.parquet", window.name(), time::date(day)));
            exported.bars += write_bars(&*reader, window, day, &path)?;
            exported.files.push(path);
        }
    }
    Ok(exported)
}

/// A Parquet file in the making.
struct Table {
    path: PathBuf,
    writer: Option<ArrowWriter<AtomicFile>>,
    rows: u64,
}

impl Table {
    fn new(path: &Path) -> Self {
        Self { path: path.to_owned(), writer: None, rows: 0 }
    }

    fn write(&mut self, columns: Vec<(String, ArrayRef)>) -> Result<()> {
        let wrong =
            |path: &Path, e: &dyn std::fmt::Display| Error::Invalid(format!("cannot write {}: {e}", path.display()));
        let batch =
            RecordBatch::try_from_iter_with_nullable(columns.into_iter().map(|(name, array)| (name, array, true)))
                .map_err(|e| wrong(&self.path, &e))?;
        let writer = match &mut self.writer {
            Some(writer) => writer,
            none => {
                let file = AtomicFile::create(&self.path)?;
                let properties = WriterProperties::builder()
                    .set_compression(Compression::ZSTD(ZstdLevel::default()))
                    .set_max_row_group_bytes(Some(GROUP_BYTES))
                    .build();
                let made = ArrowWriter::try_new(file, batch.schema(), Some(properties));
                none.insert(made.map_err(|e| wrong(&self.path, &e))?)
            }
        };
        self.rows += batch.num_rows() as u64;
        writer.write(&batch).map_err(|e| wrong(&self.path, &e))
    }

    fn finish(self) -> Result<u64> {
        if let Some(writer) = self.writer {
            let wrong =
                |e: &dyn std::fmt::Display| Error::Invalid(format!("cannot write {}: {e}", self.path.display()));
            writer.into_inner().map_err(|e| wrong(&e))?.commit()?;
        }
        Ok(self.rows)
    }
}

fn write_scores(reader: &dyn Reader, models: &[(i64, ModelInfo)], day: Millis, path: &Path) -> Result<u64> {
    let mut labels: Vec<String> = Vec::new();
    for label in models.iter().flat_map(|(_, m)| &m.labels) {
        if !labels.contains(label) {
            labels.push(label.clone());
        }
    }
    let mut table = Table::new(path);
    let mut after = -1i64;
    loop {
        let posts = reader.posts_of_day(day, after, ROWS)?;
        let Some(last) = posts.last() else { return table.finish() };
        after = last.post.seq as i64;
        table.write(score_columns(&posts, models, &labels))?;
    }
}

fn times(of: impl Iterator<Item = Millis>) -> ArrayRef {
    let mut column = TimestampMillisecondBuilder::new().with_timezone("UTC");
    of.for_each(|t| column.append_value(t));
    Arc::new(column.finish())
}

fn texts<'a>(of: impl Iterator<Item = Option<&'a str>>) -> ArrayRef {
    let mut column = StringBuilder::new();
    of.for_each(|t| column.append_option(t));
    Arc::new(column.finish())
}

fn floats(of: impl Iterator<Item = Option<f64>>) -> ArrayRef {
    let mut column = Float64Builder::new();
    of.for_each(|x| column.append_option(x));
    Arc::new(column.finish())
}

fn integers(of: impl Iterator<Item = u64>) -> ArrayRef {
    let mut column = Int64Builder::new();
    of.for_each(|x| column.append_value(i64::try_from(x).unwrap_or(i64::MAX)));
    Arc::new(column.finish())
}

fn flags(of: impl Iterator<Item = bool>) -> ArrayRef {
    let mut column = BooleanBuilder::new();
    of.for_each(|x| column.append_value(x));
    Arc::new(column.finish())
}

fn lists<'a>(of: impl Iterator<Item = Vec<&'a str>>) -> ArrayRef {
    let mut column = ListBuilder::new(StringBuilder::new());
    for list in of {
        list.into_iter().for_each(|text| column.values().append_value(text));
        column.append(true);
    }
    Arc::new(column.finish())
}

fn score_columns(posts: &[StoredPost], models: &[(i64, ModelInfo)], labels: &[String]) -> Vec<(String, ArrayRef)> {
    let each = || posts.iter().map(|p| &p.post);
    let model = |id: i64| models.iter().find(|(m, _)| *m == id).map(|(_, m)| m);
    let of_model = |get: fn(&ModelInfo) -> Option<&str>| texts(posts.iter().map(|p| model(p.model).and_then(get)));
    let mut columns: Vec<(String, ArrayRef)> = Vec::new();
    let mut add = |name: &str, array: ArrayRef| columns.push((name.to_owned(), array));
    add("seq", integers(each().map(|p| p.seq)));
    add("source", texts(each().map(|p| Some(&*p.post.source))));
    add("id", texts(each().map(|p| Some(&*p.post.id))));
    add("author", texts(each().map(|p| Some(&*p.post.author))));
    add("event_time", times(each().map(|p| p.post.event_time)));
    add("received_at", times(each().map(|p| p.post.received_at)));
    add("scored_at", times(each().map(|p| p.scored_at)));
    add("available_at", times(each().map(|p| p.available_at)));
    add("text", texts(posts.iter().map(|p| p.has_text.then_some(&*p.post.post.text))));
    add("url", texts(each().map(|p| p.post.url.as_deref())));
    add("tickers", lists(each().map(|p| p.tickers.iter().map(|t| &*t.symbol).collect())));
    add("sectors", lists(each().map(|p| p.sectors.iter().map(String::as_str).collect())));
    for label in labels {
        let column = posts.iter().map(|p| {
            let index = model(p.model)?.labels.iter().position(|l| l == label)?;
            p.post.probabilities.get(index).copied().map(f64::from)
        });
        add(&format!("p_{}", label.to_lowercase()), floats(column));
    }
    add("label", texts(posts.iter().map(|p| model(p.model)?.labels.get(p.post.label).map(String::as_str))));
    add("sentiment_score", floats(each().map(|p| Some(p.score))));
    add("confidence", floats(each().map(|p| Some(f64::from(p.confidence())))));
    add("weight", floats(each().map(|p| Some(p.weight))));
    add("is_copy_of", texts(each().map(|p| p.is_copy_of.as_deref())));
    add("damped", flags(each().map(|p| p.damped)));
    add("too_late", flags(each().map(|p| p.too_late)));
    add("model_id", of_model(|m| Some(m.model_hash.as_str())));
    add("adapter_sha", of_model(|m| m.adapter_hash.as_deref()));
    add("prompt_hash", of_model(|m| Some(m.prompt_hash.as_str())));
    columns
}

fn write_bars(reader: &dyn Reader, window: Window, day: Millis, path: &Path) -> Result<u64> {
    let mut table = Table::new(path);
    let mut after: Option<Bar> = None;
    loop {
        let bars = reader.bars_of_day(window, day, after.as_ref(), ROWS)?;
        let Some(last) = bars.last() else { return table.finish() };
        after = Some(last.clone());
        table.write(bar_columns(&bars, window))?;
    }
}

fn bar_columns(bars: &[Bar], window: Window) -> Vec<(String, ArrayRef)> {
    let each = || bars.iter();
    let float = |get: fn(&Values) -> Option<f64>| floats(each().map(|b| get(&b.values)));
    let integer = |get: fn(&Values) -> u64| integers(each().map(|b| get(&b.values)));
    let mut revisions = UInt32Builder::new();
    each().for_each(|b| revisions.append_value(b.revision));
    let trend = |v: &Values| v.trend.map(|t| ["rising", "falling", "flat"][t as usize]);
    vec![
        ("scope".into(), texts(each().map(|b| Some(b.scope.name())))),
        ("key".into(), texts(each().map(|b| Some(&*b.key)))),
        ("ticker".into(), texts(each().map(|b| (b.scope == Scope::Ticker).then_some(&*b.key)))),
        ("start".into(), times(each().map(|b| b.start))),
        ("end".into(), times(each().map(|b| b.start + window.size()))),
        // What a join on time takes: the moment up to which the window has looked.
        ("event_time".into(), times(each().map(|b| b.start + window.size()))),
        ("available_at".into(), times(each().map(|b| b.available_at))),
        ("revision".into(), Arc::new(revisions.finish())),
        ("mentions".into(), integer(|v| v.mentions)),
        ("unique_authors".into(), integer(|v| v.unique_authors)),
        ("positive_count".into(), integer(|v| v.positive_count)),
        ("neutral_count".into(), integer(|v| v.neutral_count)),
        ("negative_count".into(), integer(|v| v.negative_count)),
        ("sentiment_score".into(), float(|v| v.sentiment_score)),
        ("ci_low".into(), float(|v| v.ci_low)),
        ("ci_high".into(), float(|v| v.ci_high)),
        ("bullish_pct".into(), float(|v| v.bullish_pct)),
        ("bearish_pct".into(), float(|v| v.bearish_pct)),
        ("buzz_score".into(), float(|v| Some(v.buzz_score))),
        ("attention".into(), float(|v| v.attention)),
        ("attention_z".into(), float(|v| v.attention_z)),
        ("momentum".into(), float(|v| v.momentum)),
        ("score_z".into(), float(|v| v.score_z)),
        ("trend".into(), texts(each().map(|b| trend(&b.values)))),
        ("copies".into(), integer(|v| v.copies)),
        ("damped".into(), integer(|v| v.damped)),
    ]
}
