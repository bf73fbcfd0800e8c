//! One text, what it is, and what a model thinks of it; and the checks that stand before every measurement.

use serde::{Deserialize, Serialize};

use crate::error::{EvalError, Result, excerpt};

/// More labels than this are refused: confusion counts grow with the square.
pub const MAX_LABELS: usize = 256;

/// How far the sum of the probabilities may be from 1: room for 16-bit arithmetic, none for a forgotten softmax.
const SUM_TOLERANCE: f64 = 1e-2;

/// Probabilities below this count as this in logarithms (scikit-learn's `log_loss` clips at the same value in f64).
const SMALLEST: f64 = f64::EPSILON;

/// One judged text: probabilities in the order of the label list, which sum to 1.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq)]
pub struct Judged {
    pub text: String,
    /// Position of the true label in the label list.
    pub truth: usize,
    pub probabilities: Vec<f32>,
    /// The slice of the data it belongs to: `plain`, `mixed`, `sarcastic`, …
    pub kind: Option<String>,
}

impl Judged {
    /// Position of the most probable label; the first of equals. 0 when there are no probabilities.
    pub fn predicted(&self) -> usize {
        let mut best = 0;
        for (i, &p) in self.probabilities.iter().enumerate() {
            if self.probabilities.get(best).is_some_and(|&b| p > b || (b.is_nan() && !p.is_nan())) {
                best = i;
            }
        }
        best
    }

    /// Whether the most probable label is the true one.
    pub fn is_right(&self) -> bool {
        self.predicted() == self.truth
    }
}

/// A judged text that has passed the checks, boiled down to what the measurements need.
#[derive(Clone, Copy)]
pub(crate) struct Checked {
    pub(crate) outcome: Outcome,
    /// (Normalised) probability of the predicted label.
    pub(crate) confidence: f64,
    /// Sum over the labels of (probability - truth)².
    pub(crate) brier: f64,
}

/// The part that resampling draws, in 16 bytes: draws are random reads, and a large set should stay in the cache.
#[derive(Clone, Copy)]
pub(crate) struct Outcome {
    /// Negative log of the (normalised) probability of the true label, in nats.
    pub(crate) loss: f64,
    pub(crate) truth: u16,
    pub(crate) predicted: u16,
}

impl Outcome {
    pub(crate) fn right(&self) -> bool {
        self.truth == self.predicted
    }
}

pub(crate) fn check_labels(labels: &[String]) -> Result<()> {
    if !(2..=MAX_LABELS).contains(&labels.len()) {
        return Err(EvalError::LabelCount { found: labels.len(), max: MAX_LABELS });
    }
    for (index, label) in labels.iter().enumerate() {
        if label.trim().is_empty() || labels[..index].contains(label) {
            return Err(EvalError::BadLabel { index, label: excerpt(label) });
        }
    }
    Ok(())
}

/// Checks every text against the label list. Probabilities are divided by their sum in f64, so that rounding in the
/// model's own arithmetic does not leak into the scores.
pub(crate) fn check<'a>(judged: impl IntoIterator<Item = &'a Judged>, labels: &[String]) -> Result<Vec<Checked>> {
    check_labels(labels)?;
    let mut checked = Vec::new();
    for (index, one) in judged.into_iter().enumerate() {
        checked.push(check_one(index, one, labels.len())?);
    }
    if checked.is_empty() { Err(EvalError::Empty) } else { Ok(checked) }
}

fn check_one(index: usize, one: &Judged, labels: usize) -> Result<Checked> {
    let text = || excerpt(&one.text);
    if one.probabilities.len() != labels {
        return Err(EvalError::ProbabilityCount { index, text: text(), found: one.probabilities.len(), labels });
    }
    if one.truth >= labels {
        return Err(EvalError::Truth { index, text: text(), truth: one.truth, labels });
    }
    let highest = 1.0 + SUM_TOLERANCE as f32;
    if let Some(label) = one.probabilities.iter().position(|p| !(0.0..=highest).contains(p)) {
        return Err(EvalError::Probability { index, text: text(), label, value: one.probabilities[label] });
    }
    let sum: f64 = one.probabilities.iter().map(|&p| f64::from(p)).sum();
    if (sum - 1.0).abs() > SUM_TOLERANCE {
        return Err(EvalError::Sum { index, text: text(), sum });
    }
    let normal = |label: usize| f64::from(one.probabilities[label]) / sum;
    let predicted = one.predicted();
    let brier = (0..labels).map(|l| (normal(l) - if l == one.truth { 1.0 } else { 0.0 }).powi(2)).sum();
    Ok(Checked {
        outcome: Outcome {
            // Adding 0.0 turns the -0.0 of a certain and right answer into 0.0.
            loss: -normal(one.truth).clamp(SMALLEST, 1.0).ln() + 0.0,
            // Both are below MAX_LABELS.
            truth: one.truth as u16,
            predicted: predicted as u16,
        },
        confidence: normal(predicted),
        brier,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judged(truth: usize, probabilities: &[f32]) -> Judged {
        Judged { text: "$AAPL up".into(), truth, probabilities: probabilities.to_vec(), kind: None }
    }

    fn labels(n: usize) -> Vec<String> {
        (0..n).map(|i| format!("label {i}")).collect()
    }

    #[test]
    fn the_first_of_equals_is_predicted() {
        assert_eq!(judged(0, &[0.4, 0.4, 0.2]).predicted(), 0);
        assert_eq!(judged(0, &[0.2, 0.4, 0.4]).predicted(), 1);
        assert_eq!(judged(0, &[]).predicted(), 0);
        assert_eq!(judged(0, &[f32::NAN, 0.1, 0.3]).predicted(), 2);
    }

    #[test]
    fn refusals_name_the_text_and_the_mend() {
        let two = labels(2);
        let refuse = |one: Judged| check([&judged(0, &[0.5, 0.5]), &one], &two).err().map(|e| e.to_string());
        let message = refuse(judged(1, &[f32::NAN, 0.5])).unwrap_or_default();
        assert!(message.starts_with("text 1 (`$AAPL up`): the probability of label 0 is NaN"), "{message}");
        assert!(message.contains("\nhint: "));
        assert!(refuse(judged(1, &[-0.1, 1.1])).is_some_and(|m| m.contains("-0.1")));
        assert!(refuse(judged(1, &[f32::INFINITY, 0.0])).is_some());
        assert!(refuse(judged(2, &[0.5, 0.5])).is_some_and(|m| m.contains("only 2 labels")));
        assert!(refuse(judged(1, &[0.3, 0.3, 0.4])).is_some_and(|m| m.contains("3 probabilities for 2 labels")));
        assert!(refuse(judged(1, &[0.3, 0.3])).is_some_and(|m| m.contains("sum to 0.6")));
        assert_eq!(check([], &two).err(), Some(EvalError::Empty));
    }

    #[test]
    fn label_lists_are_checked() {
        assert!(check_labels(&labels(2)).is_ok());
        assert!(check_labels(&labels(MAX_LABELS)).is_ok());
        assert!(check_labels(&labels(1)).is_err());
        assert!(check_labels(&labels(MAX_LABELS + 1)).is_err());
        assert!(check_labels(&["a".into(), "a".into()]).is_err());
        assert!(check_labels(&["a".into(), " ".into()]).is_err());
    }

    #[test]
    fn a_long_text_is_cut_in_messages() {
        let mut one = judged(9, &[0.5, 0.5]);
        one.text = "é\n".repeat(500);
        let message = check([&one], &labels(2)).err().map(|e| e.to_string()).unwrap_or_default();
        assert!(message.contains("é …`)"), "{message}");
        assert!(message.len() < 300);
    }
}
