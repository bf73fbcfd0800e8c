//! Exact and near duplicates, conflicting labels, and the groups that a split must not tear apart.
//!
//! Rows are first grouped by [`normalised_key`](crate::clean::normalised_key): of texts that are the same, one stays, and
//! if their labels disagree the majority decides (none stays in a tie). Among the rest, texts of similarity
//! [`DedupOptions::near`] or more **with the same label** are near copies: of each connected set the first stays. Texts
//! that are similar but labelled differently both stay, because a word can flip a label; they are reported. Whatever
//! has a similarity of [`DedupOptions::related`] or more, or carries the same `pair`, ends up in one group.
//!
//! Which texts belong together does not depend on the order of the rows. Up to [`EXACT_SEARCH`] rows every pair is
//! looked at (through an inverted index); beyond that candidates come from MinHash bands, and 145 bytes are kept a row.

use std::collections::HashMap;

use rayon::prelude::*;
use sha2::{Digest, Sha256};

use crate::clean::normalised_key;
use crate::error::Result;
use crate::example::{Example, LABELS, label_index};
use crate::minhash::{BANDS, FILTER, Signature, Sketch, filter_passes, similarity};
use crate::near::NearIndex;

/// Up to how many rows near copies are searched without approximation.
const EXACT_SEARCH: usize = 20_000;
/// How many different texts of one bucket a text is compared with.
const REPRESENTATIVES: usize = 32;
/// How many pairs of near copies with different labels are remembered as examples.
const REMEMBERED_CONFLICTS: usize = 50;

#[derive(Clone, Debug)]
pub struct DedupOptions {
    /// Similarity from which two texts with the same label are copies of each other.
    pub near: f64,
    /// Similarity from which two texts must stay on the same side of a split.
    pub related: f64,
}

impl Default for DedupOptions {
    fn default() -> Self {
        Self { near: 0.7, related: 0.6 }
    }
}

/// What becomes of a row, and which row is the reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    Keep,
    /// The same text with the same label as row `of`.
    Exact {
        of: u32,
    },
    /// Nearly the same text as row `of`, with the same label.
    Near {
        of: u32,
    },
    /// The same text as row `of`, with another label, and not in the majority.
    Conflict {
        of: u32,
    },
}

#[derive(Clone, Debug)]
pub struct Dedup {
    /// One per row.
    pub fates: Vec<Fate>,
    /// One per row: the smallest row of the group it belongs to.
    pub groups: Vec<u32>,
    /// Kept rows that are near copies of each other with different labels (the first [`REMEMBERED_CONFLICTS`]).
    pub near_conflicts: Vec<(u32, u32)>,
    pub near_conflict_count: u64,
}

/// Finds the duplicates among `examples`. Labels outside [`LABELS`] count as one further label.
pub fn find_duplicates(examples: &[Example], options: &DedupOptions) -> Dedup {
    let keys: Vec<String> = examples.par_iter().map(|example| normalised_key(&example.text)).collect();
    let features: Vec<Features> = keys.par_iter().map(|key| Features::of(key, &Sketch::of_key(key))).collect();
    let mut table = Table::default();
    for (features, example) in features.iter().zip(examples) {
        table.push(features, &example.label, example.pair.as_deref());
    }
    let result = table.resolve(options, &|row| Ok(keys.get(row as usize).cloned().unwrap_or_default()));
    result.expect("keys that are in memory can be read")
}

/// What [`Table`] keeps of a text.
pub(crate) struct Features {
    key: u64,
    signature: Signature,
}

impl Features {
    pub(crate) fn of(key: &str, sketch: &Sketch) -> Self {
        Self { key: stable_hash(key), signature: Signature::of(sketch) }
    }
}

/// The first 64 bits of SHA-256: the same in every build, and no file can be made to collide on purpose.
pub(crate) fn stable_hash(text: &str) -> u64 {
    let digest = Sha256::digest(text.as_bytes());
    u64::from_be_bytes(std::array::from_fn(|index| digest[index]))
}

/// The columns that duplicates are found from, one entry a row.
#[derive(Default)]
pub(crate) struct Table {
    keys: Vec<u64>,
    /// One column a band, so that a band is read in order.
    bands: [Vec<u32>; BANDS],
    filters: Vec<[u8; FILTER]>,
    labels: Vec<u8>,
    /// Hash of the `pair`, 0 for none.
    pairs: Vec<u64>,
}

impl Table {
    pub(crate) fn len(&self) -> usize {
        self.keys.len()
    }

    pub(crate) fn push(&mut self, features: &Features, label: &str, pair: Option<&str>) {
        self.keys.push(features.key);
        for (column, band) in self.bands.iter_mut().zip(&features.signature.bands) {
            column.push(*band);
        }
        self.filters.push(features.signature.filter);
        self.labels.push(label_index(label).unwrap_or(LABELS.len()) as u8);
        self.pairs.push(pair.map_or(0, |pair| stable_hash(pair).max(1)));
    }

    /// Hash of the normalised key of a row.
    pub(crate) fn key(&self, row: u32) -> u64 {
        self.keys[row as usize]
    }

    /// Number of the label of a row.
    pub(crate) fn label(&self, row: u32) -> u8 {
        self.labels[row as usize]
    }

    /// `key_of` gives the normalised key of a row; it is called for candidates only, from several threads.
    pub(crate) fn resolve(
        &self,
        options: &DedupOptions,
        key_of: &(dyn Fn(u32) -> Result<String> + Sync),
    ) -> Result<Dedup> {
        let mut state = State {
            fates: vec![Fate::Keep; self.len()],
            related: Union::new(self.len()),
            near: Union::new(self.len()),
            near_conflicts: Vec::new(),
            near_conflict_count: 0,
        };
        self.exact(&mut state);
        self.pairs_together(&mut state);
        if self.len() <= EXACT_SEARCH {
            self.search_all(options, key_of, &mut state)?;
        } else {
            self.search_bands(options, key_of, &mut state)?;
        }
        Ok(state.finish())
    }

    /// Settles rows with the same key.
    fn exact(&self, state: &mut State) {
        let mut order: Vec<u32> = (0..self.len() as u32).collect();
        order.par_sort_unstable_by_key(|row| (self.keys[*row as usize], *row));
        for rows in order.chunk_by(|a, b| self.keys[*a as usize] == self.keys[*b as usize]) {
            let (first, others) = (rows[0], &rows[1..]);
            if others.is_empty() {
                continue;
            }
            for row in others {
                state.related.unite(first, *row);
            }
            let pair = self.pairs[first as usize];
            if pair != 0 && others.iter().all(|row| self.pairs[*row as usize] == pair) {
                continue; // A flip pair whose halves differ in punctuation only: both are wanted.
            }
            let mut counts = [0usize; LABELS.len() + 1];
            for row in rows {
                counts[self.labels[*row as usize] as usize] += 1;
            }
            let most = counts.iter().copied().max().unwrap_or(0);
            let tie = counts.iter().filter(|count| **count == most).count() > 1;
            let kept = if tie {
                None
            } else {
                rows.iter().copied().find(|row| counts[self.labels[*row as usize] as usize] == most)
            };
            for row in rows.iter().copied() {
                state.fates[row as usize] = match kept {
                    Some(kept) if kept == row => Fate::Keep,
                    Some(kept) if self.labels[kept as usize] == self.labels[row as usize] => Fate::Exact { of: kept },
                    Some(kept) => Fate::Conflict { of: kept },
                    None if row == first => Fate::Conflict { of: others[0] },
                    None => Fate::Conflict { of: first },
                };
            }
        }
    }

    fn pairs_together(&self, state: &mut State) {
        let mut first_of: HashMap<u64, u32> = HashMap::new();
        for (row, pair) in self.pairs.iter().enumerate().filter(|(_, pair)| **pair != 0) {
            let first = *first_of.entry(*pair).or_insert(row as u32);
            state.related.unite(first, row as u32);
        }
    }

    fn search_all(
        &self,
        options: &DedupOptions,
        key_of: &(dyn Fn(u32) -> Result<String> + Sync),
        state: &mut State,
    ) -> Result<()> {
        let mut index = NearIndex::default();
        let mut rows = Vec::new();
        for row in state.kept() {
            let sketch = Sketch::of_key(&key_of(row)?);
            for (other, similarity) in index.similar(&sketch, options.related) {
                self.settle(options, rows[other], row, similarity, state);
            }
            index.insert(sketch);
            rows.push(row);
        }
        Ok(())
    }

    fn search_bands(
        &self,
        options: &DedupOptions,
        key_of: &(dyn Fn(u32) -> Result<String> + Sync),
        state: &mut State,
    ) -> Result<()> {
        let kept: Vec<u32> = state.kept().collect();
        for band in &self.bands {
            // Hash and row in one number: sorting moves nothing but these.
            let mut order: Vec<u64> =
                kept.iter().map(|row| u64::from(band[*row as usize]) << 32 | u64::from(*row)).collect();
            order.par_sort_unstable();
            let buckets: Vec<&[u64]> =
                order.chunk_by(|a, b| a >> 32 == b >> 32).filter(|bucket| bucket.len() > 1).collect();
            // Roots as they stand before the band: threads only read them.
            let roots = state.near.roots();
            // In batches, so that what the threads have found never grows with the number of rows.
            for batch in buckets.chunks(1 << 16) {
                let found: Vec<Vec<(u32, u32, f64)>> = batch
                    .par_iter()
                    .map(|bucket| self.search_bucket(options, key_of, bucket, &roots))
                    .collect::<Result<_>>()?;
                for (a, b, similarity) in found.into_iter().flatten() {
                    self.settle(options, a, b, similarity, state);
                }
            }
        }
        Ok(())
    }

    /// The similar pairs of one bucket. A row that is a near copy of a representative does not become one itself.
    fn search_bucket(
        &self,
        options: &DedupOptions,
        key_of: &(dyn Fn(u32) -> Result<String> + Sync),
        bucket: &[u64],
        roots: &[u32],
    ) -> Result<Vec<(u32, u32, f64)>> {
        let bound = options.related.min(options.near);
        let mut representatives: Vec<(u32, Option<Sketch>)> = Vec::new();
        let mut found = Vec::new();
        for row in bucket.iter().map(|entry| *entry as u32) {
            let filter = &self.filters[row as usize];
            let mut sketch: Option<Sketch> = None;
            let mut represented = false;
            for (other, other_sketch) in &mut representatives {
                if roots[*other as usize] == roots[row as usize] {
                    represented = true;
                    continue;
                }
                if !filter_passes(filter, &self.filters[*other as usize], bound) {
                    continue;
                }
                let mine = match &mut sketch {
                    Some(mine) => mine,
                    None => sketch.insert(Sketch::of_key(&key_of(row)?)),
                };
                let theirs = match other_sketch {
                    Some(theirs) => theirs,
                    None => other_sketch.insert(Sketch::of_key(&key_of(*other)?)),
                };
                let similarity = similarity(mine, theirs);
                if similarity >= bound {
                    found.push((*other, row, similarity));
                    represented |=
                        similarity >= options.near && self.labels[*other as usize] == self.labels[row as usize];
                }
            }
            if !represented && representatives.len() < REPRESENTATIVES {
                representatives.push((row, sketch));
            }
        }
        Ok(found)
    }

    fn settle(&self, options: &DedupOptions, a: u32, b: u32, similarity: f64, state: &mut State) {
        let (a, b) = (a.min(b), a.max(b));
        if similarity >= options.related {
            state.related.unite(a, b);
        }
        if similarity < options.near {
            return;
        }
        let (row_a, row_b) = (a as usize, b as usize);
        if self.pairs[row_a] != 0 && self.pairs[row_a] == self.pairs[row_b] {
            return;
        }
        if self.labels[row_a] == self.labels[row_b] {
            state.near.unite(a, b);
            state.related.unite(a, b);
        } else if state.near_conflicts.len() < REMEMBERED_CONFLICTS {
            if !state.near_conflicts.contains(&(a, b)) {
                state.near_conflicts.push((a, b));
                state.near_conflict_count += 1;
            }
        } else {
            state.near_conflict_count += 1;
        }
    }
}

struct State {
    fates: Vec<Fate>,
    related: Union,
    near: Union,
    near_conflicts: Vec<(u32, u32)>,
    near_conflict_count: u64,
}

impl State {
    fn kept(&self) -> impl Iterator<Item = u32> + use<> {
        let kept: Vec<u32> =
            (0..self.fates.len() as u32).filter(|row| self.fates[*row as usize] == Fate::Keep).collect();
        kept.into_iter()
    }

    fn finish(mut self) -> Dedup {
        for row in 0..self.fates.len() as u32 {
            let first = self.near.root(row);
            if first != row && self.fates[row as usize] == Fate::Keep {
                self.fates[row as usize] = Fate::Near { of: first };
            }
        }
        Dedup {
            groups: self.related.roots(),
            fates: self.fates,
            near_conflicts: self.near_conflicts,
            near_conflict_count: self.near_conflict_count,
        }
    }
}

/// Union-find in which the root of a set is its smallest member.
struct Union(Vec<u32>);

impl Union {
    fn new(len: usize) -> Self {
        Self((0..len as u32).collect())
    }

    fn root(&mut self, mut row: u32) -> u32 {
        while self.0[row as usize] != row {
            let parent = self.0[row as usize];
            self.0[row as usize] = self.0[parent as usize];
            row = self.0[row as usize];
        }
        row
    }

    fn unite(&mut self, a: u32, b: u32) {
        let (a, b) = (self.root(a), self.root(b));
        self.0[a.max(b) as usize] = a.min(b);
    }

    fn roots(&mut self) -> Vec<u32> {
        (0..self.0.len() as u32).map(|row| self.root(row)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example(text: &str, label: &str) -> Example {
        Example::new(text, label)
    }

    #[test]
    fn exact_near_conflict_and_flip() {
        let mut flip_a = example("bought the friday calls in $F, small size", "Positive");
        let mut flip_b = example("bought the friday puts in $F, small size", "Negative");
        flip_a.pair = Some("x1".into());
        flip_b.pair = Some("x1".into());
        let rows = [
            example("Acme Corp beats on revenue, shares rise in early trading https://t.co/a", "Positive"),
            example("RT @x: Acme Corp beats on revenue, shares rise in early trading!", "Positive"),
            example("Acme Corp beats on revenue and shares rise in early trading", "Positive"),
            example("Acme Corp beats on revenue, shares rise in early trading", "Neutral"),
            example("$ZZ to report on Thursday", "Neutral"),
            example("$ZZ to report on thursday.", "Negative"),
            flip_a,
            flip_b,
            example("Acme Corp beats on revenue, shares fall in early trading", "Negative"),
        ];
        let dedup = find_duplicates(&rows, &DedupOptions::default());
        assert_eq!(
            dedup.fates,
            [
                Fate::Keep,
                Fate::Exact { of: 0 },
                Fate::Near { of: 0 },
                Fate::Conflict { of: 0 },
                Fate::Conflict { of: 5 },
                Fate::Conflict { of: 4 },
                Fate::Keep,
                Fate::Keep,
                Fate::Keep,
            ]
        );
        assert_eq!(dedup.groups, [0, 0, 0, 0, 4, 4, 6, 6, 0]);
        assert_eq!(dedup.near_conflicts, [(0, 8)]);
    }

    #[test]
    fn texts_without_words_are_one_text() {
        let rows = [example("!!!", "Neutral"), example("https://t.co/x", "Neutral")];
        assert_eq!(find_duplicates(&rows, &DedupOptions::default()).fates, [Fate::Keep, Fate::Exact { of: 0 }]);
        assert!(find_duplicates(&[], &DedupOptions::default()).fates.is_empty());
    }

    /// Above [`EXACT_SEARCH`] rows the bands must find what the exact search finds.
    #[test]
    fn bands_find_planted_copies() {
        let mut rng = crate::rng::Rng::new(5);
        let word = |rng: &mut crate::rng::Rng| -> String {
            (0..3 + rng.below(6)).map(|_| (b'a' + rng.below(26) as u8) as char).collect()
        };
        let mut rows = Vec::new();
        for _ in 0..EXACT_SEARCH {
            let text: Vec<String> = (0..12).map(|_| word(&mut rng)).collect();
            rows.push(example(&text.join(" "), LABELS[rng.below(3)]));
        }
        let planted = 1_000;
        for row in 0..planted {
            let mut words: Vec<String> = rows[row].text.split(' ').map(str::to_owned).collect();
            words[rng.below(12)] = word(&mut rng);
            let label = rows[row].label.clone();
            rows.push(example(&words.join(" "), &label));
        }
        let options = DedupOptions { near: 0.65, related: 0.6 };
        let dedup = find_duplicates(&rows, &options);
        let (mut similar, mut found) = (0, 0);
        for row in 0..planted {
            let copy = EXACT_SEARCH + row;
            if similarity(&Sketch::of(&rows[row].text), &Sketch::of(&rows[copy].text)) >= options.near {
                similar += 1;
                found += usize::from(dedup.fates[copy] == Fate::Near { of: row as u32 });
            }
        }
        assert!(similar > planted * 8 / 10, "{similar} of {planted} planted copies are similar");
        assert!(found * 100 >= similar * 99, "{found} of {similar} copies found");
        let others = dedup.fates[..EXACT_SEARCH].iter().filter(|fate| **fate != Fate::Keep).count();
        assert_eq!(others, 0, "random texts are no copies");
    }
}
