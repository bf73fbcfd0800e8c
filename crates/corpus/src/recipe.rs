//! What is asked of the chat model, word for word: the recipe.
//!
//! The default is the recipe of the write-up that this project follows: one task description, 100 examples at temperature
//! 0.5, up to eight random earlier examples shown as assistant turns, at most 1,000 tokens an answer, and a second call
//! that writes the system message (at most 500). The write-up never sent its own task and format to the model; we do, and
//! by default we also say which kind of tweet is wanted, so that the set comes out balanced.

use serde_json::{Value, json};

use crate::example::{EVENTS, Example, LABELS, SECTORS};
use crate::rng::Rng;

/// The task, as the write-up words it.
pub const TASK_PROMPT: &str = "A model that takes in a tweet related to stock market trends and classifies the sentiment as \
                               Positive, Neutral, or Negative.";

/// What the fine-tuned model is told if no system message was written for it.
pub const DEFAULT_SYSTEM_MESSAGE: &str = "Given a tweet about the stock market, classify its sentiment towards the stock or \
                                          the market as Positive, Neutral, or Negative. Answer with that one word.";

/// Kinds of text that can be asked for. The first four and `targeted` are kinds of [`Example`]; `headline` and `chatter`
/// ask for a plain text in that register.
pub const QUOTA_KINDS: [&str; 7] = ["plain", "mixed", "sarcastic", "contextual", "targeted", "headline", "chatter"];

/// How answers are to be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AnswerFormat {
    /// One JSON object, enforced by a schema.
    Json,
    /// The tweet, a line of dashes, the label.
    Text,
}

/// What one tweet should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wish {
    pub label: &'static str,
    pub kind: &'static str,
    pub register: &'static str,
    pub sector: &'static str,
    pub event: &'static str,
}

/// Shares by label and by kind: any non-negative weights.
#[derive(Clone, Debug, PartialEq)]
pub struct Quotas {
    /// One weight per label, in the order of [`LABELS`].
    pub labels: [f64; 3],
    /// Weights by name, of [`QUOTA_KINDS`].
    pub kinds: Vec<(&'static str, f64)>,
}

impl Default for Quotas {
    fn default() -> Self {
        let kinds = [
            ("headline", 4.0),
            ("chatter", 4.0),
            ("mixed", 2.0),
            ("sarcastic", 2.0),
            ("contextual", 2.0),
            ("targeted", 1.0),
        ];
        Self { labels: [1.0; 3], kinds: kinds.to_vec() }
    }
}

impl Quotas {
    /// Reads `name=weight,…` over the default; names are labels or kinds. Naming one kind sets those not named to zero,
    /// and likewise for labels.
    ///
    /// # Errors
    ///
    /// A message, for unknown names and weights that are no non-negative numbers, or if no combination remains.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut labels: Option<[f64; 3]> = None;
        let mut kinds: Vec<(&'static str, f64)> = Vec::new();
        for entry in text.split(',').map(str::trim).filter(|entry| !entry.is_empty()) {
            let (name, weight) = entry.split_once('=').unwrap_or((entry, "1"));
            let weight: f64 = weight
                .trim()
                .parse()
                .ok()
                .filter(|weight: &f64| weight.is_finite() && *weight >= 0.0)
                .ok_or_else(|| format!("quota {entry:?}: expected name=weight with a weight of 0 or more"))?;
            let same = |known: &&str| known.eq_ignore_ascii_case(name.trim());
            if let Some(index) = LABELS.iter().position(&same) {
                labels.get_or_insert([0.0; 3])[index] = weight;
            } else if let Some(kind) = QUOTA_KINDS.iter().copied().find(|known| same(known)) {
                kinds.push((kind, weight));
            } else {
                return Err(format!(
                    "quota {entry:?}: unknown name\n  hint: the labels are {}, the kinds {}",
                    LABELS.join(", "),
                    QUOTA_KINDS.join(", ")
                ));
            }
        }
        let mut quotas = Self::default();
        quotas.labels = labels.unwrap_or(quotas.labels);
        if !kinds.is_empty() {
            quotas.kinds = kinds;
        }
        if quotas.cells().is_empty() {
            return Err("the quotas leave nothing to ask for\n  hint: mixed tweets are always Neutral".into());
        }
        Ok(quotas)
    }

    /// The combinations of label and kind that are asked for.
    fn cells(&self) -> Vec<(usize, &'static str)> {
        let mut cells = Vec::new();
        for (label, weight) in self.labels.iter().enumerate() {
            for (kind, kind_weight) in &self.kinds {
                if *weight > 0.0 && *kind_weight > 0.0 && allowed(label, kind) {
                    cells.push((label, *kind));
                }
            }
        }
        cells
    }

    /// The wishes for tweets 0 to `count`: label and kind go to whoever is furthest behind its share, sectors and events
    /// take turns. Asking for more tweets later leaves the earlier wishes as they were.
    pub fn wishes(&self, count: usize, seed: u64) -> Vec<Wish> {
        let cells = self.cells();
        let label_total: f64 = self.labels.iter().sum();
        let kind_total: f64 = self.kinds.iter().map(|(_, weight)| weight).sum();
        let mut rng = Rng::keyed(seed, &[0x77_69_73_68]);
        let mut labels = [0.0f64; 3];
        let mut kinds = vec![0.0f64; self.kinds.len()];
        let (mut sectors, mut events) = (Vec::new(), Vec::new());
        let mut wishes = Vec::with_capacity(count);
        for number in 0..count {
            let behind = |label: usize, kind: usize| {
                let turn = number as f64 + 1.0;
                (self.labels[label] / label_total * turn - labels[label])
                    + (self.kinds[kind].1 / kind_total * turn - kinds[kind])
            };
            let mut best: Option<(f64, usize, usize)> = None;
            for (label, name) in &cells {
                let kind = self.kinds.iter().position(|(kind, _)| kind == name).unwrap_or(0);
                // A grain of chance breaks ties, so that the same combinations do not always follow each other.
                let score = behind(*label, kind) + 0.3 * rng.unit();
                if best.is_none_or(|(highest, _, _)| score > highest) {
                    best = Some((score, *label, kind));
                }
            }
            let Some((_, label, kind)) = best else { break };
            labels[label] += 1.0;
            kinds[kind] += 1.0;
            let (kind, register) = match self.kinds[kind].0 {
                "headline" => ("plain", "headline"),
                "chatter" => ("plain", "chatter"),
                kind => (kind, if rng.below(2) == 0 { "headline" } else { "chatter" }),
            };
            let sector = take_turn(&mut sectors, &SECTORS, &mut rng);
            let event = take_turn(&mut events, &EVENTS, &mut rng);
            wishes.push(Wish { label: LABELS[label], kind, register, sector, event });
        }
        wishes
    }
}

/// Two directions of similar weight are Neutral by definition; irony that ends up nowhere is hardly ever meant.
fn allowed(label: usize, kind: &str) -> bool {
    match kind {
        "mixed" => label == 1,
        "sarcastic" | "targeted" => label != 1,
        _ => true,
    }
}

fn take_turn(deck: &mut Vec<&'static str>, all: &[&'static str], rng: &mut Rng) -> &'static str {
    if deck.is_empty() {
        deck.extend(all.iter().filter(|value| !matches!(**value, "other" | "off-topic" | "spam")));
        rng.shuffle(deck);
    }
    deck.pop().unwrap_or("other")
}

/// The system message of the request for one tweet.
pub fn generation_system(task: &str, format: AnswerFormat) -> String {
    let answer = match format {
        AnswerFormat::Json => {
            "Answer with one JSON object and nothing else: {\"tweet\": \"…\", \"label\": \"Positive\"}. The label is exactly \
             Positive, Neutral or Negative."
        }
        AnswerFormat::Text => {
            "Answer with the tweet, then a line that holds only ---, then the label, and nothing else:\n\n\
             the text of the tweet\n---\nPositive\n\nThe label is exactly Positive, Neutral or Negative."
        }
    };
    format!(
        "You write training data for a machine-learning model. This is the model that will be trained:\n\n{task}\n\n\
         Each time you are asked, write one new example: a tweet as it could stand on the timeline of somebody who follows \
         the stock market, and its label. The label says where the text sees the stock, the sector or the market going or \
         how it says they are doing; it is not the mood of the writer. Facts without a direction, questions, and two \
         directions of equal weight are Neutral.\n\n\
         Vary companies, sectors, events, length, spelling and voice. Do not repeat or lightly reword an earlier example. \
         Do not quote real people, and invent the company where the news would harm a real one. At most 280 \
         characters.\n\n{answer}"
    )
}

/// The user message: what this tweet should be, if there is a wish, and what to avoid after a rejected answer.
pub fn generation_request(wish: Option<&Wish>, rejected_because: Option<&str>) -> String {
    let mut request = match wish {
        None => "Write the next example.".to_owned(),
        Some(wish) => {
            let register = match wish.register {
                "headline" => "a news headline as it is tweeted",
                _ => "a trader's own tweet, in the language of such tweets",
            };
            let kind = match wish.kind {
                "mixed" => "It holds good and bad news of the same weight, so that neither wins.",
                "sarcastic" => {
                    "It is sarcastic: the words say the opposite of what is meant. The label follows the meaning."
                }
                "contextual" => {
                    "The words alone would mislead: only the situation that the text describes decides the label."
                }
                "targeted" => {
                    "It names several companies or tickers, one of which is clearly its subject and decides the label."
                }
                _ => "It says what it means.",
            };
            format!(
                "Write the next example: {register}. Label: {}. Sector: {}. Occasion: {}. {kind}",
                wish.label,
                wish.sector.replace('-', " "),
                wish.event.replace('-', " ")
            )
        }
    };
    if let Some(reason) = rejected_because {
        request.push_str(&format!(" (The last answer could not be used: {reason}. Write a different one.)"));
    }
    request
}

/// An earlier example as an assistant turn, in the format that is asked for.
pub fn shown_example(example: &Example, format: AnswerFormat) -> String {
    match format {
        AnswerFormat::Json => json!({"tweet": example.text, "label": example.label}).to_string(),
        AnswerFormat::Text => format!("{}\n---\n{}", example.text, example.label),
    }
}

/// The system message of the request for a system message.
pub fn system_message_request() -> &'static str {
    "You are given the description of a model that is being trained. Write the system message under which that model will \
     be used: one or two sentences that say what it is given and what it has to answer, for example \"Given a review, answer \
     whether its author would buy again: Yes or No.\" Write for its use, not for the writing of training data. Answer with the \
     system message only."
}

/// The `response_format` that makes a server answer in [`AnswerFormat::Json`]; with a wish, only its label is possible.
pub fn response_format(wish: Option<&Wish>) -> Value {
    let labels = wish.map_or_else(|| json!(LABELS), |wish| json!([wish.label]));
    json!({
        "type": "json_schema",
        "json_schema": {
            "name": "labelled_tweet",
            "strict": true,
            "schema": {
                "type": "object",
                "properties": {
                    "tweet": {"type": "string", "description": "the text of the tweet"},
                    "label": {"type": "string", "enum": labels}
                },
                "required": ["tweet", "label"],
                "additionalProperties": false
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wishes_are_balanced_and_stable() {
        let quotas = Quotas::default();
        let wishes = quotas.wishes(300, 9);
        for label in LABELS {
            let count = wishes.iter().filter(|wish| wish.label == label).count();
            assert!((95..=105).contains(&count), "{label}: {count}");
        }
        for (kind, expected) in [("mixed", 40), ("sarcastic", 40), ("contextual", 40), ("targeted", 20)] {
            let count = wishes.iter().filter(|wish| wish.kind == kind).count();
            assert!(count.abs_diff(expected) <= 4, "{kind}: {count}");
        }
        assert!(wishes.iter().all(|wish| wish.kind != "mixed" || wish.label == "Neutral"));
        assert_eq!(wishes[..100], quotas.wishes(100, 9));
        assert_ne!(wishes[..100], quotas.wishes(100, 10));
        let sectors: std::collections::HashSet<&str> = wishes.iter().map(|wish| wish.sector).collect();
        assert_eq!(sectors.len(), SECTORS.len() - 1, "every sector but `other`");
    }

    #[test]
    fn quotas_from_text() {
        let quotas = Quotas::parse("mixed=1, plain=3, neutral=2, Positive=1").unwrap();
        assert_eq!(quotas.labels, [1.0, 2.0, 0.0]);
        let wishes = quotas.wishes(40, 0);
        assert!(wishes.iter().all(|wish| wish.label != "Negative"));
        assert!(Quotas::parse("plain=-1").unwrap_err().contains("weight"));
        assert!(Quotas::parse("sector=1").unwrap_err().contains("unknown name"));
        assert!(Quotas::parse("mixed=1,positive=1").unwrap_err().contains("nothing to ask for"));
        assert_eq!(Quotas::parse("").unwrap(), Quotas::default());
    }

    #[test]
    fn the_task_and_the_format_are_sent() {
        for format in [AnswerFormat::Json, AnswerFormat::Text] {
            let system = generation_system(TASK_PROMPT, format);
            assert!(system.contains(TASK_PROMPT));
            let shown = shown_example(&Example::new("a \"b\"", "Neutral"), format);
            assert_eq!(crate::parse::parse_answer(&shown).unwrap(), Example::new("a \"b\"", "Neutral"));
        }
        assert!(generation_system("x", AnswerFormat::Text).contains("\n---\n"));
        let wish = Quotas::default().wishes(1, 1).remove(0);
        assert!(
            generation_request(Some(&wish), Some("the text is empty")).contains(&format!("Label: {}.", wish.label))
        );
    }
}
