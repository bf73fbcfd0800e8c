//! When to try again: exponential back-off with jitter by seed, and what servers say in `Retry-After`.

use std::time::Duration;

use crate::rng::Rng;
use crate::split::days_from_civil;

/// Three attempts, 4 to 70 seconds apart, unless the server asks for more.
#[derive(Clone, Debug, PartialEq)]
pub struct RetryPolicy {
    /// Attempts in all, the first one included.
    pub attempts: u32,
    pub shortest: Duration,
    pub longest: Duration,
    /// The longest `Retry-After` that is waited for; a server that asks for more is given up.
    pub longest_retry_after: Duration,
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self {
            attempts: 3,
            shortest: Duration::from_secs(4),
            longest: Duration::from_secs(70),
            longest_retry_after: Duration::from_secs(600),
        }
    }
}

impl RetryPolicy {
    /// The pause after failed attempt number `attempt` (from 1): `shortest · 2^(attempt-1)`, up to half as much again by
    /// the seed so that parallel requests do not come back together, never more than `longest`.
    pub fn pause(&self, attempt: u32, seed: u64, request: u64) -> Duration {
        let doubled = self.shortest.saturating_mul(1u32.checked_shl(attempt.saturating_sub(1)).unwrap_or(u32::MAX));
        let jitter = 1.0 + 0.5 * Rng::keyed(seed, &[0x6A_69_74, request, u64::from(attempt)]).unit();
        doubled.min(self.longest).mul_f64(jitter).min(self.longest)
    }
}

/// How long a `Retry-After` header asks to wait: seconds, or the time until an HTTP date. `date` is the server's own clock
/// (its `Date` header), which is what its date is meant against; `now` (seconds since 1970) stands in where there is none.
pub(crate) fn retry_after(value: &str, date: Option<&str>, now: f64) -> Option<Duration> {
    let value = value.trim();
    let seconds = match value.parse::<f64>() {
        Ok(seconds) => seconds,
        Err(_) => http_date(value)? - date.and_then(http_date).unwrap_or(now),
    };
    if seconds.is_nan() { None } else { Duration::try_from_secs_f64(seconds.max(0.0)).ok() }
}

/// Seconds since 1970 of an HTTP date in any of its three forms (RFC 9110, section 5.6.7).
fn http_date(text: &str) -> Option<f64> {
    let words: Vec<&str> = text.split([' ', ',']).filter(|word| !word.is_empty()).collect();
    let (day, month, year, clock) = match words[..] {
        // Sun, 06 Nov 1994 08:49:37 GMT
        [_, day, month, year, clock, "GMT"] => (day, month, year, clock),
        // Sunday, 06-Nov-94 08:49:37 GMT
        [_, date, clock, "GMT"] => {
            let mut parts = date.split('-');
            (parts.next()?, parts.next()?, parts.next()?, clock)
        }
        // Sun Nov  6 08:49:37 1994
        [_, month, day, clock, year] => (day, month, year, clock),
        _ => return None,
    };
    const MONTHS: [&str; 12] = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let month = MONTHS.iter().position(|known| *known == month)? as i64 + 1;
    let day: i64 = day.parse().ok().filter(|day| (1..=31).contains(day))?;
    let year: i64 = match year.parse().ok().filter(|year| (0..=9999).contains(year))? {
        year @ 0..=69 => 2000 + year,
        year @ 70..=99 => 1900 + year,
        year => year,
    };
    let mut parts = clock.split(':').map(|part| part.parse::<u32>().ok().filter(|part| *part <= 60));
    let (hours, minutes, seconds) = (parts.next()??, parts.next()??, parts.next()??);
    let days = days_from_civil(year, month, day);
    (hours < 24).then(|| days as f64 * 86_400.0 + f64::from(hours * 3600 + minutes * 60 + seconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_within_bounds_and_follow_the_seed() {
        let policy = RetryPolicy::default();
        for (attempt, low, high) in [(1, 4.0, 6.0), (2, 8.0, 12.0), (3, 16.0, 24.0), (5, 64.0, 70.0), (40, 70.0, 70.0)]
        {
            let pause = policy.pause(attempt, 1, 2).as_secs_f64();
            assert!((low..=high).contains(&pause), "attempt {attempt}: {pause}");
        }
        assert_eq!(policy.pause(1, 1, 2), policy.pause(1, 1, 2));
        assert_ne!(policy.pause(1, 1, 2), policy.pause(1, 1, 3));
    }

    #[test]
    fn retry_after_in_every_form() {
        let date = 784_111_777.0;
        for form in ["Sun, 06 Nov 1994 08:49:37 GMT", "Sunday, 06-Nov-94 08:49:37 GMT", "Sun Nov  6 08:49:37 1994"] {
            assert_eq!(http_date(form), Some(date), "{form}");
        }
        assert_eq!(retry_after("20", None, 0.0), Some(Duration::from_secs(20)));
        assert_eq!(retry_after("0.5", None, 0.0), Some(Duration::from_millis(500)));
        assert_eq!(retry_after("-3", None, 0.0), Some(Duration::ZERO));
        let later = "Sun, 06 Nov 1994 08:50:07 GMT";
        assert_eq!(retry_after(later, Some("Sun, 06 Nov 1994 08:49:37 GMT"), 0.0), Some(Duration::from_secs(30)));
        assert_eq!(retry_after(later, None, date + 10.0), Some(Duration::from_secs(20)));
        assert_eq!(retry_after(later, None, date + 100.0), Some(Duration::ZERO));
        for wrong in ["", "soon", "nan", "inf", "1e300", "Sun, 06 Foo 1994 08:49:37 GMT", "Sun, 06 Nov 1994 08:49 GMT"]
        {
            assert_eq!(retry_after(wrong, None, 0.0), None, "{wrong}");
        }
    }
}
