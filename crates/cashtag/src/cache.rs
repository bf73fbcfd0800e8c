//! Where downloads are kept: `$CASHTAG_CACHE`, else `$XDG_CACHE_HOME/cashtag`, else `~/.cache/cashtag`.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::anyhow;

/// The cache directory; it need not exist.
///
/// # Errors
/// None of the variables that could name it is set.
pub(crate) fn directory() -> anyhow::Result<PathBuf> {
    directory_from(|name| std::env::var_os(name))
        .ok_or_else(|| anyhow!("no place for downloads: HOME is not set\n  hint: set CASHTAG_CACHE to a directory"))
}

fn directory_from(variable: impl Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    let set = |name: &str| variable(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    set("CASHTAG_CACHE").or_else(|| base_from(&variable).map(|base| base.join("cashtag")))
}

/// `$XDG_CACHE_HOME`, else `~/.cache`. The specification has relative paths ignored.
fn base_from(variable: impl Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    let set = |name: &str| variable(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    set("XDG_CACHE_HOME").filter(|p| p.is_absolute()).or_else(|| set("HOME").map(|home| home.join(".cache")))
}

/// `$XDG_CACHE_HOME`, else `~/.cache`: where other programs keep their caches too.
pub(crate) fn base() -> Option<PathBuf> {
    base_from(|name| std::env::var_os(name))
}

/// Creates a directory and finds out at once whether it can be written, before hours of download are spent on it.
///
/// # Errors
/// It cannot be created or written; the message names it and the variable that moves it.
pub(crate) fn writable(directory: &Path, variable: &str) -> anyhow::Result<()> {
    let fail = |e: std::io::Error| {
        anyhow!(
            "cannot write to the cache {}: {e}\n  hint: set {variable} to a directory that you can write to",
            directory.display()
        )
    };
    std::fs::create_dir_all(directory).map_err(fail)?;
    tempfile::Builder::new().prefix(".write-test-").tempfile_in(directory).map_err(fail)?;
    Ok(())
}

/// Bytes of all files below a directory; links are not followed, so nothing is counted twice.
pub(crate) fn size(directory: &Path) -> u64 {
    let Ok(entries) = std::fs::read_dir(directory) else { return 0 };
    entries
        .flatten()
        .map(|entry| match entry.metadata() {
            Ok(m) if m.is_dir() => size(&entry.path()),
            Ok(m) if m.is_file() => m.len(),
            _ => 0,
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_variables_in_their_order() {
        let from = |set: &[(&str, &str)]| {
            let set: Vec<(String, OsString)> = set.iter().map(|(k, v)| (k.to_string(), OsString::from(v))).collect();
            directory_from(|name| set.iter().find(|(k, _)| k == name).map(|(_, v)| v.clone()))
        };
        let all = [("CASHTAG_CACHE", "/a"), ("XDG_CACHE_HOME", "/b"), ("HOME", "/c")];
        assert_eq!(from(&all), Some("/a".into()));
        assert_eq!(from(&all[1..]), Some("/b/cashtag".into()));
        assert_eq!(from(&all[2..]), Some("/c/.cache/cashtag".into()));
        assert_eq!(
            from(&[("CASHTAG_CACHE", ""), ("XDG_CACHE_HOME", "relative"), ("HOME", "/c")]),
            Some("/c/.cache/cashtag".into())
        );
        assert_eq!(from(&[]), None);
    }

    #[test]
    fn a_cache_that_cannot_be_written() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, "").unwrap();
        let error = writable(&file.join("cache"), "CASHTAG_CACHE").unwrap_err().to_string();
        assert!(
            error.starts_with("cannot write to the cache ") && error.contains("hint: set CASHTAG_CACHE"),
            "{error}"
        );
        writable(&dir.path().join("a/b"), "CASHTAG_CACHE").unwrap();
        assert_eq!(std::fs::read_dir(dir.path().join("a/b")).unwrap().count(), 0);
    }

    #[test]
    fn sizes_count_links_once() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("sub")).unwrap();
        std::fs::write(dir.path().join("sub/a"), [0; 70]).unwrap();
        #[cfg(unix)]
        std::os::unix::fs::symlink("sub/a", dir.path().join("link")).unwrap();
        assert_eq!(size(dir.path()), 70);
        assert_eq!(size(&dir.path().join("none")), 0);
    }
}
