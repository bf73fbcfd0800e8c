//! `complete` and `chat` with the real small model.

use std::io::Write as _;
use std::process::Stdio;

use serde_json::Value;

use super::context::Context;
use super::model_commands::context;

fn piped(context: &Context, args: &[&str], input: &str) -> String {
    let mut command = context.command(args);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    context.shown(&child.wait_with_output().unwrap())
}

fn stdout(context: &Context, args: &[&str]) -> String {
    let output = context.command(args).output().unwrap();
    assert!(output.status.success(), "{}", context.shown(&output));
    String::from_utf8(output.stdout).unwrap()
}

/// f32, so that the text does not depend on the processor (as far as the leads in the library's fixture go).
const F32: [&str; 3] = ["-q", "--precision", "f32"];

#[test]
fn one_prompt() {
    let Some(context) = context() else { return };
    let ask = |args: &[&str]| stdout(&context, &[&["complete"], &F32[..], args].concat());
    let plain = ask(&["--max-new-tokens", "12", "What is a stock?"]);
    assert!(plain.trim().len() > 10, "{plain:?}");
    let json: Value = serde_json::from_str(&ask(&["--json", "--max-new-tokens", "12", "What is a stock?"])).unwrap();
    assert_eq!(json["completion"].as_str().unwrap().to_string() + "\n", plain);
    assert_eq!((json["finish_reason"].as_str(), json["completion_tokens"].as_u64()), (Some("length"), Some(12)));
    // A text that goes on begins with a space of its own, an answer does not.
    let raw = ask(&["--raw", "--max-new-tokens", "8", "The stock market opened higher on Monday after"]);
    assert!(raw.starts_with(' ') && !plain.starts_with(' '), "{raw:?} {plain:?}");
    let drawn = |seed: &str| ask(&["--temperature", "1.5", "--seed", seed, "--max-new-tokens", "6", "Say something."]);
    assert_eq!(drawn("1"), drawn("1"));
    assert_ne!(drawn("1"), drawn("2"));
    // The line break that `echo` ends with is no part of a prompt.
    let typed = piped(&context, &[&["complete"], &F32[..], &["--max-new-tokens", "12"]].concat(), "What is a stock?\n");
    assert_eq!(typed, format!("exit code 0\n--- stdout\n{}", plain.trim_end_matches('\n')));
    // Each of these is heard: most tokens in all, and where an answer ends.
    let length = json["prompt_tokens"].as_u64().unwrap() + 4;
    let short = ask(&["--json", "--max-length", &length.to_string(), "What is a stock?"]);
    assert_eq!(serde_json::from_str::<Value>(&short).unwrap()["completion_tokens"], 4);
    let word = plain.split_whitespace().nth(3).unwrap();
    let stopped = ask(&["--max-new-tokens", "12", "--stop", word, "What is a stock?"]);
    assert_eq!(stopped, plain[..plain.find(word).unwrap()].to_string() + "\n");
    // One token to choose from is the likeliest one, whatever the temperature.
    for only in [["--top-k", "1"], ["--top-p", "0.000001"]] {
        let flags = ["--max-new-tokens", "12", "--temperature", "1.5", "--seed", "3", "What is a stock?"];
        assert_eq!(ask(&[&only[..], &flags].concat()), plain, "{only:?}");
    }
    let warned = context.run(&["complete", "--top-p", "0.5", "--max-new-tokens", "1", "What is a stock?"]);
    assert!(warned.contains("warning: the temperature is 0") && warned.contains("hint: --temperature"), "{warned}");
}

#[test]
fn a_file_of_prompts_keeps_its_order() {
    let Some(context) = context() else { return };
    context.write(
        "prompts.jsonl",
        "{\"id\":1,\"prompt\":\"What is a stock?\"}\n\n{\"id\":2,\"messages\":[{\"role\":\"user\",\"content\":\"Say hello.\"}],\"note\":\"kept\"}\n{\"id\":3,\"prompt\":\"Name a colour.\"}\n",
    );
    let args = [&["complete"], &F32[..], &["--in", "prompts.jsonl", "--max-new-tokens", "12"]].concat();
    let rows: Vec<Value> = stdout(&context, &args).lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert_eq!(rows.iter().map(|r| r["id"].as_u64().unwrap()).collect::<Vec<_>>(), [1, 2, 3]);
    let keys: Vec<&String> = rows[1].as_object().unwrap().keys().collect();
    assert_eq!(keys, ["id", "messages", "note", "completion", "finish_reason", "prompt_tokens", "completion_tokens"]);
    // Written together, each is what it is alone.
    let alone = stdout(&context, &[&["complete"], &F32[..], &["--max-new-tokens", "12", "What is a stock?"]].concat());
    assert_eq!(rows[0]["completion"].as_str().unwrap().to_string() + "\n", alone);
    context.write("prompts.txt", "Name a colour.\nWrite two lines, one below the other.\n");
    let args =
        [&["complete"], &F32[..], &["--in", "prompts.txt", "--out", "answers.txt", "--max-new-tokens", "12"]].concat();
    stdout(&context, &args);
    let answers = std::fs::read_to_string(context.path("answers.txt")).unwrap();
    assert_eq!(answers.lines().count(), 2, "{answers}");
    assert_eq!(answers.lines().next(), rows[2]["completion"].as_str().map(|c| c.replace('\n', "\\n")).as_deref());
    context.write("bad.jsonl", "{\"prompt\":\"x\"}\n{\"text\":\"x\"}\n");
    let refused = context.run(&["complete", "-q", "--in", "bad.jsonl", "--out", "x.jsonl"]);
    assert!(refused.starts_with("exit code 1") && refused.contains("bad.jsonl:2"), "{refused}");
    assert!(refused.contains("expected either \"prompt\", a text, or \"messages\""), "{refused}");
    assert!(!context.path("x.jsonl").exists());
    context.write("list.json", "[{\"prompt\":\"x\"}]\n");
    let refused = context.run(&["complete", "-q", "--in", "list.json"]);
    assert!(refused.contains("list.json:1") && refused.contains("hint: each line of a .jsonl file"), "{refused}");
}

#[test]
fn a_conversation_from_standard_input() {
    let Some(context) = context() else { return };
    let args = [&["chat"], &F32[..], &["--max-new-tokens", "10"]].concat();
    let once = piped(&context, &args, "My name is Ada.\n");
    let twice = piped(&context, &args, "My name is Ada.\n/new\nMy name is Ada.\n/quit\nnever\n");
    let answer = once.strip_prefix("exit code 0\n--- stdout\n").unwrap().to_string();
    assert_eq!(twice, format!("exit code 0\n--- stdout\n{answer}\n{answer}"));
    let three = piped(&context, &args, "Say hello.\nSay it again.\n/system You are a pirate.\nSay hello.\n");
    assert!(three.starts_with("exit code 0\n--- stdout\n") && three.lines().count() >= 5, "{three}");
}

#[test]
fn wrong_usage() {
    let context = Context::new();
    for (args, expected) in [
        (&["complete", "--temperature=-1", "x"][..], "temperature is -1, expected a number from 0"),
        (&["complete", " "], "the prompt is empty"),
        (&["complete", "--stop", "", "x"], "expected a text that ends an answer"),
        (&["complete", "--max-new-tokens", "0", "x"], "--max-new-tokens is 0, expected a whole number from 1"),
    ] {
        let shown = context.run(args);
        assert!(shown.starts_with("exit code 2") && shown.contains(expected), "{args:?}: {shown}");
    }
    let shown = context.run(&["complete", "--in", "missing.jsonl"]);
    assert!(shown.starts_with("exit code 1") && shown.contains("cannot read missing.jsonl"), "{shown}");
}
