//! Rules such as `score_z > 3 and mentions > 20 in 5m for AAPL`, and what happens when one comes true.
//!
//! A rule fires once for each window of each key; the store remembers it, so a restart does not fire again. A webhook gets
//! each alert at least once: it is tried until it answers with a 2xx status.

use std::collections::HashSet;

use serde_json::{Map, Value, json};

use crate::store::Alert;
use crate::time::{self, Millis};
use crate::windows::{Scope, Signal, Window};

/// Occasions that are remembered in memory; the store knows all.
const REMEMBERED: usize = 100_000;

#[derive(Clone, Debug, PartialEq)]
pub struct Rule {
    text: String,
    conditions: Vec<Condition>,
    window: Window,
    target: Target,
}

#[derive(Clone, Debug, PartialEq)]
enum Target {
    Scope(Scope),
    Key(String),
}

#[derive(Clone, Debug, PartialEq)]
struct Condition {
    field: &'static str,
    comparison: Comparison,
    value: f64,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Comparison {
    Less,
    LessOrEqual,
    More,
    MoreOrEqual,
}

const FIELDS: [&str; 14] = [
    "sentiment_score",
    "score_z",
    "mentions",
    "unique_authors",
    "attention",
    "attention_z",
    "momentum",
    "buzz_score",
    "bullish_pct",
    "bearish_pct",
    "positive_count",
    "negative_count",
    "copies",
    "damped",
];

fn field(signal: &Signal, name: &str) -> Option<f64> {
    let v = &signal.values;
    match name {
        "sentiment_score" => v.sentiment_score,
        "score_z" => v.score_z,
        "mentions" => Some(v.mentions as f64),
        "unique_authors" => Some(v.unique_authors as f64),
        "attention" => v.attention,
        "attention_z" => v.attention_z,
        "momentum" => v.momentum,
        "buzz_score" => Some(v.buzz_score),
        "bullish_pct" => v.bullish_pct,
        "bearish_pct" => v.bearish_pct,
        "positive_count" => Some(v.positive_count as f64),
        "negative_count" => Some(v.negative_count as f64),
        "copies" => Some(v.copies as f64),
        "damped" => Some(v.damped as f64),
        _ => None,
    }
}

impl Rule {
    /// `FIELD > NUMBER [and FIELD < NUMBER …] [in WINDOW] [for ticker | sector | market | KEY]`; five minutes and all
    /// tickers if nothing else is said.
    ///
    /// # Errors
    /// A message that says what was not understood.
    pub fn parse(text: &str) -> Result<Self, String> {
        let hint = "\n  hint: \"score_z > 3 and mentions > 20 in 5m for ticker\"";
        let wrong = |what: String| format!("the rule {text:?}: {what}{hint}");
        let mut spaced = String::with_capacity(text.len() + 8);
        for c in text.chars().take(1_000) {
            let operator = matches!(c, '<' | '>' | '=');
            let after = spaced.ends_with(['<', '>', '=']);
            if operator != after && !spaced.is_empty() {
                spaced.push(' ');
            }
            spaced.push(c);
        }
        let spaced = spaced.replace("score z", "score_z").replace("attention z", "attention_z");
        let mut words = spaced.split_whitespace().peekable();
        let (mut conditions, mut window, mut target) = (Vec::new(), Window::M5, Target::Scope(Scope::Ticker));
        loop {
            let name = words.next().ok_or_else(|| wrong("a condition is missing".into()))?;
            let lower = name.to_lowercase();
            let found = FIELDS.into_iter().find(|f| *f == lower || (lower == "score" && *f == "sentiment_score"));
            let field = found.ok_or_else(|| wrong(format!("no field {name:?}; there are {}", FIELDS.join(", "))))?;
            let comparison = match words.next() {
                Some("<") => Comparison::Less,
                Some("<=") => Comparison::LessOrEqual,
                Some(">") => Comparison::More,
                Some(">=") => Comparison::MoreOrEqual,
                other => {
                    return Err(wrong(format!(
                        "expected <, <=, > or >= after {name}, found {:?}",
                        other.unwrap_or("")
                    )));
                }
            };
            let number = words.next().unwrap_or("");
            let value = number.parse::<f64>().ok().filter(|v| v.is_finite());
            let value = value.ok_or_else(|| wrong(format!("expected a number, found {number:?}")))?;
            conditions.push(Condition { field, comparison, value });
            match words.peek() {
                Some(&"and") => words.next(),
                _ => break,
            };
        }
        while let Some(word) = words.next() {
            let next = words.next().unwrap_or("");
            match word {
                "in" => {
                    let mut name = next.to_owned();
                    if name.bytes().all(|b| b.is_ascii_digit()) {
                        name += words.next().unwrap_or("");
                    }
                    window = Window::of_name(&name)
                        .ok_or_else(|| wrong(format!("expected the window 1m, 5m, 1h or 1d, found {name:?}")))?;
                }
                "for" if !next.is_empty() => {
                    let name = next.trim_start_matches('$');
                    target = Scope::of_name(name).map_or_else(|| Target::Key(name.to_owned()), Target::Scope);
                }
                _ => return Err(wrong(format!("{word:?} was not expected"))),
            }
        }
        Ok(Self { text: text.trim().to_owned(), conditions, window, target })
    }

    fn holds(&self, signal: &Signal) -> bool {
        let concerned = match &self.target {
            Target::Scope(scope) => *scope == signal.scope,
            Target::Key(key) => key.eq_ignore_ascii_case(&signal.key),
        };
        concerned
            && self.window == signal.window
            && self.conditions.iter().all(|c| {
                field(signal, c.field).is_some_and(|x| match c.comparison {
                    Comparison::Less => x < c.value,
                    Comparison::LessOrEqual => x <= c.value,
                    Comparison::More => x > c.value,
                    Comparison::MoreOrEqual => x >= c.value,
                })
            })
    }
}

/// All rules, and what has fired.
#[derive(Default)]
pub struct Alerts {
    rules: Vec<Rule>,
    fired: HashSet<(usize, String, Millis)>,
}

impl Alerts {
    pub fn new(rules: Vec<Rule>) -> Self {
        Self { rules, fired: HashSet::new() }
    }

    /// The alerts that these signals set off.
    pub fn check<'a>(&mut self, signals: impl IntoIterator<Item = &'a Signal>) -> Vec<Alert> {
        let mut alerts = Vec::new();
        if self.rules.is_empty() {
            return alerts;
        }
        if self.fired.len() > REMEMBERED {
            self.fired.clear();
        }
        for signal in signals {
            for (i, rule) in self.rules.iter().enumerate() {
                if rule.holds(signal) && self.fired.insert((i, signal.key.to_string(), signal.start)) {
                    alerts.push(alert(rule, signal));
                }
            }
        }
        alerts
    }
}

fn alert(rule: &Rule, signal: &Signal) -> Alert {
    let mut values = Map::new();
    for name in rule.conditions.iter().map(|c| c.field).chain(["sentiment_score", "mentions"]) {
        values.insert(name.to_owned(), field(signal, name).map_or(Value::Null, |x| json!(x)));
    }
    let said: Vec<String> = values.iter().map(|(name, value)| format!("{name} {value}")).collect();
    let text = format!("{} {}: {} ({})", signal.key, signal.window.name(), said.join(", "), rule.text);
    let (key, window, start) = (signal.key.to_string(), signal.window, signal.start);
    Alert { at: time::now(), rule: rule.text.clone(), key, window, start, values: Value::Object(values), text }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::windows::Values;

    fn signal(key: &str, mentions: u64, score_z: Option<f64>) -> Signal {
        Signal {
            key: key.into(),
            scope: Scope::Ticker,
            name: None,
            window: Window::M5,
            start: 0,
            end: Window::M5.size(),
            is_final: false,
            revision: 0,
            values: Values { mentions, score_z, ..Values::default() },
            sparkline: Vec::new(),
        }
    }

    #[test]
    fn rules_as_people_write_them() {
        let plain = Rule::parse("score z > 3 and mentions > 20 in 5 m").unwrap();
        assert_eq!(plain.conditions, Rule::parse("score_z>3 and mentions>20").unwrap().conditions);
        assert_eq!(Rule::parse("mentions >= 5 in 1h for $XYZ").unwrap().target, Target::Key("XYZ".into()));
        for (text, what) in [
            ("", "condition"),
            ("volume > 3", "no field"),
            ("mentions = 3", "expected <"),
            ("mentions > x", "expected a number"),
            ("mentions > 3 in 2m", "the window"),
            ("mentions > 3 or copies > 2", "not expected"),
            ("mentions > 3 and", "condition is missing"),
        ] {
            let message = Rule::parse(text).unwrap_err();
            assert!(message.contains(what) && message.contains("hint:"), "{message}");
        }
    }

    #[test]
    fn a_rule_fires_once_a_window() {
        let mut alerts = Alerts::new(vec![Rule::parse("score_z > 3 and mentions > 20").unwrap()]);
        let quiet = [signal("A", 20, Some(9.0)), signal("A", 99, Some(3.0)), signal("A", 99, None)];
        assert!(alerts.check(&quiet).is_empty());
        let loud = signal("A", 21, Some(3.5));
        let fired = alerts.check([&loud, &loud]);
        assert_eq!(fired.len(), 1);
        assert!(fired[0].text.starts_with("A 5m: score_z 3.5, mentions 21.0"), "{}", fired[0].text);
        assert!(alerts.check([&loud]).is_empty());
        assert_eq!(alerts.check([&Signal { start: Window::M5.size(), ..loud }]).len(), 1);
    }
}
