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

    use super::super::super::avx2_store::store;
    use super::{MR, NR, Tile};

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
            // SAFETY: the first `cols` elements of row i are inside C by contract.
            unsafe { store(t.c.add(i * t.c_stride), y, t.cols, t.accumulate) }
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
}
