//! From `--device` and `--precision` to a backend.

use anyhow::{Context, bail};
use cashtag_backend::{Backend, Dtype};
use cashtag_backend_cpu::{CpuBackend, Precision as CpuPrecision};
use cashtag_backend_cuda::{CudaBackend, Options, probe};

use super::ranks;
use crate::exit::Usage;
use crate::settings::{self, Device, Precision, Settings};
use crate::{hub, output};

/// Something to do on whatever device was chosen.
pub(crate) trait Job {
    type Output;
    /// # Errors
    /// Whatever stops the job.
    fn run<B: Backend>(self, backend: B) -> anyhow::Result<Self::Output>;
}

/// Runs a job on the device that the settings ask for.
///
/// # Errors
/// A device or precision that is not there, and what the job itself reports.
pub(crate) fn run<J: Job>(settings: &Settings, job: J) -> anyhow::Result<J::Output> {
    match settings.model.device {
        Device::Cpu => job.run(cpu(settings)?),
        Device::Cuda(ordinal) => job.run(cuda(settings, ordinal + local_rank()?)?),
        Device::Auto => {
            let found = probe();
            if found.usable() {
                return job.run(cuda(settings, local_rank()?)?);
            }
            if let Some(missing) = found.missing() {
                output::detail(format!("no GPU is used: {missing}"));
            }
            job.run(cpu(settings)?)
        }
    }
}

/// Which GPU of the machine is this process's, counted from the first that is used.
fn local_rank() -> anyhow::Result<usize> {
    Ok(ranks::world()?.map_or(0, |w| w.local_rank))
}

fn cuda(settings: &Settings, ordinal: usize) -> anyhow::Result<CudaBackend> {
    let found = probe();
    let gpu = found.gpus.iter().find(|g| g.ordinal as usize == ordinal);
    let compute = match settings.model.precision {
        Precision::Auto if gpu.is_some_and(|g| !g.bf16) => Dtype::F16,
        Precision::Auto | Precision::Bf16 => Dtype::Bf16,
        Precision::Fp16 => Dtype::F16,
        Precision::F32 => Dtype::F32,
    };
    let options = cuda_options(settings, compute);
    CudaBackend::new(ordinal as u32, options).with_context(|| format!("cuda:{ordinal} cannot be used"))
}

/// How a GPU is used that computes in `compute`.
pub(crate) fn cuda_options(settings: &Settings, compute: Dtype) -> Options {
    let resident = match settings.model.resident {
        settings::Resident::Auto => cashtag_backend_cuda::Resident::Auto,
        settings::Resident::Nf4 => cashtag_backend_cuda::Resident::Nf4,
        settings::Resident::Bf16 => cashtag_backend_cuda::Resident::Bf16,
    };
    // A GGUF file is 4-bit already: quantising its values again would only lose some.
    let is_gguf = settings.model.name == hub::EMBEDDED || settings.model.name.ends_with(".gguf");
    let quantize = !is_gguf || settings.model.resident == settings::Resident::Nf4;
    Options { compute, quantize, resident, ..Options::default() }
}

fn cpu(settings: &Settings) -> anyhow::Result<CpuBackend> {
    CpuBackend::new(cpu_precision(settings)?, ranks::threads(settings.model.threads)?).context("the CPU cannot be used")
}

/// What the CPU computes in.
///
/// # Errors
/// A precision that it does not have.
pub(crate) fn cpu_precision(settings: &Settings) -> anyhow::Result<CpuPrecision> {
    Ok(match settings.model.precision {
        Precision::Auto => CpuPrecision::best(),
        Precision::F32 => CpuPrecision::F32,
        Precision::Bf16 => CpuPrecision::Bf16,
        Precision::Fp16 => {
            bail!(Usage("the CPU computes in bf16 or f32, not in fp16\n  hint: --precision auto".into()))
        }
    })
}
