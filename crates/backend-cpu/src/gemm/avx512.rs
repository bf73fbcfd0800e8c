//! The AVX512-BF16 micro-kernel: the only file with intrinsics.
//!
//! `vdpbf16ps` adds, in each of sixteen f32 lanes, the products of two neighbouring bf16 pairs. So operands are stored as
//! u32 words that hold two consecutive k of one row (A) or one column (B), the lower k in the lower half.
//!
//! ```text
//!   B panel, NR = 32 columns:   word [kk][j] = (B[2kk][j], B[2kk+1][j])         two zmm per kk
//!   A, any strides:             word at a + i·row_stride + kk·k_stride          broadcast to a zmm
//!   MR × 2 accumulators         12 × 2 = 24 of the 32 registers
//! ```
//!
//! The scalar twin is in `scalar.rs`; `gemm::tests` holds them together.

use std::arch::x86_64::*;

use super::{MR, NR, Tile, TileOut};

/// # Safety
/// The processor has AVX512 F, BW, VL and BF16; the pointers of `tile` cover its geometry (see [`Tile`]).
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
pub(super) unsafe fn tile(t: &Tile) {
    // SAFETY: the caller's contract, passed on.
    unsafe {
        match t.rows {
            1 => kernel::<1>(t),
            2 => kernel::<2>(t),
            3 => kernel::<3>(t),
            4 => kernel::<4>(t),
            5 => kernel::<5>(t),
            6 => kernel::<6>(t),
            7 => kernel::<7>(t),
            8 => kernel::<8>(t),
            9 => kernel::<9>(t),
            10 => kernel::<10>(t),
            11 => kernel::<11>(t),
            MR => kernel::<MR>(t),
            _ => unreachable!("a tile has 1 to {MR} rows"),
        }
    }
}

/// # Safety
/// As [`tile`], with `t.rows == R`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
#[inline]
unsafe fn kernel<const R: usize>(t: &Tile) {
    let mut acc = [[_mm512_setzero_ps(); 2]; R];
    let mut b = t.b;
    let mut a = t.a;
    // SAFETY: kk < k_words words of every row of A and NR words of B per kk are readable by contract.
    unsafe {
        for _ in 0..t.k_words {
            let b0 = as_bf16(_mm512_loadu_si512(b.cast()));
            let b1 = as_bf16(_mm512_loadu_si512(b.add(16).cast()));
            for (i, acc) in acc.iter_mut().enumerate() {
                let x = as_bf16(_mm512_set1_epi32(a.add(i * t.a_row_stride).read_unaligned() as i32));
                acc[0] = _mm512_dpbf16_ps(acc[0], x, b0);
                acc[1] = _mm512_dpbf16_ps(acc[1], x, b1);
            }
            b = b.add(NR);
            a = a.add(t.a_k_stride);
        }
        let masks = [lane_mask(t.cols), lane_mask(t.cols.saturating_sub(16))];
        let alpha = _mm512_set1_ps(t.alpha);
        for (i, row) in acc.iter().enumerate() {
            for (j, (&sum, &mask)) in row.iter().zip(&masks).enumerate() {
                let at = i * t.c_stride + j * 16;
                let mut y = _mm512_mul_ps(sum, alpha);
                match t.c {
                    TileOut::F32(c) => {
                        let c = c.add(at);
                        if t.accumulate {
                            y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(mask, c));
                        }
                        _mm512_mask_storeu_ps(c, mask, y);
                    }
                    TileOut::Bf16(c) => {
                        let c: *mut i16 = c.add(at).cast();
                        if t.accumulate {
                            let old = _mm256_maskz_loadu_epi16(mask, c);
                            let old = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(old), 16));
                            y = _mm512_add_ps(y, old);
                        }
                        _mm256_mask_storeu_epi16(c, mask, bf16_bits(_mm512_cvtneps_pbh(y)));
                    }
                }
            }
        }
    }
}

#[inline(always)]
fn lane_mask(cols: usize) -> __mmask16 {
    if cols >= 16 { 0xffff } else { ((1u32 << cols) - 1) as __mmask16 }
}

#[inline(always)]
fn as_bf16(x: __m512i) -> __m512bh {
    // SAFETY: both are 512 bits without invalid patterns.
    unsafe { std::mem::transmute(x) }
}

#[inline(always)]
fn bf16_bits(x: __m256bh) -> __m256i {
    // SAFETY: both are 256 bits without invalid patterns.
    unsafe { std::mem::transmute(x) }
}
