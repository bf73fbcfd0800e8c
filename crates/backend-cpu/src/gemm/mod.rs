//! bf16 matrix products on packed panels: packing, the loop over tiles, and the work sharing.
//!
//! `C = alpha·A·B (+ C)` with A `[m, k]`, B `[k, n]`. B is always packed into [`Panels`] (frozen weights once at load,
//! everything else per call into pooled scratch); A is read in place when it is row-major and packed when it is
//! transposed. Every element of C is summed over k in one order by one thread, so the result does not depend on the
//! number of threads.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx2_store;
#[cfg(target_arch = "x86_64")]
mod avx512;
pub(crate) mod fixed;
mod pack;
mod scalar;

use std::ops::Range;

use rayon::prelude::*;

pub(crate) use pack::{Panels, interleave_rows, pack_nn, pack_nt, transpose_panels};

use crate::simd::{Bf16, Isa, isa};

/// Rows of a tile: 12 × 2 accumulators fill 24 of the 32 vector registers.
pub(crate) const MR: usize = 12;
/// Columns of a tile and of a panel: two vectors of sixteen f32.
pub(crate) const NR: usize = 32;
/// Rows of A that one task works through while a panel of B stays in the cache.
const ROWS_PER_TASK: usize = 12 * MR;

/// One MR × NR tile of C.
pub(crate) struct Tile {
    /// Words of two bf16: row i, pair kk at `a + i·a_row_stride + kk·a_k_stride`. Read unaligned.
    a: *const u32,
    a_row_stride: usize,
    a_k_stride: usize,
    /// One panel: `k_words` × NR words.
    b: *const u32,
    k_words: usize,
    c: TileOut,
    c_stride: usize,
    rows: usize,
    cols: usize,
    alpha: f32,
    accumulate: bool,
}

#[derive(Clone, Copy)]
pub(crate) enum TileOut {
    F32(*mut f32),
    Bf16(*mut Bf16),
}

impl TileOut {
    /// The element `offset` further on.
    ///
    /// # Safety
    /// It is inside the same matrix.
    #[inline(always)]
    unsafe fn add(self, offset: usize) -> Self {
        // SAFETY: the caller's contract.
        unsafe {
            match self {
                Self::F32(c) => Self::F32(c.add(offset)),
                Self::Bf16(c) => Self::Bf16(c.add(offset)),
            }
        }
    }
}

/// The A operand of a product: words of two consecutive k.
#[derive(Clone, Copy)]
pub(crate) struct AWords {
    pub(crate) ptr: *const u32,
    pub(crate) row_stride: usize,
    pub(crate) k_stride: usize,
    pub(crate) rows: usize,
    pub(crate) k_words: usize,
}

/// The C operand: rows of `stride` elements.
#[derive(Clone, Copy)]
pub(crate) struct COut {
    pub(crate) out: TileOut,
    pub(crate) stride: usize,
}

// SAFETY: tasks write disjoint tiles of C and only read A and B.
unsafe impl Send for AWords {}
unsafe impl Sync for AWords {}
unsafe impl Send for COut {}
unsafe impl Sync for COut {}

/// `C ← alpha·A·B`, or `C ← C + alpha·A·B` with `accumulate`.
///
/// # Safety
/// `a` covers `a.rows × a.k_words` words with its strides, `c` covers `a.rows × b.n` elements with its stride and nobody else
/// touches them meanwhile.
pub(crate) unsafe fn gemm(alpha: f32, a: AWords, b: &Panels, accumulate: bool, c: COut, parallel: bool) {
    // SAFETY: the caller's contract, passed on.
    unsafe { gemm_sum(alpha, &[(a, b)], accumulate, c, parallel) }
}

/// `C ← alpha·Σ A·B`, or `C ← C + alpha·Σ A·B` with `accumulate`, over terms of equal shape. A panel of C is finished before the next is
/// begun, so panels that several terms share are read once.
///
/// # Safety
/// As [`gemm`], for each term.
pub(crate) unsafe fn gemm_sum(alpha: f32, terms: &[(AWords, &Panels)], accumulate: bool, c: COut, parallel: bool) {
    let Some(&(a, b)) = terms.first() else { return };
    for (a_i, b_i) in terms {
        assert_eq!(a_i.k_words, b_i.k_words(), "inner dimensions differ");
        assert_eq!((a_i.rows, b_i.n), (a.rows, b.n), "terms of different shapes");
    }
    if a.rows == 0 || b.n == 0 {
        return;
    }
    let panels = b.n.div_ceil(NR);
    let row_tasks = a.rows.div_ceil(ROWS_PER_TASK);
    // About eight tasks a thread even the load without paying for the hand-over.
    let wanted = if parallel { rayon::current_num_threads() * 8 } else { 1 };
    let panel_tasks = wanted.div_ceil(row_tasks).clamp(1, panels);
    let task = |index: usize| {
        let (row_task, panel_task) = (index / panel_tasks, index % panel_tasks);
        let rows = row_task * ROWS_PER_TASK..((row_task + 1) * ROWS_PER_TASK).min(a.rows);
        let columns = panel_task * panels / panel_tasks..(panel_task + 1) * panels / panel_tasks;
        let step = if terms.len() == 1 { columns.len() } else { 1 };
        for first in columns.clone().step_by(step) {
            for (i, &(a, b)) in terms.iter().enumerate() {
                // SAFETY: rows and panels lie inside the operands by the caller's contract.
                unsafe { block(alpha, a, b, accumulate || i > 0, c, rows.clone(), first..first + step) }
            }
        }
    };
    let tasks = row_tasks * panel_tasks;
    if parallel && tasks > 1 {
        (0..tasks).into_par_iter().with_max_len(1).for_each(task);
    } else {
        (0..tasks).for_each(task);
    }
}

/// The tiles of `rows` × the panels `columns`.
///
/// # Safety
/// As [`gemm`], with rows and panels inside.
unsafe fn block(
    alpha: f32,
    a: AWords,
    b: &Panels,
    accumulate: bool,
    c: COut,
    rows: Range<usize>,
    columns: Range<usize>,
) {
    #[cfg(target_arch = "x86_64")]
    if isa() == Isa::Avx2 {
        // SAFETY: isa() checked the features; the rest is the caller's contract.
        return unsafe { avx2::block(alpha, a, b, accumulate, c, rows, columns) };
    }
    for p in columns {
        for row in rows.clone().step_by(MR) {
            // SAFETY: the tile lies inside the operands by the caller's contract.
            unsafe { one_tile(alpha, a, b, accumulate, c, row, (rows.end - row).min(MR), p) }
        }
    }
}

/// # Safety
/// As [`gemm`], with the tile `row .. row + rows`, panel `p` inside.
#[inline]
unsafe fn one_tile(alpha: f32, a: AWords, b: &Panels, accumulate: bool, c: COut, row: usize, rows: usize, p: usize) {
    let at = row * c.stride + p * NR;
    // SAFETY: the caller's contract keeps every pointer inside its operand.
    unsafe {
        let t = Tile {
            a: a.ptr.add(row * a.row_stride),
            a_row_stride: a.row_stride,
            a_k_stride: a.k_stride,
            b: b.panel(p).as_ptr(),
            k_words: a.k_words,
            c: c.out.add(at),
            c_stride: c.stride,
            rows,
            cols: (b.n - p * NR).min(NR),
            alpha,
            accumulate,
        };
        #[cfg(target_arch = "x86_64")]
        if isa() == Isa::Avx512 {
            return avx512::tile(&t);
        }
        scalar::tile(&t);
    }
}

#[cfg(test)]
mod tests;
