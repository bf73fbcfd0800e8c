//! The sentence that sums the run up, and the few numbers that matter most.

use super::Report;
use super::html::Html;
use super::svg::{axis, bars};
use crate::bootstrap::Interval;
use crate::metrics::Metrics;
use crate::numbers::{count, decimal, p_value, percent, signed};

/// A score as the page shows it.
struct Tile<'a> {
    name: &'static str,
    explained: &'static str,
    /// Shares are shown in percent, others as plain numbers.
    share: bool,
    lower_is_better: bool,
    pick: fn(&Metrics) -> Interval,
    /// The paired difference, where there is one.
    difference: Option<&'a Interval>,
    baseline: Option<f64>,
}

fn point(value: f64) -> Interval {
    Interval { value, low: value, high: value }
}

/// The run in one or two sentences; the first thing to read, and the only thing for many.
pub(super) fn summary(report: &Report) -> String {
    let name = if report.model.name.is_empty() { "the model" } else { &report.model.name };
    let right = |m: &Metrics| percent(m.accuracy.value);
    match (&report.before, &report.after) {
        (Some(before), Some(after)) => {
            let mut text = format!(
                "After fine-tuning, {name} labels {} of {} held-out texts correctly; before, it was {}. ",
                right(after),
                count(after.examples),
                right(before)
            );
            match &report.comparison {
                Some(c) if c.accuracy.excludes_zero() => {
                    let better = if c.accuracy.value > 0.0 { "a gain" } else { "a loss" };
                    text += &format!(
                        "That is {better} of {} points (95\u{a0}% interval {} to {}; McNemar\u{2019}s exact p {}). ",
                        decimal(c.accuracy.value.abs() * 100.0, 1),
                        signed(c.accuracy.low * 100.0, 1),
                        signed(c.accuracy.high * 100.0, 1),
                        p_value(c.mcnemar.p_value)
                    );
                }
                Some(c) => {
                    text += &format!(
                        "The difference of {} points is within the noise of this evaluation set (95\u{a0}% interval \
                         {} to {}). ",
                        signed(c.accuracy.value * 100.0, 1),
                        signed(c.accuracy.low * 100.0, 1),
                        signed(c.accuracy.high * 100.0, 1)
                    );
                }
                None => {}
            }
            text + &baseline(after)
        }
        (Some(only), None) | (None, Some(only)) => {
            let model = if report.after.is_some() { format!("After fine-tuning, {name}") } else { name.to_owned() };
            let interval = format!("{} to {}", percent(only.accuracy.low), percent(only.accuracy.high));
            format!(
                "{model} labels {} of {} held-out texts correctly (95\u{a0}% interval {interval}). {}",
                right(only),
                count(only.examples),
                baseline(only)
            )
        }
        (None, None) => format!("Training of {name}. No evaluation was made in this run."),
    }
}

fn baseline(metrics: &Metrics) -> String {
    format!("Always answering the most frequent label would be right for {}.", percent(metrics.majority_baseline))
}

fn tiles<'a>(report: &'a Report) -> Vec<Tile<'a>> {
    let c = report.comparison.as_ref();
    let metrics = report.after.as_ref().or(report.before.as_ref());
    vec![
        Tile {
            name: "Accuracy",
            explained: "share of texts labelled correctly; the dotted line is the most frequent label",
            share: true,
            lower_is_better: false,
            pick: |m| m.accuracy,
            difference: c.map(|c| &c.accuracy),
            baseline: metrics.map(|m| m.majority_baseline),
        },
        Tile {
            name: "Macro F1",
            explained: "every label counts the same, however rare",
            share: true,
            lower_is_better: false,
            pick: |m| m.macro_f1,
            difference: c.map(|c| &c.macro_f1),
            baseline: None,
        },
        Tile {
            name: "Log-loss",
            explained: "surprise at the truth, in nats; the dotted line is guessing evenly",
            share: false,
            lower_is_better: true,
            pick: |m| m.log_loss,
            difference: c.map(|c| &c.log_loss),
            baseline: Some((report.labels.len().max(2) as f64).ln()),
        },
        Tile {
            name: "Calibration error",
            explained: "mean gap between how sure it is and how often it is right",
            share: true,
            lower_is_better: true,
            pick: |m| point(m.expected_calibration_error),
            difference: None,
            baseline: None,
        },
    ]
}

/// The tiles with the headline numbers.
pub(super) fn headline(report: &Report) -> Html {
    let mut html = Html::new();
    html.open("div", &[("class", "tiles")]);
    for tile in tiles(report) {
        draw(&mut html, &tile, report.before.as_ref(), report.after.as_ref());
    }
    html.close("div");
    html
}

fn draw(html: &mut Html, tile: &Tile<'_>, before: Option<&Metrics>, after: Option<&Metrics>) {
    let (before, after) = (before.map(tile.pick), after.map(tile.pick));
    let show = |v: f64| if tile.share { percent(v) } else { decimal(v, 3) };
    let ranged = |i: Interval| {
        if i.low == i.high && i.low == i.value {
            show(i.value)
        } else {
            format!("{} ({} to {})", show(i.value), show(i.low), show(i.high))
        }
    };
    html.open("div", &[("class", "tile")]);
    html.leaf("h3", &[], tile.name);
    html.open("p", &[("class", "big")]);
    if let (Some(before), Some(_)) = (before, after) {
        // The unit stands once, after the second number.
        let was = if tile.share { decimal(before.value * 100.0, 1) } else { show(before.value) };
        html.leaf("span", &[("class", "was")], &was);
        html.raw("<span class=\"arrow\" role=\"img\" aria-label=\"to\">\u{2192}</span> ");
    }
    if let Some(last) = after.or(before) {
        html.leaf("span", &[("class", "now")], &show(last.value));
    }
    html.close("p");

    let high = if tile.share {
        // Calibration errors are small: their line ends at a round number, not at 100 %.
        let most = [before, after].into_iter().flatten().map(|i| i.high).fold(0.0, f64::max);
        if tile.baseline.is_none() && tile.lower_is_better { axis::ceiling(most, 2).min(1.0) } else { 1.0 }
    } else {
        let most = [before, after].into_iter().flatten().map(|i| i.high).chain(tile.baseline).fold(0.0, f64::max);
        axis::ceiling(most * 1.02, 4)
    };
    let spoken = [("before", before), ("after", after)]
        .into_iter()
        .filter_map(|(when, i)| i.map(|i| format!("{when}: {}", ranged(i))))
        .collect::<Vec<_>>()
        .join("; ");
    html.append(&bars::dumbbell(before, after, high, tile.baseline, &format!("{}, {spoken}", tile.name)));
    let ends = if tile.share { format!("{:.0}\u{a0}%", high * 100.0) } else { decimal(high, 1) };
    html.open("p", &[("class", "ends")]);
    html.leaf("span", &[], "0");
    html.leaf("span", &[], &ends);
    html.close("p");

    html.open("p", &[("class", "interval")]);
    match tile.difference {
        Some(d) => {
            let (scale, decimals, unit) = if tile.share { (100.0, 1, " points") } else { (1.0, 3, "") };
            let verdict = match (d.excludes_zero(), (d.value < 0.0) == tile.lower_is_better) {
                (false, _) => "within noise",
                (true, true) => "better",
                (true, false) => "worse",
            };
            html.leaf("strong", &[], &format!("{}{unit}", signed(d.value * scale, decimals)));
            html.text(&format!(
                " ({} to {}): {verdict}",
                signed(d.low * scale, decimals),
                signed(d.high * scale, decimals)
            ));
        }
        None => {
            if let Some(i) = after.or(before).filter(|i| i.low != i.high) {
                html.text(&format!("95\u{a0}% interval {} to {}", show(i.low), show(i.high)));
            } else if let (Some(before), Some(after)) = (before, after) {
                html.leaf("strong", &[], &format!("{} points", signed((after.value - before.value) * 100.0, 1)));
            }
        }
    }
    html.close("p");
    html.leaf("p", &[("class", "explained")], tile.explained);
    html.close("div");
}

/// Everything measured, in one table.
pub(super) fn table(report: &Report) -> Html {
    let share = |i: Interval| format!("{} ({} to {})", percent(i.value), percent(i.low), percent(i.high));
    let plain = |i: Interval| format!("{} ({} to {})", decimal(i.value, 3), decimal(i.low, 3), decimal(i.high, 3));
    type Row<'a> = (&'static str, &'a dyn Fn(&Metrics) -> String);
    let rows: [Row<'_>; 9] = [
        ("Texts", &|m| count(m.examples)),
        ("Accuracy", &|m| share(m.accuracy)),
        ("Macro F1", &|m| share(m.macro_f1)),
        ("Weighted F1", &|m| share(m.weighted_f1)),
        ("Log-loss (nats)", &|m| plain(m.log_loss)),
        ("Expected calibration error", &|m| percent(m.expected_calibration_error)),
        ("Brier score (0 to 2)", &|m| decimal(m.brier, 3)),
        ("Mean confidence", &|m| percent(m.mean_confidence)),
        ("Most frequent label", &|m| percent(m.majority_baseline)),
    ];
    let sides: Vec<(&str, &Metrics)> = [("Before", &report.before), ("After", &report.after)]
        .into_iter()
        .filter_map(|(n, m)| Some((n, m.as_ref()?)))
        .collect();
    let mut header = vec!["Measure (95\u{a0}% interval)"];
    header.extend(sides.iter().map(|(name, _)| *name));
    let body: Vec<Vec<String>> = rows
        .iter()
        .map(|(name, show)| std::iter::once((*name).to_owned()).chain(sides.iter().map(|(_, m)| show(m))).collect())
        .collect();
    super::tables::table("All measures", &header, &body)
}
