//! Putting defaults, a recipe and flags together, and checking what no single key can be checked for.

use std::path::Path;

use super::error::SettingsError;
use super::file::Entry;
use super::keys::{ELSEWHERE, KEYS, Key, SECTIONS};
use super::suggest::nearest;
use super::value::Raw;
use super::{Settings, Source, Strategy};

/// The key with this name or alias in a section.
fn find(section: &str, name: &str) -> Option<&'static Key> {
    KEYS.iter().find(|k| k.section == section && (k.name == name || k.aliases.contains(&name)))
}

/// Applies one value.
fn apply(settings: &mut Settings, key: &'static Key, value: &Raw, source: Source) -> Result<(), SettingsError> {
    let place = source.to_string();
    match (settings.sources.get(key.id), &source) {
        (Some(before @ Source::File { .. }), Source::File { .. })
        | (Some(before @ Source::Flag(_)), Source::Flag(_)) => {
            return Err(SettingsError::new(place, format!("{} is set twice, the first time by {before}", key.id)));
        }
        _ => {}
    }
    if !(key.set)(settings, value) {
        let mut found = value.to_string();
        if found.chars().count() > 60 {
            found = found.chars().take(57).collect::<String>() + "…";
        }
        return Err(SettingsError::new(place, format!("{} is {found}; expected {}", key.id, (key.allowed)())));
    }
    settings.sources.insert(key.id, source);
    Ok(())
}

/// Why there is no such key, with the mend if one can be guessed.
fn unknown(place: String, section: Option<&str>, name: &str) -> SettingsError {
    let known_section = section.is_none_or(|s| SECTIONS.iter().any(|(known, _)| *known == s));
    if let (false, Some(section)) = (known_section, section) {
        let names: Vec<String> = SECTIONS.iter().map(|(s, _)| format!("[{s}]")).collect();
        let error = SettingsError::new(place, format!("unknown section [{}]", shortened(section)));
        return match nearest(section, SECTIONS.iter().map(|(s, _)| *s)) {
            Some(near) => error.hint(format!("did you mean [{near}]?")),
            None => error.hint(format!("the sections are {}", names.join(", "))),
        };
    }
    let what = match section {
        Some(section) => format!("unknown key \"{}\" in [{section}]", shortened(name)),
        None => format!("\"{}\" stands in no section", shortened(name)),
    };
    let error = SettingsError::new(place, what);
    if let Some(key) = KEYS.iter().find(|k| k.name == name || k.aliases.contains(&name)) {
        return error.hint(format!("it belongs in [{}]", key.section));
    }
    if let Some((_, instead)) = ELSEWHERE.iter().find(|(other, _)| *other == name) {
        return error.hint(format!("here it is {instead}"));
    }
    let here = KEYS.iter().filter(|k| section.is_none_or(|s| k.section == s));
    if let Some(near) = nearest(name, here.map(|k| k.name)) {
        return error.hint(format!("did you mean \"{near}\"?"));
    }
    if let Some(near) = nearest(name, KEYS.iter().map(|k| k.name)) {
        let section = KEYS.iter().find(|k| k.name == near).map_or("", |k| k.section);
        return error.hint(format!("did you mean \"{near}\" in [{section}]?"));
    }
    error.hint("`cashtag config --show` lists all keys")
}

fn shortened(text: &str) -> String {
    if text.chars().count() <= 60 { text.to_string() } else { text.chars().take(57).collect::<String>() + "…" }
}

/// Applies the entries of a recipe.
pub(crate) fn apply_file(settings: &mut Settings, path: &Path, entries: Vec<Entry>) -> Result<(), SettingsError> {
    for entry in entries {
        let source = Source::File { path: path.to_owned(), line: entry.line };
        let key = entry.section.as_deref().and_then(|section| find(section, &entry.name));
        match key {
            Some(key) => apply(settings, key, &entry.value, source)?,
            // An empty section.
            None if entry.name.is_empty() && SECTIONS.iter().any(|(s, _)| Some(*s) == entry.section.as_deref()) => {}
            None => {
                let known = entry.section.as_deref().is_none_or(|s| SECTIONS.iter().any(|(known, _)| *known == s));
                let line = if known { entry.line } else { entry.section_line };
                let place = Source::File { path: path.to_owned(), line };
                return Err(unknown(place.to_string(), entry.section.as_deref(), &entry.name));
            }
        }
    }
    Ok(())
}

/// Applies the text behind a flag.
pub(crate) fn apply_flag(
    settings: &mut Settings,
    key: &'static Key,
    flag: &str,
    text: &str,
) -> Result<(), SettingsError> {
    apply(settings, key, &(key.read)(text), Source::Flag(flag.to_string()))
}

/// Applies `--set section.name=value`.
pub(crate) fn apply_set(settings: &mut Settings, assignment: &str) -> Result<(), SettingsError> {
    let Some((id, text)) = assignment.split_once('=') else {
        let what = format!("\"{}\" has no \"=\"", shortened(assignment));
        return Err(SettingsError::new("--set", what).hint("for example --set training.learning_rate=1e-4"));
    };
    let (section, name) = match id.trim().split_once('.') {
        Some((section, name)) => (Some(section), name),
        None => (None, id.trim()),
    };
    match section.and_then(|section| find(section, name)) {
        Some(key) => apply_flag(settings, key, "--set", text.trim()),
        None => Err(unknown("--set".into(), section, name)),
    }
}

/// Defaults that follow from what the user said, then everything that concerns several keys.
pub(crate) fn finish(settings: &mut Settings) -> Result<(), SettingsError> {
    follow(settings);
    check(settings)
}

/// Lets defaults give way to what was said: who only turns evaluation off should not have to turn off the three things that
/// need it.
fn follow(settings: &mut Settings) {
    let follows = |settings: &mut Settings, id: &'static str, leader: &'static str| {
        settings.sources.insert(id, Source::Follows(leader));
    };
    if settings.training.eval_strategy == Strategy::No {
        if settings.training.load_best_model_at_end && !settings.is_set("training.load_best_model_at_end") {
            settings.training.load_best_model_at_end = false;
            follows(settings, "training.load_best_model_at_end", "training.eval_strategy");
        }
        if settings.training.early_stopping_patience.is_some() && !settings.is_set("training.early_stopping_patience") {
            settings.training.early_stopping_patience = None;
            follows(settings, "training.early_stopping_patience", "training.eval_strategy");
        }
        return;
    }
    let best = settings.training.load_best_model_at_end;
    if best && settings.training.save_strategy == Strategy::No && !settings.is_set("training.load_best_model_at_end") {
        settings.training.load_best_model_at_end = false;
        follows(settings, "training.load_best_model_at_end", "training.save_strategy");
    }
    if !settings.training.load_best_model_at_end {
        return;
    }
    let (eval, save) = (settings.training.eval_strategy, settings.training.save_strategy);
    if eval != save && !settings.is_set("training.save_strategy") {
        settings.training.save_strategy = eval;
        follows(settings, "training.save_strategy", "training.eval_strategy");
    } else if eval != save && !settings.is_set("training.eval_strategy") {
        settings.training.eval_strategy = save;
        follows(settings, "training.eval_strategy", "training.save_strategy");
    }
    let training = &settings.training;
    if training.eval_strategy == Strategy::Steps && training.save_strategy == Strategy::Steps {
        let uneven = !training.save_steps.is_multiple_of(training.eval_steps);
        if uneven && !settings.is_set("training.save_steps") {
            settings.training.save_steps = settings.training.eval_steps;
            follows(settings, "training.save_steps", "training.eval_steps");
        } else if uneven && !settings.is_set("training.eval_steps") {
            settings.training.eval_steps = settings.training.save_steps;
            follows(settings, "training.eval_steps", "training.save_steps");
        }
    }
}

fn check(settings: &Settings) -> Result<(), SettingsError> {
    let fail = |id: &str, what: String, hint: &str| {
        Err(SettingsError::new(settings.source(id).to_string(), format!("{id} {what}")).hint(hint))
    };
    let t = &settings.training;
    if t.load_best_model_at_end {
        if t.eval_strategy == Strategy::No {
            let what = "is true, but training.eval_strategy is \"no\"".into();
            return fail("training.load_best_model_at_end", what, "set eval_strategy to \"steps\" or \"epoch\"");
        }
        if t.eval_strategy != t.save_strategy {
            let what = format!("is \"{}\", but training.eval_strategy is \"{}\"", t.save_strategy, t.eval_strategy);
            return fail("training.save_strategy", what, "make them equal, or set load_best_model_at_end to false");
        }
        if t.eval_strategy == Strategy::Steps && !t.save_steps.is_multiple_of(t.eval_steps) {
            let what = format!("is {}, no multiple of training.eval_steps ({})", t.save_steps, t.eval_steps);
            let hint = "the best model can only be kept if a checkpoint falls on an evaluation; or set load_best_model_at_end to false";
            return fail("training.save_steps", what, hint);
        }
    }
    if t.early_stopping_patience.is_some() && t.eval_strategy == Strategy::No {
        let what = "is set, but training.eval_strategy is \"no\"".into();
        return fail(
            "training.early_stopping_patience",
            what,
            "set eval_strategy, or early_stopping_patience = \"none\"",
        );
    }
    let labels = settings.data.labels.0.len();
    if let Some(weights) = t.class_weights.as_ref().filter(|w| w.0.len() != labels) {
        let what = format!("has {} weights for {labels} labels", weights.0.len());
        return fail(
            "training.class_weights",
            what,
            &format!("the labels are {}", settings.data.labels.names().join(", ")),
        );
    }
    Ok(())
}
