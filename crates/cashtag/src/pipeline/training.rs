//! From settings and data to a trained adapter, with everything a person sees meanwhile.

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::Context;
use cashtag_backend::Backend;
use cashtag_eval::report::HistoryRow;
use cashtag_llama::adapter::ClassifierConfig;
use cashtag_llama::lora::{Lora, LoraConfig, LoraTensors};
use cashtag_llama::model::{Checkpointing, Llama};
use cashtag_llama::packing::{TokenizedExample, TrainOn};
use cashtag_llama::prompt::PromptFormat;
use cashtag_train::tensorboard::EventWriter;
use cashtag_train::{
    EndReason, LogEntry, Observer, Optimizer, SaveStrategy, SchedulerType, StepReport, TrainOutcome, Trainer,
    TrainingArguments,
};

use super::engine::{Classifier, LabelledText};
use super::ranks;
use crate::progress::{Progress, Unit};
use crate::settings::{self, GradientCheckpointing, LrSchedulerType, Optim, Resume, Settings, Strategy};
use crate::{exit, output};

/// Directory of TensorBoard's event files in a run directory.
const EVENTS: &str = "tensorboard";

/// The knobs of `[training]` as the trainer wants them.
pub(crate) fn arguments(s: &Settings) -> TrainingArguments {
    let t = &s.training;
    let strategy = |s: Strategy| match s {
        Strategy::No => SaveStrategy::No,
        Strategy::Steps => SaveStrategy::Steps,
        Strategy::Epoch => SaveStrategy::Epoch,
    };
    TrainingArguments {
        num_train_epochs: t.num_train_epochs,
        max_steps: s.max_steps(),
        per_device_train_batch_size: t.per_device_train_batch_size,
        per_device_eval_batch_size: t.per_device_eval_batch_size,
        gradient_accumulation_steps: t.gradient_accumulation_steps,
        optim: match t.optim {
            Optim::Adamw => Optimizer::AdamW,
            Optim::Adamw8bit => Optimizer::AdamW8bit,
        },
        learning_rate: t.learning_rate,
        lr_scheduler_type: match t.lr_scheduler_type {
            LrSchedulerType::Linear => SchedulerType::Linear,
            LrSchedulerType::Cosine => SchedulerType::Cosine,
            LrSchedulerType::Constant => SchedulerType::Constant,
            LrSchedulerType::ConstantWithWarmup => SchedulerType::ConstantWithWarmup,
        },
        warmup_ratio: t.warmup_ratio,
        warmup_steps: t.warmup_steps,
        weight_decay: t.weight_decay,
        max_grad_norm: t.max_grad_norm,
        adam_beta1: t.adam_beta1,
        adam_beta2: t.adam_beta2,
        adam_epsilon: t.adam_epsilon,
        eval_strategy: strategy(t.eval_strategy),
        eval_steps: t.eval_steps,
        save_strategy: strategy(t.save_strategy),
        save_steps: t.save_steps,
        save_total_limit: t.save_total_limit,
        load_best_model_at_end: t.load_best_model_at_end,
        metric_for_best_model: t.metric_for_best_model.to_string(),
        greater_is_better: t.greater_is_better,
        early_stopping_patience: t.early_stopping_patience,
        early_stopping_threshold: t.early_stopping_threshold,
        logging_steps: t.logging_steps,
        packing: t.packing,
        max_tokens_per_batch: t.max_tokens_per_batch,
        train_on: match t.train_on {
            settings::TrainOn::Answer => TrainOn::Answer,
            settings::TrainOn::All => TrainOn::All,
        },
        label_smoothing_factor: t.label_smoothing_factor as f32,
        neftune_noise_alpha: t.neftune_noise_alpha as f32,
        loraplus_lr_ratio: s.lora.loraplus_lr_ratio as f32,
        seed: t.seed,
        world_size: 1,
    }
}

/// The adapter's configuration.
///
/// # Errors
/// An unknown target module.
pub(crate) fn lora_config(s: &Settings) -> anyhow::Result<LoraConfig> {
    let l = &s.lora;
    let target_modules = l
        .target_modules
        .names()
        .iter()
        .map(|n| n.parse().map_err(anyhow::Error::msg))
        .collect::<Result<Vec<_>, _>>()?;
    Ok(LoraConfig {
        r: l.r,
        lora_alpha: l.lora_alpha as f32,
        lora_dropout: l.lora_dropout as f32,
        target_modules,
        use_rslora: l.use_rslora,
        layers_to_transform: l.layers_to_transform.as_ref().map(|l| l.0.clone()),
        use_dora: l.use_dora,
    })
}

/// Weight of each label in the loss.
fn class_weight(s: &Settings, label: usize) -> f32 {
    s.training.class_weights.as_ref().and_then(|w| w.0.get(label)).map_or(1.0, |w| *w as f32)
}

/// Tokenizes labelled texts.
///
/// # Errors
/// A text that is too long, if that is asked to be an error.
pub(crate) fn tokenize(
    s: &Settings,
    format: &PromptFormat,
    texts: &[LabelledText],
) -> anyhow::Result<Vec<TokenizedExample>> {
    texts.iter().map(|t| Ok(format.example(&t.text, t.label, class_weight(s, t.label))?)).collect()
}

/// What stands beside an adapter so that it is used as it was trained.
pub(crate) fn classifier_config(s: &Settings, format: &PromptFormat, temperature: f32) -> ClassifierConfig {
    ClassifierConfig {
        labels: format.labels().to_vec(),
        system_message: format.system_message().map(str::to_string),
        max_seq_length: format.max_seq_length(),
        temperature,
        base_model: s.model.name.clone(),
    }
}

/// What a training run leaves.
pub(crate) struct Trained<B: Backend> {
    pub(crate) lora: Lora<B>,
    pub(crate) outcome: TrainOutcome,
    pub(crate) history: Vec<HistoryRow>,
    /// Examples and computed rows of this process; what an interrupted run did before is not among them.
    pub(crate) examples: usize,
    pub(crate) rows: usize,
}

/// Trains an adapter; `Ok(None)` if Ctrl-C ended it (a checkpoint is saved).
///
/// # Errors
/// Knobs that do not fit, a device that fails, a file system that refuses.
pub(crate) fn train<B: Backend>(
    backend: &B,
    model: &Llama<B>,
    format: &PromptFormat,
    s: &Settings,
    parts: (&[LabelledText], &[LabelledText]),
    run_dir: &Path,
    begin: Option<(LoraConfig, LoraTensors)>,
) -> anyhow::Result<Option<Trained<B>>> {
    let (train, validation) = parts;
    let mut arguments = arguments(s);
    arguments.world_size = ranks::world()?.map_or(1, |w| w.size);
    let main = ranks::other_rank().is_none();
    let (config, tensors) = match begin {
        Some(begin) => begin,
        None => {
            let config = lora_config(s)?;
            config.validate(model.config())?;
            let tensors = LoraTensors::init(&config, model.config(), arguments.seed);
            (config, tensors)
        }
    };
    let lora = Lora::new(backend, config, model.config(), &tensors, true)?;
    let classifier = classifier_config(s, format, 1.0);
    let (resume, checkpoint_dir) = match &s.training.resume {
        Resume::Never => (false, run_dir.to_owned()),
        Resume::Auto => (true, run_dir.to_owned()),
        Resume::From(path) => (true, path.parent().unwrap_or(run_dir).to_owned()),
    };
    if main && !resume && !cashtag_train::checkpoint::list(run_dir).is_empty() {
        anyhow::bail!(exit::Usage(format!(
            "{} already holds checkpoints of a run\n  hint: --resume auto goes on with it; another --output-dir begins anew",
            run_dir.display()
        )));
    }
    let fingerprint = fingerprint(s, train, format, &arguments);
    let mut trainer = Trainer {
        backend,
        model,
        lora,
        train: tokenize(s, format, train)?,
        eval: tokenize(s, format, validation)?,
        prefix: format.prefix().to_vec(),
        group: ranks::join(&fingerprint)?,
        fingerprint,
        arguments,
        checkpointing: match s.training.gradient_checkpointing {
            GradientCheckpointing::Block => Checkpointing::Block,
            GradientCheckpointing::None | GradientCheckpointing::Auto => Checkpointing::None,
        },
        run_dir: checkpoint_dir,
        base_model: Some(s.model.name.clone()),
        classifier: Some(classifier),
        resume,
        loss_scale: None,
    };
    let _clean = exit::clean_stop();
    let total = trainer.arguments.total_steps(trainer.train.len());
    if !main {
        let outcome = trainer.run(&mut Others)?;
        let finished = outcome.reason != EndReason::Interrupted;
        return Ok(finished.then_some(Trained {
            lora: trainer.lora,
            outcome,
            history: Vec::new(),
            examples: 0,
            rows: 0,
        }));
    }
    let wants_metrics = s.training.metric_for_best_model != settings::Metric::EvalLoss;
    let mut watch = Watch {
        backend,
        model,
        format,
        validation: if wants_metrics { validation } else { &[] },
        max_tokens: s.training.max_tokens_per_batch,
        bar: Progress::new("training", Unit::Of("examples"), None),
        train: parts.0,
        log: TrainerLog::open(run_dir)?,
        events: run_dir.join(EVENTS),
        writer: None,
        history: Vec::new(),
        last: None,
        examples: 0,
        rows: 0,
        seconds: 0.0,
    };
    let n = trainer.train.len();
    let per_epoch = trainer.arguments.steps_per_epoch(n);
    let per_step = trainer.arguments.examples_per_step();
    let whole: usize = (0..total)
        .map(|step| if (step + 1) % per_epoch == 0 { n - (per_epoch - 1) * per_step } else { per_step })
        .sum();
    watch.bar.set_total(whole as u64);
    let outcome = trainer.run(&mut watch)?;
    let (examples, rows) = (watch.examples, watch.rows);
    let history = watch.finish(&outcome);
    if outcome.reason == EndReason::Interrupted {
        return Ok(None);
    }
    if outcome.reason == EndReason::EarlyStopped {
        output::note(format!(
            "stopped early after step {} of {total}: {} evaluations without improvement; the best was step {}",
            outcome.state.global_step, outcome.state.evaluations_without_gain, outcome.step
        ));
    }
    Ok(Some(Trained { lora: trainer.lora, outcome, history, examples, rows }))
}

/// Watches on a rank that is not the main one: all is said and written there.
struct Others;

impl<B: Backend> Observer<B> for Others {
    fn warn(&mut self, _message: &str) {}

    fn should_stop(&mut self) -> bool {
        exit::stop_requested()
    }
}

/// Changes when anything changes that a continued run must share with the run that it continues.
fn fingerprint(s: &Settings, train: &[LabelledText], format: &PromptFormat, a: &TrainingArguments) -> String {
    use sha2::{Digest, Sha256};
    let mut hash = Sha256::new();
    for t in train {
        hash.update(t.text.as_bytes());
        hash.update([0xff, t.label as u8]);
    }
    // How long the run is and how often it evaluates and saves may change; what a step computes may not.
    let a = TrainingArguments {
        logging_steps: 0,
        per_device_eval_batch_size: 0,
        eval_steps: 0,
        save_steps: 0,
        save_total_limit: None,
        early_stopping_patience: None,
        early_stopping_threshold: 0.0,
        load_best_model_at_end: false,
        metric_for_best_model: String::new(),
        ..a.clone()
    };
    hash.update(format!("{:?}{:?}{:?}{:?}{a:?}", s.model.name, s.lora, format.system_message(), format.labels()));
    hash.finalize().iter().take(16).map(|b| format!("{b:02x}")).collect()
}

/// `trainer_log.jsonl`: one line for each entry of the log, flushed at once.
struct TrainerLog {
    path: PathBuf,
    file: File,
}

impl TrainerLog {
    fn open(run_dir: &Path) -> anyhow::Result<Self> {
        std::fs::create_dir_all(run_dir).with_context(|| format!("cannot create {}", run_dir.display()))?;
        let path = run_dir.join("trainer_log.jsonl");
        let file = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&path)
            .with_context(|| format!("cannot write {}", path.display()))?;
        Ok(Self { path, file })
    }

    fn write(&mut self, entry: &LogEntry) {
        let line = serde_json::to_string(entry).unwrap_or_default() + "\n";
        if let Err(e) = self.file.write_all(line.as_bytes()) {
            output::warn(format!("cannot write {}: {e}", self.path.display()));
        }
    }

    /// Writes the whole history anew, so that a continued run has every entry once and in order.
    fn replace(&mut self, history: &[LogEntry]) {
        let text: String = history.iter().filter_map(|e| Some(serde_json::to_string(e).ok()? + "\n")).collect();
        if let Err(e) = cashtag_corpus::formats::write_atomically(&self.path, text.as_bytes()) {
            output::warn(e.to_string());
        }
    }
}

struct Watch<'a, B: Backend> {
    backend: &'a B,
    model: &'a Llama<B>,
    format: &'a PromptFormat,
    validation: &'a [LabelledText],
    max_tokens: usize,
    bar: Progress,
    train: &'a [LabelledText],
    log: TrainerLog,
    /// Where TensorBoard finds the run, and the file of this process.
    events: PathBuf,
    writer: Option<EventWriter>,
    history: Vec<(usize, f64, f64)>,
    last: Option<StepReport>,
    examples: usize,
    rows: usize,
    seconds: f64,
}

impl<B: Backend> Watch<'_, B> {
    fn finish(mut self, outcome: &TrainOutcome) -> Vec<HistoryRow> {
        self.log.replace(&outcome.state.log_history);
        let rate = |step: usize| self.history.iter().find(|(s, ..)| *s == step).map(|(_, e, t)| (*e, *t));
        outcome
            .state
            .log_history
            .iter()
            .filter(|entry| entry.contains_key("loss") || entry.contains_key("eval_loss"))
            .map(|entry| {
                let get = |key: &str| entry.get(key).copied();
                let step = get("step").unwrap_or(0.0) as u64;
                let rates = rate(step as usize);
                HistoryRow {
                    step,
                    epoch: get("epoch").unwrap_or(0.0),
                    loss: get("loss"),
                    eval_loss: get("eval_loss"),
                    learning_rate: get("learning_rate"),
                    grad_norm: get("grad_norm"),
                    examples_per_second: rates.map(|r| r.0),
                    tokens_per_second: rates.map(|r| r.1),
                }
            })
            .collect()
    }
}

impl<B: Backend> Observer<B> for Watch<'_, B> {
    fn begin(&mut self, step: usize) {
        match EventWriter::create(&self.events, step) {
            Ok(writer) => self.writer = Some(writer),
            Err(e) => output::warn(format!("no events for TensorBoard in {}: {e}", self.events.display())),
        }
    }

    fn step(&mut self, r: &StepReport) {
        if self.last.is_none() && r.step > 1 {
            self.bar.set_position(((r.step - 1) * r.examples) as u64);
        }
        self.examples += r.examples;
        self.rows += r.rows;
        self.seconds += r.seconds;
        self.history.push((r.step, r.examples as f64 / r.seconds, r.rows as f64 / r.seconds));
        let memory = self.backend.memory().0 as f64 / f64::from(1 << 30);
        self.bar.message(format!(
            "step {}/{}, loss {:.3}, lr {:.1e}, |g| {:.2}, {:.0} tokens/s, {memory:.2} GiB",
            r.step,
            r.total_steps,
            r.loss,
            r.learning_rate,
            r.grad_norm,
            r.rows as f64 / r.seconds
        ));
        self.bar.inc(r.examples as u64);
        self.last = Some(r.clone());
    }

    fn log(&mut self, entry: &LogEntry) {
        self.log.write(entry);
        if let Some(Err(e)) = self.writer.as_mut().map(|w| w.log(entry)) {
            output::warn(format!("cannot write events for TensorBoard in {}: {e}", self.events.display()));
            self.writer = None;
        }
        if let Some(loss) = entry.get("eval_loss") {
            let more: String = entry
                .iter()
                .filter(|(k, _)| k.starts_with("eval_") && k.ends_with(['1', 'y']))
                .map(|(k, v)| format!(", {k} {v:.3}"))
                .collect();
            output::detail(format!("step {}: eval_loss {loss:.4}{more}", entry.get("step").unwrap_or(&0.0)));
        }
    }

    fn evaluate(&mut self, lora: &Lora<B>) -> cashtag_train::Result<LogEntry> {
        let mut entry = LogEntry::new();
        if self.validation.is_empty() {
            return Ok(entry);
        }
        let failed = |e: anyhow::Error| cashtag_train::Error::Invalid(format!("evaluation: {e:#}"));
        let mut classifier =
            Classifier::new(self.backend, self.model, Some(lora), self.format, self.max_tokens).map_err(failed)?;
        let texts: Vec<&str> = self.validation.iter().map(|t| t.text.as_str()).collect();
        let probabilities = classifier.classify(&texts).map_err(failed)?;
        let judged: Vec<_> = self
            .validation
            .iter()
            .zip(probabilities)
            .map(|(t, probabilities)| cashtag_eval::Judged {
                text: t.text.clone(),
                truth: t.label,
                probabilities,
                kind: t.kind.clone(),
            })
            .collect();
        let metrics = cashtag_eval::evaluate(&judged, &self.format.label_names(), 0).map_err(|e| failed(e.into()))?;
        entry.insert("eval_accuracy".into(), metrics.accuracy.value);
        entry.insert("eval_macro_f1".into(), metrics.macro_f1.value);
        entry.insert("eval_weighted_f1".into(), metrics.weighted_f1.value);
        Ok(entry)
    }

    fn warn(&mut self, message: &str) {
        output::warn(message);
    }

    fn name_example(&self, index: usize) -> String {
        let text = self.train.get(index).map_or("", |t| t.text.as_str());
        let shown: String = text.chars().take(40).collect();
        format!("{index} {:?}{}", shown, if shown.len() < text.len() { "…" } else { "" })
    }

    fn should_stop(&mut self) -> bool {
        exit::stop_requested()
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;
    use serde_json::{Value, json};

    use super::*;
    use crate::settings::Flags;

    #[derive(clap::Parser)]
    struct Cli {
        #[command(flatten)]
        settings: Flags,
    }

    fn settings(words: &[&str]) -> Settings {
        let words = ["train"].iter().chain(words);
        Cli::try_parse_from(words).unwrap_or_else(|e| panic!("{e}")).settings.resolve().unwrap()
    }

    /// Each flag of the trainer reaches the trainer under its own name. Every argument that there is stands in the table.
    #[test]
    fn every_argument_arrives() {
        let table: &[(&[&str], &str, Value)] = &[
            (&["--num-train-epochs", "1.5"], "num_train_epochs", json!(1.5)),
            (&["--max-steps", "7"], "max_steps", json!(7)),
            (&["--per-device-train-batch-size", "3"], "per_device_train_batch_size", json!(3)),
            (&["--per-device-eval-batch-size", "5"], "per_device_eval_batch_size", json!(5)),
            (&["--gradient-accumulation-steps", "6"], "gradient_accumulation_steps", json!(6)),
            (&["--optim", "adamw_8bit"], "optim", json!("adamw_8bit")),
            (&["--learning-rate", "0.25"], "learning_rate", json!(0.25)),
            (&["--lr-scheduler-type", "linear"], "lr_scheduler_type", json!("linear")),
            (&["--lr-scheduler-type", "constant"], "lr_scheduler_type", json!("constant")),
            (&["--lr-scheduler-type", "constant_with_warmup"], "lr_scheduler_type", json!("constant_with_warmup")),
            (&["--warmup-ratio", "0.5"], "warmup_ratio", json!(0.5)),
            (&["--warmup-steps", "9"], "warmup_steps", json!(9)),
            (&["--weight-decay", "0.5"], "weight_decay", json!(0.5)),
            (&["--max-grad-norm", "0.5"], "max_grad_norm", json!(0.5)),
            (&["--adam-beta1", "0.5"], "adam_beta1", json!(0.5)),
            (&["--adam-beta2", "0.5"], "adam_beta2", json!(0.5)),
            (&["--adam-epsilon", "0.5"], "adam_epsilon", json!(0.5)),
            (&["--evaluation-strategy", "epoch"], "eval_strategy", json!("epoch")),
            (&["--eval-strategy", "no"], "eval_strategy", json!("no")),
            (&["--eval-steps", "250"], "eval_steps", json!(250)),
            (&["--save-strategy", "epoch", "--no-load-best-model-at-end"], "save_strategy", json!("epoch")),
            (&["--save-steps", "1000"], "save_steps", json!(1000)),
            (&["--save-total-limit", "4"], "save_total_limit", json!(4)),
            (&["--no-load-best-model-at-end"], "load_best_model_at_end", json!(false)),
            (&["--metric-for-best-model", "eval_macro_f1"], "metric_for_best_model", json!("eval_macro_f1")),
            (&["--greater-is-better", "false"], "greater_is_better", json!(false)),
            (&["--early-stopping-patience", "8"], "early_stopping_patience", json!(8)),
            (&["--early-stopping-threshold", "0.5"], "early_stopping_threshold", json!(0.5)),
            (&["--logging-steps", "3"], "logging_steps", json!(3)),
            (&["--no-packing"], "packing", json!(false)),
            (&["--max-tokens-per-batch", "96"], "max_tokens_per_batch", json!(96)),
            (&["--train-on", "all"], "train_on", json!(TrainOn::All)),
            (&["--label-smoothing-factor", "0.5"], "label_smoothing_factor", json!(0.5)),
            (&["--neftune-noise-alpha", "5"], "neftune_noise_alpha", json!(5.0)),
            (&["--loraplus-lr-ratio", "16"], "loraplus_lr_ratio", json!(16.0)),
            (&["--seed", "7"], "seed", json!(7)),
        ];
        let of = |words: &[&str]| serde_json::to_value(arguments(&settings(words))).unwrap();
        let default = of(&[]);
        for (words, name, expected) in table {
            assert_eq!(&of(words)[*name], expected, "{words:?}");
            assert_ne!(&default[*name], expected, "{name}: the table should change it");
        }
        // The number of processes is the launcher's.
        for name in default.as_object().unwrap().keys().filter(|name| *name != "world_size") {
            assert!(table.iter().any(|(_, n, _)| n == name), "{name} is not in the table");
        }
    }

    #[test]
    fn the_adapter_s_arguments_arrive() {
        let of = |words: &[&str]| lora_config(&settings(words)).unwrap();
        let default = of(&[]);
        assert_eq!((default.r, default.lora_alpha, default.lora_dropout), (64, 16.0, 0.1));
        for (words, expected) in [
            (&["--lora-r", "8"][..], LoraConfig { r: 8, ..default.clone() }),
            (&["--lora-alpha", "32"], LoraConfig { lora_alpha: 32.0, ..default.clone() }),
            (&["--lora-dropout", "0.25"], LoraConfig { lora_dropout: 0.25, ..default.clone() }),
            (&["--use-rslora"], LoraConfig { use_rslora: true, ..default.clone() }),
            (&["--use-dora"], LoraConfig { use_dora: true, ..default.clone() }),
            (
                &["--layers-to-transform", "1,3"],
                LoraConfig { layers_to_transform: Some(vec![1, 3]), ..default.clone() },
            ),
            (
                &["--target-modules", "q_proj,v_proj"],
                LoraConfig {
                    target_modules: vec!["q_proj".parse().unwrap(), "v_proj".parse().unwrap()],
                    ..default.clone()
                },
            ),
        ] {
            assert_eq!(of(words), expected, "{words:?}");
        }
        let s = settings(&["--class-weights", "1,2.5,0.5"]);
        assert_eq!([0, 1, 2].map(|label| class_weight(&s, label)), [1.0, 2.5, 0.5]);
        assert_eq!(class_weight(&settings(&[]), 1), 1.0);
    }
}
