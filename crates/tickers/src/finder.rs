//! Both kinds of mention in one pass over a text, with symbols and offsets.

use std::ops::Range;

use crate::cashtag::{Boundary, scan};
use crate::chars::is_word;
use crate::links::Links;
use crate::names::Names;
use crate::symbol::normalise;
use crate::symbols::Symbols;

/// How a mention is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    Cashtag,
    Name,
}

/// A stock, fund, index, coin or future that a text speaks of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mention {
    /// In its normal form, without `$`.
    pub symbol: String,
    pub source: Source,
    /// Where it begins, in Unicode code points from the text's beginning: X's `start`. A cashtag begins with its `$`.
    pub start: usize,
    /// Behind its last code point: X's `end`.
    pub end: usize,
    /// The same in bytes.
    pub bytes: Range<usize>,
}

/// Finds mentions. Built once, used for every text, from any thread.
#[derive(Debug, Clone)]
pub struct Finder {
    symbols: Symbols,
    names: Option<Names>,
    boundary: Boundary,
    known_only: bool,
}

impl Finder {
    /// Cashtags only; `symbols` gives their sectors.
    pub fn new(symbols: Symbols) -> Self {
        Self { symbols, names: None, boundary: Boundary::default(), known_only: false }
    }

    /// Whether the names and aliases of the list are found too.
    pub fn with_names(mut self, names: bool) -> Self {
        self.names = names.then(|| Names::new(&self.symbols));
        self
    }

    /// What may stand around a cashtag.
    pub fn with_boundary(mut self, boundary: Boundary) -> Self {
        self.boundary = boundary;
        self
    }

    /// Whether cashtags that are not in the list are left out (`$YOLO`).
    pub fn with_known_only(mut self, known_only: bool) -> Self {
        self.known_only = known_only;
        self
    }

    pub fn symbols(&self) -> &Symbols {
        &self.symbols
    }

    /// All mentions, in order, none inside of another.
    pub fn find(&self, text: &str) -> Vec<Mention> {
        let links = Links::new(text);
        let mut found: Vec<(String, Source, Range<usize>)> = scan(text, self.boundary, &links)
            .into_iter()
            .filter_map(|cashtag| {
                let (symbol, bytes) = match self.share_class(text, &cashtag.tag, &cashtag.bytes) {
                    Some(longer) => longer,
                    None => (normalise(&cashtag.tag)?, cashtag.bytes),
                };
                let wanted = !self.known_only || self.symbols.contains(&symbol);
                wanted.then_some((symbol, Source::Cashtag, bytes))
            })
            .collect();
        if let Some(names) = &self.names {
            let tags = found.len();
            for name in names.find(text, &links) {
                let after = found[..tags].partition_point(|(_, _, bytes)| bytes.start < name.bytes.end);
                // "$BTC" is the cashtag, not a name behind a dollar sign.
                if after > 0 && found[after - 1].2.end > name.bytes.start {
                    continue;
                }
                found.push((self.symbols.at(name.company).symbol.clone(), Source::Name, name.bytes));
            }
            found.sort_by_key(|(_, _, bytes)| bytes.start);
        }
        let mut points = 0;
        let mut counted = 0;
        let mut count = |to: usize| {
            points += text[counted..to].chars().count();
            counted = to;
            points
        };
        let mentions = found.into_iter().map(|(symbol, source, bytes)| Mention {
            symbol,
            source,
            start: count(bytes.start),
            end: count(bytes.end),
            bytes,
        });
        mentions.collect()
    }

    /// The symbols of a text, each once, in the order of their first mention.
    pub fn symbols_in(&self, text: &str) -> Vec<String> {
        let mut symbols: Vec<String> = Vec::new();
        let mut seen = std::collections::HashSet::new();
        for mention in self.find(text) {
            if seen.insert(mention.symbol.clone()) {
                symbols.push(mention.symbol);
            }
        }
        symbols
    }

    /// The sectors of some symbols, each once, in their order. A symbol that is not in the list has none.
    pub fn sectors_of<'a>(&'a self, symbols: impl IntoIterator<Item = &'a str>) -> Vec<&'a str> {
        let mut sectors: Vec<&str> = Vec::new();
        for symbol in symbols {
            if let Some(company) = self.symbols.get(symbol)
                && !company.sector.is_empty()
                && !sectors.contains(&company.sector.as_str())
            {
                sectors.push(&company.sector);
            }
        }
        sectors
    }

    /// `$BRK-B` and `$BRK/B` as a reader means them, where the list knows the class. X links `$BRK` alone.
    fn share_class(&self, text: &str, tag: &str, bytes: &Range<usize>) -> Option<(String, Range<usize>)> {
        if self.boundary == Boundary::X || tag.contains(['.', '_']) {
            return None;
        }
        let mut rest = text[bytes.end..].chars();
        let (separator, class) = (rest.next()?, rest.next()?);
        if !matches!(separator, '-' | '/') || !class.is_ascii_alphabetic() || rest.next().is_some_and(is_word) {
            return None;
        }
        let symbol = normalise(&format!("{tag}.{class}"))?;
        self.symbols.contains(&symbol).then(|| (symbol, bytes.start..bytes.end + 2))
    }
}
