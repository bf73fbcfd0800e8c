//! The real model and small helpers.

use std::path::PathBuf;
use std::sync::Arc;

use cashtag_backend::philox::philox4x32;
use cashtag_backend_cpu::{CpuBackend, Precision};
use cashtag_llama::checkpoint::Checkpoint;
use cashtag_llama::model::Llama;
use cashtag_llama::prompt::{Label, PromptFormat, TooLong};

/// The model file that `cashtag pull smollm2-135m` keeps; `make test` fetches it.
pub fn model_path() -> PathBuf {
    if let Some(path) = std::env::var_os("CASHTAG_TEST_MODEL") {
        return path.into();
    }
    let cache = std::env::var_os("CASHTAG_CACHE").map(PathBuf::from);
    let cache = cache.or_else(|| std::env::var_os("XDG_CACHE_HOME").map(|x| PathBuf::from(x).join("cashtag")));
    let cache =
        cache.unwrap_or_else(|| PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".cache/cashtag"));
    let path = cache.join("SmolLM2-135M-Instruct.Q4_1.gguf");
    assert!(path.exists(), "{} is missing\n  hint: cashtag pull smollm2-135m", path.display());
    path
}

pub fn load(precision: Precision) -> (CpuBackend, Llama<CpuBackend>, Checkpoint) {
    let backend = CpuBackend::new(precision, 2).unwrap();
    let checkpoint = Checkpoint::open(&model_path()).unwrap();
    let model = Llama::load(&backend, &checkpoint, |_, _| {}).unwrap();
    (backend, model, checkpoint)
}

pub fn format(checkpoint: &Checkpoint, system: &str) -> PromptFormat {
    let labels = ["Positive", "Neutral", "Negative"].map(Label::new).to_vec();
    PromptFormat::new(
        Arc::new(checkpoint.tokenizer().unwrap()),
        checkpoint.chat_template().unwrap(),
        Some(system.into()),
        labels,
        512,
        TooLong::Truncate,
    )
    .unwrap()
}

/// First Philox word for counter (i, stream) and key (seed, 0), as make_goldens.py draws it.
fn word(i: usize, stream: usize, seed: u32) -> u32 {
    philox4x32([i as u32, stream as u32, 0, 0], [seed, 0])[0]
}

pub fn uniform(n: usize, stream: usize, bound: f32) -> Vec<f32> {
    (0..n).map(|i| ((word(i, stream, 1) >> 8) as f32 / (1u32 << 23) as f32 - 1.0) * bound).collect()
}

/// Norm and eight random-sign projections.
pub fn fingerprint(values: &[f32], stream: usize) -> Vec<f64> {
    let norm = values.iter().map(|&v| f64::from(v) * f64::from(v)).sum::<f64>().sqrt();
    let projection = |j: u32| -> f64 {
        values
            .iter()
            .enumerate()
            .map(|(i, &v)| if word(i, stream, 100 + j) & 1 == 0 { f64::from(v) } else { -f64::from(v) })
            .sum()
    };
    std::iter::once(norm).chain((0..8).map(projection)).collect()
}
