//! Every key of the configuration, defined once: its section, name, type, default, what is allowed and what it is for.
//!
//! The structs, the flags, the recipe reader, `config --show` and the reference in the documentation are all made from this
//! table, so they cannot differ. Names are those of Transformers, PEFT and TRL.

use std::path::PathBuf;

use super::choices::{
    ClassWeights, DataSource, Device, GradientCheckpointing, Labels, Layers, LrSchedulerType, Metric, Optim, Precision,
    Resident, Resume, Strategy, TargetModules, TooLong, TrainOn,
};
use super::value::{Raw, Setting};
use super::{Settings, Sources};

/// One key, as everything but the structs sees it.
pub(crate) struct Key {
    /// `section.name`.
    pub(crate) id: &'static str,
    pub(crate) section: &'static str,
    pub(crate) name: &'static str,
    /// The long flag if it is not the name with dashes.
    pub(crate) own_flag: Option<&'static str>,
    /// Other names that a recipe or a flag may use.
    pub(crate) aliases: &'static [&'static str],
    pub(crate) help: &'static str,
    pub(crate) placeholder: &'static str,
    pub(crate) is_bool: bool,
    /// What is allowed, to stand after "expected".
    pub(crate) allowed: fn() -> String,
    pub(crate) read: fn(&str) -> Raw,
    /// False: the value is not allowed, and nothing was changed.
    pub(crate) set: fn(&mut Settings, &Raw) -> bool,
    pub(crate) get: fn(&Settings) -> Raw,
}

impl Key {
    /// The long flag without its dashes.
    pub(crate) fn flag(&self) -> String {
        self.own_flag.map_or_else(|| self.name.replace('_', "-"), str::to_string)
    }
}

macro_rules! settings {
    (@allowed $ty:ty) => { <$ty as Setting>::allowed };
    (@allowed $ty:ty, $allowed:literal) => { || $allowed.to_string() };
    (@flag) => { None };
    (@flag $flag:literal) => { Some($flag) };
    ($(
        $(#[doc = $section_doc:literal])+
        $section:ident: $Section:ident {$(
            $(#[doc = $doc:literal])+
            $name:ident: $ty:ty = $default:expr
                $(, flag $flag:literal)? $(, alias [$($alias:literal),+])? $(, $allowed:literal if $check:expr)?;
        )+}
    )+) => {
        $(
            $(#[doc = $section_doc])+
            #[derive(Clone, Debug, PartialEq)]
            pub(crate) struct $Section {
                $($(#[doc = $doc])+ pub(crate) $name: $ty,)+
            }

            impl Default for $Section {
                fn default() -> Self {
                    Self { $($name: $default,)+ }
                }
            }
        )+

        impl Default for Settings {
            fn default() -> Self {
                Self { $($section: $Section::default(),)+ sources: Sources::default() }
            }
        }

        /// Sections with what they are for, in the order of a recipe.
        pub(crate) const SECTIONS: &[(&str, &str)] = &[$((stringify!($section), concat!($($section_doc),+))),+];

        /// All keys, section by section.
        pub(crate) const KEYS: &[Key] = &[$($(
            Key {
                id: concat!(stringify!($section), ".", stringify!($name)),
                section: stringify!($section),
                name: stringify!($name),
                own_flag: settings!(@flag $($flag)?),
                aliases: &[$($($alias),+)?],
                help: concat!($($doc),+),
                placeholder: <$ty as Setting>::PLACEHOLDER,
                is_bool: <$ty as Setting>::IS_BOOL,
                allowed: settings!(@allowed $ty $(, $allowed)?),
                read: <$ty as Setting>::read,
                set: |settings, raw| {
                    let Some(value) = <$ty as Setting>::from_raw(raw) else { return false };
                    $(
                        let check: fn(&$ty) -> bool = $check;
                        if !check(&value) {
                            return false;
                        }
                    )?
                    settings.$section.$name = value;
                    true
                },
                get: |settings| settings.$section.$name.to_raw(),
            },
        )+)+];
    };
}

/// What the model is asked when nothing else is said. Short: a small model learns sooner from few examples with it than with
/// an explanation of the labels (docs/quality.md).
pub(super) const SYSTEM_MESSAGE: &str = "Is this tweet Positive, Neutral or Negative for the stock or the market?";

settings! {
    /// The base model and the device that it runs on.
    model: Model {
        /// Base model: `smollm2-135m`, OWNER/NAME of the Hugging Face hub, a checkpoint directory, or a .gguf file.
        name: String = "smollm2-135m".into(), flag "model",
            "the name of a model, a directory, or a .gguf file" if |v| !v.trim().is_empty();
        /// Where the model runs; `auto` is a GPU if there is one.
        device: Device = Device::Auto;
        /// What matrix products are computed in; `auto` is the fastest that the device has.
        precision: Precision = Precision::Auto;
        /// CPU threads; 0 is one for each core.
        threads: usize = 0, "a whole number from 0 to 4096" if |v| *v <= 4096;
        /// What a GPU keeps of the frozen weights; `auto` is bf16 if it fits.
        resident: Resident = Resident::Auto;
        /// Quantise the scales of NF4 too: 0.4 bits a weight less on a GPU that keeps NF4.
        bnb_4bit_use_double_quant: bool = false;
        /// Build the model with random weights in this shape (the name of a known shape, or a config.json): for measurements.
        random_weights: Option<String> = None, "the name of a shape, the path of a config.json, or none" if |v| v.as_deref() != Some("");
        /// Take the tokenizer from this directory, tokenizer.json or .gguf instead of the model's.
        tokenizer: Option<PathBuf> = None;
        /// LoRA adapter to load: a directory that cashtag or PEFT wrote.
        adapter: Option<PathBuf> = None;
    }

    /// The examples, and how one becomes a prompt.
    data: Data {
        /// Examples: `builtin`, or a .csv, .jsonl, .parquet or .txt file, or a directory of them.
        source: DataSource = DataSource::Builtin, flag "data", alias ["source"];
        /// Evaluate on this file instead of a held-out part of the examples.
        eval_source: Option<PathBuf> = None, flag "eval-data", alias ["eval_source"];
        /// Train on all examples instead of a balanced part that is quick to train on.
        full: bool = false;
        /// How many examples to train on; `none` leaves it to the command.
        train_examples: Option<usize> = None, "a whole number from 1, or none" if |v| *v != Some(0);
        /// How many held-out examples to judge; `none` leaves it to the command.
        eval_examples: Option<usize> = None, "a whole number from 1, or none" if |v| *v != Some(0);
        /// The part that is held out for evaluation.
        eval_fraction: f64 = 0.1, "a number above 0 and below 1" if |v| *v > 0.0 && *v < 1.0;
        /// What stands before every text; `none` leaves it out.
        system_message: Option<String> = Some(SYSTEM_MESSAGE.into());
        /// The classes, and the word that the model answers with for each if it is not the label itself.
        labels: Labels = Labels::of(&["Positive", "Neutral", "Negative"]);
        /// Longest prompt with its answer, in tokens.
        max_seq_length: usize = 512, alias ["max_length"], "a whole number from 8" if |v| *v >= 8;
        /// What happens to a text that is too long: its end is cut off (never the answer), or it is an error.
        too_long: TooLong = TooLong::Truncate;
    }

    /// The run, under the names of `transformers.TrainingArguments` and TRL's `SFTConfig`.
    training: Training {
        /// Where the run is kept; `<date-time>` is replaced by the time of the start.
        output_dir: PathBuf = "runs/<date-time>".into();
        /// Passes over the training examples.
        num_train_epochs: f64 = 3.0, "a number above 0" if |v| *v > 0.0;
        /// Stop after this many optimizer steps; -1 is by num_train_epochs.
        max_steps: i64 = -1, "a whole number from 1, or -1" if |v| *v == -1 || *v >= 1;
        /// Examples in a micro-batch.
        per_device_train_batch_size: usize = 4, "a whole number from 1" if |v| *v >= 1;
        /// Examples in a batch of evaluation or prediction.
        per_device_eval_batch_size: usize = 16, "a whole number from 1" if |v| *v >= 1;
        /// Micro-batches in an optimizer step.
        gradient_accumulation_steps: usize = 8, "a whole number from 1" if |v| *v >= 1;
        /// Recompute the activations of each block in the backward pass: less memory, more time.
        gradient_checkpointing: GradientCheckpointing = GradientCheckpointing::Auto;
        /// Peak learning rate.
        learning_rate: f64 = 2e-4, "a number above 0 and at most 1" if |v| *v > 0.0 && *v <= 1.0;
        /// How the learning rate falls after the warm-up.
        lr_scheduler_type: LrSchedulerType = LrSchedulerType::Cosine;
        /// Share of the steps in which the learning rate rises from 0.
        warmup_ratio: f64 = 0.03, "a number from 0 to 1" if |v| (0.0..=1.0).contains(v);
        /// Steps in which the learning rate rises from 0; if not 0, it stands in for warmup_ratio.
        warmup_steps: usize = 0;
        /// Decoupled weight decay of AdamW.
        weight_decay: f64 = 0.01, "a number from 0 to 1" if |v| (0.0..=1.0).contains(v);
        /// Gradients are scaled down to this norm; 0 is never.
        max_grad_norm: f64 = 1.0, "a number from 0" if |v| *v >= 0.0;
        /// Decay of AdamW's first moment.
        adam_beta1: f64 = 0.9, "a number from 0 and below 1" if |v| (0.0..1.0).contains(v);
        /// Decay of AdamW's second moment.
        adam_beta2: f64 = 0.999, "a number from 0 and below 1" if |v| (0.0..1.0).contains(v);
        /// What AdamW adds to its denominator.
        adam_epsilon: f64 = 1e-8, "a number above 0" if |v| *v > 0.0;
        /// The optimizer; `adamw_8bit` keeps its moments in 8 bits.
        optim: Optim = Optim::Adamw;
        /// When to evaluate.
        eval_strategy: Strategy = Strategy::Steps, alias ["evaluation_strategy"];
        /// Steps between two evaluations.
        eval_steps: usize = 500, "a whole number from 1" if |v| *v >= 1;
        /// When to save a checkpoint.
        save_strategy: Strategy = Strategy::Steps;
        /// Steps between two checkpoints.
        save_steps: usize = 500, "a whole number from 1" if |v| *v >= 1;
        /// Checkpoints that are kept, the best one among them; `none` is all.
        save_total_limit: Option<usize> = Some(2), "a whole number from 1, or none" if |v| *v != Some(0);
        /// Go back to the best checkpoint when training ends.
        load_best_model_at_end: bool = true;
        /// What decides which checkpoint is the best.
        metric_for_best_model: Metric = Metric::EvalLoss;
        /// Whether more of that metric is better; `none` is what the metric's name says.
        greater_is_better: Option<bool> = None;
        /// Stop after this many evaluations without an improvement; `none` is never.
        early_stopping_patience: Option<usize> = Some(3), "a whole number from 1, or none" if |v| *v != Some(0);
        /// How much better an evaluation must be to count as an improvement.
        early_stopping_threshold: f64 = 0.0, "a number from 0" if |v| *v >= 0.0;
        /// Steps between two lines of the log.
        logging_steps: usize = 25, "a whole number from 1" if |v| *v >= 1;
        /// Put examples together without padding and share the system message among them; the result is the same.
        packing: bool = true;
        /// Tokens in a packed micro-batch; the batch sizes above still decide which examples make a step.
        max_tokens_per_batch: usize = 1024, "a whole number from 8" if |v| *v >= 8;
        /// Which tokens the loss is taken on: the label's, or the whole text's.
        train_on: TrainOn = TrainOn::Answer;
        /// The same seed on the same device and thread count gives the same run, bit for bit.
        seed: u64 = 42, "a whole number from 0 to 2^63-1" if |v| *v <= i64::MAX as u64;
        /// The seed of splits and samples of the data; `none` is `seed`. With it runs of several seeds have the same parts.
        data_seed: Option<u64> = None, "a whole number from 0 to 2^63-1, or none" if |v| v.is_none_or(|v| v <= i64::MAX as u64);
        /// Noise on the embeddings while training (NEFTune); 0 is none, 5 is usual.
        neftune_noise_alpha: f64 = 0.0, "a number from 0" if |v| *v >= 0.0;
        /// Share of the target probability that is spread over all tokens.
        label_smoothing_factor: f64 = 0.0, "a number from 0 and below 1" if |v| (0.0..1.0).contains(v);
        /// What an example of each label weighs in the loss, in the order of `labels`; `none` is 1 each.
        class_weights: Option<ClassWeights> = None;
        /// Continue from a checkpoint: `auto` takes the newest whole one in output_dir.
        resume: Resume = Resume::Never, alias ["resume_from_checkpoint"];
    }

    /// The adapter, under the names of `peft.LoraConfig`.
    lora: Lora {
        /// Rank of the factors.
        r: usize = 64, flag "lora-r", alias ["lora_r"], "a whole number from 1 to 4096" if |v| (1..=4096).contains(v);
        /// The factors' product is scaled by lora_alpha/r.
        lora_alpha: f64 = 16.0, "a number above 0" if |v| *v > 0.0;
        /// Share of the factors' inputs that is dropped while training.
        lora_dropout: f64 = 0.1, "a number from 0 and below 1" if |v| (0.0..1.0).contains(v);
        /// Which linear layers get factors.
        target_modules: TargetModules = TargetModules::AllLinear, alias ["lora_target_modules"];
        /// Which blocks get factors; `none` is all.
        layers_to_transform: Option<Layers> = None;
        /// Scale by lora_alpha/sqrt(r) instead (rsLoRA).
        use_rslora: bool = false;
        /// Train the direction and the magnitude of the weights apart (DoRA).
        use_dora: bool = false;
        /// Learning rate of B as a multiple of that of A (LoRA+).
        loraplus_lr_ratio: f64 = 1.0, "a number above 0" if |v| *v > 0.0;
    }
}

/// Keys of other trainers that are said differently here: what to write instead.
pub(crate) const ELSEWHERE: &[(&str, &str)] = &[
    ("fp16", "precision = \"fp16\" in [model]"),
    ("bf16", "precision = \"bf16\" in [model]"),
    ("model_name_or_path", "name in [model]"),
    ("load_in_4bit", "resident = \"nf4\" in [model]"),
    ("double_quant", "bnb_4bit_use_double_quant in [model]"),
    ("dataset", "source in [data]"),
    ("dataset_name", "source in [data]"),
    ("train_file", "source in [data]"),
    ("resume_from_checkpoint", "resume in [training]"),
    ("early_stopping", "early_stopping_patience in [training]"),
    ("assistant_only_loss", "train_on = \"answer\" in [training]"),
    ("completion_only_loss", "train_on = \"answer\" in [training]"),
    ("use_lora", "nothing: training is always with LoRA"),
    ("no_cuda", "device = \"cpu\" in [model]"),
    ("use_cpu", "device = \"cpu\" in [model]"),
    ("auto_find_batch_size", "packing and max_tokens_per_batch in [training]"),
    ("group_by_length", "packing in [training]"),
    ("padding_free", "packing in [training]"),
];
