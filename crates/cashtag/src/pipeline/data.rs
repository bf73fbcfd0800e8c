//! From `[data]` to what is trained on, validated on and judged on.

use anyhow::{Context, bail};
use cashtag_corpus::{
    Example, ReadOptions, SplitOptions, balanced_sample, builtin_split, read_examples_reported, split_examples,
};

use super::engine::LabelledText;
use crate::exit::Usage;
use crate::settings::{DataSource, Settings};
use crate::{hub, output};

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

/// Reads and splits what the settings ask for. `default_train` bounds the training part unless the user said otherwise.
///
/// # Errors
/// Unreadable files, labels that are not the run's, an empty part.
pub(crate) fn load(settings: &Settings, default_train: Option<usize>) -> anyhow::Result<Data> {
    let d = &settings.data;
    let seed = settings.training.seed;
    let (mut train, mut held_out, source) = match &d.source {
        DataSource::Builtin => {
            let split = builtin_split()?;
            (split.train, split.held_out, "built-in corpus".to_string())
        }
        DataSource::Path(path) => {
            let path = hub::resolve_dataset(&path.to_string_lossy())?;
            let examples = read(&path)?;
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
        held_out = read(&hub::resolve_dataset(&path.to_string_lossy())?)?;
    }
    let wanted = if d.full { None } else { d.train_examples.or(default_train) };
    if let Some(n) = wanted.filter(|&n| n < train.len()) {
        train = balanced_sample(&train, n, seed);
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

/// Reads a labelled file; says which columns were taken.
pub(crate) fn read(path: &std::path::Path) -> anyhow::Result<Vec<Example>> {
    let options = ReadOptions::default();
    let (examples, columns) =
        read_examples_reported(path, &options).with_context(|| format!("cannot read {}", path.display()))?;
    output::note(format!("{}: {} examples, {columns}", path.display(), examples.len()));
    if examples.is_empty() {
        bail!(Usage(format!("{} holds no examples", path.display())));
    }
    Ok(examples)
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
