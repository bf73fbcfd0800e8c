//! `checkpoint-N/`: PEFT files, `trainer_state.json`, and everything that a bit-for-bit continuation needs in
//! `training_state.safetensors`. A directory is written under a temporary name and renamed, so it is there whole or not at all.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use cashtag_backend::Backend;
use cashtag_llama::adapter::{Adapter, write_atomically};
use cashtag_llama::config::LlamaConfig;
use cashtag_llama::lora::Lora;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::{Deserialize, Serialize};

use crate::arguments::TrainingArguments;
use crate::error::{Error, Result};
use crate::state::TrainerState;

pub const STATE_FILE: &str = "training_state.safetensors";
pub const TRAINER_STATE_FILE: &str = "trainer_state.json";

/// What the safetensors file's metadata carries beside the tensors.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Position {
    pub state: TrainerState,
    /// Micro-batches so far: the counter of the dropout masks.
    pub micro_step: u32,
    pub optimizer_step: u32,
    pub loss_scale: f32,
    pub steps_since_overflow: usize,
    /// Sum and number of step losses since the last log entry.
    pub window: (f64, usize),
    /// Arguments, data and model that the run began with, to refuse a continuation of something else.
    pub fingerprint: String,
}

/// Factors and optimizer states of both groups, in host memory.
#[derive(Clone, Debug, PartialEq)]
pub struct OptimizerState {
    /// `[A, B]`, each `[parameter, m, v]`.
    pub groups: [[Vec<f32>; 3]; 2],
}

const NAMES: [[&str; 3]; 2] = [["a.parameter", "a.m", "a.v"], ["b.parameter", "b.m", "b.v"]];

impl OptimizerState {
    pub fn download<B: Backend>(backend: &B, lora: &Lora<B>) -> Result<Self> {
        let group = |g: &cashtag_llama::lora::Group<B>| -> Result<[Vec<f32>; 3]> {
            let Some(t) = &g.training else { return Err(Error::Invalid("the adapter is not trainable".into())) };
            let mut values = [vec![0.0; g.len], vec![0.0; g.len], vec![0.0; g.len]];
            for (buffer, out) in [&g.parameter, &t.m, &t.v].into_iter().zip(&mut values) {
                backend.download(buffer, 0, out)?;
            }
            Ok(values)
        };
        Ok(Self { groups: [group(&lora.a)?, group(&lora.b)?] })
    }

    pub fn upload<B: Backend>(&self, backend: &B, lora: &mut Lora<B>) -> Result<()> {
        for (group, [parameter, m, v]) in [&mut lora.a, &mut lora.b].into_iter().zip(&self.groups) {
            group.upload(backend, parameter)?;
            let Some(t) = &mut group.training else {
                return Err(Error::Invalid("the adapter is not trainable".into()));
            };
            backend.upload(m, &mut t.m, 0)?;
            backend.upload(v, &mut t.v, 0)?;
        }
        Ok(())
    }
}

fn write_error(path: &Path) -> impl FnOnce(std::io::Error) -> Error + '_ {
    move |source| Error::Write { path: path.to_owned(), source }
}

fn bytes_of(values: &[f32]) -> &[u8] {
    // SAFETY: f32 has no padding and any byte pattern is a valid u8; the length covers exactly the slice.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

/// Writes `<run>/checkpoint-<step>/` and returns its path.
///
/// # Errors
/// The file system refuses; what was there before is intact.
pub fn save(
    run: &Path,
    adapter: &Adapter,
    model: &LlamaConfig,
    optimizer: &OptimizerState,
    position: &Position,
    arguments: &TrainingArguments,
) -> Result<PathBuf> {
    let path = run.join(format!("checkpoint-{}", position.state.global_step));
    let temporary = run.join(format!(".checkpoint-{}.tmp", position.state.global_step));
    let _ = fs::remove_dir_all(&temporary);
    let write = || -> Result<()> {
        fs::create_dir_all(&temporary).map_err(write_error(&temporary))?;
        adapter.save(&temporary, model)?;
        let mut views = Vec::new();
        for (names, group) in NAMES.iter().zip(&optimizer.groups) {
            for (name, values) in names.iter().zip(group) {
                let view = TensorView::new(Dtype::F32, vec![values.len()], bytes_of(values))
                    .map_err(|e| Error::Invalid(e.to_string()))?;
                views.push((name.to_string(), view));
            }
        }
        let text = serde_json::to_string(position).map_err(|e| Error::Invalid(e.to_string()))?;
        let metadata = HashMap::from([("position".to_string(), text)]);
        let bytes = safetensors::serialize(views, Some(metadata)).map_err(|e| Error::Invalid(e.to_string()))?;
        write_atomically(&temporary.join(STATE_FILE), &bytes)?;
        let text = serde_json::to_string_pretty(&position.state.to_json(arguments))
            .map_err(|e| Error::Invalid(e.to_string()))?;
        write_atomically(&temporary.join(TRAINER_STATE_FILE), (text + "\n").as_bytes())?;
        let _ = fs::remove_dir_all(&path);
        fs::rename(&temporary, &path).map_err(write_error(&path))?;
        // The rename itself must survive a power cut.
        fs::File::open(run).and_then(|d| d.sync_all()).map_err(write_error(run))
    };
    write().inspect_err(|_| {
        let _ = fs::remove_dir_all(&temporary);
    })?;
    Ok(path)
}

/// Checkpoints of a run directory, oldest first.
pub fn list(run: &Path) -> Vec<(usize, PathBuf)> {
    let mut found: Vec<(usize, PathBuf)> = fs::read_dir(run)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|e| {
            let step = e.file_name().to_str()?.strip_prefix("checkpoint-")?.parse().ok()?;
            Some((step, e.path()))
        })
        .collect();
    found.sort();
    found
}

/// A checkpoint, read back.
pub struct Loaded {
    pub path: PathBuf,
    pub position: Position,
    pub optimizer: OptimizerState,
}

/// Reads one checkpoint; `sizes` are the numbers of A and B parameters that the run has.
///
/// # Errors
/// A file that is missing, damaged or of another run.
pub fn load(path: &Path, sizes: [usize; 2]) -> Result<Loaded> {
    let bad = |what: String| Error::Checkpoint { path: path.to_owned(), what };
    let bytes = fs::read(path.join(STATE_FILE)).map_err(|e| bad(format!("{STATE_FILE}: {e}")))?;
    let file = SafeTensors::deserialize(&bytes).map_err(|e| bad(format!("{STATE_FILE} is damaged: {e}")))?;
    let (_, header) = SafeTensors::read_metadata(&bytes).map_err(|e| bad(format!("{STATE_FILE} is damaged: {e}")))?;
    let text = header.metadata().as_ref().and_then(|m| m.get("position"));
    let text = text.ok_or_else(|| bad(format!("{STATE_FILE} has no position in it")))?;
    let position: Position = serde_json::from_str(text).map_err(|e| bad(format!("{STATE_FILE}: {e}")))?;
    let mut groups: [[Vec<f32>; 3]; 2] = Default::default();
    for ((names, group), size) in NAMES.iter().zip(&mut groups).zip(sizes) {
        for (name, values) in names.iter().zip(group) {
            let tensor = file.tensor(name).map_err(|e| bad(format!("{STATE_FILE}: {name}: {e}")))?;
            if tensor.dtype() != Dtype::F32 || tensor.shape() != [size] {
                let found = tensor.shape();
                return Err(bad(format!("{STATE_FILE}: {name} has shape {found:?}, this run needs [{size}]")));
            }
            values.extend(tensor.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])));
        }
    }
    Ok(Loaded { path: path.to_owned(), position, optimizer: OptimizerState { groups } })
}

/// The newest checkpoint that can be read; what is wrong with newer ones is said through `warn`.
///
/// # Errors
/// There are checkpoints but none can be read, or the newest readable one belongs to another run.
pub fn newest(
    run: &Path,
    sizes: [usize; 2],
    fingerprint: &str,
    mut warn: impl FnMut(String),
) -> Result<Option<Loaded>> {
    let all = list(run);
    let mut last = None;
    for (_, path) in all.iter().rev() {
        match load(path, sizes) {
            Ok(loaded) if loaded.position.fingerprint == fingerprint => return Ok(Some(loaded)),
            Ok(_) => {
                let what = "it belongs to a run with other data, model or arguments\n  hint: choose another --output-dir, or the configuration that the run began with".into();
                return Err(Error::Checkpoint { path: path.clone(), what });
            }
            Err(e) => {
                warn(format!("{e}; falling back to the checkpoint before it"));
                last = Some(e);
            }
        }
    }
    last.map_or(Ok(None), Err)
}
