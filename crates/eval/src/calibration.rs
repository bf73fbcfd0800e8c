//! Whether the probabilities mean what they say, and one number that mends them when they do not.
//!
//! Temperature scaling (Guo et al. 2017) changes how sure a model is, never which label it prefers. Fit the temperature
//! on texts that the model was neither trained nor tested on.

use serde::{Deserialize, Serialize};

use crate::judged::{Checked, Judged};

/// Equal-width bins over the confidence of the predicted label.
pub const RELIABILITY_BINS: usize = 15;

/// [`fit_temperature`] looks between these two; a separable set would otherwise ask for a temperature of zero.
pub const TEMPERATURE_RANGE: (f64, f64) = (0.05, 20.0);

/// One bar of a reliability diagram: the texts whose confidence lies in (lower, upper].
#[derive(Serialize, Deserialize, Clone, Copy, Debug, PartialEq)]
pub struct Bin {
    pub lower: f64,
    pub upper: f64,
    pub count: u64,
    /// Mean confidence of the texts in the bin; 0 when it is empty.
    pub confidence: f64,
    /// Share of them that is right; 0 when it is empty.
    pub accuracy: f64,
}

/// The bins and the expected calibration error: the mean gap between confidence and accuracy, weighted by the counts.
pub(crate) fn reliability(checked: &[Checked]) -> (Vec<Bin>, f64) {
    let width = 1.0 / RELIABILITY_BINS as f64;
    let mut sums = [(0u64, 0.0f64, 0u64); RELIABILITY_BINS];
    for one in checked {
        let bin = ((one.confidence * RELIABILITY_BINS as f64).ceil() as usize).clamp(1, RELIABILITY_BINS) - 1;
        sums[bin].0 += 1;
        sums[bin].1 += one.confidence;
        sums[bin].2 += u64::from(one.outcome.right());
    }
    let mut error = 0.0;
    let bins = sums
        .iter()
        .enumerate()
        .map(|(i, &(count, confidence, right))| {
            let n = count.max(1) as f64;
            error += (right as f64 - confidence).abs();
            Bin {
                lower: i as f64 * width,
                upper: (i + 1) as f64 * width,
                count,
                confidence: confidence / n,
                accuracy: right as f64 / n,
            }
        })
        .collect();
    (bins, error / checked.len().max(1) as f64)
}

fn log_probability(p: f32) -> f64 {
    // The floor keeps a probability that has underflowed to zero out of the infinite; NaN becomes the floor too.
    f64::from(p.max(f32::MIN_POSITIVE)).ln()
}

/// The temperature T that minimises the mean negative log-likelihood of softmax(ln p / T), within
/// [`TEMPERATURE_RANGE`]. Above 1 the model was too sure of itself, below 1 not sure enough.
///
/// Texts that cannot be used (a true label outside the probabilities, a probability that is not a number) are left out;
/// with none left the answer is 1, which changes nothing.
pub fn fit_temperature(judged: &[Judged]) -> f64 {
    let usable: Vec<(usize, Vec<f64>)> = judged
        .iter()
        .filter(|j| j.truth < j.probabilities.len() && j.probabilities.iter().all(|p| p.is_finite() && *p >= 0.0))
        .map(|j| (j.truth, j.probabilities.iter().map(|&p| log_probability(p)).collect()))
        .collect();
    if usable.is_empty() {
        return 1.0;
    }
    // The likelihood is convex in 1/T and its slope is the expected log-probability less the true one, so halving the
    // range where the slope changes its sign cannot miss.
    let slope = |temperature: f64| -> f64 {
        usable
            .iter()
            .map(|(truth, logs)| {
                let top = logs.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let weights = logs.iter().map(|s| ((s - top) / temperature).exp());
                let (total, expected) =
                    weights.zip(logs).fold((0.0, 0.0), |(total, sum), (w, s)| (total + w, sum + w * s));
                expected / total - logs[*truth]
            })
            .sum()
    };
    let (mut cold, mut hot) = (TEMPERATURE_RANGE.0.ln(), TEMPERATURE_RANGE.1.ln());
    if slope(1.0) == 0.0 {
        // Uniform probabilities: every temperature gives the same, so the one that changes nothing.
        return 1.0;
    }
    for _ in 0..60 {
        let middle = 0.5 * (cold + hot);
        // A positive slope: the likelihood falls as 1/T grows, so the best temperature is higher.
        if slope(middle.exp()) > 0.0 { cold = middle } else { hot = middle }
    }
    (0.5 * (cold + hot)).exp()
}

/// Replaces probabilities by softmax(ln p / T). A temperature that is not a positive number changes nothing.
pub fn apply_temperature(probabilities: &mut [f32], temperature: f64) {
    if !(temperature.is_finite() && temperature > 0.0) || temperature == 1.0 {
        return;
    }
    let scaled: Vec<f64> = probabilities.iter().map(|&p| log_probability(p) / temperature).collect();
    let top = scaled.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let total: f64 = scaled.iter().map(|s| (s - top).exp()).sum();
    for (p, s) in probabilities.iter_mut().zip(scaled) {
        *p = ((s - top).exp() / total) as f32;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::SplitMix64;

    fn judged(truth: usize, probabilities: &[f32]) -> Judged {
        Judged { text: String::new(), truth, probabilities: probabilities.to_vec(), kind: None }
    }

    /// scipy.optimize.minimize_scalar on the same six texts.
    #[test]
    fn temperature_matches_scipy() {
        let texts = [
            judged(0, &[0.98, 0.01, 0.01]),
            judged(1, &[0.90, 0.06, 0.04]),
            judged(2, &[0.03, 0.02, 0.95]),
            judged(1, &[0.20, 0.70, 0.10]),
            judged(0, &[0.05, 0.15, 0.80]),
            judged(2, &[0.01, 0.01, 0.98]),
        ];
        assert!((fit_temperature(&texts) - 2.193_254).abs() < 1e-5, "{}", fit_temperature(&texts));
        let mut p = [0.2, 0.7, 0.1];
        apply_temperature(&mut p, 2.0);
        // sqrt of each, divided by their sum
        for (p, expected) in p.iter().zip([0.279_490_8, 0.522_879_4, 0.197_629_8]) {
            assert!((p / expected - 1.0).abs() < 1e-5, "{p} {expected}");
        }
    }
    /// Truths drawn from p, shown as softmax(3·ln p): the temperature found must be 3.
    #[test]
    fn an_overconfident_model_is_cooled_by_what_made_it_hot() {
        let mut rng = SplitMix64::stream(5, 0);
        let texts: Vec<Judged> = (0..40_000)
            .map(|_| {
                let raw: Vec<f64> = (0..3).map(|_| 0.1 - rng.unit().ln()).collect();
                let total: f64 = raw.iter().sum();
                let (mut truth, mut rest) = (0, rng.unit() * total);
                while truth < 2 && rest > raw[truth] {
                    rest -= raw[truth];
                    truth += 1;
                }
                let mut shown: Vec<f32> = raw.iter().map(|r| (r / total) as f32).collect();
                apply_temperature(&mut shown, 1.0 / 3.0);
                judged(truth, &shown)
            })
            .collect();
        let found = fit_temperature(&texts);
        assert!((found - 3.0).abs() < 0.12, "{found}");
    }

    #[test]
    fn what_cannot_be_fitted_changes_nothing() {
        assert_eq!(fit_temperature(&[]), 1.0);
        assert_eq!(fit_temperature(&[judged(5, &[0.5, 0.5]), judged(0, &[f32::NAN, 0.5])]), 1.0);
        assert_eq!(fit_temperature(&[judged(1, &[0.25; 4])]), 1.0);
        for bad in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            let mut p = [0.3, 0.7];
            apply_temperature(&mut p, bad);
            assert_eq!(p, [0.3, 0.7]);
        }
    }

    #[test]
    fn perfect_and_hopeless_models_stay_within_the_range() {
        let near = |a: f64, b: f64| (a / b - 1.0).abs() < 1e-6;
        assert!(near(fit_temperature(&[judged(0, &[0.9, 0.1])]), TEMPERATURE_RANGE.0));
        assert!(near(fit_temperature(&[judged(1, &[0.9, 0.1])]), TEMPERATURE_RANGE.1));
        let mut certain = [1.0, 0.0];
        apply_temperature(&mut certain, 0.05);
        assert_eq!(certain, [1.0, 0.0]);
    }
}
