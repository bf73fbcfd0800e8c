//! `cashtag corpus`: what is in the built-in corpus or in a data file.

use std::path::{Path, PathBuf};

use cashtag_corpus::formats::data_files;
use cashtag_corpus::{
    Example, LabelMap, Query, ReadOptions, Stats, balanced_sample, builtin, builtin_split, read_examples_reported,
    search,
};

use crate::exit::{Interrupted, Usage};
use crate::output;

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Count labels, kinds, sectors and lengths
    Stats(Stat),
    /// Print a random sample, balanced by label and covering every kind
    Sample(Sample),
    /// Print the examples that contain all the words
    Search(Search),
}

#[derive(clap::Args)]
struct Source {
    /// `builtin`, or a .csv, .jsonl, .parquet or .txt file, or a directory of them
    #[arg(long = "data", value_name = "DATA", default_value = "builtin")]
    data: PathBuf,
    /// Of the built-in corpus: only the part that is never trained on
    #[arg(long, conflicts_with = "train")]
    held_out: bool,
    /// Of the built-in corpus: only the part to train on
    #[arg(long)]
    train: bool,
    /// Column of the text [default: guessed]
    #[arg(long, value_name = "NAME")]
    text_column: Option<String>,
    /// Column of the label [default: guessed]
    #[arg(long, value_name = "NAME")]
    label_column: Option<String>,
    /// What foreign labels mean, as in 0=Negative,1=Neutral,2=Positive
    #[arg(long, value_name = "MAP")]
    label_map: Option<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(clap::Args)]
struct Filter {
    /// Only examples with this label
    #[arg(long)]
    label: Option<String>,
    /// Only examples of this kind: plain, mixed, sarcastic, contextual, targeted
    #[arg(long)]
    kind: Option<String>,
    /// Only headlines, or only chatter
    #[arg(long)]
    register: Option<String>,
    /// Only examples of this sector
    #[arg(long)]
    sector: Option<String>,
    /// Only examples of this event
    #[arg(long)]
    event: Option<String>,
}

#[derive(clap::Args)]
struct Stat {
    #[command(flatten)]
    source: Source,
}

#[derive(clap::Args)]
struct Sample {
    /// How many to print
    #[arg(short = 'n', long, value_name = "N", default_value_t = 12)]
    count: usize,
    /// Another seed, another sample
    #[arg(long, default_value_t = 42)]
    seed: u64,
    #[command(flatten)]
    filter: Filter,
    #[command(flatten)]
    source: Source,
}

#[derive(clap::Args)]
struct Search {
    /// Words that must all occur, in any order and case
    #[arg(value_name = "WORD", required = true)]
    words: Vec<String>,
    /// Print at most so many
    #[arg(short = 'n', long, value_name = "N", default_value_t = 50)]
    count: usize,
    #[command(flatten)]
    filter: Filter,
    #[command(flatten)]
    source: Source,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    match args.command {
        Command::Stats(args) => {
            let stats = Stats::of(&load(&args.source)?);
            if args.source.json {
                return output::data(&format!("{}\n", serde_json::to_string_pretty(&stats)?));
            }
            output::data(&stats.to_string())
        }
        Command::Sample(args) => {
            let examples = load(&args.source)?;
            let fitting: Vec<Example> = search(&examples, &args.filter.query(vec![])).into_iter().cloned().collect();
            print(&balanced_sample(&fitting, args.count, args.seed), args.source.json)
        }
        Command::Search(args) => {
            let examples = load(&args.source)?;
            let found = search(&examples, &args.filter.query(args.words));
            let shown: Vec<Example> = found.iter().take(args.count).map(|example| (*example).clone()).collect();
            print(&shown, args.source.json)?;
            output::note(format!("{} of {} examples, {} shown", found.len(), examples.len(), shown.len()));
            Ok(())
        }
    }
}

impl Filter {
    fn query(self, words: Vec<String>) -> Query {
        let Self { label, kind, register, sector, event } = self;
        Query { words, label, kind, register, sector, event }
    }
}

fn load(source: &Source) -> anyhow::Result<Vec<Example>> {
    if source.data == Path::new("builtin") {
        return match (source.train, source.held_out) {
            (true, _) => Ok(builtin_split().map_err(corpus_error)?.train),
            (_, true) => Ok(builtin_split().map_err(corpus_error)?.held_out),
            _ => builtin().map_err(corpus_error),
        };
    }
    if source.train || source.held_out {
        return Err(Usage("--train and --held-out are parts of the built-in corpus only".into()).into());
    }
    let options = ReadOptions {
        text_column: source.text_column.clone(),
        label_column: source.label_column.clone(),
        label_map: label_map(source.label_map.as_deref())?,
        ..ReadOptions::default()
    };
    let mut examples = Vec::new();
    for path in data_files(&source.data).map_err(corpus_error)? {
        let (found, columns) = read_examples_reported(&path, &options).map_err(corpus_error)?;
        output::detail(format!("{}: {columns}", path.display()));
        examples.extend(found);
    }
    Ok(examples)
}

fn print(examples: &[Example], json: bool) -> anyhow::Result<()> {
    let mut text = String::new();
    for example in examples {
        if json {
            text.push_str(&serde_json::to_string(example)?);
        } else {
            let one_line = output::printable(&example.text.replace('\n', " ⏎ "));
            text.push_str(&format!("{:<9} {:<11} {one_line}", example.label, example.kind_or_plain()));
        }
        text.push('\n');
    }
    output::data(&text)
}

pub(super) fn label_map(text: Option<&str>) -> anyhow::Result<LabelMap> {
    Ok(text.map(LabelMap::parse).transpose().map_err(corpus_error)?.unwrap_or_default())
}

/// Errors of the library with the exit codes of the program.
pub(super) fn corpus_error(error: cashtag_corpus::Error) -> anyhow::Error {
    match error {
        cashtag_corpus::Error::Usage(message) => Usage(message).into(),
        cashtag_corpus::Error::Stopped => Interrupted.into(),
        other => other.into(),
    }
}
