//! `cashtag doctor`: what this machine has that cashtag can use, and what is missing.

use std::fmt::Write as _;
use std::process::Command;

use crate::{cache, hub, output};

#[derive(clap::Args)]
pub(crate) struct Args {}

pub(crate) fn run(_: Args) -> anyhow::Result<()> {
    let mut text = String::new();
    let mut line = |name: &str, value: &str| {
        let _ = writeln!(text, "{name:<10}{value}");
    };
    line("cashtag", env!("CARGO_PKG_VERSION"));
    line("cpu", &processor());
    line("", &format!("features: {}", features()));
    line("", &format!("precision: {}", precision()));
    line("threads", &std::thread::available_parallelism().map_or("unknown".into(), |n| n.to_string()));
    line("memory", &memory());
    let directory = cache::directory();
    match &directory {
        Ok(directory) => {
            let state = cache::writable(directory, "CASHTAG_CACHE").err().map(|e| format!(" (not writable: {e})"));
            line("cache", &format!("{}{}", directory.display(), state.unwrap_or_default()));
        }
        Err(e) => line("cache", &e.to_string().replace("\n  hint:", ";")),
    }
    match hub::inventory() {
        Ok(found) if found.is_empty() => line("models", "none yet; `cashtag pull smollm2-135m` fetches the smallest"),
        Ok(found) => {
            for (i, (name, path, bytes)) in found.iter().enumerate() {
                let name = output::printable(name);
                line(
                    if i == 0 { "models" } else { "" },
                    &format!("{name}, {}, {}", output::bytes(*bytes), path.display()),
                );
            }
        }
        Err(e) => line("models", &e.to_string().replace("\n  hint:", ";")),
    }
    line("pip", &pip());
    let gpu = gpu();
    for (i, found) in gpu.lines().enumerate() {
        line(if i == 0 { "gpu" } else { "" }, found);
    }
    output::data(&text)
}

/// A file of the kernel that is a page of text.
fn kernel_file(path: &str) -> Option<String> {
    std::fs::read_to_string(path).ok()
}

fn processor() -> String {
    let info = kernel_file("/proc/cpuinfo").unwrap_or_default();
    let name = info.lines().find_map(|l| l.strip_prefix("model name")).and_then(|l| l.split_once(':'));
    name.map_or_else(|| std::env::consts::ARCH.to_string(), |(_, name)| name.trim().to_string())
}

/// The instructions that the kernels ask for.
fn features() -> String {
    #[cfg(target_arch = "x86_64")]
    {
        let found = [
            ("AVX2", is_x86_feature_detected!("avx2")),
            ("FMA", is_x86_feature_detected!("fma")),
            ("AVX-512F", is_x86_feature_detected!("avx512f")),
            ("AVX512-BF16", is_x86_feature_detected!("avx512bf16")),
        ];
        let (has, lacks): (Vec<_>, Vec<_>) = found.iter().partition(|(_, has)| *has);
        let names = |list: Vec<&(&'static str, bool)>| list.iter().map(|(n, _)| *n).collect::<Vec<_>>().join(", ");
        match (has.is_empty(), lacks.is_empty()) {
            (_, true) => names(has),
            (true, _) => format!("none of {}", names(lacks)),
            _ => format!("{}; not {}", names(has), names(lacks)),
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        format!("those of {}", std::env::consts::ARCH)
    }
}

/// What `precision = "auto"` gives on the CPU.
fn precision() -> String {
    let best = cashtag_backend_cpu::Precision::best();
    match best {
        cashtag_backend_cpu::Precision::Bf16 => format!("{} (f32 with --precision f32)", best.describe()),
        cashtag_backend_cpu::Precision::F32 => "f32 (bf16 needs AVX2 and FMA)".into(),
    }
}

fn memory() -> String {
    let info = kernel_file("/proc/meminfo").unwrap_or_default();
    let read = |name: &str| {
        let line = info.lines().find_map(|l| l.strip_prefix(name))?;
        let kib: u64 = line.trim_start_matches(':').trim().trim_end_matches("kB").trim().parse().ok()?;
        kib.checked_mul(1024)
    };
    let limit = kernel_file("/sys/fs/cgroup/memory.max").and_then(|t| t.trim().parse::<u64>().ok());
    match (read("MemTotal"), read("MemAvailable")) {
        (Some(total), Some(free)) => {
            let limit = limit.filter(|l| *l < total).map(|l| format!(", this process may use {}", output::bytes(l)));
            format!("{}, {} free{}", output::bytes(total), output::bytes(free), limit.unwrap_or_default())
        }
        _ => "unknown".into(),
    }
}

/// Cards with driver and libraries, or why there is none.
fn gpu() -> String {
    let probe = cashtag_backend_cuda::probe();
    match (probe.gpus.is_empty(), probe.missing()) {
        (true, Some(why)) => format!("none: {}", output::printable(&why)),
        (_, missing) => {
            let state = if missing.is_none() { "ready" } else { "not usable: something is missing" };
            output::printable(&format!("{state}\n{probe}"))
        }
    }
}

fn pip() -> String {
    match Command::new("python3").args(["-m", "pip", "--version"]).output() {
        Ok(out) if out.status.success() => {
            let text = String::from_utf8_lossy(&out.stdout);
            output::printable(text.split_whitespace().nth(1).unwrap_or("of an unknown version"))
        }
        Ok(_) => {
            "python3 has none; `cashtag pull smollm2-135m` needs it (Debian, Ubuntu: apt install python3-pip)".into()
        }
        Err(_) => "no python3; `cashtag pull smollm2-135m` needs it with pip".into(),
    }
}
