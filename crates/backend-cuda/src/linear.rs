//! Products with frozen weights, and embeddings: directly where the values are held, through one reused workspace where the weight is NF4.

use cashtag_backend::{Dtype, Result};

use crate::Core;
use crate::driver::Launch;
use crate::gemm::Form;
use crate::kernels::{Family, Variant};
use crate::lora::Factors;
use crate::memory::{CudaBuffer, View};
use crate::rows::{Walk, u32s};
use crate::weights::{CudaWeight, Data, Nf4};

/// Dequantised values held at a time for a product with an NF4 weight.
const WORKSPACE: usize = 192 << 20;

/// How many of `total` lines of `other` elements fit in the workspace (all, or equal parts), and the bytes of so many.
pub(crate) fn part(total: usize, other: usize, compute: Dtype) -> (usize, usize) {
    let line = other * compute.size();
    let parts = (total * line).div_ceil(WORKSPACE).max(1);
    let size = total.div_ceil(parts).next_multiple_of(128).min(total).max(1);
    (size, size * line)
}

impl Core {
    /// Calls `use_part` with (first row, the dequantised rows from there on) of an NF4 weight. Rows are `inner + room` apart.
    fn dequantized_rows(
        &self,
        w: &CudaWeight,
        nf4: &Nf4,
        room: usize,
        mut use_part: impl FnMut(usize, View) -> Result<()>,
    ) -> Result<()> {
        let stride = w.inner + room;
        let (rows, bytes) = self.part(w.out, stride);
        self.workspace.with(&self.allocator, bytes, |ptr| {
            for first in (0..w.out).step_by(rows) {
                let rows = rows.min(w.out - first);
                let part = View { ptr, dtype: self.compute, rows, cols: w.inner, stride };
                self.dequantize(nf4, w.inner, first, 0, part)?;
                use_part(first, part)?;
            }
            Ok(())
        })
    }

    /// The same by columns: (first column, the dequantised columns from there on).
    fn dequantized_columns(
        &self,
        w: &CudaWeight,
        nf4: &Nf4,
        mut use_part: impl FnMut(usize, View) -> Result<()>,
    ) -> Result<()> {
        let (cols, bytes) = self.part(w.inner, w.out);
        self.workspace.with(&self.allocator, bytes, |ptr| {
            for first in (0..w.inner).step_by(cols) {
                let cols = cols.min(w.inner - first);
                let part = View { ptr, dtype: self.compute, rows: w.out, cols, stride: cols };
                self.dequantize(nf4, w.inner, 0, first, part)?;
                use_part(first, part)?;
            }
            Ok(())
        })
    }

    fn part(&self, total: usize, other: usize) -> (usize, usize) {
        part(total, other, self.compute)
    }

    pub(crate) fn linear(&self, x: View, w: &CudaWeight, accumulate: bool, y: View) -> Result<()> {
        self.linear_add(x, w, if accumulate { 1.0 } else { 0.0 }, y, y)
    }

    /// `y ← beta·added + x·Wᵀ`.
    pub(crate) fn linear_add(&self, x: View, w: &CudaWeight, beta: f32, added: View, y: View) -> Result<()> {
        assert_eq!((x.cols, y.rows, y.cols), (w.inner, x.rows, w.out), "linear: shapes do not fit");
        assert_eq!((added.rows, added.cols), (y.rows, y.cols), "linear: what is added does not fit");
        match &w.data {
            Data::Wide(buffer) => self.gemm.multiply_add(Form::Nt, 1.0, x, w.values(buffer, 0), beta, added, y),
            Data::Nf4(nf4) => self.dequantized_rows(w, nf4, 0, |row, part| {
                let (added, y) = (added.columns(row, part.rows), y.columns(row, part.rows));
                self.gemm.multiply_add(Form::Nt, 1.0, x, part, beta, added, y)
            }),
        }
    }

    pub(crate) fn linear_backward(&self, dy: View, w: &CudaWeight, accumulate: bool, dx: View) -> Result<()> {
        assert_eq!((dy.cols, dx.rows, dx.cols), (w.out, dy.rows, w.inner), "linear_backward: shapes do not fit");
        let beta = if accumulate { 1.0 } else { 0.0 };
        match &w.data {
            Data::Wide(buffer) => self.gemm.multiply(Form::Nn, 1.0, dy, w.values(buffer, 0), beta, dx),
            // By columns of W, so that each column of dx is summed in one product.
            Data::Nf4(nf4) => self.dequantized_columns(w, nf4, |column, part| {
                self.gemm.multiply(Form::Nn, 1.0, dy, part, beta, dx.columns(column, part.cols))
            }),
        }
    }

    /// `y ← beta·added + x·Wᵀ + s·Σ u_j·B_jᵀ` as one product, `[x | u]·[W | s·B]ᵀ`: the factors are copied behind the rows of W first, a
    /// hundredth of the bytes that adding them to a finished y would move.
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn linear_lora(
        &self,
        x_u: View,
        w: &CudaWeight,
        factors: &Factors,
        beta: f32,
        added: View,
        y: View,
    ) -> Result<()> {
        let rank = factors.rank();
        assert_eq!((x_u.cols, y.rows, y.cols), (w.inner + rank, x_u.rows, w.out), "linear_lora: shapes do not fit");
        assert_eq!((added.rows, added.cols), (y.rows, y.cols), "linear_lora: what is added does not fit");
        match &w.data {
            Data::Wide(buffer) if rank <= w.room && factors.fit() => self.workspace.with(&self.allocator, 0, |_| {
                let values = w.values(buffer, rank);
                self.fill_room(factors, 0, values.columns(w.inner, rank))?;
                self.gemm.multiply_add(Form::Nt, 1.0, x_u, values, beta, added, y)
            }),
            Data::Nf4(nf4) if w.inner.is_multiple_of(8) && factors.fit() => {
                self.dequantized_rows(w, nf4, rank, |row, part| {
                    let part = View { cols: part.stride, ..part };
                    self.fill_room(factors, row, part.columns(w.inner, rank))?;
                    let (added, y) = (added.columns(row, part.rows), y.columns(row, part.rows));
                    self.gemm.multiply_add(Form::Nt, 1.0, x_u, part, beta, added, y)
                })
            }
            _ => {
                self.linear_add(x_u.columns(0, w.inner), w, beta, added, y)?;
                for (j, &(first, b)) in factors.list.iter().enumerate() {
                    let u = x_u.columns(w.inner + j * factors.r, factors.r);
                    self.gemm.multiply(Form::Nt, factors.scale, u, b, 1.0, y.columns(first, b.rows))?;
                }
                Ok(())
            }
        }
    }

    /// `dx ← dy·W` and `du_j ← s·dy_j·B_j` side by side as one product, `[dx | du] = dy·[W | s·B]`.
    pub(crate) fn linear_lora_backward(&self, dy: View, w: &CudaWeight, factors: &Factors, dx_du: View) -> Result<()> {
        let rank = factors.rank();
        let shape = (w.out, dy.rows, w.inner + rank);
        assert_eq!((dy.cols, dx_du.rows, dx_du.cols), shape, "linear_lora_backward: shapes do not fit");
        match &w.data {
            Data::Wide(buffer) if rank <= w.room && factors.fit() => self.workspace.with(&self.allocator, 0, |_| {
                let values = w.values(buffer, rank);
                self.fill_room(factors, 0, values.columns(w.inner, rank))?;
                self.gemm.multiply(Form::Nn, 1.0, dy, values, 0.0, dx_du)
            }),
            // The sum runs over the rows of W, so all of them must stand in the workspace together.
            Data::Nf4(nf4)
                if w.inner.is_multiple_of(8) && factors.fit() && self.part(w.out, w.inner + rank).0 == w.out =>
            {
                self.dequantized_rows(w, nf4, rank, |row, part| {
                    let part = View { cols: part.stride, ..part };
                    self.fill_room(factors, row, part.columns(w.inner, rank))?;
                    self.gemm.multiply(Form::Nn, 1.0, dy, part, 0.0, dx_du)
                })
            }
            _ => {
                self.linear_backward(dy, w, false, dx_du.columns(0, w.inner))?;
                for (j, &(first, b)) in factors.list.iter().enumerate() {
                    let du = dx_du.columns(w.inner + j * factors.r, factors.r);
                    self.gemm.multiply(Form::Nn, factors.scale, dy.columns(first, b.rows), b, 0.0, du)?;
                }
                Ok(())
            }
        }
    }

    pub(crate) fn embed(&self, table: &CudaWeight, ids: &CudaBuffer, out: View) -> Result<()> {
        assert_eq!((out.cols, out.dtype), (table.inner, Dtype::F32), "embed writes float32 rows of the table");
        let ids = u32s(ids, out.rows, "ids");
        match &table.data {
            Data::Wide(buffer) => self.gather(table.values(buffer, 0), ids, out),
            Data::Nf4(nf4) => {
                let walk = Walk::new(out.rows, out.cols, 1, false);
                let kernel = self.kernels.get(Variant::from_to(Family::Nf4, Dtype::F32, self.compute), "nf4_embed")?;
                let launch = Launch::new(&self.device, kernel)
                    .arg(nf4.codes.ptr())
                    .arg(nf4.absmax.scales())
                    .arg(table.inner as u64)
                    .arg(table.out as u32)
                    .arg(ids)
                    .arg(out.ptr)
                    .arg(out.stride as i64)
                    .arg(walk.chunks);
                // SAFETY: `out` and `ids` were checked; the kernel refuses ids outside the table.
                unsafe { launch.go((walk.blocks, 1, 1), walk.threads, 0) }
            }
        }
    }
}
