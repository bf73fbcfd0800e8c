//! One file, fetched so that it can be continued: into `blobs/<etag>.incomplete`, renamed when it is whole.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;

use anyhow::{Context as _, anyhow, bail};
use sha2::{Digest, Sha256};
use ureq::http::{HeaderMap, Method};

use super::client::{Client, Failure, broken};
use super::layout::Layout;
use super::name::Repository;
use super::select::Listed;
use crate::exit::check_stop;
use crate::output;
use crate::progress::{Progress, Unit};

/// Files whose size no one says are small ones.
const MAX_UNKNOWN: u64 = 512 << 20;
/// No checkpoint has a file of more than that.
const MAX_SIZE: u64 = 1 << 42;

/// A file that is to be in the cache. The etag is a file name.
#[derive(Clone, Debug)]
pub(crate) struct Wanted {
    pub(crate) path: String,
    pub(crate) etag: String,
    pub(crate) size: Option<u64>,
    /// Of the content, in lower-case hexadecimal.
    pub(crate) sha256: Option<String>,
}

/// What is to be fetched, with etags: from the listing, or by asking for each file where the listing does not say.
///
/// # Errors
/// As [`Client::head`]; an etag that cannot be a file name; a size beyond all measure.
pub(crate) fn plan(
    client: &Client,
    repository: &Repository,
    commit: &str,
    files: Vec<Listed>,
) -> anyhow::Result<Vec<Wanted>> {
    files
        .into_iter()
        .map(|file| {
            let url = client.file_url(repository, commit, &file.path);
            let sha256 = file.lfs.as_ref().and_then(|l| l.sha256.clone());
            let size = file.lfs.as_ref().and_then(|l| l.size).or(file.size);
            let wanted = match sha256.clone().or(file.blob_id) {
                Some(etag) => Wanted { path: file.path, etag, size, sha256 },
                None => from_headers(file.path, &client.head(&url, repository)?)?,
            };
            checked(wanted)
        })
        .collect()
}

/// What the hub says in headers: `X-Linked-*` for a large file that it redirects to another host.
fn from_headers(path: String, headers: &HeaderMap) -> anyhow::Result<Wanted> {
    let text = |name: &str| headers.get(name).and_then(|v| v.to_str().ok());
    let linked = text("x-linked-etag");
    let etag = linked.or_else(|| text("etag")).map(|e| e.trim_start_matches("W/").trim_matches('"').to_string());
    let etag = etag.ok_or_else(|| anyhow!("the hub says no etag for {path}\n  hint: check HF_ENDPOINT"))?;
    let size = text("x-linked-size").or_else(|| text("content-length").filter(|_| linked.is_none()));
    let sha256 = (etag.len() == 64).then(|| etag.clone());
    Ok(Wanted { path, etag, size: size.and_then(|s| s.parse().ok()), sha256 })
}

fn checked(mut wanted: Wanted) -> anyhow::Result<Wanted> {
    wanted.etag = wanted.etag.to_ascii_lowercase();
    wanted.sha256 = wanted.sha256.map(|s| s.to_ascii_lowercase());
    let is_hex = |s: &str| s.bytes().all(|b| b.is_ascii_hexdigit());
    let good_etag = (1..=128).contains(&wanted.etag.len())
        && wanted.etag.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_');
    if !good_etag || wanted.sha256.as_ref().is_some_and(|s| s.len() != 64 || !is_hex(s)) {
        bail!("the hub gives {} a checksum that is none\n  hint: check HF_ENDPOINT", wanted.path);
    }
    if let Some(size) = wanted.size.filter(|s| *s > MAX_SIZE) {
        bail!("the hub says that {} has {size} bytes: that cannot be", wanted.path);
    }
    Ok(wanted)
}

/// Brings one file into the cache, unless it is there.
///
/// # Errors
/// As [`Client::listing`]; a checksum that is wrong; a disk that is full.
pub(crate) fn fetch(
    client: &Client,
    layout: &Layout,
    repository: &Repository,
    commit: &str,
    wanted: &Wanted,
) -> anyhow::Result<()> {
    if layout.has_blob(repository, wanted) {
        return Ok(());
    }
    let blob = layout.blob(repository, &wanted.etag);
    let folder = blob.parent().unwrap_or(&blob);
    std::fs::create_dir_all(folder).map_err(|e| on_disk(folder, &e))?;
    let part = blob.with_file_name(format!("{}.incomplete", wanted.etag));
    let Some(file) = lock(&part, || layout.has_blob(repository, wanted), &wanted.path)? else { return Ok(()) };
    let url = client.file_url(repository, commit, &wanted.path);
    let mut part_file = Part::open(file, &part, wanted)?;
    let progress = Progress::new(wanted.path.clone(), Unit::Bytes, wanted.size).starting_at(part_file.length);
    let (mut tries, mut furthest) = (0, part_file.length);
    while !part_file.is_whole(wanted) {
        match attempt(client, repository, &url, wanted, &mut part_file, &progress) {
            Ok(()) => break,
            Err(Stop::Error(e)) => return Err(e),
            Err(Stop::Failure(failure)) => {
                // As long as more comes than ever before, it is worth going on.
                tries = if part_file.length > furthest { 1 } else { tries + 1 };
                furthest = furthest.max(part_file.length);
                client.pause(tries, failure)?;
            }
        }
    }
    part_file.check(wanted, &part)?;
    part_file.file.sync_all().map_err(|e| on_disk(&part, &e))?;
    std::fs::rename(&part, &blob).map_err(|e| on_disk(&blob, &e))
}

/// The part's file, locked against other processes; `None` if one of them has fetched the whole meanwhile.
fn lock(part: &Path, is_here: impl Fn() -> bool, name: &str) -> anyhow::Result<Option<File>> {
    loop {
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(part);
        let file = file.map_err(|e| on_disk(part, &e))?;
        let waited = match file.try_lock() {
            Ok(()) => false,
            Err(std::fs::TryLockError::WouldBlock) => {
                output::note(format!("waiting: another process fetches {name}"));
                file.lock().map_err(|e| on_disk(part, &e))?;
                true
            }
            // A file system without locks: as good as alone.
            Err(std::fs::TryLockError::Error(_)) => false,
        };
        if is_here() {
            return Ok(None);
        }
        // Whoever was waited for may have deleted what was opened here.
        if !waited {
            return Ok(Some(file));
        }
    }
}

enum Stop {
    /// Trying again may help.
    Failure(Failure),
    Error(anyhow::Error),
}

impl From<Failure> for Stop {
    fn from(failure: Failure) -> Self {
        Stop::Failure(failure)
    }
}

impl From<anyhow::Error> for Stop {
    fn from(error: anyhow::Error) -> Self {
        Stop::Error(error)
    }
}

/// One connection's worth of a file. `Ok` when the server had no more to send.
fn attempt(
    client: &Client,
    repository: &Repository,
    url: &str,
    wanted: &Wanted,
    part: &mut Part<'_>,
    progress: &Progress,
) -> Result<(), Stop> {
    let from = part.length;
    let reply = client.request(Method::GET, url, (from > 0).then_some(from), repository)?;
    let status = reply.response.status().as_u16();
    let begins = match status {
        206 => content_range_start(reply.response.headers()),
        416 => None,
        _ => Some(0),
    };
    if begins != Some(from) {
        // The server does not continue where we are: it begins anew, or we do.
        part.restart()?;
        progress.set_position(0);
        if begins != Some(0) {
            return Err(Failure::passing(format!("the server does not continue {} at byte {from}", wanted.path)).into());
        }
    }
    let announced = reply.response.body().content_length().map(|n| n.saturating_add(part.length));
    let limit = wanted.size.unwrap_or(MAX_UNKNOWN);
    let too_much = || anyhow!("the server sends more than the {limit} bytes that {} should have", wanted.path);
    if announced.is_some_and(|n| n > limit) {
        return Err(too_much().into());
    }
    let mut body = reply.response.into_body().into_reader();
    let mut buffer = vec![0; 1 << 17];
    loop {
        check_stop().map_err(anyhow::Error::from)?;
        let n = match body.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => n,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(Failure::passing(broken(&e)).into()),
        };
        if part.length + n as u64 > limit {
            part.restart()?;
            return Err(too_much().into());
        }
        part.write(&buffer[..n])?;
        progress.set_position(part.length);
    }
    match (announced, wanted.size.or(announced)) {
        (_, Some(size)) if part.length >= size => Ok(()),
        (Some(n), Some(size)) if part.length == n => {
            Err(Failure::passing(format!("the server sends {n} bytes of {}, which should have {size}", wanted.path))
                .into())
        }
        (_, Some(_)) => Err(Failure::passing("the connection broke off").into()),
        (_, None) => Ok(()),
    }
}

/// `bytes 5-9/10` begins at 5.
fn content_range_start(headers: &HeaderMap) -> Option<u64> {
    headers.get("content-range")?.to_str().ok()?.trim().strip_prefix("bytes ")?.split('-').next()?.trim().parse().ok()
}

/// The file that grows, with the hash of what is in it.
struct Part<'a> {
    file: File,
    path: &'a Path,
    length: u64,
    hash: Sha256,
}

impl<'a> Part<'a> {
    /// Takes up what an earlier try left.
    fn open(mut file: File, path: &'a Path, wanted: &Wanted) -> anyhow::Result<Self> {
        let found = file.metadata().map_err(|e| on_disk(path, &e))?.len();
        let mut part =
            Part { file: file.try_clone().map_err(|e| on_disk(path, &e))?, path, length: 0, hash: Sha256::new() };
        if wanted.size.is_none_or(|size| found > size) {
            // Without a size there is no telling whether it is whole.
            part.restart()?;
            return Ok(part);
        }
        let mut buffer = vec![0; 1 << 20];
        loop {
            check_stop()?;
            let n = file.read(&mut buffer).map_err(|e| on_disk(path, &e))?;
            if n == 0 {
                return Ok(part);
            }
            part.hash.update(&buffer[..n]);
            part.length += n as u64;
        }
    }

    fn is_whole(&self, wanted: &Wanted) -> bool {
        wanted.size == Some(self.length)
    }

    fn write(&mut self, bytes: &[u8]) -> anyhow::Result<()> {
        self.file.write_all(bytes).map_err(|e| on_disk(self.path, &e))?;
        self.hash.update(bytes);
        self.length += bytes.len() as u64;
        Ok(())
    }

    fn restart(&mut self) -> anyhow::Result<()> {
        self.file.set_len(0).and_then(|()| self.file.seek(SeekFrom::Start(0))).map_err(|e| on_disk(self.path, &e))?;
        (self.length, self.hash) = (0, Sha256::new());
        Ok(())
    }

    /// The checksum, where the hub gives one. What is wrong is deleted: going on from it would never end well.
    fn check(&self, wanted: &Wanted, path: &Path) -> anyhow::Result<()> {
        let Some(expected) = &wanted.sha256 else { return Ok(()) };
        let found = hex(&self.hash.clone().finalize());
        if found == *expected {
            return Ok(());
        }
        std::fs::remove_file(path).with_context(|| format!("cannot delete {}", path.display()))?;
        bail!(
            "{} is damaged: its sha256 is {found}, the hub says {expected}\n  hint: it was deleted; try again, and if it happens again, look for a proxy that changes files",
            wanted.path
        )
    }
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// An error of the disk, with what to do about it.
pub(crate) fn on_disk(path: &Path, e: &std::io::Error) -> anyhow::Error {
    let mend = match e.kind() {
        std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
            "\n  hint: make room, or move the cache with HF_HOME or CASHTAG_CACHE; what was fetched stays"
        }
        _ => "",
    };
    anyhow!("cannot write {}: {e}{mend}", path.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        pairs.iter().map(|(k, v)| (ureq::http::HeaderName::from_static(k), v.parse().unwrap())).collect()
    }

    #[test]
    fn headers_of_a_large_and_a_small_file() {
        let sha = "a".repeat(64);
        let large = headers(&[
            ("x-linked-etag", &format!("\"{sha}\"")),
            ("x-linked-size", "7"),
            ("content-length", "900"),
            ("etag", "x"),
        ]);
        let wanted = from_headers("w".into(), &large).unwrap();
        assert_eq!((wanted.etag, wanted.size, wanted.sha256), (sha.clone(), Some(7), Some(sha)));
        let wanted = from_headers("w".into(), &headers(&[("etag", "W/\"abc\""), ("content-length", "5")])).unwrap();
        assert_eq!((wanted.etag.as_str(), wanted.size, wanted.sha256), ("abc", Some(5), None));
        assert!(from_headers("w".into(), &headers(&[])).is_err());
    }

    #[test]
    fn etags_are_file_names() {
        let wanted = |etag: &str, size| Wanted { path: "w".into(), etag: etag.into(), size, sha256: None };
        assert!(checked(wanted("D41D8CD9", None)).is_ok());
        for bad in ["", "../x", "a/b", "a.incomplete", ".."] {
            assert!(checked(wanted(bad, None)).is_err(), "{bad}");
        }
        assert!(checked(wanted("a", Some(u64::MAX))).is_err());
    }

    #[test]
    fn ranges() {
        assert_eq!(content_range_start(&headers(&[("content-range", "bytes 5-9/10")])), Some(5));
        assert_eq!(content_range_start(&headers(&[("content-range", "bytes */10")])), None);
        assert_eq!(content_range_start(&headers(&[])), None);
    }
}
