//! Where links and e-mail addresses stand: what looks like a symbol or a name in there is none.

use std::ops::Range;

use crate::chars::is_space;

/// The stretches of a text that are addresses, in order.
pub(crate) struct Links(Vec<Range<usize>>);

impl Links {
    pub(crate) fn new(text: &str) -> Self {
        let mut spans = Vec::new();
        // Most texts have none, and are not cut into words for that.
        if !text.contains(['/', '@']) && !text.contains("www.") && !text.contains("WWW.") {
            return Self(spans);
        }
        let mut start = 0;
        for word in text.split(is_space) {
            if let Some(from) = address(word) {
                spans.push(start + from..start + word.len());
            }
            start += word.len() + text[start + word.len()..].chars().next().map_or(0, char::len_utf8);
        }
        Self(spans)
    }

    pub(crate) fn contains(&self, byte: usize) -> bool {
        let after = self.0.partition_point(|span| span.start <= byte);
        after > 0 && byte < self.0[after - 1].end
    }
}

/// Where in a word (no white space) an address begins. It goes on to the word's end.
fn address(word: &str) -> Option<usize> {
    if let Some(colon) = word.find("://") {
        let scheme = word.as_bytes()[..colon].iter().rev().take_while(|byte| byte.is_ascii_alphanumeric()).count();
        if scheme > 0 {
            return Some(colon - scheme);
        }
    }
    let opened = word.len() - word.trim_start_matches(|c: char| c.is_ascii_punctuation() && c != '$').len();
    let rest = &word[opened..];
    let www = rest.get(..4).is_some_and(|head| head.eq_ignore_ascii_case("www."));
    (www || is_host_and_path(rest) || is_mail(rest)).then_some(opened)
}

/// `x.com/…`: dotted ASCII labels, the last one of two or more small letters, then a slash.
fn is_host_and_path(word: &str) -> bool {
    let Some((host, _)) = word.split_once('/') else { return false };
    let Some((name, top)) = host.rsplit_once('.') else { return false };
    top.len() >= 2
        && top.bytes().all(|byte| byte.is_ascii_lowercase())
        && !name.is_empty()
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.'))
}

/// `name@host.tld`: something before the `@`, and after it dotted labels that end in letters.
fn is_mail(word: &str) -> bool {
    let Some((local, host)) = word.split_once('@') else { return false };
    let host = host.trim_end_matches(|c: char| c.is_ascii_punctuation());
    let Some((name, top)) = host.rsplit_once('.') else { return false };
    local.ends_with(|c: char| c.is_ascii_alphanumeric())
        && name.starts_with(|c: char| c.is_ascii_alphabetic())
        && top.len() >= 2
        && top.bytes().all(|byte| byte.is_ascii_alphabetic())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        for (text, expected) in [
            ("see https://t.co/abc now", Some("https://t.co/abc")),
            ("(https://x.com/$AAPL)", Some("https://x.com/$AAPL)")),
            ("www.tesla.com", Some("www.tesla.com")),
            ("x.com/Tesla", Some("x.com/Tesla")),
            ("mail ir.$apple@tesla.com, now", Some("ir.$apple@tesla.com,")),
            ("$AAPL@150.50 and @Tesla", None),
            ("$BRK.B/$AAPL, 3/4, P/E", None),
            ("://", None),
        ] {
            let spans = Links::new(text).0;
            assert_eq!(spans.first().map(|span| &text[span.clone()]), expected, "{text:?}");
        }
    }

    #[test]
    fn offsets_behind_wide_spaces() {
        let text = "é\u{3000}https://a.b \u{2028}$A";
        let links = Links::new(text);
        assert!(links.contains(text.find("https").unwrap()));
        assert!(!links.contains(text.find('$').unwrap()));
    }
}
