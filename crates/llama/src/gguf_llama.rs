//! What a Llama GGUF says about its model: the configuration, the tensors' names, the rows that llama.cpp permutes.

use crate::config::{LlamaConfig, RopeScaling};
use crate::error::{Error, Result, quoted};
use crate::gguf::Gguf;

/// Reads the configuration from the metadata and the tensor directory.
///
/// # Errors
/// When the file is no Llama model, is one part of several, or lacks a key.
pub(crate) fn config(gguf: &Gguf) -> Result<LlamaConfig> {
    let fail = |what: String| Error::file(gguf.path(), what);
    if let Some(kind) = gguf.str("general.type")?.filter(|&kind| kind != "model") {
        return Err(fail(format!("general.type is {}, expected \"model\"", quoted(kind))));
    }
    let architecture = gguf.str("general.architecture")?.unwrap_or("missing");
    if architecture != "llama" {
        return Err(fail(format!("general.architecture is {}, expected \"llama\"", quoted(architecture))));
    }
    if gguf.u64("split.count")?.is_some_and(|count| count > 1) {
        return Err(fail(
            "one part of a model that was split\n  hint: join the parts with llama.cpp's llama-gguf-split --merge"
                .into(),
        ));
    }
    if gguf.u64("llama.expert_count")?.is_some_and(|count| count > 0) {
        return Err(fail("a mixture of experts, expected a dense Llama model".into()));
    }
    let optional = |key: &str| -> Result<Option<usize>> {
        let key = format!("llama.{key}");
        match gguf.u64(&key)? {
            None => Ok(None),
            Some(value) => usize::try_from(value).map(Some).map_err(|_| fail(format!("metadata {key} is {value}"))),
        }
    };
    let required =
        |key: &str| -> Result<usize> { optional(key)?.ok_or_else(|| fail(format!("metadata llama.{key} is missing"))) };
    let hidden_size = required("embedding_length")?;
    let num_attention_heads = required("attention.head_count")?;
    let head_dim = match optional("attention.key_length")? {
        Some(length) => length,
        None => hidden_size.checked_div(num_attention_heads).unwrap_or(0),
    };
    for key in ["rope.dimension_count", "attention.value_length"] {
        if let Some(value) = optional(key)?.filter(|&value| value != head_dim) {
            return Err(fail(format!("metadata llama.{key} is {value}, expected the head's {head_dim} dimensions")));
        }
    }
    let embedding = gguf.tensor("token_embd.weight");
    let vocab_size = match embedding {
        Some(info) => info.shape[0],
        None => return Err(Error::tensor(gguf.path(), "token_embd.weight", "is missing")),
    };
    let token = |key: &str| gguf.u32(&format!("tokenizer.ggml.{key}_token_id"));
    // A chat model may end its turns with another token than its texts.
    let mut eos_token_ids: Vec<u32> = [token("eos")?, token("eot")?].into_iter().flatten().collect();
    eos_token_ids.dedup();
    let config = LlamaConfig {
        hidden_size,
        intermediate_size: required("feed_forward_length")?,
        num_hidden_layers: required("block_count")?,
        num_attention_heads,
        num_key_value_heads: optional("attention.head_count_kv")?.unwrap_or(num_attention_heads),
        head_dim,
        vocab_size,
        max_position_embeddings: required("context_length")?,
        rms_norm_eps: match gguf.f32("llama.attention.layer_norm_rms_epsilon")? {
            Some(epsilon) => epsilon,
            None => return Err(fail("metadata llama.attention.layer_norm_rms_epsilon is missing".into())),
        },
        rope_theta: gguf.f32("llama.rope.freq_base")?.unwrap_or(10_000.0),
        rope_scaling: rope_scaling(gguf)?,
        tie_word_embeddings: gguf.tensor("output.weight").is_none(),
        bos_token_id: token("bos")?,
        eos_token_ids,
        pad_token_id: token("padding")?,
    };
    config.validate().map_err(|error| fail(error.to_string()))?;
    Ok(config)
}

fn rope_scaling(gguf: &Gguf) -> Result<Option<RopeScaling>> {
    // Llama 3.1's scaling stands in the file as the divisors it amounts to.
    if let Some(info) = gguf.tensor("rope_freqs.weight") {
        let mut factors = vec![0.0; info.shape.iter().product()];
        info.block_type.dequantize(gguf.data(info), &mut factors);
        return Ok(Some(RopeScaling::Factors { factors }));
    }
    let factor = gguf.f32("llama.rope.scaling.factor")?;
    match (gguf.str("llama.rope.scaling.type")?, factor) {
        (None | Some("none"), _) | (Some("linear"), None) => Ok(None),
        (Some("linear"), Some(factor)) => Ok(Some(RopeScaling::Linear { factor })),
        (Some(other), _) => Err(Error::file(
            gguf.path(),
            format!("metadata llama.rope.scaling.type is {}, expected \"linear\"", quoted(other)),
        )),
    }
}

/// GGUF's name of a tensor that Transformers calls `hf_name`.
pub(crate) fn tensor_name(hf_name: &str) -> Option<String> {
    match hf_name {
        "model.embed_tokens.weight" => return Some("token_embd.weight".into()),
        "model.norm.weight" => return Some("output_norm.weight".into()),
        "lm_head.weight" => return Some("output.weight".into()),
        _ => {}
    }
    let (layer, part) = hf_name.strip_prefix("model.layers.")?.split_once('.')?;
    let part = match part {
        "input_layernorm.weight" => "attn_norm",
        "post_attention_layernorm.weight" => "ffn_norm",
        "self_attn.q_proj.weight" => "attn_q",
        "self_attn.k_proj.weight" => "attn_k",
        "self_attn.v_proj.weight" => "attn_v",
        "self_attn.o_proj.weight" => "attn_output",
        "mlp.gate_proj.weight" => "ffn_gate",
        "mlp.up_proj.weight" => "ffn_up",
        "mlp.down_proj.weight" => "ffn_down",
        _ => return None,
    };
    Some(format!("blk.{layer}.{part}.weight"))
}

/// Heads of a tensor whose rows llama.cpp's converter permutes.
pub(crate) fn permuted_heads(hf_name: &str, config: &LlamaConfig) -> Option<usize> {
    if hf_name.ends_with(".self_attn.q_proj.weight") {
        Some(config.num_attention_heads)
    } else if hf_name.ends_with(".self_attn.k_proj.weight") {
        Some(config.num_key_value_heads)
    } else {
        None
    }
}

/// What the file's weights are mostly stored in: "Q4_K_M", or the type that most elements have.
pub(crate) fn quantization(gguf: &Gguf) -> String {
    let named = match gguf.u64("general.file_type") {
        Ok(Some(0)) => "F32",
        Ok(Some(1)) => "F16",
        Ok(Some(2)) => "Q4_0",
        Ok(Some(3)) => "Q4_1",
        Ok(Some(7)) => "Q8_0",
        Ok(Some(8)) => "Q5_0",
        Ok(Some(9)) => "Q5_1",
        Ok(Some(14)) => "Q4_K_S",
        Ok(Some(15)) => "Q4_K_M",
        Ok(Some(16)) => "Q5_K_S",
        Ok(Some(17)) => "Q5_K_M",
        Ok(Some(18)) => "Q6_K",
        Ok(Some(32)) => "BF16",
        _ => {
            let mut totals: Vec<(&str, u128)> = Vec::new();
            for info in gguf.tensors() {
                let elements = info.shape.iter().map(|&dim| dim as u128).product::<u128>();
                match totals.iter_mut().find(|(name, _)| *name == info.block_type.name()) {
                    Some((_, total)) => *total += elements,
                    None => totals.push((info.block_type.name(), elements)),
                }
            }
            totals.into_iter().max_by_key(|&(_, total)| total).map_or("empty", |(name, _)| name)
        }
    };
    named.to_owned()
}
