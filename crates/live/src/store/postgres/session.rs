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

use bytes::{BufMut, BytesMut};
use futures_util::{SinkExt, StreamExt};
use tokio::runtime::Runtime;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, Row, Statement};

use super::address::Address;
use super::tls::Tls;
use crate::error::{Error, Result};

/// For connecting, with everything that belongs to it.
const CONNECT: Duration = Duration::from_secs(10);
/// For one statement. A checkpoint of 20,000 posts takes far less.
const STATEMENT: Duration = Duration::from_secs(60);
/// So many bytes are sent at a time while rows are copied.
const PIECE: usize = 64 << 10;

pub(super) struct Session {
    client: Client,
    place: String,
    statements: RefCell<HashMap<&'static str, Statement>>,
}

type Params<'a> = &'a [&'a (dyn ToSql + Sync)];

/// The fields of a row that is copied, in PostgreSQL's binary format: numbers are big-endian, texts and json are their bytes.
/// The server checks how many there are, and the width of each.
pub(super) struct Fields(BytesMut);

impl Fields {
    pub(super) fn put(&mut self, value: impl AsRef<[u8]>) {
        self.maybe(Some(value));
    }

    pub(super) fn maybe(&mut self, value: Option<impl AsRef<[u8]>>) {
        let Some(value) = value else { return self.0.put_i32(-1) };
        let value = value.as_ref();
        self.0.put_i32(value.len() as i32);
        self.0.put_slice(value);
    }
}

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

    /// Adds rows by `COPY … FROM STDIN (FORMAT binary)`, the server at work on the first while the last are encoded. False if
    /// it has one of them already; then none was added, and the transaction goes on from a savepoint only.
    pub(super) fn copy<T>(
        &self,
        sql: &'static str,
        fields: i16,
        rows: &[T],
        encode: impl Fn(&T, &mut Fields),
    ) -> Result<bool> {
        let statement = self.prepare(sql)?;
        let copying = async {
            let mut sink = std::pin::pin!(self.client.copy_in(&statement).await?);
            let mut out = Fields(BytesMut::with_capacity(2 * PIECE));
            out.0.put_slice(b"PGCOPY\n\xff\r\n\0\0\0\0\0\0\0\0\0");
            for row in rows {
                out.0.put_i16(fields);
                encode(row, &mut out);
                if out.0.len() >= PIECE {
                    sink.send(out.0.split().freeze()).await?;
                }
            }
            out.0.put_i16(-1);
            sink.send(out.0.freeze()).await?;
            sink.finish().await
        };
        self.wait(async {
            match copying.await {
                Err(e) if e.code() == Some(&SqlState::UNIQUE_VIOLATION) => Ok(false),
                outcome => outcome.map(|_| true),
            }
        })
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
