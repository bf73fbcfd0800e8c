//! Whether one model beats another on the same texts.
//!
//! Two intervals that overlap say little: the models judge the same texts, so what one finds easy the other does too.
//! Everything here is paired, text by text.

use serde::{Deserialize, Serialize};

use crate::bootstrap::{Interval, Tally, paired};
use crate::error::{EvalError, Result, excerpt};
use crate::judged::{Judged, check};

/// What b has over a, on the same texts. Intervals are paired bootstraps of the differences b − a.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq)]
pub struct Comparison {
    pub examples: u64,
    /// b − a; above zero, b is better.
    pub accuracy: Interval,
    /// b − a; above zero, b is better.
    pub macro_f1: Interval,
    /// b − a in nats; below zero, b is better.
    pub log_loss: Interval,
    pub mcnemar: McNemar,
}

/// McNemar's exact test: of the texts that only one of the two gets right, could so uneven a split be a coin's?
#[derive(Serialize, Deserialize, Clone, Copy, Debug, PartialEq)]
pub struct McNemar {
    pub both_right: u64,
    pub only_a_right: u64,
    pub only_b_right: u64,
    pub neither_right: u64,
    /// Two-sided exact binomial probability; 1 when the models disagree about nothing.
    pub p_value: f64,
}

/// Compares two models that judged the same texts in the same order.
///
/// # Errors
/// When either slice fails the checks of [`crate::evaluate`], or a text or its true label differs between the two.
pub fn compare(a: &[Judged], b: &[Judged], labels: &[String], seed: u64) -> Result<Comparison> {
    if a.len() != b.len() {
        return Err(EvalError::PairedLength { a: a.len(), b: b.len() });
    }
    if let Some(index) = a.iter().zip(b).position(|(a, b)| a.truth != b.truth || a.text != b.text) {
        return Err(EvalError::PairedText { index, a: excerpt(&a[index].text), b: excerpt(&b[index].text) });
    }
    let (checked_a, checked_b) = (check(a, labels)?, check(b, labels)?);
    let (mut tally_a, mut tally_b) = (Tally::new(labels.len()), Tally::new(labels.len()));
    let mut table = [[0u64; 2]; 2];
    for (a, b) in checked_a.iter().zip(&checked_b).map(|(a, b)| (&a.outcome, &b.outcome)) {
        tally_a.add(a);
        tally_b.add(b);
        table[usize::from(a.right())][usize::from(b.right())] += 1;
    }
    let point = tally_b.scores().minus(tally_a.scores());
    let differences = paired(&checked_a, &checked_b, point, labels.len(), seed);
    Ok(Comparison {
        examples: checked_a.len() as u64,
        accuracy: differences.accuracy,
        macro_f1: differences.macro_f1,
        log_loss: differences.log_loss,
        mcnemar: McNemar {
            both_right: table[1][1],
            only_a_right: table[1][0],
            only_b_right: table[0][1],
            neither_right: table[0][0],
            p_value: binomial_two_sided(table[1][0], table[0][1]),
        },
    })
}

/// min(1, 2·P(X ≤ min(a, b))) for X ~ Binomial(a + b, 1/2).
fn binomial_two_sided(a: u64, b: u64) -> f64 {
    let (fewer, n) = (a.min(b), a + b);
    if a == b {
        return 1.0;
    }
    // ln of the largest term, P(X = fewer), then the others downwards as ratios: C(n, k-1) / C(n, k) = k / (n - k + 1).
    let ln_choose: f64 = (1..=fewer).map(|i| ((n - fewer + i) as f64 / i as f64).ln()).sum();
    let (mut term, mut sum) = (1.0f64, 1.0f64);
    for k in (1..=fewer).rev() {
        term *= k as f64 / (n - k + 1) as f64;
        sum += term;
        if term < sum * f64::EPSILON {
            break;
        }
    }
    let ln_p = ln_choose - n as f64 * std::f64::consts::LN_2 + sum.ln() + std::f64::consts::LN_2;
    ln_p.exp().min(1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels() -> Vec<String> {
        ["Positive", "Neutral", "Negative"].map(String::from).to_vec()
    }

    fn judged(text: usize, truth: usize, predicted: usize) -> Judged {
        let mut probabilities = vec![0.1; 3];
        probabilities[predicted] = 0.8;
        Judged { text: format!("text {text}"), truth, probabilities, kind: None }
    }

    /// scipy.stats.binomtest(k, n).pvalue
    #[test]
    fn mcnemar_matches_scipy() {
        for (a, b, expected) in MCNEMAR {
            let p = binomial_two_sided(a, b);
            assert!((p / expected - 1.0).abs() < 1e-9, "{a} {b}: {p} {expected}");
            assert_eq!(p, binomial_two_sided(b, a));
        }
        assert_eq!(binomial_two_sided(0, 0), 1.0);
        assert_eq!(binomial_two_sided(1, 1), 1.0);
        assert_eq!(binomial_two_sided(0, 1), 1.0);
    }
    const MCNEMAR: [(u64, u64, f64); 9] = [
        (0, 5, 0.0625),
        (1, 6, 0.125),
        (3, 9, 0.145_996_093_75),
        (12, 25, 0.047_031_027_439_515_74),
        (40, 60, 0.056_887_933_640_980_89),
        (10, 190, 2.947_707_604_296_853_4e-44),
        (480, 520, 0.217_448_293_204_141_5),
        (200, 1500, 3.234_085_596_706_443e-246),
        (0, 60, 1.734_723_475_976_807e-18),
    ];

    #[test]
    fn a_model_does_not_differ_from_itself() {
        let texts: Vec<Judged> = (0..50).map(|i| judged(i, i % 3, (i * 7) % 3)).collect();
        let same = compare(&texts, &texts, &labels(), 1).expect("comparable");
        let zero = Interval { value: 0.0, low: 0.0, high: 0.0 };
        assert_eq!((same.accuracy, same.macro_f1, same.log_loss), (zero, zero, zero));
        assert_eq!(same.mcnemar.p_value, 1.0);
        assert_eq!(same.mcnemar.both_right + same.mcnemar.neither_right, 50);
    }

    #[test]
    fn a_better_model_is_found_better() {
        let truth = |i: usize| i % 3;
        let a: Vec<Judged> = (0..60).map(|i| judged(i, truth(i), if i < 30 { truth(i) } else { 1 })).collect();
        let b: Vec<Judged> = (0..60).map(|i| judged(i, truth(i), truth(i))).collect();
        let found = compare(&a, &b, &labels(), 1).expect("comparable");
        assert!((found.accuracy.value - 20.0 / 60.0).abs() < 1e-12);
        assert!(found.accuracy.excludes_zero() && found.macro_f1.low > 0.0 && found.log_loss.high < 0.0);
        let m = found.mcnemar;
        assert_eq!((m.both_right, m.only_a_right, m.only_b_right, m.neither_right), (40, 0, 20, 0));
        assert!((m.p_value - 2.0 * 0.5f64.powi(20)).abs() < 1e-15);
        let turned = compare(&b, &a, &labels(), 1).expect("comparable");
        assert_eq!(turned.accuracy.value, -found.accuracy.value);
        assert!((turned.accuracy.low + found.accuracy.high).abs() < 1e-12);
    }

    #[test]
    fn what_cannot_be_paired_is_refused() {
        let a = [judged(0, 0, 0), judged(1, 1, 1)];
        let other_truth = [judged(0, 0, 0), judged(1, 2, 1)];
        let other_text = [judged(0, 0, 0), judged(7, 1, 1)];
        assert!(matches!(compare(&a, &a[..1], &labels(), 0), Err(EvalError::PairedLength { a: 2, b: 1 })));
        assert!(matches!(compare(&a, &other_truth, &labels(), 0), Err(EvalError::PairedText { index: 1, .. })));
        assert!(matches!(compare(&a, &other_text, &labels(), 0), Err(EvalError::PairedText { index: 1, .. })));
        assert_eq!(compare(&[], &[], &labels(), 0).err(), Some(EvalError::Empty));
    }
}
