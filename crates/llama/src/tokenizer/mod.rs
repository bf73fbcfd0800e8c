//! Text to token ids and back.
//!
//! Two kinds of vocabulary exist in the Llama family, both merged by byte pairs: byte-level (GPT-2's, as SmolLM and
//! Llama 3 have it) and SentencePiece (Llama 2). They come from GGUF metadata ([`Tokenizer::from_gguf`]) or from the
//! files of a Hugging Face directory ([`Tokenizer::from_hf_dir`]).
//!
//! Invariants:
//!
//! - [`Tokenizer::encode`] never yields a special token, whatever stands in the text: a tweet cannot close its own turn.
//! - [`Tokenizer::encode_rendered`] yields special tokens only for markup that the chat template wrote.
//! - No beginning-of-sequence token is ever added: the template writes it where the model wants one, as in
//!   Transformers' `apply_chat_template`.

mod added;
mod bpe;
mod decode;
mod gguf;
mod json;
mod pretokenize;
mod sentencepiece;
mod unicode;
mod write;

use std::collections::HashMap;
use std::path::Path;

pub use decode::{DecodeStream, Detokenizer};

use self::added::{AddedToken, AddedTokens};
use self::bpe::Merges;
use self::decode::Decoder;
use self::pretokenize::Step;
use crate::chat::Rendered;
use crate::error::{Error, Result};

/// SentencePiece's spelling of a space.
const UNDERLINE: char = '▁';
/// No symbol: a byte that the vocabulary has no token for.
const NO_ID: u32 = u32::MAX;
/// Largest vocabulary that is believed.
const MAX_VOCAB: usize = 1 << 22;

/// When a SentencePiece vocabulary puts a space before a piece of text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum SpacePrefix {
    Never,
    /// Before every piece (SentencePiece's dummy prefix; `Prepend` of `tokenizer.json`).
    Always,
    /// Before every piece that does not begin with a space (`Metaspace`, scheme `always`).
    UnlessSpace,
    /// As `UnlessSpace`, but only at the start of the text (`Metaspace`, scheme `first`).
    FirstUnlessSpace,
}

/// How plain text becomes symbols before they are merged.
enum Symbols {
    /// GPT-2: pre-tokens, then one symbol a byte.
    Bytes {
        steps: Vec<Step>,
        /// Symbol of each byte, [`NO_ID`] where the vocabulary has none: such bytes are left out, as by `tokenizers`.
        initial: Box<[u32; 256]>,
        /// Pre-tokens that are a token by themselves are not merged (Llama 3).
        whole_words: Option<HashMap<Box<[u8]>, u32>>,
    },
    /// SentencePiece: spaces spelled `▁`, then one symbol a character.
    Characters {
        prefix: SpacePrefix,
        chars: HashMap<char, u32>,
        /// Characters that are no token but occur inside tokens: symbol `inner_base + i` is `inner[i]`.
        inner: Vec<char>,
        inner_base: usize,
        /// Tokens of the 256 bytes, for characters without a token.
        bytes: Option<Box<[u32; 256]>>,
        unknown: Option<u32>,
        fuse_unknown: bool,
        cut: Cut,
    },
}

/// Where SentencePiece text may be cut before merging.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cut {
    /// Nowhere: some token reaches over a space.
    Nowhere,
    /// Before a `▁` that follows something else; exact when no token holds one inside, and keeps words short.
    BeforeWords,
    /// Before every `▁` (`Metaspace` with `split`).
    BeforeSpaces,
}

/// A vocabulary and its rules. Cheap to share: all methods take `&self` and none locks.
pub struct Tokenizer {
    tokens: Vec<Option<Box<str>>>,
    ids: HashMap<Box<str>, u32>,
    merges: Merges,
    symbols: Symbols,
    added: AddedTokens,
    decoder: Decoder,
    special: Vec<bool>,
    bos: Option<u32>,
    eos: Option<u32>,
    pad: Option<u32>,
    unknown: Option<u32>,
    adds_bos: bool,
}

/// What the readers collect.
struct Parts {
    tokens: Vec<Option<Box<str>>>,
    merges: Merges,
    symbols: Symbols,
    added: Vec<AddedToken>,
    decoder: Decoder,
    /// Ids that are special without being [`AddedToken`]s.
    special: Vec<u32>,
    bos: Option<u32>,
    eos: Option<u32>,
    pad: Option<u32>,
    unknown: Option<u32>,
    adds_bos: bool,
}

impl Tokenizer {
    /// The tokenizer in a GGUF file's metadata.
    ///
    /// # Errors
    /// When the file has none, or one whose model or pre-tokenizer is not of the Llama family.
    pub fn from_gguf(gguf: &crate::gguf::Gguf) -> Result<Self> {
        gguf::read(gguf)
    }

    /// The tokenizer of a directory in Hugging Face layout: `tokenizer.json`, else SentencePiece's `tokenizer.model`.
    pub fn from_hf_dir(dir: &Path) -> Result<Self> {
        let json = dir.join("tokenizer.json");
        if json.is_file() {
            return json::read(dir, &json);
        }
        let model = dir.join("tokenizer.model");
        if model.is_file() {
            return sentencepiece::read(dir, &model);
        }
        Err(Error::file(
            dir,
            "neither tokenizer.json nor tokenizer.model is here\n  hint: download the tokenizer's files as well",
        ))
    }

    fn build(parts: Parts) -> Result<Self> {
        let Parts {
            mut tokens,
            merges,
            symbols,
            added,
            decoder,
            special: ids_special,
            bos,
            eos,
            pad,
            unknown,
            adds_bos,
        } = parts;
        for token in &added {
            let at = token.id as usize;
            if at >= MAX_VOCAB {
                return Err(Error::Tokenizer(format!("added token {:?} has id {at}", token.content)));
            }
            if at >= tokens.len() {
                tokens.resize(at + 1, None);
            }
            if tokens[at].is_none() {
                tokens[at] = Some(token.content.as_str().into());
            }
        }
        let mut ids = HashMap::with_capacity(tokens.len());
        for (id, token) in tokens.iter().enumerate() {
            if let Some(token) = token {
                ids.entry(token.clone()).or_insert(id as u32);
            }
        }
        let mut special = vec![false; tokens.len()];
        let named = [bos, eos, pad, unknown].into_iter().flatten();
        for id in named.chain(ids_special).chain(added.iter().filter(|token| token.special).map(|token| token.id)) {
            match special.get_mut(id as usize) {
                Some(flag) => *flag = true,
                None => {
                    return Err(Error::Tokenizer(format!(
                        "special token {id} is outside the vocabulary of {} tokens",
                        tokens.len()
                    )));
                }
            }
        }
        let added = AddedTokens::new(added)?;
        Ok(Tokenizer { tokens, ids, merges, symbols, added, decoder, special, bos, eos, pad, unknown, adds_bos })
    }

    /// Drops added tokens that a model with `rows` embeddings has no row for: directories exist whose `added_tokens.json`
    /// names a `<pad>` that the model never got.
    ///
    /// # Errors
    /// When a token of the vocabulary proper has no row.
    pub(crate) fn limit(&mut self, rows: usize) -> Result<()> {
        if self.tokens.len() <= rows {
            return Ok(());
        }
        let proper = |id: usize| self.tokens[id].is_some() && !self.added.has(id as u32);
        if let Some(id) = (rows..self.tokens.len()).find(|&id| proper(id)) {
            return Err(Error::Tokenizer(format!("token {id} is beyond the model's embedding of {rows} rows")));
        }
        self.added.retain(|id| (id as usize) < rows);
        self.tokens.truncate(rows);
        self.special.truncate(rows);
        self.ids.retain(|_, id| (*id as usize) < rows);
        for named in [&mut self.bos, &mut self.eos, &mut self.pad, &mut self.unknown] {
            *named = named.filter(|&id| (id as usize) < rows);
        }
        Ok(())
    }

    /// Ids of plain text. Nothing in it becomes a special token, and none is added.
    pub fn encode(&self, text: &str) -> Vec<u32> {
        self.encode_around(text, std::slice::from_ref(&(0..text.len())))
    }

    /// Ids of a rendered conversation: markup outside the content ranges becomes special tokens, look-alikes inside stay
    /// plain text. For contents without look-alikes the ids are those of Transformers' `apply_chat_template`.
    pub fn encode_rendered(&self, rendered: &Rendered) -> Vec<u32> {
        let content = &rendered.content;
        if content.is_sorted_by_key(|range| range.start) {
            return self.encode_around(&rendered.text, content);
        }
        let mut content = content.clone();
        content.sort_by_key(|range| range.start);
        self.encode_around(&rendered.text, &content)
    }

    /// Cuts `text` at the added tokens that may be recognised and encodes what lies between.
    fn encode_around(&self, text: &str, content: &[std::ops::Range<usize>]) -> Vec<u32> {
        let mut out = Vec::with_capacity(text.len() / 3 + 4);
        let mut at = 0;
        self.added.find(text, content, &mut |range, id| {
            self.encode_piece(&text[at..range.start], at == 0, &mut out);
            out.push(id);
            at = range.end;
        });
        self.encode_piece(&text[at..], at == 0, &mut out);
        out
    }

    fn encode_piece(&self, text: &str, at_start: bool, out: &mut Vec<u32>) {
        if text.is_empty() {
            return;
        }
        match &self.symbols {
            Symbols::Bytes { steps, initial, whole_words } => {
                let mut symbols = Vec::new();
                pretokenize::split(text, steps, &mut |word| {
                    if let Some(&id) = whole_words.as_ref().and_then(|words| words.get(word.as_bytes())) {
                        out.push(id);
                        return;
                    }
                    symbols.clear();
                    symbols.extend(word.bytes().map(|byte| initial[byte as usize]).filter(|&id| id != NO_ID));
                    self.merges.apply(&mut symbols);
                    out.extend_from_slice(&symbols);
                });
            }
            Symbols::Characters { .. } => self.encode_characters(text, at_start, out),
        }
    }

    fn encode_characters(&self, text: &str, at_start: bool, out: &mut Vec<u32>) {
        let Symbols::Characters { prefix, chars, inner, inner_base, bytes, unknown, fuse_unknown, cut } = &self.symbols
        else {
            return;
        };
        let begins_with_space = text.starts_with([' ', UNDERLINE]);
        let prefixed = match prefix {
            SpacePrefix::Never => false,
            SpacePrefix::Always => true,
            SpacePrefix::UnlessSpace => !begins_with_space,
            SpacePrefix::FirstUnlessSpace => at_start && !begins_with_space,
        };
        let mut last_was_unknown = false;
        let mut emit = |symbols: &mut Vec<u32>| {
            self.merges.apply(symbols);
            for &symbol in symbols.iter() {
                let c = inner.get((symbol as usize).wrapping_sub(*inner_base)).copied();
                match c {
                    None if symbol != NO_ID => {
                        last_was_unknown = false;
                        out.push(symbol);
                    }
                    Some(c) if push_bytes(c, bytes.as_deref(), out) => last_was_unknown = false,
                    _ => {
                        if let Some(id) = unknown.filter(|_| !(last_was_unknown && *fuse_unknown)) {
                            out.push(id);
                        }
                        last_was_unknown = true;
                    }
                }
            }
            symbols.clear();
        };
        let mut symbols = Vec::new();
        let mut previous = None;
        for c in prefixed.then_some(UNDERLINE).into_iter().chain(text.chars()) {
            let c = if c == ' ' { UNDERLINE } else { c };
            let boundary = match cut {
                Cut::Nowhere => false,
                Cut::BeforeWords => c == UNDERLINE && previous != Some(UNDERLINE),
                Cut::BeforeSpaces => c == UNDERLINE,
            };
            if boundary && !symbols.is_empty() {
                emit(&mut symbols);
            }
            previous = Some(c);
            match chars.get(&c) {
                Some(&symbol) => symbols.push(symbol),
                None if push_bytes(c, bytes.as_deref(), &mut symbols) => {}
                None => symbols.push(NO_ID),
            }
        }
        emit(&mut symbols);
    }

    /// Text of `ids`; special tokens are left out if `skip_special`. Bytes that are no UTF-8 become U+FFFD.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        let mut stream = DecodeStream::new(self, skip_special);
        let mut text = String::new();
        for &id in ids {
            text.push_str(&stream.push(id));
        }
        text.push_str(&stream.finish());
        text
    }

    /// A decoder for one id at a time, special tokens left out.
    pub fn decode_stream(&self) -> DecodeStream<'_> {
        DecodeStream::new(self, true)
    }

    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.ids.get(token).copied()
    }

    /// The token as the vocabulary spells it ("Ġthe", "▁the").
    pub fn id_to_token(&self, id: u32) -> Option<&str> {
        self.tokens.get(id as usize)?.as_deref()
    }

    pub fn is_special(&self, id: u32) -> bool {
        self.special.get(id as usize).copied().unwrap_or(false)
    }

    /// One more than the largest id.
    pub fn vocab_size(&self) -> usize {
        self.tokens.len()
    }

    pub fn bos_token_id(&self) -> Option<u32> {
        self.bos
    }

    pub fn eos_token_id(&self) -> Option<u32> {
        self.eos
    }

    pub fn pad_token_id(&self) -> Option<u32> {
        self.pad
    }

    pub fn unk_token_id(&self) -> Option<u32> {
        self.unknown
    }

    /// Whether the model was trained on plain text that begins with the bos token. Templates write theirs themselves;
    /// whoever encodes a prompt without a template adds it.
    pub fn adds_bos(&self) -> bool {
        self.adds_bos
    }
}

/// Pushes the byte tokens of a character, if the vocabulary has all of them.
fn push_bytes(c: char, bytes: Option<&[u32; 256]>, out: &mut Vec<u32>) -> bool {
    let Some(bytes) = bytes else { return false };
    let mut buffer = [0; 4];
    let spelled = c.encode_utf8(&mut buffer).as_bytes();
    let complete = spelled.iter().all(|&byte| bytes[byte as usize] != NO_ID);
    if complete {
        out.extend(spelled.iter().map(|&byte| bytes[byte as usize]));
    }
    complete
}

/// The byte that a SentencePiece byte token ("<0x0A>") stands for.
fn byte_token(token: &str) -> Option<u8> {
    let hex = token.strip_prefix("<0x")?.strip_suffix('>')?;
    if hex.len() != 2 || !hex.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    u8::from_str_radix(hex, 16).ok()
}
