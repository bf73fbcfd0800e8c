//! Adapters that come and go while the service runs: vLLM's routes, for keys of the role admin, from one directory.

use std::path::{Path, PathBuf};

use axum::Extension;
use axum::body::Bytes;
use axum::extract::State as Shared;
use axum::http::StatusCode;
use axum::response::Response;
use cashtag_http::problem::json_response;
use cashtag_http::{Identity, Problem, Role};
use serde_json::json;

use super::Service;
use super::fields::{Fields, invalid};

fn check(who: &Identity) -> Result<(), Problem> {
    if who.role == Role::Admin {
        return Ok(());
    }
    let what = "this route needs a key of the role admin (cashtag serve keys NAME --role admin, or --admin-api-key)";
    Err(Problem::new(StatusCode::FORBIDDEN, "admin_only", what))
}

fn name(fields: &Fields) -> Result<String, Problem> {
    let name = fields.string("lora_name")?.unwrap_or_default();
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-' | '/');
    if name.is_empty() || name.len() > 100 || !name.chars().all(plain) {
        return Err(invalid("lora_name", "lora_name: expected up to 100 letters, digits and . _ - /"));
    }
    Ok(name.to_owned())
}

pub(super) async fn load(
    Shared(service): Shared<Service>,
    Extension(who): Extension<Identity>,
    body: Bytes,
) -> Result<Response, Problem> {
    check(&who)?;
    let fields = Fields::parse(&body)?;
    let name = name(&fields)?;
    let path = fields.string("lora_path")?.ok_or_else(|| invalid("lora_path", "lora_path is missing"))?;
    let Some(root) = &service.lora_dir else {
        let what = "adapters are loaded from the directory of --lora-dir, and there is none";
        return Err(Problem::new(StatusCode::FORBIDDEN, "no_lora_dir", what));
    };
    let dir = within(root, path)?;
    service.engine.load_adapter(&name, &dir).await?;
    service.log.info("adapter loaded", &[("name", name.as_str().into()), ("key", (*who.name).into())]);
    Ok(json_response(StatusCode::OK, &json!({"status": "loaded", "lora_name": name})))
}

/// The directory that `path` names inside of `root`, which symbolic links cannot leave either.
fn within(root: &Path, path: &str) -> Result<PathBuf, Problem> {
    let refused = || invalid("lora_path", "lora_path: no such directory below that of --lora-dir");
    let root = root.canonicalize().map_err(|_| refused())?;
    let dir = root.join(path).canonicalize().map_err(|_| refused())?;
    if dir.starts_with(&root) && dir.is_dir() { Ok(dir) } else { Err(refused()) }
}

pub(super) async fn unload(
    Shared(service): Shared<Service>,
    Extension(who): Extension<Identity>,
    body: Bytes,
) -> Result<Response, Problem> {
    check(&who)?;
    let name = name(&Fields::parse(&body)?)?;
    service.engine.unload_adapter(&name)?;
    service.log.info("adapter unloaded", &[("name", name.as_str().into()), ("key", (*who.name).into())]);
    Ok(json_response(StatusCode::OK, &json!({"status": "unloaded", "lora_name": name})))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_outside_of_the_directory() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
        assert!(within(&root, "engine").is_ok());
        for path in ["..", "../src/../..", "/", "/etc", "lib.rs", "none", "\0"] {
            assert!(within(&root, path).is_err(), "{path:?}");
        }
    }
}
