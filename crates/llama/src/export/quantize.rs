//! Rows of f32 as ggml's blocks: the formulas of ggml's reference (`ggml-quants.c`, `quantize_row_*_ref`).

use half::{bf16, f16};

use crate::ggml::BlockType;

/// Appends `values`, whole blocks of them, to `out`. A value that does not fit the type is infinite there.
pub(super) fn quantize(block_type: BlockType, values: &[f32], out: &mut Vec<u8>) {
    match block_type {
        BlockType::F32 => values.iter().for_each(|v| out.extend(v.to_le_bytes())),
        BlockType::F16 => values.iter().for_each(|&v| out.extend(f16::from_f32(v).to_le_bytes())),
        BlockType::Bf16 => values.iter().for_each(|&v| out.extend(bf16::from_f32(v).to_le_bytes())),
        BlockType::Q8_0 => values.chunks_exact(32).for_each(|block| q8_0(block, out)),
        BlockType::Q4_0 => values.chunks_exact(32).for_each(|block| q4_0(block, out)),
        other => unreachable!("{} is not written", other.name()),
    }
}

fn inverse(d: f32) -> f32 {
    if d == 0.0 { 0.0 } else { 1.0 / d }
}

fn q8_0(block: &[f32], out: &mut Vec<u8>) {
    let largest = block.iter().fold(0f32, |m, v| m.max(v.abs()));
    let d = largest / 127.0;
    let id = inverse(d);
    out.extend(f16::from_f32(d).to_le_bytes());
    out.extend(block.iter().map(|v| (v * id).round() as i8 as u8));
}

fn q4_0(block: &[f32], out: &mut Vec<u8>) {
    // The value of the largest magnitude, with its sign, becomes -8.
    let extreme = block.iter().fold(0f32, |m, &v| if v.abs() > m.abs() { v } else { m });
    let d = extreme / -8.0;
    let id = inverse(d);
    out.extend(f16::from_f32(d).to_le_bytes());
    let code = |v: f32| ((v * id + 8.5) as i32).clamp(0, 15) as u8;
    out.extend((0..16).map(|j| code(block[j]) | code(block[j + 16]) << 4));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn there_and_back(block_type: BlockType, values: &[f32]) -> Vec<f32> {
        let mut bytes = Vec::new();
        quantize(block_type, values, &mut bytes);
        assert_eq!(Some(bytes.len() as u64), block_type.size_of(values.len() as u64));
        let mut back = vec![0.0; values.len()];
        block_type.dequantize(&bytes, &mut back);
        back
    }

    #[test]
    fn within_half_a_step_of_each_block() {
        let values: Vec<f32> = (0..96).map(|i| ((i * 37 % 101) as f32 - 50.0) * 0.013).collect();
        for (block_type, steps) in [(BlockType::Q8_0, 127.0), (BlockType::Q4_0, 8.0)] {
            for (block, back) in values.chunks(32).zip(there_and_back(block_type, &values).chunks(32)) {
                let largest = block.iter().fold(0f32, |m, v| m.max(v.abs()));
                // Q4_0's other end has one step less; the scale itself is rounded to f16.
                let step = largest / steps;
                let limit = if steps == 8.0 { 1.01 } else { 0.51 } * step + largest * 1e-3;
                for (v, b) in block.iter().zip(back) {
                    assert!((v - b).abs() <= limit, "{}: {v} became {b}", block_type.name());
                }
            }
        }
        assert_eq!(there_and_back(BlockType::Q4_0, &[0.0; 32]), [0.0; 32]);
        assert_eq!(there_and_back(BlockType::Q8_0, &[0.0; 32]), [0.0; 32]);
    }

    /// Values that a type holds exactly come back as they were.
    #[test]
    fn a_grid_is_kept() {
        let grid: Vec<f32> = (0..32).map(|i| (i % 16 - 8) as f32 * 0.25).collect();
        assert_eq!(there_and_back(BlockType::Q4_0, &grid), grid);
        let grid: Vec<f32> = (0..32).map(|i| (i * 8 - 127) as f32 * 0.5).collect();
        assert_eq!(there_and_back(BlockType::Q8_0, &grid), grid);
    }
}
