//! Rounding with calibration: block by block, the matrices of a model are [rounded](super::rounding) for the inputs that
//! prompts of its own task give them.
//!
//! Two streams of hidden states go through the model side by side: one with the weights as they are, one with those that the file
//! will have. A matrix is rounded for the inputs of the second stream, and so that its outputs come close to the first one's:
//! what the blocks before have lost is made up for, in the residual stream too. As llama.cpp does, the second stream rounds the
//! inputs of quantised matrices to 8 bits.
//!
//! One matrix and what belongs to its inputs are in memory at a time, beside the hidden states of the calibration rows; memory
//! does not grow with the number of blocks.

use std::collections::BTreeMap;

use cashtag_backend::{Backend, Dtype, Mat, MatMut, Rope, WeightSource};
use half::f16;

use super::gguf::{GgufType, check_range};
use super::merge::Merged;
use super::quantize::quantize;
use super::rounding::{BLOCK, Factor, round, rounds};
use crate::config::LlamaConfig;
use crate::error::{Error, Result};
use crate::model::rope_tables;
use crate::packing::{PackedBatch, TokenizedExample, TrainOn, pack};
use crate::weights::first_not_finite;

/// What the rows that are read for labels count among the others.
const LABEL_WEIGHT: f32 = 4.0;

/// Gives a file the blocks of a layer's matrices, layer after layer from the first.
pub trait Rounding {
    /// The blocks of each matrix of `layer` that the file quantises, row by row in the order of the model, by the name that a
    /// Hugging Face checkpoint has for it. `go_on` is asked now and then; `false` stops with [`Error::Stopped`].
    ///
    /// # Errors
    /// Weights that cannot be read, hidden states that are not finite, a device that fails.
    fn layer(&mut self, layer: usize, go_on: &mut dyn FnMut() -> bool) -> Result<BTreeMap<String, Vec<u8>>>;
}

/// See the module's documentation.
pub struct Calibration<'a, B: Backend> {
    backend: &'a B,
    merged: Merged<'a>,
    kind: GgufType,
    batch: PackedBatch,
    positions: B::Buffer,
    cos: B::Buffer,
    sin: B::Buffer,
    /// With the weights as they are.
    exact: Stream<B>,
    /// With those of the file.
    rounded: Stream<B>,
    /// Scratch of norms and of attention.
    per_row: B::Buffer,
}

/// Hidden states of the calibration rows.
struct Stream<B: Backend> {
    /// Residual stream.
    x: B::Buffer,
    /// What goes into the matrices that are next, and what comes out of them.
    input: B::Buffer,
    output: B::Buffer,
}

/// A matrix that is in memory.
struct Values<'a> {
    name: &'a str,
    cols: usize,
    values: &'a [f32],
}

impl WeightSource for Values<'_> {
    fn name(&self) -> &str {
        self.name
    }

    fn rows(&self) -> usize {
        self.values.len() / self.cols
    }

    fn cols(&self) -> usize {
        self.cols
    }

    fn read_rows(&self, rows: std::ops::Range<usize>, out: &mut [f32]) -> cashtag_backend::Result<()> {
        out.copy_from_slice(&self.values[rows.start * self.cols..rows.end * self.cols]);
        Ok(())
    }
}

fn q_kv(c: &LlamaConfig) -> (usize, usize) {
    (c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim)
}

impl<'a, B: Backend> Calibration<'a, B> {
    /// Makes ready for a file of `kind`. `examples` share the beginning `prefix` as far as each of them does; all are run at
    /// once.
    ///
    /// # Errors
    /// No examples, tokens or positions that the model does not have, a device that computes in less than f32 or has no memory.
    pub fn new(
        backend: &'a B,
        merged: Merged<'a>,
        kind: GgufType,
        examples: &[TokenizedExample],
        prefix: &[u32],
    ) -> Result<Self> {
        let c = merged.checkpoint.config();
        if backend.compute_dtype() != Dtype::F32 {
            return Err(Error::Invalid("calibration computes in f32".into()));
        }
        if examples.is_empty() {
            return Err(Error::Invalid("there are no texts to calibrate with".into()));
        }
        let batch = pack(&examples.iter().collect::<Vec<_>>(), prefix, TrainOn::Answer);
        let (n, d) = (batch.rows(), c.hidden_size);
        let places = batch.layout.positions();
        let most = places.iter().max().map_or(0, |&p| p as usize + 1);
        if most > c.max_position_embeddings {
            let what = format!("a calibration text takes {most} of {} positions", c.max_position_embeddings);
            return Err(Error::Invalid(what));
        }
        let (x, rounded) = embeddings(&merged, kind, &batch.ids)?;
        let mut positions = backend.zeros(Dtype::U32, n)?;
        backend.upload_u32(&places, &mut positions)?;
        let [cos, sin] = rope_tables(c, most);
        let (q, kv) = q_kv(c);
        let (input, output) = (d.max(q).max(c.intermediate_size), (q + 2 * kv).max(2 * c.intermediate_size));
        let stream = |x: &[f32]| -> Result<Stream<B>> {
            let alloc = |cols: usize| backend.uninit(Dtype::F32, n * cols);
            Ok(Stream { x: uploaded(backend, x)?, input: alloc(input)?, output: alloc(output)? })
        };
        Ok(Self {
            positions,
            cos: uploaded(backend, &cos)?,
            sin: uploaded(backend, &sin)?,
            exact: stream(&x)?,
            rounded: stream(&rounded)?,
            per_row: backend.uninit(Dtype::F32, n * c.num_attention_heads)?,
            backend,
            merged,
            kind,
            batch,
        })
    }

    /// RMSNorm of the residual streams as the next input.
    fn norm(&mut self, name: &str) -> Result<()> {
        let (n, c) = (self.batch.rows(), self.merged.checkpoint.config());
        let w = uploaded(self.backend, &self.merged.checkpoint.vector(name)?)?;
        for s in [&mut self.exact, &mut self.rounded] {
            let (x, y) = (Mat::new(&s.x, n, c.hidden_size), MatMut::new(&mut s.input, n, c.hidden_size));
            self.backend.rms_norm(x, &w, c.rms_norm_eps, y, &mut self.per_row)?;
        }
        Ok(())
    }

    fn attention(&mut self) -> Result<()> {
        let (n, c, backend) = (self.batch.rows(), self.merged.checkpoint.config(), self.backend);
        let (q, kv) = q_kv(c);
        for s in [&mut self.exact, &mut self.rounded] {
            let all = q + 2 * kv;
            let rope = Rope { head_dim: c.head_dim, cos: &self.cos, sin: &self.sin, positions: &self.positions };
            backend.rope(rope, false, MatMut::new(&mut s.output, n, all).columns(0, q + kv))?;
            let qkv = Mat::new(&s.output, n, all);
            let o = MatMut::new(&mut s.input, n, q);
            let (k, v) = (qkv.columns(q, kv), qkv.columns(q + kv, kv));
            backend.attention(&self.batch.layout, c.head_dim, qkv.columns(0, q), k, v, o, &mut self.per_row)?;
        }
        Ok(())
    }

    fn swiglu(&mut self) -> Result<()> {
        let (n, f) = (self.batch.rows(), self.merged.checkpoint.config().intermediate_size);
        for s in [&mut self.exact, &mut self.rounded] {
            self.backend.swiglu(Mat::new(&s.output, n, 2 * f), MatMut::new(&mut s.input, n, f))?;
        }
        Ok(())
    }

    /// What each row counts in the error of a matrix. Behind the last attention nobody reads the others.
    fn row_weights(&self, last: bool) -> Vec<f32> {
        let mut weights = vec![if last { 0.0 } else { 1.0 }; self.batch.rows()];
        self.batch.label_rows.iter().for_each(|&row| weights[row as usize] = LABEL_WEIGHT);
        weights
    }

    /// The matrices `parts` (name, rows), which have the same input of `cols` columns: rounds each and computes the outputs of
    /// both streams, side by side; with `residual` added to the residual streams instead.
    fn matrices(
        &mut self,
        parts: &[(String, usize)],
        cols: usize,
        residual: bool,
        row_weights: &[f32],
        go_on: &mut dyn FnMut() -> bool,
        out: &mut BTreeMap<String, Vec<u8>>,
    ) -> Result<()> {
        let (n, backend) = (self.batch.rows(), self.backend);
        let tied = self.merged.checkpoint.config().tie_word_embeddings;
        let mut exact = downloaded(backend, &self.exact.input, n * cols)?;
        let mut inputs = downloaded(backend, &self.rounded.input, n * cols)?;
        if first_not_finite(&exact).or(first_not_finite(&inputs)).is_some() {
            let name = parts.first().map_or("", |(name, _)| name);
            let what =
                format!("the calibration texts give {name} inputs that are not finite\n  hint: --calibrate none");
            return Err(Error::Invalid(what));
        }
        if rounds(self.kind.of("", cols, tied), cols) {
            inputs.as_chunks_mut::<BLOCK>().0.iter_mut().for_each(to_8_bits);
            backend.upload(&inputs, &mut self.rounded.input, 0)?;
        }
        exact.iter_mut().zip(&inputs).for_each(|(e, i)| *e -= i);
        inputs.chunks_exact_mut(cols).zip(row_weights).for_each(|(row, w)| row.iter_mut().for_each(|v| *v *= w));
        let (difference, weighted) = (uploaded(backend, &exact)?, uploaded(backend, &inputs)?);
        drop((exact, inputs));
        // Xᵀ·(what X is to be), of which a matrix makes the change of its outputs that is wanted.
        let square = |b: &B::Buffer| -> Result<B::Buffer> {
            let mut product = backend.uninit(Dtype::F32, cols * cols)?;
            let (a, b) = (Mat::new(&weighted, n, cols), Mat::new(b, n, cols));
            backend.matmul_tn(1.0, a, b, 0.0, MatMut::new(&mut product, cols, cols))?;
            Ok(product)
        };
        let cross = square(&difference)?;
        drop(difference);
        let factor = Factor::new(backend, cols, downloaded(backend, &square(&self.rounded.input)?, cols * cols)?)?;
        let all: usize = parts.iter().map(|(_, rows)| rows).sum();
        let mut first = 0;
        for (name, rows) in parts {
            let rows = *rows;
            let mut values = vec![0f32; rows * cols];
            self.merged.matrix(name)?.read(0..rows, &mut values)?;
            let weight = backend.weight(&[&Values { name, cols, values: &values }])?;
            let block_type = self.kind.of(name, cols, tied);
            check_range(block_type, name, &values)?;
            let bytes = if rounds(block_type, cols) {
                let mut pull = backend.zeros(Dtype::F32, cols * rows)?;
                let mut to = MatMut::new(&mut pull, cols, rows);
                if residual {
                    let mut x = downloaded(backend, &self.exact.x, n * rows)?;
                    let rounded = downloaded(backend, &self.rounded.x, n * rows)?;
                    x.iter_mut().zip(&rounded).for_each(|(x, r)| *x -= r);
                    let missing = uploaded(backend, &x)?;
                    let (a, b) = (Mat::new(&weighted, n, cols), Mat::new(&missing, n, rows));
                    backend.matmul_tn(1.0, a, b, 0.0, to.reborrow())?;
                }
                backend.linear(Mat::new(&cross, cols, cols), &weight, true, to)?;
                round(backend, block_type, &values, &factor, pull)?
            } else {
                let mut bytes = Vec::new();
                quantize(block_type, &values, &mut bytes);
                bytes
            };
            block_type.dequantize(&bytes, &mut values);
            let stored = backend.weight(&[&Values { name, cols, values: &values }])?;
            for (s, weight) in [(&mut self.exact, &weight), (&mut self.rounded, &stored)] {
                let to = if residual { MatMut::new(&mut s.x, n, rows) } else { MatMut::new(&mut s.output, n, all) };
                let to = to.columns(first, rows);
                backend.linear(Mat::new(&s.input, n, cols), weight, residual, to)?;
            }
            first += rows;
            if rounds(block_type, cols) {
                out.insert(name.clone(), bytes);
            }
            if !go_on() {
                return Err(Error::Stopped);
            }
        }
        Ok(())
    }
}

impl<B: Backend> Rounding for Calibration<'_, B> {
    fn layer(&mut self, layer: usize, go_on: &mut dyn FnMut() -> bool) -> Result<BTreeMap<String, Vec<u8>>> {
        let c = self.merged.checkpoint.config();
        let (d, f, (q, kv)) = (c.hidden_size, c.intermediate_size, q_kv(c));
        let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
        let (every, read) = (self.row_weights(false), self.row_weights(layer + 1 == c.num_hidden_layers));
        let mut out = BTreeMap::new();
        self.norm(&name("input_layernorm"))?;
        let parts = [("self_attn.q_proj", q), ("self_attn.k_proj", kv), ("self_attn.v_proj", kv)];
        self.matrices(&parts.map(|(p, rows)| (name(p), rows)), d, false, &every, go_on, &mut out)?;
        self.attention()?;
        self.matrices(&[(name("self_attn.o_proj"), d)], q, true, &read, go_on, &mut out)?;
        self.norm(&name("post_attention_layernorm"))?;
        let parts = [("mlp.gate_proj", f), ("mlp.up_proj", f)];
        self.matrices(&parts.map(|(p, rows)| (name(p), rows)), d, false, &read, go_on, &mut out)?;
        self.swiglu()?;
        self.matrices(&[(name("mlp.down_proj"), d)], f, true, &read, go_on, &mut out)?;
        Ok(out)
    }
}

/// The rows of the tokens: as they are, and as a file of `kind` will have them.
fn embeddings(merged: &Merged<'_>, kind: GgufType, ids: &[u32]) -> Result<(Vec<f32>, Vec<f32>)> {
    const NAME: &str = "model.embed_tokens.weight";
    let c = merged.checkpoint.config();
    let (d, table) = (c.hidden_size, merged.checkpoint.weight(NAME)?);
    let block_type = kind.of(NAME, d, c.tie_word_embeddings);
    let mut exact = vec![0f32; ids.len() * d];
    let mut rounded = exact.clone();
    let mut bytes = Vec::new();
    for ((&id, exact), rounded) in ids.iter().zip(exact.chunks_exact_mut(d)).zip(rounded.chunks_exact_mut(d)) {
        let row = id as usize;
        if row >= table.rows() {
            let what = format!("token {id} is outside the model's vocabulary of {}", table.rows());
            return Err(Error::Invalid(format!("{what}\n  hint: tokenizer and model do not belong together")));
        }
        table.read_rows(row..row + 1, exact)?;
        bytes.clear();
        quantize(block_type, exact, &mut bytes);
        block_type.dequantize(&bytes, rounded);
    }
    Ok((exact, rounded))
}

/// What llama.cpp makes of the inputs of a quantised matrix, block by block.
fn to_8_bits(block: &mut [f32; BLOCK]) {
    let largest = block.iter().fold(0f32, |m, v| m.max(v.abs()));
    let d = largest / 127.0;
    let (inverse, d) = (if d == 0.0 { 0.0 } else { 1.0 / d }, f16::from_f32(d).to_f32());
    // A scale that f16 does not hold leaves the block as it is.
    if d.is_finite() {
        block.iter_mut().for_each(|v| *v = (*v * inverse).round() * d);
    }
}

fn uploaded<B: Backend>(backend: &B, values: &[f32]) -> Result<B::Buffer> {
    let mut buffer = backend.uninit(Dtype::F32, values.len())?;
    backend.upload(values, &mut buffer, 0)?;
    Ok(buffer)
}

fn downloaded<B: Backend>(backend: &B, buffer: &B::Buffer, len: usize) -> Result<Vec<f32>> {
    let mut values = vec![0f32; len];
    backend.download(buffer, 0, &mut values)?;
    Ok(values)
}

#[cfg(test)]
mod tests;
