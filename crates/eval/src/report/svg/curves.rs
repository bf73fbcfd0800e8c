//! The course of the training: loss with learning rate and gradient norm below it, over one axis of steps.

use super::axis::{self, Scale};
use super::{Anchor, dot, line, open, text};
use crate::numbers::decimal;
use crate::report::HistoryRow;
use crate::report::html::{Html, path};

/// Points drawn per line at most; longer histories show the lowest and the highest of each stretch.
const MOST_POINTS: usize = 1200;

/// Epoch marks are left out when there would be more.
const MOST_EPOCHS: f64 = 12.0;

/// What the loss panel shows, worked out once for the picture and its caption.
pub(in crate::report) struct Loss {
    raw: Vec<(f64, f64)>,
    smooth: Vec<(f64, f64)>,
    eval: Vec<(f64, f64)>,
    top: f64,
    /// Losses above the top of the picture, drawn at its edge.
    pub(in crate::report) above: usize,
    /// Logged steps that the smoothed line looks back on.
    pub(in crate::report) window: usize,
}

impl Loss {
    /// `None` when fewer than two steps carry a loss.
    pub(in crate::report) fn new(history: &[HistoryRow]) -> Option<Self> {
        let raw = series(history, |r| r.loss);
        let eval = series(history, |r| r.eval_loss);
        if raw.len() < 2 {
            return None;
        }
        let window = (raw.len() / 25).clamp(5, 200);
        let smooth = smoothed(&raw, window);
        let top = axis::ceiling(highest(&raw).max(highest(&eval)) * 1.02, 5);
        let above = raw.iter().filter(|p| p.1 > top).count();
        Some(Self { raw, smooth, eval, top, above, window })
    }

    /// Step and value of the lowest evaluation loss.
    pub(in crate::report) fn best_eval(&self) -> Option<(f64, f64)> {
        self.eval.iter().copied().min_by(|a, b| a.1.total_cmp(&b.1))
    }

    /// First and last value of the smoothed training loss.
    pub(in crate::report) fn ends(&self) -> (f64, f64) {
        let first = self.smooth.first().map_or(0.0, |p| p.1);
        (first, self.smooth.last().map_or(first, |p| p.1))
    }

    pub(in crate::report) fn has_eval(&self) -> bool {
        !self.eval.is_empty()
    }
}

/// The highest value, unless it stands alone, far above its neighbours: one wild step must not press the rest of a curve
/// flat, while a steep beginning belongs in the picture.
fn highest(points: &[(f64, f64)]) -> f64 {
    let most = points.iter().map(|p| p.1).fold(0.0, f64::max);
    let usual = (0..points.len())
        .map(|i| {
            let from = i.saturating_sub(2);
            let mut near: Vec<f64> = points[from..(i + 3).min(points.len())].iter().map(|p| p.1).collect();
            near.sort_unstable_by(f64::total_cmp);
            near[near.len() / 2]
        })
        .fold(0.0, f64::max);
    if most > 3.0 * usual && points.len() >= 10 { 1.5 * usual } else { most }
}

fn series(history: &[HistoryRow], pick: fn(&HistoryRow) -> Option<f64>) -> Vec<(f64, f64)> {
    let mut points: Vec<(f64, f64)> =
        history.iter().filter_map(|r| pick(r).filter(|v| v.is_finite()).map(|v| (r.step as f64, v))).collect();
    points.sort_by(|a, b| a.0.total_cmp(&b.0));
    points
}

/// Exponential mean over about `window` points, corrected for its start (as Adam corrects its moments).
fn smoothed(points: &[(f64, f64)], window: usize) -> Vec<(f64, f64)> {
    let keep = 1.0 - 2.0 / (window as f64 + 1.0);
    let (mut sum, mut weight) = (0.0, 0.0);
    points
        .iter()
        .map(|&(x, y)| {
            sum = keep * sum + (1.0 - keep) * y;
            weight = keep * weight + (1.0 - keep);
            (x, sum / weight)
        })
        .collect()
}

/// At most [`MOST_POINTS`] points: of each stretch its lowest and its highest, in their order.
fn thinned(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    if points.len() <= MOST_POINTS {
        return points.to_vec();
    }
    let stretch = points.len().div_ceil(MOST_POINTS / 2);
    let mut kept = Vec::with_capacity(MOST_POINTS);
    for part in points.chunks(stretch) {
        let by = |a: &&(f64, f64), b: &&(f64, f64)| a.1.total_cmp(&b.1);
        let (Some(low), Some(high)) = (part.iter().min_by(by), part.iter().max_by(by)) else { continue };
        let mut both = [*low, *high];
        both.sort_by(|a, b| a.0.total_cmp(&b.0));
        kept.extend(both);
    }
    kept
}

struct Frame {
    left: f64,
    right: f64,
    x: Scale,
}

/// The picture, `width` pixels wide. `label` is its message for those who cannot see it.
pub(in crate::report) fn draw(history: &[HistoryRow], loss: &Loss, width: f64, class: &str, label: &str) -> Html {
    let narrow = width < 500.0;
    let rate = series(history, |r| r.learning_rate);
    let norm = series(history, |r| r.grad_norm);
    let lower: Vec<(&str, &[(f64, f64)])> =
        [("learning rate", &*rate), ("gradient norm", &*norm)].into_iter().filter(|(_, s)| s.len() > 1).collect();

    let (left, right) = (if narrow { 46.0 } else { 58.0 }, width - 10.0);
    let steps = || loss.raw.iter().chain(&loss.eval).map(|p| p.0);
    let last = steps().fold(1.0, f64::max);
    let first = steps().fold(last, f64::min);
    // A curve that starts near the beginning is shown from the beginning; a resumed one from where it resumed.
    let low = if first <= last * 0.1 { 0.0 } else { first };
    let frame = Frame { left, right, x: Scale { low, high: last, from: left, to: right } };

    let legend_height = if narrow { 58.0 } else { 30.0 };
    let loss_height = if narrow { 210.0 } else { 300.0 };
    let (panel, gap) = (if narrow { 56.0 } else { 62.0 }, 34.0);
    let bottom = legend_height + loss_height + lower.len() as f64 * (panel + gap);

    let mut html = Html::new();
    open(&mut html, width, bottom + 42.0, class, label);
    legend(&mut html, loss, narrow);
    let y = Scale { low: 0.0, high: loss.top, from: legend_height + loss_height, to: legend_height + 8.0 };
    axis::vertical(&mut html, y, (left, right), 5);
    epochs(&mut html, history, &frame, (y.to, bottom));
    curve(&mut html, "raw", &loss.raw, &frame, y);
    curve(&mut html, "smooth", &loss.smooth, &frame, y);
    curve(&mut html, "eval", &loss.eval, &frame, y);
    for &(step, value) in thinned(&loss.eval).iter().filter(|_| loss.eval.len() <= 60) {
        dot(&mut html, "eval-dot", (frame.x.at(step), y.at(value)), 3.2);
    }
    if let Some((step, value)) = loss.best_eval() {
        let at = (frame.x.at(step), y.at(value));
        dot(&mut html, "best", at, 6.5);
        let anchor = if at.0 > right - 90.0 { Anchor::End } else { Anchor::Start };
        let aside = if at.0 > right - 90.0 { -10.0 } else { 10.0 };
        text(&mut html, "value halo", (at.0 + aside, at.1 - 9.0), anchor, &format!("best {}", decimal(value, 3)));
    }
    for (i, (name, points)) in lower.iter().enumerate() {
        let top = legend_height + loss_height + i as f64 * (panel + gap) + gap;
        small_panel(&mut html, name, points, &frame, (top, top + panel));
    }
    axis::horizontal(&mut html, frame.x, bottom, if narrow { 4 } else { 8 }, "optimizer step");
    html.close("svg");
    html
}

fn curve(html: &mut Html, class: &str, points: &[(f64, f64)], frame: &Frame, y: Scale) {
    if points.len() > 1 {
        let drawn: Vec<(f64, f64)> = thinned(points).iter().map(|p| (frame.x.at(p.0), y.at(p.1))).collect();
        html.void("path", &[("class", &format!("curve {class}")), ("d", &path(&drawn))]);
    }
}

/// A panel with its own scale from zero to a round number.
fn small_panel(html: &mut Html, name: &str, points: &[(f64, f64)], frame: &Frame, (top, bottom): (f64, f64)) {
    let y = Scale { low: 0.0, high: axis::ceiling(highest(points), 2), from: bottom, to: top };
    axis::vertical(html, y, (frame.left, frame.right), 2);
    curve(html, "plain", points, frame, y);
    text(html, "tick name", (frame.left, top - 8.0), Anchor::Start, name);
}

/// A thin line where each epoch ends.
fn epochs(html: &mut Html, history: &[HistoryRow], frame: &Frame, (top, bottom): (f64, f64)) {
    let last = history.iter().map(|r| r.epoch).filter(|e| e.is_finite()).fold(0.0, f64::max);
    if last > MOST_EPOCHS {
        return;
    }
    let mut epoch = 1.0;
    while epoch <= last + 1e-6 {
        if let Some(row) = history.iter().filter(|r| r.epoch >= epoch - 1e-6).min_by_key(|r| r.step) {
            let x = frame.x.at(row.step as f64);
            line(html, "epoch", (x, top), (x, bottom));
            text(html, "tick", (x - 4.0, top + 9.0), Anchor::End, &format!("epoch {epoch}"));
        }
        epoch += 1.0;
    }
}

fn legend(html: &mut Html, loss: &Loss, narrow: bool) {
    let mut entries = vec![("raw", "training loss, each logged step"), ("smooth", "smoothed")];
    if loss.has_eval() {
        entries.push(("eval", "evaluation loss"));
    }
    let mut at = (2.0, 12.0);
    for (class, name) in entries {
        line(html, &format!("curve {class}"), (at.0, at.1), (at.0 + 24.0, at.1));
        if class == "eval" {
            dot(html, "eval-dot", (at.0 + 12.0, at.1), 3.2);
        }
        text(html, "legend", (at.0 + 30.0, at.1 + 4.0), Anchor::Start, name);
        if narrow && class == "raw" {
            at = (2.0, at.1 + 22.0);
        } else {
            at.0 += 30.0 + 6.3 * name.len() as f64 + 28.0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(n: u64) -> Vec<HistoryRow> {
        (1..=n)
            .map(|step| HistoryRow { step, loss: Some(2.0 * (step as f64 / -100.0).exp()), ..HistoryRow::default() })
            .collect()
    }

    #[test]
    fn a_constant_stays_constant_when_smoothed() {
        let points: Vec<(f64, f64)> = (0..50).map(|i| (f64::from(i), 2.0)).collect();
        assert!(smoothed(&points, 7).iter().all(|p| (p.1 - 2.0).abs() < 1e-12));
    }

    #[test]
    fn thinning_keeps_the_extremes_and_the_order() {
        let mut points: Vec<(f64, f64)> = (0..100_000).map(|i| (f64::from(i), 1.0)).collect();
        points[70_001].1 = 9.0;
        points[70_002].1 = -9.0;
        let kept = thinned(&points);
        assert!(kept.len() <= MOST_POINTS);
        assert!(kept.contains(&(70_001.0, 9.0)) && kept.contains(&(70_002.0, -9.0)));
        assert!(kept.is_sorted_by(|a, b| a.0 <= b.0));
    }

    #[test]
    fn one_wild_step_does_not_set_the_scale() {
        let mut history = rows(400);
        history[200].loss = Some(1e6);
        history[201].loss = Some(f64::NAN);
        let loss = Loss::new(&history).expect("a curve");
        assert!((2.0..=3.0).contains(&loss.top) && loss.above == 1, "{} {}", loss.top, loss.above);
        let html = draw(&history, &loss, 720.0, "wide", "loss");
        assert!(!html.as_str().contains("NaN") && !html.as_str().contains("inf"));
    }

    #[test]
    fn too_short_a_history_has_no_curve() {
        assert!(Loss::new(&rows(1)).is_none());
        assert!(Loss::new(&[]).is_none());
    }
}
