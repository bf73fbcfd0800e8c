//! The contract between the Llama engine and the devices it runs on.
//!
//! This crate holds traits, plain data and documentation, no kernels: [`Backend`] names every operation that the forward
//! and the backward pass of a Llama block with LoRA need, [`Buffer`](Backend::Buffer) is device memory, [`Mat`] is a
//! row-major view of it, [`AttentionLayout`] says who attends to whom, and [`philox`] is the counter-based generator from
//! which every device draws the same dropout masks.
//!
//! Invariants that every backend keeps:
//!
//! - Matrices are row-major; a view's `stride` is counted in elements and is at least its `cols`.
//! - An operation reads its inputs and writes its outputs in the order in which it was called; a backend may run
//!   asynchronously as long as [`Backend::download`] and [`Backend::synchronize`] see the result.
//! - Operands of matrix products have the backend's [compute dtype](Backend::compute_dtype); sums, norms, softmax,
//!   residual stream and losses are f32.
//! - The same inputs give the same bits on the same device with the same number of threads.

mod backend;
pub mod dry;
mod dtype;
pub mod dynamic_map;
mod layout;
mod mat;
pub mod philox;
mod weights;

pub use backend::{AdamW, BLOCK_8BIT, Backend, Capabilities, CrossEntropy, Dropout, KernelTime, Moments8, Rope};
pub use dtype::Dtype;
pub use layout::{AttentionLayout, LayoutError, Segment, Span};
pub use mat::{Mat, MatMut};
pub use weights::{RawWeight, WeightSource};

/// What can go wrong on a device. Shapes that do not fit are programming errors and panic with both shapes; this type is
/// for what the outside world can cause.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(
        "out of memory on {device}: {needed} bytes were asked for, {free} are free\n  hint: lower max_tokens_per_batch or per_device_train_batch_size"
    )]
    OutOfMemory { device: String, needed: usize, free: usize },
    #[error("{device}: {what}")]
    Device { device: String, what: String },
    #[error("weight {name}: {what}")]
    Weight { name: String, what: String },
}

pub type Result<T, E = Error> = std::result::Result<T, E>;
