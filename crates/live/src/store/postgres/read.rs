//! Reading: for the API and exports with a connection of its own, and for a restart with the writer's.

use std::collections::HashSet;

use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio_postgres::Row;
use tokio_postgres::types::ToSql;

use super::address::Address;
use super::session::Session;
use super::{MIGRATIONS, check_version, get, version};
use crate::error::{Error, Result};
use crate::post::{Post, ScoredPost};
use crate::scorer::ModelInfo;
use crate::store::{
    Alert, Bar, DeadLetter, MAX_READ, PostFilter, Reader, StoredPost, model_of, scope_of, span_of, stored_signal,
    window_of,
};
use crate::time::{DAY, Millis};
use crate::windows::{Scope, Signal, Window};

type Read<T> = std::result::Result<T, tokio_postgres::Error>;

/// The columns that [`post_of_row`] reads, in its order, of `posts AS p`.
macro_rules! post_columns {
    () => {
        "p.seq, p.source, p.id, p.author, p.event_time, p.received_at, p.text, p.url, p.scored_at, p.available_at, \
         p.tickers::text, p.sectors::text, p.probabilities::text, p.label, p.score, p.weight, p.copy_of, p.damped, \
         p.too_late, p.fingerprint, p.model"
    };
}
const FINGERPRINT: usize = 19;
const MODEL: usize = 20;

fn parsed<T: DeserializeOwned + Default>(row: &Row, column: usize) -> Read<T> {
    Ok(serde_json::from_str(row.try_get(column)?).unwrap_or_default())
}

fn post_of_row(row: &Row) -> Read<(ScoredPost, bool)> {
    let text: Option<String> = row.try_get(6)?;
    let has_text = text.is_some();
    let post = Post {
        source: row.try_get(1)?,
        id: row.try_get(2)?,
        author: row.try_get(3)?,
        event_time: row.try_get(4)?,
        received_at: row.try_get(5)?,
        text: text.unwrap_or_default(),
        url: row.try_get(7)?,
        copy_of: None,
        cursor: None,
    };
    let scored = ScoredPost {
        seq: row.try_get::<_, i64>(0)? as u64,
        post,
        scored_at: row.try_get(8)?,
        available_at: row.try_get(9)?,
        tickers: parsed(row, 10)?,
        sectors: parsed(row, 11)?,
        probabilities: parsed(row, 12)?,
        label: row.try_get::<_, i32>(13)? as usize,
        score: row.try_get(14)?,
        weight: row.try_get(15)?,
        is_copy_of: row.try_get(16)?,
        damped: row.try_get(17)?,
        too_late: row.try_get(18)?,
    };
    Ok((scored, has_text))
}

/// A row of at, rule, key, window, start, fields, text.
fn alert_of_row(row: &Row) -> Read<Alert> {
    Ok(Alert {
        at: row.try_get(0)?,
        rule: row.try_get(1)?,
        key: row.try_get(2)?,
        window: window_of(row.try_get::<_, i16>(3)?.into()),
        start: row.try_get(4)?,
        values: parsed(row, 5)?,
        text: row.try_get(6)?,
    })
}

pub(super) fn known(session: &Session, identities: &[u128], model: i32) -> Result<HashSet<u128>> {
    let bytes: Vec<[u8; 16]> = identities.iter().map(|i| i.to_le_bytes()).collect();
    let bytes: Vec<&[u8]> = bytes.iter().map(|b| &b[..]).collect();
    let sql = "SELECT identity FROM posts WHERE identity = ANY($1) AND model = $2";
    let mut known = HashSet::new();
    for row in session.query(sql, &[&bytes, &model])? {
        let identity: &[u8] = get(session, &row, 0)?;
        known.extend(identity.try_into().map(u128::from_le_bytes));
    }
    Ok(known)
}

pub(super) fn posts_since(
    session: &Session,
    time: Millis,
    model: i32,
    each: &mut dyn FnMut(ScoredPost, u64),
) -> Result<()> {
    let sql = concat!("SELECT ", post_columns!(), " FROM posts p WHERE event_time >= $1 AND model = $2 ORDER BY seq");
    session.stream(sql, &[&time, &model], |row| {
        each(post_of_row(row)?.0, row.try_get::<_, i64>(FINGERPRINT)? as u64);
        Ok(())
    })
}

/// Of each series what its histories need, and its newest window however old that is.
pub(super) fn recent_signals(
    session: &Session,
    window: Window,
    latest: Millis,
    each: &mut dyn FnMut(Signal),
) -> Result<()> {
    let sql = "SELECT s.scope, s.key, s.name, w.start, w.revision, w.data::text FROM series s CROSS JOIN LATERAL \
               (SELECT max(start) AS newest FROM windows WHERE \"window\" = $1 AND scope = s.scope AND key = s.key) n \
               JOIN windows w ON w.\"window\" = $1 AND w.scope = s.scope AND w.key = s.key AND w.start >= least($2, n.newest) \
               ORDER BY s.scope, s.key, w.start";
    let from = latest.saturating_sub(span_of(window));
    session.stream(sql, &[&(window as i16), &from], |row| {
        let scope = scope_of(row.try_get::<_, i16>(0)?.into());
        let series = (scope, row.try_get(1)?, row.try_get(2)?);
        each(stored_signal(series, window, row.try_get(3)?, row.try_get::<_, i32>(4)? as u32, row.try_get(5)?));
        Ok(())
    })
}

/// A connection that only reads.
pub struct PostgresReader(Session);

impl PostgresReader {
    /// # Errors
    /// The server cannot be reached, or has no store.
    pub fn open(address: &Address) -> Result<Self> {
        let session = Session::connect(address)?;
        session.execute_all("SET default_transaction_read_only TO on")?;
        let row = session.query_one("SELECT to_regclass('schema_version')::text", &[])?;
        if get::<Option<String>>(&session, &row, 0)?.is_none() {
            let hint = "hint: cashtag live --store with the same address makes it";
            return Err(Error::Invalid(format!("there is no store in {address}\n  {hint}")));
        }
        check_version(address, version(&session)?, MIGRATIONS)?;
        Ok(Self(session))
    }

    fn rows<T>(
        &self,
        sql: &'static str,
        params: &[&(dyn ToSql + Sync)],
        each: impl Fn(&Row) -> Read<T>,
    ) -> Result<Vec<T>> {
        let rows = self.0.query(sql, params)?;
        rows.iter().map(each).collect::<Read<Vec<T>>>().map_err(|e| self.0.wrong(&e))
    }

    fn number(&self, sql: &'static str) -> Result<u64> {
        Ok(self.rows(sql, &[], |row| row.try_get::<_, i64>(0))?.first().copied().unwrap_or(0) as u64)
    }
}

impl Reader for PostgresReader {
    fn posts(&self, filter: &PostFilter) -> Result<Vec<Value>> {
        let before = filter.before.map_or(i64::MAX, |b| i64::try_from(b).unwrap_or(i64::MAX));
        let limit = filter.limit as i64;
        let show = |row: &Row| -> Read<Value> {
            let (post, has_text) = post_of_row(row)?;
            Ok(post.to_json(&model_of(row.try_get(MODEL + 1)?), has_text))
        };
        let (scope, key) = match (&filter.ticker, &filter.sector) {
            (Some(ticker), _) => (0i16, ticker),
            (None, Some(sector)) => (1, sector),
            (None, None) => {
                let sql = concat!(
                    "SELECT ",
                    post_columns!(),
                    ", m.info::text FROM posts p JOIN models m ON m.id = p.model WHERE p.seq < $1 ORDER BY p.seq DESC LIMIT $2"
                );
                return self.rows(sql, &[&before, &limit], show);
            }
        };
        let sql = concat!(
            "SELECT ",
            post_columns!(),
            ", m.info::text FROM post_keys k JOIN posts p ON p.seq = k.seq JOIN models m ON m.id = p.model \
             WHERE k.scope = $1 AND k.key = $2 AND k.seq < $3 ORDER BY k.seq DESC LIMIT $4"
        );
        // Nothing is stored with U+0000, and the server would refuse the question.
        if key.contains('\0') { Ok(Vec::new()) } else { self.rows(sql, &[&scope, key, &before, &limit], show) }
    }

    fn series(&self) -> Result<Vec<(Scope, String)>> {
        self.rows("SELECT scope, key FROM series ORDER BY scope, key COLLATE \"C\"", &[], |row| {
            Ok((scope_of(row.try_get::<_, i16>(0)?.into()), row.try_get(1)?))
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
        if key.contains('\0') {
            return Ok(Vec::new());
        }
        let number = scope as i16;
        let sql = "SELECT name FROM series WHERE scope = $1 AND key = $2";
        let name = self.rows(sql, &[&number, &key], |row| row.try_get::<_, Option<String>>(0))?.pop().flatten();
        let sql = "SELECT start, revision, data::text FROM windows WHERE \"window\" = $1 AND scope = $2 AND key = $3 \
                   AND start >= $4 AND start <= $5 ORDER BY start DESC LIMIT $6";
        let place: &[&(dyn ToSql + Sync)] = &[&(window as i16), &number, &key, &range.0, &range.1, &(limit as i64)];
        let mut signals = self.rows(sql, place, |row| {
            let revision = row.try_get::<_, i32>(1)? as u32;
            Ok(stored_signal((scope, key, name.as_deref()), window, row.try_get(0)?, revision, row.try_get(2)?))
        })?;
        signals.reverse();
        Ok(signals)
    }

    fn alerts(&self, limit: usize) -> Result<Vec<Value>> {
        let sql = "SELECT at, rule, key, \"window\", start, fields::text, text FROM alerts ORDER BY id DESC LIMIT $1";
        self.rows(sql, &[&(limit as i64)], |row| Ok(alert_of_row(row)?.to_json()))
    }

    fn undelivered(&self, limit: usize) -> Result<Vec<(i64, Alert)>> {
        let sql = "SELECT at, rule, key, \"window\", start, fields::text, text, id FROM alerts WHERE NOT delivered \
                   ORDER BY id LIMIT $1";
        self.rows(sql, &[&(limit as i64)], |row| Ok((row.try_get(7)?, alert_of_row(row)?)))
    }

    fn dead_letters(&self, limit: usize) -> Result<Vec<Value>> {
        let sql = "SELECT at, source, reason, raw FROM dead_letters ORDER BY id DESC LIMIT $1";
        self.rows(sql, &[&(limit as i64)], |row| {
            let letter = DeadLetter {
                at: row.try_get(0)?,
                source: row.try_get(1)?,
                reason: row.try_get(2)?,
                raw: row.try_get(3)?,
            };
            Ok(letter.to_json())
        })
    }

    fn dead_letter_count(&self) -> Result<u64> {
        self.number("SELECT value FROM meta WHERE key = 'dead_letters'")
    }

    fn post_count(&self) -> Result<u64> {
        self.number("SELECT count(*) FROM posts")
    }

    fn known(&self, identities: &[u128], version: &str) -> Result<HashSet<u128>> {
        let models =
            self.rows("SELECT id FROM models WHERE version = $1", &[&version], |row| row.try_get::<_, i32>(0))?;
        models.first().map_or_else(|| Ok(HashSet::new()), |model| known(&self.0, identities, *model))
    }

    fn models(&self) -> Result<Vec<(i64, ModelInfo)>> {
        self.rows("SELECT id, info::text FROM models ORDER BY id", &[], |row| {
            Ok((row.try_get::<_, i32>(0)?.into(), model_of(row.try_get(1)?)))
        })
    }

    fn post_days(&self, since: Millis) -> Result<Vec<Millis>> {
        let (mut days, mut from) = (Vec::new(), since);
        // By the index: from the first moment to the first moment of a later day, and so on.
        let sql = "SELECT min(event_time) FROM posts WHERE event_time >= $1";
        while let Some(first) = self.rows(sql, &[&from], |row| row.try_get::<_, Option<Millis>>(0))?.pop().flatten() {
            let day = Window::D1.start(first);
            days.push(day);
            from = day + DAY;
        }
        Ok(days)
    }

    fn posts_of_day(&self, day: Millis, after: i64, limit: usize) -> Result<Vec<StoredPost>> {
        let sql = concat!(
            "SELECT ",
            post_columns!(),
            " FROM (SELECT *, sum(coalesce(octet_length(text), 0)) OVER (ORDER BY seq) - coalesce(octet_length(text), 0) AS before FROM posts \
             WHERE event_time >= $1 AND event_time < $2 AND seq > $3 ORDER BY seq LIMIT $4) p \
             WHERE before < $5 ORDER BY seq"
        );
        self.rows(sql, &[&day, &(day + DAY), &after, &(limit as i64), &MAX_READ], |row| {
            let (post, has_text) = post_of_row(row)?;
            Ok(StoredPost { model: row.try_get::<_, i32>(MODEL)?.into(), post, has_text })
        })
    }

    fn bar_days(&self, window: Window, since: Millis) -> Result<Vec<Millis>> {
        let sql = "SELECT DISTINCT start - (start % 86400000 + 86400000) % 86400000 AS day FROM bars \
                   WHERE \"window\" = $1 AND start >= $2 ORDER BY day";
        self.rows(sql, &[&(window as i16), &since], |row| row.try_get(0))
    }

    fn bars_of_day(&self, window: Window, day: Millis, after: Option<&Bar>, limit: usize) -> Result<Vec<Bar>> {
        let (scope, key, start, revision) =
            after.map_or((-1, "", Millis::MIN, 0), |b| (b.scope as i16, &*b.key, b.start, b.revision as i32));
        let sql = "SELECT scope, key, start, revision, available_at, data::text FROM bars WHERE \"window\" = $1 \
                   AND start >= $2 AND start < $3 AND (scope, key, start, revision) > ($4, $5, $6, $7) \
                   ORDER BY scope, key, start, revision LIMIT $8";
        let end = day + DAY;
        let place: &[&(dyn ToSql + Sync)] =
            &[&(window as i16), &day, &end, &scope, &key, &start, &revision, &(limit as i64)];
        self.rows(sql, place, |row| {
            Ok(Bar {
                scope: scope_of(row.try_get::<_, i16>(0)?.into()),
                key: row.try_get(1)?,
                start: row.try_get(2)?,
                revision: row.try_get::<_, i32>(3)? as u32,
                available_at: row.try_get(4)?,
                values: parsed(row, 5)?,
            })
        })
    }
}
