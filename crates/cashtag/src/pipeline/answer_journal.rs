//! The answers so far, kept beside a file that is being classified, so that an interrupted run goes on where it was.
//!
//! `scored.csv.answers` holds one record for each row, in order: whether it had a text, and the probabilities. The output
//! itself appears whole or not at all, so nothing in it can be lost or doubled; a run that goes on takes the answers from
//! here and computes the rest. A journal of other data, another model or another prompt has another fingerprint and is begun
//! anew.

use std::fs::{File, OpenOptions};
use std::io::{BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use anyhow::Context as _;

const MAGIC: &[u8; 8] = b"ctanswr1";
const HEADER: u64 = 8 + 32;
/// Last byte of a record. Neither is zero, which is what a crash leaves where nothing was written, so a record counts when all
/// of it is there.
const ANSWER: u8 = b'a';
const NO_TEXT: u8 = b'-';

/// What a row was answered with; `None` where it has no text.
pub(crate) type Answer = Option<Vec<f32>>;

pub(crate) struct AnswerJournal {
    path: PathBuf,
    labels: usize,
    known: u64,
    /// Known answers that have not been taken yet.
    left: u64,
    reader: BufReader<File>,
    writer: BufWriter<File>,
}

impl AnswerJournal {
    /// Opens the journal of `out`, or begins it.
    ///
    /// # Errors
    /// It cannot be read or written.
    pub(crate) fn open(out: &Path, fingerprint: &[u8; 32], labels: usize) -> anyhow::Result<Self> {
        let mut path = out.as_os_str().to_owned();
        path.push(".answers");
        let path = PathBuf::from(path);
        Self::open_at(&path, fingerprint, labels).with_context(|| format!("cannot use {}", path.display()))
    }

    fn open_at(path: &Path, fingerprint: &[u8; 32], labels: usize) -> anyhow::Result<Self> {
        let mut file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
        let mut head = [0; HEADER as usize];
        let is_same = file.read_exact(&mut head).is_ok() && head[..8] == *MAGIC && head[8..] == *fingerprint;
        let mut known = 0;
        if is_same {
            let mut reader = BufReader::new(&mut file);
            while record(&mut reader, labels).is_some() {
                known += 1;
            }
        } else {
            file.set_len(0)?;
            file.rewind()?;
            file.write_all(MAGIC)?;
            file.write_all(fingerprint)?;
        }
        // What a crash cut off in the middle goes.
        let size = HEADER + known * (1 + 4 * labels as u64);
        file.set_len(size)?;
        file.seek(SeekFrom::Start(size))?;
        let mut reader = File::open(path)?;
        reader.seek(SeekFrom::Start(HEADER))?;
        let (reader, writer) = (BufReader::new(reader), BufWriter::new(file));
        Ok(Self { path: path.to_owned(), labels, known, left: known, reader, writer })
    }

    /// Rows whose answers were there when it was opened.
    pub(crate) fn known(&self) -> u64 {
        self.known
    }

    /// The answers of the next `count` rows, as far as they are known.
    pub(crate) fn take(&mut self, count: usize) -> Vec<Answer> {
        let count = self.left.min(count as u64);
        self.left -= count;
        (0..count).map_while(|_| record(&mut self.reader, self.labels)).collect()
    }

    /// Keeps the answers of the rows behind the known ones.
    ///
    /// # Errors
    /// The disk is full, for example.
    pub(crate) fn append(&mut self, answers: &[Answer]) -> anyhow::Result<()> {
        let mut write = || -> std::io::Result<()> {
            for answer in answers {
                for label in 0..self.labels {
                    let p = answer.as_ref().and_then(|a| a.get(label)).copied().unwrap_or(0.0);
                    self.writer.write_all(&p.to_le_bytes())?;
                }
                self.writer.write_all(&[if answer.is_some() { ANSWER } else { NO_TEXT }])?;
            }
            self.writer.flush()
        };
        write().with_context(|| format!("cannot write {}", self.path.display()))
    }

    /// The output is there: the journal is not needed any more.
    pub(crate) fn finish(self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

fn record(reader: &mut impl Read, labels: usize) -> Option<Answer> {
    let mut probabilities = Vec::with_capacity(labels);
    for _ in 0..labels {
        let mut bytes = [0; 4];
        reader.read_exact(&mut bytes).ok()?;
        probabilities.push(f32::from_le_bytes(bytes));
    }
    let mut tag = [0];
    reader.read_exact(&mut tag).ok()?;
    match tag[0] {
        ANSWER if probabilities.iter().all(|p| (0.0..=1.0).contains(p)) => Some(Some(probabilities)),
        NO_TEXT => Some(None),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_lost_or_doubled_wherever_it_was_cut() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("scored.csv");
        let rows: Vec<Answer> = vec![Some(vec![0.25, 0.75]), None, Some(vec![1.0, 0.0]), Some(vec![0.5, 0.5])];
        let mut journal = AnswerJournal::open(&out, &[7; 32], 2).unwrap();
        journal.append(&rows).unwrap();
        drop(journal);
        let file = dir.path().join("scored.csv.answers");
        let whole = std::fs::read(&file).unwrap();
        for cut in 0..=whole.len() {
            // Cut off, and with zeros behind the cut as some file systems leave them.
            for tail in [0, 20] {
                let mut bytes = whole[..cut].to_vec();
                bytes.resize(cut + tail, 0);
                std::fs::write(&file, bytes).unwrap();
                let mut journal = AnswerJournal::open(&out, &[7; 32], 2).unwrap();
                let mut all = journal.take(3);
                all.extend(journal.take(3));
                let known = all.len();
                assert!(known <= rows.len() && journal.known() == known as u64, "cut at {cut}");
                if cut == whole.len() {
                    assert_eq!(known, rows.len());
                }
                journal.append(&rows[known..]).unwrap();
                drop(journal);
                assert_eq!(AnswerJournal::open(&out, &[7; 32], 2).unwrap().take(9), rows, "cut at {cut}");
            }
        }
        assert_eq!(AnswerJournal::open(&out, &[8; 32], 2).unwrap().known(), 0);
        AnswerJournal::open(&out, &[8; 32], 2).unwrap().finish();
        assert!(!file.exists());
    }
}
