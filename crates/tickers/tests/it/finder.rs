//! What is found in texts, where, and what is not.

use cashtag_tickers::{Boundary, Finder, Source, Symbols};

fn finder() -> Finder {
    Finder::new(Symbols::embedded()).with_names(true)
}

#[track_caller]
fn expect(text: &str, symbols: &[&str]) {
    assert_eq!(finder().symbols_in(text), symbols, "{text:?}");
}

#[test]
fn cashtags_and_names() {
    expect("$AAPL $BRK.B $BTC $ES_F $aapl", &["AAPL", "BRK.B", "BTC", "ES_F"]);
    expect("Nvidia and TSMC up, Advanced Micro Devices down", &["NVDA", "TSM", "AMD"]);
    expect("JPMorgan cuts Tesla to sell, $TSLA off 3%", &["JPM", "TSLA"]);
    expect("McDonald’s, Lowes and Procter and Gamble", &["MCD", "LOW", "PG"]);
    expect("Estée Lauder, estee lauder, walmart, WALMART", &["EL", "WMT"]);
    expect("Tesla's and tesla, #Tesla", &["TSLA"]);
    expect("$BRK-B, $brk/b and BRK", &["BRK.B"]);
    expect("Bank of America, not the bank of england", &["BAC"]);
}

#[test]
fn words_are_no_companies() {
    for text in [
        "apple pie on target, gap up, snap back, block it, match day, meta level, root cause, open a visa",
        "best buy here? dollar general? united in health",
        "Target 450. Gap fill. Block trade. Match this. Snap!",
        "pineapple teslas nvidiax intelligence fordable",
        "@Tesla @nvidia tesla.com nvidia.co.uk https://x.com/Nvidia www.Walmart.com ir@walmart.com",
        "cats, arms, on, all, are, it, now, so, low",
    ] {
        expect(text, &[]);
    }
}

#[test]
fn short_and_common_names_are_matched_as_written() {
    expect("Apple and Meta and Intel and GM and Ford", &["AAPL", "META", "INTC", "GM", "F"]);
    expect("apple and meta and intel and gm and ford", &[]);
    expect("Best Buy beats", &["BBY"]);
}

#[test]
fn names_only_when_asked_for() {
    let finder = Finder::new(Symbols::embedded());
    assert_eq!(finder.symbols_in("Nvidia and $AMD"), ["AMD"]);
}

#[test]
fn offsets_are_code_points_and_bytes() {
    let text = "👩‍🚀 é $AAPL — Nestlé, Nvidia 🚀$BRK.B";
    let found = finder().find(text);
    let shown: Vec<_> = found.iter().map(|m| (m.symbol.as_str(), &text[m.bytes.clone()], m.source)).collect();
    assert_eq!(
        shown,
        [("AAPL", "$AAPL", Source::Cashtag), ("NVDA", "Nvidia", Source::Name), ("BRK.B", "$BRK.B", Source::Cashtag)]
    );
    // 👩‍🚀 is three code points, é one: as X counts, "start inclusive, end exclusive".
    assert_eq!((found[0].start, found[0].end), (6, 11));
    for mention in &found {
        let points: String = text.chars().skip(mention.start).take(mention.end - mention.start).collect();
        assert_eq!(points, text[mention.bytes.clone()]);
    }
}

#[test]
fn x_offers_what_x_links() {
    let finder = finder().with_boundary(Boundary::X).with_names(false);
    assert_eq!(finder.symbols_in("Apple ($AAPL), $BRK-B, $MSFT/$AMD 🚀$GME"), ["BRK", "MSFT"]);
}

#[test]
fn only_known_ones() {
    let finder = finder().with_known_only(true);
    assert_eq!(finder.symbols_in("$YOLO into $GME"), ["GME"]);
}

#[test]
fn sectors() {
    let finder = finder();
    let symbols = finder.symbols_in("$NVDA $AMD $XOM $YOLO");
    assert_eq!(finder.sectors_of(symbols.iter().map(String::as_str)), ["semiconductors", "energy"]);
}

#[test]
fn the_longest_name_wins_and_nothing_stands_in_another() {
    let file = "symbol,name,aliases\nA,Orion Mills,\nB,Orion Mills Energy,\nC,,Energy Partners\n";
    let symbols = Symbols::from_csv(file.as_bytes(), "s.csv".as_ref()).unwrap();
    let finder = Finder::new(symbols).with_names(true);
    assert_eq!(finder.symbols_in("orion mills energy partners"), ["B"]);
    assert_eq!(finder.symbols_in("Orion Mills Energyx"), ["A"]);
}
