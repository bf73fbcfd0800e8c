//! Pictures, drawn by hand as inline SVG.
//!
//! Two sorts. Charts with axes have a `viewBox` and a known width, and are drawn once for a page and once for a phone, so
//! that their letters keep their size. Bars have no `viewBox`: they use percentages across and pixels down, and stretch.
//! Every picture is one image to a screen reader, with its message in `aria-label`; the numbers are in a table beside it.
//! Colours come from classes, so the same drawing serves light, dark and paper.

pub(super) mod axis;
pub(super) mod bars;
pub(super) mod confusion;
pub(super) mod curves;
pub(super) mod reliability;

use super::html::{Attributes, Html, px};

/// Opens a drawing of a known size.
pub(super) fn open(html: &mut Html, width: f64, height: f64, class: &str, label: &str) {
    let view = format!("0 0 {} {}", px(width), px(height));
    html.open(
        "svg",
        &[
            ("viewBox", &view),
            ("width", &px(width)),
            ("height", &px(height)),
            ("class", class),
            ("role", "img"),
            ("aria-label", label),
        ],
    );
}

/// Opens a drawing that is as wide as its place and `height` pixels high.
pub(super) fn open_stretched(html: &mut Html, height: f64, label: &str) {
    html.open(
        "svg",
        &[("width", "100%"), ("height", &px(height)), ("class", "bar"), ("role", "img"), ("aria-label", label)],
    );
}

pub(super) fn line(html: &mut Html, class: &str, (x1, y1): (f64, f64), (x2, y2): (f64, f64)) {
    html.void("line", &[("class", class), ("x1", &px(x1)), ("y1", &px(y1)), ("x2", &px(x2)), ("y2", &px(y2))]);
}

pub(super) fn rect(
    html: &mut Html,
    class: &str,
    (x, y): (f64, f64),
    (width, height): (f64, f64),
    more: Attributes<'_>,
) {
    let (x, y, w, h) = (px(x), px(y), px(width.max(0.0)), px(height.max(0.0)));
    let mut attributes = vec![("class", class), ("x", &*x), ("y", &*y), ("width", &*w), ("height", &*h)];
    attributes.extend_from_slice(more);
    html.void("rect", &attributes);
}

pub(super) fn dot(html: &mut Html, class: &str, (x, y): (f64, f64), radius: f64) {
    html.void("circle", &[("class", class), ("cx", &px(x)), ("cy", &px(y)), ("r", &px(radius))]);
}

/// Where a text stands relative to its point.
#[derive(Clone, Copy)]
pub(super) enum Anchor {
    Start,
    Middle,
    End,
}

impl Anchor {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::Middle => "middle",
            Self::End => "end",
        }
    }
}

pub(super) fn text(html: &mut Html, class: &str, (x, y): (f64, f64), anchor: Anchor, text: &str) {
    html.leaf("text", &[("class", class), ("x", &px(x)), ("y", &px(y)), ("text-anchor", anchor.name())], text);
}

/// A label cut to `longest` characters, for places that cannot grow.
pub(super) fn short(label: &str, longest: usize) -> String {
    if label.chars().count() <= longest {
        return label.to_owned();
    }
    let mut cut: String = label.chars().take(longest.saturating_sub(1)).collect();
    cut.push('…');
    cut
}

/// The class that carries a label's colour. Sentiments get their own, wherever they stand in the list.
pub(super) fn label_class(label: &str, index: usize) -> &'static str {
    const OTHERS: [&str; 10] = ["k-0", "k-1", "k-2", "k-3", "k-4", "k-5", "k-6", "k-7", "k-8", "k-9"];
    match label.trim().to_ascii_lowercase().as_str() {
        "positive" | "bullish" => "k-pos",
        "neutral" => "k-neu",
        "negative" | "bearish" => "k-neg",
        _ => OTHERS[index % OTHERS.len()],
    }
}
