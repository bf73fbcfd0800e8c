//! `checkpoint-N/`: PEFT files, `trainer_state.json`, and everything that a bit-for-bit continuation needs in
//! `training_state.safetensors`. A directory is written under a temporary name and renamed, so it is there whole or not at all.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use cashtag_llama::adapter::{Adapter, write_atomically};
use cashtag_llama::config::LlamaConfig;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::{Deserialize, Serialize};

use crate::arguments::TrainingArguments;
use crate::error::{Error, Result};
use crate::loss_scale::LossScale;
use crate::optimizer_state::{Expected, OptimizerState, Values};
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
    pub loss_scale: LossScale,
    /// Sum of all step losses.
    pub total_loss: f64,
    /// Steps in a row, up to now, that were not finite; and all that were skipped.
    pub bad_steps: usize,
    pub skipped_steps: usize,
    /// Sum and number of step losses since the last log entry.
    pub window: (f64, usize),
    /// Arguments, data and model that the run began with, to refuse a continuation of something else.
    pub fingerprint: String,
}

fn write_error(path: &Path) -> impl FnOnce(std::io::Error) -> Error + '_ {
    move |source| Error::Write { path: path.to_owned(), source }
}

pub(crate) fn bytes_of(values: &[f32]) -> &[u8] {
    // SAFETY: f32 has no padding and any byte pattern is a valid u8; the length covers exactly the slice.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

fn views(optimizer: &OptimizerState) -> Result<Vec<(String, TensorView<'_>)>> {
    let mut views = Vec::new();
    for (name, values) in &optimizer.tensors {
        let (dtype, len, bytes) = match values {
            Values::F32(v) => (Dtype::F32, v.len(), bytes_of(v)),
            Values::U8(v) => (Dtype::U8, v.len(), &v[..]),
        };
        let view = TensorView::new(dtype, vec![len], bytes).map_err(|e| Error::Invalid(e.to_string()))?;
        views.push((name.clone(), view));
    }
    Ok(views)
}

fn metadata(position: &Position) -> Result<HashMap<String, String>> {
    let text = serde_json::to_string(position).map_err(|e| Error::Invalid(e.to_string()))?;
    Ok(HashMap::from([("position".to_string(), text)]))
}

/// The safetensors file of a state.
pub(crate) fn to_bytes(position: &Position, optimizer: &OptimizerState) -> Result<Vec<u8>> {
    safetensors::serialize(views(optimizer)?, Some(metadata(position)?)).map_err(|e| Error::Invalid(e.to_string()))
}

/// Reads [`to_bytes`] back; what is wrong with them, if something is.
pub(crate) fn from_bytes(bytes: &[u8], expected: &[Expected]) -> Result<(Position, OptimizerState), String> {
    let file = SafeTensors::deserialize(bytes).map_err(|e| format!("it is damaged: {e}"))?;
    let (_, header) = SafeTensors::read_metadata(bytes).map_err(|e| format!("it is damaged: {e}"))?;
    let text = header.metadata().as_ref().and_then(|m| m.get("position"));
    let text = text.ok_or("there is no position in it")?;
    let position: Position = serde_json::from_str(text).map_err(|e| e.to_string())?;
    let mut tensors = Vec::with_capacity(expected.len());
    for Expected { name, len, codes } in expected {
        let tensor = file.tensor(name).map_err(|e| format!("{name}: {e}"))?;
        let dtype = if *codes { Dtype::U8 } else { Dtype::F32 };
        if tensor.dtype() != dtype || tensor.shape() != [*len] {
            let (found, shape) = (tensor.dtype(), tensor.shape());
            return Err(format!("{name} is {found:?} of shape {shape:?}, this run needs {dtype:?} of [{len}]"));
        }
        let values = if *codes {
            Values::U8(tensor.data().to_vec())
        } else {
            let words = tensor.data().chunks_exact(4);
            Values::F32(words.map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
        };
        tensors.push((name.clone(), values));
    }
    Ok((position, OptimizerState { tensors }))
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
        // Tensor by tensor: all of them once more in one piece would be the largest thing that a run on a CPU holds.
        let file = temporary.join(STATE_FILE);
        safetensors::serialize_to_file(views(optimizer)?, Some(metadata(position)?), &file).map_err(|e| match e {
            safetensors::SafeTensorError::IoError(source) => Error::Write { path: file.clone(), source },
            other => Error::Invalid(other.to_string()),
        })?;
        fs::File::open(&file).and_then(|f| f.sync_all()).map_err(write_error(&file))?;
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

/// Reads one checkpoint; `expected` is what the run's adapter and optimizer need of it.
///
/// # Errors
/// A file that is missing, damaged or of another run.
pub fn load(path: &Path, expected: &[Expected]) -> Result<Loaded> {
    let bad = |what: String| Error::Checkpoint { path: path.to_owned(), what };
    let bytes = fs::read(path.join(STATE_FILE)).map_err(|e| bad(format!("{STATE_FILE}: {e}")))?;
    let (position, optimizer) = from_bytes(&bytes, expected).map_err(|e| bad(format!("{STATE_FILE}: {e}")))?;
    Ok(Loaded { path: path.to_owned(), position, optimizer })
}

/// The newest checkpoint that can be read; what is wrong with newer ones is said through `warn`.
///
/// # Errors
/// There are checkpoints but none can be read, or the newest readable one belongs to another run.
pub fn newest(
    run: &Path,
    expected: &[Expected],
    fingerprint: &str,
    mut warn: impl FnMut(String),
) -> Result<Option<Loaded>> {
    let all = list(run);
    let mut last = None;
    for (_, path) in all.iter().rev() {
        match load(path, expected) {
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
