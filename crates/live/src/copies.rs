//! Copies, retweets and bursts: recognised, weighted down, and shown as what they are.
//!
//! A post is a copy if its source says so (a retweet, an edit), or if its text, without links, names, case and spacing, was
//! seen in the 24 hours before. Short texts ("$XYZ up!") repeat by chance: they are copies only of the same author. A post is
//! damped if its author has written [`BURST`] others in the ten minutes before it. All is by event time and in the order of
//! the log, so a restart that observes the stored posts again stands where the process stopped.

use crate::id::Id;
use crate::post::{Post, digest};
use crate::time::{HOUR, MINUTE, Millis};

/// How long a text is remembered.
pub(crate) const HORIZON: Millis = 24 * HOUR;
const GENERATION: Millis = 12 * HOUR;
/// Posts of one author in [`BURST_TIME`] that count in full.
pub(crate) const BURST: usize = 5;
const BURST_TIME: Millis = 10 * MINUTE;
/// What a copy, and what one of a burst, counts for.
pub(crate) const COPY_WEIGHT: f64 = 0.2;
pub(crate) const DAMPED_WEIGHT: f64 = 0.2;
/// Texts with fewer characters are copies only of their own author's.
const SHORT: usize = 40;
/// Places where one text, or one author, may be kept. Of those that share them the oldest goes first.
const WAYS: usize = 8;
/// So many texts for the place of one author: bursts are minutes long, copies come a day later.
const TEXTS_PER_AUTHOR: usize = 8;

/// What was found about a post.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Verdict {
    pub(crate) is_copy_of: Option<String>,
    pub(crate) damped: bool,
    pub(crate) weight: f64,
}

/// The first post with a text.
#[derive(Clone)]
struct First {
    fingerprint: u64,
    time: Millis,
    id: Id,
}

/// The newest posts of an author, in the order of the log.
#[derive(Clone)]
struct Author {
    key: u64,
    times: [Millis; BURST],
}

const NEVER: Millis = Millis::MIN;

/// Its memory is taken at the start and never grows: what has no place any more is taken for new.
pub(crate) struct Copies {
    texts: Vec<First>,
    authors: Vec<Author>,
    latest: Millis,
}

impl Copies {
    /// Remembers about so many texts.
    pub(crate) fn new(texts: usize) -> Self {
        let texts = texts.max(TEXTS_PER_AUTHOR).next_multiple_of(WAYS);
        let authors = (texts / TEXTS_PER_AUTHOR).next_multiple_of(WAYS);
        Self {
            texts: vec![First { fingerprint: 0, time: NEVER, id: Id::Number(0) }; texts],
            authors: vec![Author { key: 0, times: [NEVER; BURST] }; authors],
            latest: NEVER,
        }
    }

    /// Judges a post and remembers it. `fingerprint` is [`fingerprint`] of it.
    pub(crate) fn observe(
        &mut self,
        fingerprint: u64,
        source: &str,
        id: &str,
        author: &str,
        told: Option<&str>,
        time: Millis,
    ) -> Verdict {
        self.latest = self.latest.max(time);
        let found = self.first_of(fingerprint, id, time);
        let is_copy_of = told.map(str::to_owned).or(found).filter(|original| original != id);
        let damped = self.is_burst(source, author, time);
        let mut weight = 1.0;
        if is_copy_of.is_some() {
            weight *= COPY_WEIGHT;
        }
        if damped {
            weight *= DAMPED_WEIGHT;
        }
        Verdict { is_copy_of, damped, weight }
    }

    /// The first post with this text; this one, if there is none.
    fn first_of(&mut self, fingerprint: u64, id: &str, time: Millis) -> Option<String> {
        // What a restart would not observe again counts no longer.
        let since = remembered_since(self.latest);
        let places = places(&mut self.texts, fingerprint);
        let same = |f: &&First| {
            f.fingerprint == fingerprint && f.time >= since && f.time.abs_diff(time) <= HORIZON.unsigned_abs()
        };
        if let Some(first) = places.iter().filter(same).min_by_key(|f| f.time) {
            return Some(first.id.to_string());
        }
        if let Some(oldest) = places.iter_mut().min_by_key(|f| f.time) {
            *oldest = First { fingerprint, time, id: Id::from(id) };
        }
        None
    }

    fn is_burst(&mut self, source: &str, author: &str, time: Millis) -> bool {
        let key = number(digest(&[source.as_bytes(), author.as_bytes()]));
        let places = places(&mut self.authors, key);
        let newest = |a: &Author| a.times.into_iter().max();
        let known = places.iter().position(|a| a.key == key);
        let at = known.or_else(|| (0..places.len()).min_by_key(|i| newest(&places[*i])));
        let Some(place) = at.and_then(|at| places.get_mut(at)) else { return false };
        if place.key != key {
            *place = Author { key, times: [NEVER; BURST] };
        }
        let recent = place.times.iter().filter(|t| t.abs_diff(time) < BURST_TIME.unsigned_abs()).count();
        place.times.rotate_left(1);
        place.times[BURST - 1] = time;
        recent >= BURST
    }
}

/// Where something may be.
fn places<T>(all: &mut [T], key: u64) -> &mut [T] {
    let groups = (all.len() / WAYS).max(1) as u64;
    let from = (key % groups) as usize * WAYS;
    &mut all[from..from + WAYS]
}

fn number(hash: [u8; 32]) -> u64 {
    u64::from_le_bytes(std::array::from_fn(|i| hash[i]))
}

fn oldest_generation(latest: Millis) -> i64 {
    latest.div_euclid(GENERATION) - 3
}

/// Posts from this time on are what a restart must observe again.
pub(crate) fn remembered_since(latest: Millis) -> Millis {
    oldest_generation(latest) * GENERATION
}

/// What copies of a text have in common.
pub(crate) fn fingerprint(post: &Post) -> u64 {
    let text = normalised(&post.text);
    let hash = if text.chars().count() < SHORT {
        digest(&[post.source.as_bytes(), post.author.as_bytes(), text.as_bytes()])
    } else {
        digest(&[text.as_bytes()])
    };
    number(hash)
}

/// Lower case, single spaces, without `RT @name:`, links and names.
fn normalised(text: &str) -> String {
    let text = text.trim_start();
    let text = match text.strip_prefix("RT @") {
        Some(rest) => rest.split_once(':').map_or(rest, |(_, rest)| rest),
        None => text,
    };
    let mut out = String::with_capacity(text.len());
    for word in text.split_whitespace() {
        if word.starts_with("http://") || word.starts_with("https://") || (word.starts_with('@') && word.len() > 1) {
            continue;
        }
        if !out.is_empty() {
            out.push(' ');
        }
        out.extend(word.chars().flat_map(char::to_lowercase));
    }
    // A cut-off retweet ends with an ellipsis.
    out.trim_end_matches(['…', '.']).trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: &str = "$XYZ beats on revenue and raises its guidance for the whole year";

    fn post(id: &str, author: &str, text: &str) -> Post {
        let (source, id, author, text) = ("s".into(), id.into(), author.into(), text.into());
        Post { source, id, author, text, event_time: 0, received_at: 0, url: None, copy_of: None, cursor: None }
    }

    fn see(copies: &mut Copies, id: &str, author: &str, text: &str, time: Millis) -> Verdict {
        copies.observe(fingerprint(&post(id, author, text)), "s", id, author, None, time)
    }

    #[test]
    fn copies_whatever_was_changed_around_the_words() {
        let mut copies = Copies::new(10_000);
        assert_eq!(see(&mut copies, "1", "ann", LONG, 0), Verdict { is_copy_of: None, damped: false, weight: 1.0 });
        for (id, text) in [
            ("2", format!("RT @ann: {LONG}")),
            ("3", format!("  {}…", LONG.to_uppercase().replace(' ', "  "))),
            ("4", format!("@bob @eve {LONG} https://t.co/abc")),
        ] {
            let verdict = see(&mut copies, id, "bob", &text, HOUR);
            assert_eq!((verdict.is_copy_of.as_deref(), verdict.weight), (Some("1"), COPY_WEIGHT), "{text}");
        }
        assert_eq!(
            see(&mut copies, "5", "bob", "$XYZ misses on revenue and cuts its guidance for the year", HOUR).weight,
            1.0
        );
        assert_eq!(see(&mut copies, "6", "eve", LONG, HORIZON + 1).is_copy_of, None, "a day later it is said anew");
    }

    #[test]
    fn short_texts_repeat_by_chance() {
        let mut copies = Copies::new(10_000);
        see(&mut copies, "1", "ann", "$XYZ up!", 0);
        assert_eq!(see(&mut copies, "2", "bob", "$XYZ up!", 1).is_copy_of, None);
        assert_eq!(see(&mut copies, "3", "ann", "$xyz UP!", 2).is_copy_of.as_deref(), Some("1"));
    }

    #[test]
    fn a_burst_is_damped_and_ends() {
        let mut copies = Copies::new(10_000);
        let verdicts: Vec<bool> =
            (0..8).map(|i| see(&mut copies, &i.to_string(), "ann", &format!("{LONG} {i}"), i * 1000).damped).collect();
        assert_eq!(verdicts, [false, false, false, false, false, true, true, true]);
        assert!(!see(&mut copies, "x", "ann", &format!("{LONG} later"), HOUR).damped);
        assert!(!see(&mut copies, "y", "bob", &format!("{LONG} other"), 7_500).damped);
    }

    #[test]
    fn observing_the_stored_posts_again_gives_the_same_state() {
        let stream: Vec<(String, Millis)> = (0..4_000)
            .map(|i| (format!("{LONG} {}", i * 7919 % 300), i * 97 * MINUTE + (i * 31 % 11 - 5) * MINUTE))
            .collect();
        let (mut whole, mut verdicts) = (Copies::new(10_000), Vec::new());
        for (i, (text, time)) in stream.iter().enumerate() {
            verdicts.push(see(&mut whole, &i.to_string(), "ann", text, *time));
        }
        for stop in [1, 777, 3_990] {
            let latest = stream[..stop].iter().map(|s| s.1).max().unwrap();
            let mut again = Copies::new(10_000);
            for (i, (text, time)) in stream.iter().enumerate() {
                if i < stop && *time < remembered_since(latest) {
                    continue;
                }
                let verdict = see(&mut again, &i.to_string(), "ann", text, *time);
                assert!(i < stop || verdict == verdicts[i], "{i} after a restart at {stop}");
            }
        }
    }

    #[test]
    fn memory_is_what_it_was_at_the_start_and_the_newest_texts_are_in_it() {
        let mut copies = Copies::new(8_000);
        let bytes = |c: &Copies| (c.texts.capacity() * size_of::<First>(), c.authors.capacity() * size_of::<Author>());
        assert_eq!(bytes(&copies), (8_000 * 32, 1_000 * 48));
        let text = |i: i64| format!("{LONG} {i}");
        for i in 0..50_000 {
            see(&mut copies, &i.to_string(), &format!("author {i}"), &text(i), i * 100);
        }
        assert_eq!(bytes(&copies), (8_000 * 32, 1_000 * 48));
        let found = |copies: &mut Copies, range: std::ops::Range<i64>| {
            range.filter(|i| see(copies, "x", "bob", &text(*i), 5_000_000).is_copy_of.is_some()).count()
        };
        // A text is gone when eight newer ones share its places.
        let (near, far) = (found(&mut copies, 48_000..50_000), found(&mut copies, 0..2_000));
        assert!(near > 1_980 && far < 20, "{near} of the newest, {far} of the oldest");
    }
}
