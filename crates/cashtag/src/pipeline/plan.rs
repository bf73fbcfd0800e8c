//! What a run will need, found before anything is loaded: memory by component, tokens and steps.
//!
//! The engine's own code runs on a device that only counts ([`cashtag_backend::dry`]): the model is "loaded" from its
//! configuration, the scorer and the workspace are made, every micro-batch of every step is packed and passed through. So
//! the sizes follow the code, and a change there changes the plan.

use cashtag_backend::dry::{DryBackend, DryRules, Usage};
use cashtag_backend::{Backend, Dtype};
use cashtag_backend_cpu::{CpuBackend, Precision as CpuPrecision};
use cashtag_backend_cuda::CudaBackend;
use cashtag_llama::adapter::Adapter;
use cashtag_llama::checkpoint::Checkpoint;
use cashtag_llama::lora::{Lora, LoraConfig, LoraTensors};
use cashtag_llama::model::{Checkpointing, Llama, Purpose, TrainPass};
use cashtag_llama::packing::{TokenizedExample, pack};
use cashtag_llama::prompt::PromptFormat;
use cashtag_train::order::step_examples;
use cashtag_train::{Trainer, TrainingArguments};
use serde_json::{Value, json};

use super::engine::{Classifier, LabelledText, Opened};
use super::{device, training};
use crate::exit;
use crate::settings::{GradientCheckpointing, Metric, Settings};

/// What is trained on, validated on and judged.
#[derive(Clone, Copy)]
pub(crate) struct Parts<'a> {
    pub(crate) train: &'a [LabelledText],
    pub(crate) validation: &'a [LabelledText],
    /// Empty where nothing is judged (`train`).
    pub(crate) held_out: &'a [LabelledText],
}

/// The answer.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    /// Bytes by component when most is held.
    pub(crate) memory: Usage,
    /// The same in the order of the work: (phase, most bytes held by the device until its end).
    pub(crate) phases: Vec<(&'static str, u64)>,
    pub(crate) steps: usize,
    pub(crate) micro_batches: usize,
    /// Examples, and rows that are computed, over all steps.
    pub(crate) examples: usize,
    pub(crate) rows: usize,
    pub(crate) largest_batch: usize,
    /// Tokens of the examples as they would be without packing, over all steps.
    pub(crate) tokens: usize,
    /// Rows of evaluations while training, and of judging before and after.
    pub(crate) evaluation_rows: usize,
    pub(crate) trainable: usize,
    /// What the process holds while a checkpoint is written, whatever the device: factors and moments, and the adapter twice.
    pub(crate) checkpoint: u64,
}

impl Plan {
    /// Bytes of the device when most is held.
    pub(crate) fn device_bytes(&self) -> u64 {
        self.memory.iter().map(|(_, b)| b).sum()
    }

    pub(crate) fn to_json(&self, process: Process) -> Value {
        let memory: serde_json::Map<String, Value> =
            self.memory.iter().filter(|(_, b)| *b > 0).map(|(name, b)| (name.to_string(), (*b).into())).collect();
        json!({
            "device_bytes": self.device_bytes(),
            "phases": self.phases.iter().map(|(name, bytes)| json!({"until": name, "peak_bytes": bytes})).collect::<Vec<_>>(),
            "memory": memory,
            "program_bytes": process.program,
            "model_file_bytes": process.model_file,
            "checkpoint_bytes": self.checkpoint,
            "steps": self.steps,
            "micro_batches": self.micro_batches,
            "examples": self.examples,
            "rows": self.rows,
            "largest_batch_rows": self.largest_batch,
            "tokens": self.tokens,
            "evaluation_rows": self.evaluation_rows,
            "trainable_parameters": self.trainable,
        })
    }
}

/// What the process holds beside the device's memory, where that is the machine's.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Process {
    /// Program, tokenizer and texts, as they are now.
    pub(crate) program: u64,
    /// The model's files, which are mapped while they are read and stay so.
    pub(crate) model_file: u64,
}

impl Process {
    pub(crate) fn now(checkpoint: &Checkpoint) -> Self {
        let path = checkpoint.path();
        let size = |path: &std::path::Path| std::fs::metadata(path).map_or(0, |m| m.len());
        let model_file = if path.is_dir() {
            let entries = std::fs::read_dir(path).into_iter().flatten().flatten();
            let weights = entries.filter(|e| e.path().extension().is_some_and(|x| x == "safetensors"));
            weights.map(|e| size(&e.path())).sum()
        } else {
            size(path)
        };
        Self { program: resident_memory(), model_file }
    }

    pub(crate) fn total(self) -> u64 {
        self.program + self.model_file
    }
}

/// Resident size of this process without the files that it maps.
fn resident_memory() -> u64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let field = |name: &str| {
        let line = text.lines().find(|l| l.starts_with(name));
        line.and_then(|l| l.split_whitespace().nth(1)?.parse::<u64>().ok()).map_or(0, |kib| kib * 1024)
    };
    field("RssAnon:")
}

/// The estimate of a run that is about to begin, to stand beside the truth at its end.
#[derive(Clone, Debug)]
pub(crate) struct Forecast {
    plan: Plan,
    process: Process,
    /// The device's memory is the machine's.
    shared: bool,
}

impl Forecast {
    /// # Errors
    /// As [`plan`].
    pub(crate) fn new<B: Backend>(
        backend: &B,
        s: &Settings,
        opened: &Opened,
        parts: Parts<'_>,
    ) -> anyhow::Result<Self> {
        let facts = backend.capabilities();
        let (shared, compute) = (facts.device == "cpu", backend.compute_dtype());
        let rules = if shared {
            let precision = if compute == Dtype::F32 { CpuPrecision::F32 } else { CpuPrecision::Bf16 };
            CpuBackend::dry_rules(precision)
        } else {
            CudaBackend::dry_rules(&device::cuda_options(s, compute), facts.memory_free.unwrap_or(u64::MAX / 2))
        };
        let process = Process::now(&opened.checkpoint);
        Ok(Self { plan: plan(s, opened, parts, rules)?, process, shared })
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.plan.device_bytes() + if self.shared { self.process.total() + self.plan.checkpoint } else { 0 }
    }

    /// What was really held at most: by this process on a CPU, by the device otherwise.
    pub(crate) fn truth<B: Backend>(&self, backend: &B) -> u64 {
        if self.shared { super::report::peak_memory() } else { backend.memory().1 }
    }

    pub(crate) fn to_json(&self) -> Value {
        let mut json = self.plan.to_json(self.process);
        json["needed_bytes"] = self.bytes().into();
        json
    }

    /// `peak memory 1.66 GiB (planned 1.60)`
    pub(crate) fn line<B: Backend>(&self, backend: &B) -> String {
        let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
        format!("peak memory {:.2} GiB (planned {:.2})", gib(self.truth(backend)), gib(self.bytes()))
    }
}

/// Runs the recipe on a device of these rules that computes nothing.
///
/// # Errors
/// Settings, data or adapter that the run itself would refuse.
pub(crate) fn plan(s: &Settings, opened: &Opened, parts: Parts<'_>, rules: DryRules) -> anyhow::Result<Plan> {
    let Opened { checkpoint, format, adapter, .. } = opened;
    let backend = DryBackend::new(rules);
    let arguments = training::arguments(s);
    let budget = s.training.max_tokens_per_batch;
    let mut phases = Vec::new();
    let mut done = |name: &'static str| phases.push((name, backend.memory().1));

    backend.label("weights");
    let model = Llama::load(&backend, checkpoint, |_, _| {})?;
    done("load the model");
    let mut evaluation_rows = 0;
    let judge = |lora: Option<&Lora<DryBackend>>, texts: &[LabelledText]| -> anyhow::Result<usize> {
        if texts.is_empty() {
            return Ok(0);
        }
        backend.label("scorer");
        let mut classifier = Classifier::new(&backend, &model, lora, format, budget)?;
        classifier.classify(&texts.iter().map(|t| t.text.as_str()).collect::<Vec<_>>())?;
        texts.iter().map(|t| Ok(classifier.rows(&format.prompt(&t.text)?))).sum()
    };
    if !parts.held_out.is_empty() {
        let begun = load_lora(&backend, &model, adapter.as_ref())?;
        evaluation_rows += judge(begun.as_ref(), parts.held_out)?;
        done("judge before");
    }

    let (config, tensors) = match adapter {
        Some(adapter) => (training::lora_config(s)?, adapter.tensors.clone()),
        None => fresh(s, &model)?,
    };
    backend.label("LoRA factors, gradients, moments");
    let lora = Lora::new(&backend, config, model.config(), &tensors, true)?;
    let trainable = lora.parameters();
    let mut trainer = trainer(&backend, &model, format, s, parts, arguments, lora)?;
    backend.label("activations");
    let purpose = Purpose::Training(trainer.checkpointing);
    let mut ws = model.workspace(&backend, trainer.capacity(), purpose, Some(&trainer.lora))?;
    model.prepare(&backend, &mut trainer.lora)?;
    backend.label("head block");
    let counts = steps(&backend, &model, &mut trainer, &mut ws)?;
    let evaluations = counts.evaluations;
    let saves = trainer.arguments.save_strategy != cashtag_train::SaveStrategy::No;
    let checkpoint = if saves { checkpoint_bytes(trainable, trainer.arguments.optim) } else { 0 };
    let validation: usize = if evaluations > 0 && !trainer.eval.is_empty() {
        trainer.eval_loss(&mut ws)?;
        trainer.eval.iter().map(|e| e.tokens.len() - format.prefix().len().min(e.tokens.len())).sum()
    } else {
        0
    };
    evaluation_rows += evaluations * validation;
    if s.training.metric_for_best_model != Metric::EvalLoss && evaluations > 0 {
        evaluation_rows += evaluations * judge(Some(&trainer.lora), parts.validation)?;
    }
    drop(ws);
    done("train");
    evaluation_rows += judge(Some(&trainer.lora), parts.validation)?;
    evaluation_rows += judge(Some(&trainer.lora), parts.held_out)?;
    done("judge after");
    Ok(Plan {
        memory: backend.peak(),
        phases,
        steps: counts.steps,
        micro_batches: counts.micro_batches,
        examples: counts.examples,
        rows: counts.rows,
        largest_batch: counts.largest,
        tokens: counts.tokens,
        evaluation_rows,
        trainable,
        checkpoint,
    })
}

fn checkpoint_bytes(parameters: usize, optim: cashtag_train::Optimizer) -> u64 {
    let (factor, moments) = match optim {
        cashtag_train::Optimizer::AdamW => (4, 8),
        cashtag_train::Optimizer::AdamW8bit => (4, 2),
    };
    ((factor + moments) * parameters + 2 * factor * parameters) as u64
}

fn fresh(s: &Settings, model: &Llama<DryBackend>) -> anyhow::Result<(LoraConfig, LoraTensors)> {
    let config = training::lora_config(s)?;
    config.validate(model.config())?;
    let tensors = LoraTensors::init(&config, model.config(), s.training.seed);
    Ok((config, tensors))
}

fn load_lora(
    backend: &DryBackend,
    model: &Llama<DryBackend>,
    adapter: Option<&Adapter>,
) -> anyhow::Result<Option<Lora<DryBackend>>> {
    backend.label("adapter");
    super::engine::load_lora(backend, model, adapter)
}

fn trainer<'a>(
    backend: &'a DryBackend,
    model: &'a Llama<DryBackend>,
    format: &PromptFormat,
    s: &Settings,
    parts: Parts<'_>,
    arguments: TrainingArguments,
    lora: Lora<DryBackend>,
) -> anyhow::Result<Trainer<'a, DryBackend>> {
    Ok(Trainer {
        backend,
        model,
        lora,
        train: training::tokenize(s, format, parts.train)?,
        eval: training::tokenize(s, format, parts.validation)?,
        prefix: format.prefix().to_vec(),
        arguments,
        checkpointing: match s.training.gradient_checkpointing {
            GradientCheckpointing::Block => Checkpointing::Block,
            GradientCheckpointing::None | GradientCheckpointing::Auto => Checkpointing::None,
        },
        run_dir: std::path::PathBuf::new(),
        base_model: None,
        classifier: None,
        fingerprint: String::new(),
        resume: false,
        loss_scale: None,
        group: None,
    })
}

#[derive(Default)]
struct Counts {
    steps: usize,
    micro_batches: usize,
    examples: usize,
    rows: usize,
    largest: usize,
    tokens: usize,
    evaluations: usize,
}

/// Every micro-batch of every step, in the order of the run.
fn steps(
    backend: &DryBackend,
    model: &Llama<DryBackend>,
    trainer: &mut Trainer<'_, DryBackend>,
    ws: &mut cashtag_llama::model::Workspace<DryBackend>,
) -> anyhow::Result<Counts> {
    let a = trainer.arguments.clone();
    let n = trainer.train.len();
    anyhow::ensure!(n > 0, exit::Usage("there are no training examples\n  hint: check --data".into()));
    if a.optim == cashtag_train::Optimizer::AdamW8bit {
        trainer.lora.use_8bit_moments(backend)?;
    }
    let mut counts = Counts { steps: a.total_steps(n), ..Counts::default() };
    counts.evaluations = match a.eval_strategy {
        cashtag_train::SaveStrategy::No => 0,
        cashtag_train::SaveStrategy::Steps => counts.steps / a.eval_steps.max(1),
        cashtag_train::SaveStrategy::Epoch => counts.steps.div_ceil(a.steps_per_epoch(n)),
    };
    if a.load_best_model_at_end && a.eval_strategy != cashtag_train::SaveStrategy::No {
        counts.evaluations = counts.evaluations.max(1);
    }
    let (mut order, mut shapes) = (None, std::collections::HashSet::new());
    for step in 0..counts.steps {
        let chosen = step_examples(n, a.examples_per_step(), a.seed, step, &mut order);
        let examples: Vec<&TokenizedExample> = chosen.iter().map(|&i| &trainer.train[i]).collect();
        let ranges = trainer.micro_batches(&examples);
        let packed: Vec<_> = ranges.into_iter().map(|r| pack(&examples[r], &trainer.prefix, a.train_on)).collect();
        counts.examples += examples.len();
        counts.tokens += examples.iter().map(|e| e.tokens.len()).sum::<usize>();
        for batch in packed {
            counts.micro_batches += 1;
            counts.rows += batch.rows();
            counts.largest = counts.largest.max(batch.rows());
            // Another batch of the same sizes asks for nothing new.
            if shapes.insert((batch.rows(), batch.label_rows.len())) {
                let pass = TrainPass {
                    random: Some((a.seed, 0)),
                    label_smoothing: 0.0,
                    loss_scale: 1.0,
                    neftune_alpha: a.neftune_noise_alpha,
                };
                model.forward_backward(backend, &batch, &mut trainer.lora, pass, ws)?;
            }
        }
        if step == 0 {
            let hyper = cashtag_backend::AdamW {
                learning_rate: 0.0,
                beta1: 0.9,
                beta2: 0.999,
                epsilon: 1e-8,
                weight_decay: 0.0,
                step: 1,
                gradient_scale: 1.0,
            };
            trainer.lora.zero_grad(backend)?;
            trainer.lora.step(backend, hyper, 1.0)?;
            model.prepare(backend, &mut trainer.lora)?;
        }
    }
    Ok(counts)
}
