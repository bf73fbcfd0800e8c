//! Progress of long work on stderr: a bar with rate and time left on a terminal, a line every few seconds elsewhere (a log
//! file wants lines, not cursor movements), nothing with `-q`.

use std::io::{IsTerminal, Write};
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::{exit, output};

/// Between two lines where stderr is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// All bars, so that other lines can be printed above them.
fn bars() -> &'static MultiProgress {
    static BARS: OnceLock<MultiProgress> = OnceLock::new();
    BARS.get_or_init(|| MultiProgress::with_draw_target(ProgressDrawTarget::stderr_with_hz(10)))
}

/// Prints a line on stderr, above the bars if there are any. An unwritable stderr is no reason to stop.
pub(crate) fn print_line(line: &str) {
    bars().suspend(|| {
        let _ = writeln!(std::io::stderr(), "{line}");
    });
}

/// What is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unit {
    Bytes,
    /// Anything else, in the plural: `examples`.
    Of(&'static str),
}

impl Unit {
    fn amount(self, n: u64) -> String {
        match self {
            Unit::Bytes => output::bytes(n),
            Unit::Of(_) => n.to_string(),
        }
    }

    fn rate(self, per_second: f64) -> String {
        match self {
            Unit::Bytes => format!("{}/s", output::bytes(per_second as u64)),
            Unit::Of(what) if per_second >= 10.0 => format!("{per_second:.0} {what}/s"),
            Unit::Of(what) => format!("{per_second:.2} {what}/s"),
        }
    }
}

/// One piece of work. Dropping it removes its bar.
pub(crate) struct Progress {
    bar: ProgressBar,
    label: String,
    unit: Unit,
    /// Where there is no terminal.
    lines: Option<Mutex<Lines>>,
}

struct Lines {
    started: Instant,
    printed: Instant,
    /// Position at the start: what an earlier run did says nothing about the rate of this one.
    first: u64,
    position: u64,
    total: Option<u64>,
    message: String,
}

impl Progress {
    /// `total`: how much there is to do, if that is known.
    pub(crate) fn new(label: impl Into<String>, unit: Unit, total: Option<u64>) -> Self {
        let label = output::printable(&label.into());
        let terminal = std::io::stderr().is_terminal() && !output::is_quiet();
        if !terminal {
            let now = Instant::now();
            let lines = Lines { started: now, printed: now, first: 0, position: 0, total, message: String::new() };
            let lines = (!output::is_quiet()).then(|| Mutex::new(lines));
            return Self { bar: ProgressBar::hidden(), label, unit, lines };
        }
        let bar = bars().add(total.map_or_else(ProgressBar::no_length, ProgressBar::new));
        bar.set_style(style(unit, total.is_some()));
        bar.set_prefix(label.clone());
        bar.enable_steady_tick(Duration::from_millis(200));
        Self { bar, label, unit, lines: None }
    }

    /// Work that cannot be counted.
    pub(crate) fn spinner(label: impl Into<String>) -> Self {
        let progress = Self::new(label, Unit::Of(""), None);
        if let Ok(style) = ProgressStyle::with_template("{prefix} {spinner} {elapsed} {msg}") {
            progress.bar.set_style(style);
        }
        progress
    }

    /// Begins at `position`, of which nothing counts for the rate: a download or a run that continues.
    pub(crate) fn starting_at(self, position: u64) -> Self {
        self.bar.set_position(position);
        self.bar.reset_eta();
        if let Some(Ok(mut lines)) = self.lines.as_ref().map(Mutex::lock) {
            (lines.first, lines.position) = (position, position);
        }
        self
    }

    pub(crate) fn set_total(&self, total: u64) {
        self.bar.set_length(total);
        if self.lines.is_none() {
            self.bar.set_style(style(self.unit, true));
        }
        if let Some(Ok(mut lines)) = self.lines.as_ref().map(Mutex::lock) {
            lines.total = Some(total);
        }
    }

    pub(crate) fn set_position(&self, position: u64) {
        self.bar.set_position(position);
        self.line(|lines| lines.position = position);
    }

    /// Shows what a job says of itself (done, of how much), and tells it to stop after Ctrl-C.
    pub(crate) fn watch(&self) -> impl FnMut(u64, u64) -> bool + '_ {
        move |done, total| {
            self.set_total(total);
            self.set_position(done);
            !exit::stop_requested()
        }
    }

    pub(crate) fn inc(&self, n: u64) {
        self.bar.inc(n);
        self.line(|lines| lines.position += n);
    }

    /// What stands behind the rate: `loss 0.41, lr 1.8e-4`.
    pub(crate) fn message(&self, message: impl Into<String>) {
        let message = output::printable(&message.into());
        self.bar.set_message(message.clone());
        self.line(|lines| lines.message = message);
    }

    fn line(&self, change: impl FnOnce(&mut Lines)) {
        let Some(Ok(mut lines)) = self.lines.as_ref().map(Mutex::lock) else { return };
        change(&mut lines);
        let now = Instant::now();
        if now.duration_since(lines.printed) < LINE_EVERY {
            return;
        }
        lines.printed = now;
        print_line(&lines.text(&self.label, self.unit, now));
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

impl Lines {
    fn text(&self, label: &str, unit: Unit, now: Instant) -> String {
        let seconds = now.duration_since(self.started).as_secs_f64();
        let rate = self.position.saturating_sub(self.first) as f64 / seconds.max(1e-9);
        let mut text = format!("{label}: {}", unit.amount(self.position));
        if let Some(total) = self.total.filter(|t| *t > 0) {
            text += &format!(" of {} ({:.0} %)", unit.amount(total), 100.0 * self.position as f64 / total as f64);
        } else if let Unit::Of(what) = unit {
            text += &format!(" {what}");
        }
        if rate > 0.0 {
            text += &format!(", {}", unit.rate(rate));
            if let Some(total) = self.total {
                text += &format!(", {} left", duration(total.saturating_sub(self.position) as f64 / rate));
            }
        }
        if !self.message.is_empty() {
            text += &format!(", {}", self.message);
        }
        text
    }
}

/// `1 h 05 min`, `3 min 20 s`, `12 s`.
pub(crate) fn duration(seconds: f64) -> String {
    // A rate near zero would give a number of centuries.
    if !(0.0..8.64e6).contains(&seconds) {
        return "a long time".into();
    }
    let s = seconds.round() as u64;
    match s {
        0..60 => format!("{s} s"),
        60..3600 => format!("{} min {:02} s", s / 60, s % 60),
        _ => format!("{} h {:02} min", s / 3600, s / 60 % 60),
    }
}

fn style(unit: Unit, total: bool) -> ProgressStyle {
    let template = match (unit, total) {
        (Unit::Bytes, true) => {
            "{prefix} [{bar:28}] {decimal_bytes} of {decimal_total_bytes} · {decimal_bytes_per_sec} · {eta} left {msg}"
                .to_string()
        }
        (Unit::Bytes, false) => "{prefix} {spinner} {decimal_bytes} · {decimal_bytes_per_sec} {msg}".to_string(),
        (Unit::Of(what), true) => {
            format!("{{prefix}} [{{bar:28}}] {{pos}} of {{len}} {what} · {{per_sec}} · {{eta}} left {{msg}}")
        }
        (Unit::Of(what), false) => format!("{{prefix}} {{spinner}} {{pos}} {what} · {{per_sec}} {{msg}}"),
    };
    ProgressStyle::with_template(&template)
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("=> ")
        .with_key("per_sec", move |state: &indicatif::ProgressState, out: &mut dyn std::fmt::Write| {
            let _ = out.write_str(&unit.rate(state.per_sec()));
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_where_there_is_no_terminal() {
        let start = Instant::now();
        let mut lines =
            Lines { started: start, printed: start, first: 0, position: 30, total: Some(120), message: String::new() };
        let at = |lines: &Lines, unit, s| lines.text("train", unit, start + Duration::from_secs(s));
        assert_eq!(at(&lines, Unit::Of("examples"), 10), "train: 30 of 120 (25 %), 3.00 examples/s, 30 s left");
        lines.message = "loss 0.41".into();
        lines.first = 20;
        assert_eq!(
            at(&lines, Unit::Of("steps"), 10),
            "train: 30 of 120 (25 %), 1.00 steps/s, 1 min 30 s left, loss 0.41"
        );
        lines.message.clear();
        (lines.total, lines.first, lines.position) = (None, 0, 5_000_000);
        assert_eq!(at(&lines, Unit::Bytes, 2), "train: 5.0 MB, 2.5 MB/s");
        lines.position = 0;
        assert_eq!(at(&lines, Unit::Of("texts"), 0), "train: 0 texts");
    }

    #[test]
    fn durations() {
        assert_eq!(duration(0.4), "0 s");
        assert_eq!(duration(200.0), "3 min 20 s");
        assert_eq!(duration(3900.0), "1 h 05 min");
        assert_eq!(duration(f64::INFINITY), "a long time");
        assert_eq!(duration(f64::NAN), "a long time");
    }
}
