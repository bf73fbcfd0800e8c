//! Cashtags: `$` and a symbol, where X would link one.
//!
//! X's rule (twitter-text): `$`, one to six ASCII letters, and perhaps `.` or `_` and one or two more; before it the
//! beginning of the text, white space or a direction mark; after it the end, white space or ASCII punctuation. So
//! `$100`, `$5k`, `US$AAPL`, `$TOOLONGAG` and `$AAPL2` are none, and `$AAPL.` ends before the full stop.

use std::ops::Range;

use crate::chars::{is_direction_mark, is_space, is_word};
use crate::links::Links;

/// What may stand around a cashtag.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Boundary {
    /// X's rule to the letter: exactly what X links and returns in `entities.cashtags`.
    X,
    /// What a reader sees as a cashtag: X's rule, and also after an opening bracket, a quotation mark, other
    /// punctuation or an emoji (`($AAPL)`, `“$AAPL”`, `$AAPL/$MSFT`, `.$AAPL`), and before any of these. Nothing inside
    /// of links and e-mail addresses.
    #[default]
    Text,
}

/// A cashtag in a text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cashtag {
    /// As written, without the `$`.
    pub tag: String,
    /// Where it stands in the text, the `$` included.
    pub bytes: Range<usize>,
}

/// The cashtags of a text, in order.
pub fn cashtags(text: &str, boundary: Boundary) -> Vec<Cashtag> {
    scan(text, boundary, &Links::new(text))
}

pub(crate) fn scan(text: &str, boundary: Boundary, links: &Links) -> Vec<Cashtag> {
    let mut found = Vec::new();
    let bytes = text.as_bytes();
    for (start, _) in text.match_indices('$') {
        if !may_precede(text[..start].chars().next_back(), boundary) {
            continue;
        }
        let Some(end) = symbol_end(bytes, start + 1, |end| may_follow(text[end..].chars().next(), boundary)) else {
            continue;
        };
        if boundary == Boundary::Text && links.contains(start) {
            continue;
        }
        found.push(Cashtag { tag: text[start + 1..end].to_string(), bytes: start..end });
    }
    found
}

/// The longest end of `[a-z]{1,6}([._][a-z]{1,2})?` from `start` that `accepts`.
fn symbol_end(bytes: &[u8], start: usize, accepts: impl Fn(usize) -> bool) -> Option<usize> {
    let letters = |from: usize, most: usize| {
        bytes[from.min(bytes.len())..].iter().take(most).take_while(|byte| byte.is_ascii_alphabetic()).count()
    };
    let root = letters(start, 6);
    if root == 0 {
        return None;
    }
    let end = start + root;
    if matches!(bytes.get(end), Some(b'.' | b'_')) {
        let class = letters(end + 1, 2);
        if let Some(found) = (1..=class).rev().map(|n| end + 1 + n).find(|&end| accepts(end)) {
            return Some(found);
        }
    }
    accepts(end).then_some(end)
}

fn may_precede(before: Option<char>, boundary: Boundary) -> bool {
    let Some(c) = before else { return true };
    is_space(c)
        || is_direction_mark(c)
        // `#`, `@`, `&`, `=` and `%` belong to tags, names and addresses; `$$` is money.
        || (boundary == Boundary::Text && !is_word(c) && !matches!(c, '$' | '#' | '@' | '&' | '=' | '%'))
}

fn may_follow(after: Option<char>, boundary: Boundary) -> bool {
    let Some(c) = after else { return true };
    match boundary {
        Boundary::X => is_space(c) || c == '\u{FEFF}' || c.is_ascii_punctuation(),
        Boundary::Text => !is_word(c) || c == '_',
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tags(text: &str, boundary: Boundary) -> Vec<String> {
        cashtags(text, boundary).into_iter().map(|found| found.tag).collect()
    }

    #[track_caller]
    fn both(text: &str, expected: &[&str]) {
        assert_eq!(tags(text, Boundary::X), expected, "{text:?} by X's rule");
        assert_eq!(tags(text, Boundary::Text), expected, "{text:?}");
    }

    #[test]
    fn what_x_links() {
        both("long $AAPL $brk.b $ES_F and $BTC", &["AAPL", "brk.b", "ES_F", "BTC"]);
        both("$AAPL, $MSFT. $TSLA! $F's $GM)", &["AAPL", "MSFT", "TSLA", "F", "GM"]);
        both("at the end $NVDA", &["NVDA"]);
        both("a\u{3000}$SPY\u{a0}b\u{200f}$QQQ", &["SPY", "QQQ"]);
        both("$AAPL.Next sentence, $AAPL_", &["AAPL", "AAPL"]);
        both("$RY.TO up", &["RY.TO"]);
    }

    #[test]
    fn what_is_no_cashtag() {
        for text in [
            "$100 $5k $5.50 $2B $1INCH",
            "US$AAPL me$AAPL株 株$AAPL",
            "$TOOLONG $AAPL2 $AAP3L",
            "$ $. $$AAPL $_F $.B",
            "$ÄÖ $ſ $AAPLé",
            "https://x.com/search?q=$AAPL&f=live",
            "#$AAPL @$AAPL",
        ] {
            both(text, &[]);
        }
    }

    #[test]
    fn readers_see_more_than_x_links() {
        for (text, x, reader) in [
            ("Apple ($AAPL) beats", &[][..], &["AAPL"][..]),
            ("“$AAPL” [$MSFT] .$TSLA", &[], &["AAPL", "MSFT", "TSLA"]),
            ("$AAPL/$MSFT", &["AAPL"], &["AAPL", "MSFT"]),
            ("🚀$GME🚀", &[], &["GME"]),
            ("$AAPL’s year", &[], &["AAPL"]),
        ] {
            assert_eq!(tags(text, Boundary::X), x, "{text:?} by X's rule");
            assert_eq!(tags(text, Boundary::Text), reader, "{text:?}");
        }
    }

    #[test]
    fn a_class_is_cut_where_it_cannot_end() {
        both("$TEST.TTT $TEST.T1 $Stock_X1", &["TEST", "TEST", "Stock"]);
    }
}
