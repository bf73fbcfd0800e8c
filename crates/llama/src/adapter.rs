//! Adapters on disk, as PEFT writes and reads them: `adapter_config.json` and `adapter_model.safetensors`, and beside them
//! `cashtag.json` with what a classifier needs to be used as it was trained (labels, system message, temperature).

use std::collections::HashMap;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::config::LlamaConfig;
use crate::error::{Error, Result};
use crate::lora::{LoraConfig, LoraTensors, Module, slots};
use crate::prompt::Label;

pub const CONFIG_FILE: &str = "adapter_config.json";
pub const WEIGHTS_FILE: &str = "adapter_model.safetensors";
pub const CLASSIFIER_FILE: &str = "cashtag.json";

/// What turns an adapter into a classifier again.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ClassifierConfig {
    pub labels: Vec<Label>,
    pub system_message: Option<String>,
    pub max_seq_length: usize,
    /// Fitted on the validation part; 1 if it was not.
    pub temperature: f32,
    /// The name that the base model was given by (`--model`).
    pub base_model: String,
}

impl ClassifierConfig {
    /// What stands in a directory of an adapter or of a merged model; `None` if nothing does.
    ///
    /// # Errors
    /// A file that cannot be read or is damaged.
    pub fn read(dir: &Path) -> Result<Option<Self>> {
        let path = dir.join(CLASSIFIER_FILE);
        if !path.exists() {
            return Ok(None);
        }
        serde_json::from_value(read_json(&path)?).map(Some).map_err(|e| bad(&path, e.to_string()))
    }
}

/// An adapter read from disk.
#[derive(Clone, Debug)]
pub struct Adapter {
    pub lora: LoraConfig,
    pub tensors: LoraTensors,
    pub base_model: Option<String>,
    pub classifier: Option<ClassifierConfig>,
}

/// PEFT files are small next to a model; anything larger is not an adapter.
const MAX_CONFIG_BYTES: u64 = 4 << 20;

fn bad(path: &Path, what: impl Into<String>) -> Error {
    Error::File { path: path.to_owned(), what: what.into() }
}

fn read_json(path: &Path) -> Result<Value> {
    let size = std::fs::metadata(path).map_err(Error::io(path))?.len();
    if size > MAX_CONFIG_BYTES {
        return Err(bad(path, format!("{size} bytes are too many for a configuration")));
    }
    let text = std::fs::read(path).map_err(Error::io(path))?;
    serde_json::from_slice(&text).map_err(|e| bad(path, format!("not valid JSON: {e}")))
}

impl Adapter {
    /// Reads an adapter directory and checks it against the model.
    ///
    /// # Errors
    /// Missing or damaged files, options that are not supported, factors that do not fit the model.
    pub fn load(dir: &Path, model: &LlamaConfig) -> Result<Self> {
        let path = dir.join(CONFIG_FILE);
        if !path.exists() {
            return Err(bad(
                dir,
                format!("no {CONFIG_FILE} in it\n  hint: --adapter takes a directory that PEFT or cashtag wrote"),
            ));
        }
        let config = read_json(&path)?;
        let lora = lora_config(&path, &config, model)?;
        lora.validate(model)?;
        let base_model = config["base_model_name_or_path"].as_str().map(str::to_string);
        let tensors = load_tensors(&dir.join(WEIGHTS_FILE), &lora, model)?;
        Ok(Self { lora, tensors, base_model, classifier: ClassifierConfig::read(dir)? })
    }

    /// Writes the directory, each file to a temporary name first.
    ///
    /// # Errors
    /// The directory cannot be written (the message names the file).
    pub fn save(&self, dir: &Path, model: &LlamaConfig) -> Result<()> {
        std::fs::create_dir_all(dir).map_err(Error::io(dir))?;
        let shapes = slots(&self.lora, model);
        let (mut views, r) = (Vec::new(), self.lora.r);
        for s in &shapes {
            let name = format!("base_model.model.model.layers.{}.{}", s.layer, s.module.path());
            let (a, b) = (self.tensors.a_of(s, r), self.tensors.b_of(s, r));
            for (suffix, shape, values) in
                [("lora_A", vec![r, s.in_features], a), ("lora_B", vec![s.out_features, r], b)]
            {
                let view = TensorView::new(Dtype::F32, shape, bytes_of(values))
                    .map_err(|e| Error::Adapter(format!("{name}.{suffix}: {e}")))?;
                views.push((format!("{name}.{suffix}.weight"), view));
            }
            if self.lora.use_dora {
                let first = s.magnitude_offset(r);
                let values = self.tensors.magnitude.get(first..first + s.out_features);
                let values = values.ok_or_else(|| Error::Adapter("a DoRA adapter without its magnitudes".into()))?;
                let view = TensorView::new(Dtype::F32, vec![s.out_features], bytes_of(values))
                    .map_err(|e| Error::Adapter(format!("{name}: {e}")))?;
                views.push((format!("{name}.{MAGNITUDE}"), view));
            }
        }
        let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
        let bytes = safetensors::serialize(views, Some(metadata)).map_err(|e| Error::Adapter(e.to_string()))?;
        write_atomically(&dir.join(WEIGHTS_FILE), &bytes)?;
        let config = peft_config(&self.lora, self.base_model.as_deref());
        write_atomically(&dir.join(CONFIG_FILE), pretty(&config)?.as_bytes())?;
        if let Some(classifier) = &self.classifier {
            let value = serde_json::to_value(classifier).map_err(|e| Error::Adapter(e.to_string()))?;
            write_atomically(&dir.join(CLASSIFIER_FILE), pretty(&value)?.as_bytes())?;
        }
        Ok(())
    }
}

/// PEFT writes it without a `.weight`.
const MAGNITUDE: &str = "lora_magnitude_vector";

fn pretty(value: &Value) -> Result<String> {
    let text = serde_json::to_string_pretty(value).map_err(|e| Error::Adapter(e.to_string()))?;
    Ok(text + "\n")
}

/// f32 values as little-endian bytes (a view: every target of this project is little-endian).
fn bytes_of(values: &[f32]) -> &[u8] {
    // SAFETY: f32 has no padding and any byte pattern is a valid u8; the length covers exactly the slice.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

/// Writes `bytes` to `path` so that a reader, or a process that comes after a crash, sees the old file or the new one whole.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".tmp");
    let temporary = PathBuf::from(temporary);
    let write = || -> std::io::Result<()> {
        let mut file = std::fs::File::create(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        std::fs::rename(&temporary, path)
    };
    write().map_err(|source| {
        let _ = std::fs::remove_file(&temporary);
        Error::Write { path: path.to_owned(), source }
    })
}

/// The keys that PEFT 0.11 and later know, sorted as PEFT sorts them.
fn peft_config(lora: &LoraConfig, base_model: Option<&str>) -> Value {
    let mut modules: Vec<&str> = lora.target_modules.iter().map(|m| m.name()).collect();
    modules.sort_unstable();
    json!({
        "alpha_pattern": {},
        "auto_mapping": null,
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": false,
        "inference_mode": true,
        "init_lora_weights": true,
        "layer_replication": null,
        "layers_pattern": null,
        "layers_to_transform": lora.layers_to_transform,
        "loftq_config": {},
        "lora_alpha": number(lora.lora_alpha),
        "lora_dropout": number(lora.lora_dropout),
        "megatron_config": null,
        "megatron_core": "megatron.core",
        "modules_to_save": null,
        "peft_type": "LORA",
        "r": lora.r,
        "rank_pattern": {},
        "revision": null,
        "target_modules": modules,
        "task_type": "CAUSAL_LM",
        "use_dora": lora.use_dora,
        "use_rslora": lora.use_rslora
    })
}

/// 16, not 16.0: PEFT annotates alpha as an integer; and 0.1, not 0.10000000149.
fn number(x: f32) -> Value {
    if x.fract() == 0.0 { json!(x as i64) } else { json!(x.to_string().parse::<f64>().unwrap_or(f64::from(x))) }
}

fn lora_config(path: &Path, c: &Value, model: &LlamaConfig) -> Result<LoraConfig> {
    let unsupported = |key: &str, why: &str| Err(bad(path, format!("{key} is set, {why}")));
    match c["peft_type"].as_str() {
        Some("LORA") => {}
        other => return Err(bad(path, format!("peft_type is {other:?}, only \"LORA\" is supported"))),
    }
    for key in ["rank_pattern", "alpha_pattern"] {
        if c[key].as_object().is_some_and(|o| !o.is_empty()) {
            return unsupported(key, "adapters with one rank and one alpha are supported");
        }
    }
    if c["fan_in_fan_out"].as_bool() == Some(true) || c["lora_bias"].as_bool() == Some(true) {
        return unsupported("fan_in_fan_out or lora_bias", "which Llama adapters do not have");
    }
    if c["modules_to_save"].as_array().is_some_and(|m| !m.is_empty()) {
        return unsupported("modules_to_save", "only LoRA factors are supported");
    }
    let names: Vec<String> = match &c["target_modules"] {
        Value::Null => vec!["q_proj".into(), "v_proj".into()],
        Value::String(all) if all == "all-linear" => Module::ALL.iter().map(|m| m.name().to_string()).collect(),
        Value::Array(list) => list.iter().filter_map(|v| v.as_str().map(str::to_string)).collect(),
        other => return Err(bad(path, format!("target_modules is {other}, expected a list of names"))),
    };
    let mut target_modules = Vec::new();
    for name in &names {
        // PEFT matches by suffix: "self_attn.q_proj" means q_proj.
        let last = name.rsplit('.').next().unwrap_or(name);
        let module: Module = last.parse().map_err(|e| bad(path, format!("target_modules: {e}")))?;
        if !target_modules.contains(&module) {
            target_modules.push(module);
        }
    }
    target_modules.sort_unstable();
    let float = |key: &str, default: f64| c[key].as_f64().unwrap_or(default) as f32;
    let layers_to_transform = match &c["layers_to_transform"] {
        Value::Null => None,
        Value::Number(n) => Some(vec![n.as_u64().unwrap_or(u64::MAX) as usize]),
        Value::Array(a) => Some(a.iter().map(|v| v.as_u64().unwrap_or(u64::MAX) as usize).collect()),
        other => return Err(bad(path, format!("layers_to_transform is {other}, expected a list of numbers"))),
    };
    let r = c["r"].as_u64().unwrap_or(8);
    if r > model.hidden_size as u64 {
        return Err(bad(path, format!("r is {r}, more than the model's hidden size {}", model.hidden_size)));
    }
    Ok(LoraConfig {
        r: r as usize,
        lora_alpha: float("lora_alpha", 8.0),
        lora_dropout: float("lora_dropout", 0.0),
        target_modules,
        use_rslora: c["use_rslora"].as_bool().unwrap_or(false),
        use_dora: c["use_dora"].as_bool().unwrap_or(false),
        layers_to_transform,
    })
}

fn load_tensors(path: &Path, lora: &LoraConfig, model: &LlamaConfig) -> Result<LoraTensors> {
    let file = std::fs::File::open(path).map_err(Error::io(path))?;
    let shapes = slots(lora, model);
    let expected: usize = shapes.iter().map(|s| (s.in_features + s.out_features) * lora.r).sum();
    // SAFETY: the map is only read; a file that is changed meanwhile gives wrong values or a bus error, as with any reader
    // of a mapped model file.
    let map = unsafe { memmap2::Mmap::map(&file) }.map_err(Error::io(path))?;
    let file = SafeTensors::deserialize(&map).map_err(|e| bad(path, format!("not a valid safetensors file: {e}")))?;
    let wanted = shapes.len() * if lora.use_dora { 3 } else { 2 };
    if file.len() > wanted {
        let name = file.names().into_iter().find(|n| !n.contains("lora_")).unwrap_or_default();
        return Err(bad(
            path,
            format!(
                "{} tensors, expected {wanted} (for example {name:?})\n  hint: is this adapter for another model?",
                file.len()
            ),
        ));
    }
    let mut tensors = LoraTensors { a: Vec::new(), b: Vec::new(), magnitude: Vec::new() };
    if expected * 2 > map.len() {
        return Err(bad(
            path,
            format!(
                "{} bytes cannot hold the {expected} values that {CONFIG_FILE} and the model ask for\n  hint: is this adapter for another model?",
                map.len()
            ),
        ));
    }
    for s in &shapes {
        let path_of = |what: &str| format!("base_model.model.model.layers.{}.{}.{what}", s.layer, s.module.path());
        let read = |name: &str, shape: &[usize], target: &mut Vec<f32>| read_tensor(path, &file, name, shape, target);
        read(&path_of("lora_A.weight"), &[lora.r, s.in_features], &mut tensors.a)?;
        read(&path_of("lora_B.weight"), &[s.out_features, lora.r], &mut tensors.b)?;
        if lora.use_dora {
            read(&path_of(MAGNITUDE), &[s.out_features], &mut tensors.magnitude)?;
        }
    }
    Ok(tensors)
}

/// Appends a tensor's values to `target`.
fn read_tensor(path: &Path, file: &SafeTensors<'_>, name: &str, shape: &[usize], target: &mut Vec<f32>) -> Result<()> {
    let tensor = file
        .tensor(name)
        .map_err(|_| bad(path, format!("no tensor {name}\n  hint: is this adapter for another model?")))?;
    if tensor.shape() != shape {
        let found = tensor.shape();
        let what = format!("expected shape {shape:?}, found {found:?}\n  hint: is this adapter for another model?");
        return Err(Error::tensor(path, name, what));
    }
    let first = target.len();
    match tensor.dtype() {
        Dtype::F32 => {
            target.extend(tensor.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])));
        }
        Dtype::F16 => {
            target.extend(tensor.data().chunks_exact(2).map(|b| half::f16::from_le_bytes([b[0], b[1]]).to_f32()));
        }
        Dtype::BF16 => {
            target.extend(tensor.data().chunks_exact(2).map(|b| half::bf16::from_le_bytes([b[0], b[1]]).to_f32()));
        }
        other => return Err(Error::tensor(path, name, format!("dtype {other:?}, expected F32, F16 or BF16"))),
    }
    if target[first..].iter().any(|x| !x.is_finite()) {
        return Err(Error::tensor(path, name, "holds NaN or infinity"));
    }
    Ok(())
}
