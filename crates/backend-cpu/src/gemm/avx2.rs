//! The AVX2 micro-kernel: the same words and panels as `avx512.rs`, widened to f32 on the way into the multiply.
//!
//! A processor with AVX2 and FMA but without `vdpbf16ps` multiplies bf16 no faster than f32, but as fast: widening a bf16
//! is a shift or a mask, and those run beside the multipliers. What is gained is half of the memory and of its traffic. The frozen layers,
//! most of the work, go by `fixed` instead; this kernel does the LoRA factors, attention and the head.
//!
//! ```text
//!   B panel, half of NR:   16 words per kk      → low  (word << 16)         two ymm
//!                                               → high (word & 0xffff0000)  two ymm
//!   A, widened once:       a block of rows as two planes of f32, lows and highs; each value is broadcast from memory
//!   6 × 2 accumulators     12 of the 16 registers
//! ```

use std::arch::x86_64::*;
use std::cell::RefCell;
use std::ops::Range;

use super::{AWords, COut, NR, Panels, TileOut};
use crate::simd::Element;

/// Rows of a tile.
const MR: usize = 6;
/// Columns of a tile: half of a panel.
const HALF: usize = NR / 2;
/// Rows of A that are widened together: with one panel of B they stay in the second-level cache.
const BLOCK: usize = 8 * MR;

thread_local! {
    static PLANES: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// A block of A as f32: the low and the high halves of its words, each with these strides.
#[derive(Clone, Copy)]
struct Planes {
    low: *const f32,
    high: *const f32,
    row_stride: usize,
    k_stride: usize,
}

/// Where a tile's result goes.
#[derive(Clone, Copy)]
struct Target {
    c: COut,
    row: usize,
    column: usize,
    columns: usize,
    alpha: f32,
    accumulate: bool,
}

/// Rows `rows` of `C ← alpha·A·B (+ C)` for the panels `panels` of B.
///
/// # Safety
/// The processor has AVX2 and FMA; the operands are as in [`super::gemm`].
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn block(
    alpha: f32,
    a: AWords,
    b: &Panels,
    accumulate: bool,
    c: COut,
    rows: Range<usize>,
    panels: Range<usize>,
) {
    PLANES.with_borrow_mut(|scratch| {
        for first in rows.clone().step_by(BLOCK) {
            let count = (rows.end - first).min(BLOCK);
            // SAFETY: rows first .. first + count are inside A by the caller's contract.
            let planes = unsafe { widen(a, first, count, scratch) };
            for p in panels.clone() {
                for column in (p * NR..((p + 1) * NR).min(b.n)).step_by(HALF) {
                    let words = b.panel(p)[column % NR..].as_ptr();
                    let columns = (b.n - column).min(HALF);
                    for i in (0..count).step_by(MR) {
                        let target = Target { c, row: first + i, column, columns, alpha, accumulate };
                        // SAFETY: the tile lies inside the operands by the caller's contract.
                        unsafe { tile(planes, i, (count - i).min(MR), words, a.k_words, target) };
                    }
                }
            }
        }
    });
}

/// Rows `first .. first + count` of A in two planes with strides of their own.
///
/// # Safety
/// The rows are inside A.
#[target_feature(enable = "avx2,fma")]
unsafe fn widen(a: AWords, first: usize, count: usize, scratch: &mut Vec<f32>) -> Planes {
    // Lines of words that lie side by side: rows, or steps of k where A is read transposed.
    let by_row = a.k_stride == 1;
    let (lines, len) = if by_row { (count, a.k_words) } else { (a.k_words, count) };
    // Not a power of two: rows of 4,096 bytes would all fall into the same sets of the cache.
    let pitch = len.next_multiple_of(8) + 8;
    let plane = lines * pitch;
    if scratch.len() < 2 * plane {
        scratch.resize(2 * plane, 0.0);
    }
    let (low, high) = scratch.split_at_mut(plane);
    for (line, (low, high)) in low.chunks_exact_mut(pitch).zip(high.chunks_exact_mut(pitch)).enumerate() {
        let at = if by_row { (first + line) * a.row_stride } else { line * a.k_stride + first * a.row_stride };
        for (i, (low, high)) in low[..len].iter_mut().zip(&mut high[..len]).enumerate() {
            // SAFETY: word (row, kk) of A is readable by contract; with k_stride ≠ 1 the row stride is 1.
            let word = unsafe { a.ptr.add(at + i).read_unaligned() };
            *low = f32::from_bits(word << 16);
            *high = f32::from_bits(word & 0xffff_0000);
        }
    }
    let (row_stride, k_stride) = if by_row { (pitch, 1) } else { (1, pitch) };
    Planes { low: low.as_ptr(), high: high.as_ptr(), row_stride, k_stride }
}

/// # Safety
/// As [`block`]; rows `row .. row + rows` are in the planes.
#[target_feature(enable = "avx2,fma")]
unsafe fn tile(a: Planes, row: usize, rows: usize, b: *const u32, k_words: usize, target: Target) {
    // SAFETY: the caller's contract, passed on.
    unsafe {
        match rows {
            1 => kernel::<1>(a, row, b, k_words, target),
            2 => kernel::<2>(a, row, b, k_words, target),
            3 => kernel::<3>(a, row, b, k_words, target),
            4 => kernel::<4>(a, row, b, k_words, target),
            5 => kernel::<5>(a, row, b, k_words, target),
            MR => kernel::<MR>(a, row, b, k_words, target),
            _ => unreachable!("a tile has 1 to {MR} rows"),
        }
    }
}

/// # Safety
/// As [`tile`], with `R` rows.
#[target_feature(enable = "avx2,fma")]
#[inline]
unsafe fn kernel<const R: usize>(a: Planes, row: usize, b: *const u32, k_words: usize, t: Target) {
    let mut acc = [[_mm256_setzero_ps(); 2]; R];
    let mask = _mm256_set1_epi32(0xffff_0000u32 as i32);
    // SAFETY: both planes hold R rows from `row` and k_words steps; the half panel holds 16 of each NR words.
    unsafe {
        let (mut low, mut high) = (a.low.add(row * a.row_stride), a.high.add(row * a.row_stride));
        let mut b = b;
        for _ in 0..k_words {
            let (w0, w1) = (_mm256_loadu_si256(b.cast()), _mm256_loadu_si256(b.add(8).cast()));
            let b0 = _mm256_castsi256_ps(_mm256_slli_epi32(w0, 16));
            let b1 = _mm256_castsi256_ps(_mm256_slli_epi32(w1, 16));
            for (i, acc) in acc.iter_mut().enumerate() {
                let x = _mm256_broadcast_ss(&*low.add(i * a.row_stride));
                acc[0] = _mm256_fmadd_ps(x, b0, acc[0]);
                acc[1] = _mm256_fmadd_ps(x, b1, acc[1]);
            }
            // Loaded again: kept, the words would take the two registers that the accumulators need.
            let again = hidden(b);
            let (w0, w1) = (_mm256_loadu_si256(again.cast()), _mm256_loadu_si256(again.add(8).cast()));
            let b0 = _mm256_castsi256_ps(_mm256_and_si256(w0, mask));
            let b1 = _mm256_castsi256_ps(_mm256_and_si256(w1, mask));
            for (i, acc) in acc.iter_mut().enumerate() {
                let x = _mm256_broadcast_ss(&*high.add(i * a.row_stride));
                acc[0] = _mm256_fmadd_ps(x, b0, acc[0]);
                acc[1] = _mm256_fmadd_ps(x, b1, acc[1]);
            }
            b = b.add(NR);
            low = low.add(a.k_stride);
            high = high.add(a.k_stride);
        }
    }
    for (i, sums) in acc.iter().enumerate() {
        let mut y = [0f32; HALF];
        let alpha = _mm256_set1_ps(t.alpha);
        // SAFETY: y holds sixteen f32; columns .. of the row are inside C by contract.
        unsafe {
            _mm256_storeu_ps(y.as_mut_ptr(), _mm256_mul_ps(sums[0], alpha));
            _mm256_storeu_ps(y.as_mut_ptr().add(8), _mm256_mul_ps(sums[1], alpha));
            let at = (t.row + i) * t.c.stride + t.column;
            match t.c.out {
                TileOut::F32(c) => store(&y, std::slice::from_raw_parts_mut(c.add(at), t.columns), t.accumulate),
                TileOut::Bf16(c) => store(&y, std::slice::from_raw_parts_mut(c.add(at), t.columns), t.accumulate),
            }
        }
    }
}

/// The same pointer, without the compiler knowing that it is the same.
#[allow(clippy::pointers_in_nomem_asm_block, reason = "nothing is read through it")]
#[inline(always)]
fn hidden(mut pointer: *const u32) -> *const u32 {
    // SAFETY: no instruction at all; the register keeps its value.
    unsafe { std::arch::asm!("/* {0} */", inout(reg) pointer, options(pure, nomem, nostack, preserves_flags)) };
    pointer
}

/// One row of a tile into C. The whole width is a loop of its own, of constant length.
#[inline(always)]
fn store<T: Element>(y: &[f32; HALF], c: &mut [T], accumulate: bool) {
    #[inline(always)]
    fn each<T: Element>(y: &[f32], c: &mut [T], accumulate: bool) {
        if accumulate {
            for (c, y) in c.iter_mut().zip(y) {
                *c = T::from_f32(c.to_f32() + y);
            }
        } else {
            for (c, y) in c.iter_mut().zip(y) {
                *c = T::from_f32(*y);
            }
        }
    }
    match <&mut [T; HALF]>::try_from(&mut *c) {
        Ok(c) => each(y, c, accumulate),
        Err(_) => each(y, c, accumulate),
    }
}
