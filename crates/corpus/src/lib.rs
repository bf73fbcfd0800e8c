//! Labelled stock-market texts: where they come from, how they are made fit for training, how they are saved.
//!
//! The way of a text through this crate:
//!
//! ```text
//! chat model ── chat_api ─ generate ─ journal ──┐
//! files ─────── formats (csv, jsonl, chat jsonl, ├─ parse ─ labels ─ clean ─ dedup ─ split ─ formats + card
//!               parquet, txt)                    │
//! built in ──── builtin ─────────────────────────┘
//! ```
//!
//! Everything downstream works on [`Example`]s, or, where a file's other columns matter (`predict --in`), on the
//! [`formats::Chunk`]s of [`formats::RowReader`] and [`formats::RowWriter`].
//!
//! Invariants: no function panics on what comes from a file or a server; sizes are checked before anything is
//! allocated; whatever is random is keyed by a seed; a file is either the old one or the whole new one.

mod backoff;
mod budget;
mod builtin;
mod card;
pub mod chat_api;
mod clean;
mod dedup;
mod error;
mod example;
pub mod formats;
pub mod generate;
pub mod journal;
mod judged;
mod labels;
mod minhash;
mod near;
pub mod parse;
pub mod prepare;
pub mod recipe;
mod rng;
mod sample;
mod split;
mod spool;
mod stats;

pub use backoff::RetryPolicy;
pub use budget::{Price, Totals};
pub use builtin::{HELD_OUT_SHARE, builtin, builtin_split};
pub use clean::{CleanOptions, clean_text, normalised_key};
pub use dedup::{Dedup, DedupOptions, Fate, find_duplicates};
pub use error::{Error, Result};
pub use example::{EVENTS, Example, KINDS, LABELS, REGISTERS, SECTORS, label_index};
pub use formats::{
    ReadOptions, read_examples, read_examples_reported, write_chat_jsonl, write_dataset_csv, write_parquet,
};
pub use judged::{JUDGED, judged_near};
pub use labels::{LabelMap, canonical_label};
pub use minhash::{Sketch, similarity};
pub use near::NearIndex;
pub use rng::Rng;
pub use sample::{balanced_sample, quick_sample};
pub use split::{Split, SplitOptions, split_by_time, split_examples};
pub use stats::{GiveAway, Lengths, Query, Stats, give_away_words, search};
