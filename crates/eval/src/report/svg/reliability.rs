//! A reliability diagram: how often the model is right when it is so sure, and how often it is so sure.

use super::axis::Scale;
use super::{Anchor, dot, line, open, rect, text};
use crate::calibration::Bin;
use crate::numbers::count;
use crate::report::html::Html;

/// Wilson's 95 % interval for a share of `n`: honest for small counts, where the normal one leaves 0 to 1.
pub(in crate::report) fn wilson(share: f64, n: u64) -> (f64, f64) {
    const Z: f64 = 1.959_963_984_540_054;
    if n == 0 {
        return (0.0, 1.0);
    }
    let n = n as f64;
    let denominator = 1.0 + Z * Z / n;
    let middle = (share + Z * Z / (2.0 * n)) / denominator;
    let half = Z / denominator * (share * (1.0 - share) / n + Z * Z / (4.0 * n * n)).sqrt();
    ((middle - half).max(0.0), (middle + half).min(1.0))
}

/// `scale_count` is the highest count of a bin over all the diagrams that stand side by side.
pub(in crate::report) fn draw(bins: &[Bin], scale_count: u64, class: &str, name: &str) -> Html {
    let (left, right, top, bottom) = (46.0, 392.0, 10.0, 286.0);
    let (counts_top, counts_bottom) = (330.0, 390.0);
    let x = Scale { low: 0.0, high: 1.0, from: left, to: right };
    let y = Scale { low: 0.0, high: 1.0, from: bottom, to: top };
    let mut html = Html::new();
    open(&mut html, 400.0, 430.0, "fixed", name);
    for share in [0.0, 0.25, 0.5, 0.75, 1.0] {
        line(&mut html, "grid", (left, y.at(share)), (right, y.at(share)));
        let label = format!("{:.0}\u{a0}%", share * 100.0);
        text(&mut html, "tick", (left - 6.0, y.at(share) + 4.0), Anchor::End, &label);
        line(&mut html, "axis", (x.at(share), counts_bottom), (x.at(share), counts_bottom + 4.0));
        let anchor = if share == 1.0 { Anchor::End } else { Anchor::Middle };
        text(&mut html, "tick", (x.at(share), counts_bottom + 17.0), anchor, &label);
    }
    line(&mut html, "ideal", (left, bottom), (right, top));

    for bin in bins.iter().filter(|b| b.count > 0) {
        let at = (x.at(bin.confidence), y.at(bin.accuracy));
        let (low, high) = wilson(bin.accuracy, bin.count);
        line(&mut html, &format!("whisker {class}"), (at.0, y.at(low)), (at.0, y.at(high)));
        dot(&mut html, &format!("point {class}"), at, 4.5);
    }
    text(&mut html, "tick name", (left, counts_top - 20.0), Anchor::Start, "texts at this confidence");
    let counts = Scale { low: 0.0, high: scale_count.max(1) as f64, from: counts_bottom, to: counts_top };
    let most = bins.iter().map(|b| b.count).max().unwrap_or(0);
    for bin in bins.iter().filter(|b| b.count > 0) {
        let (from, to) = (x.at(bin.lower) + 1.0, x.at(bin.upper) - 1.0);
        let height = (counts_bottom - counts.at(bin.count as f64)).max(1.5);
        rect(&mut html, &format!("column {class}"), (from, counts_bottom - height), (to - from, height), &[]);
        if bin.count == most {
            let above = (0.5 * (from + to), counts_bottom - height - 3.0);
            text(&mut html, "tick halo", above, Anchor::Middle, &count(bin.count));
        }
    }
    line(&mut html, "axis", (left, counts_bottom), (right, counts_bottom));
    text(&mut html, "tick name", (0.5 * (left + right), counts_bottom + 34.0), Anchor::Middle, "confidence");
    html.close("svg");
    html
}

#[cfg(test)]
mod tests {
    use super::*;

    /// statsmodels' proportion_confint(count, nobs, method="wilson")
    #[test]
    fn wilson_matches_statsmodels() {
        let near = |(low, high): (f64, f64), (l, h): (f64, f64)| (low - l).abs() < 1e-6 && (high - h).abs() < 1e-6;
        assert!(near(wilson(0.7, 10), (0.396_778, 0.892_208)), "{:?}", wilson(0.7, 10));
        assert!(near(wilson(1.0, 5), (0.565_518, 1.0)), "{:?}", wilson(1.0, 5));
        assert!(near(wilson(0.0, 3), (0.0, 0.561_497)), "{:?}", wilson(0.0, 3));
        assert_eq!(wilson(0.0, 0), (0.0, 1.0));
    }
}
