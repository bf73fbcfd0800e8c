//! What the benchmarks share: Llama-2-7B's shapes, random weights and activations, and the batch of the target.
#![allow(dead_code)] // Each example uses a part.

use cashtag_backend::{AttentionLayout, Backend, Dtype, Mat, MatMut, RawWeight, WeightSource};
use cashtag_backend_cuda::{CudaBackend, CudaBuffer};

pub(crate) const D: usize = 4096;
pub(crate) const F: usize = 11008;
pub(crate) const HEADS: usize = 32;
pub(crate) const HEAD_DIM: usize = 128;
pub(crate) const LAYERS: usize = 32;
pub(crate) const VOCAB: usize = 32_000;
pub(crate) const RANK: usize = 64;
pub(crate) const PREFIX: usize = 105;
pub(crate) const EXAMPLES: usize = 32;

pub(crate) struct Source {
    rows: usize,
    cols: usize,
    codes: Vec<u8>,
    absmax: Vec<f32>,
}

impl WeightSource for Source {
    fn name(&self) -> &str {
        "random"
    }
    fn rows(&self) -> usize {
        self.rows
    }
    fn cols(&self) -> usize {
        self.cols
    }
    fn read_rows(&self, _: std::ops::Range<usize>, out: &mut [f32]) -> cashtag_backend::Result<()> {
        out.fill(0.0);
        Ok(())
    }
    fn raw(&self) -> Option<RawWeight<'_>> {
        Some(RawWeight::Nf4 { codes: &self.codes, absmax: &self.absmax })
    }
}

/// xorshift64*
pub(crate) struct Random(pub u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }
    /// About normal values, standard deviation 1: what the numbers are decides how much power the products draw, and so their speed.
    pub(crate) fn buffer(
        &mut self,
        gpu: &CudaBackend,
        dtype: Dtype,
        len: usize,
    ) -> cashtag_backend::Result<CudaBuffer> {
        let mut b = gpu.uninit(dtype, len)?;
        let part: Vec<f32> = (0..(1 << 20).min(len))
            .map(|_| {
                let bits = self.next();
                let sum: u64 = (0..4).map(|i| bits >> (16 * i) & 0xffff).sum();
                (sum as f32 / 65536.0 - 2.0) * 1.732
            })
            .collect();
        for offset in (0..len).step_by(part.len().max(1)) {
            gpu.upload(&part[..part.len().min(len - offset)], &mut b, offset)?;
        }
        Ok(b)
    }

    pub(crate) fn weight(&mut self, rows: usize, cols: usize) -> Source {
        let codes = (0..rows * cols / 16).flat_map(|_| self.next().to_le_bytes()).collect();
        Source { rows, cols, codes, absmax: vec![0.03; rows * cols / 64] }
    }
}

/// A shared prefix and 32 examples of different lengths that make `n` rows.
pub(crate) fn packed(n: usize) -> AttentionLayout {
    let own = n - PREFIX;
    let mut lens: Vec<usize> = (0..EXAMPLES).map(|i| own / EXAMPLES - 16 + i).collect();
    let rest = own - lens.iter().sum::<usize>();
    lens[0] += rest;
    AttentionLayout::packed(PREFIX, &[PREFIX; EXAMPLES], &lens)
}

pub(crate) fn view(b: &CudaBuffer, rows: usize, cols: usize) -> Mat<'_, CudaBuffer> {
    Mat::new(b, rows, cols)
}

pub(crate) fn view_mut(b: &mut CudaBuffer, rows: usize, cols: usize) -> MatMut<'_, CudaBuffer> {
    MatMut::new(b, rows, cols)
}

/// A site of LoRA: one frozen weight and the matrices of `out` rows each that are stacked in it.
pub(crate) struct Site {
    pub(crate) name: &'static str,
    pub(crate) count: usize,
    pub(crate) out: usize,
    pub(crate) inner: usize,
    /// Whether the result is added to the f32 residual stream.
    pub(crate) residual: bool,
}

pub(crate) const SITES: [Site; 4] = [
    Site { name: "qkv", count: 3, out: D, inner: D, residual: false },
    Site { name: "o", count: 1, out: D, inner: D, residual: true },
    Site { name: "gate_up", count: 2, out: F, inner: D, residual: false },
    Site { name: "down", count: 1, out: D, inner: F, residual: true },
];
