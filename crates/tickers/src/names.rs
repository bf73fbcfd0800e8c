//! Company names in a text: one automaton for all of them, and the rules that keep words from being companies.
//!
//! A form (a name, a name without its legal ending, an alias) is matched as whole words. It is matched regardless of
//! case, unless all of its words are short (up to four letters) or ordinary ones (`common_words.txt`): then it is matched
//! exactly as the symbols file writes it. A *name* that is one such word alone is not searched for at all; give it as an
//! alias to have it. So "apple pie" and "gap up" are no companies, "Apple" is one where the file has that alias.

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::sync::OnceLock;

use aho_corasick::{AhoCorasick, MatchKind};

use crate::chars::is_word;
use crate::links::Links;
use crate::symbols::Symbols;

/// Endings that say what kind of company it is; `Apple Inc.` is also `Apple`.
const LEGAL: &[&str] = &[
    "inc",
    "incorporated",
    "corp",
    "corporation",
    "co",
    "company",
    "companies",
    "plc",
    "p.l.c",
    "ltd",
    "limited",
    "llc",
    "lp",
    "l.p",
    "ag",
    "se",
    "sa",
    "s.a",
    "nv",
    "n.v",
    "sa/nv",
    "a/s",
    "group",
    "holding",
    "holdings",
    "trust",
    "& co",
    "class a",
    "class b",
    "class c",
    "n.a",
    "and company",
    "& company",
];

/// Words of up to this many letters are short.
const SHORT: usize = 4;

/// A name as it stands in a text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Found {
    /// The place of its company in the symbols file.
    pub(crate) company: usize,
    pub(crate) bytes: Range<usize>,
}

#[derive(Debug, Clone)]
struct Form {
    text: String,
    company: usize,
    exact: bool,
}

#[derive(Debug, Clone)]
pub(crate) struct Names {
    automaton: Option<AhoCorasick>,
    forms: Vec<Form>,
}

impl Names {
    /// `None` from the automaton's builder (too many patterns for its state numbers) leaves nothing to be found; the
    /// limits on a symbols file are far below that.
    pub(crate) fn new(symbols: &Symbols) -> Self {
        let forms = forms(symbols);
        let automaton = AhoCorasick::builder()
            .ascii_case_insensitive(true)
            .match_kind(MatchKind::Standard)
            .build(forms.iter().map(|form| &form.text))
            .ok();
        Self { automaton, forms }
    }

    /// Names in order, the longest where several begin together, none inside of another.
    pub(crate) fn find(&self, text: &str, links: &Links) -> Vec<Found> {
        let Some(automaton) = &self.automaton else { return Vec::new() };
        let mut found: Vec<(Range<usize>, usize)> = automaton
            .find_overlapping_iter(text)
            .filter(|hit| {
                let form = &self.forms[hit.pattern().as_usize()];
                is_whole(text, hit.range())
                    && (!form.exact || text[hit.range()] == form.text)
                    && !links.contains(hit.start())
            })
            .map(|hit| (hit.range(), hit.pattern().as_usize()))
            .collect();
        found.sort_by_key(|(range, pattern)| (range.start, std::cmp::Reverse(range.end), *pattern));
        let mut end = 0;
        found.retain(|(range, _)| {
            let free = range.start >= end;
            if free {
                end = range.end;
            }
            free
        });
        found.into_iter().map(|(bytes, pattern)| Found { company: self.forms[pattern].company, bytes }).collect()
    }
}

/// Whole words, and neither a user name (`@Tesla`), a cashtag, nor a host (`tesla.com`).
fn is_whole(text: &str, bytes: Range<usize>) -> bool {
    let before = text[..bytes.start].chars().next_back();
    let mut rest = text[bytes.end..].chars();
    let after = rest.next();
    let dotted = after == Some('.') && rest.next().is_some_and(|c| c.is_ascii_lowercase());
    !before.is_some_and(|c| is_word(c) || matches!(c, '@' | '$')) && !after.is_some_and(is_word) && !dotted
}

/// Every form of every company; where two companies share one, the earlier line has it.
fn forms(symbols: &Symbols) -> Vec<Form> {
    let mut seen: HashMap<(String, bool), ()> = HashMap::new();
    let mut forms = Vec::new();
    for (place, company) in symbols.iter().enumerate() {
        let stem = without_legal_ending(&company.name);
        let names = [company.name.as_str(), stem].into_iter().map(|name| (name, false));
        let aliases = company.aliases.iter().map(|alias| (alias.as_str(), true));
        for (text, is_alias) in names.chain(aliases) {
            let ordinary = words(text).all(is_ordinary);
            if !is_alias && ordinary && words(text).count() < 2 {
                continue;
            }
            for text in spellings(text) {
                if seen.insert((if ordinary { text.clone() } else { text.to_lowercase() }, ordinary), ()).is_none() {
                    forms.push(Form { text, company: place, exact: ordinary });
                }
            }
        }
    }
    forms
}

fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty())
}

fn is_ordinary(word: &str) -> bool {
    static COMMON: OnceLock<HashSet<&'static str>> = OnceLock::new();
    let common = COMMON.get_or_init(|| {
        let lines = include_str!("common_words.txt").lines().filter(|line| !line.starts_with('#'));
        lines.flat_map(str::split_whitespace).collect()
    });
    word.chars().count() <= SHORT || common.contains(word.to_lowercase().as_str())
}

/// `Palo Alto Networks, Inc.` → `Palo Alto Networks`.
fn without_legal_ending(name: &str) -> &str {
    let mut rest = name;
    loop {
        let trimmed = rest.trim_end_matches([' ', ',', '.', '&']);
        let ending = LEGAL.iter().find(|ending| {
            trimmed.len().checked_sub(ending.len()).is_some_and(|at| {
                trimmed.get(at..).is_some_and(|tail| tail.eq_ignore_ascii_case(ending))
                    && trimmed[..at].ends_with([' ', ','])
            })
        });
        match ending {
            Some(ending) => rest = &trimmed[..trimmed.len() - ending.len()],
            None => {
                let stem = if rest.len() == name.len() { name } else { trimmed };
                return stem.strip_prefix("The ").unwrap_or(stem);
            }
        }
    }
}

/// `Macy's` is also written `Macy’s` and `Macys`; `Procter & Gamble` also with `and`.
fn spellings(form: &str) -> Vec<String> {
    let mut spellings = vec![form.to_string()];
    if form.contains('\'') {
        spellings.push(form.replace('\'', "’"));
        spellings.push(form.replace('\'', ""));
    }
    if form.contains(" & ") {
        spellings.push(form.replace(" & ", " and "));
    }
    // A pattern of nothing would match everywhere.
    spellings.retain(|spelling| words(spelling).next().is_some());
    spellings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn legal_endings() {
        for (name, stem) in [
            ("Apple Inc.", "Apple"),
            ("Palo Alto Networks, Inc.", "Palo Alto Networks"),
            ("The TJX Companies, Inc.", "TJX"),
            ("Deere & Company", "Deere"),
            ("Carnival Corporation & plc", "Carnival"),
            ("Anheuser-Busch InBev SA/NV", "Anheuser-Busch InBev"),
            ("Inc.", "Inc."),
            ("Costco", "Costco"),
            ("", ""),
        ] {
            assert_eq!(without_legal_ending(name), stem, "{name:?}");
        }
    }

    #[test]
    fn ordinary_words() {
        assert!(["gap", "Target", "AMD", "Meta"].into_iter().all(is_ordinary));
        assert!(!["Nvidia", "Walmart", "Nestlé"].into_iter().any(is_ordinary));
    }
}
