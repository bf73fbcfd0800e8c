//! What is served under a name: the base model, or an adapter of it, with the prompts that it was trained with.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use cashtag_llama::adapter::{Adapter, CONFIG_FILE, ClassifierConfig};
use cashtag_llama::chat::{ChatTemplate, Message};
use cashtag_llama::checkpoint::Checkpoint;
use cashtag_llama::prompt::{Label, PromptFormat, TooLong};
use cashtag_llama::tokenizer::Tokenizer;
use tokio::sync::oneshot;

use super::{Base, Command, Engine, Failure, Inner};

/// Prompts where an adapter says nothing else.
#[derive(Clone, Debug)]
pub struct Prompting {
    pub system_message: Option<String>,
    pub labels: Vec<Label>,
    pub max_seq_length: usize,
    /// The three of them go before what an adapter says.
    pub overrides: [bool; 3],
}

/// A name in the service.
pub struct Served {
    pub name: String,
    /// The base model's name, for an adapter.
    pub parent: Option<String>,
    /// Where the adapter was read from.
    pub root: Option<PathBuf>,
    /// Seconds since 1970.
    pub created: u64,
    pub labels: Vec<String>,
    pub temperature: f32,
    /// Cuts texts that are too long.
    pub(crate) cutting: PromptFormat,
    /// Refuses them.
    pub(crate) strict: PromptFormat,
    template: ChatTemplate,
}

/// Names and what they stand for. The first that was added answers where no name is given.
#[derive(Default)]
pub(crate) struct Models {
    pub(crate) by_name: BTreeMap<String, Arc<Served>>,
    pub(crate) default: Option<Arc<Served>>,
}

impl Served {
    pub(crate) fn new(
        checkpoint: &Checkpoint,
        prompting: &Prompting,
        name: &str,
        base: Option<&str>,
        root: Option<&Path>,
        trained: Option<&ClassifierConfig>,
    ) -> cashtag_llama::Result<Self> {
        let mut p = prompting.clone();
        if let Some(trained) = trained {
            let [system, labels, length] = p.overrides;
            if !system {
                p.system_message.clone_from(&trained.system_message);
            }
            if !labels {
                p.labels.clone_from(&trained.labels);
            }
            if !length {
                p.max_seq_length = trained.max_seq_length;
            }
        }
        let tokenizer = Arc::new(checkpoint.tokenizer()?);
        let format = |too_long| {
            let template = checkpoint.chat_template()?;
            PromptFormat::new(
                tokenizer.clone(),
                template,
                p.system_message.clone(),
                p.labels.clone(),
                p.max_seq_length,
                too_long,
            )
        };
        let temperature = trained.map_or(1.0, |t| t.temperature);
        let cutting = format(TooLong::Truncate)?;
        Ok(Self {
            name: name.into(),
            parent: base.map(str::to_owned),
            root: root.map(Path::to_owned),
            created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()),
            labels: cutting.label_names(),
            temperature: if temperature.is_finite() && temperature > 0.0 { temperature } else { 1.0 },
            strict: format(TooLong::Error)?,
            cutting,
            template: checkpoint.chat_template()?,
        })
    }

    pub fn tokenizer(&self) -> &Arc<Tokenizer> {
        self.cutting.tokenizer()
    }

    pub fn max_seq_length(&self) -> usize {
        self.cutting.max_seq_length()
    }

    /// The tokens of a conversation up to where the answer begins.
    ///
    /// # Errors
    /// Messages that the model's template refuses.
    pub fn conversation(&self, messages: &[Message]) -> cashtag_llama::Result<Vec<u32>> {
        Ok(self.tokenizer().encode_rendered(&self.template.render(messages, true)?))
    }

    /// The tokens of a text that is to be continued.
    pub fn plain(&self, text: &str) -> Vec<u32> {
        let t = self.tokenizer();
        t.bos_token_id().filter(|_| t.adds_bos()).into_iter().chain(t.encode(text)).collect()
    }

    /// The tokens of an answer to a conversation, with what ends the turn.
    ///
    /// # Errors
    /// As [`conversation`](Self::conversation).
    pub fn answer(&self, messages: &[Message], prompt: &[u32], answer: &str) -> cashtag_llama::Result<Vec<u32>> {
        let mut with = messages.to_vec();
        with.push(Message::new("assistant", answer));
        let full = self.tokenizer().encode_rendered(&self.template.render(&with, false)?);
        if full.len() <= prompt.len() || !full.starts_with(prompt) {
            // A template that writes past turns differently: the plain words, without an end.
            return Ok(self.tokenizer().encode(answer));
        }
        let mut tokens = full[prompt.len()..].to_vec();
        if let Some(end) = tokens.iter().rposition(|&t| self.tokenizer().is_special(t)) {
            tokens.truncate(end + 1);
        }
        Ok(tokens)
    }
}

impl Inner {
    pub(crate) fn base(&self) -> Result<&Base, Failure> {
        self.base.get().ok_or(Failure::Loading)
    }

    fn models(&self) -> std::sync::RwLockReadGuard<'_, Models> {
        self.models.read().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    pub(crate) fn change_models(&self, change: impl FnOnce(&mut Models)) {
        let mut models = self.models.write().unwrap_or_else(std::sync::PoisonError::into_inner);
        change(&mut models);
        self.measures.adapters.set(models.by_name.values().filter(|m| m.parent.is_some()).count() as u64);
    }

    pub(crate) fn find(&self, name: Option<&str>) -> Result<Arc<Served>, Failure> {
        let models = self.models();
        let found = match name {
            Some(name) => models.by_name.get(name),
            None => models.default.as_ref(),
        };
        found.cloned().ok_or_else(|| Failure::NoSuchModel {
            name: name.unwrap_or_default().chars().take(100).collect(),
            known: models.by_name.keys().cloned().collect::<Vec<_>>().join(", "),
        })
    }
}

/// The adapter's own directory, also if the directory of its run was named.
fn adapter_directory(dir: &Path) -> PathBuf {
    let inner = dir.join("adapter");
    if !dir.join(CONFIG_FILE).exists() && inner.join(CONFIG_FILE).exists() { inner } else { dir.to_owned() }
}

impl Engine {
    /// What `name` stands for; the default model for `None`.
    ///
    /// # Errors
    /// [`Failure::NoSuchModel`]; [`Failure::Loading`] before there is any.
    pub fn find(&self, name: Option<&str>) -> Result<Arc<Served>, Failure> {
        self.check_ready()?;
        self.inner.find(name)
    }

    /// Everything that is served, by name.
    pub fn models(&self) -> Vec<Arc<Served>> {
        self.inner.models().by_name.values().cloned().collect()
    }

    /// Reads an adapter and serves it under a name. Texts are classified meanwhile.
    ///
    /// # Errors
    /// A name that is taken, too many adapters, files that are not an adapter of this model, a device without memory.
    pub async fn load_adapter(&self, name: &str, path: &Path) -> Result<(), Failure> {
        self.check_ready()?;
        let _alone = self.inner.loading.lock().await;
        if self.inner.find(Some(name)).is_ok() {
            return Err(Failure::Conflict(format!("there is a model {name:?}; unload it first")));
        }
        if self.models().len() > self.config().max_loras {
            let most = self.config().max_loras;
            return Err(Failure::Conflict(format!("{most} adapters are loaded, which is the most; unload one first")));
        }
        let (inner, name, dir) = (self.inner.clone(), name.to_owned(), adapter_directory(path));
        let read = move || {
            let base = inner.base()?;
            let invalid = |e: cashtag_llama::Error| Failure::Invalid(e.to_string());
            let adapter = Adapter::load(&dir, &base.config).map_err(invalid)?;
            let trained = adapter.classifier.as_ref();
            let served = Served::new(&base.checkpoint, &base.prompting, &name, Some(&base.name), Some(&dir), trained)
                .map_err(invalid)?;
            Ok((Arc::new(served), Box::new(adapter)))
        };
        let (served, adapter) = tokio::task::spawn_blocking(read).await.map_err(|_| Failure::Ended)??;
        let (done, loaded) = oneshot::channel();
        self.inner.queue().commands.push_back(Command::Add { served: served.clone(), adapter, done });
        self.inner.wake();
        loaded.await.map_err(|_| Failure::Ended)??;
        self.inner.change_models(|models| drop(models.by_name.insert(served.name.clone(), served)));
        Ok(())
    }

    /// No longer serves an adapter. Texts that came before are still answered with it.
    ///
    /// # Errors
    /// No such adapter; the base model, and the model that answers where none is named, stay.
    pub fn unload_adapter(&self, name: &str) -> Result<(), Failure> {
        let served = self.find(Some(name))?;
        let is_default = self.inner.models().default.as_ref().is_some_and(|d| Arc::ptr_eq(d, &served));
        if served.parent.is_none() || is_default {
            let what =
                format!("{name:?} was there from the start and answers where no model is named; it cannot be unloaded");
            return Err(Failure::Conflict(what));
        }
        self.inner.change_models(|models| drop(models.by_name.remove(name)));
        self.inner.queue().commands.push_back(Command::Retire);
        self.inner.wake();
        Ok(())
    }
}
