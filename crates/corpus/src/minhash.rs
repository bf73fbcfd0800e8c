//! Shingles, their exact similarity, and MinHash signatures to find similar texts among millions.
//!
//! A text is the set of 5-character windows of its [`normalised_key`](crate::clean::normalised_key); similarity is the
//! Jaccard index of two such sets. Signatures (Broder 1997) are cut into bands: texts that agree in one band are
//! candidates, and a candidate only counts once its exact similarity has been computed. With 24 bands of 4 rows a pair of
//! similarity 0.7 is found with probability .9985, one of 0.6 with .964.

use crate::clean::normalised_key;
use crate::rng::mix;

/// Characters in a shingle.
const WINDOW: usize = 5;
pub(crate) const BANDS: usize = 24;
const ROWS: usize = 4;
const HASHES: usize = BANDS * ROWS;
/// Bytes of the signature kept beside the bands to throw out chance collisions cheaply.
pub(crate) const FILTER: usize = 32;

const _: () = assert!(ROWS == 4 && HASHES.is_multiple_of(2) && HASHES.is_multiple_of(FILTER));

/// The set of shingles of a text: sorted, distinct 32-bit hashes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sketch(Box<[u32]>);

impl Sketch {
    pub fn of(text: &str) -> Self {
        Self::of_key(&normalised_key(text))
    }

    /// The sketch of a text whose key is known.
    pub fn of_key(key: &str) -> Self {
        let mut shingles = Vec::with_capacity(key.len() + 2);
        // A space on either side makes the first and last words count as words.
        let mut window = [' '; WINDOW];
        let mut seen = 1usize;
        for character in key.chars().chain([' ']) {
            window.rotate_left(1);
            window[WINDOW - 1] = character;
            seen += 1;
            if seen >= WINDOW {
                shingles.push(hash_window(&window));
            }
        }
        if shingles.is_empty() && !key.is_empty() {
            shingles.push(hash_window(&window));
        }
        shingles.sort_unstable();
        shingles.dedup();
        Self(shingles.into_boxed_slice())
    }

    pub fn shingles(&self) -> &[u32] {
        &self.0
    }
}

fn hash_window(window: &[char; WINDOW]) -> u32 {
    // 5 × 21 bits do not fit into 64: two rounds.
    let low = window[0] as u64 | (window[1] as u64) << 21 | (window[2] as u64) << 42;
    let high = window[3] as u64 | (window[4] as u64) << 21;
    (mix(mix(low).wrapping_add(high)) >> 32) as u32
}

/// The Jaccard index of two sketches: shared shingles over all shingles, 0 to 1. Two empty sketches are the same.
pub fn similarity(a: &Sketch, b: &Sketch) -> f64 {
    let (a, b) = (a.shingles(), b.shingles());
    if a.is_empty() && b.is_empty() {
        return 1.0;
    }
    let (mut i, mut j, mut shared) = (0, 0, 0usize);
    while i < a.len() && j < b.len() {
        match a[i].cmp(&b[j]) {
            std::cmp::Ordering::Less => i += 1,
            std::cmp::Ordering::Greater => j += 1,
            std::cmp::Ordering::Equal => {
                shared += 1;
                i += 1;
                j += 1;
            }
        }
    }
    shared as f64 / (a.len() + b.len() - shared) as f64
}

/// What is kept of a text to find its near copies: 128 bytes.
#[derive(Clone, Debug)]
pub(crate) struct Signature {
    pub(crate) bands: [u32; BANDS],
    pub(crate) filter: [u8; FILTER],
}

impl Signature {
    pub(crate) fn of(sketch: &Sketch) -> Self {
        let (factors, offsets) = coefficients();
        // Sixteen bits a hash: eight lanes an instruction even on the oldest 64-bit machines. The smallest of some hundred
        // hashes is still hardly ever the same by chance. Half of the hashes see the upper half of a shingle.
        let mut minima = [i16::MAX; HASHES];
        for shingle in sketch.shingles() {
            let halves = [*shingle as i16, (*shingle >> 16) as i16];
            for (half, (minima, (factors, offsets))) in halves.iter().zip(
                minima
                    .chunks_exact_mut(HASHES / 2)
                    .zip(factors.chunks_exact(HASHES / 2).zip(offsets.chunks_exact(HASHES / 2))),
            ) {
                for (minimum, (factor, offset)) in minima.iter_mut().zip(factors.iter().zip(offsets)) {
                    *minimum = (*minimum).min(half.wrapping_mul(*factor).wrapping_add(*offset));
                }
            }
        }
        let mut bands = [0u32; BANDS];
        for (index, band) in bands.iter_mut().enumerate() {
            // Rows of a band lie far apart, so that both halves of the shingles take part.
            let row = |row: usize| u64::from(minima[index + row * BANDS] as u16);
            let rows = row(0) | row(1) << 16 | row(2) << 32 | row(3) << 48;
            *band = (mix(rows.wrapping_add(index as u64)) >> 32) as u32;
        }
        let mut filter = [0u8; FILTER];
        for (byte, minimum) in filter.iter_mut().zip(minima.iter().step_by(HASHES / FILTER)) {
            *byte = (mix(u64::from(*minimum as u16)) >> 56) as u8;
        }
        Self { bands, filter }
    }
}

/// Whether two texts can have a similarity of `bound` or more, judged by their filters alone: true unless the agreement
/// lies more than three standard deviations below what that similarity would give.
pub(crate) fn filter_passes(a: &[u8; FILTER], b: &[u8; FILTER], bound: f64) -> bool {
    let agreeing = a.iter().zip(b).filter(|(a, b)| a == b).count() as f64;
    let expected = bound * FILTER as f64;
    agreeing >= expected - 3.0 * (expected * (1.0 - bound)).sqrt()
}

/// Factors and offsets of the hash family x → a·x + b mod 2¹⁶ (a odd), fixed for ever: the same text has the same
/// signature in every build.
fn coefficients() -> (&'static [i16; HASHES], &'static [i16; HASHES]) {
    static COEFFICIENTS: std::sync::LazyLock<([i16; HASHES], [i16; HASHES])> = std::sync::LazyLock::new(|| {
        let mut rng = crate::rng::Rng::new(0x6D69_6E68_6173_6800);
        let factors = std::array::from_fn(|_| (rng.next_u64() >> 48) as i16 | 1);
        let offsets = std::array::from_fn(|_| (rng.next_u64() >> 48) as i16);
        (factors, offsets)
    });
    (&COEFFICIENTS.0, &COEFFICIENTS.1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn similarity_by_hand() {
        // " abcdef " has 4 windows of five, " abcdeg " shares the first two: 2 / 6.
        let (a, b) = (Sketch::of_key("abcdef"), Sketch::of_key("abcdeg"));
        assert_eq!((a.shingles().len(), b.shingles().len()), (4, 4));
        assert!((similarity(&a, &b) - 2.0 / 6.0).abs() < 1e-12);
        assert_eq!(similarity(&a, &a), 1.0);
        assert_eq!(similarity(&a, &Sketch::of_key("")), 0.0);
        assert_eq!(Sketch::of_key("a").shingles().len(), 1);
        assert_ne!(Sketch::of_key("a"), Sketch::of_key("b"));
    }

    #[test]
    fn a_flip_is_less_similar_than_a_copy() {
        let base = "Nordhaven Semiconductor beats quarterly estimates and raises its outlook for the year";
        let copy =
            "RT @x: Nordhaven Semiconductor beats quarterly estimates, raises its outlook for the year https://t.co/1";
        let other = "Polaris recalls nothing, sues nobody, guides in line. First quiet Tuesday of the year";
        let sketch = Sketch::of(base);
        assert!(similarity(&sketch, &Sketch::of(copy)) > 0.8);
        assert!(similarity(&sketch, &Sketch::of(other)) < 0.15);
    }

    #[test]
    fn signatures_estimate_the_similarity() {
        // Sets with known overlap: 300 shingles each, 200 shared: 200 / 400 = 0.5.
        let set = |from: u32| Sketch((from..from + 300).map(|i| (mix(u64::from(i)) >> 32) as u32).collect());
        let sorted = |mut sketch: Sketch| {
            sketch.0.sort_unstable();
            sketch
        };
        let (a, b) = (sorted(set(0)), sorted(set(100)));
        assert!((similarity(&a, &b) - 0.5).abs() < 1e-9);
        let (a, b) = (Signature::of(&a), Signature::of(&b));
        let agreeing = a.filter.iter().zip(&b.filter).filter(|(a, b)| a == b).count();
        assert!((8..=24).contains(&agreeing), "{agreeing} of 32 agree where about 16 should");
        assert!(filter_passes(&a.filter, &b.filter, 0.5));
        let stranger = Signature::of(&sorted(set(100_000)));
        assert!(!filter_passes(&a.filter, &stranger.filter, 0.5));
    }
}
