//! Softmax attention over a packed batch, forward and backward.
//!
//! Work is cut into tasks of (key/value head, tile); a tile is a run of query rows whose segments share the start of their
//! first context span, so the shared prefix is multiplied once for many examples:
//!
//! ```text
//!                 context 0 (shared prefix)   context 1      own keys
//!   segment 1  ┌──────────────────────────┐ ┌───────────┐ ┌──────◣
//!   segment 2  │   one product per tile   │ │ a product per segment │
//!   segment 3  └──────────────────────────┘ └───────────┘ └──────◣
//! ```
//!
//! Scores, softmax and all accumulations are f32; probabilities are rounded to the compute dtype before they are multiplied.
//! Gradients of the prefix are summed over tasks in a fixed order, so the result does not depend on the threads.

use cashtag_backend::{AttentionLayout, Segment, Span};
use rayon::prelude::*;

use crate::buffer::{View, ViewMut};
use crate::gemm::{AWords, COut, Panels, TileOut, gemm, interleave_rows, pack_nn, pack_nt};
use crate::linear::{Form, matmul_f32};
use crate::rows::convert;
use crate::simd::{Bf16, Element, exp, lane_sum, simd};

/// Query rows of one tile: the score matrix of a tile stays in the second-level cache.
const TILE_ROWS: usize = 128;

/// Small single-threaded products with a packed right operand, in either precision. Results are f32.
pub(crate) trait Small: Element {
    type Packed: Default + Send + Sync;
    /// The right operand is `src`ᵀ.
    fn pack_nt(src: View<'_, Self>, out: &mut Self::Packed);
    /// The right operand is `src`.
    fn pack_nn(src: View<'_, Self>, out: &mut Self::Packed);
    /// `c ← a·b (+ c)`. `a.cols` may be odd only if `a.stride` leaves room for one more finite element.
    fn mul(a: View<'_, Self>, b: &Self::Packed, accumulate: bool, c: ViewMut<'_, f32>);
    /// `c ← aᵀ·b (+ c)`.
    fn mul_t(a: View<'_, Self>, b: &Self::Packed, words: &mut Vec<u32>, accumulate: bool, c: ViewMut<'_, f32>);
}

impl Small for Bf16 {
    type Packed = Panels;

    fn pack_nt(src: View<'_, Self>, out: &mut Panels) {
        pack_nt(src.data, src.stride, src.rows, src.cols, out, false);
    }

    fn pack_nn(src: View<'_, Self>, out: &mut Panels) {
        pack_nn(src.data, src.stride, src.rows, src.cols, out, false);
    }

    fn mul(a: View<'_, Self>, b: &Panels, accumulate: bool, c: ViewMut<'_, f32>) {
        assert!(a.stride.is_multiple_of(2) && c.rows == a.rows && c.cols == b.n && a.cols == b.k);
        assert!(a.rows == 0 || (a.rows - 1) * a.stride + a.cols.next_multiple_of(2) <= a.data.len());
        let k_words = a.cols.div_ceil(2);
        let a = AWords { ptr: a.data.as_ptr().cast(), row_stride: a.stride / 2, k_stride: 1, rows: a.rows, k_words };
        let out = COut { out: TileOut::F32(c.data.as_mut_ptr()), stride: c.stride };
        // SAFETY: a covers its rows up to the last whole word (asserted), c is borrowed mutably and has the right shape.
        unsafe { gemm(1.0, a, b, accumulate, out, false) }
    }

    fn mul_t(a: View<'_, Self>, b: &Panels, words: &mut Vec<u32>, accumulate: bool, c: ViewMut<'_, f32>) {
        assert!(c.rows == a.cols && c.cols == b.n && a.rows == b.k);
        interleave_rows(a.data, a.stride, a.rows, a.cols, words, false);
        let k_words = a.rows.div_ceil(2);
        let a = AWords { ptr: words.as_ptr(), row_stride: 1, k_stride: a.cols, rows: a.cols, k_words };
        let out = COut { out: TileOut::F32(c.data.as_mut_ptr()), stride: c.stride };
        // SAFETY: the words were just made with this geometry, c is borrowed mutably and has the right shape.
        unsafe { gemm(1.0, a, b, accumulate, out, false) }
    }
}

/// Row-major copy of a right operand.
#[derive(Default)]
pub(crate) struct Plain {
    data: Vec<f32>,
    rows: usize,
    cols: usize,
    transposed: bool,
}

impl Plain {
    fn set(&mut self, src: View<'_, f32>, transposed: bool) {
        self.data.clear();
        (0..src.rows).for_each(|i| self.data.extend_from_slice(src.row(i)));
        (self.rows, self.cols, self.transposed) = (src.rows, src.cols, transposed);
    }

    fn view(&self) -> View<'_, f32> {
        View { data: &self.data, rows: self.rows, cols: self.cols, stride: self.cols }
    }
}

impl Small for f32 {
    type Packed = Plain;

    fn pack_nt(src: View<'_, Self>, out: &mut Plain) {
        out.set(src, true);
    }

    fn pack_nn(src: View<'_, Self>, out: &mut Plain) {
        out.set(src, false);
    }

    fn mul(a: View<'_, Self>, b: &Plain, accumulate: bool, c: ViewMut<'_, f32>) {
        matmul_f32(if b.transposed { Form::Nt } else { Form::Nn }, 1.0, a, b.view(), accumulate, c, false);
    }

    fn mul_t(a: View<'_, Self>, b: &Plain, _: &mut Vec<u32>, accumulate: bool, c: ViewMut<'_, f32>) {
        matmul_f32(Form::Tn, 1.0, a, b.view(), accumulate, c, false);
    }
}

/// Rows of one segment inside a tile.
#[derive(Clone, Copy)]
struct Piece {
    segment: Segment,
    /// First row of the segment that belongs to this piece.
    first: usize,
    len: usize,
}

impl Piece {
    /// Own keys that the last row of the piece may see.
    fn own(&self) -> usize {
        self.first + self.len
    }

    fn q_row(&self) -> usize {
        self.segment.q_start + self.first
    }
}

struct Tile {
    pieces: Vec<Piece>,
    /// Longest first context span of the pieces.
    shared: Span,
    q_start: usize,
    rows: usize,
}

/// Cuts the layout into tiles. With `whole`, a segment is never cut: its own keys then belong to one tile.
fn tiles(layout: &AttentionLayout, whole: bool) -> Vec<Tile> {
    let mut tiles: Vec<Tile> = Vec::new();
    for &segment in layout.segments() {
        let mut first = 0;
        while first < segment.len {
            let len = if whole { segment.len } else { (segment.len - first).min(TILE_ROWS) };
            let piece = Piece { segment, first, len };
            let context = segment.context[0];
            match tiles.last_mut() {
                Some(t)
                    if t.rows + len <= TILE_ROWS
                        && (t.shared.len > 0) == (context.len > 0)
                        && (context.len == 0 || t.shared.start == context.start) =>
                {
                    t.shared.len = t.shared.len.max(context.len);
                    t.rows += len;
                    t.pieces.push(piece);
                }
                _ => tiles.push(Tile { pieces: vec![piece], shared: context, q_start: piece.q_row(), rows: len }),
            }
            first += len;
        }
    }
    tiles
}

/// Makes room for `len` elements. What is there stays: everything that is read is written before, and clearing costs time.
fn grow<T: Clone + Default>(buffer: &mut Vec<T>, len: usize) {
    if buffer.len() < len {
        buffer.resize(len, T::default());
    }
}

/// Copies a head's rows so that a task reads them densely, whatever the stride of the batch.
fn copy_head<S: Element, T: Element>(
    src: View<'_, S>,
    start: usize,
    rows: usize,
    head: usize,
    dim: usize,
    out: &mut Vec<T>,
) {
    grow(out, rows * dim);
    for (i, out) in out.chunks_exact_mut(dim).take(rows).enumerate() {
        convert(&src.row(start + i)[head * dim..(head + 1) * dim], out);
    }
}

simd! {
    /// exp(scale·s - shift) into `p`; returns the sum of what was rounded.
    fn exp_row<T: Element>(s: &[f32], scale: f32, shift: f32, p: &mut [T]) -> f32 {
        for (p, s) in p.iter_mut().zip(s) {
            *p = T::from_f32(exp(scale * s - shift));
        }
        lane_sum(|i| p[i].to_f32(), p.len())
    }
}

simd! {
    fn max_row(s: &[f32]) -> f32 {
        let mut lanes = [f32::NEG_INFINITY; 16];
        let chunks = s.chunks_exact(16);
        let mut max = chunks.remainder().iter().fold(f32::NEG_INFINITY, |a, &b| a.max(b));
        for c in chunks {
            for (lane, &v) in lanes.iter_mut().zip(c) {
                *lane = if v > *lane { v } else { *lane };
            }
        }
        for lane in lanes {
            max = max.max(lane);
        }
        max
    }
}

simd! {
    /// P = exp(scale·S - lse) and dS = scale·P∘(dP - D), both rounded for the products that follow.
    fn d_score_row<T: Element>(s: &[f32], dp: &[f32], scale: f32, lse: f32, d: f32, p: &mut [T], ds: &mut [T]) {
        for (((s, dp), p), ds) in s.iter().zip(dp).zip(p).zip(ds) {
            let x = exp(scale * s - lse);
            *p = T::from_f32(x);
            *ds = T::from_f32(scale * x * (dp - d));
        }
    }
}

simd! {
    fn dot<T: Element>(a: &[T], b: &[T]) -> f32 {
        lane_sum(|i| a[i].to_f32() * b[i].to_f32(), a.len())
    }
}

/// Shared mutable rows that tasks write disjoint parts of.
struct Shared<T>(*mut T, usize);
// SAFETY: each task writes its own rows and head columns only; see the calls.
unsafe impl<T: Send> Sync for Shared<T> {}

impl<T> Shared<T> {
    /// # Safety
    /// No other task holds a part that overlaps `start .. start + len`.
    #[allow(clippy::mut_from_ref)]
    unsafe fn part(&self, start: usize, len: usize) -> &mut [T] {
        assert!(start + len <= self.1);
        // SAFETY: inside the allocation (asserted), disjoint by the caller's contract.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(start), len) }
    }
}

pub(crate) struct Heads {
    pub(crate) dim: usize,
    pub(crate) q: usize,
    pub(crate) kv: usize,
}

/// See [`cashtag_backend::Backend::attention`].
pub(crate) fn forward<S: Element, T: Small>(
    layout: &AttentionLayout,
    heads: Heads,
    q: View<'_, S>,
    k: View<'_, T>,
    v: View<'_, T>,
    o: ViewMut<'_, T>,
    lse: &mut [f32],
) {
    let Heads { dim, q: q_heads, kv: kv_heads } = heads;
    let group = q_heads / kv_heads;
    assert_eq!((q.rows, q.cols, o.rows, o.cols), (layout.q_rows(), q_heads * dim, q.rows, q.cols));
    assert!(k.rows >= layout.kv_rows() && v.rows >= layout.kv_rows() && k.cols == kv_heads * dim && v.cols == k.cols);
    assert!(lse.len() >= q.rows * q_heads);
    let scale = 1.0 / (dim as f32).sqrt();
    let tiles = tiles(layout, false);
    // The packed prefix of each head is shared by consecutive tiles; a distinct one per context start.
    let mut starts: Vec<Span> = Vec::new();
    for t in &tiles {
        match starts.iter_mut().find(|s| s.start == t.shared.start) {
            _ if t.shared.len == 0 => {}
            Some(s) => s.len = s.len.max(t.shared.len),
            None => starts.push(t.shared),
        }
    }
    let prefixes: Vec<(T::Packed, T::Packed)> = (0..kv_heads * starts.len())
        .into_par_iter()
        .map(|i| {
            let (head, span) = (i % kv_heads, starts[i / kv_heads]);
            let mut packed: (T::Packed, T::Packed) = Default::default();
            T::pack_nt(k.part(span.start, span.len, head * dim, dim), &mut packed.0);
            T::pack_nn(v.part(span.start, span.len, head * dim, dim), &mut packed.1);
            packed
        })
        .collect();
    let (o_stride, o_len) = (o.stride, o.data.len());
    let o_out = Shared(o.data.as_mut_ptr(), o_len);
    let lse_out = Shared(lse.as_mut_ptr(), lse.len());
    (0..tiles.len() * kv_heads).into_par_iter().with_max_len(1).for_each_init(Forward::<T>::default, |w, task| {
        let (tile, kv_head) = (&tiles[task / kv_heads], task % kv_heads);
        let prefix = starts.iter().position(|s| tile.shared.len > 0 && s.start == tile.shared.start);
        let prefix = prefix.map(|i| (&prefixes[i * kv_heads + kv_head], starts[i].len));
        let p = prefix.map_or(0, |(_, len)| len);
        w.pack_pieces(tile, k, v, kv_head, dim);
        // Columns of a row: the prefix, then context 1 and own keys of its piece; each region starts at an even column.
        let p_even = p.next_multiple_of(2);
        let widest = tile.pieces.iter().map(|x| x.segment.context[1].len.next_multiple_of(2) + x.own()).max();
        let width = (p_even + widest.unwrap_or(0)).next_multiple_of(2) + 2;
        grow(&mut w.scores, tile.rows * width);
        grow(&mut w.probabilities, tile.rows * width);
        for head in kv_head * group..(kv_head + 1) * group {
            copy_head(q, tile.q_start, tile.rows, head, dim, &mut w.q);
            let q = View { data: &w.q, rows: tile.rows, cols: dim, stride: dim };
            let region = |rows: usize, cols: usize| (rows, cols, width);
            if let Some(((kp, _), len)) = prefix {
                let (rows, cols, stride) = region(tile.rows, len);
                T::mul(q, kp, false, ViewMut { data: &mut w.scores, rows, cols, stride });
            }
            let mut row = 0;
            for (piece, packed) in tile.pieces.iter().zip(&w.packed) {
                let q = q.part(row, piece.len, 0, dim);
                let c1 = piece.segment.context[1].len;
                let mut at = row * width + p_even;
                if c1 > 0 {
                    let data = &mut w.scores[at..];
                    T::mul(q, &packed.context_k, false, ViewMut { data, rows: piece.len, cols: c1, stride: width });
                }
                at += c1.next_multiple_of(2);
                let data = &mut w.scores[at..];
                T::mul(q, &packed.k, false, ViewMut { data, rows: piece.len, cols: piece.own(), stride: width });
                row += piece.len;
            }
            // Softmax by rows; everything that a row may not see becomes a zero probability.
            let mut row = 0;
            for piece in &tile.pieces {
                let c0 = piece.segment.context[0].len;
                let c1 = piece.segment.context[1].len;
                let own_at = p_even + c1.next_multiple_of(2);
                for t in 0..piece.len {
                    let own = piece.first + t + 1;
                    let s = &w.scores[row * width..(row + 1) * width];
                    let probabilities = &mut w.probabilities[row * width..(row + 1) * width];
                    let spans = [(0, c0), (p_even, c1), (own_at, own)];
                    let max = spans.iter().fold(f32::NEG_INFINITY, |m, &(a, n)| m.max(max_row(&s[a..a + n]))) * scale;
                    let mut sum = 0.0;
                    let mut filled = 0;
                    for (a, n) in spans {
                        probabilities[filled..a].fill(T::default());
                        sum += exp_row(&s[a..a + n], scale, max, &mut probabilities[a..a + n]);
                        filled = a + n;
                    }
                    probabilities[filled..].fill(T::default());
                    w.inverse_sums[row] = 1.0 / sum;
                    // SAFETY: (row, head) belongs to this task alone.
                    unsafe { lse_out.part((tile.q_start + row) * q_heads + head, 1)[0] = max + sum.ln() };
                    row += 1;
                }
            }
            grow(&mut w.out, tile.rows * dim);
            if let Some(((_, vp), len)) = prefix {
                let a = View { data: &w.probabilities[..], rows: tile.rows, cols: len, stride: width };
                T::mul(a, vp, false, ViewMut { data: &mut w.out, rows: tile.rows, cols: dim, stride: dim });
            }
            let mut row = 0;
            for (piece, packed) in tile.pieces.iter().zip(&w.packed) {
                let c1 = piece.segment.context[1].len;
                let mut at = row * width + p_even;
                let mut accumulate = p > 0;
                if c1 > 0 {
                    let a = View { data: &w.probabilities[at..], rows: piece.len, cols: c1, stride: width };
                    let data = &mut w.out[row * dim..];
                    T::mul(a, &packed.context_v, accumulate, ViewMut { data, rows: piece.len, cols: dim, stride: dim });
                    accumulate = true;
                }
                at += c1.next_multiple_of(2);
                let a = View { data: &w.probabilities[at..], rows: piece.len, cols: piece.own(), stride: width };
                let data = &mut w.out[row * dim..];
                T::mul(a, &packed.v, accumulate, ViewMut { data, rows: piece.len, cols: dim, stride: dim });
                row += piece.len;
            }
            for row in 0..tile.rows {
                // SAFETY: (row, head) belongs to this task alone.
                let out = unsafe { o_out.part((tile.q_start + row) * o_stride + head * dim, dim) };
                for (o, x) in out.iter_mut().zip(&w.out[row * dim..]) {
                    *o = T::from_f32(x * w.inverse_sums[row]);
                }
            }
        }
    });
}

#[derive(Default)]
struct PackedPiece<P> {
    context_k: P,
    context_v: P,
    k: P,
    v: P,
}

/// Scratch of a forward task.
struct Forward<T: Small> {
    q: Vec<T>,
    scores: Vec<f32>,
    probabilities: Vec<T>,
    inverse_sums: Vec<f32>,
    out: Vec<f32>,
    packed: Vec<PackedPiece<T::Packed>>,
}

impl<T: Small> Default for Forward<T> {
    fn default() -> Self {
        let inverse_sums = vec![0.0; TILE_ROWS];
        Self { q: vec![], scores: vec![], probabilities: vec![], inverse_sums, out: vec![], packed: vec![] }
    }
}

impl<T: Small> Forward<T> {
    fn pack_pieces(&mut self, tile: &Tile, k: View<'_, T>, v: View<'_, T>, kv_head: usize, dim: usize) {
        if self.packed.len() < tile.pieces.len() {
            self.packed.resize_with(tile.pieces.len(), Default::default);
        }
        for (piece, packed) in tile.pieces.iter().zip(&mut self.packed) {
            let context = piece.segment.context[1];
            if context.len > 0 {
                T::pack_nt(k.part(context.start, context.len, kv_head * dim, dim), &mut packed.context_k);
                T::pack_nn(v.part(context.start, context.len, kv_head * dim, dim), &mut packed.context_v);
            }
            T::pack_nt(k.part(piece.segment.kv_start, piece.own(), kv_head * dim, dim), &mut packed.k);
            T::pack_nn(v.part(piece.segment.kv_start, piece.own(), kv_head * dim, dim), &mut packed.v);
        }
    }
}

/// Scratch of a backward task.
struct Backward<T: Small> {
    q: Vec<T>,
    d_o: Vec<T>,
    d: Vec<f32>,
    scores: Vec<f32>,
    d_probabilities: Vec<f32>,
    probabilities: Vec<T>,
    d_scores: Vec<T>,
    dq: Vec<f32>,
    dk: Vec<f32>,
    dv: Vec<f32>,
    k_nt: T::Packed,
    v_nt: T::Packed,
    k_nn: T::Packed,
    q_nn: T::Packed,
    do_nn: T::Packed,
    words: Vec<u32>,
}

impl<T: Small> Default for Backward<T> {
    fn default() -> Self {
        Self {
            q: vec![],
            d_o: vec![],
            d: vec![],
            scores: vec![],
            d_probabilities: vec![],
            probabilities: vec![],
            d_scores: vec![],
            dq: vec![],
            dk: vec![],
            dv: vec![],
            k_nt: Default::default(),
            v_nt: Default::default(),
            k_nn: Default::default(),
            q_nn: Default::default(),
            do_nn: Default::default(),
            words: vec![],
        }
    }
}

/// The keys and values that one product of the backward sees.
struct Keys<'a, P> {
    k_nt: &'a P,
    v_nt: &'a P,
    k_nn: &'a P,
    count: usize,
}

/// Query rows of one product, and where they stand.
struct Rows<'a> {
    /// Row of the batch of the first query, and number of rows.
    start: usize,
    count: usize,
    head: usize,
    q_heads: usize,
    lse: &'a [f32],
    /// Keys that row i may see.
    visible: &'a dyn Fn(usize) -> usize,
}

impl<T: Small> Backward<T> {
    /// One (queries × keys) block: adds to `dq` (rows × dim), `dk` and `dv` (count × dim). `self.q` and `self.d_o` hold the
    /// queries and output gradients of the rows from `offset` on, `self.d` their D = rowsum(dO∘O).
    fn block(
        &mut self,
        offset: usize,
        rows: &Rows<'_>,
        keys: &Keys<'_, T::Packed>,
        dim: usize,
        dk: &mut [f32],
        dv: &mut [f32],
    ) {
        let n = rows.count;
        let width = keys.count.next_multiple_of(2) + 2;
        let scale = 1.0 / (dim as f32).sqrt();
        grow(&mut self.scores, n * width);
        grow(&mut self.d_probabilities, n * width);
        grow(&mut self.probabilities, n * width);
        grow(&mut self.d_scores, n * width);
        let q = View { data: &self.q[offset * dim..(offset + n) * dim], rows: n, cols: dim, stride: dim };
        let d_o = View { data: &self.d_o[offset * dim..(offset + n) * dim], rows: n, cols: dim, stride: dim };
        T::mul(q, keys.k_nt, false, ViewMut { data: &mut self.scores, rows: n, cols: keys.count, stride: width });
        T::mul(
            d_o,
            keys.v_nt,
            false,
            ViewMut { data: &mut self.d_probabilities, rows: n, cols: keys.count, stride: width },
        );
        for i in 0..n {
            let (at, seen) = (i * width, (rows.visible)(i));
            let lse = rows.lse[(rows.start + i) * rows.q_heads + rows.head];
            d_score_row(
                &self.scores[at..at + seen],
                &self.d_probabilities[at..at + seen],
                scale,
                lse,
                self.d[offset + i],
                &mut self.probabilities[at..at + seen],
                &mut self.d_scores[at..at + seen],
            );
            self.probabilities[at + seen..at + width].fill(T::default());
            self.d_scores[at + seen..at + width].fill(T::default());
        }
        let p = View { data: &self.probabilities[..], rows: n, cols: keys.count, stride: width };
        let ds = View { data: &self.d_scores[..], rows: n, cols: keys.count, stride: width };
        let dq = &mut self.dq[offset * dim..(offset + n) * dim];
        T::mul(ds, keys.k_nn, true, ViewMut { data: dq, rows: n, cols: dim, stride: dim });
        T::pack_nn(q, &mut self.q_nn);
        T::mul_t(ds, &self.q_nn, &mut self.words, true, ViewMut { data: dk, rows: keys.count, cols: dim, stride: dim });
        T::pack_nn(d_o, &mut self.do_nn);
        T::mul_t(p, &self.do_nn, &mut self.words, true, ViewMut { data: dv, rows: keys.count, cols: dim, stride: dim });
    }
}

/// What a backward task adds to the prefix: dK and dV, `[prefix, dim]` each.
type PrefixGradient = (Vec<f32>, Vec<f32>);

/// See [`cashtag_backend::Backend::attention_backward`].
pub(crate) fn backward<T: Small>(
    layout: &AttentionLayout,
    heads: Heads,
    qkv: View<'_, T>,
    o: View<'_, T>,
    lse: &[f32],
    d_o: View<'_, T>,
    dqkv: ViewMut<'_, T>,
) {
    let Heads { dim, q: q_heads, kv: kv_heads } = heads;
    let Some(prefix) = layout.packed_prefix() else { panic!("only a packed training layout has a backward") };
    let group = q_heads / kv_heads;
    let n = layout.q_rows();
    assert_eq!((qkv.rows, qkv.cols, dqkv.rows, dqkv.cols), (n, (q_heads + 2 * kv_heads) * dim, n, qkv.cols));
    assert_eq!((o.rows, o.cols, d_o.rows, d_o.cols), (n, q_heads * dim, n, q_heads * dim));
    let (k_col, v_col) = (q_heads * dim, (q_heads + kv_heads) * dim);
    let stride = dqkv.stride;
    let out = Shared(dqkv.data.as_mut_ptr(), dqkv.data.len());

    // Segment 0 is the prefix itself when there is one; it goes last, when the gradients of its keys are known.
    let all = tiles(layout, true);
    let examples: Vec<&Tile> = all.iter().filter(|t| prefix == 0 || t.q_start > 0).collect();
    let packed: Vec<[T::Packed; 3]> = (0..kv_heads)
        .into_par_iter()
        .map(|head| {
            let mut p: [T::Packed; 3] = Default::default();
            if prefix > 0 {
                T::pack_nt(qkv.part(0, prefix, k_col + head * dim, dim), &mut p[0]);
                T::pack_nt(qkv.part(0, prefix, v_col + head * dim, dim), &mut p[1]);
                T::pack_nn(qkv.part(0, prefix, k_col + head * dim, dim), &mut p[2]);
            }
            p
        })
        .collect();

    // One tile: rows of q into `dqkv`, own keys' gradients into `dqkv`, or, for the prefix, into what `carry` brought.
    let run = |w: &mut Backward<T>, tile: &Tile, kv_head: usize, carry: Option<PrefixGradient>| -> PrefixGradient {
        let [kp_nt, vp_nt, kp_nn] = &packed[kv_head];
        let shared = tile.shared.len;
        let is_prefix = carry.is_some();
        let (mut dkp, mut dvp) =
            if shared > 0 { (vec![0.0; prefix * dim], vec![0.0; prefix * dim]) } else { Default::default() };
        let own: usize = tile.pieces.iter().map(|p| p.len).sum();
        let (mut dk_own, mut dv_own) = match carry {
            Some(carry) => carry,
            None => {
                let (mut dk, mut dv) = (std::mem::take(&mut w.dk), std::mem::take(&mut w.dv));
                dk.clear();
                dv.clear();
                dk.resize(own * dim, 0.0);
                dv.resize(own * dim, 0.0);
                (dk, dv)
            }
        };
        for head in kv_head * group..(kv_head + 1) * group {
            copy_head(qkv, tile.q_start, tile.rows, head, dim, &mut w.q);
            copy_head(d_o, tile.q_start, tile.rows, head, dim, &mut w.d_o);
            w.d.clear();
            for i in 0..tile.rows {
                let o = &o.row(tile.q_start + i)[head * dim..(head + 1) * dim];
                w.d.push(dot(o, &w.d_o[i * dim..(i + 1) * dim]));
            }
            w.dq.clear();
            w.dq.resize(tile.rows * dim, 0.0);
            // The shared prefix, for all rows of the tile together.
            if shared > 0 {
                let mut limit = Vec::with_capacity(tile.rows);
                tile.pieces.iter().for_each(|p| limit.extend(std::iter::repeat_n(p.segment.context[0].len, p.len)));
                let visible = |i: usize| limit[i];
                let keys = Keys { k_nt: kp_nt, v_nt: vp_nt, k_nn: kp_nn, count: prefix };
                let rows = Rows { start: tile.q_start, count: tile.rows, head, q_heads, lse, visible: &visible };
                w.block(0, &rows, &keys, dim, &mut dkp, &mut dvp);
            }
            // Each segment with itself, in chunks of query rows so that the scores stay small.
            let mut offset = 0;
            for piece in &tile.pieces {
                let start = piece.q_row();
                for first in (0..piece.len).step_by(TILE_ROWS) {
                    let count = (piece.len - first).min(TILE_ROWS);
                    let seen = first + count;
                    let mut k_nt = std::mem::take(&mut w.k_nt);
                    let mut v_nt = std::mem::take(&mut w.v_nt);
                    let mut k_nn = std::mem::take(&mut w.k_nn);
                    T::pack_nt(qkv.part(start, seen, k_col + kv_head * dim, dim), &mut k_nt);
                    T::pack_nt(qkv.part(start, seen, v_col + kv_head * dim, dim), &mut v_nt);
                    T::pack_nn(qkv.part(start, seen, k_col + kv_head * dim, dim), &mut k_nn);
                    let visible = |i: usize| first + i + 1;
                    let keys = Keys { k_nt: &k_nt, v_nt: &v_nt, k_nn: &k_nn, count: seen };
                    let rows = Rows { start: start + first, count, head, q_heads, lse, visible: &visible };
                    let at = offset * dim..(offset + seen) * dim;
                    w.block(offset + first, &rows, &keys, dim, &mut dk_own[at.clone()], &mut dv_own[at]);
                    (w.k_nt, w.v_nt, w.k_nn) = (k_nt, v_nt, k_nn);
                }
                offset += piece.len;
            }
            for i in 0..tile.rows {
                // SAFETY: (row, query head) belongs to this task alone.
                let target = unsafe { out.part((tile.q_start + i) * stride + head * dim, dim) };
                target.iter_mut().zip(&w.dq[i * dim..]).for_each(|(t, x)| *t = T::from_f32(*x));
            }
        }
        for i in 0..tile.rows {
            for (column, gradient) in [(k_col, &dk_own), (v_col, &dv_own)] {
                // SAFETY: (row, key head) belongs to this task alone: a segment is never cut here.
                let target = unsafe { out.part((tile.q_start + i) * stride + column + kv_head * dim, dim) };
                target.iter_mut().zip(&gradient[i * dim..]).for_each(|(t, x)| *t = T::from_f32(*x));
            }
        }
        if !is_prefix {
            (w.dk, w.dv) = (dk_own, dv_own);
        }
        (dkp, dvp)
    };

    let gradients: Vec<PrefixGradient> = (0..examples.len() * kv_heads)
        .into_par_iter()
        .with_max_len(1)
        .map_init(Backward::<T>::default, |w, task| run(w, examples[task / kv_heads], task % kv_heads, None))
        .collect();
    if prefix > 0 {
        (0..kv_heads).into_par_iter().for_each_init(Backward::<T>::default, |w, kv_head| {
            let mut carry = (vec![0.0; prefix * dim], vec![0.0; prefix * dim]);
            for (dk, dv) in gradients.iter().skip(kv_head).step_by(kv_heads) {
                carry.0.iter_mut().zip(dk).for_each(|(a, b)| *a += b);
                carry.1.iter_mut().zip(dv).for_each(|(a, b)| *a += b);
            }
            // The prefix is one segment; `tiles` may have put nothing else into its tile because its context is empty
            // only if every example shares none of it, which is handled by running those rows here as well.
            for tile in all.iter().filter(|t| t.q_start == 0) {
                let mut carry = std::mem::take(&mut carry);
                let own: usize = tile.pieces.iter().map(|p| p.len).sum();
                carry.0.resize(own * dim, 0.0);
                carry.1.resize(own * dim, 0.0);
                run(w, tile, kv_head, Some(carry));
            }
        });
    }
}
