//! What LoRA needs beside cuBLASLt: the gradient that passes back through a dropped-out input in one pass over dx, and the copy of the
//! up-projections behind a frozen weight.
//!
//! The dropout mask is a function of (seed, step, site, row, column), so a kernel can draw it where it needs it. What a kernel cannot take
//! (f32, ranks above 192 or that are no multiple of eight, unaligned views) goes through cuBLASLt and a separate dropout, with the same
//! result up to rounding.

use cashtag_backend::{Dropout, Dtype, Result, philox};

use crate::Core;
use crate::driver::{Argument, Launch};
use crate::gemm::Form;
use crate::kernels::{Family, Variant};
use crate::memory::View;

/// `Mask` of the kernels.
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct Mask {
    seed_low: u32,
    seed_high: u32,
    step: u32,
    site: u32,
    threshold: u32,
}
impl Argument for Mask {}

impl From<Dropout> for Mask {
    fn from(d: Dropout) -> Self {
        Self {
            seed_low: d.seed as u32,
            seed_high: (d.seed >> 32) as u32,
            step: d.step,
            site: d.site,
            threshold: u32::from(philox::dropout_threshold(d.p)),
        }
    }
}

/// LoRA's up-projections of one frozen weight: B_j (T `[rows, r]`) for rows `first ..` of the weight.
pub(crate) struct Factors {
    pub(crate) list: Vec<(usize, View)>,
    pub(crate) r: usize,
    pub(crate) scale: f32,
}

impl Factors {
    pub(crate) fn new(list: Vec<(usize, View)>, scale: f32) -> Self {
        let r = list.first().map_or(0, |(_, b)| b.cols);
        assert!(list.iter().all(|(_, b)| b.cols == r), "factors of one weight have one rank");
        Self { list, r, scale }
    }

    pub(crate) fn rank(&self) -> usize {
        self.list.len() * self.r
    }

    /// Whether the kernel that copies them takes them.
    pub(crate) fn fit(&self) -> bool {
        let views = self.list.iter().all(|(_, b)| b.wide() && b.dtype != Dtype::F32);
        (1..=MAX_FACTORS).contains(&self.list.len()) && self.r.is_multiple_of(8) && self.r > 0 && views
    }
}

/// `Factors` of the kernels.
#[derive(Clone, Copy)]
#[repr(C)]
struct FactorList {
    b: [u64; MAX_FACTORS],
    stride: [i64; MAX_FACTORS],
    first: [u32; MAX_FACTORS],
    rows: [u32; MAX_FACTORS],
}
impl Argument for FactorList {}

pub(crate) fn mask_and_scale(dropout: Option<Dropout>) -> (Mask, f32) {
    dropout.map_or((Mask::default(), 1.0), |d| (d.into(), 1.0 / (1.0 - d.p)))
}

/// Factors that one frozen weight may have: q, k, v; gate, up.
const MAX_FACTORS: usize = 4;

impl Core {
    /// The kernels' variant for a rank, if they can take it and these views.
    fn lora_variant(&self, rank: usize, views: &[&View]) -> Option<(Variant, usize)> {
        let sixteen_bits = match self.compute {
            Dtype::F16 => true,
            Dtype::Bf16 => self.device.facts.sm >= 80,
            _ => false,
        };
        let padded = rank.next_multiple_of(64);
        let fits =
            sixteen_bits && rank > 0 && rank.is_multiple_of(8) && padded <= 192 && views.iter().all(|v| v.wide());
        fits.then(|| (Variant { rank: Some(padded as u32), ..Variant::of(Family::Lora, self.compute) }, padded))
    }

    /// `dx ← dx + dropout(du·a)`: the backward of [`lora_down`](Self::lora_down) for its input.
    pub(crate) fn lora_backward(
        &self,
        du: View,
        a: View,
        dropout: Option<Dropout>,
        scratch: View,
        dx: View,
    ) -> Result<()> {
        assert_eq!((du.rows, du.cols, a.cols), (dx.rows, a.rows, dx.cols), "lora_backward: shapes do not fit");
        let (mask, scale) = mask_and_scale(dropout);
        let fits = dx.dtype == self.compute && self.lora_shared(du.cols) <= self.device.facts.shared_memory;
        match (self.lora_variant(du.cols, &[&du, &a, &dx]).filter(|_| fits), dropout) {
            (Some((variant, _)), _) => {
                let launch = Launch::new(&self.device, self.kernels.get(variant, "lora_backward")?)
                    .arg(du.ptr)
                    .arg(du.stride as i64)
                    .arg(a.ptr)
                    .arg(a.stride as i64)
                    .arg(dx.rows as u32)
                    .arg(dx.cols as u32)
                    .arg(du.cols as u32)
                    .arg(scale)
                    .arg(mask)
                    .arg(dx.ptr)
                    .arg(dx.stride as i64);
                let grid = (dx.cols.div_ceil(128) as u32, dx.rows.div_ceil(128) as u32, 1);
                // SAFETY: views were checked against their buffers, and their shapes against each other.
                unsafe { launch.go(grid, 256, self.lora_shared(du.cols)) }
            }
            (None, None) => self.gemm.multiply(Form::Nn, 1.0, du, a, 1.0, dx),
            (None, Some(d)) => {
                let product = View { rows: dx.rows, cols: dx.cols, stride: dx.cols, ..scratch };
                self.gemm.multiply(Form::Nn, 1.0, du, a, 0.0, product)?;
                self.dropout(product, d, true, dx)
            }
        }
    }

    /// Bytes of shared memory that both operands of a tile need.
    fn lora_shared(&self, rank: usize) -> u32 {
        (2 * 128 * rank.next_multiple_of(64) * 2) as u32
    }

    /// Writes s·B of every factor into `room`, the columns behind rows `row ..` of a weight, and zeros where a row has none.
    pub(crate) fn fill_room(&self, factors: &Factors, row: usize, room: View) -> Result<()> {
        let mut list = FactorList {
            b: [0; MAX_FACTORS],
            stride: [0; MAX_FACTORS],
            first: [0; MAX_FACTORS],
            rows: [0; MAX_FACTORS],
        };
        for (j, (first, b)) in factors.list.iter().enumerate() {
            list.b[j] = b.ptr;
            list.stride[j] = b.stride as i64;
            list.first[j] = *first as u32;
            list.rows[j] = b.rows as u32;
        }
        let variant = Variant { rank: Some(64), ..Variant::of(Family::Lora, self.compute) };
        let chunks = room.cols / 8;
        let launch = Launch::new(&self.device, self.kernels.get(variant, "lora_room")?)
            .arg(list)
            .arg(factors.r as u32)
            .arg(factors.scale)
            .arg(row as u32)
            .arg(room.rows as u32)
            .arg(chunks as u32)
            .arg(room.ptr)
            .arg(room.stride as i64);
        // SAFETY: the factors' views were checked against their buffers; the room is a part of a weight or of the workspace.
        unsafe { launch.go(((room.rows * chunks).div_ceil(256) as u32, 1, 1), 256, 0) }
    }
}
