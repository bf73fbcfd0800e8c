//! The operations of DoRA. They compile for every architecture and are in the conformance suite; no card has run them yet.
//!
//! Row norms take a part of the rows at a time: `s·B·A` of the part in f32 by cuBLASLt, the part of W dequantised where it is NF4,
//! then one block a row. So the memory does not grow with the matrix.

use cashtag_backend::{Dtype, Result};

use crate::Core;
use crate::driver::Launch;
use crate::gemm::Form;
use crate::kernels::{Family, Variant};
use crate::memory::{CudaBuffer, View};
use crate::rows::{Walk, f32s};
use crate::weights::{CudaWeight, Data};

/// Bytes that a part of the rows may take.
const PART: usize = 32 << 20;
/// Operands of products begin on multiples of this.
const ALIGNMENT: usize = 256;

/// How a part of an adapted weight lies in the workspace: `[s·B·A in f32 | W, if it is dequantised | norms]`.
struct Part {
    rows: usize,
    weight: usize,
    norms: usize,
    bytes: usize,
}

impl Part {
    fn new(rows: usize, inner: usize, compute: Dtype, dequantized: bool) -> Self {
        let width = if dequantized { compute.size() } else { 0 };
        let rows = (PART / (inner * (4 + width)).max(1)).clamp(1, rows.max(1));
        let weight = (rows * inner * 4).next_multiple_of(ALIGNMENT);
        let norms = weight + (rows * inner * width).next_multiple_of(ALIGNMENT);
        Self { rows, weight, norms, bytes: norms + rows * 4 }
    }
}

/// Bytes of workspace for the norms of `rows` rows.
pub(crate) fn workspace(rows: usize, inner: usize, compute: Dtype, dequantized: bool) -> usize {
    Part::new(rows, inner, compute, dequantized).bytes
}

/// The first of `columns` floats from `offset` on.
fn floats_from(buffer: &CudaBuffer, offset: usize, columns: usize, what: &str) -> u64 {
    f32s(buffer, offset + columns, what) + offset as u64 * 4
}

impl Core {
    pub(crate) fn scale_columns(&self, scale: &CudaBuffer, offset: usize, x: View) -> Result<()> {
        assert_eq!(x.dtype, self.compute, "scale_columns takes the compute dtype");
        let wide = x.wide();
        let walk = Walk::new(x.rows, x.cols, if wide { 8 } else { 1 }, wide);
        let name = if wide { "scale_columns_8" } else { "scale_columns_1" };
        let launch = Launch::new(&self.device, self.kernels.get(Variant::of(Family::Dora, self.compute), name)?)
            .arg(floats_from(scale, offset, x.cols, "scale"))
            .arg(x.ptr)
            .arg(x.stride as i64)
            .arg(x.cols as u32)
            .arg(walk.chunks);
        // SAFETY: the view was checked against its buffer, and `scale` has a float for each of its columns.
        unsafe { launch.go((walk.blocks, 1, 1), walk.threads, 0) }
    }

    pub(crate) fn column_dots(
        &self,
        a: View,
        b: View,
        scale: &CudaBuffer,
        offset: usize,
        out: &CudaBuffer,
    ) -> Result<()> {
        assert_eq!((a.rows, a.cols), (b.rows, b.cols), "column_dots: shapes do not fit");
        assert_eq!((a.dtype, b.dtype), (self.compute, self.compute), "column_dots takes the compute dtype");
        let kernel = self.kernels.get(Variant::of(Family::Dora, self.compute), "column_dots")?;
        let launch = Launch::new(&self.device, kernel)
            .arg(a.ptr)
            .arg(a.stride as i64)
            .arg(b.ptr)
            .arg(b.stride as i64)
            .arg(floats_from(scale, offset, a.cols, "scale"))
            .arg(floats_from(out, offset, a.cols, "out"))
            .arg(a.rows as u32)
            .arg(a.cols as u32);
        // SAFETY: the views were checked against their buffers; `scale` and `out` have a float for each column.
        unsafe { launch.go((a.cols.div_ceil(32) as u32, 1, 1), 256, 0) }
    }

    pub(crate) fn adapted_row_norms(
        &self,
        w: &CudaWeight,
        first: usize,
        scale: f32,
        a: View,
        b: View,
    ) -> Result<Vec<f32>> {
        let (inner, total) = (w.inner, b.rows);
        assert_eq!((a.cols, b.cols), (inner, a.rows), "adapted_row_norms: shapes do not fit");
        assert!(first + total <= w.out, "adapted_row_norms: rows up to {} of {}", first + total, w.out);
        let part = Part::new(total, inner, self.compute, w.is_nf4());
        let kernel = self.kernels.get(Variant::of(Family::Dora, self.compute), "adapted_row_norms")?;
        let mut norms = vec![0f32; total];
        for (done, norms) in (0..).step_by(part.rows).zip(norms.chunks_mut(part.rows)) {
            let rows = norms.len();
            self.workspace.with(&self.allocator, part.bytes, |workspace| {
                let update = View { ptr: workspace, dtype: Dtype::F32, rows, cols: inner, stride: inner };
                let size = self.compute.size();
                let factors = View { ptr: b.ptr + (done * b.stride * size) as u64, rows, ..b };
                self.gemm.multiply(Form::Nn, scale, factors, a, 0.0, update)?;
                let weight = match &w.data {
                    Data::Wide(buffer) => {
                        let all = w.values(buffer, 0);
                        View { ptr: all.ptr + ((first + done) * all.stride * size) as u64, rows, ..all }
                    }
                    Data::Nf4(nf4) => {
                        let ptr = workspace + part.weight as u64;
                        let view = View { ptr, dtype: self.compute, rows, cols: inner, stride: inner };
                        self.dequantize(nf4, inner, first + done, 0, view)?;
                        view
                    }
                };
                let result = workspace + part.norms as u64;
                let launch = Launch::new(&self.device, kernel)
                    .arg(weight.ptr)
                    .arg(weight.stride as i64)
                    .arg(update.ptr)
                    .arg(update.stride as i64)
                    .arg(result)
                    .arg(inner as u32);
                // SAFETY: both views hold `rows` rows of `inner` columns, and there is a float for the norm of each.
                unsafe { launch.go((rows as u32, 1, 1), 256, 0)? };
                self.transfers.download(result, rows * 4, |at, bytes| {
                    let found = bytes.as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b));
                    norms[at / 4..].iter_mut().zip(found).for_each(|(n, f)| *n = f);
                })
            })?;
        }
        Ok(norms)
    }
}
