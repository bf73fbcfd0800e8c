//! From a text to token ids: the system message, the chat template, the label words.
//!
//! Training, evaluation, the command line and a service all build their prompts here, so a model cannot be served
//! differently from how it was trained.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::chat::{ChatTemplate, Message};
use crate::error::{Error, Result};
use crate::packing::TokenizedExample;
use crate::tokenizer::Tokenizer;

/// A class and the word that the model answers with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Label {
    pub name: String,
    pub word: String,
}

impl Label {
    pub fn new(name: &str) -> Self {
        Self { name: name.into(), word: name.into() }
    }
}

/// What happens to a text that is too long for `max_seq_length`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TooLong {
    /// The end of the text is cut off; prompt and answer stay whole.
    #[default]
    Truncate,
    Error,
}

/// Everything that turns a text into tokens.
pub struct PromptFormat {
    tokenizer: Arc<Tokenizer>,
    template: ChatTemplate,
    system_message: Option<String>,
    labels: Vec<Label>,
    max_seq_length: usize,
    too_long: TooLong,
    /// Tokens that every prompt starts with.
    prefix: Vec<u32>,
    /// Per label: the answer's tokens with what ends the turn, and how many of them are the label itself.
    answers: Vec<(Vec<u32>, usize)>,
}

impl PromptFormat {
    /// # Errors
    /// Fewer than two labels, labels that tokenize alike, a template that cannot be rendered, or a prompt that leaves no room
    /// within `max_seq_length`.
    pub fn new(
        tokenizer: Arc<Tokenizer>,
        template: ChatTemplate,
        system_message: Option<String>,
        labels: Vec<Label>,
        max_seq_length: usize,
        too_long: TooLong,
    ) -> Result<Self> {
        if labels.len() < 2 {
            return Err(Error::Invalid(format!("a classifier needs at least two labels, found {}", labels.len())));
        }
        let mut format = Self {
            tokenizer,
            template,
            system_message: system_message.filter(|s| !s.trim().is_empty()),
            labels,
            max_seq_length,
            too_long,
            prefix: Vec::new(),
            answers: Vec::new(),
        };
        // What two texts that begin differently have in common is what all texts have in common.
        let (a, b) = (format.tokens("a", None)?, format.tokens("1", None)?);
        let shared = a.iter().zip(&b).take_while(|(a, b)| a == b).count();
        format.prefix = a[..shared].to_vec();
        for label in &format.labels {
            let full = format.tokens("a", Some(&label.word))?;
            let start = full.iter().zip(&a).take_while(|(x, y)| x == y).count();
            if start < a.len() {
                return Err(Error::Template(format!(
                    "the prompt is not the beginning of the prompt with the answer {:?}: this template cannot be used for classification",
                    label.word
                )));
            }
            let mut answer = full[start..].to_vec();
            // Behind the token that ends the turn some templates write a newline; nobody has to predict it.
            if let Some(end) = answer.iter().rposition(|&t| format.tokenizer.is_special(t)) {
                answer.truncate(end + 1);
            }
            let is_end =
                |t: u32| format.tokenizer.is_special(t) || format.tokenizer.decode(&[t], false).trim().is_empty();
            let words = answer.iter().rposition(|&t| !is_end(t)).map_or(0, |i| i + 1);
            if words == 0 {
                return Err(Error::Invalid(format!("label {:?} has no token of its own", label.word)));
            }
            format.answers.push((answer, words));
        }
        for i in 0..format.answers.len() {
            for j in 0..i {
                if format.label_tokens(i) == format.label_tokens(j) {
                    return Err(Error::Invalid(format!(
                        "labels {:?} and {:?} have the same tokens: give them different words",
                        format.labels[i].word, format.labels[j].word
                    )));
                }
            }
        }
        let longest = format.answers.iter().map(|(a, _)| a.len()).max().unwrap_or(0);
        if a.len() + longest > max_seq_length {
            return Err(Error::Invalid(format!(
                "the prompt without a text already has {} tokens with its answer, max_seq_length is {max_seq_length}\n  hint: shorten the system message or raise max_seq_length",
                a.len() + longest - 1
            )));
        }
        Ok(format)
    }

    fn tokens(&self, text: &str, answer: Option<&str>) -> Result<Vec<u32>> {
        let mut messages = Vec::with_capacity(3);
        let message = |role: &str, content: &str| Message { role: role.into(), content: content.into() };
        messages.extend(self.system_message.as_deref().map(|s| message("system", s)));
        messages.push(message("user", text));
        messages.extend(answer.map(|a| message("assistant", a)));
        let rendered = self.template.render(&messages, answer.is_none())?;
        Ok(self.tokenizer.encode_rendered(&rendered))
    }

    pub fn labels(&self) -> &[Label] {
        &self.labels
    }

    pub fn label_names(&self) -> Vec<String> {
        self.labels.iter().map(|l| l.name.clone()).collect()
    }

    pub fn system_message(&self) -> Option<&str> {
        self.system_message.as_deref()
    }

    pub fn tokenizer(&self) -> &Arc<Tokenizer> {
        &self.tokenizer
    }

    pub fn max_seq_length(&self) -> usize {
        self.max_seq_length
    }

    /// Tokens that every prompt starts with: what a prefix cache holds.
    pub fn prefix(&self) -> &[u32] {
        &self.prefix
    }

    /// The tokens of a label's word, without what ends the turn.
    pub fn label_tokens(&self, label: usize) -> &[u32] {
        let (answer, words) = &self.answers[label];
        &answer[..*words]
    }

    /// The tokens of the prompt for a text, up to where the answer begins.
    ///
    /// # Errors
    /// A text that is too long, if that is asked to be an error.
    pub fn prompt(&self, text: &str) -> Result<Vec<u32>> {
        let room = self.max_seq_length - self.answers.iter().map(|(a, _)| a.len()).max().unwrap_or(0);
        // No token of a usable vocabulary covers more than this, so a longer text cannot fit; the cut keeps a text of
        // megabytes from being tokenized for nothing.
        const LONGEST_TOKEN: usize = 64;
        let cut = floor_char_boundary(text, room.saturating_mul(LONGEST_TOKEN));
        if cut == text.len() {
            let tokens = self.tokens(text, None)?;
            if tokens.len() <= room {
                return Ok(tokens);
            }
        }
        if self.too_long == TooLong::Error {
            return Err(Error::Invalid(format!(
                "a text of {} bytes has more than {room} tokens with its prompt\n  hint: raise max_seq_length, or truncate",
                text.len()
            )));
        }
        // Longest beginning of the text that fits; the number of tokens grows with the length but for a token or two.
        let (mut fits, mut low, mut high) = (self.tokens("", None)?, 0, cut);
        while low < high {
            let middle = floor_char_boundary(text, (low + high).div_ceil(2));
            let middle = if middle <= low { next_char_boundary(text, low) } else { middle };
            if middle > high {
                break;
            }
            let tokens = self.tokens(&text[..middle], None)?;
            if tokens.len() <= room {
                (fits, low) = (tokens, middle);
            } else {
                high = floor_char_boundary(text, middle - 1);
            }
        }
        Ok(fits)
    }

    /// Prompt and answer, for training and for the loss.
    pub fn example(&self, text: &str, label: usize, weight: f32) -> Result<TokenizedExample> {
        let mut tokens = self.prompt(text)?;
        let answer_start = tokens.len();
        tokens.extend_from_slice(&self.answers[label].0);
        Ok(TokenizedExample { tokens, answer_start, weight })
    }
}

fn floor_char_boundary(text: &str, mut at: usize) -> usize {
    if at >= text.len() {
        return text.len();
    }
    while !text.is_char_boundary(at) {
        at -= 1;
    }
    at
}

fn next_char_boundary(text: &str, at: usize) -> usize {
    text[at..].chars().next().map_or(at, |c| at + c.len_utf8())
}
