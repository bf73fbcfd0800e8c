//! Answers of chat models, and hand-written text files, as labelled texts.
//!
//! Understood, in this order: JSON (an object, a list, or an object that holds a list; in a code fence or among prose);
//! blocks in which a line of dashes stands between the text and its label, also with headings such as `prompt` and
//! `response`; `Tweet:` and `Label:` lines; `label: tweet` lines. A label is a word on its own: an explanation behind it
//! makes it none, because a model that explains has not done what it was asked.

use serde_json::Value;

use crate::example::Example;
use crate::labels::{LabelMap, canonical_label};

/// Keys under which models put the text and the label when they answer in JSON.
const TEXT_KEYS: [&str; 8] = ["tweet", "text", "prompt", "input", "content", "headline", "sentence", "message"];
const LABEL_KEYS: [&str; 6] = ["label", "sentiment", "response", "output", "answer", "classification"];
/// Lines that only say what follows.
const HEADINGS: [&str; 14] = [
    "prompt",
    "response",
    "tweet",
    "label",
    "text",
    "sentiment",
    "example",
    "input",
    "output",
    "user",
    "assistant",
    "answer",
    "completion",
    "classification",
];

/// The labelled text of a model's answer; if there are several, the first.
///
/// # Errors
///
/// The reason, in a few words, why there is none.
pub fn parse_answer(answer: &str) -> Result<Example, String> {
    let answer = answer.trim();
    if answer.is_empty() {
        return Err("the answer is empty".into());
    }
    let mut first_problem = None;
    for (_, example) in parse_document(answer, &LabelMap::default()) {
        match example {
            Ok(example) => return Ok(example),
            Err(problem) => first_problem = first_problem.or(Some(problem)),
        }
    }
    if looks_like_refusal(answer) {
        return Err("the model refused".into());
    }
    Err(first_problem.unwrap_or_else(|| "no text and label found in it".into()))
}

fn looks_like_refusal(answer: &str) -> bool {
    let start: String = answer.chars().take(60).collect::<String>().to_lowercase().replace('’', "'");
    ["i'm sorry", "i am sorry", "sorry, ", "i cannot", "i can't", "as an ai", "i'm unable", "i am unable", "i won't"]
        .iter()
        .any(|opening| start.starts_with(opening))
}

/// All labelled texts of a document, each with the line (from 1) that it begins in, or what is wrong with it.
pub fn parse_document(content: &str, labels: &LabelMap) -> Vec<(u64, Result<Example, String>)> {
    let content = content.strip_prefix('\u{FEFF}').unwrap_or(content);
    if let Some(found) = parse_json(content, labels) {
        return found;
    }
    if content.lines().any(is_divider) {
        return parse_blocks(content, labels);
    }
    parse_lines(content, labels)
}

fn is_divider(line: &str) -> bool {
    let line = line.trim();
    line.len() >= 3 && line.bytes().all(|byte| byte == b'-')
}

/// `None` if there is no JSON that could be an example.
fn parse_json(content: &str, labels: &LabelMap) -> Option<Vec<(u64, Result<Example, String>)>> {
    let start = content.find(['{', '['])?;
    // Prose that merely contains a bracket is not JSON: what precedes must be a fence or a short lead-in.
    let mut values = serde_json::Deserializer::from_str(&content[start..]).into_iter::<Value>();
    let mut found = Vec::new();
    let mut at = start;
    while let Some(Ok(value)) = values.next() {
        let line = content[..at].lines().count().max(1) as u64;
        let list = match &value {
            Value::Array(list) => list.clone(),
            Value::Object(object) => match object.values().find_map(|value| value.as_array()) {
                Some(list) if TEXT_KEYS.iter().all(|key| !object.contains_key(*key)) => list.clone(),
                _ => vec![value.clone()],
            },
            _ => continue,
        };
        found.extend(list.iter().filter(|item| item.is_object()).map(|item| (line, json_example(item, labels))));
        at = start + values.byte_offset();
    }
    (!found.is_empty()).then_some(found)
}

fn json_example(item: &Value, labels: &LabelMap) -> Result<Example, String> {
    let pick = |keys: &[&str]| -> Option<String> {
        keys.iter().find_map(|key| item.get(key)).and_then(|value| match value {
            Value::String(text) => Some(text.clone()),
            Value::Number(number) => Some(number.to_string()),
            _ => None,
        })
    };
    let text = pick(&TEXT_KEYS).ok_or("the JSON has no \"tweet\"")?;
    let label = pick(&LABEL_KEYS).ok_or("the JSON has no \"label\"")?;
    let mut example = finish(&text, &label, labels)?;
    for field in ["kind", "register", "sector", "event"] {
        if let Some(value) = item.get(field).and_then(Value::as_str) {
            example.set_optional_field(field, value.to_owned());
        }
    }
    Ok(example)
}

/// Text, dashes, label; again and again.
fn parse_blocks(content: &str, labels: &LabelMap) -> Vec<(u64, Result<Example, String>)> {
    let mut found = Vec::new();
    // The lines of the text being gathered, and whether dashes have closed it.
    let mut text: Vec<&str> = Vec::new();
    let (mut begins, mut closed) = (0u64, false);
    // A label that came before its text ("Positive", dashes, text).
    let mut ahead: Option<(u64, String)> = None;
    for (index, line) in content.lines().enumerate() {
        let number = index as u64 + 1;
        let trimmed = line.trim();
        if is_divider(line) {
            if let [only] = text[..]
                && !closed
                && ahead.is_none()
                && labels.map(only).is_some()
            {
                ahead = Some((begins, only.to_owned()));
                text.clear();
            }
            closed = !text.is_empty();
            continue;
        }
        if trimmed.is_empty() {
            if !text.is_empty() && !closed {
                text.push("");
            }
            continue;
        }
        if is_heading(trimmed) {
            continue;
        }
        if closed {
            let joined = text.join("\n");
            found.push((begins, finish(&joined, trimmed, labels)));
            (closed, ahead) = (false, None);
            text.clear();
            continue;
        }
        if text.is_empty() {
            begins = number;
        }
        text.push(line);
    }
    let joined = text.join("\n");
    if let Some((line, label)) = ahead
        && !joined.trim().is_empty()
    {
        found.push((line, finish(&joined, &label, labels)));
    } else if !joined.trim().is_empty() && found.is_empty() {
        found.push((begins, Err("no label follows the dashes".into())));
    }
    found
}

fn is_heading(line: &str) -> bool {
    let word = line.trim_matches(|character: char| !character.is_alphanumeric()).to_ascii_lowercase();
    let word = word.trim_end_matches(|character: char| character.is_ascii_digit() || character == ' ');
    HEADINGS.contains(&word) || matches!(line, "```" | "```text" | "```json")
}

/// `Tweet:` and `Label:` lines, or `label: tweet` lines. Lines that are neither are errors only if they look like a try.
fn parse_lines(content: &str, labels: &LabelMap) -> Vec<(u64, Result<Example, String>)> {
    let mut found = Vec::new();
    let mut open: Option<(u64, String)> = None;
    for (index, line) in content.lines().enumerate() {
        let number = index as u64 + 1;
        let line = line.trim();
        if line.is_empty() || line.starts_with("```") {
            continue;
        }
        if let Some(text) = after_heading(line, &["tweet", "text", "prompt", "headline"]) {
            open = Some((number, text.to_owned()));
        } else if let (Some((begins, text)), Some(label)) =
            (&open, after_heading(line, &["label", "sentiment", "response", "answer", "classification"]))
        {
            found.push((*begins, finish(text, label, labels)));
            open = None;
        } else if let Some((_, text)) = &mut open {
            text.push('\n');
            text.push_str(line);
        } else if let Some((label, text)) = line.split_once([':', '\t', '|']).filter(|(head, _)| head.len() <= 40) {
            let problem = || labels.complaint(label);
            match labels.map(label) {
                Some(_) => found.push((number, finish(text, label, labels))),
                None => found.push((number, Err(problem()))),
            }
        } else {
            found.push((number, Err("expected `label: tweet`".into())));
        }
    }
    if let Some((begins, _)) = open {
        found.push((begins, Err("the text has no label".into())));
    }
    found
}

fn after_heading<'a>(line: &'a str, headings: &[&str]) -> Option<&'a str> {
    let bare = line.trim_start_matches(['*', '_', '#', '-', ' ']);
    headings.iter().find_map(|heading| {
        let head = bare.get(..heading.len())?;
        let rest = bare[heading.len()..].trim_start_matches(['*', '_', ' ']).strip_prefix(':')?;
        head.eq_ignore_ascii_case(heading).then(|| rest.trim_start_matches(['*', '_']).trim())
    })
}

fn finish(text: &str, label: &str, labels: &LabelMap) -> Result<Example, String> {
    let mut text = text.trim();
    if let Some(rest) = after_heading(text, &["tweet", "text", "prompt"]) {
        text = rest;
    }
    // Quotes around the whole text are the model's, not the tweet's.
    for (open, close) in [('"', '"'), ('“', '”'), ('`', '`')] {
        if let Some(inner) = text.strip_prefix(open).and_then(|text| text.strip_suffix(close))
            && !inner.contains([open, close])
        {
            text = inner.trim();
        }
    }
    if text.is_empty() {
        return Err("the text is empty".into());
    }
    if canonical_label(text).is_some() {
        return Err("the text is only a label".into());
    }
    match labels.map(label) {
        Some(label) => Ok(Example::new(text, label)),
        None => Err(labels.complaint(label)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn one(answer: &str) -> (String, String) {
        let example = parse_answer(answer).unwrap_or_else(|problem| panic!("{answer:?}: {problem}"));
        (example.text, example.label)
    }

    #[test]
    fn answers_of_models() {
        let expected = ("$AAPL up 3%".to_owned(), "Positive".to_owned());
        for answer in [
            "$AAPL up 3%\n---\nPositive",
            "\n$AAPL up 3%\n-----------\nLabel: positive.\n",
            "prompt\n-----------\n$AAPL up 3%\n-----------\n\nresponse\n-----------\nPositive\n-----------",
            "```\nprompt\n-----------\n$AAPL up 3%\n-----------\n\nresponse\n-----------\nPositive\n-----------\n```",
            "**Tweet:** \"$AAPL up 3%\"\n---\n**Positive**",
            "Tweet: $AAPL up 3%\nLabel: Positive",
            "Positive: $AAPL up 3%",
            "Positive\n---\n$AAPL up 3%",
            "{\"tweet\": \"$AAPL up 3%\", \"label\": \"Positive\"}",
            "Here you are:\n```json\n[{\"text\": \"$AAPL up 3%\", \"sentiment\": \"bullish\"}]\n```\nEnjoy!",
            "{\"examples\": [{\"prompt\": \"$AAPL up 3%\", \"response\": \"Positive\"}, {\"prompt\": \"b\", \"response\": \"Neutral\"}]}",
            "“$AAPL up 3%”\n---\nPositive\n\nSecond tweet\n---\nNegative",
        ] {
            assert_eq!(one(answer), expected, "{answer:?}");
        }
        assert_eq!(one("two\nlines: yes\n\nand more\n---\nneutral").0, "two\nlines: yes\n\nand more");
        let example = parse_answer("{\"tweet\": \"x y\", \"label\": \"Neutral\", \"kind\": \"mixed\"}").unwrap();
        assert_eq!(example.kind.as_deref(), Some("mixed"));
    }

    #[test]
    fn what_is_no_answer() {
        for (answer, reason) in [
            ("", "empty"),
            ("  \n ", "empty"),
            ("I'm sorry, but I can't help with that.", "refused"),
            ("$AAPL up 3%\n---\nPositive, because it rises", "unknown label"),
            ("$AAPL up 3%\n---\nUp", "unknown label"),
            ("$AAPL up 3%\n---\n", "no label follows"),
            ("---\nPositive\n---", "no text and label"),
            ("$AAPL up 3%", "expected `label: tweet`"),
            ("{\"tweet\": \"\", \"label\": \"Positive\"}", "the text is empty"),
            ("{\"tweet\": \"x\"}", "no \"label\""),
            ("{\"tweet\": \"Positive\", \"label\": \"Positive\"}", "only a label"),
            ("<!DOCTYPE html><html><body>502</body></html>", "expected"),
        ] {
            let found = parse_answer(answer).unwrap_err();
            assert!(found.contains(reason), "{answer:?}: {found}");
        }
    }

    #[test]
    fn documents_keep_lines() {
        let document = "first\n---\nPositive\n\nsecond\n---\nNegative\n---\nthird\n---\nsoon\nfourth\n---\nneutral\n";
        let found = parse_document(document, &LabelMap::default());
        let lines: Vec<u64> = found.iter().map(|(line, _)| *line).collect();
        assert_eq!(lines, [1, 5, 9, 12]);
        let document = "Positive: a b\nbearish\tc d\n\nhuh: e\n";
        let found = parse_document(document, &LabelMap::default());
        assert_eq!(found[1], (2, Ok(Example::new("c d", "Negative"))));
        assert!(found[2].1.as_ref().is_err_and(|problem| problem.contains("unknown label \"huh\"")));
    }

    proptest! {
        #[test]
        fn no_answer_panics(answer in "(\\PC{0,20}|---|\n|Positive|Tweet:|\\{\"tweet\":|\"label\"|\\[|\\]|\\}){0,12}") {
            let _ = parse_answer(&answer);
        }
    }
}
