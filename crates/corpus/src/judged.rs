//! The seven sentences by which a model of this project is judged. They and near copies of them are in no training
//! data: the generator rejects them, `prepare` drops them, and a test looks for them in the built-in corpus.

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
    use std::sync::LazyLock;
    static SKETCHES: LazyLock<Vec<(Sketch, String)>> = LazyLock::new(|| {
        JUDGED.iter().map(|(text, _)| (Sketch::of(text), crate::clean::normalised_key(text))).collect()
    });
    let key = crate::clean::normalised_key(text);
    let sketch = Sketch::of_key(&key);
    SKETCHES
        .iter()
        .position(|(judged, judged_key)| {
            key.contains(judged_key.as_str()) || similarity(judged, &sketch) >= JUDGED_SIMILARITY
        })
        .map(|index| JUDGED[index].0)
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
