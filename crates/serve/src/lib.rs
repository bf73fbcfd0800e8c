//! A model, and adapters of it, as a service: an engine that classifies and writes text, and the HTTP routes in front of it.
//!
//! ```text
//! route, live pipeline ─ Engine ─ admission ─ tokenizer thread ─ queue ─ engine thread ─ answer
//!                                 │ counted here, before any work        │ backend, model, adapters, prefix caches
//!                                 └ too much: refused at once            └ batches by token budget, no timer
//! ```
//!
//! What holds:
//!
//! - The queue is bounded where a text comes in, before it is tokenized; what would not be answered within its deadline is
//!   refused at once rather than late.
//! - An answer that nobody waits for any more is not computed.
//! - Between two steps of generation there is a batch of classification, if any text waits for one; and a step is bounded.
//! - A text is answered with the adapter that was loaded when it came in, also if that is unloaded meanwhile.

pub mod engine;
pub mod routes;

pub use engine::{
    ClassifyRequest, Engine, EngineConfig, Failure, GenerateRequest, Generation, Lane, Parts, Prompting, Scored,
    Served, State, Worker,
};
