//! A model on a device with its prompts: what judging, predicting and training start from.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, bail};
use cashtag_backend::Backend;
use cashtag_eval::Judged;
use cashtag_llama::adapter::{Adapter, CLASSIFIER_FILE, CONFIG_FILE, ClassifierConfig};
use cashtag_llama::checkpoint::Checkpoint;
use cashtag_llama::config::LlamaConfig;
use cashtag_llama::lora::Lora;
use cashtag_llama::model::Llama;
use cashtag_llama::prompt::{Label, PromptFormat, TooLong};
use cashtag_llama::score::{Scorer, normalise};

use super::data::hinted;
use crate::progress::{Progress, Unit};
use crate::settings::{self, Settings, Source};
use crate::{exit, hub, output};

/// Where the parts of a model come from, opened but not loaded.
pub(crate) struct Opened {
    pub(crate) checkpoint: Checkpoint,
    pub(crate) format: PromptFormat,
    pub(crate) adapter: Option<Adapter>,
    /// How the adapter, or a merged model, was trained to be asked.
    pub(crate) trained: Option<ClassifierConfig>,
}

/// A model with its adapter, without a prompt for labels.
pub(crate) struct OpenedModel {
    pub(crate) checkpoint: Checkpoint,
    pub(crate) adapter: Option<Adapter>,
    pub(crate) trained: Option<ClassifierConfig>,
}

impl Opened {
    /// The temperature that was fitted after training; 1 leaves the probabilities as the model gives them.
    pub(crate) fn temperature(&self) -> f32 {
        let fitted = self.trained.as_ref().map(|t| t.temperature);
        fitted.filter(|t| t.is_finite() && *t > 0.0).unwrap_or(1.0)
    }
}

/// Opens the model that the settings name; fetches the small default model if it is not there yet.
///
/// # Errors
/// No such model, damaged files, an adapter that does not fit.
pub(crate) fn open(settings: &Settings) -> anyhow::Result<Opened> {
    let OpenedModel { checkpoint, adapter, trained } = open_model(settings)?;
    let format = format(settings, &checkpoint, trained.as_ref())?;
    Ok(Opened { checkpoint, format, adapter, trained })
}

/// The model and its adapter without a prompt for labels: for commands that write text or files.
///
/// # Errors
/// As [`open`].
pub(crate) fn open_model(settings: &Settings) -> anyhow::Result<OpenedModel> {
    let checkpoint = match &settings.model.random_weights {
        Some(shape) => random_checkpoint(settings, shape)?,
        None => open_checkpoint(&find(settings)?)?,
    };
    let adapter = match &settings.model.adapter {
        Some(dir) => Some(Adapter::load(&adapter_directory(dir), checkpoint.config())?),
        None => None,
    };
    if let Some(base) = adapter.as_ref().and_then(|a| Some(&a.classifier.as_ref()?.base_model))
        && !is_same_model(base, &settings.model.name)
    {
        output::warn(format!("the adapter was trained on {base}, the model is {}", settings.model.name));
    }
    let trained = match &adapter {
        Some(adapter) => adapter.classifier.clone(),
        // A merged model carries what its adapter knew.
        None => ClassifierConfig::read(checkpoint.path())?,
    };
    Ok(OpenedModel { checkpoint, adapter, trained })
}

/// An adapter knows its base model: without another word from the user (`named`) that is the one to use.
pub(crate) fn follow_base_model(settings: &mut Settings, named: bool) {
    let Some(dir) = settings.model.adapter.as_deref().filter(|_| !named) else { return };
    // What is wrong with the file is said when the adapter is loaded.
    let text = std::fs::read_to_string(adapter_directory(dir).join(CLASSIFIER_FILE)).unwrap_or_default();
    let Ok(trained) = serde_json::from_str::<ClassifierConfig>(&text) else { return };
    if trained.base_model != settings.model.name && !trained.base_model.trim().is_empty() {
        settings.model.name = trained.base_model;
        settings.sources.insert("model.name", Source::Follows("model.adapter"));
    }
}

/// The adapter's own directory, also if the directory of its run was named.
pub(crate) fn adapter_directory(dir: &Path) -> PathBuf {
    let inner = dir.join("adapter");
    if !dir.join(CONFIG_FILE).exists() && inner.join(CONFIG_FILE).exists() { inner } else { dir.to_owned() }
}

fn is_same_model(a: &str, b: &str) -> bool {
    let canonical = |name: &str| std::fs::canonicalize(name).ok();
    a == b || canonical(a).is_some_and(|a| canonical(b) == Some(a))
}

/// Where the model's files lie.
fn find(settings: &Settings) -> anyhow::Result<PathBuf> {
    let found = if settings.model.name == hub::EMBEDDED {
        hub::pull_if_missing(&settings.model.name)
    } else {
        hub::resolve_model(&settings.model.name)
    };
    match (found, &settings.model.adapter) {
        (Err(e), Some(dir)) if matches!(settings.source("model.name"), Source::Follows(_)) => {
            let what = format!("the adapter {} was trained on {}", dir.display(), settings.model.name);
            Err(e.context(format!("{what}\n  hint: if that model lies elsewhere, name it with --model")))
        }
        (found, _) => found.map_err(|e| {
            hinted(e, "--model takes smollm2-135m, OWNER/NAME of the hub, a checkpoint directory or a .gguf file")
        }),
    }
}

fn open_checkpoint(path: &Path) -> anyhow::Result<Checkpoint> {
    Checkpoint::open(path).with_context(|| format!("cannot use the model {}", path.display()))
}

/// A model of the given shape with random weights, for measurements; its tokenizer comes from `--tokenizer`.
fn random_checkpoint(settings: &Settings, shape: &str) -> anyhow::Result<Checkpoint> {
    let config = match LlamaConfig::preset(shape) {
        Some(config) => config,
        None if Path::new(shape).is_file() => cashtag_llama::hf::read_config(Path::new(shape))?,
        None => bail!(exit::Usage(format!(
            "--random-weights {shape} is no known shape\n  hint: {}",
            LlamaConfig::PRESETS.join(", ")
        ))),
    };
    let Some(tokenizer) = &settings.model.tokenizer else {
        bail!(exit::Usage(
            "--random-weights needs --tokenizer: a .gguf file or a directory whose ids fit the shape".into()
        ));
    };
    Ok(Checkpoint::random(config, settings.training.seed, Some(tokenizer))?)
}

/// The prompt: what adapter or model were trained with, unless the user said something else.
///
/// # Errors
/// A model without tokenizer or chat template, labels that cannot be told apart.
pub(crate) fn format(
    settings: &Settings,
    checkpoint: &Checkpoint,
    trained: Option<&ClassifierConfig>,
) -> anyhow::Result<PromptFormat> {
    let d = &settings.data;
    let mut system = d.system_message.clone();
    let mut labels: Vec<Label> =
        d.labels.0.iter().map(|l| Label { name: l.name.clone(), word: l.word.clone() }).collect();
    let mut max_seq_length = d.max_seq_length;
    if let Some(trained) = trained {
        if !settings.is_set("data.system_message") {
            system.clone_from(&trained.system_message);
        }
        if !settings.is_set("data.labels") {
            labels.clone_from(&trained.labels);
        }
        if !settings.is_set("data.max_seq_length") {
            max_seq_length = trained.max_seq_length;
        }
    }
    let too_long = match d.too_long {
        settings::TooLong::Truncate => TooLong::Truncate,
        settings::TooLong::Error => TooLong::Error,
    };
    let tokenizer = Arc::new(checkpoint.tokenizer()?);
    let template = checkpoint.chat_template()?;
    Ok(PromptFormat::new(tokenizer, template, system, labels, max_seq_length, too_long)?)
}

/// Loads the weights, with a progress bar.
pub(crate) fn load<B: Backend>(backend: &B, checkpoint: &Checkpoint) -> anyhow::Result<Llama<B>> {
    let bar = Progress::new("loading", Unit::Of("layers"), None);
    let model = Llama::load(backend, checkpoint, |done, total| {
        bar.set_total(total as u64);
        bar.set_position(done as u64);
    })?;
    Ok(model)
}

/// Classifies texts: probabilities over the labels, in their order.
pub(crate) struct Classifier<'a, B: Backend> {
    backend: &'a B,
    model: &'a Llama<B>,
    lora: Option<&'a Lora<B>>,
    format: &'a PromptFormat,
    scorer: Scorer<B>,
    pub(crate) temperature: f32,
}

impl<'a, B: Backend> Classifier<'a, B> {
    pub(crate) fn new(
        backend: &'a B,
        model: &'a Llama<B>,
        lora: Option<&'a Lora<B>>,
        format: &'a PromptFormat,
        max_tokens: usize,
    ) -> anyhow::Result<Self> {
        let scorer = Scorer::new(backend, model, lora, format, max_tokens)?;
        Ok(Self { backend, model, lora, format, scorer, temperature: 1.0 })
    }

    /// Probabilities of each text; any number of texts.
    pub(crate) fn classify(&mut self, texts: &[&str]) -> anyhow::Result<Vec<Vec<f32>>> {
        let prompts = texts.iter().map(|t| self.format.prompt(t)).collect::<Result<Vec<_>, _>>()?;
        let prompts: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
        let scores = self.scorer.log_probabilities(self.backend, self.model, self.lora, &prompts)?;
        Ok(scores.iter().map(|s| normalise(s, self.temperature)).collect())
    }

    /// Rows that a prompt takes.
    pub(crate) fn rows(&self, prompt: &[u32]) -> usize {
        self.scorer.rows(prompt)
    }

    /// Whether a text can be a prompt (it cannot if it is too long and that is asked to be an error).
    pub(crate) fn takes(&self, text: &str) -> bool {
        self.format.prompt(text).is_ok()
    }

    /// The temperature that suits these labelled texts best.
    pub(crate) fn calibrate(&mut self, texts: &[LabelledText]) -> anyhow::Result<f32> {
        Ok(cashtag_eval::fit_temperature(&self.judge("calibrating", texts)?) as f32)
    }

    /// Classifies labelled texts, with a progress bar; Ctrl-C ends it.
    pub(crate) fn judge(&mut self, what: &str, texts: &[LabelledText]) -> anyhow::Result<Vec<Judged>> {
        const CHUNK: usize = 64;
        let bar = Progress::new(what, Unit::Of("texts"), Some(texts.len() as u64));
        let mut judged = Vec::with_capacity(texts.len());
        for chunk in texts.chunks(CHUNK) {
            exit::check_stop()?;
            let probabilities = self.classify(&chunk.iter().map(|t| t.text.as_str()).collect::<Vec<_>>())?;
            judged.extend(chunk.iter().zip(probabilities).map(|(t, probabilities)| Judged {
                text: t.text.clone(),
                truth: t.label,
                probabilities,
                kind: t.kind.clone(),
            }));
            bar.inc(chunk.len() as u64);
        }
        Ok(judged)
    }
}

/// A text with the index of its label.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct LabelledText {
    pub(crate) text: String,
    pub(crate) label: usize,
    pub(crate) kind: Option<String>,
}

/// What was learnt before: the adapter on the device, if there is one.
pub(crate) fn load_lora<B: Backend>(
    backend: &B,
    model: &Llama<B>,
    adapter: Option<&Adapter>,
) -> anyhow::Result<Option<Lora<B>>> {
    let Some(adapter) = adapter else { return Ok(None) };
    let mut lora = Lora::new(backend, adapter.lora.clone(), model.config(), &adapter.tensors, false)?;
    model.prepare(backend, &mut lora)?;
    output::detail(format!("adapter: r {}, {} parameters", adapter.lora.r, lora.parameters()));
    Ok(Some(lora))
}
