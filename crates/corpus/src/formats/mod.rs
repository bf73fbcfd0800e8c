//! Files in and out: CSV, JSON lines, chat JSON lines, Parquet, labelled text.
//!
//! Two layers. [`RowReader`] and [`RowWriter`] stream whole rows with every column they have, in bounded memory.
//! [`ExampleReader`] and the data-set writers see examples: text, label and the fields that we know.

mod arrow_values;
mod atomic;
mod columns;
mod examples;
mod files;
mod format;
mod formula;
mod json_array;
mod parquet_io;
mod row_writer;
mod rows;
mod write;

pub use atomic::{AtomicFile, write_atomically};
pub(crate) use atomic::{folder_of, sync_folder};
pub use columns::Columns;
pub use examples::{ExampleReader, ReadOptions, Record, read_examples, read_examples_reported};
pub use files::data_files;
pub use format::Format;
pub use formula::{neutralise, restore};
pub use parquet_io::panic_is_caught;
pub use row_writer::{NewColumn, RowWriter};
pub use rows::{CHUNK_BYTES, CHUNK_ROWS, Chunk, ColumnKind, MAX_RECORD, RowReader};
pub use write::{ChatDataset, CsvDataset, FIELDS, ParquetDataset, write_chat_jsonl, write_dataset_csv, write_parquet};
