//! One resolved configuration for every command that uses a model: defaults, then one TOML recipe, then flags.
//!
//! ```text
//! defaults ─ keys ──────────────┐
//! --config recipe.toml ─ file ──┼─ Resolver ─ checks ─ Settings ─ show (`config --show`, the run directory)
//! --learning-rate, --set ─ flags┘
//! ```
//!
//! Invariants: environment variables change nothing here; unknown keys are errors; each value remembers where it came from;
//! what [`Settings::to_toml_with_sources`] writes reads back as the same settings.

pub(crate) mod choices;
mod error;
mod file;
mod flags;
mod keys;
mod recipes;
mod resolve;
mod show;
mod suggest;
mod value;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

#[allow(unused_imports, reason = "every type that a setting has can be named here, whichever commands do")]
pub(crate) use choices::{
    ClassWeights, DataSource, Device, GradientCheckpointing, LINEAR_LAYERS, Label, Labels, Layers, LrSchedulerType,
    Metric, Optim, Precision, Resident, Resume, Strategy, TargetModules, TooLong, TrainOn,
};
pub(crate) use error::SettingsError;
pub(crate) use flags::{Flags, Inference};
pub(crate) use keys::{Data, Lora, Model, Training};
pub(crate) use show::reference;

/// Where a value came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    Default,
    /// A recipe, and the line in it.
    File {
        path: PathBuf,
        line: usize,
    },
    /// The flag, with its dashes.
    Flag(String),
    /// A default that follows from another key, for example the checkpoints from the evaluations.
    Follows(&'static str),
}

impl std::fmt::Display for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Source::Default => f.write_str("default"),
            Source::File { path, line } => write!(f, "{}:{line}", path.display()),
            Source::Flag(flag) => f.write_str(flag),
            Source::Follows(id) => write!(f, "follows {id}"),
        }
    }
}

/// Sources of the values that are not defaults, by `section.name`.
pub(crate) type Sources = BTreeMap<&'static str, Source>;

/// The recipe of those who name none.
pub(crate) const DEFAULT_RECIPE: &str = "smollm2-cpu";

/// Everything that can be configured, with a value for each.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Settings {
    pub(crate) model: Model,
    pub(crate) data: Data,
    pub(crate) training: Training,
    pub(crate) lora: Lora,
    pub(crate) sources: Sources,
}

impl Settings {
    /// Where the value of `section.name` came from.
    pub(crate) fn source(&self, id: &str) -> Source {
        self.sources.get(id).cloned().unwrap_or(Source::Default)
    }

    /// Whether the user said it, in a recipe or by a flag. The recipe of those who name none says nothing: it gives way as
    /// defaults do.
    pub(crate) fn is_set(&self, id: &str) -> bool {
        match self.sources.get(id) {
            Some(Source::File { path, .. }) => path != Path::new(DEFAULT_RECIPE),
            Some(Source::Flag(_)) => true,
            _ => false,
        }
    }

    /// `training.output_dir` with `<date-time>` replaced by the present time (UTC). Each call takes the time anew: call it once.
    pub(crate) fn output_dir(&self) -> PathBuf {
        let text = self.training.output_dir.to_string_lossy();
        PathBuf::from(text.replace("<date-time>", &date_time(std::time::SystemTime::now())))
    }

    /// `training.max_steps`, if there is such a limit.
    pub(crate) fn max_steps(&self) -> Option<usize> {
        usize::try_from(self.training.max_steps).ok()
    }
}

/// `2026-11-30_14-05-09`, in UTC: sorts by time and is a file name everywhere.
pub(crate) fn date_time(time: std::time::SystemTime) -> String {
    let seconds = time.duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    // Days since 1970-01-01 to a date of the Gregorian calendar; years are counted from March, so that the leap day is the last.
    let z = days + 719_468;
    let (era, day_of_era) = (z / 146_097, z % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}_{:02}-{:02}-{:02}", rest / 3600, rest / 60 % 60, rest % 60)
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use super::*;

    #[test]
    fn dates() {
        let at = |s: u64| date_time(UNIX_EPOCH + Duration::from_secs(s));
        assert_eq!(at(0), "1970-01-01_00-00-00");
        assert_eq!(at(951_782_399), "2000-02-28_23-59-59");
        assert_eq!(at(951_782_400), "2000-02-29_00-00-00");
        assert_eq!(at(1_735_689_599), "2024-12-31_23-59-59");
        assert_eq!(at(4_107_542_400), "2100-03-01_00-00-00");
    }

    #[test]
    fn only_the_placeholder_of_the_output_directory_is_replaced() {
        let mut settings = Settings::default();
        settings.training.output_dir = "runs/mine".into();
        assert_eq!(settings.output_dir(), PathBuf::from("runs/mine"));
        settings.training.output_dir = "a/<date-time>-x".into();
        let dir = settings.output_dir().display().to_string();
        assert!(
            dir.starts_with("a/20") && dir.ends_with("-x") && dir.len() == "a/2026-11-30_14-05-09-x".len(),
            "{dir}"
        );
    }
}
