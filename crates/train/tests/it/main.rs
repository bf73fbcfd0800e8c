//! The engine against Transformers + PEFT on the real 135M weights, and the trainer against itself.

mod goldens;
mod support;
mod trainer;
