//! Frozen weights in fixed point: quantised when they are loaded, transposed for the backward.

use std::ops::Range;

use rayon::prelude::*;

use super::rows::{LARGEST_SCALE, MAGIC};
use super::{Blocks, NR};
use crate::simd::simd;

/// Largest magnitude of a weight.
const LARGEST: f32 = 16383.0;
/// Largest norm of a block of a column: half of the 31 bits of a sum, so that rows and columns get about the same share.
const NORM: f32 = 46_340.0;

/// A `[k, n]` of 16-bit integers as panels of [`NR`] columns; word `[panel][kk][j]` holds rows 2kk and 2kk+1 of column
/// `panel·NR + j`. An odd last row and the columns behind `n` are zero.
#[derive(Debug, Default)]
pub(crate) struct FixedPanels {
    words: Vec<u32>,
    pub(super) k: usize,
    pub(super) n: usize,
}

/// Words of panels for a `[k, n]`.
pub(crate) fn panel_words(k: usize, n: usize) -> usize {
    n.next_multiple_of(NR) * k.div_ceil(2)
}

impl FixedPanels {
    fn panel_len(&self) -> usize {
        self.k.div_ceil(2) * NR
    }

    pub(super) fn panel(&self, p: usize) -> &[u32] {
        &self.words[p * self.panel_len()..(p + 1) * self.panel_len()]
    }

    /// Sets the geometry and makes room; scratch only grows. Returns the words in use.
    fn reshape(&mut self, k: usize, n: usize) -> &mut [u32] {
        (self.k, self.n) = (k, n);
        let len = panel_words(k, n);
        if self.words.len() < len {
            self.words.resize(len, 0);
        }
        &mut self.words[..len]
    }

    pub(super) fn get(&self, k: usize, n: usize) -> i16 {
        (self.panel(n / NR)[(k / 2) * NR + n % NR] >> (16 * (k % 2))) as i16
    }
}

/// A frozen `[out, inner]`: panels of Wᵀ, the scale of each output feature, and the norms that bound the sums.
#[derive(Debug)]
pub(crate) struct FixedWeight {
    panels: FixedPanels,
    /// For each output feature, up to a whole panel.
    scales: Vec<f32>,
    /// The same for even and for odd output features, to be multiplied into pairs of dy.
    pairs: [Vec<f32>; 2],
    /// Largest norm of a column for each block of k, forward.
    norms: Vec<f32>,
    /// The same for each part of the backward.
    backward_norms: Vec<Vec<f32>>,
    part: usize,
}

impl FixedWeight {
    /// `read(rows, target)` gives rows of W; the backward will be done in parts of `part` rows, a multiple of [`NR`].
    pub(crate) fn load<E: Send>(
        out: usize,
        inner: usize,
        part: usize,
        read: impl Fn(Range<usize>, &mut [f32]) -> Result<(), E> + Sync,
    ) -> Result<Self, E> {
        let mut panels = FixedPanels::default();
        let mut scales = vec![0f32; out.next_multiple_of(NR)];
        let blocks = Blocks::of(inner);
        let words = panels.reshape(inner, out);
        let mut norms = vec![0f32; blocks.count()];
        if !words.is_empty() {
            let each: Vec<Vec<f32>> = words
                .par_chunks_mut(blocks.words * NR)
                .zip(scales.par_chunks_mut(NR))
                .enumerate()
                .map_init(
                    || vec![0f32; NR * inner],
                    |wide, (p, (panel, scales))| {
                        let rows = p * NR..((p + 1) * NR).min(out);
                        let wide = &mut wide[..rows.len() * inner];
                        read(rows, wide)?;
                        Ok(quantise_panel(wide, inner, panel, scales))
                    },
                )
                .collect::<Result<_, E>>()?;
            for of_panel in each {
                norms.iter_mut().zip(of_panel).for_each(|(n, m)| *n = n.max(m));
            }
        }
        let pairs = [0, 1].map(|odd| (0..out.div_ceil(2)).map(|i| scales[2 * i + odd]).collect());
        let backward_norms =
            (0..out).step_by(part).map(|first| row_norms(&panels, first..(first + part).min(out))).collect();
        Ok(Self { panels, scales, pairs, norms, backward_norms, part })
    }

    pub(crate) fn bytes(&self) -> usize {
        4 * (self.panels.words.len() + self.scales.len() + 2 * self.pairs[0].len())
    }

    pub(crate) fn panels(&self) -> &FixedPanels {
        &self.panels
    }

    pub(crate) fn scales(&self) -> &[f32] {
        &self.scales
    }

    pub(crate) fn norms(&self) -> &[f32] {
        &self.norms
    }

    /// Row `row` as f32.
    pub(crate) fn read_row(&self, row: usize, target: &mut [f32]) {
        for (k, t) in target.iter_mut().enumerate() {
            *t = f32::from(self.panels.get(k, row)) * self.scales[row];
        }
    }

    /// What the columns of dy are multiplied with in part `index` of the backward, and the norms of its columns.
    pub(crate) fn backward_part(&self, index: usize) -> ([&[f32]; 2], &[f32]) {
        ([0, 1].map(|odd| &self.pairs[odd][index * self.part / 2..]), &self.backward_norms[index])
    }

    /// Rows `rows` of W as panels for `dy·W` (k = those rows, n = in). `rows.start` is a multiple of [`NR`].
    pub(crate) fn transpose(&self, rows: Range<usize>, out: &mut FixedPanels) {
        assert!(rows.start.is_multiple_of(NR) && rows.end <= self.panels.n);
        let len = rows.len().div_ceil(2) * NR;
        let words = out.reshape(rows.len(), self.panels.k);
        if len > 0 {
            words
                .par_chunks_mut(len)
                .enumerate()
                .for_each(|(p, panel)| transpose_panel(&self.panels, rows.start / NR, p, panel));
        }
    }
}

simd! {
    /// Up to NR rows of W into a panel; returns the largest norm of a column for each block of k.
    fn quantise_panel(w: &[f32], inner: usize, panel: &mut [u32], scales: &mut [f32]) -> Vec<f32> {
        let blocks = Blocks::of(inner);
        let mut norms = vec![0f32; blocks.count()];
        panel.fill(0);
        for (j, (row, scale)) in w.chunks_exact(inner).zip(scales).enumerate() {
            let max = row.iter().fold(0u32, |m, x| m.max(x.to_bits() & 0x7fff_ffff));
            let max = f32::from_bits(max);
            if !max.is_finite() {
                *scale = f32::NAN;
                continue;
            }
            if max == 0.0 {
                continue;
            }
            let relative = |x: f32| (x / max) * (x / max);
            let norm = (0..blocks.count())
                .map(|b| row[elements(blocks, b, inner)].iter().map(|&x| relative(x)).sum::<f32>().sqrt() * max)
                .fold(0.0, f32::max);
            let up = (LARGEST / max).min(NORM / norm).min(LARGEST_SCALE);
            *scale = 1.0 / up;
            for (b, norm) in norms.iter_mut().enumerate() {
                let mut squares = 0f32;
                for k in elements(blocks, b, inner) {
                    let q = (row[k] * up + MAGIC).to_bits() & 0xffff;
                    squares += f32::from(q as u16 as i16) * f32::from(q as u16 as i16);
                    panel[(k / 2) * NR + j] |= q << (16 * (k % 2));
                }
                *norm = norm.max(squares.sqrt());
            }
        }
        norms
    }
}

/// Elements of block `b` of `k` elements.
#[inline(always)]
fn elements(blocks: Blocks, b: usize, k: usize) -> Range<usize> {
    let words = blocks.range(b);
    2 * words.start..(2 * words.end).min(k)
}

/// Largest norm over the columns of W, for each block of its rows `rows`.
fn row_norms(panels: &FixedPanels, rows: Range<usize>) -> Vec<f32> {
    let blocks = Blocks::of(rows.len());
    (0..blocks.count())
        .into_par_iter()
        .map(|b| {
            let mut squares = vec![0f32; panels.k.next_multiple_of(2)];
            for i in elements(blocks, b, rows.len()) {
                add_squares(panels.panel((rows.start + i) / NR), (rows.start + i) % NR, &mut squares);
            }
            squares.into_iter().fold(0.0, f32::max).sqrt()
        })
        .collect()
}

simd! {
    fn add_squares(panel: &[u32], column: usize, squares: &mut [f32]) {
        for (squares, words) in squares.chunks_exact_mut(2).zip(panel.chunks_exact(NR)) {
            let (low, high) = (words[column] as i16, (words[column] >> 16) as i16);
            squares[0] += f32::from(low) * f32::from(low);
            squares[1] += f32::from(high) * f32::from(high);
        }
    }
}

simd! {
    fn transpose_panel(forward: &FixedPanels, first: usize, p: usize, panel: &mut [u32]) {
        // Panel p of the result: columns (in features) p·NR … p·NR + 15 = words kk p·8 … p·8 + 7 of the forward panels. Two words
        // side by side, (a₀ a₁)(b₀ b₁), become the words (a₀ b₀)(a₁ b₁) one below the other's place.
        let words = (forward.k.div_ceil(2) - p * NR / 2).min(NR / 2);
        for (source, target) in panel.chunks_mut(NR * NR / 2).enumerate() {
            let source = &forward.panel(first + source)[p * NR / 2 * NR..][..words * NR];
            if words < NR / 2 {
                target.fill(0);
            }
            for (nn, target) in target.chunks_exact_mut(NR).enumerate() {
                for (kk, source) in source.chunks_exact(NR).enumerate() {
                    let (a, b) = (source[2 * nn], source[2 * nn + 1]);
                    target[2 * kk] = (a & 0xffff) | b << 16;
                    target[2 * kk + 1] = a >> 16 | (b & 0xffff_0000);
                }
            }
        }
    }
}
