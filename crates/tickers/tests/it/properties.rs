//! Random texts and files: no panic, offsets that hold, and X's rule against a second reading of it.

use std::path::Path;
use std::sync::OnceLock;

use cashtag_tickers::{Boundary, Finder, Symbols, cashtags, normalise};
use proptest::prelude::*;

fn finder() -> &'static Finder {
    static FINDER: OnceLock<Finder> = OnceLock::new();
    FINDER.get_or_init(|| Finder::new(Symbols::embedded()).with_names(true))
}

/// Pieces that meet at every border that the rules know, between random characters.
fn nasty_text() -> impl Strategy<Value = String> {
    let piece = prop_oneof![
        4 => prop::sample::select(vec![
            "$", "$AAPL", "$BRK.B", "$ES_F", "$brk-b", "$100", "Nvidia", "Tesla", "Macy’s", "apple", "Ford", "@", "#", "://",
            "https://", "www.", ".com", "/", ".", "_", " ", "\u{3000}", "\u{200f}", "\u{85}", "🚀", "👩‍🚀", "é", "e\u{301}",
            "株", "ſ", "İ", "\u{feff}", "\u{0}", "(", "”", "&", "\r\n", "a", "Z", "9", "Johnson & Johnson", "Berkshire Hathaway",
        ]).prop_map(str::to_string),
        1 => any::<char>().prop_map(String::from),
    ];
    prop::collection::vec(piece, 0..40).prop_map(|pieces| pieces.concat())
}

/// X's rule, read a second time: characters instead of bytes, every start and every length tried.
fn by_the_rule(text: &str) -> Vec<(usize, usize)> {
    let space = |c: char| {
        let code = c as u32;
        (0x9..=0xd).contains(&code)
            || [0x20, 0x85, 0xa0, 0x1680, 0x180e, 0x2028, 0x2029, 0x202f, 0x205f, 0x3000].contains(&code)
            || (0x2000..=0x200a).contains(&code)
    };
    let mark = |c: char| {
        let code = c as u32;
        [0x61c, 0x200e, 0x200f].contains(&code)
            || (0x202a..=0x202e).contains(&code)
            || (0x2066..=0x2069).contains(&code)
    };
    let chars: Vec<char> = text.chars().collect();
    let mut found = Vec::new();
    for (start, &c) in chars.iter().enumerate() {
        if c != '$' || (start > 0 && !space(chars[start - 1]) && !mark(chars[start - 1])) {
            continue;
        }
        let fits = |end: usize| {
            let tag: String = chars[start + 1..end].iter().collect();
            let (root, class) = match tag.split_once(['.', '_']) {
                Some((root, class)) => (root, Some(class)),
                None => (tag.as_str(), None),
            };
            let letters = |text: &str, most: usize| {
                (1..=most).contains(&text.chars().count()) && text.chars().all(|c| c.is_ascii_alphabetic())
            };
            let after = chars.get(end);
            letters(root, 6)
                && class.is_none_or(|class| letters(class, 2))
                && after.is_none_or(|&c| space(c) || c == '\u{feff}' || c.is_ascii_punctuation())
        };
        if let Some(end) = (start + 2..=chars.len().min(start + 10)).rev().find(|&end| fits(end)) {
            found.push((start, end));
        }
    }
    found
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn offsets_hold(text in nasty_text()) {
        let chars: Vec<char> = text.chars().collect();
        let mut end = 0;
        for mention in finder().find(&text) {
            prop_assert!(mention.start >= end && mention.end > mention.start);
            end = mention.end;
            let points: String = chars[mention.start..mention.end].iter().collect();
            prop_assert_eq!(&points, &text[mention.bytes.clone()]);
            prop_assert_eq!(normalise(&mention.symbol), Some(mention.symbol.clone()));
        }
    }

    #[test]
    fn x_finds_what_its_rule_says(text in nasty_text()) {
        let found: Vec<(usize, usize)> = cashtags(&text, Boundary::X)
            .iter()
            .map(|cashtag| (text[..cashtag.bytes.start].chars().count(), text[..cashtag.bytes.end].chars().count()))
            .collect();
        prop_assert_eq!(found, by_the_rule(&text));
    }

    #[test]
    fn a_reader_finds_all_that_x_links(text in nasty_text()) {
        // In links and mail addresses, X may see one and a reader does not.
        let text = text.replace(['@', '/'], " ").replace("www.", "-");
        let reader = cashtags(&text, Boundary::Text);
        for cashtag in cashtags(&text, Boundary::X) {
            // A reader also takes a class that X cuts off because an emoji follows: the same beginning, never a shorter one.
            let there = reader.iter().any(|r| r.bytes.start == cashtag.bytes.start && r.bytes.end >= cashtag.bytes.end);
            prop_assert!(there, "{:?} is missing in {:?}", cashtag, reader);
        }
    }

    #[test]
    fn normalising_is_stable(symbol in "[$^]?[a-zA-Z0-9:.=!^/_-]{0,20}|.*|[A-Z]{1,4}(\\.X|-USD|-USDT|=F|1!|_F|=X){0,3}") {
        // What is written with other signs than points may hold a suffix that shows only then: the second time is the last.
        if let Some(twice) = normalise(&symbol).and_then(|once| normalise(&once)) {
            prop_assert_eq!(normalise(&twice), Some(twice));
        }
    }

    #[test]
    fn random_files_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..300), text in nasty_text()) {
        let _ = Symbols::from_csv(&bytes[..], Path::new("s"));
        let _ = Symbols::from_jsonl(&bytes[..], Path::new("s"));
        let rows = format!("symbol,name,aliases\nA,\"{0}\",\"{0}|x;{0}\"\n", text.replace('"', ""));
        if let Ok(symbols) = Symbols::from_csv(rows.as_bytes(), Path::new("s")) {
            let finder = Finder::new(symbols).with_names(true);
            finder.find(&text);
            finder.find(&format!("{text} {text}"));
        }
    }
}
