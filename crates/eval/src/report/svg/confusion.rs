//! A confusion matrix: what each sort of text was taken for.

use super::{Anchor, open, rect, short, text};
use crate::numbers::count;
use crate::report::html::{Html, px};

/// From these opacities of `--heat` on, black (light) and white (dark) letters are no longer the most readable.
/// The test in `style` checks the contrast of both themes over the whole range.
pub(in crate::report) const LIGHT_FLIPS: f64 = 0.74;
pub(in crate::report) const DARK_FLIPS: f64 = 0.56;

/// The opacity that stands for a share of a row.
pub(in crate::report) fn opacity(share: f64) -> f64 {
    0.03 + 0.97 * share.clamp(0.0, 1.0)
}

/// Rows are the truth, columns the answer; the shade is the share of the row. Cells that are missing count as zero.
pub(in crate::report) fn draw(confusion: &[Vec<u64>], labels: &[String], name: &str) -> Html {
    let n = labels.len().max(1);
    let cell = |row: usize, column: usize| confusion.get(row).and_then(|r| r.get(column)).copied().unwrap_or(0);
    const WIDTH: f64 = 400.0;
    let left = 92.0;
    let slanted = n > 5;
    // The last of the slanted names leans over the edge of the matrix.
    let right = if slanted { 46.0 } else { 2.0 };
    let side = ((WIDTH - left - right) / n as f64).min(120.0);
    let high = if n <= 4 { side * 0.66 } else { side };
    let top = if slanted { 92.0 } else { 46.0 };

    let mut html = Html::new();
    open(&mut html, WIDTH, top + high * n as f64 + 4.0, "fixed", name);
    let middle = left + side * n as f64 / 2.0;
    text(&mut html, "tick name", (middle, 14.0), Anchor::Middle, "answer of the model");
    text(&mut html, "tick name", (left - 10.0, top - 12.0), Anchor::End, "truth");
    for (i, label) in labels.iter().enumerate() {
        let x = left + side * (i as f64 + 0.5);
        if slanted {
            let turn = format!("rotate(-50 {} {})", px(x), px(top - 8.0));
            html.leaf(
                "text",
                &[("class", "legend"), ("x", &px(x)), ("y", &px(top - 8.0)), ("transform", &turn)],
                &short(label, 12),
            );
        } else {
            text(&mut html, "legend", (x, top - 12.0), Anchor::Middle, &short(label, 11));
        }
        text(&mut html, "legend", (left - 10.0, top + high * (i as f64 + 0.5) + 4.0), Anchor::End, &short(label, 12));
    }
    for row in 0..labels.len() {
        let total: u64 = (0..labels.len()).map(|c| cell(row, c)).sum();
        for column in 0..labels.len() {
            let share = cell(row, column) as f64 / total.max(1) as f64;
            let at = (left + side * column as f64, top + high * row as f64);
            let class = if row == column { "heat diagonal" } else { "heat" };
            let strength = opacity(share);
            let inset = (at.0 + 1.5, at.1 + 1.5);
            rect(&mut html, class, inset, (side - 3.0, high - 3.0), &[("fill-opacity", &px(strength)), ("rx", "3")]);
            let ink = match (strength >= LIGHT_FLIPS, strength >= DARK_FLIPS) {
                (false, false) => "on",
                (false, true) => "on dark-flip",
                (true, false) => "on light-flip",
                (true, true) => "on light-flip dark-flip",
            };
            let center = (at.0 + side / 2.0, at.1 + high / 2.0);
            if n <= 5 {
                let class = format!("{ink} number");
                text(&mut html, &class, (center.0, center.1 + 1.0), Anchor::Middle, &count(cell(row, column)));
                let small = format!("{ink} small");
                let share = format!("{:.0}\u{a0}%", share * 100.0);
                text(&mut html, &small, (center.0, center.1 + 17.0), Anchor::Middle, &share);
            } else {
                let small = format!("{ink} small");
                text(&mut html, &small, (center.0, center.1 + 4.0), Anchor::Middle, &count(cell(row, column)));
            }
        }
    }
    html.close("svg");
    html
}
