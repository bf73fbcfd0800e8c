//! A stream of posts in; sentiment per ticker, sector and market out.
//!
//! ```text
//! sources ─▶ inlet ─▶ log ─▶ pipeline ─▶ store ─▶ API, page, alerts, exports
//!            check    durable  score,      SQLite or
//!            twice?            count      PostgreSQL
//! ```
//!
//! What holds:
//! - A post that was acknowledged is counted exactly once in the windows it belongs to, whatever moment the process is
//!   killed at: the log has it, and posts, windows and the place in the log change in one transaction.
//! - Windows are by event time, closed by a watermark, corrected by late posts, and say nothing where data is thin.
//! - Nothing that comes from outside can stop the process or grow without bounds; what cannot be taken is a dead letter.
//! - Names of authors never reach the disk.

pub mod alerts;
pub mod api;
pub mod board;
pub mod bus;
mod copies;
mod error;
pub mod export;
pub mod hub;
mod id;
pub mod inlet;
pub mod log;
pub mod pipeline;
pub mod post;
pub mod run;
pub mod scorer;
pub mod sources;
pub mod state;
pub mod store;
pub mod tickers;
pub mod time;
mod webhook;
pub mod windows;

pub use error::{Error, Result};
pub use run::{LiveOptions, Started, Summary, run};
