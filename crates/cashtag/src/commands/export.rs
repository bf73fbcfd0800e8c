//! `cashtag export`: a model with its adapter, or the adapter alone, in the form of another program.
//!
//! Everything is written under a temporary name beside the target and renamed when it is whole; an export that fails or is
//! stopped leaves nothing.
//!
//! A file of quantised weights is rounded for what its prompts ask of it ([`Calibration`]), where it is known how the model is to
//! be asked.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use cashtag_backend::Backend;
use cashtag_corpus::{balanced_sample, builtin_split};
use cashtag_llama::adapter::{Adapter, CLASSIFIER_FILE, ClassifierConfig, write_atomically};
use cashtag_llama::chat::Message;
use cashtag_llama::checkpoint::Checkpoint;
use cashtag_llama::export::{Calibration, Dtype16, GgufType, HfOptions, Merged, write_gguf, write_gguf_lora, write_hf};
use cashtag_llama::packing::TokenizedExample;

use crate::exit::{self, Usage};
use crate::output;
use crate::pipeline::data;
use crate::pipeline::device::{self, Job};
use crate::pipeline::engine::{self, OpenedModel};
use crate::progress::{Progress, Unit};
use crate::settings::{Device, Flags, Inference, Precision, Settings};

/// The model inside of what `--to ollama` writes.
const MODEL_FILE: &str = "model.gguf";
/// Texts that weights are rounded for, and the most tokens of them: time and memory of an export grow with both.
const CALIBRATION_TEXTS: usize = 192;
const CALIBRATION_TOKENS: usize = 10_000;

#[derive(clap::Args)]
#[command(after_help = "Examples:\n  cashtag export --to merged --adapter runs/mine --out mine-merged\n  \
cashtag export --to gguf --type q8_0 --adapter runs/mine --out mine.gguf\n  \
cashtag export --to gguf-lora --adapter runs/mine --out mine-lora.gguf\n  \
cashtag export --to ollama --adapter runs/mine --out mine-ollama && ollama create mine -f mine-ollama/Modelfile\n\n\
Without --adapter the model is written as it is.")]
pub(crate) struct Args {
    /// What is written
    #[arg(long, value_enum, value_name = "FORM")]
    to: Form,
    /// The directory (merged, ollama) or file (gguf, gguf-lora) to write
    #[arg(long, value_name = "PATH")]
    out: PathBuf,
    /// What the weights are stored in: auto, f16, bf16 or f32 for merged; f32, f16, bf16, q8_0 or q4_0 for gguf and ollama
    /// [default: auto; f16]
    #[arg(long = "type", value_name = "TYPE")]
    weight_type: Option<String>,
    /// What q8_0 and q4_0 are rounded for (gguf, ollama): the texts of a file, `builtin`, or `none` for plain rounding
    /// [default: builtin with an adapter or a model that carries its system message, else none]
    #[arg(long, value_name = "FILE|builtin|none")]
    calibrate: Option<String>,
    /// Most megabytes of one file of weights (merged)
    #[arg(long, value_name = "MB", default_value_t = 5000)]
    max_shard_size: u64,
    /// Replace what is there
    #[arg(long)]
    overwrite: bool,
    #[command(flatten)]
    settings: Flags<Inference>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Form {
    /// A Hugging Face checkpoint in 16 bits
    Merged,
    /// One file for llama.cpp
    Gguf,
    /// The adapter alone for llama.cpp
    GgufLora,
    /// A GGUF file and a Modelfile for Ollama
    Ollama,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let plan = Plan::new(&args)?;
    output::may_replace(&args.out, args.overwrite)?;
    let mut settings = args.settings.resolve()?;
    let named = settings.is_set("model.name");
    engine::follow_base_model(&mut settings, named);
    let OpenedModel { checkpoint, adapter, trained } = engine::open_model(&settings)?;
    if adapter.is_none() {
        match args.to {
            Form::GgufLora => bail!(Usage("--to gguf-lora writes an adapter\n  hint: name it with --adapter".into())),
            _ => output::note("no --adapter: the model is written as it is"),
        }
    }
    let job = Export {
        checkpoint: &checkpoint,
        adapter: adapter.as_ref(),
        trained: trained.as_ref(),
        name: name_of(&args.out),
        // Read before the work: what is wrong with it is said at once.
        prompts: Prompts::new(&args, &plan, &settings, &checkpoint, trained.as_ref())?,
        settings: &settings,
    };
    let parent = match args.out.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let cannot = || format!("cannot write {}", args.out.display());
    std::fs::create_dir_all(parent).with_context(cannot)?;
    let scratch = tempfile::Builder::new().prefix(".export-").suffix(".tmp").tempdir_in(parent).with_context(cannot)?;
    let made = scratch.path().join("made");
    let _clean = exit::clean_stop();
    let outcome = match plan {
        Plan::Merged(options) => job.merged(&made, options),
        Plan::Gguf(kind) => job.gguf(&made, kind),
        Plan::GgufLora => job.gguf_lora(&made),
        Plan::Ollama(kind) => job.ollama(&made, kind),
    };
    match outcome {
        Err(_) if exit::stop_requested() => return Err(exit::Interrupted.into()),
        outcome => outcome?,
    }
    put(&made, &args.out, scratch.path()).with_context(cannot)?;
    output::data(&format!("{}: {}\n", args.out.display(), output::bytes(size_of(&args.out))))?;
    if let Some(classifier) = &trained
        && let Some(system) = &classifier.system_message
        && args.to != Form::Ollama
    {
        let labels: Vec<&str> = classifier.labels.iter().map(|l| l.word.as_str()).collect();
        output::note(format!("it answers {} behind the system message: {system}", labels.join(", ")));
    }
    Ok(())
}

/// What is to be done, checked before anything is opened.
enum Plan {
    Merged(HfOptions),
    Gguf(GgufType),
    GgufLora,
    Ollama(GgufType),
}

impl Plan {
    fn new(args: &Args) -> anyhow::Result<Self> {
        let wanted = args.weight_type.as_deref().map(str::to_ascii_lowercase);
        let wrong = |expected: &str| {
            let found = wanted.as_deref().unwrap_or_default();
            Usage(format!("--type {found} is not written here, expected {expected}"))
        };
        let gguf = || -> anyhow::Result<GgufType> {
            let name = wanted.as_deref().unwrap_or("f16");
            let found = GgufType::ALL.into_iter().find(|t| t.name().eq_ignore_ascii_case(name));
            let all: Vec<String> = GgufType::ALL.iter().map(|t| t.name().to_ascii_lowercase()).collect();
            Ok(found.ok_or_else(|| wrong(&all.join(", ")))?)
        };
        Ok(match args.to {
            Form::Merged => {
                let dtype = match wanted.as_deref() {
                    None | Some("auto") => Dtype16::Auto,
                    Some("f16") => Dtype16::F16,
                    Some("bf16") => Dtype16::Bf16,
                    Some("f32") => Dtype16::F32,
                    Some(_) => bail!(wrong("auto, f16, bf16 or f32")),
                };
                Plan::Merged(HfOptions { dtype, max_shard_size: args.max_shard_size.max(1).saturating_mul(1_000_000) })
            }
            Form::Gguf => Plan::Gguf(gguf()?),
            Form::Ollama => Plan::Ollama(gguf()?),
            Form::GgufLora if matches!(wanted.as_deref(), None | Some("f32")) => Plan::GgufLora,
            Form::GgufLora => bail!(wrong("f32, what factors are stored in")),
        })
    }
}

/// What weights are rounded for.
struct Prompts {
    examples: Vec<TokenizedExample>,
    prefix: Vec<u32>,
}

impl Prompts {
    /// `None`: plain rounding, or none at all.
    fn new(
        args: &Args,
        plan: &Plan,
        settings: &Settings,
        checkpoint: &Checkpoint,
        trained: Option<&ClassifierConfig>,
    ) -> anyhow::Result<Option<Self>> {
        let said = args.calibrate.as_deref();
        if !matches!(plan, Plan::Gguf(kind) | Plan::Ollama(kind) if kind.is_quantised()) {
            return match said {
                None | Some("none") => Ok(None),
                Some(_) => bail!(Usage("--calibrate is for --to gguf or ollama with --type q8_0 or q4_0".into())),
            };
        }
        let texts = match said {
            Some("none") => return Ok(None),
            // Nobody knows what the model will be asked.
            None if trained.is_none() => return Ok(None),
            None | Some("builtin") => builtin_split()?.train,
            Some(name) => data::texts(&data::resolve(name)?)?,
        };
        let format = engine::format(settings, checkpoint, trained)?;
        let labels = format.labels().len();
        let mut tokens = format.prefix().len();
        let mut examples = Vec::new();
        for (i, text) in balanced_sample(&texts, CALIBRATION_TEXTS, 0).iter().enumerate() {
            // Labels are scored by their own tokens behind every text, whatever its label is.
            let example = format.example(&text.text, i % labels, 1.0)?;
            tokens += example.tokens.len().saturating_sub(format.prefix().len());
            if tokens > CALIBRATION_TOKENS && !examples.is_empty() {
                break;
            }
            examples.push(example);
        }
        let source = if said.is_none_or(|s| s == "builtin") { "the built-in corpus" } else { "the file" };
        output::note(format!("rounding for {} texts of {source}; --calibrate none rounds to nearest", examples.len()));
        Ok(Some(Self { examples, prefix: format.prefix().to_vec() }))
    }
}

/// A GGUF file whose weights are rounded for prompts.
struct Rounded<'a> {
    export: &'a Export<'a>,
    prompts: &'a Prompts,
    file: &'a Path,
    kind: GgufType,
}

impl Job for Rounded<'_> {
    type Output = ();

    fn run<B: Backend>(self, backend: B) -> anyhow::Result<()> {
        let (merged, prompts) = (self.export.merged_model(), self.prompts);
        let bar = Progress::new("rounding", Unit::Bytes, None);
        let mut rounding = Calibration::new(&backend, merged, self.kind, &prompts.examples, &prompts.prefix)?;
        let name = &self.export.name;
        Ok(write_gguf(self.file, &merged, self.kind, name, Some(&mut rounding), &mut bar.watch())?)
    }
}

/// The name that a file carries inside: that of the target without its ending.
fn name_of(out: &Path) -> String {
    let absolute = std::path::absolute(out).unwrap_or_else(|_| out.to_owned());
    absolute.file_stem().map_or_else(|| "cashtag".into(), |s| s.to_string_lossy().into_owned())
}

/// Moves what was made to its place; a directory that stood there is deleted with the scratch.
fn put(made: &Path, out: &Path, scratch: &Path) -> std::io::Result<()> {
    let before = scratch.join("before");
    let replaces = out.symlink_metadata().is_ok_and(|m| m.is_dir());
    if replaces {
        std::fs::rename(out, &before)?;
    }
    std::fs::rename(made, out).inspect_err(|_| {
        if replaces {
            let _ = std::fs::rename(&before, out);
        }
    })
}

fn size_of(path: &Path) -> u64 {
    if !path.is_dir() {
        return std::fs::metadata(path).map_or(0, |m| m.len());
    }
    let entries = std::fs::read_dir(path).into_iter().flatten().flatten();
    entries.filter_map(|e| e.metadata().ok()).map(|m| m.len()).sum()
}

struct Export<'a> {
    checkpoint: &'a Checkpoint,
    adapter: Option<&'a Adapter>,
    /// How the model is to be asked.
    trained: Option<&'a ClassifierConfig>,
    name: String,
    prompts: Option<Prompts>,
    settings: &'a Settings,
}

impl Export<'_> {
    fn merged_model(&self) -> Merged<'_> {
        Merged { checkpoint: self.checkpoint, adapter: self.adapter }
    }

    fn merged(&self, dir: &Path, options: HfOptions) -> anyhow::Result<()> {
        std::fs::create_dir(dir)?;
        let bar = Progress::new("writing", Unit::Bytes, None);
        write_hf(dir, &self.merged_model(), options, &mut bar.watch())?;
        if let Some(classifier) = self.trained {
            let text = serde_json::to_string_pretty(classifier)? + "\n";
            write_atomically(&dir.join(CLASSIFIER_FILE), text.as_bytes())?;
        }
        Ok(())
    }

    fn gguf(&self, file: &Path, kind: GgufType) -> anyhow::Result<()> {
        if let Some(prompts) = &self.prompts {
            // In f32, which every machine computes alike.
            let mut settings = self.settings.clone();
            (settings.model.device, settings.model.precision) = (Device::Cpu, Precision::F32);
            return device::run(&settings, Rounded { export: self, prompts, file, kind });
        }
        let bar = Progress::new("writing", Unit::Bytes, None);
        Ok(write_gguf(file, &self.merged_model(), kind, &self.name, None, &mut bar.watch())?)
    }

    fn gguf_lora(&self, file: &Path) -> anyhow::Result<()> {
        let Some(adapter) = self.adapter else { return Ok(()) };
        Ok(write_gguf_lora(file, adapter, self.checkpoint.config(), &self.name)?)
    }

    fn ollama(&self, dir: &Path, kind: GgufType) -> anyhow::Result<()> {
        std::fs::create_dir(dir)?;
        let text = self.modelfile()?;
        self.gguf(&dir.join(MODEL_FILE), kind)?;
        write_atomically(&dir.join("Modelfile"), text.as_bytes())?;
        Ok(())
    }

    /// Ollama's description of the model. Its template is of Go's kind and is made from what the model's own renders.
    fn modelfile(&self) -> anyhow::Result<String> {
        let (template, tokenizer) = (self.checkpoint.chat_template()?, self.checkpoint.tokenizer()?);
        const SYSTEM: &str = "SYSTEM-TEXT";
        const PROMPT: &str = "PROMPT-TEXT";
        let bos = tokenizer.bos_token_id().filter(|_| tokenizer.adds_bos());
        let bos = bos.and_then(|id| tokenizer.id_to_token(id)).unwrap_or_default();
        let render = |messages: &[Message]| -> anyhow::Result<String> {
            let text = template.render(messages, true)?.text;
            // llama.cpp puts it in front by itself.
            Ok(text.strip_prefix(bos).unwrap_or(&text).to_string())
        };
        let whole = render(&[Message::new("system", SYSTEM), Message::new("user", PROMPT)])?;
        let bare = render(&[Message::new("user", PROMPT)])?;
        let parts = |text: &str| -> anyhow::Result<(String, String)> {
            let (before, after) = text.split_once(PROMPT).context("the chat template leaves out the user's text")?;
            Ok((before.to_string(), after.to_string()))
        };
        let ((with_system, after), (without, _)) = (parts(&whole)?, parts(&bare)?);
        let (head, middle) =
            with_system.split_once(SYSTEM).context("the chat template leaves out the system message")?;
        if [head, middle, &after, &without].iter().any(|t| t.contains("{{") || t.contains("\"\"\"")) {
            bail!("the chat template writes {{{{ or \"\"\", which a Modelfile cannot hold\n  hint: --to gguf");
        }
        let ends: Vec<&str> = {
            let ids = self.checkpoint.config().eos_token_ids.iter().copied().chain(tokenizer.eos_token_id());
            let mut ends: Vec<&str> = ids.filter_map(|id| tokenizer.id_to_token(id)).collect();
            ends.sort_unstable();
            ends.dedup();
            ends
        };
        let mut text = format!(
            "FROM ./{MODEL_FILE}\nTEMPLATE \"\"\"{{{{ if .System }}}}{head}{{{{ .System }}}}{middle}{{{{ else }}}}{without}{{{{ end }}}}{{{{ .Prompt }}}}{after}{{{{ .Response }}}}\"\"\"\n"
        );
        if let Some(classifier) = self.trained {
            if let Some(system) = &classifier.system_message {
                if system.contains("\"\"\"") {
                    bail!("the system message holds \"\"\", which a Modelfile cannot\n  hint: --to gguf");
                }
                text += &format!("SYSTEM \"\"\"{system}\"\"\"\n");
            }
            let longest = classifier.labels.iter().map(|l| tokenizer.encode(&l.word).len()).max().unwrap_or(1);
            text += &format!("PARAMETER temperature 0\nPARAMETER num_predict {}\n", longest + 2);
        }
        for end in ends {
            text += &format!("PARAMETER stop \"{end}\"\n");
        }
        Ok(text)
    }
}
