//! What can keep a service from starting. Each message names the setting or the file and, where there is one, the mend.

use std::path::PathBuf;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot read {}: {source}", path.display())]
    Read {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("cannot write {}: {source}", path.display())]
    Write {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    /// A key, or a line of a key file, that cannot be used.
    #[error("{place}: {what}")]
    Key { place: String, what: String },
    #[error("TLS: {0}")]
    Tls(String),
    #[error("cannot find the address {host:?}: {source}")]
    Resolve {
        host: String,
        #[source]
        source: std::io::Error,
    },
    #[error("cannot listen on {address}: {source}")]
    Bind {
        address: String,
        #[source]
        source: std::io::Error,
    },
    /// Everyone who can reach the machine could use the service.
    #[error(
        "{address} can be reached from other machines, and there is no API key\n  hint: make a key (--api-key-file), listen on 127.0.0.1, or allow it with --allow-no-key"
    )]
    Unprotected { address: String },
    #[error("the system gives no random numbers: {0}")]
    Random(String),
}

pub type Result<T, E = Error> = std::result::Result<T, E>;
