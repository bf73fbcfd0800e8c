//! The command line: parses, runs one command, turns its outcome into an exit code. No logic of its own.

mod cache;
mod commands;
mod exit;
mod hub;
mod output;
mod pipeline;
mod progress;
mod settings;

use std::process::ExitCode;

use clap::{ArgAction, Args, ColorChoice, CommandFactory, FromArgMatches, Parser};

use output::Color;

/// Fine-tune a Llama for stock-market sentiment, prove what it can do, and classify with it.
#[derive(Parser)]
#[command(name = "cashtag", version, arg_required_else_help = true, propagate_version = false)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: commands::Command,
}

#[derive(Args)]
struct Global {
    /// Say more about what is done
    #[arg(short, long, global = true, action = ArgAction::Count, conflicts_with = "quiet", help_heading = "Output")]
    verbose: u8,
    /// Say nothing but results and errors
    #[arg(short, long, global = true, action = ArgAction::Count, help_heading = "Output")]
    quiet: u8,
    /// When to use colour [default: on a terminal, unless NO_COLOR is set]
    #[arg(long, global = true, value_enum, value_name = "WHEN", hide_possible_values = true, help_heading = "Output")]
    color: Option<Color>,
}

fn main() -> ExitCode {
    exit::install_panic_hook();
    // A panic has been reported by the hook.
    std::panic::catch_unwind(run).unwrap_or(ExitCode::from(1))
}

fn run() -> ExitCode {
    let matches = match Cli::command().color(color_of_parser()).try_get_matches() {
        Ok(matches) => matches,
        Err(e) => {
            // Help and version go to stdout and are no error.
            let _ = e.print();
            return ExitCode::from(if e.use_stderr() { 2 } else { 0 });
        }
    };
    let cli = match Cli::from_arg_matches(&matches) {
        Ok(cli) => cli,
        Err(e) => {
            let _ = e.print();
            return ExitCode::from(2);
        }
    };
    let Global { verbose, quiet, color } = cli.global;
    // Of several processes of one run, one talks.
    let others = i8::from(pipeline::ranks::other_rank().is_some());
    output::configure(verbose.min(9) as i8 - quiet.min(9) as i8 - others, color.unwrap_or_default());
    if let Err(e) = exit::listen() {
        output::warn(format!("Ctrl-C cannot be handled: {e}"));
    }
    match cli.command.run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => exit::report(&error),
    }
}

/// Colour of the parser's own messages, which come before the parser knows the flag.
fn color_of_parser() -> ColorChoice {
    let args: Vec<_> = std::env::args_os().collect();
    let says = |word: &str| {
        args.iter().any(|a| *a == *format!("--color={word}"))
            || args.windows(2).any(|pair| pair[0] == *"--color" && pair[1] == *word)
    };
    match () {
        () if says("never") => ColorChoice::Never,
        () if says("always") => ColorChoice::Always,
        () => ColorChoice::Auto,
    }
}
