//! Llama-family models: checkpoint readers, tokenizers and chat templates.

pub mod chat;
pub mod checkpoint;
pub mod config;
pub mod error;
pub mod ggml;
pub mod gguf;
pub mod tokenizer;

pub use error::{Error, Result};
