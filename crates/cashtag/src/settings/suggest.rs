//! "Did you mean …": the nearest known word.

/// The one of `known` that `word` is most likely a misspelling of.
pub(crate) fn nearest<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    // Distances are quadratic in time; no key is this long.
    if word.len() > 64 {
        return None;
    }
    let normal = |w: &str| w.trim().to_ascii_lowercase().replace('-', "_");
    let word = normal(word);
    known
        .into_iter()
        .map(|k| (distance(&word, &normal(k)), k))
        .filter(|(d, k)| *d <= (k.chars().count().max(word.chars().count()) / 3).max(1))
        .min_by_key(|(d, _)| *d)
        .map(|(_, k)| k)
}

/// Insertions, deletions, replacements and swaps of neighbours (optimal string alignment).
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let mut before = vec![0; b.len() + 1];
    let mut previous: Vec<usize> = (0..=b.len()).collect();
    for i in 1..=a.len() {
        let mut current = vec![i; b.len() + 1];
        for j in 1..=b.len() {
            let cost = usize::from(a[i - 1] != b[j - 1]);
            current[j] = (previous[j] + 1).min(current[j - 1] + 1).min(previous[j - 1] + cost);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                current[j] = current[j].min(before[j - 2] + 1);
            }
        }
        before = std::mem::replace(&mut previous, current);
    }
    previous[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances() {
        assert_eq!(distance("", "abc"), 3);
        assert_eq!(distance("kitten", "sitting"), 3);
        assert_eq!(distance("lora", "lroa"), 1);
        assert_eq!(distance("über", "uber"), 1);
    }

    #[test]
    fn near_words_only() {
        let known = ["learning_rate", "logging_steps", "seed"];
        assert_eq!(nearest("learnign-rate", known), Some("learning_rate"));
        assert_eq!(nearest("sed", known), Some("seed"));
        assert_eq!(nearest("batch", known), None);
        assert_eq!(nearest(&"x".repeat(100_000), known), None);
    }
}
