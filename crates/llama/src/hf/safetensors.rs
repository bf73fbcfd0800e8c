//! One safetensors file: a JSON directory behind its own length, then the data.

use std::collections::{HashMap, hash_map};
use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::{self, MapAccess, Visitor};

use crate::error::{Error, Result, printable, quoted};
use crate::gguf::{Bytes, map_file};

/// Largest directory of one file that is believed; a shard of Llama-3.1-405B has 20 kB.
const MAX_HEADER: u64 = 8 << 20;
/// One safetensors file.
pub(super) struct Shard {
    pub(super) path: PathBuf,
    pub(super) bytes: Bytes,
    /// Where the data begin.
    data: usize,
    pub(super) entries: HashMap<String, Entry>,
}

/// An entry of the directory, its range checked against the file.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub(super) dtype: String,
    pub(super) shape: Vec<usize>,
    pub(super) range: Range<usize>,
}

#[derive(Deserialize)]
struct EntryJson {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

/// The directory, in which no name may stand twice.
struct Directory(HashMap<String, EntryJson>);

impl<'de> Deserialize<'de> for Directory {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct DirectoryVisitor;
        impl<'de> Visitor<'de> for DirectoryVisitor {
            type Value = Directory;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a directory of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Directory, A::Error> {
                let mut entries = HashMap::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        map.next_value::<de::IgnoredAny>()?;
                        continue;
                    }
                    let entry = map.next_value()?;
                    if let hash_map::Entry::Vacant(place) = entries.entry(name) {
                        place.insert(entry);
                    } else {
                        return Err(de::Error::custom("a tensor stands twice"));
                    }
                }
                Ok(Directory(entries))
            }
        }
        deserializer.deserialize_map(DirectoryVisitor)
    }
}

/// Bytes of one element of a safetensors dtype.
fn dtype_size(dtype: &str) -> Option<u64> {
    match dtype {
        "BOOL" | "U8" | "I8" | "F8_E4M3" | "F8_E5M2" => Some(1),
        "U16" | "I16" | "F16" | "BF16" => Some(2),
        "U32" | "I32" | "F32" => Some(4),
        "U64" | "I64" | "F64" => Some(8),
        _ => None,
    }
}

impl Shard {
    pub(super) fn open(path: &Path) -> Result<Self> {
        Self::parse(path, map_file(path)?)
    }

    fn parse(path: &Path, bytes: Bytes) -> Result<Self> {
        let fail = |what: String| Error::file(path, what);
        let Some((length, rest)) = bytes.split_first_chunk::<8>() else {
            return Err(fail(format!("not a safetensors file: {} bytes long", bytes.len())));
        };
        let length = u64::from_le_bytes(*length);
        if length > MAX_HEADER || length > rest.len() as u64 {
            return Err(fail(format!(
                "not a safetensors file, or truncated: a directory of {length} bytes in a file of {}",
                bytes.len()
            )));
        }
        let (header, data) = rest.split_at(length as usize);
        let directory: Directory =
            serde_json::from_slice(header).map_err(|error| fail(format!("safetensors directory: {error}")))?;
        let mut entries = HashMap::with_capacity(directory.0.len());
        for (name, json) in directory.0 {
            let entry =
                Entry::check(json, data.len() as u64).map_err(|what| Error::tensor(path, printable(&name), what))?;
            entries.insert(name, entry);
        }
        let data = 8 + length as usize;
        Ok(Shard { path: path.to_owned(), bytes, data, entries })
    }

    pub(super) fn data(&self, entry: &Entry) -> &[u8] {
        self.bytes.get(self.data + entry.range.start..self.data + entry.range.end).unwrap_or(&[])
    }
}

impl Entry {
    fn check(json: EntryJson, available: u64) -> Result<Self, String> {
        let EntryJson { dtype, shape, data_offsets: (start, end) } = json;
        if start > end || end > available {
            return Err(format!(
                "bytes {start} to {end} of {available}\n  hint: the file is truncated, download it again"
            ));
        }
        if shape.len() > 8 {
            return Err(format!("rank {}", shape.len()));
        }
        let Some(size) = dtype_size(&dtype) else {
            return Err(format!("dtype {} is not known", quoted(&dtype)));
        };
        let expected = shape.iter().try_fold(size, |product, &dim| product.checked_mul(dim));
        if expected != Some(end - start) {
            return Err(format!("shape {shape:?} of {dtype} does not take the {} bytes it has", end - start));
        }
        // Each dimension fits: a zero elsewhere would let an absurd one pass.
        let shape = shape.iter().map(|&dim| usize::try_from(dim).map_err(|_| format!("dimension {dim}")));
        Ok(Entry { dtype, shape: shape.collect::<Result<_, _>>()?, range: start as usize..end as usize })
    }
}
