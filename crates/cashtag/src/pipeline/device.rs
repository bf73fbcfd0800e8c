//! From `--device` and `--precision` to a backend.

use anyhow::{Context, bail};
use cashtag_backend::Backend;
use cashtag_backend_cpu::{CpuBackend, Precision as CpuPrecision};

use crate::exit::Usage;
use crate::settings::{Device, Precision, Settings};

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
        Device::Auto | Device::Cpu => job.run(cpu(settings)?),
        Device::Cuda(_) => bail!(Usage("this build has no CUDA backend yet\n  hint: --device cpu".into())),
    }
}

fn cpu(settings: &Settings) -> anyhow::Result<CpuBackend> {
    let precision = match settings.model.precision {
        Precision::Auto => CpuPrecision::best(),
        Precision::F32 => CpuPrecision::F32,
        Precision::Bf16 => CpuPrecision::Bf16,
        Precision::Fp16 => {
            bail!(Usage("the CPU computes in bf16 or f32, not in fp16\n  hint: --precision auto".into()))
        }
    };
    CpuBackend::new(precision, settings.model.threads).context("the CPU cannot be used")
}
