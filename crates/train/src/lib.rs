//! The trainer: it owns the loop and nothing else. What a step computes is in `llama`, what it computes on is a backend.
//!
//! - [`TrainingArguments`]: the knobs, under the names of Transformers.
//! - [`schedule`]: learning rates.
//! - [`order`]: which examples make up which optimizer step, as a function of seed and epoch.
//! - [`Trainer`]: steps, gradient clipping, evaluation, checkpoints, early stopping, resume.
//! - [`LossScale`]: dynamic loss scaling for fp16.
//! - [`tensorboard`]: event files that TensorBoard opens.
//! - [`distributed`]: one run on several devices, a process for each.
//! - [`checkpoint`]: `checkpoint-N/` directories with PEFT files, `trainer_state.json` and the exact state in safetensors.
//!
//! Invariant: a step covers exactly `per_device_train_batch_size × gradient_accumulation_steps` examples of every rank and its gradient is
//! the sum over their label tokens divided by the number of those tokens, however they were packed into micro-batches.

mod arguments;
pub mod checkpoint;
pub mod distributed;
mod error;
mod loss_scale;
mod optimizer_state;
pub mod order;
pub mod schedule;
mod state;
pub mod tensorboard;
mod trainer;

pub use arguments::{Optimizer, SaveStrategy, SchedulerType, TrainingArguments};
pub use error::{Error, Result};
pub use loss_scale::LossScale;
pub use optimizer_state::{Expected, OptimizerState, Values};
pub use state::{LogEntry, TrainerState};
pub use trainer::{EndReason, Observer, StepReport, TrainOutcome, Trainer};
