//! Copies, retweets and bursts: recognised, weighted down, and shown as what they are.
//!
//! A post is a copy if its source says so (a retweet, an edit), or if its text, without links, names, case and spacing, was
//! seen in the 24 hours before. Short texts ("$XYZ up!") repeat by chance: they are copies only of the same author. A post is
//! damped if its author has written [`BURST`] others in the ten minutes before it. All is by event time and in the order of
//! the log, so a restart that observes the stored posts again stands where the process stopped.

use std::collections::{BTreeMap, HashMap, VecDeque};

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
/// Authors and texts of one generation, at most: what comes then is taken for new.
const MAX_ENTRIES: usize = 2_000_000;

/// What was found about a post.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Verdict {
    pub(crate) is_copy_of: Option<String>,
    pub(crate) damped: bool,
    pub(crate) weight: f64,
}

#[derive(Default)]
pub(crate) struct Copies {
    /// By the generation of the first post: fingerprint → (id, time) of the first.
    texts: BTreeMap<i64, HashMap<u64, (String, Millis)>>,
    authors: HashMap<String, VecDeque<Millis>>,
    latest: Millis,
    swept: Millis,
}

impl Copies {
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
        let found = self.first_of(fingerprint, time).map(str::to_owned);
        if found.is_none() {
            let generation = self.texts.entry(time.div_euclid(GENERATION)).or_default();
            if generation.len() < MAX_ENTRIES {
                generation.insert(fingerprint, (id.to_owned(), time));
            }
        }
        let is_copy_of = told.map(str::to_owned).or(found).filter(|original| original != id);
        let damped = self.is_burst(source, author, time);
        let mut weight = 1.0;
        if is_copy_of.is_some() {
            weight *= COPY_WEIGHT;
        }
        if damped {
            weight *= DAMPED_WEIGHT;
        }
        self.latest = self.latest.max(time);
        self.sweep();
        Verdict { is_copy_of, damped, weight }
    }

    fn first_of(&self, fingerprint: u64, time: Millis) -> Option<&str> {
        let generation = time.div_euclid(GENERATION);
        self.texts.range(generation - 2..=generation + 2).find_map(|(_, texts)| {
            let (id, first) = texts.get(&fingerprint)?;
            ((time - first).abs() <= HORIZON).then_some(id.as_str())
        })
    }

    fn is_burst(&mut self, source: &str, author: &str, time: Millis) -> bool {
        let key = format!("{source}\n{author}");
        if !self.authors.contains_key(&key) && self.authors.len() >= MAX_ENTRIES {
            return false;
        }
        let times = self.authors.entry(key).or_default();
        let recent = times.iter().filter(|t| (time - **t).abs() < BURST_TIME).count();
        times.push_back(time);
        if times.len() > BURST {
            times.pop_front();
        }
        recent >= BURST
    }

    /// Forgets what no post can be compared with any more.
    fn sweep(&mut self) {
        if self.latest - self.swept < MINUTE {
            return;
        }
        self.swept = self.latest;
        let oldest = oldest_generation(self.latest);
        self.texts.retain(|generation, _| *generation >= oldest);
        let horizon = self.latest - HORIZON;
        self.authors.retain(|_, times| times.back().is_some_and(|t| *t >= horizon));
    }
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
    u64::from_le_bytes(std::array::from_fn(|i| hash[i]))
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
        let mut copies = Copies::default();
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
        let mut copies = Copies::default();
        see(&mut copies, "1", "ann", "$XYZ up!", 0);
        assert_eq!(see(&mut copies, "2", "bob", "$XYZ up!", 1).is_copy_of, None);
        assert_eq!(see(&mut copies, "3", "ann", "$xyz UP!", 2).is_copy_of.as_deref(), Some("1"));
    }

    #[test]
    fn a_burst_is_damped_and_ends() {
        let mut copies = Copies::default();
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
        let (mut whole, mut verdicts) = (Copies::default(), Vec::new());
        for (i, (text, time)) in stream.iter().enumerate() {
            verdicts.push(see(&mut whole, &i.to_string(), "ann", text, *time));
        }
        for stop in [1, 777, 3_990] {
            let latest = stream[..stop].iter().map(|s| s.1).max().unwrap();
            let mut again = Copies::default();
            for (i, (text, time)) in stream.iter().enumerate() {
                if i < stop && *time < remembered_since(latest) {
                    continue;
                }
                let verdict = see(&mut again, &i.to_string(), "ann", text, *time);
                assert!(i < stop || verdict == verdicts[i], "{i} after a restart at {stop}");
            }
        }
    }
}
