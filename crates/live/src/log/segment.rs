//! One file of the log: its name, its header, and what is found in it at the start.

use std::fs::File;
use std::io::{BufReader, Read, Write};
use std::path::{Path, PathBuf};

use super::MAX_RECORD;
use crate::error::{Error, Result};

pub(super) const MAGIC: [u8; 8] = *b"CTLOG1\n\0";
/// Magic and the number of the first record.
pub(super) const HEADER: u64 = 16;
/// Length and checksum.
pub(super) const RECORD_HEADER: u64 = 8;

#[derive(Clone, Debug)]
pub(super) struct Segment {
    pub(super) path: PathBuf,
    /// Number of the first record.
    pub(super) base: u64,
    pub(super) records: u64,
    /// Acknowledged bytes, with the header.
    pub(super) bytes: u64,
}

/// Creates the file of a segment, durably, with its header.
pub(super) fn create(directory: &Path, base: u64) -> Result<(File, Segment)> {
    let path = directory.join(format!("{base:020}.log"));
    let mut file = File::options()
        .create(true)
        .truncate(true)
        .read(true)
        .write(true)
        .open(&path)
        .map_err(Error::io("create", &path))?;
    let mut header = MAGIC.to_vec();
    header.extend(base.to_le_bytes());
    file.write_all(&header).and_then(|()| file.sync_all()).map_err(Error::io("write", &path))?;
    // The name must be durable too; a file system that cannot sync a directory keeps it its own way.
    if let Ok(folder) = File::open(directory) {
        let _ = folder.sync_all();
    }
    Ok((file, Segment { path, base, records: 0, bytes: HEADER }))
}

/// The segments of a directory in order; the tail of the last one is cut off behind its last whole record.
pub(super) fn recover(directory: &Path) -> Result<Vec<Segment>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(directory).map_err(Error::io("read", directory))? {
        let path = entry.map_err(Error::io("read", directory))?.path();
        let base = path.file_name().and_then(|n| n.to_str()?.strip_suffix(".log")?.parse::<u64>().ok());
        if let Some(base) = base {
            found.push((base, path));
        }
    }
    found.sort();
    let mut segments: Vec<Segment> = Vec::with_capacity(found.len());
    let last = found.len().saturating_sub(1);
    for (i, (base, path)) in found.into_iter().enumerate() {
        if let Some(before) = segments.last()
            && before.base + before.records != base
        {
            let what = format!("expected record {}, the file begins with {base}", before.base + before.records);
            return Err(Error::Damaged { path, at: 0, what });
        }
        if let Some(segment) = scan(path, base, i == last)? {
            segments.push(segment);
        }
    }
    Ok(segments)
}

/// Checks all records of a file.
fn scan(path: PathBuf, base: u64, is_last: bool) -> Result<Option<Segment>> {
    let file = File::options().read(true).write(true).open(&path).map_err(Error::io("open", &path))?;
    let length = file.metadata().map_err(Error::io("read", &path))?.len();
    let mut reader = BufReader::with_capacity(1 << 20, &file);
    let mut header = [0; HEADER as usize];
    if length < HEADER {
        // Died between creating the file and writing its header.
        if is_last {
            std::fs::remove_file(&path).map_err(Error::io("remove", &path))?;
            return Ok(None);
        }
        return Err(Error::Damaged { path, at: length, what: "the header is cut off".into() });
    }
    reader.read_exact(&mut header).map_err(Error::io("read", &path))?;
    if header[..8] != MAGIC || header[8..] != base.to_le_bytes() {
        return Err(Error::Damaged { path, at: 0, what: "this is not the header of a segment of this name".into() });
    }
    let (mut at, mut records, mut payload) = (HEADER, 0, Vec::new());
    while at < length {
        let whole = read_record(&mut reader, length - at, &mut payload).map_err(Error::io("read", &path))?;
        let Some(size) = whole else {
            if !is_last {
                return Err(Error::Damaged { path, at, what: "a record with a wrong checksum".into() });
            }
            file.set_len(at).and_then(|()| file.sync_all()).map_err(Error::io("cut", &path))?;
            break;
        };
        at += size;
        records += 1;
    }
    Ok(Some(Segment { path, base, records, bytes: at }))
}

/// Reads one record; `None` if the rest of the file is not a whole one.
fn read_record(reader: &mut impl Read, rest: u64, payload: &mut Vec<u8>) -> std::io::Result<Option<u64>> {
    if rest < RECORD_HEADER {
        return Ok(None);
    }
    let mut head = [0; RECORD_HEADER as usize];
    reader.read_exact(&mut head)?;
    let (length, checksum) = parse_head(head);
    if length > MAX_RECORD || length as u64 > rest - RECORD_HEADER {
        return Ok(None);
    }
    payload.resize(length, 0);
    reader.read_exact(payload)?;
    Ok((crc32fast::hash(payload) == checksum).then_some(RECORD_HEADER + length as u64))
}

pub(super) fn parse_head(head: [u8; 8]) -> (usize, u32) {
    let [a, b, c, d, e, f, g, h] = head;
    (u32::from_le_bytes([a, b, c, d]) as usize, u32::from_le_bytes([e, f, g, h]))
}
