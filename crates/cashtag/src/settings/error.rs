//! What can be wrong with a configuration. Every message names the file and line or the flag, what was found, what is
//! allowed, and where there is one, the mend.

use std::path::Path;

/// An error in a recipe or a flag: a usage error, exit code 2.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{place}: {what}{}", hint.as_ref().map(|h| format!("\n  hint: {h}")).unwrap_or_default())]
pub(crate) struct SettingsError {
    /// `recipe.toml:12`, or `--learning-rate`.
    pub(crate) place: String,
    pub(crate) what: String,
    pub(crate) hint: Option<String>,
}

impl SettingsError {
    pub(crate) fn new(place: impl Into<String>, what: impl Into<String>) -> Self {
        Self { place: place.into(), what: what.into(), hint: None }
    }

    pub(crate) fn file(path: &Path, what: String) -> Self {
        Self::new(path.display().to_string(), what)
    }

    pub(crate) fn at(path: &Path, line: usize, what: String) -> Self {
        Self::new(format!("{}:{line}", path.display()), what)
    }

    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}
