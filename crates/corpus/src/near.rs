//! Exact search for near copies in a set that grows.

use std::collections::HashMap;

use crate::minhash::Sketch;

/// A growing set of texts in which near copies of a new one are found exactly, through an inverted index of shingles.
#[derive(Default)]
pub struct NearIndex {
    holders: HashMap<u32, Vec<u32>>,
    sizes: Vec<u32>,
}

impl NearIndex {
    /// Adds a text; its number is how many were there before.
    pub fn insert(&mut self, sketch: Sketch) -> usize {
        let number = self.sizes.len();
        for shingle in sketch.shingles() {
            self.holders.entry(*shingle).or_default().push(number as u32);
        }
        self.sizes.push(sketch.shingles().len() as u32);
        number
    }

    /// The texts of similarity `bound` or more (which must be above 0), by number, with their similarity.
    pub fn similar(&self, sketch: &Sketch, bound: f64) -> Vec<(usize, f64)> {
        let mut shared: HashMap<u32, u32> = HashMap::new();
        for number in sketch.shingles().iter().filter_map(|shingle| self.holders.get(shingle)).flatten() {
            *shared.entry(*number).or_default() += 1;
        }
        let size = sketch.shingles().len() as u32;
        let mut found: Vec<(usize, f64)> = shared
            .into_iter()
            .filter_map(|(number, shared)| {
                let total = size + self.sizes[number as usize] - shared;
                let similarity = f64::from(shared) / f64::from(total.max(1));
                (similarity >= bound).then_some((number as usize, similarity))
            })
            .collect();
        found.sort_unstable_by_key(|(number, _)| *number);
        found
    }

    /// The most similar text of similarity `bound` or more.
    pub fn nearest(&self, sketch: &Sketch, bound: f64) -> Option<(usize, f64)> {
        self.similar(sketch, bound).into_iter().max_by(|a, b| a.1.total_cmp(&b.1).then(b.0.cmp(&a.0)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::minhash::similarity;

    #[test]
    fn the_index_and_the_definition_agree() {
        let texts = [
            "shares rise in early trade",
            "shares rise in late trade",
            "shares fall",
            "",
            "a",
            "shares rise in early trade",
        ];
        let sketches: Vec<Sketch> = texts.iter().map(|text| Sketch::of(text)).collect();
        let mut index = NearIndex::default();
        for sketch in &sketches {
            index.insert(sketch.clone());
        }
        for sketch in sketches.iter().filter(|sketch| !sketch.shingles().is_empty()) {
            let expected: Vec<(usize, f64)> = sketches
                .iter()
                .map(|other| similarity(sketch, other))
                .enumerate()
                .filter(|(_, similarity)| *similarity >= 0.3)
                .collect();
            assert_eq!(index.similar(sketch, 0.3), expected);
        }
        assert_eq!(index.nearest(&sketches[0], 0.3), Some((0, 1.0)), "the first of equals");
        assert_eq!(index.nearest(&Sketch::of("nothing like it"), 0.3), None);
    }
}
