//! `cashtag complete`: the model's answer to one prompt, or to each of a file of prompts.
//!
//! Files are read, answered and written piece by piece: memory does not grow with their length, several prompts are
//! written together, and the order is kept.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, BufRead, BufReader, IsTerminal as _, Read as _, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context as _, anyhow, bail};
use cashtag_backend::Backend;
use cashtag_corpus::formats::AtomicFile;
use cashtag_llama::chat::Message;
use cashtag_llama::generate::{FinishReason, Generator, GeneratorOptions, Request, SequenceId};
use cashtag_llama::lora::Lora;
use cashtag_llama::model::Llama;
use serde_json::{Map, Value};

use crate::exit::{self, Usage};
use crate::output;
use crate::pipeline::device::{self, Job};
use crate::pipeline::engine;
use crate::pipeline::generation::{Sampling, Writer, print_piece};
use crate::progress::{Progress, Unit};
use crate::settings::{Flags, Inference, Settings};

/// The longest line of a file, and the longest prompt on standard input.
const MAX_PROMPT: u64 = 4 << 20;
/// Rows that a prompt of a file is expected to take, to begin with; longer ones take more and others wait.
const USUAL_PROMPT: usize = 512;
/// A prompt that takes long holds back the answers behind it, for this many batches at most.
const WINDOW: usize = 4;

#[derive(clap::Args)]
#[command(after_help = "Examples:\n  cashtag complete 'Why do bond prices fall when rates rise?'\n  \
cashtag complete --raw 'The market opened' --temperature 0.8 --seed 7\n  \
cashtag complete --in prompts.jsonl --out answers.jsonl --max-new-tokens 100\n\n\
A line of a .jsonl file is an object with \"prompt\" or \"messages\"; it keeps its other fields and gets completion,\n\
finish_reason, prompt_tokens and completion_tokens. A line of any other file is a prompt.")]
pub(crate) struct Args {
    /// The prompt, or `-` for all of standard input [default: standard input]
    #[arg(value_name = "PROMPT", allow_hyphen_values = true, conflicts_with_all = ["input", "out"])]
    prompt: Option<String>,
    /// Answer the prompts in this .jsonl or .txt file
    #[arg(long = "in", id = "input", value_name = "FILE")]
    input: Option<PathBuf>,
    /// Where the answers go: JSON lines, or with a name in .txt one answer a line, its line breaks as `\n` [default:
    /// standard output]
    #[arg(long, value_name = "FILE", requires = "input")]
    out: Option<PathBuf>,
    /// Continue the text as it stands, without the model's chat template
    #[arg(long)]
    raw: bool,
    /// Print one JSON object
    #[arg(long, conflicts_with = "out")]
    json: bool,
    #[command(flatten)]
    sampling: Sampling,
    #[command(flatten)]
    settings: Flags<Inference>,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    args.sampling.check()?;
    let mut settings = args.settings.resolve()?;
    let work = match (args.prompt, args.input) {
        (_, Some(input)) => Work::File(Prompts::open(&input)?, Answers::open(args.out, &input)?),
        (Some(prompt), None) if prompt != "-" => Work::One(prompt),
        (None, None) if io::stdin().is_terminal() => {
            bail!(Usage(
                "nothing to complete\n  hint: give a prompt, or --in FILE; cashtag chat holds a conversation".into()
            ))
        }
        _ => Work::One(standard_input()?),
    };
    if let Work::One(prompt) = &work
        && prompt.trim().is_empty()
    {
        bail!(Usage("the prompt is empty".into()));
    }
    let writer = Writer::open(&mut settings)?;
    device::run(
        &settings,
        Complete { settings: &settings, sampling: &args.sampling, writer, work, raw: args.raw, json: args.json },
    )
}

fn standard_input() -> anyhow::Result<String> {
    let mut bytes = Vec::new();
    io::stdin().lock().take(MAX_PROMPT + 1).read_to_end(&mut bytes).context("cannot read standard input")?;
    if bytes.len() as u64 > MAX_PROMPT {
        bail!("standard input is longer than {MAX_PROMPT} bytes\n  hint: --in FILE takes many prompts");
    }
    let mut text = String::from_utf8(bytes).map_err(|_| {
        anyhow!("standard input is not UTF-8\n  hint: convert it, for example with iconv -f latin1 -t utf-8")
    })?;
    // The line break that ends a file or an `echo` is no part of what is asked.
    if text.ends_with('\n') {
        text.truncate(text.len() - if text.ends_with("\r\n") { 2 } else { 1 });
    }
    Ok(text)
}

enum Work {
    One(String),
    File(Prompts, Answers),
}

struct Complete<'a> {
    settings: &'a Settings,
    sampling: &'a Sampling,
    writer: Writer,
    work: Work,
    raw: bool,
    json: bool,
}

impl Job for Complete<'_> {
    type Output = ();

    fn run<B: Backend>(self, backend: B) -> anyhow::Result<()> {
        let Complete { settings, sampling, writer, work, raw, json } = self;
        let model = engine::load(&backend, &writer.checkpoint)?;
        let lora = engine::load_lora(&backend, &model, writer.adapter.as_ref())?;
        let length = sampling.length(&model);
        let most_rows = settings.training.max_tokens_per_batch;
        let device = Device { backend: &backend, model: &model, lora: lora.as_ref() };
        match work {
            Work::One(prompt) => {
                let tokens = if raw { writer.plain(&prompt) } else { writer.question(&prompt)? };
                let request = Request { continues: raw, ..sampling.request(tokens, length, 0)? };
                let rows = request.prompt.len() + request.max_new_tokens;
                let options =
                    GeneratorOptions { prefix: Vec::new(), kv_rows: rows, max_tokens: most_rows, max_sequences: 1 };
                let generator = writer.generator(&backend, &model, lora.as_ref(), options)?;
                one(&device, generator, request, Prompt::plain(prompt), json)
            }
            Work::File(prompts, answers) => {
                let batch = settings.training.per_device_eval_batch_size;
                // What all questions begin with is run once.
                let prefix = if raw { Vec::new() } else { common(&writer.question("a")?, &writer.question("1")?) };
                let usual = batch.saturating_mul(sampling.max_new_tokens().min(length) + USUAL_PROMPT);
                let options = GeneratorOptions {
                    prefix,
                    kv_rows: usual.max(length),
                    max_tokens: most_rows,
                    max_sequences: batch,
                };
                let generator = writer.generator(&backend, &model, lora.as_ref(), options)?;
                let tokens = |prompt: &Prompt| match &prompt.said {
                    Said::Text(text) if raw => Ok(writer.plain(text)),
                    Said::Text(text) => writer.question(text),
                    Said::Messages(messages) => writer.conversation(messages),
                };
                let request = |prompt: &Prompt, number: u64| {
                    let continues = raw && matches!(prompt.said, Said::Text(_));
                    Ok(Request { continues, ..sampling.request(tokens(prompt)?, length, number)? })
                };
                many(&device, generator, prompts, answers, batch * WINDOW, request)
            }
        }
    }
}

fn common(a: &[u32], b: &[u32]) -> Vec<u32> {
    a.iter().zip(b).take_while(|(a, b)| a == b).map(|(a, _)| *a).collect()
}

struct Device<'a, B: Backend> {
    backend: &'a B,
    model: &'a Llama<B>,
    lora: Option<&'a Lora<B>>,
}

fn one<B: Backend>(
    device: &Device<'_, B>,
    mut generator: Generator<B>,
    request: Request,
    prompt: Prompt,
    json: bool,
) -> anyhow::Result<()> {
    let mut answer = Answer { prompt_tokens: request.prompt.len(), ..Answer::new(generator.add(request)?, prompt) };
    let started = Instant::now();
    while !generator.is_idle() {
        for event in generator.step(device.backend, device.model, device.lora)? {
            if !json {
                print_piece(&event.text)?;
            }
            answer.take(&event.text, event.finish);
        }
    }
    let seconds = started.elapsed().as_secs_f64();
    if json {
        output::data(&(Value::from(answer.object()).to_string() + "\n"))?;
    } else {
        print_piece("\n")?;
    }
    output::detail(format!(
        "{} tokens read, {} written, {:.1} tokens/s",
        answer.prompt_tokens,
        answer.completion_tokens,
        answer.completion_tokens as f64 / seconds
    ));
    Ok(())
}

fn many<B: Backend>(
    device: &Device<'_, B>,
    mut generator: Generator<B>,
    mut prompts: Prompts,
    mut answers: Answers,
    window: usize,
    request: impl Fn(&Prompt, u64) -> anyhow::Result<Request>,
) -> anyhow::Result<()> {
    let _clean = exit::clean_stop();
    let bar = Progress::new("completing", Unit::Of("prompts"), None);
    let (mut open, mut number, mut tokens, started) = (VecDeque::<Answer>::new(), 0u64, 0usize, Instant::now());
    loop {
        while open.len() < window
            && let Some(prompt) = prompts.next()?
        {
            let at = prompts.place();
            let request = request(&prompt, number).with_context(|| at.clone())?;
            let prompt_tokens = request.prompt.len();
            let id = generator.add(request).with_context(|| at.clone())?;
            open.push_back(Answer { prompt_tokens, ..Answer::new(id, prompt) });
            number += 1;
        }
        if open.is_empty() {
            break;
        }
        exit::check_stop()?;
        for event in generator.step(device.backend, device.model, device.lora)? {
            tokens += 1;
            if let Some(answer) = open.iter_mut().find(|a| a.id == event.id) {
                answer.take(&event.text, event.finish);
            }
        }
        while open.front().is_some_and(|a| a.finish.is_some()) {
            let Some(answer) = open.pop_front() else { break };
            answers.write(&answer)?;
            bar.inc(1);
        }
    }
    drop(bar);
    let rate = tokens as f64 / started.elapsed().as_secs_f64();
    answers.finish(&format!("{number} prompts, {tokens} tokens written, {rate:.0} tokens/s"))
}

enum Said {
    Text(String),
    Messages(Vec<Message>),
}

/// A prompt and the fields that its line has.
struct Prompt {
    said: Said,
    fields: Map<String, Value>,
}

impl Prompt {
    fn plain(text: String) -> Self {
        let fields = Map::from_iter([("prompt".to_string(), Value::from(text.as_str()))]);
        Self { said: Said::Text(text), fields }
    }

    fn from_json(line: &str) -> anyhow::Result<Self> {
        let fields: Map<String, Value> = serde_json::from_str(line).map_err(|e| {
            anyhow!("{e}\n  hint: each line of a .jsonl file is one object, such as {{\"prompt\": \"…\"}}")
        })?;
        let said = match (fields.get("prompt"), fields.get("messages")) {
            (Some(Value::String(text)), None) => Said::Text(text.clone()),
            (None, Some(messages)) => {
                let messages: Vec<Message> = serde_json::from_value(messages.clone()).context("messages")?;
                if messages.is_empty() {
                    bail!("messages is empty");
                }
                Said::Messages(messages)
            }
            _ => bail!("expected either \"prompt\", a text, or \"messages\", a list of role and content"),
        };
        Ok(Self { said, fields })
    }
}

/// The prompts of a file, one after the other.
struct Prompts {
    path: PathBuf,
    lines: BufReader<File>,
    json: bool,
    line: usize,
}

fn is_json(path: &Path) -> bool {
    let extension = path.extension().map(|e| e.to_ascii_lowercase());
    extension.is_some_and(|e| e == "jsonl" || e == "ndjson" || e == "json")
}

impl Prompts {
    fn open(path: &Path) -> anyhow::Result<Self> {
        let file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
        Ok(Self { path: path.to_owned(), lines: BufReader::new(file), json: is_json(path), line: 0 })
    }

    fn place(&self) -> String {
        format!("{}:{}", self.path.display(), self.line)
    }

    /// The next prompt; empty lines are passed over.
    fn next(&mut self) -> anyhow::Result<Option<Prompt>> {
        loop {
            let mut bytes = Vec::new();
            let mut limited = (&mut self.lines).take(MAX_PROMPT + 1);
            limited.read_until(b'\n', &mut bytes).with_context(|| format!("cannot read {}", self.path.display()))?;
            self.line += 1;
            if bytes.is_empty() {
                return Ok(None);
            }
            if bytes.len() as u64 > MAX_PROMPT {
                bail!("{}: longer than {MAX_PROMPT} bytes", self.place());
            }
            let text = String::from_utf8(bytes).map_err(|_| anyhow!("{}: not UTF-8", self.place()))?;
            let text = text.strip_prefix('\u{feff}').filter(|_| self.line == 1).unwrap_or(&text);
            let text = text.trim_end_matches(['\n', '\r']);
            if text.trim().is_empty() {
                continue;
            }
            return if self.json {
                Prompt::from_json(text).with_context(|| self.place()).map(Some)
            } else {
                Ok(Some(Prompt::plain(text.to_string())))
            };
        }
    }
}

/// An answer in the making.
struct Answer {
    id: SequenceId,
    prompt: Prompt,
    prompt_tokens: usize,
    completion: String,
    completion_tokens: usize,
    finish: Option<FinishReason>,
}

impl Answer {
    fn new(id: SequenceId, prompt: Prompt) -> Self {
        Self { id, prompt, prompt_tokens: 0, completion: String::new(), completion_tokens: 0, finish: None }
    }

    fn take(&mut self, text: &str, finish: Option<FinishReason>) {
        self.completion += text;
        self.completion_tokens += 1;
        self.finish = finish;
    }

    fn object(&self) -> Map<String, Value> {
        let mut object = self.prompt.fields.clone();
        object.insert("completion".into(), self.completion.as_str().into());
        object.insert("finish_reason".into(), self.finish.map(FinishReason::name).into());
        object.insert("prompt_tokens".into(), self.prompt_tokens.into());
        object.insert("completion_tokens".into(), self.completion_tokens.into());
        object
    }

    fn line(&self) -> String {
        self.completion.replace('\\', "\\\\").replace('\n', "\\n").replace('\r', "\\r")
    }
}

/// Where the answers of a file go: standard output, or a file that is there whole or not at all.
struct Answers {
    file: Option<AtomicFile>,
    plain: bool,
}

impl Answers {
    fn open(path: Option<PathBuf>, input: &Path) -> anyhow::Result<Self> {
        let Some(path) = path else { return Ok(Self { file: None, plain: false }) };
        if std::fs::canonicalize(&path).is_ok_and(|out| std::fs::canonicalize(input).is_ok_and(|input| input == out)) {
            bail!(Usage(format!("{} is the input as well\n  hint: name another file", path.display())));
        }
        let plain = !is_json(&path);
        Ok(Self { file: Some(AtomicFile::create(&path)?), plain })
    }

    fn write(&mut self, answer: &Answer) -> anyhow::Result<()> {
        let line = if self.plain { answer.line() } else { Value::from(answer.object()).to_string() } + "\n";
        match &mut self.file {
            None => output::data(&line),
            Some(file) => {
                let target = file.target().display().to_string();
                file.write_all(line.as_bytes()).with_context(|| format!("cannot write {target}"))
            }
        }
    }

    fn finish(self, summary: &str) -> anyhow::Result<()> {
        match self.file {
            None => output::note(summary),
            Some(file) => {
                let target = file.target().display().to_string();
                file.commit()?;
                output::data(&format!("{target}: {summary}\n"))?;
            }
        }
        Ok(())
    }
}
