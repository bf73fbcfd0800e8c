//! `cashtag bench train|classify`: how fast this machine trains and classifies, on real prompts.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::bail;
use cashtag_backend::{AdamW, Backend};
use cashtag_llama::lora::{Lora, LoraTensors};
use cashtag_llama::model::{Checkpointing, Llama, Purpose, TrainPass};
use cashtag_llama::packing::{TokenizedExample, bins, pack};
use cashtag_llama::prompt::PromptFormat;
use cashtag_train::Optimizer;
use serde::Serialize;

use crate::pipeline::data;
use crate::pipeline::device::{self, Job};
use crate::pipeline::engine::{self, Classifier, LabelledText, Opened};
use crate::pipeline::{report, training};
use crate::settings::{DataSource, Flags, GradientCheckpointing, Settings};
use crate::{exit, output};

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum What {
    Train,
    Classify,
}

#[derive(clap::Args)]
pub(crate) struct Args {
    /// What to measure
    #[arg(value_enum)]
    what: What,
    /// Measure for about this many seconds, after a warm-up
    #[arg(long, default_value_t = 20.0)]
    seconds: f64,
    /// Texts that are used, from the beginning of the data
    #[arg(long, default_value_t = 256)]
    rows: usize,
    /// Read the system message from this file
    #[arg(long, value_name = "FILE")]
    system_file: Option<PathBuf>,
    /// Show what each kernel takes (on a GPU; the figures above it are a little lower with it)
    #[arg(long)]
    profile: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    settings: Flags,
}

/// What was measured.
#[derive(Debug, Serialize)]
struct Figures {
    what: What,
    model: String,
    device: String,
    examples: usize,
    examples_per_second: f64,
    /// Tokens of prompts and answers, as a tool without a shared prefix would count them.
    tokens_per_second: f64,
    /// Rows that were really computed.
    rows_per_second: f64,
    tokens_per_example: f64,
    rows_per_example: f64,
    /// Useful floating-point operations of all matrix products over the time of the step.
    gflops: f64,
    milliseconds_per_step: f64,
    /// One text alone, median (classification only).
    #[serde(skip_serializing_if = "Option::is_none")]
    latency_milliseconds: Option<f64>,
    /// Largest resident size of the process.
    peak_memory_bytes: u64,
    /// Most bytes that buffers and weights held on the device.
    peak_device_bytes: u64,
    /// Kernels, the longest first, with what is left of the time: the card waiting for work.
    #[serde(skip_serializing_if = "Option::is_none")]
    profile: Option<Vec<Share>>,
}

/// What one kernel took of the time that was measured.
#[derive(Debug, Serialize)]
struct Share {
    kernel: String,
    launches: u64,
    milliseconds: f64,
    percent: f64,
}

/// Begins a profile if one is asked for.
fn start_profile<B: Backend>(backend: &B, asked: bool) -> anyhow::Result<()> {
    if asked && !backend.start_profile() {
        bail!(exit::Usage(
            "--profile measures the kernels of a GPU, this device has none\n  hint: --device cuda".into()
        ));
    }
    Ok(())
}

/// The shares of a profile over `seconds`.
fn shares<B: Backend>(backend: &B, asked: bool, seconds: f64) -> anyhow::Result<Option<Vec<Share>>> {
    if !asked {
        return Ok(None);
    }
    let share = |kernel, launches, milliseconds: f64| Share {
        kernel,
        launches,
        milliseconds,
        percent: milliseconds / seconds / 10.0,
    };
    let times = backend.stop_profile()?;
    let idle = 1e3 * seconds - times.iter().map(|t| t.milliseconds).sum::<f64>();
    let mut shares: Vec<Share> = times.into_iter().map(|t| share(t.name, t.launches, t.milliseconds)).collect();
    shares.push(share("(copies, waiting for launches)".into(), 0, idle.max(0.0)));
    Ok(Some(shares))
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let mut settings = args.settings.resolve()?;
    if let Some(path) = &args.system_file {
        let text =
            std::fs::read_to_string(path).map_err(|e| exit::Usage(format!("cannot read {}: {e}", path.display())))?;
        settings.data.system_message = Some(text.trim().to_string());
    }
    let opened = engine::open(&settings)?;
    let figures = device::run(&settings, Bench { args: &args, settings: &settings, opened })?;
    if args.json {
        return output::data(&(serde_json::to_string(&figures)? + "\n"));
    }
    output::data(&table(&figures))
}

struct Bench<'a> {
    args: &'a Args,
    settings: &'a Settings,
    opened: Opened,
}

impl Job for Bench<'_> {
    type Output = Figures;

    fn run<B: Backend>(self, backend: B) -> anyhow::Result<Figures> {
        let Bench { args, settings: s, opened } = self;
        let labels = opened.format.label_names();
        let mut examples = match &s.data.source {
            DataSource::Builtin => cashtag_corpus::builtin_split()?.train,
            DataSource::Path(path) => data::read(path, &data::Reading::default(), &s.data.labels.names())?,
        };
        examples.truncate(args.rows);
        if examples.is_empty() {
            bail!(exit::Usage("no texts to measure with\n  hint: --data FILE, --rows N".into()));
        }
        let texts = data::labelled(&examples, &labels)?;
        let model = engine::load(&backend, &opened.checkpoint)?;
        let mut figures = match args.what {
            What::Train => train(&backend, &model, &opened.format, s, &texts, args)?,
            What::Classify => classify(&backend, &model, &opened, s, &texts, args)?,
        };
        figures.model = opened.checkpoint.describe();
        figures.device = backend.capabilities().description;
        figures.peak_memory_bytes = report::peak_memory();
        figures.peak_device_bytes = backend.memory().1;
        Ok(figures)
    }
}

fn train<B: Backend>(
    backend: &B,
    model: &Llama<B>,
    format: &PromptFormat,
    s: &Settings,
    texts: &[LabelledText],
    args: &Args,
) -> anyhow::Result<Figures> {
    let a = training::arguments(s);
    let examples = training::tokenize(s, format, texts)?;
    let config = training::lora_config(s)?;
    let tensors = LoraTensors::init(&config, model.config(), a.seed);
    let mut lora = Lora::new(backend, config, model.config(), &tensors, true)?;
    if a.optim == Optimizer::AdamW8bit {
        lora.use_8bit_moments(backend)?;
    }
    model.prepare(backend, &mut lora)?;
    let longest = examples.iter().map(|e| e.tokens.len()).max().unwrap_or(1);
    let checkpointing = match s.training.gradient_checkpointing {
        GradientCheckpointing::Block => Checkpointing::Block,
        _ => Checkpointing::None,
    };
    let capacity = a.max_tokens_per_batch.max(longest);
    let mut ws = model.workspace(backend, capacity, Purpose::Training(checkpointing), Some(&lora))?;
    let (mut step, mut micro, mut rows, mut tokens, mut pairs, mut head_rows) =
        (0usize, 0u32, 0usize, 0usize, 0usize, 0usize);
    let mut started = Instant::now();
    loop {
        exit::check_stop()?;
        let n = a.examples_per_step();
        let chosen: Vec<&TokenizedExample> = (0..n).map(|i| &examples[(step * n + i) % examples.len()]).collect();
        lora.zero_grad(backend)?;
        for range in bins(&chosen, format.prefix(), a.train_on, a.max_tokens_per_batch, usize::MAX) {
            let batch = pack(&chosen[range], format.prefix(), a.train_on);
            let pass = TrainPass {
                random: Some((a.seed, micro)),
                label_smoothing: 0.0,
                loss_scale: 1.0,
                neftune_alpha: a.neftune_noise_alpha,
            };
            model.forward_backward(backend, &batch, &mut lora, pass, &mut ws)?;
            micro += 1;
            rows += batch.rows();
            pairs += batch.layout.pairs();
            head_rows += batch.label_rows.len();
        }
        tokens += chosen.iter().map(|e| e.tokens.len()).sum::<usize>();
        let norm = lora.grad_norm(backend)?;
        anyhow::ensure!(norm.is_finite(), "the gradient is not finite");
        let hyper = AdamW {
            learning_rate: 1e-6,
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: 0.01,
            step: step as u32 + 1,
            gradient_scale: 1e-3,
        };
        lora.step(backend, hyper, 1.0)?;
        step += 1;
        if step == 1 {
            // The first step warms caches up and is not counted.
            (rows, tokens, pairs, head_rows) = (0, 0, 0, 0);
            backend.synchronize()?;
            start_profile(backend, args.profile)?;
            started = Instant::now();
        } else if started.elapsed().as_secs_f64() > args.seconds {
            break;
        }
    }
    backend.synchronize()?;
    let time = started.elapsed().as_secs_f64();
    let profile = shares(backend, args.profile, time)?;
    let (steps, c) = (step - 1, model.config());
    let done = steps * a.examples_per_step();
    // Frozen layers: forward and the gradient of the input; factors: forward and two gradients; attention: 2 and 5 products.
    let linear = 4 * rows * linear_parameters(c);
    let factors = 6 * rows * lora.parameters();
    let attention = 14 * pairs * c.head_dim * c.num_attention_heads * c.num_hidden_layers;
    let head = 4 * head_rows * c.vocab_size * c.hidden_size;
    Ok(Figures {
        what: What::Train,
        model: String::new(),
        device: String::new(),
        examples: done,
        examples_per_second: done as f64 / time,
        tokens_per_second: tokens as f64 / time,
        rows_per_second: rows as f64 / time,
        tokens_per_example: tokens as f64 / done as f64,
        rows_per_example: rows as f64 / done as f64,
        gflops: (linear + factors + attention + head) as f64 / time / 1e9,
        milliseconds_per_step: 1e3 * time / steps as f64,
        latency_milliseconds: None,
        peak_memory_bytes: 0,
        peak_device_bytes: 0,
        profile,
    })
}

fn classify<B: Backend>(
    backend: &B,
    model: &Llama<B>,
    opened: &Opened,
    s: &Settings,
    texts: &[LabelledText],
    args: &Args,
) -> anyhow::Result<Figures> {
    let lora = engine::load_lora(backend, model, opened.adapter.as_ref())?;
    let format = &opened.format;
    let mut classifier = Classifier::new(backend, model, lora.as_ref(), format, s.training.max_tokens_per_batch)?;
    let strings: Vec<&str> = texts.iter().map(|t| t.text.as_str()).collect();
    const CHUNK: usize = 64;
    classifier.classify(&strings[..CHUNK.min(strings.len())])?;
    let (mut done, mut tokens, mut rows, mut calls) = (0, 0, 0, 0);
    start_profile(backend, args.profile)?;
    let started = Instant::now();
    'all: loop {
        for chunk in strings.chunks(CHUNK) {
            exit::check_stop()?;
            classifier.classify(chunk)?;
            done += chunk.len();
            calls += 1;
            for text in chunk {
                let prompt = format.prompt(text)?;
                tokens += prompt.len();
                rows += prompt.len() - format.prefix().len().min(prompt.len());
            }
            if started.elapsed().as_secs_f64() > args.seconds {
                break 'all;
            }
        }
    }
    let time = started.elapsed().as_secs_f64();
    let profile = shares(backend, args.profile, time)?;
    let mut alone: Vec<f64> = strings
        .iter()
        .cycle()
        .take(30)
        .map(|text| {
            let start = Instant::now();
            classifier.classify(&[text])?;
            Ok(start.elapsed().as_secs_f64() * 1e3)
        })
        .collect::<anyhow::Result<_>>()?;
    alone.sort_by(f64::total_cmp);
    let factors = lora.as_ref().map_or(0, Lora::parameters);
    let c = model.config();
    let flops = 2 * rows * (linear_parameters(c) + factors) + 2 * done * c.vocab_size * c.hidden_size;
    Ok(Figures {
        what: What::Classify,
        model: String::new(),
        device: String::new(),
        examples: done,
        examples_per_second: done as f64 / time,
        tokens_per_second: tokens as f64 / time,
        rows_per_second: rows as f64 / time,
        tokens_per_example: tokens as f64 / done as f64,
        rows_per_example: rows as f64 / done as f64,
        gflops: flops as f64 / time / 1e9,
        milliseconds_per_step: 1e3 * time / f64::from(calls),
        latency_milliseconds: Some(alone[alone.len() / 2]),
        peak_memory_bytes: 0,
        peak_device_bytes: 0,
        profile,
    })
}

/// Parameters of the blocks' linear layers.
fn linear_parameters(c: &cashtag_llama::config::LlamaConfig) -> usize {
    let (d, q, kv) = (c.hidden_size, c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim);
    c.num_hidden_layers * (d * (2 * q + 2 * kv) + 3 * d * c.intermediate_size)
}

fn table(f: &Figures) -> String {
    let mut rows = vec![
        ("examples/s", format!("{:.2}", f.examples_per_second)),
        ("tokens/s", format!("{:.0}", f.tokens_per_second)),
        ("rows/s (computed)", format!("{:.0}", f.rows_per_second)),
        ("tokens per example", format!("{:.1}", f.tokens_per_example)),
        ("rows per example", format!("{:.1}", f.rows_per_example)),
        ("GFLOP/s", format!("{:.1}", f.gflops)),
        ("ms per step", format!("{:.1}", f.milliseconds_per_step)),
        ("peak memory", format!("{:.2} GiB", f.peak_memory_bytes as f64 / f64::from(1 << 30))),
        ("buffers and weights", format!("{:.2} GiB", f.peak_device_bytes as f64 / f64::from(1 << 30))),
    ];
    if let Some(ms) = f.latency_milliseconds {
        rows.push(("one text alone, median", format!("{ms:.1} ms")));
    }
    let what = if f.what == What::Train { "training" } else { "classification" };
    let mut text = format!("{what} · {} · {}\n", f.model, f.device);
    for (name, value) in rows {
        text += &format!("  {name:<24}{value:>14}\n");
    }
    const MOST_KERNELS: usize = 30;
    if let Some(shares) = &f.profile {
        text += &format!("\n  {:<34}{:>10}{:>12}{:>8}\n", "kernel", "launches", "ms", "%");
        let (last, kernels) = shares.split_last().map_or((None, &[][..]), |(last, rest)| (Some(last), rest));
        let rest: f64 = kernels.iter().skip(MOST_KERNELS).map(|s| s.percent).sum();
        for s in kernels.iter().take(MOST_KERNELS).chain(last) {
            text += &format!("  {:<34}{:>10}{:>12.1}{:>8.2}\n", s.kernel, s.launches, s.milliseconds, s.percent);
        }
        if kernels.len() > MOST_KERNELS {
            text += &format!("  {:<34}{:>30.2}\n", format!("({} more kernels)", kernels.len() - MOST_KERNELS), rest);
        }
    }
    text
}
