//! What a model can do, how sure we are of it, and a page to look at.
//!
//! The way through: [`Judged`] texts (truth and one probability per label) → [`evaluate`] gives [`Metrics`] with 95 %
//! intervals → [`compare`] says whether one model beats another on the same texts → [`report::Report`] draws it all
//! into one HTML file and [`terminal_table`] into a few lines of text.
//!
//! Invariants:
//! - Every number that is a mean over texts comes with an interval; a number without one is a description, not a claim.
//! - The same texts, labels and seed give the same bits, whatever the number of threads.
//! - Nothing here panics on data from outside: probabilities are checked first, and [`EvalError`] names the text.

mod bootstrap;
mod calibration;
mod compare;
mod error;
mod judged;
mod metrics;
mod numbers;
pub mod report;
mod rng;
mod terminal;

pub use bootstrap::{Interval, RESAMPLES};
pub use calibration::{Bin, RELIABILITY_BINS, TEMPERATURE_RANGE, apply_temperature, fit_temperature};
pub use compare::{Comparison, McNemar, compare};
pub use error::{EvalError, Result};
pub use judged::{Judged, MAX_LABELS};
pub use metrics::{ClassMetrics, Metrics, NO_KIND, by_kind, evaluate};
pub use terminal::{terminal_kinds, terminal_table};
