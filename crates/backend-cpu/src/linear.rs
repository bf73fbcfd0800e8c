//! Frozen weights and matrix products, in both precisions.

use std::ops::Range;
use std::sync::{Arc, Mutex};

use cashtag_backend::dry::Product;
use cashtag_backend::{Error, Result, WeightSource};
use gemm_common::Parallelism;
use rayon::prelude::*;

use crate::buffer::{AnyView, AnyViewMut, Held, Memory, View, ViewMut};
use crate::gemm::fixed::{self, FixedPanels, FixedWeight};
use crate::gemm::{
    AWords, COut, NR, Panels, TileOut, gemm as gemm_bf16, gemm_sum, interleave_rows, pack_nn, pack_nt, transpose_panels,
};
use crate::simd::{Bf16, Element, Isa, isa};

/// A frozen matrix `[out, in]`.
#[derive(Debug)]
pub struct CpuWeight {
    pub(crate) out: usize,
    pub(crate) inner: usize,
    pub(crate) data: WeightData,
    _held: Held,
}

#[derive(Debug)]
pub(crate) enum WeightData {
    /// Row-major, for the f32 path.
    F32(Vec<f32>),
    /// Panels of Wᵀ. The backward transposes them into scratch, a few percent of its time, so that they are held once.
    Bf16(Panels),
    /// Panels of Wᵀ, and of what rounding left of it: 16 bits of mantissa in all. f32 rows are multiplied by both.
    Pair([Panels; 2]),
    /// The same as 16-bit integers, where those multiply faster.
    Fixed(FixedWeight),
}

/// How a frozen weight is stored on this processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Storage {
    F32,
    Bf16,
    Pair,
    Fixed,
}

impl Storage {
    /// Embeddings and heads stay floats: their gradient has few large elements among many thousand tiny ones, which a scale for all
    /// of them would lose. What rounding left of them is kept: it is the same for every text, a bias on each label.
    pub(crate) fn of(bf16: bool, embedding: bool) -> Self {
        match (bf16, embedding) {
            (false, _) => Self::F32,
            (true, true) => Self::Pair,
            (true, false) if isa() == Isa::Avx2 => Self::Fixed,
            (true, false) => Self::Bf16,
        }
    }
}

/// Packing buffers that are handed from call to call, so that a step allocates nothing.
#[derive(Default)]
pub(crate) struct Scratch {
    panels: Mutex<Vec<Panels>>,
    fixed: Mutex<Vec<FixedPanels>>,
    words: Mutex<Vec<Vec<u32>>>,
}

/// Calls `f` with a buffer of the pool, or with a new one if all are in use.
fn with<T: Default, R>(pool: &Mutex<Vec<T>>, f: impl FnOnce(&mut T) -> R) -> R {
    let mut buffer = pool.lock().unwrap_or_else(|e| e.into_inner()).pop().unwrap_or_default();
    let result = f(&mut buffer);
    pool.lock().unwrap_or_else(|e| e.into_inner()).push(buffer);
    result
}

/// Words of panels for a `[k, n]`.
fn panel_words(k: usize, n: usize) -> usize {
    n.next_multiple_of(NR) * k.div_ceil(2)
}

/// Bytes that a frozen `[out, inner]` takes.
pub(crate) fn weight_bytes(storage: Storage, out: usize, inner: usize) -> u64 {
    4 * match storage {
        Storage::F32 => out * inner,
        Storage::Bf16 => panel_words(inner, out),
        Storage::Pair => 2 * panel_words(inner, out),
        Storage::Fixed => fixed::panel_words(inner, out) + 2 * out.next_multiple_of(fixed::NR),
    } as u64
}

/// Bytes that stay in the packing buffers after a product of bf16 operands.
pub(crate) fn scratch_bytes(bf16: bool, product: Product) -> u64 {
    if !bf16 {
        return 0;
    }
    let is_fixed = Storage::of(bf16, false) == Storage::Fixed;
    let words = match product {
        Product::Linear { rows, inner, .. } if is_fixed => fixed::row_words(rows, inner),
        Product::LinearBackward { rows, out, inner } if is_fixed => {
            let part = out.min(BACKWARD_ROWS);
            fixed::panel_words(part, inner) + fixed::row_words(rows, part)
        }
        Product::Linear { rows, inner, .. } => odd_words(rows, inner),
        // The transposed panels of a part of W; all of dy has its width.
        Product::LinearBackward { rows, out, inner } => {
            let part = out.min(BACKWARD_ROWS);
            panel_words(part, inner) + odd_words(rows, part)
        }
        Product::Matmul { m, n, k, transposed_a: false } => panel_words(k, n) + odd_words(m, k),
        Product::Matmul { m, n, k, transposed_a: true } => panel_words(k, n) + k.div_ceil(2) * m,
        // A few rows for each thread, which are given back.
        Product::RowNorms { .. } => 0,
    };
    4 * words as u64
}

/// Words of the copy that is made of a matrix with an odd number of columns.
fn odd_words(rows: usize, cols: usize) -> usize {
    if cols.is_multiple_of(2) { 0 } else { rows * cols.div_ceil(2) }
}

/// Rows that are dequantised at a time while a weight is loaded.
const LOAD_ROWS: usize = NR;

impl CpuWeight {
    /// Reads and stacks `sources` along their rows.
    pub(crate) fn load(sources: &[&dyn WeightSource], storage: Storage, memory: &Arc<Memory>) -> Result<Self> {
        let inner = sources.first().map_or(0, |s| s.cols());
        for s in sources {
            if s.cols() != inner {
                let what = format!("has {} columns, the weights beside it have {inner}", s.cols());
                return Err(Error::Weight { name: s.name().into(), what });
            }
        }
        let out: usize = sources.iter().map(|s| s.rows()).sum();
        let (data, bytes) = match storage {
            Storage::Fixed => {
                let read = |rows: Range<usize>, target: &mut [f32]| read_stacked(sources, rows, target);
                let weight = FixedWeight::load(out, inner, BACKWARD_ROWS, read)?;
                let bytes = weight.bytes();
                (WeightData::Fixed(weight), bytes)
            }
            Storage::Bf16 => {
                let [panels, _] = load_bf16(sources, out, inner, false)?;
                let bytes = panels.words.len() * 4;
                (WeightData::Bf16(panels), bytes)
            }
            Storage::Pair => {
                let pair = load_bf16(sources, out, inner, true)?;
                let bytes = pair.iter().map(|p| p.words.len() * 4).sum();
                (WeightData::Pair(pair), bytes)
            }
            Storage::F32 => {
                let mut w = vec![0f32; out * inner];
                if inner > 0 {
                    w.par_chunks_mut(LOAD_ROWS * inner).enumerate().try_for_each(|(chunk, rows)| {
                        let first = chunk * LOAD_ROWS;
                        read_stacked(sources, first..first + rows.len() / inner, rows)
                    })?;
                }
                let bytes = w.len() * 4;
                (WeightData::F32(w), bytes)
            }
        };
        Ok(Self { out, inner, data, _held: Held::new(memory, bytes) })
    }

    /// Row `row` as f32.
    pub(crate) fn read_row(&self, row: usize, target: &mut [f32]) {
        match &self.data {
            WeightData::F32(w) => target.copy_from_slice(&w[row * self.inner..(row + 1) * self.inner]),
            // Of a pair the rounded values: the residual stream that training sees is the one that classification sees.
            WeightData::Bf16(panels) | WeightData::Pair([panels, _]) => {
                for (k, t) in target.iter_mut().enumerate() {
                    *t = panels.get(k, row).to_f32();
                }
            }
            WeightData::Fixed(weight) => weight.read_row(row, target),
        }
    }
}

/// The weights rounded to bf16 and, with `pair`, what that left of them.
fn load_bf16(sources: &[&dyn WeightSource], out: usize, inner: usize, pair: bool) -> Result<[Panels; 2]> {
    let mut panels = [Panels::default(), Panels::default()];
    panels.iter_mut().take(1 + usize::from(pair)).for_each(|p| p.reshape(inner, out));
    let [high, low] = &mut panels;
    let len = high.panel_len();
    if len > 0 {
        let mut lows: Vec<_> = low.words.chunks_mut(len).map(Some).collect();
        lows.resize_with(out.div_ceil(NR), || None);
        high.used().par_chunks_mut(len).zip(lows).enumerate().try_for_each_init(
            || (vec![0f32; LOAD_ROWS * inner], vec![Bf16::default(); LOAD_ROWS * inner], Panels::default()),
            |(wide, narrow, one), (p, (high, low))| -> Result<()> {
                let rows = p * NR..((p + 1) * NR).min(out);
                let n = rows.len();
                let wide = &mut wide[..n * inner];
                read_stacked(sources, rows, wide)?;
                for target in [Some(high), low].into_iter().flatten() {
                    take_bf16(wide, narrow);
                    pack_nt(narrow, inner, n, inner, one, false);
                    target.copy_from_slice(one.used());
                }
                Ok(())
            },
        )?;
    }
    Ok(panels)
}

/// `narrow ← bf16(wide)`, and `wide` keeps what that left.
fn take_bf16(wide: &mut [f32], narrow: &mut [Bf16]) {
    for (narrow, wide) in narrow.iter_mut().zip(wide) {
        *narrow = Bf16::from_f32(*wide);
        *wide -= narrow.to_f32();
    }
}

fn read_stacked(sources: &[&dyn WeightSource], rows: Range<usize>, out: &mut [f32]) -> Result<()> {
    let mut first = 0;
    for s in sources {
        let (start, end) = (rows.start.max(first), rows.end.min(first + s.rows()));
        if start < end {
            let part = &mut out[(start - rows.start) * s.cols()..(end - rows.start) * s.cols()];
            s.read_rows(start - first..end - first, part)?;
        }
        first += s.rows();
    }
    Ok(())
}

fn c_out(c: &mut AnyViewMut<'_>) -> (COut, usize, usize) {
    match c {
        AnyViewMut::F32(v) => (COut { out: TileOut::F32(v.data.as_mut_ptr()), stride: v.stride }, v.rows, v.cols),
        AnyViewMut::Bf16(v) => (COut { out: TileOut::Bf16(v.data.as_mut_ptr()), stride: v.stride }, v.rows, v.cols),
    }
}

/// Runs `f` with the words of a row-major A; copies it first if a row does not start on a whole word or k is odd.
fn with_a_words<R>(a: View<'_, Bf16>, scratch: &Scratch, f: impl FnOnce(AWords) -> R) -> R {
    let k_words = a.cols.div_ceil(2);
    if a.stride.is_multiple_of(2) && a.cols.is_multiple_of(2) {
        return f(AWords { ptr: a.data.as_ptr().cast(), row_stride: a.stride / 2, k_stride: 1, rows: a.rows, k_words });
    }
    with(&scratch.words, |words| {
        words.clear();
        words.reserve(a.rows * k_words);
        for i in 0..a.rows {
            for pair in a.row(i).chunks(2) {
                words.push(u32::from(pair[0].0) | u32::from(pair.get(1).map_or(0, |b| b.0)) << 16);
            }
        }
        f(AWords { ptr: words.as_ptr(), row_stride: k_words, k_stride: 1, rows: a.rows, k_words })
    })
}

fn bf16(v: AnyView<'_>) -> View<'_, Bf16> {
    match v {
        AnyView::Bf16(v) => v,
        AnyView::F32(_) => panic!("expected bfloat16 operands, found float32"),
    }
}

fn f32(v: AnyView<'_>) -> View<'_, f32> {
    match v {
        AnyView::F32(v) => v,
        AnyView::Bf16(_) => panic!("expected float32 operands, found bfloat16"),
    }
}

/// How the operands of a product stand.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    /// a·bᵀ
    Nt,
    /// a·b
    Nn,
    /// aᵀ·b
    Tn,
}

/// `c ← alpha·op(a)·op(b) (+ c)` in the precision of the operands.
pub(crate) fn matmul(
    form: Form,
    alpha: f32,
    a: AnyView<'_>,
    b: AnyView<'_>,
    accumulate: bool,
    mut c: AnyViewMut<'_>,
    scratch: &Scratch,
) {
    let (a, b) = match (a, b) {
        (AnyView::F32(a), AnyView::F32(b)) => {
            let AnyViewMut::F32(c) = c else { panic!("float32 operands need a float32 result") };
            return matmul_f32(form, alpha, a, b, accumulate, c, true);
        }
        (a, b) => (bf16(a), bf16(b)),
    };
    let (out, rows, cols) = c_out(&mut c);
    with(&scratch.panels, |panels| {
        match form {
            Form::Nt => pack_nt(b.data, b.stride, b.rows, b.cols, panels, true),
            Form::Nn | Form::Tn => pack_nn(b.data, b.stride, b.rows, b.cols, panels, true),
        }
        assert_eq!(panels.n, cols);
        match form {
            Form::Nt | Form::Nn => {
                assert_eq!((a.rows, a.cols), (rows, panels.k), "a does not fit");
                // SAFETY: a and c are views of these sizes; c is borrowed mutably.
                with_a_words(a, scratch, |a| unsafe { gemm_bf16(alpha, a, panels, accumulate, out, true) });
            }
            Form::Tn => {
                assert_eq!((a.cols, a.rows), (rows, panels.k), "a does not fit");
                with(&scratch.words, |words| {
                    interleave_rows(a.data, a.stride, a.rows, a.cols, words, true);
                    let k_words = a.rows.div_ceil(2);
                    let a = AWords { ptr: words.as_ptr(), row_stride: 1, k_stride: a.cols, rows: a.cols, k_words };
                    // SAFETY: as above; the words were just made with this geometry.
                    unsafe { gemm_bf16(alpha, a, panels, accumulate, out, true) }
                });
            }
        }
    });
}

/// The f32 product, by the f32 part of the `gemm` crate: its other element types would take a quarter of a minute to compile.
pub(crate) fn matmul_f32(
    form: Form,
    alpha: f32,
    a: View<'_, f32>,
    b: View<'_, f32>,
    accumulate: bool,
    c: ViewMut<'_, f32>,
    parallel: bool,
) {
    let (m, k, a_row, a_col) = match form {
        Form::Tn => (a.cols, a.rows, 1, a.stride),
        _ => (a.rows, a.cols, a.stride, 1),
    };
    let (kb, n, b_row, b_col) = match form {
        Form::Nt => (b.cols, b.rows, 1, b.stride),
        _ => (b.rows, b.cols, b.stride, 1),
    };
    assert_eq!((m, n, k), (c.rows, c.cols, kb), "operands do not fit");
    if m == 0 || n == 0 {
        return;
    }
    let threads = if parallel { Parallelism::Rayon(0) } else { Parallelism::None };
    // Its kernels write columns and C has rows, so it is asked for Cᵀ = op(b)ᵀ·op(a)ᵀ.
    let multiply = gemm_f32::gemm::f32::get_gemm_fn();
    // SAFETY: the views cover m × k, k × n and m × n elements with these strides; c is borrowed mutably.
    unsafe {
        multiply(
            n,
            m,
            k,
            c.data.as_mut_ptr(),
            c.stride as isize,
            1,
            accumulate,
            b.data.as_ptr(),
            b_row as isize,
            b_col as isize,
            a.data.as_ptr(),
            a_row as isize,
            a_col as isize,
            if accumulate { 1.0 } else { 0.0 },
            alpha,
            false,
            false,
            false,
            threads,
        );
    }
}

pub(crate) fn linear(x: AnyView<'_>, w: &CpuWeight, accumulate: bool, mut y: AnyViewMut<'_>, scratch: &Scratch) {
    match &w.data {
        WeightData::Bf16(panels) => {
            let x = bf16(x);
            let (out, rows, cols) = c_out(&mut y);
            assert_eq!((x.rows, x.cols, w.out), (rows, w.inner, cols), "linear: shapes do not fit");
            // SAFETY: x and y are views of these sizes; y is borrowed mutably.
            with_a_words(x, scratch, |a| unsafe { gemm_bf16(1.0, a, panels, accumulate, out, true) });
        }
        WeightData::Pair([high, low]) => {
            let (out, rows, cols) = c_out(&mut y);
            assert_eq!((x.rows(), x.cols(), w.out), (rows, w.inner, cols), "linear: shapes do not fit");
            match x {
                // SAFETY: x and y are views of these sizes; y is borrowed mutably.
                AnyView::Bf16(x) => {
                    with_a_words(x, scratch, |a| unsafe { gemm_bf16(1.0, a, high, accumulate, out, true) });
                }
                AnyView::F32(x) => {
                    let mut wide: Vec<f32> = (0..x.rows).flat_map(|i| x.row(i)).copied().collect();
                    let mut halves = [vec![Bf16::default(); wide.len()], vec![Bf16::default(); wide.len()]];
                    halves.iter_mut().for_each(|half| take_bf16(&mut wide, half));
                    let halves = halves.each_ref().map(|data| View { data, rows, cols: x.cols, stride: x.cols });
                    with_a_words(halves[0], scratch, |a| {
                        with_a_words(halves[1], scratch, |rest| {
                            // All products of the halves but that of both remainders, 2⁻¹⁸ of the result.
                            let terms = [(a, high), (rest, high), (a, low)];
                            // SAFETY: the words are of matrices as large as x; y is borrowed mutably.
                            unsafe { gemm_sum(1.0, &terms, accumulate, out, true) }
                        });
                    });
                }
            }
        }
        WeightData::Fixed(weight) => {
            let x = bf16(x);
            let (out, rows, cols) = c_out(&mut y);
            assert_eq!((x.rows, x.cols, w.out), (rows, w.inner, cols), "linear: shapes do not fit");
            with(&scratch.words, |words| {
                let x = fixed::quantise(x, None, weight.norms(), words);
                // SAFETY: y is a view of this size, borrowed mutably.
                unsafe { fixed::gemm(&x, weight.panels(), Some(weight.scales()), accumulate, out) }
            });
        }
        WeightData::F32(data) => {
            let AnyViewMut::F32(y) = y else { panic!("float32 weights need a float32 result") };
            let w = View { data, rows: w.out, cols: w.inner, stride: w.inner };
            matmul_f32(Form::Nt, 1.0, f32(x), w, accumulate, y, true);
        }
    }
}

/// Rows of W whose transposed panels are held at a time: all of a layer's weights, a part of a language-model head.
const BACKWARD_ROWS: usize = 4096;

pub(crate) fn linear_backward(
    dy: AnyView<'_>,
    w: &CpuWeight,
    accumulate: bool,
    mut dx: AnyViewMut<'_>,
    scratch: &Scratch,
) {
    match &w.data {
        WeightData::Bf16(forward) | WeightData::Pair([forward, _]) => {
            let dy = bf16(dy);
            let (out, rows, cols) = c_out(&mut dx);
            assert_eq!((dy.rows, dy.cols, w.inner), (rows, w.out, cols), "linear_backward: shapes do not fit");
            with(&scratch.panels, |panels| {
                for first in (0..w.out).step_by(BACKWARD_ROWS) {
                    let part = first..(first + BACKWARD_ROWS).min(w.out);
                    transpose_panels(forward, part.clone(), panels);
                    let dy = dy.part(0, dy.rows, part.start, part.len());
                    let accumulate = accumulate || first > 0;
                    // SAFETY: dy and dx are views of these sizes; dx is borrowed mutably.
                    with_a_words(dy, scratch, |a| unsafe { gemm_bf16(1.0, a, panels, accumulate, out, true) });
                }
            });
        }
        WeightData::Fixed(weight) => {
            let dy = bf16(dy);
            let (out, rows, cols) = c_out(&mut dx);
            assert_eq!((dy.rows, dy.cols, w.inner), (rows, w.out, cols), "linear_backward: shapes do not fit");
            with(&scratch.fixed, |panels| {
                for (index, first) in (0..w.out).step_by(BACKWARD_ROWS).enumerate() {
                    let part = first..(first + BACKWARD_ROWS).min(w.out);
                    weight.transpose(part.clone(), panels);
                    let dy = dy.part(0, dy.rows, part.start, part.len());
                    let (factors, norms) = weight.backward_part(index);
                    with(&scratch.words, |words| {
                        let dy = fixed::quantise(dy, Some(factors), norms, words);
                        // SAFETY: dx is a view of this size, borrowed mutably.
                        unsafe { fixed::gemm(&dy, panels, None, accumulate || first > 0, out) }
                    });
                }
            });
        }
        WeightData::F32(data) => {
            let AnyViewMut::F32(dx) = dx else { panic!("float32 weights need a float32 result") };
            let w = View { data, rows: w.out, cols: w.inner, stride: w.inner };
            matmul_f32(Form::Nn, 1.0, f32(dy), w, accumulate, dx, true);
        }
    }
}
