//! A merged model as one GGUF file that llama.cpp loads.
//!
//! Metadata of a GGUF base is copied, with what the new types make untrue replaced; for a Hugging Face base it is made from
//! the configuration and the tokenizer. Rows of q and k are permuted as llama.cpp expects them.

use std::collections::BTreeMap;
use std::path::Path;

use super::calibrate::Rounding;
use super::merge::Merged;
use super::quantize::quantize;
use super::{Output, Watch, block_rows};
use crate::checkpoint::Checkpoint;
use crate::config::{LlamaConfig, RopeScaling};
use crate::error::{Error, Result};
use crate::ggml::BlockType;
use crate::gguf_llama::{permuted_heads, tensor_name};
use crate::weights::natural_row;

/// What most of a file's matrices are stored in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GgufType {
    F32,
    F16,
    Bf16,
    Q8_0,
    Q4_0,
}

impl GgufType {
    pub const ALL: [GgufType; 5] = [GgufType::F32, GgufType::F16, GgufType::Bf16, GgufType::Q8_0, GgufType::Q4_0];

    pub fn name(self) -> &'static str {
        self.block_type().name()
    }

    /// Whether matrices are stored in blocks with a scale, for which [`Calibration`](super::Calibration) is there.
    pub fn is_quantised(self) -> bool {
        matches!(self, GgufType::Q8_0 | GgufType::Q4_0)
    }

    fn block_type(self) -> BlockType {
        match self {
            GgufType::F32 => BlockType::F32,
            GgufType::F16 => BlockType::F16,
            GgufType::Bf16 => BlockType::Bf16,
            GgufType::Q8_0 => BlockType::Q8_0,
            GgufType::Q4_0 => BlockType::Q4_0,
        }
    }

    /// llama.cpp's number of the file type.
    fn file_type(self) -> u32 {
        match self {
            GgufType::F32 => 0,
            GgufType::F16 => 1,
            GgufType::Q4_0 => 2,
            GgufType::Q8_0 => 7,
            GgufType::Bf16 => 32,
        }
    }

    /// The type of one matrix: the head keeps eight bits where others have four (as llama.cpp keeps it wider), and rows
    /// that are no whole number of blocks stay 16-bit.
    pub(super) fn of(self, name: &str, cols: usize, tied: bool) -> BlockType {
        let head = name == "lm_head.weight" || (tied && name == "model.embed_tokens.weight");
        let wanted = if self == GgufType::Q4_0 && head { BlockType::Q8_0 } else { self.block_type() };
        if cols.is_multiple_of(wanted.block()) { wanted } else { BlockType::F16 }
    }
}

/// Type numbers of GGUF's values.
const UINT32: u32 = 4;
const INT32: u32 = 5;
const FLOAT32: u32 = 6;
const BOOL: u32 = 7;
const STRING: u32 = 8;
const ARRAY: u32 = 9;
const ALIGNMENT: u64 = 32;

/// Metadata in the making.
#[derive(Default)]
pub(super) struct Pairs {
    count: u64,
    bytes: Vec<u8>,
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

impl Pairs {
    fn raw(&mut self, key: &str, kind: u32, value: &[u8]) {
        text(&mut self.bytes, key);
        self.bytes.extend(kind.to_le_bytes());
        self.bytes.extend(value);
        self.count += 1;
    }

    pub(super) fn str(&mut self, key: &str, value: &str) {
        let mut bytes = Vec::new();
        text(&mut bytes, value);
        self.raw(key, STRING, &bytes);
    }

    pub(super) fn u32(&mut self, key: &str, value: u32) {
        self.raw(key, UINT32, &value.to_le_bytes());
    }

    pub(super) fn f32(&mut self, key: &str, value: f32) {
        self.raw(key, FLOAT32, &value.to_le_bytes());
    }

    fn bool(&mut self, key: &str, value: bool) {
        self.raw(key, BOOL, &[value.into()]);
    }

    fn array(&mut self, key: &str, element: u32, count: usize, values: impl FnOnce(&mut Vec<u8>)) {
        let mut bytes = element.to_le_bytes().to_vec();
        bytes.extend((count as u64).to_le_bytes());
        values(&mut bytes);
        self.raw(key, ARRAY, &bytes);
    }
}

/// A tensor of the directory.
pub(super) struct Entry {
    pub(super) name: String,
    /// As PyTorch has it.
    pub(super) shape: Vec<usize>,
    pub(super) block_type: BlockType,
}

impl Entry {
    fn size(&self) -> u64 {
        let elements: u64 = self.shape.iter().map(|&n| n as u64).product();
        self.block_type.size_of(elements).unwrap_or(0)
    }
}

/// Writes everything in front of the data.
pub(super) fn write_directory(out: &mut Output, pairs: &Pairs, entries: &[Entry]) -> Result<()> {
    let mut head = b"GGUF".to_vec();
    head.extend(3u32.to_le_bytes());
    head.extend((entries.len() as u64).to_le_bytes());
    head.extend(pairs.count.to_le_bytes());
    head.extend(&pairs.bytes);
    let mut offset = 0u64;
    for entry in entries {
        text(&mut head, &entry.name);
        head.extend((entry.shape.len() as u32).to_le_bytes());
        // The fastest dimension first.
        entry.shape.iter().rev().for_each(|&dim| head.extend((dim as u64).to_le_bytes()));
        head.extend(entry.block_type.id().to_le_bytes());
        head.extend(offset.to_le_bytes());
        offset = (offset + entry.size()).next_multiple_of(ALIGNMENT);
    }
    out.write(&head)?;
    out.align(ALIGNMENT)
}

/// Ends a tensor's data.
pub(super) fn pad(out: &mut Output) -> Result<()> {
    out.align(ALIGNMENT)
}

/// Writes the model to `path`. `name` stands in the file as the model's; the blocks of the layers come from `rounding`, if there
/// is one.
///
/// # Errors
/// Weights that cannot be read or do not fit the type, a tokenizer that llama.cpp has no name for, a file system that refuses.
pub fn write_gguf(
    path: &Path,
    merged: &Merged<'_>,
    kind: GgufType,
    name: &str,
    mut rounding: Option<&mut dyn Rounding>,
    watch: Watch<'_>,
) -> Result<()> {
    let config = merged.checkpoint.config();
    let tied = config.tie_word_embeddings;
    let mut pairs = Pairs::default();
    match merged.checkpoint.gguf() {
        Some(base) => {
            // What the types, the parts of a file or its alignment say of the base is not true of the copy.
            let stale = ["general.file_type", "general.quantization_version", "general.alignment", "general.name"];
            for (key, value_type, value) in base.raw_pairs() {
                if !stale.contains(&key) && !key.starts_with("split.") && !key.starts_with("quantize.") {
                    pairs.raw(key, value_type, value);
                }
            }
        }
        None => model_metadata(merged.checkpoint, &mut pairs)?,
    }
    pairs.str("general.name", name);
    pairs.u32("general.file_type", kind.file_type());
    pairs.u32("general.quantization_version", 2);

    let tensors = merged.tensors();
    let mut entries = Vec::with_capacity(tensors.len() + 1);
    for (hf_name, shape) in &tensors {
        let name = tensor_name(hf_name).ok_or_else(|| Error::Invalid(format!("{hf_name} has no name in GGUF")))?;
        let block_type = match shape.as_slice() {
            [_, cols] => kind.of(hf_name, *cols, tied),
            _ => BlockType::F32,
        };
        entries.push(Entry { name, shape: shape.clone(), block_type });
    }
    let factors = rope_factors(config);
    if let Some(factors) = &factors {
        entries.push(Entry {
            name: "rope_freqs.weight".into(),
            shape: vec![factors.len()],
            block_type: BlockType::F32,
        });
    }
    let total = entries.iter().map(Entry::size).sum();
    let mut out = Output::create(path)?;
    write_directory(&mut out, &pairs, &entries)?;
    let mut written = 0;
    // Blocks of the layer that is being written.
    let (mut layers, mut ready) = (0, BTreeMap::new());
    for ((hf_name, shape), entry) in tensors.iter().zip(&entries) {
        let mut bytes = Vec::new();
        if let Some(rounding) = &mut rounding
            && hf_name.starts_with(&format!("model.layers.{layers}."))
        {
            ready = rounding.layer(layers, &mut || watch(written, total))?;
            layers += 1;
        }
        if shape.len() == 1 {
            quantize(entry.block_type, &merged.checkpoint.vector(hf_name)?, &mut bytes);
            out.write(&bytes)?;
        } else if let Some(blocks) = ready.remove(hf_name) {
            let stride = blocks.len() / shape[0].max(1);
            match permuted_heads(hf_name, config).map(|heads| shape[0] / heads) {
                None => out.write(&blocks)?,
                Some(head) => {
                    for row in (0..shape[0]).map(|stored| natural_row(stored, head)) {
                        out.write(&blocks[row * stride..(row + 1) * stride])?;
                    }
                }
            }
            if !watch(written + blocks.len() as u64, total) {
                return Err(Error::Stopped);
            }
        } else {
            let matrix = merged.matrix(hf_name)?;
            let (rows, cols) = (matrix.rows(), matrix.cols());
            // Blocks are whole heads, so that permuted rows lie within them.
            let head_rows = permuted_heads(hf_name, config).map(|heads| rows / heads);
            let step = block_rows(cols).next_multiple_of(head_rows.unwrap_or(1));
            let (mut values, mut within) = (vec![0f32; step.min(rows) * cols], 0);
            for first in (0..rows).step_by(step) {
                let n = step.min(rows - first);
                let values = &mut values[..n * cols];
                matrix.read(first..first + n, values)?;
                check_range(entry.block_type, hf_name, values)?;
                bytes.clear();
                match head_rows {
                    None => quantize(entry.block_type, values, &mut bytes),
                    Some(head) => {
                        for row in (0..n).map(|stored| natural_row(stored, head)) {
                            quantize(entry.block_type, &values[row * cols..(row + 1) * cols], &mut bytes);
                        }
                    }
                }
                out.write(&bytes)?;
                within += bytes.len() as u64;
                if !watch(written + within, total) {
                    return Err(Error::Stopped);
                }
            }
        }
        written += entry.size();
        pad(&mut out)?;
    }
    if let Some(factors) = &factors {
        let mut bytes = Vec::new();
        quantize(BlockType::F32, factors, &mut bytes);
        out.write(&bytes)?;
        pad(&mut out)?;
    }
    out.finish()?;
    watch(total, total);
    Ok(())
}

/// f16, and the scales of quantised blocks, end at 65,504.
pub(super) fn check_range(block_type: BlockType, name: &str, values: &[f32]) -> Result<()> {
    let limit = match block_type {
        BlockType::F32 | BlockType::Bf16 => return Ok(()),
        BlockType::Q8_0 => 65_504.0 * 127.0,
        BlockType::Q4_0 => 65_504.0 * 8.0,
        _ => 65_504.0,
    };
    match values.iter().find(|v| v.abs() > limit) {
        None => Ok(()),
        Some(v) => Err(Error::Invalid(format!(
            "{name} holds {v}, which does not fit {}\n  hint: write bf16 or f32",
            block_type.name()
        ))),
    }
}

/// Llama 3.1's scaling as llama.cpp has it: one divisor a frequency.
fn rope_factors(config: &LlamaConfig) -> Option<Vec<f32>> {
    match &config.rope_scaling {
        Some(RopeScaling::Factors { factors }) => Some(factors.clone()),
        Some(RopeScaling::Llama3 { .. }) => {
            let plain = LlamaConfig { rope_scaling: None, ..config.clone() }.inverse_frequencies();
            Some(plain.iter().zip(config.inverse_frequencies()).map(|(plain, scaled)| plain / scaled).collect())
        }
        Some(RopeScaling::Linear { .. }) | None => None,
    }
}

/// Metadata for a base that is no GGUF file.
fn model_metadata(checkpoint: &Checkpoint, pairs: &mut Pairs) -> Result<()> {
    let c = checkpoint.config();
    pairs.str("general.architecture", "llama");
    pairs.str("general.type", "model");
    let size = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    for (key, value) in [
        ("block_count", c.num_hidden_layers),
        ("context_length", c.max_position_embeddings),
        ("embedding_length", c.hidden_size),
        ("feed_forward_length", c.intermediate_size),
        ("attention.head_count", c.num_attention_heads),
        ("attention.head_count_kv", c.num_key_value_heads),
        ("attention.key_length", c.head_dim),
        ("attention.value_length", c.head_dim),
        ("rope.dimension_count", c.head_dim),
        ("vocab_size", c.vocab_size),
    ] {
        pairs.u32(&format!("llama.{key}"), size(value));
    }
    pairs.f32("llama.rope.freq_base", c.rope_theta);
    pairs.f32("llama.attention.layer_norm_rms_epsilon", c.rms_norm_eps);
    if let Some(RopeScaling::Linear { factor }) = c.rope_scaling {
        pairs.str("llama.rope.scaling.type", "linear");
        pairs.f32("llama.rope.scaling.factor", factor);
    }
    let tokenizer = checkpoint.tokenizer()?;
    let vocabulary = tokenizer.to_gguf(c.vocab_size)?;
    pairs.str("tokenizer.ggml.model", vocabulary.model);
    // llama.cpp asks for one in every file.
    pairs.str("tokenizer.ggml.pre", vocabulary.pre.unwrap_or("default"));
    let strings = |values: &[String]| {
        let mut bytes = Vec::new();
        values.iter().for_each(|v| text(&mut bytes, v));
        bytes
    };
    let tokens = strings(&vocabulary.tokens);
    pairs.array("tokenizer.ggml.tokens", STRING, vocabulary.tokens.len(), |out| out.extend(tokens));
    pairs.array("tokenizer.ggml.token_type", INT32, vocabulary.types.len(), |out| {
        vocabulary.types.iter().for_each(|t| out.extend(t.to_le_bytes()));
    });
    if vocabulary.model == "llama" {
        pairs.array("tokenizer.ggml.scores", FLOAT32, vocabulary.scores.len(), |out| {
            vocabulary.scores.iter().for_each(|s| out.extend(s.to_le_bytes()));
        });
    } else {
        let merges = strings(&vocabulary.merges);
        pairs.array("tokenizer.ggml.merges", STRING, vocabulary.merges.len(), |out| out.extend(merges));
    }
    let eos = c.eos_token_ids.first().copied().or(tokenizer.eos_token_id());
    for (key, id) in [
        ("bos", tokenizer.bos_token_id().or(c.bos_token_id)),
        ("eos", eos),
        ("unknown", tokenizer.unk_token_id()),
        ("padding", tokenizer.pad_token_id().or(c.pad_token_id)),
    ] {
        if let Some(id) = id {
            pairs.u32(&format!("tokenizer.ggml.{key}_token_id"), id);
        }
    }
    pairs.bool("tokenizer.ggml.add_bos_token", tokenizer.adds_bos());
    pairs.bool("tokenizer.ggml.add_space_prefix", vocabulary.add_space_prefix);
    if let Ok(template) = checkpoint.chat_template() {
        pairs.str("tokenizer.chat_template", template.source());
    }
    Ok(())
}
