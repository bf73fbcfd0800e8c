//! The byte level of GGUF: a cursor that never reads past the end, and the values it walks over.

use std::ops::Range;
use std::path::Path;

use super::TensorInfo;
use crate::error::{Error, Result, printable, quoted};
use crate::ggml::BlockType;

/// Arrays of arrays may nest this deep; llama.cpp writes none.
const MAX_NESTING: usize = 4;
/// Longest key and tensor name; ggml's own limit for names is 64.
const MAX_NAME: u64 = 256;

/// A metadata value; strings and array elements are byte ranges of the file.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Value {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Bool(bool),
    Text(Range<usize>),
    Array { element: u32, count: usize, bytes: Range<usize> },
}

impl Value {
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Value::Unsigned(_) => "an unsigned integer",
            Value::Signed(_) => "a signed integer",
            Value::Float(_) => "a float",
            Value::Bool(_) => "a bool",
            Value::Text(_) => "a string",
            Value::Array { .. } => "an array",
        }
    }
}

pub(super) const UINT32: u32 = 4;
pub(super) const INT32: u32 = 5;
pub(super) const FLOAT32: u32 = 6;
pub(super) const BOOL: u32 = 7;
pub(super) const STRING: u32 = 8;
pub(super) const ARRAY: u32 = 9;

/// Bytes of a value of scalar type `kind`.
pub(super) fn scalar_size(kind: u32) -> Option<u64> {
    match kind {
        0 | 1 | BOOL => Some(1),
        2 | 3 => Some(2),
        UINT32 | INT32 | FLOAT32 => Some(4),
        10..=12 => Some(8),
        _ => None,
    }
}

/// A cursor that never reads past the end.
pub(super) struct Reader<'a> {
    pub(super) bytes: &'a [u8],
    pub(super) at: usize,
    pub(super) path: &'a Path,
}

impl<'a> Reader<'a> {
    pub(super) fn left(&self) -> u64 {
        (self.bytes.len() - self.at) as u64
    }

    pub(super) fn take(&mut self, count: u64) -> Result<&'a [u8]> {
        if count > self.left() {
            let what = format!(
                "truncated: {count} bytes expected at byte {}, {} are left\n  hint: download the file again",
                self.at,
                self.left()
            );
            return Err(Error::file(self.path, what));
        }
        let start = self.at;
        self.at += count as usize;
        Ok(&self.bytes[start..self.at])
    }

    pub(super) fn array_of<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N as u64)?);
        Ok(out)
    }

    pub(super) fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array_of()?))
    }

    pub(super) fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array_of()?))
    }

    /// Checks a count before a loop runs over it: against the bytes left and against `limit`.
    pub(super) fn believe(&self, what: &str, count: u64, smallest: u64, limit: u64) -> Result<()> {
        if count > limit || count.saturating_mul(smallest) > self.left() {
            return Err(Error::file(
                self.path,
                format!("{count} {what} announced, the {} bytes that are left cannot hold them", self.left()),
            ));
        }
        Ok(())
    }

    /// A string: length, then bytes.
    pub(super) fn counted(&mut self) -> Result<&'a [u8]> {
        let length = self.u64()?;
        self.take(length)
    }

    pub(super) fn name(&mut self, what: &str) -> Result<String> {
        let at = self.at;
        let length = self.u64()?;
        if length > MAX_NAME {
            return Err(Error::file(
                self.path,
                format!("{what} at byte {at} has {length} bytes, expected at most {MAX_NAME}"),
            ));
        }
        let raw = self.take(length)?;
        match std::str::from_utf8(raw) {
            Ok(text) => Ok(text.to_owned()),
            Err(_) => Err(Error::file(self.path, format!("{what} at byte {at} is not UTF-8"))),
        }
    }

    pub(super) fn value(&mut self, kind: u32, key: &str) -> Result<Value> {
        Ok(match kind {
            0 => Value::Unsigned(self.array_of::<1>()?[0].into()),
            1 => Value::Signed((self.array_of::<1>()?[0] as i8).into()),
            2 => Value::Unsigned(u16::from_le_bytes(self.array_of()?).into()),
            3 => Value::Signed(i16::from_le_bytes(self.array_of()?).into()),
            UINT32 => Value::Unsigned(self.u32()?.into()),
            INT32 => Value::Signed(i32::from_le_bytes(self.array_of()?).into()),
            FLOAT32 => Value::Float(f32::from_le_bytes(self.array_of()?).into()),
            BOOL => match self.array_of::<1>()?[0] {
                0 => Value::Bool(false),
                1 => Value::Bool(true),
                byte => {
                    let what = format!("metadata {} is a bool of value {byte}, expected 0 or 1", quoted(key));
                    return Err(Error::file(self.path, what));
                }
            },
            STRING => {
                let length = self.counted()?.len();
                Value::Text(self.at - length..self.at)
            }
            ARRAY => {
                let element = self.u32()?;
                let count = self.u64()?;
                let start = self.at;
                self.skip_array(element, count, key, 1)?;
                Value::Array { element, count: count as usize, bytes: start..self.at }
            }
            10 => Value::Unsigned(self.u64()?),
            11 => Value::Signed(i64::from_le_bytes(self.array_of()?)),
            12 => Value::Float(f64::from_le_bytes(self.array_of()?)),
            _ => return Err(Error::file(self.path, format!("metadata {} has unknown type {kind}", quoted(key)))),
        })
    }

    /// Walks over an array's elements, so that its end is known and its count is true.
    pub(super) fn skip_array(&mut self, element: u32, count: u64, key: &str, depth: usize) -> Result<()> {
        if let Some(size) = scalar_size(element) {
            let Some(total) = count.checked_mul(size) else {
                return Err(Error::file(self.path, format!("metadata {} announces {count} elements", quoted(key))));
            };
            self.take(total)?;
            return Ok(());
        }
        match element {
            STRING => {
                self.believe(&format!("strings of {}", quoted(key)), count, 8, u64::MAX)?;
                for _ in 0..count {
                    self.counted()?;
                }
            }
            ARRAY if depth < MAX_NESTING => {
                self.believe(&format!("arrays of {}", quoted(key)), count, 12, u64::MAX)?;
                for _ in 0..count {
                    let inner = self.u32()?;
                    let inner_count = self.u64()?;
                    self.skip_array(inner, inner_count, key, depth + 1)?;
                }
            }
            ARRAY => {
                let what = format!("metadata {} nests arrays deeper than {MAX_NESTING}", quoted(key));
                return Err(Error::file(self.path, what));
            }
            _ => {
                let what = format!("metadata {} is an array of unknown type {element}", quoted(key));
                return Err(Error::file(self.path, what));
            }
        }
        Ok(())
    }

    /// One entry of the tensor directory, its `bytes` being `0..size`, and its offset in the data.
    pub(super) fn tensor(&mut self) -> Result<(TensorInfo, u64)> {
        let name = self.name("tensor name")?;
        let rank = self.u32()?;
        let fail = |what: String| Err(Error::tensor(self.path, printable(&name), what));
        if !(1..=2).contains(&rank) {
            return fail(format!("rank {rank}, expected a vector or a matrix"));
        }
        let mut shape = Vec::new();
        for _ in 0..rank {
            shape.push(self.u64()?);
        }
        let fail = |what: String| Err(Error::tensor(self.path, printable(&name), what));
        let elements = shape.iter().try_fold(1u64, |product, &dim| product.checked_mul(dim));
        let Some(elements) = elements.filter(|&n| n > 0 && n <= isize::MAX as u64) else {
            return fail(format!("shape {shape:?} has no usable number of elements"));
        };
        let id = self.u32()?;
        let offset = self.u64()?;
        let block_type = match BlockType::from_id(id) {
            Ok(block_type) => block_type,
            Err(type_name) => {
                return fail(format!(
                    "type {type_name} is not read\n  hint: use a file in F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K or Q6_K"
                ));
            }
        };
        let columns = shape[0];
        if !columns.is_multiple_of(block_type.block() as u64) {
            return fail(format!(
                "{columns} columns are no whole number of {} blocks of {}",
                block_type.name(),
                block_type.block()
            ));
        }
        let size = block_type.size_of(elements).and_then(|size| usize::try_from(size).ok());
        let Some(size) = size else {
            return fail(format!("shape {shape:?} is too large"));
        };
        shape.reverse();
        let shape = shape.into_iter().map(|dim| dim as usize).collect();
        Ok((TensorInfo { name, shape, block_type, bytes: 0..size }, offset))
    }
}
