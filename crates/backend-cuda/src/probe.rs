//! What a machine has of what this backend needs, for `cashtag doctor`.

use std::fmt;
use std::path::PathBuf;

use serde::Serialize;

use crate::kernels::cache_folder;
use crate::{driver, libraries};

/// One card.
#[derive(Clone, Debug, Serialize)]
pub struct Gpu {
    pub ordinal: u32,
    pub name: String,
    /// "9.0".
    pub compute_capability: String,
    pub memory_bytes: u64,
    pub multiprocessors: u32,
    /// Whether its matrix instructions take bf16.
    pub bf16: bool,
}

/// What was found. Every `Err` is what is missing, with a hint how to get it.
#[derive(Clone, Debug, Serialize)]
pub struct Probe {
    /// libcuda, and the highest CUDA version that the driver speaks.
    pub driver: Result<libraries::Library, String>,
    pub gpus: Vec<Gpu>,
    pub nvrtc: Result<libraries::Library, String>,
    pub cublaslt: Result<libraries::Library, String>,
    /// Needed for training on several cards only.
    pub nccl: Result<libraries::Library, String>,
    pub kernel_cache: Option<PathBuf>,
}

impl Probe {
    /// Whether a backend can be made.
    pub fn usable(&self) -> bool {
        !self.gpus.is_empty() && self.nvrtc.is_ok() && self.cublaslt.is_ok()
    }

    /// What is missing first, in a line and a hint; `None` if nothing is.
    pub fn missing(&self) -> Option<String> {
        if let Err(e) = &self.driver {
            return Some(e.clone());
        }
        if self.gpus.is_empty() {
            return Some("the driver shows no GPU\n  hint: look at CUDA_VISIBLE_DEVICES and at nvidia-smi".into());
        }
        [&self.nvrtc, &self.cublaslt].into_iter().find_map(|l| l.as_ref().err().cloned())
    }
}

/// Looks for driver, cards and libraries. Never fails and changes nothing.
pub fn probe() -> Probe {
    let mut found = libraries::cuda().map(|c| c.0.clone());
    let gpus = match driver::devices() {
        Ok(facts) => facts,
        Err(e) => {
            found = found.and(Err(e));
            Vec::new()
        }
    };
    let gpus: Vec<Gpu> = gpus
        .into_iter()
        .zip(0..)
        .map(|(f, ordinal)| Gpu {
            ordinal,
            name: f.name,
            compute_capability: format!("{}.{}", f.sm / 10, f.sm % 10),
            memory_bytes: f.memory_total,
            multiprocessors: f.multiprocessors,
            bf16: f.sm >= 80,
        })
        .collect();
    // A large library, of use to several cards only.
    let nccl = if gpus.len() > 1 { libraries::nccl().cloned() } else { Err("one card needs none".into()) };
    Probe {
        driver: found,
        gpus,
        nvrtc: libraries::nvrtc().cloned(),
        cublaslt: libraries::cublaslt().cloned(),
        nccl,
        kernel_cache: cache_folder(),
    }
}

impl fmt::Display for Probe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut line = |name: &str, library: &Result<libraries::Library, String>| match library {
            Ok(l) => writeln!(f, "{name:<14}{} ({})", l.version, l.path.display()),
            Err(e) => writeln!(f, "{name:<14}missing: {e}"),
        };
        line("driver", &self.driver)?;
        line("NVRTC", &self.nvrtc)?;
        line("cuBLASLt", &self.cublaslt)?;
        if self.gpus.len() > 1 {
            line("NCCL", &self.nccl)?;
        }
        for g in &self.gpus {
            let gib = g.memory_bytes as f64 / (1u64 << 30) as f64;
            writeln!(
                f,
                "cuda:{:<9}{}, {gib:.1} GiB, compute capability {}{}",
                g.ordinal,
                g.name,
                g.compute_capability,
                if g.bf16 { "" } else { " (no bfloat16)" }
            )?;
        }
        match &self.kernel_cache {
            Some(folder) => write!(f, "{:<14}{}", "kernel cache", folder.display()),
            None => write!(f, "{:<14}none (set CASHTAG_CACHE)", "kernel cache"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_probe_never_fails_and_says_what_is_missing() {
        let found = probe();
        println!("{found}");
        assert_eq!(found.usable(), found.missing().is_none());
        assert!(found.to_string().contains("driver"));
    }
}
