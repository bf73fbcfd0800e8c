//! From sums to the numbers that people know: `sentiment_score`, `buzz_score`, `bullish_pct`, `trend`.

use std::collections::VecDeque;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::accumulator::Accumulator;
use super::baseline::Attention;
use super::{Scope, Window};
use crate::time::Millis;

/// Scores of the windows before that are shown with a signal.
pub const SPARKLINE: usize = 24;
/// Windows before that momentum is measured against.
const BEFORE: usize = 3;
/// A smaller change is no trend.
const FLAT: f64 = 0.1;

/// A window of one ticker, one sector or the market.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Signal {
    #[serde(serialize_with = "text")]
    pub key: Arc<str>,
    pub scope: Scope,
    pub name: Option<String>,
    pub window: Window,
    #[serde(serialize_with = "rfc3339")]
    pub start: Millis,
    #[serde(serialize_with = "rfc3339")]
    pub end: Millis,
    /// No post changes it any more.
    #[serde(rename = "final")]
    pub is_final: bool,
    /// 0 while it is open, 1 when it closed, then one more for each correction.
    pub revision: u32,
    #[serde(flatten)]
    pub values: Values,
    pub sparkline: Vec<Option<f64>>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Values {
    pub mentions: u64,
    pub unique_authors: u64,
    pub positive_count: u64,
    pub neutral_count: u64,
    pub negative_count: u64,
    pub sentiment_score: Option<f64>,
    pub ci_low: Option<f64>,
    pub ci_high: Option<f64>,
    pub bullish_pct: Option<f64>,
    pub bearish_pct: Option<f64>,
    pub buzz_score: f64,
    pub attention: Option<f64>,
    pub attention_z: Option<f64>,
    pub momentum: Option<f64>,
    /// The score against its own last 24 windows, in standard deviations.
    pub score_z: Option<f64>,
    pub trend: Option<Trend>,
    pub copies: u64,
    pub damped: u64,
    pub top_posts: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Trend {
    Rising,
    Falling,
    Flat,
}

fn text<S: serde::Serializer>(key: &Arc<str>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(key)
}

fn rfc3339<S: serde::Serializer>(time: &Millis, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&crate::time::rfc3339(*time))
}

/// When there is too little to say anything.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Thin {
    /// Fewer posts, counted by their weights, give no score.
    pub min_mentions: f64,
    pub min_authors: u64,
}

impl Default for Thin {
    fn default() -> Self {
        Self { min_mentions: 5.0, min_authors: 3 }
    }
}

/// The scores of one series and window, newest last.
#[derive(Clone, Debug, Default)]
pub(super) struct History(VecDeque<(Millis, Option<f64>)>);

impl History {
    pub(super) fn set(&mut self, start: Millis, score: Option<f64>) {
        let at = self.0.partition_point(|(s, _)| *s < start);
        match self.0.get_mut(at) {
            Some(entry) if entry.0 == start => entry.1 = score,
            _ => self.0.insert(at, (start, score)),
        }
        while self.0.len() > 2 * SPARKLINE {
            self.0.pop_front();
        }
    }

    fn get(&self, start: Millis) -> Option<f64> {
        let at = self.0.partition_point(|(s, _)| *s < start);
        self.0.get(at).filter(|(s, _)| *s == start)?.1
    }

    /// The last [`SPARKLINE`] windows up to `start`, a gap where nothing was said.
    pub(super) fn sparkline(&self, window: Window, start: Millis) -> Vec<Option<f64>> {
        (0..SPARKLINE as i64).rev().map(|i| self.get(start - i * window.size())).collect()
    }

    fn before(&self, start: Millis) -> impl Iterator<Item = f64> {
        let end = self.0.partition_point(|(s, _)| *s < start);
        self.0.range(..end).rev().take(SPARKLINE).filter_map(|(_, score)| *score)
    }
}

pub(super) fn values(
    sums: &Accumulator,
    start: Millis,
    attention: Option<Attention>,
    history: &History,
    thin: Thin,
) -> Values {
    let authors = sums.authors.count();
    let weight = sums.weight;
    // Kish's effective size: what the weighted posts are worth in equal ones.
    let effective = if sums.weight_squares > 0.0 { weight * weight / sums.weight_squares } else { 0.0 };
    let speaks = weight >= thin.min_mentions && effective > 1.0 && authors >= thin.min_authors;
    let mut v = Values {
        mentions: sums.mentions,
        unique_authors: authors,
        positive_count: sums.positive,
        neutral_count: sums.mentions - sums.positive - sums.negative,
        negative_count: sums.negative,
        copies: sums.copies,
        damped: sums.damped,
        attention: attention.map(|a| round(a.ratio)),
        attention_z: attention.map(|a| round(a.z)),
        top_posts: sums.top.iter().map(|t| t.id.to_string()).collect(),
        ..Values::default()
    };
    if speaks {
        let mean = (sums.weighted_score / weight).clamp(-1.0, 1.0);
        let variance = (sums.weighted_square / weight - mean * mean).max(0.0) * effective / (effective - 1.0);
        let half = t_quantile(effective - 1.0) * (variance / effective).sqrt();
        v.sentiment_score = Some(round(mean));
        v.ci_low = Some(round((mean - half).max(-1.0)));
        v.ci_high = Some(round((mean + half).min(1.0)));
        v.bullish_pct = Some(round(100.0 * sums.positive_weight / weight));
        v.bearish_pct = Some(round(100.0 * sums.negative_weight / weight));
        let before: Vec<f64> = history.before(start).collect();
        let recent = &before[..before.len().min(BEFORE)];
        if !recent.is_empty() {
            let momentum = mean - recent.iter().sum::<f64>() / recent.len() as f64;
            v.momentum = Some(round(momentum));
            v.trend = Some(match momentum {
                m if m > FLAT => Trend::Rising,
                m if m < -FLAT => Trend::Falling,
                _ => Trend::Flat,
            });
        }
        if before.len() >= 6 {
            let n = before.len() as f64;
            let center = before.iter().sum::<f64>() / n;
            let spread = (before.iter().map(|s| (s - center).powi(2)).sum::<f64>() / (n - 1.0)).sqrt();
            // Scores that never moved would make every tremor an alarm.
            v.score_z = Some(round((mean - center) / spread.max(0.05)));
        }
    }
    v.buzz_score = round(buzz(&v));
    v
}

/// 0 to 100: 40 for volume, 30 for attention (10 where there is no baseline), 15 for the variety of authors, 15 for how
/// decided the score is. Each part nears its maximum without reaching it.
fn buzz(v: &Values) -> f64 {
    let n = v.mentions as f64;
    if v.mentions == 0 {
        return 0.0;
    }
    let volume = 40.0 * n / (n + 20.0);
    let ratio = v.attention.unwrap_or(1.0).max(0.0);
    let attention = 30.0 * ratio / (ratio + 2.0);
    let authors = 15.0 * (v.unique_authors as f64 / n).min(1.0) * n / (n + 5.0);
    (volume + attention + authors + 15.0 * v.sentiment_score.unwrap_or(0.0).abs()).min(100.0)
}

/// 97.5 % quantile of Student's t for at least three degrees of freedom, within 2 %.
fn t_quantile(degrees: f64) -> f64 {
    let d = degrees.max(3.0);
    1.96 + 2.37 / d + 2.82 / (d * d) + 2.0 / (d * d * d)
}

/// Six decimals are enough for people and make the same number the same text everywhere.
fn round(x: f64) -> f64 {
    let rounded = (x * 1e6).round() / 1e6;
    if rounded == 0.0 { 0.0 } else { rounded }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sums(scores: &[f64]) -> Accumulator {
        let mut sums = Accumulator::default();
        for (i, score) in scores.iter().enumerate() {
            sums.add_score(i as u64, &crate::id::Id::Number(i as u64), *score, 1.0, *score > 0.3, *score < -0.3);
            sums.authors.add((i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        }
        sums
    }

    #[test]
    fn mean_and_interval_as_a_textbook_has_them() {
        // R: t.test(c(.9,.5,.1,-.2,.7,.4)) gives a mean of 0.4 and [-0.0245, 0.8245].
        let v = values(&sums(&[0.9, 0.5, 0.1, -0.2, 0.7, 0.4]), 0, None, &History::default(), Thin::default());
        assert_eq!(v.sentiment_score, Some(0.4));
        let (low, high) = (v.ci_low.unwrap(), v.ci_high.unwrap());
        assert!((low + 0.0221).abs() < 0.01 && (high - 0.8221).abs() < 0.01, "{low} {high}");
        assert_eq!((v.positive_count, v.neutral_count, v.negative_count), (4, 2, 0));
    }

    #[test]
    fn student_t() {
        for (degrees, want) in [(4.0, 2.776), (9.0, 2.262), (29.0, 2.045), (1e6, 1.960)] {
            assert!((t_quantile(degrees) / want - 1.0).abs() < 0.02, "{degrees}");
        }
    }

    #[test]
    fn thin_data_says_nothing() {
        let v = values(&sums(&[0.9; 4]), 0, None, &History::default(), Thin::default());
        assert_eq!((v.mentions, v.sentiment_score, v.ci_low, v.bullish_pct, v.trend), (4, None, None, None, None));
        assert!(v.buzz_score > 0.0);
    }

    #[test]
    fn momentum_is_against_the_windows_before() {
        let mut history = History::default();
        for (i, score) in [Some(0.0), None, Some(0.2), Some(0.4)].into_iter().enumerate() {
            history.set(i as i64 * Window::M1.size(), score);
        }
        let start = 4 * Window::M1.size();
        let v = values(&sums(&[0.5; 6]), start, None, &history, Thin::default());
        assert_eq!((v.momentum, v.trend), (Some(0.3), Some(Trend::Rising)));
        history.set(start, v.sentiment_score);
        let line = history.sparkline(Window::M1, start);
        assert_eq!(line[SPARKLINE - 5..], [Some(0.0), None, Some(0.2), Some(0.4), Some(0.5)]);
        assert_eq!(line[..SPARKLINE - 5], [None; SPARKLINE - 5]);
    }

    #[test]
    fn buzz_grows_and_stays_below_a_hundred() {
        let mut last = -1.0;
        for n in [0, 1, 5, 20, 100, 100_000] {
            let v = values(
                &sums(&vec![1.0; n]),
                0,
                Some(Attention { ratio: n as f64, z: 0.0 }),
                &History::default(),
                Thin::default(),
            );
            assert!(v.buzz_score > last && v.buzz_score <= 100.0, "{n}: {}", v.buzz_score);
            last = v.buzz_score;
        }
    }
}
