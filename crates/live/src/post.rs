//! A post on its way: as a source gives it, as the log keeps it, as the store and the API know it.

use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};
use crate::tickers::TickerMention;
use crate::time::{self, MINUTE, Millis};

/// Longer texts are refused: X's long posts have 25,000 characters at most.
pub const MAX_TEXT: usize = 100_000;
/// Longer names of sources, posts, authors and cursors are refused.
pub const MAX_ID: usize = 512;
const MAX_URL: usize = 2_048;
/// Clocks differ; what claims to be later than this is from the future.
const MAX_AHEAD: Millis = 2 * MINUTE;

/// What a source delivers.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Incoming {
    pub id: String,
    pub author: String,
    pub text: String,
    /// When it was written; `None` is "now".
    pub event_time: Option<Millis>,
    pub url: Option<String>,
    /// The post that this one repeats or replaces (a retweet, an edit).
    pub copy_of: Option<String>,
    /// Where the source goes on after this post.
    pub cursor: Option<String>,
}

/// A record of the log. The author is a keyed hash already: names never reach the disk.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Post {
    #[serde(rename = "s")]
    pub source: String,
    #[serde(rename = "i")]
    pub id: String,
    #[serde(rename = "a")]
    pub author: String,
    #[serde(rename = "e")]
    pub event_time: Millis,
    #[serde(rename = "r")]
    pub received_at: Millis,
    #[serde(rename = "t")]
    pub text: String,
    #[serde(rename = "u", default, skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
    #[serde(rename = "c", default, skip_serializing_if = "Option::is_none")]
    pub copy_of: Option<String>,
    #[serde(rename = "k", default, skip_serializing_if = "Option::is_none")]
    pub cursor: Option<String>,
}

impl Post {
    /// Checks what a source delivered. A time from the future becomes the time of receipt: one wrong clock must not close
    /// everybody's windows.
    ///
    /// # Errors
    /// Why the post cannot be taken, for the list of dead letters.
    pub fn check(source: &str, mut post: Incoming, received_at: Millis, names: &AuthorKey) -> Result<Self, String> {
        // No database takes U+0000 in a text.
        for field in [&mut post.id, &mut post.author, &mut post.text] {
            if field.contains('\0') {
                *field = field.replace('\0', "\u{fffd}");
            }
        }
        if post.text.trim().is_empty() {
            return Err("the text is empty".into());
        }
        if post.text.len() > MAX_TEXT {
            return Err(format!("the text has {} bytes, at most {MAX_TEXT} are taken", post.text.len()));
        }
        for (what, value) in [("id", &post.id), ("author", &post.author)] {
            if value.len() > MAX_ID {
                return Err(format!("the {what} has {} bytes, at most {MAX_ID} are taken", value.len()));
            }
        }
        let event_time = post.event_time.unwrap_or(received_at);
        let event_time = if event_time > received_at + MAX_AHEAD { received_at } else { event_time };
        let id = if post.id.is_empty() {
            let moment = post.event_time.unwrap_or(received_at).to_string();
            hex(&digest(&[post.author.as_bytes(), moment.as_bytes(), post.text.as_bytes()])[..12])
        } else {
            post.id
        };
        Ok(Self {
            author: names.hash(source, &post.author, &id),
            source: source.to_owned(),
            id,
            event_time,
            received_at,
            text: post.text,
            url: post.url.filter(|u| is_web_address(u)),
            copy_of: post.copy_of.filter(|c| !c.is_empty() && c.len() <= MAX_ID && !c.contains('\0')),
            cursor: post.cursor.filter(|c| c.len() <= MAX_ID && !c.contains('\0')),
        })
    }

    /// What makes a post one and the same wherever it comes from again.
    pub fn identity(&self) -> u128 {
        identity(&self.source, &self.id)
    }
}

pub fn identity(source: &str, id: &str) -> u128 {
    let hash = digest(&[source.as_bytes(), id.as_bytes()]);
    u128::from_le_bytes(std::array::from_fn(|i| hash[i]))
}

/// Only these may become a link on the page.
fn is_web_address(url: &str) -> bool {
    url.len() <= MAX_URL
        && (url.starts_with("https://") || url.starts_with("http://"))
        && !url.chars().any(|c| c.is_control() || c.is_whitespace())
}

/// Turns authors into hashes with a key of this store's own, so that names cannot be found by trying them out.
#[derive(Clone)]
pub struct AuthorKey([u8; 32]);

impl AuthorKey {
    /// The key of a data directory; made at the first start.
    ///
    /// # Errors
    /// The file cannot be read or written, or is not a key.
    pub fn open(directory: &Path) -> Result<Self> {
        let path = directory.join("author.key");
        match std::fs::read(&path) {
            Ok(bytes) => Ok(Self(bytes.try_into().map_err(|bytes: Vec<u8>| {
                let found = bytes.len();
                Error::Invalid(format!("{}: expected a key of 32 bytes, found {found}", path.display()))
            })?)),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                let mut key = [0; 32];
                getrandom::fill(&mut key).map_err(|e| Error::Invalid(format!("no random numbers: {e}")))?;
                cashtag_corpus::formats::write_atomically(&path, &key)?;
                Ok(Self(key))
            }
            Err(e) => Err(Error::io("read", &path)(e)),
        }
    }

    /// Tells one data directory from another without telling the key.
    pub fn fingerprint(&self) -> String {
        hex(&digest(&[b"log", &self.0])[..16])
    }

    /// A key for tests and measurements.
    pub fn fixed(byte: u8) -> Self {
        Self([byte; 32])
    }

    /// 16 hex digits. A post without an author is an author of its own.
    fn hash(&self, source: &str, author: &str, id: &str) -> String {
        let parts =
            if author.is_empty() { [b"id".as_slice(), id.as_bytes()] } else { [b"a".as_slice(), author.as_bytes()] };
        hex(&digest(&[&self.0, source.as_bytes(), parts[0], parts[1]])[..8])
    }
}

/// SHA-256 over parts, each with its length before it.
pub(crate) fn digest(parts: &[&[u8]]) -> [u8; 32] {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    hash.finalize().into()
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    bytes.iter().flat_map(|b| [b >> 4, b & 15]).map(|d| char::from(DIGITS[usize::from(d)])).collect()
}

/// A post with what the model says of it; what `/v1/posts` shows.
#[derive(Clone, Debug, PartialEq)]
pub struct ScoredPost {
    /// Its place in the log.
    pub seq: u64,
    pub post: Post,
    pub scored_at: Millis,
    /// When a reader of the store can first have seen it.
    pub available_at: Millis,
    pub tickers: Vec<TickerMention>,
    pub sectors: Vec<String>,
    /// In the order of the model's labels.
    pub probabilities: Vec<f32>,
    pub label: usize,
    /// p(Positive) − p(Negative).
    pub score: f64,
    /// Between 0 and 1: what it counts for in a window.
    pub weight: f64,
    /// The post that this one repeats.
    pub is_copy_of: Option<String>,
    /// One of a burst of its author.
    pub damped: bool,
    /// Came after its windows were final; it is kept but changes no signal.
    pub too_late: bool,
}

impl ScoredPost {
    pub fn confidence(&self) -> f32 {
        self.probabilities.get(self.label).copied().unwrap_or(0.0)
    }

    pub fn to_json(&self, model: &crate::scorer::ModelInfo, with_text: bool) -> serde_json::Value {
        let named: serde_json::Map<String, serde_json::Value> =
            model.labels.iter().zip(&self.probabilities).map(|(l, p)| (l.clone(), (*p).into())).collect();
        serde_json::json!({
            "seq": self.seq, "id": self.post.id, "source": self.post.source, "author": self.post.author,
            "event_time": time::rfc3339(self.post.event_time), "received_at": time::rfc3339(self.post.received_at),
            "scored_at": time::rfc3339(self.scored_at), "available_at": time::rfc3339(self.available_at),
            "text": with_text.then_some(&self.post.text), "url": self.post.url, "tickers": self.tickers,
            "sectors": self.sectors, "probabilities": named,
            "label": model.labels.get(self.label), "sentiment_score": self.score, "confidence": self.confidence(),
            "weight": self.weight, "is_copy_of": self.is_copy_of, "damped": self.damped, "too_late": self.too_late,
            "model": model.model_hash, "adapter": model.adapter_hash, "prompt": model.prompt_hash,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn incoming() -> Incoming {
        Incoming {
            id: "1".into(),
            author: "ann".into(),
            text: "$XYZ up".into(),
            event_time: Some(5),
            ..Default::default()
        }
    }

    fn check(post: Incoming) -> Result<Post, String> {
        Post::check("test", post, 1_000_000, &AuthorKey::fixed(1))
    }

    #[test]
    fn what_is_refused_and_what_is_mended() {
        for (text, why) in [("  \n", "empty"), (&*"x".repeat(MAX_TEXT + 1), "100001 bytes")] {
            assert!(check(Incoming { text: text.into(), ..incoming() }).unwrap_err().contains(why));
        }
        assert!(check(Incoming { id: "i".repeat(MAX_ID + 1), ..incoming() }).is_err());
        let future = check(Incoming { event_time: Some(i64::MAX), ..incoming() }).unwrap();
        assert_eq!(future.event_time, 1_000_000);
        let zero = check(Incoming { id: "a\0b".into(), text: "$XYZ\0up".into(), ..incoming() }).unwrap();
        assert_eq!((&*zero.id, &*zero.text), ("a\u{fffd}b", "$XYZ\u{fffd}up"));
        let script = check(Incoming { url: Some("javascript:alert(1)".into()), ..incoming() }).unwrap();
        assert_eq!(script.url, None);
    }

    #[test]
    fn authors_are_hashed_with_a_key_and_ids_are_made() {
        let post = check(incoming()).unwrap();
        assert_eq!(post.author.len(), 16);
        assert_eq!(post.author, check(Incoming { id: "2".into(), ..incoming() }).unwrap().author);
        let other = Post::check("test", incoming(), 1_000_000, &AuthorKey::fixed(2)).unwrap();
        assert_ne!(post.author, other.author);
        // Twice the same post without an id is one post; without an author each is its own.
        let bare = || check(Incoming { id: String::new(), ..incoming() }).unwrap();
        assert_eq!(bare().id, bare().id);
        let nobody = |id: &str| check(Incoming { id: id.into(), author: String::new(), ..incoming() }).unwrap().author;
        assert_ne!(nobody("1"), nobody("2"));
        assert_ne!(identity("a", "bc"), identity("ab", "c"));
    }
}
