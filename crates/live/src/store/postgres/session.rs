//! A connection, with a limit on every wait.
//!
//! Connections are driven by one thread that all of them share, so that the callers may be any threads that may block.

use std::cell::RefCell;
use std::collections::HashMap;
use std::error::Error as _;
use std::future::Future;
use std::io;
use std::sync::OnceLock;
use std::time::Duration;

use futures_util::StreamExt;
use tokio::runtime::Runtime;
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, Row, Statement};

use super::address::Address;
use super::tls::Tls;
use crate::error::{Error, Result};

/// For connecting, with everything that belongs to it.
const CONNECT: Duration = Duration::from_secs(10);
/// For one statement. A checkpoint of 20,000 posts takes far less.
const STATEMENT: Duration = Duration::from_secs(60);

pub(super) struct Session {
    client: Client,
    place: String,
    statements: RefCell<HashMap<&'static str, Statement>>,
}

type Params<'a> = &'a [&'a (dyn ToSql + Sync)];

fn runtime(place: &str) -> Result<&'static Runtime> {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    if let Some(runtime) = RUNTIME.get() {
        return Ok(runtime);
    }
    let made =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).thread_name("postgres").enable_all().build();
    let made = made.map_err(|e| Error::Store { place: place.to_owned(), why: format!("no thread: {e}") })?;
    Ok(RUNTIME.get_or_init(|| made))
}

impl Session {
    /// # Errors
    /// [`Error::StoreAway`] if the server cannot be reached (yet), [`Error::Store`] if it refuses us.
    pub(super) fn connect(address: &Address) -> Result<Self> {
        let place = address.to_string();
        let tls = Tls::of(address)?;
        let connecting = async {
            let (client, connection) = address.config.connect(tls).await?;
            // It ends with the client, or with the connection.
            tokio::spawn(connection);
            Ok(client)
        };
        let client = wait(&place, CONNECT, connecting)?;
        let session = Self { client, place, statements: RefCell::default() };
        // The name has no character that would have to be quoted.
        session.execute_all(&format!("SET search_path TO {}", address.schema))?;
        Ok(session)
    }

    /// Several statements without values, as one transaction unless they say otherwise.
    pub(super) fn execute_all(&self, sql: &str) -> Result<()> {
        self.wait(self.client.batch_execute(sql))
    }

    pub(super) fn query(&self, sql: &'static str, params: Params<'_>) -> Result<Vec<Row>> {
        let statement = self.prepare(sql)?;
        self.wait(self.client.query(&statement, params))
    }

    pub(super) fn query_opt(&self, sql: &'static str, params: Params<'_>) -> Result<Option<Row>> {
        Ok(self.query(sql, params)?.into_iter().next())
    }

    /// The one row that there must be.
    pub(super) fn query_one(&self, sql: &'static str, params: Params<'_>) -> Result<Row> {
        let row = self.query_opt(sql, params)?;
        row.ok_or_else(|| Error::Store { place: self.place.clone(), why: format!("no answer to {sql}") })
    }

    pub(super) fn execute(&self, sql: &'static str, params: Params<'_>) -> Result<u64> {
        let statement = self.prepare(sql)?;
        self.wait(self.client.execute(&statement, params))
    }

    /// Rows one by one: there may be more of them than should be held at a time.
    pub(super) fn stream(
        &self,
        sql: &'static str,
        params: Params<'_>,
        mut each: impl FnMut(&Row) -> Result<(), tokio_postgres::Error>,
    ) -> Result<()> {
        let statement = self.prepare(sql)?;
        let rows = self.wait(self.client.query_raw(&statement, params.iter().copied()))?;
        let mut rows = std::pin::pin!(rows);
        while let Some(row) = self.wait(async { rows.next().await.transpose() })? {
            each(&row).map_err(|e| self.wrong(&e))?;
        }
        Ok(())
    }

    pub(super) fn wrong(&self, error: &tokio_postgres::Error) -> Error {
        translate(&self.place, error)
    }

    fn prepare(&self, sql: &'static str) -> Result<Statement> {
        if let Some(statement) = self.statements.borrow().get(sql) {
            return Ok(statement.clone());
        }
        let statement = self.wait(self.client.prepare(sql))?;
        self.statements.borrow_mut().insert(sql, statement.clone());
        Ok(statement)
    }

    fn wait<T>(&self, work: impl Future<Output = Result<T, tokio_postgres::Error>>) -> Result<T> {
        wait(&self.place, STATEMENT, work)
    }
}

fn wait<T>(place: &str, limit: Duration, work: impl Future<Output = Result<T, tokio_postgres::Error>>) -> Result<T> {
    let waited = runtime(place)?.block_on(async { tokio::time::timeout(limit, work).await });
    match waited {
        Ok(outcome) => outcome.map_err(|e| translate(place, &e)),
        Err(_) => {
            Err(Error::StoreAway { place: place.to_owned(), why: format!("no answer within {} s", limit.as_secs()) })
        }
    }
}

/// What may pass by itself, and what somebody has to mend.
fn translate(place: &str, error: &tokio_postgres::Error) -> Error {
    let place = place.to_owned();
    if let Some(db) = error.as_db_error() {
        let code = db.code().code();
        let why = format!("{} (SQLSTATE {code})", db.message());
        // Lost or refused connections, no resources, shutting down or starting up.
        if ["08", "53", "57P"].iter().any(|class| code.starts_with(class)) {
            return Error::StoreAway { place, why };
        }
        let hint = match code {
            "28P01" | "28000" => {
                "\n  hint: the password may come from PGPASSWORD or ~/.pgpass (which only its owner may read)"
            }
            "3D000" => "\n  hint: createdb makes the database",
            "42501" => {
                "\n  hint: the user needs CREATE on the database, or a schema of its own: CREATE SCHEMA cashtag AUTHORIZATION user"
            }
            _ => "",
        };
        return Error::Store { place, why: why + hint };
    }
    let mut why = error.to_string();
    let (mut away, mut cause) = (error.is_closed(), error.source());
    while let Some(inner) = cause {
        let said = inner.to_string();
        if !why.contains(&said) {
            why = format!("{why}: {said}");
        }
        // A certificate that is not believed comes as invalid data.
        away |= inner.downcast_ref::<io::Error>().is_some_and(|e| e.kind() != io::ErrorKind::InvalidData);
        cause = inner.source();
    }
    if why.contains("password missing") {
        why += "\n  hint: it may come from PGPASSWORD or ~/.pgpass (which only its owner may read)";
    }
    if away { Error::StoreAway { place, why } } else { Error::Store { place, why } }
}
