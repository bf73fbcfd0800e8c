//! Numbers as people read them: percentages, signs, thousands, times and sizes. One way for the page and the terminal.

/// "84.2 %", with a no-break space.
pub(crate) fn percent(share: f64) -> String {
    format!("{:.1}\u{a0}%", if share.is_finite() { share * 100.0 } else { 0.0 } + 0.0)
}

/// With so many decimals and a true minus sign, which never stands before a zero; "–" for what is not a number.
pub(crate) fn decimal(value: f64, decimals: usize) -> String {
    if !value.is_finite() {
        return "–".into();
    }
    let plain = format!("{:.decimals$}", value.abs());
    let zero = plain.chars().all(|c| c == '0' || c == '.');
    if value < 0.0 && !zero { format!("\u{2212}{plain}") } else { plain }
}

/// With a sign in front, for differences.
pub(crate) fn signed(value: f64, decimals: usize) -> String {
    let number = decimal(value, decimals);
    if number.starts_with('\u{2212}') { number } else { format!("+{number}") }
}

/// "< 0.001" or "= 0.034", to stand after "p".
pub(crate) fn p_value(p: f64) -> String {
    if p < 0.001 { "<\u{a0}0.001".into() } else { format!("=\u{a0}{p:.3}") }
}

/// A count with thin no-break spaces between the thousands.
pub(crate) fn count(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (i, c) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push('\u{202f}');
        }
        out.push(c);
    }
    out
}

/// "42 s", "3 min 20 s", "2 h 05 min".
pub(crate) fn duration(seconds: f64) -> String {
    if !seconds.is_finite() || seconds < 0.0 {
        return "–".into();
    }
    if seconds < 10.0 {
        return format!("{seconds:.1} s");
    }
    let whole = seconds.round() as u64;
    match (whole / 3600, whole / 60 % 60, whole % 60) {
        (0, 0, s) => format!("{s} s"),
        (0, m, s) => format!("{m} min {s:02} s"),
        (h, m, _) => format!("{h} h {m:02} min"),
    }
}

/// "1.4 MB", in powers of ten.
pub(crate) fn bytes(n: u64) -> String {
    const UNITS: [&str; 5] = ["kB", "MB", "GB", "TB", "PB"];
    if n < 1000 {
        return format!("{n} B");
    }
    let mut value = n as f64;
    let mut unit = "B";
    for next in UNITS {
        if value < 999.5 {
            break;
        }
        value /= 1000.0;
        unit = next;
    }
    if value < 10.0 { format!("{value:.1} {unit}") } else { format!("{value:.0} {unit}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_well() {
        assert_eq!([percent(0.8421), percent(1.0), percent(f64::NAN)], ["84.2\u{a0}%", "100.0\u{a0}%", "0.0\u{a0}%"]);
        assert_eq!([signed(-0.25, 2), signed(-0.001, 2), signed(3.0, 1)], ["\u{2212}0.25", "+0.00", "+3.0"]);
        assert_eq!([count(7), count(1234), count(1_234_567)], ["7", "1\u{202f}234", "1\u{202f}234\u{202f}567"]);
        assert_eq!(
            [duration(0.25), duration(59.6), duration(200.0), duration(7500.0), duration(f64::NAN)],
            ["0.2 s", "1 min 00 s", "3 min 20 s", "2 h 05 min", "–"]
        );
        assert_eq!(
            [bytes(999), bytes(1_400_000), bytes(276_000_000), bytes(u64::MAX)],
            ["999 B", "1.4 MB", "276 MB", "18447 PB"]
        );
    }
}
