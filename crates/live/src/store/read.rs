//! Reading the store while the pipeline writes it: each reader has a connection of its own and sees whole checkpoints.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rusqlite::{Connection, OpenFlags, OptionalExtension, Row, ToSql, params};
use serde_json::{Value, json};

use super::{Alert, DeadLetter};
use crate::error::{Error, Result};
use crate::post::{Post, ScoredPost};
use crate::scorer::ModelInfo;
use crate::time::{Millis, rfc3339};
use crate::windows::{Scope, Signal, Values, Window};

/// Which posts are asked for.
#[derive(Clone, Debug, Default)]
pub struct PostFilter {
    pub ticker: Option<String>,
    pub sector: Option<String>,
    /// Only posts with a smaller number.
    pub before: Option<u64>,
    pub limit: usize,
}

/// A connection that only reads.
pub struct Reader {
    pub(crate) db: Connection,
    path: PathBuf,
}

impl Reader {
    /// # Errors
    /// There is no store, or it cannot be read.
    pub fn open(directory: &Path) -> Result<Self> {
        let path = super::file(directory);
        if !path.exists() {
            let hint = "hint: --data names the directory that cashtag live writes to";
            return Err(Error::Invalid(format!("there is no store {}\n  {hint}", path.display())));
        }
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let db = Connection::open_with_flags(&path, flags).map_err(Error::store(&path))?;
        db.busy_timeout(Duration::from_secs(2)).map_err(Error::store(&path))?;
        Ok(Self { db, path })
    }

    pub(crate) fn run<T>(&self, read: impl FnOnce(&Connection) -> rusqlite::Result<T>) -> Result<T> {
        read(&self.db).map_err(Error::store(&self.path))
    }

    /// Posts as `/v1/posts` shows them, newest first.
    ///
    /// # Errors
    /// The store cannot be read.
    pub fn posts(&self, filter: &PostFilter) -> Result<Vec<Value>> {
        let before = filter.before.map_or(i64::MAX, |b| i64::try_from(b).unwrap_or(i64::MAX));
        let limit = filter.limit as i64;
        self.run(|db| {
            let keyed = |scope: i64, key: &str| -> rusqlite::Result<Vec<Value>> {
                let sql = "SELECT p.*, m.info FROM post_keys k JOIN posts p ON p.seq = k.seq JOIN models m ON m.id = p.model \
                           WHERE k.scope = ?1 AND k.key = ?2 AND k.seq < ?3 ORDER BY k.seq DESC LIMIT ?4";
                collect(db, sql, params![scope, key, before, limit])
            };
            match (&filter.ticker, &filter.sector) {
                (Some(ticker), _) => keyed(0, ticker),
                (None, Some(sector)) => keyed(1, sector),
                (None, None) => collect(
                    db,
                    "SELECT p.*, m.info FROM posts p JOIN models m ON m.id = p.model WHERE p.seq < ?1 ORDER BY p.seq DESC LIMIT ?2",
                    params![before, limit],
                ),
            }
        })
    }

    /// All series that there ever were.
    ///
    /// # Errors
    /// The store cannot be read.
    pub fn series(&self) -> Result<Vec<(Scope, String)>> {
        self.run(|db| {
            let mut statement = db.prepare_cached("SELECT scope, key FROM series ORDER BY scope, key")?;
            let scope = |n: i64| Scope::ALL.get(n as usize).copied().unwrap_or(Scope::Ticker);
            let rows = statement.query_map([], |r| Ok((scope(r.get(0)?), r.get(1)?)))?;
            rows.collect()
        })
    }

    /// The windows of one series, oldest first; the newest `limit` of those in the range.
    ///
    /// # Errors
    /// The store cannot be read.
    pub fn history(
        &self,
        scope: Scope,
        key: &str,
        window: Window,
        range: (Millis, Millis),
        limit: usize,
    ) -> Result<Vec<Signal>> {
        self.run(|db| {
            let sql = "SELECT name FROM series WHERE scope = ?1 AND key = ?2";
            let name =
                db.query_row(sql, params![scope as i64, key], |r| r.get::<_, Option<String>>(0)).optional()?.flatten();
            let mut statement = db.prepare_cached(
                "SELECT start, revision, data FROM windows WHERE window = ?1 AND scope = ?2 AND key = ?3 \
                 AND start >= ?4 AND start <= ?5 ORDER BY start DESC LIMIT ?6",
            )?;
            let rows = statement
                .query_map(params![window as i64, scope as i64, key, range.0, range.1, limit as i64], |row| {
                    signal_of_row(row, scope, key, name.as_deref(), window)
                })?;
            let mut signals = rows.collect::<rusqlite::Result<Vec<_>>>()?;
            signals.reverse();
            Ok(signals)
        })
    }

    /// # Errors
    /// The store cannot be read.
    pub fn alerts(&self, limit: usize) -> Result<Vec<Value>> {
        self.run(|db| {
            let mut statement = db.prepare_cached(
                "SELECT at, rule, key, window, start, fields, text, id FROM alerts ORDER BY id DESC LIMIT ?1",
            )?;
            let rows = statement.query_map([limit as i64], |r| Ok(alert_of_row(r)?.to_json()))?;
            rows.collect()
        })
    }

    /// Alerts that no webhook has taken yet, oldest first, with their numbers.
    ///
    /// # Errors
    /// The store cannot be read.
    pub fn undelivered(&self, limit: usize) -> Result<Vec<(i64, Alert)>> {
        self.run(|db| {
            let mut statement = db.prepare_cached(
                "SELECT at, rule, key, window, start, fields, text, id FROM alerts WHERE delivered = 0 ORDER BY id LIMIT ?1",
            )?;
            let rows = statement.query_map([limit as i64], |r| Ok((r.get(7)?, alert_of_row(r)?)))?;
            rows.collect()
        })
    }

    /// # Errors
    /// The store cannot be read.
    pub fn dead_letters(&self, limit: usize) -> Result<Vec<Value>> {
        self.run(|db| {
            let mut statement =
                db.prepare_cached("SELECT at, source, reason, raw FROM dead_letters ORDER BY id DESC LIMIT ?1")?;
            let rows = statement.query_map([limit as i64], |r| {
                let letter = DeadLetter { at: r.get(0)?, source: r.get(1)?, reason: r.get(2)?, raw: r.get(3)? };
                Ok(json!({"at": rfc3339(letter.at), "source": letter.source, "reason": letter.reason, "raw": letter.raw}))
            })?;
            rows.collect()
        })
    }

    /// Whether the store has a post with this version of the model.
    ///
    /// # Errors
    /// The store cannot be read.
    pub fn has(&self, identity: u128, version: &str) -> Result<bool> {
        let sql = "SELECT 1 FROM posts WHERE identity = ?1 AND model = (SELECT id FROM models WHERE version = ?2)";
        self.run(|db| db.prepare_cached(sql)?.exists(params![identity.to_le_bytes(), version]))
    }

    /// How many dead letters there ever were.
    ///
    /// # Errors
    /// The store cannot be read.
    pub fn dead_letter_count(&self) -> Result<u64> {
        self.run(|db| {
            let found = db.query_row("SELECT value FROM meta WHERE key = 'dead_letters'", [], |r| r.get::<_, i64>(0));
            Ok(found.optional()?.unwrap_or(0) as u64)
        })
    }

    /// How many posts there are.
    ///
    /// # Errors
    /// The store cannot be read.
    pub fn post_count(&self) -> Result<u64> {
        self.run(|db| db.query_row("SELECT count(*) FROM posts", [], |r| Ok(r.get::<_, i64>(0)? as u64)))
    }
}

fn collect(db: &Connection, sql: &str, values: &[&dyn ToSql]) -> rusqlite::Result<Vec<Value>> {
    let mut statement = db.prepare_cached(sql)?;
    let rows = statement.query_map(values, |row| {
        let model = model_of(&row.get::<_, String>("info")?);
        let has_text = row.get::<_, Option<String>>("text")?.is_some();
        Ok(post_of_row(row)?.to_json(&model, has_text))
    })?;
    rows.collect()
}

/// The labels and hashes that a stored post was made with.
pub(crate) fn model_of(info: &str) -> ModelInfo {
    let info: Value = serde_json::from_str(info).unwrap_or_default();
    let text = |key: &str| info[key].as_str().map(str::to_owned);
    let labels = info["labels"].as_array().map(|l| l.iter().filter_map(|l| Some(l.as_str()?.to_owned())).collect());
    ModelInfo {
        name: text("name").unwrap_or_default(),
        adapter: text("adapter"),
        labels: labels.unwrap_or_default(),
        temperature: info["temperature"].as_f64().unwrap_or(1.0) as f32,
        model_hash: text("model").unwrap_or_default(),
        adapter_hash: text("adapter_hash"),
        prompt_hash: text("prompt").unwrap_or_default(),
    }
}

pub(crate) fn post_of_row(row: &Row<'_>) -> rusqlite::Result<ScoredPost> {
    let parsed = |column: &str| row.get::<_, String>(column);
    Ok(ScoredPost {
        seq: row.get::<_, i64>("seq")? as u64,
        post: Post {
            source: row.get("source")?,
            id: row.get("id")?,
            author: row.get("author")?,
            event_time: row.get("event_time")?,
            received_at: row.get("received_at")?,
            text: row.get::<_, Option<String>>("text")?.unwrap_or_default(),
            url: row.get("url")?,
            copy_of: None,
            cursor: None,
        },
        scored_at: row.get("scored_at")?,
        available_at: row.get("available_at")?,
        tickers: serde_json::from_str(&parsed("tickers")?).unwrap_or_default(),
        sectors: serde_json::from_str(&parsed("sectors")?).unwrap_or_default(),
        probabilities: serde_json::from_str(&parsed("probabilities")?).unwrap_or_default(),
        label: row.get::<_, i64>("label")? as usize,
        score: row.get("score")?,
        weight: row.get("weight")?,
        is_copy_of: row.get("copy_of")?,
        damped: row.get("damped")?,
        too_late: row.get("too_late")?,
    })
}

/// A row of (start, revision, data).
pub(crate) fn signal_of_row(
    row: &Row<'_>,
    scope: Scope,
    key: &str,
    name: Option<&str>,
    window: Window,
) -> rusqlite::Result<Signal> {
    let start: Millis = row.get(0)?;
    let values: Values = serde_json::from_str(&row.get::<_, String>(2)?).unwrap_or_default();
    Ok(Signal {
        key: Arc::from(key),
        scope,
        name: name.map(str::to_owned),
        window,
        start,
        end: start + window.size(),
        is_final: false,
        revision: row.get(1)?,
        values,
        sparkline: Vec::new(),
    })
}

fn alert_of_row(row: &Row<'_>) -> rusqlite::Result<Alert> {
    Ok(Alert {
        at: row.get(0)?,
        rule: row.get(1)?,
        key: row.get(2)?,
        window: Window::ALL.get(row.get::<_, i64>(3)? as usize).copied().unwrap_or(Window::M5),
        start: row.get(4)?,
        values: serde_json::from_str(&row.get::<_, String>(5)?).unwrap_or_default(),
        text: row.get(6)?,
    })
}

/// A few readers for many requests.
#[derive(Clone)]
pub struct Readers {
    directory: PathBuf,
    idle: Arc<Mutex<Vec<Reader>>>,
}

impl Readers {
    pub fn new(directory: &Path) -> Self {
        Self { directory: directory.to_owned(), idle: Arc::default() }
    }

    /// Reads with an idle connection, or a new one. Blocks.
    ///
    /// # Errors
    /// Whatever reading gives.
    pub fn with<T>(&self, read: impl FnOnce(&Reader) -> Result<T>) -> Result<T> {
        let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let reader = match idle {
            Some(reader) => reader,
            None => Reader::open(&self.directory)?,
        };
        let outcome = read(&reader);
        // A connection that failed is not used again.
        if outcome.is_ok() {
            let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
            if idle.len() < 8 {
                idle.push(reader);
            }
        }
        outcome
    }
}
