//! The recipes that ship inside the program, so that `--config NAME` works without a checkout.

use std::path::Path;

use super::error::SettingsError;
use super::suggest::nearest;

const RECIPES: [(&str, &str); 3] = [
    ("smollm2-cpu", include_str!("../../../../recipes/smollm2-cpu.toml")),
    ("llama-2-7b-qlora", include_str!("../../../../recipes/llama-2-7b-qlora.toml")),
    ("smollm2-full", include_str!("../../../../recipes/smollm2-full.toml")),
];

/// The text of the recipe with this name; a file of the same name goes first.
pub(crate) fn built_in(path: &Path) -> Option<&'static str> {
    let name = path.to_str()?;
    let (_, text) = RECIPES.iter().find(|(known, _)| *known == name)?;
    (!path.exists()).then_some(*text)
}

/// Adds which recipes there are to an error about a name that is neither file nor recipe.
pub(crate) fn with_hint(path: &Path, error: SettingsError) -> SettingsError {
    let is_name = path.extension().is_none() && path.parent().is_none_or(|p| p.as_os_str().is_empty());
    if !is_name || path.exists() {
        return error;
    }
    let names = RECIPES.map(|(name, _)| name);
    match path.to_str().and_then(|name| nearest(name, names)) {
        Some(near) => error.hint(format!("did you mean the recipe {near}?")),
        None => error.hint(format!("the recipes that ship with cashtag are {}", names.join(", "))),
    }
}
