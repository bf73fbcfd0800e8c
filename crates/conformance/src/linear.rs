//! Matrix products, frozen weights and embeddings.
//!
//! Weights lie on NF4's grid: levels times an absmax, at least one level ±1 in each block of 64. Quantising such values gives the same codes
//! back and dequantising the same values, so a backend that quantises must agree with one that does not.

use std::ops::Range;

use cashtag_backend::{Backend, Dtype, RawWeight, Result, WeightSource};

use crate::harness::{Harness, Kind, Lie};

const LEVELS: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// What a source offers beside rows of f32.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Offer {
    Rows,
    F32,
    Nf4,
}

pub(crate) struct Source {
    rows: usize,
    cols: usize,
    values: Vec<f32>,
    bytes: Vec<u8>,
    codes: Vec<u8>,
    absmax: Vec<f32>,
    offer: Offer,
}

impl WeightSource for Source {
    fn name(&self) -> &str {
        "conformance.weight"
    }
    fn rows(&self) -> usize {
        self.rows
    }
    fn cols(&self) -> usize {
        self.cols
    }
    fn read_rows(&self, rows: Range<usize>, out: &mut [f32]) -> Result<()> {
        out.copy_from_slice(&self.values[rows.start * self.cols..rows.end * self.cols]);
        Ok(())
    }
    fn raw(&self) -> Option<RawWeight<'_>> {
        match self.offer {
            Offer::Rows => None,
            Offer::F32 => Some(RawWeight::F32(&self.bytes)),
            Offer::Nf4 => Some(RawWeight::Nf4 { codes: &self.codes, absmax: &self.absmax }),
        }
    }
}

pub(crate) fn source<A: Backend, B: Backend>(
    h: &mut Harness<'_, A, B>,
    rows: usize,
    cols: usize,
    offer: Offer,
) -> Source {
    let n = rows * cols;
    let mut codes: Vec<u8> = (0..n).map(|_| h.random.up_to(15) as u8).collect();
    for block in codes.chunks_mut(64) {
        let at = h.random.up_to(block.len() - 1);
        block[at] = h.random.pick(&[0, 15]);
    }
    // Powers of two times eighths: exact in every dtype.
    let absmax: Vec<f32> = (0..n.div_ceil(64)).map(|_| h.random.between(8, 15) as f32 / 128.0).collect();
    let values: Vec<f32> =
        codes.iter().enumerate().map(|(i, &c)| h.round(LEVELS[c as usize] * absmax[i / 64])).collect();
    Source {
        rows,
        cols,
        bytes: values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        values,
        codes: codes.chunks(2).map(|c| c[0] << 4 | c.get(1).unwrap_or(&0)).collect(),
        absmax,
        offer,
    }
}

pub(crate) fn run<A: Backend, B: Backend>(h: &mut Harness<'_, A, B>) -> Result<()> {
    let allowed = h.tolerance.product;
    for lie in Lie::ALL {
        for kind in [Kind::T, Kind::F32] {
            // The contract of T = f32 has one kind only.
            let (m, n, k) = (h.random.between(1, 150), h.random.between(1, 200), h.random.between(1, 300));
            let (m, n, k) =
                if h.random.up_to(2) == 0 { (m, n, k) } else { (m, n.next_multiple_of(8), k.next_multiple_of(16)) };
            for accumulate in [false, true] {
                let beta = if accumulate { 1.0 } else { 0.0 };
                let what = format!("k {k}, {kind:?}, beta {beta}, {lie:?}");
                let result = |h: &mut Harness<'_, A, B>| {
                    if accumulate { h.input(kind, m, n, lie, 1.0) } else { h.output(kind, m, n, lie) }
                };
                let a = h.input(Kind::T, m, k, lie, 1.0)?;
                let b = h.input(Kind::T, n, k, lie, 1.0)?;
                let mut c = result(h)?;
                h.a.matmul_nt(0.5, a.in_a(), b.in_a(), beta, c.out_a())?;
                h.b.matmul_nt(0.5, a.in_b(), b.in_b(), beta, c.out_b())?;
                h.check("matmul_nt", &what, &c, allowed)?;

                let b = h.input(Kind::T, k, n, lie, 1.0)?;
                let mut c = result(h)?;
                h.a.matmul_nn(0.25, a.in_a(), b.in_a(), beta, c.out_a())?;
                h.b.matmul_nn(0.25, a.in_b(), b.in_b(), beta, c.out_b())?;
                h.check("matmul_nn", &what, &c, allowed)?;

                if kind == Kind::F32 {
                    let a = h.input(Kind::T, k, m, lie, 1.0)?;
                    let mut c = result(h)?;
                    h.a.matmul_tn(2.0, a.in_a(), b.in_a(), beta, c.out_a())?;
                    h.b.matmul_tn(2.0, a.in_b(), b.in_b(), beta, c.out_b())?;
                    h.check("matmul_tn", &what, &c, allowed)?;
                }
            }
        }
    }

    for offer in [Offer::Rows, Offer::F32, Offer::Nf4] {
        let (inner, sources) = stack(h, offer, &[64, 192, 576, 1024]);
        let list: Vec<&dyn WeightSource> = sources.iter().map(|s| s as &dyn WeightSource).collect();
        weights(h, &list, inner, list.iter().map(|s| s.rows()).sum(), &format!("{offer:?}"))?;
    }
    // Blocks that straddle rows, and a last block that is not full.
    let odd = source(h, 37, 90, Offer::Rows);
    weights(h, &[&odd], 90, 37, "odd columns")?;
    Ok(())
}

/// One to three matrices with as many columns, one of `inners`.
pub(crate) fn stack<A: Backend, B: Backend>(
    h: &mut Harness<'_, A, B>,
    offer: Offer,
    inners: &[usize],
) -> (usize, Vec<Source>) {
    let inner = h.random.pick(inners);
    let outs: Vec<usize> = (0..h.random.between(1, 3)).map(|_| h.random.between(1, 120)).collect();
    (inner, outs.iter().map(|&o| source(h, o, inner, offer)).collect())
}

fn weights<A: Backend, B: Backend>(
    h: &mut Harness<'_, A, B>,
    sources: &[&dyn WeightSource],
    inner: usize,
    out: usize,
    what: &str,
) -> Result<()> {
    let allowed = h.tolerance.product;
    let n = h.random.between(1, 70);
    let (wa, wb) = (h.a.weight(sources)?, h.b.weight(sources)?);
    if h.b.weight_shape(&wb) != (out, inner) {
        h.fail(format!("weight_shape: {:?}, expected {:?}", h.b.weight_shape(&wb), (out, inner)));
    }
    for lie in Lie::ALL {
        for kind in [Kind::T, Kind::F32] {
            for accumulate in [false, true] {
                let what = format!("{what}, in {inner}, {kind:?}, accumulate {accumulate}, {lie:?}");
                let result = |h: &mut Harness<'_, A, B>, cols| {
                    if accumulate { h.input(kind, n, cols, lie, 1.0) } else { h.output(kind, n, cols, lie) }
                };
                let x = h.input(Kind::T, n, inner, lie, 1.0)?;
                let mut y = result(h, out)?;
                h.a.linear(x.in_a(), &wa, accumulate, y.out_a())?;
                h.b.linear(x.in_b(), &wb, accumulate, y.out_b())?;
                h.check("linear", &what, &y, allowed)?;
                let dy = h.input(Kind::T, n, out, lie, 1.0)?;
                let mut dx = result(h, inner)?;
                h.a.linear_backward(dy.in_a(), &wa, accumulate, dx.out_a())?;
                h.b.linear_backward(dy.in_b(), &wb, accumulate, dx.out_b())?;
                h.check("linear_backward", &what, &dx, allowed)?;
            }
        }
        let (ea, eb) = (h.a.embedding(sources[0])?, h.b.embedding(sources[0])?);
        let list: Vec<u32> = (0..n).map(|_| h.random.up_to(sources[0].rows() - 1) as u32).collect();
        let ids = h.words(&list)?;
        let mut x = h.output(Kind::F32, n, inner, lie)?;
        h.a.embed(&ea, &ids.0, x.out_a())?;
        h.b.embed(&eb, &ids.1, x.out_b())?;
        h.check("embed", what, &x, 0.0)?;
        let mut x = h.output(Kind::F32, n, inner, lie)?;
        h.a.embed(&wa, &ids.0, x.out_a())?;
        h.b.embed(&wb, &ids.1, x.out_b())?;
        // A frozen weight may be held in fixed point; an embedding may not.
        let exact = h.a.compute_dtype() == Dtype::F32 && h.b.compute_dtype() == Dtype::F32;
        h.check("embed, of a weight", what, &x, if exact { 0.0 } else { 5e-4 })?;
    }
    Ok(())
}
