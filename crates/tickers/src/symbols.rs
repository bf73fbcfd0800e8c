//! The list of symbols with their names and sectors: the one that ships inside, or the user's.

use std::collections::HashMap;
use std::io::Read;
use std::path::Path;
use std::sync::OnceLock;

use crate::read::{self, SymbolsError};
use crate::symbol::normalise;

/// One line of a symbols file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Company {
    /// In its normal form.
    pub symbol: String,
    /// Empty where the file has none.
    pub name: String,
    /// Other names under which it is written.
    pub aliases: Vec<String>,
    /// Empty where the file has none.
    pub sector: String,
}

/// Companies by symbol, in the order of the file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Symbols {
    companies: Vec<Company>,
    places: HashMap<String, usize>,
}

impl Symbols {
    /// No symbols: cashtags are still found, without names and sectors.
    pub fn empty() -> Self {
        Self::default()
    }

    /// The list that ships inside: large US companies, funds, indices, coins, futures and currencies. Sectors are those
    /// of the corpus.
    pub fn embedded() -> Self {
        static EMBEDDED: OnceLock<Symbols> = OnceLock::new();
        EMBEDDED
            .get_or_init(|| {
                let text = include_str!("../symbols.csv");
                Self::from_csv(text.as_bytes(), Path::new("symbols.csv")).expect("tested: the embedded list is valid")
            })
            .clone()
    }

    /// Reads a CSV file, or JSON lines where the name ends in `.jsonl`, `.ndjson` or `.json`.
    pub fn load(path: &Path) -> Result<Self, SymbolsError> {
        read::load(path)
    }

    /// Reads CSV with a header. `path` is only for messages.
    pub fn from_csv(reader: impl Read, path: &Path) -> Result<Self, SymbolsError> {
        read::csv(reader, path)
    }

    /// Reads one JSON object a line. `path` is only for messages.
    pub fn from_jsonl(reader: impl Read, path: &Path) -> Result<Self, SymbolsError> {
        read::jsonl(reader, path)
    }

    /// This list with the lines of `other` laid over it: a symbol of both is the other's, entirely.
    pub fn overlaid(mut self, other: Symbols) -> Self {
        for company in other.companies {
            match self.places.get(&company.symbol) {
                Some(&place) => self.companies[place] = company,
                None => self.push(company),
            }
        }
        self
    }

    /// By any spelling of the symbol ([`normalise`]).
    pub fn get(&self, symbol: &str) -> Option<&Company> {
        let place = match self.places.get(symbol) {
            Some(place) => *place,
            None => *self.places.get(&normalise(symbol)?)?,
        };
        self.companies.get(place)
    }

    pub fn iter(&self) -> std::slice::Iter<'_, Company> {
        self.companies.iter()
    }

    pub fn len(&self) -> usize {
        self.companies.len()
    }

    pub fn is_empty(&self) -> bool {
        self.companies.is_empty()
    }

    pub(crate) fn contains(&self, normal: &str) -> bool {
        self.places.contains_key(normal)
    }

    pub(crate) fn at(&self, place: usize) -> &Company {
        &self.companies[place]
    }

    /// The caller has looked that the symbol is new.
    pub(crate) fn push(&mut self, company: Company) {
        self.places.insert(company.symbol.clone(), self.companies.len());
        self.companies.push(company);
    }
}

impl<'a> IntoIterator for &'a Symbols {
    type Item = &'a Company;
    type IntoIter = std::slice::Iter<'a, Company>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}
