//! Cross-entropy with its gradient.

use cashtag_backend::{Backend, CrossEntropy, Result};

use crate::harness::{Harness, Kind, Lie};

pub(crate) fn run<A: Backend, B: Backend>(h: &mut Harness<'_, A, B>) -> Result<()> {
    for lie in Lie::ALL {
        let (n, vocab) = (h.random.between(1, 20), h.random.pick(&[3, 100, 1000, 32_000, 49_152]));
        let logits = h.input(Kind::F32, n, vocab, lie, 4.0)?;
        let list: Vec<u32> = (0..n).map(|_| h.random.up_to(vocab - 1) as u32).collect();
        let targets = h.words(&list)?;
        let weights: Vec<f32> = (0..n).map(|_| h.random.pick(&[1.0, 0.25, 2.0])).collect();
        let weights = h.vector(&weights)?;
        for label_smoothing in [0.0, 0.1] {
            for with_gradient in [false, true] {
                let what = format!("smoothing {label_smoothing}, gradient {with_gradient}, {lie:?}");
                let gradient_scale = h.random.pick(&[1.0, 128.0]);
                let mut loss = h.output(Kind::F32, 1, n, Lie::Dense)?;
                let mut d = h.output(Kind::T, n, vocab, lie)?;
                let ea = CrossEntropy { targets: &targets.0, weights: &weights.a, label_smoothing, gradient_scale };
                let eb = CrossEntropy { targets: &targets.1, weights: &weights.b, label_smoothing, gradient_scale };
                h.a.cross_entropy(logits.in_a(), ea, &mut loss.a, with_gradient.then(|| d.out_a()))?;
                h.b.cross_entropy(logits.in_b(), eb, &mut loss.b, with_gradient.then(|| d.out_b()))?;
                h.check("cross_entropy", &what, &loss, h.tolerance.single)?;
                if with_gradient {
                    h.check("cross_entropy, gradient", &what, &d, h.tolerance.rounding)?;
                }
            }
        }
    }
    Ok(())
}
