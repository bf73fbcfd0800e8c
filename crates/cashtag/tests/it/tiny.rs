//! A Llama of two narrow layers with random weights and the tokenizer of the small model: the whole program in half a second.

use super::context::Context;
use super::model_commands::{MODEL_FILE, cache};

pub(crate) const CONFIG: &str = r#"{
  "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "tie_word_embeddings": true,
  "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
  "head_dim": 16, "vocab_size": 49152, "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
  "bos_token_id": 1, "eos_token_id": 2
}"#;

/// A directory with the shape in `tiny.json`, and the flags that make it the model; `None` if the tokenizer is not there.
pub(crate) fn context() -> Option<(Context, Vec<String>)> {
    let tokenizer = cache()?.join(MODEL_FILE).display().to_string();
    let context = Context::new().env("CUDA_VISIBLE_DEVICES", "");
    context.write("tiny.json", CONFIG);
    let flags = ["--random-weights", "tiny.json", "--tokenizer", &tokenizer, "--threads", "1", "--precision", "f32"];
    Some((context, flags.map(String::from).to_vec()))
}

/// A data file of so many labelled texts, whose last word gives the label away.
pub(crate) fn tweets(count: usize) -> String {
    let mut tweets = String::from("text,label\n");
    for i in 0..count {
        let (text, label) = [("up", "Positive"), ("flat", "Neutral"), ("down", "Negative")][i % 3];
        tweets += &format!("{} closes {text},{label}\n", words(i));
    }
    tweets
}

/// Seven made-up words, different for each number: texts that are no near copies of one another.
pub(crate) fn words(n: usize) -> String {
    const SYLLABLES: [&str; 16] =
        ["ba", "ce", "di", "fo", "gu", "ha", "ki", "lo", "mu", "na", "pe", "ri", "so", "tu", "va", "zi"];
    let mut hash = (n as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    let mut word = || {
        hash = (hash ^ (hash >> 29)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        (0..3).map(|i| SYLLABLES[(hash >> (20 + 8 * i)) as usize % 16]).collect::<String>()
    };
    (0..7).map(|_| word()).collect::<Vec<_>>().join(" ")
}
