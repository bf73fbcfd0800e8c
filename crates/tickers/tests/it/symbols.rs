//! Symbol files: the embedded one, the user's, and bad ones.

use std::path::Path;

use cashtag_tickers::{Finder, Symbols};

fn csv(text: &str) -> Result<Symbols, String> {
    Symbols::from_csv(text.as_bytes(), Path::new("s.csv")).map_err(|error| error.to_string())
}

fn jsonl(text: &str) -> Result<Symbols, String> {
    Symbols::from_jsonl(text.as_bytes(), Path::new("s.jsonl")).map_err(|error| error.to_string())
}

#[test]
fn the_embedded_list_uses_the_sectors_of_the_guidelines() {
    let guidelines = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../corpus/GUIDELINES.md");
    let guidelines = std::fs::read_to_string(guidelines).unwrap();
    let from = guidelines.find("`sector`: ").unwrap() + "`sector`: ".len();
    let list = &guidelines[from..from + guidelines[from..].find('.').unwrap()];
    let sectors: Vec<&str> = list.split(',').map(str::trim).collect();
    assert!(sectors.len() > 20);
    let symbols = Symbols::embedded();
    assert!(symbols.len() > 500, "{}", symbols.len());
    for company in &symbols {
        assert!(sectors.contains(&company.sector.as_str()), "{company:?}");
        assert!(!company.name.is_empty(), "{company:?}");
    }
}

#[test]
fn every_symbol_of_the_embedded_list_is_found_by_its_cashtag() {
    let finder = Finder::new(Symbols::embedded());
    for company in finder.symbols() {
        // X links letters only: the currency futures 6E, 6J and 6B have no cashtag.
        if company.symbol.starts_with(|c: char| c.is_ascii_digit()) {
            continue;
        }
        assert_eq!(finder.symbols_in(&format!("${}", company.symbol)), [company.symbol.as_str()]);
    }
}

#[test]
fn a_file_replaces_the_list_or_is_laid_over_it() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("mine.csv");
    std::fs::write(&path, "\u{feff}Ticker, Company Name ,SECTOR,extra\nbrk/b,\"Mine, Inc.\",my-sector,1\n\nzz,,\n")
        .unwrap();
    let mine = Symbols::load(&path).unwrap();
    assert_eq!(mine.len(), 2);
    assert_eq!(mine.get("BRK-B").unwrap().name, "Mine, Inc.");
    assert!(mine.get("AAPL").is_none());
    let both = Symbols::embedded().overlaid(mine);
    assert_eq!(both.get("BRK.B").unwrap().sector, "my-sector");
    assert_eq!(both.get("AAPL").unwrap().sector, "technology");

    let path = directory.path().join("mine.jsonl");
    std::fs::write(&path, "{\"symbol\":\"AB\",\"name\":\"Abra\",\"aliases\":[\"Cadabra\"],\"rank\":1}\n\n").unwrap();
    let mine = Symbols::load(&path).unwrap();
    assert_eq!(mine.get("ab").unwrap().aliases, ["Cadabra"]);
}

#[test]
fn bad_files_are_errors_with_a_line() {
    for (text, expected) in [
        ("", "s.csv:1: no column \"symbol\""),
        ("AAPL,Apple\n", "s.csv:1: no column \"symbol\"; found \"AAPL\", \"Apple\"\n  hint"),
        ("symbol,name\n", "s.csv: no symbol in it"),
        ("symbol,name\nA,a\n,b\n", "s.csv:3: \"\" is no symbol"),
        ("symbol,name\nno symbol,b\n", "s.csv:2: \"no symbol\" is no symbol"),
        ("symbol,name\nbrk.b,a\nX,y\nBRK-B,b\n", "s.csv:4: BRK.B is already on line 2"),
        ("symbol,name\nA,Foo, Inc.\n", "s.csv:2: 3 fields, expected 2\n  hint: put names with a comma in quotes"),
    ] {
        let error = csv(text).unwrap_err();
        assert!(error.starts_with(expected), "{text:?}: {error}");
    }
    let error = csv(&format!("symbol,name\nA,{}\n", "x".repeat(300))).unwrap_err();
    assert!(error.contains("s.csv:2: \"xxxx") && error.ends_with("is longer than 256 bytes"), "{error}");
    let error = Symbols::from_csv(&b"symbol,name\nA,\xff\n"[..], Path::new("s.csv")).unwrap_err().to_string();
    assert!(error.starts_with("s.csv:2: not UTF-8"), "{error}");

    for (text, expected) in [
        ("", "s.jsonl: no symbol in it"),
        ("{\"symbol\":\"A\"}\n{\n", "s.jsonl:2: EOF"),
        ("[]\n", "s.jsonl:1: expected an object"),
        ("{\"name\":\"A\"}\n", "s.jsonl:1: no \"symbol\""),
        ("{\"symbol\":1}\n", "s.jsonl:1: \"symbol\" is not a text"),
        ("{\"symbol\":\"A\",\"aliases\":[1]}\n", "s.jsonl:1: \"aliases\" is not a list of texts"),
    ] {
        let error = jsonl(text).unwrap_err();
        assert!(error.starts_with(expected), "{text:?}: {error}");
    }
    let error = Symbols::load(Path::new("/nowhere/s.csv")).unwrap_err().to_string();
    assert!(error.starts_with("cannot read /nowhere/s.csv: No such file"), "{error}");
}

#[test]
fn a_file_without_end_is_refused() {
    let endless = std::io::Read::chain(&b"symbol,name\nA,\""[..], std::io::repeat(b'x'));
    let error = Symbols::from_csv(endless, Path::new("s.csv")).unwrap_err().to_string();
    assert!(error.contains("more than 64 MiB"), "{error}");
    let error = Symbols::from_jsonl(std::io::repeat(b'['), Path::new("s.jsonl")).unwrap_err().to_string();
    assert!(error.contains("more than 64 MiB"), "{error}");
}
