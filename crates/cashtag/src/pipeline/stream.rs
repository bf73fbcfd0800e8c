//! A classifier as the live pipeline wants it, and the fingerprints that stand beside each score.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use cashtag_backend::Backend;
use cashtag_live::scorer::{ModelInfo, Scorer};
use cashtag_live::tickers::{TickerMention, Tickers};
use cashtag_llama::prompt::PromptFormat;
use cashtag_tickers::Finder;
use sha2::{Digest, Sha256};

use super::engine::{self, Classifier, Opened};
use crate::settings::Settings;

/// Texts that are scored at a time: a question on the page waits for so many at most.
const BATCH: usize = 32;
/// Of a file of weights its size, beginning and end are hashed: reading all of 13 GB at each start would take longer than
/// loading them.
const SAMPLE: u64 = 1 << 20;

pub(crate) struct StreamScorer<'a, B: Backend> {
    pub(crate) classifier: Classifier<'a, B>,
    pub(crate) info: ModelInfo,
}

impl<B: Backend> Scorer for StreamScorer<'_, B> {
    fn info(&self) -> ModelInfo {
        self.info.clone()
    }

    fn batch(&self) -> usize {
        BATCH
    }

    fn score(&mut self, texts: &[&str]) -> Result<Vec<Vec<f32>>, String> {
        self.classifier.classify(texts).map_err(|e| format!("{e:#}"))
    }
}

/// What the scores are made with.
///
/// # Errors
/// A file of the model that cannot be read again.
pub(crate) fn model_info(settings: &Settings, opened: &Opened) -> anyhow::Result<ModelInfo> {
    let adapter = settings.model.adapter.as_deref();
    let adapter_hash = match adapter {
        None => None,
        Some(dir) => Some(short(files(&engine::adapter_directory(dir))?)),
    };
    Ok(ModelInfo {
        name: settings.model.name.clone(),
        adapter: adapter.map(|dir| dir.display().to_string()),
        labels: opened.format.label_names(),
        temperature: opened.temperature(),
        model_hash: short(files(opened.checkpoint.path())?),
        adapter_hash,
        prompt_hash: short(prompt(&opened.format, opened.temperature())),
    })
}

/// A model's files, sampled.
fn files(path: &Path) -> anyhow::Result<Sha256> {
    let mut hash = Sha256::new();
    let mut paths: Vec<PathBuf> = if path.is_dir() {
        std::fs::read_dir(path)?.flatten().map(|e| e.path()).filter(|p| p.is_file()).collect()
    } else {
        vec![path.to_owned()]
    };
    paths.sort();
    for path in paths {
        let mut file = File::open(&path)?;
        let size = file.metadata()?.len();
        hash.update(size.to_le_bytes());
        let mut bytes = Vec::new();
        (&mut file).take(SAMPLE).read_to_end(&mut bytes)?;
        file.seek(SeekFrom::Start(size.saturating_sub(SAMPLE)))?;
        file.take(SAMPLE).read_to_end(&mut bytes)?;
        hash.update(&bytes);
    }
    Ok(hash)
}

/// All that surrounds a text, as tokens.
fn prompt(format: &PromptFormat, temperature: f32) -> Sha256 {
    let mut hash = Sha256::new();
    let mut add = |tokens: &[u32]| {
        hash.update((tokens.len() as u64).to_le_bytes());
        tokens.iter().for_each(|t| hash.update(t.to_le_bytes()));
    };
    add(&format.prompt("x").unwrap_or_default());
    (0..format.labels().len()).for_each(|label| add(format.label_tokens(label)));
    hash.update(temperature.to_le_bytes());
    hash
}

fn short(hash: Sha256) -> String {
    hash.finalize().iter().take(8).map(|b| format!("{b:02x}")).collect()
}

/// The ticker finder as the pipeline wants it.
pub(crate) struct Companies(pub(crate) Finder);

impl Tickers for Companies {
    fn find(&self, text: &str) -> Vec<TickerMention> {
        let mention = |m: cashtag_tickers::Mention| TickerMention { symbol: m.symbol, start: m.start, end: m.end };
        self.0.find(text).into_iter().map(mention).collect()
    }

    fn sector(&self, symbol: &str) -> Option<String> {
        let sector = &self.0.symbols().get(symbol)?.sector;
        (!sector.is_empty()).then(|| sector.clone())
    }

    fn name(&self, symbol: &str) -> Option<String> {
        let name = &self.0.symbols().get(symbol)?.name;
        (!name.is_empty()).then(|| name.clone())
    }
}
