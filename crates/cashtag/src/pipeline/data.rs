//! From `[data]` to what is trained on, validated on and judged on.

use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow, bail};
use cashtag_corpus::formats::data_files;
use cashtag_corpus::{
    Example, LabelMap, ReadOptions, SplitOptions, balanced_sample, builtin_split, quick_sample, read_examples_reported,
    split_examples,
};

use super::engine::LabelledText;
use crate::exit::Usage;
use crate::settings::{DataSource, Settings};
use crate::{hub, output};

/// How the columns of data files are understood.
#[derive(clap::Args, Clone, Debug, Default)]
pub(crate) struct Reading {
    /// Column of the text [default: guessed]
    #[arg(long, value_name = "NAME", help_heading = "Reading")]
    text_column: Option<String>,
    /// Column of the label [default: guessed]
    #[arg(long, value_name = "NAME", help_heading = "Reading")]
    label_column: Option<String>,
    /// What foreign labels mean, as in 0=Negative,1=Neutral,2=Positive
    #[arg(long, value_name = "MAP", help_heading = "Reading")]
    label_map: Option<String>,
}

impl Reading {
    fn options<S: AsRef<str>>(&self, labels: &[S]) -> anyhow::Result<ReadOptions> {
        let label_map = LabelMap::of(labels).with(self.label_map.as_deref().unwrap_or_default());
        Ok(ReadOptions {
            text_column: self.text_column.clone(),
            label_column: self.label_column.clone(),
            label_map: label_map.map_err(|e| anyhow!(Usage(format!("--label-map: {e}"))))?,
            require_label: true,
        })
    }

    /// The flags that say the same, each with a blank before it.
    pub(crate) fn flags(&self) -> String {
        let flags = [
            ("--text-column", &self.text_column),
            ("--label-column", &self.label_column),
            ("--label-map", &self.label_map),
        ];
        let given = flags.into_iter().filter_map(|(flag, value)| Some((flag, value.as_ref()?)));
        given.map(|(flag, value)| format!(" {flag} {}", quoted(value))).collect()
    }
}

/// A word as a shell takes it.
pub(crate) fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_alphanumeric() || "-_./=,:@+".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_string()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

/// Examples of one run. Near copies never stand on both sides of a border.
#[derive(Clone, Debug, Default)]
pub(crate) struct Data {
    pub(crate) train: Vec<Example>,
    /// Seen while training: early stopping, the best checkpoint, the temperature.
    pub(crate) validation: Vec<Example>,
    /// Judged before and after; nothing is chosen by it.
    pub(crate) held_out: Vec<Example>,
    pub(crate) source: String,
}

/// How much of the data a command takes when nothing is said.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Portions {
    /// Examples to train on, the validation part among them.
    pub(crate) train: Option<usize>,
    pub(crate) held_out: Option<usize>,
}

/// Reads and splits what the settings ask for. `default` bounds the parts unless the user said otherwise.
///
/// # Errors
/// Unreadable files, labels that are not the run's, an empty part.
pub(crate) fn load(settings: &Settings, reading: &Reading, default: Portions) -> anyhow::Result<Data> {
    let d = &settings.data;
    let seed = settings.training.data_seed.unwrap_or(settings.training.seed);
    let labels = d.labels.names();
    let (mut train, mut held_out, source) = match &d.source {
        DataSource::Builtin => {
            let split = builtin_split()?;
            (split.train, split.held_out, "built-in corpus".to_string())
        }
        DataSource::Path(path) => {
            let path = resolve(&path.to_string_lossy())?;
            let examples = read(&path, reading, &labels)?;
            let source = path.display().to_string();
            if d.eval_source.is_some() {
                (examples, Vec::new(), source)
            } else {
                let split = split_examples(&examples, &SplitOptions { held_out: d.eval_fraction, seed })?;
                (split.train, split.held_out, source)
            }
        }
    };
    if let Some(path) = &d.eval_source {
        held_out = read(&resolve(&path.to_string_lossy())?, reading, &labels)?;
    }
    let portion = |said: Option<usize>, default: Option<usize>| said.or(default.filter(|_| !d.full));
    let said = d.train_examples.filter(|_| !d.full);
    if let Some(n) = portion(said, default.train).filter(|&n| n < train.len()) {
        // Whoever asks for a number, or brings data, means a fair part of them.
        let is_quick = said.is_none() && matches!(d.source, DataSource::Builtin);
        train = if is_quick { quick_sample(&train, n, seed) } else { balanced_sample(&train, n, seed) };
    }
    if let Some(n) = portion(d.eval_examples, default.held_out).filter(|&n| n < held_out.len()) {
        // In the proportions of the whole, so that the figures estimate those of the whole.
        let share = n as f64 / held_out.len() as f64;
        held_out = split_examples(&held_out, &SplitOptions { held_out: share, seed })?.held_out;
    }
    // The validation part comes out of the training part, a tenth by default but never more than is useful.
    const MOST_VALIDATION: usize = 300;
    let share = d.eval_fraction.min(MOST_VALIDATION as f64 / train.len().max(1) as f64);
    let split = split_examples(&train, &SplitOptions { held_out: share, seed: seed ^ 0x5EED })?;
    for (part, what) in [(&split.train, "training"), (&held_out, "evaluation")] {
        if part.is_empty() {
            bail!(Usage(format!(
                "{source} leaves no examples for {what}\n  hint: give more data, or another eval_fraction"
            )));
        }
    }
    Ok(Data { train: split.train, validation: split.held_out, held_out, source })
}

/// Where the file, directory or data set of this name lies. Fetches nothing.
///
/// # Errors
/// There is none; the hint says what to do.
pub(crate) fn resolve(name: &str) -> anyhow::Result<PathBuf> {
    hub::resolve_dataset(name).map_err(|e| hinted(e, "check the path"))
}

/// The error with this hint, if it has none of its own.
pub(crate) fn hinted(error: impl Into<anyhow::Error>, hint: &str) -> anyhow::Error {
    let error = error.into();
    let text = format!("{error:#}");
    if text.contains("hint:") { error } else { anyhow!("{text}\n  hint: {hint}") }
}

/// Reads a labelled file, or the files of a directory; says which columns were taken.
///
/// # Errors
/// Unreadable files, columns that cannot be told, labels that are not known, no examples at all.
pub(crate) fn read<S: AsRef<str>>(path: &Path, reading: &Reading, labels: &[S]) -> anyhow::Result<Vec<Example>> {
    let options = reading.options(labels)?;
    let mut all = Vec::new();
    for file in data_files(path)? {
        let (examples, columns) = read_examples_reported(&file, &options)
            .map_err(|e| hinted(e, "a data file has a column of texts and one of labels"))?;
        output::note(format!("{}: {} examples, {columns}", file.display(), examples.len()));
        all.extend(examples);
    }
    if all.is_empty() {
        bail!(Usage(format!("{} holds no examples\n  hint: give a file with texts and labels", path.display())));
    }
    Ok(all)
}

/// Reads the texts of a file, or of the files of a directory; labels may be there or not.
///
/// # Errors
/// Unreadable files, a column that cannot be told, no texts at all.
pub(crate) fn texts(path: &Path) -> anyhow::Result<Vec<Example>> {
    let mut all = Vec::new();
    for file in data_files(path)? {
        let options = ReadOptions { require_label: false, ..ReadOptions::default() };
        let (examples, _) =
            read_examples_reported(&file, &options).map_err(|e| hinted(e, "the file needs a column of texts"))?;
        all.extend(examples);
    }
    if all.is_empty() {
        bail!(Usage(format!("{} holds no texts\n  hint: give a file with some", path.display())));
    }
    Ok(all)
}

/// Texts with the index of their label.
///
/// # Errors
/// A label that is not one of `labels`.
pub(crate) fn labelled(examples: &[Example], labels: &[String]) -> anyhow::Result<Vec<LabelledText>> {
    examples
        .iter()
        .map(|e| {
            let label = labels.iter().position(|l| *l == e.label).with_context(|| {
                format!(
                    "label {:?} of {:?} is not one of {}\n  hint: --labels names the labels of the data",
                    e.label,
                    e.text.chars().take(60).collect::<String>(),
                    labels.join(", ")
                )
            })?;
            Ok(LabelledText { text: e.text.clone(), label, kind: e.kind.clone() })
        })
        .collect()
}
