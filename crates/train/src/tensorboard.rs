//! Event files of TensorBoard: the record framing of TFRecord files and the few protocol-buffer messages that scalars need.
//!
//! ```text
//! record   length u64 · masked crc32c of it u32 · Event · masked crc32c of it u32            little-endian
//! Event    wall_time 1: double · step 2: int64 · file_version 3: string | summary 5 | session_log 7
//! ```
//!
//! Tags are those of Transformers' callback: `loss` → `train/loss`, `eval_loss` → `eval/loss`. A record is appended whole; what a
//! killed process left half is skipped by TensorBoard. A continued run opens a new file that begins with a session start, by which
//! TensorBoard drops what the interrupted one logged from that step on.

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::state::LogEntry;

/// Appends to one event file.
#[derive(Debug)]
pub struct EventWriter {
    file: File,
    path: PathBuf,
}

impl EventWriter {
    /// A new file in `dir`; `step` is the step that the run goes on behind, 0 for a new one.
    ///
    /// # Errors
    /// The file system refuses.
    pub fn create(dir: &Path, step: usize) -> std::io::Result<Self> {
        std::fs::create_dir_all(dir)?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        // TensorBoard sorts the files of a run by name: seconds first, and nanoseconds for those of the same second.
        let name = format!(
            "events.out.tfevents.{:010}.{:09}.cashtag.{}",
            now.as_secs(),
            now.subsec_nanos(),
            std::process::id()
        );
        let path = dir.join(name);
        let file = OpenOptions::new().create_new(true).append(true).open(&path)?;
        let mut writer = Self { file, path };
        let mut version = Vec::new();
        bytes_field(&mut version, 3, b"brain.Event:2");
        writer.event(0, &version)?;
        let mut start = Vec::new();
        // SessionLog { status: START }
        bytes_field(&mut start, 7, &[0x08, 1]);
        writer.event(step as u64 + 1, &start)?;
        Ok(writer)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The numbers of a log entry, under their tags; `step` and `epoch` place them.
    ///
    /// # Errors
    /// The file system refuses.
    pub fn log(&mut self, entry: &LogEntry) -> std::io::Result<()> {
        let step = entry.get("step").copied().unwrap_or(0.0) as u64;
        let mut summary = Vec::new();
        for (key, value) in entry.iter().filter(|(k, _)| *k != "step") {
            let mut scalar = Vec::new();
            bytes_field(&mut scalar, 1, tag(key).as_bytes());
            // simple_value 2: float
            scalar.push(2 << 3 | 5);
            scalar.extend((*value as f32).to_le_bytes());
            bytes_field(&mut summary, 1, &scalar);
        }
        let mut what = Vec::new();
        bytes_field(&mut what, 5, &summary);
        self.event(step, &what)
    }

    fn event(&mut self, step: u64, what: &[u8]) -> std::io::Result<()> {
        let seconds = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
        let mut event = vec![1 << 3 | 1];
        event.extend(seconds.to_le_bytes());
        if step > 0 {
            event.push(2 << 3);
            varint(&mut event, step);
        }
        event.extend(what);
        let length = (event.len() as u64).to_le_bytes();
        let mut record = length.to_vec();
        record.extend(masked_crc32c(&length).to_le_bytes());
        record.extend(&event);
        record.extend(masked_crc32c(&event).to_le_bytes());
        self.file.write_all(&record)
    }
}

/// As Transformers' `rewrite_logs`.
fn tag(key: &str) -> String {
    match key.strip_prefix("eval_") {
        Some(rest) => format!("eval/{rest}"),
        None => format!("train/{key}"),
    }
}

fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// A field of wire type 2: length and bytes.
fn bytes_field(out: &mut Vec<u8>, field: u8, bytes: &[u8]) {
    out.push(field << 3 | 2);
    varint(out, bytes.len() as u64);
    out.extend(bytes);
}

/// CRC-32C (Castagnoli), bit by bit: records are small.
fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |mut crc, &byte| {
        crc ^= u32::from(byte);
        for _ in 0..8 {
            crc = if crc & 1 == 1 { crc >> 1 ^ 0x82F6_3B78 } else { crc >> 1 };
        }
        crc
    })
}

/// As TFRecord stores it, so that a checksum of data with checksums in it is a good one.
fn masked_crc32c(bytes: &[u8]) -> u32 {
    crc32c(bytes).rotate_right(15).wrapping_add(0xA282_EAD8)
}

#[cfg(test)]
mod tests {
    use super::*;

    // Check values of RFC 3720, appendix B.4.
    #[test]
    fn checksums() {
        assert_eq!(crc32c(&[0; 32]), 0x8A91_36AA);
        assert_eq!(crc32c(&[0xFF; 32]), 0x62A8_AB43);
        assert_eq!(crc32c(&(0..32).collect::<Vec<u8>>()), 0x46DD_794E);
        assert_eq!(masked_crc32c(b"123456789"), 0xE306_9283u32.rotate_right(15).wrapping_add(0xA282_EAD8));
    }

    #[test]
    fn records_follow_one_another() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = EventWriter::create(dir.path(), 0).unwrap();
        writer
            .log(&LogEntry::from([("step".into(), 300.0), ("loss".into(), 0.5), ("eval_loss".into(), 0.25)]))
            .unwrap();
        let bytes = std::fs::read(writer.path()).unwrap();
        let (mut rest, mut events) = (&bytes[..], Vec::new());
        while !rest.is_empty() {
            let (length, tail) = rest.split_at(8);
            let n = u64::from_le_bytes(length.try_into().unwrap()) as usize;
            assert_eq!(tail[..4], masked_crc32c(length).to_le_bytes());
            assert_eq!(tail[4 + n..8 + n], masked_crc32c(&tail[4..4 + n]).to_le_bytes());
            events.push(tail[4..4 + n].to_vec());
            rest = &tail[8 + n..];
        }
        assert_eq!(events.len(), 3);
        assert!(events[0].ends_with(b"\x1a\x0dbrain.Event:2"));
        assert_eq!(events[1][9..], [0x10, 1, 0x3A, 2, 0x08, 1]);
        let mut expected = vec![0x10, 0xAC, 2, 0x2A, 36, 0x0A, 16, 0x0A, 9];
        expected.extend(b"eval/loss\x15");
        expected.extend(0.25f32.to_le_bytes());
        expected.extend([0x0A, 17, 0x0A, 10]);
        expected.extend(b"train/loss\x15");
        expected.extend(0.5f32.to_le_bytes());
        expected[4] = (expected.len() - 5) as u8;
        assert_eq!(events[2][9..], expected);
    }
}
