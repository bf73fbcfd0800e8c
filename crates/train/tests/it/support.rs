//! The real model and small helpers.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use cashtag_backend::philox::philox4x32;
use cashtag_backend_cpu::{CpuBackend, Precision};
use cashtag_llama::adapter::ClassifierConfig;
use cashtag_llama::checkpoint::Checkpoint;
use cashtag_llama::config::LlamaConfig;
use cashtag_llama::lora::{Lora, LoraConfig, LoraTensors, Module};
use cashtag_llama::model::{Checkpointing, Llama};
use cashtag_llama::packing::TokenizedExample;
use cashtag_llama::prompt::{Label, PromptFormat, TooLong};
use cashtag_train::{LogEntry, Observer, SaveStrategy, StepReport, TrainOutcome, Trainer, TrainingArguments};

/// The model file that `cashtag pull smollm2-135m` keeps; `make test` fetches it.
pub(crate) fn model_path() -> PathBuf {
    if let Some(path) = std::env::var_os("CASHTAG_TEST_MODEL") {
        return path.into();
    }
    let cache = std::env::var_os("CASHTAG_CACHE").map(PathBuf::from);
    let cache = cache.or_else(|| std::env::var_os("XDG_CACHE_HOME").map(|x| PathBuf::from(x).join("cashtag")));
    let cache =
        cache.unwrap_or_else(|| PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".cache/cashtag"));
    let path = cache.join("SmolLM2-135M-Instruct.Q4_1.gguf");
    assert!(path.exists(), "{} is missing\n  hint: cashtag pull smollm2-135m", path.display());
    path
}

pub(crate) fn load(precision: Precision) -> (CpuBackend, Llama<CpuBackend>, Checkpoint) {
    let backend = CpuBackend::new(precision, 2).unwrap();
    let checkpoint = Checkpoint::open(&model_path()).unwrap();
    let model = Llama::load(&backend, &checkpoint, |_, _| {}).unwrap();
    (backend, model, checkpoint)
}

pub(crate) fn format(checkpoint: &Checkpoint, system: &str) -> PromptFormat {
    let labels = ["Positive", "Neutral", "Negative"].map(Label::new).to_vec();
    PromptFormat::new(
        Arc::new(checkpoint.tokenizer().unwrap()),
        checkpoint.chat_template().unwrap(),
        Some(system.into()),
        labels,
        512,
        TooLong::Truncate,
    )
    .unwrap()
}

/// First Philox word for counter (i, stream) and key (seed, 0), as make_goldens.py draws it.
fn word(i: usize, stream: usize, seed: u32) -> u32 {
    philox4x32([i as u32, stream as u32, 0, 0], [seed, 0])[0]
}

pub(crate) fn uniform(n: usize, stream: usize, bound: f32) -> Vec<f32> {
    (0..n).map(|i| ((word(i, stream, 1) >> 8) as f32 / (1u32 << 23) as f32 - 1.0) * bound).collect()
}

/// Norm and eight random-sign projections.
pub(crate) fn fingerprint(values: &[f32], stream: usize) -> Vec<f64> {
    let norm = values.iter().map(|&v| f64::from(v) * f64::from(v)).sum::<f64>().sqrt();
    let projection = |j: u32| -> f64 {
        values
            .iter()
            .enumerate()
            .map(|(i, &v)| if word(i, stream, 100 + j) & 1 == 0 { f64::from(v) } else { -f64::from(v) })
            .sum()
    };
    std::iter::once(norm).chain((0..8).map(projection)).collect()
}

// --- a model of two layers with random weights, on which a step takes a millisecond ------------------------------------

pub(crate) struct Tiny {
    pub backend: CpuBackend,
    pub model: Llama<CpuBackend>,
    pub examples: Vec<TokenizedExample>,
}

/// What every example begins with.
pub(crate) const PREFIX: [u32; 6] = [1, 2, 3, 4, 5, 6];
const END: u32 = 95;

impl Tiny {
    pub(crate) fn new(precision: Precision) -> Self {
        let config = LlamaConfig {
            hidden_size: 64,
            intermediate_size: 96,
            num_hidden_layers: 2,
            num_attention_heads: 4,
            num_key_value_heads: 2,
            head_dim: 16,
            vocab_size: 96,
            max_position_embeddings: 256,
            rms_norm_eps: 1e-5,
            rope_theta: 10_000.0,
            rope_scaling: None,
            tie_word_embeddings: true,
            bos_token_id: Some(1),
            eos_token_ids: vec![END],
            pad_token_id: None,
        };
        let backend = CpuBackend::new(precision, 2).unwrap();
        let model = Llama::load(&backend, &Checkpoint::random(config, 5, None).unwrap(), |_, _| {}).unwrap();
        // Three classes that a word in the text gives away.
        let examples = (0..24usize)
            .map(|i| {
                let class = (i % 3) as u32;
                let mut tokens = PREFIX.to_vec();
                tokens.extend((0..3 + i % 5).map(|j| 10 + ((i * 7 + j * 13) % 60) as u32));
                tokens.push(80 + class);
                let answer_start = tokens.len();
                tokens.extend([90 + class, END]);
                TokenizedExample { tokens, answer_start, weight: 1.0 }
            })
            .collect();
        Self { backend, model, examples }
    }

    pub(crate) fn lora_config() -> LoraConfig {
        LoraConfig {
            r: 4,
            lora_alpha: 8.0,
            lora_dropout: 0.1,
            target_modules: Module::ALL.to_vec(),
            ..Default::default()
        }
    }

    pub(crate) fn lora(&self, config: LoraConfig) -> Lora<CpuBackend> {
        let tensors = LoraTensors::init(&config, self.model.config(), 3);
        Lora::new(&self.backend, config, self.model.config(), &tensors, true).unwrap()
    }

    pub(crate) fn trainer(&self, run_dir: &Path, arguments: TrainingArguments) -> Trainer<'_, CpuBackend> {
        self.trainer_with(run_dir, arguments, Self::lora_config())
    }

    pub(crate) fn trainer_with(
        &self,
        run_dir: &Path,
        arguments: TrainingArguments,
        config: LoraConfig,
    ) -> Trainer<'_, CpuBackend> {
        Trainer {
            backend: &self.backend,
            model: &self.model,
            lora: self.lora(config),
            train: self.examples.clone(),
            eval: self.examples[..6].to_vec(),
            prefix: PREFIX.to_vec(),
            arguments,
            checkpointing: Checkpointing::None,
            run_dir: run_dir.to_owned(),
            base_model: Some("tiny".into()),
            classifier: Some(ClassifierConfig {
                labels: ["Up", "Flat", "Down"].map(Label::new).to_vec(),
                system_message: None,
                max_seq_length: 64,
                temperature: 1.0,
                base_model: "tiny".into(),
            }),
            fingerprint: "tiny".into(),
            resume: true,
            loss_scale: None,
            group: None,
        }
    }
}

/// Six steps of eight examples, two epochs; nothing is evaluated or saved.
pub(crate) fn quiet() -> TrainingArguments {
    TrainingArguments {
        num_train_epochs: 2.0,
        per_device_train_batch_size: 4,
        gradient_accumulation_steps: 2,
        learning_rate: 5e-3,
        eval_strategy: SaveStrategy::No,
        save_strategy: SaveStrategy::No,
        load_best_model_at_end: false,
        early_stopping_patience: None,
        ..Default::default()
    }
}

/// Keeps what it saw; stops after some steps, as Ctrl-C does; gives an evaluation the scores that it was told to.
#[derive(Default)]
pub(crate) struct Watch {
    pub stop_after: Option<usize>,
    pub scores: std::collections::VecDeque<f64>,
    pub reports: Vec<StepReport>,
    pub logs: Vec<LogEntry>,
    pub saved: Vec<String>,
    pub warnings: Vec<String>,
}

impl Observer<CpuBackend> for Watch {
    fn step(&mut self, report: &StepReport) {
        self.reports.push(report.clone());
    }
    fn log(&mut self, entry: &LogEntry) {
        self.logs.push(entry.clone());
    }
    fn evaluate(&mut self, _lora: &Lora<CpuBackend>) -> cashtag_train::Result<LogEntry> {
        Ok(self.scores.pop_front().map(|score| ("eval_macro_f1".to_string(), score)).into_iter().collect())
    }
    fn saved(&mut self, path: &Path) {
        self.saved.push(path.file_name().unwrap().to_string_lossy().into_owned());
    }
    fn warn(&mut self, message: &str) {
        self.warnings.push(message.into());
    }
    fn should_stop(&mut self) -> bool {
        self.stop_after.is_some_and(|n| self.reports.len() >= n)
    }
}

pub(crate) fn run(trainer: &mut Trainer<'_, CpuBackend>, watch: Watch) -> (TrainOutcome, Watch) {
    let mut watch = watch;
    let outcome = trainer.run(&mut watch).unwrap();
    (outcome, watch)
}
