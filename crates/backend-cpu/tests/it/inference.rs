//! What a bf16 pass without a backward does in more than bf16: heads, and everything that adds up before it is rounded.

use cashtag_backend::{AttentionLayout, Backend, Dtype, Mat, MatMut};
use cashtag_backend_cpu::{CpuBackend, CpuBuffer, Precision};

use crate::dora::Source;
use crate::finite_differences::values;

fn backend() -> CpuBackend {
    CpuBackend::new(Precision::Bf16, 2).unwrap()
}

fn upload(b: &CpuBackend, dtype: Dtype, v: &[f64]) -> CpuBuffer {
    let v: Vec<f32> = v.iter().map(|x| *x as f32).collect();
    let mut buffer = b.zeros(dtype, v.len()).unwrap();
    b.upload(&v, &mut buffer, 0).unwrap();
    buffer
}

fn download(b: &CpuBackend, buffer: &CpuBuffer) -> Vec<f64> {
    let mut out = vec![0f32; b.len(buffer)];
    b.download(buffer, 0, &mut out).unwrap();
    out.into_iter().map(f64::from).collect()
}

/// Largest difference, relative to the norms of the row and the column.
fn worst(found: &[f64], x: &[f64], w: &[f64], inner: usize) -> f64 {
    let norm = |v: &[f64]| v.iter().map(|x| x * x).sum::<f64>().sqrt();
    let out = w.len() / inner;
    let mut worst = 0f64;
    for (i, x) in x.chunks(inner).enumerate() {
        for (j, w) in w.chunks(inner).enumerate() {
            let expected: f64 = x.iter().zip(w).map(|(x, w)| x * w).sum();
            worst = worst.max((found[i * out + j] - expected).abs() / (norm(x) * norm(w)));
        }
    }
    worst
}

#[test]
fn a_head_multiplies_f32_rows_by_sixteen_bits_of_its_weights() {
    let b = backend();
    for (rows, out, inner) in [(1, 1, 1), (7, 75, 70), (13, 64, 129), (150, 33, 96)] {
        let (x, w) = (values(rows * inner, 1), values(out * inner, 2));
        let weight = b.embedding(&Source(w.iter().map(|v| *v as f32).collect(), inner)).unwrap();
        let product = |dtype| {
            let x = upload(&b, dtype, &x);
            let mut y = upload(&b, Dtype::F32, &vec![1.0; rows * out]);
            b.linear(Mat::new(&x, rows, inner), &weight, true, MatMut::new(&mut y, rows, out)).unwrap();
            let y: Vec<f64> = download(&b, &y).iter().map(|y| y - 1.0).collect();
            worst(&y, &download(&b, &x), &w, inner)
        };
        // 2⁻¹⁷ for each operand, and f32's own rounding of sums.
        assert!(product(Dtype::F32) < 2e-5, "{rows} × {out} × {inner}: {}", product(Dtype::F32));
        // bf16 alone leaves more than ten times as much: the test can tell them apart.
        assert!(inner < 64 || product(Dtype::Bf16) > 2e-4, "{rows} × {out} × {inner}: {}", product(Dtype::Bf16));
    }
}

/// Rounding what goes in by hand gives the bits that rounding inside gives.
#[test]
fn attention_takes_unrounded_queries_keys_and_values() {
    let b = backend();
    let (prefix, dim, heads, kv_heads) = (5, 16, 4, 2);
    let layout = AttentionLayout::packed(prefix, &[5, 3], &[9, 20]);
    let n = layout.q_rows();
    let (q, k, v) = (values(n * heads * dim, 4), values(n * kv_heads * dim, 5), values(n * kv_heads * dim, 6));
    let attend = |[tq, tk, tv]: [Dtype; 3]| {
        let (q, k, v) = (upload(&b, tq, &q), upload(&b, tk, &k), upload(&b, tv, &v));
        let mut o = b.zeros(Dtype::Bf16, n * heads * dim).unwrap();
        let mut lse = b.zeros(Dtype::F32, n * heads).unwrap();
        let kv = |x| Mat::new(x, n, kv_heads * dim);
        let o_out = MatMut::new(&mut o, n, heads * dim);
        b.attention(&layout, dim, Mat::new(&q, n, heads * dim), kv(&k), kv(&v), o_out, &mut lse).unwrap();
        (download(&b, &o), download(&b, &lse))
    };
    let rounded = attend([Dtype::Bf16; 3]);
    assert_eq!(attend([Dtype::F32, Dtype::Bf16, Dtype::Bf16]), rounded);
    assert_eq!(attend([Dtype::F32; 3]), rounded);
}

#[test]
fn swiglu_reads_what_was_not_rounded() {
    let b = backend();
    let (n, f) = (6, 37);
    let gate_up: Vec<f64> = values(n * 2 * f, 7).iter().map(|x| 4.0 * x).collect();
    let gate_up_buffer = upload(&b, Dtype::F32, &gate_up);
    let mut h = b.zeros(Dtype::Bf16, n * f).unwrap();
    b.swiglu(Mat::new(&gate_up_buffer, n, 2 * f), MatMut::new(&mut h, n, f)).unwrap();
    for (i, found) in download(&b, &h).iter().enumerate() {
        let row = &gate_up[i / f * 2 * f..];
        let (g, u) = (row[i % f], row[f + i % f]);
        let expected = g / (1.0 + (-g).exp()) * u;
        // One rounding to bf16; that of gate and up would be as much again, each.
        assert!((found - expected).abs() <= expected.abs() / 256.0 * 1.001, "{found} {expected}");
    }
}

#[test]
fn log_probabilities_of_several_classes_of_a_row() {
    let b = backend();
    let (n, vocab) = (5, 1000);
    let logits: Vec<f64> = values(n * vocab, 8).iter().map(|x| 9.0 * x).collect();
    let buffer = upload(&b, Dtype::F32, &logits);
    let targets = [vec![0, 999, 17], vec![], vec![3], vec![5, 5], vec![998, 1, 2, 3]];
    let found = b.log_probabilities(Mat::new(&buffer, n, vocab), &targets).unwrap();
    assert_eq!(found.iter().map(Vec::len).collect::<Vec<_>>(), [3, 0, 1, 2, 4]);
    for ((row, targets), found) in logits.chunks(vocab).zip(&targets).zip(&found) {
        let lse = row.iter().map(|x| x.exp()).sum::<f64>().ln();
        for (&target, &found) in targets.iter().zip(found) {
            assert!((f64::from(found) - (row[target as usize] - lse)).abs() < 1e-5);
        }
    }
}
