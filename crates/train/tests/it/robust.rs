//! What goes wrong: overflow, NaN, damaged checkpoints. And what it costs: the trainer's own time, the memory of an evaluation.

use std::time::{Duration, Instant};

use cashtag_backend::Backend;
use cashtag_backend_cpu::Precision;
use cashtag_llama::packing::TokenizedExample;
use cashtag_train::{Error, OptimizerState, SaveStrategy, TrainingArguments, checkpoint};

use crate::support::{self, Tiny, Watch, quiet};

/// Gradients that a scale multiplies and the optimizer divides again are the same gradients.
#[test]
fn a_loss_scale_is_invisible() {
    let tiny = Tiny::new(Precision::F32);
    let of = |loss_scale| {
        let dir = tempfile::tempdir().unwrap();
        let mut trainer = tiny.trainer(dir.path(), quiet());
        trainer.loss_scale = loss_scale;
        let (_, watch) = support::run(&mut trainer, Watch::default());
        (watch.reports.iter().map(|r| (r.loss, r.grad_norm)).collect::<Vec<_>>(), trainer.adapter().unwrap().tensors)
    };
    // Powers of two change no bit of an f32 that neither overflows nor is denormal.
    assert_eq!(of(None), of(Some(1024.0)));
}

/// Overflow on purpose: the scale is halved until it fits, every skipped step is said, nothing else is lost.
#[test]
fn overflow_is_skipped_and_mended() {
    let tiny = Tiny::new(Precision::F32);
    let dir = tempfile::tempdir().unwrap();
    let a = TrainingArguments { max_steps: Some(60), save_strategy: SaveStrategy::Steps, save_steps: 4, ..quiet() };
    let mut trainer = tiny.trainer(dir.path(), a.clone());
    trainer.loss_scale = Some(2f32.powi(85));
    let (outcome, watch) = support::run(&mut trainer, Watch::default());
    // More than the limit of bad steps in a row: an overflow that a smaller scale mends does not count.
    let skipped = outcome.skipped_steps;
    println!("{skipped} steps skipped until the scale fitted");
    assert!((9..60).contains(&skipped) && watch.warnings.len() == skipped, "{skipped}: {:?}", watch.warnings);
    assert!(watch.warnings[0].starts_with("step 1: gradients overflowed; skipped, the loss scale is now 1934"));
    assert!(watch.reports.last().unwrap().loss < watch.reports[0].loss);
    // Scale and count are part of a checkpoint.
    let expected = OptimizerState::expected(&trainer.lora).unwrap();
    let found = checkpoint::load(&dir.path().join("checkpoint-60"), &expected).unwrap().position;
    assert_eq!(found.loss_scale.scale, 2f32.powi(85 - skipped as i32));
    assert_eq!((found.skipped_steps, found.loss_scale.steps_since_overflow), (skipped, 60 - skipped));
    assert_eq!(found.optimizer_step as usize, 60 - skipped);
}

/// Weights that are not numbers: every step names itself and its examples, changes nothing, and the ninth ends the run.
#[test]
fn poisoned_weights_end_the_run() {
    let tiny = Tiny::new(Precision::F32);
    let dir = tempfile::tempdir().unwrap();
    let a = TrainingArguments { max_steps: Some(30), save_strategy: SaveStrategy::Steps, save_steps: 2, ..quiet() };
    let mut good = tiny.trainer(dir.path(), a.clone());
    support::run(&mut good, Watch { stop_after: Some(3), ..Default::default() });
    let mut trainer = tiny.trainer(dir.path(), a);
    trainer.train[5].weight = f32::NAN;
    let mut watch = Watch::default();
    // Eight of 24 examples make a step: the poisoned one comes once an epoch of three steps, and the others go on.
    let outcome = trainer.run(&mut watch).unwrap();
    assert_eq!((outcome.skipped_steps, watch.warnings.len()), (9, 9), "{:?}", watch.warnings);
    for (warning, epoch) in watch.warnings.iter().zip(1..) {
        assert!(warning.contains("not finite, skipped (examples 5)"), "{epoch}: {warning}");
    }
    assert!(trainer.adapter().unwrap().tensors.b.iter().all(|b| b.is_finite()));

    let dir = tempfile::tempdir().unwrap();
    let a = TrainingArguments { max_steps: Some(30), save_strategy: SaveStrategy::Steps, save_steps: 2, ..quiet() };
    let mut good = tiny.trainer(dir.path(), a.clone());
    support::run(&mut good, Watch { stop_after: Some(2), ..Default::default() });
    let mut trainer = tiny.trainer(dir.path(), a);
    trainer.train.iter_mut().for_each(|e| e.weight = f32::INFINITY);
    let mut watch = Watch::default();
    let error = trainer.run(&mut watch).unwrap_err();
    let Error::NotFinite { step, times, examples, last_good } = &error else { panic!("{error}") };
    assert_eq!((*step, *times, watch.warnings.len()), (11, 9, 8));
    // Eight of the step's examples are named.
    assert_eq!(examples.split(", ").count(), 8, "{examples}");
    let text = error.to_string();
    assert!(text.contains("hint: lower learning_rate") && text.contains("the last good checkpoint is"), "{text}");
    // It is the newest, it can be read, and nothing in it is poisoned.
    let last_good = last_good.as_ref().unwrap();
    assert!(last_good.ends_with("checkpoint-10"), "{}", last_good.display());
    let expected = OptimizerState::expected(&trainer.lora).unwrap();
    assert_eq!(checkpoint::load(last_good, &expected).unwrap().optimizer, {
        OptimizerState::download(&tiny.backend, &good.lora).unwrap()
    });
}

/// Half a directory, an empty one, a file cut off, a bit turned in the header: each time the one before it is taken.
#[test]
fn damaged_checkpoints_are_passed_over() {
    let tiny = Tiny::new(Precision::F32);
    let dir = tempfile::tempdir().unwrap();
    let a = TrainingArguments { save_strategy: SaveStrategy::Steps, save_steps: 1, save_total_limit: None, ..quiet() };
    let mut trainer = tiny.trainer(dir.path(), a.clone());
    support::run(&mut trainer, Watch::default());
    let expected = trainer.adapter().unwrap().tensors;
    let file = |step: usize| dir.path().join(format!("checkpoint-{step}")).join(checkpoint::STATE_FILE);
    std::fs::remove_file(file(6)).unwrap();
    std::fs::write(file(5), b"").unwrap();
    let bytes = std::fs::read(file(4)).unwrap();
    std::fs::write(file(4), &bytes[..bytes.len() - 1]).unwrap();
    let mut turned = std::fs::read(file(3)).unwrap();
    turned[9] ^= 0x80;
    std::fs::write(file(3), turned).unwrap();
    // What a killed process leaves of a checkpoint that it was writing.
    std::fs::create_dir_all(dir.path().join(".checkpoint-7.tmp")).unwrap();
    let mut again = tiny.trainer(dir.path(), a);
    let (outcome, watch) = support::run(&mut again, Watch::default());
    assert_eq!((outcome.step, watch.reports[0].step), (6, 3));
    assert_eq!(watch.warnings.len(), 4, "{:?}", watch.warnings);
    for (warning, step) in watch.warnings.iter().zip([6, 5, 4, 3]) {
        assert!(warning.contains(&format!("checkpoint-{step}")), "{warning}");
        assert!(warning.ends_with("falling back to the checkpoint before it"), "{warning}");
    }
    assert_eq!(again.adapter().unwrap().tensors, expected);
}

/// A best checkpoint that cannot be read costs the best step, not the run.
#[test]
fn a_damaged_best_checkpoint_leaves_the_last_step() {
    let tiny = Tiny::new(Precision::F32);
    let dir = tempfile::tempdir().unwrap();
    let a = TrainingArguments {
        max_steps: Some(3),
        eval_strategy: SaveStrategy::Steps,
        eval_steps: 1,
        load_best_model_at_end: true,
        metric_for_best_model: "macro_f1".into(),
        ..quiet()
    };
    struct Vandal(Watch, std::path::PathBuf);
    impl cashtag_train::Observer<cashtag_backend_cpu::CpuBackend> for Vandal {
        fn evaluate(
            &mut self,
            lora: &cashtag_llama::lora::Lora<cashtag_backend_cpu::CpuBackend>,
        ) -> cashtag_train::Result<cashtag_train::LogEntry> {
            let _ = std::fs::write(self.1.join("checkpoint-1").join(checkpoint::STATE_FILE), b"gone");
            self.0.evaluate(lora)
        }
        fn warn(&mut self, message: &str) {
            self.0.warn(message);
        }
    }
    let mut trainer = tiny.trainer(dir.path(), a);
    let watch = Watch { scores: [0.9, 0.2, 0.1].into(), ..Default::default() };
    let mut vandal = Vandal(watch, dir.path().to_owned());
    let outcome = trainer.run(&mut vandal).unwrap();
    assert_eq!(outcome.step, 3);
    assert!(
        vandal.0.warnings[0].ends_with("the adapter stays at step 3, not the best step 1"),
        "{:?}",
        vandal.0.warnings
    );
}

/// An evaluation allocates for one batch and its label rows, however many examples there are.
#[test]
fn an_evaluation_holds_one_batch_and_label_rows() {
    let tiny = Tiny::new(Precision::F32);
    let peak = |examples: usize, budget: usize| {
        let dir = tempfile::tempdir().unwrap();
        let a = TrainingArguments { max_tokens_per_batch: budget, ..quiet() };
        let mut trainer = tiny.trainer(dir.path(), a);
        trainer.eval = (0..examples).map(|i| tiny.examples[i % 24].clone()).collect();
        let purpose = cashtag_llama::model::Purpose::Inference;
        let before = tiny.backend.memory().0;
        let mut ws = tiny.model.workspace(&tiny.backend, budget.max(32), purpose, Some(&trainer.lora)).unwrap();
        let workspace = tiny.backend.memory().0 - before;
        trainer.eval_loss(&mut ws).unwrap();
        // What stays is the head: logits of label rows.
        tiny.backend.memory().0 - before - workspace
    };
    // Some batches have a label row more than others, no more.
    let (few, many) = (peak(240, 256), peak(2400, 256));
    assert!(many * 4 <= few * 5, "{few} bytes for 240 examples, {many} for 2,400");
    // A long text has as many label rows as a short one.
    let mut long = Tiny::new(Precision::F32);
    let short = long.examples[0].clone();
    long.examples[0] = TokenizedExample {
        tokens: [&short.tokens[..6], &[17; 150], &short.tokens[6..]].concat(),
        answer_start: short.answer_start + 150,
        weight: 1.0,
    };
    let of = |tiny: &Tiny| {
        let dir = tempfile::tempdir().unwrap();
        let mut trainer = tiny.trainer(dir.path(), quiet());
        trainer.eval = vec![tiny.examples[0].clone()];
        let purpose = cashtag_llama::model::Purpose::Inference;
        let mut ws = tiny.model.workspace(&tiny.backend, 256, purpose, Some(&trainer.lora)).unwrap();
        let before = tiny.backend.memory().0;
        trainer.eval_loss(&mut ws).unwrap();
        tiny.backend.memory().0 - before
    };
    let two_rows_of_logits = 2 * 96 * 4;
    let found = of(&long);
    assert_eq!(found, of(&tiny));
    assert!(found < 3 * two_rows_of_logits, "{found} bytes for {two_rows_of_logits} of logits");
}

/// When a step ended and when its checkpoint was there.
#[derive(Default)]
struct Clock {
    stepped: Option<Instant>,
    checkpoints: Vec<Duration>,
}

impl cashtag_train::Observer<cashtag_backend_cpu::CpuBackend> for Clock {
    fn step(&mut self, _: &cashtag_train::StepReport) {
        self.stepped = Some(Instant::now());
    }
    fn saved(&mut self, _: &std::path::Path) {
        self.checkpoints.extend(self.stepped.map(|t| t.elapsed()));
    }
}

/// With 32 examples a step of the real model, a line of the log for each, and a checkpoint each 100 steps as in the recipe, the
/// trainer's own time is below 3 %: packing, logging, and the share of a checkpoint (of all that is trained, and its moments).
#[test]
fn the_trainer_s_own_time() {
    let (backend, model, checkpoint) = support::load(Precision::best());
    let format = support::format(&checkpoint, "Positive, Neutral or Negative?");
    let texts = ["added on the dip", "reports after the close", "cuts guidance again", "margins turn, long from here"];
    let examples: Vec<TokenizedExample> =
        (0..32).map(|i| format.example(&format!("{} {i}", texts[i % 4]), i % 3, 1.0).unwrap()).collect();
    let config = cashtag_llama::lora::LoraConfig { r: 16, ..Default::default() };
    let tensors = cashtag_llama::lora::LoraTensors::init(&config, model.config(), 3);
    let dir = tempfile::tempdir().unwrap();
    let mut trainer = cashtag_train::Trainer {
        backend: &backend,
        model: &model,
        lora: cashtag_llama::lora::Lora::new(&backend, config, model.config(), &tensors, true).unwrap(),
        train: examples.clone(),
        eval: examples[..4].to_vec(),
        prefix: format.prefix().to_vec(),
        arguments: TrainingArguments {
            max_steps: Some(2),
            per_device_train_batch_size: 32,
            gradient_accumulation_steps: 1,
            logging_steps: 1,
            save_strategy: SaveStrategy::Steps,
            save_steps: 2,
            ..quiet()
        },
        checkpointing: cashtag_llama::model::Checkpointing::None,
        run_dir: dir.path().to_owned(),
        base_model: None,
        classifier: None,
        fingerprint: String::new(),
        resume: false,
        loss_scale: None,
        group: None,
    };
    let mut clock = Clock::default();
    let outcome = trainer.run(&mut clock).unwrap();
    let [checkpoint] = clock.checkpoints[..] else { panic!("{:?}", clock.checkpoints) };
    let checkpoint = checkpoint.as_secs_f64();
    let (own, step) = ((outcome.own_seconds - checkpoint) / 2.0, (outcome.seconds - checkpoint) / 2.0);
    let share = (own + checkpoint / 100.0) / (step + checkpoint / 100.0);
    println!(
        "of a step of {step:.2} s {:.1} ms are the trainer's own, a checkpoint takes {checkpoint:.2} s: {:.2} %",
        own * 1e3,
        share * 100.0
    );
    assert!(own > 0.0 && share < 0.03, "{share}");
}
