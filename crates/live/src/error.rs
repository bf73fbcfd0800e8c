//! What can go wrong here, in words that name the file, what was expected and the mend.

use std::io;
use std::path::{Path, PathBuf};

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    #[error("cannot {what} {}: {source}{}", path.display(), hint_for(source))]
    Io { what: &'static str, path: PathBuf, source: io::Error },
    #[error("{}: {what} at byte {at}\n  hint: the segment was changed or damaged after it was written; move it away to go on without its posts", path.display())]
    Damaged { path: PathBuf, at: u64, what: String },
    #[error("{} is in use by another process\n  hint: one process at a time may write a data directory; stop the other one, or give --data", path.display())]
    InUse { path: PathBuf },
    #[error("the store {place}: {why}")]
    Store { place: String, why: String },
    /// The store cannot be reached at the moment: it may be there again later.
    #[error("the store {place} cannot be reached: {why}")]
    StoreAway { place: String, why: String },
    /// It is not in the state that this process left it in: nothing may be added to that.
    #[error(
        "the store {place} was changed by somebody else: {why}\n  hint: start again; the log has what is missing, if it is kept for long enough"
    )]
    StoreChanged { place: String, why: String },
    #[error("{0}")]
    Invalid(String),
    #[error("the model: {0}")]
    Score(String),
    #[error(transparent)]
    File(#[from] cashtag_corpus::Error),
    #[error("stopped")]
    Stopped,
}

pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    pub(crate) fn io(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { what, path, source }
    }

    pub(crate) fn store(path: &Path) -> impl FnOnce(rusqlite::Error) -> Self {
        let place = path.display().to_string();
        move |source| Self::Store { place, why: source.to_string() }
    }
}

fn hint_for(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::StorageFull => "\n  hint: make room on the disk; sources wait until then and nothing is lost",
        io::ErrorKind::PermissionDenied => "\n  hint: --data names the directory that is written to",
        _ => "",
    }
}
