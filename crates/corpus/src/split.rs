//! Splits into training and held-out examples that never tear related texts apart.
//!
//! The unit is the group (near copies, flip pairs: [`crate::dedup::Dedup::groups`]). A group's place is decided by a hash
//! of its texts and the seed, so the split does not depend on the order of rows, and adding rows moves few others.

use std::collections::BTreeMap;

use crate::clean::normalised_key;
use crate::dedup::{DedupOptions, find_duplicates, stable_hash};
use crate::error::{Error, Result};
use crate::example::Example;
use crate::rng::mix;

#[derive(Clone, Debug, Default, PartialEq)]
pub struct Split {
    pub train: Vec<Example>,
    pub held_out: Vec<Example>,
}

#[derive(Clone, Debug)]
pub struct SplitOptions {
    /// Share of the rows to hold out, 0 up to (not including) 1.
    pub held_out: f64,
    pub seed: u64,
}

impl Default for SplitOptions {
    fn default() -> Self {
        Self { held_out: 0.1, seed: 0 }
    }
}

/// What a split needs to know about a row.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SplitRow {
    /// Any number that is the same for rows that must stay together.
    pub(crate) group: u32,
    /// Rows of one stratum are held out in equal shares.
    pub(crate) stratum: u16,
    /// [`stable_hash`] of the normalised text.
    pub(crate) hash: u64,
}

/// Which rows are held out: in each stratum, as many whole groups as come nearest to the share.
///
/// A group that spans strata counts in the one of its member with the smallest hash.
pub(crate) fn held_out_rows(rows: &[SplitRow], options: &SplitOptions) -> Vec<bool> {
    let hash = |row: u32| mix(rows[row as usize].hash ^ mix(options.seed));
    let mut order: Vec<u32> = (0..rows.len() as u32).collect();
    order.sort_unstable_by_key(|row| (rows[*row as usize].group, hash(*row)));
    // (stratum, hash of the first member, where the group begins in `order`, its size)
    let mut groups: Vec<(u16, u64, u32, u32)> = Vec::new();
    let mut begins = 0u32;
    for members in order.chunk_by(|a, b| rows[*a as usize].group == rows[*b as usize].group) {
        groups.push((rows[members[0] as usize].stratum, hash(members[0]), begins, members.len() as u32));
        begins += members.len() as u32;
    }
    groups.sort_unstable();
    let mut held_out = vec![false; rows.len()];
    for stratum in groups.chunk_by(|a, b| a.0 == b.0) {
        let total: u32 = stratum.iter().map(|group| group.3).sum();
        let target = (f64::from(total) * options.held_out).round() as u32;
        let mut taken = 0;
        for (_, _, begins, size) in stratum {
            // A group that would overshoot by more than it helps is passed over.
            if taken < target && 2 * (target - taken) >= *size {
                for row in &order[*begins as usize..(begins + size) as usize] {
                    held_out[*row as usize] = true;
                }
                taken += size;
            }
        }
    }
    held_out
}

/// Numbers the strata of a data set: kind and label. A source with absurdly many kinds shares the last number.
#[derive(Default)]
pub(crate) struct Strata(BTreeMap<(String, String), u16>);

impl Strata {
    pub(crate) fn of(&mut self, example: &Example) -> u16 {
        let key = (example.kind_or_plain().to_owned(), example.label.clone());
        let next = self.0.len().min(usize::from(u16::MAX)) as u16;
        if next == u16::MAX { u16::MAX } else { *self.0.entry(key).or_insert(next) }
    }
}

/// Splits by seed, stratified by kind and label. Both halves keep the order of `examples`.
///
/// # Errors
///
/// If the share is not in [0, 1).
pub fn split_examples(examples: &[Example], options: &SplitOptions) -> Result<Split> {
    check_share(options.held_out)?;
    let groups = find_duplicates(examples, &DedupOptions::default()).groups;
    let mut strata = Strata::default();
    let rows: Vec<SplitRow> = examples
        .iter()
        .zip(&groups)
        .map(|(example, group)| SplitRow {
            group: *group,
            stratum: strata.of(example),
            hash: stable_hash(&normalised_key(&example.text)),
        })
        .collect();
    Ok(partition(examples, &held_out_rows(&rows, options)))
}

/// Splits by time: the latest share is held out. A group that reaches over the border goes to the side of its earliest
/// member, so that nothing in the held-out part has a near copy in the past.
///
/// # Errors
///
/// If a row has no time, or one that is neither ISO 8601 nor seconds since 1970.
pub fn split_by_time(examples: &[Example], options: &SplitOptions) -> Result<Split> {
    check_share(options.held_out)?;
    let groups = find_duplicates(examples, &DedupOptions::default()).groups;
    let times = examples
        .iter()
        .enumerate()
        .map(|(row, example)| {
            let time = example.time.as_deref().unwrap_or_default();
            parse_time(time).ok_or_else(|| {
                Error::usage(format!(
                    "row {} has no usable time ({time:?})\n  hint: split by seed, or name the column that holds ISO 8601 \
                     times or seconds since 1970",
                    row + 1
                ))
            })
        })
        .collect::<Result<Vec<f64>>>()?;
    Ok(partition(examples, &held_out_by_time(&groups, &times, options.held_out)))
}

/// Which rows are held out when the latest groups are; `times` in any unit that grows.
pub(crate) fn held_out_by_time(groups: &[u32], times: &[f64], share: f64) -> Vec<bool> {
    let mut earliest: BTreeMap<u32, (f64, usize)> = BTreeMap::new();
    for (group, time) in groups.iter().zip(times) {
        let entry = earliest.entry(*group).or_insert((*time, 0));
        entry.0 = entry.0.min(*time);
        entry.1 += 1;
    }
    let mut order: Vec<(f64, u32, usize)> =
        earliest.into_iter().map(|(group, (time, size))| (time, group, size)).collect();
    order.sort_unstable_by(|a, b| b.0.total_cmp(&a.0).then(b.1.cmp(&a.1)));
    let target = (times.len() as f64 * share).round() as usize;
    let (mut taken, mut chosen) = (0, std::collections::HashSet::new());
    for (_, group, size) in order {
        if taken + size > target {
            break;
        }
        taken += size;
        chosen.insert(group);
    }
    groups.iter().map(|group| chosen.contains(group)).collect()
}

pub(crate) fn check_share(share: f64) -> Result<()> {
    if (0.0..1.0).contains(&share) {
        return Ok(());
    }
    Err(Error::usage(format!("the held-out share must be at least 0 and below 1, found {share}")))
}

fn partition(examples: &[Example], held_out: &[bool]) -> Split {
    let mut split = Split::default();
    for (example, held_out) in examples.iter().zip(held_out) {
        if *held_out { &mut split.held_out } else { &mut split.train }.push(example.clone());
    }
    split
}

/// Seconds since 1970 of an ISO 8601 date or date-time (`2024-05-01`, `2024-05-01T12:30:00.5Z`, `2024-05-01
/// 12:30:00+02:00`; without an offset, UTC), of a date in words as X's older files and feeds have it (`Wed Oct 10 20:19:24
/// +0000 2018`, `Wed, 10 Oct 2018 20:19:24 GMT`), or of a number of seconds, milliseconds, microseconds or nanoseconds.
pub(crate) fn parse_time(text: &str) -> Option<f64> {
    let text = text.trim();
    if let Ok(number) = text.parse::<f64>() {
        // Today is 1.7e9 in seconds: units three orders of magnitude apart cannot be confused.
        let scale = match number.abs() {
            size if !size.is_finite() => return None,
            size if size < 1e11 => 1.0,
            size if size < 1e14 => 1e3,
            size if size < 1e17 => 1e6,
            _ => 1e9,
        };
        return Some(number / scale);
    }
    if text.starts_with(|first: char| first.is_ascii_alphabetic()) {
        return time_in_words(text);
    }
    let bytes = text.as_bytes();
    let number = |from: usize, to: usize| -> Option<i64> {
        let digits = text.get(from..to)?;
        if digits.bytes().all(|byte| byte.is_ascii_digit()) { digits.parse().ok() } else { None }
    };
    let (year, month, day) = (number(0, 4)?, number(5, 7)?, number(8, 10)?);
    if bytes.get(4) != Some(&b'-')
        || bytes.get(7) != Some(&b'-')
        || !(1..=12).contains(&month)
        || !(1..=31).contains(&day)
    {
        return None;
    }
    let days = days_from_civil(year, month, day) as f64 * 86_400.0;
    let rest = text.get(10..)?;
    if rest.is_empty() {
        return Some(days);
    }
    let (clock, offset) = split_offset(rest.strip_prefix(['T', 't', ' '])?)?;
    Some(days + clock_seconds(clock.trim())? - offset)
}

/// Seconds of `hh`, `hh:mm` or `hh:mm:ss` since midnight.
fn clock_seconds(clock: &str) -> Option<f64> {
    let (mut seconds, mut unit) = (0.0, 3600.0);
    let mut parts = clock.split(':');
    for limit in [24.0, 60.0, 61.0] {
        let Some(part) = parts.next() else { break };
        let value: f64 = part.parse().ok().filter(|value| (0.0..limit).contains(value))?;
        seconds += value * unit;
        unit /= 60.0;
    }
    parts.next().is_none().then_some(seconds)
}

/// `Wed Oct 10 20:19:24 +0000 2018`, or `Wed, 10 Oct 2018 20:19:24 +0000`, where the offset may be `GMT` or `UTC`.
fn time_in_words(text: &str) -> Option<f64> {
    const MONTHS: [&str; 12] = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let words: Vec<&str> = text.split([' ', ',']).filter(|word| !word.is_empty()).take(7).collect();
    let (day, month, year, clock, offset) = match words[..] {
        [_, month, day, clock, offset, year] if clock.contains(':') => (day, month, year, clock, offset),
        [_, day, month, year, clock, offset] if clock.contains(':') => (day, month, year, clock, offset),
        _ => return None,
    };
    let month = MONTHS.iter().position(|known| known.eq_ignore_ascii_case(month))? as i64 + 1;
    let day: i64 = day.parse().ok().filter(|day| (1..=31).contains(day))?;
    let year: i64 = year.parse().ok().filter(|year| (1900..=9999).contains(year))?;
    let offset = match offset {
        "GMT" | "UTC" | "Z" => 0.0,
        numeric if numeric.starts_with(['+', '-']) => split_offset(numeric)?.1,
        _ => return None,
    };
    Some(days_from_civil(year, month, day) as f64 * 86_400.0 + clock_seconds(clock)? - offset)
}

/// Cuts `Z`, `UTC`, `+hh:mm`, `-hhmm` or `+hh` off a clock time; the offset in seconds.
fn split_offset(clock: &str) -> Option<(&str, f64)> {
    let trimmed = clock.trim_end_matches("UTC").trim_end_matches(['Z', 'z']);
    if trimmed.len() < clock.len() {
        return Some((trimmed, 0.0));
    }
    let Some(at) = clock.rfind(['+', '-']) else { return Some((clock, 0.0)) };
    let digits: String = clock[at + 1..].chars().filter(|character| *character != ':').collect();
    if !matches!(digits.len(), 2 | 4) || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let hours: f64 = digits[..2].parse().ok()?;
    let minutes: f64 = digits.get(2..).filter(|minutes| !minutes.is_empty()).map_or(Some(0.0), |m| m.parse().ok())?;
    let offset = hours * 3600.0 + minutes * 60.0;
    Some((&clock[..at], if clock.as_bytes()[at] == b'-' { -offset } else { offset }))
}

/// Days from 1970-01-01 in the proleptic Gregorian calendar (the usual era arithmetic over 400-year cycles).
pub(crate) fn days_from_civil(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let era = year.div_euclid(400);
    let year_of_era = year.rem_euclid(400);
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
    era * 146_097 + day_of_era - 719_468
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times() {
        assert_eq!(parse_time("1970-01-02"), Some(86_400.0));
        assert_eq!(parse_time("2024-02-29T12:30:00Z"), Some(1_709_209_800.0));
        assert_eq!(parse_time("2024-02-29 14:30:00.5+02:00"), Some(1_709_209_800.5));
        assert_eq!(parse_time("2024-02-29 07:00-0530"), Some(1_709_209_800.0));
        assert_eq!(parse_time("1709209800"), Some(1_709_209_800.0));
        assert_eq!(parse_time("1709209800123"), Some(1_709_209_800.123));
        let date = Some(1_539_202_764.0);
        assert_eq!(parse_time("Wed Oct 10 20:19:24 +0000 2018"), date);
        assert_eq!(parse_time("Wed, 10 Oct 2018 22:19:24 +0200"), date);
        assert_eq!(parse_time("Wed, 10 Oct 2018 20:19:24 GMT"), date);
        for wrong in ["Wed Oct 10 20:19:24 2018", "Wed Foo 10 20:19:24 +0000 2018", "Wed Oct 10 20:19:24 +é 2018"] {
            assert_eq!(parse_time(wrong), None, "{wrong}");
        }
        for wrong in ["", "soon", "2024-13-01", "2024-01-01T25:00", "2024/01/01", "2024-01-01T1:2:3:4", "2024-01-01+é"]
        {
            assert_eq!(parse_time(wrong), None, "{wrong}");
        }
    }

    fn numbered(count: usize) -> Vec<Example> {
        // Digits in words keep the texts apart.
        let word = |n: usize| -> String {
            n.to_string()
                .bytes()
                .map(|digit| {
                    ["zero", "uno", "deux", "drei", "quattro", "cinq", "sechs", "siete", "otto", "nio"]
                        [(digit - b'0') as usize]
                })
                .collect()
        };
        (0..count)
            .map(|n| {
                let mut example =
                    Example::new(format!("{} {}", word(n), word(n * 7919 % 10_007)), crate::LABELS[n % 3]);
                example.kind = Some(crate::KINDS[n % 5].into());
                example.time = Some(format!("{}", 1_600_000_000 + n));
                example
            })
            .collect()
    }

    #[test]
    fn shares_hold_in_every_stratum_and_order_does_not_matter() {
        let examples = numbered(600);
        let options = SplitOptions { held_out: 0.1, seed: 3 };
        let split = split_examples(&examples, &options).unwrap();
        assert_eq!((split.train.len(), split.held_out.len()), (540, 60));
        for kind in crate::KINDS {
            assert_eq!(split.held_out.iter().filter(|e| e.kind_or_plain() == kind).count(), 12, "{kind}");
        }
        let mut reversed = examples.clone();
        reversed.reverse();
        let mut other = split_examples(&reversed, &options).unwrap();
        other.held_out.reverse();
        assert_eq!(other.held_out, split.held_out);
        let reseeded = split_examples(&examples, &SplitOptions { seed: 4, ..options }).unwrap();
        assert_ne!(reseeded.held_out, split.held_out);
        assert!(split_examples(&examples, &SplitOptions { held_out: 1.0, seed: 0 }).is_err());
    }

    #[test]
    fn later_rows_are_held_out_and_copies_follow_the_earliest() {
        let mut examples = numbered(100);
        examples[95].text = examples[3].text.clone();
        let split = split_by_time(&examples, &SplitOptions { held_out: 0.1, seed: 0 }).unwrap();
        assert_eq!(split.held_out.len(), 10);
        assert!(split.held_out.iter().all(|e| e.text != examples[3].text));
        assert!(split.held_out.contains(&examples[99]) && split.held_out.contains(&examples[89]));
        examples[7].time = None;
        let error = split_by_time(&examples, &SplitOptions::default()).unwrap_err().to_string();
        assert!(error.contains("row 8 has no usable time"), "{error}");
    }
}
