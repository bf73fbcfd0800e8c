//! Matrix products by cuBLASLt, with plans (descriptors and the chosen algorithm) kept for every geometry seen.
//!
//! cuBLASLt is column-major: a row-major matrix is its transpose there, so operands are swapped and c comes out right. Sums are f32.
//! Split sums are only allowed where cuBLASLt adds the parts in f32 in its workspace, in a fixed order.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::c_void;
use std::sync::{Arc, Mutex, PoisonError};

use cashtag_backend::{Dtype, Error, Result};
use cudarc::cublaslt::result as lt;
use cudarc::cublaslt::sys;

use crate::driver::Device;
use crate::libraries;
use crate::memory::{Allocator, Block, View};

/// How the operands of a product stand: a·bᵀ, a·b, aᵀ·b.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Form {
    Nt,
    Nn,
    Tn,
}

/// Everything that the choice of an algorithm depends on.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Geometry {
    form: Form,
    m: usize,
    n: usize,
    k: usize,
    strides: [usize; 4],
    /// Alignment of a, b, c and what is added, in bytes, at most 256.
    alignments: [u32; 4],
    operand: Dtype,
    result: Dtype,
}

impl Geometry {
    /// What a profile calls it: without the rows of the batch, which differ from step to step.
    fn name(&self) -> String {
        let Geometry { form, m, n, k, .. } = self;
        match form {
            Form::Nt => format!("product x·wᵀ {k} → {n}"),
            Form::Nn => format!("product x·w {k} → {n}"),
            Form::Tn => format!("product xᵀ·y {m} × {n}"),
        }
    }
}

struct Plan {
    operation: sys::cublasLtMatmulDesc_t,
    /// Of cuBLASLt's A, B, C and D, which are our b, a, what is added, and c.
    layouts: [sys::cublasLtMatrixLayout_t; 4],
    algorithm: sys::cublasLtMatmulAlgo_t,
    workspace: usize,
}

impl Drop for Plan {
    fn drop(&mut self) {
        // SAFETY: made in `plan`, destroyed once.
        unsafe {
            for layout in self.layouts {
                let _ = lt::destroy_matrix_layout(layout);
            }
            let _ = lt::destroy_matmul_desc(self.operation);
        }
    }
}

/// Workspace offered to cuBLASLt: what it recommends for Hopper.
pub(crate) const WORKSPACE: usize = 32 << 20;

/// Plans kept before all are dropped: packed batches differ in their rows, so new geometries never end.
const MAX_PLANS: usize = 8192;

struct State {
    plans: HashMap<Geometry, Plan>,
    workspace: Block,
}

pub(crate) struct Gemm {
    device: Arc<Device>,
    handle: sys::cublasLtHandle_t,
    state: Mutex<State>,
}

// SAFETY: the handle may be used from any thread; plans are only touched under the lock.
unsafe impl Send for Gemm {}
unsafe impl Sync for Gemm {}

impl Gemm {
    pub(crate) fn new(allocator: &Allocator) -> Result<Self> {
        let device = Arc::clone(&allocator.device);
        libraries::cublaslt().map_err(|e| device.error(e))?;
        device.bind()?;
        let handle = lt::create_handle().map_err(|e| device.error(format!("cuBLASLt does not start: {e}")))?;
        let state = Mutex::new(State { plans: HashMap::new(), workspace: allocator.block(WORKSPACE)? });
        Ok(Self { device, handle, state })
    }

    /// `c ← alpha·op(a)·op(b) + beta·c`.
    pub(crate) fn multiply(&self, form: Form, alpha: f32, a: View, b: View, beta: f32, c: View) -> Result<()> {
        assert!(beta == 0.0 || beta == 1.0, "beta is 0 or 1, not {beta}");
        self.multiply_add(form, alpha, a, b, beta, c, c)
    }

    /// `d ← alpha·op(a)·op(b) + beta·c`; c and d may be the same.
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn multiply_add(
        &self,
        form: Form,
        alpha: f32,
        a: View,
        b: View,
        beta: f32,
        added: View,
        c: View,
    ) -> Result<()> {
        let (m, k) = if form == Form::Tn { (a.cols, a.rows) } else { (a.rows, a.cols) };
        let (n, k_b) = if form == Form::Nt { (b.rows, b.cols) } else { (b.cols, b.rows) };
        assert_eq!((m, n, k), (c.rows, c.cols, k_b), "operands do not fit: {form:?} of {a:?} and {b:?} into {c:?}");
        assert_eq!(a.dtype, b.dtype, "operands of a product have one dtype");
        assert!(c.dtype == a.dtype || c.dtype == Dtype::F32, "a product of {:?} gives it or float32", a.dtype);
        assert_eq!((added.rows, added.cols, added.dtype), (c.rows, c.cols, c.dtype), "what is added does not fit");
        if m == 0 || n == 0 {
            return Ok(());
        }
        assert!(k > 0, "a product over nothing");
        self.device.bind()?;
        let geometry = Geometry {
            form,
            m,
            n,
            k,
            strides: [a, b, c, added].map(|v| if v.rows == 1 { v.cols } else { v.stride }),
            alignments: [a, b, c, added].map(|v| 1 << v.ptr.trailing_zeros().min(8)),
            operand: a.dtype,
            result: c.dtype,
        };
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let State { plans, workspace } = &mut *state;
        if plans.len() >= MAX_PLANS {
            plans.clear();
        }
        let plan = match plans.entry(geometry) {
            Entry::Occupied(e) => e.into_mut(),
            Entry::Vacant(e) => e.insert(self.plan(geometry).map_err(|e| self.refused(geometry, e))?),
        };
        let (device, handle) = (&self.device, self.handle);
        let queue = || {
            // SAFETY: the views were checked against their buffers, the plan was made for this geometry, and the workspace is used by
            // this stream alone.
            unsafe {
                lt::matmul(
                    handle,
                    plan.operation,
                    (&raw const alpha).cast(),
                    (&raw const beta).cast(),
                    b.ptr as *const c_void,
                    plan.layouts[0],
                    a.ptr as *const c_void,
                    plan.layouts[1],
                    added.ptr as *const c_void,
                    plan.layouts[2],
                    c.ptr as *mut c_void,
                    plan.layouts[3],
                    &plan.algorithm,
                    workspace.ptr() as *mut c_void,
                    plan.workspace,
                    device.stream.cast(),
                )
            }
            .map_err(|e| self.refused(geometry, e))
        };
        device.profile.around(device, || geometry.name().into(), queue)
    }

    fn refused(&self, g: Geometry, e: lt::CublasError) -> Error {
        let Geometry { form, m, n, k, operand, .. } = g;
        self.device.error(format!("cuBLASLt refuses a product ({form:?}, {m} × {n} × {k}, {}): {e}", operand.name()))
    }

    fn plan(&self, g: Geometry) -> Result<Plan, lt::CublasError> {
        let dtype = |d| match d {
            Dtype::F16 => sys::cudaDataType::CUDA_R_16F,
            Dtype::Bf16 => sys::cudaDataType::CUDA_R_16BF,
            _ => sys::cudaDataType::CUDA_R_32F,
        };
        // cublasOperation_t: CUBLAS_OP_N = 0, CUBLAS_OP_T = 1.
        let transposed = u32::from;
        // As stored, seen as column-major: (rows, columns) of our b, a and c.
        let (b, a) = match g.form {
            Form::Nt => ((g.k, g.n), (g.k, g.m)),
            Form::Nn => ((g.n, g.k), (g.k, g.m)),
            Form::Tn => ((g.n, g.k), (g.m, g.k)),
        };
        let (op_b, op_a) = (transposed(g.form == Form::Nt), transposed(g.form == Form::Tn));
        let [stride_a, stride_b, stride_c, stride_added] = g.strides;
        let layout = |d, shape: (usize, usize), stride: usize| {
            lt::create_matrix_layout(dtype(d), shape.0 as u64, shape.1 as u64, stride as i64)
        };
        let operation =
            lt::create_matmul_desc(sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, sys::cudaDataType::CUDA_R_32F)?;
        let mut plan = Plan {
            operation,
            layouts: [
                layout(g.operand, b, stride_b)?,
                layout(g.operand, a, stride_a)?,
                layout(g.result, (g.n, g.m), stride_added)?,
                layout(g.result, (g.n, g.m), stride_c)?,
            ],
            algorithm: sys::cublasLtMatmulAlgo_t { data: [0; 8] },
            workspace: 0,
        };
        // SAFETY: descriptors were just made; attributes are passed with the size of their type; the results array has room for one.
        unsafe {
            use sys::cublasLtMatmulDescAttributes_t as D;
            use sys::cublasLtMatmulPreferenceAttributes_t as P;
            lt::set_matmul_desc_attribute(operation, D::CUBLASLT_MATMUL_DESC_TRANSA, (&raw const op_b).cast(), 4)?;
            lt::set_matmul_desc_attribute(operation, D::CUBLASLT_MATMUL_DESC_TRANSB, (&raw const op_a).cast(), 4)?;
            let preference = lt::create_matmul_pref()?;
            let set = |attribute, value: u64, size| {
                // Little-endian: the low bytes are the u32 that some attributes are.
                lt::set_matmul_pref_attribute(preference, attribute, (&raw const value).cast(), size)
            };
            let scheme = sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u64;
            let [align_a, align_b, align_c, align_added] = g.alignments.map(u64::from);
            let found = set(P::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, WORKSPACE as u64, 8)
                .and_then(|()| set(P::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, scheme, 4))
                .and_then(|()| set(P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, align_b, 4))
                .and_then(|()| set(P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, align_a, 4))
                .and_then(|()| set(P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, align_added, 4))
                .and_then(|()| set(P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, align_c, 4))
                .and_then(|()| {
                    let [b, a, added, c] = plan.layouts;
                    lt::get_matmul_algo_heuristic(self.handle, operation, b, a, added, c, preference)
                });
            let _ = lt::destroy_matmul_pref(preference);
            let found = found?;
            plan.algorithm = found.algo;
            plan.workspace = found.workspaceSize;
        }
        Ok(plan)
    }
}

impl Drop for Gemm {
    fn drop(&mut self) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).plans.clear();
        if self.device.synchronize().is_ok() {
            // SAFETY: made in `new`, destroyed once, nothing under way.
            let _ = unsafe { lt::destroy_handle(self.handle) };
        }
    }
}
