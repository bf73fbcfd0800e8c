//! Why training stops.

use std::path::PathBuf;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Llama(#[from] cashtag_llama::Error),
    #[error(transparent)]
    Backend(#[from] cashtag_backend::Error),
    #[error("cannot write {}: {source}\n  hint: free some space or choose another --output-dir; the last complete checkpoint is intact", path.display())]
    Write {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("{}: {what}", path.display())]
    Checkpoint { path: PathBuf, what: String },
    #[error(
        "step {step}: the loss or its gradient is not finite for the {times}th time in a row (examples {examples})\n  hint: lower learning_rate, raise warmup_steps, or compute in bf16 or f32; {}",
        kept(last_good)
    )]
    NotFinite { step: usize, times: usize, examples: String, last_good: Option<PathBuf> },
    #[error(
        "rank {rank} ended before the training did\n  hint: what it said itself tells why; --resume auto goes on from the last checkpoint"
    )]
    RankLost { rank: usize },
    #[error("{0}")]
    Invalid(String),
}

pub type Result<T, E = Error> = std::result::Result<T, E>;

fn kept(last_good: &Option<PathBuf>) -> String {
    match last_good {
        Some(path) => format!("the last good checkpoint is {}", path.display()),
        None => "no checkpoint was saved before".into(),
    }
}
