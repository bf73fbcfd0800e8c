//! Tables: the numbers behind the pictures, the data, the configuration, the files.

use super::examples::MOST_CARDS;
use super::html::Html;
use super::svg::{bars, short};
use super::{HistoryRow, Report, Split};
use crate::metrics::Metrics;
use crate::numbers::{bytes, count, decimal, duration, percent};

/// Rows of the training history that the page keeps.
const MOST_HISTORY: usize = 200;

/// Rows of any table that the page keeps, and characters of a cell.
const MOST_ROWS: usize = 1000;
const LONGEST_CELL: usize = 2000;

/// A table that scrolls in its own box. The first column names the row; columns after it that hold numbers only are set
/// to the right.
pub(super) fn table(caption: &str, header: &[&str], rows: &[Vec<String>]) -> Html {
    let numeric = |column: usize| {
        column > 0
            && rows.iter().all(|r| {
                r.get(column)
                    .is_none_or(|c| !c.chars().any(char::is_alphabetic) || c.contains(" to ") || c.ends_with('B'))
            })
    };
    let class = |column: usize| if numeric(column) { "num" } else { "" };
    let classes: Vec<&str> = (0..header.len()).map(class).collect();
    let mut html = Html::new();
    html.open("div", &[("class", "scroll"), ("role", "region"), ("aria-label", caption), ("tabindex", "0")]);
    html.raw("<table><thead><tr>");
    for (name, class) in header.iter().zip(&classes) {
        html.leaf("th", &[("scope", "col"), ("class", class)], name);
    }
    html.raw("</tr></thead><tbody>\n");
    for row in rows.iter().take(MOST_ROWS) {
        html.raw("<tr>");
        for (i, (cell, class)) in row.iter().zip(&classes).enumerate() {
            if i == 0 {
                html.leaf("th", &[("scope", "row")], &short(cell, LONGEST_CELL));
            } else {
                html.leaf("td", &[("class", class)], &short(cell, LONGEST_CELL));
            }
        }
        html.raw("</tr>\n");
    }
    html.raw("</tbody></table>").close("div");
    if let Some(more) = rows.len().checked_sub(MOST_ROWS).filter(|m| *m > 0) {
        html.leaf("p", &[("class", "caption")], &format!("{} more rows are not shown.", count(more as u64)));
    }
    html
}

/// A table that opens on demand, and on paper.
pub(super) fn behind(summary: &str, content: &Html) -> Html {
    details("", summary, content)
}

/// A table too long for paper: it opens on demand only.
pub(super) fn behind_on_screen(summary: &str, content: &Html) -> Html {
    details("long", summary, content)
}

fn details(class: &str, summary: &str, content: &Html) -> Html {
    let mut html = Html::new();
    html.open("details", &[("class", class)]).leaf("summary", &[], summary).append(content).close("details");
    html
}

/// Precision, recall and F1 of each label.
pub(super) fn per_class(report: &Report) -> Html {
    let mut rows = Vec::new();
    for (i, label) in report.labels.iter().enumerate() {
        for (when, metrics) in [("before", &report.before), ("after", &report.after)] {
            let Some(class) = metrics.as_ref().and_then(|m| m.per_class.get(i)) else { continue };
            rows.push(vec![
                format!("{label}, {when}"),
                percent(class.precision),
                percent(class.recall),
                percent(class.f1),
                count(class.support),
            ]);
        }
    }
    table("Scores per label", &["Label", "Precision", "Recall", "F1", "Texts"], &rows)
}

/// The counts of one confusion matrix.
pub(super) fn confusion(metrics: &Metrics, labels: &[String], when: &str) -> Html {
    let mut header = vec!["Truth \u{2193}, answer \u{2192}"];
    header.extend(labels.iter().map(String::as_str));
    let rows: Vec<Vec<String>> = labels
        .iter()
        .enumerate()
        .map(|(r, label)| {
            let cell = |c: usize| metrics.confusion.get(r).and_then(|row| row.get(c)).copied().unwrap_or(0);
            std::iter::once(label.clone()).chain((0..labels.len()).map(|c| count(cell(c)))).collect()
        })
        .collect();
    table(&format!("Confusion matrix {when}"), &header, &rows)
}

/// What the trained model's own probabilities are called, where a temperature was fitted.
pub(super) const UNTEMPERED: &str = "After, without temperature";

/// The bins of the reliability diagrams that hold anything.
pub(super) fn reliability(report: &Report) -> Html {
    let mut rows = Vec::new();
    let sides = [("before", &report.before), (UNTEMPERED, &report.untempered), ("after", &report.after)];
    for (when, metrics) in sides {
        let when = when.to_lowercase();
        for bin in metrics.iter().flat_map(|m| &m.reliability).filter(|b| b.count > 0) {
            rows.push(vec![
                format!("{when}, {} to {}", percent(bin.lower), percent(bin.upper)),
                count(bin.count),
                percent(bin.confidence),
                percent(bin.accuracy),
            ]);
        }
    }
    table("Reliability by confidence", &["Confidence", "Texts", "Mean confidence", "Right"], &rows)
}

/// Accuracy, macro-F1 and log-loss by kind.
pub(super) fn kinds(report: &Report) -> Html {
    let mut rows = Vec::new();
    for kind in kind_names(report) {
        for (when, map) in [("before", &report.by_kind_before), ("after", &report.by_kind_after)] {
            let Some(m) = map.get(kind) else { continue };
            let interval = format!("{} to {}", percent(m.accuracy.low), percent(m.accuracy.high));
            rows.push(vec![
                format!("{kind}, {when}"),
                count(m.examples),
                percent(m.accuracy.value),
                interval,
                decimal(m.log_loss.value, 3),
                percent(m.mean_confidence),
            ]);
        }
    }
    let header = ["Kind", "Texts", "Accuracy", "95\u{a0}% interval", "Log-loss", "Mean confidence"];
    table("Accuracy by kind", &header, &rows)
}

/// Every kind that was measured, the most frequent first.
pub(super) fn kind_names(report: &Report) -> Vec<&str> {
    let mut names: Vec<(&str, u64)> = Vec::new();
    for (kind, metrics) in report.by_kind_after.iter().chain(&report.by_kind_before) {
        if !names.iter().any(|(n, _)| n == kind) {
            names.push((kind, metrics.examples));
        }
    }
    names.sort_by(|a, b| b.1.cmp(&a.1).then(a.0.cmp(b.0)));
    names.into_iter().map(|(name, _)| name).collect()
}

/// The logged steps; long histories keep the evaluations, the last step and every so manieth.
pub(super) fn history(history: &[HistoryRow]) -> Html {
    let every = history.len().div_ceil(MOST_HISTORY).max(1);
    let evaluations = history.iter().filter(|r| r.eval_loss.is_some()).count();
    let number = |value: Option<f64>, decimals: usize| value.map_or("–".into(), |v| decimal(v, decimals));
    let rows: Vec<Vec<String>> = history
        .iter()
        .enumerate()
        .filter(|(i, r)| {
            i % every == 0 || i + 1 == history.len() || (r.eval_loss.is_some() && evaluations <= MOST_HISTORY)
        })
        .map(|(_, r)| {
            vec![
                count(r.step),
                decimal(r.epoch, 2),
                number(r.loss, 4),
                number(r.eval_loss, 4),
                r.learning_rate.map_or("–".into(), |v| format!("{v:.2e}").replace('-', "\u{2212}")),
                number(r.grad_norm, 3),
                number(r.examples_per_second, 1),
                r.tokens_per_second.map_or("–".into(), |v| count(v.max(0.0) as u64)),
            ]
        })
        .collect();
    let header = ["Step", "Epoch", "Loss", "Evaluation loss", "Learning rate", "Gradient norm", "Texts/s", "Tokens/s"];
    table("Training history", &header, &rows)
}

/// A row of a table of probabilities.
fn probabilities(text: &str, when: &str, truth: Option<usize>, given: &[f32], labels: &[String]) -> Vec<String> {
    const BEGINNING: usize = 60;
    let truth = truth.and_then(|t| labels.get(t)).map_or("–", String::as_str);
    let shares = (0..labels.len()).map(|l| given.get(l).map_or("–".into(), |p| percent(f64::from(*p))));
    [short(text, BEGINNING), when.into(), truth.into()].into_iter().chain(shares).collect()
}

fn probability_table(caption: &str, labels: &[String], rows: &[Vec<String>]) -> Html {
    let header: Vec<&str> = ["Text", "When", "Truth"].into_iter().chain(labels.iter().map(String::as_str)).collect();
    table(caption, &header, rows)
}

/// The numbers behind the bars of the examples.
pub(super) fn examples(report: &Report) -> Html {
    let mut rows = Vec::new();
    for example in report.examples.iter().take(MOST_CARDS) {
        for (when, given) in [("before", &example.before), ("after", &example.after)] {
            let row = |given: &Vec<f32>| probabilities(&example.text, when, example.expected, given, &report.labels);
            rows.extend(given.as_ref().map(row));
        }
    }
    probability_table("Probabilities of the examples", &report.labels, &rows)
}

/// The numbers behind the bars of the mistakes.
pub(super) fn mistakes(report: &Report) -> Html {
    let row = |m: &super::Mistake| probabilities(&m.text, "after", Some(m.truth), &m.probabilities, &report.labels);
    let rows: Vec<Vec<String>> = report.mistakes.iter().take(MOST_CARDS).map(row).collect();
    probability_table("Probabilities of the mistakes", &report.labels, &rows)
}

/// One split: a bar by label, and a table by kind.
pub(super) fn split(split: &Split, labels: &[String]) -> Html {
    let mut html = Html::new();
    let total = split.total();
    html.open("div", &[("class", "split")]);
    html.leaf("h3", &[], &format!("{}: {} texts", split.name, count(total)));
    let shares: Vec<f64> = (0..labels.len()).map(|l| split.by_label(l) as f64 / total.max(1) as f64).collect();
    let spoken = format!("{} by label: {}", split.name, bars::spoken(&shares, labels));
    html.append(&bars::stacked(&shares, labels, None, &spoken));
    let mut header = vec!["Kind"];
    header.extend(labels.iter().map(String::as_str));
    header.push("All");
    let mut kinds: Vec<(&String, &Vec<u64>)> = split.by_kind.iter().collect();
    kinds.sort_by_key(|(name, counts)| (std::cmp::Reverse(counts.iter().sum::<u64>()), *name));
    let row = |name: &str, counts: &[u64]| -> Vec<String> {
        let cells = (0..labels.len()).map(|l| count(counts.get(l).copied().unwrap_or(0)));
        std::iter::once(name.to_owned()).chain(cells).chain([count(counts.iter().sum())]).collect()
    };
    let mut rows: Vec<Vec<String>> = kinds.into_iter().map(|(name, counts)| row(name, counts)).collect();
    let all: Vec<u64> = (0..labels.len()).map(|l| split.by_label(l)).collect();
    rows.push(row("all", &all));
    html.append(&table(&format!("{} by kind and label", split.name), &header, &rows));
    html.close("div");
    html
}

pub(super) fn configuration(report: &Report) -> Html {
    let rows: Vec<Vec<String>> =
        report.configuration.iter().map(|s| vec![s.key.clone(), s.value.clone(), s.source.clone()]).collect();
    table("Configuration in force", &["Setting", "Value", "From"], &rows)
}

pub(super) fn timings(report: &Report) -> Html {
    let total: f64 = report.timings.iter().map(|t| t.seconds).filter(|s| s.is_finite() && *s > 0.0).sum();
    let mut rows: Vec<Vec<String>> = report
        .timings
        .iter()
        .map(|t| vec![t.name.clone(), duration(t.seconds), percent(t.seconds / total.max(1e-9))])
        .collect();
    rows.push(vec!["all".into(), duration(total), percent(1.0)]);
    table("Where the time went", &["Part", "Time", "Share"], &rows)
}

pub(super) fn files(report: &Report) -> Html {
    let rows: Vec<Vec<String>> =
        report.files.iter().map(|f| vec![f.path.clone(), f.bytes.map_or("–".into(), bytes), f.note.clone()]).collect();
    table("Files of this run", &["File", "Size", "What it is"], &rows)
}
