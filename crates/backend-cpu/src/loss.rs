//! Label-row cross-entropy, the optimizer step and norms of gradients.

use cashtag_backend::AdamW;
use rayon::prelude::*;

use crate::buffer::{View, ViewMut};
use crate::simd::{Element, exp, lane_sum, simd};

pub(crate) struct RowLoss {
    pub(crate) target: usize,
    pub(crate) weight: f32,
    pub(crate) smoothing: f32,
    pub(crate) gradient_scale: f32,
}

simd! {
    fn max_of(x: &[f32]) -> f32 {
        let mut lanes = [f32::NEG_INFINITY; 16];
        let chunks = x.chunks_exact(16);
        let mut max = chunks.remainder().iter().fold(f32::NEG_INFINITY, |a, &b| if b > a { b } else { a });
        for c in chunks {
            for (lane, &v) in lanes.iter_mut().zip(c) {
                *lane = if v > *lane { v } else { *lane };
            }
        }
        for lane in lanes {
            max = if lane > max { lane } else { max };
        }
        max
    }
}

simd! {
    fn sum_exp(x: &[f32], max: f32) -> f32 {
        lane_sum(|i| exp(x[i] - max), x.len())
    }
}

simd! {
    fn sum_of(x: &[f32]) -> f32 {
        lane_sum(|i| x[i], x.len())
    }
}

simd! {
    fn gradient_row<T: Element>(logits: &[f32], lse: f32, factor: f32, uniform: f32, out: &mut [T]) {
        for (o, &x) in out.iter_mut().zip(logits) {
            *o = T::from_f32(factor * (exp(x - lse) - uniform));
        }
    }
}

/// log Σ exp of a row; NaN in, NaN out.
pub(crate) fn log_sum_exp(x: &[f32]) -> f32 {
    let max = max_of(x);
    max + sum_exp(x, max).ln()
}

fn row_loss<T: Element>(logits: &[f32], r: &RowLoss, dlogits: Option<&mut [T]>) -> f32 {
    let lse = log_sum_exp(logits);
    let classes = logits.len() as f32;
    let mut loss = (1.0 - r.smoothing) * (lse - logits[r.target]);
    if r.smoothing > 0.0 {
        loss += r.smoothing * (lse - sum_of(logits) / classes);
    }
    if let Some(out) = dlogits {
        let factor = r.weight * r.gradient_scale;
        gradient_row(logits, lse, factor, r.smoothing / classes, out);
        let p = exp(logits[r.target] - lse);
        out[r.target] = T::from_f32(factor * (p - r.smoothing / classes - (1.0 - r.smoothing)));
    }
    r.weight * loss
}

/// As [`cashtag_backend::Backend::log_probabilities`]: a row is read once, however many targets it has.
pub(crate) fn log_probabilities(logits: View<'_, f32>, targets: &[Vec<u32>]) -> Vec<Vec<f32>> {
    assert_eq!(logits.rows, targets.len());
    let row = |(i, targets): (usize, &Vec<u32>)| {
        let row = logits.row(i);
        let lse = log_sum_exp(row);
        targets.iter().map(|&t| row[t as usize] - lse).collect()
    };
    targets.par_iter().enumerate().map(row).collect()
}

pub(crate) fn cross_entropy<T: Element>(
    logits: View<'_, f32>,
    row: impl Fn(usize) -> RowLoss + Sync + Send,
    loss: &mut [f32],
    dlogits: Option<ViewMut<'_, T>>,
) {
    let loss = &mut loss[..logits.rows];
    match dlogits {
        None => {
            loss.par_iter_mut().enumerate().for_each(|(i, l)| *l = row_loss::<T>(logits.row(i), &row(i), None));
        }
        Some(d) => {
            assert_eq!((d.rows, d.cols), (logits.rows, logits.cols));
            let (cols, stride) = (d.cols, d.stride);
            d.data.par_chunks_mut(stride).zip(loss).enumerate().for_each(|(i, (out, l))| {
                *l = row_loss(logits.row(i), &row(i), Some(&mut out[..cols]));
            });
        }
    }
}

/// Elements of one block of [`sum_of_squares`]: fixed, so that the sum does not depend on the threads.
const BLOCK: usize = 1 << 16;

pub(crate) fn sum_of_squares(x: &[f32]) -> f64 {
    let blocks: Vec<f64> = x.par_chunks(BLOCK).map(|b| f64::from(squares(b))).collect();
    blocks.iter().sum()
}

simd! {
    fn squares(x: &[f32]) -> f32 {
        lane_sum(|i| x[i] * x[i], x.len())
    }
}

simd! {
    fn adamw_block<T: Element>(h: AdamW, p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32], c: &mut [T]) {
        let decay = 1.0 - h.learning_rate * h.weight_decay;
        let step = h.learning_rate / (1.0 - h.beta1.powi(h.step as i32));
        let root = 1.0 / (1.0 - h.beta2.powi(h.step as i32)).sqrt();
        for ((((p, g), m), v), c) in p.iter_mut().zip(g).zip(m).zip(v).zip(c) {
            let g = g * h.gradient_scale;
            *m = h.beta1 * *m + (1.0 - h.beta1) * g;
            *v = h.beta2 * *v + (1.0 - h.beta2) * g * g;
            *p = *p * decay - step * *m / (v.sqrt() * root + h.epsilon);
            *c = T::from_f32(*p);
        }
    }
}

pub(crate) fn adamw<T: Element>(h: AdamW, p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32], c: &mut [T]) {
    assert!([g.len(), m.len(), v.len(), c.len()].iter().all(|&n| n == p.len()));
    p.par_chunks_mut(BLOCK)
        .zip(g.par_chunks(BLOCK))
        .zip(m.par_chunks_mut(BLOCK))
        .zip(v.par_chunks_mut(BLOCK))
        .zip(c.par_chunks_mut(BLOCK))
        .for_each(|((((p, g), m), v), c)| adamw_block(h, p, g, m, v, c));
}
