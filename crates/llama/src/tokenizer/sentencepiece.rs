//! SentencePiece vocabularies: pieces with scores, merged best score first, leftmost on ties.
//!
//! `tokenizer.model` is a protobuf message (`sentencepiece_model.proto`, `ModelProto`); the few fields that matter are
//! read here directly. A vocabulary's scores are turned into the same table of merges that byte-level vocabularies have:
//! the pair (a, b) merges when "ab" is a piece, ranked by the score of "ab".

use std::collections::HashMap;
use std::path::Path;

use super::added::AddedToken;
use super::bpe::Merges;
use super::decode::Decoder;
use super::{Cut, MAX_VOCAB, NO_ID, Parts, SpacePrefix, Symbols, Tokenizer, UNDERLINE, byte_token, json};
use crate::error::{Error, Result, quoted};
use crate::json_file::read_limited;

/// Type of a piece, as in `ModelProto.SentencePiece.Type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Normal,
    Unknown,
    Control,
    UserDefined,
    Unused,
    Byte,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Piece<'a> {
    pub(super) text: &'a str,
    pub(super) score: f32,
    pub(super) kind: Kind,
}

/// Longest `tokenizer.model` that is believed; Llama 2's has 0.5 MB.
const MAX_MODEL: u64 = 32 << 20;
/// Longest piece that takes part in merging, in bytes: work grows with the square of it. Llama 2's longest has 48.
const MAX_PIECE: usize = 256;

/// Builds the merging table of a scored vocabulary. Special tokens are left to the caller.
pub(super) fn parts(pieces: &[Piece<'_>], prefix: SpacePrefix) -> Result<Parts, String> {
    // Only ordinary pieces come out of merging: text can never become a control token, whatever it spells.
    let mut mergeable: HashMap<&str, u32> = HashMap::with_capacity(pieces.len());
    let mut bytes = Box::new([NO_ID; 256]);
    let mut unknown = None;
    for (id, piece) in pieces.iter().enumerate() {
        let id = id as u32;
        match piece.kind {
            Kind::Normal => {
                if !piece.score.is_finite() {
                    return Err(format!("token {id}, {}, has score {}", quoted(piece.text), piece.score));
                }
                if piece.text.len() > MAX_PIECE {
                    return Err(format!("token {id} has {} bytes, expected at most {MAX_PIECE}", piece.text.len()));
                }
                mergeable.entry(piece.text).or_insert(id);
            }
            Kind::Byte => match byte_token(piece.text) {
                Some(byte) => bytes[byte as usize] = id,
                None => return Err(format!("byte token {id} is spelled {}", quoted(piece.text))),
            },
            Kind::Unknown => unknown = Some(id),
            Kind::Control | Kind::UserDefined | Kind::Unused => {}
        }
    }
    let has_bytes = bytes.iter().all(|&id| id != NO_ID);

    // Every character of a piece is a symbol, with an id of its own if it is a piece by itself.
    let mut chars: HashMap<char, u32> = HashMap::new();
    let mut inner = Vec::new();
    let mut buffer = [0; 4];
    let mut in_order: Vec<(&str, u32)> = mergeable.iter().map(|(text, id)| (*text, *id)).collect();
    in_order.sort_unstable_by_key(|&(_, id)| id);
    for &(text, _) in &in_order {
        for c in text.chars() {
            chars.entry(c).or_insert_with(|| match mergeable.get(&*c.encode_utf8(&mut buffer)) {
                Some(&id) => id,
                None => {
                    inner.push(c);
                    (pieces.len() + inner.len() - 1) as u32
                }
            });
        }
    }
    let symbol = |text: &str| -> Option<u32> {
        mergeable.get(text).copied().or_else(|| {
            let mut letters = text.chars();
            let only = letters.next().filter(|_| letters.next().is_none())?;
            chars.get(&only).copied()
        })
    };

    let mut by_score = in_order.clone();
    let score = |id: u32| pieces[id as usize].score;
    by_score.sort_by(|a, b| score(b.1).total_cmp(&score(a.1)));
    let mut merges = Merges::with_capacity(2 * pieces.len());
    let mut crosses_words = false;
    let mut rank = 0;
    let mut last = f32::INFINITY;
    for &(text, id) in &by_score {
        // Equal scores share a rank, so that the leftmost pair goes first.
        if score(id) < last {
            rank += 1;
            last = score(id);
        }
        for (at, c) in text.char_indices().skip(1) {
            let (left, right) = text.split_at(at);
            crosses_words |= c == UNDERLINE && !left.ends_with(UNDERLINE);
            if let (Some(left), Some(right)) = (symbol(left), symbol(right)) {
                merges.insert(left, right, rank, id);
            }
        }
    }
    Ok(Parts {
        tokens: pieces.iter().map(|piece| Some(piece.text.into())).collect(),
        merges,
        symbols: Symbols::Characters {
            prefix,
            chars,
            inner,
            inner_base: pieces.len(),
            bytes: has_bytes.then_some(bytes),
            unknown,
            fuse_unknown: true,
            cut: if crosses_words { Cut::Nowhere } else { Cut::BeforeWords },
        },
        added: Vec::new(),
        decoder: Decoder::SentencePiece { strip_first_space: prefix != SpacePrefix::Never },
        special: Vec::new(),
        bos: None,
        eos: None,
        pad: None,
        unknown,
        adds_bos: true,
    })
}

/// Reads `tokenizer.model`, with `tokenizer_config.json` and `added_tokens.json` beside it where they exist.
pub(super) fn read(dir: &Path, path: &Path) -> Result<Tokenizer> {
    let bytes = read_limited(path, MAX_MODEL)?;
    let fail = |what: String| Error::file(path, what);
    let model = Model::parse(&bytes).map_err(|what| fail(format!("not a SentencePiece model: {what}")))?;
    if model.model_type != 2 {
        let name = match model.model_type {
            1 => "unigram",
            3 => "word",
            4 => "char",
            _ => "unknown",
        };
        return Err(fail(format!("a SentencePiece model of type {name} is not read, expected BPE")));
    }
    if model.has_charsmap {
        return Err(fail(format!("normalizer {} is not read, expected identity", quoted(model.normalizer))));
    }
    if model.remove_extra_whitespaces || !model.escape_whitespaces || model.whitespace_as_suffix {
        return Err(fail(
            "white space is not kept as Llama's tokenizers keep it (remove_extra_whitespaces, escape_whitespaces, treat_whitespace_as_suffix)".into(),
        ));
    }
    let prefix = if model.add_dummy_prefix { SpacePrefix::Always } else { SpacePrefix::Never };
    let mut parts = parts(&model.pieces, prefix).map_err(fail)?;
    for (id, piece) in model.pieces.iter().enumerate() {
        match piece.kind {
            Kind::Control => parts.added.push(AddedToken::new(id as u32, piece.text, true)),
            Kind::UserDefined => parts.added.push(AddedToken::new(id as u32, piece.text, false)),
            Kind::Unknown => parts.added.push(AddedToken::new(id as u32, piece.text, true)),
            _ => {}
        }
    }
    parts.added.retain(|token| !token.content.is_empty());
    let named = |id: i32| u32::try_from(id).ok().filter(|&id| (id as usize) < model.pieces.len());
    parts.bos = named(model.bos_id);
    parts.eos = named(model.eos_id);
    parts.pad = named(model.pad_id);
    json::add_companions(dir, &mut parts)?;
    Tokenizer::build(parts)
}

/// The fields of `ModelProto` that are used.
#[derive(Debug)]
struct Model<'a> {
    pieces: Vec<Piece<'a>>,
    model_type: u64,
    whitespace_as_suffix: bool,
    bos_id: i32,
    eos_id: i32,
    pad_id: i32,
    normalizer: &'a str,
    has_charsmap: bool,
    add_dummy_prefix: bool,
    remove_extra_whitespaces: bool,
    escape_whitespaces: bool,
}

impl<'a> Model<'a> {
    fn parse(bytes: &'a [u8]) -> Result<Self, String> {
        // Defaults of the protobuf definition.
        let mut model = Model {
            pieces: Vec::new(),
            model_type: 1,
            whitespace_as_suffix: false,
            bos_id: 1,
            eos_id: 2,
            pad_id: -1,
            normalizer: "",
            has_charsmap: false,
            add_dummy_prefix: true,
            remove_extra_whitespaces: true,
            escape_whitespaces: true,
        };
        let mut message = Proto { bytes };
        while let Some((field, value)) = message.next()? {
            match (field, value) {
                (1, Field::Bytes(piece)) => {
                    if model.pieces.len() >= MAX_VOCAB {
                        return Err(format!("more than {MAX_VOCAB} pieces"));
                    }
                    let piece = parse_piece(piece).map_err(|what| format!("piece {}: {what}", model.pieces.len()))?;
                    model.pieces.push(piece);
                }
                (2, Field::Bytes(spec)) => model.trainer_spec(spec)?,
                (3, Field::Bytes(spec)) => model.normalizer_spec(spec)?,
                _ => {}
            }
        }
        if model.pieces.is_empty() {
            return Err("no pieces".into());
        }
        Ok(model)
    }

    fn trainer_spec(&mut self, bytes: &'a [u8]) -> Result<(), String> {
        let mut message = Proto { bytes };
        while let Some((field, value)) = message.next()? {
            match (field, value) {
                (3, Field::Varint(value)) => self.model_type = value,
                (24, Field::Varint(value)) => self.whitespace_as_suffix = value != 0,
                // Negative ids are sign-extended to 64 bits.
                (41, Field::Varint(value)) => self.bos_id = value as i32,
                (42, Field::Varint(value)) => self.eos_id = value as i32,
                (43, Field::Varint(value)) => self.pad_id = value as i32,
                _ => {}
            }
        }
        Ok(())
    }

    fn normalizer_spec(&mut self, bytes: &'a [u8]) -> Result<(), String> {
        let mut message = Proto { bytes };
        while let Some((field, value)) = message.next()? {
            match (field, value) {
                (1, Field::Bytes(name)) => self.normalizer = std::str::from_utf8(name).unwrap_or("?"),
                (2, Field::Bytes(map)) => self.has_charsmap = !map.is_empty(),
                (3, Field::Varint(value)) => self.add_dummy_prefix = value != 0,
                (4, Field::Varint(value)) => self.remove_extra_whitespaces = value != 0,
                (5, Field::Varint(value)) => self.escape_whitespaces = value != 0,
                _ => {}
            }
        }
        Ok(())
    }
}

fn parse_piece(bytes: &[u8]) -> Result<Piece<'_>, String> {
    let mut piece = Piece { text: "", score: 0.0, kind: Kind::Normal };
    let mut message = Proto { bytes };
    while let Some((field, value)) = message.next()? {
        match (field, value) {
            (1, Field::Bytes(text)) => piece.text = std::str::from_utf8(text).map_err(|_| "not UTF-8")?,
            (2, Field::Fixed32(bits)) => piece.score = f32::from_bits(bits),
            (3, Field::Varint(kind)) => {
                piece.kind = match kind {
                    1 => Kind::Normal,
                    2 => Kind::Unknown,
                    3 => Kind::Control,
                    4 => Kind::UserDefined,
                    5 => Kind::Unused,
                    6 => Kind::Byte,
                    _ => return Err(format!("type {kind}")),
                }
            }
            _ => {}
        }
    }
    Ok(piece)
}

/// The fields of one protobuf message, in order.
struct Proto<'a> {
    bytes: &'a [u8],
}

enum Field<'a> {
    Varint(u64),
    Fixed32(u32),
    /// Read over: no 64-bit field matters here.
    Fixed64,
    Bytes(&'a [u8]),
}

impl<'a> Proto<'a> {
    fn varint(&mut self) -> Result<u64, String> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let (&byte, rest) = self.bytes.split_first().ok_or("truncated")?;
            self.bytes = rest;
            value |= u64::from(byte & 0x7F) << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err("a number of more than ten bytes".into())
    }

    fn take(&mut self, count: u64) -> Result<&'a [u8], String> {
        let count = usize::try_from(count).ok().filter(|&count| count <= self.bytes.len()).ok_or("truncated")?;
        let (taken, rest) = self.bytes.split_at(count);
        self.bytes = rest;
        Ok(taken)
    }

    fn next(&mut self) -> Result<Option<(u64, Field<'a>)>, String> {
        if self.bytes.is_empty() {
            return Ok(None);
        }
        let tag = self.varint()?;
        let value = match tag & 7 {
            0 => Field::Varint(self.varint()?),
            1 => {
                self.take(8)?;
                Field::Fixed64
            }
            2 => {
                let length = self.varint()?;
                Field::Bytes(self.take(length)?)
            }
            5 => {
                let mut bits = [0; 4];
                bits.copy_from_slice(self.take(4)?);
                Field::Fixed32(u32::from_le_bytes(bits))
            }
            wire => return Err(format!("wire type {wire}")),
        };
        Ok(Some((tag >> 3, value)))
    }
}
