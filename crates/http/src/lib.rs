//! What every HTTP service of cashtag stands on, so that each is guarded in the same way.
//!
//! A service is an [`axum::Router`] that is given to a [`Server`]. What holds then, whatever the routes do:
//!
//! - Without a key it listens on loopback only ([`bind`]), and there it answers only to loopback names, so that a web page
//!   cannot reach it by a name of its own (DNS rebinding).
//! - Keys are kept as hashes and compared in constant time ([`keys`]).
//! - A request has a bounded head, body and time to arrive; a connection that does not read its answer is closed ([`server`],
//!   [`guard`]). Handlers get the whole body as bytes that are already there.
//! - Every answer has a request id and security headers; every request is one log line, without query, headers and body
//!   ([`log`]).
//! - At the end, requests that have begun are answered ([`server`]).

pub mod bind;
pub mod error;
pub mod guard;
mod io;
pub mod keys;
pub mod log;
pub mod metrics;
pub mod problem;
pub mod server;
mod tls;

pub use bind::Listen;
pub use error::{Error, Result};
pub use guard::{Guard, RequestId};
pub use keys::{Identity, Keys, Role};
pub use log::Log;
pub use problem::Problem;
pub use server::{Config, Limits, Server, Shutdown, signals};
pub use tls::TlsFiles;
