//! The shape of a Llama model, under the names of Transformers' `config.json`.
//!
//! One struct serves every source: GGUF metadata, `config.json` (of Transformers 4 and 5), and the presets that random
//! weights are made for.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Frequency scaling of rotary embeddings, as `rope_scaling` / `rope_parameters` of `config.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "rope_type", rename_all = "snake_case")]
pub enum RopeScaling {
    /// Every frequency divided by `factor`.
    Linear { factor: f32 },
    /// Llama 3.1: low frequencies divided by `factor`, high ones kept, a smooth passage between.
    Llama3 { factor: f32, low_freq_factor: f32, high_freq_factor: f32, original_max_position_embeddings: usize },
    /// One divisor a frequency, `head_dim / 2` of them: how GGUF files carry Llama 3.1's scaling (`rope_freqs.weight`).
    Factors { factors: Vec<f32> },
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LlamaConfig {
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub num_key_value_heads: usize,
    pub head_dim: usize,
    pub vocab_size: usize,
    pub max_position_embeddings: usize,
    pub rms_norm_eps: f32,
    pub rope_theta: f32,
    pub rope_scaling: Option<RopeScaling>,
    pub tie_word_embeddings: bool,
    pub bos_token_id: Option<u32>,
    pub eos_token_ids: Vec<u32>,
    pub pad_token_id: Option<u32>,
}

/// Sizes above these are damage, not models: Llama-3.1-405B has hidden 16,384, intermediate 53,248, 126 layers.
const MAX_WIDTH: usize = 1 << 18;
const MAX_LAYERS: usize = 1 << 10;
const MAX_VOCAB: usize = 1 << 22;

impl LlamaConfig {
    /// The published shape of a model, for random weights: "llama-2-7b", "llama-2-13b" or "smollm2-135m".
    pub fn preset(name: &str) -> Option<Self> {
        let llama2 = |hidden_size, intermediate_size, num_hidden_layers, num_attention_heads| LlamaConfig {
            hidden_size,
            intermediate_size,
            num_hidden_layers,
            num_attention_heads,
            num_key_value_heads: num_attention_heads,
            head_dim: 128,
            vocab_size: 32_000,
            max_position_embeddings: 4096,
            rms_norm_eps: 1e-5,
            rope_theta: 10_000.0,
            rope_scaling: None,
            tie_word_embeddings: false,
            bos_token_id: Some(1),
            eos_token_ids: vec![2],
            pad_token_id: None,
        };
        match name {
            "llama-2-7b" => Some(llama2(4096, 11_008, 32, 32)),
            "llama-2-13b" => Some(llama2(5120, 13_824, 40, 40)),
            "smollm2-135m" => Some(LlamaConfig {
                hidden_size: 576,
                intermediate_size: 1536,
                num_hidden_layers: 30,
                num_attention_heads: 9,
                num_key_value_heads: 3,
                head_dim: 64,
                vocab_size: 49_152,
                max_position_embeddings: 8192,
                rms_norm_eps: 1e-5,
                rope_theta: 100_000.0,
                rope_scaling: None,
                tie_word_embeddings: true,
                bos_token_id: Some(1),
                eos_token_ids: vec![2],
                pad_token_id: Some(2),
            }),
            _ => None,
        }
    }

    /// Names that [`preset`](Self::preset) knows.
    pub const PRESETS: [&'static str; 3] = ["llama-2-7b", "llama-2-13b", "smollm2-135m"];

    /// Radians per position of each pair of dimensions, `head_dim / 2` values: `theta^(-2i / head_dim)`, scaled as
    /// `rope_scaling` says. The power is taken in f64 and rounded, the rest is f32 in the order of Transformers: nearly all
    /// values have the bits that it computes.
    pub fn inverse_frequencies(&self) -> Vec<f32> {
        let base = (0..self.head_dim / 2)
            .map(|i| 1.0 / (self.rope_theta as f64).powf((2 * i) as f64 / self.head_dim as f64) as f32);
        match &self.rope_scaling {
            None => base.collect(),
            Some(RopeScaling::Linear { factor }) => base.map(|f| f / factor).collect(),
            Some(RopeScaling::Factors { factors }) => base.zip(factors).map(|(f, factor)| f / factor).collect(),
            Some(RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            }) => {
                let original = *original_max_position_embeddings as f32;
                let longest = original / low_freq_factor;
                let shortest = original / high_freq_factor;
                base.map(|f| {
                    let wavelength = 2.0 * std::f32::consts::PI / f;
                    if wavelength > longest {
                        f / factor
                    } else if wavelength < shortest {
                        f
                    } else {
                        let smooth = (original / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor);
                        (1.0 - smooth) * f / factor + smooth * f
                    }
                })
                .collect()
            }
        }
    }

    /// Parameters of the model: every weight, the tied head counted once.
    pub fn parameters(&self) -> u64 {
        let wide = |a: usize, b: usize| a as u64 * b as u64;
        let query = self.num_attention_heads * self.head_dim;
        let key_value = self.num_key_value_heads * self.head_dim;
        let layer = 2 * wide(query, self.hidden_size)
            + 2 * wide(key_value, self.hidden_size)
            + 3 * wide(self.intermediate_size, self.hidden_size)
            + 2 * self.hidden_size as u64;
        let tables = if self.tie_word_embeddings { 1 } else { 2 };
        self.num_hidden_layers as u64 * layer
            + tables * wide(self.vocab_size, self.hidden_size)
            + self.hidden_size as u64
    }

    /// Checks that the sizes fit together and are within reason, before anything is allocated by them.
    pub fn validate(&self) -> Result<()> {
        let fail = |what: String| Err(Error::Config(what));
        for (name, value, limit) in [
            ("hidden_size", self.hidden_size, MAX_WIDTH),
            ("intermediate_size", self.intermediate_size, MAX_WIDTH),
            ("num_hidden_layers", self.num_hidden_layers, MAX_LAYERS),
            ("num_attention_heads", self.num_attention_heads, MAX_LAYERS),
            ("num_key_value_heads", self.num_key_value_heads, MAX_LAYERS),
            ("head_dim", self.head_dim, 1 << 12),
            ("vocab_size", self.vocab_size, MAX_VOCAB),
            ("max_position_embeddings", self.max_position_embeddings, 1 << 28),
        ] {
            if value == 0 || value > limit {
                return fail(format!("{name} is {value}, expected 1 to {limit}"));
            }
        }
        if !self.num_attention_heads.is_multiple_of(self.num_key_value_heads) {
            return fail(format!(
                "num_attention_heads {} is no multiple of num_key_value_heads {}",
                self.num_attention_heads, self.num_key_value_heads
            ));
        }
        if !self.head_dim.is_multiple_of(2) {
            return fail(format!("head_dim is {}, rotary embeddings need an even one", self.head_dim));
        }
        for (name, value) in [("rms_norm_eps", self.rms_norm_eps), ("rope_theta", self.rope_theta)] {
            if !(value.is_finite() && value > 0.0) {
                return fail(format!("{name} is {value}, expected a positive number"));
            }
        }
        self.validate_scaling()?;
        for (name, id) in [("bos_token_id", &self.bos_token_id), ("pad_token_id", &self.pad_token_id)] {
            if let Some(id) = id.filter(|&id| id as usize >= self.vocab_size) {
                return fail(format!("{name} is {id}, the vocabulary has {} tokens", self.vocab_size));
            }
        }
        if let Some(id) = self.eos_token_ids.iter().find(|&&id| id as usize >= self.vocab_size) {
            return fail(format!("eos_token_id is {id}, the vocabulary has {} tokens", self.vocab_size));
        }
        Ok(())
    }

    fn validate_scaling(&self) -> Result<()> {
        let positive = |values: &[f32]| values.iter().all(|value| value.is_finite() && *value > 0.0);
        let good = match &self.rope_scaling {
            None => true,
            Some(RopeScaling::Linear { factor }) => positive(&[*factor]),
            Some(RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            }) => {
                positive(&[*factor, *low_freq_factor, *high_freq_factor])
                    && high_freq_factor > low_freq_factor
                    && *original_max_position_embeddings > 0
            }
            Some(RopeScaling::Factors { factors }) => factors.len() == self.head_dim / 2 && positive(factors),
        };
        if good { Ok(()) } else { Err(Error::Config(format!("rope_scaling {:?} is not usable", self.rope_scaling))) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn presets_are_valid_and_have_the_published_number_of_parameters() {
        let parameters = |name| {
            let config = LlamaConfig::preset(name).unwrap();
            config.validate().unwrap();
            config.parameters()
        };
        assert_eq!(parameters("llama-2-7b"), 6_738_415_616);
        assert_eq!(parameters("llama-2-13b"), 13_015_864_320);
        assert_eq!(parameters("smollm2-135m"), 134_515_008);
        assert!(LlamaConfig::PRESETS.iter().all(|name| LlamaConfig::preset(name).is_some()));
        assert_eq!(LlamaConfig::preset("gpt-2"), None);
    }

    // Llama-3.1-8B: theta 500,000, head_dim 128, factor 8. Agreement with Transformers is an integration test.
    #[test]
    fn llama3_scaling_keeps_high_and_divides_low_frequencies() {
        let mut config = LlamaConfig::preset("llama-2-7b").unwrap();
        config.rope_theta = 500_000.0;
        let plain = config.inverse_frequencies();
        config.rope_scaling = Some(RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 8192,
        });
        let scaled = config.inverse_frequencies();
        assert_eq!((plain.len(), scaled[0], scaled[10]), (64, plain[0], plain[10]));
        assert_eq!(scaled[63], plain[63] / 8.0);
        assert!(scaled[30] < plain[30] && scaled[30] > plain[30] / 8.0);
    }

    #[test]
    fn nonsense_is_refused() {
        let mut config = LlamaConfig::preset("smollm2-135m").unwrap();
        config.num_key_value_heads = 4;
        assert_eq!(
            config.validate().unwrap_err().to_string(),
            "model configuration: num_attention_heads 9 is no multiple of num_key_value_heads 4"
        );
        config.num_key_value_heads = 3;
        config.rms_norm_eps = f32::NAN;
        assert!(config.validate().is_err());
        config.rms_norm_eps = 1e-5;
        config.vocab_size = usize::MAX;
        assert!(config.validate().is_err());
    }
}
