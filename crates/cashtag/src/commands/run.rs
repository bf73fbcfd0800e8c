//! `cashtag run`: data → fine-tune → judged before and after → a run directory with a report.

use std::path::Path;
use std::time::Instant;

use cashtag_backend::Backend;
use cashtag_eval::Judged;
use cashtag_eval::report::{Description, FileEntry, Timing};

use crate::output;
use crate::pipeline::data::Reading;
use crate::pipeline::device::{self, Job};
use crate::pipeline::engine::{self, Classifier, LabelledText, Opened};
use crate::pipeline::fine_tune::{self, Inputs};
use crate::pipeline::plan::{Forecast, Parts};
use crate::pipeline::ranks::{self, Gpus};
use crate::pipeline::report::{self, EXAMPLES, Findings};
use crate::settings::{Flags, Settings};

#[derive(clap::Args)]
#[command(
    after_help = "With no flags: the recipe smollm2-cpu, that is the 135M model and the corpus inside the program.\n\
Ctrl-C saves a checkpoint; the same command with --output-dir DIR --resume auto goes on."
)]
pub(crate) struct Args {
    #[command(flatten)]
    reading: Reading,
    #[command(flatten)]
    gpus: Gpus,
    #[command(flatten)]
    settings: Flags,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    if ranks::launch(&args.gpus)? {
        return Ok(());
    }
    let (settings, opened) = fine_tune::open(&args.settings)?;
    device::run(&settings, Run { settings: &settings, reading: &args.reading, opened })
}

struct Run<'a> {
    settings: &'a Settings,
    reading: &'a Reading,
    opened: Opened,
}

impl Job for Run<'_> {
    type Output = ();

    fn run<B: Backend>(self, backend: B) -> anyhow::Result<()> {
        let Run { settings: s, reading, opened } = self;
        let Opened { checkpoint, format, .. } = &opened;
        let labels = format.label_names();
        let device = backend.capabilities();
        let inputs = Inputs::load(s, reading, &opened, &device)?;
        let device = device.description;
        let (run_dir, held_out) = (&inputs.run_dir, &inputs.held_out);
        inputs.announce(&opened, &device);
        let parts = Parts { train: &inputs.train, validation: &inputs.validation, held_out };
        let forecast = Forecast::new(&backend, s, &opened, parts)?;
        let mut timings = Vec::new();
        let mut timed = Timer { timings: &mut timings, last: Instant::now() };
        let model = engine::load(&backend, checkpoint)?;
        timed.lap("load the model");
        let judge =
            |lora: Option<&_>, what: &str, temperature: f32, texts: &[LabelledText]| -> anyhow::Result<Vec<Judged>> {
                let mut classifier = Classifier::new(&backend, &model, lora, format, s.training.max_tokens_per_batch)?;
                classifier.temperature = temperature;
                classifier.judge(what, texts)
            };
        if ranks::other_rank().is_some() {
            inputs.train(&backend, &model, &opened, s, "")?;
            return Ok(());
        }
        let seven = examples(&labels);
        // An adapter to begin with is a part of what stands before.
        let begun = engine::load_lora(&backend, &model, opened.adapter.as_ref())?;
        let begun_temperature = opened.temperature();
        let before = judge(begun.as_ref(), "before", begun_temperature, held_out)?;
        let examples_before = judge(begun.as_ref(), "examples", begun_temperature, &seven)?;
        drop(begun);
        timed.lap("judge before");
        let trained = inputs.train(&backend, &model, &opened, s, &inputs.resume_command("run", reading))?;
        timed.lap("train");
        let lora = &trained.lora;
        let temperature = inputs.keep(&backend, &model, &opened, s, &trained)?;
        let after = judge(Some(lora), "after", temperature, held_out)?;
        let examples_after = judge(Some(lora), "examples", temperature, &seven)?;
        timed.lap("judge after");

        let adapter_facts = Description::new("LoRA")
            .fact("rank", lora.config.r)
            .fact("parameters", lora.parameters())
            .fact("step", format!("{} of {}", trained.outcome.step, trained.outcome.state.max_steps))
            .fact("memory", forecast.line(&backend));
        let peak_bytes = forecast.truth(&backend);
        let findings = Findings {
            labels: labels.clone(),
            device,
            model: Description::new(checkpoint.describe()),
            adapter: adapter_facts,
            before,
            after,
            examples_before,
            examples_after,
            history: trained.history,
            timings,
            temperature: f64::from(temperature),
        };
        let table = report::example_table(&labels, &findings.examples_before, &findings.examples_after);
        let right = findings.examples_after.iter().filter(|j| j.predicted() == j.truth).count();
        let seconds = trained.outcome.seconds.max(1e-9);
        let measured = report::measure(s, &inputs.data, findings, files(run_dir))?;
        measured.write(run_dir, f64::from(temperature), peak_bytes, &forecast.to_json())?;
        output::data(&format!(
            "\n{}\n{table}\n{right} of {} examples right · trained {:.0} s, {:.1} examples/s, {:.0} tokens/s · {}\n{}\n",
            cashtag_eval::terminal_table(Some(&measured.before), Some(&measured.after), Some(&measured.comparison)),
            EXAMPLES.len(),
            seconds,
            trained.examples as f64 / seconds,
            trained.rows as f64 / seconds,
            forecast.line(&backend),
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

fn files(run_dir: &Path) -> Vec<FileEntry> {
    const NOTES: [(&str, &str); 9] = [
        ("dataset.csv", "the texts with their labels"),
        ("validation.csv", "those of them by which the best checkpoint and the temperature were chosen"),
        ("held_out.csv", "those of them that nothing was trained on or chosen by"),
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
