//! Foreign label vocabularies mapped to ours.
//!
//! Words are understood on their own. Numbers are not: `-1/0/1` is taken as it stands only where a `-1` has been seen,
//! and `0/1/2` means something else in every dataset, so it needs an explicit map or the class names that the file
//! carries.

use std::collections::BTreeMap;

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
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LabelMap {
    explicit: BTreeMap<String, &'static str>,
    signed: bool,
}

impl LabelMap {
    /// An explicit map such as `0=Negative,1=Neutral,2=Positive`; words that it does not name keep their usual meaning.
    ///
    /// # Errors
    ///
    /// If an entry is not `value=label` with a label that is one of ours or a synonym, or a value is named twice.
    pub fn parse(text: &str) -> Result<Self> {
        let mut explicit = BTreeMap::new();
        for entry in text.split(',').map(str::trim).filter(|entry| !entry.is_empty()) {
            let wrong = |what: &str| {
                Error::usage(format!(
                    "label map entry {entry:?}: {what}\n  hint: write it as 0=Negative,1=Neutral,2=Positive"
                ))
            };
            let (value, label) = entry.rsplit_once('=').ok_or_else(|| wrong("expected value=label"))?;
            let label =
                canonical_label(label).ok_or_else(|| wrong("expected Positive, Neutral or Negative after ="))?;
            if explicit.insert(fold(value), label).is_some() {
                return Err(wrong("this value was mapped before"));
            }
        }
        Ok(Self { explicit, signed: false })
    }

    /// The map that a file's own class names give: number → name. `None` if one of the names is no label of ours.
    pub(crate) fn from_class_names(names: &[String]) -> Option<Self> {
        let explicit = names
            .iter()
            .enumerate()
            .map(|(number, name)| Some((number.to_string(), canonical_label(name)?)))
            .collect::<Option<_>>()?;
        Some(Self { explicit, signed: false })
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
    pub fn map(&self, value: &str) -> Option<&'static str> {
        if let Some(label) = self.explicit.get(&fold(value)) {
            return Some(label);
        }
        if self.signed {
            match value.trim().parse::<f64>() {
                Ok(1.0) => return Some(LABELS[0]),
                Ok(0.0) => return Some(LABELS[1]),
                Ok(-1.0) => return Some(LABELS[2]),
                _ => {}
            }
        }
        canonical_label(value)
    }

    /// Why `value` has no label, with the mend.
    pub(crate) fn complaint(&self, value: &str) -> String {
        let shown: String = value.chars().take(40).collect();
        if shown.trim().is_empty() {
            return "the label is empty".into();
        }
        if value.trim().parse::<f64>().is_ok() {
            return format!(
                "label {shown:?} is a number whose meaning is not known\n  hint: say what the numbers mean, for example \
                 --label-map 0=Negative,1=Neutral,2=Positive"
            );
        }
        format!(
            "unknown label {shown:?}, expected Positive, Neutral or Negative\n  hint: map it, for example --label-map \
             {}=Neutral",
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
        assert_eq!(LabelMap::from_class_names(&["LABEL_0".into()]), None);
    }
}
