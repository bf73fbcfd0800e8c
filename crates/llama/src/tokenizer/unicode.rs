//! The three character classes that the pre-tokenizers' regular expressions name: `\p{L}`, `\p{N}` and `\s`.

use std::sync::OnceLock;

use regex_syntax::hir::{Class, HirKind};

/// What a character counts as. The classes do not overlap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum CharClass {
    Other = 0,
    Letter = 1,
    Number = 2,
    Space = 3,
}

/// Two bits a code point, made once from the tables of `regex-syntax`.
struct Table(Vec<u8>);

impl Table {
    fn build() -> Self {
        let mut table = vec![0u8; 0x11_0000 / 4];
        for (pattern, class) in
            [(r"\p{L}", CharClass::Letter), (r"\p{N}", CharClass::Number), (r"\p{White_Space}", CharClass::Space)]
        {
            // The patterns are constants: a failure means that the crate was built without its Unicode tables.
            let hir = regex_syntax::parse(pattern).unwrap_or_else(|e| panic!("{pattern}: {e}"));
            let HirKind::Class(Class::Unicode(ranges)) = hir.kind() else { panic!("{pattern} is no character class") };
            for range in ranges.iter() {
                for code in range.start() as usize..=range.end() as usize {
                    table[code / 4] |= (class as u8) << (2 * (code % 4));
                }
            }
        }
        Table(table)
    }
}

pub(crate) fn class(c: char) -> CharClass {
    static TABLE: OnceLock<Table> = OnceLock::new();
    let table = TABLE.get_or_init(Table::build);
    let code = c as usize;
    match (table.0[code / 4] >> (2 * (code % 4))) & 3 {
        1 => CharClass::Letter,
        2 => CharClass::Number,
        3 => CharClass::Space,
        _ => CharClass::Other,
    }
}

/// GPT-2's spelling of bytes as printable characters: printable Latin-1 stands for itself, the others are moved to
/// U+0100 and up, in order.
pub(crate) fn byte_to_char(byte: u8) -> char {
    match byte {
        b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF => byte as char,
        0..=0x20 => char::from_u32(0x100 + u32::from(byte)).unwrap_or(' '),
        0x7F..=0xA0 => char::from_u32(0x121 + u32::from(byte - 0x7F)).unwrap_or(' '),
        0xAD => '\u{143}',
    }
}

/// The byte that a character of GPT-2's alphabet stands for.
pub(crate) fn char_to_byte(c: char) -> Option<u8> {
    match c {
        '!'..='~' | '\u{A1}'..='\u{AC}' | '\u{AE}'..='\u{FF}' => u8::try_from(c as u32).ok(),
        '\u{100}'..='\u{120}' => u8::try_from(c as u32 - 0x100).ok(),
        '\u{121}'..='\u{142}' => u8::try_from(c as u32 - 0x121 + 0x7F).ok(),
        '\u{143}' => Some(0xAD),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_alphabet_is_a_bijection() {
        let chars: Vec<char> = (0..=255).map(byte_to_char).collect();
        for (byte, &c) in chars.iter().enumerate() {
            assert_eq!(char_to_byte(c), Some(byte as u8));
        }
        assert_eq!((chars[b' ' as usize], chars[b'\n' as usize], chars[0x7F], chars[0xA0]), ('Ġ', 'Ċ', 'ġ', 'ł'));
        assert_eq!(char_to_byte('→'), None);
    }

    #[test]
    fn classes() {
        for (c, expected) in [
            ('a', CharClass::Letter),
            ('語', CharClass::Letter),
            ('7', CharClass::Number),
            ('½', CharClass::Number),
            ('Ⅷ', CharClass::Number),
            ('٣', CharClass::Number),
            (' ', CharClass::Space),
            ('\u{3000}', CharClass::Space),
            ('\u{85}', CharClass::Space),
            ('\u{200B}', CharClass::Other),
            ('\u{301}', CharClass::Other),
            ('🚀', CharClass::Other),
            ('$', CharClass::Other),
        ] {
            assert_eq!(class(c), expected, "{c:?}");
        }
    }
}
