//! What can go wrong between a file on disk and a model in memory.
//!
//! Every message is one line (plus a `hint:` line where there is a mend) and names the file, tensor or key, what was
//! expected and what was found.

use std::path::{Path, PathBuf};

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot read {}: {source}", path.display())]
    Io {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("cannot write {}: {source}{}", path.display(), full_disk(source))]
    Write {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    /// Whoever watches asked to stop.
    #[error("stopped")]
    Stopped,
    /// A file that is not what its name says, is damaged, or holds what this crate does not read.
    #[error("{}: {what}", path.display())]
    File { path: PathBuf, what: String },
    /// One tensor is missing, has the wrong shape or an unreadable type.
    #[error("{}: tensor {name}: {what}", path.display())]
    Tensor { path: PathBuf, name: String, what: String },
    /// A model configuration that cannot be run.
    #[error("model configuration: {0}")]
    Config(String),
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    #[error("chat template: {0}")]
    Template(String),
    /// An adapter that cannot be read, or does not fit the model.
    #[error("adapter: {0}")]
    Adapter(String),
    /// A caller's argument: a shape, a range or an option that does not fit the model.
    #[error("{0}")]
    Invalid(String),
    #[error(transparent)]
    Backend(#[from] cashtag_backend::Error),
}

pub type Result<T, E = Error> = std::result::Result<T, E>;

fn full_disk(source: &std::io::Error) -> &'static str {
    match source.kind() {
        std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
            "\n  hint: make room, or write to another file system"
        }
        _ => "",
    }
}

impl Error {
    pub(crate) fn file(path: &Path, what: impl Into<String>) -> Self {
        Error::File { path: path.to_owned(), what: what.into() }
    }

    pub(crate) fn tensor(path: &Path, name: impl Into<String>, what: impl Into<String>) -> Self {
        Error::Tensor { path: path.to_owned(), name: name.into(), what: what.into() }
    }

    pub(crate) fn write(path: &Path) -> impl FnOnce(std::io::Error) -> Self + '_ {
        move |source| Error::Write { path: path.to_owned(), source }
    }

    pub(crate) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Self + '_ {
        move |source| Error::Io { path: path.to_owned(), source }
    }
}

/// Text from a file, shortened and without control characters, for messages: a hostile file must not fill the terminal.
pub(crate) fn printable(text: &str) -> String {
    const LIMIT: usize = 80;
    let mut out: String = text.chars().take(LIMIT).flat_map(char::escape_debug).collect();
    if text.chars().nth(LIMIT).is_some() {
        out.push('…');
    }
    out
}

/// [`printable`] text in quotation marks.
pub(crate) fn quoted(text: &str) -> String {
    format!("\"{}\"", printable(text))
}
