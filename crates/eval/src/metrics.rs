//! What a model gets right, per class and in all, with intervals.
//!
//! Definitions are scikit-learn's, so that the numbers can be checked there: a ratio without a denominator is 0; macro-F1
//! averages over the classes that occur among the truths or the predictions; log-loss is in nats.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::bootstrap::{Interval, Tally, intervals};
use crate::calibration::{Bin, reliability};
use crate::error::Result;
use crate::judged::{Checked, Judged, check, check_labels};

/// The group of the texts without a kind, in [`by_kind`].
pub const NO_KIND: &str = "unspecified";

/// How one class fares.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq)]
pub struct ClassMetrics {
    pub label: String,
    /// Of the texts given this label, the share that has it.
    pub precision: f64,
    /// Of the texts that have this label, the share given it.
    pub recall: f64,
    pub f1: f64,
    /// Texts that have this label.
    pub support: u64,
}

/// Everything measured on one set of judged texts.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq)]
pub struct Metrics {
    pub examples: u64,
    pub accuracy: Interval,
    /// Mean F1 of the classes that occur among the truths or the predictions.
    pub macro_f1: Interval,
    /// Mean F1 of the classes, weighted by their support.
    pub weighted_f1: Interval,
    /// One per label, in the order of the label list.
    pub per_class: Vec<ClassMetrics>,
    /// Counts; rows are the truth, columns the prediction.
    pub confusion: Vec<Vec<u64>>,
    /// Mean −ln p(truth), in nats; guessing evenly among k labels costs ln k.
    pub log_loss: Interval,
    /// Mean gap between confidence and accuracy over [`crate::RELIABILITY_BINS`] equal-width bins.
    pub expected_calibration_error: f64,
    pub reliability: Vec<Bin>,
    /// Mean over the texts of the sum over the labels of (p − truth)²; 0 is perfect, 2 is certain and always wrong.
    pub brier: f64,
    /// Mean probability of the predicted label; above the accuracy, the model is too sure of itself.
    pub mean_confidence: f64,
    /// Accuracy of always answering the most frequent true label.
    pub majority_baseline: f64,
}

/// Measures judged texts. Intervals are 95 % percentile bootstraps with [`crate::RESAMPLES`] resamples drawn from `seed`;
/// the result is bit-identical whatever the number of threads.
///
/// # Errors
/// When there is no text, the label list is not 2 to [`crate::MAX_LABELS`] distinct names, a truth lies outside it, or
/// probabilities are not one number from 0 to 1 per label that sum to 1.
pub fn evaluate(judged: &[Judged], labels: &[String], seed: u64) -> Result<Metrics> {
    Ok(measure(&check(judged, labels)?, labels, seed))
}

/// [`evaluate`] for each kind. Texts without a kind form the group [`NO_KIND`], unless no text has one: then the map is
/// empty.
///
/// # Errors
/// As [`evaluate`], except that no text at all gives an empty map.
pub fn by_kind(judged: &[Judged], labels: &[String], seed: u64) -> Result<BTreeMap<String, Metrics>> {
    check_labels(labels)?;
    if judged.iter().all(|j| j.kind.is_none()) {
        return Ok(BTreeMap::new());
    }
    // Checked as one, so that an error gives the place in the whole slice.
    let checked = check(judged, labels)?;
    let mut groups: BTreeMap<&str, Vec<Checked>> = BTreeMap::new();
    for (one, checked) in judged.iter().zip(checked) {
        groups.entry(one.kind.as_deref().unwrap_or(NO_KIND)).or_default().push(checked);
    }
    Ok(groups.into_iter().map(|(kind, group)| (kind.to_owned(), measure(&group, labels, seed))).collect())
}

/// `checked` is not empty.
fn measure(checked: &[Checked], labels: &[String], seed: u64) -> Metrics {
    let mut tally = Tally::new(labels.len());
    let mut confusion = vec![vec![0u64; labels.len()]; labels.len()];
    for one in checked {
        tally.add(&one.outcome);
        confusion[usize::from(one.outcome.truth)][usize::from(one.outcome.predicted)] += 1;
    }
    let per_class: Vec<ClassMetrics> = labels
        .iter()
        .enumerate()
        .map(|(c, label)| ClassMetrics {
            label: label.clone(),
            precision: tally.precision(c),
            recall: tally.recall(c),
            f1: tally.f1(c),
            support: tally.support(c),
        })
        .collect();
    let scores = intervals(checked, tally.scores(), labels.len(), seed);
    let (reliability, expected_calibration_error) = reliability(checked);
    let n = checked.len() as f64;
    Metrics {
        examples: checked.len() as u64,
        accuracy: scores.accuracy,
        macro_f1: scores.macro_f1,
        weighted_f1: scores.weighted_f1,
        majority_baseline: per_class.iter().map(|c| c.support).max().unwrap_or(0) as f64 / n,
        per_class,
        confusion,
        log_loss: scores.log_loss,
        expected_calibration_error,
        reliability,
        brier: checked.iter().map(|c| c.brier).sum::<f64>() / n,
        mean_confidence: checked.iter().map(|c| c.confidence).sum::<f64>() / n,
    }
}
