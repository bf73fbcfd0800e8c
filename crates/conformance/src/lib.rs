//! The conformance suite: every operation of [`Backend`], one file per family, on a candidate against a reference.
//!
//! The reference is the CPU backend in f32. Inputs are random, rounded to the candidate's compute dtype first, so that both start from the
//! same numbers; shapes are random and awkward (ragged layouts, odd rows, strided views, one-token examples). The measure is
//! ‖candidate - reference‖ / ‖reference‖ over an output.
//!
//! Every buffer is filled with NaN around the view that an operation may touch, and outputs inside it too: an element that is
//! read from outside, not written, or written outside its view is a failure whatever the tolerance.

mod attention;
mod dora;
mod elementwise;
mod harness;
mod linear;
mod loss;
mod norm;
mod optimizer;

pub use harness::{Report, Tolerance};

use cashtag_backend::Backend;
use harness::Harness;

/// The families of operations, in the order in which [`run_all`] takes them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    Elementwise,
    Norm,
    Linear,
    Attention,
    Loss,
    Optimizer,
    Dora,
}

impl Family {
    pub const ALL: [Family; 7] = [
        Family::Elementwise,
        Family::Norm,
        Family::Linear,
        Family::Attention,
        Family::Loss,
        Family::Optimizer,
        Family::Dora,
    ];
}

/// Runs one family for `rounds` rounds of random shapes.
pub fn run<A: Backend, B: Backend>(
    family: Family,
    reference: &A,
    candidate: &B,
    tolerance: Tolerance,
    rounds: usize,
) -> Report {
    let mut harness = Harness::new(reference, candidate, tolerance);
    for _ in 0..rounds {
        let result = match family {
            Family::Elementwise => elementwise::run(&mut harness),
            Family::Norm => norm::run(&mut harness),
            Family::Linear => linear::run(&mut harness),
            Family::Attention => attention::run(&mut harness),
            Family::Loss => loss::run(&mut harness),
            Family::Optimizer => optimizer::run(&mut harness),
            Family::Dora => dora::run(&mut harness),
        };
        if let Err(e) = result {
            harness.fail(format!("{family:?}: {e}"));
            break;
        }
    }
    harness.report()
}

/// Runs every family.
pub fn run_all<A: Backend, B: Backend>(reference: &A, candidate: &B, tolerance: Tolerance, rounds: usize) -> Report {
    let mut report = Report::default();
    for family in Family::ALL {
        report.join(run(family, reference, candidate, tolerance, rounds));
    }
    report
}
