//! The durable log: every accepted post is written here before it is acknowledged, and everything after reads from here.
//!
//! ```text
//! 00000000000000000000.log   header: "CTLOG1\n\0", sequence number of the first record
//!                            record: length u32 · CRC-32 u32 · payload        (little endian)
//!                            record: …
//! 00000000000000081920.log   the next segment, named by its first record
//! ```
//!
//! What holds: a record has the number of its place, without gaps. [`Log::append`] returns when the records are on the disk
//! (as far as [`Fsync`] says so); several callers share one sync. A record that was half written when the process or the
//! machine died is cut off at the next start; it was not acknowledged. A record that was acknowledged and is damaged is an
//! error, never skipped in silence. Readers see acknowledged records only.

mod reader;
mod segment;
mod writer;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

pub use reader::Reader;
use segment::Segment;

use crate::error::{Error, Result};

/// When written records are forced to the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fsync {
    /// Before they are acknowledged: they survive a power cut.
    Always,
    /// At most so long after: they survive a kill of the process, and a power cut costs so much at most.
    Every(Duration),
    /// When the system likes: they survive a kill of the process.
    Never,
}

#[derive(Clone, Debug)]
pub struct LogOptions {
    pub fsync: Fsync,
    /// A segment that is longer is followed by a new one.
    pub segment_bytes: u64,
}

impl Default for LogOptions {
    fn default() -> Self {
        Self { fsync: Fsync::Always, segment_bytes: 64 << 20 }
    }
}

/// The longest record.
pub const MAX_RECORD: usize = 1 << 20;

/// What writer and readers share.
struct State {
    segments: Vec<Segment>,
    /// The number that the next record gets; all before it can be read.
    end: u64,
}

struct Shared {
    directory: PathBuf,
    state: Mutex<State>,
    grown: Condvar,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Append {
    records: Vec<Vec<u8>>,
    done: Sender<Result<u64>>,
}

/// A handle; clones are the same log.
#[derive(Clone)]
pub struct Log {
    shared: Arc<Shared>,
    queue: Sender<Append>,
    /// Held while any handle lives: one process writes a log.
    _lock: Arc<File>,
}

impl Log {
    /// Opens or creates the log in a directory and cuts off what was half written.
    ///
    /// # Errors
    /// The directory cannot be written or is another process's, or a segment is damaged.
    pub fn open(directory: &Path, options: LogOptions) -> Result<Self> {
        std::fs::create_dir_all(directory).map_err(Error::io("create", directory))?;
        let lock = lock(directory)?;
        let segments = segment::recover(directory)?;
        let end = segments.last().map_or(0, |s| s.base + s.records);
        let shared = Arc::new(Shared {
            directory: directory.to_owned(),
            state: Mutex::new(State { segments, end }),
            grown: Condvar::new(),
        });
        let (queue, appends) = channel();
        let mut writer = writer::Writer::new(shared.clone(), options);
        std::thread::Builder::new()
            .name("log".into())
            .spawn(move || writer.run(&appends))
            .map_err(Error::io("start the thread of the log in", directory))?;
        Ok(Self { shared, queue, _lock: Arc::new(lock) })
    }

    /// Appends records, all or none, and returns the number of the first when they are durable. Blocks.
    ///
    /// # Errors
    /// A record that is too long, or a disk that does not take them: then none of them is in the log.
    pub fn append(&self, records: Vec<Vec<u8>>) -> Result<u64> {
        if let Some(record) = records.iter().find(|r| r.len() > MAX_RECORD) {
            let found = record.len();
            return Err(Error::Invalid(format!("a record of {found} bytes, the log takes {MAX_RECORD}")));
        }
        if records.is_empty() {
            return Ok(self.end());
        }
        let (done, outcome) = channel();
        self.queue.send(Append { records, done }).map_err(|_| Error::Stopped)?;
        outcome.recv().map_err(|_| Error::Stopped)?
    }

    /// The number that the next record gets.
    pub fn end(&self) -> u64 {
        self.shared.state().end
    }

    /// The number of the oldest record that is still there.
    pub fn start(&self) -> u64 {
        self.shared.state().segments.first().map_or(0, |s| s.base)
    }

    /// Waits until there are records from `seq` on, but not longer than `timeout`; says whether there are.
    pub fn wait(&self, seq: u64, timeout: Duration) -> bool {
        let state = self.shared.state();
        let waited = self.shared.grown.wait_timeout_while(state, timeout, |s| s.end <= seq);
        waited.unwrap_or_else(PoisonError::into_inner).0.end > seq
    }

    /// Reads from record `seq` on (from the oldest, if that one is gone).
    pub fn reader(&self, seq: u64) -> Reader {
        Reader::new(self.shared.clone(), seq)
    }

    /// Removes segments of which all records come before `seq` and that were last written before `older_than`. The last
    /// segment always stays. Returns how many went.
    ///
    /// # Errors
    /// A file that cannot be removed.
    pub fn remove(&self, seq: u64, older_than: SystemTime) -> Result<usize> {
        let mut removed = 0;
        loop {
            let mut state = self.shared.state();
            let [first, second, ..] = &state.segments[..] else { return Ok(removed) };
            let path = first.path.clone();
            let modified = std::fs::metadata(&path).and_then(|m| m.modified());
            if second.base > seq || modified.is_ok_and(|m| m > older_than) {
                return Ok(removed);
            }
            match std::fs::remove_file(&path) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(Error::io("remove", &path)(e)),
                _ => {}
            }
            state.segments.remove(0);
            removed += 1;
        }
    }

    /// Bytes on the disk.
    pub fn bytes(&self) -> u64 {
        self.shared.state().segments.iter().map(|s| s.bytes).sum()
    }
}

fn lock(directory: &Path) -> Result<File> {
    let path = directory.join("lock");
    let file =
        File::options().create(true).truncate(false).write(true).open(&path).map_err(Error::io("open", &path))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(std::fs::TryLockError::WouldBlock) => Err(Error::InUse { path: directory.to_owned() }),
        Err(std::fs::TryLockError::Error(e)) => Err(Error::io("lock", &path)(e)),
    }
}

#[cfg(test)]
mod tests;
