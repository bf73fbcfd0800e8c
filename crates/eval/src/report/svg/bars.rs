//! Bars that stretch with their place: probabilities of one text, a score with its interval, counts by label.

use super::{Anchor, label_class, open_stretched, short};
use crate::bootstrap::Interval;
use crate::numbers::percent;
use crate::report::html::{Html, px};

/// "62 %" and "Positive 62 %" need so much of the bar on a phone.
const ROOM_FOR_NUMBER: f64 = 0.15;
const ROOM_FOR_NAME: f64 = 0.45;

fn across(share: f64) -> String {
    format!("{}%", px(100.0 * share.clamp(0.0, 1.0)))
}

fn line(html: &mut Html, class: &str, (x1, y1): (f64, f64), (x2, y2): (f64, f64)) {
    html.void("line", &[("class", class), ("x1", &across(x1)), ("y1", &px(y1)), ("x2", &across(x2)), ("y2", &px(y2))]);
}

fn bar(html: &mut Html, class: &str, (from, to): (f64, f64), (y, height): (f64, f64)) {
    let width = across(to.clamp(0.0, 1.0) - from.clamp(0.0, 1.0));
    html.void(
        "rect",
        &[("class", class), ("x", &across(from)), ("y", &px(y)), ("width", &width), ("height", &px(height))],
    );
}

fn text(html: &mut Html, class: &str, (x, y): (f64, f64), anchor: Anchor, text: &str) {
    html.leaf("text", &[("class", class), ("x", &across(x)), ("y", &px(y)), ("text-anchor", anchor.name())], text);
}

/// Shares of a whole, one piece per label, each with its share inside where there is room.
pub(in crate::report) fn stacked(shares: &[f64], labels: &[String], highlight: Option<usize>, label: &str) -> Html {
    let mut html = Html::new();
    open_stretched(&mut html, 30.0, label);
    let total: f64 = shares.iter().filter(|s| s.is_finite() && **s > 0.0).sum();
    let mut from = 0.0;
    for (i, name) in labels.iter().enumerate() {
        let share = shares.get(i).copied().filter(|s| s.is_finite() && *s > 0.0).unwrap_or(0.0) / total.max(1e-12);
        let color = label_class(name, i);
        bar(&mut html, &format!("piece {color}"), (from, from + share), (3.0, 24.0));
        let words = match share {
            s if s >= ROOM_FOR_NAME => format!("{} {:.0}\u{a0}%", short(name, 9), s * 100.0),
            s if s >= ROOM_FOR_NUMBER => format!("{:.0}\u{a0}%", s * 100.0),
            _ => String::new(),
        };
        if !words.is_empty() {
            let weight = if highlight == Some(i) { "on-label strong" } else { "on-label" };
            text(&mut html, &format!("{weight} {color}"), (from + share / 2.0, 19.5), Anchor::Middle, &words);
        }
        from += share;
    }
    html.close("svg");
    html
}

/// One row of a chart of shares: a bar with its interval for "before" and one for "after".
pub(in crate::report) fn with_intervals(before: Option<Interval>, after: Option<Interval>, label: &str) -> Html {
    let mut html = Html::new();
    let rows: Vec<(&str, Interval)> =
        [("before", before), ("after", after)].into_iter().filter_map(|(c, i)| i.map(|i| (c, i))).collect();
    let height = 8.0 + 17.0 * rows.len() as f64;
    open_stretched(&mut html, height, label);
    for share in [0.0, 0.25, 0.5, 0.75, 1.0] {
        line(&mut html, "grid", (share, 0.0), (share, height));
    }
    for (i, (class, interval)) in rows.into_iter().enumerate() {
        let top = 5.0 + 17.0 * i as f64;
        bar(&mut html, &format!("level {class}"), (0.0, interval.value), (top, 12.0));
        let middle = top + 6.0;
        let ends = (interval.low, interval.high);
        line(&mut html, "whisker over", (ends.0, middle), (ends.1, middle));
        for end in [ends.0, ends.1] {
            line(&mut html, "whisker over", (end, middle - 4.0), (end, middle + 4.0));
        }
    }
    html.close("svg");
    html
}

/// The axis that belongs under rows of [`with_intervals`].
pub(in crate::report) fn share_axis() -> Html {
    let mut html = Html::new();
    html.raw("<svg width=\"100%\" height=\"20\" class=\"bar\" aria-hidden=\"true\">");
    for share in [0.0, 0.25, 0.5, 0.75, 1.0] {
        line(&mut html, "axis", (share, 0.0), (share, 4.0));
        // The labels at the ends stay within the page.
        let anchor = match share {
            0.0 => Anchor::Start,
            1.0 => Anchor::End,
            _ => Anchor::Middle,
        };
        text(&mut html, "tick", (share, 16.0), anchor, &format!("{:.0}\u{a0}%", share * 100.0));
    }
    html.close("svg");
    html
}

/// Two points with their intervals on one line, from 0 to `high`, with an optional mark such as a baseline.
pub(in crate::report) fn dumbbell(
    before: Option<Interval>,
    after: Option<Interval>,
    high: f64,
    mark: Option<f64>,
    label: &str,
) -> Html {
    let mut html = Html::new();
    let at = |value: f64| if high > 0.0 { value / high } else { 0.0 };
    open_stretched(&mut html, 34.0, label);
    line(&mut html, "grid", (0.0, 17.0), (1.0, 17.0));
    for end in [0.0, 0.5, 1.0] {
        line(&mut html, "grid", (end, 6.0), (end, 28.0));
    }
    if let Some(mark) = mark {
        line(&mut html, "baseline", (at(mark), 2.0), (at(mark), 32.0));
    }
    for (class, interval) in [("before", before), ("after", after)] {
        let Some(interval) = interval else { continue };
        bar(&mut html, &format!("span {class}"), (at(interval.low), at(interval.high)), (10.0, 14.0));
        html.void(
            "circle",
            &[("class", &format!("point {class}")), ("cx", &across(at(interval.value))), ("cy", "17"), ("r", "4.5")],
        );
    }
    html.close("svg");
    html
}

/// "Positive 62.0 %, Neutral 30.1 %, Negative 7.9 %"
pub(in crate::report) fn spoken(shares: &[f64], labels: &[String]) -> String {
    let parts: Vec<String> = labels.iter().zip(shares).map(|(l, s)| format!("{l} {}", percent(*s))).collect();
    parts.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_fill_the_bar_whatever_the_numbers() {
        let labels: Vec<String> = ["Positive", "Neutral", "Negative"].map(String::from).to_vec();
        for shares in [vec![0.2, 0.5, 0.3], vec![2.0, 5.0, 3.0], vec![0.2, 0.5, 0.3, 9.0]] {
            let html = stacked(&shares[..3], &labels, None, "x");
            assert!(
                html.as_str().contains("x=\"20%\"") && html.as_str().contains("width=\"50%\""),
                "{}",
                html.as_str()
            );
        }
        for broken in [vec![], vec![f64::NAN, -1.0, f64::INFINITY], vec![0.0; 3]] {
            let html = stacked(&broken, &labels, Some(7), "x");
            assert!(!html.as_str().contains("NaN") && !html.as_str().contains("inf"));
        }
    }
}
