//! The one thread that writes: it takes all appends that wait, writes them in one go, syncs once, and answers all of them.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use super::segment::{self, Segment};
use super::{Append, Fsync, LogOptions, Shared};
use crate::error::{Error, Result};

/// Bytes that are written in one go.
const GROUP: usize = 8 << 20;

pub(super) struct Writer {
    shared: Arc<Shared>,
    options: LogOptions,
    file: Option<File>,
    unsynced_since: Option<Instant>,
}

impl Writer {
    pub(super) fn new(shared: Arc<Shared>, options: LogOptions) -> Self {
        Self { shared, options, file: None, unsynced_since: None }
    }

    /// Works until no handle of the log is left.
    pub(super) fn run(&mut self, appends: &Receiver<Append>) {
        loop {
            let first = match (self.options.fsync, self.unsynced_since) {
                (Fsync::Every(period), Some(since)) => {
                    match appends.recv_timeout(period.saturating_sub(since.elapsed())) {
                        Ok(append) => append,
                        Err(RecvTimeoutError::Timeout) => {
                            self.sync_late();
                            continue;
                        }
                        Err(RecvTimeoutError::Disconnected) => break,
                    }
                }
                _ => match appends.recv() {
                    Ok(append) => append,
                    Err(_) => break,
                },
            };
            let mut size = first.records.iter().map(Vec::len).sum::<usize>();
            let mut group = vec![first];
            while size < GROUP
                && let Ok(next) = appends.try_recv()
            {
                size += next.records.iter().map(Vec::len).sum::<usize>();
                group.push(next);
            }
            self.write(group, size);
        }
        self.sync_late();
    }

    fn write(&mut self, group: Vec<Append>, size: usize) {
        let records = group.iter().map(|a| a.records.len()).sum::<usize>();
        let mut bytes = Vec::with_capacity(size + records * segment::RECORD_HEADER as usize);
        for record in group.iter().flat_map(|a| &a.records) {
            bytes.extend((record.len() as u32).to_le_bytes());
            bytes.extend(crc32fast::hash(record).to_le_bytes());
            bytes.extend(record);
        }
        let outcome = self.write_bytes(&bytes, records as u64);
        match outcome {
            Ok(mut seq) => {
                self.shared.grown.notify_all();
                for append in group {
                    let count = append.records.len() as u64;
                    // A caller that has left has nothing to be told.
                    let _ = append.done.send(Ok(seq));
                    seq += count;
                }
            }
            Err(error) => {
                // The next append begins a segment of its own: after a failed sync nothing is known about this file's cache.
                self.file = None;
                for append in group {
                    let _ = append.done.send(Err(again(&error)));
                }
            }
        }
    }

    fn write_bytes(&mut self, bytes: &[u8], records: u64) -> Result<u64> {
        let (end, last) = {
            let state = self.shared.state();
            (state.end, state.segments.last().cloned())
        };
        let (file, segment) = match (self.file.take(), last) {
            (Some(file), Some(segment)) if segment.bytes < self.options.segment_bytes => (file, segment),
            (old, last) => {
                if let Some(old) = old {
                    old.sync_data().map_err(Error::io("sync the log in", &self.shared.directory))?;
                }
                self.begin(end, last)?
            }
        };
        let written = file.write_all_at(bytes, segment.bytes).and_then(|()| match self.options.fsync {
            Fsync::Always => file.sync_data(),
            Fsync::Every(_) | Fsync::Never => Ok(()),
        });
        if let Err(e) = written {
            // What was written of it must not be found as whole records at the next start.
            let _ = file.set_len(segment.bytes).and_then(|()| file.sync_data());
            return Err(Error::io("write", &segment.path)(e));
        }
        self.file = Some(file);
        self.unsynced_since = self.unsynced_since.or(Some(Instant::now()));
        let mut state = self.shared.state();
        if let Some(last) = state.segments.last_mut() {
            last.bytes += bytes.len() as u64;
            last.records += records;
        }
        state.end += records;
        drop(state);
        if let (Fsync::Every(period), Some(since)) = (self.options.fsync, self.unsynced_since)
            && since.elapsed() >= period
        {
            self.sync_late();
        }
        Ok(end)
    }

    /// A file to write to: a new segment, or the last one again if it has no records (its name would be the same).
    fn begin(&self, end: u64, last: Option<Segment>) -> Result<(File, Segment)> {
        let (file, segment) = segment::create(&self.shared.directory, end)?;
        let mut state = self.shared.state();
        if last.is_some_and(|l| l.records == 0) {
            state.segments.pop();
        }
        state.segments.push(segment.clone());
        Ok((file, segment))
    }

    fn sync_late(&mut self) {
        self.unsynced_since = None;
        if let (Some(file), Fsync::Always | Fsync::Every(_)) = (&self.file, self.options.fsync)
            && file.sync_data().is_err()
        {
            // Promised was only what survives a kill, and that is in the system's hands. The next write tries a new file.
            self.file = None;
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

/// The same error for each of several callers.
fn again(error: &Error) -> Error {
    match error {
        Error::Io { what, path, source } => {
            let source = match source.raw_os_error() {
                Some(code) => std::io::Error::from_raw_os_error(code),
                None => std::io::Error::new(source.kind(), source.to_string()),
            };
            Error::Io { what, path: path.clone(), source }
        }
        other => Error::Invalid(other.to_string()),
    }
}
