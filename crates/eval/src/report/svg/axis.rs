//! Axes: round ticks, their labels, and the way from a value to a coordinate.

use super::{Anchor, line, text};
use crate::numbers::{count, decimal};
use crate::report::html::Html;

/// A linear scale from values to coordinates.
#[derive(Clone, Copy)]
pub(in crate::report) struct Scale {
    pub(in crate::report) low: f64,
    pub(in crate::report) high: f64,
    pub(in crate::report) from: f64,
    pub(in crate::report) to: f64,
}

impl Scale {
    /// The coordinate of a value; values outside the scale stop at its ends.
    pub(in crate::report) fn at(&self, value: f64) -> f64 {
        let span = self.high - self.low;
        let share = if span > 0.0 { ((value - self.low) / span).clamp(0.0, 1.0) } else { 0.0 };
        self.from + (self.to - self.from) * if share.is_finite() { share } else { 0.0 }
    }
}

/// Round values (1, 2, 2.5 or 5 times a power of ten apart) from `low` to `high`, about `wanted` of them, and the
/// distance between them. Whole numbers are 1, 2 or 5 apart when `whole`.
pub(in crate::report) fn ticks(low: f64, high: f64, wanted: usize, whole: bool) -> (Vec<f64>, f64) {
    let span = high - low;
    if !(span > 0.0 && span.is_finite()) {
        return (vec![low], 1.0);
    }
    let rough = span / wanted.max(1) as f64;
    let power = 10f64.powf(rough.log10().floor());
    let mut step =
        [1.0, 2.0, 2.5, 5.0, 10.0].map(|m| m * power).into_iter().find(|s| *s >= rough * 0.999).unwrap_or(rough);
    if whole {
        if (step / power - 2.5).abs() < 1e-9 && power < 10.0 {
            step = 5.0 * power;
        }
        step = step.max(1.0);
    }
    let first = (low / step - 1e-9).ceil();
    let number = ((high / step + 1e-9).floor() - first).clamp(0.0, 1000.0) as usize;
    ((0..=number).map(|i| (first + i as f64) * step).collect(), step)
}

/// The smallest round value not below `value`, so that an axis can end on a tick.
pub(in crate::report) fn ceiling(value: f64, wanted: usize) -> f64 {
    let (_, step) = ticks(0.0, value, wanted, false);
    if value > 0.0 { (value / step - 1e-9).ceil() * step } else { 1.0 }
}

/// A tick's label with as many decimals as the distance between ticks needs, or as `2e-4` when it is tiny.
pub(in crate::report) fn label(value: f64, step: f64) -> String {
    if value == 0.0 {
        return "0".into();
    }
    if step < 1e-3 {
        return format!("{value:.1e}").replace(".0e", "e").replace('-', "\u{2212}");
    }
    if step >= 1.0 && step.fract() == 0.0 && value >= 0.0 {
        return count(value.round() as u64);
    }
    let decimals =
        (0..=4).find(|d| (step * 10f64.powi(*d)).fract().abs() < 1e-6 || (step * 10f64.powi(*d)).fract() > 1.0 - 1e-6);
    decimal(value, decimals.unwrap_or(4) as usize)
}

/// Horizontal grid lines and their labels on the left.
pub(in crate::report) fn vertical(html: &mut Html, y: Scale, (left, right): (f64, f64), wanted: usize) {
    let (values, step) = ticks(y.low, y.high, wanted, false);
    for value in values {
        let at = y.at(value);
        line(html, "grid", (left, at), (right, at));
        text(html, "tick", (left - 6.0, at + 4.0), Anchor::End, &label(value, step));
    }
}

/// Labels below a horizontal axis with a name after them, and the axis itself.
pub(in crate::report) fn horizontal(html: &mut Html, x: Scale, y: f64, wanted: usize, name: &str) {
    line(html, "axis", (x.from, y), (x.to, y));
    let (values, step) = ticks(x.low, x.high, wanted, true);
    for value in values {
        let at = x.at(value);
        line(html, "axis", (at, y), (at, y + 4.0));
        text(html, "tick", (at, y + 17.0), Anchor::Middle, &label(value, step));
    }
    text(html, "tick name", (0.5 * (x.from + x.to), y + 34.0), Anchor::Middle, name);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_inside() {
        assert_eq!(ticks(0.0, 10.0, 5, false).0, [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]);
        assert_eq!(ticks(0.0, 1.1, 5, false).0, [0.0, 0.25, 0.5, 0.75, 1.0]);
        assert_eq!(ticks(1.0, 3.0, 8, true).0, [1.0, 2.0, 3.0]);
        assert_eq!(ticks(0.0, 12.0, 5, true).0, [0.0, 5.0, 10.0]);
        assert_eq!(ticks(3.0, 3.0, 5, false).0, [3.0]);
        for (low, high) in [(0.0, 1e-9), (0.0, 1e12), (-7.3, 11.9), (0.0, 0.000_31)] {
            let (values, step) = ticks(low, high, 6, false);
            assert!((3..=9).contains(&values.len()), "{low} {high} {values:?}");
            assert!(values.iter().all(|v| *v >= low - 1e-6 * step && *v <= high + 1e-6 * step));
        }
        assert_eq!(ticks(0.0, f64::INFINITY, 5, false).0, [0.0]);
        assert_eq!(ticks(f64::NAN, 1.0, 5, false).0.len(), 1);
    }

    #[test]
    fn tick_labels_have_the_decimals_they_need() {
        assert_eq!([label(0.5, 0.5), label(0.25, 0.25), label(1.0, 0.25)], ["0.5", "0.25", "1.00"]);
        assert_eq!([label(2e-4, 1e-4), label(1.5e-4, 5e-5), label(0.0, 1e-4)], ["2e−4", "1.5e−4", "0"]);
        assert_eq!([label(12_000.0, 2000.0), label(-0.2, 0.1)], ["12\u{202f}000", "−0.2"]);
    }

    #[test]
    fn a_ceiling_is_a_tick() {
        assert_eq!(ceiling(1.07, 5), 1.25);
        assert_eq!(ceiling(8.0, 4), 8.0);
        assert_eq!(ceiling(0.0, 4), 1.0);
    }

    #[test]
    fn a_scale_stops_at_its_ends() {
        let scale = Scale { low: 0.0, high: 2.0, from: 100.0, to: 0.0 };
        assert_eq!([scale.at(0.5), scale.at(5.0), scale.at(-1.0), scale.at(f64::NAN)], [75.0, 0.0, 100.0, 100.0]);
        let empty = Scale { low: 1.0, high: 1.0, from: 3.0, to: 9.0 };
        assert_eq!(empty.at(7.0), 3.0);
    }
}
