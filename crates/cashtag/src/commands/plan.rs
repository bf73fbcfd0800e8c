//! `cashtag plan`: what a recipe will need, before anything is loaded.

use std::time::Instant;

use anyhow::{Context as _, bail};
use cashtag_backend::dry::DryRules;
use cashtag_backend::{Backend, Capabilities, Dtype};
use cashtag_backend_cpu::{CpuBackend, Precision as CpuPrecision};
use cashtag_backend_cuda::{CudaBackend, Options, probe};
use cashtag_llama::checkpoint::Checkpoint;
use cashtag_llama::config::LlamaConfig;
use cashtag_llama::lora::{Lora, LoraConfig, LoraTensors};
use cashtag_llama::model::{Checkpointing, Llama, Purpose, TrainPass};
use cashtag_llama::packing::{TokenizedExample, TrainOn, pack};
use serde_json::{Value, json};

use crate::exit::Usage;
use crate::output;
use crate::pipeline::data::{self, Reading};
use crate::pipeline::device::{self, Job};
use crate::pipeline::fine_tune;
use crate::pipeline::plan::{self, Parts, Plan, Process};
use crate::settings::{Flags, Precision, Settings};

#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  cashtag plan --full\n  cashtag plan --data tweets.csv --per-device-train-batch-size 16 --no-packing\n  \
cashtag plan --config llama-2-7b-qlora --gpu a100-80gb\n  \
cashtag plan --random-weights llama-2-7b --tokenizer tokenizer.gguf --gpu-memory 16\n\n\
Sizes are counted by running the recipe on a device that computes nothing. The time is measured on this device, on two\n\
blocks of random weights in the model's shape; for a GPU that is only named it is not estimated."
)]
pub(crate) struct Args {
    /// Plan for this GPU, which need not be here
    #[arg(long, value_enum, value_name = "NAME", conflicts_with = "gpu_memory")]
    gpu: Option<Gpu>,
    /// Plan for a GPU with this much memory, in GiB
    #[arg(long, value_name = "GIB")]
    gpu_memory: Option<f64>,
    /// Plan `train`, which judges nothing before and after
    #[arg(long)]
    train_only: bool,
    /// Do not measure how long it takes
    #[arg(long)]
    no_time: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    reading: Reading,
    #[command(flatten)]
    settings: Flags,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Gpu {
    T4,
    #[value(name = "a100-40gb")]
    A100,
    #[value(name = "a100-80gb")]
    A100Large,
    #[value(name = "h100-80gb")]
    H100,
}

impl Gpu {
    /// Memory in GiB as the driver gives it to programs, and whether it multiplies bf16.
    fn facts(self) -> (f64, bool) {
        match self {
            Gpu::T4 => (14.6, false),
            Gpu::A100 => (39.4, true),
            Gpu::A100Large => (79.2, true),
            Gpu::H100 => (79.1, true),
        }
    }
}

/// What a CUDA context takes of a card beside what is allocated on it.
const CONTEXT: u64 = 500 << 20;
const GIB: f64 = (1u64 << 30) as f64;

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    if let Some(gib) = args.gpu_memory
        && !(gib > 0.0 && gib < 1e6)
    {
        bail!(Usage(format!("--gpu-memory {gib} is no size of a GPU in GiB")));
    }
    let (settings, opened) = fine_tune::open(&args.settings)?;
    let labels = opened.format.label_names();
    let target = Target::choose(&args, &settings)?;
    let data = data::load(&settings, &args.reading, fine_tune::quick_portions(&target.capabilities()?))?;
    let train = data::labelled(&data.train, &labels)?;
    let validation = data::labelled(&data.validation, &labels)?;
    let held_out = if args.train_only { Vec::new() } else { data::labelled(&data.held_out, &labels)? };
    let parts = Parts { train: &train, validation: &validation, held_out: &held_out };
    let process = Process::now(&opened.checkpoint);
    let planned = plan::plan(&settings, &opened, parts, target.rules(&settings)?)?;
    let needed = match target {
        Target::Cpu(_) => planned.device_bytes() + process.total() + planned.checkpoint,
        Target::Gpu { .. } => planned.device_bytes() + CONTEXT,
    };
    let there = target.capabilities()?.memory_free;
    let timing = match (&target, args.no_time) {
        (_, true) => None,
        (Target::Gpu { here: false, .. }, _) => None,
        _ => {
            let shape = opened.checkpoint.config().clone();
            let lora = crate::pipeline::training::lora_config(&settings)?;
            Some(device::run(&settings, Rate { shape, lora, rows: planned.largest_batch, settings: &settings })?)
        }
    };
    let seconds = timing.as_ref().map(|t| {
        let train = planned.rows as f64 / t.train;
        (train, train + planned.evaluation_rows as f64 / t.infer)
    });
    if args.json {
        let mut object = planned.to_json(process);
        object["device"] = target.name().into();
        object["needed_bytes"] = needed.into();
        object["available_bytes"] = there.into();
        object["fits"] = there.map(|t| needed <= t).into();
        object["training_seconds"] = seconds.map(|s| s.0).into();
        object["seconds"] = seconds.map(|s| s.1).into();
        object["rate"] =
            timing.map_or(Value::Null, |t| json!({"train_rows_per_second": t.train, "infer_rows_per_second": t.infer}));
        return output::data(&(object.to_string() + "\n"));
    }
    output::data(&text(&planned, process, &target, needed, there, timing.as_ref(), seconds))
}

fn gib(bytes: u64) -> String {
    format!("{:.2} GiB", bytes as f64 / GIB)
}

fn text(
    p: &Plan,
    process: Process,
    target: &Target,
    needed: u64,
    there: Option<u64>,
    timing: Option<&Timing>,
    seconds: Option<(f64, f64)>,
) -> String {
    let mut out = format!("on {}\n\n", target.name());
    let mut line = |name: &str, bytes: u64| {
        if bytes > 0 {
            out += &format!("{name:<34} {:>12}\n", gib(bytes));
        }
    };
    let mut memory = p.memory.clone();
    memory.sort_by_key(|m| std::cmp::Reverse(m.1));
    for (name, bytes) in memory {
        line(name, bytes);
    }
    match target {
        Target::Cpu(_) => {
            line("program, tokenizer, texts", process.program);
            line("model file, mapped", process.model_file);
            line("while a checkpoint is written", p.checkpoint);
        }
        Target::Gpu { .. } => line("CUDA context", CONTEXT),
    }
    let verdict = match there {
        None => String::new(),
        Some(t) if needed <= t => format!("   fits in {}", gib(t)),
        Some(t) => format!(
            "   does NOT fit in {}\nhint: gradient_checkpointing = \"block\", a smaller max_tokens_per_batch or lora r",
            gib(t)
        ),
    };
    out += &format!("{:<34} {:>12}{verdict}\n\n", "at most", gib(needed));
    out += &format!(
        "{} steps of {} examples in {} micro-batches; {} tokens, {} rows computed (largest batch {})\n{} trainable parameters\n",
        p.steps, p.examples, p.micro_batches, p.tokens, p.rows, p.largest_batch, p.trainable
    );
    match (timing, seconds) {
        (Some(t), Some((train, all))) => {
            out += &format!(
                "training {}, in all {} (measured now, on two blocks of random weights: {:.0} rows/s training, {:.0} judging)\n",
                crate::progress::duration(train),
                crate::progress::duration(all),
                t.train,
                t.infer
            );
        }
        _ => out += "time: not measured\n",
    }
    out
}

enum Target {
    Cpu(CpuPrecision),
    Gpu { name: String, memory: Option<u64>, bf16: bool, here: bool },
}

impl Target {
    fn choose(args: &Args, s: &Settings) -> anyhow::Result<Self> {
        if let Some(gpu) = args.gpu {
            use clap::ValueEnum as _;
            let (gib, bf16) = gpu.facts();
            let name = gpu.to_possible_value().map_or_else(String::new, |v| v.get_name().to_string());
            return Ok(Target::Gpu { name, memory: Some((gib * GIB) as u64), bf16, here: false });
        }
        if let Some(gib) = args.gpu_memory {
            let memory = Some((gib * GIB) as u64);
            return Ok(Target::Gpu { name: format!("a GPU with {gib} GiB"), memory, bf16: true, here: false });
        }
        let found = probe();
        let ordinal = match s.model.device {
            crate::settings::Device::Cuda(n) => Some(n),
            crate::settings::Device::Auto if found.usable() => Some(0),
            _ => None,
        };
        if let Some(gpu) = ordinal.and_then(|n| found.gpus.iter().find(|g| g.ordinal as usize == n)) {
            return Ok(Target::Gpu { name: gpu.name.clone(), memory: None, bf16: gpu.bf16, here: true });
        }
        Ok(Target::Cpu(device::cpu_precision(s)?))
    }

    fn name(&self) -> String {
        match self {
            Target::Cpu(precision) => {
                format!("the CPU in {}", if *precision == CpuPrecision::F32 { "f32" } else { "bf16" })
            }
            Target::Gpu { name, .. } => name.clone(),
        }
    }

    fn rules(&self, s: &Settings) -> anyhow::Result<DryRules> {
        match self {
            Target::Cpu(precision) => Ok(CpuBackend::dry_rules(*precision)),
            Target::Gpu { bf16, .. } => {
                let compute = match s.model.precision {
                    Precision::F32 => Dtype::F32,
                    Precision::Fp16 => Dtype::F16,
                    Precision::Auto | Precision::Bf16 if *bf16 => Dtype::Bf16,
                    Precision::Auto => Dtype::F16,
                    Precision::Bf16 => bail!(Usage(format!("{} has no bf16\n  hint: --precision fp16", self.name()))),
                };
                let options: Options = device::cuda_options(s, compute);
                Ok(CudaBackend::dry_rules(
                    &options,
                    self.capabilities()?.memory_free.unwrap_or(u64::MAX / 2).saturating_sub(CONTEXT),
                ))
            }
        }
    }

    /// What is there: all of a GPU's memory, what is available of the machine's. A GPU trains on as much as any does.
    fn capabilities(&self) -> anyhow::Result<Capabilities> {
        match self {
            Target::Cpu(precision) => {
                Ok(CpuBackend::new(*precision, 0).context("the CPU cannot be used")?.capabilities())
            }
            Target::Gpu { memory, .. } => Ok(Capabilities {
                device: "cuda".into(),
                description: self.name(),
                memory_total: *memory,
                memory_free: *memory,
                nominal_rate: f64::MAX,
            }),
        }
    }
}

/// Rows that a device computes in a second.
struct Timing {
    train: f64,
    infer: f64,
}

/// Measures the rate on one and on two blocks of random weights: the difference is a block's time, the rest is the head's.
struct Rate<'a> {
    shape: LlamaConfig,
    lora: LoraConfig,
    rows: usize,
    settings: &'a Settings,
}

impl Job for Rate<'_> {
    type Output = Timing;

    fn run<B: Backend>(self, backend: B) -> anyhow::Result<Timing> {
        let layers = self.shape.num_hidden_layers;
        let (one, two) = (self.measure(&backend, 1)?, self.measure(&backend, 2)?);
        let rows = self.rows.max(2) as f64;
        let rate = |one: f64, two: f64| {
            let block = (two - one).max(one * 1e-3);
            rows / (one + block * (layers - 1) as f64)
        };
        Ok(Timing { train: rate(one.0, two.0), infer: rate(one.1, two.1) })
    }
}

impl Rate<'_> {
    /// Seconds of a training pass and of a forward pass through `layers` blocks: the best of three.
    fn measure<B: Backend>(&self, backend: &B, layers: usize) -> anyhow::Result<(f64, f64)> {
        let shape = LlamaConfig { num_hidden_layers: layers, ..self.shape.clone() };
        let checkpoint = Checkpoint::random(shape, 1, None)?;
        let model = Llama::load(backend, &checkpoint, |_, _| {})?;
        let config = LoraConfig { layers_to_transform: None, ..self.lora.clone() };
        let tensors = LoraTensors::init(&config, model.config(), 1);
        let mut lora = Lora::new(backend, config, model.config(), &tensors, true)?;
        model.prepare(backend, &mut lora)?;
        // Texts as tweets are: short, behind a shared prefix, with an answer of two tokens.
        let rows = self.rows.max(2);
        let prefix: Vec<u32> = (0..(rows / 4) as u32).map(|i| 3 + i % 100).collect();
        let examples: Vec<TokenizedExample> = (0..(rows - prefix.len()).div_ceil(32).max(1))
            .map(|i| {
                let mut tokens = prefix.clone();
                tokens.extend((0..33u32.min(rows as u32)).map(|j| 3 + (i as u32 * 7 + j) % 100));
                let answer_start = tokens.len() - 2;
                TokenizedExample { tokens, answer_start: answer_start.max(1), weight: 1.0 }
            })
            .collect();
        let batch = pack(&examples.iter().collect::<Vec<_>>(), &prefix, TrainOn::Answer);
        let checkpointing = match self.settings.training.gradient_checkpointing {
            crate::settings::GradientCheckpointing::Block => Checkpointing::Block,
            _ => Checkpointing::None,
        };
        let mut ws = model.workspace(backend, batch.rows(), Purpose::Training(checkpointing), Some(&lora))?;
        let scale = rows as f64 / batch.rows() as f64;
        let (mut train, mut infer) = (f64::INFINITY, f64::INFINITY);
        for i in 0..3 {
            let started = Instant::now();
            let pass = TrainPass { random: Some((1, i)), label_smoothing: 0.0, loss_scale: 1.0, neftune_alpha: 0.0 };
            model.forward_backward(backend, &batch, &mut lora, pass, &mut ws)?;
            backend.synchronize()?;
            train = train.min(started.elapsed().as_secs_f64());
            let started = Instant::now();
            model.loss(backend, &batch, Some(&lora), 0.0, &mut ws)?;
            backend.synchronize()?;
            infer = infer.min(started.elapsed().as_secs_f64());
        }
        Ok((train * scale, infer * scale))
    }
}
