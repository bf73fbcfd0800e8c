//! `cashtag eval`: what one model can do, or several side by side, with intervals.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::bail;
use cashtag_backend::Backend;
use cashtag_corpus::{Example, builtin_split};
use cashtag_eval::report::Description;

use crate::exit::Usage;
use crate::output;
use crate::pipeline::data::{self, Reading};
use crate::pipeline::device::{self, Job};
use crate::pipeline::engine::{self, Classifier, LabelledText, Opened};
use crate::pipeline::injections;
use crate::pipeline::sides::{MOST_SIDES, Side, Sides, letter};
use crate::settings::{Flags, Inference, Settings};

#[derive(clap::Args)]
#[command(
    after_help = "--model and --adapter may be given several times: each further model is compared with the first, text by text.\n\
`--adapter none` is the base model without one.\n\n\
Examples:\n  cashtag eval --adapter runs/mine\n  \
cashtag eval --data tweets.csv --adapter none --adapter runs/a --adapter runs/b --by kind --out judged\n  \
cashtag eval --adapter none --adapter runs/mine --inject\n  \
cashtag eval --model smollm2-135m --model OWNER/NAME --json"
)]
pub(crate) struct Args {
    /// Labelled texts: a .csv, .jsonl, .parquet or .txt file (all of it is judged), a directory of them, or `builtin`, the
    /// part of the built-in corpus that is never trained on [default: builtin]
    #[arg(long, value_name = "builtin|PATH")]
    data: Option<String>,
    /// Results for each slice of the texts too
    #[arg(long, value_enum, value_name = "WHAT")]
    by: Option<By>,
    /// Measure too how often appended instructions of ten kinds turn the label (eleven times the work)
    #[arg(long)]
    inject: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    /// Write metrics.json, predictions.csv and report.html to this directory
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    #[command(flatten)]
    reading: Reading,
    #[command(flatten)]
    settings: Flags<Inference>,
}

/// The fields of an example that make slices.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
enum By {
    #[default]
    Kind,
    Register,
    Sector,
    Event,
    Source,
}

impl By {
    fn name(self) -> &'static str {
        match self {
            By::Kind => "kind",
            By::Register => "register",
            By::Sector => "sector",
            By::Event => "event",
            By::Source => "source",
        }
    }

    fn of(self, example: &Example) -> Option<&String> {
        match self {
            By::Kind => example.kind.as_ref(),
            By::Register => example.register.as_ref(),
            By::Sector => example.sector.as_ref(),
            By::Event => example.event.as_ref(),
            By::Source => example.source.as_ref(),
        }
    }
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let contestants = contestants(&args.settings)?;
    let by = args.by.unwrap_or_default();
    let mut entrants = Vec::with_capacity(contestants.len());
    for settings in contestants {
        let opened = engine::open(&settings)?;
        entrants.push(Entrant { settings, opened });
    }
    let labels = entrants[0].opened.format.label_names();
    if let Some(other) = entrants.iter().find(|e| e.opened.format.label_names() != labels) {
        bail!(Usage(format!(
            "{} answers with {}, {} with {}: they cannot be put side by side\n  hint: judge them one by one, or give both --labels",
            entrants[0].settings.model.name,
            labels.join(", "),
            other.settings.model.name,
            other.opened.format.label_names().join(", ")
        )));
    }
    let (source, texts) = texts(&args, &entrants[0].settings, &labels)?;
    let slices: Vec<Option<String>> = texts.iter().map(|e| by.of(e).cloned()).collect();
    let mut texts = data::labelled(&texts, &labels)?;
    for (text, slice) in texts.iter_mut().zip(slices) {
        text.kind = slice;
    }
    if let (Some(by), true) = (args.by, texts.iter().all(|t| t.kind.is_none())) {
        bail!(Usage(format!("{source} says nothing about the {0} of a text\n  hint: leave --by {0} out", by.name())));
    }

    let (mut sides, mut on, count) = (Vec::new(), String::new(), entrants.len());
    let mut rest = entrants.into_iter().peekable();
    while let Some(first) = rest.next() {
        // What stands on the same weights is judged together: they are loaded once.
        let settings = first.settings.clone();
        let mut group = vec![first];
        while let Some(next) = rest.next_if(|e| e.settings.model.name == settings.model.name) {
            group.push(next);
        }
        let (judged, device) =
            device::run(&settings, Judge { group, texts: &texts, before: sides.len(), count, inject: args.inject })?;
        sides.extend(judged);
        on = device;
    }
    let seed = sides.first().map_or(0, |s| s.settings.training.seed);
    let sides = Sides::measure(sides, &labels, source, on, by.name(), seed)?;
    if let Some(dir) = &args.out {
        for page in sides.write(dir)? {
            output::note(format!("written: {}", page.display()));
        }
    }
    if args.json {
        return output::data(&(sides.json()?.to_string() + "\n"));
    }
    output::data(&sides.text(args.by.is_some()))
}

/// One set of settings for each model that is judged.
fn contestants(flags: &Flags<Inference>) -> anyhow::Result<Vec<Settings>> {
    let settings = flags.resolve()?;
    let (models, adapters) = (flags.occurrences("model.name"), flags.occurrences("model.adapter"));
    let count = models.len().max(adapters.len()).max(1);
    // One model may have several adapters; an adapter has one model.
    let pairs = (models.len() <= 1 || models.len() == count) && (adapters.is_empty() || adapters.len() == count);
    if !pairs {
        bail!(Usage(format!(
            "{} models and {} adapters do not make pairs\n  hint: give one --adapter for each --model, `--adapter none` where there is none",
            models.len(),
            adapters.len()
        )));
    }
    if count > MOST_SIDES {
        bail!(Usage(format!("{count} models are too many to put side by side, at most {MOST_SIDES}")));
    }
    let mut all = vec![settings; count];
    for (i, s) in all.iter_mut().enumerate() {
        if let Some(model) = models.get(i) {
            s.model.name.clone_from(model);
        }
        if let Some(adapter) = adapters.get(i) {
            s.model.adapter = (adapter != "none").then(|| adapter.into());
        }
        let named = s.is_set("model.name");
        engine::follow_base_model(s, named);
    }
    // Without another word, "no adapter" is the base model of the adapters beside it.
    if let Some(base) = all.iter().find(|s| s.model.adapter.is_some()).map(|s| s.model.name.clone()) {
        for s in all.iter_mut().filter(|s| s.model.adapter.is_none() && !s.is_set("model.name")) {
            s.model.name.clone_from(&base);
        }
    }
    Ok(all)
}

/// What is judged, and what it is called.
fn texts(args: &Args, settings: &Settings, labels: &[String]) -> anyhow::Result<(String, Vec<Example>)> {
    let configured = settings.data.eval_source.as_ref().map(|path| path.display().to_string());
    match args.data.clone().or(configured) {
        Some(path) if path != "builtin" => {
            Ok((path.clone(), data::read(&data::resolve(&path)?, &args.reading, labels)?))
        }
        _ => Ok(("built-in corpus, held-out part".into(), builtin_split()?.held_out)),
    }
}

struct Entrant {
    settings: Settings,
    opened: Opened,
}

/// Judges with several adapters on one model.
struct Judge<'a> {
    group: Vec<Entrant>,
    texts: &'a [LabelledText],
    /// Sides that were judged already, of how many in all.
    before: usize,
    count: usize,
    inject: bool,
}

impl Job for Judge<'_> {
    type Output = (Vec<Side>, String);

    fn run<B: Backend>(self, backend: B) -> anyhow::Result<Self::Output> {
        let Judge { group, texts, before, count, inject } = self;
        let device = backend.capabilities().description;
        let Some(first) = group.first() else { return Ok((Vec::new(), device)) };
        output::note(format!("{} on {device}", first.opened.checkpoint.describe()));
        let model = engine::load(&backend, &first.opened.checkpoint)?;
        let mut sides = Vec::with_capacity(group.len());
        for (i, Entrant { settings, opened }) in group.into_iter().enumerate() {
            let lora = engine::load_lora(&backend, &model, opened.adapter.as_ref())?;
            let budget = settings.training.max_tokens_per_batch;
            let mut classifier = Classifier::new(&backend, &model, lora.as_ref(), &opened.format, budget)?;
            classifier.temperature = opened.temperature();
            let started = Instant::now();
            let name = if count > 1 { format!(" {}", letter(before + i)) } else { String::new() };
            let judged = classifier.judge(&format!("judging{name}"), texts)?;
            let seconds = started.elapsed().as_secs_f64();
            let words: Vec<String> = opened.format.labels().iter().map(|label| label.word.clone()).collect();
            let injected = match inject {
                true => Some(injections::measure(&mut classifier, &format!("injecting{name}"), &judged, &words)?),
                false => None,
            };
            let path = |p: &Path| p.display().to_string();
            let adapter = settings.model.adapter.as_deref().zip(lora.as_ref()).map(|(dir, lora)| {
                Description::new(path(dir))
                    .fact("rank", lora.config.r)
                    .fact("parameters", lora.parameters())
                    .fact("temperature", format!("{:.2}", opened.temperature()))
            });
            sides.push(Side {
                description: opened.checkpoint.describe(),
                adapter,
                temperature: opened.temperature(),
                judged,
                seconds,
                injected,
                settings,
            });
        }
        Ok((sides, device))
    }
}
