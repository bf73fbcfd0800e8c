use cashtag_backend_cpu::{CpuBackend, Precision};

use super::*;
use crate::export::quantize::quantize;

fn backend() -> CpuBackend {
    CpuBackend::new(Precision::F32, 2).unwrap()
}

/// Reproducible noise in [-1, 1].
fn noise(seed: u64, len: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

/// a·bᵀ for row-major a `[m, k]` and b `[n, k]`.
fn product_nt(a: &[f32], b: &[f32], k: usize) -> Vec<f32> {
    a.chunks(k).flat_map(|a| b.chunks(k).map(move |b| dot(a, b) as f32)).collect()
}

fn transposed(a: &[f32], cols: usize) -> Vec<f32> {
    (0..cols).flat_map(|c| a.chunks(cols).map(move |row| row[c])).collect()
}

/// xᵀx of inputs `[rows, n]`.
fn gram(x: &[f32], n: usize) -> Vec<f32> {
    let t = transposed(x, n);
    product_nt(&t, &t, x.len() / n)
}

fn zeros(backend: &CpuBackend, len: usize) -> cashtag_backend_cpu::CpuBuffer {
    backend.zeros(Dtype::F32, len).unwrap()
}

fn values(block_type: BlockType, bytes: &[u8], len: usize) -> Vec<f32> {
    let mut out = vec![0.0; len];
    block_type.dequantize(bytes, &mut out);
    out
}

fn plain(block_type: BlockType, weights: &[f32]) -> Vec<f32> {
    let mut bytes = Vec::new();
    quantize(block_type, weights, &mut bytes);
    values(block_type, &bytes, weights.len())
}

fn distance(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum()
}

/// Inputs that lie near a space of 12 dimensions, as hidden states do near one of few.
fn correlated(seed: u64, rows: usize, n: usize) -> Vec<f32> {
    let (few, directions) = (noise(seed, rows * 12), noise(77, n * 12));
    let mut x = product_nt(&few, &directions, 12);
    x.iter_mut().zip(noise(seed + 1, rows * n)).for_each(|(x, e)| *x += 0.1 * e);
    x
}

#[test]
fn a_known_factor() {
    let mut a = [4.0, 12.0, -16.0, 12.0, 37.0, -43.0, -16.0, -43.0, 98.0];
    assert!(cholesky(&mut a, 3));
    assert_eq!(a, [2.0, 0.0, 0.0, 6.0, 1.0, 0.0, -8.0, 5.0, 3.0]);
    assert!(!cholesky(&mut [1.0, 2.0, 2.0, 1.0], 2));
    assert!(!cholesky(&mut [f32::NAN; 4], 2));
}

/// R·Rᵀ is the damped matrix again, over several panels.
#[test]
fn the_factor_multiplies_back() {
    let n = 160;
    let h = gram(&correlated(3, 400, n), n);
    let factor = Factor::new(&backend(), n, h.clone()).unwrap();
    let back = product_nt(&factor.host, &factor.host, n);
    let mean = (0..n).map(|i| f64::from(h[i * n + i])).sum::<f64>() / n as f64;
    for i in 0..n {
        assert!(factor.host[i * n..i * n + i].iter().all(|&r| r == 0.0), "row {i} has values below the diagonal");
        for j in 0..n {
            let expected = f64::from(h[i * n + j]) + if i == j { DAMPING * mean } else { 0.0 };
            let found = f64::from(back[i * n + j]);
            assert!((found - expected).abs() < 1e-4 * mean, "{i}, {j}: {found} for {expected}");
        }
    }
}

/// Where inputs have nothing to do with each other, every weight goes to the nearest value of its block's scale.
#[test]
fn independent_inputs_round_to_nearest() {
    let (n, outputs) = (96, 21);
    let mut identity = vec![0f32; n * n];
    (0..n).for_each(|i| identity[i * n + i] = 3.0);
    let backend = backend();
    let factor = Factor::new(&backend, n, identity).unwrap();
    let weights = noise(5, n * outputs);
    for (block_type, lowest, highest) in [(BlockType::Q4_0, -8.0, 7.0), (BlockType::Q8_0, -127.0, 127.0)] {
        let bytes = round(&backend, block_type, &weights, &factor, zeros(&backend, n * outputs)).unwrap();
        let found = values(block_type, &bytes, weights.len());
        for ((block, w), q) in bytes.chunks(block_type.bytes()).zip(weights.chunks(BLOCK)).zip(found.chunks(BLOCK)) {
            let scale = f16::from_le_bytes([block[0], block[1]]).to_f32();
            for (w, q) in w.iter().zip(q) {
                let nearest = (w / scale).clamp(lowest, highest).round_ties_even() * scale;
                assert!((nearest - q).abs() <= 1e-6 * scale.abs(), "{w} became {q}, not {nearest}");
            }
        }
        // The choice of scales can only help.
        assert!(distance(&found, &weights) <= 1.001 * distance(&plain(block_type, &weights), &weights));
    }
}

/// With inputs as models have them the outputs are several times closer than with plain rounding, on other inputs too.
#[test]
fn correlated_inputs_make_up_for_errors() {
    let (n, outputs) = (128, 40);
    let backend = backend();
    let factor = Factor::new(&backend, n, gram(&correlated(11, 300, n), n)).unwrap();
    let (weights, others) = (noise(2, n * outputs), correlated(13, 200, n));
    let wanted = product_nt(&others, &weights, n);
    let of = |q: &[f32]| distance(&product_nt(&others, q, n), &wanted);
    for block_type in [BlockType::Q4_0, BlockType::Q8_0] {
        let bytes = round(&backend, block_type, &weights, &factor, zeros(&backend, n * outputs)).unwrap();
        let (found, before) = (of(&values(block_type, &bytes, weights.len())), of(&plain(block_type, &weights)));
        println!("{}: squared error {before:.3e}, now {found:.3e}", block_type.name());
        assert!(found < before / 4.0, "{}: {found} for {before}", block_type.name());
    }
}

/// Inputs that come from a rounded model: the weights are to give the outputs of the exact one.
#[test]
fn inputs_that_are_off_are_made_up_for() {
    let (n, outputs, rows) = (64, 24, 400);
    let backend = backend();
    let exact = correlated(21, rows, n);
    // Off in a way that depends on the inputs: some of them count a tenth less.
    let off: Vec<f32> = exact.iter().enumerate().map(|(i, x)| if i % n < 20 { 0.9 * x } else { *x }).collect();
    let weights = noise(4, n * outputs);
    let wanted = product_nt(&exact, &weights, n);
    let missing: Vec<f32> = wanted.iter().zip(product_nt(&off, &weights, n)).map(|(w, f)| w - f).collect();
    let pull_values = product_nt(&transposed(&off, n), &transposed(&missing, outputs), rows);
    let mut pull = zeros(&backend, n * outputs);
    backend.upload(&pull_values, &mut pull, 0).unwrap();
    let factor = Factor::new(&backend, n, gram(&off, n)).unwrap();
    let of = |pull| {
        let bytes = round(&backend, BlockType::Q8_0, &weights, &factor, pull).unwrap();
        distance(&product_nt(&off, &values(BlockType::Q8_0, &bytes, weights.len()), n), &wanted)
    };
    let (with, without) = (of(pull), of(zeros(&backend, n * outputs)));
    println!("squared error {without:.3e} without, {with:.3e} with");
    assert!(with < without / 20.0, "{with} for {without}");
}

/// Fewer rows than inputs, inputs that are always zero, no inputs at all, and numbers that are none.
#[test]
fn degenerate_inputs() {
    let (n, outputs) = (64, 16);
    let backend = backend();
    let weights = noise(8, n * outputs);
    let mut few = noise(9, 3 * n);
    few.chunks_mut(n).for_each(|row| row[..40].fill(0.0));
    for x in [few, vec![0.0; n]] {
        let factor = Factor::new(&backend, n, gram(&x, n)).unwrap();
        let bytes = round(&backend, BlockType::Q4_0, &weights, &factor, zeros(&backend, n * outputs)).unwrap();
        let found = values(BlockType::Q4_0, &bytes, weights.len());
        assert!(weights.iter().zip(&found).all(|(w, q)| (w - q).abs() < 0.6), "{found:?}");
    }
    let mut gram = vec![0.0; n * n];
    gram[5] = f32::NAN;
    assert!(Factor::new(&backend, n, gram).is_err());
    let factor = Factor::new(&backend, n, vec![0.0; n * n]).unwrap();
    let mut pull = zeros(&backend, n * outputs);
    backend.upload(&[f32::INFINITY], &mut pull, 0).unwrap();
    let said = round(&backend, BlockType::Q4_0, &weights, &factor, pull).unwrap_err().to_string();
    assert!(said.contains("not finite"), "{said}");
}
