//! The frozen matrices of a checkpoint as devices pull them: rows of f32, or the stored bytes where a device can take them
//! as they are.
//!
//! Every row that is read is checked for NaN and infinity, and the error names tensor and row: a damaged download shows
//! here and not as a loss of NaN.

use std::borrow::Cow;
use std::ops::Range;

use cashtag_backend::philox::philox4x32;
use cashtag_backend::{RawWeight, WeightSource};

use crate::ggml::BlockType;

/// bitsandbytes' NF4 codebook: quantiles of a normal distribution, scaled to [-1, 1] (QLoRA, appendix E).
pub(crate) const NF4_CODEBOOK: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// How a matrix is stored.
pub(crate) enum Storage<'a> {
    /// Rows of ggml blocks, plain types included. `permuted_heads`: the rows of each of that many heads are interleaved
    /// as llama.cpp stores q and k.
    Blocks { bytes: &'a [u8], block_type: BlockType, permuted_heads: Option<usize> },
    /// bitsandbytes' NF4 over the flattened matrix, `block` elements an absmax.
    Nf4 { codes: &'a [u8], absmax: Cow<'a, [f32]>, block: usize },
    /// Uniform noise of a standard deviation, or a constant if it is 0: see [`random_rows`].
    Random { seed: u64, tensor: u32, deviation: f32 },
}

/// One matrix `[rows, cols]`. Sizes were checked by the reader that made it.
pub(crate) struct Matrix<'a> {
    pub(crate) name: String,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) storage: Storage<'a>,
}

impl WeightSource for Matrix<'_> {
    fn name(&self) -> &str {
        &self.name
    }

    fn rows(&self) -> usize {
        self.rows
    }

    fn cols(&self) -> usize {
        self.cols
    }

    fn read_rows(&self, rows: Range<usize>, out: &mut [f32]) -> cashtag_backend::Result<()> {
        assert!(rows.start <= rows.end && rows.end <= self.rows, "rows {rows:?} of {} with {}", self.name, self.rows);
        assert_eq!(out.len(), rows.len() * self.cols, "output for rows {rows:?} of {}", self.name);
        match &self.storage {
            Storage::Blocks { bytes, block_type, permuted_heads } => {
                // Whole blocks a row was checked on opening.
                let stride = self.cols / block_type.block() * block_type.bytes();
                match permuted_heads {
                    None => block_type.dequantize(&bytes[rows.start * stride..rows.end * stride], out),
                    Some(heads) => {
                        for (row, out) in rows.clone().zip(out.chunks_exact_mut(self.cols)) {
                            let stored = stored_row(row, self.rows / heads);
                            block_type.dequantize(&bytes[stored * stride..(stored + 1) * stride], out);
                        }
                    }
                }
            }
            Storage::Nf4 { codes, absmax, block } => {
                let mut at = rows.start * self.cols;
                let mut left = &mut *out;
                while !left.is_empty() {
                    // Up to the end of the block, within which absmax is constant.
                    let (values, rest) = left.split_at_mut((block - at % block).min(left.len()));
                    let scale = absmax[at / block];
                    for (at, value) in (at..).zip(values.iter_mut()) {
                        // The first element of a pair is in the high nibble.
                        let code = (codes[at / 2] >> (4 * (1 - at % 2))) & 0xF;
                        *value = NF4_CODEBOOK[code as usize] * scale;
                    }
                    at += values.len();
                    left = rest;
                }
            }
            Storage::Random { seed, tensor, deviation } => {
                random_rows(*seed, *tensor, *deviation, rows.start, self.cols, out);
            }
        }
        match first_not_finite(out) {
            None => Ok(()),
            Some(at) => Err(cashtag_backend::Error::Weight {
                name: self.name.clone(),
                what: format!(
                    "row {}, column {} is {}\n  hint: the file is damaged, download it again",
                    rows.start + at / self.cols,
                    at % self.cols,
                    out[at]
                ),
            }),
        }
    }

    fn raw(&self) -> Option<RawWeight<'_>> {
        match &self.storage {
            Storage::Blocks { bytes, block_type, permuted_heads: None } => {
                let (raw, finite) = match block_type {
                    BlockType::F32 => {
                        (RawWeight::F32(bytes), finite::<4>(bytes, |b| u32::from_le_bytes(b) >> 16, 0x7F80))
                    }
                    BlockType::F16 => {
                        (RawWeight::F16(bytes), finite::<2>(bytes, |b| u16::from_le_bytes(b).into(), 0x7C00))
                    }
                    BlockType::Bf16 => {
                        (RawWeight::Bf16(bytes), finite::<2>(bytes, |b| u16::from_le_bytes(b).into(), 0x7F80))
                    }
                    _ => return None,
                };
                // Without the raw form the device reads rows, and that names the one that is not finite.
                finite.then_some(raw)
            }
            Storage::Nf4 { codes, absmax, block: 64 } if first_not_finite(absmax).is_none() => {
                Some(RawWeight::Nf4 { codes, absmax })
            }
            _ => None,
        }
    }
}

/// Where llama.cpp's converter put row `row` of q or k: within a head of `head_rows` rows the two halves that rotary
/// embedding pairs are interleaved, (half, i) → 2 · i + half.
fn stored_row(row: usize, head_rows: usize) -> usize {
    let (head, within) = (row / head_rows, row % head_rows);
    let pairs = head_rows / 2;
    head * head_rows + 2 * (within % pairs) + within / pairs
}

/// The row that stands at `stored`: the inverse of [`stored_row`].
pub(crate) fn natural_row(stored: usize, head_rows: usize) -> usize {
    let (head, within) = (stored / head_rows, stored % head_rows);
    head * head_rows + (within % 2) * (head_rows / 2) + within / 2
}

/// Index of the first NaN or infinity.
pub(crate) fn first_not_finite(values: &[f32]) -> Option<usize> {
    // The maximum of the magnitudes' bits vectorises; the position is looked for only where there is one.
    let largest = values.iter().fold(0, |largest, value| largest.max(value.to_bits() & 0x7FFF_FFFF));
    if largest < 0x7F80_0000 { None } else { values.iter().position(|value| !value.is_finite()) }
}

/// Whether no element has all exponent bits (`exponent`) set.
fn finite<const N: usize>(bytes: &[u8], bits: impl Fn([u8; N]) -> u32, exponent: u32) -> bool {
    !bytes.as_chunks::<N>().0.iter().any(|chunk| bits(*chunk) & exponent == exponent)
}

/// Uniform noise with standard deviation `deviation`, 16 bits an element, a pure function of (seed, tensor, row, column).
/// Uniform and not normal, because seven billion logarithms take minutes and what is measured on random weights does not
/// depend on their distribution.
fn random_rows(seed: u64, tensor: u32, deviation: f32, first_row: usize, cols: usize, out: &mut [f32]) {
    // A uniform variable on (-a, a) has standard deviation a / √3.
    let step = deviation * 3f32.sqrt() / 32_768.0;
    let key = [seed as u32, (seed >> 32) as u32];
    for (row, values) in (first_row..).zip(out.chunks_exact_mut(cols)) {
        for (group, values) in (0u32..).zip(values.chunks_mut(8)) {
            let words = philox4x32([group, row as u32, tensor, 0x7765_6967], key);
            for (j, value) in values.iter_mut().enumerate() {
                let half = (words[j / 2] >> (16 * (j % 2))) as u16;
                *value = (f32::from(half) - 32_767.5) * step;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use half::f16;

    use super::*;

    fn matrix(rows: usize, cols: usize, storage: Storage<'_>) -> Matrix<'_> {
        Matrix { name: "w".into(), rows, cols, storage }
    }

    fn read(matrix: &Matrix<'_>, rows: Range<usize>) -> cashtag_backend::Result<Vec<f32>> {
        let mut out = vec![0.0; rows.len() * matrix.cols];
        matrix.read_rows(rows, &mut out).map(|()| out)
    }

    #[test]
    fn permuted_rows_are_put_back() {
        // Two heads of four rows; llama.cpp stores rows 0 2 1 3 of each.
        let stored: Vec<u8> = [0f32, 2.0, 1.0, 3.0, 4.0, 6.0, 5.0, 7.0].iter().flat_map(|x| x.to_le_bytes()).collect();
        let storage = Storage::Blocks { bytes: &stored, block_type: BlockType::F32, permuted_heads: Some(2) };
        let matrix = matrix(8, 1, storage);
        assert_eq!(read(&matrix, 0..8).unwrap(), [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]);
        assert_eq!(read(&matrix, 5..7).unwrap(), [5.0, 6.0]);
        assert!(matrix.raw().is_none());
    }

    #[test]
    fn stored_and_natural_rows_are_inverse() {
        assert_eq!((0..8).map(|row| natural_row(row, 4)).collect::<Vec<_>>(), [0, 2, 1, 3, 4, 6, 5, 7]);
        assert!((0..192).all(|row| natural_row(stored_row(row, 64), 64) == row));
    }

    #[test]
    fn nf4_takes_the_high_nibble_first() {
        let codes = [0x0F, 0x77];
        let storage = Storage::Nf4 { codes: &codes, absmax: vec![2.0, 3.0].into(), block: 2 };
        assert_eq!(read(&matrix(2, 2, storage), 0..2).unwrap(), [-2.0, 2.0, 0.0, 0.0]);
    }

    #[test]
    fn damage_is_named() {
        let bytes: Vec<u8> =
            [1.0, 2.0, f32::INFINITY, 4.0].iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect();
        let storage = Storage::Blocks { bytes: &bytes, block_type: BlockType::F16, permuted_heads: None };
        let matrix = matrix(2, 2, storage);
        assert_eq!(read(&matrix, 0..1).unwrap(), [1.0, 2.0]);
        let error = read(&matrix, 1..2).unwrap_err().to_string();
        assert_eq!(error, "weight w: row 1, column 0 is inf\n  hint: the file is damaged, download it again");
        assert!(matrix.raw().is_none());
        assert_eq!(first_not_finite(&[0.0, f32::NAN]), Some(1));
    }

    #[test]
    fn random_weights_do_not_depend_on_how_they_are_read() {
        let storage = || Storage::Random { seed: 42, tensor: 7, deviation: 0.02 };
        let matrix = matrix(50, 1001, storage());
        let all = read(&matrix, 0..50).unwrap();
        assert_eq!(read(&matrix, 20..21).unwrap(), all[20 * 1001..21 * 1001]);
        let mean = all.iter().sum::<f32>() / all.len() as f32;
        let deviation = (all.iter().map(|x| x * x).sum::<f32>() / all.len() as f32).sqrt();
        // 50,050 draws: the mean's standard error is 0.0001.
        assert!(mean.abs() < 0.0005 && (deviation - 0.02).abs() < 0.0003, "{mean} {deviation}");
    }
}
