//! The engine against Transformers + PEFT on the real 135M weights, and the trainer against itself.

mod arguments;
mod distributed;
mod dora;
mod files;
mod goldens;
mod robust;
mod support;
mod trainer;
