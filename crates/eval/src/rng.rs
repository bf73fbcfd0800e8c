//! Random numbers for resampling: one independent SplitMix64 stream per resample.
//!
//! A stream depends on (seed, stream number) only, so resamples can run on any thread in any order with the same result.
//! Not for anything that must be unpredictable.

/// SplitMix64 (Steele, Lea, Flood 2014): 64 bits of state, passes BigCrush, three multiplications a draw.
pub(crate) struct SplitMix64(u64);

fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

impl SplitMix64 {
    const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;

    #[cfg(test)]
    pub(crate) fn new(state: u64) -> Self {
        Self(state)
    }

    /// The stream with the given number. Both are mixed, so that neighbouring seeds or numbers share no stretch.
    pub(crate) fn stream(seed: u64, number: u64) -> Self {
        Self(mix(mix(seed.wrapping_add(Self::GOLDEN)) ^ number.wrapping_mul(Self::GOLDEN)))
    }

    pub(crate) fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(Self::GOLDEN);
        mix(self.0)
    }

    /// A number below `n` (`n` > 0), by Lemire's multiplication; the bias is below n / 2^64.
    pub(crate) fn below(&mut self, n: usize) -> usize {
        ((u128::from(self.next_u64()) * n as u128) >> 64) as usize
    }

    #[cfg(test)]
    pub(crate) fn unit(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The first values that the authors' C program prints for the seed 1234567.
    #[test]
    fn splitmix_matches_the_published_values() {
        let mut rng = SplitMix64::new(1_234_567);
        let drawn: Vec<u64> = (0..5).map(|_| rng.next_u64()).collect();
        assert_eq!(
            drawn,
            [
                6_457_827_717_110_365_317,
                3_203_168_211_198_807_973,
                9_817_491_932_198_370_423,
                4_593_380_528_125_082_431,
                16_408_922_859_458_223_821
            ]
        );
    }

    #[test]
    fn below_is_even_over_its_range() {
        let mut counts = [0u32; 7];
        let mut rng = SplitMix64::stream(3, 9);
        for _ in 0..70_000 {
            counts[rng.below(7)] += 1;
        }
        // 5 standard deviations of a binomial(70000, 1/7).
        assert!(counts.iter().all(|&c| (c as f64 - 10_000.0).abs() < 463.0), "{counts:?}");
    }

    #[test]
    fn streams_differ() {
        let first: Vec<u64> = (0..100).map(|i| SplitMix64::stream(0, i).next_u64()).collect();
        let mut unique = first.clone();
        unique.sort_unstable();
        unique.dedup();
        assert_eq!(unique.len(), 100);
        assert_ne!(SplitMix64::stream(1, 0).next_u64(), first[0]);
    }
}
