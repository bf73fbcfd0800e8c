//! The seven sentences by which a model of this project is judged. They and near copies of them are in no training
//! data: the generator rejects them, `prepare` drops them, and a test looks for them in the built-in corpus.

use std::sync::LazyLock;

use crate::clean::normalised_key;
use crate::minhash::{Sketch, similarity};

/// (sentence, expected label).
pub const JUDGED: [(&str, &str); 7] = [
    ("The stock market is recovering after a steep decline last week.", "Positive"),
    ("Major stock indices dropped significantly due to concerns about inflation.", "Negative"),
    ("The stock market is steady, with no major changes in performance today.", "Neutral"),
    ("Tech stocks are up, but there are concerns about the overall market's future.", "Neutral"),
    ("Stock prices are rising today, but investors remain cautious about long-term growth.", "Neutral"),
    ("Oh great, another stock market crash. Just what we needed!", "Negative"),
    ("The market volatility today was exactly as expected, no surprises.", "Neutral"),
];

/// Similarity from which a text counts as a copy of a judged sentence. Lower than the bound for ordinary
/// near-duplicates: here a false alarm costs one text, a miss costs the honesty of the result.
const JUDGED_SIMILARITY: f64 = 0.45;

/// The judged sentence that `text` is, contains, or nearly copies.
pub fn judged_near(text: &str) -> Option<&'static str> {
    let key = normalised_key(text);
    judged_near_key(&key, &Sketch::of_key(&key))
}

/// [`judged_near`] for a text whose key and sketch are known.
pub(crate) fn judged_near_key(key: &str, sketch: &Sketch) -> Option<&'static str> {
    static JUDGES: LazyLock<Judges> = LazyLock::new(Judges::new);
    JUDGES.find(key, sketch)
}

struct Judges {
    sentences: Vec<(Sketch, String)>,
    /// One bit for each value of the lower half of a shingle that occurs in a judged sentence.
    bits: Vec<u64>,
    /// A text with fewer shingles among the bits is near none of them.
    fewest: usize,
}

impl Judges {
    fn new() -> Self {
        let sentences: Vec<(Sketch, String)> =
            JUDGED.iter().map(|(text, _)| (Sketch::of(text), normalised_key(text))).collect();
        let mut bits = vec![0u64; (1 << 16) / 64];
        for shingle in sentences.iter().flat_map(|(sketch, _)| sketch.shingles()) {
            let low = (shingle & 0xFFFF) as usize;
            bits[low / 64] |= 1 << (low % 64);
        }
        let shortest = sentences.iter().map(|(sketch, _)| sketch.shingles().len()).min().unwrap_or(0);
        // To contain a sentence is to share all its shingles but the two at its ends; to be similar is to share a part.
        let fewest = ((shortest as f64 * JUDGED_SIMILARITY) as usize).min(shortest.saturating_sub(2));
        Self { sentences, bits, fewest }
    }

    fn find(&self, key: &str, sketch: &Sketch) -> Option<&'static str> {
        let known = |shingle: &&u32| {
            let low = (**shingle & 0xFFFF) as usize;
            self.bits[low / 64] >> (low % 64) & 1 == 1
        };
        if sketch.shingles().iter().filter(known).count() < self.fewest {
            return None;
        }
        self.sentences
            .iter()
            .position(|(judged, judged_key)| {
                key.contains(judged_key.as_str()) || similarity(judged, sketch) >= JUDGED_SIMILARITY
            })
            .map(|index| JUDGED[index].0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_copies_and_lets_others_pass() {
        for (text, _) in JUDGED {
            assert_eq!(judged_near(text), Some(text));
            assert_eq!(judged_near(&format!("RT @someone: {}!! https://t.co/abc", text.to_uppercase())), Some(text));
        }
        assert_eq!(
            judged_near("The stock market is recovering after a sharp decline last week"),
            Some(JUDGED[0].0),
            "one word changed"
        );
        assert_eq!(judged_near("$AAPL breaks out above 200 on strong volume"), None);
        assert_eq!(judged_near("Oh great, the bakery is out of croissants again."), None);
    }
}
