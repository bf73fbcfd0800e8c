//! Weights and configurations against what Transformers, bitsandbytes and the `gguf` package read from the same files.

use std::path::Path;

use cashtag_backend::RawWeight;
use cashtag_llama::checkpoint::Checkpoint;
use cashtag_llama::config::{LlamaConfig, RopeScaling};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::{fixture, golden, list, model, text};

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn digest(values: &[f32]) -> String {
    let mut sha = Sha256::new();
    values.iter().for_each(|value| sha.update(value.to_le_bytes()));
    hex(&sha.finalize()[..16])
}

/// Reads a tensor in uneven pieces, as devices do.
fn read(checkpoint: &Checkpoint, name: &str) -> Vec<f32> {
    if name.ends_with("norm.weight") {
        return checkpoint.vector(name).unwrap();
    }
    let weight = checkpoint.weight(name).unwrap();
    let (rows, cols) = (weight.rows(), weight.cols());
    let mut out = vec![f32::NAN; rows * cols];
    let step = (rows / 3).max(1);
    for start in (0..rows).step_by(step) {
        let end = (start + step).min(rows);
        weight.read_rows(start..end, &mut out[start * cols..end * cols]).unwrap();
    }
    out
}

fn compare(checkpoint: &Checkpoint, expected: &Value) {
    let expected = expected.as_object().unwrap();
    let mut names = checkpoint.tensor_names();
    names.sort();
    let mut expected_names: Vec<&String> = expected.keys().collect();
    expected_names.sort();
    assert_eq!(names.iter().collect::<Vec<_>>(), expected_names);
    for name in &names {
        assert_eq!(digest(&read(checkpoint, name)), text(&expected[name]), "{name}");
    }
}

fn compare_frequencies(config: &LlamaConfig, expected: &Value) {
    let expected: Vec<f32> = list(expected).iter().map(|x| x.as_f64().unwrap() as f32).collect();
    let found = config.inverse_frequencies();
    assert_eq!(found.len(), expected.len());
    for (at, (found, expected)) in found.iter().zip(&expected).enumerate() {
        // Two units in the last place: powers are rounded differently by different libraries.
        assert!((found - expected).abs() <= expected * 2.5e-7, "{at}: {found:e} {expected:e}");
    }
}

#[test]
fn the_real_model_bit_for_bit() {
    let checkpoint = Checkpoint::open(&model()).unwrap();
    let golden = golden("checkpoints.json");
    compare(&checkpoint, &golden["real"]);
    assert_eq!(checkpoint.config(), &LlamaConfig::preset("smollm2-135m").unwrap());
    let frequencies = list(&golden["real inverse frequencies"]).iter().map(|x| x.as_f64().unwrap() as f32);
    assert_eq!(checkpoint.config().inverse_frequencies(), frequencies.collect::<Vec<_>>());
    assert!(!checkpoint.has("lm_head.weight"));
    assert_eq!(checkpoint.weight("lm_head.weight").unwrap().rows(), 49_152);
}

#[test]
fn sharded_bf16_of_transformers_5() {
    let checkpoint = Checkpoint::open(&fixture("tiny")).unwrap();
    let golden = golden("checkpoints.json");
    compare(&checkpoint, &golden["tiny"]);
    assert_eq!(
        checkpoint.config().rope_scaling,
        Some(RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 32
        })
    );
    compare_frequencies(checkpoint.config(), &golden["tiny inverse frequencies"]);
    assert!(checkpoint.has("lm_head.weight"));
    let weight = checkpoint.weight("model.layers.1.mlp.down_proj.weight").unwrap();
    let Some(RawWeight::Bf16(bytes)) = weight.raw() else { panic!("expected the stored bf16") };
    assert_eq!(bytes.len(), 32 * 64 * 2);
    assert_eq!(checkpoint.describe(), "tiny, safetensors BF16, 0 MB");
}

#[test]
fn one_file_of_transformers_4_with_tied_embeddings() {
    let checkpoint = Checkpoint::open(&fixture("tiny-tied")).unwrap();
    compare(&checkpoint, &golden("checkpoints.json")["tiny-tied"]);
    let config = checkpoint.config();
    assert_eq!((config.rope_theta, &config.rope_scaling), (20_000.0, &Some(RopeScaling::Linear { factor: 2.0 })));
    assert_eq!((config.eos_token_ids.as_slice(), config.tie_word_embeddings), ([2, 3, 5].as_slice(), true));
    assert_eq!(read(&checkpoint, "lm_head.weight"), read(&checkpoint, "model.embed_tokens.weight"));
}

#[test]
fn nf4_of_bitsandbytes() {
    for name in ["tiny-nf4", "tiny-nf4-plain"] {
        let checkpoint = Checkpoint::open(&fixture(name)).unwrap();
        compare(&checkpoint, &golden("checkpoints.json")[name]);
        assert!(
            checkpoint
                .describe()
                .starts_with(&format!("{} {}", name.replace('-', " "), ", safetensors NF4").replace(" ,", ","))
        );
        let weight = checkpoint.weight("model.layers.0.mlp.up_proj.weight").unwrap();
        let Some(RawWeight::Nf4 { codes, absmax }) = weight.raw() else { panic!("expected the stored NF4") };
        assert_eq!((codes.len(), absmax.len()), (320 * 64 / 2, 320 * 64 / 64));
        // The raw form says the same as the rows.
        let mut row = vec![0.0; 64];
        weight.read_rows(5..6, &mut row).unwrap();
        let largest = row.iter().fold(0f32, |largest, value| largest.max(value.abs()));
        assert_eq!(largest, absmax[5]);
    }
}

#[test]
fn gguf_of_many_types() {
    let checkpoint = Checkpoint::open(&fixture("tiny.gguf")).unwrap();
    compare(&checkpoint, &golden("checkpoints.json")["tiny.gguf"]);
    let raw = |name: &str| checkpoint.weight(name).unwrap().raw().is_some();
    // q and k stand permuted, so their bytes are no use to a device.
    assert!(!raw("model.layers.0.self_attn.k_proj.weight"));
    assert!(raw("model.layers.0.self_attn.v_proj.weight"));
    assert!(raw("lm_head.weight"));
}

#[test]
fn descriptions() {
    let path = model();
    if path.file_name().is_some_and(|name| name == crate::MODEL) {
        assert_eq!(Checkpoint::open(&path).unwrap().describe(), "SmolLM2 135M Instruct, GGUF Q4_1, 98 MB");
    }
}

#[test]
fn random_weights_borrow_a_tokenizer() {
    let config = LlamaConfig::preset("llama-2-7b").unwrap();
    let checkpoint = Checkpoint::random(config.clone(), 7, Some(&fixture("spm"))).unwrap();
    assert_eq!(checkpoint.tokenizer().unwrap().vocab_size(), 700);
    // A Llama 2 without a template of its own has Llama 2's.
    assert!(checkpoint.chat_template().unwrap().source().contains("[INST]"));
    // The same model twice is the same.
    let twin = Checkpoint::random(config, 7, None).unwrap();
    let name = "model.layers.3.self_attn.k_proj.weight";
    let row = |checkpoint: &Checkpoint| {
        let mut row = vec![0.0; 4096];
        checkpoint.weight(name).unwrap().read_rows(9..10, &mut row).unwrap();
        row
    };
    assert_eq!(row(&checkpoint), row(&twin));
    let small = Checkpoint::random(LlamaConfig::preset("smollm2-135m").unwrap(), 7, Some(&fixture("spm"))).unwrap();
    assert!(small.chat_template().is_err());
}

/// A copy of a fixture directory with changes.
fn changed(name: &str, change: impl FnOnce(&Path)) -> String {
    let dir = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(fixture(name)).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), dir.path().join(entry.file_name())).unwrap();
    }
    change(dir.path());
    let message = match Checkpoint::open(dir.path()) {
        Ok(_) => "it was opened".to_owned(),
        Err(error) => error.to_string(),
    };
    message.replace(&dir.path().display().to_string(), "DIR")
}

fn edit(dir: &Path, file: &str, change: impl FnOnce(&mut Value)) {
    let path = dir.join(file);
    let mut json: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    change(&mut json);
    std::fs::write(path, json.to_string()).unwrap();
}

#[test]
fn refusals() {
    let config = |change: fn(&mut Value)| changed("tiny", |dir| edit(dir, "config.json", change));
    assert_eq!(
        config(|json| json["model_type"] = json!("mistral")),
        "DIR/config.json: model_type is \"mistral\", expected \"llama\""
    );
    assert_eq!(
        config(|json| json["architectures"] = json!(["LlamaForSequenceClassification"])),
        "DIR/config.json: architecture \"LlamaForSequenceClassification\", expected \"LlamaForCausalLM\""
    );
    assert_eq!(
        config(|json| json["quantization_config"] = json!({"quant_method": "gptq"})),
        "DIR/config.json: quantised with \"gptq\" (4-bit: false, type \"fp4\"), expected bitsandbytes NF4 or 16-bit weights"
    );
    assert_eq!(
        config(|json| json["rope_parameters"] = json!({"rope_type": "yarn", "rope_theta": 1e4})),
        "DIR/config.json: rope scaling of type \"yarn\" is not read, expected \"linear\" or \"llama3\""
    );
    assert_eq!(
        config(|json| json["hidden_size"] = json!("wide")),
        "DIR/config.json: hidden_size is \"\\\"wide\\\"\", expected a whole number"
    );
    assert_eq!(
        config(|json| json["intermediate_size"] = json!(96)),
        "DIR: tensor model.layers.0.mlp.gate_proj.weight: shape [64, 32], expected [96, 32]"
    );
    assert_eq!(
        config(|json| json["num_hidden_layers"] = json!(3)),
        "DIR: tensor model.layers.2.input_layernorm.weight: is missing, and 8 more of 30"
    );
    let index = |change: fn(&mut Value)| changed("tiny", |dir| edit(dir, "model.safetensors.index.json", change));
    assert_eq!(
        index(|json| json["weight_map"]["x"] = json!("../secret.safetensors")),
        "DIR/model.safetensors.index.json: \"../secret.safetensors\" is no name of a shard"
    );
    assert_eq!(
        index(|json| json["weight_map"]["x"] = json!("model-3.safetensors")),
        "DIR/model.safetensors.index.json: shard model-3.safetensors is not here\n  hint: download it as well"
    );
    let pickled = changed("tiny", |dir| {
        std::fs::remove_file(dir.join("model.safetensors.index.json")).unwrap();
        std::fs::write(dir.join("pytorch_model.bin"), b"").unwrap();
    });
    assert!(pickled.starts_with("DIR: the weights are pickled (pytorch_model.bin)"), "{pickled}");
    let adapter = changed("tiny", |dir| {
        std::fs::rename(dir.join("config.json"), dir.join("adapter_config.json")).unwrap();
    });
    assert!(adapter.starts_with("DIR: no config.json: this is an adapter, not a model\n  hint: "), "{adapter}");
    let truncated = changed("tiny-tied", |dir| {
        let path = dir.join("model.safetensors");
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(path, &bytes[..bytes.len() - 1000]).unwrap();
    });
    assert!(truncated.contains("hint: the file is truncated, download it again"), "{truncated}");
    let missing = Checkpoint::open(Path::new("no-such-model.gguf")).err().unwrap().to_string();
    assert!(missing.starts_with("cannot read no-such-model.gguf: "), "{missing}");
}

#[test]
fn damaged_weights_are_named_when_they_are_read() {
    let dir = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(fixture("tiny-tied")).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), dir.path().join(entry.file_name())).unwrap();
    }
    let path = dir.path().join("model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    let start = |name: &str| 8 + length + header[name]["data_offsets"][0].as_u64().unwrap() as usize;
    // Row 2, column 1 of a matrix of f16; element 3 of a norm in f32.
    let at = start("model.layers.0.mlp.down_proj.weight") + 2 * (2 * 64 + 1);
    bytes[at..at + 2].copy_from_slice(&[0x00, 0x7E]);
    let at = start("model.norm.weight") + 4 * 3;
    bytes[at..at + 4].copy_from_slice(&f32::INFINITY.to_le_bytes());
    std::fs::write(&path, bytes).unwrap();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let weight = checkpoint.weight("model.layers.0.mlp.down_proj.weight").unwrap();
    let mut out = vec![0.0; 4 * 64];
    let error = weight.read_rows(0..4, &mut out).unwrap_err().to_string();
    assert_eq!(
        error,
        "weight model.layers.0.mlp.down_proj.weight: row 2, column 1 is NaN\n  hint: the file is damaged, download it again"
    );
    assert!(weight.raw().is_none());
    let error = checkpoint.vector("model.norm.weight").unwrap_err().to_string();
    assert!(error.contains("tensor model.norm.weight: element 3 is inf"), "{error}");
}
