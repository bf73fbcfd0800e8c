//! From files and journals to data sets: read, clean, deduplicate, split, write, and say what was dropped and why.
//!
//! Rows go through a temporary file; in memory stay about 200 bytes a row (signatures, offsets, fates), so a million rows
//! of any length take some 250 MB. What is written:
//!
//! ```text
//! dataset.csv               all rows that were kept, with their split
//! fine_tune_dataset.jsonl   the training rows as chat messages
//! evaluation_dataset.jsonl  the held-out rows as chat messages
//! train.parquet, test.parquet
//! rejected.jsonl            the rows that were dropped, each with its reason
//! prepare.json              the report, for programs
//! README.md                 the data-set card
//! ```

mod read;

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::PathBuf;

use rayon::prelude::*;
use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::clean::{CleanOptions, normalised_key};
use crate::dedup::{Dedup, DedupOptions, Fate, Table};
use crate::error::{Error, Result};
use crate::example::Example;
use crate::formats::{AtomicFile, ChatDataset, CsvDataset, FIELDS, ParquetDataset, ReadOptions, write_atomically};
use crate::recipe::DEFAULT_SYSTEM_MESSAGE;
use crate::rng::mix;
use crate::split::{SplitOptions, SplitRow, Strata, check_share, held_out_by_time, held_out_rows};
use crate::spool::{Spool, SpoolWriter};
use crate::stats::Stats;
use read::{Batches, Looked, look};

/// Rows that are worked on at a time.
const BATCH: usize = 8192;
/// Rows in all, at most.
const MAX_ROWS: usize = u32::MAX as usize;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum SplitBy {
    #[default]
    Seed,
    Time,
}

#[derive(Clone, Debug)]
pub struct PrepareOptions {
    /// Files of any format that can be read, and journals.
    pub inputs: Vec<PathBuf>,
    pub out_dir: PathBuf,
    pub read: ReadOptions,
    pub clean: CleanOptions,
    pub dedup: DedupOptions,
    /// Texts of more characters are dropped.
    pub max_characters: usize,
    /// Drop training rows of the more frequent labels until all are equally frequent.
    pub balance: bool,
    pub split_by: SplitBy,
    pub held_out: f64,
    pub seed: u64,
    /// For the chat files; by default what a journal holds, or [`DEFAULT_SYSTEM_MESSAGE`].
    pub system_message: Option<String>,
}

impl Default for PrepareOptions {
    fn default() -> Self {
        Self {
            inputs: Vec::new(),
            out_dir: PathBuf::from("dataset"),
            read: ReadOptions::default(),
            clean: CleanOptions::default(),
            dedup: DedupOptions::default(),
            max_characters: 1_000,
            balance: false,
            split_by: SplitBy::Seed,
            held_out: 0.1,
            seed: 0,
            system_message: None,
        }
    }
}

/// One input, and what was made of it.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Input {
    /// The file name, without its folders.
    pub name: String,
    /// Which columns were read.
    pub columns: String,
    pub rows: u64,
    pub kept: u64,
    /// Rows dropped because an input before this one had them.
    pub duplicates_of_earlier_inputs: u64,
}

#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    pub inputs: Vec<Input>,
    pub rows: u64,
    pub kept: u64,
    pub train: u64,
    pub held_out: u64,
    /// Reason → rows.
    pub dropped: BTreeMap<String, u64>,
    /// Pairs of near copies that are labelled differently; both stay, on one side of the split.
    pub near_conflicts: u64,
    /// Some of them: the two texts, with their labels.
    pub near_conflict_examples: Vec<[String; 2]>,
    /// Groups of related rows, and how many rows are in groups of two or more.
    pub groups: u64,
    pub rows_in_groups: u64,
    pub split_by: SplitBy,
    pub held_out_share: f64,
    pub seed: u64,
    pub balanced: bool,
    pub system_message: String,
    pub train_stats: Stats,
    pub held_out_stats: Stats,
    /// What the user should look at.
    pub warnings: Vec<String>,
}

/// Does it all; `progress` hears the stage and how far it has come, 0 to 1, and returns whether to go on.
///
/// # Errors
///
/// If an input cannot be read, nothing is left of them, or the results cannot be written. Rows that are no examples are
/// dropped and reported, unless there is nothing else. [`Error::Stopped`] if `progress` says so; nothing is left behind then.
pub fn prepare(options: &PrepareOptions, progress: &mut dyn FnMut(&'static str, f64) -> bool) -> Result<Report> {
    check_share(options.held_out)?;
    if options.inputs.is_empty() {
        return Err(Error::usage("no input\n  hint: name a journal, or files in CSV, JSONL, Parquet or text"));
    }
    std::fs::create_dir_all(&options.out_dir).map_err(Error::io("create the directory", &options.out_dir))?;
    let mut gathered = gather(options, progress)?;
    go_on(progress("finding duplicates", 0.0))?;
    let spool = &gathered.spool;
    let dedup = gathered.table.resolve(&options.dedup, &|row| Ok(normalised_key(&spool.row(row)?.example.text)))?;
    note_near_conflicts(&mut gathered, &dedup)?;
    go_on(progress("splitting", 0.0))?;
    let places = place(options, &gathered, &dedup);
    write(options, gathered, &dedup, &places, progress)
}

fn go_on(yes: bool) -> Result<()> {
    if yes { Ok(()) } else { Err(Error::Stopped) }
}

/// The inputs, read.
struct Gathered {
    spool: Spool,
    table: Table,
    strata: Vec<u16>,
    /// Seconds since 1970 of every row, when the split is by time.
    times: Vec<f64>,
    fields: [bool; FIELDS.len()],
    report: Report,
    rejected: Rejected,
}

/// `rejected.jsonl` in the making.
struct Rejected {
    path: PathBuf,
    file: AtomicFile,
}

impl Rejected {
    fn write(&mut self, source: &str, line: u64, reason: &str, example: Option<&Example>) -> Result<()> {
        let mut row: Map<String, Value> = Map::new();
        row.insert("source".into(), source.into());
        row.insert("line".into(), line.into());
        row.insert("reason".into(), reason.into());
        if let Some(example) = example {
            row.insert("text".into(), example.text.as_str().into());
            row.insert("label".into(), example.label.as_str().into());
        }
        serde_json::to_writer(&mut self.file, &row)
            .map_err(std::io::Error::from)
            .and_then(|()| self.file.write_all(b"\n"))
            .map_err(Error::io("write", &self.path))
    }
}

fn gather(options: &PrepareOptions, progress: &mut dyn FnMut(&'static str, f64) -> bool) -> Result<Gathered> {
    let path = options.out_dir.join("rejected.jsonl");
    let mut rejected = Rejected { file: AtomicFile::create(&path)?, path };
    let mut spool = SpoolWriter::create(&options.out_dir)?;
    let mut report = Report {
        split_by: options.split_by,
        held_out_share: options.held_out,
        seed: options.seed,
        balanced: options.balance,
        ..Report::default()
    };
    let (mut table, mut numbers, mut strata, mut times) = (Table::default(), Strata::default(), Vec::new(), Vec::new());
    let mut fields = [false; FIELDS.len()];
    let mut system_message = options.system_message.clone();
    let mut first_problem = None;
    for (number, path) in options.inputs.iter().enumerate() {
        let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
        let mut input = Input { name: name.clone(), ..Input::default() };
        let mut batches = Batches::open(path, &options.read)?;
        input.columns = batches.columns();
        if let Batches::Journal { system_message: Some(found), .. } = &batches {
            system_message.get_or_insert_with(|| found.clone());
        }
        while let Some(records) = batches.next_batch()? {
            go_on(progress("reading", (number as f64 + batches.progress()) / options.inputs.len() as f64))?;
            input.rows += records.len() as u64;
            if table.len() + records.len() > MAX_ROWS {
                return Err(Error::file(
                    path,
                    None,
                    format!("more than {MAX_ROWS} rows in all\n  hint: prepare them in parts"),
                ));
            }
            let looked: Vec<Looked> =
                records.into_par_iter().map(|record| look(options, number as u32, record)).collect();
            for looked in looked {
                match looked {
                    Looked::Bad { line, reason, example } => {
                        // The first line tells the reason, what follows is the mend.
                        let kind = reason.lines().next().unwrap_or_default();
                        rejected.write(&name, line, kind, example.as_ref())?;
                        *report.dropped.entry(kind.to_owned()).or_default() += 1;
                        first_problem.get_or_insert_with(|| Error::file(path, line, reason));
                    }
                    Looked::Fine { encoded, features, time, row } => {
                        spool.push(&encoded)?;
                        table.push(&features, &row.example.label, row.example.pair.as_deref());
                        strata.push(numbers.of(&row.example));
                        if options.split_by == SplitBy::Time {
                            times.push(time);
                        }
                        for (used, (_, value)) in fields.iter_mut().zip(row.example.optional_fields()) {
                            *used |= value.is_some();
                        }
                    }
                }
            }
        }
        report.rows += input.rows;
        report.inputs.push(input);
    }
    if table.len() == 0 {
        return Err(first_problem.unwrap_or_else(|| Error::usage("there are no rows in the input")));
    }
    report.system_message = system_message.unwrap_or_else(|| DEFAULT_SYSTEM_MESSAGE.into());
    limit_reasons(&mut report.dropped);
    Ok(Gathered { spool: spool.finish()?, table, strata, times, fields, report, rejected })
}

/// Reasons that quote what they found are as many as the finds: the rarest beyond twenty are counted together.
fn limit_reasons(dropped: &mut BTreeMap<String, u64>) {
    if dropped.len() <= 20 {
        return;
    }
    let mut reasons: Vec<(String, u64)> = std::mem::take(dropped).into_iter().collect();
    reasons.sort_by(|a, b| b.1.cmp(&a.1).then(a.0.cmp(&b.0)));
    let others: u64 = reasons.drain(20..).map(|(_, rows)| rows).sum();
    dropped.extend(reasons);
    *dropped.entry("other reasons (see rejected.jsonl)".into()).or_default() += others;
}

fn note_near_conflicts(gathered: &mut Gathered, dedup: &Dedup) -> Result<()> {
    gathered.report.near_conflicts = dedup.near_conflict_count;
    for (a, b) in dedup.near_conflicts.iter().take(10) {
        let shown = |row: u32| -> Result<String> {
            let example = gathered.spool.row(row)?.example;
            Ok(format!("{}: {}", example.label, example.text))
        };
        let pair = [shown(*a)?, shown(*b)?];
        gathered.report.near_conflict_examples.push(pair);
    }
    Ok(())
}

/// Where a kept row goes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    Dropped,
    Unbalanced,
    Train,
    HeldOut,
}

fn place(options: &PrepareOptions, gathered: &Gathered, dedup: &Dedup) -> Vec<Place> {
    let kept: Vec<u32> = (0..dedup.fates.len() as u32).filter(|row| dedup.fates[*row as usize] == Fate::Keep).collect();
    let groups = |row: &u32| dedup.groups[*row as usize];
    let held_out = match options.split_by {
        SplitBy::Seed => {
            let rows: Vec<SplitRow> = kept
                .iter()
                .map(|row| SplitRow {
                    group: groups(row),
                    stratum: gathered.strata[*row as usize],
                    hash: gathered.table.key(*row),
                })
                .collect();
            held_out_rows(&rows, &SplitOptions { held_out: options.held_out, seed: options.seed })
        }
        SplitBy::Time => {
            let group_of: Vec<u32> = kept.iter().map(groups).collect();
            let times: Vec<f64> = kept.iter().map(|row| gathered.times[*row as usize]).collect();
            held_out_by_time(&group_of, &times, options.held_out)
        }
    };
    let mut places = vec![Place::Dropped; dedup.fates.len()];
    for (row, held_out) in kept.iter().zip(held_out) {
        places[*row as usize] = if held_out { Place::HeldOut } else { Place::Train };
    }
    if options.balance {
        balance(options.seed, gathered, &mut places);
    }
    places
}

/// Leaves as many training rows of every label as there are of the rarest, chosen by hash.
fn balance(seed: u64, gathered: &Gathered, places: &mut [Place]) {
    let mut by_label: BTreeMap<u8, Vec<(u64, usize)>> = BTreeMap::new();
    for (row, _) in places.iter().enumerate().filter(|(_, place)| **place == Place::Train) {
        let hash = mix(gathered.table.key(row as u32) ^ mix(seed));
        by_label.entry(gathered.table.label(row as u32)).or_default().push((hash, row));
    }
    let fewest = by_label.values().map(Vec::len).min().unwrap_or(0);
    for rows in by_label.values_mut() {
        rows.sort_unstable();
        for (_, row) in rows.iter().skip(fewest) {
            places[*row] = Place::Unbalanced;
        }
    }
}

fn write(
    options: &PrepareOptions,
    gathered: Gathered,
    dedup: &Dedup,
    places: &[Place],
    progress: &mut dyn FnMut(&'static str, f64) -> bool,
) -> Result<Report> {
    let Gathered { mut spool, fields, mut report, mut rejected, .. } = gathered;
    let fields: Vec<&'static str> =
        FIELDS.into_iter().zip(fields).filter(|(_, used)| *used).map(|(name, _)| name).collect();
    let path = |name: &str| options.out_dir.join(name);
    let mut table = CsvDataset::create(&path("dataset.csv"), &fields, true)?;
    let mut chats = [
        ChatDataset::create(&path("fine_tune_dataset.jsonl"), &report.system_message)?,
        ChatDataset::create(&path("evaluation_dataset.jsonl"), &report.system_message)?,
    ];
    let mut parquets = [
        ParquetDataset::create(&path("train.parquet"), &fields)?,
        ParquetDataset::create(&path("test.parquet"), &fields)?,
    ];
    // Which input the row that made another a duplicate came from; rows of one input are contiguous.
    let total = spool.len();
    let mut ends = vec![0u32; report.inputs.len()];
    spool.for_each(|number, row| {
        if number.is_multiple_of(4096) {
            go_on(progress("writing", f64::from(number) / total as f64))?;
        }
        let file = row.file as usize;
        if let Some(end) = ends.get_mut(file) {
            *end = number + 1;
        }
        let source = report.inputs.get(file).map(|input| input.name.clone()).unwrap_or_default();
        let split = match places.get(number as usize).copied().unwrap_or(Place::Dropped) {
            place @ (Place::Dropped | Place::Unbalanced) => {
                let (reason, of) = match dedup.fates[number as usize] {
                    _ if place == Place::Unbalanced => ("dropped to balance the labels", None),
                    Fate::Exact { of } => ("exact duplicate", Some(of)),
                    Fate::Near { of } => ("near duplicate", Some(of)),
                    Fate::Conflict { of } => ("the same text with another label", Some(of)),
                    Fate::Keep => ("kept", None),
                };
                *report.dropped.entry(reason.into()).or_default() += 1;
                if let (Some(of), Some(start)) = (of, file.checked_sub(1).and_then(|before| ends.get(before)))
                    && of < *start
                    && let Some(input) = report.inputs.get_mut(file)
                {
                    input.duplicates_of_earlier_inputs += 1;
                }
                return rejected.write(&source, row.line, reason, Some(&row.example));
            }
            Place::Train => 0,
            Place::HeldOut => 1,
        };
        if let Some(input) = report.inputs.get_mut(file) {
            input.kept += 1;
        }
        report.kept += 1;
        if split == 0 {
            report.train += 1;
            report.train_stats.add(&row.example);
        } else {
            report.held_out += 1;
            report.held_out_stats.add(&row.example);
        }
        table.write(&row.example, Some(if split == 0 { "train" } else { "test" }))?;
        chats[split].write(&row.example)?;
        parquets[split].write(&row.example)
    })?;
    count_groups(dedup, places, &mut report);
    warn(&mut report);
    go_on(progress("writing", 1.0))?;
    table.finish()?;
    chats.into_iter().try_for_each(ChatDataset::finish)?;
    parquets.into_iter().try_for_each(ParquetDataset::finish)?;
    rejected.file.commit()?;
    let mut json = serde_json::to_vec_pretty(&json!(report)).unwrap_or_default();
    json.push(b'\n');
    write_atomically(&path("prepare.json"), &json)?;
    write_atomically(&path("README.md"), crate::card::card(&report).as_bytes())?;
    Ok(report)
}

fn count_groups(dedup: &Dedup, places: &[Place], report: &mut Report) {
    let mut sizes: std::collections::HashMap<u32, u64> = std::collections::HashMap::new();
    for (group, place) in dedup.groups.iter().zip(places) {
        if matches!(place, Place::Train | Place::HeldOut) {
            *sizes.entry(*group).or_default() += 1;
        }
    }
    report.groups = sizes.values().filter(|size| **size > 1).count() as u64;
    report.rows_in_groups = sizes.values().filter(|size| **size > 1).sum();
}

fn warn(report: &mut Report) {
    let dropped = |reason: &str| report.dropped.get(reason).copied().unwrap_or(0);
    let mut warnings = Vec::new();
    let conflicts = dropped("the same text with another label");
    if conflicts > 0 {
        warnings.push(format!(
            "{conflicts} rows repeat a text with another label: the majority was kept, ties were dropped"
        ));
    }
    if report.near_conflicts > 0 {
        warnings.push(format!(
            "{} pairs of near copies carry different labels: both were kept, on the same side of the split",
            report.near_conflicts
        ));
    }
    let (train, all) = (report.train, report.kept);
    for label in crate::LABELS {
        let count = report.train_stats.labels.get(label).copied().unwrap_or(0);
        if count == 0 {
            warnings.push(format!("no training row is {label}"));
        } else if count * 10 < train {
            warnings.push(format!("only {count} of {train} training rows are {label}"));
        }
    }
    if report.held_out == 0 && report.held_out_share > 0.0 {
        warnings.push(format!("nothing is held out: {all} rows are too few, or all are related"));
    }
    let bad: u64 = report.rows - report.kept;
    if bad * 2 > report.rows {
        warnings.push(format!("{bad} of {} rows were dropped: see rejected.jsonl", report.rows));
    }
    report.warnings = warnings;
}
