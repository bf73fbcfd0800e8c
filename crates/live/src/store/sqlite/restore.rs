//! What a restart reads: the checkpoint, the posts that are still of use, the signals that histories need.

use rusqlite::{OptionalExtension, params};

use super::SqliteStore;
use super::read::{post_of_row, signal_of_row};
use crate::error::{Error, Result};
use crate::post::ScoredPost;
use crate::store::{Checkpoint, SourceState, span_of};
use crate::time::Millis;
use crate::windows::{Scope, Signal, Window};

impl SqliteStore {
    pub(super) fn read_checkpoint(&self) -> Result<Option<Checkpoint>> {
        let read = || -> rusqlite::Result<Option<Checkpoint>> {
            let value = |key: &str| {
                self.db.query_row("SELECT value FROM meta WHERE key = ?1", [key], |r| r.get::<_, i64>(0)).optional()
            };
            let Some(seq) = value("seq")? else { return Ok(None) };
            let mut statement = self.db.prepare("SELECT name, cursor, newest FROM sources")?;
            let sources = statement
                .query_map([], |r| Ok((r.get(0)?, SourceState { cursor: r.get(1)?, newest: r.get(2)? })))?
                .collect::<rusqlite::Result<_>>()?;
            Ok(Some(Checkpoint {
                seq: seq as u64,
                watermark: value("watermark")?.unwrap_or(Millis::MIN),
                latest: value("latest")?.unwrap_or(Millis::MIN),
                sources,
            }))
        };
        read().map_err(Error::store(&self.path))
    }

    /// Posts of this model from an event time on, in the order of the log, with their fingerprints.
    pub(super) fn read_posts_since(&self, time: Millis, each: &mut dyn FnMut(ScoredPost, u64)) -> Result<()> {
        let mut read = || -> rusqlite::Result<()> {
            let mut statement =
                self.db.prepare("SELECT * FROM posts WHERE event_time >= ?1 AND model = ?2 ORDER BY seq")?;
            let mut rows = statement.query(params![time, self.model])?;
            while let Some(row) = rows.next()? {
                each(post_of_row(row)?, row.get::<_, i64>("fingerprint")? as u64);
            }
            Ok(())
        };
        read().map_err(Error::store(&self.path))
    }

    /// The signals that histories and baselines are made from again, older ones of a series first.
    pub(super) fn read_recent_signals(&self, latest: Millis, each: &mut dyn FnMut(Signal)) -> Result<()> {
        let mut read = || -> rusqlite::Result<()> {
            let mut all = self.db.prepare("SELECT scope, key, name FROM series")?;
            let series: Vec<(i64, String, Option<String>)> =
                all.query_map([], |r| Ok((r.get(0)?, r.get(1)?, r.get(2)?)))?.collect::<rusqlite::Result<_>>()?;
            let mut windows = self.db.prepare(
                "SELECT start, revision, data FROM windows WHERE window = ?1 AND scope = ?2 AND key = ?3 \
                 AND start >= ?4 ORDER BY start",
            )?;
            for (scope, key, name) in &series {
                let Some(scope) = Scope::ALL.get(*scope as usize) else { continue };
                for window in Window::ALL {
                    // The newest of each series is shown however old it is.
                    let newest: Option<Millis> = self
                        .db
                        .prepare_cached("SELECT max(start) FROM windows WHERE window = ?1 AND scope = ?2 AND key = ?3")?
                        .query_row(params![window as i64, *scope as i64, key], |r| r.get(0))?;
                    let Some(newest) = newest else { continue };
                    let from = latest.saturating_sub(span_of(window)).min(newest);
                    let mut rows = windows.query(params![window as i64, *scope as i64, key, from])?;
                    while let Some(row) = rows.next()? {
                        each(signal_of_row(row, *scope, key, name.as_deref(), window)?);
                    }
                }
            }
            Ok(())
        };
        read().map_err(Error::store(&self.path))
    }
}
