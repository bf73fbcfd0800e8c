//! `cashtag chat`: a conversation with the model, on the terminal or line by line from standard input.
//!
//! The keys and values of the conversation stay on the device: a turn costs its own tokens, not those of the turns before.

use std::io::{self, BufRead as _, IsTerminal as _, Read as _, Write as _};
use std::time::Instant;

use anyhow::{Context as _, bail};
use cashtag_backend::Backend;
use cashtag_llama::chat::Message;
use cashtag_llama::generate::{Generator, GeneratorOptions, SequenceId};
use cashtag_llama::lora::Lora;
use cashtag_llama::model::Llama;

use crate::pipeline::device::{self, Job};
use crate::pipeline::engine;
use crate::pipeline::generation::{Sampling, Writer, print_piece};
use crate::settings::{Flags, Inference, Settings};
use crate::{exit, output};

/// The longest line.
const MAX_LINE: u64 = 1 << 20;

/// What can be said beside text.
const HELP: &str = "/new forgets the conversation, /system TEXT begins anew with that system message, /quit or Ctrl-D ends; \
Ctrl-C ends an answer";

#[derive(clap::Args)]
#[command(
    after_help = "In a conversation: /new forgets it, /system TEXT begins anew with that system message, /quit ends. \
Ctrl-C ends an answer.\n\nExamples:\n  cashtag chat\n  cashtag chat --adapter runs/mine\n  \
cashtag chat --temperature 0.7 --top-p 0.9 --system-message 'You are terse.'"
)]
pub(crate) struct Args {
    #[command(flatten)]
    sampling: Sampling,
    #[command(flatten)]
    settings: Flags<Inference>,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    args.sampling.check()?;
    let mut settings = args.settings.resolve()?;
    let writer = Writer::open(&mut settings)?;
    device::run(&settings, Chat { settings: &settings, sampling: &args.sampling, writer })
}

struct Chat<'a> {
    settings: &'a Settings,
    sampling: &'a Sampling,
    writer: Writer,
}

impl Job for Chat<'_> {
    type Output = ();

    fn run<B: Backend>(self, backend: B) -> anyhow::Result<()> {
        let Chat { settings, sampling, writer } = self;
        let model = engine::load(&backend, &writer.checkpoint)?;
        let lora = engine::load_lora(&backend, &model, writer.adapter.as_ref())?;
        let length = sampling.length(&model);
        let rows = settings.training.max_tokens_per_batch;
        let options = GeneratorOptions { prefix: Vec::new(), kv_rows: length, max_tokens: rows, max_sequences: 1 };
        let generator = writer.generator(&backend, &model, lora.as_ref(), options)?;
        let mut talk = Talk {
            backend: &backend,
            model: &model,
            lora: lora.as_ref(),
            generator,
            system: writer.system.clone(),
            writer: &writer,
            sampling,
            length,
            turns: Vec::new(),
            sequence: None,
            answers: 0,
        };
        let terminal = io::stdin().is_terminal();
        if terminal {
            output::note(format!(
                "{}; /help says what can be typed, /quit or Ctrl-D ends",
                writer.checkpoint.describe()
            ));
            if let Some(system) = &talk.system {
                output::note(format!("system message: {system}"));
            }
        }
        loop {
            if terminal {
                let mut err = io::stderr();
                let _ = write!(err, "> ").and_then(|()| err.flush());
            }
            let Some(line) = read_line()? else { break };
            match line.trim() {
                "" => {}
                "/quit" | "/exit" => return Ok(()),
                "/new" => talk.begin(),
                "/help" | "/?" => output::note(HELP),
                said => match said.strip_prefix("/system") {
                    Some(rest) if rest.is_empty() || rest.starts_with(char::is_whitespace) => {
                        talk.system = Some(rest.trim().to_string()).filter(|s| !s.is_empty());
                        talk.begin();
                    }
                    _ => talk.answer(said)?,
                },
            }
        }
        if terminal {
            output::note("");
        }
        Ok(())
    }
}

fn read_line() -> anyhow::Result<Option<String>> {
    let mut bytes = Vec::new();
    io::stdin().lock().take(MAX_LINE + 1).read_until(b'\n', &mut bytes).context("cannot read standard input")?;
    if bytes.len() as u64 > MAX_LINE {
        bail!("a line of standard input is longer than {MAX_LINE} bytes");
    }
    if bytes.is_empty() {
        return Ok(None);
    }
    match String::from_utf8(bytes) {
        Ok(line) => Ok(Some(line)),
        Err(_) => bail!("standard input is not UTF-8\n  hint: convert it, for example with iconv -f latin1 -t utf-8"),
    }
}

struct Talk<'a, B: Backend> {
    backend: &'a B,
    model: &'a Llama<B>,
    lora: Option<&'a Lora<B>>,
    generator: Generator<B>,
    writer: &'a Writer,
    sampling: &'a Sampling,
    system: Option<String>,
    length: usize,
    /// User and assistant in turn.
    turns: Vec<Message>,
    sequence: Option<SequenceId>,
    answers: u64,
}

impl<B: Backend> Talk<'_, B> {
    fn begin(&mut self) {
        self.turns.clear();
        output::note("a new conversation");
    }

    /// The tokens of the conversation; the oldest turns are left out where it has become too long.
    fn prompt(&mut self) -> anyhow::Result<Vec<u32>> {
        let mut left_out = 0;
        loop {
            let mut messages = Vec::with_capacity(self.turns.len() + 1);
            messages.extend(self.system.as_deref().map(|s| Message::new("system", s)));
            messages.extend_from_slice(&self.turns);
            let tokens = self.writer.conversation(&messages)?;
            let fits = tokens.len() + self.sampling.max_new_tokens() <= self.length;
            if fits || self.turns.len() < 3 {
                if left_out > 0 {
                    output::note(format!(
                        "the conversation is long: its first {left_out} turns are left out from now on"
                    ));
                }
                return Ok(tokens);
            }
            self.turns.drain(..2);
            left_out += 2;
        }
    }

    fn answer(&mut self, said: &str) -> anyhow::Result<()> {
        self.turns.push(Message::new("user", said));
        let prompt = self.prompt()?;
        let read = prompt.len();
        let mut request = match self.sampling.request(prompt, self.length, self.answers) {
            Ok(request) => request,
            Err(e) => {
                // A text that is too long is no reason to end the conversation.
                self.turns.pop();
                output::warn(format!("{e:#}"));
                return Ok(());
            }
        };
        request.keep = Some(self.length);
        self.answers += 1;
        let id = match self.sequence {
            Some(id) => self.generator.again(id, request).map(|()| id)?,
            None => self.generator.add(request)?,
        };
        self.sequence = Some(id);
        let _clean = exit::clean_stop();
        let (started, mut text, mut count) = (Instant::now(), String::new(), 0u32);
        while !self.generator.is_idle() {
            if exit::stop_requested() {
                exit::forget_stop();
                self.generator.remove(id);
                self.sequence = None;
                break;
            }
            for event in self.generator.step(self.backend, self.model, self.lora)? {
                count += 1;
                print_piece(&event.text)?;
                text += &event.text;
            }
        }
        print_piece("\n")?;
        let seconds = started.elapsed().as_secs_f64();
        output::detail(format!("{read} tokens read, {count} written, {:.1} tokens/s", f64::from(count) / seconds));
        self.turns.push(Message::new("assistant", text));
        Ok(())
    }
}
