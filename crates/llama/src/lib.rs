//! Llama-family models: checkpoint readers, tokenizers and chat templates.

pub mod adapter;
pub mod chat;
pub mod checkpoint;
pub mod combine;
pub mod config;
pub mod error;
pub mod export;
pub mod generate;
pub mod ggml;
pub mod gguf;
mod gguf_llama;
pub mod hf;
mod json_file;
pub mod kv;
pub mod lora;
pub mod model;
mod neftune;
pub mod packing;
pub mod prompt;
pub mod score;
pub mod tokenizer;
mod weights;

pub use error::{Error, Result};
