//! The CUDA backend: one NVIDIA GPU from compute capability 7.5 on.
//!
//! Nothing of CUDA is needed to build. The driver, the compiler (NVRTC) and the matrix library (cuBLASLt) are looked for when a backend is
//! made ([`probe`] says what was found and how to get what is missing), and our kernels, which include no toolkit header, are
//! compiled for the card at first use and kept on disk.
//!
//! Invariants:
//!
//! - Everything runs on one stream in the order of the calls. Only [`download`](Backend::download),
//!   [`synchronize`](Backend::synchronize), [`sum_of_squares`](Backend::sum_of_squares) and
//!   [`adapted_row_norms`](Backend::adapted_row_norms) wait for the card.
//! - No atomics: every sum has a fixed order, so the same inputs give the same bits on the same card.
//! - Compute dtypes bf16 (from sm_80), f16 and f32. Products sum in f32; norms, softmax and losses are f32.

mod attention;
mod collective;
mod dora;
mod driver;
mod fused;
mod gemm;
mod graph;
mod kernels;
mod libraries;
mod linear;
mod lora;
mod memory;
mod probe;
mod profile;
mod rows;
mod timer;
mod weights;

use std::path::PathBuf;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex};

use cashtag_backend::dry::DryRules;
use cashtag_backend::{
    AdamW, AttentionLayout, Backend, Capabilities, CrossEntropy, Dropout, Dtype, KernelTime, Mat, MatMut, Moments8,
    Result, Rope, WeightSource,
};
use half::{bf16, f16};

use crate::attention::Layouts;
use crate::collective::Collective;
use crate::driver::Device;
use crate::gemm::{Form, Gemm};
use crate::kernels::Kernels;
use crate::memory::{Allocator, Block, Count, Scratch, Staging, Transfers, View};
use crate::rows::u32s;

pub use graph::Graph;
pub use kernels::cache_folder;
pub use libraries::Library;
pub use memory::CudaBuffer;
pub use probe::{Gpu, Probe, probe};
pub use timer::Timer;
pub use weights::CudaWeight;

/// How quantised weights stay in memory. Results do not depend on it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Resident {
    /// Dequantised as long as the weights so held fit in 60 % of the memory that was free at the start, NF4 from there on.
    #[default]
    Auto,
    /// Codes; dequantised into a workspace for each product.
    Nf4,
    /// The dequantised values in the compute dtype.
    Bf16,
}

/// Choices that hold for the life of a backend.
#[derive(Clone, Debug)]
pub struct Options {
    /// T: bf16, f16 or f32.
    pub compute: Dtype,
    /// Quantise the weights that [`Backend::weight`] loads to NF4 (QLoRA); without it they keep their values, rounded to `compute`.
    /// Embeddings are never quantised.
    pub quantize: bool,
    /// Quantise the absmax values of NF4 too (`bnb_4bit_use_double_quant`).
    pub double_quant: bool,
    pub resident: Resident,
    /// Rank of the adapters that will be trained or served: leaves room for their s·B behind the dequantised weights, `lora_r` columns for each
    /// matrix of a stack, so that [`CudaBackend::linear_lora`] is one product. 0: none.
    pub lora_r: usize,
    /// Where compiled kernels are kept; `None`: nowhere.
    pub kernel_cache: Option<PathBuf>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            compute: Dtype::Bf16,
            quantize: true,
            double_quant: false,
            resident: Resident::Auto,
            lora_r: 0,
            kernel_cache: cache_folder(),
        }
    }
}

/// Share of the free memory that `Resident::Auto` gives to dequantised weights: the rest is for activations, adapters and caches.
const WIDE_SHARE: f64 = 0.6;

/// What the operations need; they are written in the modules of their families. Fields that hold device memory or modules come before the
/// device, which is released last.
pub(crate) struct Core {
    collective: Collective,
    gemm: Gemm,
    kernels: Kernels,
    layouts: Layouts,
    transfers: Transfers,
    load_staging: Mutex<Option<(Staging, usize)>>,
    /// Dequantised weights.
    workspace: Scratch,
    /// Partial sums of kernels.
    partials: Scratch,
    map: Mutex<Option<Arc<Block>>>,
    weight_bytes: AtomicU64,
    wide_budget: u64,
    compute: Dtype,
    options: Options,
    allocator: Allocator,
    device: Arc<Device>,
}

/// See the crate's documentation.
pub struct CudaBackend {
    core: Core,
}

impl CudaBackend {
    /// Opens GPU number `ordinal`.
    ///
    /// # Errors
    /// No driver, no such card, a library is missing (with how to get it), or the card cannot compute in `options.compute`.
    pub fn new(ordinal: u32, options: Options) -> Result<Self> {
        let device = Device::open(ordinal)?;
        let compute = options.compute;
        match compute {
            Dtype::U32 => {
                return Err(device.error("uint32 is no dtype to compute in\n  hint: bfloat16, float16 or float32"));
            }
            Dtype::Bf16 if device.facts.sm < 80 => {
                let what =
                    format!("{} has no bfloat16 matrix instructions\n  hint: compute in float16", device.facts.name);
                return Err(device.error(what));
            }
            _ => {}
        }
        libraries::nvrtc().map_err(|e| device.error(e))?;
        let allocator = Allocator { device: Arc::clone(&device), count: Arc::new(Count::default()) };
        let (free, _) = device.memory()?;
        Ok(Self {
            core: Core {
                collective: Collective::default(),
                gemm: Gemm::new(&allocator)?,
                kernels: Kernels::new(&device, options.kernel_cache.clone()),
                layouts: Layouts::default(),
                transfers: Transfers::new(&device),
                load_staging: Mutex::default(),
                workspace: Scratch::default(),
                partials: Scratch::default(),
                map: Mutex::default(),
                weight_bytes: AtomicU64::new(0),
                wide_budget: (free as f64 * WIDE_SHARE) as u64,
                compute,
                options,
                allocator,
                device,
            },
        })
    }

    /// What a card with `free` bytes of free memory holds of its own accord, for `cashtag plan`; the card need not be here.
    pub fn dry_rules(options: &Options, free: u64) -> DryRules {
        let budget = weights::Budget::new(options, (free as f64 * WIDE_SHARE) as u64);
        let (weight, scratch) = (Arc::clone(&budget), budget);
        DryRules {
            compute: options.compute,
            inference_output: options.compute,
            weight: Box::new(move |out, inner, embedding| weight.hold(out, inner, embedding)),
            scratch: Box::new(move |product| scratch.scratch(product)),
            lazy: false,
        }
    }

    pub fn options(&self) -> &Options {
        &self.core.options
    }

    /// Codes (two a byte, the first element in the high nibble) and absmax values of a weight that is held as NF4.
    ///
    /// # Errors
    /// The device fails.
    pub fn read_nf4(&self, weight: &CudaWeight) -> Result<Option<(Vec<u8>, Vec<f32>)>> {
        self.core.read_nf4(weight)
    }

    /// Records what `work` queues, without running it. Kernels, layouts and products must have been used once before, with the same
    /// shapes; uploads, downloads and waits cannot be recorded.
    ///
    /// # Errors
    /// The work fails, or cannot be recorded.
    pub fn capture(&self, work: impl FnOnce() -> Result<()>) -> Result<Graph> {
        Graph::capture(&self.core.device, work)
    }

    /// A stop watch on the device's stream.
    ///
    /// # Errors
    /// The device fails.
    pub fn timer(&self) -> Result<Timer> {
        Timer::new(&self.core.device)
    }
}

fn of(m: Mat<'_, CudaBuffer>) -> View {
    View::new(m)
}

fn of_mut(m: &MatMut<'_, CudaBuffer>) -> View {
    View::of_mut(m)
}

impl Backend for CudaBackend {
    type Buffer = CudaBuffer;
    type Weight = CudaWeight;

    fn capabilities(&self) -> Capabilities {
        let device = &self.core.device;
        let memory = device.memory().ok();
        let sm = device.facts.sm;
        Capabilities {
            device: device.name(),
            description: format!(
                "{}, compute capability {}.{}, {} multiprocessors, {}",
                device.facts.name,
                sm / 10,
                sm % 10,
                device.facts.multiprocessors,
                self.core.compute.name()
            ),
            memory_total: memory.map(|m| m.1),
            memory_free: memory.map(|m| m.0),
            nominal_rate: f64::from(device.facts.multiprocessors) * 400.0,
        }
    }

    fn compute_dtype(&self) -> Dtype {
        self.core.compute
    }

    fn zeros(&self, dtype: Dtype, len: usize) -> Result<CudaBuffer> {
        let buffer = self.core.allocator.buffer(dtype, len)?;
        buffer.block.fill_zero()?;
        Ok(buffer)
    }

    fn uninit(&self, dtype: Dtype, len: usize) -> Result<CudaBuffer> {
        self.core.allocator.buffer(dtype, len)
    }

    fn dtype(&self, buffer: &CudaBuffer) -> Dtype {
        buffer.dtype
    }

    fn len(&self, buffer: &CudaBuffer) -> usize {
        buffer.len
    }

    fn upload(&self, data: &[f32], buffer: &mut CudaBuffer, offset: usize) -> Result<()> {
        assert!(offset + data.len() <= buffer.len, "upload up to {} of {} elements", offset + data.len(), buffer.len);
        let size = buffer.dtype.size();
        let to = buffer.ptr() + (offset * size) as u64;
        let dtype = buffer.dtype;
        self.core.transfers.upload(to, data.len() * size, |start, part| {
            let data = &data[start / size..];
            match dtype {
                Dtype::F32 => part.chunks_exact_mut(4).zip(data).for_each(|(b, x)| b.copy_from_slice(&x.to_le_bytes())),
                Dtype::Bf16 => part
                    .chunks_exact_mut(2)
                    .zip(data)
                    .for_each(|(b, &x)| b.copy_from_slice(&bf16::from_f32(x).to_le_bytes())),
                Dtype::F16 => part
                    .chunks_exact_mut(2)
                    .zip(data)
                    .for_each(|(b, &x)| b.copy_from_slice(&f16::from_f32(x).to_le_bytes())),
                Dtype::U32 => panic!("floats cannot be uploaded into a uint32 buffer"),
            }
        })
    }

    fn upload_u32(&self, data: &[u32], buffer: &mut CudaBuffer) -> Result<()> {
        let to = u32s(buffer, data.len(), "the target of upload_u32");
        self.core.transfers.upload(to, data.len() * 4, |start, part| {
            for (b, x) in part.chunks_exact_mut(4).zip(&data[start / 4..]) {
                b.copy_from_slice(&x.to_le_bytes());
            }
        })
    }

    fn download(&self, buffer: &CudaBuffer, offset: usize, out: &mut [f32]) -> Result<()> {
        assert!(offset + out.len() <= buffer.len, "download up to {} of {} elements", offset + out.len(), buffer.len);
        let size = buffer.dtype.size();
        let from = buffer.ptr() + (offset * size) as u64;
        let dtype = buffer.dtype;
        self.core.transfers.download(from, out.len() * size, |start, part| {
            let out = &mut out[start / size..];
            match dtype {
                Dtype::F32 => {
                    part.as_chunks::<4>().0.iter().zip(out).for_each(|(&b, o)| *o = f32::from_le_bytes(b));
                }
                Dtype::Bf16 => {
                    part.as_chunks::<2>().0.iter().zip(out).for_each(|(&b, o)| *o = bf16::from_le_bytes(b).to_f32());
                }
                Dtype::F16 => {
                    part.as_chunks::<2>().0.iter().zip(out).for_each(|(&b, o)| *o = f16::from_le_bytes(b).to_f32());
                }
                Dtype::U32 => panic!("a uint32 buffer has no floats to download"),
            }
        })
    }

    fn download_u32(&self, buffer: &CudaBuffer, out: &mut [u32]) -> Result<()> {
        let from = u32s(buffer, out.len(), "the source of download_u32");
        self.core.transfers.download(from, out.len() * 4, |start, part| {
            part.as_chunks::<4>().0.iter().zip(&mut out[start / 4..]).for_each(|(&b, o)| *o = u32::from_le_bytes(b));
        })
    }

    fn synchronize(&self) -> Result<()> {
        self.core.device.synchronize()
    }

    fn collective_id(&self) -> Result<Option<Vec<u8>>> {
        self.core.collective.id(&self.core.device)
    }

    fn join_collective(&self, id: &[u8], rank: usize, size: usize) -> Result<()> {
        self.core.collective.join(&self.core.device, id, rank, size)
    }

    fn all_reduce(&self, x: &mut CudaBuffer) -> Result<()> {
        self.core.collective.all_reduce(&self.core.device, x)
    }

    fn memory(&self) -> (u64, u64) {
        self.core.allocator.count.read()
    }

    fn start_profile(&self) -> bool {
        self.core.device.profile.start();
        true
    }

    fn stop_profile(&self) -> Result<Vec<KernelTime>> {
        self.core.device.profile.stop(&self.core.device)
    }

    fn fill_zero(&self, buffer: &mut CudaBuffer) -> Result<()> {
        buffer.block.fill_zero()
    }

    fn copy(&self, src: Mat<'_, CudaBuffer>, dst: MatMut<'_, CudaBuffer>) -> Result<()> {
        self.core.copy(of(src), of_mut(&dst))
    }

    fn add(&self, src: Mat<'_, CudaBuffer>, dst: MatMut<'_, CudaBuffer>) -> Result<()> {
        self.core.add(of(src), of_mut(&dst))
    }

    fn gather_rows(&self, src: Mat<'_, CudaBuffer>, rows: &CudaBuffer, out: MatMut<'_, CudaBuffer>) -> Result<()> {
        self.core.gather(of(src), u32s(rows, out.rows, "rows"), of_mut(&out))
    }

    fn scatter_add_rows(&self, src: Mat<'_, CudaBuffer>, rows: &CudaBuffer, dst: MatMut<'_, CudaBuffer>) -> Result<()> {
        self.core.scatter_add(of(src), u32s(rows, src.rows, "rows"), of_mut(&dst))
    }

    fn dropout(
        &self,
        x: Mat<'_, CudaBuffer>,
        dropout: Dropout,
        accumulate: bool,
        out: MatMut<'_, CudaBuffer>,
    ) -> Result<()> {
        self.core.dropout(of(x), dropout, accumulate, of_mut(&out))
    }

    fn embed(&self, table: &CudaWeight, ids: &CudaBuffer, out: MatMut<'_, CudaBuffer>) -> Result<()> {
        self.core.embed(table, ids, of_mut(&out))
    }

    fn rms_norm(
        &self,
        x: Mat<'_, CudaBuffer>,
        w: &CudaBuffer,
        epsilon: f32,
        y: MatMut<'_, CudaBuffer>,
        inv_rms: &mut CudaBuffer,
    ) -> Result<()> {
        self.core.rms_norm(of(x), w, epsilon, Some(of_mut(&y)), None, inv_rms)
    }

    fn rms_norm_backward(
        &self,
        dy: Mat<'_, CudaBuffer>,
        x: Mat<'_, CudaBuffer>,
        w: &CudaBuffer,
        inv_rms: &CudaBuffer,
        dx: MatMut<'_, CudaBuffer>,
    ) -> Result<()> {
        self.core.rms_norm_backward(of(dy), of(x), w, inv_rms, of_mut(&dx), None)
    }

    fn weight(&self, sources: &[&dyn WeightSource]) -> Result<CudaWeight> {
        self.core.load(sources, self.core.options.quantize, self.core.options.lora_r * sources.len())
    }

    fn embedding(&self, source: &dyn WeightSource) -> Result<CudaWeight> {
        self.core.load(&[source], false, 0)
    }

    fn weight_shape(&self, w: &CudaWeight) -> (usize, usize) {
        (w.out, w.inner)
    }

    fn linear(
        &self,
        x: Mat<'_, CudaBuffer>,
        w: &CudaWeight,
        accumulate: bool,
        y: MatMut<'_, CudaBuffer>,
    ) -> Result<()> {
        self.core.linear(of(x), w, accumulate, of_mut(&y))
    }

    fn linear_backward(
        &self,
        dy: Mat<'_, CudaBuffer>,
        w: &CudaWeight,
        accumulate: bool,
        dx: MatMut<'_, CudaBuffer>,
    ) -> Result<()> {
        self.core.linear_backward(of(dy), w, accumulate, of_mut(&dx))
    }

    fn matmul_nt(
        &self,
        alpha: f32,
        a: Mat<'_, CudaBuffer>,
        b: Mat<'_, CudaBuffer>,
        beta: f32,
        c: MatMut<'_, CudaBuffer>,
    ) -> Result<()> {
        self.core.gemm.multiply(Form::Nt, alpha, of(a), of(b), beta, of_mut(&c))
    }

    fn matmul_nn(
        &self,
        alpha: f32,
        a: Mat<'_, CudaBuffer>,
        b: Mat<'_, CudaBuffer>,
        beta: f32,
        c: MatMut<'_, CudaBuffer>,
    ) -> Result<()> {
        self.core.gemm.multiply(Form::Nn, alpha, of(a), of(b), beta, of_mut(&c))
    }

    fn matmul_tn(
        &self,
        alpha: f32,
        a: Mat<'_, CudaBuffer>,
        b: Mat<'_, CudaBuffer>,
        beta: f32,
        c: MatMut<'_, CudaBuffer>,
    ) -> Result<()> {
        self.core.gemm.multiply(Form::Tn, alpha, of(a), of(b), beta, of_mut(&c))
    }

    fn rope(&self, rope: Rope<'_, CudaBuffer>, inverse: bool, x: MatMut<'_, CudaBuffer>) -> Result<()> {
        self.core.rope(of_mut(&x), rope.head_dim, rope.cos, rope.sin, rope.positions, inverse)
    }

    fn attention(
        &self,
        layout: &AttentionLayout,
        head_dim: usize,
        q: Mat<'_, CudaBuffer>,
        k: Mat<'_, CudaBuffer>,
        v: Mat<'_, CudaBuffer>,
        o: MatMut<'_, CudaBuffer>,
        lse: &mut CudaBuffer,
    ) -> Result<()> {
        self.core.attention(layout, head_dim, [of(q), of(k), of(v), of_mut(&o)], lse)
    }

    fn attention_backward(
        &self,
        layout: &AttentionLayout,
        head_dim: usize,
        kv_heads: usize,
        qkv: Mat<'_, CudaBuffer>,
        o: Mat<'_, CudaBuffer>,
        lse: &CudaBuffer,
        d_o: Mat<'_, CudaBuffer>,
        dqkv: MatMut<'_, CudaBuffer>,
    ) -> Result<()> {
        self.core.attention_backward(layout, head_dim, kv_heads, of(qkv), of(o), lse, of(d_o), of_mut(&dqkv))
    }

    fn swiglu(&self, gate_up: Mat<'_, CudaBuffer>, h: MatMut<'_, CudaBuffer>) -> Result<()> {
        self.core.swiglu(of(gate_up), Some(of_mut(&h)), None)
    }

    fn swiglu_backward(
        &self,
        dh: Mat<'_, CudaBuffer>,
        gate_up: Mat<'_, CudaBuffer>,
        d_gate_up: MatMut<'_, CudaBuffer>,
    ) -> Result<()> {
        self.core.swiglu_backward(of(dh), of(gate_up), of_mut(&d_gate_up))
    }

    fn cross_entropy(
        &self,
        logits: Mat<'_, CudaBuffer>,
        arguments: CrossEntropy<'_, CudaBuffer>,
        loss: &mut CudaBuffer,
        dlogits: Option<MatMut<'_, CudaBuffer>>,
    ) -> Result<()> {
        let CrossEntropy { targets, weights, label_smoothing, gradient_scale } = arguments;
        let dlogits = dlogits.as_ref().map(of_mut);
        self.core.cross_entropy(of(logits), targets, weights, label_smoothing, gradient_scale, loss, dlogits)
    }

    fn sum_of_squares(&self, x: &CudaBuffer) -> Result<f64> {
        self.core.sum_of_squares(x)
    }

    fn adamw(
        &self,
        hyper: AdamW,
        parameter: &mut CudaBuffer,
        gradient: &CudaBuffer,
        m: &mut CudaBuffer,
        v: &mut CudaBuffer,
        compute: &mut CudaBuffer,
    ) -> Result<()> {
        self.core.adamw(hyper, parameter, gradient, m, v, compute)
    }

    fn adamw_8bit(
        &self,
        hyper: AdamW,
        parameter: &mut CudaBuffer,
        gradient: &CudaBuffer,
        moments: Moments8<'_, CudaBuffer>,
        compute: &mut CudaBuffer,
    ) -> Result<()> {
        self.core.adamw_8bit(hyper, parameter, gradient, &moments, compute)
    }

    fn has_dora(&self) -> bool {
        true
    }

    fn scale_columns(&self, scale: &CudaBuffer, offset: usize, x: MatMut<'_, CudaBuffer>) -> Result<()> {
        self.core.scale_columns(scale, offset, of_mut(&x))
    }

    fn column_dots(
        &self,
        a: Mat<'_, CudaBuffer>,
        b: Mat<'_, CudaBuffer>,
        scale: &CudaBuffer,
        offset: usize,
        out: &mut CudaBuffer,
    ) -> Result<()> {
        self.core.column_dots(of(a), of(b), scale, offset, out)
    }

    fn adapted_row_norms(
        &self,
        w: &CudaWeight,
        first: usize,
        scale: f32,
        a: Mat<'_, CudaBuffer>,
        b: Mat<'_, CudaBuffer>,
    ) -> Result<Vec<f32>> {
        self.core.adapted_row_norms(w, first, scale, of(a), of(b))
    }
}
