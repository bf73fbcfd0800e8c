//! What `run` and `train` have in common, in the order of the work: settings and model, the inputs and the run directory,
//! the training, the adapter that is left there with its temperature.
//!
//! Invariant: the `config.toml` of a run directory gives the same run again, also where values came from an adapter.

use std::path::{Path, PathBuf};

use anyhow::Context;
use cashtag_backend::{Backend, Capabilities};
use cashtag_corpus::formats::write_atomically;
use cashtag_llama::adapter::{Adapter, ClassifierConfig};
use cashtag_llama::lora::{LoraConfig, Module};
use cashtag_llama::model::Llama;

use super::data::{self, Data, Portions, Reading, quoted};
use super::engine::{self, Classifier, LabelledText, Opened};
use super::ranks;
use super::training::{self, Trained};
use crate::hub;
use crate::settings::choices::{Label, Layers, TargetModules};
use crate::settings::{self, DEFAULT_RECIPE, Flags, Settings, Source};
use crate::{exit, output};

/// Parts of the data in a run with nothing else said: what the device trains on, twice, and judges in under five minutes.
pub(crate) fn quick_portions(capabilities: &Capabilities) -> Portions {
    /// GFLOP/s by which [`MOST`] examples fit: two cores with AVX512-BF16.
    const ENOUGH: f64 = 250.0;
    const LEAST: f64 = 240.0;
    const MOST: f64 = 1200.0;
    let train = (MOST * capabilities.nominal_rate / ENOUGH).clamp(LEAST, MOST);
    Portions { train: Some(train as usize), held_out: Some(240) }
}

/// Settings (the recipe for small machines if none is named) and the model. With `--adapter` the adapter is what training
/// begins with: its shape and its prompt are the run's.
///
/// # Errors
/// What is wrong with settings, model or adapter; flags that contradict the adapter.
pub(crate) fn open(flags: &Flags) -> anyhow::Result<(Settings, Opened)> {
    let mut settings = flags.resolve_or_recipe(DEFAULT_RECIPE)?;
    let named = match settings.source("model.name") {
        Source::Flag(_) => true,
        // The recipe names a model for those who have none.
        Source::File { path, .. } => path != Path::new(DEFAULT_RECIPE),
        Source::Default | Source::Follows(_) => false,
    };
    engine::follow_base_model(&mut settings, named);
    let opened = engine::open(&settings)?;
    let mut followed = Vec::new();
    if let Some(adapter) = &opened.adapter {
        followed.extend(follow_adapter(&mut settings, adapter)?);
    }
    if let Some(trained) = &opened.trained {
        followed.extend(follow_prompt(&mut settings, trained)?);
    }
    if opened.adapter.is_none() && settings.model.name == hub::EMBEDDED && settings.model.random_weights.is_none() {
        narrow_quick_run(&mut settings);
    }
    let source = Source::Follows(if opened.adapter.is_some() { "model.adapter" } else { "model.name" });
    settings.sources.extend(followed.into_iter().map(|id| (id, source.clone())));
    Ok((settings, opened))
}

/// A run on a part of the examples has a few minutes: factors on the upper 18 of the small model's 30 blocks take three quarters of the
/// time, and the texts that this buys teach more than the other blocks do (docs/quality.md).
fn narrow_quick_run(s: &mut Settings) {
    let quick = !s.data.full && s.data.train_examples.is_none();
    if quick && !s.is_set("lora.layers_to_transform") {
        s.lora.layers_to_transform = Some(Layers((12..30).collect()));
        s.sources.insert("lora.layers_to_transform", Source::Follows("data.full"));
    }
}

/// Puts what the adapter fixes into the settings; the keys that changed.
fn follow_adapter(s: &mut Settings, adapter: &Adapter) -> anyhow::Result<Vec<&'static str>> {
    let (own, said) = (&adapter.lora, training::lora_config(s)?);
    let sorted = |c: &LoraConfig| {
        let mut modules = c.target_modules.clone();
        modules.sort_unstable();
        modules
    };
    let differences = [
        ("lora.r", own.r != said.r),
        ("lora.lora_alpha", own.lora_alpha != said.lora_alpha),
        ("lora.target_modules", sorted(own) != sorted(&said)),
        ("lora.use_rslora", own.use_rslora != said.use_rslora),
        ("lora.use_dora", own.use_dora != said.use_dora),
        ("lora.layers_to_transform", own.layers_to_transform != said.layers_to_transform),
    ];
    for (id, differs) in differences {
        if let (true, Source::Flag(flag)) = (differs, s.source(id)) {
            anyhow::bail!(exit::Usage(format!(
                "{flag}: {id} cannot be changed, the adapter that training begins with has its own\n  hint: leave {flag} or --adapter out"
            )));
        }
    }
    s.lora.r = own.r;
    s.lora.lora_alpha = f64::from(own.lora_alpha);
    s.lora.target_modules = if own.target_modules.len() == Module::ALL.len() {
        TargetModules::AllLinear
    } else {
        TargetModules::Some(own.target_modules.iter().map(|m| m.name().to_string()).collect())
    };
    s.lora.use_rslora = own.use_rslora;
    s.lora.use_dora = own.use_dora;
    s.lora.layers_to_transform = own.layers_to_transform.clone().map(Layers);
    Ok(differences.into_iter().filter_map(|(id, differs)| differs.then_some(id)).collect())
}

/// Puts the prompt that adapter or model were trained with into the settings; the keys that followed.
fn follow_prompt(s: &mut Settings, trained: &ClassifierConfig) -> anyhow::Result<Vec<&'static str>> {
    let mut followed = Vec::new();
    if !s.is_set("data.system_message") {
        s.data.system_message.clone_from(&trained.system_message);
        followed.push("data.system_message");
    }
    if !s.is_set("data.labels") {
        let label = |l: &cashtag_llama::prompt::Label| Label { name: l.name.clone(), word: l.word.clone() };
        s.data.labels.0 = trained.labels.iter().map(label).collect();
        followed.push("data.labels");
    }
    if !s.is_set("data.max_seq_length") {
        s.data.max_seq_length = trained.max_seq_length;
        followed.push("data.max_seq_length");
    }
    let labels = s.data.labels.0.len();
    if let Some(weights) = s.training.class_weights.as_ref().filter(|w| w.0.len() != labels) {
        let found = weights.0.len();
        anyhow::bail!(exit::Usage(format!(
            "training.class_weights has {found} weights, the model was trained with {labels} labels\n  hint: give one for each of {}",
            s.data.labels.names().join(", ")
        )));
    }
    Ok(followed)
}

/// The settings with the portions that the device decided on, so that they are the same on another one.
fn with_portions(s: &Settings, portions: Portions) -> Settings {
    let mut s = s.clone();
    let d = &mut s.data;
    let parts = [
        ("data.train_examples", &mut d.train_examples, portions.train),
        ("data.eval_examples", &mut d.eval_examples, portions.held_out),
    ];
    for (id, said, portion) in parts {
        if said.is_none() && !d.full {
            *said = portion;
            s.sources.insert(id, Source::Follows("model.device"));
        }
    }
    s
}

/// The parts of the data, and where the run is kept.
pub(crate) struct Inputs {
    pub(crate) run_dir: PathBuf,
    pub(crate) data: Data,
    pub(crate) train: Vec<LabelledText>,
    pub(crate) validation: Vec<LabelledText>,
    pub(crate) held_out: Vec<LabelledText>,
}

impl Inputs {
    /// Reads and splits the data, and writes what the run begins with: `config.toml`, `dataset.csv`, `validation.csv`,
    /// `held_out.csv`, `fine_tune_dataset.jsonl`.
    ///
    /// # Errors
    /// Data that cannot be read or has other labels, a run directory that cannot be written.
    pub(crate) fn load(
        s: &Settings,
        reading: &Reading,
        opened: &Opened,
        device: &Capabilities,
    ) -> anyhow::Result<Self> {
        let labels = opened.format.label_names();
        let portions = quick_portions(device);
        let data = data::load(s, reading, portions)?;
        let inputs = Self {
            run_dir: s.output_dir(),
            train: data::labelled(&data.train, &labels)?,
            validation: data::labelled(&data.validation, &labels)?,
            held_out: data::labelled(&data.held_out, &labels)?,
            data,
        };
        if ranks::other_rank().is_none() {
            inputs.write(&with_portions(s, portions), opened)?;
        }
        Ok(inputs)
    }

    fn write(&self, s: &Settings, opened: &Opened) -> anyhow::Result<()> {
        let (dir, data) = (&self.run_dir, &self.data);
        std::fs::create_dir_all(dir)
            .with_context(|| format!("cannot create {}\n  hint: choose another --output-dir", dir.display()))?;
        write_atomically(&dir.join("config.toml"), s.to_toml_with_sources().as_bytes())?;
        let all: Vec<_> = data.train.iter().chain(&data.validation).chain(&data.held_out).cloned().collect();
        cashtag_corpus::write_dataset_csv(&dir.join("dataset.csv"), &all)?;
        if !data.validation.is_empty() {
            cashtag_corpus::write_dataset_csv(&dir.join("validation.csv"), &data.validation)?;
        }
        cashtag_corpus::write_dataset_csv(&dir.join("held_out.csv"), &data.held_out)?;
        let system = opened.format.system_message().unwrap_or_default();
        cashtag_corpus::write_chat_jsonl(&dir.join("fine_tune_dataset.jsonl"), &data.train, system)?;
        Ok(())
    }

    /// Says what is about to happen.
    pub(crate) fn announce(&self, opened: &Opened, device: &str) {
        output::note(format!("{} on {device}", opened.checkpoint.describe()));
        output::note(format!(
            "{}: {} to train on, {} to validate, {} held out; run directory {}",
            self.data.source,
            self.train.len(),
            self.validation.len(),
            self.held_out.len(),
            self.run_dir.display()
        ));
    }

    /// Trains, from the adapter that was opened if there is one. `command` is what goes on with an interrupted run.
    ///
    /// # Errors
    /// As [`training::train`]; [`exit::Interrupted`] after Ctrl-C, when a checkpoint is saved.
    pub(crate) fn train<B: Backend>(
        &self,
        backend: &B,
        model: &Llama<B>,
        opened: &Opened,
        s: &Settings,
        command: &str,
    ) -> anyhow::Result<Trained<B>> {
        let begin = match &opened.adapter {
            Some(adapter) => Some((training::lora_config(s)?, adapter.tensors.clone())),
            None => None,
        };
        let parts = (&self.train[..], &self.validation[..]);
        match training::train(backend, model, &opened.format, s, parts, &self.run_dir, begin)? {
            Some(trained) => Ok(trained),
            None if ranks::other_rank().is_some() => Err(exit::Interrupted.into()),
            None => {
                output::note(format!("stopped; a checkpoint is saved. To go on: {command}"));
                Err(exit::Interrupted.into())
            }
        }
    }

    /// The command that goes on with this run.
    pub(crate) fn resume_command(&self, command: &str, reading: &Reading) -> String {
        let dir = quoted(&self.run_dir.to_string_lossy());
        let config = quoted(&self.run_dir.join("config.toml").to_string_lossy());
        let columns = reading.flags();
        format!("cashtag {command} --config {config} --output-dir {dir}{columns} --resume auto")
    }

    /// Where [`keep`](Self::keep) puts the adapter.
    pub(crate) fn adapter_dir(&self) -> PathBuf {
        self.run_dir.join("adapter")
    }

    /// Fits the temperature on the validation part and saves the adapter with it; the temperature.
    ///
    /// # Errors
    /// The device fails, the file system refuses, Ctrl-C.
    pub(crate) fn keep<B: Backend>(
        &self,
        backend: &B,
        model: &Llama<B>,
        opened: &Opened,
        s: &Settings,
        trained: &Trained<B>,
    ) -> anyhow::Result<f32> {
        let (format, lora) = (&opened.format, &trained.lora);
        let mut temperature = 1.0;
        if !self.validation.is_empty() {
            let mut classifier = Classifier::new(backend, model, Some(lora), format, s.training.max_tokens_per_batch)?;
            temperature = classifier.calibrate(&self.validation)?;
        }
        let adapter = Adapter {
            lora: lora.config.clone(),
            tensors: lora.tensors(backend)?,
            base_model: Some(s.model.name.clone()),
            classifier: Some(training::classifier_config(s, format, temperature)),
        };
        adapter.save(&self.adapter_dir(), model.config())?;
        Ok(temperature)
    }
}

/// `cashtag eval` for an adapter: on what nobody trained on.
pub(crate) fn eval_command(s: &Settings, run_dir: &Path) -> String {
    let path = |name: &str| quoted(&run_dir.join(name).to_string_lossy());
    let data = match (&s.data.source, &s.data.eval_source) {
        (settings::DataSource::Builtin, None) => String::new(),
        _ => format!(" --data {}", path("held_out.csv")),
    };
    format!("cashtag eval{data} --adapter {}", path("adapter"))
}
