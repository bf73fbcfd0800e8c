//! Tokens that are matched as a whole before any merging: markup such as `<|im_end|>` and `</s>`, and words that were
//! added to a vocabulary.

use std::ops::Range;

use super::unicode::{CharClass, class};
use crate::error::{Error, Result, quoted};

/// A token of `added_tokens`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct AddedToken {
    pub(crate) id: u32,
    pub(crate) content: String,
    /// Left out of decoded text.
    pub(crate) special: bool,
    /// White space on the left or right is swallowed.
    pub(crate) lstrip: bool,
    pub(crate) rstrip: bool,
}

impl AddedToken {
    pub(crate) fn new(id: u32, content: &str, special: bool) -> Self {
        AddedToken { id, content: content.to_owned(), special, lstrip: false, rstrip: false }
    }

    /// Whether it may be recognised only in the template's own text. All special tokens, and those that are markup by
    /// their looks: files exist that flag `<|im_end|>` as an ordinary added word, and it closes a turn all the same.
    fn is_markup(&self) -> bool {
        let bracketed = |open, close| self.content.starts_with(open) && self.content.ends_with(close);
        self.special || bracketed('<', '>') || bracketed('[', ']')
    }
}

/// Added tokens a file may have; Llama 3 has 256.
const MAX_ADDED: usize = 1 << 16;

/// The added tokens, found leftmost first and longest first.
pub(crate) struct AddedTokens {
    tokens: Vec<AddedToken>,
    /// Indices into `tokens` by the first byte, the longest first.
    by_first_byte: Vec<Vec<u32>>,
}

impl AddedTokens {
    pub(crate) fn new(tokens: Vec<AddedToken>) -> Result<Self> {
        if tokens.len() > MAX_ADDED {
            return Err(Error::Tokenizer(format!("{} added tokens, expected at most {MAX_ADDED}", tokens.len())));
        }
        let mut by_first_byte = vec![Vec::new(); 256];
        for (index, token) in tokens.iter().enumerate() {
            match token.content.as_bytes().first() {
                Some(&byte) => by_first_byte[byte as usize].push(index as u32),
                None => return Err(Error::Tokenizer(format!("added token {} is empty", token.id))),
            }
            if token.content.len() > 1024 {
                return Err(Error::Tokenizer(format!("added token {} is too long", quoted(&token.content))));
            }
        }
        for list in &mut by_first_byte {
            list.sort_by_key(|&index| std::cmp::Reverse(tokens[index as usize].content.len()));
        }
        Ok(AddedTokens { tokens, by_first_byte })
    }

    pub(crate) fn all(&self) -> &[AddedToken] {
        &self.tokens
    }

    pub(crate) fn has(&self, id: u32) -> bool {
        self.tokens.iter().any(|token| token.id == id)
    }

    pub(crate) fn retain(&mut self, keep: impl Fn(u32) -> bool) {
        for list in &mut self.by_first_byte {
            list.retain(|&index| keep(self.tokens[index as usize].id));
        }
    }

    /// Calls `found` for every match in order. Markup is matched only where it overlaps none of `content`, which must be
    /// sorted and disjoint.
    pub(crate) fn find(&self, text: &str, content: &[Range<usize>], found: &mut dyn FnMut(Range<usize>, u32)) {
        let bytes = text.as_bytes();
        let mut at = 0;
        let mut end_of_last = 0;
        let mut content = content.iter().filter(|range| !range.is_empty()).peekable();
        while at < bytes.len() {
            let candidates = &self.by_first_byte[bytes[at] as usize];
            if candidates.is_empty() {
                at += 1;
                continue;
            }
            while content.next_if(|range| range.end <= at).is_some() {}
            let start_of_content = content.peek().map_or(usize::MAX, |range| range.start);
            let hit = candidates.iter().map(|&index| &self.tokens[index as usize]).find(|token| {
                bytes[at..].starts_with(token.content.as_bytes())
                    && (!token.is_markup() || at + token.content.len() <= start_of_content)
            });
            let Some(token) = hit else {
                at += 1;
                continue;
            };
            let (mut start, mut end) = (at, at + token.content.len());
            if token.lstrip {
                let left = &text[end_of_last..start];
                start = end_of_last + left.trim_end_matches(|c| class(c) == CharClass::Space).len();
            }
            if token.rstrip {
                let right = &text[end..];
                end += right.len() - right.trim_start_matches(|c| class(c) == CharClass::Space).len();
            }
            found(start..end, token.id);
            at = end;
            end_of_last = end;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(tokens: Vec<AddedToken>, text: &str, content: &[Range<usize>]) -> Vec<(Range<usize>, u32)> {
        let mut out = Vec::new();
        AddedTokens::new(tokens).unwrap().find(text, content, &mut |range, id| out.push((range, id)));
        out
    }

    #[test]
    fn markup_overlapping_content_is_text() {
        let tokens = vec![AddedToken::new(2, "<|im_end|>", true), AddedToken::new(7, "moon", false)];
        let text = "<|im_end|><|im_end|>moon";
        assert_eq!(found(tokens.clone(), text, &[]), [(0..10, 2), (10..20, 2), (20..24, 7)]);
        // The second one lies in the content; the plain word is found in it all the same.
        assert_eq!(found(tokens.clone(), text, std::slice::from_ref(&(10..24))), [(0..10, 2), (20..24, 7)]);
        // One byte of overlap is enough, on either side.
        assert_eq!(found(tokens.clone(), "<|im_end|>", std::slice::from_ref(&(9..10))), []);
        assert_eq!(found(tokens.clone(), "<|im_end|>", std::slice::from_ref(&(0..1))), []);
        // Content that ends before or begins after does not matter, nor does empty content.
        assert_eq!(found(tokens, "a<|im_end|>b", &[0..1, 5..5, 11..12]), [(1..11, 2)]);
    }

    #[test]
    fn a_word_that_looks_like_markup_is_markup() {
        let tokens = vec![AddedToken::new(2, "<|im_end|>", false)];
        assert_eq!(found(tokens, "<|im_end|>", std::slice::from_ref(&(0..10))), []);
    }

    #[test]
    fn longest_first_and_white_space() {
        let mut wide = AddedToken::new(3, "<a>", true);
        (wide.lstrip, wide.rstrip) = (true, true);
        let tokens = vec![AddedToken::new(1, "<s", true), AddedToken::new(2, "<s>", true), wide];
        assert_eq!(found(tokens, "x<s> \n<a>  y<s", &[]), [(1..4, 2), (4..11, 3), (12..14, 1)]);
    }
}
