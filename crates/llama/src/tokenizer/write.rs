//! A tokenizer as the files of others: `tokenizer.json` for Transformers, `tokenizer.ggml.*` for llama.cpp.
//!
//! Both are written from the tables that this crate encodes with, so a file says what the reader understood. What a format
//! cannot express is an error.

use serde_json::{Map, Value, json};

use super::decode::Decoder;
use super::pretokenize::Step;
use super::{SpacePrefix, Symbols, Tokenizer};
use crate::error::{Error, Result};

/// llama.cpp's types of tokens.
const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;
const BYTE: i32 = 6;

/// What `tokenizer.ggml.*` says.
pub(crate) struct GgufVocabulary {
    /// "gpt2" or "llama".
    pub(crate) model: &'static str,
    /// The pre-tokenizer of "gpt2".
    pub(crate) pre: Option<&'static str>,
    pub(crate) tokens: Vec<String>,
    pub(crate) types: Vec<i32>,
    /// Of "gpt2".
    pub(crate) merges: Vec<String>,
    /// Of "llama".
    pub(crate) scores: Vec<f32>,
    pub(crate) add_space_prefix: bool,
}

impl Tokenizer {
    fn spelled(&self, id: u32) -> &str {
        self.id_to_token(id).unwrap_or_default()
    }

    /// Pairs of tokens that merge, the first first. Pairs with a character that is no token are left out: nothing can be
    /// written that spells them.
    fn merge_pairs(&self) -> Vec<(&str, &str)> {
        let known = |id: u32| self.id_to_token(id).filter(|t| !t.is_empty());
        self.merges.sorted().into_iter().filter_map(|(_, _, left, right)| Some((known(left)?, known(right)?))).collect()
    }

    fn pre_tokenizer(steps: &[Step]) -> Option<(&'static str, Value)> {
        let bytes = |regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": regex});
        match steps {
            [Step::Gpt2] => Some(("gpt-2", bytes(true))),
            [Step::Digits { individual: true }, Step::Gpt2] => {
                let digits = json!({"type": "Digits", "individual_digits": true});
                Some(("smollm", json!({"type": "Sequence", "pretokenizers": [digits, bytes(true)]})))
            }
            [Step::Llama3] => {
                let split = json!({
                    "type": "Split", "pattern": {"Regex": super::pretokenize::LLAMA3}, "behavior": "Isolated", "invert": false
                });
                Some(("llama-bpe", json!({"type": "Sequence", "pretokenizers": [split, bytes(false)]})))
            }
            _ => None,
        }
    }

    /// `tokenizer.json` as the `tokenizers` library reads it.
    ///
    /// # Errors
    /// A pre-tokenizer that has no name in that library.
    pub fn to_json(&self) -> Result<Value> {
        let fail = |what: &str| Err(Error::Tokenizer(format!("{what} cannot be written as tokenizer.json")));
        let replace = |from: &str, to: &str| json!({"type": "Replace", "pattern": {"String": from}, "content": to});
        let (normalizer, pre_tokenizer, decoder) = match &self.symbols {
            Symbols::Bytes { steps, .. } => {
                let Some((_, pre)) = Self::pre_tokenizer(steps) else { return fail("its pre-tokenizer") };
                let decoder =
                    json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true});
                (Value::Null, pre, decoder)
            }
            Symbols::Characters { prefix, .. } => {
                let mut normalizers = match prefix {
                    SpacePrefix::Never => Vec::new(),
                    SpacePrefix::Always => vec![json!({"type": "Prepend", "prepend": "▁"})],
                    _ => return fail("its space prefix"),
                };
                normalizers.push(replace(" ", "▁"));
                let mut decoders = vec![replace("▁", " "), json!({"type": "ByteFallback"}), json!({"type": "Fuse"})];
                if self.decoder == (Decoder::SentencePiece { strip_first_space: true }) {
                    decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
                }
                let sequence = json!({"type": "Sequence", "normalizers": normalizers});
                (sequence, Value::Null, json!({"type": "Sequence", "decoders": decoders}))
            }
        };
        let mut added: Vec<(u32, Value)> = Vec::new();
        let entry = |id: u32, content: &str, special: bool, lstrip: bool, rstrip: bool| {
            let value = json!({
                "id": id, "content": content, "single_word": false, "lstrip": lstrip, "rstrip": rstrip,
                "normalized": false, "special": special
            });
            (id, value)
        };
        for t in self.added.all() {
            added.push(entry(t.id, &t.content, t.special, t.lstrip, t.rstrip));
        }
        // Special without being an added token: SentencePiece's <unk>.
        for id in (0..self.tokens.len() as u32).filter(|&id| self.is_special(id) && !self.added.has(id)) {
            added.push(entry(id, self.spelled(id), true, false, false));
        }
        added.sort_by_key(|(id, _)| *id);
        let mut vocab = Map::new();
        for (id, token) in self.tokens.iter().enumerate() {
            if let Some(token) = token {
                // Of two tokens that are spelled alike only the first can be reached.
                vocab.entry(token.to_string()).or_insert(id.into());
            }
        }
        let (bytes, whole_words, fuse) = match &self.symbols {
            Symbols::Bytes { whole_words, .. } => (false, whole_words.is_some(), false),
            Symbols::Characters { bytes, fuse_unknown, .. } => (bytes.is_some(), false, *fuse_unknown),
        };
        let unknown = match &self.symbols {
            Symbols::Characters { unknown, .. } => unknown.map(|id| self.spelled(id)),
            Symbols::Bytes { .. } => None,
        };
        Ok(json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": added.into_iter().map(|(_, value)| value).collect::<Vec<_>>(),
            "normalizer": normalizer,
            "pre_tokenizer": pre_tokenizer,
            "post_processor": self.post_processor(),
            "decoder": decoder,
            "model": {
                "type": "BPE",
                "dropout": null,
                "unk_token": unknown,
                "continuing_subword_prefix": null,
                "end_of_word_suffix": null,
                "fuse_unk": fuse,
                "byte_fallback": bytes,
                "ignore_merges": whole_words,
                "vocab": vocab,
                "merges": self.merge_pairs().iter().map(|(l, r)| json!([l, r])).collect::<Vec<_>>(),
            },
        }))
    }

    fn post_processor(&self) -> Value {
        let Some(bos) = self.bos.filter(|_| self.adds_bos) else { return Value::Null };
        let text = self.spelled(bos);
        let special = |kind: u32| json!({"SpecialToken": {"id": text, "type_id": kind}});
        let sequence = |name: &str, kind: u32| json!({"Sequence": {"id": name, "type_id": kind}});
        json!({
            "type": "TemplateProcessing",
            "single": [special(0), sequence("A", 0)],
            "pair": [special(0), sequence("A", 0), special(1), sequence("B", 1)],
            "special_tokens": {text: {"id": text, "ids": [bos], "tokens": [text]}},
        })
    }

    /// What llama.cpp reads, padded to `size` tokens.
    ///
    /// # Errors
    /// A pre-tokenizer that llama.cpp does not know.
    pub(crate) fn to_gguf(&self, size: usize) -> Result<GgufVocabulary> {
        let size = size.max(self.tokens.len());
        let spelled = |id: u32| self.id_to_token(id).map_or_else(|| format!("[PAD{id}]"), str::to_owned);
        let is_byte = |id: u32| match &self.symbols {
            Symbols::Characters { bytes: Some(bytes), .. } => bytes.contains(&id),
            _ => false,
        };
        let kind = |id: u32| {
            let added = self.added.all().iter().find(|t| t.id == id);
            match added {
                _ if self.id_to_token(id).is_none() => UNUSED,
                Some(t) if !t.special => USER_DEFINED,
                _ if self.unknown == Some(id) && matches!(self.symbols, Symbols::Characters { .. }) => UNKNOWN,
                _ if self.is_special(id) => CONTROL,
                _ if is_byte(id) => BYTE,
                _ => NORMAL,
            }
        };
        let mut vocabulary = GgufVocabulary {
            model: "gpt2",
            pre: None,
            tokens: (0..size as u32).map(spelled).collect(),
            types: (0..size as u32).map(kind).collect(),
            merges: Vec::new(),
            scores: Vec::new(),
            add_space_prefix: false,
        };
        match &self.symbols {
            Symbols::Bytes { steps, .. } => {
                let Some((pre, _)) = Self::pre_tokenizer(steps) else {
                    return Err(Error::Tokenizer("llama.cpp has no name for its pre-tokenizer".into()));
                };
                vocabulary.pre = Some(pre);
                vocabulary.merges = self.merge_pairs().iter().map(|(l, r)| format!("{l} {r}")).collect();
            }
            Symbols::Characters { prefix, .. } => {
                vocabulary.model = "llama";
                vocabulary.add_space_prefix = *prefix != SpacePrefix::Never;
                // Only the order of scores matters: the rank of the first merge that makes a token, others last.
                let merges = self.merges.sorted();
                let last = merges.last().map_or(0, |m| m.0) + 1;
                vocabulary.scores = vec![-(last as f32); size];
                for &(rank, merged, _, _) in merges.iter().rev() {
                    if let Some(score) = vocabulary.scores.get_mut(merged as usize) {
                        *score = -(rank as f32);
                    }
                }
                for (score, &kind) in vocabulary.scores.iter_mut().zip(&vocabulary.types) {
                    if kind != NORMAL {
                        *score = 0.0;
                    }
                }
            }
        }
        Ok(vocabulary)
    }
}
