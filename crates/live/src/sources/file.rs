//! A file or standard input, replayed by event time: at real speed, N times as fast, or as fast as it goes.
//!
//! JSON lines, CSV and Parquet. A line of JSON that is none becomes a dead letter; the file goes on behind it. The cursor is
//! the number of the row, with a fingerprint of the file's beginning: the same file goes on where it was, another one of the
//! same name begins anew.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use cashtag_corpus::formats::{Format, RowReader};
use serde_json::{Map, Value};

use super::{Running, Source, row};
use crate::board::{Pace, State};
use crate::error::{Error, Result};
use crate::inlet::Inlet;
use crate::post::{Incoming, digest, hex};
use crate::store::DeadLetter;
use crate::time::Millis;

const MAX_LINE: u64 = 1 << 20;
const TOGETHER: usize = 1_000;
/// A pause in a replay is cut into pieces: someone may want to stop.
const NAP: Duration = Duration::from_millis(50);

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Speed {
    /// 1 is real time.
    Times(f64),
    Fastest,
}

pub struct Replay {
    input: Input,
    speed: Speed,
}

enum Input {
    File(PathBuf),
    Stdin,
    /// A name and JSON lines that ship with the program.
    Embedded(&'static str, &'static [u8]),
}

impl Replay {
    pub fn file(path: PathBuf, speed: Speed) -> Self {
        Self { input: Input::File(path), speed }
    }

    /// JSON lines.
    pub fn stdin(speed: Speed) -> Self {
        Self { input: Input::Stdin, speed }
    }

    pub fn embedded(name: &'static str, lines: &'static [u8], speed: Speed) -> Self {
        Self { input: Input::Embedded(name, lines), speed }
    }
}

impl Source for Replay {
    fn name(&self) -> String {
        match &self.input {
            Input::File(path) => {
                path.file_stem().map_or("file".into(), |s| s.to_string_lossy().chars().take(64).collect())
            }
            Input::Stdin => "stdin".into(),
            Input::Embedded(name, _) => (*name).into(),
        }
    }

    fn kind(&self) -> &'static str {
        if matches!(self.input, Input::Stdin) { "stdin" } else { "file" }
    }

    fn pace(&self) -> Pace {
        Pace::Replay
    }

    fn run(self: Box<Self>, inlet: Inlet) -> Running {
        Box::pin(async move {
            let work = tokio::task::spawn_blocking(move || Job::new(&self, inlet)?.run(&self.input));
            work.await.map_err(|_| Error::Stopped)?
        })
    }
}

struct Job {
    inlet: Inlet,
    name: String,
    speed: Speed,
    /// Rows of this file that were delivered by a run before this one.
    skip: u64,
    fingerprint: String,
    row: u64,
    waiting: Vec<Incoming>,
    began: Option<(Instant, Millis)>,
    sent_at: Instant,
}

impl Job {
    fn new(replay: &Replay, inlet: Inlet) -> Result<Self> {
        let name = replay.name();
        let fingerprint = match &replay.input {
            Input::File(path) => {
                let mut head = Vec::new();
                let file = File::open(path).map_err(Error::io("read", path))?;
                file.take(4096).read_to_end(&mut head).map_err(Error::io("read", path))?;
                hex(&digest(&[&head])[..6])
            }
            Input::Stdin => String::new(),
            Input::Embedded(_, lines) => hex(&digest(&[lines])[..6]),
        };
        let cursor = inlet.cursor(&name).filter(|_| !matches!(replay.input, Input::Stdin)).unwrap_or_default();
        let skip = match cursor.split_once(':') {
            Some((row, of)) if of == fingerprint => row.parse().unwrap_or(0),
            _ => 0,
        };
        let detail = if skip > 0 { format!("goes on after row {skip}") } else { String::new() };
        inlet.board().set(&name, State::Connected, detail);
        let (waiting, sent_at) = (Vec::with_capacity(TOGETHER), Instant::now());
        Ok(Self { inlet, name, speed: replay.speed, skip, fingerprint, row: 0, waiting, began: None, sent_at })
    }

    fn run(mut self, input: &Input) -> Result<()> {
        match input {
            Input::Stdin => self.lines(std::io::stdin().lock(), "standard input")?,
            Input::Embedded(name, lines) => self.lines(*lines, name)?,
            Input::File(path) => {
                let shown = path.display().to_string();
                match Format::detect(path)? {
                    Format::Jsonl => {
                        self.lines(BufReader::new(File::open(path).map_err(Error::io("read", path))?), &shown)?
                    }
                    _ => self.rows(RowReader::open(path)?, &shown)?,
                }
            }
        }
        self.send()
    }

    fn lines(&mut self, mut input: impl BufRead, place: &str) -> Result<()> {
        let mut line = Vec::new();
        loop {
            line.clear();
            let io = |e| Error::io("read", std::path::Path::new(place))(e);
            if input.by_ref().take(MAX_LINE).read_until(b'\n', &mut line).map_err(io)? == 0 {
                return Ok(());
            }
            self.row += 1;
            let whole = line.len() < MAX_LINE as usize || line.ends_with(b"\n");
            if !whole {
                skip_line(&mut input).map_err(io)?;
            }
            if self.row <= self.skip || line.trim_ascii().is_empty() {
                continue;
            }
            let parsed = if whole {
                serde_json::from_slice::<Map<String, Value>>(&line).map_err(|e| e.to_string())
            } else {
                Err(format!("the line is longer than {MAX_LINE} bytes"))
            };
            let outcome = parsed.and_then(|map| row::incoming(&map));
            self.take(outcome, place, || String::from_utf8_lossy(&line).into_owned())?;
        }
    }

    fn rows(&mut self, reader: RowReader, place: &str) -> Result<()> {
        for chunk in reader {
            let rows = chunk?.rows().map_err(|e| Error::Invalid(format!("{place}: {e}")))?;
            for map in rows {
                self.row += 1;
                if self.row > self.skip {
                    self.take(row::incoming(&map), place, || Value::Object(map.clone()).to_string())?;
                }
            }
        }
        Ok(())
    }

    fn take(&mut self, post: Result<Incoming, String>, place: &str, raw: impl FnOnce() -> String) -> Result<()> {
        if self.inlet.stopping() {
            return Err(Error::Stopped);
        }
        match post {
            Err(reason) => {
                let reason = format!("{place}:{}: {reason}", self.row);
                self.inlet.dead_letter(DeadLetter::new(&self.name, reason, raw().trim_end()));
                Ok(())
            }
            Ok(mut post) => {
                if post.id.is_empty() {
                    post.id = format!("{}-{}", self.fingerprint, self.row);
                }
                post.cursor = Some(format!("{}:{}", self.row, self.fingerprint));
                if let Some(time) = post.event_time {
                    self.wait_until(time)?;
                }
                self.waiting.push(post);
                let slow = matches!(self.speed, Speed::Times(_)) && self.sent_at.elapsed() > NAP;
                if self.waiting.len() >= TOGETHER || slow { self.send() } else { Ok(()) }
            }
        }
    }

    /// Waits for the moment of a post; what waits already is delivered before.
    fn wait_until(&mut self, time: Millis) -> Result<()> {
        let Speed::Times(times) = self.speed else { return Ok(()) };
        let (began, first) = *self.began.get_or_insert_with(|| (Instant::now(), time));
        let due = Duration::from_secs_f64(((time - first).max(0) as f64 / 1000.0 / times.max(1e-6)).min(1e9));
        while let Some(rest) = due.checked_sub(began.elapsed()).filter(|r| !r.is_zero()) {
            self.send()?;
            if self.inlet.stopping() {
                return Err(Error::Stopped);
            }
            std::thread::sleep(rest.min(NAP));
        }
        Ok(())
    }

    fn send(&mut self) -> Result<()> {
        self.sent_at = Instant::now();
        if self.waiting.is_empty() {
            return Ok(());
        }
        self.inlet.wait_for_room()?;
        let batch = std::mem::take(&mut self.waiting);
        let mut pause = NAP;
        loop {
            match self.inlet.take(&self.name, batch.clone()) {
                Ok(_) => {
                    self.inlet.board().set(&self.name, State::Connected, "");
                    return Ok(());
                }
                Err(Error::Stopped) => return Err(Error::Stopped),
                Err(e) => {
                    let said = crate::inlet::first_line(&e);
                    self.inlet.board().set(&self.name, State::Connected, format!("waiting: {said}"));
                }
            }
            if self.inlet.stopping() {
                return Err(Error::Stopped);
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_secs(5));
        }
    }
}

/// Reads to the end of a line that is too long, without keeping it.
fn skip_line(input: &mut impl BufRead) -> std::io::Result<()> {
    loop {
        let buffer = input.fill_buf()?;
        if buffer.is_empty() {
            return Ok(());
        }
        match buffer.iter().position(|b| *b == b'\n') {
            Some(at) => {
                input.consume(at + 1);
                return Ok(());
            }
            None => {
                let length = buffer.len();
                input.consume(length);
            }
        }
    }
}
