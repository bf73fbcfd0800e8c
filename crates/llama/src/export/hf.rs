//! A merged model as a Hugging Face checkpoint: `config.json`, safetensors in one file or shards with their index,
//! the tokenizer's files and the chat template.
//!
//! The directory of a safetensors file follows from names and shapes, so it is written first and the weights are streamed
//! behind it.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::gguf::check_range;
use super::merge::Merged;
use super::quantize::quantize;
use super::{Output, Watch, block_rows};
use crate::adapter::write_atomically;
use crate::checkpoint::Checkpoint;
use crate::config::{LlamaConfig, RopeScaling};
use crate::error::{Error, Result};
use crate::ggml::BlockType;
use crate::json_file::read_companion;

/// What the weights are stored in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype16 {
    /// As the base is, if that is 16-bit; else f16.
    Auto,
    F16,
    Bf16,
    /// Not 16-bit: twice the size, nothing rounded.
    F32,
}

#[derive(Clone, Copy, Debug)]
pub struct HfOptions {
    pub dtype: Dtype16,
    /// Bytes of weights in one file.
    pub max_shard_size: u64,
}

/// Files of a base directory that hold for the merged model as they are.
const COPIED: [&str; 9] = [
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "LICENSE",
];

/// Writes the checkpoint into the directory `dir`, which is there.
///
/// # Errors
/// Weights that cannot be read or do not fit the dtype, a tokenizer or configuration that has no form there, a file system
/// that refuses.
pub fn write_hf(dir: &Path, merged: &Merged<'_>, options: HfOptions, watch: Watch<'_>) -> Result<()> {
    let block_type = match options.dtype {
        Dtype16::F16 => BlockType::F16,
        Dtype16::Bf16 => BlockType::Bf16,
        Dtype16::F32 => BlockType::F32,
        Dtype16::Auto => match merged.checkpoint.storage_name().as_deref() {
            Some("BF16") => BlockType::Bf16,
            _ => BlockType::F16,
        },
    };
    // The small files first: what is wrong with them shows before gigabytes are written.
    let config = config_json(merged.checkpoint, block_type)?;
    write_json(&dir.join("config.json"), &config)?;
    match merged.checkpoint.directory() {
        Some(base) => copy_companions(base, dir)?,
        None => make_companions(merged.checkpoint, dir)?,
    }
    write_weights(dir, merged, block_type, options.max_shard_size, watch)
}

fn write_json(path: &Path, value: &Value) -> Result<()> {
    let text = serde_json::to_string_pretty(value).map_err(|e| Error::file(path, e.to_string()))?;
    write_atomically(path, (text + "\n").as_bytes())
}

struct Tensor {
    name: String,
    shape: Vec<usize>,
    bytes: u64,
}

fn write_weights(
    dir: &Path,
    merged: &Merged<'_>,
    block_type: BlockType,
    max_shard_size: u64,
    watch: Watch<'_>,
) -> Result<()> {
    let tensors: Vec<Tensor> = merged
        .tensors()
        .into_iter()
        .map(|(name, shape)| {
            let elements: u64 = shape.iter().map(|&n| n as u64).product();
            Tensor { name, shape, bytes: elements * block_type.bytes() as u64 }
        })
        .collect();
    let total: u64 = tensors.iter().map(|t| t.bytes).sum();
    let mut shards: Vec<&[Tensor]> = Vec::new();
    let (mut first, mut size) = (0, 0);
    for (i, tensor) in tensors.iter().enumerate() {
        if i > first && size + tensor.bytes > max_shard_size {
            shards.push(&tensors[first..i]);
            (first, size) = (i, 0);
        }
        size += tensor.bytes;
    }
    shards.push(&tensors[first..]);
    let (mut weight_map, mut written) = (Map::new(), 0);
    for (number, shard) in shards.iter().enumerate() {
        let name = match shards.len() {
            1 => "model.safetensors".to_string(),
            n => format!("model-{:05}-of-{n:05}.safetensors", number + 1),
        };
        let mut out = Output::create(&dir.join(&name))?;
        out.write(&directory(shard, block_type))?;
        for tensor in *shard {
            weight_map.insert(tensor.name.clone(), name.clone().into());
            let mut bytes = Vec::new();
            if tensor.shape.len() == 1 {
                quantize(block_type, &merged.checkpoint.vector(&tensor.name)?, &mut bytes);
                out.write(&bytes)?;
                written += bytes.len() as u64;
                continue;
            }
            let matrix = merged.matrix(&tensor.name)?;
            let (rows, cols) = (matrix.rows(), matrix.cols());
            let step = block_rows(cols).min(rows);
            let mut values = vec![0f32; step * cols];
            for first in (0..rows).step_by(step) {
                let n = step.min(rows - first);
                let values = &mut values[..n * cols];
                matrix.read(first..first + n, values)?;
                check_range(block_type, &tensor.name, values)?;
                bytes.clear();
                quantize(block_type, values, &mut bytes);
                out.write(&bytes)?;
                written += bytes.len() as u64;
                if !watch(written, total) {
                    return Err(Error::Stopped);
                }
            }
        }
        out.finish()?;
    }
    if shards.len() > 1 {
        let index = json!({"metadata": {"total_size": total}, "weight_map": weight_map});
        write_json(&dir.join("model.safetensors.index.json"), &index)?;
    }
    watch(total, total);
    Ok(())
}

/// Length and JSON directory in front of a shard's data; the data begin at a multiple of eight bytes.
fn directory(shard: &[Tensor], block_type: BlockType) -> Vec<u8> {
    let mut entries = Map::new();
    entries.insert("__metadata__".into(), json!({"format": "pt"}));
    let mut at = 0;
    for t in shard {
        let entry = json!({"dtype": block_type.name(), "shape": t.shape, "data_offsets": [at, at + t.bytes]});
        entries.insert(t.name.clone(), entry);
        at += t.bytes;
    }
    let mut json = Value::Object(entries).to_string().into_bytes();
    json.resize(json.len().next_multiple_of(8), b' ');
    let mut head = (json.len() as u64).to_le_bytes().to_vec();
    head.extend(json);
    head
}

fn torch_dtype(block_type: BlockType) -> &'static str {
    match block_type {
        BlockType::F32 => "float32",
        BlockType::Bf16 => "bfloat16",
        _ => "float16",
    }
}

/// The shortest decimal that reads back as this f32.
fn decimal(x: f32) -> Value {
    json!(x.to_string().parse::<f64>().unwrap_or(f64::from(x)))
}

fn config_json(checkpoint: &Checkpoint, block_type: BlockType) -> Result<Value> {
    let dtype = torch_dtype(block_type);
    if let Some(base) = checkpoint.directory() {
        let mut config = read_companion(&base.join("config.json"))?.unwrap_or_default();
        if let Some(config) = config.as_object_mut() {
            config.remove("quantization_config");
            config.remove("_name_or_path");
            // Transformers 4 and 5.
            config.insert("torch_dtype".into(), dtype.into());
            config.insert("dtype".into(), dtype.into());
        }
        return Ok(config);
    }
    let c = checkpoint.config();
    let scaling = rope_scaling(c)?;
    let mut parameters = scaling.clone().unwrap_or_else(|| json!({"rope_type": "default"}));
    parameters["rope_theta"] = decimal(c.rope_theta);
    let eos = match c.eos_token_ids.as_slice() {
        [] => Value::Null,
        [one] => json!(one),
        several => json!(several),
    };
    Ok(json!({
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": false,
        "attention_dropout": 0.0,
        "bos_token_id": c.bos_token_id,
        "dtype": dtype,
        "eos_token_id": eos,
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "hidden_size": c.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": c.intermediate_size,
        "max_position_embeddings": c.max_position_embeddings,
        "mlp_bias": false,
        "model_type": "llama",
        "num_attention_heads": c.num_attention_heads,
        "num_hidden_layers": c.num_hidden_layers,
        "num_key_value_heads": c.num_key_value_heads,
        "pad_token_id": c.pad_token_id,
        "pretraining_tp": 1,
        "rms_norm_eps": decimal(c.rms_norm_eps),
        "rope_parameters": parameters,
        "rope_scaling": scaling,
        "rope_theta": decimal(c.rope_theta),
        "tie_word_embeddings": c.tie_word_embeddings,
        "torch_dtype": dtype,
        "use_cache": true,
        "vocab_size": c.vocab_size,
    }))
}

/// `rope_scaling` of `config.json`. A GGUF file has only the divisors of Llama 3.1's scaling; the factors that it is known
/// with are tried.
fn rope_scaling(c: &LlamaConfig) -> Result<Option<Value>> {
    let llama3 = |factor: f32, low: f32, high: f32, original: usize| {
        json!({
            "rope_type": "llama3", "factor": decimal(factor), "low_freq_factor": decimal(low),
            "high_freq_factor": decimal(high), "original_max_position_embeddings": original
        })
    };
    match &c.rope_scaling {
        None => Ok(None),
        Some(RopeScaling::Linear { factor }) => Ok(Some(json!({"rope_type": "linear", "factor": decimal(*factor)}))),
        Some(RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings }) => {
            Ok(Some(llama3(*factor, *low_freq_factor, *high_freq_factor, *original_max_position_embeddings)))
        }
        Some(RopeScaling::Factors { .. }) => {
            let wanted = c.inverse_frequencies();
            for factor in [8.0, 32.0] {
                let scaling = RopeScaling::Llama3 {
                    factor,
                    low_freq_factor: 1.0,
                    high_freq_factor: 4.0,
                    original_max_position_embeddings: 8192,
                };
                let found = LlamaConfig { rope_scaling: Some(scaling), ..c.clone() }.inverse_frequencies();
                if wanted.iter().zip(&found).all(|(w, f)| (w - f).abs() <= 1e-4 * w.abs()) {
                    return Ok(Some(llama3(factor, 1.0, 4.0, 8192)));
                }
            }
            Err(Error::Config(
                "the divisors of its rotary frequencies are not those of Llama 3.1 or 3.2, and config.json cannot say them\n  hint: export to GGUF".into(),
            ))
        }
    }
}

fn copy_companions(base: &Path, dir: &Path) -> Result<()> {
    for name in COPIED {
        let (from, to) = (base.join(name), dir.join(name));
        if from.is_file() {
            std::fs::copy(&from, &to).map_err(Error::write(&to))?;
        }
    }
    Ok(())
}

/// The files of the tokenizer for a base that has none of its own.
fn make_companions(checkpoint: &Checkpoint, dir: &Path) -> Result<()> {
    let tokenizer = checkpoint.tokenizer()?;
    let path = dir.join("tokenizer.json");
    let json = tokenizer.to_json()?.to_string();
    write_atomically(&path, json.as_bytes())?;
    let c = checkpoint.config();
    let mut config = Map::new();
    let mut special = Map::new();
    for (key, id) in [
        ("bos_token", tokenizer.bos_token_id()),
        ("eos_token", tokenizer.eos_token_id()),
        ("unk_token", tokenizer.unk_token_id()),
        ("pad_token", tokenizer.pad_token_id()),
    ] {
        if let Some(token) = id.and_then(|id| tokenizer.id_to_token(id)) {
            config.insert(key.into(), token.into());
            special.insert(key.into(), token.into());
        }
    }
    config.insert("tokenizer_class".into(), "PreTrainedTokenizerFast".into());
    config.insert("model_max_length".into(), c.max_position_embeddings.into());
    config.insert("clean_up_tokenization_spaces".into(), false.into());
    if let Ok(template) = checkpoint.chat_template() {
        config.insert("chat_template".into(), template.source().into());
        write_atomically(&dir.join("chat_template.jinja"), template.source().as_bytes())?;
    }
    write_json(&dir.join("tokenizer_config.json"), &Value::Object(config))?;
    write_json(&dir.join("special_tokens_map.json"), &Value::Object(special))?;
    let eos = if c.eos_token_ids.len() == 1 { json!(c.eos_token_ids[0]) } else { json!(c.eos_token_ids) };
    let generation = json!({"bos_token_id": c.bos_token_id, "eos_token_id": eos, "pad_token_id": c.pad_token_id});
    write_json(&dir.join("generation_config.json"), &generation)
}
