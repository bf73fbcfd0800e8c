//! The loop on the real model: resume, accumulation, packing, early stopping, interruption.

use std::path::Path;

use cashtag_backend_cpu::{CpuBackend, Precision};
use cashtag_llama::lora::{Lora, LoraConfig, LoraTensors, Module};
use cashtag_llama::model::{Checkpointing, Llama};
use cashtag_llama::packing::TokenizedExample;
use cashtag_llama::prompt::PromptFormat;
use cashtag_train::{EndReason, SaveStrategy, SchedulerType, TrainOutcome, Trainer, TrainingArguments};

use crate::support::{self, Watch};

const TEXTS: [(&str, usize); 12] = [
    ("added to $VRDN on the dip, thesis unchanged", 0),
    ("Kestrel Air raises full-year outlook", 0),
    ("third green week in a row for copper", 0),
    ("margins finally turning, long from here", 0),
    ("Orba Systems to report after the close", 1),
    ("what time is the call?", 1),
    ("Halden Paper names new board member", 1),
    ("watching 120 on $SRPT, no position", 1),
    ("Tellmar cuts guidance for the second time", 2),
    ("stopped out of $NVTX, tape is awful", 2),
    ("demand softens at every retailer I checked", 2),
    ("shares slide after the auditor resigns", 2),
];

fn lora(backend: &CpuBackend, model: &Llama<CpuBackend>) -> Lora<CpuBackend> {
    let config = LoraConfig {
        r: 4,
        lora_alpha: 8.0,
        lora_dropout: 0.1,
        target_modules: vec![Module::QProj, Module::VProj, Module::DownProj],
        layers_to_transform: Some(vec![0, 14, 29]),
        ..Default::default()
    };
    let tensors = LoraTensors::init(&config, model.config(), 3);
    Lora::new(backend, config, model.config(), &tensors, true).unwrap()
}

fn arguments() -> TrainingArguments {
    TrainingArguments {
        num_train_epochs: 3.0,
        per_device_train_batch_size: 2,
        gradient_accumulation_steps: 2,
        learning_rate: 1e-3,
        lr_scheduler_type: SchedulerType::Linear,
        eval_strategy: SaveStrategy::Steps,
        eval_steps: 2,
        save_strategy: SaveStrategy::Steps,
        save_steps: 2,
        logging_steps: 1,
        early_stopping_patience: None,
        load_best_model_at_end: false,
        ..Default::default()
    }
}

struct Setup {
    backend: CpuBackend,
    model: Llama<CpuBackend>,
    format: PromptFormat,
    examples: Vec<TokenizedExample>,
}

impl Setup {
    fn new(precision: Precision) -> Self {
        let (backend, model, checkpoint) = support::load(precision);
        let format = support::format(&checkpoint, "Positive, Neutral or Negative?");
        let examples = TEXTS.iter().map(|(text, label)| format.example(text, *label, 1.0).unwrap()).collect();
        Self { backend, model, format, examples }
    }

    fn trainer(&self, run_dir: &Path, arguments: TrainingArguments) -> Trainer<'_, CpuBackend> {
        Trainer {
            backend: &self.backend,
            model: &self.model,
            lora: lora(&self.backend, &self.model),
            train: self.examples.clone(),
            eval: self.examples[..3].to_vec(),
            prefix: self.format.prefix().to_vec(),
            arguments,
            checkpointing: Checkpointing::None,
            run_dir: run_dir.to_owned(),
            base_model: Some("smollm2-135m".into()),
            classifier: None,
            fingerprint: "test".into(),
            resume: true,
            loss_scale: None,
            group: None,
        }
    }
}

fn run(trainer: &mut Trainer<'_, CpuBackend>, stop_after: Option<usize>) -> (TrainOutcome, Watch) {
    support::run(trainer, Watch { stop_after, ..Default::default() })
}

#[test]
fn an_interrupted_run_goes_on_bit_for_bit() {
    let setup = Setup::new(Precision::best());
    let whole = tempfile::tempdir().unwrap();
    let mut undisturbed = setup.trainer(whole.path(), arguments());
    let (outcome, _) = run(&mut undisturbed, None);
    assert_eq!((outcome.reason, outcome.step), (EndReason::Finished, 9));
    let expected = undisturbed.adapter().unwrap().tensors;

    let parts = tempfile::tempdir().unwrap();
    let mut steps = 0;
    let found = loop {
        let mut trainer = setup.trainer(parts.path(), arguments());
        let (outcome, watch) = run(&mut trainer, Some(2));
        steps += watch.reports.len();
        if outcome.reason == EndReason::Finished {
            assert_eq!(outcome.state.log_history.len(), 9 + 4 + 1);
            break trainer.adapter().unwrap().tensors;
        }
        assert_eq!(outcome.reason, EndReason::Interrupted);
    };
    assert_eq!(steps, 9);
    assert_eq!(found, expected);
}

#[test]
fn a_damaged_newest_checkpoint_falls_back() {
    let setup = Setup::new(Precision::best());
    let dir = tempfile::tempdir().unwrap();
    let mut trainer = setup.trainer(dir.path(), arguments());
    run(&mut trainer, None);
    let expected = trainer.adapter().unwrap().tensors;
    let steps: Vec<usize> = cashtag_train::checkpoint::list(dir.path()).iter().map(|(s, _)| *s).collect();
    assert_eq!(steps, [8, 9], "save_total_limit keeps two");
    let newest = dir.path().join("checkpoint-9").join(cashtag_train::checkpoint::STATE_FILE);
    let bytes = std::fs::read(&newest).unwrap();
    std::fs::write(&newest, &bytes[..bytes.len() / 2]).unwrap();
    let mut again = setup.trainer(dir.path(), arguments());
    let (outcome, watch) = run(&mut again, None);
    assert_eq!((outcome.step, watch.reports.len()), (9, 1));
    assert!(watch.warnings[0].contains("checkpoint-9"), "{:?}", watch.warnings);
    assert_eq!(again.adapter().unwrap().tensors, expected);

    let mut other = setup.trainer(dir.path(), arguments());
    other.fingerprint = "something else".into();
    let error = other.run(&mut Watch::default()).unwrap_err().to_string();
    assert!(error.contains("belongs to a run with other data"), "{error}");
}

/// 1 × 4, 2 × 2 and 4 × 1 examples, packed or not, whatever the token budget: the same gradients up to rounding (without
/// dropout, whose masks belong to the micro-batch).
#[test]
fn accumulation_and_packing_are_invisible() {
    let setup = Setup::new(Precision::F32);
    let mut results = Vec::new();
    for (batch, accumulation, packing, budget) in
        [(4, 1, true, 4096), (1, 4, false, 64), (2, 2, false, 64), (4, 1, true, 60)]
    {
        let dir = tempfile::tempdir().unwrap();
        let mut trainer = setup.trainer(
            dir.path(),
            TrainingArguments {
                per_device_train_batch_size: batch,
                gradient_accumulation_steps: accumulation,
                packing,
                max_tokens_per_batch: budget,
                max_steps: Some(4),
                ..arguments()
            },
        );
        trainer.lora.config.lora_dropout = 0.0;
        let (_, watch) = run(&mut trainer, None);
        results.push((
            watch.reports.iter().map(|r| (r.loss, r.grad_norm)).collect::<Vec<_>>(),
            trainer.adapter().unwrap().tensors,
        ));
    }
    for (reports, tensors) in &results[1..] {
        for ((loss, norm), (l, n)) in results[0].0.iter().zip(reports) {
            assert!((loss - l).abs() < 1e-5 && (norm / n - 1.0).abs() < 1e-4, "{loss} {l} {norm} {n}");
        }
        let far = results[0].1.b.iter().zip(&tensors.b).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
        assert!(far < 2e-4, "{far}");
    }
}

#[test]
fn early_stopping_and_the_best_model() {
    let setup = Setup::new(Precision::best());
    let dir = tempfile::tempdir().unwrap();
    let mut trainer = setup.trainer(
        dir.path(),
        TrainingArguments {
            learning_rate: 0.0,
            eval_steps: 1,
            early_stopping_patience: Some(3),
            load_best_model_at_end: true,
            ..arguments()
        },
    );
    // With a learning rate of 0 nothing ever improves: the first evaluation is the best, three more end the run.
    let (outcome, _) = run(&mut trainer, None);
    assert_eq!((outcome.reason, outcome.state.global_step, outcome.step), (EndReason::EarlyStopped, 4, 1));
}
