//! Runs the program in a directory of its own, with an environment of its own, and gives its output as one text in which
//! whatever differs from run to run is replaced.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

pub(crate) struct Context {
    dir: tempfile::TempDir,
    env: Vec<(String, String)>,
    filters: Vec<(String, String)>,
}

impl Context {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let text = dir.path().canonicalize().unwrap().display().to_string();
        let env = vec![
            ("HOME".into(), text.clone()),
            ("PATH".into(), std::env::var("PATH").unwrap_or_default()),
            // Servers of the tests are not asked through a proxy.
            ("NO_PROXY".into(), "127.0.0.1,localhost".into()),
        ];
        let version = format!("cashtag {}", env!("CARGO_PKG_VERSION"));
        let filters = vec![(text, "[DIR]".into()), (version, "cashtag [VERSION]".into())];
        Self { dir, env, filters }
    }

    pub(crate) fn env(mut self, name: &str, value: impl Into<String>) -> Self {
        self.env.retain(|(n, _)| n != name);
        self.env.push((name.into(), value.into()));
        self
    }

    pub(crate) fn filter(mut self, found: impl Into<String>, shown: &str) -> Self {
        self.filters.insert(0, (found.into(), shown.into()));
        self
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn write(&self, name: &str, text: impl AsRef<[u8]>) {
        let path = self.path(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }

    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_cashtag"));
        command.args(args).current_dir(self.dir.path()).env_clear();
        command.envs(self.env.iter().map(|(n, v)| (n, v)));
        command
    }

    /// Runs it; exit code, stdout and stderr as one text.
    pub(crate) fn run(&self, args: &[&str]) -> String {
        self.shown(&self.command(args).output().unwrap())
    }

    pub(crate) fn shown(&self, output: &Output) -> String {
        let code = output.status.code().map_or("killed".to_string(), |c| c.to_string());
        let mut text = format!("exit code {code}");
        for (name, bytes) in [("stdout", &output.stdout), ("stderr", &output.stderr)] {
            let printed = String::from_utf8_lossy(bytes);
            if !printed.is_empty() {
                text += &format!("\n--- {name}\n{}", printed.trim_end_matches('\n'));
            }
        }
        for (found, shown) in &self.filters {
            text = text.replace(found, shown);
        }
        text
    }
}

/// Files below a directory, for tests that look at what was left behind.
pub(crate) fn files(directory: &Path) -> Vec<String> {
    let mut found = Vec::new();
    let mut folders = vec![directory.to_owned()];
    while let Some(folder) = folders.pop() {
        let Ok(entries) = std::fs::read_dir(folder) else { continue };
        for entry in entries.flatten() {
            if std::fs::symlink_metadata(entry.path()).unwrap().is_dir() {
                folders.push(entry.path());
            } else {
                found.push(entry.path().strip_prefix(directory).unwrap().display().to_string());
            }
        }
    }
    found.sort();
    found
}
