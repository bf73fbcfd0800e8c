//! Launches of the element-wise kernels, norms, RoPE, SwiGLU, loss and optimizer: the host picks the width and the grid.

use cashtag_backend::{AdamW, Dropout, Dtype, Moments8, Result};

use crate::Core;
use crate::driver::Launch;
use crate::kernels::{Family, Variant};
use crate::lora::{Mask, mask_and_scale};
use crate::memory::{CudaBuffer, View};

const THREADS: u32 = 256;

/// A grid over the rows of a view: `chunks` blocks of `threads` threads a row, `width` columns a thread.
pub(crate) struct Walk {
    pub(crate) wide: bool,
    pub(crate) chunks: u32,
    pub(crate) blocks: u32,
    pub(crate) threads: u32,
}

impl Walk {
    pub(crate) fn new(rows: usize, cols: usize, width: usize, wide: bool) -> Self {
        let lanes = cols.div_ceil(width).max(1);
        let threads = (lanes.next_multiple_of(32) as u32).min(THREADS);
        let chunks = u32::try_from(lanes.div_ceil(threads as usize)).expect("a row fits a grid");
        let blocks = if cols == 0 { 0 } else { rows * chunks as usize };
        let blocks = i32::try_from(blocks).expect("rows fit a grid") as u32;
        Self { wide, chunks, blocks, threads }
    }

    fn of(views: &[&View]) -> Self {
        let wide = views.iter().all(|v| v.wide());
        Self::new(views[0].rows, views[0].cols, if wide { 8 } else { 1 }, wide)
    }
}

/// See [`Core::outputs`].
struct Outputs {
    plain: (u64, i64),
    dropped: (u64, i64),
    mask: Mask,
    scale: f32,
    wide: bool,
}

macro_rules! width {
    ($wide:expr, $name:literal) => {
        if $wide { concat!($name, "_8") } else { concat!($name, "_1") }
    };
}

/// Both views as one row each where neither has gaps, so that short rows fill whole blocks.
fn flatten(a: View, b: View) -> (View, View) {
    match (a.flat(), b.flat()) {
        (Some(x), Some(y)) if x.cols < 1 << 31 => (x, y),
        _ => (a, b),
    }
}

fn between(family: Family, s: Dtype, d: Dtype) -> Variant {
    Variant { s: Some(s), d: Some(d), ..Variant::plain(family) }
}

pub(crate) fn f32s(buffer: &CudaBuffer, at_least: usize, what: &str) -> u64 {
    assert!(
        buffer.dtype == Dtype::F32 && buffer.len >= at_least,
        "{what} is float32 of at least {at_least} elements, not {} of {}",
        buffer.dtype.name(),
        buffer.len
    );
    buffer.ptr()
}

pub(crate) fn u32s(buffer: &CudaBuffer, at_least: usize, what: &str) -> u64 {
    assert!(
        buffer.dtype == Dtype::U32 && buffer.len >= at_least,
        "{what} is uint32 of at least {at_least} elements, not {} of {}",
        buffer.dtype.name(),
        buffer.len
    );
    buffer.ptr()
}

impl Core {
    fn launch(&self, variant: Variant, name: &'static str) -> Result<Launch<'_>> {
        Ok(Launch::new(&self.device, self.kernels.get(variant, name)?))
    }

    fn floats(&self, views: &[&View]) {
        assert!(views.iter().all(|v| v.dtype != Dtype::U32), "expected floats, found uint32");
    }

    fn computes(&self, views: &[&View]) {
        let t = self.compute;
        assert!(views.iter().all(|v| v.dtype == t), "expected {} everywhere, found {views:?}", t.name());
    }

    fn shapes(a: View, b: View) {
        assert_eq!((a.rows, a.cols), (b.rows, b.cols), "shapes differ");
    }

    pub(crate) fn copy(&self, src: View, dst: View) -> Result<()> {
        self.pairwise(src, dst, |wide| width!(wide, "copy"))
    }

    pub(crate) fn add(&self, src: View, dst: View) -> Result<()> {
        self.pairwise(src, dst, |wide| width!(wide, "add"))
    }

    fn pairwise(&self, src: View, dst: View, name: impl Fn(bool) -> &'static str) -> Result<()> {
        Self::shapes(src, dst);
        self.floats(&[&src, &dst]);
        let (src, dst) = flatten(src, dst);
        let walk = Walk::of(&[&src, &dst]);
        let launch = self
            .launch(between(Family::Elementwise, src.dtype, dst.dtype), name(walk.wide))?
            .arg(src.ptr)
            .arg(src.stride as i64)
            .arg(dst.ptr)
            .arg(dst.stride as i64)
            .arg(src.cols as u32)
            .arg(walk.chunks);
        // SAFETY: the views were checked against their buffers.
        unsafe { launch.go((walk.blocks, 1, 1), walk.threads, 0) }
    }

    pub(crate) fn gather(&self, src: View, rows: u64, out: View) -> Result<()> {
        assert_eq!(src.cols, out.cols, "columns differ");
        self.floats(&[&src, &out]);
        let walk = Walk::of(&[&out, &src]);
        let launch = self
            .launch(between(Family::Elementwise, src.dtype, out.dtype), width!(walk.wide, "gather"))?
            .arg(src.ptr)
            .arg(src.stride as i64)
            .arg(rows)
            .arg(src.rows as u32)
            .arg(out.ptr)
            .arg(out.stride as i64)
            .arg(out.cols as u32)
            .arg(walk.chunks);
        // SAFETY: `out` and `rows` were checked; the kernel refuses row numbers outside `src`.
        unsafe { launch.go((walk.blocks, 1, 1), walk.threads, 0) }
    }

    pub(crate) fn scatter_add(&self, src: View, rows: u64, dst: View) -> Result<()> {
        assert_eq!(src.cols, dst.cols, "columns differ");
        self.floats(&[&src, &dst]);
        let walk = Walk::of(&[&src, &dst]);
        let launch = self
            .launch(between(Family::Elementwise, src.dtype, dst.dtype), width!(walk.wide, "scatter_add"))?
            .arg(src.ptr)
            .arg(src.stride as i64)
            .arg(rows)
            .arg(dst.rows as u32)
            .arg(dst.ptr)
            .arg(dst.stride as i64)
            .arg(src.cols as u32)
            .arg(walk.chunks);
        // SAFETY: as above, with `dst` as the side that rows select.
        unsafe { launch.go((walk.blocks, 1, 1), walk.threads, 0) }
    }

    pub(crate) fn dropout(&self, x: View, dropout: Dropout, accumulate: bool, out: View) -> Result<()> {
        Self::shapes(x, out);
        self.computes(&[&x, &out]);
        // The mask depends on row and column, so the rows stay rows.
        let walk = Walk::of(&[&x, &out]);
        let name = if accumulate { width!(walk.wide, "dropout_add") } else { width!(walk.wide, "dropout") };
        let launch = self
            .launch(Variant::of(Family::Dropout, self.compute), name)?
            .arg(x.ptr)
            .arg(x.stride as i64)
            .arg(out.ptr)
            .arg(out.stride as i64)
            .arg(x.cols as u32)
            .arg(walk.chunks)
            .arg(Mask::from(dropout))
            .arg(1.0 / (1.0 - dropout.p));
        // SAFETY: the views were checked against their buffers.
        unsafe { launch.go((walk.blocks, 1, 1), walk.threads, 0) }
    }

    /// `y`, and `dropped` = dropout(y); either may be left out.
    pub(crate) fn rms_norm(
        &self,
        x: View,
        w: &CudaBuffer,
        epsilon: f32,
        y: Option<View>,
        dropped: Option<(Dropout, View)>,
        inv_rms: &CudaBuffer,
    ) -> Result<()> {
        let outputs = self.outputs(x.rows, x.cols, y, dropped);
        self.floats(&[&x]);
        let (w, inv_rms) = (f32s(w, x.cols, "w"), f32s(inv_rms, x.rows, "inv_rms"));
        let launch = self
            .launch(
                Variant::from_to(Family::Norm, x.dtype, self.compute),
                width!(x.wide() && outputs.wide, "rms_norm"),
            )?
            .arg(x.ptr)
            .arg(x.stride as i64)
            .arg(w)
            .arg(epsilon)
            .arg(outputs.plain.0)
            .arg(outputs.plain.1)
            .arg(outputs.dropped.0)
            .arg(outputs.dropped.1)
            .arg(outputs.mask)
            .arg(outputs.scale)
            .arg(inv_rms)
            .arg(x.cols as u32);
        // SAFETY: views and buffers were checked.
        unsafe { launch.go((x.rows as u32, 1, 1), THREADS, 0) }
    }

    pub(crate) fn rms_norm_backward(
        &self,
        dy: View,
        x: View,
        w: &CudaBuffer,
        inv_rms: &CudaBuffer,
        dx: View,
        copy: Option<View>,
    ) -> Result<()> {
        Self::shapes(dy, x);
        Self::shapes(x, dx);
        self.computes(&[&dy]);
        self.floats(&[&x]);
        assert_eq!(dx.dtype, Dtype::F32, "dx is float32");
        let (w, inv_rms) = (f32s(w, x.cols, "w"), f32s(inv_rms, x.rows, "inv_rms"));
        if let Some(c) = copy {
            Self::shapes(dx, c);
            self.computes(&[&c]);
        }
        let wide = dy.wide() && x.wide() && dx.wide() && copy.is_none_or(|c| c.wide());
        let launch = self
            .launch(Variant::from_to(Family::Norm, x.dtype, self.compute), width!(wide, "rms_norm_backward"))?
            .arg(dy.ptr)
            .arg(dy.stride as i64)
            .arg(x.ptr)
            .arg(x.stride as i64)
            .arg(w)
            .arg(inv_rms)
            .arg(dx.ptr)
            .arg(dx.stride as i64)
            .arg(copy.map_or(0, |c| c.ptr))
            .arg(copy.map_or(0, |c| c.stride as i64))
            .arg(x.cols as u32);
        // SAFETY: views and buffers were checked.
        unsafe { launch.go((x.rows as u32, 1, 1), THREADS, 0) }
    }

    #[allow(clippy::too_many_arguments)]
    pub(crate) fn rope(
        &self,
        x: View,
        head_dim: usize,
        cos: &CudaBuffer,
        sin: &CudaBuffer,
        positions: &CudaBuffer,
        inverse: bool,
    ) -> Result<()> {
        self.computes(&[&x]);
        assert!(
            head_dim.is_multiple_of(2) && head_dim > 0 && x.cols.is_multiple_of(head_dim),
            "{} columns of heads of {head_dim}",
            x.cols
        );
        let half = head_dim / 2;
        assert_eq!(cos.len, sin.len);
        let (cos_ptr, sin_ptr) = (f32s(cos, 0, "cos"), f32s(sin, 0, "sin"));
        let wide = x.wide() && half.is_multiple_of(8);
        let lanes = if wide { half / 8 } else { half };
        assert!(lanes <= 1024, "heads of {head_dim} are too wide");
        let threads = ((THREADS as usize / lanes).max(1) * lanes) as u32;
        let launch = self
            .launch(Variant::of(Family::Rope, self.compute), width!(wide, "rope"))?
            .arg(x.ptr)
            .arg(x.stride as i64)
            .arg((x.cols / head_dim) as u32)
            .arg(half as u32)
            .arg(cos_ptr)
            .arg(sin_ptr)
            .arg(u32s(positions, x.rows, "positions"))
            .arg((cos.len / half) as u32)
            .arg(if inverse { -1.0f32 } else { 1.0 });
        // SAFETY: the view was checked; the kernel refuses positions outside the tables.
        unsafe { launch.go((x.rows as u32, 1, 1), threads, 0) }
    }

    /// `h`, and `dropped` = dropout(h); either may be left out.
    pub(crate) fn swiglu(&self, gate_up: View, h: Option<View>, dropped: Option<(Dropout, View)>) -> Result<()> {
        assert!(gate_up.cols.is_multiple_of(2), "gate_up holds gate and up");
        let f = gate_up.cols / 2;
        let outputs = self.outputs(gate_up.rows, f, h, dropped);
        self.computes(&[&gate_up]);
        let wide = gate_up.columns(0, f).wide() && gate_up.columns(f, f).wide() && outputs.wide;
        let walk = Walk::new(gate_up.rows, f, if wide { 8 } else { 1 }, wide);
        let launch = self
            .launch(Variant::of(Family::Swiglu, self.compute), width!(walk.wide, "swiglu"))?
            .arg(gate_up.ptr)
            .arg(gate_up.stride as i64)
            .arg(outputs.plain.0)
            .arg(outputs.plain.1)
            .arg(outputs.dropped.0)
            .arg(outputs.dropped.1)
            .arg(outputs.mask)
            .arg(outputs.scale)
            .arg(f as u32)
            .arg(walk.chunks);
        // SAFETY: the views were checked against their buffers.
        unsafe { launch.go((walk.blocks, 1, 1), walk.threads, 0) }
    }

    /// Arguments for a result and its copy under dropout.
    fn outputs(&self, rows: usize, cols: usize, plain: Option<View>, dropped: Option<(Dropout, View)>) -> Outputs {
        let mut outputs = Outputs { plain: (0, 0), dropped: (0, 0), mask: Mask::default(), scale: 1.0, wide: true };
        let mut place = |v: View| {
            assert_eq!((v.rows, v.cols), (rows, cols), "shapes differ");
            self.computes(&[&v]);
            outputs.wide &= v.wide();
            (v.ptr, v.stride as i64)
        };
        let plain = plain.map_or((0, 0), &mut place);
        let copy = dropped.map_or((0, 0), |(_, v)| place(v));
        (outputs.plain, outputs.dropped) = (plain, copy);
        if let Some((dropout, _)) = dropped {
            (outputs.mask, outputs.scale) = mask_and_scale(Some(dropout));
        }
        outputs
    }

    pub(crate) fn swiglu_backward(&self, dh: View, gate_up: View, out: View) -> Result<()> {
        assert_eq!((gate_up.rows, gate_up.cols), (dh.rows, 2 * dh.cols), "gate_up holds gate and up of dh");
        Self::shapes(gate_up, out);
        self.computes(&[&dh, &gate_up, &out]);
        let f = dh.cols;
        let parts = [gate_up.columns(0, f), gate_up.columns(f, f), out.columns(0, f), out.columns(f, f)];
        let walk = Walk::of(&[&dh, &parts[0], &parts[1], &parts[2], &parts[3]]);
        let launch = self
            .launch(Variant::of(Family::Swiglu, self.compute), width!(walk.wide, "swiglu_backward"))?
            .arg(dh.ptr)
            .arg(dh.stride as i64)
            .arg(gate_up.ptr)
            .arg(gate_up.stride as i64)
            .arg(out.ptr)
            .arg(out.stride as i64)
            .arg(f as u32)
            .arg(walk.chunks);
        // SAFETY: the views were checked against their buffers.
        unsafe { launch.go((walk.blocks, 1, 1), walk.threads, 0) }
    }

    #[allow(clippy::too_many_arguments)]
    pub(crate) fn cross_entropy(
        &self,
        logits: View,
        targets: &CudaBuffer,
        weights: &CudaBuffer,
        label_smoothing: f32,
        gradient_scale: f32,
        loss: &CudaBuffer,
        dlogits: Option<View>,
    ) -> Result<()> {
        assert_eq!(logits.dtype, Dtype::F32, "logits are float32");
        let (n, vocab) = (logits.rows, logits.cols);
        if let Some(d) = dlogits {
            Self::shapes(logits, d);
            self.computes(&[&d]);
        }
        let wide = logits.wide() && dlogits.is_none_or(|d| d.wide());
        let launch = self
            .launch(Variant::of(Family::Loss, self.compute), width!(wide, "cross_entropy"))?
            .arg(logits.ptr)
            .arg(logits.stride as i64)
            .arg(vocab as u32)
            .arg(u32s(targets, n, "targets"))
            .arg(f32s(weights, n, "weights"))
            .arg(label_smoothing)
            .arg(gradient_scale)
            .arg(f32s(loss, n, "loss"))
            .arg(dlogits.map_or(0, |d| d.ptr))
            .arg(dlogits.map_or(0, |d| d.stride as i64));
        // SAFETY: views and buffers were checked; a target outside the vocabulary gives NaN.
        unsafe { launch.go((n as u32, 1, 1), 512, 0) }
    }

    /// Blocks of a sum: enough to fill a card, a function of the length alone so that the order of summation is too.
    fn sum_blocks(len: usize) -> u32 {
        len.div_ceil(4096).clamp(1, 1024) as u32
    }

    pub(crate) fn sum_of_squares(&self, x: &CudaBuffer) -> Result<f64> {
        let ptr = f32s(x, 0, "x");
        let blocks = Self::sum_blocks(x.len);
        let mut sum = f64::NAN;
        self.partials.with(&self.allocator, blocks as usize * 8 + 8, |partials| {
            let result = partials + u64::from(blocks) * 8;
            self.queue_sum("sum_of_squares", ptr, x.len, partials, 1.0, result, 0)?;
            self.transfers.download(result, 8, |_, bytes| {
                if let Ok(b) = bytes.try_into() {
                    sum = f64::from_le_bytes(b);
                }
            })
        })?;
        Ok(sum)
    }

    /// Writes the mean of `len` floats at `ptr` to the float at `mean`.
    pub(crate) fn queue_mean(&self, ptr: u64, len: usize, mean: u64) -> Result<()> {
        self.partials.with(&self.allocator, Self::sum_blocks(len) as usize * 8, |partials| {
            self.queue_sum("sum", ptr, len, partials, 1.0 / len as f64, 0, mean)
        })
    }

    #[allow(clippy::too_many_arguments)]
    fn queue_sum(
        &self,
        kernel: &'static str,
        ptr: u64,
        len: usize,
        partials: u64,
        factor: f64,
        result: u64,
        rounded: u64,
    ) -> Result<()> {
        let blocks = Self::sum_blocks(len);
        let variant = Variant::plain(Family::Reduce);
        let first = self.launch(variant, kernel)?.arg(ptr).arg(len as u64).arg(partials);
        let second = self.launch(variant, "finish_sum")?.arg(partials).arg(blocks).arg(factor).arg(result).arg(rounded);
        // SAFETY: `partials` has a place for each block; the caller's pointers are to one number each.
        unsafe {
            first.go((blocks, 1, 1), 256, 0)?;
            second.go((1, 1, 1), 256, 0)
        }
    }

    #[allow(clippy::too_many_arguments)]
    pub(crate) fn adamw(
        &self,
        h: AdamW,
        parameter: &CudaBuffer,
        gradient: &CudaBuffer,
        m: &CudaBuffer,
        v: &CudaBuffer,
        compute: &CudaBuffer,
    ) -> Result<()> {
        let len = parameter.len;
        assert!([gradient, m, v, compute].iter().all(|b| b.len == len), "lengths differ");
        assert_eq!(compute.dtype, self.compute, "the compute copy has the compute dtype");
        let launch = self
            .launch(Variant::of(Family::Adamw, self.compute), "adamw")?
            .arg(f32s(parameter, len, "parameter"))
            .arg(f32s(gradient, len, "gradient"))
            .arg(f32s(m, len, "m"))
            .arg(f32s(v, len, "v"))
            .arg(compute.ptr())
            .arg(len as u64)
            .arg(h.gradient_scale)
            .arg(h.beta1)
            .arg(h.beta2)
            .arg(1.0 - h.learning_rate * h.weight_decay)
            .arg(h.learning_rate / (1.0 - h.beta1.powi(h.step as i32)))
            .arg(1.0 / (1.0 - h.beta2.powi(h.step as i32)).sqrt())
            .arg(h.epsilon);
        // SAFETY: all buffers have `len` elements (asserted).
        unsafe { launch.go((len.div_ceil(8 * 256) as u32, 1, 1), 256, 0) }
    }

    pub(crate) fn adamw_8bit(
        &self,
        h: AdamW,
        parameter: &CudaBuffer,
        gradient: &CudaBuffer,
        moments: &Moments8<'_, CudaBuffer>,
        compute: &CudaBuffer,
    ) -> Result<()> {
        let (len, blocks) = (parameter.len, moments.blocks);
        assert!(gradient.len == len && compute.len == len, "lengths differ");
        assert_eq!(compute.dtype, self.compute, "the compute copy has the compute dtype");
        let map = self.dynamic_map()?;
        let launch = self
            .launch(Variant::of(Family::Adamw8, self.compute), "adamw_8bit")?
            .arg(f32s(parameter, len, "parameter"))
            .arg(f32s(gradient, len, "gradient"))
            .arg(u32s(moments.table, 3 * blocks, "table"))
            .arg(u32s(moments.m, len.div_ceil(4), "m"))
            .arg(u32s(moments.v, len.div_ceil(4), "v"))
            .arg(f32s(moments.absmax, 2 * blocks, "absmax"))
            .arg(f32s(moments.m32, 1, "m32"))
            .arg(f32s(moments.v32, 1, "v32"))
            .arg(compute.ptr())
            .arg(map.ptr())
            .arg(blocks as u32)
            .arg(h.gradient_scale)
            .arg(h.beta1)
            .arg(h.beta2)
            .arg(1.0 - h.learning_rate * h.weight_decay)
            .arg(h.learning_rate / (1.0 - h.beta1.powi(h.step as i32)))
            .arg(1.0 / (1.0 - h.beta2.powi(h.step as i32)).sqrt())
            .arg(h.epsilon);
        // SAFETY: the table covers `len` elements in blocks of at most 256 (the caller's contract); the buffers have room (asserted).
        unsafe { launch.go((blocks as u32, 1, 1), 256, 0) }
    }
}
