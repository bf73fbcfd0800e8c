//! `tokenizer.json` of the `tokenizers` library, as the Llama family's files have it, and the small files beside it.
//!
//! Read are BPE models that are byte-level (`ByteLevel`, after `Digits` or a `Split` by a known expression) or
//! SentencePiece-like (`Prepend` and `Replace`, or `Metaspace`). Any other component is an error that names it: a
//! tokenizer that is nearly right would train a model that is nearly wrong.

use std::collections::HashMap;
use std::fmt;
use std::path::Path;

use serde::Deserialize;
use serde::de::{self, SeqAccess, Visitor};
use serde_json::Value;

use super::added::AddedToken;
use super::bpe::Merges;
use super::decode::Decoder;
use super::gguf::{byte_symbols, spelled_words};
use super::pretokenize::{GPT2, LLAMA3, Step};
use super::{Cut, MAX_VOCAB, NO_ID, Parts, SpacePrefix, Symbols, Tokenizer, UNDERLINE};
use crate::error::{Error, Result, quoted};
use crate::json_file::{bounded, read_companion, read_limited, token_text};

/// Largest `tokenizer.json`; Llama 3's has 17 MB.
const MAX_JSON: u64 = 64 << 20;
#[derive(Deserialize)]
struct TokenizerKind {
    model: ModelKind,
}

#[derive(Deserialize)]
struct ModelKind {
    #[serde(rename = "type")]
    kind: Option<String>,
}

#[derive(Deserialize)]
struct TokenizerJson {
    #[serde(default)]
    added_tokens: Vec<AddedJson>,
    #[serde(default, deserialize_with = "bounded")]
    normalizer: Value,
    #[serde(default, deserialize_with = "bounded")]
    pre_tokenizer: Value,
    #[serde(default, deserialize_with = "bounded")]
    post_processor: Value,
    #[serde(default, deserialize_with = "bounded")]
    decoder: Value,
    model: BpeJson,
}

#[derive(Deserialize)]
struct AddedJson {
    #[serde(default)]
    id: u32,
    content: String,
    #[serde(default)]
    special: bool,
    #[serde(default)]
    lstrip: bool,
    #[serde(default)]
    rstrip: bool,
    #[serde(default)]
    single_word: bool,
}

#[derive(Deserialize)]
struct BpeJson {
    vocab: HashMap<Box<str>, u32>,
    #[serde(default)]
    merges: Vec<Pair>,
    dropout: Option<f32>,
    unk_token: Option<String>,
    continuing_subword_prefix: Option<String>,
    end_of_word_suffix: Option<String>,
    #[serde(default)]
    fuse_unk: bool,
    #[serde(default)]
    byte_fallback: bool,
    #[serde(default)]
    ignore_merges: bool,
}

/// A merge: `"a b"` in older files, `["a", "b"]` in newer ones.
struct Pair(Box<str>, Box<str>);

impl<'de> Deserialize<'de> for Pair {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct PairVisitor;
        impl<'de> Visitor<'de> for PairVisitor {
            type Value = Pair;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a merge, \"a b\" or [\"a\", \"b\"]")
            }

            fn visit_str<E: de::Error>(self, line: &str) -> Result<Pair, E> {
                match line.split_once(' ') {
                    Some((left, right)) => Ok(Pair(left.into(), right.into())),
                    None => Err(E::invalid_value(de::Unexpected::Str(line), &self)),
                }
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Pair, A::Error> {
                let left = seq.next_element()?.ok_or_else(|| de::Error::invalid_length(0, &self))?;
                let right = seq.next_element()?.ok_or_else(|| de::Error::invalid_length(1, &self))?;
                match seq.next_element::<de::IgnoredAny>()? {
                    None => Ok(Pair(left, right)),
                    Some(_) => Err(de::Error::invalid_length(3, &self)),
                }
            }
        }
        deserializer.deserialize_any(PairVisitor)
    }
}

pub(super) fn read(dir: &Path, path: &Path) -> Result<Tokenizer> {
    let bytes = read_limited(path, MAX_JSON)?;
    let malformed = |error: serde_json::Error| Error::file(path, error.to_string());
    let kind: TokenizerKind = serde_json::from_slice(&bytes).map_err(malformed)?;
    if let Some(kind) = kind.model.kind.filter(|kind| kind != "BPE") {
        return Err(Error::file(path, format!("model {} is not read, expected \"BPE\"", quoted(&kind))));
    }
    let json: TokenizerJson = serde_json::from_slice(&bytes).map_err(malformed)?;
    drop(bytes);
    let mut parts = parts(json).map_err(|what| Error::file(path, what))?;
    add_companions(dir, &mut parts)?;
    Tokenizer::build(parts)
}

fn parts(json: TokenizerJson) -> Result<Parts, String> {
    let TokenizerJson { added_tokens, normalizer, pre_tokenizer, post_processor, decoder, model } = json;
    let added = added_tokens.into_iter().map(added_token).collect::<Result<Vec<_>, _>>()?;
    for (name, value) in [
        ("continuing_subword_prefix", &model.continuing_subword_prefix),
        ("end_of_word_suffix", &model.end_of_word_suffix),
    ] {
        if let Some(value) = value.as_ref().filter(|value| !value.is_empty()) {
            return Err(format!("model.{name} {} is not read", quoted(value)));
        }
    }
    if model.dropout.is_some_and(|dropout| dropout != 0.0) {
        return Err("model.dropout is not read".into());
    }
    let size = model.vocab.values().max().map_or(0, |&id| id as usize + 1);
    if size > MAX_VOCAB {
        return Err(format!("largest token id {}, expected less than {MAX_VOCAB}", size - 1));
    }
    let mut tokens: Vec<Option<Box<str>>> = vec![None; size];
    for (token, &id) in &model.vocab {
        if let Some(before) = tokens[id as usize].replace(token.clone()) {
            return Err(format!("tokens {} and {} share id {id}", quoted(&before), quoted(token)));
        }
    }
    let mut is_special = vec![false; size];
    for token in added.iter().filter(|token| token.special) {
        if let Some(flag) = is_special.get_mut(token.id as usize) {
            *flag = true;
        }
    }
    let unknown = model.unk_token.as_deref().and_then(|token| model.vocab.get(token).copied());
    let merges = merges(&model, &is_special)?;
    let (symbols, decoder) = match Stages::read(&normalizer, &pre_tokenizer)? {
        Stages::Bytes(steps) => {
            expect_decoder(&decoder, &["ByteLevel"])?;
            let mut initial = byte_symbols(|spelled| model.vocab.get(spelled).copied());
            if let Some(unknown) = unknown {
                initial.iter_mut().filter(|id| **id == NO_ID).for_each(|id| *id = unknown);
            }
            let whole_words =
                model.ignore_merges.then(|| spelled_words(model.vocab.iter().map(|(token, id)| (&**token, *id))));
            (Symbols::Bytes { steps, initial, whole_words }, Decoder::ByteLevel)
        }
        Stages::Characters { prefix, split } => {
            if model.ignore_merges {
                return Err("model.ignore_merges without ByteLevel is not read".into());
            }
            expect_decoder(&decoder, &["Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"])?;
            let chars = model
                .vocab
                .iter()
                .filter(|(_, id)| !is_special[**id as usize])
                .filter_map(|(token, &id)| {
                    let mut chars = token.chars();
                    chars.next().filter(|_| chars.next().is_none()).map(|c| (c, id))
                })
                .collect();
            let bytes = model.byte_fallback.then(|| {
                let mut bytes = Box::new([NO_ID; 256]);
                for (byte, id) in bytes.iter_mut().enumerate() {
                    *id = model.vocab.get(format!("<0x{byte:02X}>").as_str()).copied().unwrap_or(NO_ID);
                }
                bytes
            });
            let symbols = Symbols::Characters {
                prefix,
                chars,
                inner: Vec::new(),
                inner_base: size,
                bytes,
                unknown,
                fuse_unknown: model.fuse_unk,
                cut: match (split, crosses_words(&model.merges)) {
                    (true, _) => Cut::BeforeSpaces,
                    (false, true) => Cut::Nowhere,
                    (false, false) => Cut::BeforeWords,
                },
            };
            let strip_first_space = strips_first_space(&decoder, prefix);
            (symbols, Decoder::SentencePiece { strip_first_space })
        }
    };
    let adds_bos = leading_token(&post_processor).is_some();
    Ok(Parts {
        tokens,
        merges,
        symbols,
        added,
        decoder,
        special: Vec::new(),
        bos: None,
        eos: None,
        pad: None,
        unknown,
        adds_bos,
    })
}

fn added_token(json: AddedJson) -> Result<AddedToken, String> {
    if json.single_word {
        return Err(format!("added token {} with single_word is not read", quoted(&json.content)));
    }
    Ok(AddedToken {
        id: json.id,
        content: json.content,
        special: json.special,
        lstrip: json.lstrip,
        rstrip: json.rstrip,
    })
}

fn merges(model: &BpeJson, is_special: &[bool]) -> Result<Merges, String> {
    let mut merges = Merges::with_capacity(model.merges.len());
    let mut merged = String::new();
    for (rank, Pair(left, right)) in model.merges.iter().enumerate() {
        merged.clear();
        merged.push_str(left);
        merged.push_str(right);
        let id = |token: &str| {
            model.vocab.get(token).copied().ok_or_else(|| {
                format!("merge {rank} names the token {}, which is not in the vocabulary", quoted(token))
            })
        };
        let (left, right, merged) = (id(left)?, id(right)?, id(&merged)?);
        // Text that spells a special token must not become it.
        if !is_special[merged as usize] {
            merges.insert(left, right, rank as u32, merged);
        }
    }
    Ok(merges)
}

/// Whether some merge reaches over the start of a word.
fn crosses_words(merges: &[Pair]) -> bool {
    merges.iter().any(|Pair(left, right)| {
        let mut previous = None;
        left.chars().chain(right.chars()).any(|c| {
            let crosses = c == UNDERLINE && previous.is_some_and(|before| before != UNDERLINE);
            previous = Some(c);
            crosses
        })
    })
}

/// What normalizer and pre-tokenizer amount to.
enum Stages {
    Bytes(Vec<Step>),
    Characters { prefix: SpacePrefix, split: bool },
}

fn kind(component: &Value) -> &str {
    component.get("type").and_then(Value::as_str).unwrap_or("?")
}

/// The components of a `Sequence` (stored under `list`), or the component itself.
fn flatten<'a>(component: &'a Value, list: &str) -> Vec<&'a Value> {
    match component {
        Value::Null => Vec::new(),
        _ if kind(component) == "Sequence" => {
            component.get(list).and_then(Value::as_array).map(|all| all.iter().collect()).unwrap_or_default()
        }
        _ => vec![component],
    }
}

fn flag(component: &Value, name: &str, default: bool) -> bool {
    component.get(name).and_then(Value::as_bool).unwrap_or(default)
}

fn is_underline(value: Option<&Value>) -> bool {
    value.and_then(Value::as_str) == Some("▁")
}

impl Stages {
    fn read(normalizer: &Value, pre_tokenizer: &Value) -> Result<Self, String> {
        let (mut prepends, mut replaces) = (false, false);
        for component in flatten(normalizer, "normalizers") {
            match kind(component) {
                "Prepend" if is_underline(component.get("prepend")) => prepends = true,
                "Replace"
                    if component.pointer("/pattern/String").and_then(Value::as_str) == Some(" ")
                        && is_underline(component.get("content")) =>
                {
                    replaces = true;
                }
                _ => return Err(format!("normalizer {} is not read", quoted(&component.to_string()))),
            }
        }
        let mut steps = Vec::new();
        let mut metaspace = None;
        let mut byte_level = false;
        for component in flatten(pre_tokenizer, "pretokenizers") {
            let unread = || format!("pre-tokenizer {} is not read", quoted(&component.to_string()));
            if byte_level || metaspace.is_some() {
                return Err(unread());
            }
            match kind(component) {
                "Digits" => steps.push(Step::Digits { individual: flag(component, "individual_digits", false) }),
                "Split" => steps.push(split_step(component).ok_or_else(unread)?),
                "ByteLevel" => {
                    byte_level = true;
                    if flag(component, "add_prefix_space", true) {
                        steps.push(Step::PrefixSpace);
                    }
                    if flag(component, "use_regex", true) {
                        steps.push(Step::Gpt2);
                    }
                }
                "Metaspace" if steps.is_empty() && is_underline(component.get("replacement")) => {
                    let scheme = component.get("prepend_scheme").and_then(Value::as_str);
                    let prefix = match scheme {
                        Some("first") => SpacePrefix::FirstUnlessSpace,
                        Some("never") => SpacePrefix::Never,
                        Some("always") => SpacePrefix::UnlessSpace,
                        Some(_) => return Err(unread()),
                        None if flag(component, "add_prefix_space", true) => SpacePrefix::UnlessSpace,
                        None => SpacePrefix::Never,
                    };
                    metaspace = Some((prefix, flag(component, "split", true)));
                }
                _ => return Err(unread()),
            }
        }
        match (byte_level, metaspace, replaces) {
            (true, None, false) if !prepends => Ok(Stages::Bytes(steps)),
            (false, Some((prefix, split)), false) if !prepends => Ok(Stages::Characters { prefix, split }),
            (false, None, true) if steps.is_empty() => {
                let prefix = if prepends { SpacePrefix::Always } else { SpacePrefix::Never };
                Ok(Stages::Characters { prefix, split: false })
            }
            _ => Err(format!(
                "normalizer {} with pre-tokenizer {} is not read",
                quoted(&normalizer.to_string()),
                quoted(&pre_tokenizer.to_string())
            )),
        }
    }
}

/// A `Split` by an expression that there is a scanner for.
fn split_step(component: &Value) -> Option<Step> {
    let pattern = component.pointer("/pattern/Regex")?.as_str()?;
    // Every character belongs to some match, so keeping matches and cutting between them are the same.
    let behavior = component.get("behavior").and_then(Value::as_str)?;
    let inverted = flag(component, "invert", false);
    match (behavior, inverted, pattern) {
        ("Isolated", false, LLAMA3) | ("Removed", true, LLAMA3) => Some(Step::Llama3),
        ("Isolated", false, GPT2) | ("Removed", true, GPT2) => Some(Step::Gpt2),
        ("Isolated", false, r"\p{N}") => Some(Step::Digits { individual: true }),
        _ => None,
    }
}

fn expect_decoder(decoder: &Value, known: &[&str]) -> Result<(), String> {
    for component in flatten(decoder, "decoders") {
        if !known.contains(&kind(component)) {
            return Err(format!("decoder {} is not read", quoted(&component.to_string())));
        }
    }
    Ok(())
}

fn strips_first_space(decoder: &Value, prefix: SpacePrefix) -> bool {
    flatten(decoder, "decoders").into_iter().any(|component| match kind(component) {
        "Strip" => component.get("start").and_then(Value::as_u64).is_some_and(|count| count > 0),
        "Metaspace" => prefix != SpacePrefix::Never,
        _ => false,
    })
}

/// The token that a `TemplateProcessing` puts in front of a text.
fn leading_token(post_processor: &Value) -> Option<&str> {
    flatten(post_processor, "processors")
        .into_iter()
        .find(|component| kind(component) == "TemplateProcessing")?
        .pointer("/single/0/SpecialToken/id")?
        .as_str()
}

/// Adds what stands beside the vocabulary: `added_tokens.json`, `tokenizer_config.json`, `special_tokens_map.json`.
pub(super) fn add_companions(dir: &Path, parts: &mut Parts) -> Result<()> {
    let add = |path: &Path, parts: &mut Parts, token: AddedToken| -> Result<()> {
        if token.id as usize >= MAX_VOCAB {
            return Err(Error::file(path, format!("added token {} has id {}", quoted(&token.content), token.id)));
        }
        match parts.added.iter_mut().find(|known| known.id == token.id) {
            // The vocabulary's own entry holds, but special stays special.
            Some(known) => known.special |= token.special,
            None => parts.added.push(token),
        }
        Ok(())
    };
    let path = dir.join("added_tokens.json");
    if let Some(Value::Object(tokens)) = read_companion(&path)? {
        for (content, id) in &tokens {
            let id = id.as_u64().and_then(|id| u32::try_from(id).ok());
            let id = id.ok_or_else(|| Error::file(&path, format!("the id of {} is no number", quoted(content))))?;
            add(&path, parts, AddedToken::new(id, content, false))?;
        }
    }
    let path = dir.join("tokenizer_config.json");
    let config = read_companion(&path)?.unwrap_or_default();
    if let Some(Value::Object(tokens)) = config.get("added_tokens_decoder") {
        for (id, token) in tokens {
            let bad = |what: &str| Error::file(&path, format!("added_tokens_decoder {}: {what}", quoted(id)));
            let id = id.parse().map_err(|_| bad("the id is no number"))?;
            let mut json: AddedJson = serde_json::from_value(token.clone()).map_err(|error| bad(&error.to_string()))?;
            json.id = id;
            let token = added_token(json).map_err(|what| bad(&what))?;
            add(&path, parts, token)?;
        }
    }
    let map = read_companion(&dir.join("special_tokens_map.json"))?.unwrap_or_default();
    let named = |key: &str, parts: &Parts| -> Option<u32> {
        let text = [&config, &map].into_iter().filter_map(|file| file.get(key)).find_map(token_text)?;
        let added = parts.added.iter().find(|token| token.content == text).map(|token| token.id);
        added.or_else(|| parts.tokens.iter().position(|token| token.as_deref() == Some(text)).map(|id| id as u32))
    };
    parts.bos = named("bos_token", parts).or(parts.bos);
    parts.eos = named("eos_token", parts).or(parts.eos);
    parts.pad = named("pad_token", parts).or(parts.pad);
    parts.unknown = named("unk_token", parts).or(parts.unknown);
    // Turn ends are markup even where a file forgot to say so.
    for id in [parts.bos, parts.eos].into_iter().flatten() {
        match parts.added.iter_mut().find(|token| token.id == id) {
            Some(token) => token.special = true,
            None => {
                if let Some(Some(text)) = parts.tokens.get(id as usize).filter(|text| text.is_some()) {
                    parts.added.push(AddedToken::new(id, &text.clone(), true));
                }
            }
        }
    }
    if let Some(adds_bos) = config.get("add_bos_token").and_then(Value::as_bool) {
        parts.adds_bos = adds_bos;
    }
    Ok(())
}
