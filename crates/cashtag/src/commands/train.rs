//! `cashtag train`: data → adapter, without judging before and after.

use cashtag_backend::Backend;

use crate::output;
use crate::pipeline::data::Reading;
use crate::pipeline::device::{self, Job};
use crate::pipeline::engine::{self, Opened};
use crate::pipeline::fine_tune::{self, Inputs};
use crate::pipeline::plan::{Forecast, Parts};
use crate::pipeline::ranks::{self, Gpus};
use crate::settings::{Flags, Settings};

#[derive(clap::Args)]
#[command(after_help = "Examples:\n  cashtag train --data tweets.csv --output-dir runs/mine\n  \
cashtag train --data more.csv --adapter runs/mine --output-dir runs/more\n\n\
With --adapter training begins with the factors of that adapter. With no flags: the recipe smollm2-cpu.\n\
Ctrl-C saves a checkpoint; the same command with --output-dir DIR --resume auto goes on.")]
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
    device::run(&settings, Train { settings: &settings, reading: &args.reading, opened })
}

struct Train<'a> {
    settings: &'a Settings,
    reading: &'a Reading,
    opened: Opened,
}

impl Job for Train<'_> {
    type Output = ();

    fn run<B: Backend>(self, backend: B) -> anyhow::Result<()> {
        let Train { settings: s, reading, opened } = self;
        let device = backend.capabilities();
        let inputs = Inputs::load(s, reading, &opened, &device)?;
        inputs.announce(&opened, &device.description);
        let parts = Parts { train: &inputs.train, validation: &inputs.validation, held_out: &[] };
        let forecast = Forecast::new(&backend, s, &opened, parts)?;
        let model = engine::load(&backend, &opened.checkpoint)?;
        let trained = inputs.train(&backend, &model, &opened, s, &inputs.resume_command("train", reading))?;
        if ranks::other_rank().is_some() {
            return Ok(());
        }
        let temperature = inputs.keep(&backend, &model, &opened, s, &trained)?;

        let outcome = &trained.outcome;
        let kept = outcome.state.log_history.iter().filter(|e| e.get("step") == Some(&(outcome.step as f64)));
        let losses: String = ["loss", "eval_loss"]
            .into_iter()
            .filter_map(|name| Some(format!(", {name} {:.3}", kept.clone().find_map(|e| e.get(name))?)))
            .collect();
        let seconds = outcome.seconds.max(1e-9);
        output::data(&format!(
            "{}: step {} of {}{losses}, temperature {temperature:.2} · trained {:.0} s, {:.1} examples/s, {:.0} tokens/s · {}\n",
            inputs.adapter_dir().display(),
            outcome.step,
            outcome.state.max_steps,
            outcome.seconds,
            trained.examples as f64 / seconds,
            trained.rows as f64 / seconds,
            forecast.line(&backend),
        ))?;
        output::note(format!("to judge it: {}", fine_tune::eval_command(s, &inputs.run_dir)));
        Ok(())
    }
}
