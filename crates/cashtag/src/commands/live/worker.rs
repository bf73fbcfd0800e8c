//! `cashtag live worker`: scores and sums for a `cashtag live --bus` somewhere else.

use cashtag_backend::Backend;
use cashtag_live::bus::{BusOptions, WorkerOptions, work};
use cashtag_live::scorer::Scorer;

use super::{follow_signals, pipeline_scorer};
use crate::exit;
use crate::output;
use crate::pipeline::device::{self, Job};
use crate::pipeline::engine::{self, Classifier, Opened};
use crate::settings::{Flags, Inference, Settings};

#[derive(clap::Args)]
#[command(next_help_heading = "Scale-out")]
pub(super) struct Bus {
    /// Let `cashtag live worker` processes score and sum, over NATS JetStream: nats://host:4222
    #[arg(long = "bus", value_name = "URL")]
    url: Option<String>,
    #[command(flatten)]
    shape: Shape,
    /// Parts that windows are divided into; not more than these may share the work
    #[arg(long, value_name = "N", default_value_t = 8, requires = "url")]
    bus_partitions: u32,
    /// Bytes that each of the three streams may take on the server's disk
    #[arg(long, value_name = "N", default_value_t = 4 << 30, requires = "url")]
    bus_max_bytes: i64,
}

#[derive(clap::Args)]
struct Shape {
    /// What streams and subjects are called by: several pipelines may share a server
    #[arg(long, value_name = "NAME", default_value = "cashtag")]
    bus_name: String,
    /// A text that a worker did not answer for so long goes to another one
    #[arg(long, value_name = "TIME", default_value = "15s", value_parser = super::duration, hide_short_help = true)]
    bus_ack_wait: std::time::Duration,
}

impl Shape {
    fn options(&self, url: &str) -> anyhow::Result<BusOptions> {
        let mut options = BusOptions::new(url.to_owned());
        options.name.clone_from(&self.bus_name);
        options.ack_wait = self.bus_ack_wait;
        options.check()?;
        Ok(options)
    }
}

impl Bus {
    pub(super) fn options(&self) -> anyhow::Result<Option<BusOptions>> {
        let Some(url) = &self.url else { return Ok(None) };
        let mut options = self.shape.options(url)?;
        options.partitions = self.bus_partitions;
        options.max_bytes = self.bus_max_bytes;
        options.check()?;
        Ok(Some(options))
    }
}

#[derive(clap::Args)]
#[command(after_help = "Examples:\n  cashtag live worker --bus nats://10.0.0.1:4222 --adapter runs/mine\n  \
cashtag live worker --bus nats://10.0.0.1:4222 --only windows\n\n\
Start as many as there are machines, with the model and adapter of the `cashtag live --bus` that they work for; stop and\n\
kill them as you like.")]
pub(super) struct Worker {
    /// The NATS server: nats://host:4222, nats://user:password@host, tls://host; several with commas
    #[arg(long, value_name = "URL")]
    bus: String,
    #[command(flatten)]
    shape: Shape,
    /// Do one thing only: windows need no model
    #[arg(long, value_name = "WHAT")]
    only: Option<Only>,
    #[command(flatten)]
    settings: Flags<Inference>,
}

#[derive(Clone, Copy, PartialEq, clap::ValueEnum)]
enum Only {
    Scoring,
    Windows,
}

impl Worker {
    pub(super) fn run(&self) -> anyhow::Result<()> {
        let options = WorkerOptions { bus: self.shape.options(&self.bus)?, windows: self.only != Some(Only::Scoring) };
        if self.only == Some(Only::Windows) {
            return start(&options, None);
        }
        let mut settings = self.settings.resolve()?;
        let named = settings.is_set("model.name");
        engine::follow_base_model(&mut settings, named);
        let opened = engine::open(&settings)?;
        device::run(&settings, Scoring { settings: &settings, opened, options })
    }
}

struct Scoring<'a> {
    settings: &'a Settings,
    opened: Opened,
    options: WorkerOptions,
}

impl Job for Scoring<'_> {
    type Output = ();

    fn run<B: Backend>(self, backend: B) -> anyhow::Result<()> {
        let Scoring { settings, opened, options } = self;
        let model = engine::load(&backend, &opened.checkpoint)?;
        let lora = engine::load_lora(&backend, &model, opened.adapter.as_ref())?;
        let budget = settings.training.max_tokens_per_batch;
        let classifier = Classifier::new(&backend, &model, lora.as_ref(), &opened.format, budget)?;
        let mut scorer = pipeline_scorer(settings, &opened, classifier)?;
        start(&options, Some(&mut scorer))
    }
}

fn start(options: &WorkerOptions, scorer: Option<&mut dyn Scorer>) -> anyhow::Result<()> {
    let _clean = exit::clean_stop();
    Ok(work(options, scorer, follow_signals(), |said| output::note(format!("{said}  (Ctrl-C stops)")))?)
}
