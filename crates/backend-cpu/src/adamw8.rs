//! AdamW with block-wise 8-bit moments: the arithmetic of bitsandbytes' `adamw_8bit`.

use cashtag_backend::dynamic_map::{SIGNED, UNSIGNED, nearest};
use cashtag_backend::{AdamW, BLOCK_8BIT, Moments8};
use rayon::prelude::*;

use crate::buffer::{CpuBuffer, Data};
use crate::simd::Element;

/// The moments as slices.
pub(crate) struct States<'a> {
    table: &'a [u32],
    m: &'a mut [u8],
    v: &'a mut [u8],
    absmax: (&'a mut [f32], &'a mut [f32]),
    m32: &'a mut [f32],
    v32: &'a mut [f32],
}

fn bytes(buffer: &mut CpuBuffer) -> &mut [u8] {
    match &mut buffer.data {
        Data::U32(words) => bytemuck::cast_slice_mut(words),
        _ => panic!("codes stand in uint32"),
    }
}

impl<'a> States<'a> {
    pub(crate) fn new(moments: Moments8<'a, CpuBuffer>, len: usize) -> Self {
        let Moments8 { table, blocks, m, v, absmax, m32, v32 } = moments;
        let (absmax_m, absmax_v) = absmax.f32s_mut()[..2 * blocks].split_at_mut(blocks);
        Self {
            table: &table.u32s()[..3 * blocks],
            m: &mut bytes(m)[..len],
            v: &mut bytes(v)[..len],
            absmax: (absmax_m, absmax_v),
            m32: m32.f32s_mut(),
            v32: v32.f32s_mut(),
        }
    }
}

/// What one block works on.
struct Block<'a, T> {
    p: &'a mut [f32],
    g: &'a [f32],
    c: &'a mut [T],
    moments: Moments<'a>,
}

enum Moments<'a> {
    Codes { m: &'a mut [u8], v: &'a mut [u8], absmax: (&'a mut f32, &'a mut f32) },
    Wide { m: &'a mut [f32], v: &'a mut [f32] },
}

/// The first `n` elements of a slice that is used up from the front.
fn take<'a, T>(slice: &mut &'a mut [T], n: usize) -> &'a mut [T] {
    let (head, tail) = std::mem::take(slice).split_at_mut(n);
    *slice = tail;
    head
}

pub(crate) fn step<T: Element>(h: AdamW, mut p: &mut [f32], mut g: &[f32], states: States<'_>, mut c: &mut [T]) {
    assert!(g.len() == p.len() && c.len() == p.len(), "lengths differ");
    let States { table, mut m, mut v, absmax, mut m32, mut v32 } = states;
    let mut blocks = Vec::with_capacity(table.len() / 3);
    let (mut first, mut wide) = (0, 0);
    for ((entry, absmax_m), absmax_v) in table.chunks_exact(3).zip(absmax.0).zip(absmax.1) {
        let len = entry[1] as usize;
        assert!(entry[0] as usize == first && len <= BLOCK_8BIT, "block {entry:?} does not follow {first}");
        first += len;
        let (head, tail) = g.split_at(len);
        g = tail;
        let (codes_m, codes_v) = (take(&mut m, len), take(&mut v, len));
        let moments = if entry[2] == u32::MAX {
            Moments::Codes { m: codes_m, v: codes_v, absmax: (absmax_m, absmax_v) }
        } else {
            assert_eq!(entry[2] as usize, wide, "f32 moments stand in the order of the blocks");
            wide += len;
            Moments::Wide { m: take(&mut m32, len), v: take(&mut v32, len) }
        };
        blocks.push(Block { p: take(&mut p, len), g: head, c: take(&mut c, len), moments });
    }
    assert!(p.is_empty(), "the blocks cover {first} elements, {} are left", p.len());
    blocks.into_par_iter().with_min_len(64).for_each(|block| step_block(h, block));
}

fn step_block<T: Element>(h: AdamW, block: Block<'_, T>) {
    let Block { p, g, c, moments } = block;
    let decay = 1.0 - h.learning_rate * h.weight_decay;
    let step = h.learning_rate / (1.0 - h.beta1.powi(h.step as i32));
    let root = 1.0 / (1.0 - h.beta2.powi(h.step as i32)).sqrt();
    let update = |m: &mut f32, v: &mut f32, g: f32| -> f32 {
        let g = g * h.gradient_scale;
        *m = h.beta1 * *m + (1.0 - h.beta1) * g;
        *v = h.beta2 * *v + (1.0 - h.beta2) * g * g;
        step * *m / (v.sqrt() * root + h.epsilon)
    };
    match moments {
        Moments::Wide { m, v } => {
            for ((((p, g), m), v), c) in p.iter_mut().zip(g).zip(m).zip(v).zip(c) {
                let u = update(m, v, *g);
                *p = *p * decay - u;
                *c = T::from_f32(*p);
            }
        }
        Moments::Codes { m, v, absmax } => {
            let (mut wide_m, mut wide_v) = ([0f32; BLOCK_8BIT], [0f32; BLOCK_8BIT]);
            let (mut top_m, mut top_v) = (0f32, 0f32);
            for i in 0..p.len() {
                let (a, b) = (&mut wide_m[i], &mut wide_v[i]);
                *a = SIGNED[usize::from(m[i])] * *absmax.0;
                *b = UNSIGNED[usize::from(v[i])] * *absmax.1;
                let u = update(a, b, g[i]);
                p[i] = p[i] * decay - u;
                c[i] = T::from_f32(p[i]);
                top_m = top_m.max(a.abs());
                top_v = top_v.max(*b);
            }
            for i in 0..p.len() {
                let a = wide_m[i];
                let mut code = nearest(&SIGNED, if top_m > 0.0 { a / top_m } else { 0.0 });
                // What is small against its block must not change its direction by rounding.
                if a > 0.0 && SIGNED[usize::from(code)] < 0.0 {
                    code += 1;
                } else if a < 0.0 && SIGNED[usize::from(code)] >= 0.0 {
                    code -= 1;
                }
                m[i] = code;
                v[i] = nearest(&UNSIGNED, if top_v > 0.0 { wide_v[i] / top_v } else { 0.0 });
            }
            (*absmax.0, *absmax.1) = (top_m, top_v);
        }
    }
}
