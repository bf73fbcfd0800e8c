//! Element-wise and row-wise operations: copy, add, gather, scatter, dropout, RMSNorm, RoPE, SwiGLU.

use cashtag_backend::{Dropout, philox};
use rayon::prelude::*;

use crate::buffer::{View, ViewMut};
use crate::simd::{Element, lane_sum, sigmoid, simd};

/// Elements of one task: enough to hide the hand-over, few enough to share out.
const GRAIN: usize = 16 * 1024;

/// Calls `f(row index, row of dst)` for every row, in parallel.
fn each_row<D: Send>(dst: ViewMut<'_, D>, f: impl Fn(usize, &mut [D]) + Sync + Send) {
    let ViewMut { data, cols, stride, rows } = dst;
    if rows == 0 || cols == 0 {
        return;
    }
    let per_task = (GRAIN / cols).max(1);
    let run = |(chunk, part): (usize, &mut [D])| {
        for (i, row) in part.chunks_mut(stride).enumerate() {
            f(chunk * per_task + i, &mut row[..cols]);
        }
    };
    if rows <= per_task {
        run((0, data));
    } else {
        data.par_chunks_mut(per_task * stride).enumerate().for_each(run);
    }
}

simd! {
    pub(crate) fn convert<S: Element, D: Element>(src: &[S], dst: &mut [D]) {
        for (d, s) in dst.iter_mut().zip(src) {
            *d = D::from_f32(s.to_f32());
        }
    }
}

simd! {
    fn add_row<S: Element, D: Element>(src: &[S], dst: &mut [D]) {
        for (d, s) in dst.iter_mut().zip(src) {
            *d = D::from_f32(d.to_f32() + s.to_f32());
        }
    }
}

pub(crate) fn copy<S: Element, D: Element>(src: View<'_, S>, dst: ViewMut<'_, D>) {
    assert_eq!((src.rows, src.cols), (dst.rows, dst.cols));
    each_row(dst, |i, row| convert(src.row(i), row));
}

pub(crate) fn add<S: Element, D: Element>(src: View<'_, S>, dst: ViewMut<'_, D>) {
    assert_eq!((src.rows, src.cols), (dst.rows, dst.cols));
    each_row(dst, |i, row| add_row(src.row(i), row));
}

pub(crate) fn gather<S: Element, D: Element>(src: View<'_, S>, rows: &[u32], out: ViewMut<'_, D>) {
    assert_eq!(src.cols, out.cols);
    assert!(out.rows <= rows.len());
    each_row(out, |i, row| convert(src.row(rows[i] as usize), row));
}

pub(crate) fn scatter_add<S: Element, D: Element>(src: View<'_, S>, rows: &[u32], dst: ViewMut<'_, D>) {
    assert_eq!(src.cols, dst.cols);
    for (i, &row) in rows[..src.rows].iter().enumerate() {
        assert!((row as usize) < dst.rows);
        add_row(src.row(i), &mut dst.data[row as usize * dst.stride..][..dst.cols]);
    }
}

// --- dropout -------------------------------------------------------------------------------------------------------------

/// Counters that one block of sixteen Philox lanes covers, eight elements each.
const LANES: usize = 16;

#[inline(always)]
fn philox_lanes(first: u32, row: u32, site: u32, step: u32, seed: u64) -> [[u32; LANES]; 4] {
    let mut c = [[0u32; LANES], [row; LANES], [site; LANES], [step; LANES]];
    for (i, c) in c[0].iter_mut().enumerate() {
        *c = first + i as u32;
    }
    let mut key = [seed as u32, (seed >> 32) as u32];
    for round in 0..10 {
        if round > 0 {
            key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
        }
        #[allow(clippy::needless_range_loop, reason = "all four rows are indexed by the lane")]
        for i in 0..LANES {
            let p0 = 0xD251_1F53u64 * u64::from(c[0][i]);
            let p1 = 0xCD9E_8D57u64 * u64::from(c[2][i]);
            let (c1, c3) = (c[1][i], c[3][i]);
            c[0][i] = (p1 >> 32) as u32 ^ c1 ^ key[0];
            c[1][i] = p1 as u32;
            c[2][i] = (p0 >> 32) as u32 ^ c3 ^ key[1];
            c[3][i] = p0 as u32;
        }
    }
    c
}

/// Elements that one block of lanes decides: the four words of a counter decide eight neighbouring ones.
const BLOCK: usize = LANES * 8;
/// Elements of a word of a mask.
const WORD: usize = 16;

simd! {
    /// Which elements of a row are kept, a bit each, the lowest first.
    fn mask_row(d: Dropout, row: u32, mask: &mut [u16]) {
        let threshold = philox::dropout_threshold(d.p);
        let mut bits = [0u32; LANES * 4];
        for (block, mask) in mask.chunks_mut(BLOCK / WORD).enumerate() {
            let words = philox_lanes((block * LANES) as u32, row, d.site, d.step, d.seed);
            // Sixteen bits for each element, the lower half first.
            for lane in 0..LANES {
                for (w, words) in words.iter().enumerate() {
                    bits[lane * 4 + w] = words[lane];
                }
            }
            let halves: &[u16; BLOCK] = bytemuck::cast_ref(&bits);
            for (mask, halves) in mask.iter_mut().zip(halves.as_chunks::<WORD>().0) {
                let mut word = 0;
                for (j, &half) in halves.iter().enumerate() {
                    word |= u16::from(half >= threshold) << j;
                }
                *mask = word;
            }
        }
    }
}

simd! {
    fn masked_row<T: Element>(x: &[T], mask: &[u16], scale: f32, accumulate: bool, out: &mut [T]) {
        let ((x, x_rest), (out, out_rest)) = (x.as_chunks::<WORD>(), out.as_chunks_mut::<WORD>());
        let words = || x.iter().zip(mask);
        if accumulate {
            for (out, (x, &mask)) in out.iter_mut().zip(words()) {
                for j in 0..WORD {
                    out[j] = T::from_f32(out[j].to_f32() + x[j].to_f32() * kept(mask, j, scale));
                }
            }
        } else {
            for (out, (x, &mask)) in out.iter_mut().zip(words()) {
                for j in 0..WORD {
                    out[j] = T::from_f32(x[j].to_f32() * kept(mask, j, scale));
                }
            }
        }
        for (j, (out, x)) in out_rest.iter_mut().zip(x_rest).enumerate() {
            let kept = x.to_f32() * kept(mask[mask.len() - 1], j, scale);
            *out = T::from_f32(if accumulate { out.to_f32() + kept } else { kept });
        }
    }
}

#[inline(always)]
fn kept(mask: u16, j: usize, scale: f32) -> f32 {
    if u32::from(mask) & (1 << j) != 0 { scale } else { 0.0 }
}

/// Which elements of `[rows, cols]` are kept, a line of words for each row.
pub(crate) fn dropout_mask(d: Dropout, rows: usize, cols: usize, mask: &mut Vec<u16>) {
    let line = cols.div_ceil(WORD);
    mask.resize(rows * line, 0);
    each_row(ViewMut { data: mask, rows, cols: line, stride: line }, |i, mask| mask_row(d, i as u32, mask));
}

/// `out ← mask∘x / (1 - p) (+ out)` with the mask of [`dropout_mask`].
pub(crate) fn dropout<T: Element>(x: View<'_, T>, p: f32, mask: &[u16], accumulate: bool, out: ViewMut<'_, T>) {
    assert_eq!((x.rows, x.cols), (out.rows, out.cols));
    let (line, scale) = (x.cols.div_ceil(WORD), 1.0 / (1.0 - p));
    assert_eq!(mask.len(), x.rows * line);
    each_row(out, |i, row| masked_row(x.row(i), &mask[i * line..(i + 1) * line], scale, accumulate, row));
}

// --- RMSNorm -------------------------------------------------------------------------------------------------------------

simd! {
    fn norm_row<S: Element, T: Element>(x: &[S], w: &[f32], epsilon: f32, y: &mut [T]) -> f32 {
        let squares = lane_sum(|i| { let v = x[i].to_f32(); v * v }, x.len());
        let inv = 1.0 / (squares / x.len() as f32 + epsilon).sqrt();
        for ((y, x), w) in y.iter_mut().zip(x).zip(w) {
            *y = T::from_f32(x.to_f32() * inv * w);
        }
        inv
    }
}

simd! {
    fn norm_backward_row<S: Element, T: Element>(dy: &[T], x: &[S], w: &[f32], inv: f32, dx: &mut [f32]) {
        let n = x.len();
        let (dy, w) = (&dy[..n], &w[..n]);
        let mean = lane_sum(|i| dy[i].to_f32() * w[i] * x[i].to_f32(), n) * inv / n as f32;
        for (((dx, x), dy), w) in dx.iter_mut().zip(x).zip(dy).zip(w) {
            *dx += inv * (dy.to_f32() * w - x.to_f32() * inv * mean);
        }
    }
}

pub(crate) fn rms_norm<S: Element, T: Element>(
    x: View<'_, S>,
    w: &[f32],
    epsilon: f32,
    y: ViewMut<'_, T>,
    inv_rms: &mut [f32],
) {
    assert_eq!((x.rows, x.cols, w.len()), (y.rows, y.cols, y.cols));
    let ViewMut { data, cols, stride, rows } = y;
    if rows == 0 {
        return;
    }
    data.par_chunks_mut(stride)
        .zip(&mut inv_rms[..rows])
        .enumerate()
        .with_min_len((GRAIN / cols).max(1))
        .for_each(|(i, (row, inv))| *inv = norm_row(x.row(i), w, epsilon, &mut row[..cols]));
}

pub(crate) fn rms_norm_backward<S: Element, T: Element>(
    dy: View<'_, T>,
    x: View<'_, S>,
    w: &[f32],
    inv_rms: &[f32],
    dx: ViewMut<'_, f32>,
) {
    assert_eq!((x.rows, x.cols, dy.rows, dy.cols), (dx.rows, dx.cols, dx.rows, w.len()));
    each_row(dx, |i, row| norm_backward_row(dy.row(i), x.row(i), w, inv_rms[i], row));
}

// --- RoPE ----------------------------------------------------------------------------------------------------------------

simd! {
    fn rope_row<T: Element>(x: &mut [T], head_dim: usize, cos: &[f32], sin: &[f32], sign: f32) {
        let half = head_dim / 2;
        for head in x.chunks_exact_mut(head_dim) {
            let (a, b) = head.split_at_mut(half);
            for (((a, b), c), s) in a.iter_mut().zip(b).zip(cos).zip(sin) {
                let (x, y, s) = (a.to_f32(), b.to_f32(), s * sign);
                *a = T::from_f32(x * c - y * s);
                *b = T::from_f32(y * c + x * s);
            }
        }
    }
}

pub(crate) fn rope<T: Element>(
    x: ViewMut<'_, T>,
    head_dim: usize,
    cos: &[f32],
    sin: &[f32],
    positions: &[u32],
    inverse: bool,
) {
    let half = head_dim / 2;
    let sign = if inverse { -1.0 } else { 1.0 };
    each_row(x, |i, row| {
        let at = positions[i] as usize * half;
        rope_row(row, head_dim, &cos[at..at + half], &sin[at..at + half], sign);
    });
}

// --- SwiGLU --------------------------------------------------------------------------------------------------------------

simd! {
    fn swiglu_row<S: Element, T: Element>(gate_up: &[S], h: &mut [T]) {
        let (gate, up) = gate_up.split_at(h.len());
        for ((h, g), u) in h.iter_mut().zip(gate).zip(up) {
            let g = g.to_f32();
            *h = T::from_f32(g * sigmoid(g) * u.to_f32());
        }
    }
}

simd! {
    fn swiglu_backward_row<T: Element>(dh: &[T], gate_up: &[T], out: &mut [T]) {
        let f = dh.len();
        let (gate, up) = gate_up.split_at(f);
        let (d_gate, d_up) = out.split_at_mut(f);
        for ((((dh, g), u), dg), du) in dh.iter().zip(gate).zip(up).zip(d_gate).zip(d_up) {
            let (dh, g, u) = (dh.to_f32(), g.to_f32(), u.to_f32());
            let s = sigmoid(g);
            let silu = g * s;
            *dg = T::from_f32(dh * u * (s + silu * (1.0 - s)));
            *du = T::from_f32(dh * silu);
        }
    }
}

pub(crate) fn swiglu<S: Element, T: Element>(gate_up: View<'_, S>, h: ViewMut<'_, T>) {
    assert_eq!((gate_up.rows, gate_up.cols), (h.rows, 2 * h.cols));
    each_row(h, |i, row| swiglu_row(gate_up.row(i), row));
}

pub(crate) fn swiglu_backward<T: Element>(dh: View<'_, T>, gate_up: View<'_, T>, out: ViewMut<'_, T>) {
    assert_eq!((gate_up.rows, gate_up.cols, dh.rows, 2 * dh.cols), (out.rows, out.cols, out.rows, out.cols));
    each_row(out, |i, row| swiglu_backward_row(dh.row(i), gate_up.row(i), row));
}
