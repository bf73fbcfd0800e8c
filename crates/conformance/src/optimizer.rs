//! AdamW, with moments in f32 and in 8 bits, and the norm of a gradient.

use cashtag_backend::{AdamW, BLOCK_8BIT, Backend, Dtype, Moments8, Result};

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
        compare(h, "adamw, m", &(&m.0, &m.1), h.tolerance.single)?;
        compare(h, "adamw, v", &(&v.0, &v.1), h.tolerance.single)?;
        compare(h, "adamw, parameter", &(&start.0, &start.1), h.tolerance.single)?;
        compare(h, "adamw, compute copy", &(&compute.0, &compute.1), h.tolerance.rounding)?;

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
    eight_bit(h)
}

/// Moments of 8 bits on one device.
struct Eight<X> {
    table: X,
    blocks: usize,
    m: X,
    v: X,
    absmax: X,
    m32: X,
    v32: X,
}

impl<X> Eight<X> {
    fn new<D: Backend<Buffer = X>>(device: &D, table: &[u32], len: usize, wide: usize) -> Result<Self> {
        let blocks = table.len() / 3;
        let mut own = device.uninit(Dtype::U32, table.len())?;
        device.upload_u32(table, &mut own)?;
        Ok(Self {
            table: own,
            blocks,
            m: device.zeros(Dtype::U32, len.div_ceil(4))?,
            v: device.zeros(Dtype::U32, len.div_ceil(4))?,
            absmax: device.zeros(Dtype::F32, 2 * blocks)?,
            m32: device.zeros(Dtype::F32, wide.max(1))?,
            v32: device.zeros(Dtype::F32, wide.max(1))?,
        })
    }

    fn moments(&mut self) -> Moments8<'_, X> {
        Moments8 {
            table: &self.table,
            blocks: self.blocks,
            m: &mut self.m,
            v: &mut self.v,
            absmax: &mut self.absmax,
            m32: &mut self.m32,
            v32: &mut self.v32,
        }
    }
}

/// A few tensors, one of them too small for codes, by [`Backend::adamw_8bit`].
///
/// A moment that lies half-way between two levels may be rounded to either: its parameter then moves otherwise by a share of the
/// learning rate. So parameters are compared after the first step, where no code was read, to `single`, and later by how far they moved.
fn eight_bit<A: Backend, B: Backend>(h: &mut Harness<'_, A, B>) -> Result<()> {
    let mut table = Vec::new();
    let (mut len, mut wide) = (0, 0);
    for _ in 0..h.random.between(1, 4) {
        let tensor = h.random.pick(&[7, 64, 1000, 4096, 36_864, 36_865]);
        let codes = tensor >= 4096;
        for first in (0..tensor).step_by(BLOCK_8BIT) {
            let elements = (tensor - first).min(BLOCK_8BIT);
            table.extend([(len + first) as u32, elements as u32, if codes { u32::MAX } else { (wide + first) as u32 }]);
        }
        len += tensor;
        wide += if codes { 0 } else { tensor };
    }
    let values: Vec<f32> = (0..len).map(|_| h.random.normal() * 0.02).collect();
    let mut parameter = exact(h, &values)?;
    let mut eight = (Eight::new(h.a, &table, len, wide)?, Eight::new(h.b, &table, len, wide)?);
    let mut compute = (h.a.zeros(h.a.compute_dtype(), len)?, h.b.zeros(h.b.compute_dtype(), len)?);
    for step in 1..=3 {
        let gradient: Vec<f32> = (0..len).map(|_| h.random.normal()).collect();
        let gradient = exact(h, &gradient)?;
        let hyper = AdamW {
            learning_rate: 2e-3,
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: 0.01,
            step,
            gradient_scale: 0.5,
        };
        h.a.adamw_8bit(hyper, &mut parameter.0, &gradient.0, eight.0.moments(), &mut compute.0)?;
        h.b.adamw_8bit(hyper, &mut parameter.1, &gradient.1, eight.1.moments(), &mut compute.1)?;
        compare(
            h,
            "adamw_8bit, absmax",
            &(&eight.0.absmax, &eight.1.absmax),
            if step == 1 { h.tolerance.single } else { 1e-3 },
        )?;
        if step == 1 {
            compare(h, "adamw_8bit, parameter", &(&parameter.0, &parameter.1), h.tolerance.single)?;
            compare(h, "adamw_8bit, compute copy", &(&compute.0, &compute.1), h.tolerance.rounding)?;
        }
    }
    let moved = |to: &[f32]| -> Vec<f32> { to.iter().zip(&values).map(|(to, from)| to - from).collect() };
    let (a, b) = download(h, &(&parameter.0, &parameter.1))?;
    let error = relative(&moved(&a), &moved(&b));
    h.record("adamw_8bit, way", format!("adamw_8bit of {len}"), error, 5e-3);
    Ok(())
}

/// A f32 buffer of exactly these values on each side: the optimizer takes whole buffers.
fn exact<A: Backend, B: Backend>(h: &Harness<'_, A, B>, values: &[f32]) -> Result<(A::Buffer, B::Buffer)> {
    let mut a = h.a.uninit(Dtype::F32, values.len())?;
    let mut b = h.b.uninit(Dtype::F32, values.len())?;
    h.a.upload(values, &mut a, 0)?;
    h.b.upload(values, &mut b, 0)?;
    Ok((a, b))
}

fn download<A: Backend, B: Backend>(
    h: &Harness<'_, A, B>,
    pair: &(&A::Buffer, &B::Buffer),
) -> Result<(Vec<f32>, Vec<f32>)> {
    let len = h.a.len(pair.0);
    let (mut a, mut b) = (vec![0.0; len], vec![0.0; len]);
    h.a.download(pair.0, 0, &mut a)?;
    h.b.download(pair.1, 0, &mut b)?;
    Ok((a, b))
}

fn compare<A: Backend, B: Backend>(
    h: &mut Harness<'_, A, B>,
    name: &str,
    pair: &(&A::Buffer, &B::Buffer),
    allowed: f64,
) -> Result<()> {
    let (a, b) = download(h, pair)?;
    h.record(name, format!("{name} of {}", a.len()), relative(&a, &b), allowed);
    Ok(())
}

/// ‖a − b‖ / ‖a‖
fn relative(a: &[f32], b: &[f32]) -> f64 {
    let error: f64 = a.iter().zip(b).map(|(&x, &y)| (f64::from(x) - f64::from(y)).powi(2)).sum();
    let norm: f64 = a.iter().map(|&x| f64::from(x).powi(2)).sum();
    (error / norm).sqrt()
}
