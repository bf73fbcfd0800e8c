//! GGUF, llama.cpp's container: metadata, tensor directory, tensor data. Versions 2 and 3, little-endian.
//!
//! The file is memory-mapped and nothing is copied on opening: strings and arrays stay where they are and are handed out
//! as views. Every count, length and offset is checked against what is left of the file before it is believed, so opening
//! a damaged file costs an error and at most the directory's own size in memory.
//!
//! ```text
//! "GGUF" version:u32 tensors:u64 pairs:u64 | pairs × (key, type:u32, value) | tensors × (name, rank:u32, dims:u64×rank,
//! type:u32, offset:u64) | padding to general.alignment | data
//! ```
//!
//! Dimensions are stored with the fastest first: a matrix `[rows, cols]` of PyTorch stands as `[cols, rows]`.

mod reader;

use std::collections::HashMap;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use self::reader::{FLOAT32, INT32, Reader, STRING, UINT32, Value};
use crate::error::{Error, Result, quoted};
use crate::ggml::BlockType;

/// Metadata pairs and tensors of one file. The largest Llama files have some 1,200 tensors and 60 pairs.
const MAX_PAIRS: u64 = 1 << 14;
const MAX_TENSORS: u64 = 1 << 16;

/// The bytes of a file: mapped, or in memory for tests.
pub(crate) enum Bytes {
    Map(Mmap),
    Owned(Vec<u8>),
}

impl std::ops::Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Bytes::Map(map) => map,
            Bytes::Owned(bytes) => bytes,
        }
    }
}

/// Maps a file into memory for reading.
pub(crate) fn map_file(path: &Path) -> Result<Bytes> {
    let file = File::open(path).map_err(Error::io(path))?;
    let length = file.metadata().map_err(Error::io(path))?.len();
    if length == 0 {
        // An empty file cannot be mapped.
        return Ok(Bytes::Owned(Vec::new()));
    }
    // SAFETY: the map is only read. A file that another process truncates while it is mapped raises SIGBUS, as with every
    // reader of memory-mapped models; a file that another process rewrites yields other numbers, which no code here uses
    // as a size after it was checked on opening.
    let map = unsafe { Mmap::map(&file) }.map_err(Error::io(path))?;
    Ok(Bytes::Map(map))
}

/// Where a tensor stands and what it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    pub name: String,
    /// Row-major as in PyTorch: `[rows, cols]` or `[len]`.
    pub shape: Vec<usize>,
    pub block_type: BlockType,
    bytes: Range<usize>,
}

/// An opened GGUF file.
pub struct Gguf {
    path: PathBuf,
    bytes: Bytes,
    version: u32,
    metadata: HashMap<String, Value>,
    /// Key, type and bytes of each value as they stand, in the file's order: for copies.
    pairs: Vec<(String, u32, Range<usize>)>,
    tensors: Vec<TensorInfo>,
    index: HashMap<String, usize>,
}

impl Gguf {
    /// Maps and checks the file.
    ///
    /// # Errors
    /// When the file is no GGUF of version 2 or 3, is big-endian, truncated or inconsistent, or holds a tensor of rank
    /// other than 1 and 2 or of a type that is not read.
    pub fn open(path: &Path) -> Result<Self> {
        Self::parse(path, map_file(path)?)
    }

    /// Parses a file that is already in memory; `path` is only named in messages.
    pub fn from_bytes(path: &Path, bytes: Vec<u8>) -> Result<Self> {
        Self::parse(path, Bytes::Owned(bytes))
    }

    fn parse(path: &Path, bytes: Bytes) -> Result<Self> {
        let mut reader = Reader { bytes: &bytes, at: 0, path };
        if reader.take(4).ok() != Some(b"GGUF") {
            return Err(Error::file(path, "not a GGUF file: it does not begin with \"GGUF\""));
        }
        let version = reader.u32()?;
        match version {
            2 | 3 => {}
            1 => {
                return Err(Error::file(
                    path,
                    "GGUF version 1, expected 2 or 3\n  hint: convert the model again with a current llama.cpp",
                ));
            }
            0x0200_0000 | 0x0300_0000 => {
                return Err(Error::file(path, "big-endian GGUF, expected little-endian"));
            }
            _ => return Err(Error::file(path, format!("GGUF version {version}, expected 2 or 3"))),
        }
        let tensor_count = reader.u64()?;
        let pair_count = reader.u64()?;
        // A pair takes at least 13 bytes (empty key, type, one byte), a tensor 32 (empty name, rank 1).
        reader.believe("metadata pairs", pair_count, 13, MAX_PAIRS)?;
        let mut metadata = HashMap::new();
        let mut pairs = Vec::new();
        for _ in 0..pair_count {
            let key = reader.name("metadata key")?;
            let kind = reader.u32()?;
            let start = reader.at;
            let value = reader.value(kind, &key)?;
            pairs.push((key.clone(), kind, start..reader.at));
            if metadata.insert(key.clone(), value).is_some() {
                return Err(Error::file(path, format!("metadata key {} stands twice", quoted(&key))));
            }
        }
        reader.believe("tensors", tensor_count, 32, MAX_TENSORS)?;
        let mut tensors = Vec::new();
        let mut offsets = Vec::new();
        let mut index = HashMap::new();
        for number in 0..tensor_count as usize {
            let (info, offset) = reader.tensor()?;
            if index.insert(info.name.clone(), number).is_some() {
                return Err(Error::tensor(path, info.name, "stands twice in the directory"));
            }
            tensors.push(info);
            offsets.push(offset);
        }
        let end = reader.at;
        let mut gguf = Gguf { path: path.to_owned(), bytes, version, metadata, pairs, tensors, index };
        let alignment = gguf.u64("general.alignment")?.unwrap_or(32);
        if !alignment.is_power_of_two() || alignment > 1 << 20 {
            return Err(Error::file(path, format!("general.alignment is {alignment}, expected a power of two")));
        }
        gguf.place(&offsets, end, alignment)?;
        Ok(gguf)
    }

    /// Turns offsets into byte ranges of the file.
    fn place(&mut self, offsets: &[u64], directory_end: usize, alignment: u64) -> Result<()> {
        let length = self.bytes.len() as u64;
        let data = (directory_end as u64).next_multiple_of(alignment);
        for (info, &offset) in self.tensors.iter_mut().zip(offsets) {
            if !offset.is_multiple_of(alignment) {
                let what = format!("offset {offset} is not a multiple of the alignment {alignment}");
                return Err(Error::tensor(&self.path, &info.name, what));
            }
            // `bytes` holds 0..size until here.
            let size = info.bytes.end as u64;
            let start = data.checked_add(offset);
            let end = start.and_then(|start| start.checked_add(size));
            match (start, end) {
                (Some(start), Some(end)) if end <= length => info.bytes = start as usize..end as usize,
                _ => {
                    let what = format!(
                        "{size} bytes at offset {offset} of the data reach past the end of the file ({length} bytes)\n  hint: the file is truncated, download it again"
                    );
                    return Err(Error::tensor(&self.path, &info.name, what));
                }
            }
        }
        Ok(())
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn version(&self) -> u32 {
        self.version
    }

    /// Bytes of the whole file.
    pub fn file_size(&self) -> u64 {
        self.bytes.len() as u64
    }

    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.index.get(name).and_then(|&at| self.tensors.get(at))
    }

    /// Every metadata pair: key, type number and the value's bytes.
    pub(crate) fn raw_pairs(&self) -> impl Iterator<Item = (&str, u32, &[u8])> {
        let bytes = |range: &Range<usize>| self.bytes.get(range.clone()).unwrap_or(&[]);
        self.pairs.iter().map(move |(key, kind, range)| (key.as_str(), *kind, bytes(range)))
    }

    /// The stored bytes of a tensor of this file.
    pub fn data(&self, info: &TensorInfo) -> &[u8] {
        // Ranges were checked against the file on opening; a foreign `TensorInfo` gets nothing.
        self.bytes.get(info.bytes.clone()).unwrap_or(&[])
    }

    pub fn has(&self, key: &str) -> bool {
        self.metadata.contains_key(key)
    }

    fn wrong(&self, key: &str, expected: &str, value: &Value) -> Error {
        Error::file(&self.path, format!("metadata {} is {}, expected {expected}", quoted(key), value.kind()))
    }

    /// A non-negative integer of any width.
    pub fn u64(&self, key: &str) -> Result<Option<u64>> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Value::Unsigned(value)) => Ok(Some(*value)),
            Some(Value::Signed(value)) if *value >= 0 => Ok(Some(*value as u64)),
            Some(other) => Err(self.wrong(key, "a non-negative integer", other)),
        }
    }

    /// A token id.
    pub fn u32(&self, key: &str) -> Result<Option<u32>> {
        match self.u64(key)? {
            None => Ok(None),
            Some(value) => u32::try_from(value)
                .map(Some)
                .map_err(|_| Error::file(&self.path, format!("metadata {} is {value}, expected 32 bits", quoted(key)))),
        }
    }

    pub fn f32(&self, key: &str) -> Result<Option<f32>> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Value::Float(value)) => Ok(Some(*value as f32)),
            Some(other) => Err(self.wrong(key, "a float", other)),
        }
    }

    pub fn bool(&self, key: &str) -> Result<Option<bool>> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(*value)),
            Some(other) => Err(self.wrong(key, "a bool", other)),
        }
    }

    pub fn str(&self, key: &str) -> Result<Option<&str>> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Value::Text(range)) => self.text(key, range.clone()).map(Some),
            Some(other) => Err(self.wrong(key, "a string", other)),
        }
    }

    fn text(&self, key: &str, range: Range<usize>) -> Result<&str> {
        let bytes = self.bytes.get(range).unwrap_or(&[]);
        std::str::from_utf8(bytes)
            .map_err(|_| Error::file(&self.path, format!("metadata {} is not UTF-8", quoted(key))))
    }

    /// The elements of an array of strings, in order.
    pub fn strings(&self, key: &str) -> Result<Option<Vec<&str>>> {
        let Some((count, bytes)) = self.array(key, STRING, "an array of strings")? else {
            return Ok(None);
        };
        // The array was walked on opening, so `count` strings do stand in `bytes`.
        let mut reader = Reader { bytes, at: 0, path: &self.path };
        let mut out = Vec::with_capacity(count);
        for number in 0..count {
            let raw = reader.counted()?;
            let text = std::str::from_utf8(raw).map_err(|_| {
                Error::file(&self.path, format!("metadata {}: element {number} is not UTF-8", quoted(key)))
            })?;
            out.push(text);
        }
        Ok(Some(out))
    }

    /// The elements of an array of f32.
    pub fn f32s(&self, key: &str) -> Result<Option<Vec<f32>>> {
        let Some((_, bytes)) = self.array(key, FLOAT32, "an array of 32-bit floats")? else {
            return Ok(None);
        };
        Ok(Some(bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()))
    }

    /// The elements of an array of 32-bit integers, signed or not.
    pub fn i32s(&self, key: &str) -> Result<Option<Vec<i32>>> {
        let element = match self.metadata.get(key) {
            Some(Value::Array { element: UINT32, .. }) => UINT32,
            _ => INT32,
        };
        let Some((_, bytes)) = self.array(key, element, "an array of 32-bit integers")? else {
            return Ok(None);
        };
        Ok(Some(bytes.as_chunks::<4>().0.iter().map(|b| i32::from_le_bytes(*b)).collect()))
    }

    /// Count and bytes of an array whose elements have type `expected`.
    fn array(&self, key: &str, expected: u32, words: &str) -> Result<Option<(usize, &[u8])>> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Value::Array { element, count, bytes }) if *element == expected => {
                Ok(Some((*count, self.bytes.get(bytes.clone()).unwrap_or(&[]))))
            }
            Some(other) => Err(self.wrong(key, words, other)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::reader::{ARRAY, BOOL};
    use super::*;

    /// Builds files by hand, byte for byte.
    #[derive(Default)]
    struct Builder {
        pairs: Vec<u8>,
        pair_count: u64,
        tensors: Vec<u8>,
        tensor_count: u64,
    }

    fn string(text: &str) -> Vec<u8> {
        let mut out = (text.len() as u64).to_le_bytes().to_vec();
        out.extend(text.as_bytes());
        out
    }

    impl Builder {
        fn pair(mut self, key: &str, kind: u32, value: &[u8]) -> Self {
            self.pairs.extend(string(key));
            self.pairs.extend(kind.to_le_bytes());
            self.pairs.extend(value);
            self.pair_count += 1;
            self
        }

        fn tensor(mut self, name: &str, dims: &[u64], kind: u32, offset: u64) -> Self {
            self.tensors.extend(string(name));
            self.tensors.extend((dims.len() as u32).to_le_bytes());
            for dim in dims {
                self.tensors.extend(dim.to_le_bytes());
            }
            self.tensors.extend(kind.to_le_bytes());
            self.tensors.extend(offset.to_le_bytes());
            self.tensor_count += 1;
            self
        }

        fn build(self, data: &[u8]) -> Vec<u8> {
            let mut out = b"GGUF".to_vec();
            out.extend(3u32.to_le_bytes());
            out.extend(self.tensor_count.to_le_bytes());
            out.extend(self.pair_count.to_le_bytes());
            out.extend(self.pairs);
            out.extend(self.tensors);
            out.resize(out.len().next_multiple_of(32), 0);
            out.extend(data);
            out
        }
    }

    fn open(bytes: Vec<u8>) -> Result<Gguf> {
        Gguf::from_bytes(Path::new("x.gguf"), bytes)
    }

    fn message(bytes: Vec<u8>) -> String {
        match open(bytes) {
            Ok(_) => "it was opened".to_owned(),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn values_and_a_tensor() {
        let mut words = STRING.to_le_bytes().to_vec();
        words.extend(2u64.to_le_bytes());
        words.extend(string("a"));
        words.extend(string("bc"));
        let data: Vec<u8> = [1.0f32, 2.0, 3.0, 4.0, 5.0, 6.0].iter().flat_map(|x| x.to_le_bytes()).collect();
        let gguf = open(
            Builder::default()
                .pair("n", UINT32, &7u32.to_le_bytes())
                .pair("t", STRING, &string("llama"))
                .pair("w", ARRAY, &words)
                .pair("b", BOOL, &[1])
                .tensor("m", &[3, 2], 0, 0)
                .build(&data),
        )
        .unwrap();
        assert_eq!(gguf.u64("n").unwrap(), Some(7));
        assert_eq!(gguf.str("t").unwrap(), Some("llama"));
        assert_eq!(gguf.strings("w").unwrap(), Some(vec!["a", "bc"]));
        assert_eq!(gguf.bool("b").unwrap(), Some(true));
        assert_eq!(gguf.u64("absent").unwrap(), None);
        assert_eq!(
            gguf.u64("t").unwrap_err().to_string(),
            "x.gguf: metadata \"t\" is a string, expected a non-negative integer"
        );
        let info = gguf.tensor("m").unwrap();
        assert_eq!((info.shape.as_slice(), info.block_type), ([2, 3].as_slice(), BlockType::F32));
        assert_eq!(gguf.data(info), data);
    }

    #[test]
    fn refusals_name_what_is_wrong() {
        assert_eq!(message(b"GG".to_vec()), "x.gguf: not a GGUF file: it does not begin with \"GGUF\"");
        let mut big_endian = Builder::default().build(&[]);
        big_endian[4..8].copy_from_slice(&[0, 0, 0, 3]);
        assert_eq!(message(big_endian), "x.gguf: big-endian GGUF, expected little-endian");
        let rank3 = Builder::default().tensor("conv", &[2, 2, 2], 0, 0).build(&[0; 32]);
        assert_eq!(message(rank3), "x.gguf: tensor conv: rank 3, expected a vector or a matrix");
        let q2 = Builder::default().tensor("w", &[256], 10, 0).build(&[0; 84]);
        assert!(message(q2).starts_with("x.gguf: tensor w: type Q2_K is not read\n  hint: "));
        let ragged = Builder::default().tensor("w", &[33, 2], 2, 0).build(&[0; 64]);
        assert_eq!(message(ragged), "x.gguf: tensor w: 33 columns are no whole number of Q4_0 blocks of 32");
        let short = Builder::default().tensor("w", &[32], 0, 0).build(&[0; 64]);
        assert!(message(short).contains("tensor w: 128 bytes at offset 0 of the data reach past the end"));
        let skewed = Builder::default().tensor("w", &[4], 0, 8).build(&[0; 64]);
        assert!(message(skewed).contains("offset 8 is not a multiple of the alignment 32"));
        let twice = Builder::default().tensor("w", &[4], 0, 0).tensor("w", &[4], 0, 0).build(&[0; 64]);
        assert_eq!(message(twice), "x.gguf: tensor w: stands twice in the directory");
    }

    #[test]
    fn hostile_counts_are_not_believed() {
        let mut many = Builder::default().build(&[]);
        many[16..24].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(message(many).contains("metadata pairs announced"));
        let mut array = UINT32.to_le_bytes().to_vec();
        array.extend(u64::MAX.to_le_bytes());
        assert!(message(Builder::default().pair("a", ARRAY, &array).build(&[])).contains("announces"));
        let mut strings = STRING.to_le_bytes().to_vec();
        strings.extend((1u64 << 40).to_le_bytes());
        assert!(message(Builder::default().pair("a", ARRAY, &strings).build(&[])).contains("announced"));
        let mut nested = Vec::new();
        for _ in 0..6 {
            nested.extend(ARRAY.to_le_bytes());
            nested.extend(1u64.to_le_bytes());
        }
        assert!(
            message(Builder::default().pair("a", ARRAY, &nested).build(&[])).contains("nests arrays deeper than 4")
        );
        let huge = Builder::default().tensor("w", &[1 << 40, 1 << 40], 0, 0).build(&[]);
        assert!(message(huge).contains("no usable number of elements"));
    }
}
