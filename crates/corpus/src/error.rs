//! The one error type of the crate. A message names the thing, what was found, and the mend.

use std::path::{Path, PathBuf};

pub type Result<T, E = Error> = std::result::Result<T, E>;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system said no.
    #[error("cannot {action} {}: {source}{}", path.display(), io_hint(source))]
    Io { action: &'static str, path: PathBuf, source: std::io::Error },

    /// A file is not what it should be. `line` counts from 1 (rows for Parquet).
    #[error("{}{}: {message}", path.display(), line.map(|line| format!(":{line}")).unwrap_or_default())]
    File { path: PathBuf, line: Option<u64>, message: String },

    /// Another process holds the journal.
    #[error("{} is in use by another run\n  hint: wait for it, or give this run another output directory", path.display())]
    Locked { path: PathBuf },

    /// The chat-completions server could not be used.
    #[error(transparent)]
    Api(#[from] crate::error::ApiError),

    /// The caller asked to stop.
    #[error("stopped")]
    Stopped,

    /// Options that do not go together or cannot be met.
    #[error("{0}")]
    Usage(String),
}

/// What went wrong between us and a chat-completions server.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ApiError {
    #[error(
        "{url} refused the API key ({status}): {message}\n  hint: set OPENAI_API_KEY or --api-key-file to a valid key"
    )]
    Unauthorised { url: String, status: u16, message: String },

    #[error("{url} answered {status}: {message}{hint}")]
    Refused { url: String, status: u16, message: String, hint: String },

    #[error("{url} gave no usable answer in {attempts} attempts; the last: {message}")]
    GaveUp { url: String, attempts: u32, message: String },

    #[error("{0}")]
    Setup(String),
}

fn io_hint(source: &std::io::Error) -> &'static str {
    match source.kind() {
        std::io::ErrorKind::StorageFull => "\n  hint: free some space and run the same command again",
        std::io::ErrorKind::PermissionDenied => "\n  hint: check who owns it, or choose another path",
        std::io::ErrorKind::NotFound => "\n  hint: check the path",
        _ => "",
    }
}

impl Error {
    pub(crate) fn io(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.into();
        move |source| Error::Io { action, path, source }
    }

    pub(crate) fn file(path: &Path, line: impl Into<Option<u64>>, message: impl Into<String>) -> Error {
        Error::File { path: path.to_path_buf(), line: line.into(), message: message.into() }
    }

    pub(crate) fn usage(message: impl Into<String>) -> Error {
        Error::Usage(message.into())
    }
}
