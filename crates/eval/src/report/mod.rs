//! The report of a run: what was trained, on what, how it went, and what the model can do before and after.
//!
//! [`Report`] is plain data (it can be kept as JSON next to the page). [`Report::html`] makes one file of it that asks
//! the network for nothing, runs no script, and reads on a phone, on paper, in the dark and with a screen reader.
//!
//! Invariants:
//! - No text from outside can become markup: [`html::Html`] takes markup as `&'static str` only and escapes the rest.
//! - Whatever is missing or inconsistent (no "before", an empty history, a matrix of another size) is left out or drawn
//!   as far as it goes; nothing panics, and every list is cut at a stated length.

mod examples;
mod headline;
mod html;
mod page;
mod style;
mod svg;
mod tables;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::compare::Comparison;
use crate::judged::Judged;
use crate::metrics::{Metrics, NO_KIND};

/// Everything that the page shows. Empty lists and `None` leave their section out.
#[derive(Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(default)]
pub struct Report {
    pub title: String,
    /// When the run was made, as it should be printed.
    pub created: String,
    /// A sentence shown above everything else, in a box: "These are invented figures", for example.
    pub notice: Option<String>,
    /// The command that makes this run again.
    pub command: Option<String>,
    pub device: String,
    pub model: Description,
    pub adapter: Option<Description>,
    /// The label list; probabilities and matrices are in this order.
    pub labels: Vec<String>,
    pub configuration: Vec<Setting>,
    pub data: DataSummary,
    pub history: Vec<HistoryRow>,
    pub before: Option<Metrics>,
    pub after: Option<Metrics>,
    /// `after` as it would be without its temperature: what the temperature mends.
    pub untempered: Option<Metrics>,
    /// `compare(before, after)`.
    pub comparison: Option<Comparison>,
    pub by_kind_before: BTreeMap<String, Metrics>,
    pub by_kind_after: BTreeMap<String, Metrics>,
    pub examples: Vec<ExampleTweet>,
    /// The hardest mistakes, hardest first: see [`Mistake::hardest`].
    pub mistakes: Vec<Mistake>,
    pub timings: Vec<Timing>,
    pub files: Vec<FileEntry>,
}

/// A model or an adapter: its name, and what else should be known of it in pairs of name and value.
#[derive(Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
pub struct Description {
    pub name: String,
    #[serde(default)]
    pub facts: Vec<(String, String)>,
}

impl Description {
    pub fn new(name: impl Into<String>) -> Self {
        Self { name: name.into(), facts: Vec::new() }
    }

    pub fn fact(mut self, name: impl Into<String>, value: impl ToString) -> Self {
        self.facts.push((name.into(), value.to_string()));
        self
    }
}

/// One line of the resolved configuration.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq)]
pub struct Setting {
    pub key: String,
    pub value: String,
    /// Where the value came from: "default", a file and line, "--flag", an environment variable.
    pub source: String,
}

/// What the model was trained and evaluated on.
#[derive(Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
pub struct DataSummary {
    /// Where the texts came from.
    pub source: String,
    pub splits: Vec<Split>,
}

/// Counts of one split by kind and label.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq)]
pub struct Split {
    pub name: String,
    /// For each kind, one count per label in the order of the label list.
    pub by_kind: BTreeMap<String, Vec<u64>>,
}

impl Split {
    /// Counts texts given as (position of the label, kind). A label outside the list is not counted.
    pub fn count<'a>(
        name: impl Into<String>,
        labels: usize,
        texts: impl IntoIterator<Item = (usize, Option<&'a str>)>,
    ) -> Self {
        let mut by_kind: BTreeMap<String, Vec<u64>> = BTreeMap::new();
        for (label, kind) in texts {
            let counts = by_kind.entry(kind.unwrap_or(NO_KIND).to_owned()).or_insert_with(|| vec![0; labels]);
            if let Some(count) = counts.get_mut(label) {
                *count += 1;
            }
        }
        Self { name: name.into(), by_kind }
    }

    fn by_label(&self, label: usize) -> u64 {
        self.by_kind.values().filter_map(|counts| counts.get(label)).sum()
    }

    fn total(&self) -> u64 {
        self.by_kind.values().flatten().sum()
    }
}

/// One logged step. `None` means not measured at this step, or not a number.
#[derive(Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq)]
#[serde(default)]
pub struct HistoryRow {
    pub step: u64,
    pub epoch: f64,
    pub loss: Option<f64>,
    pub eval_loss: Option<f64>,
    pub learning_rate: Option<f64>,
    pub grad_norm: Option<f64>,
    pub examples_per_second: Option<f64>,
    pub tokens_per_second: Option<f64>,
}

/// A text chosen to be looked at, with the answer before and after.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq)]
pub struct ExampleTweet {
    pub text: String,
    /// Position of the expected label in the label list; `None` when the text has no agreed answer.
    pub expected: Option<usize>,
    /// What is special about it: "mixed", "sarcastic".
    pub note: Option<String>,
    pub before: Option<Vec<f32>>,
    pub after: Option<Vec<f32>>,
}

/// A text that the trained model gets wrong.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq)]
pub struct Mistake {
    pub text: String,
    pub truth: usize,
    pub kind: Option<String>,
    pub probabilities: Vec<f32>,
}

impl Mistake {
    /// The `most` wrongly judged texts that the model was surest of: those with the least probability for the truth.
    pub fn hardest(judged: &[Judged], most: usize) -> Vec<Self> {
        let truth = |j: &Judged| j.probabilities.get(j.truth).copied().unwrap_or(0.0);
        let mut wrong: Vec<&Judged> = judged.iter().filter(|j| !j.is_right()).collect();
        wrong.sort_by(|a, b| truth(a).total_cmp(&truth(b)));
        wrong
            .into_iter()
            .take(most)
            .map(|j| Self {
                text: j.text.clone(),
                truth: j.truth,
                kind: j.kind.clone(),
                probabilities: j.probabilities.clone(),
            })
            .collect()
    }
}

/// How long a part of the run took.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq)]
pub struct Timing {
    pub name: String,
    pub seconds: f64,
}

/// A file that the run left behind.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq)]
pub struct FileEntry {
    pub path: String,
    pub bytes: Option<u64>,
    pub note: String,
}

impl Report {
    /// The whole page: one HTML file with its style and pictures inside.
    pub fn html(&self) -> String {
        page::page(self)
    }
}
