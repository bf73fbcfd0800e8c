//! `cashtag run`: data → fine-tune → judged before and after → a run directory with a report.

use std::path::Path;
use std::time::Instant;

use anyhow::Context;
use cashtag_backend::Backend;
use cashtag_eval::Judged;
use cashtag_eval::report::{Description, FileEntry, Timing};
use cashtag_llama::adapter::Adapter;

use crate::pipeline::data::{self, Data};
use crate::pipeline::device::{self, Job};
use crate::pipeline::engine::{self, Classifier, LabelledText, Opened};
use crate::pipeline::report::{self, EXAMPLES, Findings};
use crate::pipeline::training;
use crate::settings::{Flags, Settings};
use crate::{exit, output};

/// Training examples of a run with nothing else said: what two cores train on in about three minutes.
const DEFAULT_TRAIN_EXAMPLES: usize = 1500;

#[derive(clap::Args)]
#[command(
    after_help = "With no flags: the recipe smollm2-cpu, that is the 135M model and the corpus inside the program.\n\
Ctrl-C saves a checkpoint; the same command with --output-dir DIR --resume auto goes on."
)]
pub(crate) struct Args {
    #[command(flatten)]
    settings: Flags,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let settings = args.settings.resolve_or_recipe("smollm2-cpu")?;
    let opened = engine::open(&settings)?;
    device::run(&settings, Run { settings: &settings, opened })
}

struct Run<'a> {
    settings: &'a Settings,
    opened: Opened,
}

impl Job for Run<'_> {
    type Output = ();

    fn run<B: Backend>(self, backend: B) -> anyhow::Result<()> {
        let Run { settings: s, opened } = self;
        let Opened { checkpoint, format, .. } = opened;
        let labels = format.label_names();
        let run_dir = s.output_dir();
        let data = data::load(s, Some(DEFAULT_TRAIN_EXAMPLES))?;
        let (train, validation, held_out) = (
            data::labelled(&data.train, &labels)?,
            data::labelled(&data.validation, &labels)?,
            data::labelled(&data.held_out, &labels)?,
        );
        write_inputs(&run_dir, s, &data)?;
        let capabilities = backend.capabilities();
        output::note(format!("{} on {}", checkpoint.describe(), capabilities.description));
        output::note(format!(
            "{}: {} to train on, {} to validate, {} held out; run directory {}",
            data.source,
            train.len(),
            validation.len(),
            held_out.len(),
            run_dir.display()
        ));
        let mut timings = Vec::new();
        let mut timed = Timer { timings: &mut timings, last: Instant::now() };
        let model = engine::load(&backend, &checkpoint)?;
        timed.lap("load the model");
        let judge =
            |lora: Option<&_>, what: &str, temperature: f32, texts: &[LabelledText]| -> anyhow::Result<Vec<Judged>> {
                let mut classifier = Classifier::new(&backend, &model, lora, &format, s.training.max_tokens_per_batch)?;
                classifier.temperature = temperature;
                classifier.judge(what, texts)
            };
        let seven = examples(&labels);
        let before = judge(None, "before", 1.0, &held_out)?;
        let examples_before = judge(None, "examples", 1.0, &seven)?;
        timed.lap("judge before");
        let trained = training::train(&backend, &model, &format, s, (&train, &validation), &run_dir, None)?;
        let Some(trained) = trained else {
            output::note(format!(
                "stopped; a checkpoint is saved. To go on: cashtag run --config {0}/config.toml --output-dir {0} --resume auto",
                run_dir.display()
            ));
            return Err(exit::Interrupted.into());
        };
        timed.lap("train");
        let lora = &trained.lora;
        let judged_validation = judge(Some(lora), "calibrating", 1.0, &validation)?;
        let temperature = cashtag_eval::fit_temperature(&judged_validation);
        let after = judge(Some(lora), "after", temperature as f32, &held_out)?;
        let examples_after = judge(Some(lora), "examples", temperature as f32, &seven)?;
        timed.lap("judge after");

        let classifier = training::classifier_config(s, &format, temperature as f32);
        let adapter = Adapter {
            lora: lora.config.clone(),
            tensors: lora.tensors(&backend)?,
            base_model: Some(s.model.name.clone()),
            classifier: Some(classifier),
        };
        adapter.save(&run_dir.join("adapter"), model.config())?;
        let adapter_facts = Description::new("LoRA")
            .fact("rank", lora.config.r)
            .fact("parameters", lora.parameters())
            .fact("step", format!("{} of {}", trained.outcome.step, trained.outcome.state.max_steps));
        let peak_bytes = report::peak_memory();
        let findings = Findings {
            labels: labels.clone(),
            device: capabilities.description,
            model: Description::new(checkpoint.describe()),
            adapter: adapter_facts,
            before,
            after,
            examples_before,
            examples_after,
            history: trained.history,
            timings,
            temperature,
            peak_bytes,
        };
        let table = report::example_table(&labels, &findings.examples_before, &findings.examples_after);
        let right = findings.examples_after.iter().filter(|j| j.predicted() == j.truth).count();
        let seconds = trained.outcome.seconds.max(1e-9);
        let steps = trained.outcome.state.global_step as f64;
        let examples_seen = steps * trained.arguments.examples_per_step() as f64;
        let measured = report::measure(s, &data, findings, files(&run_dir))?;
        measured.write(&run_dir, temperature, peak_bytes)?;
        output::data(&format!(
            "\n{}\n{table}\n{right} of {} examples right · trained {:.0} s, {:.1} examples/s, {:.0} tokens/s · peak memory {:.2} GiB\n{}\n",
            cashtag_eval::terminal_table(Some(&measured.before), Some(&measured.after), Some(&measured.comparison)),
            EXAMPLES.len(),
            seconds,
            examples_seen / seconds,
            trained.rows as f64 / seconds,
            peak_bytes as f64 / f64::from(1 << 30),
            run_dir.join("report.html").display()
        ))
    }
}

/// The seven tweets, as far as their labels are the run's.
fn examples(labels: &[String]) -> Vec<LabelledText> {
    EXAMPLES
        .iter()
        .filter_map(|(text, label, note)| {
            let label = labels.iter().position(|l| l == label)?;
            Some(LabelledText { text: text.to_string(), label, kind: Some(note.to_string()) })
        })
        .collect()
}

fn write_inputs(run_dir: &Path, s: &Settings, data: &Data) -> anyhow::Result<()> {
    std::fs::create_dir_all(run_dir)
        .with_context(|| format!("cannot create {}\n  hint: choose another --output-dir", run_dir.display()))?;
    let config = s.to_toml_with_sources();
    cashtag_corpus::formats::write_atomically(&run_dir.join("config.toml"), config.as_bytes())?;
    let all: Vec<_> = data.train.iter().chain(&data.validation).chain(&data.held_out).cloned().collect();
    cashtag_corpus::write_dataset_csv(&run_dir.join("dataset.csv"), &all)?;
    let system = s.data.system_message.clone().unwrap_or_default();
    cashtag_corpus::write_chat_jsonl(&run_dir.join("fine_tune_dataset.jsonl"), &data.train, &system)?;
    Ok(())
}

fn files(run_dir: &Path) -> Vec<FileEntry> {
    const NOTES: [(&str, &str); 7] = [
        ("dataset.csv", "the texts with their labels"),
        ("fine_tune_dataset.jsonl", "the training part as chat messages"),
        ("config.toml", "the resolved configuration; a recipe"),
        ("adapter/adapter_model.safetensors", "the LoRA factors, as PEFT reads them"),
        ("adapter/adapter_config.json", "their configuration"),
        ("trainer_log.jsonl", "the log of the training"),
        ("metrics.json", "every figure of this page"),
    ];
    NOTES
        .iter()
        .map(|(path, note)| FileEntry {
            path: path.to_string(),
            bytes: std::fs::metadata(run_dir.join(path)).ok().map(|m| m.len()),
            note: note.to_string(),
        })
        .collect()
}

struct Timer<'a> {
    timings: &'a mut Vec<Timing>,
    last: Instant,
}

impl Timer<'_> {
    fn lap(&mut self, name: &str) {
        self.timings.push(Timing { name: name.into(), seconds: self.last.elapsed().as_secs_f64() });
        self.last = Instant::now();
    }
}
