//! An adapter as llama.cpp reads it (`llama-cli --lora`): its factors in a GGUF file of type "adapter".

use std::path::Path;

use super::Output;
use super::gguf::{Entry, Pairs, pad, write_directory};
use super::quantize::quantize;
use crate::adapter::Adapter;
use crate::config::LlamaConfig;
use crate::error::{Error, Result};
use crate::ggml::BlockType;
use crate::gguf_llama::{permuted_heads, tensor_name};
use crate::lora::slots;
use crate::weights::natural_row;

/// Writes the factors in f32. llama.cpp scales by alpha / r, so an rsLoRA adapter gets the alpha that makes this its own
/// alpha / √r.
///
/// # Errors
/// A DoRA adapter, which has no form there; a file system that refuses.
pub fn write_gguf_lora(path: &Path, adapter: &Adapter, model: &LlamaConfig, name: &str) -> Result<()> {
    let (lora, r) = (&adapter.lora, adapter.lora.r);
    if lora.use_dora {
        return Err(Error::Adapter("llama.cpp has no form for DoRA\n  hint: export the merged model".into()));
    }
    let mut pairs = Pairs::default();
    pairs.str("general.architecture", "llama");
    pairs.str("general.type", "adapter");
    pairs.str("general.name", name);
    pairs.str("adapter.type", "lora");
    pairs.f32("adapter.lora.alpha", lora.scale() * r as f32);
    pairs.u32("general.file_type", 0);
    pairs.u32("general.quantization_version", 2);
    let slots = slots(lora, model);
    let mut entries = Vec::with_capacity(2 * slots.len());
    for s in &slots {
        let hf_name = format!("model.layers.{}.{}.weight", s.layer, s.module.path());
        let name = tensor_name(&hf_name).ok_or_else(|| Error::Invalid(format!("{hf_name} has no name in GGUF")))?;
        for (suffix, shape) in [("lora_a", vec![r, s.in_features]), ("lora_b", vec![s.out_features, r])] {
            entries.push(Entry { name: format!("{name}.{suffix}"), shape, block_type: BlockType::F32 });
        }
    }
    let mut out = Output::create(path)?;
    write_directory(&mut out, &pairs, &entries)?;
    let mut bytes = Vec::new();
    for s in &slots {
        bytes.clear();
        quantize(BlockType::F32, adapter.tensors.a_of(s, r), &mut bytes);
        out.write(&bytes)?;
        pad(&mut out)?;
        bytes.clear();
        let b = adapter.tensors.b_of(s, r);
        let hf_name = format!("model.layers.{}.{}.weight", s.layer, s.module.path());
        match permuted_heads(&hf_name, model).map(|heads| s.out_features / heads) {
            None => quantize(BlockType::F32, b, &mut bytes),
            // The rows of B are rows of the weight.
            Some(head) => {
                for row in (0..s.out_features).map(|stored| natural_row(stored, head)) {
                    quantize(BlockType::F32, &b[row * r..(row + 1) * r], &mut bytes);
                }
            }
        }
        out.write(&bytes)?;
        pad(&mut out)?;
    }
    out.finish()
}
