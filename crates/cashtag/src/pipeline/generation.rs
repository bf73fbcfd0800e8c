//! What `chat` and `complete` share: how tokens are chosen, which system message there is, a generator for a model.

use std::io::IsTerminal as _;
use std::sync::Arc;

use anyhow::bail;
use cashtag_backend::Backend;
use cashtag_llama::adapter::Adapter;
use cashtag_llama::chat::{ChatTemplate, Message};
use cashtag_llama::checkpoint::Checkpoint;
use cashtag_llama::generate::{self, Generator, GeneratorOptions, Request};
use cashtag_llama::lora::Lora;
use cashtag_llama::model::Llama;
use cashtag_llama::tokenizer::Tokenizer;

use super::engine::{self, OpenedModel};
use crate::exit::Usage;
use crate::output;
use crate::settings::Settings;

/// How answers are written, under Transformers' names.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct Sampling {
    /// Most tokens of an answer
    #[arg(long, value_name = "N", default_value_t = 256, help_heading = "Generation")]
    max_new_tokens: usize,
    /// Most tokens of prompt and answer together [default: as many as the model takes]
    #[arg(long, value_name = "N", help_heading = "Generation")]
    max_length: Option<usize>,
    /// Flattens (above 1) or sharpens the choice; 0 takes the likeliest token each time
    #[arg(long, value_name = "T", default_value_t = 0.0, help_heading = "Generation")]
    temperature: f32,
    /// Choose among the likeliest tokens that together have this probability
    #[arg(long, value_name = "P", default_value_t = 1.0, help_heading = "Generation")]
    top_p: f32,
    /// Choose among this many of the likeliest tokens; 0 is all
    #[arg(long, value_name = "K", default_value_t = 0, help_heading = "Generation")]
    top_k: usize,
    /// The same seed gives the same answers
    #[arg(long, value_name = "N", default_value_t = 42, help_heading = "Generation")]
    seed: u64,
    /// End an answer before this text (`\n` is a line break); may be given several times
    #[arg(long, value_name = "TEXT", help_heading = "Generation")]
    stop: Vec<String>,
}

impl Sampling {
    /// # Errors
    /// Values that mean nothing.
    pub(crate) fn check(&self) -> anyhow::Result<()> {
        self.chosen(0).validate().map_err(|e| Usage(e.to_string()))?;
        for (flag, value) in [("--max-new-tokens", Some(self.max_new_tokens)), ("--max-length", self.max_length)] {
            if value == Some(0) {
                bail!(Usage(format!("{flag} is 0, expected a whole number from 1")));
            }
        }
        if let Some(empty) = self.stop.iter().find(|s| s.is_empty()) {
            bail!(Usage(format!("--stop is {empty:?}, expected a text that ends an answer")));
        }
        if self.temperature == 0.0 && (self.top_k > 0 || self.top_p < 1.0) {
            output::warn(
                "the temperature is 0, so the likeliest token is taken each time: --top-k and --top-p change nothing\n  hint: --temperature 0.8",
            );
        }
        Ok(())
    }

    /// `number`: which of several prompts; each has random numbers of its own.
    fn chosen(&self, number: u64) -> generate::Sampling {
        let Self { temperature, top_k, top_p, .. } = *self;
        generate::Sampling { temperature, top_k, top_p, seed: self.seed.wrapping_add(number) }
    }

    /// Most positions that a prompt with its answer may take.
    pub(crate) fn length<B: Backend>(&self, model: &Llama<B>) -> usize {
        self.max_length.unwrap_or(usize::MAX).min(model.max_positions())
    }

    pub(crate) fn max_new_tokens(&self) -> usize {
        self.max_new_tokens
    }

    /// # Errors
    /// A prompt that leaves no room for an answer.
    pub(crate) fn request(&self, prompt: Vec<u32>, length: usize, number: u64) -> anyhow::Result<Request> {
        let Some(room) = length.checked_sub(prompt.len()).filter(|&room| room > 0) else {
            bail!(
                "a prompt of {} tokens leaves no room for an answer within {length}\n  hint: shorten it{}",
                prompt.len(),
                if self.max_length.is_some() { ", or raise --max-length" } else { "" }
            );
        };
        let escaped = |s: &String| s.replace("\\n", "\n").replace("\\t", "\t");
        Ok(Request {
            sampling: self.chosen(number),
            stop: self.stop.iter().map(escaped).collect(),
            ..Request::new(prompt, self.max_new_tokens.min(room))
        })
    }
}

/// A model that writes text, opened but not loaded.
pub(crate) struct Writer {
    pub(crate) checkpoint: Checkpoint,
    pub(crate) adapter: Option<Adapter>,
    pub(crate) tokenizer: Arc<Tokenizer>,
    /// The error is only one where a conversation is to be rendered.
    template: Result<ChatTemplate, cashtag_llama::Error>,
    pub(crate) system: Option<String>,
}

impl Writer {
    /// Opens the model of the settings; the system message is the one that was said, else the one of the adapter or merged model, else none: the
    /// default of the settings asks for a label, which is no way to begin a conversation.
    ///
    /// # Errors
    /// As [`engine::open_model`].
    pub(crate) fn open(settings: &mut Settings) -> anyhow::Result<Self> {
        let named = settings.is_set("model.name");
        engine::follow_base_model(settings, named);
        let OpenedModel { checkpoint, adapter, trained } = engine::open_model(settings)?;
        let trained = trained.and_then(|t| t.system_message);
        let system =
            if settings.is_set("data.system_message") { settings.data.system_message.clone() } else { trained };
        let (tokenizer, template) = (Arc::new(checkpoint.tokenizer()?), checkpoint.chat_template());
        Ok(Self { checkpoint, adapter, tokenizer, template, system: system.filter(|s| !s.trim().is_empty()) })
    }

    /// The tokens of a conversation up to where the answer begins.
    ///
    /// # Errors
    /// A model without a template, or one that refuses these messages.
    pub(crate) fn conversation(&self, messages: &[Message]) -> anyhow::Result<Vec<u32>> {
        let template = match &self.template {
            Ok(template) => template,
            Err(e) => bail!("{e}"),
        };
        Ok(self.tokenizer.encode_rendered(&template.render(messages, true)?))
    }

    /// The tokens of a question, behind the system message if there is one.
    ///
    /// # Errors
    /// As [`conversation`](Self::conversation).
    pub(crate) fn question(&self, text: &str) -> anyhow::Result<Vec<u32>> {
        let mut messages = Vec::with_capacity(2);
        messages.extend(self.system.as_deref().map(|s| Message::new("system", s)));
        messages.push(Message::new("user", text));
        self.conversation(&messages)
    }

    /// The tokens of a text that is to be continued.
    pub(crate) fn plain(&self, text: &str) -> Vec<u32> {
        let mut tokens = Vec::new();
        tokens.extend(self.tokenizer.bos_token_id().filter(|_| self.tokenizer.adds_bos()));
        tokens.extend(self.tokenizer.encode(text));
        tokens
    }

    pub(crate) fn generator<B: Backend>(
        &self,
        backend: &B,
        model: &Llama<B>,
        lora: Option<&Lora<B>>,
        options: GeneratorOptions,
    ) -> anyhow::Result<Generator<B>> {
        Ok(Generator::new(backend, model, lora, Arc::clone(&self.tokenizer), options)?)
    }
}

/// Prints a piece of an answer at once; what could move the cursor is not let through to a terminal.
///
/// # Errors
/// As [`output::data`].
pub(crate) fn print_piece(text: &str) -> anyhow::Result<()> {
    if text.is_empty() {
        return Ok(());
    }
    if std::io::stdout().is_terminal() { output::data(&output::printable(text)) } else { output::data(text) }
}
