//! A row of a tile's sums into C, by AVX2: what both kernels of that instruction set end with.

use std::arch::x86_64::*;

use super::TileOut;
use crate::simd::Bf16;

/// Elements of a row of a tile.
pub(super) const WIDTH: usize = 16;

/// The first `cols` of a row's sums into C, or onto it with `accumulate`.
///
/// # Safety
/// The processor has AVX2; `cols` elements at `c` (at most [`WIDTH`]).
#[target_feature(enable = "avx2")]
#[inline]
pub(super) unsafe fn store(c: TileOut, y: [__m256; 2], cols: usize, accumulate: bool) {
    // SAFETY: the caller's contract.
    unsafe {
        match c {
            TileOut::F32(c) => with_whole(c, cols, accumulate, |c| store_f32(c, y, accumulate)),
            TileOut::Bf16(c) => with_whole(c, cols, accumulate, |c| store_bf16(c, y, accumulate)),
        }
    }
}

/// Calls `f` with a row of WIDTH elements: with C itself if it has them, else with a copy of the `cols` that it has.
///
/// # Safety
/// `cols` elements at `c`.
#[inline(always)]
unsafe fn with_whole<T: Copy + Default>(c: *mut T, cols: usize, read: bool, f: impl Fn(*mut T)) {
    if cols == WIDTH {
        return f(c);
    }
    let mut row = [T::default(); WIDTH];
    // SAFETY: the caller's contract; cols < WIDTH.
    unsafe {
        if read {
            std::ptr::copy_nonoverlapping(c, row.as_mut_ptr(), cols);
        }
        f(row.as_mut_ptr());
        std::ptr::copy_nonoverlapping(row.as_ptr(), c, cols);
    }
}

/// # Safety
/// WIDTH elements at `c`.
#[target_feature(enable = "avx2")]
#[inline]
unsafe fn store_f32(c: *mut f32, y: [__m256; 2], accumulate: bool) {
    // SAFETY: the caller's contract.
    unsafe {
        for (j, y) in y.into_iter().enumerate() {
            let c = c.add(8 * j);
            _mm256_storeu_ps(c, if accumulate { _mm256_add_ps(_mm256_loadu_ps(c), y) } else { y });
        }
    }
}

/// # Safety
/// WIDTH elements at `c`.
#[target_feature(enable = "avx2")]
#[inline]
unsafe fn store_bf16(c: *mut Bf16, mut y: [__m256; 2], accumulate: bool) {
    // SAFETY: the caller's contract.
    unsafe {
        if accumulate {
            for (j, y) in y.iter_mut().enumerate() {
                let old = _mm256_cvtepu16_epi32(_mm_loadu_si128(c.add(8 * j).cast()));
                *y = _mm256_add_ps(_mm256_castsi256_ps(_mm256_slli_epi32(old, 16)), *y);
            }
        }
        let [low, high] = y.map(|y| bf16_bits(y));
        // Packing works in each half of the registers; the quarters are put in order behind it.
        let packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0b11_01_10_00);
        _mm256_storeu_si256(c.cast(), packed);
    }
}

/// As `Bf16::from_f32`.
#[target_feature(enable = "avx2")]
#[inline]
fn bf16_bits(y: __m256) -> __m256i {
    let bits = _mm256_castps_si256(y);
    let odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    let rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    let nan = _mm256_or_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(0x40));
    let is_nan = _mm256_castps_si256(_mm256_cmp_ps(y, y, _CMP_UNORD_Q));
    _mm256_blendv_epi8(_mm256_srli_epi32(rounded, 16), nan, is_nan)
}
