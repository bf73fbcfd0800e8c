//! The left operand of a fixed-point product: rows of bf16 as integers of up to 16 bits, in the order in which the kernel reads.

use rayon::prelude::*;

use super::{BLOCK_WORDS, Blocks, MR};
use crate::buffer::View;
use crate::simd::{Bf16, simd};

/// Largest magnitude of an element.
const LARGEST: f32 = 32767.0;
/// What a sum may reach at most: 2³¹ less what the norms, taken in f32, may be wrong.
const SUM: f32 = 2_147_483_648.0 * 0.999;
/// Adding it to a float below 2²² rounds to the nearest integer, whose two's complement is then in the low bits.
pub(super) const MAGIC: f32 = 12_582_912.0; // 1.5 · 2²³
/// What is left by rounding is kept in so many steps of its own where the first ones are coarse.
const STEPS: f32 = 1024.0;
/// Units of the root mean square of a block of a row below which its steps are coarse: an error of 7e-4.
const COARSE: f32 = 400.0;
/// Scales stay below it, so that one over them is not zero.
pub(super) const LARGEST_SCALE: f32 = 1e30;

/// Quantised rows in groups of [`MR`]: word `[group][kk][i]` holds elements 2kk and 2kk+1 of row `group·MR + i`.
pub(crate) struct Rows<'a> {
    words: &'a [u32],
    /// `[group][block][i]`.
    scales: &'a [f32],
    /// What rounding left of rows with steps that are coarse, in the same places; and its scales, 0 where there is none of it. Of
    /// a group without any, the words are not written.
    rest: &'a [u32],
    rest_scales: &'a [f32],
    pub(super) rows: usize,
    pub(super) blocks: Blocks,
}

impl Rows<'_> {
    pub(super) fn block(&self, group: usize, block: usize) -> &[u32] {
        let range = self.blocks.range(block);
        &self.words[(group * self.blocks.words + range.start) * MR..(group * self.blocks.words + range.end) * MR]
    }

    pub(super) fn scales(&self, group: usize, block: usize) -> &[f32] {
        &self.scales[(group * self.blocks.count() + block) * MR..][..MR]
    }

    /// Words and scales of what rounding left, if any row of the group has that.
    pub(super) fn rest(&self, group: usize, block: usize) -> Option<(&[u32], &[f32])> {
        let scales = &self.rest_scales[(group * self.blocks.count() + block) * MR..][..MR];
        let range = self.blocks.range(block);
        let words =
            &self.rest[(group * self.blocks.words + range.start) * MR..(group * self.blocks.words + range.end) * MR];
        scales.iter().any(|s| *s != 0.0).then_some((words, scales))
    }
}

/// Words that [`quantise`] needs.
pub(crate) fn row_words(rows: usize, k: usize) -> usize {
    let blocks = Blocks::of(k);
    rows.next_multiple_of(MR) * (blocks.words + blocks.count()) * 2
}

/// Quantises `x`, after its columns were multiplied by `factors` (those of even columns, those of odd ones). `norms` are the
/// largest norms of the columns that it will be multiplied with, one for each block of k.
pub(crate) fn quantise<'a>(
    x: View<'_, Bf16>,
    factors: Option<[&[f32]; 2]>,
    norms: &[f32],
    scratch: &'a mut Vec<u32>,
) -> Rows<'a> {
    let blocks = Blocks::of(x.cols);
    assert_eq!(norms.len(), blocks.count(), "one norm for each block of k");
    assert!(factors.is_none_or(|f| f.iter().all(|f| f.len() >= blocks.words)));
    let needed = row_words(x.rows, x.cols);
    if scratch.len() < needed {
        scratch.resize(needed, 0);
    }
    let (words, scales) = scratch[..needed].split_at_mut(2 * x.rows.next_multiple_of(MR) * blocks.words);
    let (words, rest) = words.split_at_mut(words.len() / 2);
    let scales: &mut [f32] = bytemuck::cast_slice_mut(scales);
    let (scales, rest_scales) = scales.split_at_mut(scales.len() / 2);
    if blocks.words > 0 {
        let (of_words, of_scales) = (blocks.words * MR, blocks.count() * MR);
        let groups = words.par_chunks_mut(of_words).zip(scales.par_chunks_mut(of_scales));
        let rests = rest.par_chunks_mut(of_words).zip(rest_scales.par_chunks_mut(of_scales));
        groups.zip(rests).enumerate().with_min_len(4).for_each(|(group, ((words, scales), (rest, rest_scales)))| {
            let mut lines = [[[0u32; BLOCK_WORDS]; MR]; 2];
            for (block, (scales, rest_scales)) in
                scales.chunks_exact_mut(MR).zip(rest_scales.chunks_exact_mut(MR)).enumerate()
            {
                let range = blocks.range(block);
                let [wholes, rests] = &mut lines;
                for (i, (whole, left)) in wholes.iter_mut().zip(rests.iter_mut()).enumerate() {
                    let (row, whole, left) = (group * MR + i, &mut whole[..range.len()], &mut left[..range.len()]);
                    (scales[i], rest_scales[i]) = if row < x.rows {
                        let factors = factors.map(|f| f.map(|f| &f[range.clone()]));
                        let end = (2 * range.end).min(x.cols);
                        quantise_line(&x.row(row)[2 * range.start..end], factors, norms[block], [whole, left])
                    } else {
                        whole.fill(0);
                        (0.0, 0.0)
                    };
                    if rest_scales[i] == 0.0 {
                        left.fill(0);
                    }
                }
                interleave(wholes, &mut words[range.start * MR..range.end * MR]);
                if rest_scales.iter().any(|s| *s != 0.0) {
                    interleave(rests, &mut rest[range.start * MR..range.end * MR]);
                }
            }
        });
    }
    Rows { words, scales, rest, rest_scales, rows: x.rows, blocks }
}

simd! {
    fn interleave(lines: &[[u32; BLOCK_WORDS]; MR], words: &mut [u32]) {
        for (kk, words) in words.as_chunks_mut::<MR>().0.iter_mut().enumerate() {
            for (word, line) in words.iter_mut().zip(lines) {
                *word = line[kk];
            }
        }
    }
}

/// One block of one row: the integers, and what rounding left of them if that is much; returns the scales of both.
fn quantise_line(x: &[Bf16], factors: Option<[&[f32]; 2]>, norm: f32, lines: [&mut [u32]; 2]) -> (f32, f32) {
    // A last element without a neighbour is one word with a zero.
    let (whole, rest) = bytemuck::cast_slice::<Bf16, [u8; 2]>(x).as_chunks::<2>();
    let last = rest.first().map(|&[low, high]| [[low, high], [0, 0]]);
    let [(line, end), (left, left_end)] = lines.map(|l| l.split_at_mut(whole.len()));
    let at = whole.len();
    let (head, tail) = match factors {
        Some([low, high]) => (Some([&low[..at], &high[..at]]), Some([&low[at..], &high[at..]])),
        None => (None, None),
    };
    let last = last.as_slice();
    let (mut max, mut squares) = measure(whole, head);
    if !last.is_empty() {
        let (m, s) = measure(last, tail);
        (max, squares) = (max.max(m), squares + s);
    }
    let (up, down) = row_scale(max, squares, x.len(), norm);
    // The squares are within the range of f32 wherever this matters.
    if up > 0.0 && up * (squares / x.len() as f32).sqrt() < COARSE {
        round_twice(whole, head, up, line, left);
        round_twice(last, tail, up, end, left_end);
        return (down, down / STEPS);
    }
    round(whole, head, up, line);
    round(last, tail, up, end);
    (down, 0.0)
}

/// The factor that makes integers of a row, and the one that undoes it, from the bits of its largest magnitude, its sum of squares
/// and its length.
fn row_scale(max: u32, squares: f32, len: usize, norm: f32) -> (f32, f32) {
    let max = f32::from_bits(max);
    if !max.is_finite() {
        return (0.0, f32::NAN);
    }
    if max == 0.0 {
        return (0.0, 0.0);
    }
    let root = (len as f32).sqrt();
    // Where the squares left the range of f32, the norm that they cannot exceed.
    let row_norm = if squares > 1e-20 && squares < 1e37 { squares.sqrt() } else { root * max };
    // Rounding moves the row by half a unit in each element.
    let limit = SUM / norm - 0.5 * root;
    let up = (LARGEST / max).min(limit / row_norm).min(LARGEST_SCALE);
    (up, 1.0 / up)
}

#[inline(always)]
fn low([bytes, _]: [[u8; 2]; 2]) -> f32 {
    f32::from_bits(u32::from(u16::from_le_bytes(bytes)) << 16)
}

#[inline(always)]
fn high([_, bytes]: [[u8; 2]; 2]) -> f32 {
    f32::from_bits(u32::from(u16::from_le_bytes(bytes)) << 16)
}

const LANES: usize = 16;

/// What [`measure`] gathers, in lanes so that it vectorises.
struct Measure {
    max: [u32; LANES],
    squares: [f32; LANES],
}

impl Measure {
    #[inline(always)]
    fn add(&mut self, values: impl Fn(usize) -> [f32; 2]) {
        for j in 0..LANES {
            let [a, b] = values(j);
            self.max[j] = self.max[j].max(a.to_bits() & 0x7fff_ffff).max(b.to_bits() & 0x7fff_ffff);
            self.squares[j] += a * a + b * b;
        }
    }
}

/// The first values of a whole chunk, and zeros, which change neither maximum nor sum.
#[inline(always)]
fn padded<T: Copy + Default>(rest: &[T]) -> [T; LANES] {
    let mut chunk = [T::default(); LANES];
    chunk[..rest.len()].copy_from_slice(rest);
    chunk
}

simd! {
    /// The bits of the largest magnitude, which order as the magnitudes do with NaN above infinity, and the sum of squares.
    fn measure(x: &[[[u8; 2]; 2]], factors: Option<[&[f32]; 2]>) -> (u32, f32) {
        let mut m = Measure { max: [0; LANES], squares: [0.0; LANES] };
        let (chunks, rest) = x.as_chunks::<LANES>();
        match factors {
            None => {
                for x in chunks {
                    m.add(|j| [low(x[j]), high(x[j])]);
                }
                if !rest.is_empty() {
                    let x = padded(rest);
                    m.add(|j| [low(x[j]), high(x[j])]);
                }
            }
            Some([l, h]) => {
                let ((l, l_rest), (h, h_rest)) = (l[..x.len()].as_chunks::<LANES>(), h[..x.len()].as_chunks::<LANES>());
                for ((x, l), h) in chunks.iter().zip(l).zip(h) {
                    m.add(|j| [low(x[j]) * l[j], high(x[j]) * h[j]]);
                }
                if !rest.is_empty() {
                    let (x, l, h) = (padded(rest), padded(l_rest), padded(h_rest));
                    m.add(|j| [low(x[j]) * l[j], high(x[j]) * h[j]]);
                }
            }
        }
        (m.max.into_iter().fold(0, u32::max), m.squares.iter().sum())
    }
}

#[inline(always)]
fn pair(low: f32, high: f32, up: f32) -> u32 {
    ((low * up + MAGIC).to_bits() & 0xffff) | (high * up + MAGIC).to_bits() << 16
}

/// An integer in the low bits, and what is left of `x` in steps of 1/[`STEPS`], likewise.
#[inline(always)]
fn twice(x: f32) -> [u32; 2] {
    let moved = x + MAGIC;
    [moved.to_bits(), ((x - (moved - MAGIC)) * STEPS + MAGIC).to_bits()]
}

#[inline(always)]
fn pairs(low: f32, high: f32) -> [u32; 2] {
    let (low, high) = (twice(low), twice(high));
    [0, 1].map(|i| (low[i] & 0xffff) | high[i] << 16)
}

simd! {
    fn round_twice(x: &[[[u8; 2]; 2]], factors: Option<[&[f32]; 2]>, up: f32, out: &mut [u32], left: &mut [u32]) {
        let out = out.iter_mut().zip(left);
        match factors {
            None => {
                for ((out, left), &x) in out.zip(x) {
                    [*out, *left] = pairs(low(x) * up, high(x) * up);
                }
            }
            Some([l, h]) => {
                for ((((out, left), &x), l), h) in out.zip(x).zip(l).zip(h) {
                    [*out, *left] = pairs(low(x) * l * up, high(x) * h * up);
                }
            }
        }
    }
}

simd! {
    fn round(x: &[[[u8; 2]; 2]], factors: Option<[&[f32]; 2]>, up: f32, out: &mut [u32]) {
        // Without a scale there is nothing finite to round.
        if up == 0.0 {
            return out.fill(0);
        }
        match factors {
            None => {
                for (out, &x) in out.iter_mut().zip(x) {
                    *out = pair(low(x), high(x), up);
                }
            }
            Some([l, h]) => {
                for (((out, &x), l), h) in out.iter_mut().zip(x).zip(l).zip(h) {
                    *out = pair(low(x) * l, high(x) * h, up);
                }
            }
        }
    }
}
