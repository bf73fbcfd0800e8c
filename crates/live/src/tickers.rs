//! What the pipeline asks of a ticker finder; the list of companies and sectors is not this crate's business.

use serde::{Deserialize, Serialize};

/// A ticker in a text. Positions count Unicode code points, end exclusive, as X's `entities.cashtags` do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TickerMention {
    pub symbol: String,
    pub start: usize,
    pub end: usize,
}

pub trait Tickers: Send + Sync {
    /// The tickers of a text in their order; a symbol may come more than once.
    fn find(&self, text: &str) -> Vec<TickerMention>;

    fn sector(&self, symbol: &str) -> Option<String>;

    /// The name that people know a ticker by.
    fn name(&self, symbol: &str) -> Option<String>;
}
