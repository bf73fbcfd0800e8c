//! Who attends to whom in a packed batch.
//!
//! A batch is one matrix of token rows without padding. It is cut into [segments](Segment): runs of rows that attend to
//! themselves causally and, in full, to up to two earlier spans of keys. That is enough for everything cashtag does:
//!
//! ```text
//! training         rows  0…p-1 │ p…        │ p+n₁…      │          prefix once, then the examples
//!                        prefix│ example 1 │ example 2  │          context of an example: [0, p)
//!
//! classification   kv    0…p-1 │ tweet 1 │ Pos │ Ne utral │ tweet 2 …
//!                        cached│         └ branches: context [0, p) and the tweet
//!
//! generation       kv    0…p-1 │ …past of one sequence… │ new row   context: [0, p) and the past
//! ```

/// A run of keys, `start .. start + len`, in rows of the key/value matrices.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Span {
    pub start: usize,
    pub len: usize,
}

/// Query rows `q_start .. q_start + len`, whose own keys are rows `kv_start .. kv_start + len`. Query `q_start + t` attends
/// to every key of both context spans and to keys `kv_start ..= kv_start + t`. Context spans lie in front of `kv_start`
/// or anywhere else, but never overlap the segment's own keys or each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    pub q_start: usize,
    pub len: usize,
    pub kv_start: usize,
    pub context: [Span; 2],
}

impl Segment {
    /// Keys that the last query of the segment attends to; the position of its first query is this less `len`.
    pub fn keys(&self) -> usize {
        self.context[0].len + self.context[1].len + self.len
    }

    /// Position of the segment's first token, as rotary embedding counts it.
    pub fn first_position(&self) -> usize {
        self.context[0].len + self.context[1].len
    }
}

/// The segments of one batch. Query rows are covered exactly once, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttentionLayout {
    segments: Vec<Segment>,
    q_rows: usize,
    kv_rows: usize,
    packed_prefix: Option<usize>,
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum LayoutError {
    #[error("segment {index} starts at query row {found}, expected {expected}")]
    Gap { index: usize, expected: usize, found: usize },
    #[error("segment {index} is empty")]
    Empty { index: usize },
    #[error("segment {index} touches key rows up to {end} of {kv_rows}")]
    Keys { index: usize, end: usize, kv_rows: usize },
    #[error("segment {index}: context spans overlap its own keys or each other")]
    Overlap { index: usize },
}

impl AttentionLayout {
    /// Any layout for the forward pass: `segments` must cover query rows `0 .. n` in order without gaps.
    ///
    /// # Errors
    /// A segment that is empty, leaves a gap, reaches past `kv_rows` or overlaps its own context.
    pub fn new(segments: Vec<Segment>, kv_rows: usize) -> Result<Self, LayoutError> {
        let mut q_rows = 0;
        for (index, s) in segments.iter().enumerate() {
            if s.len == 0 {
                return Err(LayoutError::Empty { index });
            }
            if s.q_start != q_rows {
                return Err(LayoutError::Gap { index, expected: q_rows, found: s.q_start });
            }
            q_rows += s.len;
            let own = Span { start: s.kv_start, len: s.len };
            let spans = [own, s.context[0], s.context[1]];
            for span in spans {
                let end = span.start.saturating_add(span.len);
                if end > kv_rows {
                    return Err(LayoutError::Keys { index, end, kv_rows });
                }
            }
            let overlap =
                |a: Span, b: Span| a.len > 0 && b.len > 0 && a.start < b.start + b.len && b.start < a.start + a.len;
            if overlap(spans[0], spans[1]) || overlap(spans[0], spans[2]) || overlap(spans[1], spans[2]) {
                return Err(LayoutError::Overlap { index });
            }
        }
        Ok(Self { segments, q_rows, kv_rows, packed_prefix: None })
    }

    /// The training layout: `prefix` shared rows first, then the examples. Example `i` has `lens[i]` rows of its own and
    /// attends to the first `shared[i] ≤ prefix` prefix rows (usually all of them; fewer when its tokens leave the common
    /// prefix early). Queries and keys are the same rows. This is the only kind of layout that has a backward.
    pub fn packed(prefix: usize, shared: &[usize], lens: &[usize]) -> Self {
        assert_eq!(shared.len(), lens.len());
        let mut segments = Vec::with_capacity(lens.len() + 1);
        if prefix > 0 {
            segments.push(Segment { q_start: 0, len: prefix, kv_start: 0, context: Default::default() });
        }
        let mut row = prefix;
        for (&shared, &len) in shared.iter().zip(lens) {
            assert!(shared <= prefix && len > 0, "shared {shared} of {prefix}, len {len}");
            let context = [Span { start: 0, len: shared }, Span::default()];
            segments.push(Segment { q_start: row, len, kv_start: row, context });
            row += len;
        }
        Self { segments, q_rows: row, kv_rows: row, packed_prefix: Some(prefix) }
    }

    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// Number of query rows.
    pub fn q_rows(&self) -> usize {
        self.q_rows
    }

    /// Number of key/value rows that the layout may touch.
    pub fn kv_rows(&self) -> usize {
        self.kv_rows
    }

    /// Length of the shared prefix if this is a [packed](Self::packed) training layout: segment 0 is then the prefix (when
    /// it is not empty) and every other segment's only context is the first rows of it.
    pub fn packed_prefix(&self) -> Option<usize> {
        self.packed_prefix
    }

    /// Rotary position of every query row.
    pub fn positions(&self) -> Vec<u32> {
        let mut positions = Vec::with_capacity(self.q_rows);
        for s in &self.segments {
            let first = s.first_position() as u32;
            positions.extend(first..first + s.len as u32);
        }
        positions
    }

    /// Multiply-accumulates of one head's QKᵀ, per unit of head_dim: the number of (query, key) pairs.
    pub fn pairs(&self) -> usize {
        self.segments.iter().map(|s| s.len * s.first_position() + s.len * (s.len + 1) / 2).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packed_positions_continue_from_the_shared_prefix() {
        let layout = AttentionLayout::packed(3, &[3, 2], &[2, 3]);
        assert_eq!(layout.positions(), [0, 1, 2, 3, 4, 2, 3, 4]);
        assert_eq!((layout.q_rows(), layout.kv_rows(), layout.packed_prefix()), (8, 8, Some(3)));
        // prefix 6, example one 2·3 + 3, example two 3·2 + 6
        assert_eq!(layout.pairs(), 6 + 9 + 12);
    }

    #[test]
    fn bad_layouts_are_refused() {
        let segment = |q_start, len, kv_start, c: (usize, usize)| Segment {
            q_start,
            len,
            kv_start,
            context: [Span { start: c.0, len: c.1 }, Span::default()],
        };
        let error = |s: Vec<Segment>| AttentionLayout::new(s, 8).unwrap_err();
        assert_eq!(error(vec![segment(1, 2, 0, (0, 0))]), LayoutError::Gap { index: 0, expected: 0, found: 1 });
        assert_eq!(error(vec![segment(0, 0, 0, (0, 0))]), LayoutError::Empty { index: 0 });
        assert_eq!(error(vec![segment(0, 4, 5, (0, 0))]), LayoutError::Keys { index: 0, end: 9, kv_rows: 8 });
        assert_eq!(error(vec![segment(0, 4, 2, (0, 3))]), LayoutError::Overlap { index: 0 });
        assert!(AttentionLayout::new(vec![segment(0, 4, 3, (0, 3))], 8).is_ok());
    }
}
