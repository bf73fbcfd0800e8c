use std::path::Path;

use cashtag_backend_cpu::{CpuBackend, Precision};

use super::*;
use crate::checkpoint::Checkpoint;
use crate::model::{Llama, Purpose};

const PREFIX: [u32; 3] = [1, 7, 12];

fn examples() -> Vec<TokenizedExample> {
    let example = |i: u32| {
        let own = (0..5 + i % 4).map(|j| 3 + (i * 11 + j * 7) % 36);
        let tokens: Vec<u32> = PREFIX.into_iter().chain(own).collect();
        TokenizedExample { answer_start: tokens.len() - 2, tokens, weight: 1.0 }
    };
    (0..24).map(example).collect()
}

fn tiny() -> Checkpoint {
    Checkpoint::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tiny")).unwrap()
}

/// Losses of the label rows from a residual stream.
fn losses(checkpoint: &Checkpoint, batch: &PackedBatch, x: &[f32]) -> Vec<f32> {
    let c = checkpoint.config();
    let (d, norm, head) =
        (c.hidden_size, checkpoint.vector("model.norm.weight").unwrap(), checkpoint.weight("lm_head.weight").unwrap());
    let mut table = vec![0f32; c.vocab_size * d];
    head.read_rows(0..c.vocab_size, &mut table).unwrap();
    let of = |(&row, &target): (&u32, &u32)| {
        let x = &x[row as usize * d..(row as usize + 1) * d];
        let inverse = 1.0 / (x.iter().map(|v| v * v).sum::<f32>() / d as f32 + c.rms_norm_eps).sqrt();
        let y: Vec<f32> = x.iter().zip(&norm).map(|(x, w)| x * inverse * w).collect();
        let logits: Vec<f32> = table.chunks(d).map(|t| t.iter().zip(&y).map(|(t, y)| t * y).sum()).collect();
        logits.iter().map(|l| l.exp()).sum::<f32>().ln() - logits[target as usize]
    };
    batch.label_rows.iter().zip(&batch.targets).map(of).collect()
}

/// Runs all layers; the squared distance of the two streams' label rows, with the losses of both.
fn run(backend: &CpuBackend, checkpoint: &Checkpoint, kind: GgufType) -> (f64, [Vec<f32>; 2], Vec<u8>) {
    let merged = Merged { checkpoint, adapter: None };
    let mut calibration = Calibration::new(backend, merged, kind, &examples(), &PREFIX).unwrap();
    let mut bytes = Vec::new();
    for layer in 0..checkpoint.config().num_hidden_layers {
        let found = calibration.layer(layer, &mut || true).unwrap();
        assert_eq!(found.len(), if kind.is_quantised() { 7 } else { 0 });
        found.into_values().for_each(|b| bytes.extend(b));
    }
    let (batch, d) = (&calibration.batch, checkpoint.config().hidden_size);
    let streams =
        [&calibration.exact, &calibration.rounded].map(|s| downloaded(backend, &s.x, batch.rows() * d).unwrap());
    let of_row = |row: u32| row as usize * d..(row as usize + 1) * d;
    let far =
        batch.label_rows.iter().flat_map(|&row| of_row(row)).map(|i| f64::from(streams[0][i] - streams[1][i]).powi(2));
    (far.sum(), streams.each_ref().map(|x| losses(checkpoint, batch, x)), bytes)
}

/// The exact stream is the model: it has the losses that the engine computes, and without rounding so has the other.
#[test]
fn the_streams_are_the_model() {
    let (backend, checkpoint) = (CpuBackend::new(Precision::F32, 2).unwrap(), tiny());
    let model = Llama::load(&backend, &checkpoint, |_, _| {}).unwrap();
    let examples = examples();
    let batch = pack(&examples.iter().collect::<Vec<_>>(), &PREFIX, TrainOn::Answer);
    let mut ws = model.workspace(&backend, batch.rows(), Purpose::Inference, None).unwrap();
    let expected = model.loss(&backend, &batch, None, 0.0, &mut ws).unwrap().rows;
    let (far, [exact, rounded], bytes) = run(&backend, &checkpoint, GgufType::F32);
    assert!(bytes.is_empty() && far == 0.0, "{far}");
    for (e, f) in expected.iter().zip(&exact) {
        assert!((e - f).abs() < 1e-4, "{exact:?} for {expected:?}");
    }
    assert_eq!(exact, rounded);
    let close = |kind, most: f32| {
        let (far, [exact, rounded], bytes) = run(&backend, &checkpoint, kind);
        let widest = exact.iter().zip(&rounded).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        println!("{}: squared distance {far:.2e}, losses differ by at most {widest:.2e}", kind.name());
        assert!(widest > 0.0 && widest < most, "{}: {widest}", kind.name());
        bytes
    };
    close(GgufType::Q8_0, 0.02);
    // The same bytes each time.
    assert_eq!(close(GgufType::Q4_0, 0.3), close(GgufType::Q4_0, 0.3));
}

#[test]
fn what_cannot_be_calibrated() {
    let (backend, checkpoint) = (CpuBackend::new(Precision::F32, 2).unwrap(), tiny());
    let merged = Merged { checkpoint: &checkpoint, adapter: None };
    let said = |examples: &[TokenizedExample]| {
        Calibration::new(&backend, merged, GgufType::Q4_0, examples, &PREFIX).err().unwrap().to_string()
    };
    let example = |tokens: Vec<u32>| TokenizedExample { answer_start: tokens.len() - 1, tokens, weight: 1.0 };
    assert_eq!(said(&[]), "there are no texts to calibrate with");
    let outside = said(&[example(vec![1, 7, 12, 400, 3])]);
    assert!(outside.starts_with("token 400 is outside the model's vocabulary of 40"), "{outside}");
    let long = said(&[example(vec![5; 80])]);
    assert_eq!(long, "a calibration text takes 79 of 64 positions");
    let mut calibration = Calibration::new(&backend, merged, GgufType::Q4_0, &examples(), &PREFIX).unwrap();
    assert!(matches!(calibration.layer(0, &mut || false), Err(Error::Stopped)));
}
