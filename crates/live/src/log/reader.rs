//! Reads records in order, up to what has been acknowledged.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use super::segment::{HEADER, RECORD_HEADER, Segment, parse_head};
use super::{MAX_RECORD, Shared};
use crate::error::{Error, Result};

const BUFFER: u64 = 1 << 20;

pub struct Reader {
    shared: Arc<Shared>,
    /// The next record to hand out.
    seq: u64,
    open: Option<Open>,
}

struct Open {
    file: File,
    segment: Segment,
    /// The record at `at`.
    seq: u64,
    at: u64,
    buffer: Vec<u8>,
    /// Where in the file the buffer begins.
    buffer_at: u64,
}

impl Reader {
    pub(super) fn new(shared: Arc<Shared>, seq: u64) -> Self {
        Self { shared, seq, open: None }
    }

    /// The number of the record that comes next.
    pub fn position(&self) -> u64 {
        self.seq
    }

    /// The next record with its number; `None` if there is none yet.
    ///
    /// # Errors
    /// A file that cannot be read, or a damaged record.
    pub fn next_record(&mut self) -> Result<Option<(u64, Vec<u8>)>> {
        loop {
            if !self.refresh()? {
                return Ok(None);
            }
            let Some(open) = &mut self.open else { return Ok(None) };
            let record = open.read()?;
            let seq = open.seq;
            open.seq += 1;
            if seq >= self.seq {
                self.seq = seq + 1;
                return Ok(Some((seq, record)));
            }
        }
    }

    /// Opens the segment of the next record, or learns how far it has grown; false if there is no such record yet.
    fn refresh(&mut self) -> Result<bool> {
        if let Some(open) = &self.open
            && open.at < open.segment.bytes
        {
            return Ok(true);
        }
        let state = self.shared.state();
        self.seq = self.seq.max(state.segments.first().map_or(0, |s| s.base));
        if self.seq >= state.end {
            return Ok(false);
        }
        let index = state.segments.partition_point(|s| s.base <= self.seq).saturating_sub(1);
        let Some(segment) = state.segments.get(index).cloned() else { return Ok(false) };
        drop(state);
        match &mut self.open {
            Some(open) if open.segment.base == segment.base => open.segment = segment,
            _ => {
                let file = File::open(&segment.path).map_err(Error::io("open", &segment.path))?;
                let (seq, at) = (segment.base, HEADER);
                self.open = Some(Open { file, segment, seq, at, buffer: Vec::new(), buffer_at: 0 });
            }
        }
        Ok(true)
    }
}

impl Open {
    fn read(&mut self) -> Result<Vec<u8>> {
        let damaged = |open: &Self, what: &str| Error::Damaged {
            path: open.segment.path.clone(),
            at: open.at,
            what: format!("record {}: {what}", open.seq),
        };
        let head: [u8; 8] = match self.bytes(RECORD_HEADER)?.try_into() {
            Ok(head) => head,
            Err(_) => return Err(damaged(self, "the file was cut off")),
        };
        let (length, checksum) = parse_head(head);
        if length > MAX_RECORD {
            return Err(damaged(self, "its length cannot be"));
        }
        let whole = self.bytes(RECORD_HEADER + length as u64)?;
        let Some(payload) = whole.get(RECORD_HEADER as usize..).filter(|p| p.len() == length).map(<[u8]>::to_vec)
        else {
            return Err(damaged(self, "the file was cut off"));
        };
        if crc32fast::hash(&payload) != checksum {
            return Err(damaged(self, "its checksum is wrong"));
        }
        self.at += RECORD_HEADER + length as u64;
        Ok(payload)
    }

    /// `count` bytes from the position on, or what there is of them.
    fn bytes(&mut self, count: u64) -> Result<&[u8]> {
        let from = self.at.wrapping_sub(self.buffer_at);
        if self.at < self.buffer_at || from + count > self.buffer.len() as u64 {
            let rest = self.segment.bytes.saturating_sub(self.at);
            let want = rest.min(count.max(BUFFER)) as usize;
            self.buffer.resize(want, 0);
            let mut filled = 0;
            while filled < want {
                let n = self
                    .file
                    .read_at(&mut self.buffer[filled..], self.at + filled as u64)
                    .map_err(Error::io("read", &self.segment.path))?;
                if n == 0 {
                    break;
                }
                filled += n;
            }
            self.buffer.truncate(filled);
            self.buffer_at = self.at;
        }
        let from = (self.at - self.buffer_at) as usize;
        let to = (from + count as usize).min(self.buffer.len());
        Ok(self.buffer.get(from..to).unwrap_or_default())
    }
}
