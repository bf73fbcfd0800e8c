//! Which examples make up which step: a function of seed, epoch and step, so that resume needs no saved position but the
//! step itself.

use cashtag_backend::philox::philox4x32;

/// A random order of `0 .. n` for an epoch (Fisher–Yates with Philox words).
pub fn epoch_order(n: usize, seed: u64, epoch: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..n).collect();
    for i in (1..n).rev() {
        // The last counter word keeps these words apart from those of dropout (a step number) and of LoRA's initial values.
        let words =
            philox4x32([i as u32, (i >> 32) as u32, epoch as u32, u32::MAX - 1], [seed as u32, (seed >> 32) as u32]);
        let word = u64::from(words[0]) << 32 | u64::from(words[1]);
        // Multiply-shift: the bias is below n / 2⁶⁴.
        let j = ((u128::from(word) * (i as u128 + 1)) >> 64) as usize;
        order.swap(i, j);
    }
    order
}

/// The examples of optimizer step `step` (over the whole run).
pub fn step_examples(
    n: usize,
    per_step: usize,
    seed: u64,
    step: usize,
    cache: &mut Option<(usize, Vec<usize>)>,
) -> Vec<usize> {
    let steps = n.div_ceil(per_step);
    let (epoch, within) = (step / steps, step % steps);
    if cache.as_ref().is_none_or(|(e, _)| *e != epoch) {
        *cache = Some((epoch, epoch_order(n, seed, epoch)));
    }
    let order = &cache.as_ref().map_or(&[][..], |(_, o)| o);
    order[within * per_step..((within + 1) * per_step).min(n)].to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_example_once_an_epoch() {
        let mut cache = None;
        for epoch in 0..3 {
            let mut seen: Vec<usize> =
                (0..4).flat_map(|s| step_examples(10, 3, 7, epoch * 4 + s, &mut cache)).collect();
            assert_ne!(seen, (0..10).collect::<Vec<_>>());
            seen.sort();
            assert_eq!(seen, (0..10).collect::<Vec<_>>());
        }
        assert_ne!(epoch_order(10, 7, 0), epoch_order(10, 7, 1));
        assert_eq!(epoch_order(10, 7, 1), epoch_order(10, 7, 1));
    }
}
