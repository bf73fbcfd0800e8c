//! `cashtag predict`: one text, lines of standard input, or a file in and out.
//!
//! Files and streams are read, classified and written piece by piece: memory does not grow with their length, the order of
//! the rows is kept, and a row without a text has an answer without values.

use std::io::{self, BufRead, IsTerminal, Read, Write};
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::Instant;

use anyhow::{anyhow, bail};
use cashtag_backend::Backend;
use cashtag_corpus::ReadOptions;
use cashtag_corpus::formats::{Chunk, Columns, ExampleReader, Format, RowReader, RowWriter};
use serde_json::Value;
use sha2::{Digest as _, Sha256};

use crate::exit::{self, Usage};
use crate::output;
use crate::pipeline::answer_journal::AnswerJournal;
use crate::pipeline::answers::{AnswerColumns, best};
use crate::pipeline::data::hinted;
use crate::pipeline::device::{self, Job};
use crate::pipeline::engine::{self, Classifier, Opened};
use crate::progress::{Progress, Unit};
use crate::settings::{Flags, Inference, Settings};

/// Texts that are classified at a time; what a person who presses Ctrl-C waits for.
const BATCH: usize = 64;
/// The longest line of standard input.
const MAX_LINE: u64 = 1 << 20;

#[derive(clap::Args)]
#[command(after_help = "Examples:\n  cashtag predict \"Tech stocks are up\" --adapter runs/mine\n  \
tail -f tweets.txt | cashtag predict - --adapter runs/mine --json\n  \
cashtag predict --in tweets.parquet --out scored.csv --adapter runs/mine\n\n\
A file keeps all its columns, in their order; label, confidence and one p_… for each label are added. \
The same command goes on where an interrupted one was.")]
pub(crate) struct Args {
    /// A text, or `-` for standard input, one text a line [default: standard input]
    #[arg(value_name = "TEXT", allow_hyphen_values = true, conflicts_with_all = ["input", "out", "text_column"])]
    text: Option<String>,
    /// Classify the rows of this .csv, .tsv, .jsonl, .parquet or .txt file
    #[arg(long = "in", id = "input", value_name = "FILE")]
    input: Option<PathBuf>,
    /// Where the rows go with their answers, in the format of the name [default: standard output]
    #[arg(long, value_name = "FILE", requires = "input")]
    out: Option<PathBuf>,
    /// Column of the text [default: guessed]
    #[arg(long, value_name = "NAME", requires = "input")]
    text_column: Option<String>,
    /// Print one JSON object for each text
    #[arg(long, conflicts_with = "out")]
    json: bool,
    #[command(flatten)]
    settings: Flags<Inference>,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let mut settings = args.settings.resolve()?;
    let work = match (args.text, args.input) {
        (_, Some(input)) => Work::File(Table::open(input, args.out, args.text_column)?),
        (Some(text), None) if text != "-" => {
            if text.trim().is_empty() {
                bail!(Usage("the text is empty\n  hint: cashtag predict \"Tech stocks are up\"".into()));
            }
            Work::Text(text)
        }
        (None, None) if io::stdin().is_terminal() => {
            bail!(Usage("nothing to classify\n  hint: give a text, --in FILE, or - to type texts".into()))
        }
        _ => Work::Lines,
    };
    let named = settings.is_set("model.name");
    engine::follow_base_model(&mut settings, named);
    let opened = engine::open(&settings)?;
    if opened.adapter.is_none() && opened.trained.is_none() {
        output::note(format!(
            "no --adapter: the base model {} answers, which was not fine-tuned for this",
            settings.model.name
        ));
    }
    device::run(&settings, Predict { settings: &settings, opened, work, json: args.json })
}

enum Work {
    Text(String),
    Lines,
    File(Table),
}

struct Predict<'a> {
    settings: &'a Settings,
    opened: Opened,
    work: Work,
    json: bool,
}

impl Job for Predict<'_> {
    type Output = ();

    fn run<B: Backend>(self, backend: B) -> anyhow::Result<()> {
        let Predict { settings, opened, work, json } = self;
        let model = engine::load(&backend, &opened.checkpoint)?;
        let lora = engine::load_lora(&backend, &model, opened.adapter.as_ref())?;
        let budget = settings.training.max_tokens_per_batch;
        let mut classifier = Classifier::new(&backend, &model, lora.as_ref(), &opened.format, budget)?;
        classifier.temperature = opened.temperature();
        let labels = opened.format.label_names();
        let mut counted = Counted { by_label: vec![0; labels.len()], empty: 0, known: 0, started: Instant::now() };
        match work {
            Work::Text(text) => {
                let answers = classifier.classify(&[&text])?;
                let answer = answers.first().map(Vec::as_slice);
                if json {
                    return output::data(&json_line(&labels, &text, answer));
                }
                output::data(&(line(&labels, answer) + "\n"))
            }
            Work::Lines => {
                lines(&mut classifier, &labels, json, &mut counted)?;
                if counted.empty > 0 {
                    output::note(format!("lines without a text: {}", counted.empty));
                }
                Ok(())
            }
            Work::File(table) => {
                let fingerprint = table.fingerprint(settings, &opened);
                table.predict(&mut classifier, &labels, json, &mut counted, fingerprint)
            }
        }
    }
}

/// What the answers were.
struct Counted {
    by_label: Vec<u64>,
    empty: u64,
    /// Texts whose answers an earlier run has left.
    known: u64,
    started: Instant,
}

impl Counted {
    /// Classifies the texts that there are; `place` names the text at an index.
    fn classify<B: Backend>(
        &mut self,
        classifier: &mut Classifier<'_, B>,
        texts: &[Option<&str>],
        place: impl Fn(usize) -> String,
    ) -> anyhow::Result<Vec<Option<Vec<f32>>>> {
        let is_there = |text: &Option<&str>| text.is_some_and(|t| !t.trim().is_empty());
        let given: Vec<usize> = (0..texts.len()).filter(|&i| is_there(&texts[i])).collect();
        let strings: Vec<&str> = given.iter().filter_map(|&i| texts[i]).collect();
        let mut answers = vec![None; texts.len()];
        if !strings.is_empty() {
            let found = match classifier.classify(&strings) {
                Ok(found) => found,
                // One of them cannot be a prompt: which one?
                Err(error) => {
                    let culprit = given.iter().find(|&&i| texts[i].is_some_and(|t| !classifier.takes(t)));
                    return Err(match culprit {
                        Some(&i) => anyhow!("{}: {error:#}", place(i)),
                        None => error,
                    });
                }
            };
            for (&i, probabilities) in given.iter().zip(found) {
                if let Some(n) = self.by_label.get_mut(best(&probabilities)) {
                    *n += 1;
                }
                answers[i] = Some(probabilities);
            }
        }
        self.empty += (texts.len() - given.len()) as u64;
        Ok(answers)
    }

    /// Counts answers that an earlier run has left.
    fn take(&mut self, answers: &[Option<Vec<f32>>]) {
        for answer in answers {
            match answer.as_ref().map(|a| best(a)) {
                Some(label) => {
                    self.known += 1;
                    if let Some(n) = self.by_label.get_mut(label) {
                        *n += 1;
                    }
                }
                None => self.empty += 1,
            }
        }
    }

    fn texts(&self) -> u64 {
        self.by_label.iter().sum()
    }
}

/// `Negative   87.2 %   Positive 3.1 · Neutral 9.7 · Negative 87.2`; a dash where there is no text.
fn line(labels: &[String], answer: Option<&[f32]>) -> String {
    let longest = labels.iter().map(|l| l.chars().count()).max().unwrap_or(0);
    let Some(answer) = answer else { return "–".into() };
    let parts: Vec<String> = labels.iter().zip(answer).map(|(l, p)| format!("{l} {:.1}", 100.0 * p)).collect();
    let top = best(answer);
    let (label, p) = (labels.get(top).map_or("", String::as_str), answer.get(top).copied().unwrap_or(0.0));
    output::printable(&format!("{label:<longest$} {:>5.1} %   {}", 100.0 * p, parts.join(" · ")))
}

fn json_line(labels: &[String], text: &str, answer: Option<&[f32]>) -> String {
    Value::from(AnswerColumns::new(labels, &[]).object(text, answer)).to_string() + "\n"
}

/// Classifies what stands on standard input, each line as soon as it has come.
fn lines<B: Backend>(
    classifier: &mut Classifier<'_, B>,
    labels: &[String],
    json: bool,
    counted: &mut Counted,
) -> anyhow::Result<()> {
    let incoming = read_lines();
    // On a terminal the answers themselves are the progress.
    let bar = (!io::stdout().is_terminal()).then(|| Progress::new("classifying", Unit::Of("texts"), None));
    let mut number = 0usize;
    while let Ok(first) = incoming.recv() {
        let mut batch = Vec::with_capacity(BATCH);
        let mut failed = None;
        for line in std::iter::once(first).chain(incoming.try_iter().take(BATCH - 1)) {
            match line {
                Ok(line) => batch.push(line),
                Err(message) => failed = Some(message),
            }
        }
        let texts: Vec<Option<&str>> = batch.iter().map(|text| Some(text.as_str())).collect();
        let answers = counted.classify(classifier, &texts, |i| format!("standard input:{}", number + i + 1))?;
        let mut printed = String::new();
        for (text, answer) in batch.iter().zip(&answers) {
            if json {
                printed += &json_line(labels, text, answer.as_deref());
            } else {
                let text = output::printable(text).replace('\t', " ");
                printed += format!("{}   {text}", line(labels, answer.as_deref())).trim_end();
                printed.push('\n');
            }
        }
        output::data(&printed)?;
        number += batch.len();
        if let Some(bar) = &bar {
            bar.set_position(number as u64);
        }
        if let Some(message) = failed {
            bail!("standard input:{}: {message}", number + 1);
        }
    }
    Ok(())
}

/// Lines of standard input without their ends, read on a thread of its own, a batch ahead at most. The first that cannot
/// be read is the last.
fn read_lines() -> Receiver<Result<String, String>> {
    let (sender, receiver) = sync_channel(BATCH);
    std::thread::spawn(move || {
        let mut input = io::stdin().lock();
        let mut first = true;
        loop {
            let mut bytes = Vec::new();
            let line = match input.by_ref().take(MAX_LINE + 1).read_until(b'\n', &mut bytes) {
                Ok(0) => return,
                Err(e) => Err(format!("cannot read: {e}")),
                Ok(n) if n as u64 > MAX_LINE => {
                    Err("the line is longer than 1 MiB\n  hint: one text a line; for other forms --in FILE".to_string())
                }
                Ok(_) => String::from_utf8(bytes).map_err(|_| {
                    "the text is not UTF-8\n  hint: convert it, for example with iconv -f latin1 -t utf-8".to_string()
                }),
            };
            let line = line.map(|line| {
                let line = if first { line.trim_start_matches('\u{feff}') } else { &line };
                line.trim_end_matches(['\n', '\r']).to_string()
            });
            first = false;
            let last = line.is_err();
            if sender.send(line).is_err() || last {
                return;
            }
        }
    });
    receiver
}

/// A file to classify.
struct Table {
    path: PathBuf,
    out: Option<PathBuf>,
    columns: Columns,
    rows: u64,
}

impl Table {
    /// Reads the whole file once: what is wrong with a row is said before a model is loaded and hours are spent on the rows
    /// before it, and how many there are gives the time left.
    fn open(path: PathBuf, out: Option<PathBuf>, text_column: Option<String>) -> anyhow::Result<Self> {
        if path.is_dir() {
            bail!("{} is a directory\n  hint: --in takes one file", path.display());
        }
        if path.exists() && !path.is_file() {
            // It is read more than once.
            bail!("{} is no regular file\n  hint: pipe texts to standard input instead", path.display());
        }
        // A finished file takes the place of what has its name: a device or a directory must not be lost so.
        if let Some(out) = out.as_ref().filter(|out| out.exists() && !out.is_file()) {
            bail!(
                "{} is no regular file\n  hint: name a file such as scored.csv, or leave --out out to print",
                out.display()
            );
        }
        let options = ReadOptions { text_column, require_label: false, ..ReadOptions::default() };
        let reader = ExampleReader::open(&path, &options).map_err(|e| hinted(e, "the file needs a column of texts"))?;
        let columns = reader.columns().clone();
        let bar = Progress::new("reading", Unit::Of("rows"), None);
        let mut rows = 0;
        for chunk in RowReader::open(&path)? {
            rows += chunk?.len() as u64;
            bar.set_position(rows);
        }
        Ok(Self { path, out, columns, rows })
    }

    /// Of everything that an answer depends on.
    fn fingerprint(&self, settings: &Settings, opened: &Opened) -> [u8; 32] {
        let mut hash = Sha256::new();
        let mut add = |bytes: &[u8]| {
            hash.update((bytes.len() as u64).to_le_bytes());
            hash.update(bytes);
        };
        let time = |t: std::time::SystemTime| t.duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_nanos());
        for path in [self.path.as_path(), opened.checkpoint.path()] {
            let data = std::fs::metadata(path).ok();
            add(path.as_os_str().as_encoded_bytes());
            add(&data.as_ref().map_or(0, std::fs::Metadata::len).to_le_bytes());
            add(&data.and_then(|d| d.modified().ok()).map_or(0, time).to_le_bytes());
        }
        add(&self.rows.to_le_bytes());
        add(self.columns.text.as_bytes());
        let (format, model) = (&opened.format, &settings.model);
        add(format!("{:?} {:?} {:?}", format.labels(), format.system_message(), format.max_seq_length()).as_bytes());
        add(format!("{:?} {:?} {:?}", model.device, model.precision, opened.temperature()).as_bytes());
        for value in opened.adapter.iter().flat_map(|a| {
            let t = &a.tensors;
            t.a.iter().chain(&t.b).chain(&t.magnitude)
        }) {
            hash.update(value.to_le_bytes());
        }
        hash.finalize().into()
    }

    /// The text of each row.
    fn texts(&self, chunk: &Chunk) -> anyhow::Result<Vec<Option<String>>> {
        let failed = |message: String| anyhow!("{}: {message}", self.path.display());
        if self.columns.chat {
            let messages = chunk.values(&self.columns.text).map_err(failed)?;
            return Ok(messages.iter().map(last_user_message).collect());
        }
        let texts = chunk.texts(&self.columns.text).map_err(failed)?;
        Ok(texts.into_iter().map(|text| text.map(|t| t.into_owned())).collect())
    }

    fn predict<B: Backend>(
        self,
        classifier: &mut Classifier<'_, B>,
        labels: &[String],
        json: bool,
        counted: &mut Counted,
        fingerprint: [u8; 32],
    ) -> anyhow::Result<()> {
        // The half-written file is removed when asked to stop.
        let _stop = exit::clean_stop();
        let mut reader = RowReader::open(&self.path)?;
        let guessed = if self.columns.guessed { " (guessed)" } else { "" };
        output::note(format!("{}: text from {:?}{guessed}", self.path.display(), self.columns.text));
        let taken: Vec<String> = reader.columns()?.into_iter().map(|(name, _)| name).collect();
        let columns = AnswerColumns::new(labels, &taken);
        if columns.renamed() {
            output::note(format!("some names are taken; the new columns are {}", columns.names().join(", ")));
        }
        let new = columns.new_columns();
        let mut writer = match &self.out {
            Some(out) => RowWriter::create(out, &reader, &new)?,
            None => {
                let format = match reader.format() {
                    Format::Csv { delimiter } if !json => Format::Csv { delimiter },
                    _ => Format::Jsonl,
                };
                RowWriter::to_stream("standard output", Box::new(Stdout), format, &reader, &new)?
            }
        };
        let mut journal = match &self.out {
            Some(out) => Some(AnswerJournal::open(out, &fingerprint, labels.len())?),
            None => None,
        };
        if let Some(known) = journal.as_ref().map(AnswerJournal::known).filter(|n| *n > 0) {
            output::note(format!(
                "going on after {known} of {} rows, whose answers an earlier run has left",
                self.rows
            ));
        }
        let bar = Progress::new("classifying", Unit::Of("texts"), Some(self.rows));
        while let Some(chunk) = reader.next().transpose()? {
            let texts = self.texts(&chunk)?;
            let mut added: Vec<Vec<Value>> = vec![Vec::with_capacity(chunk.len()); new.len()];
            for (batch, texts) in texts.chunks(BATCH).enumerate() {
                exit::check_stop()?;
                let place = |i: usize| format!("{}:{}", self.path.display(), chunk.line(batch * BATCH + i));
                let texts: Vec<Option<&str>> = texts.iter().map(Option::as_deref).collect();
                let mut answers = journal.as_mut().map(|j| j.take(texts.len())).unwrap_or_default();
                counted.take(&answers);
                let known = answers.len();
                let computed = counted.classify(classifier, &texts[known..], |i| place(known + i))?;
                if let Some(journal) = &mut journal {
                    journal.append(&computed)?;
                }
                answers.extend(computed);
                for answer in answers {
                    for (column, value) in added.iter_mut().zip(columns.values(answer.as_deref())) {
                        column.push(value);
                    }
                }
                bar.inc(texts.len() as u64);
            }
            writer.write(&chunk, &added)?;
        }
        drop(bar);
        writer.finish()?;
        if let Some(journal) = journal {
            journal.finish();
        }
        let told = self.told(labels, counted);
        match &self.out {
            Some(out) => output::data(&format!("{}: {told}\n", out.display())),
            None => {
                output::note(format!("{}: {told}", self.path.display()));
                Ok(())
            }
        }
    }

    fn told(&self, labels: &[String], counted: &Counted) -> String {
        let texts = counted.texts();
        let by_label: Vec<String> = labels.iter().zip(&counted.by_label).map(|(l, n)| format!("{l} {n}")).collect();
        let empty = match counted.empty {
            0 => String::new(),
            n => format!(" · rows without a text: {n}"),
        };
        let rate = (texts - counted.known) as f64 / counted.started.elapsed().as_secs_f64().max(1e-9);
        format!("{texts} texts, {}{empty} · {rate:.1} texts/s", by_label.join(", "))
    }
}

/// The last message of a user in chat data, in both of its spellings.
fn last_user_message(messages: &Value) -> Option<String> {
    let word = |message: &Value, names: [&str; 2]| {
        names.iter().find_map(|name| message.get(name)).and_then(Value::as_str).map(str::to_string)
    };
    let is_user = |m: &&Value| matches!(word(m, ["role", "from"]).as_deref(), Some("user" | "human"));
    word(messages.as_array()?.iter().rev().find(is_user)?, ["content", "value"])
}

/// Standard output; a reader that has left (`| head`) ends the program quietly.
struct Stdout;

impl Write for Stdout {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match io::stdout().write(bytes) {
            Err(e) if e.kind() == io::ErrorKind::BrokenPipe => std::process::exit(0),
            outcome => outcome,
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match io::stdout().flush() {
            Err(e) if e.kind() == io::ErrorKind::BrokenPipe => std::process::exit(0),
            outcome => outcome,
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn chat_data_in_both_spellings() {
        let openai = json!([{"role": "system", "content": "s"}, {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]);
        assert_eq!(last_user_message(&openai).as_deref(), Some("u"));
        let other =
            json!([{"from": "human", "value": "1"}, {"from": "gpt", "value": "2"}, {"from": "human", "value": "3"}]);
        assert_eq!(last_user_message(&other).as_deref(), Some("3"));
        for wrong in [json!(null), json!("text"), json!([]), json!([{"role": "user"}])] {
            assert_eq!(last_user_message(&wrong), None, "{wrong}");
        }
    }

    #[test]
    fn a_line_for_people() {
        let labels = ["Positive", "Neutral"].map(String::from).to_vec();
        assert_eq!(line(&labels, Some(&[0.25, 0.75])), "Neutral   75.0 %   Positive 25.0 · Neutral 75.0");
        assert_eq!(line(&labels, None), "–");
    }
}
