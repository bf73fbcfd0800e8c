//! The operations. Each has a contract of its own and, where the forward pass needs one, its backward beside it.
//!
//! Notation: `n` rows (tokens), `d` hidden size, `T` the backend's compute dtype (bf16, f16 or f32). "f32" and "T" behind
//! an argument say which dtype its buffer has.

use crate::{AttentionLayout, Dtype, Error, Mat, MatMut, Result, WeightSource};

/// What a device offers; printed by `cashtag doctor`, read by the trainer's defaults and by `cashtag plan`.
#[derive(Clone, Debug)]
pub struct Capabilities {
    /// "cpu" or "cuda:0".
    pub device: String,
    /// The processor's or card's own name and what of it is used.
    pub description: String,
    /// Bytes of device memory in all and free now; `None` if unknown.
    pub memory_total: Option<u64>,
    pub memory_free: Option<u64>,
    /// What a training step gets through in matrix products, in GFLOP/s: a rough figure for the kind of device, to choose how
    /// much work fits into minutes. Not measured, so that the same kind of machine always chooses the same.
    pub nominal_rate: f64,
}

/// Inverted dropout (mask / (1 - p)) with the mask of [`crate::philox`].
#[derive(Clone, Copy, Debug)]
pub struct Dropout {
    pub p: f32,
    pub seed: u64,
    /// Micro-batch counter over the whole run.
    pub step: u32,
    /// Which input of which layer: `layer * 4 + {0 attention in, 1 attention out, 2 MLP in, 3 MLP middle}`.
    pub site: u32,
}

/// Rotary embedding in the half-split layout of Transformers (`rotate_half`): element `i` of a head pairs with
/// `i + head_dim / 2`.
#[derive(Debug)]
pub struct Rope<'a, B> {
    pub head_dim: usize,
    /// f32 `[max_position, head_dim / 2]`.
    pub cos: &'a B,
    /// f32 `[max_position, head_dim / 2]`.
    pub sin: &'a B,
    /// u32 `[n]`: position of each row.
    pub positions: &'a B,
}

/// Hyper-parameters of one AdamW step (Loshchilov & Hutter 2019), as `torch.optim.AdamW`:
/// `p ← p·(1 - lr·weight_decay)`, `m ← β₁m + (1-β₁)g`, `v ← β₂v + (1-β₂)g²`,
/// `p ← p - lr/(1-β₁ᵗ) · m / (√v/√(1-β₂ᵗ) + ε)`.
#[derive(Clone, Copy, Debug)]
pub struct AdamW {
    pub learning_rate: f32,
    pub beta1: f32,
    pub beta2: f32,
    pub epsilon: f32,
    pub weight_decay: f32,
    /// t, counted from 1.
    pub step: u32,
    /// Every gradient is multiplied by this first (1 / tokens, loss scale, clipping).
    pub gradient_scale: f32,
}

/// Moments of [`Backend::adamw_8bit`] (Dettmers et al., "8-bit optimizers via block-wise quantization", ICLR 2022), as
/// bitsandbytes keeps them: blocks of at most 256 neighbouring elements with a code of eight bits for each element and an absmax for
/// each block. Tensors that are too small for it keep f32 moments.
#[derive(Debug)]
pub struct Moments8<'a, B> {
    /// u32 `[blocks, 3]`, covering the parameters in order without gaps: first element, number of elements (at most
    /// [`BLOCK_8BIT`]), and where the block's moments stand in `m32` and `v32`; `u32::MAX` for a block of codes.
    pub table: &'a B,
    pub blocks: usize,
    /// u32, element `i` in byte `i % 4` (0 = lowest) of word `i / 4`: index into [`crate::dynamic_map::SIGNED`].
    pub m: &'a mut B,
    /// As `m`, into [`crate::dynamic_map::UNSIGNED`].
    pub v: &'a mut B,
    /// f32 `[2, blocks]`: absmax of m, then of v.
    pub absmax: &'a mut B,
    /// f32, at least one element.
    pub m32: &'a mut B,
    pub v32: &'a mut B,
}

/// Elements of a block of 8-bit moments.
pub const BLOCK_8BIT: usize = 256;

/// Arguments of [`Backend::cross_entropy`].
#[derive(Debug)]
pub struct CrossEntropy<'a, B> {
    /// u32 `[n]`: the class that each row should predict.
    pub targets: &'a B,
    /// f32 `[n]`: weight of each row's loss (1, or a class weight).
    pub weights: &'a B,
    /// ε of label smoothing as in `torch.nn.CrossEntropyLoss`: loss = (1-ε)·(-log p[target]) + ε·mean over classes of -log p.
    pub label_smoothing: f32,
    /// Multiplies the gradient only (loss scale of fp16).
    pub gradient_scale: f32,
}

impl<B> Clone for Rope<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<B> Copy for Rope<'_, B> {}

impl<B> Clone for CrossEntropy<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<B> Copy for CrossEntropy<'_, B> {}

/// What one kernel took on the device, over all its launches.
#[derive(Clone, Debug, PartialEq)]
pub struct KernelTime {
    pub name: String,
    pub launches: u64,
    pub milliseconds: f64,
}

/// A device that can run a Llama block forward and backward.
///
/// Methods take `&self`: a backend is shared by the threads of a service. Views whose dtype or shape do not fit a contract
/// are programming errors and panic.
pub trait Backend: Send + Sync + 'static {
    /// Device memory of one dtype.
    type Buffer: Send + Sync;
    /// A frozen weight matrix `[out, in]` as the device wants it (packed panels, NF4 codes, 16-bit).
    type Weight: Send + Sync;

    fn capabilities(&self) -> Capabilities;

    /// T: dtype of activations and of all matrix operands.
    fn compute_dtype(&self) -> Dtype;

    /// What holds q, k, v and gate, up of a pass without a backward, and what its head multiplies: T, or f32 where that costs little.
    /// Frozen layer, LoRA and RoPE then add up unrounded; what they become is T again. [`rope`](Self::rope),
    /// [`swiglu`](Self::swiglu), the q of [`attention`](Self::attention), results of products and [`linear`](Self::linear) by an
    /// [`embedding`](Self::embedding) take it.
    fn inference_output_dtype(&self) -> Dtype {
        self.compute_dtype()
    }

    /// Runs a pass of many operations: on a device with threads of its own in one of them, so that not each operation is handed over, and
    /// rayon's loops in it run on those.
    fn run<R: Send>(&self, pass: impl FnOnce() -> R + Send) -> R {
        pass()
    }

    // --- memory ------------------------------------------------------------------------------------------------------

    /// `len` elements, zeroed.
    fn zeros(&self, dtype: Dtype, len: usize) -> Result<Self::Buffer>;
    /// A buffer that the caller will write before it reads: the contents are unspecified.
    fn uninit(&self, dtype: Dtype, len: usize) -> Result<Self::Buffer> {
        self.zeros(dtype, len)
    }
    fn dtype(&self, buffer: &Self::Buffer) -> Dtype;
    fn len(&self, buffer: &Self::Buffer) -> usize;
    /// f32 values into elements `offset ..` of a buffer of any float dtype (rounded to nearest even).
    fn upload(&self, data: &[f32], buffer: &mut Self::Buffer, offset: usize) -> Result<()>;
    /// Into elements `0 ..` of a u32 buffer.
    fn upload_u32(&self, data: &[u32], buffer: &mut Self::Buffer) -> Result<()>;
    /// Elements `offset .. offset + out.len()` of a float buffer as f32; waits for what was queued.
    fn download(&self, buffer: &Self::Buffer, offset: usize, out: &mut [f32]) -> Result<()>;
    /// Elements `0 ..` of a u32 buffer; waits for what was queued.
    fn download_u32(&self, buffer: &Self::Buffer, out: &mut [u32]) -> Result<()>;
    /// Waits until everything queued is done.
    fn synchronize(&self) -> Result<()>;

    /// Bytes of device memory now held, and the most ever held, by buffers and weights of this backend.
    fn memory(&self) -> (u64, u64);

    /// Begins to measure each kernel; `false` if the device cannot.
    fn start_profile(&self) -> bool {
        false
    }
    /// The time of each kernel since the start, the longest first; measures no more. Waits for what was queued.
    fn stop_profile(&self) -> Result<Vec<KernelTime>> {
        Ok(Vec::new())
    }

    // --- element-wise ------------------------------------------------------------------------------------------------

    fn fill_zero(&self, buffer: &mut Self::Buffer) -> Result<()>;
    /// `dst ← src`, element by element, converting between float dtypes.
    fn copy(&self, src: Mat<'_, Self::Buffer>, dst: MatMut<'_, Self::Buffer>) -> Result<()>;
    /// `dst ← dst + src`; any float dtypes, the sum in f32.
    fn add(&self, src: Mat<'_, Self::Buffer>, dst: MatMut<'_, Self::Buffer>) -> Result<()>;
    /// `out[i] ← src[rows[i]]` for u32 `rows` of `out.rows` entries; converts between float dtypes.
    fn gather_rows(&self, src: Mat<'_, Self::Buffer>, rows: &Self::Buffer, out: MatMut<'_, Self::Buffer>)
    -> Result<()>;
    /// `dst[rows[i]] ← dst[rows[i]] + src[i]`; `rows` are all different; converts between float dtypes.
    fn scatter_add_rows(
        &self,
        src: Mat<'_, Self::Buffer>,
        rows: &Self::Buffer,
        dst: MatMut<'_, Self::Buffer>,
    ) -> Result<()>;
    /// `out ← mask ∘ x / (1 - p)`, or with `accumulate` `out ← out + mask ∘ x / (1 - p)`. The mask's row and column are those of
    /// the view. Its own backward. x T, out T.
    fn dropout(
        &self,
        x: Mat<'_, Self::Buffer>,
        dropout: Dropout,
        accumulate: bool,
        out: MatMut<'_, Self::Buffer>,
    ) -> Result<()>;

    // --- embedding and norm ------------------------------------------------------------------------------------------

    /// `out[i] ← table[ids[i]]`: ids u32 `[n]`, out f32 `[n, d]`.
    fn embed(&self, table: &Self::Weight, ids: &Self::Buffer, out: MatMut<'_, Self::Buffer>) -> Result<()>;

    /// RMSNorm (Zhang & Sennrich 2019): `y = x · inv_rms · w`, `inv_rms = 1/√(mean(x²) + ε)`.
    /// x f32 or T `[n, d]`, w f32 `[d]`, y T `[n, d]`, inv_rms f32 `[n]` (written).
    fn rms_norm(
        &self,
        x: Mat<'_, Self::Buffer>,
        w: &Self::Buffer,
        epsilon: f32,
        y: MatMut<'_, Self::Buffer>,
        inv_rms: &mut Self::Buffer,
    ) -> Result<()>;

    /// Backward of [`rms_norm`](Self::rms_norm) for a frozen `w`, added to the gradient of the residual stream:
    /// with `h = w∘dy`, `x̂ = x·inv_rms`: `dx ← dx + inv_rms·(h - x̂·mean(h∘x̂))`.
    /// dy T, x f32 or T, inv_rms f32 as the forward left it, dx f32, all `[n, d]`.
    fn rms_norm_backward(
        &self,
        dy: Mat<'_, Self::Buffer>,
        x: Mat<'_, Self::Buffer>,
        w: &Self::Buffer,
        inv_rms: &Self::Buffer,
        dx: MatMut<'_, Self::Buffer>,
    ) -> Result<()>;

    // --- matrix products ---------------------------------------------------------------------------------------------

    /// Stacks `sources` along their rows (out features) into one frozen weight; all have the same `cols`.
    fn weight(&self, sources: &[&dyn WeightSource]) -> Result<Self::Weight>;
    /// As [`weight`](Self::weight), for a matrix that is used by [`embed`](Self::embed) too (and tied lm_heads).
    fn embedding(&self, source: &dyn WeightSource) -> Result<Self::Weight>;
    /// `(out, in)` of a weight.
    fn weight_shape(&self, w: &Self::Weight) -> (usize, usize);

    /// `y ← x·Wᵀ`, or with `accumulate` `y ← y + x·Wᵀ`. x T `[n, in]`, y T or f32 `[n, out]`.
    fn linear(
        &self,
        x: Mat<'_, Self::Buffer>,
        w: &Self::Weight,
        accumulate: bool,
        y: MatMut<'_, Self::Buffer>,
    ) -> Result<()>;

    /// `dx ← dy·W`, or with `accumulate` `dx ← dx + dy·W`. dy T `[n, out]`, dx T or f32 `[n, in]`. Never a gradient for W.
    fn linear_backward(
        &self,
        dy: Mat<'_, Self::Buffer>,
        w: &Self::Weight,
        accumulate: bool,
        dx: MatMut<'_, Self::Buffer>,
    ) -> Result<()>;

    /// `c ← alpha·a·bᵀ + beta·c`: a T `[m, k]`, b T `[n, k]`, c T or f32 `[m, n]`; beta is 0 or 1.
    /// (LoRA down `u = x̂·Aᵀ` and up `y += s·u·Bᵀ`.)
    fn matmul_nt(
        &self,
        alpha: f32,
        a: Mat<'_, Self::Buffer>,
        b: Mat<'_, Self::Buffer>,
        beta: f32,
        c: MatMut<'_, Self::Buffer>,
    ) -> Result<()>;

    /// `c ← alpha·a·b + beta·c`: a T `[m, k]`, b T `[k, n]`, c T or f32 `[m, n]`. (`du = s·dy·B`, `dx̂ = du·A`.)
    fn matmul_nn(
        &self,
        alpha: f32,
        a: Mat<'_, Self::Buffer>,
        b: Mat<'_, Self::Buffer>,
        beta: f32,
        c: MatMut<'_, Self::Buffer>,
    ) -> Result<()>;

    /// `c ← alpha·aᵀ·b + beta·c`: a T `[k, m]`, b T `[k, n]`, c f32 `[m, n]`. (`dB += s·dyᵀ·u`, `dA += duᵀ·x̂`.)
    fn matmul_tn(
        &self,
        alpha: f32,
        a: Mat<'_, Self::Buffer>,
        b: Mat<'_, Self::Buffer>,
        beta: f32,
        c: MatMut<'_, Self::Buffer>,
    ) -> Result<()>;

    // --- attention ---------------------------------------------------------------------------------------------------

    /// Rotates every head of `x` (T `[n, heads·head_dim]`) in place; `inverse` rotates back, which is its backward.
    fn rope(&self, rope: Rope<'_, Self::Buffer>, inverse: bool, x: MatMut<'_, Self::Buffer>) -> Result<()>;

    /// Softmax attention over a packed batch, scores scaled by 1/√head_dim.
    ///
    /// q T `[q_rows, heads·head_dim]`, k and v T `[kv_rows, kv_heads·head_dim]` (head h reads key head h / (heads/kv_heads)),
    /// o T as q. lse f32 `[q_rows, heads]` receives log Σ exp(score) for the backward.
    fn attention(
        &self,
        layout: &AttentionLayout,
        head_dim: usize,
        q: Mat<'_, Self::Buffer>,
        k: Mat<'_, Self::Buffer>,
        v: Mat<'_, Self::Buffer>,
        o: MatMut<'_, Self::Buffer>,
        lse: &mut Self::Buffer,
    ) -> Result<()>;

    /// Backward of [`attention`](Self::attention) for a [packed](AttentionLayout::packed) layout. `qkv` and `dqkv` are T
    /// `[n, (heads + 2·kv_heads)·head_dim]` with q, k, v side by side (rotated, as the forward saw them); o, d_o T
    /// `[n, heads·head_dim]`; lse as the forward left it. Keys and values of the prefix collect the gradients of every example.
    fn attention_backward(
        &self,
        layout: &AttentionLayout,
        head_dim: usize,
        kv_heads: usize,
        qkv: Mat<'_, Self::Buffer>,
        o: Mat<'_, Self::Buffer>,
        lse: &Self::Buffer,
        d_o: Mat<'_, Self::Buffer>,
        dqkv: MatMut<'_, Self::Buffer>,
    ) -> Result<()>;

    // --- MLP ---------------------------------------------------------------------------------------------------------

    /// `h ← silu(gate)∘up`: gate_up T `[n, 2·f]` (gate in the first f columns), h T `[n, f]`.
    fn swiglu(&self, gate_up: Mat<'_, Self::Buffer>, h: MatMut<'_, Self::Buffer>) -> Result<()>;

    /// Backward of [`swiglu`](Self::swiglu): reads dh T `[n, f]` and gate_up, writes d_gate_up T `[n, 2·f]`.
    fn swiglu_backward(
        &self,
        dh: Mat<'_, Self::Buffer>,
        gate_up: Mat<'_, Self::Buffer>,
        d_gate_up: MatMut<'_, Self::Buffer>,
    ) -> Result<()>;

    // --- loss --------------------------------------------------------------------------------------------------------

    /// Loss of each row and, in `dlogits`, its gradient: logits f32 `[n, vocab]`, loss f32 `[n]` (weighted),
    /// dlogits T `[n, vocab]` = gradient_scale · weight · (softmax - (1-ε)·onehot - ε/vocab).
    fn cross_entropy(
        &self,
        logits: Mat<'_, Self::Buffer>,
        arguments: CrossEntropy<'_, Self::Buffer>,
        loss: &mut Self::Buffer,
        dlogits: Option<MatMut<'_, Self::Buffer>>,
    ) -> Result<()>;

    /// log p of the classes that are asked for, row by row: logits f32 `[n, vocab]`, `targets` n lists of any lengths.
    ///
    /// As it stands here, a [`cross_entropy`](Self::cross_entropy) for each target that a row has.
    fn log_probabilities(&self, logits: Mat<'_, Self::Buffer>, targets: &[Vec<u32>]) -> Result<Vec<Vec<f32>>> {
        let n = targets.len();
        let mut ids = self.zeros(Dtype::U32, n)?;
        let mut weights = self.zeros(Dtype::F32, n)?;
        let mut loss = self.zeros(Dtype::F32, n)?;
        self.upload(&vec![1.0; n], &mut weights, 0)?;
        let mut values = vec![0f32; n];
        let mut result = vec![Vec::new(); n];
        for pass in 0..targets.iter().map(Vec::len).max().unwrap_or(0) {
            let column: Vec<u32> = targets.iter().map(|row| row.get(pass).copied().unwrap_or(0)).collect();
            self.upload_u32(&column, &mut ids)?;
            let arguments =
                CrossEntropy { targets: &ids, weights: &weights, label_smoothing: 0.0, gradient_scale: 1.0 };
            self.cross_entropy(logits, arguments, &mut loss, None)?;
            self.download(&loss, 0, &mut values)?;
            for ((row, value), result) in targets.iter().zip(&values).zip(&mut result) {
                if pass < row.len() {
                    result.push(-value);
                }
            }
        }
        Ok(result)
    }

    // --- optimizer ---------------------------------------------------------------------------------------------------

    /// Σ x² over a f32 buffer, accumulated in f64 or in f32 over fixed blocks; not finite if any element is not.
    fn sum_of_squares(&self, x: &Self::Buffer) -> Result<f64>;

    /// One [`AdamW`] step over f32 parameters, gradients and states of the same length; `compute` (T) receives the rounded
    /// parameters that the matrix products read. The gradient is left as it is.
    fn adamw(
        &self,
        hyper: AdamW,
        parameter: &mut Self::Buffer,
        gradient: &Self::Buffer,
        m: &mut Self::Buffer,
        v: &mut Self::Buffer,
        compute: &mut Self::Buffer,
    ) -> Result<()>;

    /// One step of AdamW with [8-bit moments](Moments8), as bitsandbytes' `adamw_8bit`: the moments of a block are read through the
    /// dynamic maps, updated as by [`adamw`](Self::adamw), and stored again relative to their new absmax. A code of m never changes
    /// the sign of what it stands for.
    fn adamw_8bit(
        &self,
        hyper: AdamW,
        parameter: &mut Self::Buffer,
        gradient: &Self::Buffer,
        moments: Moments8<'_, Self::Buffer>,
        compute: &mut Self::Buffer,
    ) -> Result<()>;

    // --- several devices ---------------------------------------------------------------------------------------------

    /// What one rank makes and gives to all, so that their devices find each other; `None` if devices of this kind cannot sum among
    /// themselves (then the host does it).
    fn collective_id(&self) -> Result<Option<Vec<u8>>> {
        Ok(None)
    }

    /// Joins the devices that have the same `id`; returns when all `size` are there. `None` by
    /// [`collective_id`](Self::collective_id) excludes it.
    fn join_collective(&self, _id: &[u8], _rank: usize, _size: usize) -> Result<()> {
        let what = "this device has no collective operations".into();
        Err(Error::Device { device: self.capabilities().device, what })
    }

    /// `x ← Σ x over the joined devices`, f32, the same bits on all of them.
    fn all_reduce(&self, _x: &mut Self::Buffer) -> Result<()> {
        let what = "this device has joined no others".into();
        Err(Error::Device { device: self.capabilities().device, what })
    }

    // --- DoRA --------------------------------------------------------------------------------------------------------

    /// Whether the operations of this section are there; the others of this trait are always.
    fn has_dora(&self) -> bool {
        false
    }

    /// `x[i][j] ← x[i][j] · scale[offset + j]`: x T, scale f32.
    fn scale_columns(&self, _scale: &Self::Buffer, _offset: usize, _x: MatMut<'_, Self::Buffer>) -> Result<()> {
        Err(no_dora(self.capabilities()))
    }

    /// `out[offset + j] ← out[offset + j] + scale[offset + j] · Σ_i a[i][j]·b[i][j]`: a and b T, scale and out f32.
    fn column_dots(
        &self,
        _a: Mat<'_, Self::Buffer>,
        _b: Mat<'_, Self::Buffer>,
        _scale: &Self::Buffer,
        _offset: usize,
        _out: &mut Self::Buffer,
    ) -> Result<()> {
        Err(no_dora(self.capabilities()))
    }

    /// The Euclidean norm of rows `first .. first + b.rows` of `W + scale·B·A`, which is never held as a whole: a T `[r, in]`, b T
    /// `[rows, r]`.
    fn adapted_row_norms(
        &self,
        _w: &Self::Weight,
        _first: usize,
        _scale: f32,
        _a: Mat<'_, Self::Buffer>,
        _b: Mat<'_, Self::Buffer>,
    ) -> Result<Vec<f32>> {
        Err(no_dora(self.capabilities()))
    }
}

fn no_dora(c: Capabilities) -> Error {
    let what = "DoRA is not implemented on this device\n  hint: leave use_dora out, or take --device cpu".into();
    Error::Device { device: c.device, what }
}
