//! Ids of posts, as small as they can be kept: the windows and the memory of texts hold hundreds of thousands of them.

use std::fmt;
use std::sync::Arc;

/// Sixteen bytes. Numbers (X) need nothing else; other ids are shared by all who hold a clone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Id {
    Number(u64),
    Text(Arc<str>),
}

impl From<&str> for Id {
    fn from(id: &str) -> Self {
        // Only what is written again exactly as it was.
        let plain = id.bytes().all(|b| b.is_ascii_digit()) && (id == "0" || !id.starts_with('0'));
        match id.parse() {
            Ok(number) if plain => Self::Number(number),
            _ => Self::Text(id.into()),
        }
    }
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(number) => number.fmt(f),
            Self::Text(text) => f.write_str(text),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_id_comes_back_as_it_was() {
        assert_eq!(size_of::<Id>(), 16);
        let most = u64::MAX.to_string();
        for (text, is_number) in [
            ("0", true),
            ("1996543210987654321", true),
            (most.as_str(), true),
            ("18446744073709551616", false),
            ("007", false),
            ("+7", false),
            ("", false),
            ("at://did:plc:abc/app.bsky.feed.post/3k", false),
            ("٣", false),
        ] {
            let id = Id::from(text);
            assert_eq!((id.to_string().as_str(), matches!(id, Id::Number(_))), (text, is_number));
        }
    }
}
