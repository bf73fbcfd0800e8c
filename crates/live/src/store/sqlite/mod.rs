//! The embedded store: SQLite with a write-ahead log.
//!
//! What holds: posts, windows, alerts and the checkpoint (place in the log, watermark, cursors of the sources) change in one
//! transaction. Whatever moment the process dies at, the store is at a checkpoint, and the log has everything after it.
//! Writing twice is writing once: a post is keyed by (source, id, model), a window by its place, an alert by its occasion.

mod read;
mod restore;
mod retention;

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::{Connection, Transaction, params};

pub use read::SqliteReader;

use super::{Alert, Batch, Checkpoint, DeadLetter, MAX_DEAD_LETTERS, Store, StoreOptions, model_json};
use crate::error::{Error, Result};
use crate::post::ScoredPost;
use crate::scorer::ModelInfo;
use crate::time::Millis;
use crate::windows::Signal;

pub struct SqliteStore {
    db: Connection,
    path: PathBuf,
    options: StoreOptions,
    model: i64,
    /// The series whose windows were looked at last for old ones.
    forgotten: Option<(i64, String)>,
}

impl SqliteStore {
    /// Opens or creates the store of a directory for writing.
    ///
    /// # Errors
    /// A directory that cannot be written, or a file that is no store or of a newer version.
    pub fn open(directory: &Path, model: &ModelInfo, options: StoreOptions) -> Result<Self> {
        std::fs::create_dir_all(directory).map_err(Error::io("create", directory))?;
        let path = file(directory);
        let db = Connection::open(&path).map_err(Error::store(&path))?;
        let model = prepare(&db, model, options.cache_mb).map_err(Error::store(&path))?;
        let version: i64 = db.query_row("PRAGMA user_version", [], |r| r.get(0)).map_err(Error::store(&path))?;
        if version != 1 {
            let what = format!("{}: expected a store of version 1, found {version}", path.display());
            return Err(Error::Invalid(
                what + "\n  hint: it was written by another version of cashtag; give another --data",
            ));
        }
        Ok(Self { db, path, options, model, forgotten: None })
    }
}

impl Store for SqliteStore {
    fn keeps_text(&self) -> bool {
        self.options.with_text
    }

    fn known(&mut self, identities: &[u128]) -> Result<HashSet<u128>> {
        known(&self.db, identities, self.model).map_err(Error::store(&self.path))
    }

    fn commit(&mut self, batch: &Batch) -> Result<()> {
        let (options, model) = (self.options, self.model);
        let write = |db: &mut Connection| -> rusqlite::Result<()> {
            let tx = db.transaction()?;
            write_posts(&tx, batch, model, options.with_text)?;
            write_signals(&tx, batch)?;
            write_alerts(&tx, &batch.alerts, options.webhook)?;
            write_dead_letters(&tx, &batch.dead_letters)?;
            write_checkpoint(&tx, &batch.checkpoint)?;
            tx.commit()
        };
        write(&mut self.db).map_err(Error::store(&self.path))
    }

    fn delivered(&mut self, ids: &[i64]) -> Result<()> {
        let mark = || -> rusqlite::Result<()> {
            let mut statement = self.db.prepare_cached("UPDATE alerts SET delivered = 1 WHERE id = ?1")?;
            ids.iter().try_for_each(|id| statement.execute([id]).map(|_| ()))
        };
        mark().map_err(Error::store(&self.path))
    }

    fn checkpoint(&mut self) -> Result<Option<Checkpoint>> {
        self.read_checkpoint()
    }

    fn posts_since(&mut self, time: Millis, each: &mut dyn FnMut(ScoredPost, u64)) -> Result<()> {
        self.read_posts_since(time, each)
    }

    fn recent_signals(&mut self, latest: Millis, each: &mut dyn FnMut(Signal)) -> Result<()> {
        self.read_recent_signals(latest, each)
    }

    fn forget(&mut self, cutoff: Millis, time: Duration) -> Result<bool> {
        self.forget_before(cutoff, time)
    }
}

/// Which of these posts there are with this model.
fn known(db: &Connection, identities: &[u128], model: i64) -> rusqlite::Result<HashSet<u128>> {
    // One look at the file for all of them: each statement alone would lock it and ask anew what has changed.
    let tx = db.unchecked_transaction()?;
    let mut statement = tx.prepare_cached("SELECT 1 FROM posts WHERE identity = ?1 AND model = ?2")?;
    let mut known = HashSet::new();
    for identity in identities {
        if statement.exists(params![identity.to_le_bytes(), model])? {
            known.insert(*identity);
        }
    }
    Ok(known)
}

pub(crate) fn file(directory: &Path) -> PathBuf {
    directory.join("live.sqlite")
}

fn prepare(db: &Connection, model: &ModelInfo, cache_mb: u32) -> rusqlite::Result<i64> {
    db.busy_timeout(Duration::from_secs(5))?;
    db.pragma_update(None, "journal_mode", "WAL")?;
    // The log is synced before a post is acknowledged; what a power cut takes from here is read from there again.
    db.pragma_update(None, "synchronous", "NORMAL")?;
    // Below zero it is in KiB.
    db.pragma_update(None, "cache_size", -1_024 * i64::from(cache_mb))?;
    // Pages that change with every checkpoint go into the file once in 64 MB: each time is a sync that the pipeline waits for.
    db.pragma_update(None, "wal_autocheckpoint", 16_384)?;
    db.pragma_update(None, "temp_store", "MEMORY")?;
    db.set_prepared_statement_cache_capacity(64);
    let version: i64 = db.query_row("PRAGMA user_version", [], |r| r.get(0))?;
    if version == 0 {
        db.execute_batch(include_str!("schema.sql"))?;
        db.pragma_update(None, "user_version", 1)?;
    }
    let info = model_json(model);
    let version = model.version();
    db.execute("INSERT OR IGNORE INTO models (version, info) VALUES (?1, ?2)", params![version, info.to_string()])?;
    db.query_row("SELECT id FROM models WHERE version = ?1", [version], |r| r.get(0))
}

fn write_posts(tx: &Transaction<'_>, batch: &Batch, model: i64, with_text: bool) -> rusqlite::Result<()> {
    let mut post = tx.prepare_cached(
        "INSERT INTO posts VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15, ?16, ?17, ?18, ?19, \
         ?20, ?21, ?22) ON CONFLICT DO NOTHING",
    )?;
    let mut key = tx.prepare_cached("INSERT INTO post_keys VALUES (?1, ?2, ?3) ON CONFLICT DO NOTHING")?;
    for (p, fingerprint) in batch.posts.iter().zip(&batch.fingerprints) {
        let tickers = serde_json::to_string(&p.tickers).unwrap_or_default();
        let sectors = serde_json::to_string(&p.sectors).unwrap_or_default();
        let probabilities = serde_json::to_string(&p.probabilities).unwrap_or_default();
        let seq = p.seq as i64;
        post.execute(params![
            seq,
            p.post.identity().to_le_bytes(),
            model,
            p.post.source,
            p.post.id,
            p.post.author,
            p.post.event_time,
            p.post.received_at,
            p.scored_at,
            batch.available_at,
            with_text.then_some(&p.post.text),
            p.post.url,
            p.is_copy_of,
            p.damped,
            p.too_late,
            p.weight,
            *fingerprint as i64,
            tickers,
            sectors,
            probabilities,
            p.label as i64,
            p.score,
        ])?;
        for ticker in &p.tickers {
            key.execute(params![0, ticker.symbol, seq])?;
        }
        for sector in &p.sectors {
            key.execute(params![1, sector, seq])?;
        }
    }
    Ok(())
}

fn write_signals(tx: &Transaction<'_>, batch: &Batch) -> rusqlite::Result<()> {
    let mut series = tx.prepare_cached("INSERT INTO series VALUES (?1, ?2, ?3) ON CONFLICT DO NOTHING")?;
    let mut window = tx.prepare_cached(
        "INSERT INTO windows VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7) ON CONFLICT DO UPDATE SET \
         revision = excluded.revision, available_at = excluded.available_at, data = excluded.data",
    )?;
    let mut bar = tx.prepare_cached("INSERT OR REPLACE INTO bars VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)")?;
    for s in &batch.signals {
        let data = serde_json::to_string(&s.values).unwrap_or_default();
        let (w, scope, key) = (s.window as i64, s.scope as i64, &*s.key);
        if s.window == crate::windows::Window::D1 {
            series.execute(params![scope, key, s.name])?;
        }
        window.execute(params![w, scope, key, s.start, s.revision, batch.available_at, data])?;
        if s.revision > 0 {
            bar.execute(params![w, scope, key, s.start, s.revision, batch.available_at, data])?;
        }
    }
    Ok(())
}

fn write_alerts(tx: &Transaction<'_>, alerts: &[Alert], webhook: bool) -> rusqlite::Result<()> {
    let mut statement = tx.prepare_cached(
        "INSERT INTO alerts (rule, key, window, start, at, fields, text, delivered) \
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8) ON CONFLICT DO NOTHING",
    )?;
    for a in alerts {
        statement.execute(params![
            a.rule,
            a.key,
            a.window as i64,
            a.start,
            a.at,
            a.values.to_string(),
            a.text,
            !webhook
        ])?;
    }
    Ok(())
}

fn write_dead_letters(tx: &Transaction<'_>, letters: &[DeadLetter]) -> rusqlite::Result<()> {
    if letters.is_empty() {
        return Ok(());
    }
    let mut statement =
        tx.prepare_cached("INSERT INTO dead_letters (at, source, reason, raw) VALUES (?1, ?2, ?3, ?4)")?;
    for l in letters {
        statement.execute(params![l.at, l.source, l.reason, l.raw])?;
    }
    let oldest = "DELETE FROM dead_letters WHERE id <= (SELECT max(id) FROM dead_letters) - ?1";
    tx.prepare_cached(oldest)?.execute([MAX_DEAD_LETTERS])?;
    tx.prepare_cached("INSERT INTO meta VALUES ('dead_letters', ?1) ON CONFLICT DO UPDATE SET value = value + ?1")?
        .execute([letters.len() as i64])?;
    Ok(())
}

fn write_checkpoint(tx: &Transaction<'_>, checkpoint: &Checkpoint) -> rusqlite::Result<()> {
    let mut meta = tx.prepare_cached("INSERT OR REPLACE INTO meta VALUES (?1, ?2)")?;
    meta.execute(params!["seq", checkpoint.seq as i64])?;
    meta.execute(params!["watermark", checkpoint.watermark])?;
    meta.execute(params!["latest", checkpoint.latest])?;
    let mut source = tx.prepare_cached("INSERT OR REPLACE INTO sources VALUES (?1, ?2, ?3)")?;
    for (name, state) in &checkpoint.sources {
        source.execute(params![name, state.cursor, state.newest])?;
    }
    Ok(())
}
