//! One file per command: `Args` (what clap parses) and `run(Args)`.
//!
//! To add a command: `mod name;` here, one line in [`Command`], one in [`Command::run`]. Commands that use a model flatten
//! `settings::Flags` into their `Args` and call `resolve()`; `Flags<Inference>` leaves the flags for training out.

mod config;
mod doctor;
mod pull;
mod run;

#[derive(clap::Subcommand)]
pub(crate) enum Command {
    /// Data, fine-tune, judge before and after, report: the whole job
    Run(run::Args),
    /// Fetch a model or a data set, once
    Pull(pull::Args),
    /// Show the configuration in force, and where each value came from
    Config(config::Args),
    /// Look at this machine: what cashtag can use, and what is missing
    Doctor(doctor::Args),
}

impl Command {
    /// # Errors
    /// Whatever stopped the command; `exit::report` says with which code the program ends.
    pub(crate) fn run(self) -> anyhow::Result<()> {
        match self {
            Command::Run(args) => run::run(args),
            Command::Pull(args) => pull::run(args),
            Command::Config(args) => config::run(args),
            Command::Doctor(args) => doctor::run(args),
        }
    }
}
