//! Tokenizers in GGUF metadata (`tokenizer.ggml.*`).

use std::collections::HashMap;

use super::added::AddedToken;
use super::bpe::Merges;
use super::decode::Decoder;
use super::pretokenize::Step;
use super::sentencepiece::{self, Kind, Piece};
use super::unicode::byte_to_char;
use super::{MAX_VOCAB, NO_ID, Parts, SpacePrefix, Symbols, Tokenizer};
use crate::error::{Error, Result, quoted};
use crate::gguf::Gguf;

pub(super) fn read(gguf: &Gguf) -> Result<Tokenizer> {
    let fail = |what: String| Error::file(gguf.path(), what);
    let model = gguf.str("tokenizer.ggml.model")?;
    let model = model.ok_or_else(|| fail("no tokenizer in this file (tokenizer.ggml.model)".into()))?;
    let tokens = gguf.strings("tokenizer.ggml.tokens")?;
    let tokens = tokens.ok_or_else(|| fail("tokenizer.ggml.tokens is missing".into()))?;
    if tokens.len() > MAX_VOCAB {
        return Err(fail(format!("{} tokens, expected at most {MAX_VOCAB}", tokens.len())));
    }
    let types = gguf.i32s("tokenizer.ggml.token_type")?.unwrap_or_default();
    if !types.is_empty() && types.len() != tokens.len() {
        return Err(fail(format!("{} token types for {} tokens", types.len(), tokens.len())));
    }
    let kinds: Vec<Kind> = (0..tokens.len())
        .map(|id| match types.get(id) {
            Some(2) => Kind::Unknown,
            Some(3) => Kind::Control,
            Some(4) => Kind::UserDefined,
            Some(5) => Kind::Unused,
            Some(6) => Kind::Byte,
            _ => Kind::Normal,
        })
        .collect();
    let mut parts = match model {
        "gpt2" => byte_level(gguf, &tokens)?,
        "llama" => sentencepiece_model(gguf, &tokens, &kinds)?,
        other => {
            return Err(fail(format!("tokenizer model {} is not read, expected \"gpt2\" or \"llama\"", quoted(other))));
        }
    };
    for (id, kind) in kinds.iter().enumerate() {
        match kind {
            Kind::Control => parts.added.push(AddedToken::new(id as u32, tokens[id], true)),
            Kind::UserDefined => parts.added.push(AddedToken::new(id as u32, tokens[id], false)),
            Kind::Unknown => parts.special.push(id as u32),
            _ => {}
        }
    }
    parts.added.retain(|token| !token.content.is_empty());
    let id = |key: &str| -> Result<Option<u32>> {
        let id = gguf.u32(&format!("tokenizer.ggml.{key}_token_id"))?;
        match id {
            Some(id) if id as usize >= tokens.len() => {
                Err(fail(format!("tokenizer.ggml.{key}_token_id is {id}, the vocabulary has {} tokens", tokens.len())))
            }
            _ => Ok(id),
        }
    };
    parts.bos = id("bos")?;
    parts.eos = id("eos")?;
    parts.pad = id("padding")?;
    parts.unknown = id("unknown")?;
    // Turn ends are markup even where a file forgot to flag them.
    for named in [parts.bos, parts.eos].into_iter().flatten() {
        if !parts.added.iter().any(|token| token.id == named) && !tokens[named as usize].is_empty() {
            parts.added.push(AddedToken::new(named, tokens[named as usize], true));
        }
    }
    // llama.cpp's defaults where the flag is missing: SentencePiece and Llama 3 begin texts with it.
    let whole_words = matches!(parts.symbols, Symbols::Bytes { whole_words: Some(_), .. });
    parts.adds_bos = gguf.bool("tokenizer.ggml.add_bos_token")?.unwrap_or(model == "llama" || whole_words);
    Tokenizer::build(parts)
}

fn byte_level(gguf: &Gguf, tokens: &[&str]) -> Result<Parts> {
    let fail = |what: String| Error::file(gguf.path(), what);
    let pre = gguf.str("tokenizer.ggml.pre")?.unwrap_or("default");
    // (stages, whether words that are tokens are taken whole)
    let (steps, whole_words) = match pre {
        "smollm" => (vec![Step::Digits { individual: true }, Step::Gpt2], false),
        "llama-bpe" | "llama3" | "llama-v3" => (vec![Step::Llama3], true),
        "default" | "gpt-2" | "gpt2" => (vec![Step::Gpt2], false),
        other => {
            return Err(fail(format!(
                "pre-tokenizer {} is not read, expected \"smollm\", \"llama-bpe\", \"gpt-2\" or \"default\"",
                quoted(other)
            )));
        }
    };
    let mut ids: HashMap<&str, u32> = HashMap::with_capacity(tokens.len());
    for (id, token) in tokens.iter().enumerate() {
        ids.entry(token).or_insert(id as u32);
    }
    let lines = gguf.strings("tokenizer.ggml.merges")?;
    let lines = lines.ok_or_else(|| fail("tokenizer.ggml.merges is missing".into()))?;
    let mut merges = Merges::with_capacity(lines.len());
    let mut merged = String::new();
    for (rank, line) in lines.iter().enumerate() {
        let bad = |what: &str| fail(format!("tokenizer.ggml.merges: element {rank}, {}, {what}", quoted(line)));
        let (left, right) = line.split_once(' ').ok_or_else(|| bad("is no pair"))?;
        merged.clear();
        merged.push_str(left);
        merged.push_str(right);
        match (ids.get(left), ids.get(right), ids.get(merged.as_str())) {
            (Some(&left), Some(&right), Some(&id)) => merges.insert(left, right, rank as u32, id),
            _ => return Err(bad("names a token that is not in the vocabulary")),
        }
    }
    let initial = byte_symbols(|spelled| ids.get(spelled).copied());
    let whole_words = whole_words.then(|| spelled_words(ids.iter().map(|(token, id)| (*token, *id))));
    Ok(Parts {
        tokens: tokens.iter().map(|token| Some((*token).into())).collect(),
        merges,
        symbols: Symbols::Bytes { steps, initial, whole_words },
        added: Vec::new(),
        decoder: Decoder::ByteLevel,
        special: Vec::new(),
        bos: None,
        eos: None,
        pad: None,
        unknown: None,
        adds_bos: false,
    })
}

/// The symbol of each byte in a byte-level vocabulary.
pub(super) fn byte_symbols(id: impl Fn(&str) -> Option<u32>) -> Box<[u32; 256]> {
    let mut initial = Box::new([NO_ID; 256]);
    let mut buffer = [0; 4];
    for (byte, symbol) in initial.iter_mut().enumerate() {
        *symbol = id(byte_to_char(byte as u8).encode_utf8(&mut buffer)).unwrap_or(NO_ID);
    }
    initial
}

/// Tokens by their bytes, for vocabularies that take words whole (`ignore_merges`).
pub(super) fn spelled_words<'a>(tokens: impl Iterator<Item = (&'a str, u32)>) -> HashMap<Box<[u8]>, u32> {
    tokens
        .filter_map(|(token, id)| {
            let bytes: Option<Vec<u8>> = token.chars().map(super::unicode::char_to_byte).collect();
            Some((bytes?.into_boxed_slice(), id))
        })
        .collect()
}

fn sentencepiece_model(gguf: &Gguf, tokens: &[&str], kinds: &[Kind]) -> Result<Parts> {
    let fail = |what: String| Error::file(gguf.path(), what);
    let scores = gguf.f32s("tokenizer.ggml.scores")?;
    let scores = scores.ok_or_else(|| fail("tokenizer.ggml.scores is missing".into()))?;
    if scores.len() != tokens.len() {
        return Err(fail(format!("{} token scores for {} tokens", scores.len(), tokens.len())));
    }
    let pieces: Vec<Piece<'_>> =
        tokens.iter().zip(&scores).zip(kinds).map(|((text, &score), &kind)| Piece { text, score, kind }).collect();
    let prefix = match gguf.bool("tokenizer.ggml.add_space_prefix")? {
        Some(false) => SpacePrefix::Never,
        _ => SpacePrefix::Always,
    };
    sentencepiece::parts(&pieces, prefix).map_err(fail)
}
