//! The flags of the configuration: one for each key, made from the table, and `--config` and `--set`.
//!
//! A command takes them with `#[command(flatten)] settings: Flags` and calls [`Flags::resolve`].

use std::collections::BTreeMap;
use std::marker::PhantomData;
use std::path::PathBuf;

use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches};

use super::error::SettingsError;
use super::keys::{KEYS, Key};
use super::{Settings, file, recipes, resolve};

/// Which keys have flags on a command; a recipe and `--set` may name all keys everywhere.
pub(crate) trait Scope {
    fn has(id: &str) -> bool;
}

/// For commands that train or measure.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Everything {}

impl Scope for Everything {
    fn has(_: &str) -> bool {
        true
    }
}

/// For commands that only use a model.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Inference {}

impl Scope for Inference {
    fn has(id: &str) -> bool {
        const DATA: [&str; 4] = ["data.system_message", "data.labels", "data.max_seq_length", "data.too_long"];
        id.starts_with("model.") || DATA.contains(&id) || id == "training.per_device_eval_batch_size"
    }
}

/// Flags that `-h` shows; `--help` shows all.
const SHORT_HELP: [&str; 8] = [
    "model.name",
    "model.adapter",
    "model.device",
    "data.source",
    "data.labels",
    "training.output_dir",
    "training.num_train_epochs",
    "training.learning_rate",
];

/// What was said on the command line, not resolved yet.
#[derive(Clone, Debug)]
pub(crate) struct Flags<S = Everything> {
    config: Option<PathBuf>,
    /// Texts of `--set`.
    set: Vec<String>,
    /// Texts behind the flag of each key that was given, in order.
    given: BTreeMap<&'static str, Vec<String>>,
    scope: PhantomData<S>,
}

impl<S> Default for Flags<S> {
    fn default() -> Self {
        Self { config: None, set: Vec::new(), given: BTreeMap::new(), scope: PhantomData }
    }
}

impl<S> Flags<S> {
    /// Defaults, then the recipe of `--config`, then the flags.
    ///
    /// # Errors
    /// An unreadable recipe, unknown keys, values that are not allowed, keys that contradict one another.
    pub(crate) fn resolve(&self) -> Result<Settings, SettingsError> {
        self.resolve_or(None)
    }

    /// Like [`resolve`](Self::resolve), but with one of the recipes that ship with the program if `--config` was not given.
    ///
    /// # Errors
    /// As for `resolve`.
    pub(crate) fn resolve_or_recipe(&self, name: &str) -> Result<Settings, SettingsError> {
        self.resolve_or(Some(name))
    }

    /// Every value that the flag of `section.name` was given, in order (`--model A --model B`); the last is in force.
    pub(crate) fn occurrences(&self, id: &str) -> &[String] {
        self.given.get(id).map_or(&[], Vec::as_slice)
    }

    fn resolve_or(&self, recipe: Option<&str>) -> Result<Settings, SettingsError> {
        let mut settings = Settings::default();
        let named = self.config.clone().or_else(|| recipe.map(PathBuf::from));
        if let Some(path) = named {
            let text = match recipes::built_in(&path) {
                Some(text) => text.to_string(),
                None => file::read(&path).map_err(|e| recipes::with_hint(&path, e))?,
            };
            let entries = file::parse(&path, &text)?;
            resolve::apply_file(&mut settings, &path, entries)?;
        }
        for assignment in &self.set {
            resolve::apply_set(&mut settings, assignment)?;
        }
        for key in KEYS {
            if let Some(text) = self.given.get(key.id).and_then(|texts| texts.last()) {
                resolve::apply_flag(&mut settings, key, &format!("--{}", key.flag()), text)?;
            }
        }
        resolve::finish(&mut settings)?;
        Ok(settings)
    }
}

/// The first sentence, for `-h`.
fn help(key: &Key) -> String {
    let default = (key.get)(&Settings::default()).to_string();
    let help = key.help.trim();
    // The default of the system message is a paragraph: `config --show` prints it.
    if default.len() > 60 { help.to_string() } else { format!("{help} [default: {}]", default.trim_matches('"')) }
}

fn argument(key: &'static Key) -> Arg {
    let flag = key.flag();
    let mut aliases: Vec<String> = vec![key.name.replace('_', "-"), key.name.to_string()];
    for alias in key.aliases {
        aliases.extend([alias.replace('_', "-"), alias.to_string()]);
    }
    aliases.sort();
    aliases.dedup();
    // `--name` says too little for a flag.
    aliases.retain(|a| *a != flag && a != "name");
    let arg = Arg::new(key.id)
        .long(flag)
        .aliases(aliases)
        .help(help(key))
        .help_heading(format!("[{}]", key.section))
        .hide_short_help(!SHORT_HELP.contains(&key.id))
        .value_name(key.placeholder)
        .action(ArgAction::Append)
        .allow_negative_numbers(true);
    if key.is_bool { arg.num_args(0..=1).default_missing_value("true") } else { arg }
}

impl<S: Scope> Args for Flags<S> {
    fn augment_args(command: Command) -> Command {
        let config = Arg::new("config")
            .long("config")
            .value_name("RECIPE")
            .value_parser(clap::value_parser!(PathBuf))
            .help("TOML file with settings, or the name of a recipe that ships with cashtag; flags override it");
        let set = Arg::new("set")
            .long("set")
            .value_name("SECTION.KEY=VALUE")
            .action(ArgAction::Append)
            .help("Set any key of the configuration");
        let mut command = command.arg(config).arg(set);
        for key in KEYS.iter().filter(|k| S::has(k.id)) {
            command = command.arg(argument(key));
            if key.is_bool {
                let no = Arg::new(format!("no {}", key.id)).long(format!("no-{}", key.flag()));
                command = command.arg(no.hide(true).action(ArgAction::SetTrue).conflicts_with(key.id));
            }
        }
        command
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl<S: Scope> FromArgMatches for Flags<S> {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut flags = Self::default();
        flags.update_from_arg_matches(matches)?;
        Ok(flags)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        self.config = matches.get_one("config").cloned();
        self.set = matches.get_many("set").map(|v| v.cloned().collect()).unwrap_or_default();
        for key in KEYS.iter().filter(|k| S::has(k.id)) {
            if let Some(texts) = matches.get_many::<String>(key.id) {
                self.given.insert(key.id, texts.cloned().collect());
            }
            if key.is_bool && matches.get_flag(&format!("no {}", key.id)) {
                self.given.insert(key.id, vec!["false".into()]);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::super::Source;
    use super::super::choices::{Device, Labels, Metric, Optim, Strategy, TargetModules};
    use super::*;

    #[derive(Parser, Debug)]
    struct Train {
        #[command(flatten)]
        settings: Flags,
    }

    #[derive(Parser, Debug)]
    struct Predict {
        #[command(flatten)]
        settings: Flags<Inference>,
        text: Option<String>,
    }

    fn flags(words: &[&str]) -> Flags {
        Train::try_parse_from([&["train"], words].concat()).unwrap().settings
    }

    fn settings(words: &[&str]) -> Settings {
        flags(words).resolve().unwrap()
    }

    fn error(words: &[&str]) -> String {
        flags(words).resolve().unwrap_err().to_string()
    }

    #[test]
    fn clap_accepts_the_table() {
        use clap::CommandFactory;
        Train::command().debug_assert();
        Predict::command().debug_assert();
    }

    #[test]
    fn one_flag_for_each_key() {
        let s = settings(&[
            "--learning-rate",
            "1e-4",
            "--max_steps",
            "-1",
            "--lora-r",
            "8",
            "--model=a/b",
            "--device",
            "cuda:1",
        ]);
        assert_eq!(s.training.learning_rate, 1e-4);
        assert_eq!(s.max_steps(), None);
        assert_eq!(s.lora.r, 8);
        assert_eq!(s.model.name, "a/b");
        assert_eq!(s.model.device, Device::Cuda(1));
        assert_eq!(s.source("lora.r"), Source::Flag("--lora-r".into()));
        assert_eq!(s.source("training.seed"), Source::Default);
        let s = settings(&["--target-modules", "q_proj,v_proj", "--labels", "Bullish=up,Bearish=down", "--r", "4"]);
        assert_eq!(s.lora.target_modules.names(), ["q_proj", "v_proj"]);
        assert_eq!(s.data.labels.0[1].word, "down");
        assert_eq!(s.lora.r, 4);
        // What looks like a number stays a text where a text is asked for.
        assert_eq!(settings(&["--system-message", "3"]).data.system_message.as_deref(), Some("3"));
        assert_eq!(settings(&["--system-message", "none"]).data.system_message, None);
    }

    #[test]
    fn switches() {
        assert!(settings(&["--use-dora"]).lora.use_dora);
        assert!(!settings(&["--packing=false"]).training.packing);
        assert!(!settings(&["--packing", "False"]).training.packing);
        assert!(!settings(&["--no-packing"]).training.packing);
        assert_eq!(settings(&["--greater-is-better"]).training.greater_is_better, Some(true));
        assert!(Train::try_parse_from(["train", "--packing", "--no-packing"]).is_err());
    }

    #[test]
    fn set_names_any_key() {
        let s = settings(&["--set", "training.optim=adamw_bnb_8bit", "--set", "lora.target_modules=[\"o_proj\"]"]);
        assert_eq!(s.training.optim, Optim::Adamw8bit);
        assert_eq!(s.lora.target_modules, TargetModules::Some(vec!["o_proj".into()]));
        assert_eq!(
            error(&["--set", "training.lerning_rate=1"]),
            "--set: unknown key \"lerning_rate\" in [training]\n  hint: did you mean \"learning_rate\"?"
        );
        assert_eq!(
            error(&["--set", "seed=1"]),
            "--set: \"seed\" stands in no section\n  hint: it belongs in [training]"
        );
        assert_eq!(
            error(&["--set", "seed"]),
            "--set: \"seed\" has no \"=\"\n  hint: for example --set training.learning_rate=1e-4"
        );
        assert_eq!(
            error(&["--set", "training.seed=1", "--seed", "2"]),
            "--seed: training.seed is set twice, the first time by --set"
        );
    }

    #[test]
    fn values_are_checked() {
        for (words, message) in [
            (
                ["--learning-rate", "fast"],
                "--learning-rate: training.learning_rate is \"fast\"; expected a number above 0 and at most 1",
            ),
            (
                ["--learning-rate", "0"],
                "--learning-rate: training.learning_rate is 0; expected a number above 0 and at most 1",
            ),
            (["--lora-dropout", "1"], "--lora-dropout: lora.lora_dropout is 1; expected a number from 0 and below 1"),
            (["--optim", "sgd"], "--optim: training.optim is \"sgd\"; expected \"adamw\" or \"adamw_8bit\""),
            (["--max-steps", "0"], "--max-steps: training.max_steps is 0; expected a whole number from 1, or -1"),
            (["--seed", "-1"], "--seed: training.seed is -1; expected a whole number from 0 to 2^63-1"),
            (
                ["--eval-fraction", "nan"],
                "--eval-fraction: data.eval_fraction is \"nan\"; expected a number above 0 and below 1",
            ),
            (["--packing", "maybe"], "--packing: training.packing is \"maybe\"; expected true or false"),
            (
                ["--class-weights", "1,2"],
                "--class-weights: training.class_weights has 2 weights for 3 labels\n  hint: the labels are Positive, Neutral, Negative",
            ),
        ] {
            assert_eq!(error(&words), message);
        }
    }

    #[test]
    fn defaults_give_way_to_what_was_said() {
        let s = settings(&["--eval-strategy", "no"]);
        assert!(!s.training.load_best_model_at_end);
        assert_eq!(s.training.early_stopping_patience, None);
        assert_eq!(s.source("training.load_best_model_at_end"), Source::Follows("training.eval_strategy"));
        let s = settings(&["--evaluation_strategy", "epoch"]);
        assert_eq!((s.training.eval_strategy, s.training.save_strategy), (Strategy::Epoch, Strategy::Epoch));
        assert_eq!(settings(&["--eval-steps", "300"]).training.save_steps, 300);
        assert_eq!(settings(&["--eval-steps", "100"]).training.save_steps, 500);
        assert_eq!(settings(&["--save-steps", "30"]).training.eval_steps, 30);
        assert_eq!(
            error(&["--eval-steps", "300", "--save-steps", "500"]).lines().next().unwrap(),
            "--save-steps: training.save_steps is 500, no multiple of training.eval_steps (300)"
        );
        assert!(
            error(&["--eval-strategy=no", "--load-best-model-at-end"]).contains("training.eval_strategy is \"no\"")
        );
    }

    #[test]
    fn the_last_of_several_is_in_force_and_all_can_be_seen() {
        let flags = flags(&["--model", "a", "--model", "b"]);
        assert_eq!(flags.occurrences("model.name"), ["a", "b"]);
        assert_eq!(flags.resolve().unwrap().model.name, "b");
        assert!(flags.occurrences("lora.r").is_empty());
    }

    #[test]
    fn a_command_that_only_uses_a_model_has_no_flags_for_training() {
        let p = Predict::try_parse_from(["predict", "--model", "m", "good news"]).unwrap();
        assert_eq!(p.text.as_deref(), Some("good news"));
        assert_eq!(p.settings.resolve().unwrap().model.name, "m");
        assert!(Predict::try_parse_from(["predict", "--learning-rate", "1"]).is_err());
    }

    #[test]
    fn recipes_that_ship() {
        for name in ["smollm2-cpu", "llama-2-7b-qlora", "smollm2-full"] {
            let s = flags(&[]).resolve_or_recipe(name).unwrap();
            assert_eq!(flags(&["--config", name]).resolve().unwrap(), s);
        }
        let s = flags(&["--lora-r", "8"]).resolve_or_recipe("llama-2-7b-qlora").unwrap();
        assert_eq!(s.model.name, "NousResearch/Llama-2-7b-chat-hf");
        assert_eq!(s.lora.target_modules.names(), ["q_proj", "v_proj"]);
        assert_eq!((s.lora.r, s.training.learning_rate, s.training.gradient_accumulation_steps), (8, 2e-4, 1));
        assert!(error(&["--config", "smollm-cpu"]).contains("no such file"));
    }

    fn from_file(text: &str) -> Result<Settings, SettingsError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("r.toml");
        std::fs::write(&path, text).unwrap();
        flags(&["--config", path.to_str().unwrap()]).resolve().map_err(|mut e| {
            e.place = e.place.replace(dir.path().to_str().unwrap(), "");
            e
        })
    }

    #[test]
    fn a_recipe() {
        let s = from_file("[training]\nevaluation_strategy = \"epoch\"\nmetric_for_best_model = \"eval_f1\"\n[data]\nlabels = [\"Up\", \"Down\"]\n[lora]\n").unwrap();
        assert_eq!(s.training.eval_strategy, Strategy::Epoch);
        assert_eq!(s.training.metric_for_best_model, Metric::EvalMacroF1);
        assert_eq!(s.data.labels, Labels::of(&["Up", "Down"]));
        assert!(matches!(s.source("data.labels"), Source::File { line: 5, .. }));
        let s = from_file("[data.labels]\nZ = \"up\"\nA = \"down\"\n").unwrap();
        assert_eq!(s.data.labels.names(), ["Z", "A"]);
    }

    #[test]
    fn mistakes_in_a_recipe() {
        for (text, message) in [
            (
                "[training]\nlearnig_rate = 1",
                "/r.toml:2: unknown key \"learnig_rate\" in [training]\n  hint: did you mean \"learning_rate\"?",
            ),
            ("\n[traning]\nx = 1", "/r.toml:2: unknown section [traning]\n  hint: did you mean [training]?"),
            ("[xyz]", "/r.toml:1: unknown section [xyz]\n  hint: the sections are [model], [data], [training], [lora]"),
            ("[training]\nr = 1", "/r.toml:2: unknown key \"r\" in [training]\n  hint: it belongs in [lora]"),
            (
                "[training]\nfp16 = true",
                "/r.toml:2: unknown key \"fp16\" in [training]\n  hint: here it is precision = \"fp16\" in [model]",
            ),
            ("seed = 1", "/r.toml:1: \"seed\" stands in no section\n  hint: it belongs in [training]"),
            ("[training]\nseed = \"1\"", "/r.toml:2: training.seed is \"1\"; expected a whole number from 0 to 2^63-1"),
            (
                "[training]\neval_strategy = \"no\"\nevaluation_strategy = \"no\"",
                "/r.toml:3: training.eval_strategy is set twice, the first time by ",
            ),
            (
                "[lora]\ntarget_modules = [\"q\"]",
                "/r.toml:2: lora.target_modules is [\"q\"]; expected \"all-linear\", or a list of some of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj",
            ),
            (
                "[lora]\nzzz = 1",
                "/r.toml:2: unknown key \"zzz\" in [lora]\n  hint: `cashtag config --show` lists all keys",
            ),
        ] {
            let found = from_file(text).unwrap_err().to_string();
            assert!(found.starts_with(message), "{found}");
        }
    }
}
