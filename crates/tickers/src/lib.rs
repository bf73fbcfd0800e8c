//! Which stocks a text is about: cashtags by X's rules, company names by a symbols file, and the sector of each.
//!
//! ```
//! use cashtag_tickers::{Finder, Symbols};
//!
//! let finder = Finder::new(Symbols::embedded()).with_names(true);
//! let text = "🚀 $BRK.B and Nvidia up, paid $100";
//! let found = finder.find(text);
//! assert_eq!(found[0].symbol, "BRK.B");
//! assert_eq!((found[0].start, found[0].end), (2, 8)); // code points, as X counts
//! assert_eq!(&text[found[0].bytes.clone()], "$BRK.B");
//! assert_eq!(found[1].symbol, "NVDA");
//! assert_eq!(finder.symbols().get("NVDA").unwrap().sector, "semiconductors");
//! ```
//!
//! The way through: [`cashtags`] scans for `$…`; a name matcher (one Aho–Corasick automaton for all names) finds
//! companies; [`Finder`] puts both together, resolves each to a symbol of its [`Symbols`] and counts offsets.
//!
//! Invariants:
//! - Nothing panics on any text or any file; time is linear in the text.
//! - Every offset lies on a character border; mentions are ordered and do not overlap.
//! - A symbol is always in its normal form ([`normalise`]): `brk-b`, `BRK/B` and `$BRK.B` are one.

mod cashtag;
mod chars;
mod finder;
mod links;
mod names;
mod read;
mod symbol;
mod symbols;

pub use cashtag::{Boundary, Cashtag, cashtags};
pub use finder::{Finder, Mention, Source};
pub use read::SymbolsError;
pub use symbol::normalise;
pub use symbols::{Company, Symbols};
