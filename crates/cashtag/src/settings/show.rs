//! The configuration as text: what is in force and where it came from, and the reference of all keys.

use std::fmt::Write as _;

use super::Settings;
use super::keys::{KEYS, SECTIONS};

/// Column of the comments, if the value leaves room.
const COMMENT: usize = 44;

impl Settings {
    /// All values as a recipe, each with where it came from in a comment. It reads back as the same settings.
    pub(crate) fn to_toml_with_sources(&self) -> String {
        let mut text = String::new();
        for (i, (section, _)) in SECTIONS.iter().enumerate() {
            let _ = writeln!(text, "{}[{section}]", if i > 0 { "\n" } else { "" });
            for key in KEYS.iter().filter(|k| k.section == *section) {
                let line = format!("{} = {}", key.name, (key.get)(self));
                // A control character in a path could end the comment.
                let source: String = self.source(key.id).to_string().chars().filter(|c| !c.is_control()).collect();
                let _ = writeln!(text, "{line:COMMENT$}  # {source}");
            }
        }
        text
    }
}

/// All keys with default, what is allowed and what they are for, as Markdown.
pub(crate) fn reference() -> String {
    let defaults = Settings::default();
    let mut text = String::new();
    for (section, about) in SECTIONS {
        let _ = writeln!(text, "## [{section}]\n\n{}\n\n| key | flag | default | allowed | |", about.trim());
        let _ = writeln!(text, "| --- | --- | --- | --- | --- |");
        for key in KEYS.iter().filter(|k| k.section == *section) {
            let other = match key.aliases {
                [] => String::new(),
                names => format!(" Also: {}.", names.iter().map(|n| format!("`{n}`")).collect::<Vec<_>>().join(", ")),
            };
            let default = (key.get)(&defaults);
            let cells = [
                format!("`{}`", key.name),
                format!("`--{}`", key.flag()),
                format!("`{default}`"),
                (key.allowed)(),
                key.help.trim().to_string() + &other,
            ];
            let _ = writeln!(text, "| {} |", cells.map(|c| c.replace('|', "\\|")).join(" | "));
        }
        text.push('\n');
    }
    text.truncate(text.trim_end().len());
    text + "\n"
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use proptest::prelude::*;

    use super::super::choices::{ClassWeights, DataSource, Device, Label, Labels, Layers, Resume, TargetModules};
    use super::super::keys::SYSTEM_MESSAGE;
    use super::super::{Source, file, resolve};
    use super::*;

    fn read_back(settings: &Settings) -> Settings {
        let text = settings.to_toml_with_sources();
        let path = Path::new("resolved.toml");
        let mut read = Settings::default();
        resolve::apply_file(&mut read, path, file::parse(path, &text).unwrap()).unwrap();
        resolve::finish(&mut read).unwrap();
        assert!(KEYS.iter().all(|k| read.is_set(k.id)), "every key is written");
        read.sources = settings.sources.clone();
        read
    }

    #[test]
    fn defaults_read_back() {
        assert_eq!(read_back(&Settings::default()), Settings::default());
    }

    #[test]
    fn values_carry_their_sources() {
        let mut settings = Settings::default();
        settings.training.learning_rate = 1e-4;
        settings.sources.insert("training.learning_rate", Source::Flag("--learning-rate".into()));
        settings.lora.r = 8;
        settings.sources.insert("lora.r", Source::File { path: PathBuf::from("my\nrecipe.toml"), line: 7 });
        let text = settings.to_toml_with_sources();
        for line in [
            "learning_rate = 1e-4                          # --learning-rate",
            "r = 8                                         # myrecipe.toml:7",
            "lora_alpha = 16.0                             # default",
        ] {
            assert!(text.lines().any(|l| l == line), "{text}");
        }
        assert_eq!(read_back(&settings), settings);
    }

    #[test]
    fn the_system_message_fits_a_prompt() {
        let words = SYSTEM_MESSAGE.split_whitespace().count();
        assert!((8..=50).contains(&words), "{words}");
        for label in ["Positive", "Neutral", "Negative"] {
            assert!(SYSTEM_MESSAGE.contains(label));
        }
    }

    #[test]
    fn the_reference_names_every_key() {
        let text = reference();
        assert!(KEYS.iter().all(|k| text.contains(&format!("| `{}` | `--{}` |", k.name, k.flag()))));
    }

    proptest! {
        #[test]
        fn any_settings_read_back(
            text in ".*",
            path in "[^\u{0}]+",
            rate in 1e-30f64..1.0,
            seed in 0..=i64::MAX as u64,
            weights in proptest::collection::vec(1e-6f64..1e12, 3),
            words in proptest::collection::btree_set("[a-z\"\\\\#=\\]]{1,8}", 3),
            layers in proptest::collection::btree_set(0usize..500, 1..9),
        ) {
            prop_assume!(text != "none" && path != "none" && !["builtin", "auto", "never"].contains(&path.as_str()));
            let mut settings = Settings::default();
            settings.data.system_message = Some(text);
            settings.data.source = DataSource::Path(PathBuf::from(&path));
            settings.model.adapter = Some(PathBuf::from(&path));
            settings.model.device = Device::Cuda(3);
            settings.training.resume = Resume::From(PathBuf::from(&path));
            settings.training.learning_rate = rate;
            settings.training.seed = seed;
            settings.training.class_weights = Some(ClassWeights(weights));
            settings.lora.layers_to_transform = Some(Layers(layers.into_iter().collect()));
            settings.lora.target_modules = TargetModules::Some(vec!["v_proj".into()]);
            settings.data.labels = Labels(
                words.into_iter().enumerate().map(|(i, word)| Label { name: format!("L {i}"), word }).collect(),
            );
            prop_assert_eq!(read_back(&settings), settings);
        }
    }
}
