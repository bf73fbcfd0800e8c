//! ggml's tensor types: block layouts and their values as f32.
//!
//! Each `dequantize_*` evaluates the formula of ggml's reference (`ggml-quants.c`, `dequantize_row_*`) in the same order
//! and in f32, so the result is bit-identical to it. A block is the smallest unit that can be read: [`BlockType::block`]
//! elements in [`BlockType::bytes`] bytes.

use half::{bf16, f16};

/// The tensor types that this crate reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BlockType {
    F32,
    F16,
    Bf16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q4K,
    Q5K,
    Q6K,
}

/// ggml's names of its type numbers, for messages about types that are not read.
const NAMES: [(u32, &str); 33] = [
    (0, "F32"),
    (1, "F16"),
    (2, "Q4_0"),
    (3, "Q4_1"),
    (6, "Q5_0"),
    (7, "Q5_1"),
    (8, "Q8_0"),
    (9, "Q8_1"),
    (10, "Q2_K"),
    (11, "Q3_K"),
    (12, "Q4_K"),
    (13, "Q5_K"),
    (14, "Q6_K"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (20, "IQ4_NL"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (23, "IQ4_XS"),
    (24, "I8"),
    (25, "I16"),
    (26, "I32"),
    (27, "I64"),
    (28, "F64"),
    (29, "IQ1_M"),
    (30, "BF16"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (39, "MXFP4"),
    (40, "NVFP4"),
];

/// Elements of a k-quant's super-block.
const QK_K: usize = 256;

impl BlockType {
    /// The type with ggml's number `id`; otherwise a name for the message.
    pub fn from_id(id: u32) -> Result<Self, String> {
        Ok(match id {
            0 => BlockType::F32,
            1 => BlockType::F16,
            2 => BlockType::Q4_0,
            3 => BlockType::Q4_1,
            6 => BlockType::Q5_0,
            7 => BlockType::Q5_1,
            8 => BlockType::Q8_0,
            12 => BlockType::Q4K,
            13 => BlockType::Q5K,
            14 => BlockType::Q6K,
            30 => BlockType::Bf16,
            _ => {
                return Err(match NAMES.iter().find(|&&(number, _)| number == id) {
                    Some((_, name)) => (*name).to_owned(),
                    None => format!("number {id}"),
                });
            }
        })
    }

    /// ggml's number of the type.
    pub const fn id(self) -> u32 {
        match self {
            BlockType::F32 => 0,
            BlockType::F16 => 1,
            BlockType::Q4_0 => 2,
            BlockType::Q4_1 => 3,
            BlockType::Q5_0 => 6,
            BlockType::Q5_1 => 7,
            BlockType::Q8_0 => 8,
            BlockType::Q4K => 12,
            BlockType::Q5K => 13,
            BlockType::Q6K => 14,
            BlockType::Bf16 => 30,
        }
    }

    pub const fn name(self) -> &'static str {
        match self {
            BlockType::F32 => "F32",
            BlockType::F16 => "F16",
            BlockType::Bf16 => "BF16",
            BlockType::Q4_0 => "Q4_0",
            BlockType::Q4_1 => "Q4_1",
            BlockType::Q5_0 => "Q5_0",
            BlockType::Q5_1 => "Q5_1",
            BlockType::Q8_0 => "Q8_0",
            BlockType::Q4K => "Q4_K",
            BlockType::Q5K => "Q5_K",
            BlockType::Q6K => "Q6_K",
        }
    }

    /// Elements of one block.
    pub const fn block(self) -> usize {
        match self {
            BlockType::F32 | BlockType::F16 | BlockType::Bf16 => 1,
            BlockType::Q4_0 | BlockType::Q4_1 | BlockType::Q5_0 | BlockType::Q5_1 | BlockType::Q8_0 => 32,
            BlockType::Q4K | BlockType::Q5K | BlockType::Q6K => QK_K,
        }
    }

    /// Bytes of one block.
    pub const fn bytes(self) -> usize {
        match self {
            BlockType::F32 => 4,
            BlockType::F16 | BlockType::Bf16 => 2,
            BlockType::Q4_0 => 18,
            BlockType::Q4_1 => 20,
            BlockType::Q5_0 => 22,
            BlockType::Q5_1 => 24,
            BlockType::Q8_0 => 34,
            BlockType::Q4K => 144,
            BlockType::Q5K => 176,
            BlockType::Q6K => 210,
        }
    }

    /// Bytes of `elements` elements, or `None` if they are no whole number of blocks or the size overflows.
    pub fn size_of(self, elements: u64) -> Option<u64> {
        let block = self.block() as u64;
        if !elements.is_multiple_of(block) {
            return None;
        }
        (elements / block).checked_mul(self.bytes() as u64)
    }

    /// Writes the values of `bytes` into `out`.
    ///
    /// # Panics
    /// If `out` is no whole number of blocks or `bytes` does not hold exactly as many: sizes are checked when a file is opened.
    pub fn dequantize(self, bytes: &[u8], out: &mut [f32]) {
        assert_eq!(
            Some(bytes.len() as u64),
            self.size_of(out.len() as u64),
            "{} bytes for {} elements of {}",
            bytes.len(),
            out.len(),
            self.name()
        );
        match self {
            BlockType::F32 => each::<4, 1>(bytes, out, |b, y| y[0] = f32::from_le_bytes(*b)),
            BlockType::F16 => each::<2, 1>(bytes, out, |b, y| y[0] = f16::from_le_bytes(*b).to_f32()),
            BlockType::Bf16 => each::<2, 1>(bytes, out, |b, y| y[0] = bf16::from_le_bytes(*b).to_f32()),
            BlockType::Q4_0 => each(bytes, out, dequantize_q4_0),
            BlockType::Q4_1 => each(bytes, out, dequantize_q4_1),
            BlockType::Q5_0 => each(bytes, out, dequantize_q5_0),
            BlockType::Q5_1 => each(bytes, out, dequantize_q5_1),
            BlockType::Q8_0 => each(bytes, out, dequantize_q8_0),
            BlockType::Q4K => each(bytes, out, dequantize_q4_k),
            BlockType::Q5K => each(bytes, out, dequantize_q5_k),
            BlockType::Q6K => each(bytes, out, dequantize_q6_k),
        }
    }
}

fn each<const BYTES: usize, const N: usize>(
    bytes: &[u8],
    out: &mut [f32],
    block: impl Fn(&[u8; BYTES], &mut [f32; N]),
) {
    for (b, y) in bytes.as_chunks::<BYTES>().0.iter().zip(out.as_chunks_mut::<N>().0) {
        block(b, y);
    }
}

fn half_at(bytes: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
}

// d · (q − 8); byte j holds elements j (low nibble) and j + 16 (high nibble).
fn dequantize_q4_0(b: &[u8; 18], y: &mut [f32; 32]) {
    let d = half_at(b, 0);
    for j in 0..16 {
        let q = b[2 + j];
        y[j] = (i32::from(q & 0xF) - 8) as f32 * d;
        y[j + 16] = (i32::from(q >> 4) - 8) as f32 * d;
    }
}

// d · q + m
fn dequantize_q4_1(b: &[u8; 20], y: &mut [f32; 32]) {
    let (d, m) = (half_at(b, 0), half_at(b, 2));
    for j in 0..16 {
        let q = b[4 + j];
        y[j] = f32::from(q & 0xF) * d + m;
        y[j + 16] = f32::from(q >> 4) * d + m;
    }
}

/// The fifth bits of elements `j` and `j + 16` of a Q5 block, in place (0 or 16).
fn fifth_bits(qh: u32, j: usize) -> (u8, u8) {
    ((((qh >> j) << 4) & 0x10) as u8, ((qh >> (j + 12)) & 0x10) as u8)
}

// d · (q − 16), the fifth bits apart in a 32-bit word.
fn dequantize_q5_0(b: &[u8; 22], y: &mut [f32; 32]) {
    let d = half_at(b, 0);
    let qh = u32::from_le_bytes([b[2], b[3], b[4], b[5]]);
    for j in 0..16 {
        let q = b[6 + j];
        let (low, high) = fifth_bits(qh, j);
        y[j] = (i32::from((q & 0xF) | low) - 16) as f32 * d;
        y[j + 16] = (i32::from((q >> 4) | high) - 16) as f32 * d;
    }
}

// d · q + m, the fifth bits apart in a 32-bit word.
fn dequantize_q5_1(b: &[u8; 24], y: &mut [f32; 32]) {
    let (d, m) = (half_at(b, 0), half_at(b, 2));
    let qh = u32::from_le_bytes([b[4], b[5], b[6], b[7]]);
    for j in 0..16 {
        let q = b[8 + j];
        let (low, high) = fifth_bits(qh, j);
        y[j] = f32::from((q & 0xF) | low) * d + m;
        y[j + 16] = f32::from((q >> 4) | high) * d + m;
    }
}

// d · q with signed bytes.
fn dequantize_q8_0(b: &[u8; 34], y: &mut [f32; 32]) {
    let d = half_at(b, 0);
    for j in 0..32 {
        y[j] = f32::from(b[2 + j] as i8) * d;
    }
}

/// Scale and minimum of sub-block `j` (of 8): six bits each, packed into 12 bytes.
fn scale_min(scales: &[u8], j: usize) -> (f32, f32) {
    let (scale, min) = if j < 4 {
        (scales[j] & 63, scales[j + 4] & 63)
    } else {
        ((scales[j + 4] & 0xF) | ((scales[j - 4] >> 6) << 4), (scales[j + 4] >> 4) | ((scales[j] >> 6) << 4))
    };
    (f32::from(scale), f32::from(min))
}

// Per sub-block of 32: (d · scale) · q − dmin · min. Bytes 32i.. hold sub-blocks 2i (low nibbles) and 2i + 1 (high).
fn dequantize_q4_k(b: &[u8; 144], y: &mut [f32; QK_K]) {
    let (d, dmin) = (half_at(b, 0), half_at(b, 2));
    for pair in 0..4 {
        let (s1, m1) = scale_min(&b[4..16], 2 * pair);
        let (s2, m2) = scale_min(&b[4..16], 2 * pair + 1);
        let (d1, m1, d2, m2) = (d * s1, dmin * m1, d * s2, dmin * m2);
        for l in 0..32 {
            let q = b[16 + 32 * pair + l];
            y[64 * pair + l] = d1 * f32::from(q & 0xF) - m1;
            y[64 * pair + 32 + l] = d2 * f32::from(q >> 4) - m2;
        }
    }
}

// As Q4_K, with the fifth bits of sub-block s in bit s of 32 bytes.
fn dequantize_q5_k(b: &[u8; 176], y: &mut [f32; QK_K]) {
    let (d, dmin) = (half_at(b, 0), half_at(b, 2));
    let (high, low) = (&b[16..48], &b[48..176]);
    for pair in 0..4 {
        let (s1, m1) = scale_min(&b[4..16], 2 * pair);
        let (s2, m2) = scale_min(&b[4..16], 2 * pair + 1);
        let (d1, m1, d2, m2) = (d * s1, dmin * m1, d * s2, dmin * m2);
        for l in 0..32 {
            let q = low[32 * pair + l];
            let q1 = (q & 0xF) | (((high[l] >> (2 * pair)) & 1) << 4);
            let q2 = (q >> 4) | (((high[l] >> (2 * pair + 1)) & 1) << 4);
            y[64 * pair + l] = d1 * f32::from(q1) - m1;
            y[64 * pair + 32 + l] = d2 * f32::from(q2) - m2;
        }
    }
}

// d · scale · (q − 32): sixteen signed 8-bit scales, four low bits in ql, two high bits in qh.
fn dequantize_q6_k(b: &[u8; 210], y: &mut [f32; QK_K]) {
    let d = half_at(b, 208);
    for half in 0..2 {
        let (ql, qh) = (&b[64 * half..64 * half + 64], &b[128 + 32 * half..128 + 32 * half + 32]);
        let scales = &b[192 + 8 * half..192 + 8 * half + 8];
        for l in 0..32 {
            for quarter in 0..4 {
                let low = ql[l + 32 * (quarter % 2)] >> (4 * (quarter / 2));
                let q = (low & 0xF) | (((qh[l] >> (2 * quarter)) & 3) << 4);
                let scale = f32::from(scales[l / 16 + 2 * quarter] as i8);
                y[128 * half + 32 * quarter + l] = d * scale * (i32::from(q) - 32) as f32;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(d: f32, m: Option<f32>, rest: &[u8]) -> Vec<u8> {
        let mut bytes = f16::from_f32(d).to_le_bytes().to_vec();
        if let Some(m) = m {
            bytes.extend(f16::from_f32(m).to_le_bytes());
        }
        bytes.extend(rest);
        bytes
    }

    #[test]
    fn q4_1_by_hand() {
        let mut quants = [0u8; 16];
        quants[0] = 0xF3; // element 0 is 3, element 16 is 15
        let mut y = [9.0; 32];
        BlockType::Q4_1.dequantize(&block(0.5, Some(-1.0), &quants), &mut y);
        assert_eq!((y[0], y[16], y[1]), (0.5, 6.5, -1.0));
    }

    #[test]
    fn q5_0_takes_the_fifth_bits_apart() {
        let mut rest = [0u8; 20];
        rest[0] = 0b0000_0001; // fifth bit of element 0
        rest[2] = 0b0000_0010; // fifth bit of element 17
        let mut y = [9.0; 32];
        BlockType::Q5_0.dequantize(&block(1.0, None, &rest), &mut y);
        assert_eq!((y[0], y[1], y[16], y[17]), (0.0, -16.0, -16.0, 0.0));
    }

    #[test]
    fn sizes_are_whole_blocks() {
        assert_eq!(BlockType::Q4_1.size_of(576), Some(360));
        assert_eq!(BlockType::Q6K.size_of(576), None);
        assert_eq!(BlockType::F32.size_of(u64::MAX), None);
    }

    #[test]
    fn types_that_are_not_read_are_named() {
        assert_eq!(BlockType::from_id(10), Err("Q2_K".to_owned()));
        assert_eq!(BlockType::from_id(77), Err("number 77".to_owned()));
    }
}
