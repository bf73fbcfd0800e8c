//! The tile of a fixed-point product: by AVX2, and its scalar twin that gives the same bits.
//!
//! ```text
//!   B panel:      16 words per kk            two ymm
//!   A, a group:   6 words per kk             each broadcast from memory
//!   6 × 2 accumulators of eight i32          12 of the 16 registers
//! ```
//!
//! `vpmaddwd` multiplies sixteen pairs of 16-bit integers and adds neighbours, `vpaddd` adds the eight sums: two instructions for
//! sixteen multiply-adds, and the adders are other units than the two multipliers.

use super::{MR, NR, Tile, TileOut};
use crate::simd::{Bf16, Element};

/// The fastest tile that this processor runs.
pub(super) fn best() -> unsafe fn(&Tile) {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") {
        return avx2::tile;
    }
    scalar
}

/// The scalar twin.
///
/// # Safety
/// The pointers of `t` cover its geometry (see [`Tile`]).
pub(super) unsafe fn scalar(t: &Tile) {
    for i in 0..t.rows {
        let mut acc = [0i32; NR];
        for kk in 0..t.words {
            // SAFETY: words × MR words of A and words × NR words of B are readable by contract.
            unsafe {
                let a = *t.a.add(kk * MR + i);
                for (j, acc) in acc.iter_mut().enumerate() {
                    let b = *t.b.add(kk * NR + j);
                    *acc += i32::from(a as i16) * i32::from(b as i16)
                        + i32::from((a >> 16) as i16) * i32::from((b >> 16) as i16);
                }
            }
        }
        for (j, &acc) in acc.iter().enumerate() {
            // SAFETY: MR row scales, NR column scales and MR × NR sums by contract; element (i, j) of C is inside the tile.
            unsafe {
                let mut y = acc as f32 * *t.row_scales.add(i);
                let sum = t.sums.add(i * NR + j);
                if !t.first {
                    y += *sum;
                }
                if !t.last {
                    *sum = y;
                } else if j < t.cols {
                    y *= *t.column_scales.add(j);
                    let at = i * t.c_stride + j;
                    match t.c {
                        TileOut::F32(c) => *c.add(at) = if t.accumulate { *c.add(at) + y } else { y },
                        TileOut::Bf16(c) => {
                            let c = c.add(at);
                            *c = Bf16::from_f32(if t.accumulate { (*c).to_f32() + y } else { y });
                        }
                    }
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64::*;

    use super::{Bf16, MR, NR, Tile, TileOut};

    /// # Safety
    /// The processor has AVX2; the pointers of `t` cover its geometry (see [`Tile`]).
    pub(in super::super) unsafe fn tile(t: &Tile) {
        // SAFETY: the caller's contract, passed on.
        unsafe {
            match t.rows {
                1 => kernel::<1>(t),
                2 => kernel::<2>(t),
                3 => kernel::<3>(t),
                4 => kernel::<4>(t),
                5 => kernel::<5>(t),
                MR => kernel::<MR>(t),
                _ => unreachable!("a tile has 1 to {MR} rows"),
            }
        }
    }

    /// # Safety
    /// As [`tile`], with `t.rows == R`.
    #[target_feature(enable = "avx2")]
    unsafe fn kernel<const R: usize>(t: &Tile) {
        let mut acc = [[_mm256_setzero_si256(); 2]; R];
        let (mut a, mut b) = (t.a, t.b);
        // SAFETY: words × MR words of A and words × NR words of B are readable by contract.
        unsafe {
            for _ in 0..t.words / 2 {
                step(a, b, &mut acc);
                step(a.add(MR), b.add(NR), &mut acc);
                a = a.add(2 * MR);
                b = b.add(2 * NR);
            }
            if t.words % 2 == 1 {
                step(a, b, &mut acc);
            }
        }
        for (i, acc) in acc.iter().enumerate() {
            // SAFETY: MR row scales, NR column scales and MR × NR sums by contract.
            let y = unsafe {
                let scale = _mm256_set1_ps(*t.row_scales.add(i));
                let sums = t.sums.add(i * NR);
                let mut y = acc.map(|acc| _mm256_mul_ps(_mm256_cvtepi32_ps(acc), scale));
                if !t.first {
                    y = [_mm256_add_ps(y[0], _mm256_loadu_ps(sums)), _mm256_add_ps(y[1], _mm256_loadu_ps(sums.add(8)))];
                }
                if !t.last {
                    _mm256_storeu_ps(sums, y[0]);
                    _mm256_storeu_ps(sums.add(8), y[1]);
                    continue;
                }
                [
                    _mm256_mul_ps(y[0], _mm256_loadu_ps(t.column_scales)),
                    _mm256_mul_ps(y[1], _mm256_loadu_ps(t.column_scales.add(8))),
                ]
            };
            let at = i * t.c_stride;
            // SAFETY: the first `cols` elements of row i are inside C by contract.
            unsafe {
                match t.c {
                    TileOut::F32(c) => with_whole(c.add(at), t.cols, t.accumulate, |c| store_f32(c, y, t.accumulate)),
                    TileOut::Bf16(c) => with_whole(c.add(at), t.cols, t.accumulate, |c| store_bf16(c, y, t.accumulate)),
                }
            }
        }
    }

    /// One word of k for all accumulators.
    ///
    /// # Safety
    /// R words of A, NR words of B.
    #[target_feature(enable = "avx2")]
    #[inline]
    unsafe fn step<const R: usize>(a: *const u32, b: *const u32, acc: &mut [[__m256i; 2]; R]) {
        // SAFETY: the caller's contract.
        unsafe {
            let (b0, b1) = (_mm256_loadu_si256(b.cast()), _mm256_loadu_si256(b.add(8).cast()));
            for (i, acc) in acc.iter_mut().enumerate() {
                let x = _mm256_set1_epi32(*a.add(i) as i32);
                acc[0] = _mm256_add_epi32(acc[0], _mm256_madd_epi16(x, b0));
                acc[1] = _mm256_add_epi32(acc[1], _mm256_madd_epi16(x, b1));
            }
        }
    }

    /// Calls `f` with a row of NR elements: with C itself if it has them, else with a copy of the `cols` that it has.
    ///
    /// # Safety
    /// `cols` elements at `c`.
    #[inline(always)]
    unsafe fn with_whole<T: Copy + Default>(c: *mut T, cols: usize, read: bool, f: impl Fn(*mut T)) {
        if cols == NR {
            return f(c);
        }
        let mut row = [T::default(); NR];
        // SAFETY: the caller's contract; cols < NR.
        unsafe {
            if read {
                std::ptr::copy_nonoverlapping(c, row.as_mut_ptr(), cols);
            }
            f(row.as_mut_ptr());
            std::ptr::copy_nonoverlapping(row.as_ptr(), c, cols);
        }
    }

    /// # Safety
    /// NR elements at `c`.
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
    /// NR elements at `c`.
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
}
