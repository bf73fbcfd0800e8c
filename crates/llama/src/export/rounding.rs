//! Rounding of a matrix to ggml's blocks for the inputs that it will have, not for itself.
//!
//! With X the inputs (a row each), W the matrix and Q what is stored, the outputs differ by X·(W-Q)ᵀ. Let H = XᵀX + λI = R·Rᵀ
//! with R upper triangular: the squared error of an output is then |(w-q)·R|² for its row w of W, and column j of (w-q)·R has
//!
//! ```text
//! (w_j - q_j)·R_jj + Σ_{i<j} (w_i - q_i)·R_ij
//! ```
//!
//! Going from the first column to the last, q_j is what brings that term closest to zero: each weight makes up for the errors of
//! those before it. This is GPTQ (Frantar et al. 2022) without an inverse (the form of LDLQ, Chee et al. 2023). A block's scale
//! is chosen when its first column is reached, as the one of a few with the least error over the block.
//!
//! The outputs that are wanted may differ from X·Wᵀ, because X comes from blocks before that were rounded: with D the wanted
//! change of the outputs, W is to become W + DᵀX·H⁻¹. With Y = DᵀX·R⁻ᵀ its part of column j of the error is Y_j, so that one
//! triangular system is solved and no corrected W is made.
//!
//! Matrices over the outputs stand transposed, `[in, out]`: a block of columns is then a stretch of memory, products with R are
//! the device's, and what is left is done for 16 outputs at a time.

use cashtag_backend::{Backend, Dtype, Mat, MatMut};
use half::f16;
use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::ggml::BlockType;

/// Elements of a block of ggml's plain quantised types.
pub(super) const BLOCK: usize = 32;
/// Outputs that are rounded side by side.
const LANES: usize = 16;
/// λ, as a share of the mean of the diagonal of XᵀX.
const DAMPING: f64 = 0.01;

type Lanes = [f32; LANES];

/// R of the module's documentation, `[n, n]`.
pub(super) struct Factor<B: Backend> {
    n: usize,
    host: Vec<f32>,
    device: B::Buffer,
}

impl<B: Backend> Factor<B> {
    /// That of XᵀX = `gram`, which is used up. A singular one is damped more.
    ///
    /// # Errors
    /// Values that are not finite; a device without memory.
    pub(super) fn new(backend: &B, n: usize, mut gram: Vec<f32>) -> Result<Self> {
        assert_eq!(gram.len(), n * n);
        let mean = (0..n).map(|i| f64::from(gram[i * n + i])).sum::<f64>() / n.max(1) as f64;
        if !mean.is_finite() {
            return Err(not_finite());
        }
        // The lower factor of the matrix read backwards is R read backwards.
        gram.reverse();
        let mut damping = DAMPING;
        let mut lower = loop {
            let mut a = gram.clone();
            // No input at all: every weight counts the same.
            let add = if mean > 0.0 { damping * mean } else { 1.0 };
            (0..n).for_each(|i| a[i * n + i] = (f64::from(a[i * n + i]) + add) as f32);
            // In the device's threads, as many as were asked for.
            if backend.run(|| cholesky(&mut a, n)) {
                break a;
            }
            damping *= 10.0;
            if damping > 1e3 {
                return Err(not_finite());
            }
        };
        lower.reverse();
        let mut device = backend.uninit(Dtype::F32, n * n)?;
        backend.upload(&lower, &mut device, 0)?;
        Ok(Self { n, host: lower, device })
    }

    /// Y = P·R⁻ᵀ for P = `y` `[n, outputs]` (both transposed), in place.
    fn solve(&self, backend: &B, y: &mut B::Buffer, outputs: usize) -> Result<()> {
        let n = self.n;
        let r = Mat::new(&self.device, n, n);
        let mut product = backend.uninit(Dtype::F32, BLOCK * outputs)?;
        let (mut block, mut after) = (vec![0f32; BLOCK * outputs], vec![0f32; BLOCK * outputs]);
        for first in (0..n).step_by(BLOCK).rev() {
            let end = first + BLOCK;
            backend.download(y, first * outputs, &mut block)?;
            if end < n {
                let right = r.rows(first, BLOCK).columns(end, n - end);
                let below = Mat::new(&*y, n, outputs).rows(end, n - end);
                backend.matmul_nn(1.0, right, below, 0.0, MatMut::new(&mut product, BLOCK, outputs))?;
                backend.download(&product, 0, &mut after)?;
                block.iter_mut().zip(&after).for_each(|(b, a)| *b -= a);
            }
            for j in (0..BLOCK).rev() {
                let (head, solved) = block.split_at_mut((j + 1) * outputs);
                let row = &mut head[j * outputs..];
                for (i, known) in (j + 1..BLOCK).zip(solved.chunks_exact(outputs)) {
                    let factor = self.host[(first + j) * n + first + i];
                    row.iter_mut().zip(known).for_each(|(y, k)| *y -= factor * k);
                }
                let inverse = 1.0 / self.host[(first + j) * n + first + j];
                row.iter_mut().for_each(|y| *y *= inverse);
            }
            backend.upload(&block, y, first * outputs)?;
        }
        Ok(())
    }
}

/// The lower factor of a symmetric matrix, in its lower half; the rest is zero then. `false` where it is not positive.
fn cholesky(a: &mut [f32], n: usize) -> bool {
    const PANEL: usize = 64;
    for first in (0..n).step_by(PANEL) {
        let end = (first + PANEL).min(n);
        let (head, tail) = a.split_at_mut(end * n);
        for i in first..end {
            let (above, row) = head.split_at_mut(i * n);
            for j in first..i {
                let known = &above[j * n..=j * n + j];
                row[j] = ((f64::from(row[j]) - dot(&row[..j], &known[..j])) / f64::from(known[j])) as f32;
            }
            let pivot = f64::from(row[i]) - dot(&row[..i], &row[..i]);
            // Not a number is not positive either.
            if pivot.is_nan() || pivot <= 0.0 || pivot.is_infinite() {
                return false;
            }
            row[i] = pivot.sqrt() as f32;
            row[i + 1..n].fill(0.0);
        }
        tail.par_chunks_exact_mut(n).for_each(|row| {
            for j in first..end {
                let known = &head[j * n..=j * n + j];
                row[j] = ((f64::from(row[j]) - dot(&row[..j], &known[..j])) / f64::from(known[j])) as f32;
            }
        });
    }
    true
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    let mut sums = [0f64; 8];
    let (heads, rest) = a.as_chunks::<8>();
    let (others, other_rest) = b.as_chunks::<8>();
    for (a, b) in heads.iter().zip(others) {
        for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
            *sum += f64::from(*a) * f64::from(*b);
        }
    }
    rest.iter().zip(other_rest).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>() + sums.iter().sum::<f64>()
}

/// The scales that are tried for a block, as shares of the one that just holds its value of the largest magnitude.
struct Scales {
    /// (share, steps that the value of the largest magnitude has)
    tried: &'static [(f32, f32)],
    lowest: f32,
    highest: f32,
}

impl Scales {
    /// `None` for types that are not rounded in this way.
    fn of(block_type: BlockType) -> Option<Self> {
        match block_type {
            // -8 … 7: either end can take the extreme.
            BlockType::Q4_0 => Some(Self {
                tried: &[
                    (1.0, -8.0),
                    (0.94, -8.0),
                    (0.87, -8.0),
                    (0.8, -8.0),
                    (0.72, -8.0),
                    (1.06, -8.0),
                    (1.0, 7.0),
                    (0.92, 7.0),
                    (0.84, 7.0),
                    (0.76, 7.0),
                ],
                lowest: -8.0,
                highest: 7.0,
            }),
            BlockType::Q8_0 => Some(Self {
                tried: &[(1.0, 127.0), (0.99, 127.0), (0.98, 127.0), (0.97, 127.0)],
                lowest: -127.0,
                highest: 127.0,
            }),
            _ => None,
        }
    }
}

fn not_finite() -> Error {
    Error::Invalid("the calibration texts give values that are not finite\n  hint: --calibrate none".into())
}

/// Whether [`round`] writes this type in rows of `cols` values.
pub(super) fn rounds(block_type: BlockType, cols: usize) -> bool {
    Scales::of(block_type).is_some() && cols.is_multiple_of(BLOCK)
}

/// The blocks of `weights` `[out, n]`, row by row. `pull`: DᵀX of the module's documentation, transposed (`[n, out]`); it is
/// used up.
///
/// # Errors
/// Values that are not finite; a device that fails.
pub(super) fn round<B: Backend>(
    backend: &B,
    block_type: BlockType,
    weights: &[f32],
    factor: &Factor<B>,
    mut pull: B::Buffer,
) -> Result<Vec<u8>> {
    let n = factor.n;
    let outputs = weights.len() / n;
    let Some(scales) = Scales::of(block_type).filter(|_| n.is_multiple_of(BLOCK)) else {
        return Err(Error::Invalid(format!("rows of {n} values are not rounded to {}", block_type.name())));
    };
    factor.solve(backend, &mut pull, outputs)?;
    // w - q of the columns before, transposed.
    let mut errors = backend.uninit(Dtype::F32, n * outputs)?;
    let mut product = backend.uninit(Dtype::F32, BLOCK * outputs)?;
    let (mut pulled, mut before) = (vec![0f32; BLOCK * outputs], vec![0f32; BLOCK * outputs]);
    let bytes = block_type.bytes();
    let mut out = vec![0u8; outputs * (n / BLOCK) * bytes];
    for first in (0..n).step_by(BLOCK) {
        backend.download(&pull, first * outputs, &mut pulled)?;
        if first > 0 {
            let above = Mat::new(&factor.device, n, n).rows(0, first).columns(first, BLOCK);
            let known = Mat::new(&errors, n, outputs).rows(0, first);
            backend.matmul_tn(1.0, above, known, 0.0, MatMut::new(&mut product, BLOCK, outputs))?;
            backend.download(&product, 0, &mut before)?;
            pulled.iter_mut().zip(&before).for_each(|(p, b)| *p += b);
        }
        let corner = Corner::of(&factor.host, n, first);
        let chunk = |chunk: usize| {
            let (mut w, mut t) = ([[0f32; LANES]; BLOCK], [[0f32; LANES]; BLOCK]);
            for lane in 0..LANES.min(outputs - chunk * LANES) {
                let output = chunk * LANES + lane;
                for j in 0..BLOCK {
                    w[j][lane] = weights[output * n + first + j];
                    t[j][lane] = pulled[j * outputs + output];
                }
            }
            corner.round(&w, &t, &scales)
        };
        let rounded: Vec<Rounded> = backend.run(|| (0..outputs.div_ceil(LANES)).into_par_iter().map(chunk).collect());
        for (output, (rounded, lane)) in
            rounded.iter().flat_map(|r| (0..LANES).map(move |lane| (r, lane))).take(outputs).enumerate()
        {
            if rounded.cost[lane].is_infinite() {
                return Err(not_finite());
            }
            // Room of the product that was added.
            (0..BLOCK).for_each(|j| before[j * outputs + output] = rounded.errors[j][lane]);
            let at = (output * (n / BLOCK) + first / BLOCK) * bytes;
            rounded.encode(lane, block_type, &mut out[at..at + bytes]);
        }
        backend.upload(&before, &mut errors, first * outputs)?;
    }
    Ok(out)
}

/// A block of [`LANES`] rows, rounded.
struct Rounded {
    scale: Lanes,
    codes: [Lanes; BLOCK],
    errors: [Lanes; BLOCK],
    /// The squared error of each row; infinite where no scale gave a finite one.
    cost: Lanes,
}

impl Rounded {
    fn encode(&self, lane: usize, block_type: BlockType, out: &mut [u8]) {
        let (scale, codes) = out.split_at_mut(2);
        scale.copy_from_slice(&f16::from_f32(self.scale[lane]).to_le_bytes());
        let code = |j: usize| self.codes[j][lane] as i8;
        for (j, byte) in codes.iter_mut().enumerate() {
            *byte = match block_type {
                BlockType::Q4_0 => (code(j) + 8) as u8 | ((code(j + BLOCK / 2) + 8) as u8) << 4,
                _ => code(j) as u8,
            };
        }
    }
}

/// The part of R that stands on the diagonal beside a block.
struct Corner {
    diagonal: [f32; BLOCK],
    /// R_ij / R_jj at `[j][i]`.
    ratios: [[f32; BLOCK]; BLOCK],
}

impl Corner {
    fn of(r: &[f32], n: usize, first: usize) -> Self {
        let at = |i: usize, j: usize| r[(first + i) * n + first + j];
        let mut corner = Self { diagonal: [0.0; BLOCK], ratios: [[0.0; BLOCK]; BLOCK] };
        for j in 0..BLOCK {
            corner.diagonal[j] = at(j, j);
            (0..j).for_each(|i| corner.ratios[j][i] = at(i, j) / at(j, j));
        }
        corner
    }

    /// `w`: the weights; `t`: what the columns before and the wanted change add to the error of each column.
    fn round(&self, w: &[Lanes; BLOCK], t: &[Lanes; BLOCK], scales: &Scales) -> Rounded {
        // What the weights would have to be for no error at all.
        let mut wanted = [[0f32; LANES]; BLOCK];
        for j in 0..BLOCK {
            let inverse = 1.0 / self.diagonal[j];
            let mut sum = t[j].map(|t| t * inverse);
            for i in 0..j {
                let ratio = self.ratios[j][i];
                (0..LANES).for_each(|l| sum[l] += (w[i][l] - wanted[i][l]) * ratio);
            }
            (0..LANES).for_each(|l| wanted[j][l] = w[j][l] + sum[l]);
        }
        let mut extreme = [0f32; LANES];
        for row in &wanted {
            (0..LANES).for_each(|l| extreme[l] = if row[l].abs() > extreme[l].abs() { row[l] } else { extreme[l] });
        }
        let mut best = Rounded {
            scale: [0.0; LANES],
            codes: [[0.0; LANES]; BLOCK],
            errors: [[0.0; LANES]; BLOCK],
            cost: [f32::INFINITY; LANES],
        };
        for &(share, steps) in scales.tried {
            let scale = extreme.map(|e| {
                let scale = f16::from_f32(e * share / steps).to_f32();
                if scale.is_finite() { scale } else { f16::MAX.to_f32().copysign(scale) }
            });
            let inverse = scale.map(|d| if d == 0.0 { 0.0 } else { 1.0 / d });
            let (mut codes, mut errors, mut cost) = ([[0f32; LANES]; BLOCK], [[0f32; LANES]; BLOCK], [0f32; LANES]);
            for j in 0..BLOCK {
                let mut value = wanted[j];
                for (ratio, error) in self.ratios[j].iter().zip(&errors[..j]) {
                    (0..LANES).for_each(|l| value[l] += error[l] * ratio);
                }
                let weight = self.diagonal[j] * self.diagonal[j];
                for l in 0..LANES {
                    let code = nearest((value[l] * inverse[l]).max(scales.lowest).min(scales.highest));
                    let left = value[l] - code * scale[l];
                    cost[l] += weight * left * left;
                    codes[j][l] = code;
                    errors[j][l] = wanted[j][l] - code * scale[l];
                }
            }
            for l in 0..LANES {
                if cost[l] < best.cost[l] {
                    (best.cost[l], best.scale[l]) = (cost[l], scale[l]);
                    (0..BLOCK).for_each(|j| best.codes[j][l] = codes[j][l]);
                }
            }
        }
        for ((errors, w), codes) in best.errors.iter_mut().zip(w).zip(&best.codes) {
            (0..LANES).for_each(|l| errors[l] = w[l] - codes[l] * best.scale[l]);
        }
        best
    }
}

/// The nearest whole number of a magnitude below 2²².
fn nearest(value: f32) -> f32 {
    const SHIFT: f32 = 12_582_912.0;
    (value + SHIFT) - SHIFT
}

#[cfg(test)]
mod tests;
