//! Parameters and moments of an adapter in host memory, under the names that the file of a checkpoint gives them.

use cashtag_backend::Backend;
use cashtag_llama::lora::{Group, Lora, Moments};

use crate::error::{Error, Result};

/// Values of one tensor.
#[derive(Clone, Debug, PartialEq)]
pub enum Values {
    F32(Vec<f32>),
    /// Codes of 8-bit moments.
    U8(Vec<u8>),
}

/// Everything that the optimizer changes: `a.parameter`, `a.m`, `a.v`, …, and with 8-bit moments `a.m8`, `a.v8`, `a.absmax`, `a.m32`,
/// `a.v32`.
#[derive(Clone, Debug, PartialEq)]
pub struct OptimizerState {
    pub tensors: Vec<(String, Values)>,
}

/// What a tensor of the state must look like.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Expected {
    pub name: String,
    pub len: usize,
    /// Codes, not f32.
    pub codes: bool,
}

fn not_trainable() -> Error {
    Error::Invalid("the adapter is not trainable".into())
}

fn shape_of<B: Backend>(prefix: &str, group: &Group<B>) -> Result<Vec<Expected>> {
    let t = group.training.as_ref().ok_or_else(not_trainable)?;
    let one = |name: &str, len, codes| Expected { name: format!("{prefix}.{name}"), len, codes };
    let mut all = vec![one("parameter", group.len, false)];
    match &t.moments {
        Moments::Full { .. } => all.extend(["m", "v"].map(|n| one(n, group.len, false))),
        Moments::EightBit(e) => {
            all.extend(["m8", "v8"].map(|n| one(n, group.len, true)));
            all.push(one("absmax", 2 * e.blocks, false));
            all.extend(["m32", "v32"].map(|n| one(n, e.wide, false)));
        }
    }
    Ok(all)
}

fn codes<B: Backend>(backend: &B, buffer: &B::Buffer, len: usize) -> Result<Values> {
    let mut words = vec![0u32; len.div_ceil(4)];
    backend.download_u32(buffer, &mut words)?;
    let mut bytes: Vec<u8> = words.into_iter().flat_map(u32::to_le_bytes).collect();
    bytes.truncate(len);
    Ok(Values::U8(bytes))
}

fn floats<B: Backend>(backend: &B, buffer: &B::Buffer, len: usize) -> Result<Values> {
    let mut values = vec![0.0; len];
    backend.download(buffer, 0, &mut values)?;
    Ok(Values::F32(values))
}

impl OptimizerState {
    /// Names and sizes of what [`download`](Self::download) gives.
    ///
    /// # Errors
    /// The adapter is not trainable.
    pub fn expected<B: Backend>(lora: &Lora<B>) -> Result<Vec<Expected>> {
        let mut all = Vec::new();
        for (prefix, group) in lora.groups() {
            all.extend(shape_of(prefix, group)?);
        }
        Ok(all)
    }

    /// # Errors
    /// The device fails, or the adapter is not trainable.
    pub fn download<B: Backend>(backend: &B, lora: &Lora<B>) -> Result<Self> {
        let mut tensors = Vec::new();
        for (prefix, group) in lora.groups() {
            let t = group.training.as_ref().ok_or_else(not_trainable)?;
            let mut values = vec![floats(backend, &group.parameter, group.len)?];
            match &t.moments {
                Moments::Full { m, v } => {
                    values.push(floats(backend, m, group.len)?);
                    values.push(floats(backend, v, group.len)?);
                }
                Moments::EightBit(e) => {
                    values.push(codes(backend, &e.m, group.len)?);
                    values.push(codes(backend, &e.v, group.len)?);
                    values.push(floats(backend, &e.absmax, 2 * e.blocks)?);
                    values.push(floats(backend, &e.m32, e.wide)?);
                    values.push(floats(backend, &e.v32, e.wide)?);
                }
            }
            tensors.extend(shape_of(prefix, group)?.into_iter().map(|e| e.name).zip(values));
        }
        Ok(Self { tensors })
    }

    /// # Errors
    /// The state is of another adapter or optimizer, or the device fails.
    pub fn upload<B: Backend>(&self, backend: &B, lora: &mut Lora<B>) -> Result<()> {
        let wrong = |name: &str| Error::Invalid(format!("the state of the optimizer has no fitting {name}"));
        let floats = |name: String, len: usize| match self.get(&name) {
            Some(Values::F32(v)) if v.len() == len => Ok(&v[..]),
            _ => Err(wrong(&name)),
        };
        let words = |name: String, len: usize| match self.get(&name) {
            Some(Values::U8(v)) if v.len() == len => Ok(v
                .chunks(4)
                .map(|c| c.iter().rev().fold(0u32, |word, &b| word << 8 | u32::from(b)))
                .collect::<Vec<u32>>()),
            _ => Err(wrong(&name)),
        };
        lora.magnitudes_given();
        for (prefix, group) in lora.groups_mut() {
            let len = group.len;
            let name = |part: &str| format!("{prefix}.{part}");
            group.upload(backend, floats(name("parameter"), len)?)?;
            let t = group.training.as_mut().ok_or_else(not_trainable)?;
            match &mut t.moments {
                Moments::Full { m, v } => {
                    backend.upload(floats(name("m"), len)?, m, 0)?;
                    backend.upload(floats(name("v"), len)?, v, 0)?;
                }
                Moments::EightBit(e) => {
                    backend.upload_u32(&words(name("m8"), len)?, &mut e.m)?;
                    backend.upload_u32(&words(name("v8"), len)?, &mut e.v)?;
                    backend.upload(floats(name("absmax"), 2 * e.blocks)?, &mut e.absmax, 0)?;
                    backend.upload(floats(name("m32"), e.wide)?, &mut e.m32, 0)?;
                    backend.upload(floats(name("v32"), e.wide)?, &mut e.v32, 0)?;
                }
            }
        }
        Ok(())
    }

    pub fn get(&self, name: &str) -> Option<&Values> {
        self.tensors.iter().find(|(n, _)| n == name).map(|(_, v)| v)
    }
}
