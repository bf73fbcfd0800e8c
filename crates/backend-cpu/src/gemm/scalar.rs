//! The scalar twin of `avx512.rs`: the same tile, in plain Rust, for tests and for processors without AVX512-BF16.

use super::{NR, Tile, TileOut};
use crate::simd::{Bf16, Element};

/// # Safety
/// The pointers of `t` cover its geometry (see [`Tile`]).
pub(super) unsafe fn tile(t: &Tile) {
    for i in 0..t.rows {
        let mut acc = [0f32; NR];
        for kk in 0..t.k_words {
            // SAFETY: kk < k_words words of every row of A and NR words of B per kk are readable by contract.
            unsafe {
                let a = t.a.add(i * t.a_row_stride + kk * t.a_k_stride).read_unaligned();
                for (j, acc) in acc.iter_mut().enumerate() {
                    let b = t.b.add(kk * NR + j).read_unaligned();
                    *acc += low(a) * low(b) + high(a) * high(b);
                }
            }
        }
        for (j, &sum) in acc.iter().enumerate().take(t.cols) {
            let at = i * t.c_stride + j;
            let y = sum * t.alpha;
            // SAFETY: element (i, j) of C is inside the tile by contract.
            unsafe {
                match t.c {
                    TileOut::F32(c) => {
                        let c = c.add(at);
                        *c = if t.accumulate { *c + y } else { y };
                    }
                    TileOut::Bf16(c) => {
                        let c = c.add(at);
                        *c = Bf16::from_f32(if t.accumulate { (*c).to_f32() + y } else { y });
                    }
                }
            }
        }
    }
}

fn low(word: u32) -> f32 {
    f32::from_bits(word << 16)
}

fn high(word: u32) -> f32 {
    f32::from_bits(word & 0xffff_0000)
}
