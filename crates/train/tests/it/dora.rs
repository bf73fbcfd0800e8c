//! DoRA: gradients and steps against PEFT's (`dora.json`, made by `make_dora_goldens.py`) and finite differences, files, resume.

use cashtag_backend::Backend;
use cashtag_backend_cpu::{CpuBackend, Precision};
use cashtag_llama::adapter::Adapter;
use cashtag_llama::lora::{Lora, LoraConfig, LoraTensors};
use cashtag_llama::model::{Checkpointing, Purpose, TrainPass};
use cashtag_llama::packing::{TokenizedExample, TrainOn, pack};
use cashtag_train::{OptimizerState, TrainingArguments, Values};
use serde_json::Value;

use crate::arguments::names;
use crate::support::{self, PREFIX, Tiny, Watch, quiet};

/// Loss, the gradient of every factor and magnitude, and six AdamW steps as PEFT has them, on the real model in f32.
#[test]
fn gradients_and_steps_are_peft_s() {
    let g: Value = serde_json::from_str(include_str!("dora.json")).unwrap();
    let float = |v: &Value| v.as_f64().unwrap();
    let (backend, model, checkpoint) = support::load(Precision::F32);
    let format = support::format(&checkpoint, g["system"].as_str().unwrap());
    let examples: Vec<TokenizedExample> = g["texts"]
        .as_array()
        .unwrap()
        .iter()
        .map(|t| {
            let label = format.label_names().iter().position(|l| l == t[1].as_str().unwrap()).unwrap();
            format.example(t[0].as_str().unwrap(), label, 1.0).unwrap()
        })
        .collect();
    let r = g["r"].as_u64().unwrap() as usize;
    let config = LoraConfig {
        r,
        lora_alpha: float(&g["alpha"]) as f32,
        lora_dropout: 0.0,
        use_dora: true,
        layers_to_transform: Some(
            g["layers"].as_array().unwrap().iter().map(|l| l.as_u64().unwrap() as usize).collect(),
        ),
        ..Default::default()
    };
    let mut tensors = LoraTensors::init(&config, model.config(), 1);
    let mut fresh = Lora::new(&backend, config.clone(), model.config(), &tensors, true).unwrap();
    model.prepare(&backend, &mut fresh).unwrap();
    tensors.magnitude = fresh.tensors(&backend).unwrap().magnitude;
    let slots = fresh.slots().to_vec();
    drop(fresh);
    // What the script draws for a module: stream 3·(7·layer + module) for A, one more for B, two more for the magnitude.
    let streams: Vec<usize> = slots.iter().map(|s| 3 * (7 * s.layer + s.module as usize)).collect();
    for (s, stream) in slots.iter().zip(&streams) {
        let (a, b, m) = (s.a_offset, s.b_offset, s.magnitude_offset(r));
        let bound = (1.0 / (s.in_features as f64).sqrt()) as f32;
        tensors.a[a..a + r * s.in_features].copy_from_slice(&support::uniform(r * s.in_features, *stream, bound));
        tensors.b[b..b + r * s.out_features].copy_from_slice(&support::uniform(r * s.out_features, stream + 1, 0.05));
        let moved = support::uniform(s.out_features, stream + 2, 0.2);
        tensors.magnitude[m..m + s.out_features].iter_mut().zip(moved).for_each(|(m, u)| *m *= 1.0 + u);
    }
    let mut lora = Lora::new(&backend, config, model.config(), &tensors, true).unwrap();
    model.prepare(&backend, &mut lora).unwrap();
    let refs: Vec<&TokenizedExample> = examples.iter().collect();
    let batch = pack(&refs, format.prefix(), TrainOn::Answer);
    let n = batch.loss_tokens as f64;
    let mut ws = model.workspace(&backend, 512, Purpose::Training(Checkpointing::None), Some(&lora)).unwrap();
    let pass = TrainPass { random: None, label_smoothing: 0.0, loss_scale: 1.0, neftune_alpha: 0.0 };
    let mut loss_of = |lora: &mut Lora<CpuBackend>| {
        lora.zero_grad(&backend).unwrap();
        model.forward_backward(&backend, &batch, lora, pass, &mut ws).unwrap().sum() / n
    };

    let loss = loss_of(&mut lora);
    assert!((loss / float(&g["loss"]) - 1.0).abs() < 1e-5, "{loss} for {}", g["loss"]);
    let gradients: Vec<(&str, Vec<f32>)> = lora
        .groups()
        .map(|(name, group)| {
            let mut values = vec![0f32; group.len];
            backend.download(&group.training.as_ref().unwrap().gradient, 0, &mut values).unwrap();
            (name, values)
        })
        .collect();
    let of = |name: &str| &gradients.iter().find(|(n, _)| *n == name).unwrap().1;
    let mut worst = [0f64; 3];
    for (s, stream) in slots.iter().zip(&streams) {
        let parts = [
            ("a", s.a_offset, r * s.in_features),
            ("b", s.b_offset, r * s.out_features),
            ("magnitude", s.magnitude_offset(r), s.out_features),
        ];
        for (i, (name, first, len)) in parts.into_iter().enumerate() {
            let scaled: Vec<f32> = of(name)[first..first + len].iter().map(|v| v / n as f32).collect();
            let found = support::fingerprint(&scaled, stream + i);
            let expected: Vec<f64> =
                g["gradients"][(stream + i).to_string()].as_array().unwrap().iter().map(float).collect();
            // Root mean square of the projections of the error estimates its norm.
            let error = found[1..].iter().zip(&expected[1..]).map(|(f, e)| (f - e).powi(2)).sum::<f64>() / 8.0;
            worst[i] = worst[i].max(error.sqrt() / expected[0]).max((found[0] / expected[0] - 1.0).abs());
        }
    }
    println!("worst relative errors: A {:.1e}, B {:.1e}, magnitudes {:.1e}", worst[0], worst[1], worst[2]);
    assert!(worst.iter().all(|w| *w < 1e-3), "{worst:?}");

    let a = &g["adamw"];
    for (i, expected) in a["curve"].as_array().unwrap().iter().enumerate() {
        let loss = loss_of(&mut lora);
        let norm = lora.grad_norm(&backend).unwrap() / n;
        assert!((loss - float(&expected[0])).abs() < 1e-3, "step {i}: loss {loss} for {}", expected[0]);
        assert!((norm / float(&expected[1]) - 1.0).abs() < 5e-3, "step {i}: norm {norm} for {}", expected[1]);
        let hyper = cashtag_backend::AdamW {
            learning_rate: float(&a["learning_rate"]) as f32,
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: float(&a["weight_decay"]) as f32,
            step: i as u32 + 1,
            gradient_scale: ((float(&a["max_grad_norm"]) / (norm + 1e-6)).min(1.0) / n) as f32,
        };
        lora.step(&backend, hyper, 1.0).unwrap();
        model.prepare(&backend, &mut lora).unwrap();
    }
}

/// Norms do not depend on the magnitudes, so their gradient is a plain derivative.
#[test]
fn magnitudes_by_finite_differences() {
    let tiny = Tiny::new(Precision::F32);
    let config = LoraConfig { use_dora: true, lora_dropout: 0.0, ..Tiny::lora_config() };
    let mut lora = tiny.lora(config);
    tiny.model.prepare(&tiny.backend, &mut lora).unwrap();
    let b = support::uniform(lora.b.len, 9, 0.1);
    lora.groups_mut().filter(|(n, _)| *n == "b").for_each(|(_, g)| g.upload(&tiny.backend, &b).unwrap());
    let norms = {
        let mut fresh = tiny.lora(lora.config.clone());
        tiny.model.prepare(&tiny.backend, &mut fresh).unwrap();
        fresh.tensors(&tiny.backend).unwrap().magnitude
    };
    let spread = support::uniform(norms.len(), 11, 0.2);
    let magnitudes: Vec<f32> = norms.iter().zip(&spread).map(|(n, u)| n * (1.0 + u)).collect();
    let direction = support::uniform(norms.len(), 12, 0.3);
    let refs: Vec<&TokenizedExample> = tiny.examples.iter().collect();
    let batch = pack(&refs, &PREFIX, TrainOn::Answer);
    let mut ws = tiny.model.workspace(&tiny.backend, 512, Purpose::Training(Checkpointing::None), Some(&lora)).unwrap();
    let mut loss_at = |lora: &mut Lora<CpuBackend>, t: f32| -> f64 {
        let moved: Vec<f32> = magnitudes.iter().zip(&direction).map(|(m, d)| m + t * d).collect();
        lora.groups_mut()
            .filter(|(n, _)| *n == "magnitude")
            .for_each(|(_, g)| g.upload(&tiny.backend, &moved).unwrap());
        tiny.model.prepare(&tiny.backend, lora).unwrap();
        lora.zero_grad(&tiny.backend).unwrap();
        let pass = TrainPass { random: None, label_smoothing: 0.0, loss_scale: 1.0, neftune_alpha: 0.0 };
        tiny.model.forward_backward(&tiny.backend, &batch, lora, pass, &mut ws).unwrap().sum()
    };
    let h = 0.05;
    let slope = (loss_at(&mut lora, h) - loss_at(&mut lora, -h)) / (2.0 * f64::from(h));
    loss_at(&mut lora, 0.0);
    let group = &lora.dora.as_ref().unwrap().magnitude;
    let mut gradient = vec![0f32; group.len];
    tiny.backend.download(&group.training.as_ref().unwrap().gradient, 0, &mut gradient).unwrap();
    let expected: f64 = gradient.iter().zip(&direction).map(|(g, d)| f64::from(*g) * f64::from(*d)).sum();
    assert!((slope / expected - 1.0).abs() < 1e-2, "{slope} for {expected}");
}

/// A new adapter changes nothing, whatever it is; a trained one has learnt magnitudes of its own, which stand in its file.
#[test]
fn an_adapter_with_magnitudes() {
    let tiny = Tiny::new(Precision::F32);
    let dir = tempfile::tempdir().unwrap();
    let config = LoraConfig { use_dora: true, ..Tiny::lora_config() };
    let refs: Vec<&TokenizedExample> = tiny.examples.iter().collect();
    let batch = pack(&refs, &PREFIX, TrainOn::Answer);
    let loss = |lora: Option<&Lora<CpuBackend>>| {
        let mut ws = tiny.model.workspace(&tiny.backend, 512, Purpose::Inference, lora).unwrap();
        tiny.model.loss(&tiny.backend, &batch, lora, 0.0, &mut ws).map(|l| l.sum())
    };
    let mut fresh = tiny.lora(config.clone());
    assert!(loss(Some(&fresh)).unwrap_err().to_string().contains("out of date"));
    tiny.model.prepare(&tiny.backend, &mut fresh).unwrap();
    let (with, without) = (loss(Some(&fresh)).unwrap(), loss(None).unwrap());
    assert!((with / without - 1.0).abs() < 1e-6, "{with} for {without}");
    let begin = fresh.tensors(&tiny.backend).unwrap().magnitude;
    assert!(begin.iter().all(|m| *m > 0.05), "norms of 64 and 96 weights with a deviation of 0.02");

    let mut trainer =
        tiny.trainer_with(dir.path(), TrainingArguments { num_train_epochs: 8.0, ..quiet() }, config.clone());
    let (_, watch) = support::run(&mut trainer, Watch::default());
    assert!(watch.reports.last().unwrap().loss < watch.reports[0].loss - 0.3);
    let adapter = trainer.adapter().unwrap();
    assert!(adapter.tensors.magnitude.iter().zip(&begin).all(|(a, b)| a != b));
    let (_, _, plain) = {
        let mut trainer = tiny.trainer(dir.path(), TrainingArguments { num_train_epochs: 8.0, ..quiet() });
        let (o, w) = support::run(&mut trainer, Watch::default());
        (o, w, trainer.adapter().unwrap())
    };
    assert_ne!(plain.tensors.b, adapter.tensors.b);

    let path = dir.path().join("adapter");
    adapter.save(&path, tiny.model.config()).unwrap();
    let names = names(&path);
    assert_eq!(names.len(), 3 * 2 * 7);
    assert!(names.contains(&"base_model.model.model.layers.1.mlp.up_proj.lora_magnitude_vector".to_string()));
    let read = Adapter::load(&path, tiny.model.config()).unwrap();
    assert_eq!((&read.tensors, &read.lora), (&adapter.tensors, &adapter.lora));
    let mut again = Lora::new(&tiny.backend, read.lora, tiny.model.config(), &read.tensors, false).unwrap();
    tiny.model.prepare(&tiny.backend, &mut again).unwrap();
    assert_eq!(loss(Some(&again)).unwrap(), loss(Some(&trainer.lora)).unwrap());
}

/// Interrupted in the middle, with DoRA, 8-bit moments, noise and dropout all at once: the same bits.
#[test]
fn goes_on_bit_for_bit() {
    let tiny = Tiny::new(Precision::best());
    let arguments = TrainingArguments {
        optim: cashtag_train::Optimizer::AdamW8bit,
        neftune_noise_alpha: 5.0,
        label_smoothing_factor: 0.1,
        ..quiet()
    };
    let config = || LoraConfig { use_dora: true, r: 64, ..Tiny::lora_config() };
    let dir = tempfile::tempdir().unwrap();
    let mut whole = tiny.trainer_with(dir.path(), arguments.clone(), config());
    support::run(&mut whole, Watch::default());
    let dir = tempfile::tempdir().unwrap();
    for _ in 0..2 {
        let mut part = tiny.trainer_with(dir.path(), arguments.clone(), config());
        support::run(&mut part, Watch { stop_after: Some(2), ..Default::default() });
    }
    let mut rest = tiny.trainer_with(dir.path(), arguments, config());
    let (_, watch) = support::run(&mut rest, Watch::default());
    assert_eq!(watch.reports.iter().map(|r| r.step).collect::<Vec<_>>(), [5, 6]);
    let state = |lora: &Lora<CpuBackend>| OptimizerState::download(&tiny.backend, lora).unwrap();
    assert_eq!(state(&rest.lora), state(&whole.lora));
    assert!(matches!(state(&rest.lora).get("a.m8"), Some(Values::U8(_))));
}
