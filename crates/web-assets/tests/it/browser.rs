//! Runs `web/test/browser.mjs`: the page in a real Chromium, on data from the development server.

use std::path::Path;
use std::process::{Command, Stdio};

fn runs(program: &str, argument: &str) -> bool {
    Command::new(program).arg(argument).stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok_and(|s| s.success())
}

#[test]
fn the_page_works_in_chromium() {
    let web = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../web");
    if !cashtag_web::is_built() {
        println!("skipped: the page is not built (make web)");
        return;
    }
    if !web.join("node_modules/playwright-core").exists() || !web.join("node_modules/axe-core").exists() {
        println!("skipped: the page's test tools are not installed (npm ci in web/)");
        return;
    }
    let node = std::env::var("CASHTAG_NODE").unwrap_or_else(|_| "node".to_string());
    if !runs(&node, "--version") {
        println!("skipped: no node (set CASHTAG_NODE to one)");
        return;
    }
    let chromium = std::env::var("CHROMIUM").ok().or_else(|| {
        ["chromium", "chromium-browser", "google-chrome"].into_iter().find(|c| runs(c, "--version")).map(String::from)
    });
    let Some(chromium) = chromium else {
        println!("skipped: no Chromium (apt install chromium, or set CHROMIUM)");
        return;
    };
    let output = Command::new(&node).arg(web.join("test/browser.mjs")).env("CHROMIUM", chromium).output().unwrap();
    let stdout = String::from_utf8_lossy(&output.stdout);
    println!("{stdout}");
    assert!(output.status.success(), "{stdout}\n{}", String::from_utf8_lossy(&output.stderr));
}
