//! Each argument does what its name says in Transformers, PEFT and TRL: a test each that fails if it did nothing.

use std::path::Path;
use std::sync::Arc;

use cashtag_backend::Backend;
use cashtag_backend_cpu::{CpuBackend, Precision};
use cashtag_llama::checkpoint::Checkpoint;
use cashtag_llama::lora::{Lora, LoraConfig, LoraTensors, Module};
use cashtag_llama::model::{Checkpointing, Purpose, TrainPass};
use cashtag_llama::packing::{TokenizedExample, TrainOn, pack};
use cashtag_llama::prompt::{Label, PromptFormat, TooLong};
use cashtag_train::schedule::learning_rate;
use cashtag_train::{
    EndReason, Optimizer, OptimizerState, SaveStrategy, SchedulerType, TrainOutcome, TrainingArguments, Values,
};

use crate::support::{self, PREFIX, Tiny, Watch, quiet};

/// A run of a new adapter in a directory of its own: outcome, what was seen, the factors.
fn run(
    tiny: &Tiny,
    arguments: TrainingArguments,
    config: LoraConfig,
    watch: Watch,
) -> (TrainOutcome, Watch, LoraTensors) {
    let dir = tempfile::tempdir().unwrap();
    let mut trainer = tiny.trainer_with(dir.path(), arguments, config);
    let (outcome, watch) = support::run(&mut trainer, watch);
    let tensors = trainer.lora.tensors(&tiny.backend).unwrap();
    (outcome, watch, tensors)
}

fn factors(tiny: &Tiny, arguments: TrainingArguments) -> LoraTensors {
    run(tiny, arguments, Tiny::lora_config(), Watch::default()).2
}

fn norm(values: &[f32]) -> f64 {
    values.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt()
}

fn steps_of(watch: &Watch, key: &str) -> Vec<usize> {
    watch.logs.iter().filter(|e| e.contains_key(key)).map(|e| e["step"] as usize).collect()
}

#[test]
fn epochs_steps_and_warm_up() {
    let a = quiet();
    // As Transformers: ceil(examples / (batch · accumulation)) steps an epoch, ceil(epochs · that) in all.
    for (examples, epochs, max_steps, total) in
        [(24, 2.0, None, 6), (25, 2.0, None, 8), (24, 1.5, None, 5), (24, 0.1, None, 1), (24, 9.0, Some(4), 4)]
    {
        let a = TrainingArguments { num_train_epochs: epochs, max_steps, ..a.clone() };
        assert_eq!(a.total_steps(examples), total, "{examples} examples, {epochs} epochs, {max_steps:?}");
    }
    let warmup =
        |warmup_ratio, warmup_steps, total| TrainingArguments { warmup_ratio, warmup_steps, ..a.clone() }.warmup(total);
    // As Transformers: ceil(ratio · steps), and steps stand in for the ratio.
    assert_eq!((warmup(0.03, 0, 100), warmup(0.031, 0, 100), warmup(0.5, 7, 100), warmup(0.0, 0, 9)), (3, 4, 7, 0));

    let tiny = Tiny::new(Precision::F32);
    let a = TrainingArguments { max_steps: Some(7), warmup_steps: 2, lr_scheduler_type: SchedulerType::Linear, ..a };
    let (outcome, watch, _) = run(&tiny, a.clone(), Tiny::lora_config(), Watch::default());
    assert_eq!((outcome.state.global_step, outcome.state.max_steps), (7, 7));
    assert!((outcome.state.epoch - 7.0 / 3.0).abs() < 1e-12);
    let rates: Vec<f64> = watch.reports.iter().map(|r| r.learning_rate).collect();
    assert_eq!(rates, (0..7).map(|s| learning_rate(&a, s, 7)).collect::<Vec<_>>());
    assert!(rates[0] == 0.0 && rates[2] == a.learning_rate);
}

/// `schedules.json` has what Transformers' own schedulers give, step by step (`make_schedule_goldens.py`).
#[test]
fn learning_rates_are_those_of_transformers() {
    let cases: Vec<serde_json::Value> = serde_json::from_str(include_str!("schedules.json")).unwrap();
    assert_eq!(cases.len(), 4 * 8);
    for case in cases {
        let number = |key: &str| case[key].as_u64().unwrap() as usize;
        let total = number("total");
        let a = TrainingArguments {
            lr_scheduler_type: serde_json::from_value(case["type"].clone()).unwrap(),
            learning_rate: 3e-4,
            warmup_ratio: case["warmup_ratio"].as_f64().unwrap(),
            warmup_steps: number("warmup_steps"),
            ..quiet()
        };
        assert_eq!(a.warmup(total), number("warmup"), "{case}");
        for (step, expected) in case["rates"].as_array().unwrap().iter().enumerate() {
            let (found, expected) = (learning_rate(&a, step, total), expected.as_f64().unwrap());
            assert!((found - expected).abs() < 1e-12, "step {step}: {found} for {expected} in {case}");
        }
    }
}

/// Moments after one step: m = (1-β₁)·g and Σv = (1-β₂)·|g|², with the gradient clipped before.
#[test]
fn clipping_betas_epsilon_and_weight_decay() {
    let tiny = Tiny::new(Precision::F32);
    let first = TrainingArguments { max_steps: Some(1), warmup_ratio: 0.0, ..quiet() };
    let moments = |arguments: TrainingArguments| {
        let dir = tempfile::tempdir().unwrap();
        let mut trainer = tiny.trainer(dir.path(), arguments);
        let (_, watch) = support::run(&mut trainer, Watch::default());
        let state = OptimizerState::download(&tiny.backend, &trainer.lora).unwrap();
        let all = |part: &str| -> Vec<f32> {
            let values = ["a", "b"].map(|g| match state.get(&format!("{g}.{part}")) {
                Some(Values::F32(v)) => v.clone(),
                other => panic!("{other:?}"),
            });
            values.concat()
        };
        (watch.reports[0].grad_norm, norm(&all("m")), all("v").iter().map(|v| f64::from(*v)).sum::<f64>())
    };
    let close = |a: f64, b: f64| assert!((a / b - 1.0).abs() < 1e-4, "{a} for {b}");
    for (beta1, beta2, most) in [(0.9, 0.999, 1e9), (0.5, 0.9, 1e9), (0.9, 0.999, 1e-2), (0.9, 0.999, 0.0)] {
        let arguments =
            TrainingArguments { adam_beta1: beta1, adam_beta2: beta2, max_grad_norm: most, ..first.clone() };
        let (found, m, v) = moments(arguments);
        assert!(found > 2e-2, "the test wants a norm above the limit, found {found}");
        let clipped = if most > 0.0 { found.min(most) } else { found };
        close(m, (1.0 - beta1) * clipped);
        close(v, (1.0 - beta2) * clipped * clipped);
    }
    // In the first step every element moves by lr·g/(|g| + ε): by the learning rate, or next to nothing for a large ε.
    let start = LoraTensors::init(&Tiny::lora_config(), tiny.model.config(), 3);
    let plain = TrainingArguments { weight_decay: 0.0, ..first };
    let moved = |t: &LoraTensors| t.b.iter().fold(0f32, |most, b| most.max(b.abs()));
    let (usual, large) =
        (factors(&tiny, plain.clone()), factors(&tiny, TrainingArguments { adam_epsilon: 1e3, ..plain.clone() }));
    assert!((moved(&usual) / 5e-3 - 1.0).abs() < 1e-3, "{}", moved(&usual));
    assert!(moved(&large) < 1e-6, "{}", moved(&large));
    // A has no gradient in the first step (B is 0): all that moves it is the decay.
    assert_eq!(usual.a, start.a);
    let decayed = factors(&tiny, TrainingArguments { weight_decay: 0.1, ..plain });
    for (found, was) in decayed.a.iter().zip(&start.a) {
        assert!((found - was * (1.0 - 5e-3 * 0.1)).abs() <= was.abs() * 1e-6, "{found} {was}");
    }
}

#[test]
fn when_to_evaluate_to_save_and_to_log() {
    let tiny = Tiny::new(Precision::F32);
    let a = TrainingArguments { eval_steps: 4, save_steps: 2, save_total_limit: None, logging_steps: 4, ..quiet() };
    let a = TrainingArguments { max_steps: Some(10), ..a };
    let seen = |eval_strategy, save_strategy| {
        let a = TrainingArguments { eval_strategy, save_strategy, ..a.clone() };
        let (_, watch, _) = run(&tiny, a, Tiny::lora_config(), Watch::default());
        (steps_of(&watch, "eval_loss"), watch.saved.clone(), steps_of(&watch, "loss"))
    };
    let saved = |steps: &[usize]| steps.iter().map(|s| format!("checkpoint-{s}")).collect::<Vec<_>>();
    use SaveStrategy::{Epoch, No, Steps};
    // Three steps are an epoch; whoever saves at all saves the end.
    assert_eq!(seen(No, No), (vec![], vec![], vec![4, 8, 10]));
    assert_eq!(seen(Steps, Epoch), (vec![4, 8], saved(&[3, 6, 9, 10]), vec![4, 8, 10]));
    assert_eq!(seen(Epoch, Steps), (vec![3, 6, 9, 10], saved(&[2, 4, 6, 8, 10]), vec![4, 8, 10]));

    // A logged loss is the mean of the steps since the line before.
    let (_, watch, _) = run(&tiny, a, Tiny::lora_config(), Watch::default());
    let losses: Vec<f64> = watch.reports.iter().map(|r| r.loss).collect();
    let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len() as f64;
    let logged: Vec<f64> = watch.logs.iter().filter_map(|e| e.get("loss").copied()).collect();
    assert_eq!(logged, [mean(&losses[..4]), mean(&losses[4..8]), mean(&losses[8..])]);
    assert!((watch.logs.last().unwrap()["train_loss"] - mean(&losses)).abs() < 1e-12);
}

#[test]
fn the_newest_checkpoints_and_the_best_are_kept() {
    let tiny = Tiny::new(Precision::F32);
    let dir = tempfile::tempdir().unwrap();
    let a = TrainingArguments {
        max_steps: Some(6),
        eval_strategy: SaveStrategy::Steps,
        eval_steps: 1,
        save_strategy: SaveStrategy::Steps,
        save_steps: 1,
        save_total_limit: Some(2),
        load_best_model_at_end: true,
        metric_for_best_model: "macro_f1".into(),
        ..quiet()
    };
    let mut trainer = tiny.trainer(dir.path(), a);
    let watch = Watch { scores: [0.1, 0.5, 0.3, 0.4, 0.2, 0.3].into(), ..Default::default() };
    let (outcome, _) = support::run(&mut trainer, watch);
    let kept: Vec<usize> = cashtag_train::checkpoint::list(dir.path()).iter().map(|(s, _)| *s).collect();
    assert_eq!(kept, [2, 6]);
    // More of an F1 is better; the adapter that comes out is that of the best step.
    assert_eq!((outcome.step, outcome.state.best_metric), (2, Some(0.5)));
    let expected = OptimizerState::expected(&trainer.lora).unwrap();
    let best = cashtag_train::checkpoint::load(&dir.path().join("checkpoint-2"), &expected).unwrap();
    assert_eq!(OptimizerState::download(&tiny.backend, &trainer.lora).unwrap(), best.optimizer);
    assert_eq!(best.position.state.global_step, 2);
}

#[test]
fn the_best_by_loss_by_score_and_turned_round() {
    let tiny = Tiny::new(Precision::F32);
    let base = TrainingArguments {
        max_steps: Some(4),
        eval_strategy: SaveStrategy::Steps,
        eval_steps: 1,
        load_best_model_at_end: true,
        metric_for_best_model: "eval_macro_f1".into(),
        ..quiet()
    };
    let scores = || Watch { scores: [0.4, 0.2, 0.9, 0.3].into(), ..Default::default() };
    let best = |a: TrainingArguments| run(&tiny, a, Tiny::lora_config(), scores()).0.step;
    assert_eq!(best(base.clone()), 3);
    assert_eq!(best(TrainingArguments { greater_is_better: Some(false), ..base.clone() }), 2);
    // Training goes well, so by the loss the last step is the best.
    assert_eq!(best(TrainingArguments { metric_for_best_model: "loss".into(), ..base.clone() }), 4);
    assert_eq!(best(TrainingArguments { load_best_model_at_end: false, ..base.clone() }), 4);
    let dir = tempfile::tempdir().unwrap();
    let a = TrainingArguments { metric_for_best_model: "f2".into(), ..base };
    let error = tiny.trainer(dir.path(), a).run(&mut scores()).unwrap_err().to_string();
    assert!(error.contains("\"eval_f2\"") && error.contains("eval_macro_f1") && error.contains("hint"), "{error}");
}

#[test]
fn early_stopping_has_patience_and_a_threshold() {
    let tiny = Tiny::new(Precision::F32);
    let run = |early_stopping_patience, early_stopping_threshold, scores: &[f64]| {
        let a = TrainingArguments {
            max_steps: Some(6),
            eval_strategy: SaveStrategy::Steps,
            eval_steps: 1,
            metric_for_best_model: "macro_f1".into(),
            early_stopping_patience,
            early_stopping_threshold,
            ..quiet()
        };
        let watch = Watch { scores: scores.iter().copied().collect(), ..Default::default() };
        let (outcome, ..) = run(&tiny, a, Tiny::lora_config(), watch);
        (outcome.reason, outcome.state.global_step)
    };
    let rising = [0.50, 0.51, 0.52, 0.53, 0.54, 0.55];
    assert_eq!(run(Some(2), 0.0, &rising), (EndReason::Finished, 6));
    // Gains of 0.01 are none with a threshold of 0.05, however they add up: each is measured against the best so far.
    assert_eq!(run(Some(2), 0.05, &rising), (EndReason::EarlyStopped, 3));
    assert_eq!(run(None, 0.05, &rising), (EndReason::Finished, 6));
    // A gain sets the count back.
    assert_eq!(run(Some(2), 0.0, &[0.5, 0.4, 0.6, 0.5, 0.5, 0.9]), (EndReason::EarlyStopped, 5));
    assert_eq!(run(Some(3), 0.0, &[0.5, 0.4, 0.6, 0.5, 0.5, 0.9]), (EndReason::Finished, 6));
}

#[test]
fn a_seed_is_a_run() {
    let tiny = Tiny::new(Precision::best());
    let a = quiet();
    let first = factors(&tiny, a.clone());
    assert_eq!(first, factors(&tiny, a.clone()), "the same seed, the same bits");
    assert_ne!(first, factors(&tiny, TrainingArguments { seed: 43, ..a }));
}

/// Any way to cut 32 examples a step is the same step; likewise any evaluation batch.
#[test]
fn batches_accumulation_and_packing_are_invisible() {
    let tiny = Tiny::new(Precision::F32);
    let mut results = Vec::new();
    for (batch, accumulation, packing, budget) in [
        (32, 1, false, 8),
        (1, 32, false, 8),
        (8, 4, false, 8),
        (4, 8, true, 4096),
        (4, 8, true, 70),
        (32, 1, true, 24),
        (2, 16, true, 8),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let a = TrainingArguments {
            per_device_train_batch_size: batch,
            gradient_accumulation_steps: accumulation,
            per_device_eval_batch_size: 1 + batch % 5,
            packing,
            max_tokens_per_batch: budget,
            max_steps: Some(3),
            learning_rate: 1e-3,
            eval_strategy: SaveStrategy::Steps,
            eval_steps: 1,
            ..quiet()
        };
        // Dropout's masks belong to the micro-batch.
        let config = LoraConfig { lora_dropout: 0.0, ..Tiny::lora_config() };
        let mut trainer = tiny.trainer_with(dir.path(), a, config);
        trainer.train = (0..40).map(|i| tiny.examples[i % 24].clone()).collect();
        let (_, watch) = support::run(&mut trainer, Watch::default());
        let losses: Vec<f64> = watch.reports.iter().flat_map(|r| [r.loss, r.grad_norm]).collect();
        let evaluated: Vec<f64> = watch.logs.iter().filter_map(|e| e.get("eval_loss").copied()).collect();
        assert_eq!(evaluated.len(), 3);
        results.push((losses, evaluated, trainer.lora.tensors(&tiny.backend).unwrap()));
    }
    for (losses, evaluated, tensors) in &results[1..] {
        for (a, b) in results[0].0.iter().chain(&results[0].1).zip(losses.iter().chain(evaluated)) {
            assert!((a / b - 1.0).abs() < 1e-5, "{a} for {b}");
        }
        let far = results[0].2.b.iter().zip(&tensors.b).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
        assert!(far < 2e-4, "{far}");
    }
}

/// How examples are cut is invisible in the result, so it is looked at: the batch sizes without packing, the budget with it.
#[test]
fn batches_hold_what_they_should() {
    let tiny = Tiny::new(Precision::F32);
    let cut = |batch, packing, budget| {
        let dir = tempfile::tempdir().unwrap();
        let a = TrainingArguments {
            per_device_train_batch_size: batch,
            gradient_accumulation_steps: 12 / batch,
            packing,
            max_tokens_per_batch: budget,
            ..quiet()
        };
        let trainer = tiny.trainer(dir.path(), a);
        let refs: Vec<&TokenizedExample> = tiny.examples[..12].iter().collect();
        let ranges = trainer.micro_batches(&refs);
        let rows: Vec<usize> = ranges.iter().map(|r| pack(&refs[r.clone()], &PREFIX, TrainOn::Answer).rows()).collect();
        (ranges.iter().map(|r| r.len()).collect::<Vec<_>>(), rows)
    };
    assert_eq!(cut(4, false, 8).0, [4, 4, 4]);
    assert_eq!(cut(3, false, 4096).0, [3, 3, 3, 3]);
    assert_eq!(cut(4, true, 4096).0, [12]);
    let (examples, rows) = cut(4, true, 30);
    assert!(examples.len() > 3 && rows.iter().all(|r| *r <= 30) && rows.iter().any(|r| *r > 20), "{rows:?}");

    // Batches of an evaluation: what it says of its speed.
    let evaluated = |per_device_eval_batch_size, packing| {
        let a = TrainingArguments {
            max_steps: Some(1),
            eval_strategy: SaveStrategy::Steps,
            eval_steps: 1,
            per_device_eval_batch_size,
            packing,
            ..quiet()
        };
        let (_, watch, _) = run(&tiny, a, Tiny::lora_config(), Watch::default());
        let entry = watch.logs.iter().find(|e| e.contains_key("eval_loss")).unwrap();
        (entry["eval_steps_per_second"] * entry["eval_runtime"]).round() as usize
    };
    assert_eq!((evaluated(1, false), evaluated(2, false), evaluated(4, false), evaluated(1, true)), (6, 3, 2, 1));
}

/// The bits are the same (above), the memory is not: a block keeps its input and nothing else.
#[test]
fn recomputed_blocks_take_less_memory() {
    let tiny = Tiny::new(Precision::F32);
    let lora = tiny.lora(Tiny::lora_config());
    let bytes = |checkpointing| {
        let before = tiny.backend.memory().0;
        let ws = tiny.model.workspace(&tiny.backend, 512, Purpose::Training(checkpointing), Some(&lora)).unwrap();
        let held = tiny.backend.memory().0 - before;
        drop(ws);
        held
    };
    let (all, block) = (bytes(Checkpointing::None), bytes(Checkpointing::Block));
    println!("{all} bytes, {block} with recomputed blocks");
    assert!(block * 20 < all * 19, "{block} of {all}");
}

/// `max_seq_length` by choice: the end of the text is cut off, or it is an error. Markup and answer stay whole.
#[test]
fn long_texts_lose_their_end_and_never_their_answer() {
    let checkpoint = Checkpoint::open(&support::model_path()).unwrap();
    let format = |max_seq_length, too_long| {
        let labels = ["Positive", "Neutral", "Negative"].map(Label::new).to_vec();
        let (tokenizer, template) = (Arc::new(checkpoint.tokenizer().unwrap()), checkpoint.chat_template().unwrap());
        PromptFormat::new(tokenizer, template, Some("Mood?".into()), labels, max_seq_length, too_long).unwrap()
    };
    let long = "margins finally turning, long from here. ".repeat(60);
    for most in [48, 200] {
        let (cutting, strict) = (format(most, TooLong::Truncate), format(most, TooLong::Error));
        for label in 0..3 {
            let short = cutting.example("margins finally", label, 1.0).unwrap();
            assert_eq!(strict.example("margins finally", label, 1.0).unwrap(), short);
            let cut = cutting.example(&long, label, 1.0).unwrap();
            assert!(cut.tokens.len() <= most && cut.tokens.len() + 6 > most, "{} of {most}", cut.tokens.len());
            assert_eq!(cut.tokens[cut.answer_start..], short.tokens[short.answer_start..]);
            // The end of the user's turn and the beginning of the answer's.
            assert_eq!(
                cut.tokens[cut.answer_start - 4..cut.answer_start],
                short.tokens[short.answer_start - 4..short.answer_start]
            );
            let error = strict.example(&long, label, 1.0).unwrap_err().to_string();
            assert!(error.contains("hint: raise max_seq_length, or truncate"), "{error}");
        }
    }
}

/// Loss and flat gradient of one batch.
fn gradient(
    tiny: &Tiny,
    lora: &mut Lora<CpuBackend>,
    examples: &[TokenizedExample],
    pass: TrainPass,
    checkpointing: Checkpointing,
) -> (f64, Vec<f32>) {
    let refs: Vec<&TokenizedExample> = examples.iter().collect();
    let batch = pack(&refs, &PREFIX, TrainOn::Answer);
    tiny.model.prepare(&tiny.backend, lora).unwrap();
    let purpose = Purpose::Training(checkpointing);
    let mut ws = tiny.model.workspace(&tiny.backend, 512, purpose, Some(&*lora)).unwrap();
    lora.zero_grad(&tiny.backend).unwrap();
    let loss = tiny.model.forward_backward(&tiny.backend, &batch, lora, pass, &mut ws).unwrap().sum();
    let mut all = Vec::new();
    for (_, group) in lora.groups() {
        let mut values = vec![0f32; group.len];
        tiny.backend.download(&group.training.as_ref().unwrap().gradient, 0, &mut values).unwrap();
        all.extend(values);
    }
    (loss, all)
}

const PLAIN: TrainPass = TrainPass { random: None, label_smoothing: 0.0, loss_scale: 1.0, neftune_alpha: 0.0 };

/// An adapter whose B is not zero.
fn lively(tiny: &Tiny, config: LoraConfig) -> Lora<CpuBackend> {
    let mut lora = tiny.lora(config);
    tiny.model.prepare(&tiny.backend, &mut lora).unwrap();
    let b = support::uniform(lora.b.len, 9, 0.05);
    lora.groups_mut().for_each(|(name, g)| {
        if name == "b" {
            g.upload(&tiny.backend, &b).unwrap();
        }
    });
    lora
}

#[test]
fn recomputed_blocks_give_the_same_bits() {
    for use_dora in [false, true] {
        let tiny = Tiny::new(Precision::best());
        let mut lora = lively(&tiny, LoraConfig { use_dora, ..Tiny::lora_config() });
        let pass = TrainPass { random: Some((7, 3)), neftune_alpha: 5.0, ..PLAIN };
        let kept = gradient(&tiny, &mut lora, &tiny.examples, pass, Checkpointing::None);
        let recomputed = gradient(&tiny, &mut lora, &tiny.examples, pass, Checkpointing::Block);
        assert_eq!(kept, recomputed);
        assert!(kept.1.iter().any(|g| *g != 0.0));
    }
}

/// Factors on the upper blocks alone: the backward ends at the first of them, and their gradients are those that they get beside factors
/// below which do nothing.
#[test]
fn a_backward_ends_at_the_first_block_with_factors() {
    for (precision, use_dora) in [(Precision::F32, false), (Precision::F32, true), (Precision::best(), false)] {
        let tiny = Tiny::new(precision);
        let layers = tiny.model.config().num_hidden_layers;
        for first in 1..layers {
            let config = LoraConfig { use_dora, ..Tiny::lora_config() };
            let mut all = lively(&tiny, config.clone());
            let upper = LoraConfig { layers_to_transform: Some((first..layers).collect()), ..config };
            let mut upper = lively(&tiny, upper);
            assert_eq!((all.first_layer(), upper.first_layer()), (Some(0), Some(first)));
            // The same factors above; below, B is zero.
            tiny.model.prepare(&tiny.backend, &mut upper).unwrap();
            for ((name, all), (_, upper)) in all.groups_mut().zip(upper.groups_mut()) {
                let mut values: Vec<f32> = all.download(&tiny.backend).unwrap();
                let below = all.len - upper.len;
                if name == "b" {
                    values[..below].fill(0.0);
                    all.upload(&tiny.backend, &values).unwrap();
                }
                upper.upload(&tiny.backend, &values[below..]).unwrap();
            }
            for checkpointing in [Checkpointing::None, Checkpointing::Block] {
                let pass = TrainPass { random: Some((7, 3)), ..PLAIN };
                let (loss, expected) = gradient(&tiny, &mut all, &tiny.examples, pass, checkpointing);
                let (found_loss, found) = gradient(&tiny, &mut upper, &tiny.examples, pass, checkpointing);
                assert_eq!(found_loss, loss);
                let mut above: Vec<f32> = Vec::new();
                let mut at = 0;
                for ((_, all), (_, upper)) in all.groups().zip(upper.groups()) {
                    above.extend(&expected[at + all.len - upper.len..at + all.len]);
                    at += all.len;
                }
                assert_eq!(found, above, "{precision:?} from block {first}");
                assert!(found.iter().any(|g| *g != 0.0));
            }
        }
    }
}

/// A weight multiplies an example's loss and gradient; 0 takes it out.
#[test]
fn class_weights_weigh() {
    let tiny = Tiny::new(Precision::F32);
    let mut lora = lively(&tiny, LoraConfig { lora_dropout: 0.0, ..Tiny::lora_config() });
    let mut examples = tiny.examples[..9].to_vec();
    let mut of = |examples: &[TokenizedExample]| gradient(&tiny, &mut lora, examples, PLAIN, Checkpointing::None);
    let parts: Vec<_> = (0..3).map(|class| of(&[0, 3, 6].map(|i| examples[i + class].clone()))).collect();
    for (i, e) in examples.iter_mut().enumerate() {
        e.weight = [2.0, 0.5, 0.0][i % 3];
    }
    let (loss, gradient) = of(&examples);
    assert!((loss - (2.0 * parts[0].0 + 0.5 * parts[1].0)).abs() < 1e-4 * loss, "{loss}");
    for (i, g) in gradient.iter().enumerate() {
        let expected = 2.0 * parts[0].1[i] + 0.5 * parts[1].1[i];
        assert!((g - expected).abs() < 1e-5 + 1e-4 * expected.abs(), "{g} for {expected}");
    }
}

/// (1-ε)·(-log p[target]) + ε·mean(-log p), against the plain loss and that of a model which says everything alike.
#[test]
fn label_smoothing_is_in_the_training_loss_only() {
    let tiny = Tiny::new(Precision::F32);
    let a = TrainingArguments { eval_strategy: SaveStrategy::Steps, eval_steps: 1, max_steps: Some(2), ..quiet() };
    let config = || LoraConfig { lora_dropout: 0.0, ..Tiny::lora_config() };
    let (_, plain, plain_factors) = run(&tiny, a.clone(), config(), Watch::default());
    let smoothed = TrainingArguments { label_smoothing_factor: 0.3, ..a };
    let (_, smoothed, smoothed_factors) = run(&tiny, smoothed, config(), Watch::default());
    // Random weights give nearly the same probability to all 96 words, so the first loss is ln 96 with it and without.
    assert!((plain.reports[0].loss - 96f64.ln()).abs() < 0.1, "{}", plain.reports[0].loss);
    assert_ne!(plain.reports[0].loss, smoothed.reports[0].loss);
    assert!((plain.reports[0].loss - smoothed.reports[0].loss).abs() < 0.1);
    // Its gradient is smaller by about ε, because the target is nearer to what the model says.
    let ratio = smoothed.reports[0].grad_norm / plain.reports[0].grad_norm;
    assert!((ratio - 0.7).abs() < 0.05, "{ratio}");
    assert_ne!(plain_factors, smoothed_factors);
}

#[test]
fn neftune_is_noise_while_training() {
    let tiny = Tiny::new(Precision::F32);
    let mut lora = lively(&tiny, LoraConfig { lora_dropout: 0.0, ..Tiny::lora_config() });
    let mut of = |random, neftune_alpha| {
        let pass = TrainPass { random, neftune_alpha, ..PLAIN };
        gradient(&tiny, &mut lora, &tiny.examples[..6], pass, Checkpointing::None)
    };
    let quiet = of(Some((1, 0)), 0.0);
    let noisy = of(Some((1, 0)), 5.0);
    assert_eq!(noisy, of(Some((1, 0)), 5.0), "drawn from seed and micro-batch");
    assert_ne!(noisy, of(Some((1, 1)), 5.0));
    assert_ne!(noisy, of(Some((2, 0)), 5.0));
    assert_ne!(noisy, quiet);
    assert_eq!(quiet, of(None, 5.0), "no noise where nothing is random");
    let far = |a: &(f64, Vec<f32>)| norm(&a.1.iter().zip(&quiet.1).map(|(a, b)| a - b).collect::<Vec<_>>());
    // Small against the embeddings, so that the effect grows with it.
    let (small, tenth) = (far(&of(Some((1, 0)), 0.1)), far(&of(Some((1, 0)), 0.01)));
    assert!(tenth < 0.2 * small && small < far(&noisy), "{tenth} {small}");
    // An evaluation has no noise: a run whose learning rate is 0 evaluates as the model is.
    let a = TrainingArguments {
        learning_rate: 0.0,
        eval_strategy: SaveStrategy::Steps,
        eval_steps: 1,
        max_steps: Some(2),
        ..crate::support::quiet()
    };
    let evaluated = |neftune_noise_alpha| {
        let a = TrainingArguments { neftune_noise_alpha, ..a.clone() };
        let (_, watch, _) = run(&tiny, a, Tiny::lora_config(), Watch::default());
        let losses: Vec<f64> = watch.logs.iter().filter_map(|e| e.get("eval_loss").copied()).collect();
        (losses, watch.reports[0].loss)
    };
    let (without, with) = (evaluated(0.0), evaluated(5.0));
    assert_eq!(without.0, with.0);
    assert_ne!(without.1, with.1);
}

#[test]
fn dropout_drops_while_training() {
    let tiny = Tiny::new(Precision::F32);
    let of = |lora_dropout, random| {
        let mut lora = lively(&tiny, LoraConfig { lora_dropout, ..Tiny::lora_config() });
        gradient(&tiny, &mut lora, &tiny.examples[..6], TrainPass { random, ..PLAIN }, Checkpointing::None)
    };
    let none = of(0.0, Some((1, 0)));
    assert_eq!(none, of(0.5, None));
    assert_ne!(none, of(0.5, Some((1, 0))));
    assert_ne!(of(0.5, Some((1, 1))), of(0.5, Some((1, 0))));
}

#[test]
fn layers_and_modules_that_are_not_named_are_left_alone() {
    let tiny = Tiny::new(Precision::F32);
    let config = LoraConfig {
        layers_to_transform: Some(vec![1]),
        target_modules: vec![Module::QProj, Module::DownProj],
        ..Tiny::lora_config()
    };
    let dir = tempfile::tempdir().unwrap();
    let a = TrainingArguments { save_strategy: SaveStrategy::Epoch, ..quiet() };
    let mut trainer = tiny.trainer_with(dir.path(), a, config);
    support::run(&mut trainer, Watch::default());
    let tensors = trainer.lora.tensors(&tiny.backend).unwrap();
    // r·(in + out) of q (64 → 64) and down (96 → 64), of one layer.
    assert_eq!((tensors.a.len(), tensors.b.len()), (4 * (64 + 96), 4 * (64 + 64)));
    assert!(tensors.b.iter().all(|b| *b != 0.0));
    assert_eq!(
        names(&dir.path().join("checkpoint-6")),
        [
            "base_model.model.model.layers.1.mlp.down_proj.lora_A.weight",
            "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight",
            "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight",
            "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight",
        ]
    );
}

/// Names of an adapter's tensors, sorted.
pub(crate) fn names(adapter: &Path) -> Vec<String> {
    let bytes = std::fs::read(adapter.join("adapter_model.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let mut names: Vec<String> = file.names().into_iter().map(str::to_string).collect();
    names.sort();
    names
}

#[test]
fn rank_stabilised_lora_scales_by_the_root() {
    let tiny = Tiny::new(Precision::F32);
    let config = |lora_alpha, use_rslora| LoraConfig { r: 4, lora_alpha, use_rslora, ..Tiny::lora_config() };
    let of = |config| run(&tiny, quiet(), config, Watch::default()).2;
    // alpha/√4 of alpha 8 is alpha/4 of alpha 16.
    assert_eq!(of(config(8.0, true)), of(config(16.0, false)));
    assert_ne!(of(config(8.0, true)), of(config(8.0, false)));
}

#[test]
fn lora_plus_makes_b_faster() {
    let tiny = Tiny::new(Precision::F32);
    let a = TrainingArguments { max_steps: Some(1), warmup_ratio: 0.0, weight_decay: 0.01, ..quiet() };
    let plain = factors(&tiny, a.clone());
    let plus = factors(&tiny, TrainingArguments { loraplus_lr_ratio: 16.0, ..a });
    assert_eq!(plain.a, plus.a);
    assert!(plain.b.iter().any(|b| *b != 0.0));
    for (plus, plain) in plus.b.iter().zip(&plain.b) {
        assert!((plus - 16.0 * plain).abs() <= 1e-5 * plus.abs(), "{plus} for 16 · {plain}");
    }
}

#[test]
fn eight_bit_moments_train_like_wide_ones() {
    let tiny = Tiny::new(Precision::F32);
    let dir = tempfile::tempdir().unwrap();
    // Of 4,096 elements and more, as all factors but the B of k and v: they have codes.
    let config = || LoraConfig { r: 64, lora_dropout: 0.0, ..Tiny::lora_config() };
    let a = TrainingArguments { num_train_epochs: 8.0, ..quiet() };
    let (_, wide, wide_factors) = run(&tiny, a.clone(), config(), Watch::default());
    let a = TrainingArguments { optim: Optimizer::AdamW8bit, ..a };
    let mut trainer = tiny.trainer_with(dir.path(), a, config());
    let before = tiny.backend.memory().0;
    let (_, narrow) = support::run(&mut trainer, Watch::default());
    assert!(tiny.backend.memory().0 < before, "moments of 8 bits take less memory than those that they replace");
    let last = |w: &Watch| w.reports.last().unwrap().loss;
    println!("loss after {} steps: {} and {} in 8 bits", wide.reports.len(), last(&wide), last(&narrow));
    assert!(last(&wide) < wide.reports[0].loss - 0.3, "{}", last(&wide));
    assert!((last(&narrow) / last(&wide) - 1.0).abs() < 0.1, "{} for {}", last(&narrow), last(&wide));
    assert_ne!(trainer.lora.tensors(&tiny.backend).unwrap(), wide_factors);
    let state = OptimizerState::download(&tiny.backend, &trainer.lora).unwrap();
    let Some(Values::U8(codes)) = state.get("b.m8") else { panic!("no codes") };
    assert!(codes.iter().any(|c| *c > 127) && codes.iter().any(|c| *c < 127));
}
