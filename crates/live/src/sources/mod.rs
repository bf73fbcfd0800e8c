//! Where posts come from. Each source is a task that delivers to the [`Inlet`] and tells the board how it is.
//!
//! What holds for all: a post is delivered again rather than lost (the inlet recognises it); what cannot be taken becomes a
//! dead letter with its reason; nothing a server sends can stop the process or make it keep more than a bounded part of it.

mod backoff;
mod feeder;
pub mod file;
pub mod jetstream;
pub mod net;
pub mod row;
pub mod x_api;
mod x_budget;
pub mod x_rules;
pub mod x_search;
pub mod x_stream;

use std::pin::Pin;

use crate::board::{Pace, State};
use crate::error::{Error, Result};
use crate::inlet::{Inlet, first_line};

pub use x_api::XOptions;

pub type Running = Pin<Box<dyn Future<Output = Result<()>> + Send>>;

pub trait Source: Send {
    fn name(&self) -> String;

    /// What the page calls it: `file`, `bluesky`, `x-stream`, …
    fn kind(&self) -> &'static str;

    fn pace(&self) -> Pace;

    /// Delivers until there is nothing more. A source that can be reached again never ends by itself.
    fn run(self: Box<Self>, inlet: Inlet) -> Running;
}

/// Starts a source; the board shows how it ends.
pub fn start(source: Box<dyn Source>, inlet: Inlet, runtime: &tokio::runtime::Handle) -> tokio::task::JoinHandle<()> {
    let name = source.name();
    inlet.board().register(&name, source.kind(), source.pace());
    runtime.spawn(async move {
        let board = inlet.board().clone();
        match source.run(inlet).await {
            Ok(()) => board.set(&name, State::Done, ""),
            Err(Error::Stopped) => board.set(&name, State::Stopped, "the process stops"),
            Err(e) => board.set(&name, State::Stopped, first_line(&e)),
        }
    })
}
