//! ggml blocks against the `gguf` package, bit for bit.

use cashtag_llama::ggml::BlockType;

use crate::{golden, text};

fn unhex(hex: &str) -> Vec<u8> {
    (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap()).collect()
}

#[test]
fn every_type_bit_for_bit() {
    let golden = golden("dequantize.json");
    let ids = [0, 1, 30, 2, 3, 6, 7, 8, 12, 13, 14];
    assert_eq!(golden.as_object().unwrap().len(), ids.len());
    for block_type in ids.map(|id| BlockType::from_id(id).unwrap()) {
        let case = &golden[block_type.name()];
        let bytes = unhex(text(&case["bytes"]));
        let expected: Vec<f32> = unhex(text(&case["values"]))
            .chunks_exact(4)
            .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
            .collect();
        let mut found = vec![f32::NAN; expected.len()];
        block_type.dequantize(&bytes, &mut found);
        for (at, (found, expected)) in found.iter().zip(&expected).enumerate() {
            assert_eq!(found.to_bits(), expected.to_bits(), "{} element {at}: {found} {expected}", block_type.name());
        }
    }
}
