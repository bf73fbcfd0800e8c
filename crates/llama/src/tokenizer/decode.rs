//! Ids back to text, whole or one at a time.

use super::unicode::char_to_byte;
use super::{Tokenizer, UNDERLINE, byte_token};

/// How a vocabulary spells text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Decoder {
    /// GPT-2's alphabet: one character a byte.
    ByteLevel,
    /// SentencePiece: `▁` is a space, `<0x0A>` a byte; the space that encoding put in front is taken away.
    SentencePiece { strip_first_space: bool },
}

/// Decodes ids as they come: [`Detokenizer`] with its tokenizer. All parts together are what [`Tokenizer::decode`] gives.
pub struct DecodeStream<'a> {
    tokenizer: &'a Tokenizer,
    state: Detokenizer,
}

impl<'a> DecodeStream<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer, skip_special: bool) -> Self {
        DecodeStream { tokenizer, state: Detokenizer::new(skip_special, false) }
    }

    /// The text that `id` completes; often a word, empty while a character is incomplete. Unknown ids give nothing.
    pub fn push(&mut self, id: u32) -> String {
        self.state.push(self.tokenizer, id)
    }

    /// What is left when no more ids come: U+FFFD for an incomplete character, usually nothing.
    pub fn finish(mut self) -> String {
        self.state.finish(self.tokenizer)
    }
}

/// What decoding ids one at a time has to remember; whoever keeps many of them gives the tokenizer with each call. A
/// character is handed out when its last byte has arrived; bytes that can no longer become UTF-8 are handed out as U+FFFD.
#[derive(Clone, Debug)]
pub struct Detokenizer {
    skip_special: bool,
    /// An incomplete character: at most three bytes between calls.
    pending: Vec<u8>,
    at_start: bool,
}

impl Detokenizer {
    /// `continues`: text stands in front of the first id, so a space that it begins with is the text's own.
    pub fn new(skip_special: bool, continues: bool) -> Self {
        Detokenizer { skip_special, pending: Vec::new(), at_start: !continues }
    }

    /// The text that `id` completes; often a word, empty while a character is incomplete. Unknown ids give nothing.
    pub fn push(&mut self, tokenizer: &Tokenizer, id: u32) -> String {
        if self.skip_special && tokenizer.is_special(id) {
            return String::new();
        }
        let Some(token) = tokenizer.id_to_token(id) else {
            return String::new();
        };
        match tokenizer.decoder {
            Decoder::ByteLevel => {
                let before = self.pending.len();
                for c in token.chars() {
                    match char_to_byte(c) {
                        Some(byte) => self.pending.push(byte),
                        None => {
                            // An added token in plain spelling.
                            self.pending.truncate(before);
                            self.pending.extend_from_slice(token.as_bytes());
                            break;
                        }
                    }
                }
            }
            Decoder::SentencePiece { .. } => match byte_token(token) {
                Some(byte) => self.pending.push(byte),
                None => {
                    let mut buffer = [0; 4];
                    for c in token.chars() {
                        let c = if c == UNDERLINE { ' ' } else { c };
                        self.pending.extend_from_slice(c.encode_utf8(&mut buffer).as_bytes());
                    }
                }
            },
        }
        let text = self.complete(false);
        self.trim_start(tokenizer, text)
    }

    /// What is left when no more ids come: U+FFFD for an incomplete character, usually nothing.
    pub fn finish(&mut self, tokenizer: &Tokenizer) -> String {
        let text = self.complete(true);
        self.trim_start(tokenizer, text)
    }

    /// Takes the decodable part of the pending bytes, all of it if nothing more can come.
    fn complete(&mut self, last: bool) -> String {
        let mut text = String::new();
        let mut done = 0;
        let mut chunks = self.pending.utf8_chunks().peekable();
        while let Some(chunk) = chunks.next() {
            text.push_str(chunk.valid());
            done += chunk.valid().len();
            let invalid = chunk.invalid();
            if invalid.is_empty() {
                continue;
            }
            if chunks.peek().is_none() && !last && may_continue(invalid) {
                break;
            }
            text.push(char::REPLACEMENT_CHARACTER);
            done += invalid.len();
        }
        self.pending.drain(..done);
        text
    }

    fn trim_start(&mut self, tokenizer: &Tokenizer, mut text: String) -> String {
        if self.at_start && !text.is_empty() {
            self.at_start = false;
            if tokenizer.decoder == (Decoder::SentencePiece { strip_first_space: true }) && text.starts_with(' ') {
                text.remove(0);
            }
        }
        text
    }
}

/// Whether more bytes could complete `bytes`, the invalid end of a text, to a character.
fn may_continue(bytes: &[u8]) -> bool {
    matches!(std::str::from_utf8(bytes), Err(error) if error.error_len().is_none())
}
