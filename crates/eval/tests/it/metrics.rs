//! Metrics against scikit-learn, the intervals against simulated data, and what must hold for any data.

use cashtag_eval::{Judged, Metrics, NO_KIND, RELIABILITY_BINS, by_kind, compare, evaluate};
use proptest::prelude::*;

const PROBABILITIES: [[f32; 3]; 12] = [
    [0.7, 0.2, 0.1],
    [0.1, 0.77, 0.13],
    [0.3, 0.3, 0.4],
    [0.05, 0.05, 0.9],
    [0.62, 0.28, 0.1],
    [0.2, 0.5, 0.3],
    [0.15, 0.23, 0.62],
    [0.45, 0.35, 0.2],
    [0.01, 0.01, 0.98],
    [0.33, 0.34, 0.33],
    [0.1, 0.13, 0.77],
    [0.55, 0.25, 0.2],
];
const TRUTHS: [usize; 12] = [0, 1, 1, 2, 0, 2, 2, 1, 2, 0, 0, 0];

fn labels(n: usize) -> Vec<String> {
    ["Positive", "Neutral", "Negative"]
        .into_iter()
        .map(String::from)
        .chain((3..).map(|i| format!("{i}")))
        .take(n)
        .collect()
}

fn judged(truth: usize, probabilities: &[f32]) -> Judged {
    Judged { text: "$SPY flat".into(), truth, probabilities: probabilities.to_vec(), kind: None }
}

fn twelve() -> Vec<Judged> {
    TRUTHS.iter().zip(PROBABILITIES).map(|(&t, p)| judged(t, &p)).collect()
}

/// Texts whose predictions are certain.
fn certain(pairs: &[(usize, usize)], classes: usize) -> Vec<Judged> {
    let one_hot = |at: usize| (0..classes).map(|i| if i == at { 1.0 } else { 0.0 }).collect::<Vec<f32>>();
    pairs.iter().map(|&(truth, predicted)| judged(truth, &one_hot(predicted))).collect()
}

fn close(found: f64, expected: f64) {
    assert!((found - expected).abs() < 1e-9, "found {found}, expected {expected}");
}

fn measured(texts: &[Judged], classes: usize) -> Metrics {
    evaluate(texts, &labels(classes), 7).expect("valid texts")
}

/// accuracy_score, f1_score, precision_recall_fscore_support, confusion_matrix, log_loss and brier_score_loss of
/// scikit-learn 1.7 on the same twelve texts; the calibration error from NumPy.
#[test]
fn scikit_learn_gives_the_same_numbers() {
    let m = measured(&twelve(), 3);
    close(m.accuracy.value, 7.0 / 12.0);
    close(m.macro_f1.value, 0.555_555_555_555_555_5);
    close(m.weighted_f1.value, 0.583_333_333_333_333_4);
    close(m.log_loss.value, 0.763_877_243_335_547_3);
    close(m.brier, 0.439_266_663_708_413_7);
    close(m.expected_calibration_error, 0.321_666_665_108_253_6);
    close(m.mean_confidence, 0.633_333_330_073_704_2);
    close(m.majority_baseline, 5.0 / 12.0);
    assert_eq!(m.confusion, [[3, 1, 1], [1, 1, 1], [0, 1, 3]]);
    let expected = [(0.75, 0.6, 2.0 / 3.0, 5), (1.0 / 3.0, 1.0 / 3.0, 1.0 / 3.0, 3), (0.6, 0.75, 2.0 / 3.0, 4)];
    for (class, (precision, recall, f1, support)) in m.per_class.iter().zip(expected) {
        close(class.precision, precision);
        close(class.recall, recall);
        close(class.f1, f1);
        assert_eq!(class.support, support);
    }
    let filled: Vec<(usize, u64)> =
        m.reliability.iter().enumerate().filter(|(_, b)| b.count > 0).map(|(i, b)| (i, b.count)).collect();
    assert_eq!(filled, [(5, 2), (6, 1), (7, 1), (8, 1), (9, 2), (10, 1), (11, 2), (13, 1), (14, 1)]);
    close(m.reliability[11].confidence, 0.769_999_998_137_354_8);
    close(m.reliability[11].accuracy, 0.5);
}

/// f1_score(average="macro") without `labels`: a class that nobody has and nobody predicts does not count, one that is
/// only predicted does, with 0.
#[test]
fn a_missing_class_is_treated_as_scikit_learn_does() {
    let m = measured(&certain(&[(0, 0), (0, 2), (2, 2), (2, 2), (0, 0)], 3), 3);
    close(m.macro_f1.value, 0.8);
    assert_eq!((m.per_class[1].precision, m.per_class[1].recall, m.per_class[1].f1), (0.0, 0.0, 0.0));
    let m = measured(&certain(&[(0, 0), (0, 1), (2, 2), (2, 2), (0, 0)], 3), 3);
    close(m.macro_f1.value, 0.6);
    close(m.weighted_f1.value, 0.88);
}

#[test]
fn one_text_is_enough_to_measure_and_too_few_to_know() {
    let m = measured(&[judged(1, &[0.25, 0.5, 0.25])], 3);
    assert_eq!((m.accuracy.value, m.accuracy.low, m.accuracy.high), (1.0, 1.0, 1.0));
    close(m.log_loss.value, 2f64.ln());
    close(m.expected_calibration_error, 0.5);
    assert_eq!(m.majority_baseline, 1.0);
}

#[test]
fn a_certain_mistake_costs_much_but_not_infinitely_much() {
    let m = measured(&certain(&[(0, 1)], 2), 2);
    close(m.log_loss.value, -f64::EPSILON.ln());
    close(m.brier, 2.0);
}

/// The true accuracy is 0.7; of 95 % intervals from 200 texts, 95 in a hundred should hold it. With 400 simulations the
/// standard deviation of the share is 1.1 %; the percentile bootstrap is a little narrow at this size.
#[test]
fn intervals_cover_what_they_promise() {
    let (mut state, mut accuracy_held, mut difference_held) = (0x5EED_u64, 0, 0);
    let mut unit = move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 11) as f64 / (1u64 << 53) as f64
    };
    const SIMULATIONS: u64 = 400;
    for seed in 0..SIMULATIONS {
        let mut draw = |share: f64| usize::from(unit() >= share);
        let pairs: Vec<((usize, usize), (usize, usize))> = (0..200)
            .map(|_| {
                let truth = draw(0.5);
                // Where a errs, b errs half of the time; where a is right, b is always right: 0.7 and 0.85.
                let a_errs = draw(0.7);
                let b_errs = if a_errs == 1 { draw(0.5) } else { 0 };
                ((truth, truth ^ a_errs), (truth, truth ^ b_errs))
            })
            .collect();
        let (a, b): (Vec<_>, Vec<_>) = pairs.into_iter().unzip();
        let (a, b) = (certain(&a, 2), certain(&b, 2));
        let accuracy = evaluate(&a, &labels(2), seed).expect("valid").accuracy;
        accuracy_held += u32::from(accuracy.low <= 0.7 && 0.7 <= accuracy.high);
        let difference = compare(&a, &b, &labels(2), seed).expect("valid").accuracy;
        difference_held += u32::from(difference.low <= 0.15 && 0.15 <= difference.high);
    }
    for held in [accuracy_held, difference_held] {
        let share = f64::from(held) / SIMULATIONS as f64;
        assert!((0.915..=0.98).contains(&share), "coverage {share}");
    }
}

/// For an accuracy of 0.7 from 1,000 texts the normal interval is 0.7 ± 1.96·√(0.21/1000).
#[test]
fn a_wide_sample_gives_the_textbook_interval() {
    let pairs: Vec<(usize, usize)> = (0..1000).map(|i| (i % 2, if i < 700 { i % 2 } else { 1 - i % 2 })).collect();
    let accuracy = measured(&certain(&pairs, 2), 2).accuracy;
    assert!((accuracy.low - 0.6716).abs() < 0.003 && (accuracy.high - 0.7284).abs() < 0.003, "{accuracy:?}");
}

#[test]
fn threads_change_no_bit() {
    let texts: Vec<Judged> = twelve().into_iter().cycle().take(500).collect();
    let on = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a thread pool");
        pool.install(|| (measured(&texts, 3), compare(&texts, &texts, &labels(3), 3).expect("valid")))
    };
    let (one, seven) = (on(1), on(7));
    assert_eq!(one, seven);
    assert_eq!(one.0.log_loss.low.to_bits(), seven.0.log_loss.low.to_bits());
    let other_seed = evaluate(&texts, &labels(3), 8).expect("valid");
    assert_ne!(other_seed.log_loss.low, one.0.log_loss.low);
}

#[test]
fn kinds_partition_the_texts() {
    let mut texts = twelve();
    assert!(by_kind(&texts, &labels(3), 0).expect("valid").is_empty());
    assert!(by_kind(&[], &labels(3), 0).expect("valid").is_empty());
    for (i, text) in texts.iter_mut().enumerate() {
        text.kind = [Some("plain"), Some("mixed"), None][i % 3].map(String::from);
    }
    let kinds = by_kind(&texts, &labels(3), 0).expect("valid");
    assert_eq!(kinds.keys().collect::<Vec<_>>(), ["mixed", "plain", NO_KIND]);
    assert!(kinds.values().all(|m| m.examples == 4));
    let mixed: Vec<Judged> = texts.iter().filter(|t| t.kind.as_deref() == Some("mixed")).cloned().collect();
    assert_eq!(kinds["mixed"], evaluate(&mixed, &labels(3), 0).expect("valid"));
    // The place in an error is that in the whole slice.
    texts[5].probabilities[0] = f32::NAN;
    assert!(by_kind(&texts, &labels(3), 0).is_err_and(|e| e.to_string().starts_with("text 5 ")));
}

#[test]
fn metrics_survive_json() {
    let m = measured(&twelve(), 3);
    let text = serde_json::to_string(&m).expect("serialises");
    assert_eq!(serde_json::from_str::<Metrics>(&text).expect("parses"), m);
}

/// Texts over `classes` labels with probabilities from a softmax of arbitrary scores.
fn texts(classes: usize) -> impl Strategy<Value = Vec<Judged>> {
    let one = (0..classes, prop::collection::vec(-20.0f32..20.0, classes)).prop_map(|(truth, scores)| {
        let top = scores.iter().copied().fold(f32::MIN, f32::max);
        let weights: Vec<f32> = scores.iter().map(|s| (s - top).exp()).collect();
        let total: f32 = weights.iter().sum();
        judged(truth, &weights.iter().map(|w| w / total).collect::<Vec<_>>())
    });
    prop::collection::vec(one, 1..40)
}

fn any_texts() -> impl Strategy<Value = (usize, Vec<Judged>)> {
    (2usize..=10).prop_flat_map(|classes| texts(classes).prop_map(move |t| (classes, t)))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn scores_stay_in_their_ranges((classes, texts) in any_texts()) {
        let m = measured(&texts, classes);
        for share in [m.accuracy, m.macro_f1, m.weighted_f1] {
            prop_assert!((0.0..=1.0).contains(&share.value));
            prop_assert!(0.0 <= share.low && share.low <= share.high && share.high <= 1.0);
        }
        prop_assert!(m.log_loss.low >= 0.0 && m.log_loss.low <= m.log_loss.high && m.log_loss.high.is_finite());
        prop_assert!((0.0..=1.0).contains(&m.expected_calibration_error));
        prop_assert!((0.0..=2.0 + 1e-9).contains(&m.brier));
        prop_assert!(m.mean_confidence >= 1.0 / classes as f64 - 1e-6);
        prop_assert_eq!(m.confusion.iter().flatten().sum::<u64>(), texts.len() as u64);
        prop_assert_eq!(m.reliability.len(), RELIABILITY_BINS);
        prop_assert_eq!(m.reliability.iter().map(|b| b.count).sum::<u64>(), texts.len() as u64);
        let diagonal: u64 = (0..classes).map(|c| m.confusion[c][c]).sum();
        prop_assert!((m.accuracy.value - diagonal as f64 / texts.len() as f64).abs() < 1e-12);
        for bin in m.reliability.iter().filter(|b| b.count > 0) {
            prop_assert!(bin.confidence > bin.lower - 1e-9 && bin.confidence < bin.upper + 1e-9);
        }
    }

    #[test]
    fn order_does_not_matter((classes, texts) in any_texts(), turn in 0usize..40) {
        let m = measured(&texts, classes);
        let mut turned = texts.clone();
        turned.rotate_left(turn % texts.len());
        turned.reverse();
        let t = measured(&turned, classes);
        prop_assert_eq!(&m.confusion, &t.confusion);
        prop_assert_eq!(&m.per_class, &t.per_class);
        prop_assert_eq!(m.accuracy.value, t.accuracy.value);
        prop_assert_eq!(m.macro_f1.value, t.macro_f1.value);
        let near = |a: f64, b: f64| (a - b).abs() < 1e-9 * (1.0 + a.abs());
        prop_assert!(near(m.log_loss.value, t.log_loss.value) && near(m.brier, t.brier));
        prop_assert!(near(m.expected_calibration_error, t.expected_calibration_error));
        // The ends of the intervals come from other draws of the same texts: within noise of each other.
        let width = (m.log_loss.high - m.log_loss.low).max(t.log_loss.high - t.log_loss.low);
        prop_assert!((m.log_loss.low - t.log_loss.low).abs() <= 0.6 * width + 1e-9);
    }

    #[test]
    fn perfect_predictions_are_perfect(classes in 2usize..=10, truths in prop::collection::vec(0usize..10, 1..50)) {
        let pairs: Vec<(usize, usize)> = truths.iter().map(|t| (t % classes, t % classes)).collect();
        let m = measured(&certain(&pairs, classes), classes);
        for share in [m.accuracy, m.macro_f1, m.weighted_f1] {
            prop_assert_eq!((share.value, share.low, share.high), (1.0, 1.0, 1.0));
        }
        prop_assert_eq!((m.log_loss.value, m.brier, m.expected_calibration_error), (0.0, 0.0, 0.0));
    }

    #[test]
    fn broken_probabilities_are_refused(
        (classes, mut texts) in any_texts(),
        at in any::<prop::sample::Index>(),
        bad in prop::sample::select(vec![f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -0.5, 1.5, 1e30]),
    ) {
        let at = at.index(texts.len());
        texts[at].probabilities[at % classes] = bad;
        let message = evaluate(&texts, &labels(classes), 0).map(|_| ()).map_err(|e| e.to_string());
        let place = format!("text {at} (`$SPY flat`)");
        prop_assert!(message.is_err_and(|m| m.starts_with(&place) && m.contains("hint: ")));
    }

    #[test]
    fn temperature_never_changes_the_prediction((_, texts) in any_texts(), temperature in 0.05f64..20.0) {
        for text in texts {
            let mut scaled = text.clone();
            cashtag_eval::apply_temperature(&mut scaled.probabilities, temperature);
            let sum: f32 = scaled.probabilities.iter().sum();
            prop_assert!((sum - 1.0).abs() < 1e-5);
            // Equal to the highest, if rounding has made equals of neighbours.
            let top = scaled.probabilities.iter().copied().fold(0.0, f32::max);
            prop_assert_eq!(scaled.probabilities[text.predicted()], top);
        }
    }

    #[test]
    fn the_fitted_temperature_is_no_worse_than_any((_, texts) in any_texts(), other in 0.06f64..19.0) {
        // Not by `evaluate`, whose log-loss stops at 36 nats.
        let loss_at = |temperature: f64| -> f64 {
            let loss = |text: &Judged| {
                let scaled = |p: f32| f64::from(p.max(f32::MIN_POSITIVE)).ln() / temperature;
                let top = scaled(text.probabilities[text.predicted()]);
                let total: f64 = text.probabilities.iter().map(|&p| (scaled(p) - top).exp()).sum();
                total.ln() + top - scaled(text.probabilities[text.truth])
            };
            texts.iter().map(loss).sum()
        };
        let (fitted, other) = (loss_at(cashtag_eval::fit_temperature(&texts)), loss_at(other));
        prop_assert!(fitted <= other * (1.0 + 1e-9) + 1e-9, "{} against {}", fitted, other);
    }
}
