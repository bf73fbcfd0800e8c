//! What the pipeline asks of a model, and which of its labels are good news and which bad.

use serde_json::{Value, json};

use crate::error::{Error, Result};
use crate::post::{digest, hex};

/// What the numbers were made with; it stands beside each of them.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelInfo {
    pub name: String,
    pub adapter: Option<String>,
    pub labels: Vec<String>,
    pub temperature: f32,
    pub model_hash: String,
    pub adapter_hash: Option<String>,
    pub prompt_hash: String,
}

impl ModelInfo {
    /// One word for all that decides a score: posts are counted once for each.
    pub fn version(&self) -> String {
        let adapter = self.adapter_hash.as_deref().unwrap_or("");
        let labels = self.labels.join("\n");
        hex(&digest(&[self.model_hash.as_bytes(), adapter.as_bytes(), self.prompt_hash.as_bytes(), labels.as_bytes()])
            [..8])
    }

    pub fn to_json(&self) -> Value {
        json!({"name": self.name, "adapter": self.adapter, "labels": self.labels, "temperature": self.temperature})
    }
}

/// A model. It stays on the thread that runs the pipeline, so it need not be `Send`.
pub trait Scorer {
    fn info(&self) -> ModelInfo;

    /// Texts that are scored at a time; what a request to classify waits for.
    fn batch(&self) -> usize {
        32
    }

    /// A probability for each label, for each text.
    ///
    /// # Errors
    /// Why it failed. The pipeline tries the texts one by one then, so that only the culprit is set aside.
    fn score(&mut self, texts: &[&str]) -> Result<Vec<Vec<f32>>, String>;
}

/// Where good and bad news stand among the labels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Polarity {
    pub positive: usize,
    pub negative: usize,
}

impl Polarity {
    /// # Errors
    /// Labels without a positive and a negative one: there is no score then.
    pub fn of(labels: &[String]) -> Result<Self> {
        let find = |names: &[&str]| labels.iter().position(|l| names.contains(&l.to_lowercase().as_str()));
        match (find(&["positive", "bullish"]), find(&["negative", "bearish"])) {
            (Some(positive), Some(negative)) => Ok(Self { positive, negative }),
            _ => Err(Error::Invalid(format!(
                "signals need a label Positive (or Bullish) and a label Negative (or Bearish); the model has {}\n  \
                 hint: --labels, or an adapter that was trained with them",
                labels.join(", ")
            ))),
        }
    }

    /// p(Positive) − p(Negative).
    pub fn score(self, probabilities: &[f32]) -> f64 {
        let p = |i: usize| probabilities.get(i).copied().map_or(0.0, f64::from);
        p(self.positive) - p(self.negative)
    }
}

/// What is wrong with a model's answer, if something is: every probability must be one.
pub(crate) fn check(probabilities: &[f32], labels: usize) -> Result<(), String> {
    let sum: f32 = probabilities.iter().sum();
    let sound = probabilities.iter().all(|p| (0.0..=1.001).contains(p)) && (sum - 1.0).abs() < 0.01;
    if probabilities.len() == labels && sound { Ok(()) } else { Err(format!("no probabilities: {probabilities:?}")) }
}

/// The label with the highest probability; the first of equals.
pub(crate) fn best(probabilities: &[f32]) -> usize {
    let mut top = 0;
    for (i, p) in probabilities.iter().enumerate() {
        if *p > probabilities[top] {
            top = i;
        }
    }
    top
}

/// Scores texts together; if that fails, one by one, so that a text that the model cannot take harms no other.
pub(crate) fn score_each(scorer: &mut dyn Scorer, texts: &[&str], labels: usize) -> Vec<Result<Vec<f32>, String>> {
    let mut answers = Vec::with_capacity(texts.len());
    for chunk in texts.chunks(scorer.batch().max(1)) {
        match scorer.score(chunk) {
            Ok(all) if all.len() == chunk.len() && all.iter().all(|p| check(p, labels).is_ok()) => {
                answers.extend(all.into_iter().map(Ok));
            }
            _ => answers.extend(chunk.iter().map(|text| -> Result<Vec<f32>, String> {
                let alone = scorer.score(&[*text])?;
                let probabilities = alone.into_iter().next().ok_or("the model gave no answer")?;
                check(&probabilities, labels)?;
                Ok(probabilities)
            })),
        }
    }
    answers
}
