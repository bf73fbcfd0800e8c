//! What is in a set of examples: counts, lengths, words that give a label away; and finding examples in it.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;

use serde::Serialize;

use crate::clean::normalised_key;
use crate::example::{Example, LABELS, label_index};

/// Counts and lengths, gathered one example at a time in constant memory.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Stats {
    pub rows: u64,
    pub labels: BTreeMap<String, u64>,
    /// kind → label → rows; examples without a kind count as `plain`.
    pub kinds: BTreeMap<String, BTreeMap<String, u64>>,
    pub registers: BTreeMap<String, u64>,
    pub sectors: BTreeMap<String, u64>,
    pub events: BTreeMap<String, u64>,
    pub characters: Lengths,
    pub words: Lengths,
}

/// A histogram of lengths, exact up to 1,023.
#[derive(Clone, Debug, Default)]
pub struct Lengths {
    counts: Vec<u64>,
    total: u64,
    sum: u64,
    longest: u64,
}

/// Different values of a field that are counted; further ones count as "(other)".
const MAX_VALUES: usize = 1_000;

impl Stats {
    pub fn of(examples: &[Example]) -> Self {
        let mut stats = Self::default();
        examples.iter().for_each(|example| stats.add(example));
        stats
    }

    pub fn add(&mut self, example: &Example) {
        self.rows += 1;
        count(&mut self.labels, &example.label);
        if self.kinds.len() < MAX_VALUES || self.kinds.contains_key(example.kind_or_plain()) {
            count(self.kinds.entry(example.kind_or_plain().to_owned()).or_default(), &example.label);
        }
        for (counts, value) in [
            (&mut self.registers, &example.register),
            (&mut self.sectors, &example.sector),
            (&mut self.events, &example.event),
        ] {
            if let Some(value) = value {
                count(counts, value);
            }
        }
        self.characters.add(example.text.chars().count());
        self.words.add(example.text.split_whitespace().count());
    }
}

fn count(counts: &mut BTreeMap<String, u64>, value: &str) {
    if let Some(count) = counts.get_mut(value) {
        *count += 1;
    } else {
        let value = if counts.len() < MAX_VALUES { value } else { "(other)" };
        *counts.entry(value.to_owned()).or_default() += 1;
    }
}

impl Lengths {
    fn add(&mut self, length: usize) {
        let slot = length.min(1_023);
        if self.counts.len() <= slot {
            self.counts.resize(slot + 1, 0);
        }
        self.counts[slot] += 1;
        self.total += 1;
        self.sum += length as u64;
        self.longest = self.longest.max(length as u64);
    }

    pub fn mean(&self) -> f64 {
        if self.total == 0 { 0.0 } else { self.sum as f64 / self.total as f64 }
    }

    /// The length that a share of the texts does not exceed.
    pub fn quantile(&self, share: f64) -> u64 {
        let wanted = (self.total as f64 * share).ceil().max(1.0) as u64;
        let mut seen = 0;
        for (length, count) in self.counts.iter().enumerate() {
            seen += count;
            if seen >= wanted {
                return if length == 1_023 { self.longest } else { length as u64 };
            }
        }
        self.longest
    }

    pub fn longest(&self) -> u64 {
        self.longest
    }
}

impl Serialize for Lengths {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        use serde::ser::SerializeMap as _;
        let mut map = serializer.serialize_map(Some(4))?;
        map.serialize_entry("mean", &((self.mean() * 10.0).round() / 10.0))?;
        map.serialize_entry("median", &self.quantile(0.5))?;
        map.serialize_entry("p95", &self.quantile(0.95))?;
        map.serialize_entry("longest", &self.longest)?;
        map.end()
    }
}

impl fmt::Display for Lengths {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "mean {:.1}, median {}, 95 % up to {}, longest {}",
            self.mean(),
            self.quantile(0.5),
            self.quantile(0.95),
            self.longest
        )
    }
}

/// The tables of `cashtag corpus stats`, plain text.
impl fmt::Display for Stats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} examples", self.rows)?;
        writeln!(f, "characters: {}\nwords: {}\n", self.characters, self.words)?;
        let others: Vec<&String> = self.labels.keys().filter(|label| label_index(label).is_none()).collect();
        let columns: Vec<&str> = LABELS.into_iter().chain(others.iter().map(|label| label.as_str())).collect();
        write!(f, "{:<14}", "kind")?;
        for label in &columns {
            write!(f, "{:>10}", if label.is_empty() { "(none)" } else { label })?;
        }
        writeln!(f, "{:>10}", "all")?;
        for (kind, labels) in &self.kinds {
            write!(f, "{kind:<14}")?;
            for label in &columns {
                write!(f, "{:>10}", labels.get(*label).copied().unwrap_or(0))?;
            }
            writeln!(f, "{:>10}", labels.values().sum::<u64>())?;
        }
        write!(f, "{:<14}", "all")?;
        for label in &columns {
            write!(f, "{:>10}", self.labels.get(*label).copied().unwrap_or(0))?;
        }
        writeln!(f, "{:>10}", self.rows)?;
        for (title, counts) in [("register", &self.registers), ("sector", &self.sectors), ("event", &self.events)] {
            if !counts.is_empty() {
                let mut counts: Vec<_> = counts.iter().collect();
                counts.sort_by(|a, b| b.1.cmp(a.1).then(a.0.cmp(b.0)));
                let shown: Vec<String> = counts.iter().map(|(value, count)| format!("{value} {count}")).collect();
                writeln!(f, "\n{title}: {}", shown.join(", "))?;
            }
        }
        Ok(())
    }
}

/// A word whose occurrences stand almost all under one label.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct GiveAway {
    pub word: String,
    /// Texts that contain the word.
    pub texts: usize,
    pub label: String,
    /// Share of those texts that carry `label`.
    pub share: f64,
}

/// Words that occur in at least `min_texts` texts, more than `share` of them under one label; the most frequent first.
pub fn give_away_words(examples: &[Example], min_texts: usize, share: f64) -> Vec<GiveAway> {
    let mut counts: HashMap<String, [usize; LABELS.len()]> = HashMap::new();
    for example in examples {
        let Some(label) = label_index(&example.label) else { continue };
        let key = normalised_key(&example.text);
        for word in key.split(' ').filter(|word| !word.is_empty()).collect::<HashSet<_>>() {
            counts.entry(word.to_owned()).or_default()[label] += 1;
        }
    }
    let mut found: Vec<GiveAway> = counts
        .into_iter()
        .filter_map(|(word, counts)| {
            let texts: usize = counts.iter().sum();
            let (label, most) = counts.iter().enumerate().max_by_key(|(_, count)| **count)?;
            let most_share = *most as f64 / texts as f64;
            let gives_away = texts >= min_texts && most_share > share;
            gives_away.then(|| GiveAway { word, texts, label: LABELS[label].to_owned(), share: most_share })
        })
        .collect();
    found.sort_by(|a, b| b.texts.cmp(&a.texts).then(a.word.cmp(&b.word)));
    found
}

/// What [`search`] looks for: everything that is given must hold.
#[derive(Clone, Debug, Default)]
pub struct Query {
    /// Words that must all occur in the text, in any order and case.
    pub words: Vec<String>,
    pub label: Option<String>,
    pub kind: Option<String>,
    pub register: Option<String>,
    pub sector: Option<String>,
    pub event: Option<String>,
}

/// The examples that fit `query`, in their order.
pub fn search<'a>(examples: &'a [Example], query: &Query) -> Vec<&'a Example> {
    let words: Vec<String> = query.words.iter().map(|word| word.to_lowercase()).collect();
    let same = |wanted: &Option<String>, found: &str| {
        wanted.as_deref().is_none_or(|wanted| wanted.eq_ignore_ascii_case(found))
    };
    examples
        .iter()
        .filter(|example| {
            same(&query.label, &example.label)
                && same(&query.kind, example.kind_or_plain())
                && same(&query.register, example.register.as_deref().unwrap_or_default())
                && same(&query.sector, example.sector.as_deref().unwrap_or_default())
                && same(&query.event, example.event.as_deref().unwrap_or_default())
        })
        .filter(|example| {
            let text = example.text.to_lowercase();
            words.iter().all(|word| text.contains(word))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set() -> Vec<Example> {
        let mut examples = vec![
            Example::new("up up up", "Positive"),
            Example::new("up we go", "Positive"),
            Example::new("Up? no", "Negative"),
            Example::new("flat line", "Neutral"),
        ];
        examples[3].kind = Some("mixed".into());
        examples[3].sector = Some("energy".into());
        examples
    }

    #[test]
    fn the_table() {
        let expected = "\
4 examples
characters: mean 7.8, median 8, 95 % up to 9, longest 9
words: mean 2.5, median 2, 95 % up to 3, longest 3

kind            Positive   Neutral  Negative       all
mixed                  0         1         0         1
plain                  2         0         1         3
all                    2         1         1         4

sector: energy 1
";
        assert_eq!(Stats::of(&set()).to_string(), expected);
    }

    #[test]
    fn give_away_counts_texts_not_words() {
        let found = give_away_words(&set(), 3, 0.6);
        assert_eq!(found.len(), 1);
        assert_eq!((found[0].word.as_str(), found[0].texts, found[0].label.as_str()), ("up", 3, "Positive"));
        assert!((found[0].share - 2.0 / 3.0).abs() < 1e-9);
        assert!(give_away_words(&set(), 3, 0.7).is_empty());
    }

    #[test]
    fn search_needs_every_word() {
        let set = set();
        let query =
            |words: &[&str]| Query { words: words.iter().map(|w| (*w).to_owned()).collect(), ..Query::default() };
        assert_eq!(search(&set, &query(&["UP", "go"])).len(), 1);
        assert_eq!(search(&set, &Query { kind: Some("plain".into()), ..query(&["up"]) }).len(), 3);
        assert_eq!(search(&set, &Query { sector: Some("Energy".into()), ..query(&[]) })[0].text, "flat line");
        assert_eq!(search(&set, &query(&[])).len(), 4);
    }
}
