//! The Llama block on a device: forward and hand-written backward.
//!
//! ```text
//! x ──┬─ RMSNorm ─ qkv ─ RoPE ─ attention ─ o ─┬─(+)── x ──┬─ RMSNorm ─ gate,up ─ SwiGLU ─ down ─┬─(+)── x
//!     └────────────────────────────────────────┘          └──────────────────────────────────────┘
//! ```
//!
//! The residual stream `x` and its gradient are f32; everything between is in the compute dtype. A forward pass for training
//! saves, per layer, the two block inputs, q, k, v after RoPE, the attention output with its log-sum-exp, gate and up, and the LoRA
//! down-projections; norms and SwiGLU are recomputed in the backward because that is cheaper than keeping them. With
//! [`Checkpointing::Block`] only the block's input is saved and the whole block runs again.
//!
//! Nobody reads the last block's results but the head, and that for a few rows (the labels of training, the ends of prompts): behind its
//! attention the last block computes those rows alone ([`Narrowed`]), forward and backward. The results are the same.
//!
//! Nothing is trained below the first block with factors: a backward ends there, and the blocks below it save nothing.

use cashtag_backend::{AttentionLayout, Backend, Dtype, Mat, MatMut, Rope, WeightSource};

use crate::checkpoint::Checkpoint;
use crate::config::LlamaConfig;
use crate::error::{Error, Result};
use crate::kv::KvStore;
use crate::lora::{BackwardScratch, Lora, Site, SiteAt, Slot};
use crate::neftune;
use crate::packing::PackedBatch;

struct Layer<B: Backend> {
    input_norm: B::Buffer,
    qkv: B::Weight,
    o: B::Weight,
    post_attention_norm: B::Buffer,
    gate_up: B::Weight,
    down: B::Weight,
}

/// A frozen model on a device.
pub struct Llama<B: Backend> {
    config: LlamaConfig,
    embed: B::Weight,
    /// `None`: tied to the embedding.
    lm_head: Option<B::Weight>,
    layers: Vec<Layer<B>>,
    norm: B::Buffer,
    cos: B::Buffer,
    sin: B::Buffer,
    positions: usize,
}

/// What the backward recomputes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Checkpointing {
    /// Norms and SwiGLU only.
    #[default]
    None,
    /// Each block, from its saved input.
    Block,
}

/// What a pass is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    Inference,
    Training(Checkpointing),
}

/// What one layer's forward leaves for its backward.
struct Saved<B: Backend> {
    /// Input of the block, and of its second half.
    x1: B::Buffer,
    x2: B::Buffer,
    inv1: B::Buffer,
    inv2: B::Buffer,
    qkv: B::Buffer,
    o: B::Buffer,
    lse: B::Buffer,
    gate_up: B::Buffer,
    /// x̂·Aᵀ for each site.
    u: [B::Buffer; 4],
    /// With DoRA: what o and down add to the residual stream.
    added: [B::Buffer; 2],
}

/// Device memory of a pass over at most `capacity` rows; reused from batch to batch.
pub struct Workspace<B: Backend> {
    capacity: usize,
    purpose: Purpose,
    /// The first block that a backward comes to: those below share one set of `saved`.
    first: usize,
    /// Residual stream, f32 `[capacity, d]`.
    x: B::Buffer,
    ids: B::Buffer,
    positions: B::Buffer,
    saved: Vec<Saved<B>>,
    block_inputs: Vec<B::Buffer>,
    /// Norm output, and scratch of the same size.
    y: B::Buffer,
    h: B::Buffer,
    x_hat: B::Buffer,
    backward: Option<BackwardBuffers<B>>,
    /// Where the rows that the head reads stand in `x` after a pass.
    rows: Vec<u32>,
    /// Kept between batches.
    narrowed: Option<Narrowed<B>>,
    head: Option<HeadBuffers<B>>,
}

/// Memory of the last block for the rows that the head reads, side by side.
struct Narrowed<B: Backend> {
    capacity: usize,
    /// Which rows of the batch they are.
    index: B::Buffer,
    /// Attention output, and its gradient.
    o: B::Buffer,
    d_o: Option<B::Buffer>,
    /// Residual stream, or its gradient, f32.
    x: B::Buffer,
}

impl<B: Backend> Narrowed<B> {
    /// The rows that the last block can do with, if they are clearly fewer than all `n`.
    fn of(rows: &[u32], n: usize) -> Option<&[u32]> {
        (4 * rows.len() <= 3 * n).then_some(rows)
    }

    /// The buffers of the batch before, if they are large enough.
    fn reuse<'a>(
        old: &'a mut Option<Self>,
        backend: &B,
        (q_dim, d): (usize, usize),
        wanted: usize,
        training: bool,
    ) -> Result<&'a mut Self> {
        let old = match old.take() {
            Some(kept) if kept.capacity >= wanted => old.insert(kept),
            smaller => {
                drop(smaller);
                let t = backend.compute_dtype();
                old.insert(Self {
                    capacity: wanted,
                    index: backend.zeros(Dtype::U32, wanted)?,
                    o: backend.uninit(t, wanted * q_dim)?,
                    d_o: if training { Some(backend.uninit(t, wanted * q_dim)?) } else { None },
                    x: backend.uninit(Dtype::F32, wanted * d)?,
                })
            }
        };
        Ok(old)
    }
}

/// Which set of `saved` block `l` has where `first` is the first block of a backward.
fn set_of(l: usize, first: usize, sets: usize) -> usize {
    if sets == 1 { 0 } else { (l + usize::from(first > 0)).saturating_sub(first) }
}

struct BackwardBuffers<B: Backend> {
    /// Gradient of the residual stream, f32.
    dx: B::Buffer,
    /// The same in the compute dtype, and gradients of norm outputs.
    dt: B::Buffer,
    d_attention: B::Buffer,
    dqkv: B::Buffer,
    dh: B::Buffer,
    d_gate_up: B::Buffer,
    du: B::Buffer,
    /// With DoRA: q and k before RoPE.
    unrotated: B::Buffer,
}

/// Positions of RoPE tables; longer prompts are refused long before.
const MAX_POSITIONS: usize = 8192;
/// Elements of a block of logits: 32 MiB in f32.
const LOGITS_BLOCK: usize = 8 << 20;

/// Losses of a batch.
#[derive(Clone, Debug)]
pub struct BatchLoss {
    /// Weighted loss of each label row, in the order of the batch.
    pub rows: Vec<f32>,
}

impl BatchLoss {
    pub fn sum(&self) -> f64 {
        self.rows.iter().map(|&l| f64::from(l)).sum()
    }
}

/// Options of a training pass.
#[derive(Clone, Copy, Debug)]
pub struct TrainPass {
    /// Seed of the dropout masks and the micro-batch counter over the run; dropout is off when `None`.
    pub random: Option<(u64, u32)>,
    pub label_smoothing: f32,
    /// fp16 loss scale; 1 otherwise.
    pub loss_scale: f32,
    /// Noise on the embeddings ([`neftune`](crate::neftune)), drawn like the dropout masks; 0 is none.
    pub neftune_alpha: f32,
}

impl<B: Backend> Llama<B> {
    /// Reads a checkpoint onto a device. `progress(done, total)` is called after each layer.
    ///
    /// # Errors
    /// Missing or misshapen tensors, non-finite weights, a device without memory.
    pub fn load(backend: &B, checkpoint: &Checkpoint, mut progress: impl FnMut(usize, usize)) -> Result<Self> {
        let config = checkpoint.config().clone();
        config.validate()?;
        let (d, f) = (config.hidden_size, config.intermediate_size);
        let (q, kv) = (config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim);
        let total = config.num_hidden_layers + 1;
        let matrix = |name: &str, rows: usize, cols: usize| -> Result<Box<dyn WeightSource + '_>> {
            let w = checkpoint.weight(name)?;
            if (w.rows(), w.cols()) != (rows, cols) {
                return Err(Error::tensor(
                    checkpoint.path(),
                    name,
                    format!("expected shape [{rows}, {cols}], found [{}, {}]", w.rows(), w.cols()),
                ));
            }
            Ok(w)
        };
        let vector = |name: &str| -> Result<B::Buffer> {
            let v = checkpoint.vector(name)?;
            if v.len() != d {
                let what = format!("expected {d} values, found {}", v.len());
                return Err(Error::tensor(checkpoint.path(), name, what));
            }
            let mut buffer = backend.zeros(Dtype::F32, d)?;
            backend.upload(&v, &mut buffer, 0)?;
            Ok(buffer)
        };
        let embed = backend.embedding(&*matrix("model.embed_tokens.weight", config.vocab_size, d)?)?;
        let lm_head = if config.tie_word_embeddings {
            None
        } else {
            // Loaded as an embedding: the head stays 16-bit where blocks are quantised, as with bitsandbytes.
            Some(backend.embedding(&*matrix("lm_head.weight", config.vocab_size, d)?)?)
        };
        progress(1, total);
        let mut layers = Vec::with_capacity(config.num_hidden_layers);
        for i in 0..config.num_hidden_layers {
            let name = |part: &str| format!("model.layers.{i}.{part}.weight");
            let stacked = |parts: &[(&str, usize)], cols: usize| -> Result<B::Weight> {
                let sources: Vec<_> =
                    parts.iter().map(|(part, rows)| matrix(&name(part), *rows, cols)).collect::<Result<_>>()?;
                let sources: Vec<&dyn WeightSource> = sources.iter().map(|s| &**s).collect();
                Ok(backend.weight(&sources)?)
            };
            layers.push(Layer {
                input_norm: vector(&name("input_layernorm"))?,
                qkv: stacked(&[("self_attn.q_proj", q), ("self_attn.k_proj", kv), ("self_attn.v_proj", kv)], d)?,
                o: stacked(&[("self_attn.o_proj", d)], q)?,
                post_attention_norm: vector(&name("post_attention_layernorm"))?,
                gate_up: stacked(&[("mlp.gate_proj", f), ("mlp.up_proj", f)], d)?,
                down: stacked(&[("mlp.down_proj", d)], f)?,
            });
            progress(i + 2, total);
        }
        let norm = vector("model.norm.weight")?;
        let positions = config.max_position_embeddings.min(MAX_POSITIONS);
        let [cos, sin] = rope_tables(&config, positions);
        let upload = |values: &[f32]| -> Result<B::Buffer> {
            let mut buffer = backend.zeros(Dtype::F32, values.len())?;
            backend.upload(values, &mut buffer, 0)?;
            Ok(buffer)
        };
        let (cos, sin) = (upload(&cos)?, upload(&sin)?);
        Ok(Self { embed, lm_head, layers, norm, cos, sin, positions, config })
    }

    pub fn config(&self) -> &LlamaConfig {
        &self.config
    }

    /// Longest sequence that the model takes.
    pub fn max_positions(&self) -> usize {
        self.positions
    }

    fn q_dim(&self) -> usize {
        self.config.num_attention_heads * self.config.head_dim
    }

    fn kv_dim(&self) -> usize {
        self.config.num_key_value_heads * self.config.head_dim
    }

    fn qkv_dim(&self) -> usize {
        self.q_dim() + 2 * self.kv_dim()
    }

    /// Brings an adapter up to date with its parameters: takes the norms that DoRA divides by, and the magnitudes of a new adapter.
    /// Needed after the adapter was made and whenever its parameters changed; does nothing without DoRA.
    ///
    /// # Errors
    /// The device fails or has no DoRA.
    pub fn prepare(&self, backend: &B, lora: &mut Lora<B>) -> Result<()> {
        let Some(d) = &lora.dora else { return Ok(()) };
        if d.current {
            return Ok(());
        }
        let (scale, rows) = (lora.config.scale(), d.magnitude.len);
        let mut norms = Vec::with_capacity(rows);
        for slot in lora.slots() {
            let layer = &self.layers[slot.layer];
            let weight = match slot.module.site() {
                Site::AttentionIn => &layer.qkv,
                Site::AttentionOut => &layer.o,
                Site::MlpIn => &layer.gate_up,
                Site::MlpMiddle => &layer.down,
            };
            let first = slot.module.first_column(&self.config);
            let (a, b) = (lora.a_of(slot), lora.b_factor(slot));
            norms.extend(backend.adapted_row_norms(weight, first, scale, a, b)?);
        }
        let Some(d) = &mut lora.dora else { return Ok(()) };
        if d.begins {
            d.magnitude.upload(backend, &norms)?;
        }
        let magnitudes = d.magnitude.download(backend)?;
        // A row of zeros has no direction; it is left alone.
        let scales: Vec<f32> = magnitudes.iter().zip(&norms).map(|(m, n)| if *n > 0.0 { m / n } else { 1.0 }).collect();
        let inverses: Vec<f32> = magnitudes.iter().map(|m| if *m == 0.0 { 0.0 } else { 1.0 / m }).collect();
        backend.upload(&scales, &mut d.scale, 0)?;
        backend.upload(&inverses, &mut d.inverse, 0)?;
        (d.current, d.begins) = (true, false);
        Ok(())
    }

    /// Key/value memory for `capacity` rows.
    pub fn kv_store(&self, backend: &B, capacity: usize) -> Result<KvStore<B>> {
        KvStore::new(backend, self.layers.len(), self.kv_dim(), capacity)
    }

    /// Memory for passes over at most `capacity` rows.
    ///
    /// # Errors
    /// The device has no room for it.
    pub fn workspace(
        &self,
        backend: &B,
        capacity: usize,
        purpose: Purpose,
        lora: Option<&Lora<B>>,
    ) -> Result<Workspace<B>> {
        let c = &self.config;
        let (n, d, f, t) = (capacity, c.hidden_size, c.intermediate_size, backend.compute_dtype());
        let wide = d.max(f).max(self.q_dim());
        let ranks = Site::ALL.map(|s| lora.map_or(0, |l| l.max_site_rank(s)));
        let alloc = |cols: usize| -> Result<B::Buffer> { Ok(backend.uninit(t, n * cols)?) };
        let f32s = |cols: usize| -> Result<B::Buffer> { Ok(backend.uninit(Dtype::F32, n * cols)?) };
        let training = matches!(purpose, Purpose::Training(_));
        let output = if training { t } else { backend.inference_output_dtype() };
        let outputs = |cols: usize| -> Result<B::Buffer> { Ok(backend.uninit(output, n * cols)?) };
        let dora = lora.is_some_and(|l| l.dora.is_some());
        let layers = self.layers.len();
        let first = lora.and_then(Lora::first_layer).unwrap_or(0);
        let sets = match purpose {
            Purpose::Training(Checkpointing::None) => layers - first + usize::from(first > 0),
            _ => 1,
        };
        let mut saved = Vec::with_capacity(sets);
        for _ in 0..sets {
            let norm_input =
                |n: usize| -> Result<B::Buffer> { Ok(backend.uninit(t, if training { n * d } else { 0 })?) };
            saved.push(Saved {
                x1: norm_input(n)?,
                x2: norm_input(n)?,
                inv1: f32s(1)?,
                inv2: f32s(1)?,
                qkv: outputs(self.qkv_dim())?,
                o: alloc(self.q_dim())?,
                lse: f32s(c.num_attention_heads)?,
                gate_up: outputs(2 * f)?,
                u: [alloc(ranks[0])?, alloc(ranks[1])?, alloc(ranks[2])?, alloc(ranks[3])?],
                added: [alloc(if dora { d } else { 0 })?, alloc(if dora { d } else { 0 })?],
            });
        }
        let block_inputs = if purpose == Purpose::Training(Checkpointing::Block) {
            (0..layers).map(|l| f32s(if l < first { 0 } else { d })).collect::<Result<_>>()?
        } else {
            Vec::new()
        };
        let backward = if training {
            Some(BackwardBuffers {
                dx: f32s(d)?,
                dt: alloc(d)?,
                d_attention: alloc(self.q_dim())?,
                dqkv: alloc(self.qkv_dim())?,
                dh: alloc(f)?,
                d_gate_up: alloc(2 * f)?,
                du: alloc(ranks.into_iter().max().unwrap_or(0))?,
                unrotated: alloc(if dora { self.q_dim() + self.kv_dim() } else { 0 })?,
            })
        } else {
            None
        };
        Ok(Workspace {
            capacity,
            purpose,
            first,
            x: f32s(d)?,
            ids: backend.zeros(Dtype::U32, n)?,
            positions: backend.zeros(Dtype::U32, n)?,
            saved,
            block_inputs,
            y: alloc(d)?,
            h: alloc(f)?,
            x_hat: alloc(if lora.is_some() { wide } else { 0 })?,
            backward,
            rows: Vec::new(),
            narrowed: None,
            head: None,
        })
    }

    /// `rows`: those that the head will read, in rising order.
    fn start(
        &self,
        backend: &B,
        ws: &mut Workspace<B>,
        ids: &[u32],
        layout: &AttentionLayout,
        rows: &[u32],
    ) -> Result<()> {
        let n = ids.len();
        assert!(
            rows.is_sorted_by(|a, b| a < b) && rows.last().is_none_or(|&last| (last as usize) < n),
            "rows {rows:?} of {n}"
        );
        ws.rows.clear();
        match Narrowed::<B>::of(rows, n) {
            Some(rows) => ws.rows.extend(0..rows.len() as u32),
            None => ws.rows.extend_from_slice(rows),
        }
        assert_eq!(n, layout.q_rows());
        if n > ws.capacity {
            return Err(Error::Invalid(format!("a batch of {n} tokens does not fit a workspace of {}", ws.capacity)));
        }
        if let Some(&id) = ids.iter().find(|&&id| id as usize >= self.config.vocab_size) {
            return Err(Error::Invalid(format!(
                "token {id} is outside the model's vocabulary of {}\n  hint: tokenizer and model do not belong together",
                self.config.vocab_size
            )));
        }
        let positions = layout.positions();
        if let Some(&p) = positions.iter().find(|&&p| p as usize >= self.positions) {
            return Err(Error::Invalid(format!(
                "a text of more than {p} tokens is longer than the model's {} positions\n  hint: lower max_seq_length or shorten the text",
                self.positions
            )));
        }
        backend.upload_u32(ids, &mut ws.ids)?;
        backend.upload_u32(&positions, &mut ws.positions)?;
        backend.embed(&self.embed, &ws.ids, MatMut::new(&mut ws.x, n, self.config.hidden_size))?;
        Ok(())
    }

    fn rope<'a>(&'a self, positions: &'a B::Buffer) -> Rope<'a, B::Buffer> {
        Rope { head_dim: self.config.head_dim, cos: &self.cos, sin: &self.sin, positions }
    }

    /// The rows that layer `l` computes behind its attention, if they are not all `n`.
    fn narrowed<'a>(&self, l: usize, rows: &'a [u32], n: usize) -> Option<&'a [u32]> {
        if l + 1 == self.layers.len() { Narrowed::<B>::of(rows, n) } else { None }
    }

    /// One block forward over `n` rows; `kv` holds the keys and values of an inference pass.
    fn forward_layer(
        &self,
        backend: &B,
        pass: &LayerPass<'_, B>,
        kv: Option<&mut KvStore<B>>,
        ws: &mut Workspace<B>,
    ) -> Result<()> {
        let LayerPass { layer: l, layout, rows, lora, random } = *pass;
        let c = &self.config;
        let (n, d, f) = (layout.q_rows(), c.hidden_size, c.intermediate_size);
        let (q_dim, kv_dim, qkv_dim) = (self.q_dim(), self.kv_dim(), self.qkv_dim());
        let layer = &self.layers[l];
        let training = ws.purpose != Purpose::Inference && l >= ws.first;
        let set = set_of(l, ws.first, ws.saved.len());
        let Workspace { x, positions, saved, y, h, x_hat, narrowed, .. } = ws;
        let s = &mut saved[set];
        let at = |site| SiteAt { model: c, layer: l, site, random };

        if training {
            backend.copy(Mat::new(x, n, d), MatMut::new(&mut s.x1, n, d))?;
        }
        backend.rms_norm(Mat::new(x, n, d), &layer.input_norm, c.rms_norm_eps, MatMut::new(y, n, d), &mut s.inv1)?;
        backend.linear(Mat::new(y, n, d), &layer.qkv, false, MatMut::new(&mut s.qkv, n, qkv_dim))?;
        if let Some(lora) = lora {
            let out = MatMut::new(&mut s.qkv, n, qkv_dim);
            lora.forward(backend, at(Site::AttentionIn), Mat::new(y, n, d), x_hat, &mut s.u[0], out)?;
        }
        // q and k stand side by side, so one call rotates both.
        let rotated = MatMut::new(&mut s.qkv, n, qkv_dim).columns(0, q_dim + kv_dim);
        backend.rope(self.rope(positions), false, rotated)?;
        let o = MatMut::new(&mut s.o, n, q_dim);
        let qkv = Mat::new(&s.qkv, n, qkv_dim);
        let (q, k, v) = (qkv.columns(0, q_dim), qkv.columns(q_dim, kv_dim), qkv.columns(q_dim + kv_dim, kv_dim));
        match kv {
            None => backend.attention(layout, c.head_dim, q, k, v, o, &mut s.lse)?,
            Some(store) => {
                store.write(backend, l, layout, qkv.columns(q_dim, 2 * kv_dim))?;
                let (k, v) = store.views(l);
                backend.attention(layout, c.head_dim, q, k, v, o, &mut s.lse)?;
            }
        }
        let (n, o) = match self.narrowed(l, rows, n) {
            None => (n, &s.o),
            Some([]) => return Ok(()),
            Some(rows) => {
                let kept = Narrowed::reuse(narrowed, backend, (q_dim, d), rows.len(), training)?;
                let m = rows.len();
                backend.upload_u32(rows, &mut kept.index)?;
                backend.gather_rows(Mat::new(&s.o, n, q_dim), &kept.index, MatMut::new(&mut kept.o, m, q_dim))?;
                backend.gather_rows(Mat::new(x, n, d), &kept.index, MatMut::new(&mut kept.x, m, d))?;
                backend.copy(Mat::new(&kept.x, m, d), MatMut::new(x, m, d))?;
                (m, &kept.o)
            }
        };
        let scales = |site| lora.is_some_and(|lora| lora.scales(l, site));
        let apart = scales(Site::AttentionOut);
        let out = MatMut::new(if apart { &mut s.added[0] } else { &mut *x }, n, d);
        backend.linear(Mat::new(o, n, q_dim), &layer.o, !apart, out)?;
        if let Some(lora) = lora {
            let out = MatMut::new(if apart { &mut s.added[0] } else { &mut *x }, n, d);
            lora.forward(backend, at(Site::AttentionOut), Mat::new(o, n, q_dim), x_hat, &mut s.u[1], out)?;
        }
        if apart {
            backend.add(Mat::new(&s.added[0], n, d), MatMut::new(x, n, d))?;
        }

        if training {
            backend.copy(Mat::new(x, n, d), MatMut::new(&mut s.x2, n, d))?;
        }
        let w = &layer.post_attention_norm;
        backend.rms_norm(Mat::new(x, n, d), w, c.rms_norm_eps, MatMut::new(y, n, d), &mut s.inv2)?;
        backend.linear(Mat::new(y, n, d), &layer.gate_up, false, MatMut::new(&mut s.gate_up, n, 2 * f))?;
        if let Some(lora) = lora {
            let out = MatMut::new(&mut s.gate_up, n, 2 * f);
            lora.forward(backend, at(Site::MlpIn), Mat::new(y, n, d), x_hat, &mut s.u[2], out)?;
        }
        backend.swiglu(Mat::new(&s.gate_up, n, 2 * f), MatMut::new(h, n, f))?;
        let apart = scales(Site::MlpMiddle);
        let out = MatMut::new(if apart { &mut s.added[1] } else { &mut *x }, n, d);
        backend.linear(Mat::new(h, n, f), &layer.down, !apart, out)?;
        if let Some(lora) = lora {
            let out = MatMut::new(if apart { &mut s.added[1] } else { &mut *x }, n, d);
            lora.forward(backend, at(Site::MlpMiddle), Mat::new(h, n, f), x_hat, &mut s.u[3], out)?;
        }
        if apart {
            backend.add(Mat::new(&s.added[1], n, d), MatMut::new(x, n, d))?;
        }
        Ok(())
    }

    /// Forward over a batch whose keys and values go into `kv`. [`head`](Self::head) then reads `rows`, in rising order.
    ///
    /// # Errors
    /// Token ids or positions that the model does not have, or a device that fails.
    #[allow(clippy::too_many_arguments, reason = "a pass needs them all, and all are of different types")]
    pub fn forward_inference(
        &self,
        backend: &B,
        ids: &[u32],
        layout: &AttentionLayout,
        rows: &[u32],
        lora: Option<&Lora<B>>,
        kv: &mut KvStore<B>,
        ws: &mut Workspace<B>,
    ) -> Result<()> {
        check(lora)?;
        backend.run(|| {
            self.start(backend, ws, ids, layout, rows)?;
            for layer in 0..self.layers.len() {
                let pass = LayerPass { layer, layout, rows, lora, random: None };
                self.forward_layer(backend, &pass, Some(&mut *kv), ws)?;
            }
            Ok(())
        })
    }

    /// Final norm and language-model head for the rows that the pass was asked for. For each block of them, calls
    /// `use_logits(number of its first row among them, logits f32 [rows, vocab])`.
    pub fn head(
        &self,
        backend: &B,
        ws: &mut Workspace<B>,
        mut use_logits: impl FnMut(usize, Mat<'_, B::Buffer>) -> Result<()>,
    ) -> Result<()> {
        let rows = std::mem::take(&mut ws.rows);
        let mut head = HeadBuffers::reuse(ws.head.take(), backend, &self.config, rows.len(), false)?;
        for (i, block) in rows.chunks(head.rows).enumerate() {
            self.head_block(backend, ws, block, &mut head)?;
            use_logits(i * head.rows, Mat::new(&head.logits, block.len(), self.config.vocab_size))?;
        }
        (ws.head, ws.rows) = (Some(head), rows);
        Ok(())
    }

    fn head_block(&self, backend: &B, ws: &Workspace<B>, rows: &[u32], head: &mut HeadBuffers<B>) -> Result<()> {
        let (d, m) = (self.config.hidden_size, rows.len());
        backend.upload_u32(rows, &mut head.index)?;
        backend.gather_rows(Mat::new(&ws.x, ws.capacity, d), &head.index, MatMut::new(&mut head.x, m, d))?;
        let y = MatMut::new(&mut head.y, m, d);
        backend.rms_norm(Mat::new(&head.x, m, d), &self.norm, self.config.rms_norm_eps, y, &mut head.inv)?;
        let w = self.lm_head.as_ref().unwrap_or(&self.embed);
        backend.linear(Mat::new(&head.y, m, d), w, false, MatMut::new(&mut head.logits, m, self.config.vocab_size))?;
        Ok(())
    }

    /// Forward and loss of a packed batch without a backward (evaluation).
    pub fn loss(
        &self,
        backend: &B,
        batch: &PackedBatch,
        lora: Option<&Lora<B>>,
        label_smoothing: f32,
        ws: &mut Workspace<B>,
    ) -> Result<BatchLoss> {
        check(lora)?;
        backend.run(|| {
            self.start(backend, ws, &batch.ids, &batch.layout, &batch.label_rows)?;
            for layer in 0..self.layers.len() {
                let pass = LayerPass { layer, layout: &batch.layout, rows: &batch.label_rows, lora, random: None };
                self.forward_layer(backend, &pass, None, ws)?;
            }
            let mut head = HeadBuffers::reuse(ws.head.take(), backend, &self.config, batch.label_rows.len(), false)?;
            let loss = self.label_loss(backend, batch, label_smoothing, None, &mut head, ws)?;
            ws.head = Some(head);
            Ok(loss)
        })
    }

    /// Forward and backward of a packed batch: adds the gradient of the weighted sum of label-row losses (times the loss
    /// scale) to the gradients of `lora`.
    ///
    /// # Errors
    /// Token ids or positions that the model does not have, or a device that fails.
    pub fn forward_backward(
        &self,
        backend: &B,
        batch: &PackedBatch,
        lora: &mut Lora<B>,
        pass: TrainPass,
        ws: &mut Workspace<B>,
    ) -> Result<BatchLoss> {
        backend.run(|| {
            let n = batch.rows();
            let d = self.config.hidden_size;
            let random = pass.random;
            let (layout, rows) = (&batch.layout, &batch.label_rows[..]);
            check(Some(lora))?;
            self.start(backend, ws, &batch.ids, layout, rows)?;
            if let (Some(random), true) = (random, pass.neftune_alpha > 0.0) {
                let x = MatMut::new(&mut ws.x, n, d);
                neftune::add_noise(backend, layout, pass.neftune_alpha, random, x)?;
            }
            let block = ws.purpose == Purpose::Training(Checkpointing::Block);
            let Some(first) = lora.first_layer() else {
                return Err(Error::Invalid("there is nothing to train: the adapter has no factors".into()));
            };
            assert!(ws.first <= first, "the workspace is one of another adapter");
            for layer in 0..self.layers.len() {
                if block && layer >= first {
                    backend.copy(Mat::new(&ws.x, n, d), MatMut::new(&mut ws.block_inputs[layer], n, d))?;
                }
                self.forward_layer(backend, &LayerPass { layer, layout, rows, lora: Some(lora), random }, None, ws)?;
            }
            let mut head = HeadBuffers::reuse(ws.head.take(), backend, &self.config, batch.label_rows.len(), true)?;
            let loss = self.label_loss(backend, batch, pass.label_smoothing, Some(pass.loss_scale), &mut head, ws)?;
            ws.head = Some(head);
            for layer in (first..self.layers.len()).rev() {
                let forward = LayerPass { layer, layout, rows, lora: Some(&*lora), random };
                if block {
                    backend.copy(Mat::new(&ws.block_inputs[layer], n, d), MatMut::new(&mut ws.x, n, d))?;
                    self.forward_layer(backend, &forward, None, ws)?;
                }
                self.backward_layer(backend, layer, layer == first, rows, layout, random, lora, ws)?;
            }
            Ok(loss)
        })
    }

    /// Loss of the label rows and, with a loss scale, its gradient in `dx`.
    fn label_loss(
        &self,
        backend: &B,
        batch: &PackedBatch,
        label_smoothing: f32,
        gradient: Option<f32>,
        head: &mut HeadBuffers<B>,
        ws: &mut Workspace<B>,
    ) -> Result<BatchLoss> {
        let (n, d, vocab) = (batch.rows(), self.config.hidden_size, self.config.vocab_size);
        let mut losses = vec![0f32; batch.label_rows.len()];
        if gradient.is_some()
            && let Some(b) = &mut ws.backward
        {
            backend.fill_zero(&mut b.dx)?;
        }
        for first in (0..losses.len()).step_by(head.rows) {
            let part = first..(first + head.rows).min(losses.len());
            let m = part.len();
            self.head_block(backend, ws, &ws.rows[part.clone()], head)?;
            backend.upload_u32(&batch.targets[part.clone()], &mut head.targets)?;
            backend.upload(&batch.weights[part.clone()], &mut head.weights, 0)?;
            let arguments = cashtag_backend::CrossEntropy {
                targets: &head.targets,
                weights: &head.weights,
                label_smoothing,
                gradient_scale: gradient.unwrap_or(1.0),
            };
            let logits = Mat::new(&head.logits, m, vocab);
            let dlogits = head.gradient.as_mut().map(|g| MatMut::new(&mut g.dlogits, m, vocab));
            backend.cross_entropy(logits, arguments, &mut head.loss, dlogits)?;
            backend.download(&head.loss, 0, &mut losses[part])?;
            let (Some(g), Some(b)) = (&mut head.gradient, &mut ws.backward) else { continue };
            let w = self.lm_head.as_ref().unwrap_or(&self.embed);
            backend.linear_backward(Mat::new(&g.dlogits, m, vocab), w, false, MatMut::new(&mut g.dy32, m, d))?;
            backend.copy(Mat::new(&g.dy32, m, d), MatMut::new(&mut g.dy, m, d))?;
            backend.fill_zero(&mut g.dy32)?;
            let (dy, x) = (Mat::new(&g.dy, m, d), Mat::new(&head.x, m, d));
            backend.rms_norm_backward(dy, x, &self.norm, &head.inv, MatMut::new(&mut g.dy32, m, d))?;
            backend.scatter_add_rows(Mat::new(&g.dy32, m, d), &head.index, MatMut::new(&mut b.dx, n, d))?;
        }
        Ok(BatchLoss { rows: losses })
    }

    /// `is_last`: nobody asks for the gradient of the block's input.
    fn backward_layer(
        &self,
        backend: &B,
        l: usize,
        is_last: bool,
        rows: &[u32],
        layout: &AttentionLayout,
        random: Option<(u64, u32)>,
        lora: &mut Lora<B>,
        ws: &mut Workspace<B>,
    ) -> Result<()> {
        let c = &self.config;
        let (all, d, f) = (layout.q_rows(), c.hidden_size, c.intermediate_size);
        let rows = self.narrowed(l, rows, all);
        let n = rows.map_or(all, <[u32]>::len);
        let (q_dim, kv_dim, qkv_dim) = (self.q_dim(), self.kv_dim(), self.qkv_dim());
        let layer = &self.layers[l];
        let set = set_of(l, ws.first, ws.saved.len());
        let Workspace { positions, saved, y, h, x_hat, backward, narrowed, .. } = ws;
        let s = &mut saved[set];
        let Some(BackwardBuffers { dx, dt, d_attention, dqkv, dh, d_gate_up, du, unrotated }) = backward else {
            panic!("a workspace for inference has no backward")
        };
        let mut narrowed = narrowed.as_mut().filter(|_| rows.is_some());
        let at = |site| SiteAt { model: c, layer: l, site, random };

        // MLP: dx → dh → (d_gate, d_up) → norm → dx
        backend.copy(Mat::new(dx, n, d), MatMut::new(dt, n, d))?;
        backend.swiglu(Mat::new(&s.gate_up, n, 2 * f), MatMut::new(h, n, f))?;
        let y_down = |_: &Slot, _| Mat::new(&s.added[1], n, d);
        lora.backward_magnitude(backend, at(Site::MlpMiddle), y_down, MatMut::new(dt, n, d))?;
        backend.linear_backward(Mat::new(dt, n, d), &layer.down, false, MatMut::new(dh, n, f))?;
        lora.backward(
            backend,
            at(Site::MlpMiddle),
            Mat::new(h, n, f),
            &s.u[3],
            Mat::new(dt, n, d),
            BackwardScratch { du, x_hat },
            Some(MatMut::new(dh, n, f)),
        )?;
        backend.swiglu_backward(
            Mat::new(dh, n, f),
            Mat::new(&s.gate_up, n, 2 * f),
            MatMut::new(d_gate_up, n, 2 * f),
        )?;
        let y_gate_up = |slot: &Slot, column| Mat::new(&s.gate_up, n, 2 * f).columns(column, slot.out_features);
        lora.backward_magnitude(backend, at(Site::MlpIn), y_gate_up, MatMut::new(d_gate_up, n, 2 * f))?;
        let w = &layer.post_attention_norm;
        backend.rms_norm(Mat::new(&s.x2, n, d), w, c.rms_norm_eps, MatMut::new(y, n, d), &mut s.inv2)?;
        backend.linear_backward(Mat::new(d_gate_up, n, 2 * f), &layer.gate_up, false, MatMut::new(dt, n, d))?;
        lora.backward(
            backend,
            at(Site::MlpIn),
            Mat::new(y, n, d),
            &s.u[2],
            Mat::new(d_gate_up, n, 2 * f),
            BackwardScratch { du, x_hat },
            Some(MatMut::new(dt, n, d)),
        )?;
        backend.rms_norm_backward(Mat::new(dt, n, d), Mat::new(&s.x2, n, d), w, &s.inv2, MatMut::new(dx, n, d))?;

        // Attention: dx → do → (dq, dk, dv) → norm → dx
        backend.copy(Mat::new(dx, n, d), MatMut::new(dt, n, d))?;
        let y_o = |_: &Slot, _| Mat::new(&s.added[0], n, d);
        lora.backward_magnitude(backend, at(Site::AttentionOut), y_o, MatMut::new(dt, n, d))?;
        let (o, d_o) = match &mut narrowed {
            None => (&s.o, &mut *d_attention),
            Some(Narrowed { o, d_o: Some(d_o), .. }) => (&*o, d_o),
            Some(_) => panic!("the rows of a pass without a backward"),
        };
        backend.linear_backward(Mat::new(dt, n, d), &layer.o, false, MatMut::new(d_o, n, q_dim))?;
        lora.backward(
            backend,
            at(Site::AttentionOut),
            Mat::new(o, n, q_dim),
            &s.u[1],
            Mat::new(dt, n, d),
            BackwardScratch { du, x_hat },
            Some(MatMut::new(d_o, n, q_dim)),
        )?;
        if let Some(Narrowed { index, d_o: Some(d_o), x, .. }) = narrowed {
            // Back among all rows; the others have no gradient yet.
            backend.fill_zero(d_attention)?;
            backend.scatter_add_rows(Mat::new(d_o, n, q_dim), index, MatMut::new(d_attention, all, q_dim))?;
            backend.copy(Mat::new(dx, n, d), MatMut::new(x, n, d))?;
            backend.fill_zero(dx)?;
            backend.scatter_add_rows(Mat::new(x, n, d), index, MatMut::new(dx, all, d))?;
        }
        let n = all;
        backend.attention_backward(
            layout,
            c.head_dim,
            c.num_key_value_heads,
            Mat::new(&s.qkv, n, qkv_dim),
            Mat::new(&s.o, n, q_dim),
            &s.lse,
            Mat::new(d_attention, n, q_dim),
            MatMut::new(dqkv, n, qkv_dim),
        )?;
        let rotated = MatMut::new(dqkv, n, qkv_dim).columns(0, q_dim + kv_dim);
        backend.rope(self.rope(positions), true, rotated)?;
        if lora.scales(l, Site::AttentionIn) {
            let rotated = q_dim + kv_dim;
            backend.copy(Mat::new(&s.qkv, n, qkv_dim).columns(0, rotated), MatMut::new(unrotated, n, rotated))?;
            backend.rope(self.rope(positions), true, MatMut::new(unrotated, n, rotated))?;
            let y_qkv = |slot: &Slot, column| {
                let y = if column < rotated { Mat::new(&*unrotated, n, rotated) } else { Mat::new(&s.qkv, n, qkv_dim) };
                y.columns(column, slot.out_features)
            };
            lora.backward_magnitude(backend, at(Site::AttentionIn), y_qkv, MatMut::new(dqkv, n, qkv_dim))?;
        }
        let w = &layer.input_norm;
        backend.rms_norm(Mat::new(&s.x1, n, d), w, c.rms_norm_eps, MatMut::new(y, n, d), &mut s.inv1)?;
        if !is_last {
            backend.linear_backward(Mat::new(dqkv, n, qkv_dim), &layer.qkv, false, MatMut::new(dt, n, d))?;
        }
        lora.backward(
            backend,
            at(Site::AttentionIn),
            Mat::new(y, n, d),
            &s.u[0],
            Mat::new(dqkv, n, qkv_dim),
            BackwardScratch { du, x_hat },
            (!is_last).then_some(MatMut::new(dt, n, d)),
        )?;
        if !is_last {
            backend.rms_norm_backward(Mat::new(dt, n, d), Mat::new(&s.x1, n, d), w, &s.inv1, MatMut::new(dx, n, d))?;
        }
        Ok(())
    }
}

/// cos and sin of the angle of every frequency, position by position.
pub(crate) fn rope_tables(config: &LlamaConfig, positions: usize) -> [Vec<f32>; 2] {
    let frequencies = config.inverse_frequencies();
    let mut tables = [Vec::new(), Vec::new()];
    for position in 0..positions {
        for &frequency in &frequencies {
            // In f32, as Transformers computes the angle; the sine of it in f64 is then exact to rounding.
            let angle = f64::from(position as f32 * frequency);
            tables[0].push(angle.cos() as f32);
            tables[1].push(angle.sin() as f32);
        }
    }
    tables
}

/// DoRA's norms must belong to the factors.
fn check<B: Backend>(lora: Option<&Lora<B>>) -> Result<()> {
    if lora.and_then(|l| l.dora.as_ref()).is_some_and(|d| !d.current) {
        return Err(Error::Invalid("the adapter's norms are out of date: Llama::prepare was not called".into()));
    }
    Ok(())
}

struct LayerPass<'a, B: Backend> {
    layer: usize,
    layout: &'a AttentionLayout,
    /// What the head will read.
    rows: &'a [u32],
    lora: Option<&'a Lora<B>>,
    random: Option<(u64, u32)>,
}

impl<B: Backend> Clone for LayerPass<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<B: Backend> Copy for LayerPass<'_, B> {}

/// Memory of the language-model head for a block of rows.
struct HeadBuffers<B: Backend> {
    rows: usize,
    index: B::Buffer,
    targets: B::Buffer,
    weights: B::Buffer,
    x: B::Buffer,
    y: B::Buffer,
    inv: B::Buffer,
    logits: B::Buffer,
    loss: B::Buffer,
    gradient: Option<HeadGradient<B>>,
}

struct HeadGradient<B: Backend> {
    dlogits: B::Buffer,
    dy: B::Buffer,
    dy32: B::Buffer,
}

impl<B: Backend> HeadBuffers<B> {
    /// The buffers of the batch before, if they are large enough.
    fn reuse(old: Option<Self>, backend: &B, c: &LlamaConfig, wanted: usize, gradient: bool) -> Result<Self> {
        match old {
            Some(old) if old.rows >= Self::block(c, wanted) && old.gradient.is_some() >= gradient => Ok(old),
            _ => Self::new(backend, c, wanted, gradient),
        }
    }

    /// Rows of a block when there are `wanted` in all.
    fn block(c: &LlamaConfig, wanted: usize) -> usize {
        (LOGITS_BLOCK / c.vocab_size).clamp(1, wanted.max(1))
    }

    fn new(backend: &B, c: &LlamaConfig, wanted: usize, gradient: bool) -> Result<Self> {
        let rows = Self::block(c, wanted);
        let (d, t) = (c.hidden_size, backend.compute_dtype());
        Ok(Self {
            rows,
            index: backend.zeros(Dtype::U32, rows)?,
            targets: backend.zeros(Dtype::U32, rows)?,
            weights: backend.zeros(Dtype::F32, rows)?,
            x: backend.uninit(Dtype::F32, rows * d)?,
            y: backend.uninit(if gradient { t } else { backend.inference_output_dtype() }, rows * d)?,
            inv: backend.uninit(Dtype::F32, rows)?,
            logits: backend.uninit(Dtype::F32, rows * c.vocab_size)?,
            loss: backend.uninit(Dtype::F32, rows)?,
            gradient: if gradient {
                Some(HeadGradient {
                    dlogits: backend.uninit(t, rows * c.vocab_size)?,
                    dy: backend.uninit(t, rows * d)?,
                    dy32: backend.uninit(Dtype::F32, rows * d)?,
                })
            } else {
                None
            },
        })
    }
}
