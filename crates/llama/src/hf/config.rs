//! `config.json` as the shape of a Llama.

use std::path::Path;

use serde_json::Value;

use crate::config::{LlamaConfig, RopeScaling};
use crate::error::{Error, Result, quoted};

/// Reads `config.json` of Transformers 4 (`rope_theta`, `rope_scaling`) and 5 (`rope_parameters`).
pub(super) fn read(path: &Path, json: &Value, generation: &Value) -> Result<LlamaConfig> {
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
