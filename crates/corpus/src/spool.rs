//! Rows on their way through `prepare`, in an unnamed temporary file, so that memory does not grow with their length.

use std::fs::File;
use std::io::{BufReader, BufWriter, Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::example::Example;

/// A row and where it came from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Row {
    /// Number of the input file.
    pub(crate) file: u32,
    pub(crate) line: u64,
    #[serde(flatten)]
    pub(crate) example: Example,
}

/// Rows are written once, in order.
pub(crate) struct SpoolWriter {
    folder: PathBuf,
    writer: BufWriter<File>,
    offsets: Vec<u64>,
    end: u64,
}

impl SpoolWriter {
    /// A temporary file in `folder`, which is where the results will need room as well.
    pub(crate) fn create(folder: &Path) -> Result<Self> {
        let file = tempfile::tempfile_in(folder).map_err(Error::io("write a temporary file in", folder))?;
        Ok(Self { folder: folder.into(), writer: BufWriter::with_capacity(1 << 18, file), offsets: Vec::new(), end: 0 })
    }

    /// Appends a row as [`encode`] has it.
    pub(crate) fn push(&mut self, encoded: &[u8]) -> Result<()> {
        self.offsets.push(self.end);
        self.end += encoded.len() as u64;
        self.writer.write_all(encoded).map_err(Error::io("write a temporary file in", &self.folder))
    }

    pub(crate) fn finish(self) -> Result<Spool> {
        let Self { folder, writer, mut offsets, end } = self;
        let file =
            writer.into_inner().map_err(|error| Error::io("write a temporary file in", &folder)(error.into_error()))?;
        offsets.push(end);
        Ok(Spool { folder, file, offsets })
    }
}

pub(crate) fn encode(row: &Row) -> Vec<u8> {
    // Strings and numbers in a struct always have a JSON form.
    serde_json::to_vec(row).unwrap_or_default()
}

/// Rows that can be read in order, or one by one from several threads.
pub(crate) struct Spool {
    folder: PathBuf,
    file: File,
    /// Where each row begins, and where the last one ends.
    offsets: Vec<u64>,
}

impl Spool {
    pub(crate) fn len(&self) -> usize {
        self.offsets.len() - 1
    }

    pub(crate) fn row(&self, row: u32) -> Result<Row> {
        let (start, end) = (self.offsets[row as usize], self.offsets[row as usize + 1]);
        let mut bytes = vec![0; (end - start) as usize];
        read_at(&self.file, &mut bytes, start).map_err(Error::io("read a temporary file in", &self.folder))?;
        self.decode(&bytes)
    }

    /// Hands all rows to `work`, in order.
    pub(crate) fn for_each(&mut self, mut work: impl FnMut(u32, Row) -> Result<()>) -> Result<()> {
        let broken = |source| Error::io("read a temporary file in", &self.folder)(source);
        (&self.file).seek(SeekFrom::Start(0)).map_err(broken)?;
        let mut reader = BufReader::with_capacity(1 << 18, &self.file);
        let mut bytes = Vec::new();
        for row in 0..self.len() {
            bytes.resize((self.offsets[row + 1] - self.offsets[row]) as usize, 0);
            reader.read_exact(&mut bytes).map_err(broken)?;
            work(row as u32, self.decode(&bytes)?)?;
        }
        Ok(())
    }

    fn decode(&self, bytes: &[u8]) -> Result<Row> {
        serde_json::from_slice(bytes)
            .map_err(|error| Error::io("read a temporary file in", &self.folder)(std::io::Error::from(error)))
    }
}

#[cfg(unix)]
fn read_at(file: &File, bytes: &mut [u8], offset: u64) -> std::io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, bytes, offset)
}

#[cfg(windows)]
fn read_at(file: &File, mut bytes: &mut [u8], mut offset: u64) -> std::io::Result<()> {
    while !bytes.is_empty() {
        match std::os::windows::fs::FileExt::seek_read(file, bytes, offset)? {
            0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
            read => {
                bytes = &mut bytes[read..];
                offset += read as u64;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_come_back() {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = SpoolWriter::create(folder.path()).unwrap();
        let row = |n: u64| Row { file: 1, line: n, example: Example::new(format!("text\n{n}"), "Neutral") };
        for n in 0..100 {
            writer.push(&encode(&row(n))).unwrap();
        }
        let mut spool = writer.finish().unwrap();
        assert_eq!(spool.row(99).unwrap(), row(99));
        let mut seen = 0;
        spool
            .for_each(|n, found| {
                assert_eq!(found, row(u64::from(n)));
                seen += 1;
                Ok(())
            })
            .unwrap();
        assert_eq!(seen, 100);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "the file has no name");
    }
}
