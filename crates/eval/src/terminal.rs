//! The end of a run in a few lines of text: the same numbers as the report, in a box.
//!
//! No colour and no escape codes, so that it looks the same in a terminal, a log file and under `NO_COLOR`.

use std::collections::BTreeMap;

use crate::bootstrap::Interval;
use crate::compare::Comparison;
use crate::metrics::Metrics;
use crate::numbers::{count, decimal, p_value, signed};

/// Kinds with longer names are cut.
const LONGEST_NAME: usize = 24;

fn percent(share: f64) -> String {
    format!("{}%", decimal(share * 100.0, 1))
}

fn share(i: Interval) -> String {
    format!("{} [{}, {}]", percent(i.value), decimal(i.low * 100.0, 1), decimal(i.high * 100.0, 1))
}

fn plain(i: Interval) -> String {
    format!("{} [{}, {}]", decimal(i.value, 3), decimal(i.low, 2), decimal(i.high, 2))
}

/// The change of a share is in points, that of anything else as it is.
fn change(i: &Interval, scale: f64, decimals: usize) -> String {
    let show = |v: f64| signed(v * scale, decimals);
    format!("{} [{}, {}]", show(i.value), show(i.low), show(i.high))
}

/// Before and after in a box, one line per measure, with 95 % intervals; ends with a line break. Empty when there is
/// neither. About 80 columns wide.
///
/// `comparison` is `compare(before, after)` and adds the column of changes.
pub fn terminal_table(before: Option<&Metrics>, after: Option<&Metrics>, comparison: Option<&Comparison>) -> String {
    let sides: Vec<(&str, &Metrics)> =
        [("before", before), ("after", after)].into_iter().filter_map(|(n, m)| Some((n, m?))).collect();
    let Some((_, last)) = sides.last() else { return String::new() };
    let comparison = comparison.filter(|_| sides.len() == 2);

    let mut header = vec![format!("{} texts", count(last.examples))];
    header.extend(sides.iter().map(|(name, _)| (*name).to_owned()));
    if comparison.is_some() {
        header.push("change".into());
    }
    type Row<'a> = (&'static str, &'a dyn Fn(&Metrics) -> String, Option<String>);
    let measures: [Row<'_>; 6] = [
        ("accuracy", &|m| share(m.accuracy), comparison.map(|c| change(&c.accuracy, 100.0, 1))),
        ("macro F1", &|m| share(m.macro_f1), comparison.map(|c| change(&c.macro_f1, 100.0, 1))),
        ("weighted F1", &|m| share(m.weighted_f1), comparison.map(|_| String::new())),
        ("log-loss", &|m| plain(m.log_loss), comparison.map(|c| change(&c.log_loss, 1.0, 2))),
        ("calibration", &|m| percent(m.expected_calibration_error), comparison.map(|_| String::new())),
        ("majority", &|m| percent(m.majority_baseline), comparison.map(|_| String::new())),
    ];
    let mut rows = vec![header];
    for (name, show, change) in measures {
        let mut row = vec![name.to_owned()];
        row.extend(sides.iter().map(|(_, m)| show(m)));
        row.extend(change);
        rows.push(row);
    }
    let mut text = boxed(&rows);
    text += "In brackets: 95% intervals, bootstrap over the texts.\n";
    if let Some(c) = comparison {
        let m = &c.mcnemar;
        text += &format!(
            "{} texts mended, {} spoilt: McNemar p {}.\n",
            count(m.only_b_right),
            count(m.only_a_right),
            p_value(m.p_value)
        );
    }
    text
}

/// Accuracy by kind in a box; empty when there is no kind.
pub fn terminal_kinds(before: &BTreeMap<String, Metrics>, after: &BTreeMap<String, Metrics>) -> String {
    let mut kinds: Vec<(&String, u64)> = after.iter().map(|(k, m)| (k, m.examples)).collect();
    kinds.extend(before.iter().filter(|(k, _)| !after.contains_key(*k)).map(|(k, m)| (k, m.examples)));
    kinds.sort_by_key(|(name, examples)| (std::cmp::Reverse(*examples), *name));
    if kinds.is_empty() {
        return String::new();
    }
    let sides: Vec<(&str, &BTreeMap<String, Metrics>)> =
        [("before", before), ("after", after)].into_iter().filter(|(_, m)| !m.is_empty()).collect();
    let mut rows = vec![vec!["accuracy by kind".to_owned(), "texts".to_owned()]];
    rows[0].extend(sides.iter().map(|(name, _)| (*name).to_owned()));
    for (kind, examples) in kinds {
        // A name from a data file: nothing in it may move the cursor.
        let name: String = kind.chars().filter(|c| !c.is_control()).take(LONGEST_NAME).collect();
        let mut row = vec![name, count(examples)];
        row.extend(sides.iter().map(|(_, m)| m.get(kind).map_or("–".to_owned(), |m| share(m.accuracy))));
        rows.push(row);
    }
    boxed(&rows)
}

/// Rows in a box, the first as the head. Every character counts as one column.
fn boxed(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |c: usize| rows.iter().filter_map(|r| r.get(c)).map(|cell| cell.chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let rule = |left: &str, middle: &str, right: &str| {
        let parts: Vec<String> = widths.iter().map(|w| "─".repeat(w + 2)).collect();
        format!("{left}{}{right}\n", parts.join(middle))
    };
    let mut text = rule("┌", "┬", "┐");
    for (i, row) in rows.iter().enumerate() {
        for (c, width) in widths.iter().enumerate() {
            let cell = row.get(c).map_or("", String::as_str);
            text += &format!("│ {cell:<width$} ");
        }
        text += "│\n";
        if i == 0 {
            text += &rule("├", "┼", "┤");
        }
    }
    text + &rule("└", "┴", "┘")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Judged, by_kind, compare, evaluate};

    fn judged(right: usize) -> Vec<Judged> {
        (0..40)
            .map(|i| {
                let truth = i % 3;
                let answer = if i < right { truth } else { (truth + 1) % 3 };
                let mut probabilities = vec![0.1; 3];
                probabilities[answer] = 0.8;
                let kind = Some(if i % 4 == 0 { "mi\u{1b}[31mxed" } else { "plain" }.to_owned());
                Judged { text: format!("{i}"), truth, probabilities, kind }
            })
            .collect()
    }

    #[test]
    fn the_box_is_straight_and_fits_a_wide_terminal() {
        let labels: Vec<String> = ["Positive", "Neutral", "Negative"].map(String::from).to_vec();
        let (a, b) = (judged(13), judged(36));
        let measure = |j: &[Judged]| evaluate(j, &labels, 1).expect("valid");
        let comparison = compare(&a, &b, &labels, 1).expect("paired");
        let text = terminal_table(Some(&measure(&a)), Some(&measure(&b)), Some(&comparison));
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 12);
        assert!(lines[..10].iter().all(|l| l.chars().count() == lines[0].chars().count()), "{text}");
        assert!(lines.iter().all(|l| l.chars().count() <= 80), "{text}");
        assert!(lines[3].starts_with("│ accuracy    │ 32.5% ["), "{text}");
        assert!(lines[3].contains("│ 90.0% [") && lines[3].contains("│ +57.5 [+"), "{text}");
        assert!(lines[11] == "23 texts mended, 0 spoilt: McNemar p <\u{a0}0.001.", "{text}");
        assert!(!text.contains('\u{1b}'));

        let one = terminal_table(None, Some(&measure(&b)), Some(&comparison));
        assert!(!one.contains("change") && !one.contains("before") && one.contains("after"));
        assert_eq!(terminal_table(None, None, None), "");

        let kinds = |j: &[Judged]| by_kind(j, &labels, 1).expect("valid");
        let text = terminal_kinds(&kinds(&a), &kinds(&b));
        assert!(
            text.contains("│ plain            │ 30    │") && text.contains("│ mi[31mxed        │ 10    │"),
            "{text}"
        );
        assert!(!text.contains('\u{1b}'));
        assert_eq!(terminal_kinds(&BTreeMap::new(), &BTreeMap::new()), "");
    }
}
