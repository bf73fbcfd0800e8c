//! LoRA factors (Hu et al. 2021): which linear layers have them, where each factor stands in flat device memory, and the
//! products that add them to a frozen layer, forward and backward.
//!
//! All A factors of a model are one flat f32 buffer and all B factors another, each with its compute copy, gradient and AdamW
//! states: the optimizer, the gradient norm and an all-reduce are one call each. Projections that read the same input (q, k
//! and v; gate and up) form a [`Site`]: their A factors stand below one another, so the down projection of a site is one
//! product, and they share one dropout mask.
//!
//! ```text
//! forward    x̂ = dropout(x)      u = x̂·Aᵀ            y_j += s·u_j·B_jᵀ
//! backward   dB_j += s·dy_jᵀ·u_j  du_j = s·dy_j·B_j    dA += duᵀ·x̂     dx += mask∘(du·A)/(1-p)
//! ```
//!
//! With DoRA (Liu et al. 2024) the adapted layer's output is scaled, column by column, to the norm `m` that is learnt for each
//! row of its weight, `y ← g∘y` with `g = m/‖W + s·B·A‖`. As in PEFT the norm is a constant of the gradient. Then `dm = Σ dy∘y / m`
//! and everything above sees `g∘dy`. Norms change with the factors: [`Llama::prepare`](crate::model::Llama::prepare) takes them anew.

use std::str::FromStr;

use cashtag_backend::{AdamW, BLOCK_8BIT, Backend, Dropout, Dtype, Mat, MatMut, Moments8, philox};
use serde::{Deserialize, Serialize};

use crate::config::LlamaConfig;
use crate::error::{Error, Result};

/// A linear layer of the block that can carry LoRA factors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Module {
    QProj,
    KProj,
    VProj,
    OProj,
    GateProj,
    UpProj,
    DownProj,
}

impl Module {
    pub const ALL: [Module; 7] = [
        Module::QProj,
        Module::KProj,
        Module::VProj,
        Module::OProj,
        Module::GateProj,
        Module::UpProj,
        Module::DownProj,
    ];

    /// The name that Transformers and PEFT give it: `q_proj` …
    pub fn name(self) -> &'static str {
        match self {
            Module::QProj => "q_proj",
            Module::KProj => "k_proj",
            Module::VProj => "v_proj",
            Module::OProj => "o_proj",
            Module::GateProj => "gate_proj",
            Module::UpProj => "up_proj",
            Module::DownProj => "down_proj",
        }
    }

    /// Its path below `model.layers.{i}.`: `self_attn.q_proj` …
    pub fn path(self) -> String {
        let parent = if matches!(self.site(), Site::AttentionIn | Site::AttentionOut) { "self_attn" } else { "mlp" };
        format!("{parent}.{}", self.name())
    }

    pub fn site(self) -> Site {
        match self {
            Module::QProj | Module::KProj | Module::VProj => Site::AttentionIn,
            Module::OProj => Site::AttentionOut,
            Module::GateProj | Module::UpProj => Site::MlpIn,
            Module::DownProj => Site::MlpMiddle,
        }
    }

    /// `(in_features, out_features)`.
    pub fn features(self, c: &LlamaConfig) -> (usize, usize) {
        let (d, f) = (c.hidden_size, c.intermediate_size);
        let (q, kv) = (c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim);
        match self {
            Module::QProj => (d, q),
            Module::KProj | Module::VProj => (d, kv),
            Module::OProj => (q, d),
            Module::GateProj | Module::UpProj => (d, f),
            Module::DownProj => (f, d),
        }
    }

    /// First column of its output in the fused output of its site.
    pub(crate) fn first_column(self, c: &LlamaConfig) -> usize {
        let (q, kv) = (c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim);
        match self {
            Module::KProj => q,
            Module::VProj => q + kv,
            Module::UpProj => c.intermediate_size,
            _ => 0,
        }
    }
}

impl FromStr for Module {
    type Err = String;

    fn from_str(s: &str) -> std::result::Result<Self, String> {
        Module::ALL.into_iter().find(|m| m.name() == s).ok_or_else(|| {
            format!("unknown target module {s:?}\n  hint: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj or all-linear")
        })
    }
}

/// The four inputs of a block that linear layers read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Site {
    AttentionIn,
    AttentionOut,
    MlpIn,
    MlpMiddle,
}

impl Site {
    pub const ALL: [Site; 4] = [Site::AttentionIn, Site::AttentionOut, Site::MlpIn, Site::MlpMiddle];
}

/// Hyper-parameters of the adapter, under PEFT's names.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LoraConfig {
    pub r: usize,
    pub lora_alpha: f32,
    pub lora_dropout: f32,
    pub target_modules: Vec<Module>,
    /// Scale alpha/√r instead of alpha/r.
    pub use_rslora: bool,
    /// Only these layers; all if `None`.
    pub layers_to_transform: Option<Vec<usize>>,
    /// Learn the norm of each row of an adapted weight apart from its direction.
    #[serde(default)]
    pub use_dora: bool,
}

impl Default for LoraConfig {
    fn default() -> Self {
        Self {
            r: 64,
            lora_alpha: 16.0,
            lora_dropout: 0.1,
            target_modules: Module::ALL.to_vec(),
            use_rslora: false,
            layers_to_transform: None,
            use_dora: false,
        }
    }
}

impl LoraConfig {
    pub fn scale(&self) -> f32 {
        self.lora_alpha / if self.use_rslora { (self.r as f32).sqrt() } else { self.r as f32 }
    }

    /// # Errors
    /// Values that PEFT would refuse, or layers that the model does not have.
    pub fn validate(&self, c: &LlamaConfig) -> Result<()> {
        let bad = |what: String| Err(Error::Adapter(what));
        if self.r == 0 || self.r > c.hidden_size {
            return bad(format!("lora r must be 1 to {} (the hidden size), found {}", c.hidden_size, self.r));
        }
        if !self.lora_alpha.is_finite() || !(0.0..1.0).contains(&self.lora_dropout) {
            return bad(format!(
                "lora_alpha must be finite and lora_dropout in [0, 1), found {} and {}",
                self.lora_alpha, self.lora_dropout
            ));
        }
        if self.target_modules.is_empty() {
            return bad("target_modules is empty: nothing would be trained".into());
        }
        if let Some(&layer) = self.layers_to_transform.iter().flatten().find(|&&l| l >= c.num_hidden_layers) {
            return bad(format!("layers_to_transform names layer {layer}, the model has {}", c.num_hidden_layers));
        }
        Ok(())
    }
}

/// Where one module's factors stand: A `[r, in]` in the A buffer, B `[out, r]` in the B buffer.
#[derive(Clone, Copy, Debug)]
pub struct Slot {
    pub layer: usize,
    pub module: Module,
    pub a_offset: usize,
    pub b_offset: usize,
    pub in_features: usize,
    pub out_features: usize,
}

impl Slot {
    /// Where its magnitudes stand among those of all modules.
    pub fn magnitude_offset(&self, r: usize) -> usize {
        self.b_offset / r
    }
}

/// Flat parameters of one kind (all A or all B) with what the optimizer keeps about them.
pub struct Group<B: Backend> {
    pub parameter: B::Buffer,
    /// The parameters in the compute dtype, as the matrix products read them.
    pub compute: B::Buffer,
    pub len: usize,
    pub training: Option<Training<B>>,
}

pub struct Training<B: Backend> {
    pub gradient: B::Buffer,
    pub moments: Moments<B>,
}

/// What AdamW remembers of the gradients.
pub enum Moments<B: Backend> {
    Full { m: B::Buffer, v: B::Buffer },
    EightBit(EightBit<B>),
}

/// Buffers of [`Moments8`].
pub struct EightBit<B: Backend> {
    table: B::Buffer,
    pub blocks: usize,
    pub m: B::Buffer,
    pub v: B::Buffer,
    pub absmax: B::Buffer,
    pub m32: B::Buffer,
    pub v32: B::Buffer,
    /// Elements of `m32` and `v32`.
    pub wide: usize,
}

/// Tensors with fewer elements keep f32 moments beside 8-bit ones, as in bitsandbytes (`min_8bit_size`).
pub const MIN_8BIT_SIZE: usize = 4096;

impl<B: Backend> EightBit<B> {
    /// Moments of zero for tensors of these sizes that stand one behind the other.
    fn new(backend: &B, tensors: &[usize]) -> Result<Self> {
        let (mut table, mut first, mut wide) = (Vec::new(), 0, 0);
        for &size in tensors {
            for start in (0..size).step_by(BLOCK_8BIT) {
                let len = BLOCK_8BIT.min(size - start);
                let place = if size < MIN_8BIT_SIZE { wide as u32 } else { u32::MAX };
                wide += if size < MIN_8BIT_SIZE { len } else { 0 };
                table.extend([first as u32, len as u32, place]);
                first += len;
            }
        }
        let blocks = table.len() / 3;
        let mut on_device = backend.zeros(Dtype::U32, table.len())?;
        backend.upload_u32(&table, &mut on_device)?;
        // Level 127 of the signed map and level 0 of the unsigned one are 0; with an absmax of 0 every level is.
        let codes = || backend.zeros(Dtype::U32, first.div_ceil(4));
        let wides = || backend.zeros(Dtype::F32, wide.max(1));
        Ok(Self {
            table: on_device,
            blocks,
            m: codes()?,
            v: codes()?,
            absmax: backend.zeros(Dtype::F32, 2 * blocks)?,
            m32: wides()?,
            v32: wides()?,
            wide,
        })
    }
}

impl<B: Backend> Group<B> {
    fn new(backend: &B, values: &[f32], trainable: bool) -> Result<Self> {
        let len = values.len();
        let mut parameter = backend.zeros(Dtype::F32, len)?;
        let mut compute = backend.zeros(backend.compute_dtype(), len)?;
        backend.upload(values, &mut parameter, 0)?;
        backend.upload(values, &mut compute, 0)?;
        let training = if trainable {
            let zeros = || backend.zeros(Dtype::F32, len);
            Some(Training { gradient: zeros()?, moments: Moments::Full { m: zeros()?, v: zeros()? } })
        } else {
            None
        };
        Ok(Self { parameter, compute, len, training })
    }

    pub fn download(&self, backend: &B) -> Result<Vec<f32>> {
        let mut values = vec![0.0; self.len];
        backend.download(&self.parameter, 0, &mut values)?;
        Ok(values)
    }

    /// Replaces the parameters.
    pub fn upload(&mut self, backend: &B, values: &[f32]) -> Result<()> {
        assert_eq!(values.len(), self.len);
        backend.upload(values, &mut self.parameter, 0)?;
        backend.upload(values, &mut self.compute, 0)?;
        Ok(())
    }

    fn step(&mut self, backend: &B, hyper: AdamW) -> Result<()> {
        let Some(Training { gradient, moments }) = &mut self.training else { return Ok(()) };
        match moments {
            Moments::Full { m, v } => {
                backend.adamw(hyper, &mut self.parameter, gradient, m, v, &mut self.compute)?;
            }
            Moments::EightBit(e) => {
                let EightBit { table, blocks, m, v, absmax, m32, v32, .. } = e;
                let moments = Moments8 { table, blocks: *blocks, m, v, absmax, m32, v32 };
                backend.adamw_8bit(hyper, &mut self.parameter, gradient, moments, &mut self.compute)?;
            }
        }
        Ok(())
    }
}

/// What DoRA adds to the factors. Places of all modules' rows stand in the order of the slots.
pub struct Dora<B: Backend> {
    pub magnitude: Group<B>,
    /// g = m/‖W + s·B·A‖.
    pub(crate) scale: B::Buffer,
    /// 1/m, for the gradient.
    pub(crate) inverse: B::Buffer,
    /// Whether `scale` and `inverse` belong to the parameters as they are.
    pub(crate) current: bool,
    /// The magnitudes were not given: they begin as the norms of the weights.
    pub(crate) begins: bool,
}

/// An adapter on a device.
pub struct Lora<B: Backend> {
    pub config: LoraConfig,
    pub a: Group<B>,
    pub b: Group<B>,
    pub dora: Option<Dora<B>>,
    slots: Vec<Slot>,
    /// `[layer][site]`: range of `slots`.
    ranges: Vec<[std::ops::Range<usize>; 4]>,
}

/// The factors as host memory, in the order of [`slots`].
#[derive(Clone, Debug, PartialEq)]
pub struct LoraTensors {
    pub a: Vec<f32>,
    pub b: Vec<f32>,
    /// DoRA's magnitudes; empty without DoRA, and for a new adapter, whose magnitudes are the norms of the weights.
    pub magnitude: Vec<f32>,
}

/// The slots of a configuration, in memory order: by layer, site, module.
pub fn slots(config: &LoraConfig, model: &LlamaConfig) -> Vec<Slot> {
    let (mut slots, mut a, mut b) = (Vec::new(), 0, 0);
    for layer in 0..model.num_hidden_layers {
        if config.layers_to_transform.as_ref().is_some_and(|l| !l.contains(&layer)) {
            continue;
        }
        for module in Module::ALL.into_iter().filter(|m| config.target_modules.contains(m)) {
            let (in_features, out_features) = module.features(model);
            slots.push(Slot { layer, module, a_offset: a, b_offset: b, in_features, out_features });
            a += config.r * in_features;
            b += config.r * out_features;
        }
    }
    slots
}

impl LoraTensors {
    /// A `[r, in]` of a module of an adapter of rank `r`.
    pub fn a_of(&self, slot: &Slot, r: usize) -> &[f32] {
        &self.a[slot.a_offset..slot.a_offset + r * slot.in_features]
    }

    /// B `[out, r]` of it.
    pub fn b_of(&self, slot: &Slot, r: usize) -> &[f32] {
        &self.b[slot.b_offset..slot.b_offset + r * slot.out_features]
    }

    /// PEFT's initialisation: A Kaiming-uniform with a = √5, that is U(-1/√in, 1/√in); B zero.
    pub fn init(config: &LoraConfig, model: &LlamaConfig, seed: u64) -> Self {
        let slots = slots(config, model);
        let b = slots.iter().map(|s| s.out_features * config.r).sum();
        let mut a = Vec::with_capacity(slots.iter().map(|s| s.in_features * config.r).sum());
        for (i, s) in slots.iter().enumerate() {
            let bound = 1.0 / (s.in_features as f32).sqrt();
            let n = config.r * s.in_features;
            for block in 0..n.div_ceil(4) {
                // Counter word 3 is out of the range of training steps, so dropout never repeats these words.
                let key = [seed as u32, (seed >> 32) as u32];
                let words = philox::philox4x32([block as u32, i as u32, 0, u32::MAX], key);
                for word in words.into_iter().take(n - block * 4) {
                    let unit = (word >> 8) as f32 / (1u32 << 24) as f32;
                    a.push((2.0 * unit - 1.0) * bound);
                }
            }
        }
        Self { a, b: vec![0.0; b], magnitude: Vec::new() }
    }
}

impl<B: Backend> Lora<B> {
    /// # Errors
    /// A configuration that does not fit the model, factors of another size, or a device without memory.
    pub fn new(
        backend: &B,
        config: LoraConfig,
        model: &LlamaConfig,
        tensors: &LoraTensors,
        trainable: bool,
    ) -> Result<Self> {
        config.validate(model)?;
        let slots = slots(&config, model);
        let size = |f: fn(&Slot) -> usize| slots.iter().map(f).sum::<usize>() * config.r;
        let expected = (size(|s| s.in_features), size(|s| s.out_features));
        if (tensors.a.len(), tensors.b.len()) != expected {
            return Err(Error::Adapter(format!(
                "the factors hold {} and {} values, the model needs {} and {}",
                tensors.a.len(),
                tensors.b.len(),
                expected.0,
                expected.1
            )));
        }
        let rows = slots.iter().map(|s| s.out_features).sum::<usize>();
        let dora = if config.use_dora {
            if !backend.has_dora() {
                return Err(Error::Adapter(format!(
                    "DoRA is not implemented on {}\n  hint: leave use_dora out, or take --device cpu",
                    backend.capabilities().device
                )));
            }
            let begins = tensors.magnitude.is_empty();
            if !begins && tensors.magnitude.len() != rows {
                let found = tensors.magnitude.len();
                return Err(Error::Adapter(format!("the magnitudes are {found} values, the model needs {rows}")));
            }
            let zeros = vec![0.0; rows];
            Some(Dora {
                magnitude: Group::new(backend, if begins { &zeros } else { &tensors.magnitude }, trainable)?,
                scale: backend.zeros(Dtype::F32, rows)?,
                inverse: backend.zeros(Dtype::F32, rows)?,
                current: false,
                begins,
            })
        } else {
            None
        };
        let range = |layer: usize, site: Site| {
            let first = slots.partition_point(|s| (s.layer, s.module.site() as usize) < (layer, site as usize));
            let last = slots.partition_point(|s| (s.layer, s.module.site() as usize) <= (layer, site as usize));
            first..last
        };
        let ranges = (0..model.num_hidden_layers).map(|l| Site::ALL.map(|s| range(l, s))).collect();
        Ok(Self {
            a: Group::new(backend, &tensors.a, trainable)?,
            b: Group::new(backend, &tensors.b, trainable)?,
            dora,
            config,
            slots,
            ranges,
        })
    }

    pub fn slots(&self) -> &[Slot] {
        &self.slots
    }

    /// The first block that has factors.
    pub fn first_layer(&self) -> Option<usize> {
        self.slots.iter().map(|s| s.layer).min()
    }

    pub fn parameters(&self) -> usize {
        self.groups().map(|(_, g)| g.len).sum()
    }

    /// All parameters, by the names that checkpoints give them.
    pub fn groups(&self) -> impl Iterator<Item = (&'static str, &Group<B>)> {
        let magnitude = self.dora.as_ref().map(|d| ("magnitude", &d.magnitude));
        [("a", &self.a), ("b", &self.b)].into_iter().chain(magnitude)
    }

    /// As [`groups`](Self::groups), to change them; [`Llama::prepare`](crate::model::Llama::prepare) is needed behind it.
    pub fn groups_mut(&mut self) -> impl Iterator<Item = (&'static str, &mut Group<B>)> {
        let magnitude = self.dora.as_mut().map(|d| {
            d.current = false;
            ("magnitude", &mut d.magnitude)
        });
        [("a", &mut self.a), ("b", &mut self.b)].into_iter().chain(magnitude)
    }

    /// The magnitudes of a new adapter were put there by somebody: they do not begin as the norms of the weights.
    pub fn magnitudes_given(&mut self) {
        if let Some(d) = &mut self.dora {
            d.begins = false;
        }
    }

    /// Keeps AdamW's moments in 8 bits from here on; they begin anew.
    ///
    /// # Errors
    /// A device without memory.
    pub fn use_8bit_moments(&mut self, backend: &B) -> Result<()> {
        let r = self.config.r;
        let sizes = |f: fn(&Slot, usize) -> usize| self.slots.iter().map(|s| f(s, r)).collect::<Vec<_>>();
        let all = [sizes(|s, r| s.in_features * r), sizes(|s, r| s.out_features * r), sizes(|s, _| s.out_features)];
        let magnitude = self.dora.as_mut().map(|d| &mut d.magnitude);
        for (group, tensors) in [Some(&mut self.a), Some(&mut self.b), magnitude].into_iter().zip(all) {
            if let Some(training) = group.and_then(|g| g.training.as_mut()) {
                training.moments = Moments::EightBit(EightBit::new(backend, &tensors)?);
            }
        }
        Ok(())
    }

    pub fn tensors(&self, backend: &B) -> Result<LoraTensors> {
        let magnitude = match &self.dora {
            Some(d) => d.magnitude.download(backend)?,
            None => Vec::new(),
        };
        Ok(LoraTensors { a: self.a.download(backend)?, b: self.b.download(backend)?, magnitude })
    }

    /// Whether the output of this site is scaled as a whole, so that it cannot be added to anything before.
    pub(crate) fn scales(&self, layer: usize, site: Site) -> bool {
        self.dora.is_some() && !self.site(layer, site).is_empty()
    }

    pub(crate) fn site(&self, layer: usize, site: Site) -> &[Slot] {
        &self.slots[self.ranges[layer][site as usize].clone()]
    }

    /// Columns of `u` that a site needs: r for each of its modules.
    pub(crate) fn site_rank(&self, layer: usize, site: Site) -> usize {
        self.site(layer, site).len() * self.config.r
    }

    /// Largest [`site_rank`](Self::site_rank) of a site.
    pub(crate) fn max_site_rank(&self, site: Site) -> usize {
        (0..self.ranges.len()).map(|l| self.site_rank(l, site)).max().unwrap_or(0)
    }

    fn a_factor(&self, slots: &[Slot]) -> Mat<'_, B::Buffer> {
        let (first, rows) = (slots[0], slots.len() * self.config.r);
        Mat {
            buffer: &self.a.compute,
            offset: first.a_offset,
            rows,
            cols: first.in_features,
            stride: first.in_features,
        }
    }

    /// A of one module.
    pub(crate) fn a_of(&self, slot: &Slot) -> Mat<'_, B::Buffer> {
        self.a_factor(std::slice::from_ref(slot))
    }

    pub(crate) fn b_factor(&self, slot: &Slot) -> Mat<'_, B::Buffer> {
        let r = self.config.r;
        Mat { buffer: &self.b.compute, offset: slot.b_offset, rows: slot.out_features, cols: r, stride: r }
    }

    /// Adds the site's factors to `y` (the fused output of the frozen layer); `u` receives x̂·Aᵀ for the backward.
    pub(crate) fn forward(
        &self,
        backend: &B,
        at: SiteAt<'_>,
        x: Mat<'_, B::Buffer>,
        x_hat: &mut B::Buffer,
        u: &mut B::Buffer,
        mut y: MatMut<'_, B::Buffer>,
    ) -> Result<()> {
        let slots = self.site(at.layer, at.site);
        if slots.is_empty() {
            return Ok(());
        }
        let rank = slots.len() * self.config.r;
        let x = match at.dropout(&self.config) {
            Some(d) => {
                backend.dropout(x, d, false, MatMut::new(x_hat, x.rows, x.cols))?;
                Mat::new(&*x_hat, x.rows, x.cols)
            }
            None => x,
        };
        backend.matmul_nt(1.0, x, self.a_factor(slots), 0.0, MatMut::new(u, x.rows, rank))?;
        for (j, slot) in slots.iter().enumerate() {
            let u = Mat::new(&*u, x.rows, rank).columns(j * self.config.r, self.config.r);
            let y = y.reborrow().columns(slot.module.first_column(at.model), slot.out_features);
            backend.matmul_nt(self.config.scale(), u, self.b_factor(slot), 1.0, y)?;
        }
        if let Some(d) = &self.dora {
            for slot in slots {
                let y = y.reborrow().columns(slot.module.first_column(at.model), slot.out_features);
                backend.scale_columns(&d.scale, slot.magnitude_offset(self.config.r), y)?;
            }
        }
        Ok(())
    }

    /// DoRA's part of the backward, before everything else: the gradient of the magnitudes, and `dy ← g∘dy`. `y` is the fused
    /// output as [`forward`](Self::forward) left it, without what was done to it later.
    pub(crate) fn backward_magnitude<'y>(
        &mut self,
        backend: &B,
        at: SiteAt<'_>,
        y: impl Fn(&Slot, usize) -> Mat<'y, B::Buffer>,
        mut dy: MatMut<'_, B::Buffer>,
    ) -> Result<()> {
        let r = self.config.r;
        let Some(d) = &mut self.dora else { return Ok(()) };
        for slot in &self.slots[self.ranges[at.layer][at.site as usize].clone()] {
            let (column, offset) = (slot.module.first_column(at.model), slot.magnitude_offset(r));
            if let Some(t) = &mut d.magnitude.training {
                let dy = dy.as_ref().columns(column, slot.out_features);
                backend.column_dots(dy, y(slot, column), &d.inverse, offset, &mut t.gradient)?;
            }
            backend.scale_columns(&d.scale, offset, dy.reborrow().columns(column, slot.out_features))?;
        }
        Ok(())
    }

    /// Gradients of the site's factors, and what flows through them into `dx`.
    ///
    /// `x` is the site's input, `u` as the forward left it, `dy` the gradient of the fused output (T). `du` and `x_hat` are
    /// scratch. `dx` (T, already holding dy·W) is left alone when it is `None`.
    pub(crate) fn backward(
        &mut self,
        backend: &B,
        at: SiteAt<'_>,
        x: Mat<'_, B::Buffer>,
        u: &B::Buffer,
        dy: Mat<'_, B::Buffer>,
        scratch: BackwardScratch<'_, B>,
        dx: Option<MatMut<'_, B::Buffer>>,
    ) -> Result<()> {
        let slots = self.slots[self.ranges[at.layer][at.site as usize].clone()].to_vec();
        if slots.is_empty() {
            return Ok(());
        }
        let (r, scale) = (self.config.r, self.config.scale());
        let (n, rank) = (x.rows, slots.len() * r);
        let BackwardScratch { du, x_hat } = scratch;
        for (j, slot) in slots.iter().enumerate() {
            let dy = dy.columns(slot.module.first_column(at.model), slot.out_features);
            let u = Mat::new(u, n, rank).columns(j * r, r);
            backend.matmul_nn(scale, dy, self.b_factor(slot), 0.0, MatMut::new(du, n, rank).columns(j * r, r))?;
            let Some(t) = &mut self.b.training else { continue };
            let d_b =
                MatMut { buffer: &mut t.gradient, offset: slot.b_offset, rows: slot.out_features, cols: r, stride: r };
            backend.matmul_tn(scale, dy, u, 1.0, d_b)?;
        }
        let du = Mat::new(&*du, n, rank);
        let dropout = at.dropout(&self.config);
        if let Some(t) = &mut self.a.training {
            let x = match dropout {
                Some(d) => {
                    backend.dropout(x, d, false, MatMut::new(x_hat, n, x.cols))?;
                    Mat::new(&*x_hat, n, x.cols)
                }
                None => x,
            };
            let offset = slots[0].a_offset;
            let d_a = MatMut { buffer: &mut t.gradient, offset, rows: rank, cols: x.cols, stride: x.cols };
            backend.matmul_tn(1.0, du, x, 1.0, d_a)?;
        }
        if let Some(dx) = dx {
            match dropout {
                Some(d) => {
                    backend.matmul_nn(1.0, du, self.a_factor(&slots), 0.0, MatMut::new(x_hat, n, x.cols))?;
                    backend.dropout(Mat::new(&*x_hat, n, x.cols), d, true, dx)?;
                }
                None => backend.matmul_nn(1.0, du, self.a_factor(&slots), 1.0, dx)?,
            }
        }
        Ok(())
    }

    /// Sets all gradients to zero.
    pub fn zero_grad(&mut self, backend: &B) -> Result<()> {
        let magnitude = self.dora.as_mut().map(|d| &mut d.magnitude);
        for group in [&mut self.a, &mut self.b].into_iter().chain(magnitude) {
            if let Some(t) = &mut group.training {
                backend.fill_zero(&mut t.gradient)?;
            }
        }
        Ok(())
    }

    /// √Σg² over all gradients; not finite if any gradient is not.
    pub fn grad_norm(&self, backend: &B) -> Result<f64> {
        let mut sum = 0.0;
        for t in self.groups().filter_map(|(_, g)| g.training.as_ref()) {
            sum += backend.sum_of_squares(&t.gradient)?;
        }
        Ok(sum.sqrt())
    }

    /// One AdamW step; `loraplus_lr_ratio` multiplies the learning rate of the B factors (LoRA+, Hayou et al. 2024) and, as in PEFT,
    /// of DoRA's magnitudes.
    pub fn step(&mut self, backend: &B, hyper: AdamW, loraplus_lr_ratio: f32) -> Result<()> {
        self.a.step(backend, hyper)?;
        let hyper = AdamW { learning_rate: hyper.learning_rate * loraplus_lr_ratio, ..hyper };
        self.b.step(backend, hyper)?;
        if let Some(d) = &mut self.dora {
            d.current = false;
            d.magnitude.step(backend, hyper)?;
        }
        Ok(())
    }
}

/// Scratch of [`Lora::backward`].
pub(crate) struct BackwardScratch<'a, B: Backend> {
    pub(crate) du: &'a mut B::Buffer,
    pub(crate) x_hat: &'a mut B::Buffer,
}

/// Which site of which layer, and the randomness of this pass.
#[derive(Clone, Copy)]
pub(crate) struct SiteAt<'a> {
    pub(crate) model: &'a LlamaConfig,
    pub(crate) layer: usize,
    pub(crate) site: Site,
    /// (seed, micro-batch counter) while training; `None` turns dropout off.
    pub(crate) random: Option<(u64, u32)>,
}

impl SiteAt<'_> {
    fn dropout(&self, config: &LoraConfig) -> Option<Dropout> {
        let (seed, step) = self.random?;
        let site = (self.layer * 4 + self.site as usize) as u32;
        (config.lora_dropout > 0.0).then_some(Dropout { p: config.lora_dropout, seed, step, site })
    }
}
