//! Byte-pair merging: a sequence of symbols, the pair of lowest rank merged first, leftmost on ties.
//!
//! Short words (nearly all) are merged by scanning for the lowest rank; long ones by a heap over a linked list, so that
//! a hostile word of n symbols costs O(n log n). Both orders are the same and a property test holds them together.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::hash::{BuildHasherDefault, Hasher};

/// Words of more symbols than this take the heap.
const SCAN_LIMIT: usize = 48;

/// A multiplicative hash for keys that are already integers.
#[derive(Default)]
pub(crate) struct IntHasher(u64);

impl Hasher for IntHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_u64(u64::from(byte));
        }
    }

    fn write_u64(&mut self, value: u64) {
        // The high half of the product depends on all bits of the key; the table uses low bits, so fold it down.
        let product = (self.0 ^ value).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        self.0 = product ^ (product >> 32);
    }
}

/// The merges of a vocabulary.
#[derive(Default)]
pub(crate) struct Merges {
    /// (left << 32 | right) → (rank, merged)
    map: HashMap<u64, (u32, u32), BuildHasherDefault<IntHasher>>,
}

const NONE: u32 = u32::MAX;

fn key(left: u32, right: u32) -> u64 {
    u64::from(left) << 32 | u64::from(right)
}

impl Merges {
    pub(crate) fn with_capacity(capacity: usize) -> Self {
        Merges { map: HashMap::with_capacity_and_hasher(capacity, BuildHasherDefault::default()) }
    }

    /// Adds a merge; of two for the same pair the later one holds, as in the `tokenizers` library.
    pub(crate) fn insert(&mut self, left: u32, right: u32, rank: u32, merged: u32) {
        self.map.insert(key(left, right), (rank, merged));
    }

    /// All merges as (rank, merged, left, right), in that order.
    pub(crate) fn sorted(&self) -> Vec<(u32, u32, u32, u32)> {
        let all = self.map.iter().map(|(key, &(rank, merged))| (rank, merged, (key >> 32) as u32, *key as u32));
        let mut all: Vec<_> = all.collect();
        all.sort_unstable();
        all
    }

    fn get(&self, left: u32, right: u32) -> Option<(u32, u32)> {
        self.map.get(&key(left, right)).copied()
    }

    /// Merges `symbols` in place until no pair is left that can be merged.
    pub(crate) fn apply(&self, symbols: &mut Vec<u32>) {
        if symbols.len() <= SCAN_LIMIT { self.scan(symbols) } else { self.heap(symbols) }
    }

    fn scan(&self, symbols: &mut Vec<u32>) {
        let length = symbols.len();
        if length < 2 {
            return;
        }
        let mut pairs = [(NONE, NONE); SCAN_LIMIT];
        for (pair, both) in pairs.iter_mut().zip(symbols.windows(2)) {
            *pair = self.get(both[0], both[1]).unwrap_or((NONE, NONE));
        }
        // pairs[i] belongs to symbols[i] and symbols[i + 1].
        let mut left = length - 1;
        while let Some((at, &(rank, merged))) = pairs[..left].iter().enumerate().min_by_key(|(_, pair)| pair.0) {
            if rank == NONE {
                break;
            }
            symbols[at] = merged;
            symbols.remove(at + 1);
            pairs.copy_within(at + 1..left, at);
            left -= 1;
            if at < left {
                pairs[at] = self.get(merged, symbols[at + 1]).unwrap_or((NONE, NONE));
            }
            if at > 0 {
                pairs[at - 1] = self.get(symbols[at - 1], merged).unwrap_or((NONE, NONE));
            }
        }
    }

    fn heap(&self, symbols: &mut Vec<u32>) {
        // A doubly linked list over the symbols' places; a symbol that was merged into its left neighbour is NONE.
        let length = symbols.len();
        let mut next: Vec<usize> = (1..=length).collect();
        let mut previous: Vec<usize> = (0..length).map(|at| at.wrapping_sub(1)).collect();
        let mut queue: BinaryHeap<Reverse<(u32, usize, u32, u32)>> = BinaryHeap::with_capacity(length);
        let push = |queue: &mut BinaryHeap<_>, symbols: &[u32], left: usize, right: usize| {
            if let Some((rank, _)) = self.get(symbols[left], symbols[right]) {
                queue.push(Reverse((rank, left, symbols[left], symbols[right])));
            }
        };
        for at in 1..length {
            push(&mut queue, symbols, at - 1, at);
        }
        while let Some(Reverse((_, at, left, right))) = queue.pop() {
            let other = next[at];
            // The pair may have changed since it was queued.
            if symbols[at] != left || other >= length || symbols[other] != right {
                continue;
            }
            let Some((_, merged)) = self.get(left, right) else { continue };
            symbols[at] = merged;
            symbols[other] = NONE;
            next[at] = next[other];
            if next[at] < length {
                previous[next[at]] = at;
                push(&mut queue, symbols, at, next[at]);
            }
            if previous[at] < length {
                push(&mut queue, symbols, previous[at], at);
            }
        }
        symbols.retain(|&symbol| symbol != NONE);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn lowest_rank_first_then_leftmost() {
        // 0 = a, 1 = b; ab → 2 (rank 1), aa → 3 (rank 0), 3 3 → 4 (rank 2)
        let mut merges = Merges::with_capacity(3);
        merges.insert(0, 1, 1, 2);
        merges.insert(0, 0, 0, 3);
        merges.insert(3, 3, 2, 4);
        let apply = |symbols: &[u32]| {
            let mut out = symbols.to_vec();
            merges.apply(&mut out);
            out
        };
        assert_eq!(apply(&[0, 0, 1]), [3, 1]);
        assert_eq!(apply(&[0, 0, 0, 1]), [3, 2]);
        assert_eq!(apply(&[0, 0, 0, 0]), [4]);
        assert_eq!(apply(&[]), [0u32; 0]);
    }

    proptest! {
        #[test]
        fn scan_and_heap_agree(
            table in prop::collection::vec((0u32..8, 0u32..8, 0u32..5, 0u32..8), 0..30),
            symbols in prop::collection::vec(0u32..8, 0..=SCAN_LIMIT),
        ) {
            let mut merges = Merges::with_capacity(table.len());
            for &(left, right, rank, merged) in &table {
                merges.insert(left, right, rank, merged);
            }
            let (mut scanned, mut heaped) = (symbols.clone(), symbols);
            merges.scan(&mut scanned);
            merges.heap(&mut heaped);
            prop_assert_eq!(scanned, heaped);
        }
    }
}
