//! One file per command: `Args` (what clap parses) and `run(Args)`.
//!
//! To add a command: `mod name;` here, one line in [`Command`], one in [`Command::run`]. Commands that use a model flatten
//! `settings::Flags` into their `Args` and call `resolve()`; `Flags<Inference>` leaves the flags for training out.

mod bench;
mod chat;
mod combine;
mod complete;
mod config;
mod corpus;
mod doctor;
mod eval;
mod export;
mod generate;
mod live;
mod plan;
mod predict;
mod prepare;
mod pull;
mod run;
mod serve;
mod train;

#[derive(clap::Subcommand)]
#[allow(clippy::large_enum_variant, reason = "there is one for the whole run of the program")]
pub(crate) enum Command {
    /// Data, fine-tune, judge before and after, report: the whole job
    Run(run::Args),
    /// Fine-tune: data in, an adapter out
    Train(train::Args),
    /// Judge a model, or several side by side, on labelled texts
    Eval(eval::Args),
    /// Classify a text, lines of standard input, or a file
    Predict(predict::Args),
    /// Serve a model and its adapters over HTTP
    Serve(serve::Args),
    /// Talk with a model
    Chat(chat::Args),
    /// Have a model answer one prompt, or a file of prompts
    Complete(complete::Args),
    /// Score a stream of posts and turn it into signals per ticker, sector and market, on a page
    Live(live::Args),
    /// Make one adapter of several: the mean of what they change
    Combine(combine::Args),
    /// Write a model with its adapter for Transformers, llama.cpp or Ollama
    Export(export::Args),
    /// Say what a recipe will need: memory, steps, time
    Plan(plan::Args),
    /// Measure how fast this machine trains and classifies
    Bench(bench::Args),
    /// Have a chat model write labelled tweets
    Generate(generate::Args),
    /// Make data sets from journals and files: read, clean, deduplicate, split
    Prepare(prepare::Args),
    /// Look into the built-in corpus or a data file
    Corpus(corpus::Args),
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
            Command::Train(args) => train::run(args),
            Command::Eval(args) => eval::run(args),
            Command::Predict(args) => predict::run(args),
            Command::Serve(args) => serve::run(args),
            Command::Chat(args) => chat::run(args),
            Command::Complete(args) => complete::run(args),
            Command::Live(args) => live::run(args),
            Command::Combine(args) => combine::run(args),
            Command::Export(args) => export::run(args),
            Command::Plan(args) => plan::run(args),
            Command::Bench(args) => bench::run(args),
            Command::Generate(args) => generate::run(args),
            Command::Prepare(args) => prepare::run(args),
            Command::Corpus(args) => corpus::run(args),
            Command::Pull(args) => pull::run(args),
            Command::Config(args) => config::run(args),
            Command::Doctor(args) => doctor::run(args),
        }
    }
}
