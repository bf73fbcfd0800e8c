//! Each family on every backend that this machine has. Without a GPU the CUDA tests say that they skip.

use cashtag_backend::{Backend, Dtype};
use cashtag_backend_cpu::{CpuBackend, Precision};
use cashtag_backend_cuda::{CudaBackend, Options, Resident, probe};
use cashtag_conformance::{Family, Tolerance, run};

fn reference() -> CpuBackend {
    CpuBackend::new(Precision::F32, 0).unwrap()
}

fn pass<B: Backend>(family: Family, candidate: &B, rounds: usize) {
    let report = run(family, &reference(), candidate, Tolerance::of(candidate.compute_dtype()), rounds);
    println!("{:?}\n{report}", candidate.capabilities());
    assert!(report.passed(), "{report}");
}

fn cuda(family: Family, compute: Dtype, quantize: bool, resident: Resident) {
    let found = probe();
    if !found.usable() {
        println!("skipped: no CUDA device ({})", found.missing().unwrap_or_default());
        return;
    }
    if compute == Dtype::Bf16 && !found.gpus[0].bf16 {
        println!("skipped: {} has no bfloat16", found.gpus[0].name);
        return;
    }
    let options = Options { compute, quantize, resident, ..Options::default() };
    pass(family, &CudaBackend::new(0, options).unwrap(), 6);
}

macro_rules! suite {
    ($($name:ident: $family:ident),*) => {
        mod cpu_bf16 {
            use super::*;
            $(#[test] fn $name() { pass(Family::$family, &CpuBackend::new(Precision::Bf16, 0).unwrap(), 3); })*
        }
        mod cuda_bf16 {
            use super::*;
            $(#[test] fn $name() { cuda(Family::$family, Dtype::Bf16, false, Resident::Bf16); })*
        }
        mod cuda_f16 {
            use super::*;
            $(#[test] fn $name() { cuda(Family::$family, Dtype::F16, false, Resident::Bf16); })*
        }
        mod cuda_f32 {
            use super::*;
            $(#[test] fn $name() { cuda(Family::$family, Dtype::F32, false, Resident::Bf16); })*
        }
    };
}
suite!(elementwise: Elementwise, norm: Norm, linear: Linear, attention: Attention, loss: Loss, optimizer: Optimizer, dora: Dora);

mod cuda_nf4 {
    use super::*;

    #[test]
    fn linear_from_codes() {
        cuda(Family::Linear, Dtype::Bf16, true, Resident::Nf4);
        cuda(Family::Linear, Dtype::F16, true, Resident::Nf4);
    }

    #[test]
    fn norms_from_codes() {
        cuda(Family::Dora, Dtype::Bf16, true, Resident::Nf4);
        cuda(Family::Dora, Dtype::F16, true, Resident::Nf4);
    }

    #[test]
    fn linear_dequantised() {
        cuda(Family::Linear, Dtype::Bf16, true, Resident::Bf16);
    }
}

/// Operations of the CUDA backend beside the trait, against the compositions that they stand for.
mod cuda_fused {
    use cashtag_backend::{Dropout, Mat, MatMut};
    use cashtag_backend_cuda::CudaBuffer;

    use super::*;

    fn filled(gpu: &CudaBackend, dtype: Dtype, len: usize, seed: u32) -> CudaBuffer {
        let values: Vec<f32> =
            (0..len as u32).map(|i| ((i ^ seed).wrapping_mul(0x9E37_79B9) >> 16) as f32 / 32768.0 - 1.0).collect();
        let mut b = gpu.zeros(dtype, len).unwrap();
        gpu.upload(&values, &mut b, 0).unwrap();
        b
    }

    fn read(gpu: &CudaBackend, b: &CudaBuffer) -> Vec<f32> {
        let mut out = vec![0.0; gpu.len(b)];
        gpu.download(b, 0, &mut out).unwrap();
        out
    }

    fn error(a: &[f32], b: &[f32]) -> f64 {
        let e: f64 = a.iter().zip(b).map(|(x, y)| f64::from(x - y).powi(2)).sum();
        let n: f64 = b.iter().map(|x| f64::from(*x).powi(2)).sum();
        (e / n).sqrt()
    }

    fn backend(compute: Dtype) -> Option<CudaBackend> {
        let found = probe();
        if !found.usable() || (compute == Dtype::Bf16 && !found.gpus[0].bf16) {
            println!("skipped: no CUDA device for {} ({})", compute.name(), found.missing().unwrap_or_default());
            return None;
        }
        Some(CudaBackend::new(0, Options { compute, quantize: false, ..Options::default() }).unwrap())
    }

    #[test]
    fn results_with_a_dropped_out_copy() {
        for compute in [Dtype::Bf16, Dtype::F16, Dtype::F32] {
            let Some(gpu) = backend(compute) else { return };
            let t = compute;
            for (n, d) in [(1, 64), (150, 576), (33, 90)] {
                let dropout = Dropout { p: 0.1, seed: 99, step: 3, site: 5 };
                let what = format!("{} {n} × {d}", t.name());
                let (x, w) = (filled(&gpu, Dtype::F32, n * d, 1), filled(&gpu, Dtype::F32, d, 2));
                let zeros = |dtype, len| gpu.zeros(dtype, len).unwrap();
                let (mut y, mut inv, mut expected) = (zeros(t, n * d), zeros(Dtype::F32, n), zeros(t, n * d));
                gpu.rms_norm(Mat::new(&x, n, d), &w, 1e-5, MatMut::new(&mut y, n, d), &mut inv).unwrap();
                gpu.dropout(Mat::new(&y, n, d), dropout, false, MatMut::new(&mut expected, n, d)).unwrap();
                let (mut both, mut copy, mut alone) = (zeros(t, n * d), zeros(t, n * d), zeros(t, n * d));
                let out = Some(MatMut::new(&mut both, n, d));
                gpu.rms_norm_dropout(
                    Mat::new(&x, n, d),
                    &w,
                    1e-5,
                    out,
                    (dropout, MatMut::new(&mut copy, n, d)),
                    &mut inv,
                )
                .unwrap();
                gpu.rms_norm_dropout(
                    Mat::new(&x, n, d),
                    &w,
                    1e-5,
                    None,
                    (dropout, MatMut::new(&mut alone, n, d)),
                    &mut inv,
                )
                .unwrap();
                assert_eq!(read(&gpu, &both), read(&gpu, &y), "rms_norm {what}");
                assert_eq!(read(&gpu, &copy), read(&gpu, &expected), "rms_norm {what}");
                assert_eq!(read(&gpu, &alone), read(&gpu, &expected), "rms_norm {what}");

                let gate_up = filled(&gpu, t, 2 * n * d, 3);
                gpu.swiglu(Mat::new(&gate_up, n, 2 * d), MatMut::new(&mut y, n, d)).unwrap();
                gpu.dropout(Mat::new(&y, n, d), dropout, false, MatMut::new(&mut expected, n, d)).unwrap();
                let out = Some(MatMut::new(&mut both, n, d));
                gpu.swiglu_dropout(Mat::new(&gate_up, n, 2 * d), out, (dropout, MatMut::new(&mut copy, n, d))).unwrap();
                gpu.swiglu_dropout(Mat::new(&gate_up, n, 2 * d), None, (dropout, MatMut::new(&mut alone, n, d)))
                    .unwrap();
                assert_eq!(read(&gpu, &both), read(&gpu, &y), "swiglu {what}");
                assert_eq!(read(&gpu, &copy), read(&gpu, &expected), "swiglu {what}");
                assert_eq!(read(&gpu, &alone), read(&gpu, &expected), "swiglu {what}");
            }
        }
    }

    #[test]
    fn lora_backward_with_dropout_on_the_way() {
        for compute in [Dtype::Bf16, Dtype::F16, Dtype::F32] {
            let Some(gpu) = backend(compute) else { return };
            let t = compute;
            for (n, inner, rank) in [(1, 64, 8), (150, 576, 24), (333, 1536, 128), (1740, 4096, 192), (300, 100, 12)] {
                for d in [None, Some(Dropout { p: 0.1, seed: 99, step: 3, site: 5 })] {
                    let a = filled(&gpu, t, rank * inner, 2);
                    let (mut scratch, mut product) =
                        (gpu.zeros(t, n * inner).unwrap(), gpu.zeros(t, n * inner).unwrap());
                    let width = inner + rank;
                    let (mut dx, mut expected) = (filled(&gpu, t, n * width, 5), filled(&gpu, t, n * width, 5));
                    let a = Mat::new(&a, rank, inner);
                    let du = Mat::new(&dx, n, width).columns(inner, rank);
                    gpu.matmul_nn(1.0, du, a, 0.0, MatMut::new(&mut product, n, inner)).unwrap();
                    let to = MatMut::new(&mut expected, n, width).columns(0, inner);
                    match d {
                        Some(d) => gpu.dropout(Mat::new(&product, n, inner), d, true, to).unwrap(),
                        None => gpu.add(Mat::new(&product, n, inner), to).unwrap(),
                    }
                    gpu.lora_backward(a, d, &mut scratch, MatMut::new(&mut dx, n, width)).unwrap();
                    let e = error(&read(&gpu, &dx), &read(&gpu, &expected));
                    let allowed = Tolerance::of(compute).product;
                    assert!(e <= allowed, "{} {n} × {inner}, rank {rank}, {d:?}: {e:.2e}", t.name());
                }
            }
        }
    }

    /// A stack of three matrices on NF4's grid (absmax 1/4, at least one ±1 in a block).
    struct Grid {
        rows: usize,
        cols: usize,
        codes: Vec<u8>,
        absmax: Vec<f32>,
    }
    impl cashtag_backend::WeightSource for Grid {
        fn name(&self) -> &str {
            "grid"
        }
        fn rows(&self) -> usize {
            self.rows
        }
        fn cols(&self) -> usize {
            self.cols
        }
        fn read_rows(&self, _: std::ops::Range<usize>, out: &mut [f32]) -> cashtag_backend::Result<()> {
            out.fill(f32::NAN);
            Ok(())
        }
        fn raw(&self) -> Option<cashtag_backend::RawWeight<'_>> {
            Some(cashtag_backend::RawWeight::Nf4 { codes: &self.codes, absmax: &self.absmax })
        }
    }

    #[test]
    fn linear_with_its_adapter_is_the_sum_of_both() {
        for (compute, resident, lora_r) in [
            (Dtype::Bf16, Resident::Bf16, 16),
            (Dtype::Bf16, Resident::Bf16, 0),
            (Dtype::Bf16, Resident::Nf4, 0),
            (Dtype::F16, Resident::Bf16, 64),
            (Dtype::F32, Resident::Bf16, 16),
        ] {
            if backend(compute).is_none() {
                return;
            }
            let gpu = CudaBackend::new(0, Options { compute, resident, lora_r, ..Options::default() }).unwrap();
            let t = compute;
            let (n, inner, r, outs) = (70, 192, 16, [64, 40, 128]);
            let grids: Vec<Grid> = outs
                .iter()
                .map(|&rows| {
                    let codes =
                        (0..rows * inner / 2).map(|i| ((i as u32).wrapping_mul(0x9E37_79B9) >> 20) as u8).collect();
                    Grid { rows, cols: inner, codes, absmax: vec![0.25; rows * inner / 64] }
                })
                .collect();
            let stack: Vec<&dyn cashtag_backend::WeightSource> =
                grids.iter().map(|g| g as &dyn cashtag_backend::WeightSource).collect();
            let w = gpu.weight(&stack).unwrap();
            let out: usize = outs.iter().sum();
            // Two of the three matrices have factors.
            let (b0, b1) = (filled(&gpu, t, 64 * r, 2), filled(&gpu, t, 128 * r, 3));
            let factors = [(0, Mat::new(&b0, 64, r)), (104, Mat::new(&b1, 128, r))];
            let x_u = filled(&gpu, t, n * (inner + 2 * r), 4);
            let view = || Mat::new(&x_u, n, inner + 2 * r);
            let what = format!("{} {resident:?} room {lora_r}", t.name());
            for kind in [t, Dtype::F32] {
                for accumulate in [false, true] {
                    let (mut y, mut expected) = (filled(&gpu, kind, n * out, 5), filled(&gpu, kind, n * out, 5));
                    gpu.linear_lora(view(), &w, &factors, 0.25, accumulate, MatMut::new(&mut y, n, out)).unwrap();
                    gpu.linear(view().columns(0, inner), &w, accumulate, MatMut::new(&mut expected, n, out)).unwrap();
                    for (j, (first, b)) in factors.iter().enumerate() {
                        let c = MatMut::new(&mut expected, n, out).columns(*first, b.rows);
                        gpu.matmul_nt(0.25, view().columns(inner + j * r, r), *b, 1.0, c).unwrap();
                    }
                    let e = error(&read(&gpu, &y), &read(&gpu, &expected));
                    assert!(e <= Tolerance::of(compute).product, "linear_lora, {what}: {e:.2e}");
                }
            }
            let dy = filled(&gpu, t, n * out, 6);
            let (mut d, mut expected) =
                (filled(&gpu, t, n * (inner + 2 * r), 7), filled(&gpu, t, n * (inner + 2 * r), 7));
            gpu.linear_lora_backward(Mat::new(&dy, n, out), &w, &factors, 0.25, MatMut::new(&mut d, n, inner + 2 * r))
                .unwrap();
            let mut whole = MatMut::new(&mut expected, n, inner + 2 * r);
            gpu.linear_backward(Mat::new(&dy, n, out), &w, false, whole.reborrow().columns(0, inner)).unwrap();
            for (j, (first, b)) in factors.iter().enumerate() {
                let dy = Mat::new(&dy, n, out).columns(*first, b.rows);
                gpu.matmul_nn(0.25, dy, *b, 0.0, whole.reborrow().columns(inner + j * r, r)).unwrap();
            }
            let e = error(&read(&gpu, &d), &read(&gpu, &expected));
            assert!(e <= Tolerance::of(compute).product, "linear_lora_backward, {what}: {e:.2e}");
        }
    }

    #[test]
    fn sums_into_new_places_and_copies() {
        let Some(gpu) = backend(Dtype::Bf16) else { return };
        let (n, d) = (130, 512);
        let t = Dtype::Bf16;
        let (dy, x, w, inv) = (
            filled(&gpu, t, n * d, 1),
            filled(&gpu, Dtype::F32, n * d, 2),
            filled(&gpu, Dtype::F32, d, 3),
            filled(&gpu, Dtype::F32, n, 4),
        );
        let (mut a, mut b) = (filled(&gpu, Dtype::F32, n * d, 5), filled(&gpu, Dtype::F32, n * d, 5));
        let mut copy = gpu.zeros(t, n * d).unwrap();
        gpu.rms_norm_backward(Mat::new(&dy, n, d), Mat::new(&x, n, d), &w, &inv, MatMut::new(&mut a, n, d)).unwrap();
        gpu.rms_norm_backward_copy(
            Mat::new(&dy, n, d),
            Mat::new(&x, n, d),
            &w,
            &inv,
            MatMut::new(&mut b, n, d),
            MatMut::new(&mut copy, n, d),
        )
        .unwrap();
        assert_eq!(read(&gpu, &a), read(&gpu, &b));
        let mut rounded = gpu.zeros(t, n * d).unwrap();
        gpu.copy(Mat::new(&a, n, d), MatMut::new(&mut rounded, n, d)).unwrap();
        assert_eq!(read(&gpu, &rounded), read(&gpu, &copy));

        struct Ones;
        impl cashtag_backend::WeightSource for Ones {
            fn name(&self) -> &str {
                "ones"
            }
            fn rows(&self) -> usize {
                512
            }
            fn cols(&self) -> usize {
                512
            }
            fn read_rows(&self, _: std::ops::Range<usize>, out: &mut [f32]) -> cashtag_backend::Result<()> {
                out.fill(1.0);
                Ok(())
            }
        }
        let weight = gpu.weight(&[&Ones]).unwrap();
        let mut y = gpu.zeros(Dtype::F32, n * d).unwrap();
        gpu.linear_add(Mat::new(&dy, n, d), &weight, Mat::new(&x, n, d), MatMut::new(&mut y, n, d)).unwrap();
        let mut expected = gpu.zeros(Dtype::F32, n * d).unwrap();
        gpu.copy(Mat::new(&x, n, d), MatMut::new(&mut expected, n, d)).unwrap();
        gpu.linear(Mat::new(&dy, n, d), &weight, true, MatMut::new(&mut expected, n, d)).unwrap();
        assert_eq!(read(&gpu, &y), read(&gpu, &expected));
    }
}
