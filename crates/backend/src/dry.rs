//! A device that computes nothing and counts everything: what a run would hold, found by running its own code.
//!
//! Buffers have a length and no contents, operations only note which part of their output they write. So the sizes are
//! those that the engine asks a device for, not a second list of them; `cashtag plan` runs a recipe through it before
//! anything is loaded. What a device does by itself (how it stores a weight, what it needs inside of a product) it says in
//! [`DryRules`].
//!
//! Two ways of counting: all that was asked for, as a GPU gives it, and what was written, as an operating system gives it
//! ([`DryRules::lazy`]): a page of fresh zeros costs nothing until then.

use std::sync::{Arc, Mutex, MutexGuard};

use crate::{
    AdamW, AttentionLayout, Backend, Capabilities, CrossEntropy, Dropout, Dtype, Mat, MatMut, Moments8, Result, Rope,
    WeightSource,
};

/// A product, as far as a device needs memory for it beyond its operands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Product {
    /// `x·Wᵀ` and `dy·W` of `rows` rows with a frozen `[out, inner]`.
    Linear {
        rows: usize,
        out: usize,
        inner: usize,
    },
    LinearBackward {
        rows: usize,
        out: usize,
        inner: usize,
    },
    /// `[m, k]` times `[k, n]`; `transposed_a` for aᵀ·b.
    Matmul {
        m: usize,
        n: usize,
        k: usize,
        transposed_a: bool,
    },
    /// [`Backend::adapted_row_norms`] of `rows` rows of `inner` columns.
    RowNorms {
        rows: usize,
        inner: usize,
    },
}

type WeightRule = Box<dyn Fn(usize, usize, bool) -> u64 + Send + Sync>;
type ScratchRule = Box<dyn Fn(Product) -> u64 + Send + Sync>;

/// What a device does by itself.
pub struct DryRules {
    pub compute: Dtype,
    /// [`Backend::inference_output_dtype`].
    pub inference_output: Dtype,
    /// Bytes of a frozen weight: (out, in, whether it is an embedding or a head).
    pub weight: WeightRule,
    /// Bytes that a product needs and the device keeps for the next one.
    pub scratch: ScratchRule,
    /// Buffers take memory when they are written, not when they are made.
    pub lazy: bool,
}

/// Bytes by what they are for.
pub type Usage = Vec<(&'static str, u64)>;

#[derive(Default)]
struct Ledger {
    /// What is allocated from now on is for this.
    label: &'static str,
    now: Usage,
    /// The moment at which most was held.
    peak: Usage,
    peak_total: u64,
    scratch: u64,
}

const SCRATCH: &str = "scratch of products";

impl Ledger {
    fn change(&mut self, label: &'static str, by: i64) {
        match self.now.iter_mut().find(|(l, _)| *l == label) {
            Some((_, bytes)) => *bytes = bytes.saturating_add_signed(by),
            None => self.now.push((label, by.max(0) as u64)),
        }
        let total = self.now.iter().map(|(_, b)| b).sum();
        if total > self.peak_total {
            (self.peak_total, self.peak) = (total, self.now.clone());
        }
    }
}

/// See the module's documentation.
pub struct DryBackend {
    rules: DryRules,
    ledger: Arc<Mutex<Ledger>>,
}

/// Memory of a [`DryBackend`].
pub struct DryBuffer {
    dtype: Dtype,
    len: usize,
    /// Elements that are counted.
    counted: usize,
    label: &'static str,
    ledger: Arc<Mutex<Ledger>>,
}

/// A weight of a [`DryBackend`].
pub struct DryWeight {
    out: usize,
    inner: usize,
    bytes: u64,
    label: &'static str,
    ledger: Arc<Mutex<Ledger>>,
}

fn lock(ledger: &Mutex<Ledger>) -> MutexGuard<'_, Ledger> {
    ledger.lock().unwrap_or_else(|e| e.into_inner())
}

impl DryBuffer {
    /// The first `len` elements are written.
    fn touch(&mut self, len: usize) {
        assert!(len <= self.len, "view up to {len} of {} elements", self.len);
        if len > self.counted {
            lock(&self.ledger).change(self.label, ((len - self.counted) * self.dtype.size()) as i64);
            self.counted = len;
        }
    }
}

impl Drop for DryBuffer {
    fn drop(&mut self) {
        lock(&self.ledger).change(self.label, -((self.counted * self.dtype.size()) as i64));
    }
}

impl Drop for DryWeight {
    fn drop(&mut self) {
        lock(&self.ledger).change(self.label, -(self.bytes as i64));
    }
}

impl DryBackend {
    pub fn new(rules: DryRules) -> Self {
        Self { rules, ledger: Arc::default() }
    }

    /// What is made from now on is for `label`.
    pub fn label(&self, label: &'static str) {
        lock(&self.ledger).label = label;
    }

    /// Bytes held now.
    pub fn now(&self) -> Usage {
        lock(&self.ledger).now.clone()
    }

    /// Bytes held when most was held.
    pub fn peak(&self) -> Usage {
        lock(&self.ledger).peak.clone()
    }

    fn product(&self, product: Product) {
        let bytes = (self.rules.scratch)(product);
        let mut ledger = lock(&self.ledger);
        if bytes > ledger.scratch {
            let more = bytes - ledger.scratch;
            ledger.scratch = bytes;
            ledger.change(SCRATCH, more as i64);
        }
    }

    fn hold(&self, sources: &[&dyn WeightSource], embedding: bool) -> DryWeight {
        let inner = sources.first().map_or(0, |s| s.cols());
        let out = sources.iter().map(|s| s.rows()).sum();
        let bytes = (self.rules.weight)(out, inner, embedding);
        let mut ledger = lock(&self.ledger);
        let label = ledger.label;
        ledger.change(label, bytes as i64);
        DryWeight { out, inner, bytes, label, ledger: Arc::clone(&self.ledger) }
    }
}

fn wrote(m: MatMut<'_, DryBuffer>) {
    let end = m.end();
    m.buffer.touch(end);
}

impl Backend for DryBackend {
    type Buffer = DryBuffer;
    type Weight = DryWeight;

    fn capabilities(&self) -> Capabilities {
        let description = "counts and computes nothing".into();
        let device = "none".into();
        Capabilities { device, description, memory_total: None, memory_free: None, nominal_rate: 0.0 }
    }

    fn compute_dtype(&self) -> Dtype {
        self.rules.compute
    }

    fn inference_output_dtype(&self) -> Dtype {
        self.rules.inference_output
    }

    fn zeros(&self, dtype: Dtype, len: usize) -> Result<DryBuffer> {
        let label = lock(&self.ledger).label;
        let mut buffer = DryBuffer { dtype, len, counted: 0, label, ledger: Arc::clone(&self.ledger) };
        if !self.rules.lazy {
            buffer.touch(len);
        }
        Ok(buffer)
    }

    fn dtype(&self, buffer: &DryBuffer) -> Dtype {
        buffer.dtype
    }

    fn len(&self, buffer: &DryBuffer) -> usize {
        buffer.len
    }

    fn upload(&self, data: &[f32], buffer: &mut DryBuffer, offset: usize) -> Result<()> {
        buffer.touch(offset + data.len());
        Ok(())
    }

    fn upload_u32(&self, data: &[u32], buffer: &mut DryBuffer) -> Result<()> {
        buffer.touch(data.len());
        Ok(())
    }

    fn download(&self, _: &DryBuffer, _: usize, out: &mut [f32]) -> Result<()> {
        out.fill(0.0);
        Ok(())
    }

    fn download_u32(&self, _: &DryBuffer, out: &mut [u32]) -> Result<()> {
        out.fill(0);
        Ok(())
    }

    fn synchronize(&self) -> Result<()> {
        Ok(())
    }

    fn memory(&self) -> (u64, u64) {
        let ledger = lock(&self.ledger);
        (ledger.now.iter().map(|(_, b)| b).sum(), ledger.peak_total)
    }

    fn fill_zero(&self, buffer: &mut DryBuffer) -> Result<()> {
        buffer.touch(buffer.len);
        Ok(())
    }

    fn copy(&self, _: Mat<'_, DryBuffer>, dst: MatMut<'_, DryBuffer>) -> Result<()> {
        wrote(dst);
        Ok(())
    }

    fn add(&self, _: Mat<'_, DryBuffer>, dst: MatMut<'_, DryBuffer>) -> Result<()> {
        wrote(dst);
        Ok(())
    }

    fn gather_rows(&self, _: Mat<'_, DryBuffer>, _: &DryBuffer, out: MatMut<'_, DryBuffer>) -> Result<()> {
        wrote(out);
        Ok(())
    }

    fn scatter_add_rows(&self, _: Mat<'_, DryBuffer>, _: &DryBuffer, dst: MatMut<'_, DryBuffer>) -> Result<()> {
        wrote(dst);
        Ok(())
    }

    fn dropout(&self, _: Mat<'_, DryBuffer>, _: Dropout, _: bool, out: MatMut<'_, DryBuffer>) -> Result<()> {
        wrote(out);
        Ok(())
    }

    fn embed(&self, _: &DryWeight, _: &DryBuffer, out: MatMut<'_, DryBuffer>) -> Result<()> {
        wrote(out);
        Ok(())
    }

    fn rms_norm(
        &self,
        x: Mat<'_, DryBuffer>,
        _: &DryBuffer,
        _: f32,
        y: MatMut<'_, DryBuffer>,
        inv_rms: &mut DryBuffer,
    ) -> Result<()> {
        inv_rms.touch(x.rows);
        wrote(y);
        Ok(())
    }

    fn rms_norm_backward(
        &self,
        _: Mat<'_, DryBuffer>,
        _: Mat<'_, DryBuffer>,
        _: &DryBuffer,
        _: &DryBuffer,
        dx: MatMut<'_, DryBuffer>,
    ) -> Result<()> {
        wrote(dx);
        Ok(())
    }

    fn weight(&self, sources: &[&dyn WeightSource]) -> Result<DryWeight> {
        Ok(self.hold(sources, false))
    }

    fn embedding(&self, source: &dyn WeightSource) -> Result<DryWeight> {
        Ok(self.hold(&[source], true))
    }

    fn weight_shape(&self, w: &DryWeight) -> (usize, usize) {
        (w.out, w.inner)
    }

    fn linear(&self, x: Mat<'_, DryBuffer>, w: &DryWeight, _: bool, y: MatMut<'_, DryBuffer>) -> Result<()> {
        self.product(Product::Linear { rows: x.rows, out: w.out, inner: w.inner });
        wrote(y);
        Ok(())
    }

    fn linear_backward(&self, dy: Mat<'_, DryBuffer>, w: &DryWeight, _: bool, dx: MatMut<'_, DryBuffer>) -> Result<()> {
        self.product(Product::LinearBackward { rows: dy.rows, out: w.out, inner: w.inner });
        wrote(dx);
        Ok(())
    }

    fn matmul_nt(
        &self,
        _: f32,
        a: Mat<'_, DryBuffer>,
        b: Mat<'_, DryBuffer>,
        _: f32,
        c: MatMut<'_, DryBuffer>,
    ) -> Result<()> {
        self.product(Product::Matmul { m: a.rows, n: b.rows, k: a.cols, transposed_a: false });
        wrote(c);
        Ok(())
    }

    fn matmul_nn(
        &self,
        _: f32,
        a: Mat<'_, DryBuffer>,
        b: Mat<'_, DryBuffer>,
        _: f32,
        c: MatMut<'_, DryBuffer>,
    ) -> Result<()> {
        self.product(Product::Matmul { m: a.rows, n: b.cols, k: a.cols, transposed_a: false });
        wrote(c);
        Ok(())
    }

    fn matmul_tn(
        &self,
        _: f32,
        a: Mat<'_, DryBuffer>,
        b: Mat<'_, DryBuffer>,
        _: f32,
        c: MatMut<'_, DryBuffer>,
    ) -> Result<()> {
        self.product(Product::Matmul { m: a.cols, n: b.cols, k: a.rows, transposed_a: true });
        wrote(c);
        Ok(())
    }

    fn rope(&self, _: Rope<'_, DryBuffer>, _: bool, _: MatMut<'_, DryBuffer>) -> Result<()> {
        Ok(())
    }

    fn attention(
        &self,
        layout: &AttentionLayout,
        head_dim: usize,
        q: Mat<'_, DryBuffer>,
        _: Mat<'_, DryBuffer>,
        _: Mat<'_, DryBuffer>,
        o: MatMut<'_, DryBuffer>,
        lse: &mut DryBuffer,
    ) -> Result<()> {
        lse.touch(layout.q_rows() * (q.cols / head_dim));
        wrote(o);
        Ok(())
    }

    fn attention_backward(
        &self,
        _: &AttentionLayout,
        _: usize,
        _: usize,
        _: Mat<'_, DryBuffer>,
        _: Mat<'_, DryBuffer>,
        _: &DryBuffer,
        _: Mat<'_, DryBuffer>,
        dqkv: MatMut<'_, DryBuffer>,
    ) -> Result<()> {
        wrote(dqkv);
        Ok(())
    }

    fn swiglu(&self, _: Mat<'_, DryBuffer>, h: MatMut<'_, DryBuffer>) -> Result<()> {
        wrote(h);
        Ok(())
    }

    fn swiglu_backward(
        &self,
        _: Mat<'_, DryBuffer>,
        _: Mat<'_, DryBuffer>,
        d_gate_up: MatMut<'_, DryBuffer>,
    ) -> Result<()> {
        wrote(d_gate_up);
        Ok(())
    }

    fn cross_entropy(
        &self,
        logits: Mat<'_, DryBuffer>,
        _: CrossEntropy<'_, DryBuffer>,
        loss: &mut DryBuffer,
        dlogits: Option<MatMut<'_, DryBuffer>>,
    ) -> Result<()> {
        loss.touch(logits.rows);
        if let Some(d) = dlogits {
            wrote(d);
        }
        Ok(())
    }

    fn sum_of_squares(&self, _: &DryBuffer) -> Result<f64> {
        Ok(1.0)
    }

    fn adamw(
        &self,
        _: AdamW,
        parameter: &mut DryBuffer,
        gradient: &DryBuffer,
        m: &mut DryBuffer,
        v: &mut DryBuffer,
        compute: &mut DryBuffer,
    ) -> Result<()> {
        for buffer in [parameter, m, v, compute] {
            buffer.touch(gradient.len);
        }
        Ok(())
    }

    fn adamw_8bit(
        &self,
        _: AdamW,
        parameter: &mut DryBuffer,
        gradient: &DryBuffer,
        moments: Moments8<'_, DryBuffer>,
        compute: &mut DryBuffer,
    ) -> Result<()> {
        parameter.touch(gradient.len);
        compute.touch(gradient.len);
        for buffer in [moments.m, moments.v, moments.absmax, moments.m32, moments.v32] {
            buffer.touch(buffer.len);
        }
        Ok(())
    }

    fn has_dora(&self) -> bool {
        true
    }

    fn scale_columns(&self, _: &DryBuffer, _: usize, _: MatMut<'_, DryBuffer>) -> Result<()> {
        Ok(())
    }

    fn column_dots(
        &self,
        a: Mat<'_, DryBuffer>,
        _: Mat<'_, DryBuffer>,
        _: &DryBuffer,
        offset: usize,
        out: &mut DryBuffer,
    ) -> Result<()> {
        out.touch(offset + a.cols);
        Ok(())
    }

    fn adapted_row_norms(
        &self,
        w: &DryWeight,
        _: usize,
        _: f32,
        _: Mat<'_, DryBuffer>,
        b: Mat<'_, DryBuffer>,
    ) -> Result<Vec<f32>> {
        self.product(Product::RowNorms { rows: b.rows, inner: w.inner });
        Ok(vec![1.0; b.rows])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn backend(lazy: bool) -> DryBackend {
        DryBackend::new(DryRules {
            compute: Dtype::Bf16,
            inference_output: Dtype::F32,
            weight: Box::new(|out, inner, _| (2 * out * inner) as u64),
            scratch: Box::new(|product| match product {
                Product::Linear { rows, .. } => rows as u64,
                _ => 0,
            }),
            lazy,
        })
    }

    #[test]
    fn written_or_asked_for() {
        for (lazy, expected) in [(true, 4 * 10), (false, 4 * 100)] {
            let b = backend(lazy);
            b.label("a");
            let mut x = b.zeros(Dtype::F32, 100).unwrap();
            b.copy(Mat::new(&b.zeros(Dtype::F32, 0).unwrap(), 0, 0), MatMut::new(&mut x, 2, 5)).unwrap();
            b.label("b");
            assert_eq!(b.now(), [("a", expected)]);
            drop(x);
            assert_eq!((b.now(), b.peak(), b.memory()), (vec![("a", 0)], vec![("a", expected)], (0, expected)));
        }
    }

    #[test]
    #[should_panic(expected = "view up to 101 of 100 elements")]
    fn writing_past_the_end_is_seen() {
        let b = backend(true);
        let mut x = b.zeros(Dtype::F32, 100).unwrap();
        b.upload(&[0.0], &mut x, 100).unwrap();
    }
}
