//! How long to wait before the next attempt, as the documentation of X's streams asks for it; Bluesky is treated alike.
//!
//! | what happened | wait |
//! | --- | --- |
//! | a connection that worked was lost | none, once |
//! | no connection | 250 ms more each time, up to 16 s |
//! | an HTTP error | 5 s, doubled each time, up to 320 s |
//! | 429 | 60 s, doubled each time, up to 15 min; until `x-rate-limit-reset` if it says when |

use std::time::Duration;

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Failure {
    /// A connection that had delivered something ended.
    Lost,
    Network,
    Http,
    /// With the seconds until the limit is reset, if the server said so.
    RateLimit(Option<u64>),
}

#[derive(Clone, Debug)]
pub(super) struct Backoff {
    last: Option<Failure>,
    times: u32,
    /// 1; tests wait less.
    scale: f64,
}

impl Backoff {
    pub(super) fn new(scale: f64) -> Self {
        Self { last: None, times: 0, scale }
    }

    /// The connection works.
    pub(super) fn reset(&mut self) {
        self.last = None;
        self.times = 0;
    }

    pub(super) fn after(&mut self, failure: Failure) -> Duration {
        let same = self.last.is_some_and(|l| std::mem::discriminant(&l) == std::mem::discriminant(&failure));
        self.times = if same { self.times.saturating_add(1) } else { 1 };
        self.last = Some(failure);
        let doubled = |first: u64, most: u64| (first << (self.times - 1).min(16)).min(most);
        let millis = match failure {
            Failure::Lost if self.times == 1 => 0,
            Failure::Lost | Failure::Network => (250 * u64::from(self.times)).min(16_000),
            Failure::Http => doubled(5_000, 320_000),
            Failure::RateLimit(None) => doubled(60_000, 900_000),
            // A server that says a year is not believed.
            Failure::RateLimit(Some(seconds)) => seconds.clamp(1, 900) * 1_000,
        };
        Duration::from_millis(millis).mul_f64(self.scale)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_documented_steps() {
        let mut backoff = Backoff::new(1.0);
        let mut seconds = |failure| backoff.after(failure).as_secs_f64();
        assert_eq!([(); 3].map(|()| seconds(Failure::Lost)), [0.0, 0.5, 0.75]);
        assert_eq!([(); 3].map(|()| seconds(Failure::Network)), [0.25, 0.5, 0.75]);
        assert_eq!([(); 8].map(|()| seconds(Failure::Http)), [5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 320.0]);
        assert_eq!([(); 2].map(|()| seconds(Failure::RateLimit(None))), [60.0, 120.0]);
        assert_eq!(seconds(Failure::RateLimit(Some(7))), 7.0);
        assert_eq!(seconds(Failure::RateLimit(Some(u64::MAX))), 900.0);
        for _ in 0..100 {
            seconds(Failure::Network);
        }
        assert_eq!(seconds(Failure::Network), 16.0);
        backoff.reset();
        assert_eq!(backoff.after(Failure::Lost), Duration::ZERO);
    }
}
