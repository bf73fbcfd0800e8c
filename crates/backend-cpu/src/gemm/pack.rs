//! Packing: from row-major bf16 to the words and panels that the micro-kernel reads.

use rayon::prelude::*;

use super::NR;
use crate::simd::{Bf16, simd};

/// A `[k, n]` operand as panels of [`NR`] columns; word `[panel][kk][j]` holds rows 2kk and 2kk+1 of column `panel·NR + j`.
/// An odd last row and the columns behind `n` are zero.
#[derive(Clone, Debug, Default)]
pub(crate) struct Panels {
    pub(crate) words: Vec<u32>,
    pub(crate) k: usize,
    pub(crate) n: usize,
}

impl Panels {
    pub(crate) fn k_words(&self) -> usize {
        self.k.div_ceil(2)
    }

    pub(crate) fn panel_len(&self) -> usize {
        self.k_words() * NR
    }

    #[inline]
    pub(crate) fn panel(&self, p: usize) -> &[u32] {
        &self.words[p * self.panel_len()..(p + 1) * self.panel_len()]
    }

    /// Sets the geometry and makes room. Scratch only grows: clearing what the packer overwrites anyway costs time.
    pub(crate) fn reshape(&mut self, k: usize, n: usize) {
        (self.k, self.n) = (k, n);
        let len = self.panel_len() * n.div_ceil(NR);
        if self.words.len() < len {
            self.words.resize(len, 0);
        }
    }

    /// The words that the geometry uses.
    pub(crate) fn used(&mut self) -> &mut [u32] {
        let len = self.panel_len() * self.n.div_ceil(NR);
        &mut self.words[..len]
    }

    /// One element, for the embedding gather and for tests.
    #[inline]
    pub(crate) fn get(&self, k: usize, n: usize) -> Bf16 {
        let word = self.words[(n / NR) * self.panel_len() + (k / 2) * NR + n % NR];
        Bf16((word >> (16 * (k % 2))) as u16)
    }
}

#[inline(always)]
fn word(low: Bf16, high: Bf16) -> u32 {
    u32::from(low.0) | u32::from(high.0) << 16
}

fn for_each_panel(out: &mut Panels, parallel: bool, fill: impl Fn(usize, &mut [u32]) + Sync) {
    let len = out.panel_len();
    if len == 0 {
        return;
    }
    if parallel {
        out.used().par_chunks_mut(len).enumerate().for_each(|(p, panel)| fill(p, panel));
    } else {
        out.used().chunks_mut(len).enumerate().for_each(|(p, panel)| fill(p, panel));
    }
}

/// B = `src`ᵀ for row-major `src` `[n, k]` with row stride `stride` (a torch Linear weight, LoRA factors in the forward).
pub(crate) fn pack_nt(src: &[Bf16], stride: usize, n: usize, k: usize, out: &mut Panels, parallel: bool) {
    out.reshape(k, n);
    for_each_panel(out, parallel, |p, panel| pack_nt_panel(src, stride, n, k, p, panel));
}

simd! {
    fn pack_nt_panel(src: &[Bf16], stride: usize, n: usize, k: usize, p: usize, panel: &mut [u32]) {
        let columns = (n - p * NR).min(NR);
        if columns < NR {
            panel.fill(0);
        }
        // Sixteen words of each column at a time: one cache line is read whole before the next column's is touched.
        let whole = k / 2;
        for block in (0..whole).step_by(16) {
            let end = (block + 16).min(whole);
            for j in 0..columns {
                let row = &src[(p * NR + j) * stride..][..k];
                for kk in block..end {
                    panel[kk * NR + j] = word(row[2 * kk], row[2 * kk + 1]);
                }
            }
        }
        if k % 2 == 1 {
            for j in 0..columns {
                panel[whole * NR + j] = word(src[(p * NR + j) * stride + k - 1], Bf16(0));
            }
        }
    }
}

/// B = `src` for row-major `src` `[k, n]` with row stride `stride`.
pub(crate) fn pack_nn(src: &[Bf16], stride: usize, k: usize, n: usize, out: &mut Panels, parallel: bool) {
    out.reshape(k, n);
    for_each_panel(out, parallel, |p, panel| pack_nn_panel(src, stride, k, n, p, panel));
}

simd! {
    fn pack_nn_panel(src: &[Bf16], stride: usize, k: usize, n: usize, p: usize, panel: &mut [u32]) {
        let columns = (n - p * NR).min(NR);
        if columns < NR {
            panel.fill(0);
        }
        for (kk, words) in panel.chunks_exact_mut(NR).enumerate() {
            let low = &src[2 * kk * stride + p * NR..][..columns];
            if 2 * kk + 1 < k {
                let high = &src[(2 * kk + 1) * stride + p * NR..][..columns];
                if columns == NR {
                    let (low, high): (&[Bf16; NR], &[Bf16; NR]) = (low.try_into().unwrap(), high.try_into().unwrap());
                    for j in 0..NR {
                        words[j] = word(low[j], high[j]);
                    }
                } else {
                    for j in 0..columns {
                        words[j] = word(low[j], high[j]);
                    }
                }
            } else {
                for j in 0..columns {
                    words[j] = word(low[j], Bf16(0));
                }
            }
        }
    }
}

/// The words of Aᵀ for row-major `src` `[k, m]`: `out[kk * m + i]` = (src[2kk][i], src[2kk+1][i]). Read by the kernel with
/// row stride 1 and k stride m.
pub(crate) fn interleave_rows(src: &[Bf16], stride: usize, k: usize, m: usize, out: &mut Vec<u32>, parallel: bool) {
    let len = k.div_ceil(2) * m;
    if out.len() < len {
        out.resize(len, 0);
    }
    let out = &mut out[..len];
    let fill = |(kk, words): (usize, &mut [u32])| {
        let low = &src[2 * kk * stride..][..m];
        let high = (2 * kk + 1 < k).then(|| &src[(2 * kk + 1) * stride..][..m]);
        interleave(low, high, words);
    };
    if m == 0 {
        return;
    }
    if parallel {
        out.par_chunks_mut(m).enumerate().with_min_len(16).for_each(fill);
    } else {
        out.chunks_mut(m).enumerate().for_each(fill);
    }
}

simd! {
    fn interleave(low: &[Bf16], high: Option<&[Bf16]>, words: &mut [u32]) {
        match high {
            Some(high) => {
                for ((w, &l), &h) in words.iter_mut().zip(low).zip(high) {
                    *w = word(l, h);
                }
            }
            None => {
                for (w, &l) in words.iter_mut().zip(low) {
                    *w = word(l, Bf16(0));
                }
            }
        }
    }
}

/// From the panels of Wᵀ (forward: k = in, n = out) rows `rows` of W as panels for `dy·W` (k = those out rows, n = in),
/// so that a frozen weight is kept only once. `rows.start` is a multiple of [`NR`].
pub(crate) fn transpose_panels(forward: &Panels, rows: std::ops::Range<usize>, out: &mut Panels) {
    assert!(rows.start.is_multiple_of(NR) && rows.end <= forward.n);
    out.reshape(rows.len(), forward.k);
    for_each_panel(out, true, |p, panel| transpose_panel(forward, rows.start, rows.len(), p, panel));
}

simd! {
    fn transpose_panel(forward: &Panels, first: usize, count: usize, p: usize, panel: &mut [u32]) {
        // Panel p of the result: columns (in features) p·NR … p·NR + 31 = words kk p·16 … p·16 + 15 of the forward panels.
        let columns = (forward.k - p * NR).min(NR);
        let words = columns.div_ceil(2);
        if columns < NR || count % 2 == 1 {
            panel.fill(0);
        }
        for nn in 0..count / 2 {
            let n = first + 2 * nn;
            let source = &forward.panel(n / NR)[p * (NR / 2) * NR + n % NR..];
            let target = &mut panel[nn * NR..(nn + 1) * NR];
            for kk in 0..words {
                let (a, b) = (source[kk * NR], source[kk * NR + 1]);
                target[2 * kk] = (a & 0xffff) | b << 16;
                if 2 * kk + 1 < columns {
                    target[2 * kk + 1] = a >> 16 | (b & 0xffff_0000);
                }
            }
        }
        if count % 2 == 1 {
            let n = first + count - 1;
            for kk in 0..columns {
                panel[(count / 2) * NR + kk] = u32::from(forward.get(p * NR + kk, n).0);
            }
        }
    }
}
