//! Attention: layouts on the device, and which kernels a call runs.
//!
//! A layout is turned into lists of work once and kept, since all layers of a batch share it:
//!
//! ```text
//! tiles   up to 64 query rows of one segment with the spans of their keys       forward, dq
//! items   up to 64 keys with the query rows that see them                       dk, dv (packed layouts only)
//! ```
//!
//! Keys of the shared prefix are seen by every row of the batch. Their rows are cut into parts, each with a slot for partial sums, which
//! a last kernel adds up in order: no atomics, the same bits every time.

use std::sync::{Arc, Mutex, PoisonError};

use cashtag_backend::{AttentionLayout, Dtype, Result, Segment};

use crate::Core;
use crate::driver::{Argument, Launch};
use crate::kernels::{Family, Variant};
use crate::memory::{Block, CudaBuffer, View};
use crate::rows::f32s;

/// Rows of a tile and keys of an item; BQ in the kernels.
const TILE: usize = 64;
/// Queries (or keys) that pass through shared memory at a time; BK in the kernels.
const STEP: usize = 32;
/// Query rows of one part of the prefix's backward.
const PART_ROWS: usize = 512;
/// Threads of a block.
const THREADS: u32 = 128;
/// Layouts kept: a training batch has one, a service a few.
const KEPT: usize = 16;

/// `View` of the kernels.
#[derive(Clone, Copy)]
#[repr(C)]
struct Strided {
    ptr: u64,
    stride: i64,
}
impl Argument for Strided {}

impl From<View> for Strided {
    fn from(v: View) -> Self {
        Self { ptr: v.ptr, stride: v.stride as i64 }
    }
}

/// The lists of a layout, as offsets (in words) into one buffer.
struct DeviceLayout {
    words: Block,
    tiles: u32,
    backward: Option<Backward>,
}

struct Backward {
    /// Items with the prefix cut into parts, and how many.
    items: (usize, u32),
    /// Items with whole rows, for the kernels without partial sums.
    whole_items: (usize, u32),
    visible: usize,
    prefix: usize,
    parts: u32,
}

impl Backward {
    fn key_tiles(&self) -> u32 {
        self.prefix.div_ceil(TILE) as u32
    }
}

/// Device copies of the layouts seen last.
#[derive(Default)]
pub(crate) struct Layouts {
    kept: Mutex<Vec<(AttentionLayout, Arc<DeviceLayout>)>>,
}

const TILE_WORDS: usize = 8;
const ITEM_WORDS: usize = 6;
const NO_SLOT: u32 = u32::MAX;

fn tiles(layout: &AttentionLayout) -> Vec<[u32; TILE_WORDS]> {
    let mut tiles = Vec::new();
    for &Segment { q_start, len, kv_start, context: [c0, c1] } in layout.segments() {
        for first in (0..len).step_by(TILE) {
            let rows = TILE.min(len - first);
            tiles.push([q_start + first, rows, c0.start, c0.len, c1.start, c1.len, kv_start, first].map(|x| x as u32));
        }
    }
    // The tiles with the most keys first: no long one is left for the end.
    tiles.sort_by_key(|t| std::cmp::Reverse(t[3] + t[5] + t[7] + t[1]));
    tiles
}

/// Items of a packed layout whose prefix is seen in `parts` parts of `part_rows` rows.
fn items(layout: &AttentionLayout, prefix: usize, parts: usize, part_rows: usize) -> Vec<[u32; ITEM_WORDS]> {
    let n = layout.q_rows();
    let mut items = Vec::new();
    for key in (0..prefix).step_by(TILE) {
        for part in 0..parts {
            let slot = if parts == 1 { NO_SLOT } else { (items.len()) as u32 };
            let (begin, end) = (part * part_rows, ((part + 1) * part_rows).min(n));
            items.push([key as u32, TILE.min(prefix - key) as u32, begin as u32, end as u32, 0, slot]);
        }
    }
    let first = usize::from(prefix > 0);
    for s in &layout.segments()[first..] {
        for start in (0..s.len).step_by(TILE) {
            let row = s.q_start + start;
            items.push([row, TILE.min(s.len - start), row, s.q_start + s.len, 1, NO_SLOT as usize].map(|x| x as u32));
        }
    }
    items.sort_by_key(|i| std::cmp::Reverse(i[3] - i[2]));
    items
}

/// How many keys of the prefix each row sees.
fn visible(layout: &AttentionLayout, prefix: usize) -> Vec<u32> {
    let first = usize::from(prefix > 0);
    let own = (0..prefix).map(|i| i as u32 + 1);
    own.chain(layout.segments()[first..].iter().flat_map(|s| std::iter::repeat_n(s.context[0].len as u32, s.len)))
        .collect()
}

struct Heads {
    dim: usize,
    q: u32,
    group: u32,
    scale: f32,
}

impl Heads {
    fn new(dim: usize, q_cols: usize, kv_cols: usize) -> Self {
        assert!(
            dim > 0 && q_cols.is_multiple_of(dim) && kv_cols.is_multiple_of(dim),
            "heads of {dim} in {q_cols} and {kv_cols}"
        );
        let (q, kv) = (q_cols / dim, kv_cols / dim);
        assert!(kv > 0 && q.is_multiple_of(kv), "{q} query heads share {kv} key heads");
        assert!(dim <= 256, "heads of {dim} are wider than the kernels' 256");
        Self { dim, q: q as u32, group: (q / kv) as u32, scale: 1.0 / (dim as f32).sqrt() }
    }

    fn kv(&self) -> u32 {
        self.q / self.group
    }
}

impl Core {
    fn device_layout(&self, layout: &AttentionLayout) -> Result<Arc<DeviceLayout>> {
        let mut kept = self.layouts.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(i) = kept.iter().rposition(|(l, _)| l == layout) {
            // The most recent last, so that a batch's layout is not pushed out by its own layers.
            let entry = kept.remove(i);
            let found = Arc::clone(&entry.1);
            kept.push(entry);
            return Ok(found);
        }
        let tiles = tiles(layout);
        let mut words: Vec<u32> = tiles.as_flattened().to_vec();
        let backward = layout.packed_prefix().map(|prefix| {
            let parts = if prefix == 0 { 0 } else { layout.q_rows().div_ceil(PART_ROWS) };
            let mut append = |list: &[u32]| {
                let at = words.len();
                words.extend_from_slice(list);
                at
            };
            let cut = items(layout, prefix, parts, PART_ROWS);
            let whole = items(layout, prefix, parts.min(1), layout.q_rows());
            Backward {
                items: (append(cut.as_flattened()), cut.len() as u32),
                whole_items: (append(whole.as_flattened()), whole.len() as u32),
                visible: append(&visible(layout, prefix)),
                prefix,
                parts: parts as u32,
            }
        });
        let block = self.allocator.block(words.len() * 4)?;
        self.transfers.upload(block.ptr(), words.len() * 4, |start, part| {
            for (bytes, word) in part.chunks_exact_mut(4).zip(&words[start / 4..]) {
                bytes.copy_from_slice(&word.to_le_bytes());
            }
        })?;
        let made = Arc::new(DeviceLayout { words: block, tiles: tiles.len() as u32, backward });
        if kept.len() >= KEPT {
            kept.remove(0);
        }
        kept.push((layout.clone(), Arc::clone(&made)));
        Ok(made)
    }

    /// Whether the matrix instructions can be used: dtype, head dimension, 16-byte rows, shared memory, and bf16 only from sm_80 on.
    fn by_matrices(&self, heads: &Heads, views: &[View], shared: u32) -> bool {
        let dtype = match self.compute {
            Dtype::F16 => true,
            Dtype::Bf16 => self.device.facts.sm >= 80,
            _ => false,
        };
        dtype
            && matches!(heads.dim, 64 | 128)
            && views.iter().all(View::wide)
            && shared <= self.device.facts.shared_memory
    }

    fn attention_launch(&self, heads: &Heads, matrices: bool, names: [&'static str; 2]) -> Result<Launch<'_>> {
        let family = if matrices { Family::Attention } else { Family::AttentionAny };
        let head_dim = matrices.then_some(heads.dim as u32);
        let variant = Variant { head_dim, ..Variant::of(family, self.compute) };
        Ok(Launch::new(&self.device, self.kernels.get(variant, names[usize::from(!matrices)])?))
    }

    /// Bytes of `rows` shared rows and of the stages behind them.
    fn shared_bytes(&self, heads: &Heads, rows: usize, scalars: usize) -> u32 {
        let stages = if self.device.facts.sm >= 80 { 2 } else { 1 };
        (rows * heads.dim * 2 + stages * (2 * STEP * heads.dim * 2 + scalars * STEP * 4)) as u32
    }

    pub(crate) fn attention(
        &self,
        layout: &AttentionLayout,
        head_dim: usize,
        [q, k, v, o]: [View; 4],
        lse: &CudaBuffer,
    ) -> Result<()> {
        let heads = Heads::new(head_dim, q.cols, k.cols);
        assert_eq!(
            (q.rows, o.rows, o.cols, v.cols),
            (layout.q_rows(), q.rows, q.cols, k.cols),
            "attention: shapes do not fit"
        );
        assert!(k.rows >= layout.kv_rows() && v.rows >= layout.kv_rows(), "the layout reads {} keys", layout.kv_rows());
        assert!([q, k, v, o].iter().all(|x| x.dtype == self.compute), "attention computes in {}", self.compute.name());
        let lse = f32s(lse, q.rows * heads.q as usize, "lse");
        let on_device = self.device_layout(layout)?;
        let shared = self.shared_bytes(&heads, TILE, 0);
        let matrices = self.by_matrices(&heads, &[q, k, v, o], shared);
        let mut launch = self
            .attention_launch(&heads, matrices, ["attention_forward", "attention_any_forward"])?
            .arg(on_device.words.ptr())
            .arg(Strided::from(q))
            .arg(Strided::from(k))
            .arg(Strided::from(v))
            .arg(Strided::from(o))
            .arg(lse)
            .arg(heads.q)
            .arg(heads.group);
        if !matrices {
            launch = launch.arg(head_dim as u32);
        }
        let launch = launch.arg(heads.scale);
        // SAFETY: the layout's rows lie inside the views (asserted), and the views inside their buffers.
        unsafe { launch.go((on_device.tiles, heads.q, 1), THREADS, if matrices { shared } else { 0 }) }
    }

    #[allow(clippy::too_many_arguments)]
    pub(crate) fn attention_backward(
        &self,
        layout: &AttentionLayout,
        head_dim: usize,
        kv_heads: usize,
        qkv: View,
        o: View,
        lse: &CudaBuffer,
        d_o: View,
        dqkv: View,
    ) -> Result<()> {
        let heads = Heads::new(head_dim, o.cols, kv_heads * head_dim);
        let kv_cols = kv_heads * head_dim;
        let n = layout.q_rows();
        assert_eq!((qkv.rows, qkv.cols), (n, o.cols + 2 * kv_cols), "attention_backward: qkv does not fit");
        assert_eq!((dqkv.rows, dqkv.cols), (n, qkv.cols), "attention_backward: dqkv does not fit");
        assert_eq!((o.rows, d_o.rows, d_o.cols), (n, n, o.cols), "attention_backward: o and d_o do not fit");
        let all = [qkv, o, d_o, dqkv];
        assert!(all.iter().all(|x| x.dtype == self.compute), "attention computes in {}", self.compute.name());
        let lse = f32s(lse, n * heads.q as usize, "lse");
        let on_device = self.device_layout(layout)?;
        let backward = on_device.backward.as_ref().expect("only packed layouts have a backward");
        let split = |x: View| {
            [x.columns(0, o.cols), x.columns(o.cols, kv_cols), x.columns(o.cols + kv_cols, kv_cols)].map(Strided::from)
        };
        let ([q, k, v], [dq, dk, dv]) = (split(qkv), split(dqkv));
        let (o, d_o) = (Strided::from(o), Strided::from(d_o));
        let shared_q = self.shared_bytes(&heads, 2 * TILE, 0);
        let shared_kv = self.shared_bytes(&heads, 2 * TILE, 3);
        let matrices = self.by_matrices(&heads, &all, shared_q.max(shared_kv));
        let words = on_device.words.ptr();
        let at = |offset: usize| words + offset as u64 * 4;
        let slots = if matrices && backward.parts > 1 { backward.key_tiles() * backward.parts } else { 0 };
        let delta_bytes = (n * heads.q as usize * 4).next_multiple_of(256);
        let partial_bytes = slots as usize * kv_heads * 2 * TILE * head_dim * 4;
        self.partials.with(&self.allocator, delta_bytes + partial_bytes, |delta| {
            let partials = delta + delta_bytes as u64;

            let mut first = self
                .attention_launch(&heads, matrices, ["attention_backward_q", "attention_any_backward_q"])?
                .arg(words)
                .arg(q)
                .arg(k)
                .arg(v)
                .arg(o)
                .arg(d_o)
                .arg(dq)
                .arg(lse)
                .arg(delta)
                .arg(heads.q)
                .arg(heads.group);
            let (items, count) = if matrices { backward.items } else { backward.whole_items };
            let mut second = self
                .attention_launch(&heads, matrices, ["attention_backward_kv", "attention_any_backward_kv"])?
                .arg(at(items))
                .arg(q)
                .arg(k)
                .arg(v)
                .arg(d_o)
                .arg(dk)
                .arg(dv)
                .arg(lse)
                .arg(delta)
                .arg(at(backward.visible))
                .arg(heads.q)
                .arg(heads.group);
            if !matrices {
                first = first.arg(head_dim as u32);
                second = second.arg(head_dim as u32);
            }
            let first = first.arg(heads.scale);
            let mut second = second.arg(heads.scale);
            if matrices {
                second = second.arg(partials);
            }
            // SAFETY: the layout's rows lie inside the views (asserted), and the views inside their buffers; the scratch block has a place for
            // every row's D and every slot.
            unsafe {
                first.go((on_device.tiles, heads.q, 1), THREADS, if matrices { shared_q } else { 0 })?;
                second.go((count, heads.kv(), 1), THREADS, if matrices { shared_kv } else { 0 })?;
                if slots > 0 {
                    let reduce = self
                        .attention_launch(&heads, true, ["attention_reduce", ""])?
                        .arg(partials)
                        .arg(backward.parts)
                        .arg(backward.prefix as u32)
                        .arg(dk)
                        .arg(dv);
                    reduce.go((backward.key_tiles(), heads.kv(), (2 * TILE * head_dim / 1024) as u32), 256, 0)?;
                }
            }
            Ok(())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_cover_every_row_once_and_items_every_key() {
        let layout = AttentionLayout::packed(70, &[70, 3], &[130, 1]);
        let mut rows = vec![0; layout.q_rows()];
        for t in tiles(&layout) {
            (t[0]..t[0] + t[1]).for_each(|r| rows[r as usize] += 1);
        }
        assert!(rows.iter().all(|&n| n == 1));
        let cut = items(&layout, 70, 2, 128);
        // Prefix keys: two tiles in two parts; 130 own keys: three tiles; one more.
        assert_eq!(cut.len(), 2 * 2 + 3 + 1);
        let mut slots: Vec<u32> = cut.iter().map(|i| i[5]).filter(|&s| s != NO_SLOT).collect();
        slots.sort();
        assert_eq!(slots, [0, 1, 2, 3]);
        assert!(cut.contains(&[64, 6, 128, 201, 0, 3]));
        assert!(cut.contains(&[70 + 128, 2, 70 + 128, 200, 1, NO_SLOT]));
        let seen = visible(&layout, 70);
        assert_eq!((seen.len(), seen[0], seen[69], seen[70], seen[200]), (201, 1, 70, 70, 3));
    }
}
