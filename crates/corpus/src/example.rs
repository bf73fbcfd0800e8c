//! The labelled text that everything in the project works on, and the closed sets of values its fields take in the
//! built-in corpus.

use serde::{Deserialize, Serialize};

/// The labels, in the order of every table and every probability vector of the project.
pub const LABELS: [&str; 3] = ["Positive", "Neutral", "Negative"];

/// How words and meaning relate; see `corpus/GUIDELINES.md`.
pub const KINDS: [&str; 5] = ["plain", "mixed", "sarcastic", "contextual", "targeted"];

/// Which of the two worlds a text belongs to.
pub const REGISTERS: [&str; 2] = ["headline", "chatter"];

pub const SECTORS: [&str; 35] = [
    "technology",
    "semiconductors",
    "internet",
    "software",
    "media",
    "telecom",
    "autos",
    "retail",
    "consumer",
    "restaurants",
    "travel",
    "airlines",
    "industrials",
    "defense",
    "chemicals",
    "materials",
    "mining",
    "energy",
    "utilities",
    "renewables",
    "banks",
    "insurance",
    "fintech",
    "real-estate",
    "healthcare",
    "biotech",
    "pharma",
    "crypto",
    "commodities",
    "currencies",
    "rates",
    "macro",
    "indices",
    "funds",
    "other",
];

pub const EVENTS: [&str; 31] = [
    "earnings",
    "guidance",
    "rating",
    "deal",
    "offering",
    "dividend",
    "buyback",
    "product",
    "contract",
    "regulation",
    "lawsuit",
    "executive",
    "labor",
    "insider",
    "filing",
    "conference",
    "move",
    "chart",
    "options",
    "position",
    "opinion",
    "question",
    "macro-data",
    "central-bank",
    "politics",
    "supply",
    "split",
    "ipo",
    "spam",
    "off-topic",
    "other",
];

/// A text and its label.
///
/// `label` is one of [`LABELS`] in everything this crate hands out, except that a reader told not to require labels
/// leaves it empty. The other fields are known for the built-in corpus and for generated texts, and for files that
/// carry columns of these names.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Example {
    pub text: String,
    pub label: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kind: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub register: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sector: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub event: Option<String>,
    /// Two texts with the same value differ in a word or two and in the label, and stay on one side of every split.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pair: Option<String>,
    /// Identity in the source it came from, kept as it was written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// When it was posted, as it was written (ISO 8601 or seconds since 1970): what a split by time sorts on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time: Option<String>,
    /// The file or run it came from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
}

impl Example {
    pub fn new(text: impl Into<String>, label: impl Into<String>) -> Self {
        Self { text: text.into(), label: label.into(), ..Self::default() }
    }

    /// The kind, with everything that has none counted as `plain`.
    pub fn kind_or_plain(&self) -> &str {
        self.kind.as_deref().unwrap_or("plain")
    }

    /// The optional fields by name, in the order in which they are written to a table.
    pub(crate) fn optional_fields(&self) -> [(&'static str, Option<&str>); 8] {
        [
            ("kind", self.kind.as_deref()),
            ("register", self.register.as_deref()),
            ("sector", self.sector.as_deref()),
            ("event", self.event.as_deref()),
            ("pair", self.pair.as_deref()),
            ("id", self.id.as_deref()),
            ("time", self.time.as_deref()),
            ("source", self.source.as_deref()),
        ]
    }

    pub(crate) fn set_optional_field(&mut self, name: &str, value: String) {
        let slot = match name {
            "kind" => &mut self.kind,
            "register" => &mut self.register,
            "sector" => &mut self.sector,
            "event" => &mut self.event,
            "pair" => &mut self.pair,
            "id" => &mut self.id,
            "time" => &mut self.time,
            "source" => &mut self.source,
            _ => return,
        };
        *slot = (!value.is_empty()).then_some(value);
    }
}

/// Where a label stands in [`LABELS`].
pub fn label_index(label: &str) -> Option<usize> {
    LABELS.iter().position(|known| *known == label)
}
