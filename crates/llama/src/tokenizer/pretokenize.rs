//! Cutting text into pre-tokens, the pieces that byte-pair merges never cross.
//!
//! The regular expressions of the Llama family are few and fixed, so each is a hand-written scanner that reads every
//! character once or twice; it takes linear time on any text, which a backtracking engine does not promise.

use super::unicode::{CharClass, class};

/// GPT-2's expression (`ByteLevel` with `use_regex` in `tokenizer.json`).
pub(crate) const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
/// Llama 3's expression.
pub(crate) const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// One stage; each cuts the pieces of the stage before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// Numbers apart from the rest, every digit alone (`individual`) or runs together.
    Digits {
        individual: bool,
    },
    Gpt2,
    Llama3,
    /// A space before every piece that begins with none (`ByteLevel` with `add_prefix_space`).
    PrefixSpace,
}

/// Hands the pieces of `text` after all `steps` to `emit`, in order.
pub(crate) fn split(text: &str, steps: &[Step], emit: &mut dyn FnMut(&str)) {
    let Some((step, rest)) = steps.split_first() else {
        if !text.is_empty() {
            emit(text);
        }
        return;
    };
    let mut at = 0;
    let mut cut = |length: usize| {
        split(&text[at..at + length], rest, emit);
        at += length;
    };
    match step {
        Step::Digits { individual } => {
            let mut left = text;
            while let Some(first) = left.chars().next() {
                let number = class(first) == CharClass::Number;
                let length = if number && *individual {
                    first.len_utf8()
                } else {
                    run(left, |c| (class(c) == CharClass::Number) == number)
                };
                cut(length);
                left = &left[length..];
            }
        }
        Step::Gpt2 => {
            let mut left = text;
            while !left.is_empty() {
                let length = gpt2_match(left);
                cut(length);
                left = &left[length..];
            }
        }
        Step::Llama3 => {
            let mut left = text;
            while !left.is_empty() {
                let length = llama3_match(left);
                cut(length);
                left = &left[length..];
            }
        }
        Step::PrefixSpace => {
            if text.is_empty() || text.starts_with(' ') {
                split(text, rest, emit);
            } else {
                split(&format!(" {text}"), rest, emit);
            }
        }
    }
}

/// Bytes of the longest prefix whose characters all satisfy `wanted`.
fn run(text: &str, wanted: impl Fn(char) -> bool) -> usize {
    text.find(|c| !wanted(c)).unwrap_or(text.len())
}

/// A contraction at the start of `text` ("'s", "'re", …), in bytes; `fold` ignores case.
fn contraction(text: &str, fold: bool) -> Option<usize> {
    let mut chars = text.strip_prefix('\'')?.chars();
    // U+017F (long s) folds to s in Unicode; no other character outside ASCII folds into these suffixes.
    let lower = |c: char| match c {
        _ if !fold => c,
        'ſ' => 's',
        _ => c.to_ascii_lowercase(),
    };
    let first = chars.next()?;
    let second = chars.next();
    match (lower(first), second.map(lower)) {
        ('s' | 't' | 'm' | 'd', _) => Some(1 + first.len_utf8()),
        ('r' | 'v', Some('e')) | ('l', Some('l')) => Some(3),
        _ => None,
    }
}

/// White space at the start of `text`: all of it at the end of the text, else all but the last character, which belongs
/// to what follows (`\s+(?!\S)|\s+`).
fn spaces(text: &str) -> usize {
    let length = run(text, |c| class(c) == CharClass::Space);
    if length == text.len() {
        return length;
    }
    let last = text[..length].chars().next_back().map_or(0, char::len_utf8);
    if length > last { length - last } else { length }
}

/// Length of the first match of [`GPT2`] in `text`, which is not empty. Every character is matched by some alternative.
fn gpt2_match(text: &str) -> usize {
    if let Some(length) = contraction(text, false) {
        return length;
    }
    let lead = usize::from(text.starts_with(' '));
    let body = &text[lead..];
    match body.chars().next().map(class) {
        Some(CharClass::Space) | None => spaces(text),
        Some(kind) => lead + run(body, |c| class(c) == kind),
    }
}

/// Length of the first match of [`LLAMA3`] in `text`, which is not empty.
fn llama3_match(text: &str) -> usize {
    if let Some(length) = contraction(text, true) {
        return length;
    }
    let mut chars = text.chars();
    let Some(first) = chars.next() else { return 0 };
    let kind = class(first);
    let letters = |text: &str| run(text, |c| class(c) == CharClass::Letter);
    match kind {
        CharClass::Letter => return letters(text),
        CharClass::Number => {
            let digits = run(text, |c| class(c) == CharClass::Number);
            return text[..digits].char_indices().nth(3).map_or(digits, |(at, _)| at);
        }
        _ => {}
    }
    // One character that is no line break, then letters.
    if first != '\r' && first != '\n' {
        let word = letters(chars.as_str());
        if word > 0 {
            return first.len_utf8() + word;
        }
    }
    // Symbols, after at most one space, with the line breaks behind them.
    let lead = usize::from(first == ' ');
    let symbols = run(&text[lead..], |c| class(c) == CharClass::Other);
    if symbols > 0 {
        let end = lead + symbols;
        return end + run(&text[end..], |c| c == '\r' || c == '\n');
    }
    // White space up to its last line break, if it has one.
    let blank = run(text, |c| class(c) == CharClass::Space);
    if let Some(at) = text[..blank].rfind(['\r', '\n']) {
        return at + 1;
    }
    spaces(text)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pieces(text: &str, steps: &[Step]) -> Vec<String> {
        let mut out = Vec::new();
        split(text, steps, &mut |piece| out.push(piece.to_owned()));
        out
    }

    const SMOLLM: [Step; 2] = [Step::Digits { individual: true }, Step::Gpt2];

    #[test]
    fn gpt2() {
        assert_eq!(
            pieces("I'll buy  $TSLA at 420.69!!\n\n  ok 'S", &[Step::Gpt2]),
            ["I", "'ll", " buy", " ", " $", "TSLA", " at", " 420", ".", "69", "!!", "\n\n ", " ok", " '", "S"]
        );
        assert_eq!(pieces("a\n\nb \u{a0}", &[Step::Gpt2]), ["a", "\n", "\n", "b", " \u{a0}"]);
    }

    #[test]
    fn smollm_cuts_digits_before_everything() {
        assert_eq!(pieces("at 12  3x", &SMOLLM), ["at", " ", "1", "2", "  ", "3", "x"]);
        assert_eq!(pieces("½", &SMOLLM), ["½"]);
    }

    #[test]
    fn llama3() {
        assert_eq!(
            pieces("We'Re up 12345% (wow)\r\n\n  x\t\n y  ", &[Step::Llama3]),
            ["We", "'Re", " up", " ", "123", "45", "%", " (", "wow", ")\r\n\n", " ", " x", "\t\n", " y", "  "]
        );
        assert_eq!(pieces("'ſ'ſ", &[Step::Llama3]), ["'ſ", "'ſ"]);
    }

    proptest! {
        #[test]
        fn nothing_is_lost(text in "\\PC{0,40}|[ a1\\n\\r\t'sS$]{0,40}") {
            for steps in [&[Step::Gpt2][..], &SMOLLM, &[Step::Llama3], &[Step::Digits { individual: false }]] {
                prop_assert_eq!(pieces(&text, steps).concat(), text.clone());
            }
        }
    }
}
