use std::convert::Infallible;

use proptest::prelude::*;

use super::*;
use crate::buffer::View;
use crate::simd::{Bf16, Element};

/// Near-normal values, some of them outliers of up to `outlier` standard deviations.
fn random(len: usize, seed: u32, outlier: f32) -> Vec<f32> {
    (0..len as u32)
        .map(|i| {
            let words = cashtag_backend::philox::philox4x32([i, 0, 0, 0], [seed, 7]);
            let sum: f32 = words.iter().map(|w| (w >> 8) as f32 / 8_388_608.0 - 1.0).sum();
            if words[0].is_multiple_of(997) { sum * outlier } else { sum }
        })
        .collect()
}

fn narrow(x: &[f32]) -> Vec<Bf16> {
    x.iter().map(|&x| Bf16::from_f32(x)).collect()
}

fn weight(w: &[f32], out: usize, inner: usize, part: usize) -> FixedWeight {
    let read = |rows: std::ops::Range<usize>, target: &mut [f32]| {
        target.copy_from_slice(&w[rows.start * inner..rows.end * inner]);
        Ok::<_, Infallible>(())
    };
    match FixedWeight::load(out, inner, part, read) {
        Ok(w) => w,
        Err(never) => match never {},
    }
}

/// C by both kernels: f32 and bf16.
fn products(a: &Rows<'_>, b: &FixedPanels, scales: Option<&[f32]>, accumulate: bool) -> Vec<f32> {
    let stride = b.n + 1;
    let mut results = Vec::new();
    for tile in [kernel::best(), kernel::scalar] {
        let mut c32 = vec![1f32; a.rows * stride];
        let mut c16 = vec![Bf16::from_f32(1.0); a.rows * stride];
        // SAFETY: both results have this geometry.
        unsafe {
            gemm_by(tile, a, b, scales, accumulate, COut { out: TileOut::F32(c32.as_mut_ptr()), stride });
            gemm_by(tile, a, b, scales, accumulate, COut { out: TileOut::Bf16(c16.as_mut_ptr()), stride });
        }
        for row in 0..a.rows {
            assert_eq!(
                (c32[row * stride + b.n], c16[row * stride + b.n].to_f32()),
                (1.0, 1.0),
                "wrote behind row {row}"
            );
            c32[row * stride..][..b.n].iter().zip(&c16[row * stride..]).for_each(|(x, y)| {
                let same = Bf16::from_f32(*x).0 == y.0;
                assert!(same || x.is_nan() && y.to_f32().is_nan(), "{x} rounded to {}", y.to_f32());
            });
        }
        results.push(c32);
    }
    let bits = |c: &[f32]| c.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    assert!(bits(&results[0]) == bits(&results[1]), "the twins differ");
    let c = results.swap_remove(0);
    c.chunks_exact(stride).flat_map(|row| row[..b.n].iter().copied()).collect()
}

/// Error of `c` in each row relative to what the row's elements amount to, the worst row.
fn worst_row(c: &[f32], truth: &[f64], n: usize, accumulated: f64) -> f64 {
    let mut worst = 0f64;
    for (c, t) in c.chunks_exact(n).zip(truth.chunks_exact(n)) {
        let error: f64 = c.iter().zip(t).map(|(c, t)| (f64::from(*c) - t - accumulated).powi(2)).sum();
        let size: f64 = t.iter().map(|t| t * t).sum();
        worst = worst.max(error.sqrt() / size.sqrt().max(1e-30));
    }
    worst
}

struct Errors {
    forward: f64,
    backward: f64,
}

/// `y = x·Wᵀ` and `dx = dy·W` by both kernels, against f64.
fn check(rows: usize, out: usize, inner: usize, pad: usize, part: usize, outlier: f32) -> Errors {
    // Weights have no such outliers.
    let w = random(out * inner, 1, outlier.min(20.0));
    let fixed = weight(&w, out, inner, part);
    let mut scratch = Vec::new();
    let mut errors = Errors { forward: 0.0, backward: 0.0 };
    for accumulate in [false, true] {
        let added = if accumulate { 1.0 } else { 0.0 };
        let stride = inner + pad;
        let x = narrow(&random(rows * stride, 2, outlier));
        let truth: Vec<f64> = (0..rows * out)
            .map(|i| {
                let (x, w) = (&x[i / out * stride..][..inner], &w[i % out * inner..][..inner]);
                x.iter().zip(w).map(|(x, w)| f64::from(x.to_f32()) * f64::from(*w)).sum()
            })
            .collect();
        let view = View { data: &x, rows, cols: inner, stride };
        let quantised = quantise(view, None, fixed.norms(), &mut scratch);
        let y = products(&quantised, fixed.panels(), Some(fixed.scales()), accumulate);
        errors.forward = errors.forward.max(worst_row(&y, &truth, out, added));

        let stride = out + pad;
        let dy = narrow(&random(rows * stride, 3, outlier));
        let truth: Vec<f64> = (0..rows * inner)
            .map(|i| {
                let (dy, w) = (&dy[i / inner * stride..][..out], w.iter().skip(i % inner).step_by(inner));
                dy.iter().zip(w).map(|(dy, w)| f64::from(dy.to_f32()) * f64::from(*w)).sum()
            })
            .collect();
        let view = View { data: &dy, rows, cols: out, stride };
        let mut panels = FixedPanels::default();
        let mut total = vec![0f32; rows * inner];
        for (index, first) in (0..out).step_by(part).enumerate() {
            let range = first..(first + part).min(out);
            fixed.transpose(range.clone(), &mut panels);
            let (factors, norms) = fixed.backward_part(index);
            let dy = quantise(view.part(0, rows, range.start, range.len()), Some(factors), norms, &mut scratch);
            let dx = products(&dy, &panels, None, accumulate && index == 0);
            total.iter_mut().zip(dx).for_each(|(t, x)| *t += x);
        }
        errors.backward = errors.backward.max(worst_row(&total, &truth, inner, added));
    }
    errors
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]
    #[test]
    fn products_are_right(rows in 1usize..40, out in 1usize..100, inner in 1usize..90, pad in 0usize..5, small in any::<bool>()) {
        let errors = check(rows, out, inner, pad, if small { 32 } else { 4096 }, 1.0);
        // One column may cancel itself out, so the error of a row is not small against it; it is against √out columns.
        prop_assert!(errors.forward < 2e-2 && errors.backward < 2e-2, "{} {}", errors.forward, errors.backward);
    }

    #[test]
    fn transposed_twice_is_the_same(out in 1usize..150, inner in 1usize..100, second in any::<bool>()) {
        let fixed = weight(&random(out * inner, 5, 1.0), out, inner, 4096);
        let first = if second && out > NR { NR } else { 0 };
        let mut back = FixedPanels::default();
        fixed.transpose(first..out, &mut back);
        for o in first..out {
            for i in 0..inner {
                prop_assert_eq!(back.get(o - first, i), fixed.panels().get(i, o));
            }
        }
    }

    /// Whatever the values, no sum leaves the integers: the row and the column that come closest are those that are proportional.
    #[test]
    fn no_sum_overflows(inner in 1usize..1700, seed in any::<u32>(), flat in any::<bool>()) {
        let row: Vec<f32> = if flat { vec![0.7; inner] } else { random(inner, seed, 30.0) };
        let row: Vec<f32> = narrow(&row).iter().map(|x| x.to_f32()).collect();
        let w: Vec<f32> = row.iter().chain(&row).map(|x| x * 3.0).collect();
        let fixed = weight(&w, 2, inner, 4096);
        let mut scratch = Vec::new();
        let x = narrow(&row);
        let view = View { data: &x, rows: 1, cols: inner, stride: inner };
        let a = quantise(view, None, fixed.norms(), &mut scratch);
        // The scalar twin adds with a check in this profile or not; the value tells in any.
        let y = products(&a, fixed.panels(), Some(fixed.scales()), false);
        let truth: f64 = row.iter().map(|&x| 3.0 * f64::from(x).powi(2)).sum();
        prop_assert!((f64::from(y[0]) / truth - 1.0).abs() < 2e-3, "{} for {truth}", y[0]);
    }
}

/// The shapes of the 135M model, with activations as they are and with outliers. Weights rounded to bf16 would give 1.7e-3.
#[test]
fn errors_are_below_those_of_bf16() {
    for (outlier, bound) in [(1.0, 5e-4), (20.0, 1e-3), (300.0, 1e-3), (10_000.0, 1e-3)] {
        for (out, inner) in [(960, 576), (576, 1536), (3072, 576)] {
            let errors = check(13, out, inner, 0, 4096, outlier);
            eprintln!("outlier {outlier}, {out}x{inner}: {:.1e} {:.1e}", errors.forward, errors.backward);
            assert!(errors.forward < bound, "outlier {outlier}, {out}x{inner}: forward {}", errors.forward);
            assert!(errors.backward < bound, "outlier {outlier}, {out}x{inner}: backward {}", errors.backward);
        }
    }
}

#[test]
fn what_is_not_finite_stays_so_and_zeros_are_zeros() {
    let (out, inner) = (35, 1500);
    let mut w = random(out * inner, 1, 1.0);
    w[..inner].fill(0.0);
    let fixed = weight(&w, out, inner, 4096);
    let mut x = narrow(&random(5 * inner, 2, 1.0));
    x[..inner].fill(Bf16(0));
    for (row, bad) in [(1, f32::NAN), (2, f32::INFINITY), (3, f32::NEG_INFINITY)] {
        x[row * inner + 1400] = Bf16::from_f32(bad);
    }
    let mut scratch = Vec::new();
    let view = View { data: &x, rows: 5, cols: inner, stride: inner };
    let a = quantise(view, None, fixed.norms(), &mut scratch);
    let y = products(&a, fixed.panels(), Some(fixed.scales()), false);
    assert!(y[..out].iter().all(|&y| y == 0.0));
    assert!(y[out..4 * out].iter().all(|y| y.is_nan()));
    assert!(y[4 * out] == 0.0 && y[4 * out + 1..].iter().all(|y| y.is_finite() && *y != 0.0));
}

#[test]
fn the_ends_of_the_range_of_bf16() {
    let inner = 640;
    let fixed = weight(&random(16 * inner, 1, 1.0), 16, inner, 4096);
    let base = random(inner, 2, 1.0);
    let mut scratch = Vec::new();
    let mut of = |factor: f32| {
        let x = narrow(&base.iter().map(|x| x * factor).collect::<Vec<_>>());
        let view = View { data: &x, rows: 1, cols: inner, stride: inner };
        let a = quantise(view, None, fixed.norms(), &mut scratch);
        products(&a, fixed.panels(), Some(fixed.scales()), false)
    };
    let y = of(1.0);
    for exponent in [-80, -60, -10, 10, 60, 100] {
        let factor = 2f32.powi(exponent);
        for (a, b) in of(factor).iter().zip(&y) {
            assert!((a / factor - b).abs() < 0.05, "2^{exponent}: {} for {b}", a / factor);
        }
    }
    assert!(of(1e-40).iter().all(|y| y.is_finite()));
}

#[test]
#[ignore = "a measurement"]
fn fixed_rate() {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
    pool.install(|| {
        for (m, n, k) in crate::gemm::tests::RATED {
            let x = narrow(&random(m * k, 2, 1.0));
            let fixed = weight(&random(n * k, 1, 1.0), n, k, 4096);
            let mut c = vec![Bf16(0); m * n];
            let mut scratch = Vec::new();
            let view = View { data: &x, rows: m, cols: k, stride: k };
            let (mut best, mut packing, mut transposing) = (f64::MAX, f64::MAX, f64::MAX);
            let mut back = FixedPanels::default();
            for _ in 0..30 {
                let start = std::time::Instant::now();
                let a = quantise(view, None, fixed.norms(), &mut scratch);
                packing = packing.min(start.elapsed().as_secs_f64());
                let start = std::time::Instant::now();
                // SAFETY: C has this geometry.
                unsafe {
                    gemm(
                        &a,
                        fixed.panels(),
                        Some(fixed.scales()),
                        false,
                        COut { out: TileOut::Bf16(c.as_mut_ptr()), stride: n },
                    )
                };
                best = best.min(start.elapsed().as_secs_f64());
                let start = std::time::Instant::now();
                fixed.transpose(0..n, &mut back);
                transposing = transposing.min(start.elapsed().as_secs_f64());
            }
            let flops = 2.0 * (m * n * k) as f64 / 1e9;
            eprintln!(
                "{m}x{n}x{k}: {:.0} GFLOP/s, {:.0} with quantising ({:.2} ns/el); transpose {:.2} ns/el",
                flops / best,
                flops / (best + packing),
                packing * 1e9 / (m * k) as f64,
                transposing * 1e9 / (n * k) as f64
            );
        }
    });
}
