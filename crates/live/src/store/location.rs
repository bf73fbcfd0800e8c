//! Which store: the one in the data directory, or a PostgreSQL server by its address.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::postgres::{Address, PostgresReader, PostgresStore};
use super::{Reader, SqliteReader, SqliteStore, Store, StoreOptions};
use crate::error::{Error, Result};
use crate::scorer::ModelInfo;

/// Shown, it never tells a password.
#[derive(Clone)]
pub enum Location {
    /// The data directory.
    Sqlite(PathBuf),
    Postgres(Box<Address>),
}

/// What a writer needs to know.
pub struct Opening<'a> {
    pub model: &'a ModelInfo,
    pub options: StoreOptions,
    /// Which log the store belongs to.
    pub log: String,
    /// Waiting ends when it is set.
    pub stop: &'a AtomicBool,
    /// Is told, once for each reason, that a store is waited for.
    pub waiting: &'a dyn Fn(&str),
}

impl Location {
    /// `postgres://…`, or the data directory where nothing is said.
    ///
    /// # Errors
    /// Something that is no address of a PostgreSQL server; the message does not repeat it, because it may hold a password.
    pub fn of(url: Option<&str>, data: &Path) -> Result<Self> {
        match url {
            None => Ok(Self::Sqlite(data.to_owned())),
            Some(url) => Ok(Self::Postgres(Box::new(Address::parse(url)?))),
        }
    }

    pub fn kind(&self) -> &'static str {
        match self {
            Self::Sqlite(_) => "sqlite",
            Self::Postgres(_) => "postgres",
        }
    }

    /// Opens or creates it for writing. A server that cannot be reached yet is waited for; one that refuses us is an error.
    ///
    /// # Errors
    /// No access, no store or one of a newer version, another process that writes it.
    pub fn open(&self, opening: &Opening<'_>) -> Result<Box<dyn Store>> {
        let address = match self {
            Self::Sqlite(data) => return Ok(Box::new(SqliteStore::open(data, opening.model, opening.options)?)),
            Self::Postgres(address) => address,
        };
        let (mut pause, mut said) = (Duration::from_millis(100), String::new());
        loop {
            match PostgresStore::open(address, opening.model, opening.options, &opening.log) {
                Ok(store) => return Ok(Box::new(store)),
                Err(e @ Error::StoreAway { .. }) if !opening.stop.load(Ordering::Relaxed) => {
                    let why = e.to_string();
                    if why != said {
                        (opening.waiting)(&why);
                        said = why;
                    }
                }
                Err(e) => return Err(e),
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_secs(5));
        }
    }

    /// # Errors
    /// There is no store, or it cannot be read.
    pub fn reader(&self) -> Result<Box<dyn Reader>> {
        Ok(match self {
            Self::Sqlite(data) => Box::new(SqliteReader::open(data)?),
            Self::Postgres(address) => Box::new(PostgresReader::open(address)?),
        })
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sqlite(data) => write!(f, "{}", super::sqlite::file(data).display()),
            Self::Postgres(address) => address.fmt(f),
        }
    }
}

impl fmt::Debug for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
