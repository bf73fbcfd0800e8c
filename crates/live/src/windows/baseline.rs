//! What is usual for a ticker at this hour: the measure of attention.

use std::collections::BTreeMap;

use super::Window;
use crate::time::{DAY, HOUR, Millis};

/// Days that are looked back at.
pub(crate) const DAYS: i64 = 14;
/// Fewer observations are no baseline.
const MIN_OBSERVATIONS: usize = 3;

/// Mentions by the hour.
#[derive(Clone, Debug, Default)]
pub(super) struct Baseline {
    hours: BTreeMap<i64, u32>,
    first: Option<i64>,
}

/// Mentions compared with what is usual.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Attention {
    /// 1 is usual, 2 is twice as many mentions. Half a mention is added to both sides, so that quiet hours do not give
    /// ratios without meaning.
    pub(super) ratio: f64,
    /// In standard deviations; counts scatter at least as a Poisson process does.
    pub(super) z: f64,
}

impl Baseline {
    pub(super) fn add(&mut self, time: Millis, mentions: u32) {
        let hour = time.div_euclid(HOUR);
        let count = self.hours.entry(hour).or_default();
        *count = count.saturating_add(mentions);
        self.first = Some(self.first.map_or(hour, |f| f.min(hour)));
        let oldest = self.hours.last_key_value().map_or(hour, |(h, _)| *h) - 24 * (DAYS + 2);
        while self.hours.first_key_value().is_some_and(|(h, _)| *h < oldest) {
            self.hours.pop_first();
        }
    }

    /// How `mentions` in the window that began at `start` compare, of which the share `elapsed` has passed. Same hour of
    /// the fourteen days before; with fewer than three of them, the hours of the day before; with fewer than three of
    /// these, nothing.
    pub(super) fn attention(&self, window: Window, start: Millis, elapsed: f64, mentions: u64) -> Option<Attention> {
        let first = self.first?;
        let hour = start.div_euclid(HOUR);
        let at = |h: i64| f64::from(self.hours.get(&h).copied().unwrap_or(0));
        let observed: Vec<f64> = if window.size() >= DAY {
            let days = (1..=DAYS).map(|d| hour - 24 * d).filter(|h| *h >= first);
            days.map(|h| self.hours.range(h..h + 24).map(|(_, n)| f64::from(*n)).sum()).collect()
        } else {
            let same: Vec<f64> = (1..=DAYS).map(|d| hour - 24 * d).filter(|h| *h >= first).map(at).collect();
            if same.len() >= MIN_OBSERVATIONS {
                same
            } else {
                (1..=24).map(|d| hour - d).filter(|h| *h >= first).map(at).collect()
            }
        };
        if observed.len() < MIN_OBSERVATIONS {
            return None;
        }
        let n = observed.len() as f64;
        let mean = observed.iter().sum::<f64>() / n;
        let variance = observed.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / (n - 1.0);
        let part = (window.size() as f64 / if window.size() >= DAY { DAY } else { HOUR } as f64) * elapsed;
        let (expected, variance) = (mean * part, variance * part * part);
        let mentions = mentions as f64;
        Some(Attention {
            ratio: (mentions + 0.5) / (expected + 0.5),
            z: (mentions - expected) / variance.max(expected).max(0.5).sqrt(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn against_the_same_hour() {
        let mut baseline = Baseline::default();
        // Ten mentions at nine o'clock each day, one at ten.
        for day in 0..10 {
            baseline.add(day * DAY + 9 * HOUR, 10);
            baseline.add(day * DAY + 10 * HOUR, 1);
        }
        let at = |hour: Millis, n| baseline.attention(Window::H1, 10 * DAY + hour * HOUR, 1.0, n).unwrap();
        assert_eq!(at(9, 10), Attention { ratio: 1.0, z: 0.0 });
        assert!((at(10, 10).ratio - 7.0).abs() < 1e-9 && at(10, 10).z == 9.0);
        // A quarter of an hour in, a quarter is usual.
        let quarter = baseline.attention(Window::H1, 10 * DAY + 9 * HOUR, 0.25, 10).unwrap();
        assert!((quarter.ratio - 3.5).abs() < 1e-9);
        let five = baseline.attention(Window::M5, 10 * DAY + 9 * HOUR, 1.0, 0).unwrap();
        assert!((five.z + 10.0 / 12.0 / (10.0f64 / 12.0).sqrt()).abs() < 1e-9);
        let day = baseline.attention(Window::D1, 10 * DAY, 1.0, 22).unwrap();
        assert!((day.ratio - 22.5 / 11.5).abs() < 1e-9);
    }

    #[test]
    fn too_little_is_no_baseline() {
        let mut baseline = Baseline::default();
        assert_eq!(baseline.attention(Window::M5, 0, 1.0, 5), None);
        baseline.add(0, 4);
        assert_eq!(baseline.attention(Window::H1, 2 * HOUR, 1.0, 5), None);
        // Three hours: 4, 0 and 0 mentions.
        let three = baseline.attention(Window::H1, 3 * HOUR, 1.0, 4).unwrap();
        assert!((three.ratio - 4.5 / (4.0 / 3.0 + 0.5)).abs() < 1e-9);
    }
}
