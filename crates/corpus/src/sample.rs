//! A smaller set that still shows every label and every kind.

use std::collections::BTreeMap;

use crate::example::Example;
use crate::rng::Rng;

/// Draws `n` examples (all of them if there are no more), balanced by label and, within a label, by kind in proportion
/// to the square root of what there is: rare kinds are over-represented, none is left out while there is room.
///
/// The same arguments give the same sample; a sample does not shrink when `n` grows. The result is shuffled, labels taking
/// turns, so that every prefix is balanced too.
pub fn balanced_sample(examples: &[Example], n: usize, seed: u64) -> Vec<Example> {
    draw(examples, |_| true, |_| 1.0, n, seed)
}

/// As [`balanced_sample`], for a run of a few hundred steps on the built-in corpus: short texts, of which more fit into the same
/// time, twice as many mixed ones and fewer of the kinds that take a longer training to learn. Which shares teach most was
/// tried out (docs/quality.md). Data with too few short texts are drawn from as a whole.
pub fn quick_sample(examples: &[Example], n: usize, seed: u64) -> Vec<Example> {
    /// Characters; half of the built-in texts have no more.
    const SHORT: usize = 90;
    let is_short = |example: &Example| example.text.chars().count() <= SHORT;
    let weight = |kind: &str| match kind {
        "mixed" => 2.0,
        "contextual" => 0.6,
        "targeted" => 0.3,
        _ => 1.0,
    };
    let enough = examples.iter().filter(|e| is_short(e)).count() >= n;
    draw(examples, |e| !enough || is_short(e), weight, n, seed)
}

/// Those of `examples` that are `wanted`, each kind at its rate times its `weight`.
fn draw(
    examples: &[Example],
    wanted: impl Fn(&Example) -> bool,
    weight: impl Fn(&str) -> f64,
    n: usize,
    seed: u64,
) -> Vec<Example> {
    // Stratum → shuffled rows; strata in a fixed order.
    let mut labels: BTreeMap<&str, BTreeMap<&str, Vec<usize>>> = BTreeMap::new();
    let mut available = 0;
    for (row, example) in examples.iter().enumerate().filter(|(_, e)| wanted(e)) {
        labels.entry(&example.label).or_default().entry(example.kind_or_plain()).or_default().push(row);
        available += 1;
    }
    let n = n.min(available);
    let mut rng = Rng::keyed(seed, &[0x73_61_6D_70]);
    let mut lanes: Vec<std::vec::IntoIter<usize>> = labels
        .into_values()
        .map(|kinds| interleave(kinds.into_iter().map(|(k, rows)| (weight(k), rows)), &mut rng).into_iter())
        .collect();
    let mut order: Vec<usize> = (0..lanes.len()).collect();
    let mut sample = Vec::with_capacity(n);
    while sample.len() < n {
        rng.shuffle(&mut order);
        for lane in &order {
            if sample.len() < n
                && let Some(row) = lanes[*lane].next()
            {
                sample.push(examples[row].clone());
            }
        }
    }
    sample
}

/// Merges strata into one sequence in which each comes up at a rate proportional to the square root of its size times its
/// weight, until it is used up.
fn interleave(strata: impl Iterator<Item = (f64, Vec<usize>)>, rng: &mut Rng) -> Vec<usize> {
    let mut merged: Vec<(f64, u64, usize)> = Vec::new();
    for (weight, mut rows) in strata {
        rng.shuffle(&mut rows);
        let rate = weight * (rows.len() as f64).sqrt();
        for (turn, row) in rows.into_iter().enumerate() {
            merged.push(((turn as f64 + rng.unit()) / rate, rng.next_u64(), row));
        }
    }
    merged.sort_unstable_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
    merged.into_iter().map(|(_, _, row)| row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{KINDS, LABELS};

    #[test]
    fn balanced_covering_and_repeatable() {
        let mut examples = Vec::new();
        for n in 0..1_000 {
            let mut example = Example::new(format!("text {n}"), LABELS[if n % 10 < 6 { 1 } else { n % 3 }]);
            example.kind = Some(KINDS[if n % 50 == 0 { 1 + n / 50 % 4 } else { 0 }].into());
            examples.push(example);
        }
        let sample = balanced_sample(&examples, 90, 1);
        assert_eq!(sample.len(), 90);
        for label in LABELS {
            assert_eq!(sample.iter().filter(|e| e.label == label).count(), 30, "{label}");
        }
        for kind in KINDS {
            assert!(sample.iter().any(|e| e.kind_or_plain() == kind), "{kind}");
        }
        assert_eq!(sample, balanced_sample(&examples, 90, 1));
        assert_ne!(sample, balanced_sample(&examples, 90, 2));
        assert_eq!(sample[..30], balanced_sample(&examples, 30, 1), "a smaller sample is a prefix");
        let mut all = balanced_sample(&examples, 5_000, 1);
        assert_eq!(all.len(), 1_000);
        all.sort_by(|a, b| a.text.cmp(&b.text));
        all.dedup();
        assert_eq!(all.len(), 1_000);
        assert!(balanced_sample(&[], 5, 1).is_empty());
    }

    #[test]
    fn a_quick_sample_is_short_and_has_more_mixed_texts() {
        let split = crate::builtin_split().unwrap();
        let n = 900;
        let (sample, balanced) = (quick_sample(&split.train, n, 1), balanced_sample(&split.train, n, 1));
        assert_eq!((sample.len(), balanced.len()), (n, n));
        assert!(sample.iter().all(|e| e.text.chars().count() <= 90));
        for label in LABELS {
            assert_eq!(sample.iter().filter(|e| e.label == label).count(), n / 3, "{label}");
        }
        let count = |examples: &[Example], kind: &str| examples.iter().filter(|e| e.kind_or_plain() == kind).count();
        for kind in KINDS {
            assert!(count(&sample, kind) >= 20, "{kind}");
        }
        assert!(count(&sample, "mixed") > count(&balanced, "mixed") * 5 / 4);
        assert!(count(&sample, "contextual") < count(&balanced, "contextual"));
        assert_eq!(sample[..300], quick_sample(&split.train, 300, 1), "a smaller sample is a prefix");
        // With fewer short texts than are wanted, long ones are taken too.
        let long: Vec<Example> =
            (0..50).map(|i| Example::new(format!("{i} {}", "long ".repeat(30)), LABELS[i % 3])).collect();
        assert_eq!(quick_sample(&long, 20, 1).len(), 20);
        assert_eq!(quick_sample(&long, 200, 1).len(), 50);
    }
}
