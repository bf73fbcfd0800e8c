//! Files that are either the old one or the whole new one: written beside the target, synced, renamed.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

use crate::error::{Error, Result};

/// A file in the making. Dropped before [`AtomicFile::commit`], it leaves nothing behind.
pub struct AtomicFile {
    target: PathBuf,
    writer: BufWriter<NamedTempFile>,
}

impl AtomicFile {
    /// Starts a replacement for `target`, creating its directory if there is none.
    ///
    /// # Errors
    ///
    /// If the directory cannot be created or written.
    pub fn create(target: &Path) -> Result<Self> {
        let folder = folder_of(target);
        std::fs::create_dir_all(folder).map_err(Error::io("create the directory", folder))?;
        let mut builder = tempfile::Builder::new();
        builder.prefix(".").suffix(".tmp");
        #[cfg(unix)]
        {
            // The usual permissions of a new file (the umask applies), not the private ones of a temporary file.
            use std::os::unix::fs::PermissionsExt as _;
            builder.permissions(std::fs::Permissions::from_mode(0o666));
        }
        let file = builder.tempfile_in(folder).map_err(Error::io("write", target))?;
        Ok(Self { target: target.to_path_buf(), writer: BufWriter::with_capacity(1 << 16, file) })
    }

    pub fn target(&self) -> &Path {
        &self.target
    }

    /// Puts the file in place.
    ///
    /// # Errors
    ///
    /// If what is buffered cannot be written or synced (a full disk), or the rename fails.
    pub fn commit(self) -> Result<()> {
        let Self { target, writer } = self;
        let file = writer.into_inner().map_err(|error| Error::io("write", &target)(error.into_error()))?;
        file.as_file().sync_all().map_err(Error::io("write", &target))?;
        file.persist(&target).map_err(|error| Error::io("write", &target)(error.error))?;
        sync_folder(&target);
        Ok(())
    }
}

impl Write for AtomicFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.writer.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.writer.flush()
    }
}

/// Writes a small file in one go.
///
/// # Errors
///
/// Those of [`AtomicFile`].
pub fn write_atomically(target: &Path, content: &[u8]) -> Result<()> {
    let mut file = AtomicFile::create(target)?;
    file.write_all(content).map_err(Error::io("write", target))?;
    file.commit()
}

/// Makes a new name durable. Not every file system can; the file itself is synced either way.
pub(crate) fn sync_folder(target: &Path) {
    if let Ok(folder) = File::open(folder_of(target)) {
        let _ = folder.sync_all();
    }
}

pub(crate) fn folder_of(target: &Path) -> &Path {
    match target.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_or_new_never_half() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("deep/er/file.txt");
        write_atomically(&path, b"old").unwrap();
        let mut file = AtomicFile::create(&path).unwrap();
        file.write_all(b"half of the n").unwrap();
        drop(file);
        assert_eq!(std::fs::read(&path).unwrap(), b"old");
        let mut file = AtomicFile::create(&path).unwrap();
        file.write_all(b"new").unwrap();
        file.commit().unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"new");
        assert_eq!(std::fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "no temporary file is left");
    }
}
