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
    // Stratum → shuffled rows; strata in a fixed order.
    let mut labels: BTreeMap<&str, BTreeMap<&str, Vec<usize>>> = BTreeMap::new();
    for (row, example) in examples.iter().enumerate() {
        labels.entry(&example.label).or_default().entry(example.kind_or_plain()).or_default().push(row);
    }
    let mut rng = Rng::keyed(seed, &[0x73_61_6D_70]);
    let mut lanes: Vec<std::vec::IntoIter<usize>> =
        labels.into_values().map(|kinds| interleave(kinds.into_values(), &mut rng).into_iter()).collect();
    let mut order: Vec<usize> = (0..lanes.len()).collect();
    let mut sample = Vec::with_capacity(n.min(examples.len()));
    while sample.len() < n.min(examples.len()) {
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

/// Merges strata into one sequence in which each comes up at a rate proportional to the square root of its size, until
/// it is used up.
fn interleave(strata: impl Iterator<Item = Vec<usize>>, rng: &mut Rng) -> Vec<usize> {
    let mut merged: Vec<(f64, u64, usize)> = Vec::new();
    for mut rows in strata {
        rng.shuffle(&mut rows);
        let rate = (rows.len() as f64).sqrt();
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
}
