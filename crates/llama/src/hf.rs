//! Checkpoints in Hugging Face layout: a directory with `config.json` and safetensors files, one or sharded, in F32, F16,
//! BF16 or bitsandbytes' NF4.
//!
//! The files are memory-mapped; their directories are checked (sizes against shapes, ranges against the file) before any of
//! it is used.

mod config;
mod safetensors;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;

use self::safetensors::{Entry, Shard};
use crate::config::LlamaConfig;
use crate::error::{Error, Result, printable, quoted};
use crate::ggml::BlockType;
use crate::json_file::{read_companion, read_limited};
use crate::weights::{Matrix, NF4_CODEBOOK, Storage, first_not_finite};

/// Largest `model.safetensors.index.json`; Llama-3.1-405B's has 120 kB.
const MAX_INDEX: u64 = 8 << 20;
const MAX_SHARDS: usize = 4096;

/// A checkpoint directory.
pub(crate) struct HfCheckpoint {
    dir: PathBuf,
    shards: Vec<Shard>,
    /// Tensor → shard. Companions of NF4 tensors are in it too.
    index: HashMap<String, usize>,
    config: LlamaConfig,
}

impl HfCheckpoint {
    pub(crate) fn open(dir: &Path) -> Result<Self> {
        let config_path = dir.join("config.json");
        if !config_path.is_file() {
            let what = if dir.join("adapter_config.json").is_file() {
                "no config.json: this is an adapter, not a model\n  hint: give the base model here and the adapter with its own option"
            } else {
                "no config.json here, expected a model in Hugging Face layout or a .gguf file"
            };
            return Err(Error::file(dir, what));
        }
        let json = read_companion(&config_path)?.unwrap_or_default();
        let generation = read_companion(&dir.join("generation_config.json"))?.unwrap_or_default();
        let config = config::read(&config_path, &json, &generation)?;
        let shards = shard_names(dir)?.iter().map(|name| Shard::open(&dir.join(name))).collect::<Result<Vec<_>>>()?;
        let mut index = HashMap::new();
        for (number, shard) in shards.iter().enumerate() {
            for name in shard.entries.keys() {
                if index.insert(name.clone(), number).is_some() {
                    return Err(Error::tensor(&shard.path, printable(name), "stands in another shard as well"));
                }
            }
        }
        Ok(HfCheckpoint { dir: dir.to_owned(), shards, index, config })
    }

    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    pub(crate) fn config(&self) -> &LlamaConfig {
        &self.config
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        self.index.contains_key(name)
    }

    /// Names of the model's tensors, without the companions of NF4 tensors.
    pub(crate) fn names(&self) -> Vec<String> {
        let companion =
            |name: &str| name.rsplit_once(".weight.").is_some_and(|(base, _)| self.has(&format!("{base}.weight")));
        self.index.keys().filter(|name| !companion(name)).cloned().collect()
    }

    /// Bytes of all files.
    pub(crate) fn size(&self) -> u64 {
        self.shards.iter().map(|shard| shard.bytes.len() as u64).sum()
    }

    /// What the weights are stored in, for people: "BF16", "NF4".
    pub(crate) fn storage_name(&self) -> String {
        if self.index.keys().any(|name| name.ends_with(".quant_state.bitsandbytes__nf4")) {
            return "NF4".into();
        }
        self.find("model.layers.0.mlp.up_proj.weight").map_or_else(|| "?".into(), |(_, entry)| entry.dtype.clone())
    }

    fn find(&self, name: &str) -> Option<(&Shard, &Entry)> {
        let shard = self.shards.get(*self.index.get(name)?)?;
        Some((shard, shard.entries.get(name)?))
    }

    fn require(&self, name: &str) -> Result<(&Shard, &Entry)> {
        self.find(name).ok_or_else(|| Error::tensor(&self.dir, name, "is missing"))
    }

    /// Rows and columns of a matrix, or length and 1 of a vector, without reading it.
    pub(crate) fn shape(&self, name: &str) -> Result<Vec<usize>> {
        let (_, entry) = self.require(name)?;
        match self.find(&nf4_state_name(name)) {
            Some(_) => Ok(self.nf4_state(name)?.shape),
            None => Ok(entry.shape.clone()),
        }
    }

    /// A dense vector as f32.
    pub(crate) fn vector(&self, name: &str) -> Result<Vec<f32>> {
        let (shard, entry) = self.require(name)?;
        let fail = |what: String| Error::tensor(&shard.path, name, what);
        let block_type = dense_type(&entry.dtype).ok_or_else(|| fail(unreadable(&entry.dtype)))?;
        if entry.shape.len() != 1 {
            return Err(fail(format!("shape {:?}, expected a vector", entry.shape)));
        }
        let mut out = vec![0.0; entry.shape[0]];
        block_type.dequantize(shard.data(entry), &mut out);
        Ok(out)
    }

    /// A matrix, dense or NF4.
    pub(crate) fn matrix(&self, name: &str) -> Result<Matrix<'_>> {
        let (shard, entry) = self.require(name)?;
        if self.has(&nf4_state_name(name)) {
            return self.nf4_matrix(name, shard, entry);
        }
        let fail = |what: String| Error::tensor(&shard.path, name, what);
        let block_type = dense_type(&entry.dtype).ok_or_else(|| fail(unreadable(&entry.dtype)))?;
        let &[rows, cols] = entry.shape.as_slice() else {
            return Err(fail(format!("shape {:?}, expected a matrix", entry.shape)));
        };
        let storage = Storage::Blocks { bytes: shard.data(entry), block_type, permuted_heads: None };
        Ok(Matrix { name: name.to_owned(), rows, cols, storage })
    }

    fn nf4_state(&self, name: &str) -> Result<Nf4State> {
        let state_name = nf4_state_name(name);
        let (shard, entry) = self.require(&state_name)?;
        let fail = |what: String| Error::tensor(&shard.path, &state_name, what);
        let bytes = shard.data(entry);
        if bytes.len() > 64 << 10 {
            return Err(fail(format!("{} bytes, expected a short JSON text", bytes.len())));
        }
        let state: Nf4State = serde_json::from_slice(bytes).map_err(|error| fail(error.to_string()))?;
        if state.quant_type != "nf4" || !(2..=4096).contains(&state.blocksize) || state.shape.len() != 2 {
            return Err(fail(format!(
                "quant_type {}, blocksize {}, shape {:?}, expected an nf4 matrix",
                quoted(&state.quant_type),
                state.blocksize,
                state.shape
            )));
        }
        Ok(state)
    }

    /// A floating-point companion of an NF4 tensor with `length` elements.
    fn floats(&self, name: &str, length: usize) -> Result<Vec<f32>> {
        let (shard, entry) = self.require(name)?;
        let values = match entry.dtype.as_str() {
            "F32" if entry.range.len() == 4 * length => {
                let mut values = vec![0.0; length];
                BlockType::F32.dequantize(shard.data(entry), &mut values);
                values
            }
            dtype => {
                let what = format!("{dtype} of shape {:?}, expected {length} values of F32", entry.shape);
                return Err(Error::tensor(&shard.path, name, what));
            }
        };
        match first_not_finite(&values) {
            None => Ok(values),
            Some(at) => Err(Error::tensor(&shard.path, name, format!("element {at} is {}", values[at]))),
        }
    }

    fn nf4_matrix<'a>(&'a self, name: &str, shard: &'a Shard, entry: &'a Entry) -> Result<Matrix<'a>> {
        let state = self.nf4_state(name)?;
        let fail = |what: String| Error::tensor(&shard.path, name, what);
        let (rows, cols) = (state.shape[0], state.shape[1]);
        let elements =
            rows.checked_mul(cols).filter(|&n| n > 0).ok_or_else(|| fail(format!("shape {:?}", state.shape)))?;
        if entry.dtype != "U8" || entry.range.len() != elements.div_ceil(2) {
            return Err(fail(format!(
                "{} bytes of {}, expected {} of U8 for NF4 of shape {:?}",
                entry.range.len(),
                entry.dtype,
                elements.div_ceil(2),
                state.shape
            )));
        }
        let codebook = self.floats(&format!("{name}.quant_map"), 16)?;
        if codebook.iter().zip(NF4_CODEBOOK).any(|(a, b)| (a - b).abs() > 1e-6) {
            return Err(fail("its quant_map is not NF4's codebook".into()));
        }
        let blocks = elements.div_ceil(state.blocksize);
        let absmax_name = format!("{name}.absmax");
        let absmax = if self.has(&format!("{name}.nested_absmax")) {
            let (absmax_shard, absmax) = self.require(&absmax_name)?;
            if absmax.dtype != "U8" || absmax.range.len() != blocks {
                let what = format!("{} of shape {:?}, expected {blocks} codes of U8", absmax.dtype, absmax.shape);
                return Err(Error::tensor(&absmax_shard.path, absmax_name, what));
            }
            let (Some(nested), Some(offset)) = (state.nested_blocksize, state.nested_offset) else {
                return Err(fail("its quant_state lacks nested_blocksize or nested_offset".into()));
            };
            if !(1..=65_536).contains(&nested) || !offset.is_finite() {
                return Err(fail(format!("nested_blocksize {nested}, nested_offset {offset}")));
            }
            let map = self.floats(&format!("{name}.nested_quant_map"), 256)?;
            let scales = self.floats(&format!("{name}.nested_absmax"), blocks.div_ceil(nested))?;
            let codes = absmax_shard.data(absmax).iter().enumerate();
            codes.map(|(at, &code)| map[code as usize] * scales[at / nested] + offset).collect()
        } else {
            self.floats(&absmax_name, blocks)?
        };
        let storage = Storage::Nf4 { codes: shard.data(entry), absmax: absmax.into(), block: state.blocksize };
        Ok(Matrix { name: name.to_owned(), rows, cols, storage })
    }
}

fn nf4_state_name(name: &str) -> String {
    format!("{name}.quant_state.bitsandbytes__nf4")
}

fn dense_type(dtype: &str) -> Option<BlockType> {
    match dtype {
        "F32" => Some(BlockType::F32),
        "F16" => Some(BlockType::F16),
        "BF16" => Some(BlockType::Bf16),
        _ => None,
    }
}

fn unreadable(dtype: &str) -> String {
    format!("dtype {dtype}, expected F32, F16, BF16 or bitsandbytes NF4")
}

#[derive(Deserialize)]
struct Nf4State {
    quant_type: String,
    blocksize: usize,
    shape: Vec<usize>,
    nested_blocksize: Option<usize>,
    nested_offset: Option<f32>,
}

/// The safetensors files of a directory, in order.
fn shard_names(dir: &Path) -> Result<Vec<String>> {
    if dir.join("model.safetensors").is_file() {
        return Ok(vec!["model.safetensors".into()]);
    }
    let path = dir.join("model.safetensors.index.json");
    if !path.is_file() {
        let pickled = ["pytorch_model.bin", "pytorch_model.bin.index.json"].iter().any(|name| dir.join(name).is_file());
        let what = if pickled {
            "the weights are pickled (pytorch_model.bin), expected model.safetensors\n  hint: save the model again with safe_serialization=True"
        } else {
            "no model.safetensors and no model.safetensors.index.json here"
        };
        return Err(Error::file(dir, what));
    }
    #[derive(Deserialize)]
    struct Index {
        weight_map: HashMap<String, String>,
    }
    let bytes = read_limited(&path, MAX_INDEX)?;
    let index: Index = serde_json::from_slice(&bytes).map_err(|error| Error::file(&path, error.to_string()))?;
    let mut names: Vec<String> = index.weight_map.into_values().collect();
    names.sort();
    names.dedup();
    if names.is_empty() || names.len() > MAX_SHARDS {
        return Err(Error::file(&path, format!("{} shards, expected 1 to {MAX_SHARDS}", names.len())));
    }
    for name in &names {
        // An index must not lead out of its directory.
        if name.contains(['/', '\\', '\0']) || !name.ends_with(".safetensors") {
            return Err(Error::file(&path, format!("{} is no name of a shard", quoted(name))));
        }
        if !dir.join(name).is_file() {
            return Err(Error::file(&path, format!("shard {name} is not here\n  hint: download it as well")));
        }
    }
    Ok(names)
}

/// The shape that a `config.json` describes.
///
/// # Errors
/// A file that cannot be read, or describes no Llama.
pub fn read_config(path: &Path) -> Result<LlamaConfig> {
    let json = read_companion(path)?.unwrap_or_default();
    config::read(path, &json, &Value::Null)
}
