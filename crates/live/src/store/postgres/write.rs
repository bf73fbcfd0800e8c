//! A batch as a few statements: posts are copied, of everything else the columns of many rows are arrays.

use std::borrow::Cow;
use std::collections::HashMap;

use super::session::{Fields, Session};
use crate::error::Result;
use crate::post::ScoredPost;
use crate::store::{Alert, Batch, Checkpoint, DeadLetter, MAX_DEAD_LETTERS, StoreOptions};
use crate::windows::Window;

/// Rows and bytes of text of one statement: a server takes no message above 1 GB.
const ROWS: usize = 5_000;
const BYTES: usize = 16 << 20;

/// PostgreSQL's texts cannot have U+0000; nothing that comes from outside may make a batch that can never be written.
fn clean(text: &str) -> Cow<'_, str> {
    if text.contains('\0') { text.replace('\0', "\u{fffd}").into() } else { text.into() }
}

fn json(value: &impl serde::Serialize) -> String {
    let text = serde_json::to_string(value).unwrap_or_default();
    if text.contains("\\u0000") { without_zero(&text) } else { text }
}

/// An escaped U+0000 becomes U+FFFD; `\\u0000`, which is a backslash and five more characters, stays.
fn without_zero(text: &str) -> String {
    let (mut out, mut rest) = (String::with_capacity(text.len()), text);
    while let Some(at) = rest.find('\\') {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        let end = match rest.strip_prefix("\\u0000") {
            Some(behind) => {
                out.push('\u{fffd}');
                rest = behind;
                continue;
            }
            None => rest.char_indices().nth(2).map_or(rest.len(), |(end, _)| end),
        };
        out.push_str(&rest[..end]);
        rest = &rest[end..];
    }
    out + rest
}

/// Everything of a batch, inside of a transaction that the caller has begun.
pub(super) fn batch(session: &Session, batch: &Batch, model: i32, options: StoreOptions) -> Result<()> {
    let mut rest: Vec<(&ScoredPost, u64)> = batch.posts.iter().zip(batch.fingerprints.iter().copied()).collect();
    while !rest.is_empty() {
        let (mut count, mut bytes) = (0, 0);
        while count < rest.len().min(ROWS) && bytes < BYTES {
            bytes += rest[count].0.post.text.len();
            count += 1;
        }
        let later = rest.split_off(count);
        posts(session, &rest, batch, model, options.with_text)?;
        rest = later;
    }
    signals(session, batch)?;
    alerts(session, &batch.alerts, options.webhook)?;
    dead_letters(session, &batch.dead_letters)?;
    checkpoint(session, &batch.checkpoint)
}

/// A table that rows are copied into, and the way around those that it has already.
struct Table {
    fields: i16,
    copy: &'static str,
    aside: &'static str,
    copy_aside: &'static str,
    merge: &'static str,
}

/// The statements for a table by its name: literals, because each is prepared once.
macro_rules! table {
    ($name:literal, $fields:literal) => {
        Table {
            fields: $fields,
            copy: concat!("COPY ", $name, " FROM STDIN (FORMAT binary)"),
            aside: concat!(
                "ROLLBACK TO copying; CREATE TEMP TABLE IF NOT EXISTS ",
                $name,
                "_aside (LIKE ",
                $name,
                ") ON COMMIT DELETE ROWS; TRUNCATE ",
                $name,
                "_aside"
            ),
            copy_aside: concat!("COPY ", $name, "_aside FROM STDIN (FORMAT binary)"),
            merge: concat!("INSERT INTO ", $name, " SELECT * FROM ", $name, "_aside ON CONFLICT DO NOTHING"),
        }
    };
}

const POSTS: Table = table!("posts", 22);
const POST_KEYS: Table = table!("post_keys", 3);

/// Adds the rows that are not there. All of them are new unless something is wrong, and COPY takes half the time of an INSERT
/// that looks for conflicts; so that comes second.
fn add<T>(session: &Session, table: &Table, rows: &[T], encode: impl Fn(&T, &mut Fields)) -> Result<()> {
    if rows.is_empty() {
        return Ok(());
    }
    session.execute_all("SAVEPOINT copying")?;
    if session.copy(table.copy, table.fields, rows, &encode)? {
        return session.execute_all("RELEASE copying");
    }
    session.execute_all(table.aside)?;
    session.copy(table.copy_aside, table.fields, rows, &encode)?;
    session.execute(table.merge, &[])?;
    Ok(())
}

fn posts(session: &Session, posts: &[(&ScoredPost, u64)], batch: &Batch, model: i32, with_text: bool) -> Result<()> {
    // In the order of the table's columns.
    add(session, &POSTS, posts, |(p, fingerprint), row| {
        row.put((p.seq as i64).to_be_bytes());
        row.put(p.post.identity().to_le_bytes());
        row.put(model.to_be_bytes());
        row.put(&*clean(&p.post.source));
        row.put(&*clean(&p.post.id));
        row.put(&*clean(&p.post.author));
        row.put(p.post.event_time.to_be_bytes());
        row.put(p.post.received_at.to_be_bytes());
        row.put(p.scored_at.to_be_bytes());
        row.put(batch.available_at.to_be_bytes());
        row.maybe(with_text.then(|| clean(&p.post.text)).as_deref());
        row.maybe(p.post.url.as_deref().map(clean).as_deref());
        row.maybe(p.is_copy_of.as_deref().map(clean).as_deref());
        row.put([p.damped.into()]);
        row.put([p.too_late.into()]);
        row.put(p.weight.to_be_bytes());
        row.put((*fingerprint as i64).to_be_bytes());
        row.put(json(&p.tickers));
        row.put(json(&p.sectors));
        row.put(json(&p.probabilities));
        row.put((p.label as i32).to_be_bytes());
        row.put(p.score.to_be_bytes());
    })?;
    let mut keys: Vec<(i16, Cow<'_, str>, i64)> = Vec::new();
    for (post, _) in posts {
        let tickers = post.tickers.iter().map(|t| (0, &*t.symbol));
        let all = tickers.chain(post.sectors.iter().map(|s| (1, &**s)));
        keys.extend(all.map(|(scope, key)| (scope, clean(key), post.seq as i64)));
    }
    // A post may name a ticker twice; in the order of the index each page of it is visited once.
    keys.sort_unstable();
    keys.dedup();
    add(session, &POST_KEYS, &keys, |(scope, key, seq), row| {
        row.put(scope.to_be_bytes());
        row.put(key.as_bytes());
        row.put(seq.to_be_bytes());
    })
}

fn signals(session: &Session, batch: &Batch) -> Result<()> {
    // An upsert takes each row once: of a window's states the last one.
    let mut last = HashMap::new();
    for (at, s) in batch.signals.iter().enumerate() {
        last.insert((s.window as i16, s.scope as i16, &*s.key, s.start), at);
    }
    let mut bars = HashMap::new();
    for (at, s) in batch.signals.iter().enumerate().filter(|(_, s)| s.revision > 0) {
        bars.insert((s.window as i16, s.scope as i16, &*s.key, s.start, s.revision), at);
    }
    let mut states: Vec<usize> = last.into_values().collect();
    let mut bars: Vec<usize> = bars.into_values().collect();
    states.sort_unstable();
    bars.sort_unstable();
    let days = batch.signals.iter().filter(|s| s.window == Window::D1);
    let names: HashMap<(i16, &str), Option<&str>> =
        days.map(|s| ((s.scope as i16, &*s.key), s.name.as_deref())).collect();
    if !names.is_empty() {
        let scopes: Vec<i16> = names.keys().map(|(scope, _)| *scope).collect();
        let keys: Vec<_> = names.keys().map(|(_, key)| clean(key)).collect();
        let named: Vec<_> = names.values().map(|name| name.map(clean)).collect();
        session.execute(
            "INSERT INTO series SELECT * FROM unnest($1::smallint[], $2::text[], $3::text[]) ON CONFLICT DO NOTHING",
            &[&scopes, &keys, &named],
        )?;
    }
    for (rows, sql) in [
        (
            states,
            "INSERT INTO windows SELECT t.w, t.scope, t.key, t.start, t.revision, $1::bigint, t.data::json FROM \
             unnest($2::smallint[], $3::smallint[], $4::text[], $5::bigint[], $6::integer[], $7::text[]) \
             AS t(w, scope, key, start, revision, data) ON CONFLICT (\"window\", scope, key, start) DO UPDATE SET \
             revision = excluded.revision, available_at = excluded.available_at, data = excluded.data",
        ),
        (
            bars,
            "INSERT INTO bars SELECT t.w, t.scope, t.key, t.start, t.revision, $1::bigint, t.data::json FROM \
             unnest($2::smallint[], $3::smallint[], $4::text[], $5::bigint[], $6::integer[], $7::text[]) \
             AS t(w, scope, key, start, revision, data) ON CONFLICT (\"window\", scope, key, start, revision) DO UPDATE SET \
             available_at = excluded.available_at, data = excluded.data",
        ),
    ] {
        for rows in rows.chunks(ROWS) {
            let of = || rows.iter().map(|at| &batch.signals[*at]);
            let sizes: Vec<i16> = of().map(|s| s.window as i16).collect();
            let scopes: Vec<i16> = of().map(|s| s.scope as i16).collect();
            let keys: Vec<_> = of().map(|s| clean(&s.key)).collect();
            let starts: Vec<i64> = of().map(|s| s.start).collect();
            let revisions: Vec<i32> = of().map(|s| s.revision as i32).collect();
            let data: Vec<String> = of().map(|s| json(&s.values)).collect();
            session.execute(sql, &[&batch.available_at, &sizes, &scopes, &keys, &starts, &revisions, &data])?;
        }
    }
    Ok(())
}

fn alerts(session: &Session, alerts: &[Alert], webhook: bool) -> Result<()> {
    for a in alerts {
        session.execute(
            "INSERT INTO alerts (rule, key, \"window\", start, at, fields, text, delivered) \
             VALUES ($1, $2, $3, $4, $5, $6::text::json, $7, $8) ON CONFLICT DO NOTHING",
            &[
                &clean(&a.rule),
                &clean(&a.key),
                &(a.window as i16),
                &a.start,
                &a.at,
                &json(&a.values),
                &clean(&a.text),
                &!webhook,
            ],
        )?;
    }
    Ok(())
}

fn dead_letters(session: &Session, letters: &[DeadLetter]) -> Result<()> {
    if letters.is_empty() {
        return Ok(());
    }
    let times: Vec<i64> = letters.iter().map(|l| l.at).collect();
    let sources: Vec<_> = letters.iter().map(|l| clean(&l.source)).collect();
    let reasons: Vec<_> = letters.iter().map(|l| clean(&l.reason)).collect();
    let raws: Vec<_> = letters.iter().map(|l| clean(&l.raw)).collect();
    session.execute(
        "INSERT INTO dead_letters (at, source, reason, raw) \
         SELECT * FROM unnest($1::bigint[], $2::text[], $3::text[], $4::text[])",
        &[&times, &sources, &reasons, &raws],
    )?;
    session.execute(
        "DELETE FROM dead_letters WHERE id <= (SELECT max(id) FROM dead_letters) - $1",
        &[&MAX_DEAD_LETTERS],
    )?;
    session.execute(
        "INSERT INTO meta VALUES ('dead_letters', $1) ON CONFLICT (key) DO UPDATE SET value = meta.value + excluded.value",
        &[&(letters.len() as i64)],
    )?;
    Ok(())
}

fn checkpoint(session: &Session, checkpoint: &Checkpoint) -> Result<()> {
    session.execute(
        "INSERT INTO meta VALUES ('seq', $1), ('watermark', $2), ('latest', $3) \
         ON CONFLICT (key) DO UPDATE SET value = excluded.value",
        &[&(checkpoint.seq as i64), &checkpoint.watermark, &checkpoint.latest],
    )?;
    if checkpoint.sources.is_empty() {
        return Ok(());
    }
    let names: Vec<_> = checkpoint.sources.keys().map(|name| clean(name)).collect();
    let cursors: Vec<_> = checkpoint.sources.values().map(|s| s.cursor.as_deref().map(clean)).collect();
    let newest: Vec<_> = checkpoint.sources.values().map(|s| s.newest).collect();
    session.execute(
        "INSERT INTO sources SELECT * FROM unnest($1::text[], $2::text[], $3::bigint[]) \
         ON CONFLICT (name) DO UPDATE SET cursor = excluded.cursor, newest = excluded.newest",
        &[&names, &cursors, &newest],
    )?;
    Ok(())
}

#[cfg(test)]
mod tests {
    #[test]
    fn only_real_zeros_are_replaced() {
        for (given, want) in [
            (
                vec!["a\0b", "\\u0000", "\\\0", "\"\0\"", "\u{1}"],
                vec!["a\u{fffd}b", "\\u0000", "\\\u{fffd}", "\"\u{fffd}\"", "\u{1}"],
            ),
            (vec!["plain"], vec!["plain"]),
        ] {
            let found: Vec<String> = serde_json::from_str(&super::json(&given)).unwrap();
            assert_eq!(found, want);
        }
    }
}
