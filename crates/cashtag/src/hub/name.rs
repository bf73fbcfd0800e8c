//! Names of models and data sets.

use std::fmt;
use std::path::{Component, Path, PathBuf};

use crate::exit::Usage;

/// What `--model` was given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ModelName {
    /// A checkpoint directory or a .gguf file.
    Path(PathBuf),
    /// The model that a Python package carries.
    Embedded,
    Repository(Repository),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Model,
    Dataset,
}

/// A repository of the hub. All parts are safe in paths and URLs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Repository {
    pub(crate) kind: Kind,
    pub(crate) owner: String,
    pub(crate) name: String,
    /// A branch, a tag, or a commit.
    pub(crate) revision: String,
}

impl ModelName {
    /// # Errors
    /// Neither a path nor a name that a model can have.
    pub(crate) fn parse(text: &str) -> Result<Self, Usage> {
        let path = Path::new(text);
        if text == super::EMBEDDED {
            return Ok(ModelName::Embedded);
        }
        let looks_like_path = text.starts_with(['.', '/', '~'])
            || text.ends_with('/')
            || path.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf"));
        if path.exists() || looks_like_path {
            return Ok(ModelName::Path(path.to_owned()));
        }
        Repository::parse(Kind::Model, text).map(ModelName::Repository).ok_or_else(|| {
            let text: String = text.chars().take(80).collect();
            Usage(format!(
                "\"{text}\" is no model\n  hint: a model is {}, OWNER/NAME of the Hugging Face hub, a directory, or a .gguf file",
                super::EMBEDDED
            ))
        })
    }
}

impl Repository {
    /// # Errors
    /// Not of the form `OWNER/NAME[@REVISION]`.
    pub(crate) fn dataset(text: &str) -> Result<Self, Usage> {
        Self::parse(Kind::Dataset, text).ok_or_else(|| {
            let text: String = text.chars().take(80).collect();
            Usage(format!("\"{text}\" is no data set\n  hint: a data set is OWNER/NAME of the Hugging Face hub"))
        })
    }

    fn parse(kind: Kind, text: &str) -> Option<Self> {
        let (id, revision) = text.split_once('@').unwrap_or((text, "main"));
        let (owner, name) = id.split_once('/')?;
        let good = is_name(owner) && is_name(name) && is_revision(revision);
        good.then(|| Self { kind, owner: owner.into(), name: name.into(), revision: revision.into() })
    }

    /// `OWNER/NAME`.
    pub(crate) fn id(&self) -> String {
        format!("{}/{}", self.owner, self.name)
    }
}

impl fmt::Display for Repository {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.owner, self.name)?;
        if self.revision != "main" { write!(f, "@{}", self.revision) } else { Ok(()) }
    }
}

/// The hub's own rule: letters, digits, `-`, `_` and `.`, none of the last three doubled or at an end. (`--` separates owner
/// and name in the cache.)
fn is_name(text: &str) -> bool {
    let inner = |c: char| matches!(c, '-' | '_' | '.');
    (1..=96).contains(&text.len())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || inner(c))
        && !text.starts_with(['-', '.'])
        && !text.ends_with(['-', '.'])
        && !text.contains("--")
        && !text.contains("..")
}

fn is_revision(text: &str) -> bool {
    text.len() <= 200
        && text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '/'))
        && is_inside(text)
}

/// Whether a relative path stays inside the directory that it is joined to, and is one that can be created.
pub(crate) fn is_inside(path: &str) -> bool {
    !path.is_empty()
        && path.len() <= 1024
        && !path.contains('\\')
        && !path.chars().any(char::is_control)
        && path.split('/').all(|part| !part.is_empty() && part != "." && part != ".." && part.len() <= 255)
        && Path::new(path).components().all(|c| matches!(c, Component::Normal(_)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_models() {
        let repository = |text: &str| match ModelName::parse(text) {
            Ok(ModelName::Repository(r)) => Some(format!("{} {} {}", r.owner, r.name, r.revision)),
            _ => None,
        };
        assert_eq!(repository("NousResearch/Llama-2-7b-chat-hf").unwrap(), "NousResearch Llama-2-7b-chat-hf main");
        assert_eq!(repository("a/b@refs/pr/1").unwrap(), "a b refs/pr/1");
        for bad in
            ["a", "a/b/c", "a/..", "../b", "a/b@", "a/b@../x", "a/b@/x", "a b/c", "a--b/c", "a/b@x y", "", "a/", "é/b"]
        {
            assert_eq!(repository(bad), None, "{bad}");
        }
        assert_eq!(ModelName::parse("smollm2-135m").unwrap(), ModelName::Embedded);
        assert_eq!(ModelName::parse("no/such.gguf").unwrap(), ModelName::Path("no/such.gguf".into()));
        assert_eq!(ModelName::parse("src").unwrap(), ModelName::Path("src".into()));
        let error = ModelName::parse("smollm").unwrap_err().to_string();
        assert!(error.starts_with("\"smollm\" is no model\n  hint: a model is smollm2-135m, OWNER/NAME"), "{error}");
    }

    #[test]
    fn paths_that_stay_inside() {
        for good in ["a", "a/b.txt", "data/train-00000-of-00001.parquet", "ünï cödé"] {
            assert!(is_inside(good), "{good}");
        }
        let long = "x".repeat(300);
        for bad in ["", "/a", "../a", "a/../b", "a/./b", "a//b", "a/", "a\\b", "a\nb", "a\0b", &long] {
            assert!(!is_inside(bad), "{bad:?}");
        }
    }
}
