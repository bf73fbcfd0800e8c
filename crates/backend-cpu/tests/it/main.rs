//! The CPU backend against finite differences in f64 and against bitsandbytes, and what it computes in more than bf16.

mod adamw8;
mod dora;
mod finite_differences;
mod inference;
