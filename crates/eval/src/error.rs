//! What can be wrong with judged texts, said so that the reader can find the text and mend it.

use thiserror::Error;

pub type Result<T, E = EvalError> = std::result::Result<T, E>;

/// Why texts could not be measured. `index` counts from 0 in the slice that was given.
#[derive(Debug, Error, Clone, PartialEq)]
#[non_exhaustive]
pub enum EvalError {
    #[error("no texts to evaluate\nhint: the evaluation split is empty; check the data files and the split sizes")]
    Empty,

    #[error("{found} labels, expected 2 to {max}\nhint: the label list must name every class once")]
    LabelCount { found: usize, max: usize },

    #[error(
        "label {index} (`{label}`) is empty or stands twice in the label list\nhint: give every class its own name"
    )]
    BadLabel { index: usize, label: String },

    #[error(
        "text {index} (`{text}`): its true label is number {truth}, but there are only {labels} labels\nhint: the \
         texts were labelled with another label list than the one given here"
    )]
    Truth { index: usize, text: String, truth: usize, labels: usize },

    #[error(
        "text {index} (`{text}`): {found} probabilities for {labels} labels\nhint: the model was scored with another \
         label list than the one given here"
    )]
    ProbabilityCount { index: usize, text: String, found: usize, labels: usize },

    #[error(
        "text {index} (`{text}`): the probability of label {label} is {value}, expected a number from 0 to 1\nhint: a \
         NaN here means that the model's logits overflowed; use bf16 or f32 instead of fp16, or a lower learning rate"
    )]
    Probability { index: usize, text: String, label: usize, value: f32 },

    #[error(
        "text {index} (`{text}`): the probabilities sum to {sum}, expected 1\nhint: pass them through a softmax over \
         the labels first"
    )]
    Sum { index: usize, text: String, sum: f64 },

    #[error("cannot pair {a} texts with {b}\nhint: judge the same texts, in the same order, with both models")]
    PairedLength { a: usize, b: usize },

    #[error(
        "text {index} differs between the two models (`{a}` and `{b}`, or another true label)\nhint: judge the same \
         texts, in the same order, with both models"
    )]
    PairedText { index: usize, a: String, b: String },
}

/// The beginning of a text, for messages: enough to find it, short enough for a terminal, and on one line.
pub(crate) fn excerpt(text: &str) -> String {
    const LONGEST: usize = 60;
    let mut short: String = text.chars().take(LONGEST).map(|c| if c.is_control() { ' ' } else { c }).collect();
    if text.chars().nth(LONGEST).is_some() {
        short.push('…');
    }
    short
}
