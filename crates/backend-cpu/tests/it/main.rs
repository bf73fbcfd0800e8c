//! The CPU backend against finite differences in f64, and against bitsandbytes.

mod adamw8;
mod dora;
mod finite_differences;
