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
suite!(elementwise: Elementwise, norm: Norm, linear: Linear, attention: Attention, loss: Loss, optimizer: Optimizer);

mod cuda_nf4 {
    use super::*;

    #[test]
    fn linear_from_codes() {
        cuda(Family::Linear, Dtype::Bf16, true, Resident::Nf4);
        cuda(Family::Linear, Dtype::F16, true, Resident::Nf4);
    }

    #[test]
    fn linear_dequantised() {
        cuda(Family::Linear, Dtype::Bf16, true, Resident::Bf16);
    }
}
