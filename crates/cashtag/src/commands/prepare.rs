//! `cashtag prepare`: from journals and files to data sets.

use std::path::PathBuf;

use cashtag_corpus::formats::data_files;
use cashtag_corpus::prepare::{PrepareOptions, Report, SplitBy, prepare};
use cashtag_corpus::{CleanOptions, DedupOptions, ReadOptions};

use super::corpus::{corpus_error, label_map};
use crate::progress::{Progress, Unit};
use crate::{exit, output};

#[derive(clap::Args)]
#[command(after_help = "Examples:\n  cashtag prepare generated/journal.jsonl\n  \
cashtag prepare tweets.csv more.parquet --label-map 0=Negative,1=Positive,2=Neutral --balance\n  \
cashtag prepare tweets.jsonl --split time --held-out 0.2 --out by-time")]
pub(crate) struct Args {
    /// Journals of `generate`, .csv, .tsv, .jsonl, .parquet or .txt files, or directories of them
    #[arg(required = true, value_name = "FILE")]
    inputs: Vec<PathBuf>,
    /// Where the data set is written
    #[arg(long, value_name = "DIR", default_value = "dataset")]
    out: PathBuf,
    /// Column of the text [default: guessed]
    #[arg(long, value_name = "NAME", help_heading = "Reading")]
    text_column: Option<String>,
    /// Column of the label [default: guessed]
    #[arg(long, value_name = "NAME", help_heading = "Reading")]
    label_column: Option<String>,
    /// What foreign labels mean, as in 0=Negative,1=Neutral,2=Positive
    #[arg(long, value_name = "MAP", help_heading = "Reading")]
    label_map: Option<String>,
    /// Replace links by `http`
    #[arg(long, help_heading = "Cleaning")]
    mask_urls: bool,
    /// Replace user names by `@user`
    #[arg(long, help_heading = "Cleaning")]
    mask_users: bool,
    /// Drop texts of more characters
    #[arg(long, value_name = "N", default_value_t = 1000, help_heading = "Cleaning")]
    max_characters: usize,
    /// Similarity (0 to 1) from which texts with one label are copies of each other
    #[arg(long, value_name = "SIMILARITY", default_value_t = 0.7, help_heading = "Cleaning")]
    near: f64,
    /// Drop training rows until all labels are equally frequent
    #[arg(long, help_heading = "Splitting")]
    balance: bool,
    /// Hold out a random part, or the latest rows: seed, time
    #[arg(long, value_name = "HOW", default_value = "seed", value_parser = split_by, help_heading = "Splitting")]
    split: SplitBy,
    /// Share of the rows to hold out
    #[arg(long, value_name = "SHARE", default_value_t = 0.1, help_heading = "Splitting")]
    held_out: f64,
    /// Another seed, another split
    #[arg(long, default_value_t = 42, help_heading = "Splitting")]
    seed: u64,
    /// For the chat files [default: the one that a journal holds]
    #[arg(long, value_name = "TEXT")]
    system_message: Option<String>,
}

fn split_by(text: &str) -> Result<SplitBy, String> {
    match text {
        "seed" => Ok(SplitBy::Seed),
        "time" => Ok(SplitBy::Time),
        _ => Err("expected seed or time".into()),
    }
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let mut inputs = Vec::new();
    for input in &args.inputs {
        inputs.extend(data_files(input).map_err(corpus_error)?);
    }
    let related = DedupOptions::default().related.min(args.near);
    run_with(&PrepareOptions {
        inputs,
        out_dir: args.out,
        read: ReadOptions {
            text_column: args.text_column,
            label_column: args.label_column,
            label_map: label_map(args.label_map.as_deref())?,
            ..ReadOptions::default()
        },
        clean: CleanOptions { mask_urls: args.mask_urls, mask_users: args.mask_users },
        dedup: DedupOptions { near: args.near, related },
        max_characters: args.max_characters,
        balance: args.balance,
        split_by: args.split,
        held_out: args.held_out,
        seed: args.seed,
        system_message: args.system_message,
    })
}

/// Prepares with a progress bar, and says what came of it.
pub(super) fn run_with(options: &PrepareOptions) -> anyhow::Result<()> {
    // Files in the making are removed when asked to stop.
    let _stop = exit::clean_stop();
    let progress = Progress::new("prepare", Unit::Of("%"), Some(100));
    let report = prepare(options, &mut |stage, share| {
        progress.message(stage);
        progress.set_position(match stage {
            "reading" => (50.0 * share) as u64,
            "writing" => (70.0 + 30.0 * share) as u64,
            _ => 50,
        });
        !exit::stop_requested()
    })
    .map_err(corpus_error)?;
    drop(progress);
    tell(&report);
    output::data(&format!("{}\n", options.out_dir.display()))
}

fn tell(report: &Report) {
    for input in &report.inputs {
        output::note(format!("{}: {} of {} rows kept; {}", input.name, input.kept, input.rows, input.columns));
    }
    for (reason, rows) in &report.dropped {
        output::note(format!("dropped {rows}: {reason}"));
    }
    for warning in &report.warnings {
        output::warn(warning);
    }
    output::note(format!("{} rows to train on, {} held out", report.train, report.held_out));
}
