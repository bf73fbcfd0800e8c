//! An opened model: one interface over GGUF files, Hugging Face directories and random weights.
//!
//! Tensors go by their names in Transformers ("model.layers.0.self_attn.q_proj.weight"). All tensors that the
//! configuration calls for are checked for presence and shape on opening, so a model that opens can be loaded.

use std::path::{Path, PathBuf};

use cashtag_backend::WeightSource;
use serde_json::Value;

use crate::chat::{ChatTemplate, LLAMA2_TEMPLATE};
use crate::config::LlamaConfig;
use crate::error::{Error, Result};
use crate::gguf::Gguf;
use crate::gguf_llama;
use crate::hf::HfCheckpoint;
use crate::json_file::{read_companion, read_limited, token_text};
use crate::tokenizer::Tokenizer;
use crate::weights::{Matrix, Storage, first_not_finite};

/// A model file or directory, its weights still on disk.
pub struct Checkpoint {
    path: PathBuf,
    config: LlamaConfig,
    source: Source,
}

enum Source {
    Gguf(Gguf),
    Hf(HfCheckpoint),
    Random(RandomWeights),
}

/// Weights drawn from a seed, for measuring speed and memory without a download. Nothing is stored: an element is a
/// function of (seed, tensor, row, column).
struct RandomWeights {
    seed: u64,
    /// A model whose tokenizer and template are borrowed.
    tokenizer: Option<Box<TokenizerFiles>>,
}

enum TokenizerFiles {
    Gguf(Gguf),
    Hf(PathBuf),
}

/// Standard deviation of random weights: Llama's `initializer_range`.
const RANDOM_DEVIATION: f32 = 0.02;

impl Checkpoint {
    /// Opens a `.gguf` file or a directory in Hugging Face layout.
    ///
    /// # Errors
    /// When it is no Llama model, is damaged, or lacks a tensor or has it in another shape than the configuration says.
    pub fn open(path: &Path) -> Result<Self> {
        let metadata = std::fs::metadata(path).map_err(Error::io(path))?;
        let (config, source) = if metadata.is_dir() {
            let hf = HfCheckpoint::open(path)?;
            (hf.config().clone(), Source::Hf(hf))
        } else if path.extension().is_some_and(|extension| extension == "safetensors") {
            return Err(Error::file(path, "one file of a model\n  hint: give the directory that it lies in"));
        } else {
            let gguf = Gguf::open(path)?;
            (gguf_llama::config(&gguf)?, Source::Gguf(gguf))
        };
        let checkpoint = Checkpoint { path: path.to_owned(), config, source };
        checkpoint.check_tensors()?;
        Ok(checkpoint)
    }

    /// A model of random weights. Tokenizer and chat template come from the model at `tokenizer_path`, which may have a
    /// smaller vocabulary; without one, [`tokenizer`](Self::tokenizer) is an error.
    pub fn random(config: LlamaConfig, seed: u64, tokenizer_path: Option<&Path>) -> Result<Self> {
        config.validate()?;
        let tokenizer = match tokenizer_path {
            None => None,
            Some(path) if path.is_dir() => Some(Box::new(TokenizerFiles::Hf(path.to_owned()))),
            Some(path) => Some(Box::new(TokenizerFiles::Gguf(Gguf::open(path)?))),
        };
        let path = PathBuf::from("random weights");
        Ok(Checkpoint { path, config, source: Source::Random(RandomWeights { seed, tokenizer }) })
    }

    pub fn config(&self) -> &LlamaConfig {
        &self.config
    }

    /// The file or directory that was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Every tensor of the model with its shape, in the order of the forward pass.
    pub(crate) fn expected(config: &LlamaConfig) -> Vec<(String, Vec<usize>)> {
        let (hidden, intermediate) = (config.hidden_size, config.intermediate_size);
        let query = config.num_attention_heads * config.head_dim;
        let key_value = config.num_key_value_heads * config.head_dim;
        let mut all = vec![("model.embed_tokens.weight".to_owned(), vec![config.vocab_size, hidden])];
        for layer in 0..config.num_hidden_layers {
            for (part, shape) in [
                ("input_layernorm", vec![hidden]),
                ("self_attn.q_proj", vec![query, hidden]),
                ("self_attn.k_proj", vec![key_value, hidden]),
                ("self_attn.v_proj", vec![key_value, hidden]),
                ("self_attn.o_proj", vec![hidden, query]),
                ("post_attention_layernorm", vec![hidden]),
                ("mlp.gate_proj", vec![intermediate, hidden]),
                ("mlp.up_proj", vec![intermediate, hidden]),
                ("mlp.down_proj", vec![hidden, intermediate]),
            ] {
                all.push((format!("model.layers.{layer}.{part}.weight"), shape));
            }
        }
        all.push(("model.norm.weight".to_owned(), vec![hidden]));
        if !config.tie_word_embeddings {
            all.push(("lm_head.weight".to_owned(), vec![config.vocab_size, hidden]));
        }
        all
    }

    fn check_tensors(&self) -> Result<()> {
        let expected = Self::expected(&self.config);
        let missing: Vec<&String> = expected.iter().map(|(name, _)| name).filter(|name| !self.has(name)).collect();
        if let Some(first) = missing.first() {
            let others = match missing.len() {
                1 => String::new(),
                more => format!(", and {} more of {}", more - 1, expected.len()),
            };
            return Err(Error::tensor(&self.path, first.as_str(), format!("is missing{others}")));
        }
        for (name, shape) in &expected {
            let found = match &self.source {
                Source::Gguf(gguf) => {
                    let info = gguf_llama::tensor_name(name).and_then(|name| gguf.tensor(&name));
                    info.map(|info| info.shape.clone()).unwrap_or_default()
                }
                Source::Hf(hf) => hf.shape(name)?,
                Source::Random(_) => shape.clone(),
            };
            if found != *shape {
                let what = format!("shape {found:?}, expected {shape:?}");
                return Err(Error::tensor(&self.path, name.as_str(), what));
            }
        }
        Ok(())
    }

    /// A matrix by its name in Transformers. "lm_head.weight" of a model with tied embeddings is the embedding.
    ///
    /// # Errors
    /// When there is no such matrix, or it is stored in a way that is not read.
    pub fn weight(&self, hf_name: &str) -> Result<Box<dyn WeightSource + '_>> {
        let stored_name = match hf_name {
            "lm_head.weight" if self.config.tie_word_embeddings => "model.embed_tokens.weight",
            name => name,
        };
        let missing = || Error::tensor(&self.path, hf_name, "is missing");
        let matrix = match &self.source {
            Source::Hf(hf) => hf.matrix(stored_name)?,
            Source::Gguf(gguf) => {
                let name = gguf_llama::tensor_name(stored_name).ok_or_else(missing)?;
                let info = gguf.tensor(&name).ok_or_else(missing)?;
                let &[rows, cols] = info.shape.as_slice() else {
                    return Err(Error::tensor(
                        &self.path,
                        hf_name,
                        format!("shape {:?}, expected a matrix", info.shape),
                    ));
                };
                let permuted_heads = gguf_llama::permuted_heads(stored_name, &self.config);
                let storage = Storage::Blocks { bytes: gguf.data(info), block_type: info.block_type, permuted_heads };
                Matrix { name: stored_name.to_owned(), rows, cols, storage }
            }
            Source::Random(random) => {
                let expected = Self::expected(&self.config);
                let found = expected.iter().zip(0..).find(|((name, _), _)| name == stored_name);
                match found {
                    Some(((name, shape), tensor)) if shape.len() == 2 => Matrix {
                        name: name.clone(),
                        rows: shape[0],
                        cols: shape[1],
                        storage: Storage::Random { seed: random.seed, tensor, deviation: RANDOM_DEVIATION },
                    },
                    _ => return Err(missing()),
                }
            }
        };
        Ok(Box::new(matrix))
    }

    /// A vector by its name in Transformers: the weights of a norm.
    ///
    /// # Errors
    /// When there is no such vector, or it holds NaN or infinity.
    pub fn vector(&self, hf_name: &str) -> Result<Vec<f32>> {
        let missing = || Error::tensor(&self.path, hf_name, "is missing");
        let values = match &self.source {
            Source::Hf(hf) => hf.vector(hf_name)?,
            Source::Gguf(gguf) => {
                let name = gguf_llama::tensor_name(hf_name).ok_or_else(missing)?;
                let info = gguf.tensor(&name).ok_or_else(missing)?;
                let &[length] = info.shape.as_slice() else {
                    return Err(Error::tensor(
                        &self.path,
                        hf_name,
                        format!("shape {:?}, expected a vector", info.shape),
                    ));
                };
                let mut values = vec![0.0; length];
                info.block_type.dequantize(gguf.data(info), &mut values);
                values
            }
            Source::Random(_) => {
                let expected = Self::expected(&self.config);
                match expected.iter().find(|(name, _)| name == hf_name).map(|(_, shape)| shape.as_slice()) {
                    Some(&[length]) => vec![1.0; length],
                    _ => return Err(missing()),
                }
            }
        };
        match first_not_finite(&values) {
            None => Ok(values),
            Some(at) => Err(Error::tensor(
                &self.path,
                hf_name,
                format!("element {at} is {}\n  hint: the file is damaged, download it again", values[at]),
            )),
        }
    }

    /// Whether the tensor is stored; "lm_head.weight" is not where it is tied to the embedding.
    pub fn has(&self, hf_name: &str) -> bool {
        match &self.source {
            Source::Hf(hf) => hf.has(hf_name),
            Source::Gguf(gguf) => gguf_llama::tensor_name(hf_name).is_some_and(|name| gguf.tensor(&name).is_some()),
            Source::Random(_) => Self::expected(&self.config).iter().any(|(name, _)| name == hf_name),
        }
    }

    /// Names of the model's tensors, in the order of the forward pass.
    pub fn tensor_names(&self) -> Vec<String> {
        let mut names: Vec<String> = Self::expected(&self.config).into_iter().map(|(name, _)| name).collect();
        if let Source::Hf(hf) = &self.source {
            // Whatever else the files hold, behind.
            let mut others = hf.names();
            others.retain(|name| !names.contains(name));
            others.sort();
            names.append(&mut others);
        }
        names
    }

    /// The model's tokenizer.
    ///
    /// # Errors
    /// When it is missing, of a kind that is not read, or has a larger vocabulary than the model.
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        let mut tokenizer = match self.tokenizer_files()? {
            Files::Gguf(gguf) => Tokenizer::from_gguf(gguf)?,
            Files::Hf(dir) => Tokenizer::from_hf_dir(dir)?,
        };
        tokenizer.limit(self.config.vocab_size)?;
        Ok(tokenizer)
    }

    /// The GGUF file that was opened, if it is one.
    pub(crate) fn gguf(&self) -> Option<&Gguf> {
        match &self.source {
            Source::Gguf(gguf) => Some(gguf),
            _ => None,
        }
    }

    /// The Hugging Face directory that was opened, if it is one.
    pub(crate) fn directory(&self) -> Option<&Path> {
        match &self.source {
            Source::Hf(hf) => Some(hf.dir()),
            _ => None,
        }
    }

    /// How a directory's matrices are mostly stored: "F16", "BF16", "F32", "NF4".
    pub(crate) fn storage_name(&self) -> Option<String> {
        match &self.source {
            Source::Hf(hf) => Some(hf.storage_name()),
            _ => None,
        }
    }

    fn tokenizer_files(&self) -> Result<Files<'_>> {
        match &self.source {
            Source::Gguf(gguf) => Ok(Files::Gguf(gguf)),
            Source::Hf(hf) => Ok(Files::Hf(hf.dir())),
            Source::Random(random) => match random.tokenizer.as_deref() {
                Some(TokenizerFiles::Gguf(gguf)) => Ok(Files::Gguf(gguf)),
                Some(TokenizerFiles::Hf(dir)) => Ok(Files::Hf(dir)),
                None => Err(Error::Tokenizer(
                    "random weights have none\n  hint: name a model whose tokenizer is to be used".into(),
                )),
            },
        }
    }

    /// The chat template in the model's files; Llama 2's own for a Llama 2 that has none.
    ///
    /// # Errors
    /// When there is none, or it cannot be compiled.
    pub fn chat_template(&self) -> Result<ChatTemplate> {
        let files = self.tokenizer_files()?;
        let (source, bos, eos) = match files {
            Files::Gguf(gguf) => {
                let tokens = gguf.strings("tokenizer.ggml.tokens")?.unwrap_or_default();
                let text = |key: &str| -> Result<String> {
                    let id = gguf.u32(&format!("tokenizer.ggml.{key}_token_id"))?;
                    Ok(id.and_then(|id| tokens.get(id as usize)).map_or_else(String::new, |text| (*text).to_owned()))
                };
                (gguf.str("tokenizer.chat_template")?.map(str::to_owned), text("bos")?, text("eos")?)
            }
            Files::Hf(dir) => {
                let config = read_companion(&dir.join("tokenizer_config.json"))?.unwrap_or_default();
                let map = read_companion(&dir.join("special_tokens_map.json"))?.unwrap_or_default();
                let text = |key: &str| {
                    let found = [&config, &map].into_iter().filter_map(|file| file.get(key)).find_map(token_text);
                    found.unwrap_or_default().to_owned()
                };
                (hf_template(dir, &config)?, text("bos_token"), text("eos_token"))
            }
        };
        match source {
            Some(source) => ChatTemplate::new(&source, &bos, &eos),
            None if self.is_llama2() => ChatTemplate::new(
                LLAMA2_TEMPLATE,
                if bos.is_empty() { "<s>" } else { &bos },
                if eos.is_empty() { "</s>" } else { &eos },
            ),
            None => Err(Error::Template(format!(
                "{} has none\n  hint: use a model that was tuned for chat",
                self.path.display()
            ))),
        }
    }

    /// Whether the shape is that of a Llama 2: its vocabulary, context and rotary base are shared by no later family.
    fn is_llama2(&self) -> bool {
        let config = &self.config;
        (32_000..=32_128).contains(&config.vocab_size)
            && config.max_position_embeddings == 4096
            && config.rope_theta == 10_000.0
            && matches!((config.hidden_size, config.num_hidden_layers), (4096, 32) | (5120, 40) | (8192, 80))
    }

    /// One line for people: "SmolLM2 135M Instruct, GGUF Q4_1, 98 MB".
    pub fn describe(&self) -> String {
        match &self.source {
            Source::Gguf(gguf) => {
                let quantization = gguf_llama::quantization(gguf);
                let name = display_name(&self.path, &quantization);
                // Converters leave file names such as "ggml-model-f16" and then know the name themselves.
                let named = gguf.str("general.name").ok().flatten().filter(|_| name.to_lowercase().contains("model"));
                let name = named.map_or(name, str::to_owned);
                format!("{name}, GGUF {quantization}, {}", megabytes(gguf.file_size()))
            }
            Source::Hf(hf) => {
                let name = display_name(&self.path, "");
                format!("{name}, safetensors {}, {}", hf.storage_name(), megabytes(hf.size()))
            }
            Source::Random(random) => {
                let millions = self.config.parameters() as f64 / 1e6;
                let size =
                    if millions < 1000.0 { format!("{millions:.0}M") } else { format!("{:.1}B", millions / 1e3) };
                format!("{size} parameters, random weights, seed {}", random.seed)
            }
        }
    }
}

enum Files<'a> {
    Gguf(&'a Gguf),
    Hf(&'a Path),
}

/// The chat template of a Hugging Face directory: a file of its own, or in `tokenizer_config.json`, there one or several.
fn hf_template(dir: &Path, config: &Value) -> Result<Option<String>> {
    let path = dir.join("chat_template.jinja");
    if path.is_file() {
        let bytes = read_limited(&path, 1 << 20)?;
        return String::from_utf8(bytes).map(Some).map_err(|_| Error::file(&path, "not UTF-8"));
    }
    let legacy = read_companion(&dir.join("chat_template.json"))?.unwrap_or_default();
    let found = config.get("chat_template").or_else(|| legacy.get("chat_template"));
    Ok(match found {
        Some(Value::String(source)) => Some(source.clone()),
        Some(Value::Array(named)) => named
            .iter()
            .find(|entry| entry.get("name").and_then(Value::as_str) == Some("default"))
            .and_then(|entry| entry.get("template")?.as_str())
            .map(str::to_owned),
        _ => None,
    })
}

/// "SmolLM2-135M-Instruct.Q4_1.gguf" → "SmolLM2 135M Instruct".
fn display_name(path: &Path, quantization: &str) -> String {
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let path = if path.file_name().is_some() { path } else { &absolute };
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let stem = name.strip_suffix(".gguf").unwrap_or(&name);
    let end = stem.len() - quantization.len().min(stem.len());
    let stem = match stem.get(end..) {
        Some(tail) if !quantization.is_empty() && tail.eq_ignore_ascii_case(quantization) => {
            stem[..end].trim_end_matches(['.', '-', '_'])
        }
        _ => stem,
    };
    stem.replace(['-', '_'], " ")
}

fn megabytes(bytes: u64) -> String {
    match bytes {
        0..1_000_000_000 => format!("{} MB", (bytes + 500_000) / 1_000_000),
        _ => format!("{:.1} GB", bytes as f64 / 1e9),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_for_people() {
        assert_eq!(display_name(Path::new("/m/SmolLM2-135M-Instruct.Q4_1.gguf"), "Q4_1"), "SmolLM2 135M Instruct");
        assert_eq!(display_name(Path::new("llama-2-7b-chat.Q4_K_M.gguf"), "Q4_K_M"), "llama 2 7b chat");
        assert_eq!(display_name(Path::new("/m/Llama-2-7b-chat-hf/"), ""), "Llama 2 7b chat hf");
        assert_eq!(megabytes(98_362_432), "98 MB");
        assert_eq!(megabytes(13_476_925_163), "13.5 GB");
    }

    #[test]
    fn random_weights_have_the_model_s_shapes() {
        let config = LlamaConfig::preset("llama-2-7b").unwrap();
        let checkpoint = Checkpoint::random(config, 1, None).unwrap();
        let down = checkpoint.weight("model.layers.31.mlp.down_proj.weight").unwrap();
        assert_eq!((down.rows(), down.cols()), (4096, 11_008));
        let mut row = vec![0.0; 11_008];
        down.read_rows(4095..4096, &mut row).unwrap();
        assert!(row.iter().any(|&x| x > 0.03) && row.iter().all(|&x| x.abs() < 0.035));
        assert_eq!(checkpoint.vector("model.norm.weight").unwrap(), vec![1.0; 4096]);
        assert_eq!(checkpoint.tensor_names().len(), 3 + 32 * 9);
        assert!(checkpoint.weight("model.layers.32.mlp.down_proj.weight").is_err());
        assert_eq!(checkpoint.describe(), "6.7B parameters, random weights, seed 1");
        let error = checkpoint.tokenizer().err().unwrap().to_string();
        assert!(error.starts_with("tokenizer: random weights have none"), "{error}");
    }
}
