//! Dropout masks of the present micro-batch, a bit for each element.
//!
//! A mask is a pure function of seed, step, site, row and column, so nobody has to keep it; but the forward draws it, the backward
//! needs it twice more, and drawing takes nearly half of the time of a dropout. So the masks of one step are kept until another
//! step asks, up to a limit; beyond it they are drawn each time.

use std::sync::{Arc, Mutex};

use cashtag_backend::Dropout;

use crate::rows;

/// Bytes of masks that are kept: those of 1,136 rows of the 135M model take 14 MB.
const LIMIT: usize = 64 << 20;

#[derive(Default)]
pub(crate) struct Masks(Mutex<Kept>);

#[derive(Default)]
struct Kept {
    step: Option<(u64, u32)>,
    masks: Vec<(Key, Arc<Vec<u16>>)>,
    bytes: usize,
    /// Memory of the step before.
    spare: Vec<Vec<u16>>,
}

#[derive(Clone, Copy, PartialEq)]
struct Key {
    p: f32,
    site: u32,
    rows: usize,
    cols: usize,
}

impl Masks {
    /// The mask of `[rows, cols]` as [`rows::dropout_mask`] draws it.
    pub(crate) fn get(&self, d: Dropout, rows: usize, cols: usize) -> Arc<Vec<u16>> {
        let key = Key { p: d.p, site: d.site, rows, cols };
        let mut kept = self.0.lock().unwrap_or_else(|e| e.into_inner());
        if kept.step != Some((d.seed, d.step)) {
            let old = std::mem::take(&mut kept.masks);
            kept.spare = old.into_iter().filter_map(|(_, mask)| Arc::into_inner(mask)).collect();
            (kept.step, kept.bytes) = (Some((d.seed, d.step)), 0);
        }
        if let Some((_, mask)) = kept.masks.iter().find(|(k, _)| *k == key) {
            return Arc::clone(mask);
        }
        let mut mask = kept.spare.pop().unwrap_or_default();
        rows::dropout_mask(d, rows, cols, &mut mask);
        let (mask, bytes) = (Arc::new(mask), 2 * rows * cols.div_ceil(16));
        if kept.bytes + bytes <= LIMIT {
            kept.bytes += bytes;
            kept.masks.push((key, Arc::clone(&mask)));
        }
        mask
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(step: u32, site: u32) -> Dropout {
        Dropout { p: 0.25, seed: 5, step, site }
    }

    #[test]
    fn a_mask_is_drawn_once_in_a_step() {
        let masks = Masks::default();
        let first = masks.get(at(1, 2), 7, 33);
        assert_eq!(first.len(), 7 * 3);
        assert!(Arc::ptr_eq(&first, &masks.get(at(1, 2), 7, 33)));
        for other in [masks.get(at(1, 3), 7, 33), masks.get(Dropout { p: 0.5, ..at(1, 2) }, 7, 33)] {
            assert_ne!(*first, *other);
        }
        // The same rows are the beginning of more rows.
        assert_eq!(masks.get(at(1, 2), 9, 33)[..first.len()], first[..]);
        // Another step asks for its own, and the first one is drawn again, the same.
        assert_ne!(*first, *masks.get(at(2, 2), 7, 33));
        let again = masks.get(at(1, 2), 7, 33);
        assert!(!Arc::ptr_eq(&first, &again));
        assert_eq!(first, again);
    }

    #[test]
    fn beyond_the_limit_nothing_is_kept() {
        let masks = Masks::default();
        let (rows, cols) = (LIMIT / 2, 16);
        let one = masks.get(at(1, 1), rows, cols);
        assert!(Arc::ptr_eq(&one, &masks.get(at(1, 1), rows, cols)));
        let two = masks.get(at(1, 2), 1, cols);
        let twice = masks.get(at(1, 2), 1, cols);
        assert!(!Arc::ptr_eq(&two, &twice));
        assert_eq!(two, twice);
    }
}
