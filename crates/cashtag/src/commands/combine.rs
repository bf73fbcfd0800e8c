//! `cashtag combine`: one adapter out of several, the weighted sum of what they change.

use std::path::PathBuf;

use anyhow::{Context as _, bail};
use cashtag_backend::Backend;
use cashtag_llama::adapter::Adapter;
use cashtag_llama::combine::{Combined, combine};

use crate::exit::{self, Usage};
use crate::output;
use crate::pipeline::data::{self, Reading};
use crate::pipeline::device::{self, Job};
use crate::pipeline::engine::{self, Classifier, LabelledText, Opened};
use crate::progress::{Progress, Unit};
use crate::settings::{Flags, Inference, Settings};

/// What a run leaves of its validation part.
const VALIDATION: &str = "validation.csv";

#[derive(clap::Args)]
#[command(
    after_help = "Adapters of the same recipe and several seeds err in different places: their mean is better than each of them and \
costs as much as one. It is what PEFT calls add_weighted_adapter, \"cat\" without --rank and \"svd\" with it.\n\n\
Examples:\n  \
for s in 1 2 3; do cashtag run --full --seed $s --data-seed 0 --output-dir runs/seed-$s; done\n  \
cashtag combine runs/seed-1 runs/seed-2 runs/seed-3 --rank 64 --out runs/mean\n  \
cashtag eval --adapter runs/seed-1 --adapter runs/mean --by kind"
)]
pub(crate) struct Args {
    /// Adapters of one base model, or the directories of the runs that they come from
    #[arg(required = true, num_args = 1.., value_name = "ADAPTER")]
    adapters: Vec<PathBuf>,
    /// The directory to write
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// What each adapter counts, in their order [default: the same for each, 1 in all]
    #[arg(long, value_delimiter = ',', allow_negative_numbers = true, value_name = "W,W,…")]
    weights: Vec<f32>,
    /// Bring the sum down to this rank; without it the rank is the sum of the ranks and nothing is lost
    #[arg(long, value_name = "R")]
    rank: Option<usize>,
    /// Labelled texts to fit the temperature on, which no adapter was trained on; `none` leaves it at 1
    /// [default: the validation.csv of the runs, where all have the same]
    #[arg(long, value_name = "PATH|none")]
    calibrate_on: Option<String>,
    /// Replace what is there
    #[arg(long)]
    overwrite: bool,
    #[command(flatten)]
    reading: Reading,
    #[command(flatten)]
    settings: Flags<Inference>,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let count = args.adapters.len();
    let weights = match args.weights.len() {
        0 => vec![1.0 / count as f32; count],
        n if n == count => args.weights.clone(),
        n => bail!(Usage(format!(
            "{n} weights for {count} adapters\n  hint: --weights takes one for each, or leave it out"
        ))),
    };
    output::may_replace(&args.out, args.overwrite)?;
    let mut settings = args.settings.resolve()?;
    let named = settings.is_set("model.name");
    settings.model.adapter = args.adapters.first().cloned();
    engine::follow_base_model(&mut settings, named);
    let mut opened = engine::open(&settings)?;
    let config = opened.checkpoint.config().clone();
    let mut parts = Vec::with_capacity(count);
    parts.extend(opened.adapter.take());
    for dir in &args.adapters[1..] {
        parts.push(Adapter::load(&engine::adapter_directory(dir), &config)?);
    }
    // Read before the work: what is wrong with it is said at once.
    let texts = calibration_texts(&args, &opened)?;

    let made = {
        let bar = Progress::new("combining", Unit::Of("modules"), None);
        combine(&parts, &weights, args.rank, &config, &mut bar.watch())
    };
    exit::check_stop()?;
    let Combined { mut adapter, lost } = made?;
    drop(parts);
    let temperature = match &texts {
        Some(texts) => {
            device::run(&settings, Calibrate { settings: &settings, opened: &opened, adapter: &adapter, texts })?
        }
        None => 1.0,
    };
    if let Some(classifier) = &mut adapter.classifier {
        classifier.temperature = temperature;
    }
    adapter.save(&args.out, &config)?;
    let factors = adapter.tensors.a.len() + adapter.tensors.b.len();
    let lost = match args.rank {
        Some(_) => format!(", {:.2} % of the sum's squared norm left out", 1e2 * lost),
        None => String::new(),
    };
    let (out, r) = (args.out.display(), adapter.lora.r);
    output::data(&format!(
        "{out}: {count} adapters, r {r}, {factors} parameters, temperature {temperature:.2}{lost}\n"
    ))?;
    output::note(format!("next: cashtag eval --adapter {}", data::quoted(&args.out.to_string_lossy())));
    Ok(())
}

/// What the temperature is fitted on; `None` leaves it at 1.
fn calibration_texts(args: &Args, opened: &Opened) -> anyhow::Result<Option<Vec<LabelledText>>> {
    let path = match args.calibrate_on.as_deref() {
        Some("none") => return Ok(None),
        Some(path) => data::resolve(path)?,
        None => match common_validation(&args.adapters)? {
            Some(path) => path,
            None => {
                output::warn(
                    "the temperature is left at 1: the adapters' runs have no validation part in common\n  hint: --calibrate-on FILE with texts that none was trained on, or train with the same --data-seed",
                );
                return Ok(None);
            }
        },
    };
    let labels = opened.format.label_names();
    let examples = data::read(&path, &args.reading, &labels)?;
    data::labelled(&examples, &labels).map(Some)
}

/// The validation part of the runs that the adapters come from, if it is the same for all.
fn common_validation(adapters: &[PathBuf]) -> anyhow::Result<Option<PathBuf>> {
    let mut common: Option<(PathBuf, Vec<u8>)> = None;
    for dir in adapters {
        let adapter = engine::adapter_directory(dir);
        let Some(path) = adapter.parent().map(|run| run.join(VALIDATION)).filter(|p| p.is_file()) else {
            return Ok(None);
        };
        let text = std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        match &common {
            Some((_, first)) if *first != text => return Ok(None),
            Some(_) => {}
            None => common = Some((path, text)),
        }
    }
    Ok(common.map(|(path, _)| path))
}

/// Fits the temperature of an adapter on the model that was opened.
struct Calibrate<'a> {
    settings: &'a Settings,
    opened: &'a Opened,
    adapter: &'a Adapter,
    texts: &'a [LabelledText],
}

impl Job for Calibrate<'_> {
    type Output = f32;

    fn run<B: Backend>(self, backend: B) -> anyhow::Result<f32> {
        let Calibrate { settings, opened, adapter, texts } = self;
        let model = engine::load(&backend, &opened.checkpoint)?;
        let lora = engine::load_lora(&backend, &model, Some(adapter))?;
        let budget = settings.training.max_tokens_per_batch;
        let mut classifier = Classifier::new(&backend, &model, lora.as_ref(), &opened.format, budget)?;
        classifier.calibrate(texts)
    }
}
