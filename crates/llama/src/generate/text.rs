//! From tokens to the text that a reader may see: whole characters only, and nothing of a stop string.

use crate::tokenizer::{Detokenizer, Tokenizer};

/// The text of one sequence. What could still become a stop string is held back until it cannot.
#[derive(Clone, Debug)]
pub(super) struct TextStream {
    decoder: Detokenizer,
    stop: Vec<String>,
    held: String,
}

impl TextStream {
    /// `continues`: the sequence goes on with a text that stands in front of it.
    pub(super) fn new(stop: Vec<String>, continues: bool) -> Self {
        let stop = stop.into_iter().filter(|s| !s.is_empty()).collect();
        Self { decoder: Detokenizer::new(true, continues), stop, held: String::new() }
    }

    /// The text that this token releases, and whether a stop string stands behind it.
    pub(super) fn push(&mut self, tokenizer: &Tokenizer, token: u32) -> (String, bool) {
        let text = self.decoder.push(tokenizer, token);
        self.take(&text)
    }

    /// What was held back when no more tokens come, and whether it ends in a stop string after all (an incomplete
    /// character may complete one).
    pub(super) fn finish(&mut self, tokenizer: &Tokenizer) -> (String, bool) {
        let text = self.decoder.finish(tokenizer);
        let (mut text, stopped) = self.take(&text);
        if !stopped {
            text += &std::mem::take(&mut self.held);
        }
        (text, stopped)
    }

    fn take(&mut self, text: &str) -> (String, bool) {
        self.held.push_str(text);
        if let Some(at) = self.stop.iter().filter_map(|s| self.held.find(s.as_str())).min() {
            self.held.truncate(at);
            return (std::mem::take(&mut self.held), true);
        }
        // The longest end of the text that a stop string begins with.
        let keep = self.stop.iter().map(|s| overlap(&self.held, s)).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        (std::mem::replace(&mut self.held, rest), false)
    }
}

/// Bytes at the end of `text` that are a proper beginning of `stop`.
fn overlap(text: &str, stop: &str) -> usize {
    let longest = text.len().min(stop.len().saturating_sub(1));
    (1..=longest).rev().find(|&n| stop.is_char_boundary(n) && text.ends_with(&stop[..n])).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(stop: &[&str], parts: &[&str]) -> (Vec<String>, bool) {
        let mut stream = TextStream::new(stop.iter().map(|s| s.to_string()).collect(), false);
        let mut out = Vec::new();
        for part in parts {
            let (text, stopped) = stream.take(part);
            out.push(text);
            if stopped {
                return (out, true);
            }
        }
        out.push(std::mem::take(&mut stream.held));
        (out, false)
    }

    #[test]
    fn a_stop_string_over_several_tokens_is_never_seen() {
        assert_eq!(
            run(&["\n\n"], &["a", "\n", "b\n", "\nc"]),
            (vec!["a".into(), "".into(), "\nb".into(), "".into()], true)
        );
        assert_eq!(
            run(&["END"], &["the E", "N", "d"]),
            (vec!["the ".into(), "".into(), "ENd".into(), "".into()], false)
        );
        // What was held back comes out at the end.
        assert_eq!(run(&["END"], &["E"]), (vec!["".into(), "E".into()], false));
    }

    #[test]
    fn the_first_of_several_wins() {
        assert_eq!(run(&["yz", "x"], &["wxyz"]), (vec!["w".into()], true));
        assert_eq!(
            run(&["", "é!"], &["caf", "é", "?"]),
            (vec!["caf".into(), "".into(), "é?".into(), "".into()], false)
        );
    }
}
