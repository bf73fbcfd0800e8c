//! Reading a symbols file: CSV with a header, or JSON lines.
//!
//! Columns are `symbol` (or `ticker`), `name` (`company`, `company_name`, `security`), `aliases` (`alias`; separated by
//! `|` or `;` in CSV, a list or such a text in JSON) and `sector` (`gics_sector`), in any case and order; others are left
//! alone, so that an exchange's or a broker's list can be used as it is. What cannot be read is an error with its line.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::symbol::normalise;
use crate::symbols::{Company, Symbols};

/// The largest symbols file, in bytes and in lines: all listed companies of the world are well below both.
const MAX_BYTES: u64 = 64 << 20;
const MAX_COMPANIES: usize = 250_000;
/// The longest field, and the most aliases of one company.
const MAX_FIELD: usize = 256;
const MAX_ALIASES: usize = 64;

/// Why a symbols file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SymbolsError {
    #[error("cannot read {}: {source}", path.display())]
    Io { path: PathBuf, source: std::io::Error },

    #[error("{}{}: {message}", path.display(), line.map(|line| format!(":{line}")).unwrap_or_default())]
    Invalid { path: PathBuf, line: Option<u64>, message: String },
}

/// Collects companies and knows the lines for messages.
struct Collector<'a> {
    path: &'a Path,
    symbols: Symbols,
    lines: HashMap<String, u64>,
}

impl<'a> Collector<'a> {
    fn new(path: &'a Path) -> Self {
        Self { path, symbols: Symbols::empty(), lines: HashMap::new() }
    }

    fn error(&self, line: impl Into<Option<u64>>, message: impl Into<String>) -> SymbolsError {
        SymbolsError::Invalid { path: self.path.to_path_buf(), line: line.into(), message: message.into() }
    }

    fn add(&mut self, line: u64, company: Raw) -> Result<(), SymbolsError> {
        let symbol = normalise(&company.symbol).ok_or_else(|| {
            self.error(
                line,
                format!(
                    "{} is no symbol: expected letters, digits and a class, such as AAPL, BRK.B or ES_F",
                    shown(&company.symbol)
                ),
            )
        })?;
        if let Some(first) = self.lines.get(&symbol) {
            return Err(self.error(line, format!("{symbol} is already on line {first}\n  hint: keep one of the two")));
        }
        if company.aliases.len() > MAX_ALIASES {
            return Err(
                self.error(line, format!("{symbol} has {} aliases, {MAX_ALIASES} are taken", company.aliases.len()))
            );
        }
        let fields: Vec<&String> = [&company.name, &company.sector].into_iter().chain(&company.aliases).collect();
        let long = fields.into_iter().find(|field| field.len() > MAX_FIELD).map(|field| shown(field));
        if let Some(long) = long {
            return Err(self.error(line, format!("{long} is longer than {MAX_FIELD} bytes")));
        }
        if self.symbols.len() == MAX_COMPANIES {
            return Err(self.error(line, format!("more than {MAX_COMPANIES} symbols")));
        }
        self.lines.insert(symbol.clone(), line);
        self.symbols.push(Company {
            symbol,
            name: company.name.trim().to_string(),
            aliases: company.aliases,
            sector: company.sector.trim().to_string(),
        });
        Ok(())
    }

    fn finish(self) -> Result<Symbols, SymbolsError> {
        if self.symbols.is_empty() {
            return Err(self.error(None, "no symbol in it: expected columns symbol, name, aliases, sector"));
        }
        Ok(self.symbols)
    }
}

struct Raw {
    symbol: String,
    name: String,
    aliases: Vec<String>,
    sector: String,
}

pub(crate) fn load(path: &Path) -> Result<Symbols, SymbolsError> {
    let io = |source| SymbolsError::Io { path: path.to_path_buf(), source };
    let file = File::open(path).map_err(io)?;
    let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default().to_ascii_lowercase();
    match extension.as_str() {
        "jsonl" | "ndjson" | "json" => jsonl(file, path),
        _ => csv(file, path),
    }
}

/// A reader that says so when there is more than [`MAX_BYTES`].
fn bounded(reader: impl Read) -> impl Read {
    struct Bounded<R>(R, u64);
    impl<R: Read> Read for Bounded<R> {
        fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
            let read = self.0.read(buffer)?;
            self.1 = self.1.checked_sub(read as u64).ok_or_else(|| {
                std::io::Error::new(
                    std::io::ErrorKind::InvalidData,
                    format!("more than {} MiB; is this a symbols file?", MAX_BYTES >> 20),
                )
            })?;
            Ok(read)
        }
    }
    Bounded(reader, MAX_BYTES)
}

pub(crate) fn csv(reader: impl Read, path: &Path) -> Result<Symbols, SymbolsError> {
    let mut collector = Collector::new(path);
    let mut rows = csv::ReaderBuilder::new().flexible(true).trim(csv::Trim::All).from_reader(bounded(reader));
    let csv_error = |collector: &Collector<'_>, error: csv::Error| {
        let line = error.position().map(csv::Position::line);
        match error.into_kind() {
            csv::ErrorKind::Io(source) => SymbolsError::Io { path: path.to_path_buf(), source },
            csv::ErrorKind::Utf8 { .. } => collector.error(line, "not UTF-8\n  hint: save the file as UTF-8"),
            kind => collector.error(line, format!("{kind:?}")),
        }
    };
    let header = rows.headers().map_err(|error| csv_error(&collector, error))?.clone();
    let column = |names: &[&str]| {
        header.iter().position(|cell| {
            let cell = cell.trim_start_matches('\u{FEFF}').trim().to_lowercase().replace([' ', '-'], "_");
            names.contains(&cell.as_str())
        })
    };
    let Some(symbol) = column(SYMBOL) else {
        let found: Vec<String> = header.iter().take(12).map(shown).collect();
        return Err(collector.error(
            1,
            format!(
                "no column \"symbol\"; found {}\n  hint: the first line names the columns: symbol,name,aliases,sector",
                found.join(", ")
            ),
        ));
    };
    let (name, aliases, sector) = (column(NAME), column(ALIASES), column(SECTOR));
    let mut row = csv::StringRecord::new();
    loop {
        match rows.read_record(&mut row) {
            Ok(true) => {}
            Ok(false) => return collector.finish(),
            Err(error) => return Err(csv_error(&collector, error)),
        }
        let line = row.position().map_or(0, csv::Position::line);
        if row.iter().all(str::is_empty) {
            continue;
        }
        if row.len() > header.len() {
            let message = format!(
                "{} fields, expected {}\n  hint: put names with a comma in quotes, and separate aliases by |",
                row.len(),
                header.len()
            );
            return Err(collector.error(line, message));
        }
        let cell = |column: Option<usize>| column.and_then(|at| row.get(at)).unwrap_or_default();
        let company = Raw {
            symbol: cell(Some(symbol)).to_string(),
            name: cell(name).to_string(),
            aliases: split_aliases(cell(aliases)),
            sector: cell(sector).to_string(),
        };
        collector.add(line, company)?;
    }
}

pub(crate) fn jsonl(reader: impl Read, path: &Path) -> Result<Symbols, SymbolsError> {
    let mut collector = Collector::new(path);
    let mut lines = BufReader::new(bounded(reader));
    let mut bytes = Vec::new();
    for line in 1.. {
        bytes.clear();
        let read =
            lines.read_until(b'\n', &mut bytes).map_err(|source| SymbolsError::Io { path: path.into(), source })?;
        if read == 0 {
            break;
        }
        let text = std::str::from_utf8(&bytes)
            .map_err(|_| collector.error(line, "not UTF-8\n  hint: save the file as UTF-8"))?
            .trim_start_matches('\u{FEFF}')
            .trim();
        if text.is_empty() {
            continue;
        }
        let value: Value = serde_json::from_str(text).map_err(|error| {
            collector.error(line, format!("{error}\n  hint: expected one object a line, {{\"symbol\": …}}"))
        })?;
        let Value::Object(object) = &value else {
            return Err(collector.error(line, "expected an object, {\"symbol\": …, \"name\": …}"));
        };
        let field = |names: &[&str]| {
            object.iter().find(|(key, _)| names.contains(&key.to_lowercase().as_str())).map(|(_, value)| value)
        };
        let text_of = |names: &[&str]| match field(names) {
            None | Some(Value::Null) => Ok(String::new()),
            Some(Value::String(text)) => Ok(text.clone()),
            Some(_) => Err(collector.error(line, format!("\"{}\" is not a text", names[0]))),
        };
        let aliases = match field(ALIASES) {
            Some(Value::Array(items)) => items
                .iter()
                .map(|item| item.as_str().map(|alias| alias.trim().to_string()))
                .collect::<Option<Vec<String>>>()
                .ok_or_else(|| collector.error(line, "\"aliases\" is not a list of texts"))?,
            _ => split_aliases(&text_of(ALIASES)?),
        };
        if field(SYMBOL).is_none() {
            return Err(collector.error(line, "no \"symbol\""));
        }
        let company = Raw {
            symbol: text_of(SYMBOL)?,
            name: text_of(NAME)?,
            aliases: aliases.into_iter().filter(|alias| !alias.is_empty()).collect(),
            sector: text_of(SECTOR)?,
        };
        collector.add(line, company)?;
    }
    collector.finish()
}

const SYMBOL: &[&str] = &["symbol", "ticker"];
const NAME: &[&str] = &["name", "company", "company_name", "security"];
const ALIASES: &[&str] = &["aliases", "alias"];
const SECTOR: &[&str] = &["sector", "gics_sector"];

fn split_aliases(cell: &str) -> Vec<String> {
    cell.split(['|', ';']).map(str::trim).filter(|alias| !alias.is_empty()).map(str::to_string).collect()
}

/// A text from outside, quoted and cut.
fn shown(text: &str) -> String {
    let mut cut: String = text.chars().take(40).collect();
    if cut.len() < text.len() {
        cut.push('…');
    }
    format!("{cut:?}")
}
