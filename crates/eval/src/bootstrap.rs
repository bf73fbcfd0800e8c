//! Intervals by the percentile bootstrap: how much a score would move if other texts of the same sort had been drawn.
//!
//! Resample number i depends on (seed, i) only and its sums run in the order of its draws, so the result is the same to
//! the last bit on one thread and on sixty-four.

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::judged::{Checked, Outcome};
use crate::rng::SplitMix64;

/// Resamples behind every interval.
pub const RESAMPLES: usize = 2000;

/// A score and its 95 % interval (percentile bootstrap over the texts, [`RESAMPLES`] resamples).
///
/// The interval speaks of the texts only: of the luck of this evaluation set, not of the luck of one training seed.
#[derive(Serialize, Deserialize, Clone, Copy, Debug, PartialEq)]
pub struct Interval {
    pub value: f64,
    pub low: f64,
    pub high: f64,
}

impl Interval {
    /// From a value and its resampled values, by the 2.5 % and 97.5 % quantiles.
    fn from_samples(value: f64, mut samples: Vec<f64>) -> Self {
        samples.sort_unstable_by(f64::total_cmp);
        Self { value, low: quantile(&samples, 0.025), high: quantile(&samples, 0.975) }
    }

    /// Whether the interval reaches neither zero nor across it. Meant for differences.
    pub fn excludes_zero(&self) -> bool {
        self.low > 0.0 || self.high < 0.0
    }
}

/// Quantile of sorted values with linear interpolation (NumPy's default); 0 when there are none.
fn quantile(sorted: &[f64], q: f64) -> f64 {
    let Some(last) = sorted.len().checked_sub(1) else { return 0.0 };
    let at = q * last as f64;
    let below = (at.floor() as usize).min(last);
    let above = (below + 1).min(last);
    sorted[below] + (sorted[above] - sorted[below]) * (at - below as f64)
}

/// Counts per class that accuracy and F1 need, and the sum of the losses: everything that a resample has to collect.
pub(crate) struct Tally {
    right: Vec<u64>,
    truth: Vec<u64>,
    predicted: Vec<u64>,
    loss: f64,
    examples: u64,
}

/// The scores that get an interval, in one order everywhere.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scores {
    pub(crate) accuracy: f64,
    pub(crate) macro_f1: f64,
    pub(crate) weighted_f1: f64,
    pub(crate) log_loss: f64,
}

impl Scores {
    pub(crate) fn minus(self, other: Self) -> Self {
        Self {
            accuracy: self.accuracy - other.accuracy,
            macro_f1: self.macro_f1 - other.macro_f1,
            weighted_f1: self.weighted_f1 - other.weighted_f1,
            log_loss: self.log_loss - other.log_loss,
        }
    }
}

impl Tally {
    pub(crate) fn new(labels: usize) -> Self {
        Self { right: vec![0; labels], truth: vec![0; labels], predicted: vec![0; labels], loss: 0.0, examples: 0 }
    }

    pub(crate) fn clear(&mut self) {
        for counts in [&mut self.right, &mut self.truth, &mut self.predicted] {
            counts.fill(0);
        }
        self.loss = 0.0;
        self.examples = 0;
    }

    pub(crate) fn add(&mut self, one: &Outcome) {
        self.truth[usize::from(one.truth)] += 1;
        self.predicted[usize::from(one.predicted)] += 1;
        self.right[usize::from(one.truth)] += u64::from(one.right());
        self.loss += one.loss;
        self.examples += 1;
    }

    pub(crate) fn precision(&self, class: usize) -> f64 {
        ratio(self.right[class], self.predicted[class])
    }

    pub(crate) fn recall(&self, class: usize) -> f64 {
        ratio(self.right[class], self.truth[class])
    }

    /// 2·TP / (2·TP + FP + FN): the harmonic mean of precision and recall, 0 for a class that does not occur.
    pub(crate) fn f1(&self, class: usize) -> f64 {
        ratio(2 * self.right[class], self.truth[class] + self.predicted[class])
    }

    pub(crate) fn support(&self, class: usize) -> u64 {
        self.truth[class]
    }

    pub(crate) fn scores(&self) -> Scores {
        let classes = 0..self.truth.len();
        let occurring = classes.clone().filter(|&c| self.truth[c] + self.predicted[c] > 0).count();
        Scores {
            accuracy: ratio(self.right.iter().sum(), self.examples),
            macro_f1: classes.clone().map(|c| self.f1(c)).sum::<f64>() / occurring.max(1) as f64,
            weighted_f1: classes.map(|c| self.f1(c) * self.truth[c] as f64).sum::<f64>() / self.examples.max(1) as f64,
            log_loss: self.loss / self.examples.max(1) as f64,
        }
    }
}

fn ratio(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 / whole as f64 }
}

/// Intervals of [`Scores`].
pub(crate) struct ScoreIntervals {
    pub(crate) accuracy: Interval,
    pub(crate) macro_f1: Interval,
    pub(crate) weighted_f1: Interval,
    pub(crate) log_loss: Interval,
}

impl ScoreIntervals {
    fn new(point: Scores, samples: &[Scores]) -> Self {
        let interval =
            |pick: fn(&Scores) -> f64| Interval::from_samples(pick(&point), samples.iter().map(pick).collect());
        Self {
            accuracy: interval(|s| s.accuracy),
            macro_f1: interval(|s| s.macro_f1),
            weighted_f1: interval(|s| s.weighted_f1),
            log_loss: interval(|s| s.log_loss),
        }
    }
}

/// Scores of `checked` (not empty) with their intervals.
pub(crate) fn intervals(checked: &[Checked], point: Scores, labels: usize, seed: u64) -> ScoreIntervals {
    let outcomes: Vec<Outcome> = checked.iter().map(|c| c.outcome).collect();
    let samples: Vec<Scores> = (0..RESAMPLES as u64)
        .into_par_iter()
        .map_init(
            || Tally::new(labels),
            |tally, number| {
                tally.clear();
                let mut rng = SplitMix64::stream(seed, number);
                for _ in 0..outcomes.len() {
                    tally.add(&outcomes[rng.below(outcomes.len())]);
                }
                tally.scores()
            },
        )
        .collect();
    ScoreIntervals::new(point, &samples)
}

/// Differences b − a of the scores with their intervals; every resample draws the same texts for both (paired).
/// Both slices have the same length, which is not zero.
pub(crate) fn paired(a: &[Checked], b: &[Checked], point: Scores, labels: usize, seed: u64) -> ScoreIntervals {
    let pairs: Vec<(Outcome, Outcome)> = a.iter().zip(b).map(|(a, b)| (a.outcome, b.outcome)).collect();
    let samples: Vec<Scores> = (0..RESAMPLES as u64)
        .into_par_iter()
        .map_init(
            || (Tally::new(labels), Tally::new(labels)),
            |(tally_a, tally_b), number| {
                tally_a.clear();
                tally_b.clear();
                let mut rng = SplitMix64::stream(seed, number);
                for _ in 0..pairs.len() {
                    let (a, b) = &pairs[rng.below(pairs.len())];
                    tally_a.add(a);
                    tally_b.add(b);
                }
                tally_b.scores().minus(tally_a.scores())
            },
        )
        .collect();
    ScoreIntervals::new(point, &samples)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_numpys() {
        // numpy.quantile([1, 2, 4, 8], q)
        let sorted = [1.0, 2.0, 4.0, 8.0];
        assert_eq!(quantile(&sorted, 0.0), 1.0);
        assert_eq!(quantile(&sorted, 0.5), 3.0);
        assert!((quantile(&sorted, 0.025) - 1.075).abs() < 1e-12);
        assert!((quantile(&sorted, 0.975) - 7.7).abs() < 1e-12);
        assert_eq!(quantile(&sorted, 1.0), 8.0);
        assert_eq!(quantile(&[5.0], 0.3), 5.0);
        assert_eq!(quantile(&[], 0.3), 0.0);
    }

    #[test]
    fn an_interval_says_whether_it_excludes_zero() {
        let interval = |low, high| Interval { value: 0.1, low, high };
        assert!(interval(0.01, 0.2).excludes_zero());
        assert!(interval(-0.2, -0.01).excludes_zero());
        assert!(!interval(-0.01, 0.2).excludes_zero());
        assert!(!interval(0.0, 0.2).excludes_zero());
    }
}
