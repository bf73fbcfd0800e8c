//! The types of settings that are more than a number or a text: choices of words, devices, labels, lists.

use std::path::PathBuf;

use super::value::{Raw, Setting, guess_list};

/// An enum whose values are words, written as Transformers, PEFT and TRL write them; `=` gives other spellings that are read.
macro_rules! choices {
    ($($(#[$meta:meta])* $name:ident { $($variant:ident $word:literal $(= $other:literal)*),+ $(,)? })+) => {$(
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(crate) enum $name { $($variant),+ }

        impl $name {
            pub(crate) fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $word),+ }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.pad(self.as_str())
            }
        }

        impl Setting for $name {
            const PLACEHOLDER: &'static str = join!($($word),+);

            fn allowed() -> String {
                one_of(&[$($word),+])
            }
            fn from_raw(raw: &Raw) -> Option<Self> {
                let Raw::Text(text) = raw else { return None };
                match text.as_str() {
                    $($word $(| $other)* => Some(Self::$variant),)+
                    _ => None,
                }
            }
            fn to_raw(&self) -> Raw {
                Raw::Text(self.as_str().to_string())
            }
            fn read(text: &str) -> Raw {
                Raw::Text(text.to_string())
            }
        }
    )+};
}

macro_rules! join {
    ($first:literal $(, $rest:literal)*) => { concat!($first $(, "|", $rest)*) };
}

fn one_of(words: &[&str]) -> String {
    match words {
        [] => String::new(),
        [one] => format!("{one:?}"),
        [head @ .., last] => {
            let head: Vec<String> = head.iter().map(|w| format!("{w:?}")).collect();
            format!("{} or {last:?}", head.join(", "))
        }
    }
}

choices! {
    /// What matrix products are computed in.
    Precision { Auto "auto", F32 "f32" = "float32" = "fp32", Bf16 "bf16" = "bfloat16", Fp16 "fp16" = "float16" }

    /// What a GPU keeps of the frozen weights.
    Resident { Auto "auto", Nf4 "nf4", Bf16 "bf16" }

    /// What happens to a text that is too long for `max_seq_length`.
    TooLong { Truncate "truncate", Error "error" }

    /// Which activations are recomputed in the backward pass.
    GradientCheckpointing { Auto "auto", None "none", Block "block" }

    /// How the learning rate changes over the steps.
    LrSchedulerType {
        Linear "linear", Cosine "cosine", Constant "constant", ConstantWithWarmup "constant_with_warmup",
    }

    /// The optimizer; PyTorch's names for the same arithmetic are read too.
    Optim {
        Adamw "adamw" = "adamw_torch" = "adamw_torch_fused" = "adamw_hf" = "paged_adamw_32bit",
        Adamw8bit "adamw_8bit" = "adamw_bnb_8bit" = "paged_adamw_8bit",
    }

    /// When to evaluate, or to save.
    Strategy { No "no", Steps "steps", Epoch "epoch" }

    /// What decides which checkpoint is the best; as in Transformers the prefix `eval_` may be left out.
    Metric {
        EvalLoss "eval_loss" = "loss", EvalAccuracy "eval_accuracy" = "accuracy",
        EvalMacroF1 "eval_macro_f1" = "macro_f1" = "eval_f1" = "f1", EvalWeightedF1 "eval_weighted_f1" = "weighted_f1",
    }

    /// Which tokens the loss is taken on.
    TrainOn { Answer "answer", All "all" }
}

/// A type that is written as one word with its own syntax.
macro_rules! worded {
    ($name:ident, $placeholder:literal, $allowed:literal, $parse:expr, $show:expr) => {
        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                let show: fn(&$name) -> String = $show;
                f.pad(&show(self))
            }
        }

        impl Setting for $name {
            const PLACEHOLDER: &'static str = $placeholder;

            fn allowed() -> String {
                $allowed.into()
            }
            fn from_raw(raw: &Raw) -> Option<Self> {
                let parse: fn(&str) -> Option<$name> = $parse;
                if let Raw::Text(text) = raw { parse(text) } else { None }
            }
            fn to_raw(&self) -> Raw {
                Raw::Text(self.to_string())
            }
            fn read(text: &str) -> Raw {
                Raw::Text(text.to_string())
            }
        }
    };
}

/// Where the model runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Device {
    /// A GPU if there is one, else the CPU.
    Auto,
    Cpu,
    /// The GPU with this index.
    Cuda(usize),
}

worded!(
    Device,
    "auto|cpu|cuda|cuda:N",
    "\"auto\", \"cpu\", \"cuda\" or \"cuda:N\"",
    |text| match text {
        "auto" => Some(Device::Auto),
        "cpu" => Some(Device::Cpu),
        "cuda" => Some(Device::Cuda(0)),
        _ => text.strip_prefix("cuda:")?.parse().ok().map(Device::Cuda),
    },
    |device| match device {
        Device::Auto => "auto".into(),
        Device::Cpu => "cpu".into(),
        Device::Cuda(0) => "cuda".into(),
        Device::Cuda(n) => format!("cuda:{n}"),
    }
);

/// Where the examples come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum DataSource {
    /// The corpus inside the program.
    Builtin,
    /// A file, a directory, or `OWNER/NAME` of a data set that was pulled.
    Path(PathBuf),
}

worded!(
    DataSource,
    "builtin|PATH",
    "\"builtin\", or a path",
    |text| match text {
        "" => None,
        "builtin" => Some(DataSource::Builtin),
        path => Some(DataSource::Path(path.into())),
    },
    |source| match source {
        DataSource::Builtin => "builtin".into(),
        DataSource::Path(path) => path.to_string_lossy().into_owned(),
    }
);

/// Whether a run continues from a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Resume {
    Never,
    /// From the newest checkpoint in `output_dir` that is whole, if there is one.
    Auto,
    /// From this checkpoint directory.
    From(PathBuf),
}

worded!(
    Resume,
    "never|auto|PATH",
    "\"never\", \"auto\", or the path of a checkpoint",
    |text| match text {
        "" => None,
        "never" => Some(Resume::Never),
        "auto" => Some(Resume::Auto),
        path => Some(Resume::From(path.into())),
    },
    |resume| match resume {
        Resume::Never => "never".into(),
        Resume::Auto => "auto".into(),
        Resume::From(path) => path.to_string_lossy().into_owned(),
    }
);

/// A class and the word that the model answers with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Label {
    pub(crate) name: String,
    pub(crate) word: String,
}

/// The classes, in the order that reports list them in: at least two, all names and all words different.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Labels(pub Vec<Label>);

impl Labels {
    /// Labels whose word is their name.
    pub(crate) fn of(names: &[&str]) -> Self {
        Self(names.iter().map(|n| Label { name: n.to_string(), word: n.to_string() }).collect())
    }

    pub(crate) fn names(&self) -> Vec<&str> {
        self.0.iter().map(|l| l.name.as_str()).collect()
    }

    fn checked(labels: Vec<Label>) -> Option<Self> {
        let distinct = |part: fn(&Label) -> &str| {
            let mut seen = std::collections::BTreeSet::new();
            labels.iter().all(|l| !part(l).trim().is_empty() && seen.insert(part(l).trim().to_lowercase()))
        };
        let good = (2..=64).contains(&labels.len()) && distinct(|l| &l.name) && distinct(|l| &l.word);
        good.then_some(Self(labels))
    }
}

impl Setting for Labels {
    const PLACEHOLDER: &'static str = "A,B,…|A=word,…";

    fn allowed() -> String {
        "a list of 2 to 64 different labels, or a table that gives each label its word".into()
    }
    fn from_raw(raw: &Raw) -> Option<Self> {
        let text = |raw: &Raw| String::from_raw(raw);
        let labels: Option<Vec<Label>> = match raw {
            Raw::List(names) => names.iter().map(|n| text(n).map(|n| Label { word: n.clone(), name: n })).collect(),
            Raw::Table(words) => {
                words.iter().map(|(name, w)| text(w).map(|word| Label { name: name.clone(), word })).collect()
            }
            _ => None,
        };
        labels.and_then(Self::checked)
    }
    fn to_raw(&self) -> Raw {
        if self.0.iter().all(|l| l.name == l.word) {
            Raw::List(self.0.iter().map(|l| Raw::Text(l.name.clone())).collect())
        } else {
            Raw::Table(self.0.iter().map(|l| (l.name.clone(), Raw::Text(l.word.clone()))).collect())
        }
    }
    fn read(text: &str) -> Raw {
        guess_list(text)
    }
}

/// The names of the linear layers that can carry LoRA factors.
pub(crate) const LINEAR_LAYERS: [&str; 7] =
    ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];

/// Which linear layers get LoRA factors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum TargetModules {
    /// All of [`LINEAR_LAYERS`].
    AllLinear,
    /// Some of them, each once.
    Some(Vec<String>),
}

impl TargetModules {
    /// The names, `all-linear` spelled out.
    pub(crate) fn names(&self) -> Vec<&str> {
        match self {
            TargetModules::AllLinear => LINEAR_LAYERS.to_vec(),
            TargetModules::Some(names) => names.iter().map(String::as_str).collect(),
        }
    }
}

impl Setting for TargetModules {
    const PLACEHOLDER: &'static str = "all-linear|q_proj,v_proj,…";

    fn allowed() -> String {
        format!("\"all-linear\", or a list of some of {}", LINEAR_LAYERS.join(", "))
    }
    fn from_raw(raw: &Raw) -> Option<Self> {
        let one = |raw: &Raw| String::from_raw(raw).filter(|n| LINEAR_LAYERS.contains(&n.as_str()));
        match raw {
            Raw::Text(text) if text == "all-linear" => Some(TargetModules::AllLinear),
            Raw::Text(_) => one(raw).map(|n| TargetModules::Some(vec![n])),
            Raw::List(names) => {
                let names: Vec<String> = names.iter().map(one).collect::<Option<_>>()?;
                let distinct = names.iter().enumerate().all(|(i, n)| !names[..i].contains(n));
                (distinct && !names.is_empty()).then_some(TargetModules::Some(names))
            }
            _ => None,
        }
    }
    fn to_raw(&self) -> Raw {
        match self {
            TargetModules::AllLinear => Raw::Text("all-linear".into()),
            TargetModules::Some(names) => Raw::List(names.iter().cloned().map(Raw::Text).collect()),
        }
    }
    fn read(text: &str) -> Raw {
        if text.trim() == "all-linear" { Raw::Text("all-linear".into()) } else { guess_list(text) }
    }
}

/// Indices of layers, each once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Layers(pub Vec<usize>);

impl Setting for Layers {
    const PLACEHOLDER: &'static str = "N,N,…";

    fn allowed() -> String {
        "a list of different layer indices, counted from 0".into()
    }
    fn from_raw(raw: &Raw) -> Option<Self> {
        let layers: Vec<usize> = match raw {
            Raw::Integer(_) => vec![usize::from_raw(raw)?],
            Raw::List(values) => values.iter().map(usize::from_raw).collect::<Option<_>>()?,
            _ => return None,
        };
        let distinct = layers.iter().enumerate().all(|(i, n)| !layers[..i].contains(n));
        (distinct && !layers.is_empty()).then_some(Self(layers))
    }
    fn to_raw(&self) -> Raw {
        Raw::List(self.0.iter().map(|&n| Raw::Integer(n as i128)).collect())
    }
    fn read(text: &str) -> Raw {
        guess_list(text)
    }
}

/// One weight for each label, in the order of the labels.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct ClassWeights(pub Vec<f64>);

impl Setting for ClassWeights {
    const PLACEHOLDER: &'static str = "W,W,…";

    fn allowed() -> String {
        "a list with one number above 0 for each label".into()
    }
    fn from_raw(raw: &Raw) -> Option<Self> {
        let Raw::List(values) = raw else { return None };
        let weights: Vec<f64> = values.iter().map(f64::from_raw).collect::<Option<_>>()?;
        (!weights.is_empty() && weights.iter().all(|w| *w > 0.0)).then_some(Self(weights))
    }
    fn to_raw(&self) -> Raw {
        Raw::List(self.0.iter().map(Setting::to_raw).collect())
    }
    fn read(text: &str) -> Raw {
        guess_list(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read<T: Setting>(text: &str) -> Option<T> {
        T::from_raw(&T::read(text))
    }

    #[test]
    fn choices_have_other_spellings_and_one_name() {
        assert_eq!(read("adamw_torch"), Some(Optim::Adamw));
        assert_eq!(Optim::Adamw.to_string(), "adamw");
        assert_eq!(read::<Optim>("sgd"), None);
        assert_eq!(Optim::allowed(), "\"adamw\" or \"adamw_8bit\"");
        assert_eq!(Strategy::PLACEHOLDER, "no|steps|epoch");
        assert_eq!(read("macro_f1"), Some(Metric::EvalMacroF1));
    }

    #[test]
    fn devices() {
        for (text, device) in [("auto", Device::Auto), ("cpu", Device::Cpu), ("cuda:3", Device::Cuda(3))] {
            assert_eq!(read(text), Some(device));
            assert_eq!(device.to_string(), text);
        }
        assert_eq!(read("cuda"), Some(Device::Cuda(0)));
        for text in ["gpu", "cuda:", "cuda:x", "cuda:-1", ""] {
            assert_eq!(read::<Device>(text), None, "{text}");
        }
    }

    #[test]
    fn labels_keep_their_order_and_differ() {
        let labels: Labels = read("Zebra,Ape").unwrap();
        assert_eq!(labels.names(), ["Zebra", "Ape"]);
        let labels: Labels = read("Zebra=up, Ape=down").unwrap();
        assert_eq!(labels.to_raw().to_string(), "{ Zebra = \"up\", Ape = \"down\" }");
        for text in ["One", "Up,up", "A=x,B=x", "A,", "3,4"] {
            assert_eq!(read::<Labels>(text), None, "{text}");
        }
    }

    #[test]
    fn target_modules() {
        assert_eq!(read("all-linear"), Some(TargetModules::AllLinear));
        assert_eq!(read::<TargetModules>("q_proj,v_proj").unwrap().names(), ["q_proj", "v_proj"]);
        assert_eq!(read::<TargetModules>("q_proj").unwrap().names(), ["q_proj"]);
        for text in ["q_proj,q_proj", "lm_head", "[]", "all"] {
            assert_eq!(read::<TargetModules>(text), None, "{text}");
        }
    }

    #[test]
    fn lists_of_numbers() {
        assert_eq!(read("0,5"), Some(Layers(vec![0, 5])));
        assert_eq!(read("[3]"), Some(Layers(vec![3])));
        assert_eq!(read::<Layers>("1,1"), None);
        assert_eq!(read("1,2.5"), Some(ClassWeights(vec![1.0, 2.5])));
        assert_eq!(read::<ClassWeights>("1,-2"), None);
    }
}
