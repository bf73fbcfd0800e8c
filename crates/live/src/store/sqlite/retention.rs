//! Forgetting by age. Age is counted from when something came or changed, so a replay of an old day is kept like a new one.

use std::time::{Duration, Instant};

use rusqlite::params;

use super::SqliteStore;
use crate::error::{Error, Result};
use crate::time::Millis;
use crate::windows::Window;

/// Rows that one transaction removes: the pipeline waits no longer than that takes.
const CHUNK: i64 = 5_000;

impl SqliteStore {
    /// Removes posts, windows, alerts and dead letters that came or last changed before `cutoff`, for at most `time`.
    /// Returns whether it was all.
    pub(super) fn forget_before(&mut self, cutoff: Millis, time: Duration) -> Result<bool> {
        let began = Instant::now();
        self.forget_until(cutoff, || began.elapsed() < time).map_err(Error::store(&self.path.clone()))
    }

    fn forget_until(&mut self, cutoff: Millis, mut may_go_on: impl FnMut() -> bool) -> rusqlite::Result<bool> {
        let posts = "DELETE FROM posts WHERE seq IN (SELECT seq FROM posts ORDER BY seq LIMIT ?2) AND received_at < ?1";
        loop {
            let tx = self.db.transaction()?;
            let removed = tx.execute(posts, params![cutoff, CHUNK])?;
            // Keys of posts that are gone: they lie below the oldest post that is left.
            if removed > 0 {
                let oldest: Option<i64> = tx.query_row("SELECT min(seq) FROM posts", [], |r| r.get(0))?;
                tx.execute("DELETE FROM post_keys WHERE seq < ?1", [oldest.unwrap_or(i64::MAX)])?;
            }
            tx.commit()?;
            if (removed as i64) < CHUNK {
                break;
            }
            if !may_go_on() {
                return Ok(false);
            }
        }
        let tx = self.db.transaction()?;
        tx.execute("DELETE FROM alerts WHERE at < ?1", [cutoff])?;
        tx.execute("DELETE FROM dead_letters WHERE at < ?1", [cutoff])?;
        tx.commit()?;
        let series: Vec<(i64, String)> = {
            let mut all = self.db.prepare("SELECT scope, key FROM series ORDER BY scope, key")?;
            all.query_map([], |r| Ok((r.get(0)?, r.get(1)?)))?.collect::<rusqlite::Result<_>>()?
        };
        // Behind the one that the last call ended with: with many series none is left out for ever.
        let done = self.forgotten.take();
        let behind = |place: &&(i64, String)| done.as_ref().is_none_or(|done| *place > done);
        for (scope, key) in series.iter().filter(behind) {
            let tx = self.db.transaction()?;
            for window in Window::ALL {
                for table in ["windows", "bars"] {
                    tx.prepare_cached(&format!(
                        "DELETE FROM {table} WHERE window = ?1 AND scope = ?2 AND key = ?3 AND start < ?4 AND available_at < ?4"
                    ))?
                    .execute(params![window as i64, scope, key, cutoff])?;
                }
            }
            tx.commit()?;
            if !may_go_on() && series.last().is_some_and(|last| last != &(*scope, key.clone())) {
                self.forgotten = Some((*scope, key.clone()));
                return Ok(false);
            }
        }
        Ok(true)
    }
}
