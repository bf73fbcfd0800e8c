//! W + s·B·A, row by row; with DoRA each row scaled to its magnitude.

use std::ops::Range;

use cashtag_backend::WeightSource;

use crate::adapter::Adapter;
use crate::checkpoint::Checkpoint;
use crate::config::LlamaConfig;
use crate::error::{Error, Result};
use crate::lora::slots;

/// A model with the factors of an adapter in its weights; the model itself where there is none.
#[derive(Clone, Copy)]
pub struct Merged<'a> {
    pub checkpoint: &'a Checkpoint,
    pub adapter: Option<&'a Adapter>,
}

/// One matrix of a [`Merged`] model.
pub(super) struct MergedMatrix<'a> {
    base: Box<dyn WeightSource + 'a>,
    factors: Option<Factors<'a>>,
}

struct Factors<'a> {
    /// `[r, in]`
    a: &'a [f32],
    /// `[out, r]`
    b: &'a [f32],
    r: usize,
    scale: f32,
    /// DoRA: the norm of each row.
    magnitude: Option<&'a [f32]>,
}

impl<'a> Merged<'a> {
    /// Every tensor with its shape, in the order of the forward pass.
    pub(super) fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        Checkpoint::expected(self.checkpoint.config())
    }

    pub(super) fn matrix(&self, name: &str) -> Result<MergedMatrix<'a>> {
        let base = self.checkpoint.weight(name)?;
        let factors = match self.adapter {
            Some(adapter) => Factors::of(adapter, name, self.checkpoint.config())?,
            None => None,
        };
        Ok(MergedMatrix { base, factors })
    }
}

impl<'a> Factors<'a> {
    /// Those of the matrix `name`, if the adapter has any for it.
    fn of(adapter: &'a Adapter, name: &str, model: &LlamaConfig) -> Result<Option<Self>> {
        let (lora, tensors) = (&adapter.lora, &adapter.tensors);
        let slot = slots(lora, model)
            .into_iter()
            .find(|s| name == format!("model.layers.{}.{}.weight", s.layer, s.module.path()));
        let Some(slot) = slot else { return Ok(None) };
        let part = |values: &'a [f32], first: usize, len: usize| {
            let found = values.get(first..first + len);
            found.ok_or_else(|| Error::Adapter(format!("it lacks values for {name}")))
        };
        let magnitude = match lora.use_dora {
            true => Some(part(&tensors.magnitude, slot.magnitude_offset(lora.r), slot.out_features)?),
            false => None,
        };
        Ok(Some(Self {
            a: part(&tensors.a, slot.a_offset, lora.r * slot.in_features)?,
            b: part(&tensors.b, slot.b_offset, lora.r * slot.out_features)?,
            r: lora.r,
            scale: lora.scale(),
            magnitude,
        }))
    }
}

impl MergedMatrix<'_> {
    pub(super) fn rows(&self) -> usize {
        self.base.rows()
    }

    pub(super) fn cols(&self) -> usize {
        self.base.cols()
    }

    /// Rows `rows` as f32, on all cores.
    pub(super) fn read(&self, rows: Range<usize>, out: &mut [f32]) -> Result<()> {
        let cols = self.cols();
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let share = rows.len().div_ceil(threads).max(1);
        std::thread::scope(|scope| {
            let parts: Vec<_> = out
                .chunks_mut(share * cols)
                .zip((rows.start..rows.end).step_by(share))
                .map(|(out, first)| scope.spawn(move || self.part(first..first + out.len() / cols, out)))
                .collect();
            // A panic of a part is one of the whole.
            parts.into_iter().try_for_each(|p| p.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
        })
    }

    fn part(&self, rows: Range<usize>, out: &mut [f32]) -> Result<()> {
        let cols = self.cols();
        self.base.read_rows(rows.clone(), out)?;
        let Some(f) = &self.factors else { return Ok(()) };
        let mut delta = vec![0f32; cols];
        for (row, out) in rows.zip(out.chunks_exact_mut(cols)) {
            delta.fill(0.0);
            for (b, a) in f.b[row * f.r..(row + 1) * f.r].iter().zip(f.a.chunks_exact(cols)) {
                delta.iter_mut().zip(a).for_each(|(d, a)| *d += b * a);
            }
            out.iter_mut().zip(&delta).for_each(|(w, d)| *w += f.scale * d);
            if let Some(magnitude) = f.magnitude {
                let norm = out.iter().map(|w| f64::from(*w) * f64::from(*w)).sum::<f64>().sqrt();
                let factor = (f64::from(magnitude[row]) / norm) as f32;
                out.iter_mut().for_each(|w| *w *= factor);
            }
            if let Some(column) = out.iter().position(|w| !w.is_finite()) {
                let what = format!("row {row}, column {column} is {} with the adapter", out[column]);
                return Err(Error::Adapter(format!("{}: {what}", self.base.name())));
            }
        }
        Ok(())
    }
}
