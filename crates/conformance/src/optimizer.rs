//! AdamW and the norm of a gradient.

use cashtag_backend::{AdamW, Backend, Result};

use crate::harness::Harness;

pub(crate) fn run<A: Backend, B: Backend>(h: &mut Harness<'_, A, B>) -> Result<()> {
    let len = h.random.pick(&[1, 7, 64, 1000, 36_864, 300_001]);
    let values: Vec<f32> = (0..len).map(|_| h.random.normal() * 0.02).collect();
    let mut start = exact(h, &values)?;
    let mut m = exact(h, &vec![0.0; len])?;
    let mut v = exact(h, &vec![0.0; len])?;
    let mut compute = (h.a.zeros(h.a.compute_dtype(), len)?, h.b.zeros(h.b.compute_dtype(), len)?);
    for step in 1..=3 {
        let gradient: Vec<f32> = (0..len).map(|_| h.random.normal()).collect();
        let gradient = exact(h, &gradient)?;
        let hyper = AdamW {
            learning_rate: 2e-3,
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: h.random.pick(&[0.0, 0.01]),
            step,
            gradient_scale: h.random.pick(&[1.0, 0.125]),
        };
        h.a.adamw(hyper, &mut start.0, &gradient.0, &mut m.0, &mut v.0, &mut compute.0)?;
        h.b.adamw(hyper, &mut start.1, &gradient.1, &mut m.1, &mut v.1, &mut compute.1)?;
        compare(h, "adamw, m", &m, h.tolerance.single)?;
        compare(h, "adamw, v", &v, h.tolerance.single)?;
        compare(h, "adamw, parameter", &start, h.tolerance.single)?;
        compare(h, "adamw, compute copy", &compute, h.tolerance.rounding)?;

        let (a, b) = (h.a.sum_of_squares(&gradient.0)?, h.b.sum_of_squares(&gradient.1)?);
        h.record("sum_of_squares", format!("sum_of_squares of {len}"), (a - b).abs() / a, h.tolerance.single);
        if b.to_bits() != h.b.sum_of_squares(&gradient.1)?.to_bits() {
            h.fail("sum_of_squares: differs between two runs".into());
        }
    }
    let mut bad = values;
    bad[len / 2] = f32::INFINITY;
    let bad = exact(h, &bad)?;
    if h.b.sum_of_squares(&bad.1)?.is_finite() {
        h.fail("sum_of_squares: an infinite element gives a finite sum".into());
    }
    Ok(())
}

/// A f32 buffer of exactly these values on each side: the optimizer takes whole buffers.
fn exact<A: Backend, B: Backend>(h: &Harness<'_, A, B>, values: &[f32]) -> Result<(A::Buffer, B::Buffer)> {
    let mut a = h.a.uninit(cashtag_backend::Dtype::F32, values.len())?;
    let mut b = h.b.uninit(cashtag_backend::Dtype::F32, values.len())?;
    h.a.upload(values, &mut a, 0)?;
    h.b.upload(values, &mut b, 0)?;
    Ok((a, b))
}

fn compare<A: Backend, B: Backend>(
    h: &mut Harness<'_, A, B>,
    name: &str,
    pair: &(A::Buffer, B::Buffer),
    allowed: f64,
) -> Result<()> {
    let len = h.a.len(&pair.0);
    let (mut a, mut b) = (vec![0.0; len], vec![0.0; len]);
    h.a.download(&pair.0, 0, &mut a)?;
    h.b.download(&pair.1, 0, &mut b)?;
    let error: f64 = a.iter().zip(&b).map(|(&x, &y)| (f64::from(x) - f64::from(y)).powi(2)).sum();
    let norm: f64 = a.iter().map(|&x| f64::from(x).powi(2)).sum();
    h.record(name, format!("{name} of {len}"), (error / norm).sqrt(), allowed);
    Ok(())
}
