//! What is printed where: data on stdout, everything else on stderr, in colour only where someone looks at it.

use std::io::{IsTerminal, Write};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicI8, Ordering};

use crate::exit::Usage;
use crate::progress;

/// When output is coloured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Color {
    /// On a terminal, unless NO_COLOR is set.
    #[default]
    Auto,
    Always,
    Never,
}

static VERBOSITY: AtomicI8 = AtomicI8::new(0);
static COLOR: AtomicBool = AtomicBool::new(false);

/// Called once, before anything is printed. `verbosity` is the number of `-v` less that of `-q`.
pub(crate) fn configure(verbosity: i8, color: Color) {
    VERBOSITY.store(verbosity, Ordering::Relaxed);
    let no_color = std::env::var_os("NO_COLOR").is_some_and(|v| !v.is_empty());
    let on = match color {
        Color::Always => true,
        Color::Never => false,
        Color::Auto => !no_color && std::io::stderr().is_terminal(),
    };
    COLOR.store(on, Ordering::Relaxed);
}

pub(crate) fn is_quiet() -> bool {
    VERBOSITY.load(Ordering::Relaxed) < 0
}

pub(crate) fn is_verbose() -> bool {
    VERBOSITY.load(Ordering::Relaxed) > 0
}

/// What a word on stderr is, and so how it looks.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Paint {
    Error,
    Warning,
    Hint,
}

pub(crate) fn paint(paint: Paint, text: &str) -> String {
    let code = match paint {
        Paint::Error => "1;31",
        Paint::Warning => "1;33",
        Paint::Hint => "1;36",
    };
    if COLOR.load(Ordering::Relaxed) { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_string() }
}

/// A line about what is being done; silent with `-q`.
pub(crate) fn note(line: impl AsRef<str>) {
    if !is_quiet() {
        progress::print_line(&printable(line.as_ref()));
    }
}

/// A line for those who asked for more with `-v`.
pub(crate) fn detail(line: impl AsRef<str>) {
    if is_verbose() {
        progress::print_line(&printable(line.as_ref()));
    }
}

/// Something that the user should know but that does not stop the work; silent with `-q`.
pub(crate) fn warn(line: impl AsRef<str>) {
    if !is_quiet() {
        progress::print_line(&format!("{} {}", paint(Paint::Warning, "warning:"), printable(line.as_ref())));
    }
}

/// Text without what could move the cursor: names come from files and servers.
pub(crate) fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() && c != '\n' && c != '\t' { '\u{fffd}' } else { c }).collect()
}

/// Prints data. A reader that has left (`| head`) ends the program quietly.
///
/// # Errors
/// Stdout cannot be written for another reason, for example a full disk.
pub(crate) fn data(text: &str) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => std::process::exit(0),
        outcome => Ok(outcome.map_err(|e| anyhow::anyhow!("cannot write to stdout: {e}"))?),
    }
}

/// `98.4 MB`: as download pages and disk labels count.
pub(crate) fn bytes(n: u64) -> String {
    const UNITS: [&str; 5] = ["kB", "MB", "GB", "TB", "PB"];
    if n < 1000 {
        return format!("{n} B");
    }
    let mut value = n as f64 / 1000.0;
    let mut unit = 0;
    while value >= 999.95 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

/// Whether a command may write to `path`.
///
/// # Errors
/// Something is there, and `overwrite` was not asked for.
pub(crate) fn may_replace(path: &Path, overwrite: bool) -> Result<(), Usage> {
    if path.symlink_metadata().is_ok() && !overwrite {
        return Err(Usage(format!("{} exists\n  hint: --overwrite replaces it", path.display())));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        let want = [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (98_362_432, "98.4 MB"), (999_960_000, "1.0 GB")];
        for (n, text) in want {
            assert_eq!(bytes(n), text);
        }
        assert_eq!(bytes(u64::MAX), "18446.7 PB");
    }

    #[test]
    fn nothing_moves_the_cursor() {
        assert_eq!(printable("a\x1b[2Jb\rc\nd"), "a\u{fffd}[2Jb\u{fffd}c\nd");
    }
}
