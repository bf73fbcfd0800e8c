use proptest::prelude::*;

use super::*;
use crate::simd::Element;

fn random(len: usize, seed: u64) -> Vec<Bf16> {
    (0..len as u32)
        .map(|i| {
            let bits = cashtag_backend::philox::philox4x32([i, 0, 0, 0], [seed as u32, 7])[0];
            Bf16::from_f32((bits >> 8) as f32 / 8_388_608.0 - 1.0)
        })
        .collect()
}

fn reference(
    m: usize,
    n: usize,
    k: usize,
    a: impl Fn(usize, usize) -> Bf16,
    b: impl Fn(usize, usize) -> Bf16,
) -> Vec<f64> {
    let mut c = vec![0f64; m * n];
    for i in 0..m {
        for j in 0..n {
            c[i * n + j] = (0..k).map(|x| f64::from(a(i, x).to_f32()) * f64::from(b(x, j).to_f32())).sum();
        }
    }
    c
}

/// All three ways to pack, f32 and bf16 results, with and without accumulation, against f64.
fn check(m: usize, n: usize, k: usize, pad: usize) {
    let k_even = k + k % 2;
    let (sa, sbt, sb) = (k_even + 2 * pad, k + pad, n + pad);
    let mut a = random(m * sa, 1);
    if k % 2 == 1 {
        // An A that is read in place has an even k; the packer of B pads with zero, so whatever stands there is harmless
        // only if it is finite.
        for row in a.chunks_mut(sa) {
            row[k] = Bf16::from_f32(3.0);
        }
    }
    let bt = random(n * sbt, 2);
    let b = random(k * sb, 3);
    let at = random(k * (m + pad), 4);
    let mut panels = Panels::default();
    let mut words = Vec::new();
    for case in 0..3 {
        let truth = match case {
            0 => {
                pack_nt(&bt, sbt, n, k, &mut panels, true);
                reference(m, n, k, |i, x| a[i * sa + x], |x, j| bt[j * sbt + x])
            }
            1 => {
                pack_nn(&b, sb, k, n, &mut panels, false);
                reference(m, n, k, |i, x| a[i * sa + x], |x, j| b[x * sb + j])
            }
            _ => {
                pack_nn(&b, sb, k, n, &mut panels, true);
                interleave_rows(&at, m + pad, k, m, &mut words, true);
                reference(m, n, k, |i, x| at[x * (m + pad) + i], |x, j| b[x * sb + j])
            }
        };
        let operand = if case < 2 {
            AWords { ptr: a.as_ptr().cast(), row_stride: sa / 2, k_stride: 1, rows: m, k_words: k.div_ceil(2) }
        } else {
            AWords { ptr: words.as_ptr(), row_stride: 1, k_stride: m, rows: m, k_words: k.div_ceil(2) }
        };
        let mut c32 = vec![1f32; m * (n + 1)];
        let mut c16 = vec![Bf16::from_f32(1.0); m * (n + 1)];
        for accumulate in [false, true] {
            // SAFETY: the operands were made with this geometry.
            unsafe {
                let out = COut { out: TileOut::F32(c32.as_mut_ptr()), stride: n + 1 };
                gemm(0.5, operand, &panels, accumulate, out, true);
                let out = COut { out: TileOut::Bf16(c16.as_mut_ptr()), stride: n + 1 };
                gemm(0.5, operand, &panels, accumulate, out, false);
            }
            let times = if accumulate { 1.0 } else { 0.5 };
            for i in 0..m {
                for j in 0..n {
                    let want = times * truth[i * n + j];
                    let scale = (k as f64).sqrt() + want.abs();
                    let (x, y) = (f64::from(c32[i * (n + 1) + j]), f64::from(c16[i * (n + 1) + j].to_f32()));
                    assert!((x - want).abs() < 1e-5 * scale, "{m}x{n}x{k} case {case}: {x} for {want}");
                    assert!((y - want).abs() < 8e-3 * scale, "{m}x{n}x{k} case {case}: {y} for {want}");
                }
                assert_eq!(c32[i * (n + 1) + n], 1.0, "wrote behind row {i}");
                assert_eq!(c16[i * (n + 1) + n].to_f32(), 1.0, "wrote behind row {i}");
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]
    #[test]
    fn products_are_right(m in 1usize..40, n in 1usize..100, k in 1usize..90, pad in 0usize..5) {
        check(m, n, k, pad);
    }

    #[test]
    fn the_backward_panels_are_the_transposed_weight(out in 1usize..150, inner in 1usize..100) {
        let w = random(out * inner, 5);
        let (mut forward, mut back) = (Panels::default(), Panels::default());
        pack_nt(&w, inner, out, inner, &mut forward, false);
        let first = if out > NR { NR } else { 0 };
        transpose_panels(&forward, first..out, &mut back);
        for o in 0..out {
            for i in 0..inner {
                prop_assert_eq!(forward.get(i, o), w[o * inner + i]);
                if o >= first {
                    prop_assert_eq!(back.get(o - first, i), w[o * inner + i]);
                }
            }
        }
    }
}

#[test]
fn shapes_of_the_model() {
    check(145, 192, 576, 0);
    check(13, 576, 1536, 0);
}

#[test]
fn the_scalar_twin_agrees() {
    let (m, n, k) = (12, 32, 64);
    let (a, b) = (random(m * k, 1), random(n * k, 2));
    let mut panels = Panels::default();
    pack_nt(&b, k, n, k, &mut panels, false);
    let mut c = [vec![0f32; m * n], vec![0f32; m * n]];
    let tile = |c: &mut Vec<f32>| Tile {
        a: a.as_ptr().cast(),
        a_row_stride: k / 2,
        a_k_stride: 1,
        b: panels.panel(0).as_ptr(),
        k_words: k / 2,
        c: TileOut::F32(c.as_mut_ptr()),
        c_stride: n,
        rows: m,
        cols: n,
        alpha: 1.0,
        accumulate: false,
    };
    // SAFETY: the operands were made with this geometry.
    unsafe {
        scalar::tile(&tile(&mut c[0]));
        let whole = AWords { ptr: a.as_ptr().cast(), row_stride: k / 2, k_stride: 1, rows: m, k_words: k / 2 };
        gemm(1.0, whole, &panels, false, COut { out: TileOut::F32(c[1].as_mut_ptr()), stride: n }, false);
    }
    for (x, y) in c[0].iter().zip(&c[1]) {
        assert!((x - y).abs() < 1e-4, "{x} {y}");
    }
}

/// The products `[m, k]·[k, n]` of the small model, and a large one, whose rate is measured.
pub(super) const RATED: [(usize, usize, usize); 8] = [
    (1024, 1536, 576),
    (1024, 576, 1536),
    (1024, 960, 576),
    (1024, 3072, 576),
    (1024, 64, 576),
    (1024, 576, 64),
    (64, 3072, 576),
    (512, 4096, 4096),
];

#[test]
#[ignore = "a measurement"]
fn rate() {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
    pool.install(|| {
        for (m, n, k) in RATED {
            let (a, b) = (random(m * k, 1), random(n * k, 2));
            let mut panels = Panels::default();
            pack_nt(&b, k, n, k, &mut panels, false);
            let mut c = vec![Bf16(0); m * n];
            let mut best = f64::MAX;
            for _ in 0..20 {
                let start = std::time::Instant::now();
                let whole = AWords { ptr: a.as_ptr().cast(), row_stride: k / 2, k_stride: 1, rows: m, k_words: k / 2 };
                unsafe {
                    gemm(1.0, whole, &panels, false, COut { out: TileOut::Bf16(c.as_mut_ptr()), stride: n }, true)
                };
                best = best.min(start.elapsed().as_secs_f64());
            }
            let mut t = [f64::MAX; 3];
            let mut out = Panels::default();
            for _ in 0..5 {
                let s = std::time::Instant::now();
                transpose_panels(&panels, 0..n, &mut out);
                t[0] = t[0].min(s.elapsed().as_secs_f64());
                let s = std::time::Instant::now();
                pack_nt(&b, k, n, k, &mut out, true);
                t[1] = t[1].min(s.elapsed().as_secs_f64());
                let s = std::time::Instant::now();
                pack_nn(&a, k, m, k, &mut out, true);
                t[2] = t[2].min(s.elapsed().as_secs_f64());
            }
            eprintln!(
                "{m}x{n}x{k}: {:.0} GFLOP/s; transpose {:.2} ns/el, nt {:.2}, nn {:.2}",
                2.0 * (m * n * k) as f64 / best / 1e9,
                t[0] * 1e9 / (n * k) as f64,
                t[1] * 1e9 / (n * k) as f64,
                t[2] * 1e9 / (m * k) as f64
            );
        }
    });
}
