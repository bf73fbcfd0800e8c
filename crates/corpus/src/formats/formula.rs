//! Formula injection: a cell that begins with `=`, `+`, `-`, `@` or a control character is run by spreadsheets.
//!
//! Such cells get an apostrophe in front when written and lose it when read. Cells that already begin with apostrophes
//! before a dangerous character get one more, so writing and reading are exact inverses for every text. Numbers ("-0.5")
//! are left alone: they are harmless, and other programs want to read them.

use std::borrow::Cow;

fn is_dangerous(cell: &str) -> bool {
    let Some(first) = cell.chars().next() else { return false };
    let starts_formula = matches!(first, '=' | '+' | '-' | '@' | '\t' | '\r' | '\n' | '＝' | '＋' | '－' | '＠');
    starts_formula && !is_number(cell)
}

fn is_number(cell: &str) -> bool {
    cell.bytes().all(|byte| byte.is_ascii_digit() || matches!(byte, b'+' | b'-' | b'.' | b'e' | b'E'))
        && cell.parse::<f64>().is_ok()
}

/// The cell as it is safe to write.
pub fn neutralise(cell: &str) -> Cow<'_, str> {
    if is_dangerous(cell.trim_start_matches('\'')) { Cow::Owned(format!("'{cell}")) } else { Cow::Borrowed(cell) }
}

/// The cell as it was before [`neutralise`].
pub fn restore(cell: &str) -> &str {
    match cell.strip_prefix('\'') {
        Some(rest) if is_dangerous(rest.trim_start_matches('\'')) => rest,
        _ => cell,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn dangerous_cells() {
        assert_eq!(neutralise("=cmd|'/c calc'!A1"), "'=cmd|'/c calc'!A1");
        assert_eq!(neutralise("@jim $AAPL +5%"), "'@jim $AAPL +5%");
        assert_eq!(neutralise("'=1"), "''=1");
        assert_eq!(neutralise("-5% today"), "'-5% today");
        for harmless in ["", "plain", "-0.5", "+3", "1e-9", "'quoted'", "a=b", "'"] {
            assert_eq!(neutralise(harmless), harmless);
            assert_eq!(restore(harmless), harmless);
        }
        assert_eq!(restore("'=1+1"), "=1+1");
        assert_eq!(restore("''=1"), "'=1");
    }

    proptest! {
        #[test]
        fn restore_undoes_neutralise(cell in "['=+@\t\r-]{0,4}\\PC{0,12}") {
            let written = neutralise(&cell);
            prop_assert!(!is_dangerous(&written));
            prop_assert_eq!(restore(&written), cell.as_str());
        }
    }
}
