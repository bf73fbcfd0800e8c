//! Products of bf16 rows with frozen weights in 16-bit fixed point, for processors that multiply integers faster than
//! floats: `vpmaddwd` does sixteen multiply-adds where an FMA of AVX2 does eight.
//!
//! ```text
//!   y[row][column] = scale[column] · Σ over blocks of k: ( scale[row][block] · Σ over k: a[row][k]·w[k][column] )
//!                    f32                                   f32                 exact, in 32-bit integers
//! ```
//!
//! Weights are quantised once, when they are loaded ([`weights`]): signed integers of up to 15 bits with a scale for each
//! output feature. The other operand is quantised for each product ([`rows`]): signed integers of up to 16 bits with a scale
//! for each row and each block of k. What holds:
//!
//! - **No sum overflows.** By Cauchy and Schwarz a sum is at most the norm of a block of a row times the norm of that block of a
//!   column. The largest norm of all columns is known from the weights; a row's scale is chosen so that the product of
//!   the two stays below 2³¹.
//! - **An element that is much larger than the others** of its row makes the steps of all coarse. Then what rounding left is
//!   quantised too, in steps of 1/1024 of the first ones, and multiplied in a second pass over that group of rows.
//! - **What is not finite stays so.** A row with a NaN or an infinity gets NaN for its scale, so all of its results are NaN.
//! - Sums are exact, and the few operations in f32 are done in one order: the scalar twin of the kernel gives the same bits.
//! - The backward product `dy·W` reads the same integers, transposed: there the scales of the output features run along k and
//!   are multiplied into dy before it is quantised.

mod kernel;
mod rows;
#[cfg(test)]
mod tests;
mod weights;

use rayon::prelude::*;

use super::{COut, TileOut};
pub(crate) use rows::{Rows, quantise, row_words};
pub(crate) use weights::{FixedPanels, FixedWeight, panel_words};

/// Rows of a tile: 6 × 2 accumulators of eight integers take 12 of the 16 registers.
pub(crate) const MR: usize = 6;
/// Columns of a tile and of a panel.
pub(crate) const NR: usize = 16;
/// Most words of a block of k: its part of a panel, with six rows of A, stays in the first-level cache.
const BLOCK_WORDS: usize = 320;
/// Tiles of one below the other that a task works through while it holds a panel.
const TILES: usize = 16;

/// How k is cut: blocks of equal length, in words of two elements, of which the last may be shorter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Blocks {
    pub(crate) words: usize,
    pub(crate) length: usize,
}

impl Blocks {
    pub(crate) fn of(k: usize) -> Self {
        let words = k.div_ceil(2);
        let count = words.div_ceil(BLOCK_WORDS).max(1);
        Self { words, length: words.div_ceil(count).max(1) }
    }

    pub(crate) fn count(self) -> usize {
        self.words.div_ceil(self.length)
    }

    /// Words of block `b`.
    pub(crate) fn range(self, b: usize) -> std::ops::Range<usize> {
        b * self.length..((b + 1) * self.length).min(self.words)
    }
}

/// One tile of up to MR × NR, for one block of k.
pub(crate) struct Tile {
    /// `words` × MR words.
    a: *const u32,
    /// `words` × NR words.
    b: *const u32,
    words: usize,
    /// MR of them, for this block.
    row_scales: *const f32,
    /// NR of them.
    column_scales: *const f32,
    /// MR × NR: the sums of the blocks before this one.
    sums: *mut f32,
    first: bool,
    last: bool,
    c: TileOut,
    c_stride: usize,
    rows: usize,
    cols: usize,
    accumulate: bool,
}

static ONES: [f32; NR] = [1.0; NR];

/// `C ← A·B (+ C)`, with the columns of the result scaled.
///
/// # Safety
/// `c` covers `a.rows × b.n` elements with its stride and nobody else touches them meanwhile.
pub(crate) unsafe fn gemm(a: &Rows<'_>, b: &FixedPanels, column_scales: Option<&[f32]>, accumulate: bool, c: COut) {
    // SAFETY: the caller's contract, passed on.
    unsafe { gemm_by(kernel::best(), a, b, column_scales, accumulate, c) }
}

/// As [`gemm`], by a kernel of choice.
///
/// # Safety
/// As [`gemm`]; the processor can run `tile`.
unsafe fn gemm_by(
    tile: unsafe fn(&Tile),
    a: &Rows<'_>,
    b: &FixedPanels,
    column_scales: Option<&[f32]>,
    accumulate: bool,
    c: COut,
) {
    assert_eq!(a.blocks, Blocks::of(b.k), "inner dimensions differ");
    let panels = b.n.div_ceil(NR);
    assert!(column_scales.is_none_or(|s| s.len() >= panels * NR));
    if a.rows == 0 || b.n == 0 {
        return;
    }
    let groups = a.rows.div_ceil(MR);
    let row_tasks = groups.div_ceil(TILES);
    // About eight tasks a thread even the load without paying for the hand-over.
    let panel_tasks = (rayon::current_num_threads() * 8).div_ceil(row_tasks).clamp(1, panels);
    let task = |index: usize| {
        let (row_task, panel_task) = (index / panel_tasks, index % panel_tasks);
        let groups = row_task * TILES..((row_task + 1) * TILES).min(groups);
        let mut sums = [[0f32; MR * NR]; TILES];
        for p in panel_task * panels / panel_tasks..(panel_task + 1) * panels / panel_tasks {
            let blocks = a.blocks.count();
            for block in 0..blocks {
                let (c, range) = (&c, a.blocks.range(block));
                let panel = b.panel(p)[range.start * NR..range.end * NR].as_ptr();
                for (group, sums) in groups.clone().zip(&mut sums) {
                    let at = group * MR * c.stride + p * NR;
                    let rest = a.rest(group, block);
                    // SAFETY: group and panel are inside the operands, the scales of a panel inside theirs (asserted); C by the
                    // caller's contract, and no other task has this group and panel.
                    unsafe {
                        let whole = Tile {
                            a: a.block(group, block).as_ptr(),
                            b: panel,
                            words: range.len(),
                            row_scales: a.scales(group, block).as_ptr(),
                            column_scales: column_scales.map_or(&ONES[..], |s| &s[p * NR..]).as_ptr(),
                            sums: sums.as_mut_ptr(),
                            first: block == 0 && rest.is_none(),
                            last: block + 1 == blocks,
                            c: match c.out {
                                TileOut::F32(c) => TileOut::F32(c.add(at)),
                                TileOut::Bf16(c) => TileOut::Bf16(c.add(at)),
                            },
                            c_stride: c.stride,
                            rows: (a.rows - group * MR).min(MR),
                            cols: (b.n - p * NR).min(NR),
                            accumulate,
                        };
                        if let Some((words, scales)) = rest {
                            let (a, row_scales) = (words.as_ptr(), scales.as_ptr());
                            tile(&Tile { a, row_scales, first: block == 0, last: false, ..whole });
                        }
                        tile(&whole);
                    }
                }
            }
        }
    };
    let tasks = row_tasks * panel_tasks;
    if tasks > 1 {
        (0..tasks).into_par_iter().with_max_len(1).for_each(task);
    } else {
        task(0);
    }
}
