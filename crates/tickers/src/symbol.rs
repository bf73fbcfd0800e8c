//! One spelling for each symbol.

/// The longest symbol that is taken.
const MAX_LENGTH: usize = 16;

/// The normal form of a symbol as files, brokers and posts write it, or `None` if it is none.
///
/// Upper case; `$` and `^` in front and an exchange (`NASDAQ:`) fall away; a share class stands behind a dot; a future
/// ends in `_F`; a coin has no suffix.
///
/// ```
/// use cashtag_tickers::normalise;
/// for spelling in ["$BRK.B", "brk-b", "BRK/B", "NYSE:BRK.B"] {
///     assert_eq!(normalise(spelling).as_deref(), Some("BRK.B"));
/// }
/// assert_eq!(normalise("ES=F").as_deref(), Some("ES_F"));
/// assert_eq!(normalise("BTC.X").as_deref(), Some("BTC"));
/// assert_eq!(normalise("not a symbol"), None);
/// ```
pub fn normalise(symbol: &str) -> Option<String> {
    let symbol = symbol.trim();
    // Long texts are refused before they are copied.
    if symbol.len() > 4 * MAX_LENGTH {
        return None;
    }
    let symbol = match symbol.split_once(':') {
        Some((exchange, rest)) if !exchange.is_empty() && exchange.bytes().all(|b| b.is_ascii_alphanumeric()) => rest,
        _ => symbol,
    };
    // A caret inside is a point, so that a suffix behind it is seen as one.
    let mut symbol = symbol.trim_start_matches(['$', '^']).to_ascii_uppercase().replace('^', ".");
    // Yahoo's futures and currencies, TradingView's continuous contracts, StockTwits' and Yahoo's coins.
    if let Some(root) = symbol.strip_suffix("=F").or_else(|| symbol.strip_suffix("1!")) {
        symbol = format!("{root}_F");
    } else {
        while let Some(root) = ["=X", ".X", "-USD", "-USDT"].iter().find_map(|suffix| symbol.strip_suffix(suffix)) {
            symbol.truncate(root.len());
        }
    }
    let (root, future) = match symbol.strip_suffix("_F") {
        Some(root) => (root, "_F"),
        None => (symbol.as_str(), ""),
    };
    let root = root.replace(['-', '/', '_'], ".");
    let symbol = format!("{root}{future}");
    let valid = (1..=MAX_LENGTH).contains(&symbol.len())
        && root.split('.').all(|part| !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'&'));
    valid.then_some(symbol)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spellings() {
        for (spelling, expected) in [
            ("aapl", Some("AAPL")),
            (" AAPL ", Some("AAPL")),
            ("BRK_B", Some("BRK.B")),
            ("ABR^D", Some("ABR.D")),
            ("^GSPC", Some("GSPC")),
            ("$es_f", Some("ES_F")),
            ("CME_MINI:ES1!", None),
            ("CME:ES1!", Some("ES_F")),
            ("BTC-USD", Some("BTC")),
            ("EURUSD=X", Some("EURUSD")),
            ("7203.T", Some("7203.T")),
            ("M&M", Some("M&M")),
            ("", None),
            ("$", None),
            ("_F", None),
            (".X", None),
            ("A..B", None),
            ("A B", None),
            ("ÄÖ", None),
            ("ABCDEFGHIJKLMNOPQ", None),
        ] {
            assert_eq!(normalise(spelling).as_deref(), expected, "{spelling:?}");
        }
    }

    #[test]
    fn normalising_twice_changes_nothing() {
        for spelling in ["brk-b", "ES=F", "BTC.X", "NYSE:BF/B", "RY.TO", "BTC.X.X", "A-USD-USD"] {
            if let Some(once) = normalise(spelling) {
                assert_eq!(normalise(&once).as_deref(), Some(once.as_str()), "{spelling}");
            }
        }
    }
}
