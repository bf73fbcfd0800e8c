//! The CPU backend: pure Rust, no BLAS.
//!
//! Two precisions: **bf16** on processors with AVX512-BF16 or AVX2, and **f32** everywhere (the `gemm-f32` crate), which is also the
//! parity mode. What bf16 means for matrix products depends on the processor:
//!
//! | | frozen layers | LoRA factors, attention, embedding and head |
//! | --- | --- | --- |
//! | AVX512-BF16 | bf16 operands, f32 sums | the same |
//! | AVX2 | activations rounded to bf16, both operands in 16-bit fixed point, exact sums (`gemm/fixed`) | bf16 operands, f32 sums |
//!
//! Without a backward, results of the fused layers stay f32 until they are operands again, and a head multiplies by 16 bits of its weights.
//!
//! Both are faster than f32 in the frozen layers, by about two with AVX512-BF16, and take half of its memory. Work is shared over a rayon pool of the
//! backend's own, so that a number of threads can be asked for and a result repeats bit for bit with it.

mod adamw8;
mod attention;
mod buffer;
mod dora;
mod gemm;
mod linear;
mod loss;
mod masks;
mod rows;
mod simd;

use std::sync::Arc;

use cashtag_backend::dry::DryRules;
use cashtag_backend::{
    AdamW, AttentionLayout, Backend, Capabilities, CrossEntropy, Dropout, Dtype, Error, Mat, MatMut, Moments8, Result,
    Rope, WeightSource,
};

pub use buffer::CpuBuffer;
use buffer::{AnyView, AnyViewMut, Data, Memory, Rounded, ViewMut, typed, view, view_mut};
pub use linear::CpuWeight;
use linear::{Form, Scratch, Storage};
use masks::Masks;
use simd::{Bf16, Element, Isa};

/// How matrix operands are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    F32,
    Bf16,
}

impl Precision {
    /// bf16 where there is a kernel for it, f32 elsewhere.
    pub fn best() -> Self {
        if simd::isa() == Isa::Plain { Precision::F32 } else { Precision::Bf16 }
    }

    /// What this precision is on this processor, for a line of text.
    pub fn describe(self) -> &'static str {
        match (self, simd::isa()) {
            (Precision::Bf16, Isa::Avx512) => "bf16 by AVX512-BF16",
            (Precision::Bf16, Isa::Avx2) => "bf16, frozen layers in int16 by AVX2",
            (Precision::Bf16, Isa::Plain) => "bf16 by scalar code (slow: this processor has no AVX2)",
            (Precision::F32, _) => "f32",
        }
    }
}

/// See the crate's documentation.
pub struct CpuBackend {
    precision: Precision,
    pool: rayon::ThreadPool,
    memory: Arc<Memory>,
    scratch: Scratch,
    masks: Masks,
}

impl CpuBackend {
    /// A backend with `threads` threads (0: one for each core that this process may use).
    ///
    /// # Errors
    /// The threads cannot be started.
    pub fn new(precision: Precision, threads: usize) -> Result<Self> {
        let threads = if threads == 0 { std::thread::available_parallelism().map_or(1, usize::from) } else { threads };
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|i| format!("cashtag-cpu-{i}"))
            .build()
            .map_err(|e| Error::Device {
                device: "cpu".into(),
                what: format!("cannot start {threads} threads: {e}"),
            })?;
        Ok(Self { precision, pool, memory: Arc::default(), scratch: Scratch::default(), masks: Masks::default() })
    }

    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// What this device holds of its own accord, for `cashtag plan`.
    pub fn dry_rules(precision: Precision) -> DryRules {
        let bf16 = precision == Precision::Bf16;
        DryRules {
            compute: if bf16 { Dtype::Bf16 } else { Dtype::F32 },
            inference_output: Dtype::F32,
            weight: Box::new(move |out, inner, embedding| {
                linear::weight_bytes(Storage::of(bf16, embedding), out, inner)
            }),
            scratch: Box::new(move |product| linear::scratch_bytes(bf16, product)),
            lazy: true,
        }
    }

    pub fn threads(&self) -> usize {
        self.pool.current_num_threads()
    }

    fn matmul(
        &self,
        form: Form,
        alpha: f32,
        a: Mat<'_, CpuBuffer>,
        b: Mat<'_, CpuBuffer>,
        beta: f32,
        c: MatMut<'_, CpuBuffer>,
    ) -> Result<()> {
        assert!(beta == 0.0 || beta == 1.0, "beta is 0 or 1, not {beta}");
        self.pool.install(|| {
            linear::matmul(form, alpha, view(a), view(b), beta == 1.0, view_mut(c), &self.scratch);
        });
        Ok(())
    }
}

/// Views of the two operands in the same dtype, for operations that have only one.
macro_rules! same {
    ($a:ident, $b:ident => $body:expr) => {
        match ($a, $b) {
            (AnyView::F32($a), AnyViewMut::F32($b)) => $body,
            (AnyView::Bf16($a), AnyViewMut::Bf16($b)) => $body,
            _ => panic!("operands have different dtypes"),
        }
    };
}

impl Backend for CpuBackend {
    type Buffer = CpuBuffer;
    type Weight = CpuWeight;

    fn capabilities(&self) -> Capabilities {
        let (total, free) = memory_of_the_machine();
        // GFLOP/s of a thread.
        let rate = match (self.precision, simd::isa()) {
            (Precision::Bf16, Isa::Avx512) => 125.0,
            (Precision::Bf16, Isa::Avx2) => 75.0,
            (Precision::Bf16, Isa::Plain) => 2.0,
            (Precision::F32, Isa::Avx512 | Isa::Avx2) => 45.0,
            (Precision::F32, Isa::Plain) => 10.0,
        };
        Capabilities {
            device: "cpu".into(),
            description: format!("{}, {} threads, {}", processor_name(), self.threads(), self.precision.describe()),
            memory_total: total,
            memory_free: free,
            nominal_rate: rate * self.threads() as f64,
        }
    }

    fn compute_dtype(&self) -> Dtype {
        match self.precision {
            Precision::F32 => Dtype::F32,
            Precision::Bf16 => Dtype::Bf16,
        }
    }

    /// Rounding q, k, v, gate and up to bf16 after each addition is a good part of what separates bf16's probabilities from f32's.
    fn inference_output_dtype(&self) -> Dtype {
        Dtype::F32
    }

    fn run<R: Send>(&self, pass: impl FnOnce() -> R + Send) -> R {
        self.pool.install(pass)
    }

    fn zeros(&self, dtype: Dtype, len: usize) -> Result<CpuBuffer> {
        Ok(CpuBuffer::new(&self.memory, dtype, len))
    }

    fn dtype(&self, buffer: &CpuBuffer) -> Dtype {
        buffer.dtype()
    }

    fn len(&self, buffer: &CpuBuffer) -> usize {
        buffer.len()
    }

    fn upload(&self, data: &[f32], buffer: &mut CpuBuffer, offset: usize) -> Result<()> {
        let n = data.len();
        match &mut buffer.data {
            Data::F32(d) => d[offset..offset + n].copy_from_slice(data),
            Data::Bf16(d) => d[offset..offset + n].iter_mut().zip(data).for_each(|(d, &x)| *d = Bf16::from_f32(x)),
            Data::U32(_) => panic!("floats cannot be uploaded into a uint32 buffer"),
        }
        Ok(())
    }

    fn upload_u32(&self, data: &[u32], buffer: &mut CpuBuffer) -> Result<()> {
        match &mut buffer.data {
            Data::U32(d) => d[..data.len()].copy_from_slice(data),
            _ => panic!("uint32 cannot be uploaded into a float buffer"),
        }
        Ok(())
    }

    fn download(&self, buffer: &CpuBuffer, offset: usize, out: &mut [f32]) -> Result<()> {
        let n = out.len();
        match &buffer.data {
            Data::F32(d) => out.copy_from_slice(&d[offset..offset + n]),
            Data::Bf16(d) => out.iter_mut().zip(&d[offset..offset + n]).for_each(|(o, x)| *o = x.to_f32()),
            Data::U32(_) => panic!("a uint32 buffer has no floats to download"),
        }
        Ok(())
    }

    fn download_u32(&self, buffer: &CpuBuffer, out: &mut [u32]) -> Result<()> {
        out.copy_from_slice(&buffer.u32s()[..out.len()]);
        Ok(())
    }

    fn synchronize(&self) -> Result<()> {
        Ok(())
    }

    fn memory(&self) -> (u64, u64) {
        self.memory.read()
    }

    fn fill_zero(&self, buffer: &mut CpuBuffer) -> Result<()> {
        match &mut buffer.data {
            Data::F32(d) => d.fill(0.0),
            Data::Bf16(d) => d.fill(Bf16(0)),
            Data::U32(d) => d.fill(0),
        }
        Ok(())
    }

    fn copy(&self, src: Mat<'_, CpuBuffer>, dst: MatMut<'_, CpuBuffer>) -> Result<()> {
        self.pool.install(|| typed!(AnyView, view(src), s => typed!(AnyViewMut, view_mut(dst), d => rows::copy(s, d))));
        Ok(())
    }

    fn add(&self, src: Mat<'_, CpuBuffer>, dst: MatMut<'_, CpuBuffer>) -> Result<()> {
        self.pool.install(|| typed!(AnyView, view(src), s => typed!(AnyViewMut, view_mut(dst), d => rows::add(s, d))));
        Ok(())
    }

    fn gather_rows(&self, src: Mat<'_, CpuBuffer>, rows: &CpuBuffer, out: MatMut<'_, CpuBuffer>) -> Result<()> {
        let rows = rows.u32s();
        self.pool.install(
            || typed!(AnyView, view(src), s => typed!(AnyViewMut, view_mut(out), d => rows::gather(s, rows, d))),
        );
        Ok(())
    }

    fn scatter_add_rows(&self, src: Mat<'_, CpuBuffer>, rows: &CpuBuffer, dst: MatMut<'_, CpuBuffer>) -> Result<()> {
        let rows = rows.u32s();
        typed!(AnyView, view(src), s => typed!(AnyViewMut, view_mut(dst), d => rows::scatter_add(s, rows, d)));
        Ok(())
    }

    fn dropout(
        &self,
        x: Mat<'_, CpuBuffer>,
        dropout: Dropout,
        accumulate: bool,
        out: MatMut<'_, CpuBuffer>,
    ) -> Result<()> {
        let (rows, cols) = (x.rows, x.cols);
        let (x, out) = (view(x), view_mut(out));
        self.pool.install(|| {
            let mask = self.masks.get(dropout, rows, cols);
            same!(x, out => rows::dropout(x, dropout.p, &mask, accumulate, out));
        });
        Ok(())
    }

    fn embed(&self, table: &CpuWeight, ids: &CpuBuffer, out: MatMut<'_, CpuBuffer>) -> Result<()> {
        let AnyViewMut::F32(out) = view_mut(out) else { panic!("embed writes float32") };
        let ViewMut { data, rows, cols, stride } = out;
        assert_eq!(cols, table.inner);
        for (row, &id) in data.chunks_mut(stride).zip(&ids.u32s()[..rows]) {
            table.read_row(id as usize, &mut row[..cols]);
        }
        Ok(())
    }

    fn rms_norm(
        &self,
        x: Mat<'_, CpuBuffer>,
        w: &CpuBuffer,
        epsilon: f32,
        y: MatMut<'_, CpuBuffer>,
        inv_rms: &mut CpuBuffer,
    ) -> Result<()> {
        let (w, inv) = (w.f32s(), inv_rms.f32s_mut());
        self.pool.install(
            || typed!(AnyView, view(x), x => typed!(AnyViewMut, view_mut(y), y => rows::rms_norm(x, w, epsilon, y, inv))),
        );
        Ok(())
    }

    fn rms_norm_backward(
        &self,
        dy: Mat<'_, CpuBuffer>,
        x: Mat<'_, CpuBuffer>,
        w: &CpuBuffer,
        inv_rms: &CpuBuffer,
        dx: MatMut<'_, CpuBuffer>,
    ) -> Result<()> {
        let AnyViewMut::F32(dx) = view_mut(dx) else { panic!("dx is float32") };
        let (w, inv) = (w.f32s(), inv_rms.f32s());
        self.pool.install(
            || typed!(AnyView, view(dy), dy => typed!(AnyView, view(x), x => rows::rms_norm_backward(dy, x, w, inv, dx))),
        );
        Ok(())
    }

    fn weight(&self, sources: &[&dyn WeightSource]) -> Result<CpuWeight> {
        let storage = Storage::of(self.precision == Precision::Bf16, false);
        self.pool.install(|| CpuWeight::load(sources, storage, &self.memory))
    }

    fn embedding(&self, source: &dyn WeightSource) -> Result<CpuWeight> {
        let storage = Storage::of(self.precision == Precision::Bf16, true);
        self.pool.install(|| CpuWeight::load(&[source], storage, &self.memory))
    }

    fn weight_shape(&self, w: &CpuWeight) -> (usize, usize) {
        (w.out, w.inner)
    }

    fn linear(&self, x: Mat<'_, CpuBuffer>, w: &CpuWeight, accumulate: bool, y: MatMut<'_, CpuBuffer>) -> Result<()> {
        self.pool.install(|| linear::linear(view(x), w, accumulate, view_mut(y), &self.scratch));
        Ok(())
    }

    fn linear_backward(
        &self,
        dy: Mat<'_, CpuBuffer>,
        w: &CpuWeight,
        accumulate: bool,
        dx: MatMut<'_, CpuBuffer>,
    ) -> Result<()> {
        self.pool.install(|| linear::linear_backward(view(dy), w, accumulate, view_mut(dx), &self.scratch));
        Ok(())
    }

    fn matmul_nt(
        &self,
        alpha: f32,
        a: Mat<'_, CpuBuffer>,
        b: Mat<'_, CpuBuffer>,
        beta: f32,
        c: MatMut<'_, CpuBuffer>,
    ) -> Result<()> {
        self.matmul(Form::Nt, alpha, a, b, beta, c)
    }

    fn matmul_nn(
        &self,
        alpha: f32,
        a: Mat<'_, CpuBuffer>,
        b: Mat<'_, CpuBuffer>,
        beta: f32,
        c: MatMut<'_, CpuBuffer>,
    ) -> Result<()> {
        self.matmul(Form::Nn, alpha, a, b, beta, c)
    }

    fn matmul_tn(
        &self,
        alpha: f32,
        a: Mat<'_, CpuBuffer>,
        b: Mat<'_, CpuBuffer>,
        beta: f32,
        c: MatMut<'_, CpuBuffer>,
    ) -> Result<()> {
        self.matmul(Form::Tn, alpha, a, b, beta, c)
    }

    fn rope(&self, rope: Rope<'_, CpuBuffer>, inverse: bool, x: MatMut<'_, CpuBuffer>) -> Result<()> {
        let (cos, sin, positions) = (rope.cos.f32s(), rope.sin.f32s(), rope.positions.u32s());
        self.pool.install(
            || typed!(AnyViewMut, view_mut(x), x => rows::rope(x, rope.head_dim, cos, sin, positions, inverse)),
        );
        Ok(())
    }

    fn attention(
        &self,
        layout: &AttentionLayout,
        head_dim: usize,
        q: Mat<'_, CpuBuffer>,
        k: Mat<'_, CpuBuffer>,
        v: Mat<'_, CpuBuffer>,
        o: MatMut<'_, CpuBuffer>,
        lse: &mut CpuBuffer,
    ) -> Result<()> {
        let heads = attention::Heads { dim: head_dim, q: q.cols / head_dim, kv: k.cols / head_dim };
        let lse = lse.f32s_mut();
        self.pool.install(|| match (view(q), view(k), view(v), view_mut(o)) {
            (AnyView::F32(q), AnyView::F32(k), AnyView::F32(v), AnyViewMut::F32(o)) => {
                attention::forward(layout, heads, q, k, v, o, lse);
            }
            (AnyView::Bf16(q), AnyView::Bf16(k), AnyView::Bf16(v), AnyViewMut::Bf16(o)) => {
                attention::forward(layout, heads, q, k, v, o, lse);
            }
            (AnyView::F32(q), AnyView::Bf16(k), AnyView::Bf16(v), AnyViewMut::Bf16(o)) => {
                attention::forward(layout, heads, q, k, v, o, lse);
            }
            (AnyView::F32(q), AnyView::F32(k), AnyView::F32(v), AnyViewMut::Bf16(o)) => {
                let (k, v) = (Rounded::of(k), Rounded::of(v));
                attention::forward(layout, heads, q, k.view(), v.view(), o, lse);
            }
            _ => panic!("q, k, v and o have different dtypes"),
        });
        Ok(())
    }

    fn attention_backward(
        &self,
        layout: &AttentionLayout,
        head_dim: usize,
        kv_heads: usize,
        qkv: Mat<'_, CpuBuffer>,
        o: Mat<'_, CpuBuffer>,
        lse: &CpuBuffer,
        d_o: Mat<'_, CpuBuffer>,
        dqkv: MatMut<'_, CpuBuffer>,
    ) -> Result<()> {
        let heads = attention::Heads { dim: head_dim, q: o.cols / head_dim, kv: kv_heads };
        let lse = lse.f32s();
        self.pool.install(|| match (view(qkv), view(o), view(d_o), view_mut(dqkv)) {
            (AnyView::F32(qkv), AnyView::F32(o), AnyView::F32(d_o), AnyViewMut::F32(d)) => {
                attention::backward(layout, heads, qkv, o, lse, d_o, d);
            }
            (AnyView::Bf16(qkv), AnyView::Bf16(o), AnyView::Bf16(d_o), AnyViewMut::Bf16(d)) => {
                attention::backward(layout, heads, qkv, o, lse, d_o, d);
            }
            _ => panic!("qkv, o, d_o and dqkv have different dtypes"),
        });
        Ok(())
    }

    fn swiglu(&self, gate_up: Mat<'_, CpuBuffer>, h: MatMut<'_, CpuBuffer>) -> Result<()> {
        let (gate_up, h) = (view(gate_up), view_mut(h));
        self.pool.install(|| typed!(AnyView, gate_up, g => typed!(AnyViewMut, h, h => rows::swiglu(g, h))));
        Ok(())
    }

    fn swiglu_backward(
        &self,
        dh: Mat<'_, CpuBuffer>,
        gate_up: Mat<'_, CpuBuffer>,
        d_gate_up: MatMut<'_, CpuBuffer>,
    ) -> Result<()> {
        self.pool.install(|| match (view(dh), view(gate_up), view_mut(d_gate_up)) {
            (AnyView::F32(dh), AnyView::F32(g), AnyViewMut::F32(d)) => rows::swiglu_backward(dh, g, d),
            (AnyView::Bf16(dh), AnyView::Bf16(g), AnyViewMut::Bf16(d)) => rows::swiglu_backward(dh, g, d),
            _ => panic!("dh, gate_up and d_gate_up have different dtypes"),
        });
        Ok(())
    }

    fn cross_entropy(
        &self,
        logits: Mat<'_, CpuBuffer>,
        arguments: CrossEntropy<'_, CpuBuffer>,
        loss: &mut CpuBuffer,
        dlogits: Option<MatMut<'_, CpuBuffer>>,
    ) -> Result<()> {
        let AnyView::F32(logits) = view(logits) else { panic!("logits are float32") };
        let (targets, weights) = (arguments.targets.u32s(), arguments.weights.f32s());
        let row = |i: usize| loss::RowLoss {
            target: targets[i] as usize,
            weight: weights[i],
            smoothing: arguments.label_smoothing,
            gradient_scale: arguments.gradient_scale,
        };
        let loss = loss.f32s_mut();
        self.pool.install(|| match dlogits.map(view_mut) {
            None => loss::cross_entropy::<f32>(logits, row, loss, None),
            Some(AnyViewMut::F32(d)) => loss::cross_entropy(logits, row, loss, Some(d)),
            Some(AnyViewMut::Bf16(d)) => loss::cross_entropy(logits, row, loss, Some(d)),
        });
        Ok(())
    }

    fn log_probabilities(&self, logits: Mat<'_, CpuBuffer>, targets: &[Vec<u32>]) -> Result<Vec<Vec<f32>>> {
        let AnyView::F32(logits) = view(logits) else { panic!("logits are float32") };
        Ok(self.pool.install(|| loss::log_probabilities(logits, targets)))
    }

    fn sum_of_squares(&self, x: &CpuBuffer) -> Result<f64> {
        Ok(self.pool.install(|| loss::sum_of_squares(x.f32s())))
    }

    fn adamw(
        &self,
        hyper: AdamW,
        parameter: &mut CpuBuffer,
        gradient: &CpuBuffer,
        m: &mut CpuBuffer,
        v: &mut CpuBuffer,
        compute: &mut CpuBuffer,
    ) -> Result<()> {
        let (p, g, m, v) = (parameter.f32s_mut(), gradient.f32s(), m.f32s_mut(), v.f32s_mut());
        self.pool.install(|| match &mut compute.data {
            Data::F32(c) => loss::adamw(hyper, p, g, m, v, c),
            Data::Bf16(c) => loss::adamw(hyper, p, g, m, v, c),
            Data::U32(_) => panic!("the compute copy holds floats"),
        });
        Ok(())
    }

    fn adamw_8bit(
        &self,
        hyper: AdamW,
        parameter: &mut CpuBuffer,
        gradient: &CpuBuffer,
        moments: Moments8<'_, CpuBuffer>,
        compute: &mut CpuBuffer,
    ) -> Result<()> {
        let (p, g) = (parameter.f32s_mut(), gradient.f32s());
        let moments = adamw8::States::new(moments, p.len());
        self.pool.install(|| match &mut compute.data {
            Data::F32(c) => adamw8::step(hyper, p, g, moments, c),
            Data::Bf16(c) => adamw8::step(hyper, p, g, moments, c),
            Data::U32(_) => panic!("the compute copy holds floats"),
        });
        Ok(())
    }

    fn has_dora(&self) -> bool {
        true
    }

    fn scale_columns(&self, scale: &CpuBuffer, offset: usize, x: MatMut<'_, CpuBuffer>) -> Result<()> {
        let scale = &scale.f32s()[offset..offset + x.cols];
        self.pool.install(|| typed!(AnyViewMut, view_mut(x), x => dora::scale_columns(scale, x)));
        Ok(())
    }

    fn column_dots(
        &self,
        a: Mat<'_, CpuBuffer>,
        b: Mat<'_, CpuBuffer>,
        scale: &CpuBuffer,
        offset: usize,
        out: &mut CpuBuffer,
    ) -> Result<()> {
        let part = offset..offset + a.cols;
        let (scale, out) = (&scale.f32s()[part.clone()], &mut out.f32s_mut()[part]);
        self.pool.install(
            || typed!(AnyView, view(a), a => typed!(AnyView, view(b), b => dora::column_dots(a, b, scale, out))),
        );
        Ok(())
    }

    fn adapted_row_norms(
        &self,
        w: &CpuWeight,
        first: usize,
        scale: f32,
        a: Mat<'_, CpuBuffer>,
        b: Mat<'_, CpuBuffer>,
    ) -> Result<Vec<f32>> {
        Ok(self.pool.install(
            || typed!(AnyView, view(a), a => typed!(AnyView, view(b), b => dora::adapted_row_norms(w, first, scale, a, b))),
        ))
    }
}

/// Total and available memory in bytes, from /proc/meminfo; nothing elsewhere.
fn memory_of_the_machine() -> (Option<u64>, Option<u64>) {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let field = |name: &str| {
        let line = text.lines().find(|l| l.starts_with(name))?;
        Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? * 1024)
    };
    (field("MemTotal:"), field("MemAvailable:"))
}

fn processor_name() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = text.lines().find(|l| l.starts_with("model name"));
    let name = line.and_then(|l| l.split_once(':')).map(|(_, name)| name.trim().to_string());
    name.unwrap_or_else(|| std::env::consts::ARCH.to_string())
}
