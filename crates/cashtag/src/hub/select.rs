//! Which files of a repository are fetched: what a Llama checkpoint needs and nothing that is there twice.

use std::path::Path;

use anyhow::bail;
use serde::Deserialize;

use super::name::{Kind, Repository};

/// What the hub says about a repository at a revision. Names are checked, the commit is one.
#[derive(Debug)]
pub(crate) struct Listing {
    pub(crate) commit: String,
    pub(crate) files: Vec<Listed>,
}

/// One file of a listing.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Listed {
    #[serde(rename = "rfilename")]
    pub(crate) path: String,
    pub(crate) size: Option<u64>,
    /// The hash that git has for it; the etag of a small file.
    #[serde(rename = "blobId")]
    pub(crate) blob_id: Option<String>,
    pub(crate) lfs: Option<Lfs>,
}

/// What is known of a large file.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Lfs {
    pub(crate) sha256: Option<String>,
    pub(crate) size: Option<u64>,
}

/// Files of a checkpoint besides the weights.
const SMALL: [&str; 10] = [
    "config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "model.safetensors.index.json",
    "adapter_config.json",
];

const DATA: [&str; 4] = [".parquet", ".csv", ".jsonl", ".jsonl.gz"];

/// # Errors
/// Nothing that cashtag could load is in the repository.
pub(crate) fn select(repository: &Repository, listing: &Listing) -> anyhow::Result<Vec<Listed>> {
    let names: Vec<&str> = listing.files.iter().map(|f| f.path.as_str()).collect();
    let chosen: Vec<&str> = match repository.kind {
        Kind::Model => checkpoint(&names),
        Kind::Dataset => {
            names.iter().copied().filter(|n| DATA[..3].iter().any(|e| n.to_ascii_lowercase().ends_with(e))).collect()
        }
    };
    let weights = chosen.iter().any(|n| n.ends_with(".safetensors"));
    match repository.kind {
        Kind::Dataset if chosen.is_empty() => {
            bail!("{repository} has no Parquet, CSV or JSONL file\n  hint: {}", seen(&names))
        }
        Kind::Model if !weights => {
            let has = |ending: &str| names.iter().any(|n| n.ends_with(ending));
            let mend = if has(".gguf") {
                "it has .gguf files: download one of them and pass its path".to_string()
            } else if has(".bin") || has(".pth") {
                "its weights are PyTorch pickles: use a repository that has them as .safetensors".to_string()
            } else {
                seen(&names)
            };
            bail!("{repository} has no .safetensors file\n  hint: {mend}")
        }
        Kind::Model if !chosen.contains(&"config.json") && !chosen.contains(&"adapter_config.json") => {
            bail!("{repository} has no config.json: it is no checkpoint for Transformers\n  hint: {}", seen(&names))
        }
        _ => {}
    }
    Ok(listing.files.iter().filter(|f| chosen.contains(&f.path.as_str())).cloned().collect())
}

fn seen(names: &[&str]) -> String {
    match names {
        [] => "it has no files at all".into(),
        names => {
            let first: Vec<&str> = names.iter().take(6).copied().collect();
            format!("it has {}{}", first.join(", "), if names.len() > 6 { ", …" } else { "" })
        }
    }
}

/// Files at the top only: folders hold other formats of the same weights (`original/`, `onnx/`).
fn checkpoint<'a>(names: &[&'a str]) -> Vec<&'a str> {
    let top = || names.iter().copied().filter(|n| !n.contains('/'));
    let mut chosen: Vec<&str> = top().filter(|n| SMALL.contains(n) || n.starts_with("tokenizer")).collect();
    let weights: Vec<&str> = top().filter(|n| n.ends_with(".safetensors")).collect();
    // The same weights may be there whole, in shards, and under the names of another format.
    if weights.contains(&"model.safetensors") {
        chosen.push("model.safetensors");
        chosen.retain(|n| *n != "model.safetensors.index.json");
    } else {
        let shards: Vec<&str> = weights.iter().copied().filter(|n| n.starts_with("model-")).collect();
        let others = weights.iter().copied().filter(|n| !n.starts_with("consolidated"));
        chosen.extend(if shards.is_empty() { others.collect() } else { shards });
    }
    chosen
}

/// Whether a snapshot has all that is needed to load it.
pub(crate) fn is_whole(kind: Kind, snapshot: &Path) -> bool {
    let has = |name: &str| snapshot.join(name).is_file();
    match kind {
        // A snapshot of a data set is linked when all its files are here.
        Kind::Dataset => true,
        Kind::Model if has("model.safetensors") || has("adapter_model.safetensors") => {
            has("config.json") || has("adapter_config.json")
        }
        Kind::Model if has("model.safetensors.index.json") => {
            #[derive(Deserialize)]
            struct Index {
                weight_map: std::collections::HashMap<String, String>,
            }
            let index = std::fs::read(snapshot.join("model.safetensors.index.json")).ok();
            let index = index.and_then(|bytes| serde_json::from_slice::<Index>(&bytes).ok());
            has("config.json") && index.is_some_and(|i| i.weight_map.values().all(|shard| has(shard)))
        }
        Kind::Model => {
            let entries = std::fs::read_dir(snapshot);
            let is_weights = |name: std::ffi::OsString| name.to_string_lossy().ends_with(".safetensors");
            has("config.json") && entries.is_ok_and(|e| e.flatten().any(|entry| is_weights(entry.file_name())))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_checkpoint_without_what_is_there_twice() {
        let llama = [
            ".gitattributes",
            "LICENSE.txt",
            "README.md",
            "config.json",
            "generation_config.json",
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "model.safetensors.index.json",
            "pytorch_model-00001-of-00002.bin",
            "pytorch_model.bin.index.json",
            "original/consolidated.00.pth",
            "special_tokens_map.json",
            "tokenizer.json",
            "tokenizer.model",
            "tokenizer_config.json",
        ];
        let want = [
            "config.json",
            "generation_config.json",
            "model.safetensors.index.json",
            "special_tokens_map.json",
            "tokenizer.json",
            "tokenizer.model",
            "tokenizer_config.json",
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
        ];
        assert_eq!(checkpoint(&llama), want);
        let mistral = ["config.json", "consolidated.safetensors", "model-00001-of-00001.safetensors"];
        assert_eq!(checkpoint(&mistral), ["config.json", "model-00001-of-00001.safetensors"]);
        let whole = ["model.safetensors", "model.safetensors.index.json", "onnx/model.safetensors"];
        assert_eq!(checkpoint(&whole), ["model.safetensors"]);
    }

    #[test]
    fn repositories_that_cannot_be_used() {
        let error = |files: &[&str]| {
            let listed = |n: &&str| Listed { path: n.to_string(), size: None, blob_id: None, lfs: None };
            let listing = Listing { commit: String::new(), files: files.iter().map(listed).collect() };
            let repository = match super::super::ModelName::parse("a/b").unwrap() {
                super::super::ModelName::Repository(r) => r,
                other => panic!("{other:?}"),
            };
            select(&repository, &listing).unwrap_err().to_string()
        };
        assert!(error(&["config.json", "pytorch_model.bin"]).contains("PyTorch pickles"));
        assert!(error(&["a.Q4_0.gguf"]).contains("pass its path"));
        assert!(error(&["model.safetensors"]).starts_with("a/b has no config.json"));
        assert!(error(&[]).contains("no files at all"));
    }
}
