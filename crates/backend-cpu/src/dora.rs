//! The operations of DoRA: columns scaled by their magnitude, its gradient, and the row norms of an adapted weight.

use rayon::prelude::*;

use crate::buffer::{View, ViewMut};
use crate::linear::{CpuWeight, Form, matmul_f32};
use crate::simd::{Element, lane_sum, simd};

simd! {
    fn scale_row<T: Element>(scale: &[f32], x: &mut [T]) {
        for (x, s) in x.iter_mut().zip(scale) {
            *x = T::from_f32(x.to_f32() * s);
        }
    }
}

pub(crate) fn scale_columns<T: Element>(scale: &[f32], x: ViewMut<'_, T>) {
    let ViewMut { data, cols, stride, .. } = x;
    data.par_chunks_mut(stride.max(1)).with_min_len(16).for_each(|row| scale_row(scale, &mut row[..cols]));
}

simd! {
    fn add_products<A: Element, B: Element>(a: &[A], b: &[B], sums: &mut [f32]) {
        for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
            *sum += a.to_f32() * b.to_f32();
        }
    }
}

/// Columns of one task.
const COLUMNS: usize = 128;

pub(crate) fn column_dots<A: Element, B: Element>(a: View<'_, A>, b: View<'_, B>, scale: &[f32], out: &mut [f32]) {
    assert_eq!((a.rows, a.cols), (b.rows, b.cols), "column_dots: shapes do not fit");
    out.par_chunks_mut(COLUMNS).zip(scale.par_chunks(COLUMNS)).enumerate().for_each(|(chunk, (out, scale))| {
        let columns = chunk * COLUMNS..chunk * COLUMNS + out.len();
        let mut sums = [0f32; COLUMNS];
        for i in 0..a.rows {
            add_products(&a.row(i)[columns.clone()], &b.row(i)[columns.clone()], &mut sums[..out.len()]);
        }
        for ((out, sum), scale) in out.iter_mut().zip(sums).zip(scale) {
            *out += scale * sum;
        }
    });
}

simd! {
    fn norm(x: &[f32]) -> f32 {
        lane_sum(|i| x[i] * x[i], x.len()).sqrt()
    }
}

/// Rows of W that one task holds as f32.
const ROWS: usize = 32;

pub(crate) fn adapted_row_norms<A: Element, B: Element>(
    w: &CpuWeight,
    first: usize,
    scale: f32,
    a: View<'_, A>,
    b: View<'_, B>,
) -> Vec<f32> {
    let (r, inner) = (a.rows, w.inner);
    assert_eq!((a.cols, b.cols), (inner, r), "adapted_row_norms: shapes do not fit");
    let wide_a: Vec<f32> = (0..r).flat_map(|i| a.row(i).iter().map(|x| x.to_f32())).collect();
    let mut norms = vec![0f32; b.rows];
    norms.par_chunks_mut(ROWS).enumerate().for_each_init(
        || (vec![0f32; ROWS * inner], vec![0f32; ROWS * r]),
        |(rows, factors), (chunk, norms)| {
            let n = norms.len();
            for i in 0..n {
                w.read_row(first + chunk * ROWS + i, &mut rows[i * inner..(i + 1) * inner]);
                for (f, b) in factors[i * r..(i + 1) * r].iter_mut().zip(b.row(chunk * ROWS + i)) {
                    *f = b.to_f32();
                }
            }
            let factors = View { data: &factors[..n * r], rows: n, cols: r, stride: r };
            let wide_a = View { data: &wide_a, rows: r, cols: inner, stride: inner };
            let target = ViewMut { data: &mut rows[..n * inner], rows: n, cols: inner, stride: inner };
            matmul_f32(Form::Nn, scale, factors, wide_a, true, target, false);
            for (norm_of, row) in norms.iter_mut().zip(rows.chunks_exact(inner)) {
                *norm_of = norm(row);
            }
        },
    );
    norms
}
