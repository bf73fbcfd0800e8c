//! A batch as a few statements, each with the columns of many rows as arrays.

use std::borrow::Cow;
use std::collections::HashMap;

use super::session::Session;
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

fn posts(session: &Session, posts: &[(&ScoredPost, u64)], batch: &Batch, model: i32, with_text: bool) -> Result<()> {
    fn column<'a, T>(posts: &[(&'a ScoredPost, u64)], of: impl Fn(&'a ScoredPost) -> T) -> Vec<T> {
        posts.iter().map(|(p, _)| of(p)).collect()
    }
    let seqs = column(posts, |p| p.seq as i64);
    let identities: Vec<[u8; 16]> = column(posts, |p| p.post.identity().to_le_bytes());
    let identities: Vec<&[u8]> = identities.iter().map(|i| &i[..]).collect();
    let sources = column(posts, |p| clean(&p.post.source));
    let ids = column(posts, |p| clean(&p.post.id));
    let authors = column(posts, |p| clean(&p.post.author));
    let event_times = column(posts, |p| p.post.event_time);
    let received = column(posts, |p| p.post.received_at);
    let scored = column(posts, |p| p.scored_at);
    let texts = column(posts, |p| with_text.then(|| clean(&p.post.text)));
    let urls = column(posts, |p| p.post.url.as_deref().map(clean));
    let copies = column(posts, |p| p.is_copy_of.as_deref().map(clean));
    let damped = column(posts, |p| p.damped);
    let too_late = column(posts, |p| p.too_late);
    let weights = column(posts, |p| p.weight);
    let fingerprints: Vec<i64> = posts.iter().map(|(_, f)| *f as i64).collect();
    let tickers = column(posts, |p| json(&p.tickers));
    let sectors = column(posts, |p| json(&p.sectors));
    let probabilities = column(posts, |p| json(&p.probabilities));
    let labels = column(posts, |p| p.label as i32);
    let scores = column(posts, |p| p.score);
    session.execute(
        "INSERT INTO posts SELECT t.seq, t.identity, $1::integer, t.source, t.id, t.author, t.event_time, t.received_at, \
         t.scored_at, $2::bigint, t.text, t.url, t.copy_of, t.damped, t.too_late, t.weight, t.fingerprint, \
         t.tickers::json, t.sectors::json, t.probabilities::json, t.label, t.score \
         FROM unnest($3::bigint[], $4::bytea[], $5::text[], $6::text[], $7::text[], $8::bigint[], $9::bigint[], \
         $10::bigint[], $11::text[], $12::text[], $13::text[], $14::boolean[], $15::boolean[], \
         $16::double precision[], $17::bigint[], $18::text[], $19::text[], $20::text[], $21::integer[], \
         $22::double precision[]) AS t(seq, identity, source, id, author, event_time, received_at, scored_at, text, url, \
         copy_of, damped, too_late, weight, fingerprint, tickers, sectors, probabilities, label, score) \
         ON CONFLICT DO NOTHING",
        &[
            &model,
            &batch.available_at,
            &seqs,
            &identities,
            &sources,
            &ids,
            &authors,
            &event_times,
            &received,
            &scored,
            &texts,
            &urls,
            &copies,
            &damped,
            &too_late,
            &weights,
            &fingerprints,
            &tickers,
            &sectors,
            &probabilities,
            &labels,
            &scores,
        ],
    )?;
    let (mut scopes, mut keys, mut of) = (Vec::new(), Vec::new(), Vec::new());
    for (post, _) in posts {
        let tickers = post.tickers.iter().map(|t| (0i16, &*t.symbol));
        for (scope, key) in tickers.chain(post.sectors.iter().map(|s| (1i16, &**s))) {
            scopes.push(scope);
            keys.push(clean(key));
            of.push(post.seq as i64);
        }
    }
    if !keys.is_empty() {
        session.execute(
            "INSERT INTO post_keys SELECT * FROM unnest($1::smallint[], $2::text[], $3::bigint[]) ON CONFLICT DO NOTHING",
            &[&scopes, &keys, &of],
        )?;
    }
    Ok(())
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
