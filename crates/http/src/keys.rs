//! API keys: several, with a name and a role each, kept as SHA-256 and compared in constant time.
//!
//! A key file has one key a line: `name role sha256-in-hex`. The key itself is shown once, when it is made ([`generate`]),
//! and is nowhere on disk. It has 256 random bits, so a plain hash of it cannot be turned back by guessing.

use std::fmt::Write as _;
use std::fs::{File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::path::Path;
use std::sync::Arc;

use sha2::{Digest, Sha256};
use subtle::{Choice, ConditionallySelectable, ConstantTimeEq};

use crate::error::{Error, Result};

/// What a key may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// Ask questions.
    User,
    /// Change the service while it runs, too.
    Admin,
}

impl Role {
    pub fn name(self) -> &'static str {
        match self {
            Role::User => "user",
            Role::Admin => "admin",
        }
    }
}

impl std::str::FromStr for Role {
    type Err = String;

    fn from_str(word: &str) -> Result<Self, String> {
        match word {
            "user" => Ok(Role::User),
            "admin" => Ok(Role::Admin),
            _ => Err(format!("{word:?} is no role, expected user or admin")),
        }
    }
}

/// Who asks: the name and the role of the key. Without keys in force everybody is a nameless user.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    pub name: Arc<str>,
    pub role: Role,
}

struct Key {
    identity: Identity,
    hash: [u8; 32],
}

/// The keys in force.
#[derive(Default)]
pub struct Keys {
    keys: Vec<Key>,
}

impl std::fmt::Debug for Keys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.keys.iter().map(|k| &k.identity)).finish()
    }
}

/// Shorter keys can be guessed.
const SHORTEST: usize = 16;
/// Longer tokens are not hashed.
const LONGEST: usize = 512;
const MAX_FILE: u64 = 1 << 20;
const MAX_NAME: usize = 64;

fn hash(key: &str) -> [u8; 32] {
    Sha256::digest(key.as_bytes()).into()
}

fn bad(place: impl Into<String>, what: impl Into<String>) -> Error {
    Error::Key { place: place.into(), what: what.into() }
}

fn check_name(name: &str) -> Result<(), String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-' | '@');
    if name.is_empty() || name.len() > MAX_NAME || !name.chars().all(plain) {
        return Err(format!(
            "{:?} cannot be the name of a key, expected up to {MAX_NAME} letters, digits and . _ - @",
            name.chars().take(MAX_NAME).collect::<String>()
        ));
    }
    Ok(())
}

impl Keys {
    /// Adds a key that is given itself, for example in the environment. `place` says where it came from.
    ///
    /// # Errors
    /// A key that is too short, too long, or cannot be sent in a header. The message does not show it.
    pub fn add(&mut self, place: &str, name: &str, role: Role, key: &str) -> Result<()> {
        check_name(name).map_err(|what| bad(place, what))?;
        if key.len() < SHORTEST || key.len() > LONGEST {
            let what = format!(
                "the key has {} characters, expected {SHORTEST} to {LONGEST}\n  hint: cashtag serve keys NAME makes one",
                key.len()
            );
            return Err(bad(place, what));
        }
        if !key.bytes().all(|b| b.is_ascii_graphic()) {
            return Err(bad(place, "the key has characters that a header cannot carry, expected ASCII without spaces"));
        }
        self.push(Identity { name: name.into(), role }, hash(key));
        Ok(())
    }

    fn push(&mut self, identity: Identity, hash: [u8; 32]) {
        self.keys.push(Key { identity, hash });
    }

    /// Adds the keys of a file.
    ///
    /// # Errors
    /// A file that cannot be read, holds no key, or has a line that is none (the message names it).
    pub fn add_file(&mut self, path: &Path) -> Result<()> {
        let read = |source| Error::Read { path: path.to_owned(), source };
        let mut text = String::new();
        File::open(path).map_err(read)?.take(MAX_FILE).read_to_string(&mut text).map_err(read)?;
        let before = self.keys.len();
        for (i, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let place = format!("{}:{}", path.display(), i + 1);
            let mut words = line.split_whitespace();
            let (Some(name), Some(role), Some(hex), None) = (words.next(), words.next(), words.next(), words.next())
            else {
                let what = "expected NAME ROLE SHA256\n  hint: cashtag serve keys NAME writes such a line";
                return Err(bad(place, what));
            };
            check_name(name).map_err(|what| bad(&place, what))?;
            let role = role.parse().map_err(|what: String| bad(&place, what))?;
            let Some(hash) = from_hex(hex) else {
                return Err(bad(place, "the third word is no SHA-256, expected 64 hexadecimal digits"));
            };
            self.push(Identity { name: name.into(), role }, hash);
        }
        if self.keys.len() == before {
            return Err(bad(path.display().to_string(), "no key in it\n  hint: cashtag serve keys NAME makes one"));
        }
        Ok(())
    }

    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    pub fn len(&self) -> usize {
        self.keys.len()
    }

    /// Whether some key may change the service.
    pub fn any_admin(&self) -> bool {
        self.keys.iter().any(|k| k.identity.role == Role::Admin)
    }

    /// Whose key this is. Every key is compared in full, whichever fits; the time depends on the number of keys only.
    pub fn verify(&self, key: &str) -> Option<Identity> {
        if key.len() > LONGEST {
            return None;
        }
        let given = hash(key);
        // The index of the match + 1, without a branch on it.
        let mut found = 0u32;
        for (i, key) in self.keys.iter().enumerate() {
            let same: Choice = key.hash.ct_eq(&given);
            found.conditional_assign(&(i as u32 + 1), same);
        }
        found.checked_sub(1).and_then(|i| self.keys.get(i as usize)).map(|k| k.identity.clone())
    }
}

fn from_hex(text: &str) -> Option<[u8; 32]> {
    if text.len() != 64 || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    let mut bytes = [0; 32];
    for (i, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(text.get(2 * i..2 * i + 2)?, 16).ok()?;
    }
    Some(bytes)
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Random bytes from the system.
///
/// # Errors
/// The system has none to give.
pub(crate) fn random<const N: usize>() -> Result<[u8; N]> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(|e| Error::Random(e.to_string()))?;
    Ok(bytes)
}

/// Makes a key and the line for a key file. The key begins with `ctk_`, which scanners of leaked secrets can look for.
///
/// # Errors
/// A name that cannot be one, or a system without random numbers.
pub fn generate(name: &str, role: Role) -> Result<(String, String)> {
    check_name(name).map_err(|what| bad("the name", what))?;
    let key = format!("ctk_{}", hex(&random::<32>()?));
    let line = format!("{name} {} {}", role.name(), hex(&hash(&key)));
    Ok((key, line))
}

/// Appends a line of [`generate`] to a key file, which only its owner may read.
///
/// # Errors
/// The name is in the file already, or the file cannot be written.
pub fn append(path: &Path, line: &str) -> Result<()> {
    let mut known = Keys::default();
    if std::fs::metadata(path).is_ok_and(|m| m.len() > 0) {
        known.add_file(path)?;
    }
    let name = line.split(' ').next().unwrap_or_default();
    if known.keys.iter().any(|k| &*k.identity.name == name) {
        let what = format!("there is a key named {name}\n  hint: delete its line first, or take another name");
        return Err(bad(path.display().to_string(), what));
    }
    let write = |source| Error::Write { path: path.to_owned(), source };
    let mut options = OpenOptions::new();
    options.create(true).append(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let mut file = options.open(path).map_err(write)?;
    file.write_all(format!("{line}\n").as_bytes()).map_err(write)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_found_by_itself_only() {
        let mut keys = Keys::default();
        keys.add("test", "a", Role::User, "0123456789abcdef").unwrap();
        keys.add("test", "b", Role::Admin, "fedcba9876543210").unwrap();
        assert_eq!(keys.verify("0123456789abcdef").unwrap().name.as_ref(), "a");
        assert_eq!(keys.verify("fedcba9876543210").unwrap().role, Role::Admin);
        for wrong in ["", "0123456789abcde", "0123456789abcdeF", &"x".repeat(100_000)] {
            assert_eq!(keys.verify(wrong), None);
        }
        assert!(!format!("{keys:?}").contains("0123"));
    }

    #[test]
    fn what_is_no_key_is_not_shown() {
        let mut keys = Keys::default();
        let short = keys.add("--api-key", "a", Role::User, "hunter2").unwrap_err().to_string();
        assert!(short.starts_with("--api-key: the key has 7 characters, expected 16"), "{short}");
        let spaced = keys.add("--api-key", "a", Role::User, "correct horse battery").unwrap_err().to_string();
        assert!(!short.contains("hunter2") && !spaced.contains("horse"));
    }

    #[test]
    fn a_file_of_keys() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("keys");
        let (first, line) = generate("ci", Role::User).unwrap();
        append(&path, &line).unwrap();
        let (second, line) = generate("boss", Role::Admin).unwrap();
        append(&path, &line).unwrap();
        let again = append(&path, &line).unwrap_err().to_string();
        assert!(again.contains("there is a key named boss"), "{again}");
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(!text.contains(&first) && !text.contains(&second));
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt as _;
            assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        }
        let mut keys = Keys::default();
        keys.add_file(&path).unwrap();
        assert_eq!((keys.len(), keys.any_admin()), (2, true));
        assert_eq!(keys.verify(&second).unwrap().name.as_ref(), "boss");
        for (text, what) in [
            ("", "no key in it"),
            ("a user", ":1: expected NAME ROLE SHA256"),
            ("# c\na root 00", ":2: \"root\" is no role"),
            ("a user 00", ":1: the third word is no SHA-256"),
            ("ä user 00", "cannot be the name of a key"),
        ] {
            std::fs::write(&path, text).unwrap();
            let error = Keys::default().add_file(&path).unwrap_err().to_string();
            assert!(error.contains(what), "{error}");
        }
    }
}
