//! Files that are damaged or mean harm: an error or rows, never a panic, never unbounded memory.

use cashtag_corpus::formats::{Format, RowReader};
use cashtag_corpus::{Example, ReadOptions, journal, read_examples, write_parquet};
use proptest::prelude::*;

fn try_all(bytes: &[u8]) {
    let folder = tempfile::tempdir().unwrap();
    for name in ["x.csv", "x.tsv", "x.jsonl", "x.txt", "x.parquet", "x"] {
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        for require_label in [true, false] {
            let _ = read_examples(&path, &ReadOptions { require_label, ..ReadOptions::default() });
        }
        for format in [Format::Csv { delimiter: b',' }, Format::Jsonl, Format::Text] {
            if let Ok(reader) = RowReader::open_as(&path, format) {
                for chunk in reader.flatten() {
                    let _ = (chunk.rows(), chunk.texts("text"));
                }
            }
        }
        let _ = journal::harvest(&path);
    }
}

/// A Parquet file with a few pages.
fn parquet_bytes() -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.parquet");
    let rows: Vec<Example> =
        (0..500).map(|n| Example::new(format!("text number {n} of many"), cashtag_corpus::LABELS[n % 3])).collect();
    write_parquet(&path, &rows).unwrap();
    std::fs::read(path).unwrap()
}

fn try_parquet(bytes: &[u8]) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.parquet");
    std::fs::write(&path, bytes).unwrap();
    // Damage makes the Parquet library panic now and then. It must be caught, and known to be by a panic hook.
    static HOOK: std::sync::Once = std::sync::Once::new();
    HOOK.call_once(|| {
        let usual = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if !cashtag_corpus::formats::panic_is_caught() {
                usual(info);
            }
        }));
    });
    if let Err(error) = read_examples(&path, &ReadOptions::default()) {
        assert!(error.to_string().contains("x.parquet"), "{error}");
    }
}

#[test]
fn truncated_parquet() {
    let whole = parquet_bytes();
    for cut in (0..whole.len()).step_by(whole.len() / 60) {
        try_parquet(&whole[..cut]);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn arbitrary_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        try_all(&bytes);
    }

    #[test]
    fn nearly_right_text(text in "(text|label|,|;|\"|\n|\r\n|\\{|\\}|\\[|:|Positive|---|\u{FEFF}|messages|role|user|content|1|-1|é){0,60}") {
        try_all(text.as_bytes());
    }

    #[test]
    fn damaged_parquet(damage in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6), tail in any::<bool>()) {
        let mut bytes = parquet_bytes();
        let length = bytes.len();
        for (index, value) in damage {
            // Half of the time only the footer, which holds every size and offset.
            let at = if tail { length - 1 - index.index(length.min(1200)) } else { index.index(length) };
            bytes[at] = value;
        }
        try_parquet(&bytes);
    }
}
