//! Every backward against central differences, in f64, of a scalar forward that is written here as plainly as possible.
//! Shapes are random: prefix 0 and more, ragged lengths, one-token examples, grouped heads.

use cashtag_backend::{
    AttentionLayout, Backend, CrossEntropy, Dropout, Dtype, Mat, MatMut, Rope, WeightSource, philox,
};
use cashtag_backend_cpu::{CpuBackend, CpuBuffer, Precision};
use proptest::prelude::*;

pub(crate) fn backend() -> CpuBackend {
    CpuBackend::new(Precision::F32, 2).unwrap()
}

/// Reproducible values in (-1, 1), exactly representable in f32.
pub(crate) fn values(n: usize, seed: u32) -> Vec<f64> {
    (0..n as u32)
        .map(|i| f64::from((philox::philox4x32([i, 0, 0, 0], [seed, 9])[0] >> 9) as f32 / 4_194_304.0 - 1.0))
        .collect()
}

pub(crate) fn upload(b: &CpuBackend, v: &[f64]) -> CpuBuffer {
    let v: Vec<f32> = v.iter().map(|&x| x as f32).collect();
    let mut buffer = b.zeros(Dtype::F32, v.len()).unwrap();
    b.upload(&v, &mut buffer, 0).unwrap();
    buffer
}

pub(crate) fn download(b: &CpuBackend, buffer: &CpuBuffer) -> Vec<f64> {
    let mut out = vec![0f32; b.len(buffer)];
    b.download(buffer, 0, &mut out).unwrap();
    out.into_iter().map(f64::from).collect()
}

/// Central differences of Σ cotangent·f(x).
pub(crate) fn differences(x: &[f64], cotangent: &[f64], f: impl Fn(&[f64]) -> Vec<f64>) -> Vec<f64> {
    let scalar = |x: &[f64]| -> f64 { f(x).iter().zip(cotangent).map(|(y, c)| y * c).sum() };
    let mut x = x.to_vec();
    (0..x.len())
        .map(|i| {
            let (h, old) = (1e-5, x[i]);
            x[i] = old + h;
            let up = scalar(&x);
            x[i] = old - h;
            let down = scalar(&x);
            x[i] = old;
            (up - down) / (2.0 * h)
        })
        .collect()
}

pub(crate) fn assert_close(found: &[f64], expected: &[f64], what: &str) {
    assert_eq!(found.len(), expected.len());
    let norm = expected.iter().map(|e| e * e).sum::<f64>().sqrt();
    let error = found.iter().zip(expected).map(|(f, e)| (f - e) * (f - e)).sum::<f64>().sqrt();
    assert!(error <= 2e-5 * (norm + 1e-3), "{what}: relative error {:e}", error / norm);
}

// --- scalar forwards -------------------------------------------------------------------------------------------------

fn rms_norm(x: &[f64], w: &[f64], eps: f64) -> Vec<f64> {
    x.chunks(w.len())
        .flat_map(|row| {
            let inv = 1.0 / (row.iter().map(|v| v * v).sum::<f64>() / w.len() as f64 + eps).sqrt();
            row.iter().zip(w).map(move |(v, w)| v * inv * w).collect::<Vec<_>>()
        })
        .collect()
}

fn swiglu(x: &[f64], f: usize) -> Vec<f64> {
    x.chunks(2 * f)
        .flat_map(|row| (0..f).map(|i| row[i] / (1.0 + (-row[i]).exp()) * row[f + i]).collect::<Vec<_>>())
        .collect()
}

/// q, k, v side by side, `[n, (heads + 2·kv_heads)·dim]`.
fn attention(qkv: &[f64], layout: &AttentionLayout, heads: usize, kv_heads: usize, dim: usize) -> Vec<f64> {
    let width = (heads + 2 * kv_heads) * dim;
    let mut out = vec![0.0; layout.q_rows() * heads * dim];
    for s in layout.segments() {
        for t in 0..s.len {
            let mut keys: Vec<usize> = Vec::new();
            s.context.iter().for_each(|c| keys.extend(c.start..c.start + c.len));
            keys.extend(s.kv_start..=s.kv_start + t);
            let row = s.q_start + t;
            for h in 0..heads {
                let kv = h / (heads / kv_heads);
                let q = &qkv[row * width + h * dim..][..dim];
                let k = |key: usize| &qkv[key * width + (heads + kv) * dim..][..dim];
                let v = |key: usize| &qkv[key * width + (heads + kv_heads + kv) * dim..][..dim];
                let scores: Vec<f64> = keys
                    .iter()
                    .map(|&key| (q.iter().zip(k(key)).map(|(a, b)| a * b).sum::<f64>() / (dim as f64).sqrt()).exp())
                    .collect();
                let sum: f64 = scores.iter().sum();
                for (&key, p) in keys.iter().zip(&scores) {
                    for (o, v) in out[(row * heads + h) * dim..][..dim].iter_mut().zip(v(key)) {
                        *o += p / sum * v;
                    }
                }
            }
        }
    }
    out
}

fn cross_entropy(logits: &[f64], vocab: usize, targets: &[u32], weights: &[f64], smoothing: f64) -> Vec<f64> {
    logits
        .chunks(vocab)
        .zip(targets)
        .zip(weights)
        .map(|((row, &t), w)| {
            let lse = row.iter().map(|x| x.exp()).sum::<f64>().ln();
            let mean = row.iter().map(|x| lse - x).sum::<f64>() / vocab as f64;
            w * ((1.0 - smoothing) * (lse - row[t as usize]) + smoothing * mean)
        })
        .collect()
}

// --- the tests -------------------------------------------------------------------------------------------------------

fn packed_layout() -> impl Strategy<Value = AttentionLayout> {
    (0usize..6, prop::collection::vec((0usize..7, 1usize..6), 0..5)).prop_filter_map("empty", |(prefix, examples)| {
        if prefix == 0 && examples.is_empty() {
            return None;
        }
        let shared: Vec<usize> = examples.iter().map(|&(s, _)| s.min(prefix)).collect();
        let lens: Vec<usize> = examples.iter().map(|&(_, l)| l).collect();
        Some(AttentionLayout::packed(prefix, &shared, &lens))
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn rms_norm_backward(rows in 1usize..5, d in 1usize..40, seed in 0u32..1000) {
        let b = backend();
        let (x, w, dy) = (values(rows * d, seed), values(d, seed + 1), values(rows * d, seed + 2));
        let start = values(rows * d, seed + 3);
        let (xb, wb, dyb) = (upload(&b, &x), upload(&b, &w), upload(&b, &dy));
        let mut y = b.zeros(Dtype::F32, rows * d).unwrap();
        let mut inv = b.zeros(Dtype::F32, rows).unwrap();
        b.rms_norm(Mat::new(&xb, rows, d), &wb, 1e-5, MatMut::new(&mut y, rows, d), &mut inv).unwrap();
        assert_close(&download(&b, &y), &rms_norm(&x, &w, 1e-5), "forward");
        let mut dx = upload(&b, &start);
        b.rms_norm_backward(Mat::new(&dyb, rows, d), Mat::new(&xb, rows, d), &wb, &inv, MatMut::new(&mut dx, rows, d)).unwrap();
        let mut expected = differences(&x, &dy, |x| rms_norm(x, &w, 1e-5));
        expected.iter_mut().zip(&start).for_each(|(e, s)| *e += s);
        assert_close(&download(&b, &dx), &expected, "backward");
    }

    #[test]
    fn swiglu_backward(rows in 1usize..5, f in 1usize..40, seed in 0u32..1000) {
        let b = backend();
        let x: Vec<f64> = values(rows * 2 * f, seed).iter().map(|v| v * 8.0).collect();
        let dh = values(rows * f, seed + 1);
        let (xb, dhb) = (upload(&b, &x), upload(&b, &dh));
        let mut h = b.zeros(Dtype::F32, rows * f).unwrap();
        b.swiglu(Mat::new(&xb, rows, 2 * f), MatMut::new(&mut h, rows, f)).unwrap();
        assert_close(&download(&b, &h), &swiglu(&x, f), "forward");
        let mut d = b.zeros(Dtype::F32, rows * 2 * f).unwrap();
        b.swiglu_backward(Mat::new(&dhb, rows, f), Mat::new(&xb, rows, 2 * f), MatMut::new(&mut d, rows, 2 * f)).unwrap();
        assert_close(&download(&b, &d), &differences(&x, &dh, |x| swiglu(x, f)), "backward");
    }

    #[test]
    fn attention_backward(layout in packed_layout(), kv_heads in 1usize..3, group in 1usize..4, seed in 0u32..1000) {
        let b = backend();
        let (dim, heads) = (8, kv_heads * group);
        let (n, width) = (layout.q_rows(), (heads + 2 * kv_heads) * dim);
        let qkv = values(n * width, seed);
        let d_o = values(n * heads * dim, seed + 1);
        let (qb, dob) = (upload(&b, &qkv), upload(&b, &d_o));
        let mut o = upload(&b, &vec![f64::NAN; n * heads * dim]);
        let mut lse = b.zeros(Dtype::F32, n * heads).unwrap();
        let all = Mat::new(&qb, n, width);
        let (q, k, v) = (all.columns(0, heads * dim), all.columns(heads * dim, kv_heads * dim), all.columns((heads + kv_heads) * dim, kv_heads * dim));
        b.attention(&layout, dim, q, k, v, MatMut::new(&mut o, n, heads * dim), &mut lse).unwrap();
        assert_close(&download(&b, &o), &attention(&qkv, &layout, heads, kv_heads, dim), "forward");
        let mut d = upload(&b, &vec![f64::NAN; n * width]);
        b.attention_backward(&layout, dim, kv_heads, all, Mat::new(&o, n, heads * dim), &lse, Mat::new(&dob, n, heads * dim), MatMut::new(&mut d, n, width)).unwrap();
        let expected = differences(&qkv, &d_o, |x| attention(x, &layout, heads, kv_heads, dim));
        assert_close(&download(&b, &d), &expected, "backward");
    }

    #[test]
    fn rope_is_its_own_inverse_and_its_backward(rows in 1usize..6, heads in 1usize..4, seed in 0u32..1000) {
        let b = backend();
        let dim = 6;
        let positions: Vec<u32> = (0..rows as u32).map(|i| (i * 7 + seed) % 11).collect();
        let angle = |position: u32, i: usize| f64::from(position) * 10f64.powi(-(i as i32));
        let table = |f: fn(f64) -> f64| (0..11).flat_map(|p| (0..dim / 2).map(move |i| f(angle(p, i)))).collect::<Vec<f64>>();
        let (cos, sin) = (upload(&b, &table(f64::cos)), upload(&b, &table(f64::sin)));
        let mut ids = b.zeros(Dtype::U32, rows).unwrap();
        b.upload_u32(&positions, &mut ids).unwrap();
        let rope = Rope { head_dim: dim, cos: &cos, sin: &sin, positions: &ids };
        let forward = |x: &[f64]| -> Vec<f64> {
            let mut y = x.to_vec();
            for (row, y) in y.chunks_mut(heads * dim).enumerate() {
                for head in y.chunks_mut(dim) {
                    for i in 0..dim / 2 {
                        let (s, c) = angle(positions[row], i).sin_cos();
                        let (a, b) = (head[i], head[i + dim / 2]);
                        (head[i], head[i + dim / 2]) = (a * c - b * s, b * c + a * s);
                    }
                }
            }
            y
        };
        let (x, dy) = (values(rows * heads * dim, seed), values(rows * heads * dim, seed + 1));
        let mut y = upload(&b, &x);
        b.rope(rope, false, MatMut::new(&mut y, rows, heads * dim)).unwrap();
        assert_close(&download(&b, &y), &forward(&x), "forward");
        let mut dx = upload(&b, &dy);
        b.rope(rope, true, MatMut::new(&mut dx, rows, heads * dim)).unwrap();
        assert_close(&download(&b, &dx), &differences(&x, &dy, forward), "backward");
    }

    #[test]
    fn cross_entropy_gradient(rows in 1usize..5, vocab in 2usize..60, smoothing in prop::sample::select(vec![0.0, 0.1]), seed in 0u32..1000) {
        let b = backend();
        let logits: Vec<f64> = values(rows * vocab, seed).iter().map(|v| v * 4.0).collect();
        let targets: Vec<u32> = (0..rows as u32).map(|i| (i * 31 + seed) % vocab as u32).collect();
        let weights: Vec<f64> = (0..rows).map(|i| 0.5 + i as f64).collect();
        let (lb, wb) = (upload(&b, &logits), upload(&b, &weights));
        let mut tb = b.zeros(Dtype::U32, rows).unwrap();
        b.upload_u32(&targets, &mut tb).unwrap();
        let mut loss = b.zeros(Dtype::F32, rows).unwrap();
        let mut d = b.zeros(Dtype::F32, rows * vocab).unwrap();
        let arguments = CrossEntropy { targets: &tb, weights: &wb, label_smoothing: smoothing as f32, gradient_scale: 2.0 };
        b.cross_entropy(Mat::new(&lb, rows, vocab), arguments, &mut loss, Some(MatMut::new(&mut d, rows, vocab))).unwrap();
        assert_close(&download(&b, &loss), &cross_entropy(&logits, vocab, &targets, &weights, smoothing), "forward");
        let expected = differences(&logits, &vec![2.0; rows], |x| cross_entropy(x, vocab, &targets, &weights, smoothing));
        assert_close(&download(&b, &d), &expected, "backward");
    }

    #[test]
    fn linear_backward(rows in 1usize..5, inner in 1usize..20, out in 1usize..20, seed in 0u32..1000) {
        let b = backend();
        let (x, w, dy) = (values(rows * inner, seed), values(out * inner, seed + 1), values(rows * out, seed + 2));
        let weight = b.weight(&[&Matrix { rows: out, cols: inner, data: w.clone() }]).unwrap();
        let forward = |x: &[f64]| -> Vec<f64> {
            x.chunks(inner).flat_map(|x| w.chunks(inner).map(|w| x.iter().zip(w).map(|(a, b)| a * b).sum()).collect::<Vec<f64>>()).collect()
        };
        let (xb, dyb) = (upload(&b, &x), upload(&b, &dy));
        let mut y = b.zeros(Dtype::F32, rows * out).unwrap();
        b.linear(Mat::new(&xb, rows, inner), &weight, false, MatMut::new(&mut y, rows, out)).unwrap();
        assert_close(&download(&b, &y), &forward(&x), "forward");
        let mut dx = b.zeros(Dtype::F32, rows * inner).unwrap();
        b.linear_backward(Mat::new(&dyb, rows, out), &weight, false, MatMut::new(&mut dx, rows, inner)).unwrap();
        assert_close(&download(&b, &dx), &differences(&x, &dy, forward), "backward");
    }

    #[test]
    fn dropout_draws_the_documented_mask(rows in 1usize..4, cols in 1usize..300, seed in 0u64..1000) {
        let d = Dropout { p: 0.3, seed, step: 5, site: 9 };
        let x = values(rows * cols, 1);
        for precision in [Precision::F32, Precision::Bf16] {
            let b = CpuBackend::new(precision, 2).unwrap();
            let mut xb = b.zeros(b.compute_dtype(), rows * cols).unwrap();
            b.upload(&x.iter().map(|&v| v as f32).collect::<Vec<_>>(), &mut xb, 0).unwrap();
            let mut y = b.zeros(b.compute_dtype(), rows * cols).unwrap();
            b.dropout(Mat::new(&xb, rows, cols), d, false, MatMut::new(&mut y, rows, cols)).unwrap();
            let (x, y) = (download(&b, &xb), download(&b, &y));
            for i in 0..rows * cols {
                let bits = philox::dropout_bits(seed, 5, 9, (i / cols) as u32, (i % cols) as u32);
                let expected = if bits >= philox::dropout_threshold(0.3) { x[i] / 0.7 } else { 0.0 };
                prop_assert!((y[i] - expected).abs() <= 0.005 * expected.abs() + 1e-7, "{} for {}", y[i], expected);
            }
        }
    }
}

struct Matrix {
    rows: usize,
    cols: usize,
    data: Vec<f64>,
}

impl WeightSource for Matrix {
    fn name(&self) -> &str {
        "test"
    }
    fn rows(&self) -> usize {
        self.rows
    }
    fn cols(&self) -> usize {
        self.cols
    }
    fn read_rows(&self, rows: std::ops::Range<usize>, out: &mut [f32]) -> cashtag_backend::Result<()> {
        let part = &self.data[rows.start * self.cols..rows.end * self.cols];
        out.iter_mut().zip(part).for_each(|(o, &v)| *o = v as f32);
        Ok(())
    }
}
