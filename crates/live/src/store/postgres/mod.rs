//! The store on a PostgreSQL server, for whoever wants to query it beside the page or to keep it on another machine.
//!
//! What holds, beyond what holds for every store:
//! - One process writes: it holds an advisory lock of the database for as long as its connection lives.
//! - A transaction whose answer was lost is not written twice: checkpoints are numbered, and the number tells whether it
//!   came through. A server that has lost checkpoints (restored from a backup, failed over) is noticed, too.
//! - The tables belong to one log: another data directory is refused.

mod address;
mod read;
mod session;
mod tls;
mod write;

use std::collections::HashSet;
use std::time::{Duration, Instant};

pub use address::Address;
pub use read::PostgresReader;
use session::Session;

use super::{Batch, Checkpoint, SourceState, Store, StoreOptions, model_json};
use crate::error::{Error, Result};
use crate::post::ScoredPost;
use crate::scorer::ModelInfo;
use crate::time::Millis;
use crate::windows::{Signal, Window};

/// Each is applied once, in its order; what is published never changes.
const MIGRATIONS: &[(i32, &str)] = &[(1, include_str!("schema_001.sql")), (2, include_str!("schema_002.sql"))];
/// How long a start waits for the lock of a process that has just been killed.
const LOCK: Duration = Duration::from_secs(10);
/// Rows that one transaction of [`Store::forget`] removes.
const CHUNK: i64 = 5_000;

pub struct PostgresStore {
    address: Address,
    options: StoreOptions,
    model: i32,
    session: Option<Session>,
    /// Number of the last checkpoint that is known to be written.
    commits: i64,
    /// The next one may be written already: its answer was lost.
    unsure: bool,
}

impl PostgresStore {
    /// Connects, takes the lock, brings the tables up to date.
    ///
    /// # Errors
    /// [`Error::StoreAway`] if the server cannot be reached yet; else why it cannot be used.
    pub fn open(address: &Address, model: &ModelInfo, options: StoreOptions, log: &str) -> Result<Self> {
        let session = Session::connect(address)?;
        let began = Instant::now();
        while !lock(&session, address)? {
            if began.elapsed() > LOCK {
                return Err(Error::Invalid(format!(
                    "the store {address} is in use by another process\n  \
                     hint: one process at a time may write a store; stop the other one, or add ?schema=another_name"
                )));
            }
            std::thread::sleep(Duration::from_millis(200));
        }
        migrate(&session, address, MIGRATIONS)?;
        session.execute("INSERT INTO owner SELECT $1::text WHERE NOT EXISTS (SELECT FROM owner)", &[&log])?;
        let owner: String = get(&session, &session.query_one("SELECT log FROM owner", &[])?, 0)?;
        if owner != log {
            return Err(Error::Invalid(format!(
                "the store {address} belongs to another data directory\n  \
                 hint: log and store belong together; give the --data it was made with, or add ?schema=another_name"
            )));
        }
        let (version, info) = (model.version(), model_json(model).to_string());
        session.execute(
            "INSERT INTO models (version, info) SELECT $1::text, $2::text::json WHERE NOT EXISTS (SELECT FROM models WHERE version = $1::text)",
            &[&version, &info],
        )?;
        let model = get(&session, &session.query_one("SELECT id FROM models WHERE version = $1", &[&version])?, 0)?;
        let commits = commits(&session)?;
        Ok(Self { address: address.clone(), options, model, session: Some(session), commits, unsure: false })
    }

    /// Works with the connection, or a new one. One on which something failed is closed: what was begun on it is undone.
    fn with<T>(&mut self, work: impl FnOnce(&Session, &Self) -> Result<T>) -> Result<T> {
        let session = match self.session.take() {
            Some(session) => session,
            None => {
                let session = Session::connect(&self.address)?;
                if !lock(&session, &self.address)? {
                    let why = "another connection holds its lock; it may be our own former one".to_owned();
                    return Err(Error::StoreAway { place: self.address.to_string(), why });
                }
                session
            }
        };
        let outcome = work(&session, self);
        if outcome.is_ok() {
            self.session = Some(session);
        }
        outcome
    }
}

fn get<'a, T: tokio_postgres::types::FromSql<'a>>(
    session: &Session,
    row: &'a tokio_postgres::Row,
    column: usize,
) -> Result<T> {
    row.try_get(column).map_err(|e| session.wrong(&e))
}

/// The right to write, for as long as the connection lives.
fn lock(session: &Session, address: &Address) -> Result<bool> {
    let sql = "SELECT pg_try_advisory_lock(hashtext('cashtag live'), hashtext($1))";
    get(session, &session.query_one(sql, &[&address.schema])?, 0)
}

fn commits(session: &Session) -> Result<i64> {
    let row = session.query_opt("SELECT value FROM meta WHERE key = 'commits'", &[])?;
    row.map_or(Ok(0), |row| get(session, &row, 0))
}

/// Applies what is missing, each step in a transaction with its number.
fn migrate(session: &Session, address: &Address, migrations: &[(i32, &str)]) -> Result<()> {
    let schema = &address.schema;
    let there: Option<String> =
        get(session, &session.query_one("SELECT to_regclass('schema_version')::text", &[])?, 0)?;
    if there.is_none() {
        session.execute_all(&format!(
            "CREATE SCHEMA IF NOT EXISTS {schema}; \
             CREATE TABLE IF NOT EXISTS {schema}.schema_version \
             (version integer PRIMARY KEY, applied_at timestamptz NOT NULL DEFAULT now())"
        ))?;
    }
    let found = version(session)?;
    check_version(address, found, migrations)?;
    for (number, sql) in migrations.iter().filter(|(number, _)| *number > found) {
        session.execute_all(&format!("BEGIN; {sql} INSERT INTO schema_version VALUES ({number}); COMMIT"))?;
    }
    Ok(())
}

fn version(session: &Session) -> Result<i32> {
    get(session, &session.query_one("SELECT coalesce(max(version), 0) FROM schema_version", &[])?, 0)
}

fn check_version(address: &Address, found: i32, migrations: &[(i32, &str)]) -> Result<()> {
    let newest = migrations.last().map_or(0, |(number, _)| *number);
    if found <= newest {
        return Ok(());
    }
    Err(Error::Invalid(format!(
        "{address}: expected a store of version {newest} or older, found {found}\n  \
         hint: it was written by a newer cashtag; use that one, or add ?schema=another_name"
    )))
}

impl Store for PostgresStore {
    fn keeps_text(&self) -> bool {
        self.options.with_text
    }

    fn known(&mut self, identities: &[u128]) -> Result<HashSet<u128>> {
        self.with(|session, store| read::known(session, identities, store.model))
    }

    fn commit(&mut self, batch: &Batch) -> Result<()> {
        let unsure = std::mem::replace(&mut self.unsure, true);
        self.with(|session, store| {
            let found = commits(session)?;
            if unsure && found == store.commits + 1 {
                return Ok(());
            }
            if found != store.commits {
                return Err(Error::StoreChanged {
                    place: store.address.to_string(),
                    why: format!("expected checkpoint {}, found {found}", store.commits),
                });
            }
            session.execute_all("BEGIN")?;
            write::batch(session, batch, store.model, store.options)?;
            session.execute(
                "INSERT INTO meta VALUES ('commits', $1) ON CONFLICT (key) DO UPDATE SET value = excluded.value",
                &[&(found + 1)],
            )?;
            session.execute_all("COMMIT")
        })?;
        self.commits += 1;
        self.unsure = false;
        Ok(())
    }

    fn delivered(&mut self, ids: &[i64]) -> Result<()> {
        self.with(|session, _| {
            session.execute("UPDATE alerts SET delivered = true WHERE id = ANY($1)", &[&ids]).map(|_| ())
        })
    }

    fn checkpoint(&mut self) -> Result<Option<Checkpoint>> {
        self.with(|session, _| {
            let value = |key: &str| -> Result<Option<i64>> {
                let row = session.query_opt("SELECT value FROM meta WHERE key = $1", &[&key])?;
                row.map(|row| get(session, &row, 0)).transpose()
            };
            let Some(seq) = value("seq")? else { return Ok(None) };
            let mut sources = std::collections::BTreeMap::new();
            for row in session.query("SELECT name, cursor, newest FROM sources", &[])? {
                let state = SourceState { cursor: get(session, &row, 1)?, newest: get(session, &row, 2)? };
                sources.insert(get(session, &row, 0)?, state);
            }
            Ok(Some(Checkpoint {
                seq: seq as u64,
                watermark: value("watermark")?.unwrap_or(Millis::MIN),
                latest: value("latest")?.unwrap_or(Millis::MIN),
                sources,
            }))
        })
    }

    fn posts_since(&mut self, time: Millis, each: &mut dyn FnMut(ScoredPost, u64)) -> Result<()> {
        self.with(|session, store| read::posts_since(session, time, store.model, each))
    }

    fn recent_signals(&mut self, latest: Millis, each: &mut dyn FnMut(Signal)) -> Result<()> {
        self.with(|session, _| Window::ALL.into_iter().try_for_each(|w| read::recent_signals(session, w, latest, each)))
    }

    fn forget(&mut self, cutoff: Millis, time: Duration) -> Result<bool> {
        let began = Instant::now();
        self.with(|session, _| {
            loop {
                let removed = session.execute(
                    "WITH gone AS (DELETE FROM posts WHERE seq IN (SELECT seq FROM posts ORDER BY seq LIMIT $2) \
                     AND received_at < $1 RETURNING seq) \
                     DELETE FROM post_keys WHERE seq IN (SELECT seq FROM gone)",
                    &[&cutoff, &CHUNK],
                );
                removed?;
                let oldest = session.query_opt("SELECT received_at FROM posts ORDER BY seq LIMIT 1", &[])?;
                let oldest: Option<Millis> = oldest.map(|row| get(session, &row, 0)).transpose()?;
                if oldest.is_none_or(|oldest| oldest >= cutoff) {
                    break;
                }
                if began.elapsed() >= time {
                    return Ok(false);
                }
            }
            session.execute("DELETE FROM alerts WHERE at < $1", &[&cutoff])?;
            session.execute("DELETE FROM dead_letters WHERE at < $1", &[&cutoff])?;
            for sql in [
                "DELETE FROM windows WHERE ctid = ANY(ARRAY(SELECT ctid FROM windows WHERE start < $1 AND available_at < $1 LIMIT $2))",
                "DELETE FROM bars WHERE ctid = ANY(ARRAY(SELECT ctid FROM bars WHERE start < $1 AND available_at < $1 LIMIT $2))",
            ] {
                while session.execute(sql, &[&cutoff, &CHUNK])? as i64 == CHUNK {
                    if began.elapsed() >= time {
                        return Ok(false);
                    }
                }
            }
            Ok(true)
        })
    }
}
