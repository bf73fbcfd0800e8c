//! Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): a counter-based generator.
//! A dropout mask is a pure function of (seed, step, site, row, column), so recomputation, resume and every device see the
//! same mask without storing it.

const M0: u32 = 0xD251_1F53;
const M1: u32 = 0xCD9E_8D57;
const W0: u32 = 0x9E37_79B9;
const W1: u32 = 0xBB67_AE85;

/// Four random words for one counter value.
#[inline]
pub fn philox4x32(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for round in 0..10 {
        if round > 0 {
            key[0] = key[0].wrapping_add(W0);
            key[1] = key[1].wrapping_add(W1);
        }
        let p0 = u64::from(M0) * u64::from(counter[0]);
        let p1 = u64::from(M1) * u64::from(counter[2]);
        counter =
            [(p1 >> 32) as u32 ^ counter[1] ^ key[0], p1 as u32, (p0 >> 32) as u32 ^ counter[3] ^ key[1], p0 as u32];
    }
    counter
}

/// The word that decides whether element (`row`, `column`) of dropout site `site` is kept.
///
/// Sixteen bits decide one element, eight elements share one Philox call: counter = (column / 8, row, site, step),
/// key = (seed low, seed high); element `column % 8 = j` takes half `j % 2` (0 = low) of word `j / 2`.
#[inline]
pub fn dropout_bits(seed: u64, step: u32, site: u32, row: u32, column: u32) -> u16 {
    let words = philox4x32([column / 8, row, site, step], [seed as u32, (seed >> 32) as u32]);
    let j = column % 8;
    (words[(j / 2) as usize] >> (16 * (j % 2))) as u16
}

/// An element is kept when its [bits](dropout_bits) are at least this threshold: round(p · 65536), at most 65535.
pub fn dropout_threshold(p: f32) -> u16 {
    (p * 65536.0).round().clamp(0.0, 65535.0) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    // Known-answer vectors of the Random123 distribution (kat_vectors, philox4x32 10).
    #[test]
    fn known_answers() {
        assert_eq!(philox4x32([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox4x32([u32::MAX; 4], [u32::MAX; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        assert_eq!(
            philox4x32([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], [0xa409_3822, 0x299f_31d0]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn a_tenth_is_dropped() {
        let threshold = dropout_threshold(0.1);
        let dropped = (0..200u32)
            .flat_map(|row| (0..500u32).map(move |column| dropout_bits(42, 7, 3, row, column)))
            .filter(|&bits| bits < threshold)
            .count();
        // 100,000 draws with p = 0.1: one standard deviation is 95.
        assert!((9_600..=10_400).contains(&dropped), "{dropped}");
    }
}
