//! Which rows of the key/value store belong to whom: each sequence has one run of them, from when it starts to when it is
//! removed.

use std::ops::Range;

/// Runs of rows, the lowest free one first.
#[derive(Clone, Debug)]
pub(super) struct Rows {
    all: Range<usize>,
    /// Sorted, disjoint.
    used: Vec<Range<usize>>,
}

impl Rows {
    pub(super) fn new(all: Range<usize>) -> Self {
        Self { all, used: Vec::new() }
    }

    pub(super) fn len(&self) -> usize {
        self.all.len()
    }

    /// Takes `count` rows in a row, if there are.
    pub(super) fn take(&mut self, count: usize) -> Option<Range<usize>> {
        let mut start = self.all.start;
        let mut at = self.used.len();
        for (i, taken) in self.used.iter().enumerate() {
            if taken.start - start >= count {
                at = i;
                break;
            }
            start = taken.end;
        }
        if self.all.end - start < count {
            return None;
        }
        self.used.insert(at, start..start + count);
        Some(start..start + count)
    }

    pub(super) fn give_back(&mut self, rows: &Range<usize>) {
        self.used.retain(|r| r != rows);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_are_filled_first() {
        let mut rows = Rows::new(10..20);
        let (a, b, c) = (rows.take(3).unwrap(), rows.take(3).unwrap(), rows.take(4).unwrap());
        assert_eq!((a.clone(), b.clone(), c), (10..13, 13..16, 16..20));
        assert_eq!(rows.take(1), None);
        rows.give_back(&b);
        assert_eq!(rows.take(4), None);
        assert_eq!(rows.take(2), Some(13..15));
        rows.give_back(&a);
        assert_eq!((rows.take(3), rows.take(1), rows.take(1)), (Some(10..13), Some(15..16), None));
    }
}
