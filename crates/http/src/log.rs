//! One line an event on stderr, for people or as JSON. Nothing waits for it.
//!
//! Lines are written on a thread of its own from a bounded queue; where nobody reads stderr the queue fills, lines are
//! dropped, and the next one that is written says how many. Callers give names and numbers, never headers, queries or
//! bodies.

use std::io::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    Error,
    Warn,
    Info,
    Debug,
}

impl Level {
    fn name(self) -> &'static str {
        match self {
            Level::Error => "error",
            Level::Warn => "warn",
            Level::Info => "info",
            Level::Debug => "debug",
        }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// `12:34:56.789 info request method=POST path=/predict status=200`
    #[default]
    Text,
    /// One object a line.
    Json,
}

/// A handle to the log; clones write to the same.
#[derive(Clone)]
pub struct Log {
    level: Option<Level>,
    format: Format,
    queue: SyncSender<Line>,
    dropped: Arc<AtomicU64>,
}

enum Line {
    Text(String),
    /// Everything before it has been written when the answer comes.
    Flush(SyncSender<()>),
}

/// Lines that may wait.
const QUEUE: usize = 4096;
/// Longest value; what is behind it is cut.
const MAX_VALUE: usize = 1024;

impl Log {
    /// Events of `level` and more urgent ones; none with `None`.
    pub fn stderr(level: Option<Level>, format: Format) -> Self {
        Self::to(level, format, |line| {
            let _ = std::io::stderr().lock().write_all(line.as_bytes());
        })
    }

    /// A log that keeps nothing.
    pub fn off() -> Self {
        Self { level: None, format: Format::Text, queue: sync_channel(1).0, dropped: Arc::default() }
    }

    /// Gives each line, with its end, to `write`, on a thread of its own.
    pub fn to(level: Option<Level>, format: Format, write: impl FnMut(&str) + Send + 'static) -> Self {
        let (queue, lines) = sync_channel(QUEUE);
        let dropped = Arc::new(AtomicU64::new(0));
        let count = dropped.clone();
        // Without a thread lines are dropped, which is no reason to end.
        let _ = std::thread::Builder::new().name("log".into()).spawn(move || run(lines, format, &count, write));
        Self { level, format, queue, dropped }
    }

    pub fn is_on(&self, level: Level) -> bool {
        self.level.is_some_and(|max| level <= max)
    }

    /// Writes an event with its fields.
    pub fn event(&self, level: Level, event: &str, fields: &[(&str, Value)]) {
        if !self.is_on(level) {
            return;
        }
        let line = line(self.format, level, event, fields);
        if self.queue.try_send(Line::Text(line)).is_err() {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    pub fn info(&self, event: &str, fields: &[(&str, Value)]) {
        self.event(Level::Info, event, fields);
    }

    pub fn warn(&self, event: &str, fields: &[(&str, Value)]) {
        self.event(Level::Warn, event, fields);
    }

    pub fn error(&self, event: &str, fields: &[(&str, Value)]) {
        self.event(Level::Error, event, fields);
    }

    /// Waits, a second at most, until what was logged before is written.
    pub fn flush(&self) {
        let (sender, receiver) = sync_channel(1);
        if self.queue.try_send(Line::Flush(sender)).is_ok() {
            let _ = receiver.recv_timeout(Duration::from_secs(1));
        }
    }
}

fn run(lines: Receiver<Line>, format: Format, dropped: &AtomicU64, mut write: impl FnMut(&str)) {
    for entry in lines {
        match entry {
            Line::Text(text) => write(&text),
            Line::Flush(done) => {
                let _ = done.send(());
            }
        }
        let lost = dropped.swap(0, Ordering::Relaxed);
        if lost > 0 {
            write(&line(format, Level::Warn, "log lines were dropped", &[("lines", lost.into())]));
        }
    }
}

fn line(format: Format, level: Level, event: &str, fields: &[(&str, Value)]) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    match format {
        Format::Json => {
            let mut object = Map::new();
            object.insert("time".into(), timestamp(now).into());
            object.insert("level".into(), level.name().into());
            object.insert("event".into(), event.into());
            for (name, value) in fields {
                let value = match value {
                    Value::String(s) => Value::from(cut(s)),
                    other => other.clone(),
                };
                object.insert((*name).to_string(), value);
            }
            Value::from(object).to_string() + "\n"
        }
        Format::Text => {
            let time = timestamp(now);
            let mut text = format!("{} {} {event}", time.get(11..23).unwrap_or_default(), level.name());
            for (name, value) in fields {
                match value {
                    Value::Null => {}
                    Value::String(s) if is_word(s) => text += &format!(" {name}={}", cut(s)),
                    Value::String(s) => text += &format!(" {name}={}", Value::from(cut(s))),
                    other => text += &format!(" {name}={other}"),
                }
            }
            text + "\n"
        }
    }
}

/// Needs no quotes.
fn is_word(text: &str) -> bool {
    !text.is_empty() && text.chars().all(|c| c.is_ascii_graphic() && !matches!(c, '"' | '=' | '\\'))
}

fn cut(text: &str) -> String {
    let mut end = text.len().min(MAX_VALUE);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    // JSON escapes ASCII control characters itself; those of C1 move terminals too.
    text[..end].chars().map(|c| if c.is_control() && !c.is_ascii() { '\u{fffd}' } else { c }).collect()
}

/// `2026-11-28T09:08:47.123Z` (civil date from days: Howard Hinnant's algorithm).
pub fn timestamp(since_epoch: Duration) -> String {
    let seconds = since_epoch.as_secs();
    let (days, rest) = ((seconds / 86_400) as i64, seconds % 86_400);
    let z = days + 719_468;
    let era = z.div_euclid(146_097);
    let day_of_era = z.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    let (hour, minute, second, milli) = (rest / 3600, rest / 60 % 60, rest % 60, since_epoch.subsec_millis());
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{milli:03}Z")
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[test]
    fn dates() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_782_399, "2000-02-28T23:59:59.000Z"),
            (951_782_400, "2000-02-29T00:00:00.000Z"),
            (1_796_030_400, "2026-11-30T09:20:00.000Z"),
            (4_107_542_400, "2100-03-01T00:00:00.000Z"),
        ] {
            assert_eq!(timestamp(Duration::from_secs(seconds)), text);
        }
    }

    #[test]
    fn lines_for_people_and_for_programs() {
        let written = Arc::new(Mutex::new(String::new()));
        let into = |written: &Arc<Mutex<String>>| {
            let written = written.clone();
            move |line: &str| written.lock().unwrap().push_str(line)
        };
        let log = Log::to(Some(Level::Info), Format::Text, into(&written));
        log.event(Level::Debug, "unseen", &[]);
        log.info("request", &[("path", "/a b\n\u{9b}2J".into()), ("status", 200.into()), ("key", Value::Null)]);
        log.flush();
        let text = std::mem::take(&mut *written.lock().unwrap());
        assert_eq!(&text[12..], " info request path=\"/a b\\n\u{fffd}2J\" status=200\n");
        let log = Log::to(Some(Level::Warn), Format::Json, into(&written));
        log.warn("e", &[("x", "é".repeat(2000).into())]);
        log.flush();
        let text = written.lock().unwrap().clone();
        let object: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(object["level"], "warn");
        assert_eq!(object["x"].as_str().unwrap().len(), MAX_VALUE);
    }

    #[test]
    fn nobody_waits_for_a_log_that_nobody_reads() {
        let (hold, held) = sync_channel::<()>(0);
        let log = Log::to(Some(Level::Info), Format::Text, move |_| {
            let _ = held.recv();
        });
        for i in 0..QUEUE * 2 {
            log.info("event", &[("i", i.into())]);
        }
        assert!(log.dropped.load(Ordering::Relaxed) >= (QUEUE - 2) as u64);
        drop(hold);
    }
}
