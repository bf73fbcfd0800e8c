//! Reading while the pipeline writes: a connection of its own that only reads.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::{Connection, OpenFlags, OptionalExtension, Row, ToSql, params};
use serde_json::Value;

use crate::error::{Error, Result};
use crate::post::{Post, ScoredPost};
use crate::scorer::ModelInfo;
use crate::store::{
    Alert, Bar, DeadLetter, MAX_READ, PostFilter, Reader, StoredPost, model_of, scope_of, stored_signal, window_of,
};
use crate::time::{DAY, Millis};
use crate::windows::{Scope, Signal, Window};

/// A connection that only reads.
pub struct SqliteReader {
    db: Connection,
    path: PathBuf,
}

impl SqliteReader {
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

    fn run<T>(&self, read: impl FnOnce(&Connection) -> rusqlite::Result<T>) -> Result<T> {
        read(&self.db).map_err(Error::store(&self.path))
    }
}

impl Reader for SqliteReader {
    fn posts(&self, filter: &PostFilter) -> Result<Vec<Value>> {
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

    fn series(&self) -> Result<Vec<(Scope, String)>> {
        self.run(|db| {
            let mut statement = db.prepare_cached("SELECT scope, key FROM series ORDER BY scope, key")?;
            let rows = statement.query_map([], |r| Ok((scope_of(r.get(0)?), r.get(1)?)))?;
            rows.collect()
        })
    }

    fn history(
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

    fn alerts(&self, limit: usize) -> Result<Vec<Value>> {
        self.run(|db| {
            let mut statement = db.prepare_cached(
                "SELECT at, rule, key, window, start, fields, text, id FROM alerts ORDER BY id DESC LIMIT ?1",
            )?;
            let rows = statement.query_map([limit as i64], |r| Ok(alert_of_row(r)?.to_json()))?;
            rows.collect()
        })
    }

    fn undelivered(&self, limit: usize) -> Result<Vec<(i64, Alert)>> {
        self.run(|db| {
            let mut statement = db.prepare_cached(
                "SELECT at, rule, key, window, start, fields, text, id FROM alerts WHERE delivered = 0 ORDER BY id LIMIT ?1",
            )?;
            let rows = statement.query_map([limit as i64], |r| Ok((r.get(7)?, alert_of_row(r)?)))?;
            rows.collect()
        })
    }

    fn dead_letters(&self, limit: usize) -> Result<Vec<Value>> {
        self.run(|db| {
            let mut statement =
                db.prepare_cached("SELECT at, source, reason, raw FROM dead_letters ORDER BY id DESC LIMIT ?1")?;
            let rows = statement.query_map([limit as i64], |r| {
                let letter = DeadLetter { at: r.get(0)?, source: r.get(1)?, reason: r.get(2)?, raw: r.get(3)? };
                Ok(letter.to_json())
            })?;
            rows.collect()
        })
    }

    fn known(&self, identities: &[u128], version: &str) -> Result<HashSet<u128>> {
        self.run(|db| {
            let model: Option<i64> = db
                .prepare_cached("SELECT id FROM models WHERE version = ?1")?
                .query_row([version], |r| r.get(0))
                .optional()?;
            model.map_or_else(|| Ok(HashSet::new()), |model| super::known(db, identities, model))
        })
    }

    fn dead_letter_count(&self) -> Result<u64> {
        self.run(|db| {
            let found = db.query_row("SELECT value FROM meta WHERE key = 'dead_letters'", [], |r| r.get::<_, i64>(0));
            Ok(found.optional()?.unwrap_or(0) as u64)
        })
    }

    fn post_count(&self) -> Result<u64> {
        self.run(|db| db.query_row("SELECT count(*) FROM posts", [], |r| Ok(r.get::<_, i64>(0)? as u64)))
    }

    fn models(&self) -> Result<Vec<(i64, ModelInfo)>> {
        self.run(|db| {
            let mut statement = db.prepare("SELECT id, info FROM models ORDER BY id")?;
            let rows = statement.query_map([], |r| Ok((r.get(0)?, model_of(&r.get::<_, String>(1)?))))?;
            rows.collect()
        })
    }

    fn post_days(&self, since: Millis) -> Result<Vec<Millis>> {
        // By the index: from the first moment to the first moment of a later day, and so on.
        self.run(|db| {
            let mut statement = db.prepare_cached("SELECT min(event_time) FROM posts WHERE event_time >= ?1")?;
            let (mut days, mut from) = (Vec::new(), since);
            while let Some(first) = statement.query_row([from], |r| r.get::<_, Option<Millis>>(0))? {
                let day = Window::D1.start(first);
                days.push(day);
                from = day + DAY;
            }
            Ok(days)
        })
    }

    fn posts_of_day(&self, day: Millis, after: i64, limit: usize) -> Result<Vec<StoredPost>> {
        self.run(|db| {
            let mut statement = db.prepare_cached(
                "SELECT * FROM posts WHERE event_time >= ?1 AND event_time < ?2 AND seq > ?3 ORDER BY seq LIMIT ?4",
            )?;
            let rows = statement.query_map(params![day, day + DAY, after, limit as i64], |r| {
                let has_text = r.get::<_, Option<String>>("text")?.is_some();
                Ok(StoredPost { model: r.get("model")?, post: post_of_row(r)?, has_text })
            })?;
            let (mut posts, mut bytes) = (Vec::new(), 0);
            for post in rows {
                let post: StoredPost = post?;
                bytes += post.post.post.text.len() as i64;
                posts.push(post);
                if bytes >= MAX_READ {
                    break;
                }
            }
            Ok(posts)
        })
    }

    fn bar_days(&self, window: Window, since: Millis) -> Result<Vec<Millis>> {
        self.run(|db| {
            let mut statement = db.prepare(BAR_DAYS)?;
            let rows = statement.query_map(params![window as i64, since], |r| r.get(0))?;
            rows.collect()
        })
    }

    fn bars_of_day(&self, window: Window, day: Millis, after: Option<&Bar>, limit: usize) -> Result<Vec<Bar>> {
        let (scope, key, start, revision) =
            after.map_or((-1, "", Millis::MIN, 0), |b| (b.scope as i64, &*b.key, b.start, b.revision));
        self.run(|db| {
            let mut statement = db.prepare_cached(
                "SELECT scope, key, start, revision, available_at, data FROM bars WHERE window = ?1 AND start >= ?2 AND start < ?3 \
                 AND (scope, key, start, revision) > (?4, ?5, ?6, ?7) ORDER BY scope, key, start, revision LIMIT ?8",
            )?;
            let place = params![window as i64, day, day + DAY, scope, key, start, revision, limit as i64];
            let rows = statement.query_map(place, |r| {
                Ok(Bar {
                    scope: scope_of(r.get(0)?),
                    key: r.get(1)?,
                    start: r.get(2)?,
                    revision: r.get(3)?,
                    available_at: r.get(4)?,
                    values: serde_json::from_str(&r.get::<_, String>(5)?).unwrap_or_default(),
                })
            })?;
            rows.collect()
        })
    }
}

/// Days before 1970 have negative times; `%` goes towards zero.
const BAR_DAYS: &str = "SELECT DISTINCT start - (start % 86400000 + 86400000) % 86400000 AS day FROM bars \
                        WHERE window = ?1 AND start >= ?2 ORDER BY day";

fn collect(db: &Connection, sql: &str, values: &[&dyn ToSql]) -> rusqlite::Result<Vec<Value>> {
    let mut statement = db.prepare_cached(sql)?;
    let rows = statement.query_map(values, |row| {
        let model = model_of(&row.get::<_, String>("info")?);
        let has_text = row.get::<_, Option<String>>("text")?.is_some();
        Ok(post_of_row(row)?.to_json(&model, has_text))
    })?;
    rows.collect()
}

pub(super) fn post_of_row(row: &Row<'_>) -> rusqlite::Result<ScoredPost> {
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
pub(super) fn signal_of_row(
    row: &Row<'_>,
    scope: Scope,
    key: &str,
    name: Option<&str>,
    window: Window,
) -> rusqlite::Result<Signal> {
    Ok(stored_signal((scope, key, name), window, row.get(0)?, row.get(1)?, &row.get::<_, String>(2)?))
}

fn alert_of_row(row: &Row<'_>) -> rusqlite::Result<Alert> {
    Ok(Alert {
        at: row.get(0)?,
        rule: row.get(1)?,
        key: row.get(2)?,
        window: window_of(row.get(3)?),
        start: row.get(4)?,
        values: serde_json::from_str(&row.get::<_, String>(5)?).unwrap_or_default(),
        text: row.get(6)?,
    })
}
