//! The Hugging Face hub's own cache, so that Transformers finds what was pulled here, and the other way round.
//!
//! ```text
//! $HF_HOME/hub/models--OWNER--NAME/
//!   blobs/<etag>                   contents; for large files the etag is the sha256
//!   blobs/<etag>.incomplete        what was fetched so far
//!   refs/<revision>                the commit that a branch or tag was at
//!   snapshots/<commit>/<file>      a link to ../../blobs/<etag>
//! ```

use std::path::{Path, PathBuf};

use anyhow::{Context as _, anyhow};

use super::download::Wanted;
use super::name::{Kind, Repository};
use crate::cache;

pub(crate) struct Layout {
    root: PathBuf,
}

impl Layout {
    /// `$HF_HUB_CACHE`, else `$HF_HOME/hub`, else `huggingface/hub` in the user's cache.
    ///
    /// # Errors
    /// None of the variables that could name it is set.
    pub(crate) fn from_env() -> anyhow::Result<Self> {
        let set = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
        let root = set("HF_HUB_CACHE").or_else(|| home().map(|home| home.join("hub")));
        let root =
            root.ok_or_else(|| anyhow!("no place for downloads: HOME is not set\n  hint: set HF_HOME to a directory"))?;
        Ok(Self { root })
    }

    #[cfg(test)]
    pub(crate) fn at(root: &Path) -> Self {
        Self { root: root.to_owned() }
    }

    pub(crate) fn check_writable(&self) -> anyhow::Result<()> {
        cache::writable(&self.root, "HF_HOME")
    }

    fn folder(&self, repository: &Repository) -> PathBuf {
        let kind = match repository.kind {
            Kind::Model => "models",
            Kind::Dataset => "datasets",
        };
        self.root.join(format!("{kind}--{}--{}", repository.owner, repository.name))
    }

    /// Where the content with this etag lies, or will.
    pub(crate) fn blob(&self, repository: &Repository, etag: &str) -> PathBuf {
        self.folder(repository).join("blobs").join(etag)
    }

    pub(crate) fn has_blob(&self, repository: &Repository, wanted: &Wanted) -> bool {
        let metadata = std::fs::metadata(self.blob(repository, &wanted.etag));
        metadata.is_ok_and(|m| m.is_file() && wanted.size.is_none_or(|size| size == m.len()))
    }

    /// The snapshot that the repository's revision was at when it was pulled, whole or not.
    pub(crate) fn snapshot(&self, repository: &Repository) -> Option<PathBuf> {
        let folder = self.folder(repository);
        let commit = std::fs::read_to_string(folder.join("refs").join(&repository.revision)).ok();
        let commit = commit.map_or_else(|| repository.revision.clone(), |text| text.trim().to_string());
        if !is_commit(&commit) {
            return None;
        }
        Some(folder.join("snapshots").join(commit)).filter(|path| path.is_dir())
    }

    /// Makes the snapshot of a commit from blobs that are all here, and lets the revision point to it.
    ///
    /// # Errors
    /// The cache cannot be written.
    pub(crate) fn link(&self, repository: &Repository, commit: &str, files: &[Wanted]) -> anyhow::Result<PathBuf> {
        let folder = self.folder(repository);
        let snapshot = folder.join("snapshots").join(commit);
        for file in files {
            let path = snapshot.join(&file.path);
            // Up from the file's directory to the repository's folder: snapshots, commit, directories of the file.
            let up = "../".repeat(file.path.matches('/').count() + 2);
            let target = PathBuf::from(format!("{up}blobs/{}", file.etag));
            replace_link(&target, &self.blob(repository, &file.etag), &path)
                .with_context(|| format!("cannot write {}", path.display()))?;
        }
        if repository.revision != commit {
            let path = folder.join("refs").join(&repository.revision);
            write_atomically(&path, commit).with_context(|| format!("cannot write {}", path.display()))?;
        }
        Ok(snapshot)
    }

    /// Repositories in the cache: `(OWNER/NAME, folder)`, sorted.
    pub(crate) fn repositories(&self) -> Vec<(String, PathBuf)> {
        let Ok(entries) = std::fs::read_dir(&self.root) else { return Vec::new() };
        let mut found: Vec<_> = entries
            .flatten()
            .filter_map(|entry| {
                let file_name = entry.file_name().into_string().ok()?;
                let (kind, id) = file_name.split_once("--")?;
                let (owner, name) = id.split_once("--")?;
                let prefix = match kind {
                    "models" => "",
                    "datasets" => "dataset ",
                    _ => return None,
                };
                Some((format!("{prefix}{owner}/{name}"), entry.path()))
            })
            .collect();
        found.sort();
        found
    }
}

/// `$HF_HOME`, else `huggingface` in the user's cache.
pub(crate) fn home() -> Option<PathBuf> {
    let set = std::env::var_os("HF_HOME").filter(|v| !v.is_empty()).map(PathBuf::from);
    set.or_else(|| cache::base().map(|base| base.join("huggingface")))
}

/// A git commit: 40 hexadecimal digits.
pub(crate) fn is_commit(text: &str) -> bool {
    text.len() == 40 && text.bytes().all(|b| b.is_ascii_hexdigit())
}

/// A symbolic link at `path`; where there are none (Windows without the right to make them), a copy.
fn replace_link(target: &Path, blob: &Path, path: &Path) -> std::io::Result<()> {
    let parent = path.parent().unwrap_or(path);
    std::fs::create_dir_all(parent)?;
    if std::fs::read_link(path).is_ok_and(|old| old == target) {
        return Ok(());
    }
    let link = tempfile::Builder::new().prefix(".link-").make_in(parent, |temporary| {
        #[cfg(unix)]
        {
            let _ = blob;
            std::os::unix::fs::symlink(target, temporary)
        }
        #[cfg(not(unix))]
        {
            let _ = target;
            std::fs::copy(blob, temporary).map(|_| ())
        }
    })?;
    link.persist(path).map_err(|e| e.error)?;
    Ok(())
}

fn write_atomically(path: &Path, text: &str) -> std::io::Result<()> {
    use std::io::Write as _;

    let parent = path.parent().unwrap_or(path);
    std::fs::create_dir_all(parent)?;
    let mut file = tempfile::NamedTempFile::new_in(parent)?;
    file.write_all(text.as_bytes())?;
    file.persist(path).map_err(|e| e.error)?;
    Ok(())
}
