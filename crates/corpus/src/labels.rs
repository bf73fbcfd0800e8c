//! Foreign label vocabularies mapped to the labels of a run: Positive, Neutral and Negative, or any others.
//!
//! Words are understood on their own. Numbers are not: `-1/0/1` is taken as it stands only where a `-1` has been seen,
//! and `0/1/2` means something else in every dataset, so it needs an explicit map or the class names that the file
//! carries.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::example::LABELS;

const WORDS: [(&str, usize); 26] = [
    ("positive", 0),
    ("pos", 0),
    ("bullish", 0),
    ("bull", 0),
    ("very positive", 0),
    ("strongly positive", 0),
    ("moderately positive", 0),
    ("mildly positive", 0),
    ("optimistic", 0),
    ("neutral", 1),
    ("neu", 1),
    ("mixed", 1),
    ("none", 1),
    ("no sentiment", 1),
    ("neither", 1),
    ("somewhat neutral", 1),
    ("negative", 2),
    ("neg", 2),
    ("bearish", 2),
    ("bear", 2),
    ("very negative", 2),
    ("strongly negative", 2),
    ("moderately negative", 2),
    ("mildly negative", 2),
    ("pessimistic", 2),
    ("neutrality", 1),
];

/// The label that a word stands for: ours, a synonym, or one dressed up ("**Positive**.", "Label: bullish",
/// "\"negative\""). Numbers stand for nothing here.
pub fn canonical_label(word: &str) -> Option<&'static str> {
    let mut word = bare(word);
    for prefix in ["label", "sentiment", "classification", "class", "answer", "output", "response", "completion"] {
        if let Some(head) = word.get(..prefix.len())
            && head.eq_ignore_ascii_case(prefix)
            && let Some(rest) = bare_end(&word[prefix.len()..]).strip_prefix([':', '=', '-'])
        {
            word = bare(rest);
            break;
        }
    }
    if word.len() > 24 {
        return None;
    }
    let folded = word.to_lowercase().replace(['_', '-'], " ");
    WORDS.iter().find(|(known, _)| *known == folded).map(|(_, index)| LABELS[*index])
}

/// Without white space, quotes, markup and a full stop around it.
fn bare(word: &str) -> &str {
    word.trim_matches(|character: char| character.is_whitespace() || "\"'`*_.“”‘’[](){}<>!,#".contains(character))
}

fn bare_end(word: &str) -> &str {
    word.trim_start_matches(|character: char| character.is_whitespace() || "\"'`*_".contains(character))
}

/// How the labels of a file are read.
#[derive(Clone, Debug, PartialEq)]
pub struct LabelMap {
    labels: Arc<[String]>,
    explicit: BTreeMap<String, usize>,
    signed: bool,
}

impl Default for LabelMap {
    fn default() -> Self {
        Self::of(&LABELS)
    }
}

impl LabelMap {
    /// Maps to these labels: to each by its name, and by the synonyms of Positive, Neutral and Negative to those of them that are
    /// there. Words of degree ("very positive") are synonyms only where these three are all there is.
    pub fn of<S: AsRef<str>>(labels: &[S]) -> Self {
        let labels = labels.iter().map(|l| l.as_ref().to_owned()).collect();
        Self { labels, explicit: BTreeMap::new(), signed: false }
    }

    /// An explicit map such as `0=Negative,1=Neutral,2=Positive`; words that it does not name keep their usual meaning.
    ///
    /// # Errors
    ///
    /// If an entry is not `value=label` with a label that is one of ours or a synonym, or a value is named twice.
    pub fn parse(text: &str) -> Result<Self> {
        Self::default().with(text)
    }

    /// This map with the entries of an explicit one, such as `0=Bearish,1=Bullish`.
    ///
    /// # Errors
    ///
    /// As [`parse`](Self::parse).
    pub fn with(mut self, text: &str) -> Result<Self> {
        for entry in text.split(',').map(str::trim).filter(|entry| !entry.is_empty()) {
            let wrong = |what: String| {
                let example: Vec<String> =
                    self.labels.iter().rev().take(3).enumerate().map(|(n, label)| format!("{n}={label}")).collect();
                let example =
                    if self.is_usual() { "0=Negative,1=Neutral,2=Positive".into() } else { example.join(",") };
                Error::usage(format!("label map entry {entry:?}: {what}\n  hint: write it as {example}"))
            };
            let (value, label) = entry.rsplit_once('=').ok_or_else(|| wrong("expected value=label".into()))?;
            let label = self.word(label).ok_or_else(|| wrong(format!("expected {} after =", self.listed())))?;
            if self.explicit.contains_key(&fold(value)) {
                return Err(wrong("this value was mapped before".into()));
            }
            self.explicit.insert(fold(value), label);
        }
        Ok(self)
    }

    /// This map with what a file's own class names say: number → name. No entries if one of the names is no label.
    pub(crate) fn with_class_names(mut self, names: &[String]) -> Self {
        let found: Option<BTreeMap<String, usize>> =
            names.iter().enumerate().map(|(number, name)| Some((number.to_string(), self.word(name)?))).collect();
        self.explicit.extend(found.unwrap_or_default());
        self
    }

    /// Whether the labels are Positive, Neutral and Negative.
    fn is_usual(&self) -> bool {
        self.labels.iter().eq(LABELS.iter())
    }

    /// "Positive, Neutral or Negative".
    fn listed(&self) -> String {
        match &self.labels[..] {
            [head @ .., last] if !head.is_empty() => format!("{} or {last}", head.join(", ")),
            all => all.join(""),
        }
    }

    /// The label that a word means by itself.
    fn word(&self, word: &str) -> Option<usize> {
        let same = |a: &str, b: &str| {
            let plain = |x: &str| x.to_lowercase().replace(['_', '-'], " ");
            plain(a.trim()) == plain(b.trim())
        };
        if let Some(named) = self.labels.iter().position(|label| same(label, word) || same(label, bare(word))) {
            return Some(named);
        }
        let canonical = canonical_label(word)?;
        // Where there are more labels than three, a "mildly positive" may be any of them.
        let graded = bare(word).contains([' ', '_', '-']);
        if graded && !self.is_usual() {
            return None;
        }
        self.labels.iter().position(|label| label == canonical)
    }

    pub(crate) fn is_explicit(&self) -> bool {
        !self.explicit.is_empty()
    }

    /// Looks at the first labels of a file: where there is a -1 and nothing but -1, 0 and 1 among the numbers, they are
    /// signs.
    pub(crate) fn learn<'a>(&mut self, labels: impl Iterator<Item = &'a str>) {
        if self.is_explicit() {
            return;
        }
        let (mut negative, mut others) = (false, false);
        for number in labels.filter_map(|label| label.trim().parse::<f64>().ok()) {
            negative |= number == -1.0;
            others |= ![-1.0, 0.0, 1.0].contains(&number);
        }
        self.signed = negative && !others;
    }

    /// The label that `value` stands for.
    pub fn map(&self, value: &str) -> Option<&str> {
        self.index(value).map(|label| self.labels[label].as_str())
    }

    fn index(&self, value: &str) -> Option<usize> {
        if let Some(label) = self.explicit.get(&fold(value)) {
            return Some(*label);
        }
        if self.signed && self.is_usual() {
            match value.trim().parse::<f64>() {
                Ok(1.0) => return Some(0),
                Ok(0.0) => return Some(1),
                Ok(-1.0) => return Some(2),
                _ => {}
            }
        }
        self.word(value)
    }

    /// Why `value` has no label, with the mend.
    pub(crate) fn complaint(&self, value: &str) -> String {
        let shown: String = value.chars().take(40).collect();
        if shown.trim().is_empty() {
            return "the label is empty".into();
        }
        if value.trim().parse::<f64>().is_ok() {
            let example: Vec<String> =
                self.labels.iter().take(3).enumerate().map(|(n, label)| format!("{n}={label}")).collect();
            let example = if self.is_usual() { "0=Negative,1=Neutral,2=Positive".into() } else { example.join(",") };
            return format!(
                "label {shown:?} is a number whose meaning is not known\n  hint: say what the numbers mean, for example \
                 --label-map {example}"
            );
        }
        let middle = self.labels.get(self.labels.len() / 2).map_or("", String::as_str);
        format!(
            "unknown label {shown:?}, expected {}\n  hint: map it, for example --label-map {}={middle}, or name the labels of \
             the data with --labels",
            self.listed(),
            shown.trim()
        )
    }
}

/// Numbers written as floats (`1.0`) name the same class as integers.
fn fold(value: &str) -> String {
    let value = value.trim();
    match value.parse::<f64>() {
        Ok(number) if number.fract() == 0.0 && number.abs() < 1e15 => format!("{}", number as i64),
        _ => value.to_lowercase(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words() {
        for word in [
            "Positive",
            " positive. ",
            "**Bullish**",
            "Label: positive",
            "\"pos\"",
            "Sentiment = POSITIVE",
            "Very_Positive",
        ] {
            assert_eq!(canonical_label(word), Some("Positive"), "{word}");
        }
        assert_eq!(canonical_label("Answer - neutral"), Some("Neutral"));
        assert_eq!(canonical_label("bearish"), Some("Negative"));
        for word in ["", "Positive because it rises", "not negative", "1", "label", "é", "class act"] {
            assert_eq!(canonical_label(word), None, "{word}");
        }
    }

    #[test]
    fn numbers_need_a_reason() {
        let mut map = LabelMap::default();
        assert_eq!(map.map("1"), None);
        map.learn(["1", "0", "1"].into_iter());
        assert_eq!(map.map("1"), None, "0 and 1 alone say nothing");
        map.learn(["1", "0", "-1.0"].into_iter());
        assert_eq!(
            [map.map("1.0"), map.map("0"), map.map("-1")],
            [Some("Positive"), Some("Neutral"), Some("Negative")]
        );
        map.learn(["-1", "2"].into_iter());
        assert_eq!(map.map("-1"), None, "a 2 among them: not signs");

        let map = LabelMap::parse("0=bearish, 1=Bullish,2=Neutral,hold=neutral").unwrap();
        assert_eq!(
            [map.map("0"), map.map("1.0"), map.map("Hold"), map.map("neg"), map.map("3")],
            [Some("Negative"), Some("Positive"), Some("Neutral"), Some("Negative"), None]
        );
        assert!(map.complaint("3").contains("--label-map"));
        for wrong in ["0", "0=up", "0=Positive,0.0=Negative"] {
            assert!(LabelMap::parse(wrong).unwrap_err().to_string().contains("hint"), "{wrong}");
        }
        assert!(!LabelMap::default().with_class_names(&["LABEL_0".into()]).is_explicit());
        assert_eq!(LabelMap::default().with_class_names(&["bearish".into()]).map("0"), Some("Negative"));
    }

    #[test]
    fn labels_of_the_user() {
        let map = LabelMap::of(&["Positive", "Neutral", "Negative", "Mixed"]);
        assert_eq!(
            ["mixed", "Bullish", "neg", "**Neutral**", "mildly positive"].map(|w| map.map(w)),
            [Some("Mixed"), Some("Positive"), Some("Negative"), Some("Neutral"), None]
        );
        let map = LabelMap::of(&["Very negative", "Negative", "Neutral", "Positive", "Very positive"]);
        assert_eq!(
            ["very_positive", "Very Negative", "positive", "strongly positive", "-1"].map(|w| map.map(w)),
            [Some("Very positive"), Some("Very negative"), Some("Positive"), None, None]
        );
        let mut map = LabelMap::of(&["Bullish", "Bearish"]);
        map.learn(["1", "-1"].into_iter());
        // The names of others are not ours: a bullish file is no positive one here, and signs mean nothing.
        assert_eq!(
            ["bullish", "BEARISH", "positive", "1"].map(|w| map.map(w)),
            [Some("Bullish"), Some("Bearish"), None, None]
        );
        let map = map.with("1=Bullish,-1=bearish,up=Bullish").unwrap();
        assert_eq!(["1", "-1.0", "Up"].map(|w| map.map(w)), [Some("Bullish"), Some("Bearish"), Some("Bullish")]);
        let error = map.clone().with("0=Neutral").unwrap_err().to_string();
        assert!(
            error.contains("expected Bullish or Bearish after =") && error.contains("0=Bearish,1=Bullish"),
            "{error}"
        );
        let complaint = map.complaint("sideways");
        assert!(complaint.contains("expected Bullish or Bearish\n  hint: map it"), "{complaint}");
        assert!(LabelMap::of(&["A", "B"]).complaint("2").contains("--label-map 0=A,1=B"));
    }
}
