//! Operations beside the trait that do in one pass over memory what several of the trait's do: a result with its copy under dropout, a
//! frozen linear with its adapter as one product, the gradient through a dropped-out input, a residual sum into a new place.
//!
//! Each is the sum of trait operations that its documentation names, up to rounding; where no kernel fits (f32, odd shapes, no room behind the
//! weight) it is carried out as that sum.

use cashtag_backend::{Dropout, Mat, MatMut, Result};

use crate::lora::Factors;
use crate::memory::View;
use crate::{CudaBackend, CudaBuffer, CudaWeight, of, of_mut};

/// A buffer as one row.
fn whole(b: &CudaBuffer) -> View {
    View::new(Mat::new(b, 1, b.len))
}

impl CudaBackend {
    /// [`rms_norm`](cashtag_backend::Backend::rms_norm) that writes y, or dropout(y), or both in one pass.
    ///
    /// # Errors
    /// The device fails.
    pub fn rms_norm_dropout(
        &self,
        x: Mat<'_, CudaBuffer>,
        w: &CudaBuffer,
        epsilon: f32,
        y: Option<MatMut<'_, CudaBuffer>>,
        dropped: (Dropout, MatMut<'_, CudaBuffer>),
        inv_rms: &mut CudaBuffer,
    ) -> Result<()> {
        let dropped = Some((dropped.0, of_mut(&dropped.1)));
        self.core.rms_norm(of(x), w, epsilon, y.as_ref().map(of_mut), dropped, inv_rms)
    }

    /// [`swiglu`](cashtag_backend::Backend::swiglu) that writes h, or dropout(h), or both in one pass.
    ///
    /// # Errors
    /// The device fails.
    pub fn swiglu_dropout(
        &self,
        gate_up: Mat<'_, CudaBuffer>,
        h: Option<MatMut<'_, CudaBuffer>>,
        dropped: (Dropout, MatMut<'_, CudaBuffer>),
    ) -> Result<()> {
        self.core.swiglu(of(gate_up), h.as_ref().map(of_mut), Some((dropped.0, of_mut(&dropped.1))))
    }

    /// `dx ← dx + dropout(du·a)`: the gradient that reaches a dropped-out input through the adapter. dx_du T `[n, in + r]` holds dx and,
    /// behind it, du, as [`linear_lora_backward`](Self::linear_lora_backward) leaves them; a T `[r, in]`. `scratch` (T, n·in elements)
    /// is used where no kernel does it in one pass.
    ///
    /// # Errors
    /// The device fails.
    pub fn lora_backward(
        &self,
        a: Mat<'_, CudaBuffer>,
        dropout: Option<Dropout>,
        scratch: &mut CudaBuffer,
        dx_du: MatMut<'_, CudaBuffer>,
    ) -> Result<()> {
        let (a, both) = (of(a), of_mut(&dx_du));
        assert_eq!(both.cols, a.cols + a.rows, "lora_backward: shapes do not fit");
        let (dx, du) = (both.columns(0, a.cols), both.columns(a.cols, a.rows));
        self.core.lora_backward(du, a, dropout, whole(scratch), dx)
    }

    /// A frozen linear with its adapter: `y ← [y +] x·Wᵀ + scale·Σ u_j·B_jᵀ`, each factor into its own columns of y.
    ///
    /// x_u T `[n, in + factors·r]` holds x and, behind it, the u_j side by side; a factor is (first column of y, B_j T `[out_j, r]`).
    /// One product if the weight has room for the factors ([`Options::lora_r`](crate::Options::lora_r)) or is held as NF4.
    ///
    /// # Errors
    /// The device fails.
    #[allow(clippy::too_many_arguments)]
    pub fn linear_lora(
        &self,
        x_u: Mat<'_, CudaBuffer>,
        w: &CudaWeight,
        factors: &[(usize, Mat<'_, CudaBuffer>)],
        scale: f32,
        accumulate: bool,
        y: MatMut<'_, CudaBuffer>,
    ) -> Result<()> {
        let factors = Factors::new(factors.iter().map(|&(first, b)| (first, of(b))).collect(), scale);
        let y = of_mut(&y);
        self.core.linear_lora(of(x_u), w, &factors, if accumulate { 1.0 } else { 0.0 }, y, y)
    }

    /// Backward of [`linear_lora`](Self::linear_lora) for its input: `dx ← dy·W` in the first `in` columns of dx_du T
    /// `[n, in + factors·r]`, `du_j ← scale·dy_j·B_j` behind it.
    ///
    /// # Errors
    /// The device fails.
    pub fn linear_lora_backward(
        &self,
        dy: Mat<'_, CudaBuffer>,
        w: &CudaWeight,
        factors: &[(usize, Mat<'_, CudaBuffer>)],
        scale: f32,
        dx_du: MatMut<'_, CudaBuffer>,
    ) -> Result<()> {
        let factors = Factors::new(factors.iter().map(|&(first, b)| (first, of(b))).collect(), scale);
        self.core.linear_lora_backward(of(dy), w, &factors, of_mut(&dx_du))
    }

    /// `y ← added + x·Wᵀ`: [`linear`](cashtag_backend::Backend::linear) into a new place, for a residual stream whose old value is kept.
    ///
    /// # Errors
    /// The device fails.
    pub fn linear_add(
        &self,
        x: Mat<'_, CudaBuffer>,
        w: &CudaWeight,
        added: Mat<'_, CudaBuffer>,
        y: MatMut<'_, CudaBuffer>,
    ) -> Result<()> {
        self.core.linear_add(of(x), w, 1.0, of(added), of_mut(&y))
    }

    /// [`rms_norm_backward`](cashtag_backend::Backend::rms_norm_backward) that also leaves the new dx in `copy`, rounded to T.
    ///
    /// # Errors
    /// The device fails.
    #[allow(clippy::too_many_arguments)]
    pub fn rms_norm_backward_copy(
        &self,
        dy: Mat<'_, CudaBuffer>,
        x: Mat<'_, CudaBuffer>,
        w: &CudaBuffer,
        inv_rms: &CudaBuffer,
        dx: MatMut<'_, CudaBuffer>,
        copy: MatMut<'_, CudaBuffer>,
    ) -> Result<()> {
        self.core.rms_norm_backward(of(dy), of(x), w, inv_rms, of_mut(&dx), Some(of_mut(&copy)))
    }
}
