//! Checkpoints in Hugging Face layout: a directory with `config.json` and safetensors files, one or sharded, in F32, F16,
//! BF16 or bitsandbytes' NF4.
//!
//! A safetensors file is a JSON directory behind its own length, then the data. The files are memory-mapped; the directory
//! is checked (sizes against shapes, ranges against the file) before any of it is used.

use std::collections::HashMap;
use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::{self, MapAccess, Visitor};
use serde_json::Value;

use crate::config::{LlamaConfig, RopeScaling};
use crate::error::{Error, Result, quoted};
use crate::ggml::BlockType;
use crate::gguf::{Bytes, map_file};
use crate::tokenizer::{read_companion, read_limited};
use crate::weights::{Matrix, NF4_CODEBOOK, Storage, first_not_finite};

/// Largest directory of one file that is believed; a shard of Llama-3.1-405B has 20 kB.
const MAX_HEADER: u64 = 8 << 20;
/// Largest `model.safetensors.index.json`; Llama-3.1-405B's has 120 kB.
const MAX_INDEX: u64 = 8 << 20;
const MAX_SHARDS: usize = 4096;

/// One safetensors file.
struct Shard {
    path: PathBuf,
    bytes: Bytes,
    /// Where the data begin.
    data: usize,
    entries: HashMap<String, Entry>,
}

/// An entry of the directory, its range checked against the file.
#[derive(Clone, Debug)]
struct Entry {
    dtype: String,
    shape: Vec<usize>,
    range: Range<usize>,
}

#[derive(Deserialize)]
struct EntryJson {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

/// The directory, in which no name may stand twice.
struct Directory(HashMap<String, EntryJson>);

impl<'de> Deserialize<'de> for Directory {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct DirectoryVisitor;
        impl<'de> Visitor<'de> for DirectoryVisitor {
            type Value = Directory;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a directory of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Directory, A::Error> {
                let mut entries = HashMap::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        map.next_value::<de::IgnoredAny>()?;
                    } else if entries.contains_key(&name) {
                        return Err(de::Error::custom(format!("tensor {} stands twice", quoted(&name))));
                    } else {
                        let entry = map.next_value()?;
                        entries.insert(name, entry);
                    }
                }
                Ok(Directory(entries))
            }
        }
        deserializer.deserialize_map(DirectoryVisitor)
    }
}

/// Bytes of one element of a safetensors dtype.
fn dtype_size(dtype: &str) -> Option<u64> {
    match dtype {
        "BOOL" | "U8" | "I8" | "F8_E4M3" | "F8_E5M2" => Some(1),
        "U16" | "I16" | "F16" | "BF16" => Some(2),
        "U32" | "I32" | "F32" => Some(4),
        "U64" | "I64" | "F64" => Some(8),
        _ => None,
    }
}

impl Shard {
    fn open(path: &Path) -> Result<Self> {
        Self::parse(path, map_file(path)?)
    }

    fn parse(path: &Path, bytes: Bytes) -> Result<Self> {
        let fail = |what: String| Error::file(path, what);
        let Some((length, rest)) = bytes.split_first_chunk::<8>() else {
            return Err(fail(format!("not a safetensors file: {} bytes long", bytes.len())));
        };
        let length = u64::from_le_bytes(*length);
        if length > MAX_HEADER || length > rest.len() as u64 {
            return Err(fail(format!(
                "not a safetensors file, or truncated: a directory of {length} bytes in a file of {}",
                bytes.len()
            )));
        }
        let (header, data) = rest.split_at(length as usize);
        let directory: Directory =
            serde_json::from_slice(header).map_err(|error| fail(format!("safetensors directory: {error}")))?;
        let mut entries = HashMap::with_capacity(directory.0.len());
        for (name, json) in directory.0 {
            let entry =
                Entry::check(json, data.len() as u64).map_err(|what| Error::tensor(path, printable(&name), what))?;
            entries.insert(name, entry);
        }
        let data = 8 + length as usize;
        Ok(Shard { path: path.to_owned(), bytes, data, entries })
    }

    fn data(&self, entry: &Entry) -> &[u8] {
        self.bytes.get(self.data + entry.range.start..self.data + entry.range.end).unwrap_or(&[])
    }
}

impl Entry {
    fn check(json: EntryJson, available: u64) -> Result<Self, String> {
        let EntryJson { dtype, shape, data_offsets: (start, end) } = json;
        if start > end || end > available {
            return Err(format!(
                "bytes {start} to {end} of {available}\n  hint: the file is truncated, download it again"
            ));
        }
        if shape.len() > 8 {
            return Err(format!("rank {}", shape.len()));
        }
        let Some(size) = dtype_size(&dtype) else {
            return Err(format!("dtype {} is not known", quoted(&dtype)));
        };
        let expected = shape.iter().try_fold(size, |product, &dim| product.checked_mul(dim));
        if expected != Some(end - start) {
            return Err(format!("shape {shape:?} of {dtype} does not take the {} bytes it has", end - start));
        }
        // Each dimension fits: a zero elsewhere would let an absurd one pass.
        let shape = shape.iter().map(|&dim| usize::try_from(dim).map_err(|_| format!("dimension {dim}")));
        Ok(Entry { dtype, shape: shape.collect::<Result<_, _>>()?, range: start as usize..end as usize })
    }
}

fn printable(name: &str) -> String {
    name.chars().take(200).flat_map(char::escape_debug).collect()
}

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
        let config = config(&config_path, &json, &generation)?;
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

/// Reads `config.json` of Transformers 4 (`rope_theta`, `rope_scaling`) and 5 (`rope_parameters`).
fn config(path: &Path, json: &Value, generation: &Value) -> Result<LlamaConfig> {
    let fail = |what: String| Error::file(path, what);
    let architectures: Vec<&str> = match json.get("architectures") {
        Some(Value::Array(all)) => all.iter().filter_map(Value::as_str).collect(),
        _ => Vec::new(),
    };
    let model_type = json.get("model_type").and_then(Value::as_str).unwrap_or("missing");
    if model_type != "llama" {
        return Err(fail(format!("model_type is {}, expected \"llama\"", quoted(model_type))));
    }
    if let Some(other) = architectures.iter().find(|name| **name != "LlamaForCausalLM") {
        return Err(fail(format!("architecture {}, expected \"LlamaForCausalLM\"", quoted(other))));
    }
    if let Some(quantization) = json.get("quantization_config").filter(|value| !value.is_null()) {
        let method = quantization.get("quant_method").and_then(Value::as_str).unwrap_or("bitsandbytes");
        let four_bit = quantization.get("load_in_4bit").and_then(Value::as_bool).unwrap_or(false);
        let kind = quantization.get("bnb_4bit_quant_type").and_then(Value::as_str).unwrap_or("fp4");
        if method != "bitsandbytes" || !four_bit || kind != "nf4" {
            return Err(fail(format!(
                "quantised with {} (4-bit: {four_bit}, type {}), expected bitsandbytes NF4 or 16-bit weights",
                quoted(method),
                quoted(kind)
            )));
        }
    }
    for key in ["attention_bias", "mlp_bias"] {
        if json.get(key).and_then(Value::as_bool).unwrap_or(false) {
            return Err(fail(format!("{key} is true, expected a model without biases")));
        }
    }
    if let Some(activation) = json.get("hidden_act").and_then(Value::as_str).filter(|&name| name != "silu") {
        return Err(fail(format!("hidden_act is {}, expected \"silu\"", quoted(activation))));
    }
    let optional = |key: &str| -> Result<Option<usize>> {
        match json.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => match value.as_u64().and_then(|value| usize::try_from(value).ok()) {
                Some(value) => Ok(Some(value)),
                None => Err(fail(format!("{key} is {}, expected a whole number", quoted(&value.to_string())))),
            },
        }
    };
    let required = |key: &str| -> Result<usize> { optional(key)?.ok_or_else(|| fail(format!("{key} is missing"))) };
    let number = |value: Option<&Value>, key: &str, default: f32| -> Result<f32> {
        match value {
            None | Some(Value::Null) => Ok(default),
            Some(value) => value.as_f64().map(|value| value as f32).ok_or_else(|| fail(format!("{key} is no number"))),
        }
    };
    let parameters = json.get("rope_parameters").filter(|value| value.is_object());
    let rope_theta = parameters.and_then(|rope| rope.get("rope_theta")).or_else(|| json.get("rope_theta"));
    let scaling = parameters.or_else(|| json.get("rope_scaling")).filter(|value| value.is_object());
    let hidden_size = required("hidden_size")?;
    let num_attention_heads = required("num_attention_heads")?;
    let head_dim = match optional("head_dim")? {
        Some(head_dim) => head_dim,
        None => hidden_size.checked_div(num_attention_heads).unwrap_or(0),
    };
    let token = |key: &str| json.get(key).and_then(Value::as_u64).and_then(|id| u32::try_from(id).ok());
    let mut eos_token_ids: Vec<u32> = Vec::new();
    for value in [json.get("eos_token_id"), generation.get("eos_token_id")].into_iter().flatten() {
        let ids = value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice);
        for id in ids.iter().filter_map(Value::as_u64).filter_map(|id| u32::try_from(id).ok()) {
            if !eos_token_ids.contains(&id) {
                eos_token_ids.push(id);
            }
        }
    }
    let config = LlamaConfig {
        hidden_size,
        intermediate_size: required("intermediate_size")?,
        num_hidden_layers: required("num_hidden_layers")?,
        num_attention_heads,
        num_key_value_heads: optional("num_key_value_heads")?.unwrap_or(num_attention_heads),
        head_dim,
        vocab_size: required("vocab_size")?,
        max_position_embeddings: optional("max_position_embeddings")?.unwrap_or(2048),
        rms_norm_eps: number(json.get("rms_norm_eps"), "rms_norm_eps", 1e-6)?,
        rope_theta: number(rope_theta, "rope_theta", 10_000.0)?,
        rope_scaling: scaling.map(|scaling| rope_scaling(path, scaling)).transpose()?.flatten(),
        tie_word_embeddings: json.get("tie_word_embeddings").and_then(Value::as_bool).unwrap_or(false),
        bos_token_id: token("bos_token_id"),
        eos_token_ids,
        pad_token_id: token("pad_token_id"),
    };
    config.validate().map_err(|error| fail(error.to_string()))?;
    Ok(config)
}

fn rope_scaling(path: &Path, json: &Value) -> Result<Option<RopeScaling>> {
    let kind = json.get("rope_type").or_else(|| json.get("type")).and_then(Value::as_str).unwrap_or("default");
    let number = |key: &str| -> Result<f32> {
        let value = json.get(key).and_then(Value::as_f64);
        value.map(|value| value as f32).ok_or_else(|| Error::file(path, format!("rope scaling lacks {key}")))
    };
    match kind {
        "default" => Ok(None),
        "linear" => Ok(Some(RopeScaling::Linear { factor: number("factor")? })),
        "llama3" => Ok(Some(RopeScaling::Llama3 {
            factor: number("factor")?,
            low_freq_factor: number("low_freq_factor")?,
            high_freq_factor: number("high_freq_factor")?,
            original_max_position_embeddings: number("original_max_position_embeddings")? as usize,
        })),
        other => Err(Error::file(
            path,
            format!("rope scaling of type {} is not read, expected \"linear\" or \"llama3\"", quoted(other)),
        )),
    }
}
