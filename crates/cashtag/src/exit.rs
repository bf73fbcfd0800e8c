//! How the program ends: exit codes, the wording of errors, Ctrl-C, and what is said if there is a bug.
//!
//! | code | |
//! | --- | --- |
//! | 0 | done |
//! | 1 | failed |
//! | 2 | wrong usage: flags, configuration |
//! | 130, 143 | stopped by Ctrl-C (SIGINT) or by SIGTERM |

use std::fmt;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicUsize, Ordering};

use crate::output::{self, Paint, paint};
use crate::settings::SettingsError;

/// An error of usage without a type of its own: ends with code 2.
#[derive(Debug)]
pub(crate) struct Usage(pub(crate) String);

impl fmt::Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Usage {}

/// The user asked to stop, and the work stopped cleanly.
#[derive(Debug)]
pub(crate) struct Interrupted;

impl fmt::Display for Interrupted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("stopped")
    }
}

impl std::error::Error for Interrupted {}

/// Prints an error and says with which code to end.
pub(crate) fn report(error: &anyhow::Error) -> ExitCode {
    if error.chain().any(|e| e.is::<Interrupted>()) {
        return ExitCode::from(signal_code());
    }
    let rank = crate::pipeline::ranks::other_rank().map(|rank| format!("rank {rank}: ")).unwrap_or_default();
    crate::progress::print_line(&(rank + &render(error)));
    let usage = error.chain().any(|e| e.is::<Usage>() || e.is::<SettingsError>() || e.is::<clap::Error>());
    ExitCode::from(if usage { 2 } else { 1 })
}

/// `error: …`, its causes, and the hints of all of them at the end. A line of a message that begins with `hint:` is a hint.
fn render(error: &anyhow::Error) -> String {
    let (mut said, mut hints): (Vec<String>, Vec<String>) = (Vec::new(), Vec::new());
    for cause in error.chain() {
        let text = output::printable(&cause.to_string());
        let (mut message, mut hint) = (Vec::new(), None::<Vec<&str>>);
        for line in text.lines() {
            match (line.trim_start().strip_prefix("hint:"), &mut hint) {
                (Some(first), _) => hint = Some([hint.take().unwrap_or_default(), vec![first.trim()]].concat()),
                (None, Some(hint)) => hint.push(line.trim()),
                (None, None) => message.push(line.trim_end()),
            }
        }
        hints.extend(hint.map(|lines| lines.join(" ")).filter(|h| !h.is_empty()));
        let message = message.join("\n");
        // Many errors repeat their cause in their own words.
        if !message.is_empty() && !said.iter().any(|s| s.contains(&message)) {
            said.push(message);
        }
    }
    hints.dedup();
    let mut lines = Vec::new();
    for (i, message) in said.iter().enumerate() {
        if i == 0 {
            lines.push(format!("{} {message}", paint(Paint::Error, "error:")));
        } else {
            lines.push(format!("  caused by: {message}"));
        }
    }
    lines.extend(hints.iter().map(|hint| format!("{} {hint}", paint(Paint::Hint, "hint:"))));
    lines.join("\n")
}

/// Work that stops cleanly by itself; see [`clean_stop`].
static CLEAN_STOPS: AtomicUsize = AtomicUsize::new(0);
static REQUESTED: AtomicBool = AtomicBool::new(false);
static SIGNAL: AtomicI32 = AtomicI32::new(signal_hook::consts::SIGINT);

fn signal_code() -> u8 {
    128 + SIGNAL.load(Ordering::Relaxed) as u8
}

/// Starts listening for Ctrl-C and SIGTERM. Without a [`clean_stop`] the first one ends the program at once.
///
/// # Errors
/// The thread or the handlers cannot be set up.
pub(crate) fn listen() -> std::io::Result<()> {
    let mut signals = signal_hook::iterator::Signals::new([signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM])?;
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        for signal in signals.forever() {
            SIGNAL.store(signal, Ordering::Relaxed);
            if CLEAN_STOPS.load(Ordering::SeqCst) == 0 || REQUESTED.swap(true, Ordering::SeqCst) {
                std::process::exit(128 + signal);
            }
            output::note("stopping; Ctrl-C again stops at once");
        }
    })?;
    Ok(())
}

/// While this lives, the first Ctrl-C only asks to stop ([`stop_requested`], [`check_stop`]); the second ends the program.
#[must_use]
pub(crate) struct CleanStop(());

pub(crate) fn clean_stop() -> CleanStop {
    CLEAN_STOPS.fetch_add(1, Ordering::SeqCst);
    CleanStop(())
}

impl Drop for CleanStop {
    fn drop(&mut self) {
        CLEAN_STOPS.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Whether the user asked to stop. Cheap: ask once for each step, batch or block.
pub(crate) fn stop_requested() -> bool {
    REQUESTED.load(Ordering::Relaxed)
}

/// The request was met by ending one piece of work; the program goes on (a conversation after a reply was cut short).
pub(crate) fn forget_stop() {
    REQUESTED.store(false, Ordering::SeqCst);
}

/// [`stop_requested`] as an error, which ends the program with the signal's code and without a message.
///
/// # Errors
/// [`Interrupted`] if the user asked to stop.
pub(crate) fn check_stop() -> Result<(), Interrupted> {
    if stop_requested() { Err(Interrupted) } else { Ok(()) }
}

/// A panic is a bug: one line that asks for a report, no backtrace (`RUST_BACKTRACE` still gives one).
pub(crate) fn install_panic_hook() {
    static SAID: AtomicBool = AtomicBool::new(false);
    let with_backtrace = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        let payload = info.payload();
        let message = payload.downcast_ref::<&str>().copied();
        let message = message.or_else(|| payload.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message");
        if message.starts_with("failed printing to std") {
            // Someone else's `println!` met a closed pipe.
            std::process::exit(if message.contains("Broken pipe") { 0 } else { 1 });
        }
        // Threads that were waiting for the first one may panic too.
        if SAID.swap(true, Ordering::SeqCst) {
            return;
        }
        if std::env::var_os("RUST_BACKTRACE").is_some_and(|v| v != "0") {
            return with_backtrace(info);
        }
        let at = info.location().map(|l| format!(" ({}:{})", l.file(), l.line())).unwrap_or_default();
        let version = env!("CARGO_PKG_VERSION");
        crate::progress::print_line(&format!(
            "{} a bug in cashtag {version}: {}{at}\n{} please report this line together with the command that you ran",
            paint(Paint::Error, "error:"),
            output::printable(message).replace('\n', " "),
            paint(Paint::Hint, "hint:"),
        ));
    }));
}

#[cfg(test)]
mod tests {
    use anyhow::{Context as _, anyhow};

    use super::*;

    #[test]
    fn hints_come_last_and_causes_are_not_repeated() {
        let error = anyhow!("no such file\n  hint: look\n  twice")
            .context("cannot read a.toml: no such file")
            .context("run failed");
        assert_eq!(
            render(&error),
            "error: run failed\n  caused by: cannot read a.toml: no such file\nhint: look twice"
        );
        assert_eq!(render(&anyhow!("bad name \x1b[2J")), "error: bad name \u{fffd}[2J");
    }

    #[test]
    #[ignore = "panics: the test below runs it in a process of its own"]
    fn a_bug() {
        install_panic_hook();
        // A second thread that panics because of the first says nothing more.
        let _ = std::thread::spawn(|| panic!("index 3\nof 2")).join();
        panic!("poisoned");
    }

    #[test]
    fn a_panic_is_one_line_and_a_request() {
        let this = std::env::current_exe().unwrap();
        let mut command = std::process::Command::new(this);
        command.args(["--ignored", "--exact", "exit::tests::a_bug", "--nocapture"]).env_remove("RUST_BACKTRACE");
        let said = String::from_utf8(command.output().unwrap().stderr).unwrap();
        let mut lines = said.lines();
        let first = lines.next().unwrap();
        assert!(
            first.starts_with("error: a bug in cashtag ")
                && first.contains(": index 3 of 2 (")
                && first.contains("exit.rs:")
        );
        assert_eq!(lines.next(), Some("hint: please report this line together with the command that you ran"));
        assert!(!said.contains("poisoned"), "{said}");
    }

    #[test]
    fn settings_are_usage() {
        let error = Err::<(), _>(SettingsError::new("--x", "is wrong")).context("deeper").unwrap_err();
        assert!(error.chain().any(|e| e.is::<SettingsError>()));
    }
}
