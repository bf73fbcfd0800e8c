//! Cleaning of texts, and the key under which two texts count as the same.
//!
//! [`clean_text`] changes how a text is written, never what it says: it is what training and classification see.
//! [`normalised_key`] throws away what does not distinguish two tweets (links, mentions, case, most punctuation) and is
//! only ever compared.

use std::borrow::Cow;

use unicode_normalization::{UnicodeNormalization, is_nfc, is_nfkc};

#[derive(Clone, Debug, PartialEq)]
pub struct CleanOptions {
    /// Replace every link by `http`, as the tweet models of the field do.
    pub mask_urls: bool,
    /// Replace every user name by `@user`.
    pub mask_users: bool,
}

#[expect(clippy::derivable_impls, reason = "the defaults are a decision, not an accident of the types")]
impl Default for CleanOptions {
    fn default() -> Self {
        Self { mask_urls: false, mask_users: false }
    }
}

/// The text with HTML entities decoded, Unicode composed (NFC), invisible characters and controls removed, and white
/// space collapsed. Line breaks stay (at most two in a row): they are part of how a tweet is written.
pub fn clean_text(text: &str, options: &CleanOptions) -> String {
    let decoded = decode_entities(text);
    let mut out = String::with_capacity(decoded.len());
    // Invisible characters go first: one of them may stand between a letter and its accent.
    let visible = decoded.chars().filter(|character| character.is_whitespace() || !is_invisible(*character));
    if is_nfc(&decoded) && !decoded.chars().any(is_invisible) {
        push_collapsed(&mut out, visible);
    } else {
        push_collapsed(&mut out, visible.nfc());
    }
    out.truncate(out.trim_end().len());
    if options.mask_urls || options.mask_users { mask(&out, options) } else { out }
}

fn push_collapsed(out: &mut String, characters: impl Iterator<Item = char>) {
    let (mut breaks, mut space) = (0usize, false);
    for character in characters {
        match character {
            '\n' | '\u{2028}' | '\u{2029}' | '\u{85}' => breaks += 1,
            _ if character.is_whitespace() => space = true,
            _ => {
                if !out.is_empty() {
                    match breaks {
                        0 if space => out.push(' '),
                        0 => {}
                        1 => out.push('\n'),
                        _ => out.push_str("\n\n"),
                    }
                }
                (breaks, space) = (0, false);
                out.push(character);
            }
        }
    }
}

/// Controls, zero-width marks, direction overrides and byte-order marks. The joiner and the variation selectors that
/// hold emoji together stay.
fn is_invisible(character: char) -> bool {
    character.is_control()
        || matches!(character, '\u{AD}' | '\u{200B}' | '\u{200C}' | '\u{200E}' | '\u{200F}' | '\u{FEFF}' | '\u{FFFE}')
        || matches!(character, '\u{202A}'..='\u{202E}' | '\u{2060}'..='\u{2064}' | '\u{2066}'..='\u{206F}')
        || matches!(character, '\u{FFF9}'..='\u{FFFB}' | '\u{E0000}'..='\u{E001F}')
}

fn mask(text: &str, options: &CleanOptions) -> String {
    let mut out = String::with_capacity(text.len());
    for piece in text.split_inclusive(char::is_whitespace) {
        let word = piece.trim_end();
        let link = if options.mask_urls { link_start(word) } else { None };
        let (before, link) = word.split_at(link.unwrap_or(word.len()));
        if options.mask_users {
            mask_users(&mut out, before)
        } else {
            out.push_str(before)
        }
        if !link.is_empty() {
            out.push_str("http");
            // A bracket or quotation mark that was opened before the link is closed behind it.
            if !before.is_empty() {
                out.push_str(&link[link.trim_end_matches([')', ']', '}', '>', '"', '\'', '”', '’', '»']).len()..]);
            }
        }
        out.push_str(&piece[word.len()..]);
    }
    out
}

/// Where in a word a link begins; it goes on to the word's end.
fn link_start(word: &str) -> Option<usize> {
    let scheme = |at: &usize| {
        let rest = &word.as_bytes()[*at..];
        let starts =
            |prefix: &str| rest.get(..prefix.len()).is_some_and(|head| head.eq_ignore_ascii_case(prefix.as_bytes()));
        let opens = || !word[..*at].ends_with(char::is_alphanumeric);
        starts("http://") || starts("https://") || (starts("www.") && opens())
    };
    word.char_indices().map(|(at, _)| at).find(scheme)
}

/// Replaces user names wherever they can begin: not inside of a mail address.
fn mask_users(out: &mut String, word: &str) {
    let mut rest = word;
    while let Some(at) = rest.find('@') {
        let (before, name) = rest.split_at(at);
        out.push_str(before);
        let length = mention_len(name);
        let inside =
            out.ends_with(|c: char| c.is_alphanumeric() || matches!(c, '_' | '@')) && at + word.len() > rest.len();
        if length > 0 && !inside {
            out.push_str("@user");
            rest = &name[length..];
        } else {
            out.push('@');
            rest = &name[1..];
        }
    }
    out.push_str(rest);
}

fn is_url(word: &str) -> bool {
    let start = |prefix: &str| word.get(..prefix.len()).is_some_and(|head| head.eq_ignore_ascii_case(prefix));
    start("http://") || start("https://") || start("www.")
}

/// Length in bytes of the `@name` that `word` begins with (0 if it does not); a mask counts as one.
fn mention_len(word: &str) -> usize {
    let Some(name) = word.strip_prefix('@') else { return 0 };
    let length = name.bytes().take_while(|byte| byte.is_ascii_alphanumeric() || *byte == b'_').count();
    if length == 0 { 0 } else { 1 + length }
}

/// What two tweets must share to count as the same: lower case, compatibility forms folded, links, mentions and the
/// `RT @name:` of a retweet dropped, punctuation reduced to what carries meaning in a market text: `$` and `#` tags lose
/// nothing but the `#`, signs and percent stay on numbers ("+5%" is not "-5%"), a question stays a question, emoji stay.
pub fn normalised_key(text: &str) -> String {
    let decoded = decode_entities(text);
    let folded: Cow<'_, str> =
        if decoded.is_ascii() || is_nfkc(&decoded) { decoded } else { Cow::Owned(decoded.nfkc().collect()) };
    let mut key = String::with_capacity(folded.len());
    let mut first = true;
    for word in folded.split_whitespace() {
        let retweet = first && word.eq_ignore_ascii_case("rt");
        first = false;
        if retweet || is_url(word) || word == "http" {
            continue;
        }
        push_key_word(&mut key, &word[mention_len(word)..]);
    }
    key
}

fn push_key_word(key: &mut String, word: &str) {
    let mut characters = word.chars().peekable();
    let mut gap = !key.is_empty();
    while let Some(character) = characters.next() {
        let before_digit = characters.peek().is_some_and(|next| next.is_ascii_digit() || *next == '.' || *next == '$');
        let in_number = before_digit && !gap && key.ends_with(|last: char| last.is_ascii_digit());
        let keep = match character {
            '$' | '%' | '€' | '£' | '¥' => true,
            '.' | ',' | ':' | '/' => in_number,
            '+' | '-' => before_digit && (gap || key.is_empty() || key.ends_with(['(', '$', ' '])),
            '?' => {
                // A question mark is a word of its own, however often it is repeated.
                if !key.ends_with('?') {
                    if !key.is_empty() {
                        key.push(' ');
                    }
                    key.push('?');
                }
                gap = true;
                continue;
            }
            '\'' | '’' | '`' | '"' | '“' | '”' | '#' | '\u{FE0F}' | '\u{200D}' => continue,
            _ if is_invisible(character) => continue,
            _ => character.is_alphanumeric() || !(character.is_ascii() || is_punctuation(character)),
        };
        if !keep {
            gap = !key.is_empty();
            continue;
        }
        if std::mem::take(&mut gap) && !key.ends_with(' ') && !key.is_empty() {
            key.push(' ');
        }
        if character.is_ascii() {
            key.push(character.to_ascii_lowercase());
        } else {
            key.extend(character.to_lowercase());
        }
    }
}

fn is_punctuation(character: char) -> bool {
    matches!(character, '\u{A1}'..='\u{BF}' | '×' | '÷' | '\u{2010}'..='\u{2027}' | '\u{2030}'..='\u{205E}' | '\u{3000}'..='\u{303F}')
}

/// Named and numeric character references, decoded until nothing changes (sources escape twice now and then), at most
/// three times.
pub(crate) fn decode_entities(text: &str) -> Cow<'_, str> {
    let mut current = Cow::Borrowed(text);
    for _ in 0..3 {
        match decode_once(&current) {
            Some(decoded) => current = Cow::Owned(decoded),
            None => break,
        }
    }
    current
}

fn decode_once(text: &str) -> Option<String> {
    let mut rest = text;
    let mut out: Option<String> = None;
    let mut kept_from = 0usize;
    while let Some(at) = rest.find('&') {
        let offset = text.len() - rest.len() + at;
        rest = &rest[at + 1..];
        let Some((decoded, length)) = decode_reference(rest) else { continue };
        let out = out.get_or_insert_with(|| String::with_capacity(text.len()));
        out.push_str(&text[kept_from..offset]);
        out.push(decoded);
        rest = &rest[length..];
        kept_from = text.len() - rest.len();
    }
    out.map(|mut out| {
        out.push_str(&text[kept_from..]);
        out
    })
}

/// The character that the reference after `&` stands for, and how many bytes it takes. The semicolon may be missing
/// only after the five names that old pages write without it, and only when no letter follows ("&ltd" stays).
fn decode_reference(text: &str) -> Option<(char, usize)> {
    if let Some(number) = text.strip_prefix('#') {
        let (digits, radix) = match number.strip_prefix(['x', 'X']) {
            Some(hexadecimal) => (hexadecimal, 16),
            None => (number, 10),
        };
        let length = digits.bytes().take_while(|byte| (*byte as char).is_digit(radix)).count();
        if length == 0 || length > 7 || digits.as_bytes().get(length) != Some(&b';') {
            return None;
        }
        let code = u32::from_str_radix(&digits[..length], radix).ok()?;
        // 128 to 159 are what Windows-1252 has there, by the HTML standard; only the ones that occur are worth a name.
        let character = match code {
            0x85 => '…',
            0x91 => '‘',
            0x92 => '’',
            0x93 => '“',
            0x94 => '”',
            0x96 => '–',
            0x97 => '—',
            _ => char::from_u32(code)?,
        };
        return Some((character, text.len() - digits.len() + length + 1));
    }
    let length = text.bytes().take(9).take_while(u8::is_ascii_alphanumeric).count();
    let name = &text[..length];
    let (_, character) = ENTITIES.iter().find(|(known, _)| *known == name)?;
    match text.as_bytes().get(length) {
        Some(b';') => Some((*character, length + 1)),
        _ if matches!(name, "amp" | "lt" | "gt" | "quot" | "nbsp") => Some((*character, length)),
        _ => None,
    }
}

/// The names that occur in tweets and feeds; any other reference is left as it stands.
const ENTITIES: [(&str, char); 49] = [
    ("amp", '&'),
    ("lt", '<'),
    ("gt", '>'),
    ("quot", '"'),
    ("apos", '\''),
    ("nbsp", '\u{A0}'),
    ("hellip", '…'),
    ("ndash", '–'),
    ("mdash", '—'),
    ("lsquo", '‘'),
    ("rsquo", '’'),
    ("ldquo", '“'),
    ("rdquo", '”'),
    ("laquo", '«'),
    ("raquo", '»'),
    ("bull", '•'),
    ("middot", '·'),
    ("euro", '€'),
    ("pound", '£'),
    ("yen", '¥'),
    ("cent", '¢'),
    ("copy", '©'),
    ("reg", '®'),
    ("trade", '™'),
    ("deg", '°'),
    ("plusmn", '±'),
    ("times", '×'),
    ("divide", '÷'),
    ("frac12", '½'),
    ("frac14", '¼'),
    ("frac34", '¾'),
    ("sect", '§'),
    ("para", '¶'),
    ("larr", '←'),
    ("uarr", '↑'),
    ("rarr", '→'),
    ("darr", '↓'),
    ("eacute", 'é'),
    ("egrave", 'è'),
    ("agrave", 'à'),
    ("ccedil", 'ç'),
    ("auml", 'ä'),
    ("ouml", 'ö'),
    ("uuml", 'ü'),
    ("Auml", 'Ä'),
    ("Ouml", 'Ö'),
    ("Uuml", 'Ü'),
    ("szlig", 'ß'),
    ("zwj", '\u{200D}'),
];

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn clean(text: &str) -> String {
        clean_text(text, &CleanOptions::default())
    }

    #[test]
    fn entities() {
        assert_eq!(clean("S&amp;P 500 &gt; 4,000"), "S&P 500 > 4,000");
        assert_eq!(clean("AT&amp;amp;T"), "AT&T");
        assert_eq!(clean("it&#39;s &#x1F680; &#8217;"), "it's 🚀 ’");
        assert_eq!(
            clean("P&L, Q&A, R&D; &ltd &unknown; &#xD800; &#; & &"),
            "P&L, Q&A, R&D; &ltd &unknown; &#xD800; &#; & &"
        );
        assert_eq!(clean("09:58 -&gt; call"), "09:58 -> call");
        assert_eq!(clean("a&gt b"), "a> b");
    }

    #[test]
    fn unicode_and_space() {
        assert_eq!(clean("e\u{301}te\u{301}"), "été");
        assert_eq!(clean("  a\u{200B}b\u{202E}c \t d\r\n e\n\n\n\nf\u{FEFF}  "), "abc d\ne\n\nf");
        assert_eq!(clean("👨\u{200D}👩\u{200D}👧 ❤\u{FE0F}"), "👨\u{200D}👩\u{200D}👧 ❤\u{FE0F}");
        assert_eq!(clean("\u{200B}\n \u{7}"), "");
    }

    #[test]
    fn masks() {
        let options = CleanOptions { mask_urls: true, mask_users: true };
        assert_eq!(
            clean_text("RT @jim_c: see https://t.co/x1 mail a@b.c, @ 5 HTTP://Q @amy's", &options),
            "RT @user: see http mail a@b.c, @ 5 http @user's"
        );
        assert_eq!(
            clean_text(".@bob (https://t.co/x) “@amy” $A/@b via https://t.co/y, é@c.d @@x (www.a.b", &options),
            ".@user (http) “@user” $A/@user via http é@c.d @@x (http"
        );
    }

    #[test]
    fn keys() {
        let key = normalised_key;
        assert_eq!(key("RT @bob: $AAPL is UP +5.2%!!! https://t.co/abc"), "$aapl is up +5.2%");
        assert_eq!(key("$AAPL is up +5.2% 🚀"), "$aapl is up +5.2% 🚀");
        assert_ne!(key("up 5%"), key("-5%"));
        assert_ne!(key("$AAPL +5%"), key("$AAPL -5%"));
        assert_eq!(key("Is $F a buy???"), "is $f a buy ?");
        assert_eq!(key("don’t \"panic\" — it's #Earnings-day"), "dont panic its earnings day");
        assert_eq!(key("1,200 vs 1.3 (10:30) 9/10"), "1,200 vs 1.3 10:30 9/10");
        assert_eq!(key("ＦＵＬＬ ﬁne"), "full fine");
        assert_eq!(key("!!! ... https://t.co/a"), "");
    }

    proptest! {
        #[test]
        fn cleaning_is_idempotent_and_never_panics(text in "\\PC{0,60}|[&#x;a-z0-9@$%+. \\n\u{200B}\u{301}e?-]{0,60}") {
            let once = clean(&text);
            // What three rounds of decoding leave may decode further: only then a second cleaning may differ.
            if decode_once(&once).is_none() {
                prop_assert_eq!(&clean(&once), &once);
            }
            let masked = clean_text(&text, &CleanOptions { mask_urls: true, mask_users: true });
            prop_assert!(!masked.split_whitespace().any(is_url));
            let _ = normalised_key(&text);
        }
    }
}
