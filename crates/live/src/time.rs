//! Times as milliseconds since 1970 in UTC: reading them as files and services write them, and writing RFC 3339.

use std::time::{SystemTime, UNIX_EPOCH};

/// Milliseconds since 1970-01-01T00:00:00Z.
pub type Millis = i64;

pub const SECOND: Millis = 1_000;
pub const MINUTE: Millis = 60 * SECOND;
pub const HOUR: Millis = 60 * MINUTE;
pub const DAY: Millis = 24 * HOUR;

/// 0001-01-01 and 9999-12-31: what is outside is no time of a post.
const RANGE: std::ops::RangeInclusive<Millis> = -62_135_596_800_000..=253_402_300_799_999;

/// The clock of this machine.
pub fn now() -> Millis {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| i64::try_from(d.as_millis()).unwrap_or(0))
}

/// `2026-11-28T09:00:00.000Z`.
pub fn rfc3339(time: Millis) -> String {
    let (days, rest) = (time.div_euclid(DAY), time.rem_euclid(DAY));
    let (year, month, day) = civil_from_days(days);
    let (h, m, s, ms) = (rest / HOUR, rest / MINUTE % 60, rest / SECOND % 60, rest % 1000);
    format!("{year:04}-{month:02}-{day:02}T{h:02}:{m:02}:{s:02}.{ms:03}Z")
}

/// `2026-11-28`.
pub fn date(time: Millis) -> String {
    let (year, month, day) = civil_from_days(time.div_euclid(DAY));
    format!("{year:04}-{month:02}-{day:02}")
}

/// Reads RFC 3339 and its relatives (`2024-01-15 10:35:00`, `2024-01-15`, offsets, any number of decimals), seconds,
/// milliseconds or microseconds since 1970, and the form of Twitter's first API (`Wed Oct 10 20:19:24 +0000 2018`). Without
/// an offset a time is in UTC.
pub fn parse(text: &str) -> Option<Millis> {
    let text = text.trim();
    if text.len() > 64 || !text.is_ascii() {
        return None;
    }
    if let Ok(number) = text.parse::<f64>() {
        return from_number(number);
    }
    parse_rfc3339(text).or_else(|| parse_classic(text)).filter(|t| RANGE.contains(t))
}

/// Seconds, milliseconds or microseconds since 1970, by their size. Years such as `2024` are no time.
pub fn from_number(number: f64) -> Option<Millis> {
    let millis = match number.abs() {
        n if !n.is_finite() || n < 1e6 => return None,
        n if n < 1e11 => number * 1e3,
        n if n < 1e14 => number,
        n if n < 1e17 => number / 1e3,
        _ => return None,
    };
    Some(millis.round() as Millis).filter(|t| RANGE.contains(t))
}

fn parse_rfc3339(text: &str) -> Option<Millis> {
    let (date, time) = match text.find(['T', 't', ' ']) {
        Some(at) => (&text[..at], text[at + 1..].trim_start()),
        None => (text, ""),
    };
    let mut parts = date.split('-');
    let (year, month, day) = (digits(parts.next()?, 4)?, digits(parts.next()?, 2)?, digits(parts.next()?, 2)?);
    if parts.next().is_some() {
        return None;
    }
    let days = checked_days(year, month, day)?;
    if time.is_empty() {
        return Some(days * DAY);
    }
    let (clock, offset) = match time.find(['Z', 'z', '+', '-']) {
        Some(at) => (time[..at].trim_end(), &time[at..]),
        None => (time, "Z"),
    };
    Some(days * DAY + parse_clock(clock)? - parse_offset(offset)?)
}

/// `Wed Oct 10 20:19:24 +0000 2018`.
fn parse_classic(text: &str) -> Option<Millis> {
    const MONTHS: [&str; 12] = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let words: Vec<&str> = text.split(' ').filter(|w| !w.is_empty()).collect();
    let [_, month, day, clock, offset, year] = words[..] else { return None };
    let month = MONTHS.iter().position(|m| *m == month)? as i64 + 1;
    let day = day.parse::<i64>().ok()?;
    Some(checked_days(digits(year, 4)?, month, day)? * DAY + parse_clock(clock)? - parse_offset(offset)?)
}

fn parse_clock(text: &str) -> Option<Millis> {
    let (whole, decimals) = text.split_once(['.', ',']).unwrap_or((text, ""));
    let mut parts = whole.split(':');
    let (h, m) = (digits(parts.next()?, 2)?, digits(parts.next()?, 2)?);
    let s = parts.next().map_or(Some(0), |s| digits(s, 2))?;
    if h > 23 || m > 59 || s > 60 || parts.next().is_some() || !decimals.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let millis = decimals.bytes().chain(*b"000").take(3).fold(0, |ms, b| ms * 10 + i64::from(b - b'0'));
    Some(h * HOUR + m * MINUTE + s * SECOND + millis)
}

fn parse_offset(text: &str) -> Option<Millis> {
    if text.eq_ignore_ascii_case("z") {
        return Some(0);
    }
    let sign = match text.as_bytes().first()? {
        b'+' => 1,
        b'-' => -1,
        _ => return None,
    };
    let rest = text[1..].replace(':', "");
    let (h, m) = match rest.len() {
        2 => (digits(&rest, 2)?, 0),
        4 => (digits(&rest[..2], 2)?, digits(&rest[2..], 2)?),
        _ => return None,
    };
    (h <= 23 && m <= 59).then_some(sign * (h * HOUR + m * MINUTE))
}

fn digits(text: &str, count: usize) -> Option<i64> {
    (text.len() == count && text.bytes().all(|b| b.is_ascii_digit())).then(|| text.parse().ok())?
}

fn checked_days(year: i64, month: i64, day: i64) -> Option<i64> {
    let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    let length = match month {
        2 => 28 + i64::from(leap),
        4 | 6 | 9 | 11 => 30,
        1..=12 => 31,
        _ => return None,
    };
    (1..=length).contains(&day).then(|| days_from_civil(year, month, day))
}

/// Days since 1970-01-01 in the proleptic Gregorian calendar (Howard Hinnant, "chrono-Compatible Low-Level Date
/// Algorithms").
fn days_from_civil(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let era = year.div_euclid(400);
    let of_era = year.rem_euclid(400);
    let of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year - 719_468
}

fn civil_from_days(days: i64) -> (i64, i64, i64) {
    let days = days + 719_468;
    let (era, of_era) = (days.div_euclid(146_097), days.rem_euclid(146_097));
    let year = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let shifted = (5 * of_year + 2) / 153;
    let day = of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    (year + era * 400 + i64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forms_of_one_moment() {
        let want = 1_705_314_900_123;
        for text in [
            "2024-01-15T10:35:00.123Z",
            "2024-01-15 10:35:00.123456",
            "2024-01-15t12:35:00,123+02:00",
            "2024-01-15T05:35:00.123-0500",
            "1705314900123",
            "1705314900.123",
            "1705314900123000",
        ] {
            assert_eq!(parse(text), Some(want), "{text}");
        }
        assert_eq!(rfc3339(want), "2024-01-15T10:35:00.123Z");
        assert_eq!(parse("Mon Jan 15 10:35:00 +0000 2024"), Some(1_705_314_900_000));
        assert_eq!(parse("2024-02-29"), Some(1_709_164_800_000));
        assert_eq!(date(1_709_164_800_000 - 1), "2024-02-28");
    }

    #[test]
    fn what_is_no_time() {
        for text in
            ["", "2024", "2023-02-29", "2024-13-01", "10:35", "2024-01-15T25:00:00Z", "NaN", "1e300", "ü", "now"]
        {
            assert_eq!(parse(text), None, "{text}");
        }
    }

    #[test]
    fn there_and_back() {
        for time in [0, -1, 951_782_399_999, 4_102_444_800_000, -2_208_988_800_000] {
            assert_eq!(parse(&rfc3339(time)), Some(time));
        }
    }
}
