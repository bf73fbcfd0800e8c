//! The journal of a generation run: JSON lines, appended and synced before anything else happens with an answer.
//!
//! The first line says what the run is; a journal serves one run only and is locked while the run goes on. A torn last
//! line (the process was killed while writing) is cut off when the journal is opened again; a damaged line before it is an
//! error, because then something else than us has written there. The journal holds every answer that was paid for, so the
//! run can be worked out again from it without asking anybody; `accepted` and `rejected` lines only record what came out.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::example::Example;
use crate::formats::{MAX_RECORD, sync_folder};

/// Version of the format that this program writes.
const VERSION: u32 = 1;

/// What a model said, and what it cost.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Reply {
    /// `None` for an empty list of choices, or a refusal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refusal: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finish_reason: Option<String>,
    pub prompt_tokens: u64,
    pub completion_tokens: u64,
    /// The server did not say how many tokens it used: they are estimated from the number of bytes.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub estimated: bool,
    /// The model that the server says it was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Entry {
    /// The first line: everything that decides what the run asks for.
    Run { version: u32, settings: Map<String, Value> },
    /// The answer to the `ask`th request for tweet number `slot`.
    Answer { slot: u64, ask: u32, reply: Reply },
    /// Why an answer was not used.
    Rejected { slot: u64, ask: u32, reason: String },
    /// What became of an answer.
    Accepted { slot: u64, ask: u32, example: Example },
    /// An attempt that brought no answer; the tokens are what it may have cost at most.
    Failed { slot: Option<u64>, problem: String, prompt_tokens: u64, completion_tokens: u64 },
    /// The answer to the request for a system message.
    SystemMessage { reply: Reply },
}

/// See the module.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    file: File,
    length: u64,
    /// Why an entry could not be written: nothing is written after it.
    broken: Option<(std::io::ErrorKind, String)>,
}

impl Journal {
    /// Opens the journal at `path`, or begins it; the entries that are already there.
    ///
    /// # Errors
    ///
    /// If another process holds it, its run was started with other settings, or a line is damaged.
    pub fn open(path: &Path, settings: &Map<String, Value>) -> Result<(Self, Vec<Entry>)> {
        let folder = crate::formats::folder_of(path);
        std::fs::create_dir_all(folder).map_err(Error::io("create the directory", folder))?;
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .map_err(Error::io("open the journal", path))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(Error::Locked { path: path.into() }),
            Err(TryLockError::Error(source)) => return Err(Error::io("lock the journal", path)(source)),
        }
        let (entries, length) = read_entries(path, &mut file)?;
        file.set_len(length).map_err(Error::io("write the journal", path))?;
        file.seek(SeekFrom::Start(length)).map_err(Error::io("write the journal", path))?;
        let mut journal = Self { path: path.into(), file, length, broken: None };
        if entries.is_empty() {
            journal.append(&Entry::Run { version: VERSION, settings: settings.clone() })?;
            sync_folder(path);
        } else {
            check_settings(path, &entries, settings)?;
        }
        Ok((journal, entries))
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Appends an entry; when this returns, it is on the disk.
    ///
    /// # Errors
    ///
    /// If it cannot be written or synced. What was written of it is taken back, and the journal takes no more entries.
    pub fn append(&mut self, entry: &Entry) -> Result<()> {
        if let Some((kind, message)) = &self.broken {
            return Err(Error::io("write the journal", &self.path)(std::io::Error::new(*kind, message.clone())));
        }
        let mut line = serde_json::to_vec(entry)
            .map_err(|error| Error::io("write the journal", &self.path)(std::io::Error::from(error)))?;
        line.push(b'\n');
        match self.file.write_all(&line).and_then(|()| self.file.sync_data()) {
            Ok(()) => {
                self.length += line.len() as u64;
                Ok(())
            }
            Err(source) => {
                self.broken = Some((source.kind(), source.to_string()));
                let _ = self.file.set_len(self.length);
                Err(Error::io("write the journal", &self.path)(source))
            }
        }
    }
}

/// All whole lines, and how many bytes they take.
fn read_entries(path: &Path, file: &mut File) -> Result<(Vec<Entry>, u64)> {
    let mut reader = BufReader::new(file);
    let (mut entries, mut length, mut line) = (Vec::new(), 0u64, Vec::new());
    loop {
        line.clear();
        let read = (&mut reader)
            .take(MAX_RECORD + 1)
            .read_until(b'\n', &mut line)
            .map_err(Error::io("read the journal", path))? as u64;
        let number = entries.len() as u64 + 1;
        if read > MAX_RECORD {
            return Err(Error::file(path, number, "a line of more than 16 MiB: this is no journal of ours"));
        }
        if read == 0 || !line.ends_with(b"\n") {
            return Ok((entries, length));
        }
        match serde_json::from_slice(&line) {
            Ok(entry) => entries.push(entry),
            // Unsynced blocks of a crash may hold anything, but only at the end of the file.
            Err(_) if reader.fill_buf().map_err(Error::io("read the journal", path))?.is_empty() => {
                return Ok((entries, length));
            }
            Err(error) => {
                let hint = "hint: remove the line, or give this run another output directory";
                return Err(Error::file(path, number, format!("a damaged entry: {error}\n  {hint}")));
            }
        }
        length += read;
    }
}

fn check_settings(path: &Path, entries: &[Entry], settings: &Map<String, Value>) -> Result<()> {
    let Some(Entry::Run { version, settings: found }) = entries.first() else {
        return Err(Error::file(path, 1, "not a journal: it does not begin with a run"));
    };
    if *version != VERSION {
        return Err(Error::file(path, 1, format!("a journal of version {version}, expected {VERSION}")));
    }
    let names = settings.keys().chain(found.keys().filter(|name| !settings.contains_key(*name)));
    let changed: Vec<String> = names
        .filter(|name| settings.get(*name) != found.get(*name))
        .map(|name| {
            let show = |value: Option<&Value>| value.map_or("nothing".to_owned(), ToString::to_string);
            format!("{name}: {} there, {} now", show(found.get(name)), show(settings.get(name)))
        })
        .collect();
    if changed.is_empty() {
        return Ok(());
    }
    Err(Error::file(
        path,
        1,
        format!(
            "the journal belongs to a run with other settings ({})\n  hint: use the same options to go on with it, or \
             another output directory",
            changed.join("; ")
        ),
    ))
}

/// Whether the file begins like a journal.
pub fn is_journal(path: &Path) -> bool {
    let Ok(file) = File::open(path) else { return false };
    let mut head = Vec::new();
    file.take(14).read_to_end(&mut head).is_ok() && head == b"{\"type\":\"run\","
}

/// A setting of the run that the journal at `path` was begun by; `None` if there is no such journal.
pub(crate) fn recorded_setting(path: &Path, name: &str) -> Option<Value> {
    let mut line = Vec::new();
    BufReader::new(File::open(path).ok()?).take(MAX_RECORD).read_until(b'\n', &mut line).ok()?;
    match serde_json::from_slice(&line).ok()? {
        Entry::Run { settings, .. } => settings.get(name).cloned(),
        _ => None,
    }
}

/// What a journal has come to.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Harvest {
    /// The accepted examples, by their number.
    pub examples: Vec<Example>,
    pub system_message: Option<String>,
    /// Reasons of rejection, with how often each occurred.
    pub rejected: std::collections::BTreeMap<String, u64>,
}

/// Reads a journal without locking it.
///
/// # Errors
///
/// If it cannot be read or is damaged.
pub fn harvest(path: &Path) -> Result<Harvest> {
    let mut file = File::open(path).map_err(Error::io("read the journal", path))?;
    let (entries, _) = read_entries(path, &mut file)?;
    let mut accepted = std::collections::BTreeMap::new();
    let mut harvest = Harvest::default();
    for entry in entries {
        match entry {
            Entry::Accepted { slot, example, .. } => drop(accepted.insert(slot, example)),
            Entry::SystemMessage { reply } => {
                harvest.system_message = crate::generate::usable_system_message(&reply);
            }
            Entry::Rejected { reason, .. } => *harvest.rejected.entry(reason).or_default() += 1,
            _ => {}
        }
    }
    harvest.examples = accepted.into_values().collect();
    Ok(harvest)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(seed: u64) -> Map<String, Value> {
        Map::from_iter([("seed".to_owned(), seed.into()), ("model".to_owned(), "m".into())])
    }

    fn answer(slot: u64) -> Entry {
        Entry::Answer { slot, ask: 0, reply: Reply { content: Some("é\n".into()), ..Reply::default() } }
    }

    #[test]
    fn goes_on_after_every_possible_tear() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal.jsonl");
        let (mut journal, entries) = Journal::open(&path, &settings(1)).unwrap();
        assert!(entries.is_empty() && is_journal(&path));
        journal.append(&answer(0)).unwrap();
        let whole = std::fs::read(&path).unwrap();
        journal.append(&answer(1)).unwrap();
        let full = std::fs::read(&path).unwrap();
        drop(journal);
        for cut in whole.len()..full.len() {
            std::fs::write(&path, &full[..cut]).unwrap();
            let (mut journal, entries) = Journal::open(&path, &settings(1)).unwrap();
            assert_eq!(entries.len(), 2, "cut at {cut}");
            journal.append(&answer(1)).unwrap();
            drop(journal);
            assert_eq!(std::fs::read(&path).unwrap(), full);
        }
        // A last line of zeros, as a crash of the whole machine can leave it.
        std::fs::write(&path, [&whole[..], &[0; 40], b"\n"].concat()).unwrap();
        assert_eq!(Journal::open(&path, &settings(1)).unwrap().1.len(), 2);
    }

    #[test]
    fn locked_changed_damaged() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal.jsonl");
        let (journal, _) = Journal::open(&path, &settings(1)).unwrap();
        let error = Journal::open(&path, &settings(1)).unwrap_err();
        assert!(matches!(error, Error::Locked { .. }), "{error}");
        drop(journal);
        let error = Journal::open(&path, &settings(2)).unwrap_err().to_string();
        assert!(error.contains("seed: 1 there, 2 now"), "{error}");
        let mut content = std::fs::read(&path).unwrap();
        content.extend_from_slice(b"half a li\n{\"type\":\"rejected\",\"slot\":0,\"ask\":0,\"reason\":\"x\"}\n");
        std::fs::write(&path, content).unwrap();
        let error = Journal::open(&path, &settings(1)).unwrap_err().to_string();
        assert!(error.contains("journal.jsonl:2: a damaged entry"), "{error}");
        std::fs::write(&path, "{\"type\":\"rejected\",\"slot\":0,\"ask\":0,\"reason\":\"x\"}\n").unwrap();
        assert!(Journal::open(&path, &settings(1)).unwrap_err().to_string().contains("not a journal"));
    }

    #[test]
    fn harvests_in_slot_order() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal.jsonl");
        let (mut journal, _) = Journal::open(&path, &settings(1)).unwrap();
        for slot in [1, 0] {
            let example = Example::new(format!("tweet {slot}"), "Neutral");
            journal.append(&Entry::Accepted { slot, ask: 0, example }).unwrap();
        }
        journal.append(&Entry::Rejected { slot: 2, ask: 0, reason: "empty".into() }).unwrap();
        let reply = Reply { content: Some("Say the label.".into()), ..Reply::default() };
        journal.append(&Entry::SystemMessage { reply }).unwrap();
        let harvest = harvest(&path).unwrap();
        assert_eq!(harvest.examples.iter().map(|e| e.text.as_str()).collect::<Vec<_>>(), ["tweet 0", "tweet 1"]);
        assert_eq!(harvest.system_message.as_deref(), Some("Say the label."));
        assert_eq!(harvest.rejected["empty"], 1);
    }
}
