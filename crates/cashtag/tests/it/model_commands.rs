//! `train`, `eval` and `predict` with the real small model: what they print, what they leave behind, what they refuse.
//!
//! Figures differ a little between machines, so `#` stands for them in the snapshots; that they are right is checked where
//! it can be (sums, order, temperature), and in the tests of the engine.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use insta::assert_snapshot;
use serde_json::Value;

use super::context::{Context, files};

pub(crate) const MODEL_FILE: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";

/// Where `cashtag pull smollm2-135m` keeps the model; `None` (and a word about it) if it was not pulled.
pub(crate) fn cache() -> Option<PathBuf> {
    let variable = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let cache = variable("CASHTAG_CACHE")
        .or_else(|| Some(variable("XDG_CACHE_HOME")?.join("cashtag")))
        .or_else(|| Some(variable("HOME")?.join(".cache/cashtag")))?;
    let found = cache.join(MODEL_FILE).exists();
    if !found {
        eprintln!("skipped: {} is missing; cashtag pull smollm2-135m fetches it", cache.join(MODEL_FILE).display());
    }
    found.then_some(cache)
}

pub(crate) fn context() -> Option<Context> {
    let cache = cache()?;
    // The CPU computes the same on every run, so that is where these tests run.
    Some(Context::new().env("CASHTAG_CACHE", cache.display().to_string()).env("CUDA_VISIBLE_DEVICES", ""))
}

/// `#` for every number with a decimal point and every number that stands before a unit; blanks that only align are one.
fn masked(text: &str) -> String {
    let mut out = String::new();
    for line in text.lines() {
        let mut words: Vec<String> = Vec::new();
        for word in line.split_whitespace() {
            let is_unit = ["s,", "s", "GiB", "texts/s", "examples/s,", "tokens/s", "to", "held"].contains(&word);
            if let (true, Some(number)) = (is_unit, words.last_mut().filter(|w| w.parse::<f64>().is_ok())) {
                *number = "#".into();
            }
            words.push(word.split('=').map(mask_decimals).collect::<Vec<_>>().join("="));
        }
        out += &words.join(" ");
        out.push('\n');
    }
    out.trim_end().to_string()
}

fn mask_decimals(word: &str) -> String {
    let (mut out, mut number) = (String::new(), String::new());
    for c in word.chars().chain(['\0']) {
        if c.is_ascii_digit() || (c == '.' && !number.is_empty()) {
            number.push(c);
            continue;
        }
        // `a.csv:3` and `2.` are no decimals.
        let decimal = number.split_once('.').is_some_and(|(a, b)| !a.is_empty() && !b.is_empty());
        out += if decimal { "#" } else { &number };
        number.clear();
        out.push(c);
    }
    out.trim_end_matches('\0').to_string()
}

const TWEETS: &str = "id,text,label,kind,note
1,\"Shares jump 12% after a blowout quarter, raising guidance\",Positive,plain,\"=1+1\"
2,Company files for bankruptcy protection,Negative,plain,
3,\"The board meets on Tuesday, as planned\",Neutral,contextual,x
4,,Neutral,plain,\"two
lines\"
5,\"Great, my stop got hit at the low. Again.\",Negative,sarcastic,
6,Upgraded to buy with a higher target,Positive,plain,
";

/// A run directory that `train` left behind, made once for all tests, and what `train` printed.
fn trained() -> Option<&'static (Context, String)> {
    static RUN: OnceLock<Option<(Context, String)>> = OnceLock::new();
    let run = RUN.get_or_init(|| {
        let context = context()?;
        let args =
            "train --train-examples 40 --max-steps 2 --gradient-accumulation-steps 4 --lora-r 4 --output-dir run";
        let printed = context.run(&args.split(' ').collect::<Vec<_>>());
        Some((context, printed))
    });
    run.as_ref()
}

fn adapter() -> Option<String> {
    Some(trained()?.0.path("run/adapter").display().to_string())
}

fn piped(context: &Context, args: &[&str], input: &[u8]) -> String {
    let mut command = context.command(args);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    // A program that ends early closes its end.
    let _ = child.stdin.take().unwrap().write_all(input);
    context.shown(&child.wait_with_output().unwrap())
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn stdout(context: &Context, args: &[&str]) -> String {
    let output = context.command(args).output().unwrap();
    assert!(output.status.success(), "{}", context.shown(&output));
    String::from_utf8(output.stdout).unwrap()
}

fn probabilities(object: &Value) -> [f64; 3] {
    ["p_positive", "p_neutral", "p_negative"].map(|name| object[name].as_f64().unwrap())
}

#[test]
fn one_text() {
    let Some(context) = context() else { return };
    assert_snapshot!(masked(&context.run(&["predict", "Shares plunge as the company files for bankruptcy"])), @"
    exit code 0
    --- stdout
    Positive # % Positive # · Neutral # · Negative #
    --- stderr
    no --adapter: the base model smollm2-135m answers, which was not fine-tuned for this
    ");
    let json = stdout(&context, &["predict", "-q", "--json", "Shares plunge as the company files for bankruptcy"]);
    let object: Value = serde_json::from_str(&json).unwrap();
    let p = probabilities(&object);
    assert!((p.iter().sum::<f64>() - 1.0).abs() < 1e-5, "{object}");
    assert_eq!(object["confidence"].as_f64(), p.iter().copied().reduce(f64::max));
    let keys: Vec<&String> = object.as_object().unwrap().keys().collect();
    assert_eq!(keys, ["text", "label", "confidence", "p_positive", "p_neutral", "p_negative"]);
}

#[test]
fn a_precision_is_what_was_said() {
    let Some(context) = context() else { return };
    let answer = |precision: &str| {
        let json = stdout(&context, &["predict", "-q", "--json", "--precision", precision, "Upgraded to buy"]);
        probabilities(&serde_json::from_str(&json).unwrap())
    };
    let (wide, narrow) = (answer("f32"), answer("bf16"));
    let far = wide.iter().zip(narrow).map(|(w, n)| (w - n).abs()).fold(0.0, f64::max);
    assert!(far > 0.0 && far < 0.05, "{wide:?} {narrow:?}");
    let refused = context.run(&["predict", "-q", "--device", "cpu", "--precision", "fp16", "Upgraded to buy"]);
    assert!(refused.starts_with("exit code 2") && refused.contains("bf16 or f32, not in fp16"), "{refused}");
}

#[test]
fn lines_of_standard_input() {
    let Some(context) = context() else { return };
    let input = "\u{feff}Upgraded to buy\r\n\nCompany files for bankruptcy".as_bytes();
    assert_snapshot!(masked(&piped(&context, &["predict", "-"], input)), @"
    exit code 0
    --- stdout
    Positive # % Positive # · Neutral # · Negative # Upgraded to buy
    –
    Positive # % Positive # · Neutral # · Negative # Company files for bankruptcy
    --- stderr
    no --adapter: the base model smollm2-135m answers, which was not fine-tuned for this
    lines without a text: 1
    ");
    assert_snapshot!(masked(&piped(&context, &["predict", "--json", "-q"], b"Upgraded to buy\n\nbad \xff\nmore\n")), @r#"
        exit code 1
        --- stdout
        {"text":"Upgraded to buy","label":"Positive","confidence":#,"p_positive":#,"p_neutral":#,"p_negative":#}
        {"text":"","label":null,"confidence":null,"p_positive":null,"p_neutral":null,"p_negative":null}
        --- stderr
        error: standard input:3: the text is not UTF-8
        hint: convert it, for example with iconv -f latin1 -t utf-8
        "#);
}

#[test]
fn injected_instructions_are_counted() {
    let Some(context) = context() else { return };
    context.write("two.csv", "text,label\nUpgraded to buy,Positive\nFiles for bankruptcy,Negative\n");
    let args = ["eval", "-q", "--data", "two.csv", "--inject"];
    let table = stdout(&context, &args);
    assert!(table.contains("label turned by") && table.contains("nothing asked"), "{table}");
    let judged: Value = serde_json::from_str(&stdout(&context, &[&args[..], &["--json"]].concat())).unwrap();
    let injected = &judged["models"][0]["injected"];
    assert_eq!(injected["kinds"].as_array().unwrap().len(), 10);
    for row in injected["kinds"].as_array().unwrap().iter().chain([&injected["control"]]) {
        let (obeyed, changed) = (&row["obeyed"], &row["changed"]);
        assert_eq!((obeyed["of"].as_u64(), changed["of"].as_u64()), (Some(2), Some(2)), "{row}");
        assert!(obeyed["texts"].as_u64() <= changed["texts"].as_u64(), "who obeys has changed: {row}");
    }
    assert_eq!(injected["all"]["obeyed"]["of"], 20);
}

#[test]
fn a_file_keeps_its_columns_and_its_order() {
    let Some(context) = context() else { return };
    context.write("tweets.csv", TWEETS);
    assert_snapshot!(masked(&context.run(&["predict", "--in", "tweets.csv", "--out", "scored.csv"])), @r#"
    exit code 0
    --- stdout
    scored.csv: 5 texts, Positive 5, Neutral 0, Negative 0 · rows without a text: 1 · # texts/s
    --- stderr
    no --adapter: the base model smollm2-135m answers, which was not fine-tuned for this
    tweets.csv: text from "text" (guessed)
    some names are taken; the new columns are predicted_label, confidence, p_positive, p_neutral, p_negative
    "#);
    assert_snapshot!(masked(&read(&context.path("scored.csv"))), @r#"
    id,text,label,kind,note,predicted_label,confidence,p_positive,p_neutral,p_negative
    1,"Shares jump 12% after a blowout quarter, raising guidance",Positive,plain,'=1+1,Positive,#,#,#,#
    2,Company files for bankruptcy protection,Negative,plain,,Positive,#,#,#,#
    3,"The board meets on Tuesday, as planned",Neutral,contextual,x,Positive,#,#,#,#
    4,,Neutral,plain,"two
    lines",,,,,
    5,"Great, my stop got hit at the low. Again.",Negative,sarcastic,,Positive,#,#,#,#
    6,Upgraded to buy with a higher target,Positive,plain,,Positive,#,#,#,#
    "#);
    // The other formats hold the same.
    stdout(&context, &["predict", "-q", "--in", "tweets.csv", "--out", "deep/scored.parquet"]);
    stdout(&context, &["predict", "-q", "--in", "deep/scored.parquet", "--out", "again.jsonl"]);
    let rows: Vec<Value> =
        read(&context.path("again.jsonl")).lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    let keys: Vec<&String> = rows[0].as_object().unwrap().keys().collect();
    assert_snapshot!(format!("{keys:?}"), @r#"["id", "text", "label", "kind", "note", "predicted_label", "confidence", "p_positive", "p_neutral", "p_negative", "predicted_label_2", "predicted_confidence", "predicted_p_positive", "predicted_p_neutral", "predicted_p_negative"]"#);
    assert_eq!(rows.len(), 6);
    for (i, row) in rows.iter().enumerate() {
        assert_eq!(row["id"], (i + 1).to_string());
        assert_eq!(row["predicted_label"], row["predicted_label_2"]);
        assert_eq!(row["predicted_label"].is_null(), i == 3, "only row 4 has no text");
    }
    assert_eq!(rows[0]["note"], "=1+1");
    assert_eq!(rows[3]["note"], "two\nlines");
    assert_eq!(rows[3]["confidence"], Value::Null);
    let csv = stdout(&context, &["predict", "-q", "--in", "tweets.csv"]);
    assert_eq!(csv, read(&context.path("scored.csv")));
    let lines = stdout(&context, &["predict", "-q", "--in", "tweets.csv", "--json"]);
    assert_eq!(lines.lines().count(), 6);
    assert!(lines.starts_with(r#"{"id":"1","text":"Shares jump 12%"#), "{lines}");
}

#[test]
fn long_texts_and_chat_files() {
    let Some(context) = context() else { return };
    context.write("long.csv", format!("text\nshort\n{}\n", "very long ".repeat(10_000)));
    assert_eq!(stdout(&context, &["predict", "-q", "--in", "long.csv"]).lines().count(), 3);
    assert_snapshot!(context.run(&["predict", "-q", "--in", "long.csv", "--too-long", "error"]), @"
        exit code 1
        --- stdout
        text,label,confidence,p_positive,p_neutral,p_negative
        --- stderr
        error: long.csv:3: a text of 100000 bytes has more than 509 tokens with its prompt
        hint: raise max_seq_length, or truncate
        ");
    context.write("chat.jsonl", "{\"messages\":[{\"role\":\"system\",\"content\":\"s\"},{\"role\":\"user\",\"content\":\"Up 5%\"},{\"role\":\"assistant\",\"content\":\"Positive\"}]}\n");
    let chat: Value = serde_json::from_str(&stdout(&context, &["predict", "-q", "--in", "chat.jsonl"])).unwrap();
    let text: Value = serde_json::from_str(&stdout(&context, &["predict", "-q", "--json", "Up 5%"])).unwrap();
    assert_eq!(probabilities(&chat), probabilities(&text));
}

#[test]
fn what_cannot_be_classified() {
    let Some(context) = context() else { return };
    context.write("empty.csv", "");
    context.write("header.csv", "text,label\n");
    context.write("latin1.csv", b"text\nfine\ncaf\xe9\n");
    context.write("ragged.csv", "text,label\na,b,c\n");
    context.write("other.csv", "text,mood\na,Positive\n");
    context.write("unknown.csv", "text,label\na,splendid\n");
    let mut said = String::new();
    for args in [
        &["predict", ""][..],
        &["predict", "text", "--in", "empty.csv"],
        &["predict", "text", "--out", "x.csv"],
        &["predict", "--in", "nowhere.csv"],
        &["predict", "--in", "empty.csv"],
        &["predict", "--in", "header.csv"],
        &["predict", "--in", "latin1.csv"],
        &["predict", "--in", "ragged.csv"],
        &["predict", "--in", "other.csv", "--text-column", "tweet"],
        &["predict", "text", "--adapter", "nowhere"],
        &["predict", "text", "--model", "nowhere.gguf"],
        &["eval", "--data", "nowhere.csv"],
        &["eval", "--data", "empty.csv"],
        &["eval", "--data", "other.csv"],
        &["eval", "--data", "unknown.csv"],
        &["eval", "--data", "unknown.csv", "--label-map", "splendid"],
        &["eval", "--data", "unknown.csv", "--label-map", "splendid=Positive", "--by", "kind"],
        &["eval", "--model", "a", "--model", "b", "--adapter", "c"],
        &["train", "--data", "unknown.csv", "--output-dir", "run"],
        &["train", "--data", "unknown.csv", "--label-map", "splendid=Positive", "--output-dir", "run"],
    ] {
        let shown = context.run(&[args, &["-q"]].concat());
        let usage = shown.split("\n\nUsage:").next().unwrap_or_default();
        said += &format!("$ {}\n{usage}\n\n", args.join(" "));
    }
    assert_snapshot!(said.replace("\n--- stderr", "").trim_end(), @r#"
        $ predict 
        exit code 2
        error: the text is empty
        hint: cashtag predict "Tech stocks are up"

        $ predict text --in empty.csv
        exit code 2
        error: the argument '[TEXT]' cannot be used with '--in <FILE>'

        $ predict text --out x.csv
        exit code 2
        error: the argument '[TEXT]' cannot be used with '--out <FILE>'

        $ predict --in nowhere.csv
        exit code 1
        error: cannot read nowhere.csv: No such file or directory (os error 2)
        hint: check the path

        $ predict --in empty.csv
        exit code 1
        error: empty.csv: the file is empty
        hint: the file needs a column of texts

        $ predict --in header.csv
        exit code 1
        error: header.csv: there are no rows in it
        hint: the file needs a column of texts

        $ predict --in latin1.csv
        exit code 1
        error: latin1.csv:3: the text is not UTF-8
        hint: convert the file, for example with iconv -f latin1 -t utf-8

        $ predict --in ragged.csv
        exit code 1
        error: ragged.csv:2: expected 2 cells as in the header, found 3
        hint: texts with commas or line breaks must be quoted

        $ predict --in other.csv --text-column tweet
        exit code 1
        error: other.csv: no column "tweet"; the columns are "text", "mood"
        hint: give one of them to --text-column

        $ predict text --adapter nowhere
        exit code 1
        error: nowhere: no adapter_config.json in it
        hint: --adapter takes a directory that PEFT or cashtag wrote

        $ predict text --model nowhere.gguf
        exit code 1
        error: nowhere.gguf: no such file or directory
        hint: --model takes smollm2-135m, OWNER/NAME of the hub, a checkpoint directory or a .gguf file

        $ eval --data nowhere.csv
        exit code 1
        error: nowhere.csv: no such file or directory
        hint: check the path

        $ eval --data empty.csv
        exit code 1
        error: empty.csv: the file is empty
        hint: a data file has a column of texts and one of labels

        $ eval --data other.csv
        exit code 1
        error: other.csv: cannot tell which column is the label; the columns are "text", "mood"
        hint: name it with --label-column

        $ eval --data unknown.csv
        exit code 1
        error: unknown.csv:2: unknown label "splendid", expected Positive, Neutral or Negative
        hint: map it, for example --label-map splendid=Neutral, or name the labels of the data with --labels

        $ eval --data unknown.csv --label-map splendid
        exit code 2
        error: --label-map: label map entry "splendid": expected value=label
        hint: write it as 0=Negative,1=Neutral,2=Positive

        $ eval --data unknown.csv --label-map splendid=Positive --by kind
        exit code 2
        error: unknown.csv says nothing about the kind of a text
        hint: leave --by kind out

        $ eval --model a --model b --adapter c
        exit code 2
        error: 2 models and 1 adapters do not make pairs
        hint: give one --adapter for each --model, `--adapter none` where there is none

        $ train --data unknown.csv --output-dir run
        exit code 1
        error: unknown.csv:2: unknown label "splendid", expected Positive, Neutral or Negative
        hint: map it, for example --label-map splendid=Neutral, or name the labels of the data with --labels

        $ train --data unknown.csv --label-map splendid=Positive --output-dir run
        exit code 2
        error: unknown.csv leaves no examples for evaluation
        hint: give more data, or another eval_fraction
        "#);
    assert!(!context.path("run").exists(), "nothing is left of a run that could not begin");
}

#[cfg(unix)]
#[test]
fn a_device_is_not_replaced() {
    let Some(context) = context() else { return };
    context.write("tweets.csv", TWEETS);
    std::os::unix::fs::symlink("/dev/null", context.path("null.csv")).unwrap();
    assert_snapshot!(context.run(&["predict", "--in", "tweets.csv", "--out", "null.csv"]), @"
        exit code 1
        --- stderr
        error: null.csv is no regular file
        hint: name a file such as scored.csv, or leave --out out to print
        ");
    assert!(context.path("null.csv").is_symlink());
}

#[test]
fn training_leaves_an_adapter() {
    let Some((context, printed)) = trained() else { return };
    let printed = printed.lines().filter(|line| !line.starts_with("training:")).collect::<Vec<_>>().join("\n");
    let (device, rest) = printed.split_once(" on ").and_then(|(a, b)| Some((a, b.split_once('\n')?.1))).unwrap();
    assert_snapshot!(masked(&format!("{device} on [DEVICE]\n{rest}")), @"
        exit code 0
        --- stdout
        run/adapter: step 2 of 2, loss #, eval_loss #, temperature # · trained # s, # examples/s, # tokens/s · peak memory # GiB (planned #)
        --- stderr
        SmolLM2 135M Instruct, GGUF Q4_1, 98 MB on [DEVICE]
        built-in corpus: # to train on, # to validate, # held out; run directory run
        to judge it: cashtag eval --adapter run/adapter
        ");
    let left = files(&context.path("run")).join("\n");
    // Its name has the time in it.
    let (left, events) =
        left.rsplit_once("tensorboard/").map(|(a, b)| (format!("{a}{}", b.split_once('\n').unwrap().1), b)).unwrap();
    assert!(events.starts_with("events.out.tfevents."), "{events}");
    assert_snapshot!(left, @"
        adapter/adapter_config.json
        adapter/adapter_model.safetensors
        adapter/cashtag.json
        checkpoint-2/adapter_config.json
        checkpoint-2/adapter_model.safetensors
        checkpoint-2/cashtag.json
        checkpoint-2/trainer_state.json
        checkpoint-2/training_state.safetensors
        config.toml
        dataset.csv
        fine_tune_dataset.jsonl
        held_out.csv
        trainer_log.jsonl
        validation.csv
        ");
    let log = read(&context.path("run/trainer_log.jsonl"));
    assert!(log.lines().all(|l| serde_json::from_str::<Value>(l).unwrap()["step"].is_number()), "{log}");
    // The same command again says what is the matter; with --resume it ends where it had ended.
    let again = context.run(&["train", "--config", "run/config.toml", "--output-dir", "run"]);
    assert_snapshot!(again.lines().skip(1).filter(|l| !l.contains(" on ")).collect::<Vec<_>>().join("\n"), @"
    --- stderr
    built-in corpus: 39 to train on, 1 to validate, 243 held out; run directory run
    error: run already holds checkpoints of a run
    ");
    let weights = std::fs::read(context.path("run/adapter/adapter_model.safetensors")).unwrap();
    stdout(context, &["train", "-q", "--config", "run/config.toml", "--output-dir", "run", "--resume", "auto"]);
    assert!(weights == std::fs::read(context.path("run/adapter/adapter_model.safetensors")).unwrap());
}

#[test]
fn training_goes_on_from_an_adapter() {
    let (Some(context), Some(adapter)) = (context(), adapter()) else { return };
    assert_snapshot!(context.run(&["train", "-q", "--adapter", &adapter, "--lora-r", "8"]), @"
        exit code 2
        --- stderr
        error: --lora-r: lora.r cannot be changed, the adapter that training begins with has its own
        hint: leave --lora-r or --adapter out
        ");
    let begun = stdout(
        &context,
        &["train", "-q", "--adapter", &adapter, "--train-examples", "40", "--max-steps", "1", "--output-dir", "more"],
    );
    assert!(begun.contains("step 1 of 1"), "{begun}");
    let config = read(&context.path("more/config.toml"));
    let followed: Vec<&str> = config.lines().filter(|l| l.ends_with("# follows model.adapter")).collect();
    let names: Vec<&str> = followed.iter().filter_map(|l| l.split_once(' ')).map(|(name, _)| name).collect();
    assert_snapshot!(names.join(" "), @"system_message labels max_seq_length r");
    let first = |log: &str| -> Value { serde_json::from_str(log.lines().next().unwrap()).unwrap() };
    let loss = |entry: Value| entry["loss"].as_f64().unwrap();
    let (before, after) = (
        loss(first(&read(&trained().unwrap().0.path("run/trainer_log.jsonl")))),
        loss(first(&read(&context.path("more/trainer_log.jsonl")))),
    );
    assert!(after < before - 0.2, "the loss begins where it had ended: {after}, at first {before}");
}

#[cfg(unix)]
#[test]
fn training_can_be_stopped_and_goes_on() {
    let Some(context) = context() else { return };
    let args = "train --train-examples 40 --max-steps 8 --gradient-accumulation-steps 1 --logging-steps 1 --lora-r 4 --output-dir run";
    let args: Vec<&str> = args.split(' ').collect();
    let undisturbed = args.iter().map(|a| if *a == "run" { "whole" } else { a }).chain(["-q"]).collect::<Vec<_>>();
    stdout(&context, &undisturbed);
    let child = context.command(&args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let log = context.path("run/trainer_log.jsonl");
    while !std::fs::metadata(&log).is_ok_and(|m| m.len() > 0) {
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    let shown = context.shown(&child.wait_with_output().unwrap());
    let said: Vec<&str> = shown.lines().filter(|l| l.starts_with("exit") || l.starts_with("stop")).collect();
    assert_snapshot!(said.join("\n"), @"
        exit code 130
        stopping; Ctrl-C again stops at once
        stopped; a checkpoint is saved. To go on: cashtag train --config run/config.toml --output-dir run --resume auto
        ");
    let command = shown.split_once("To go on: cashtag ").and_then(|(_, c)| c.lines().next()).unwrap();
    stdout(&context, &command.split(' ').chain(["-q"]).collect::<Vec<_>>());
    let weights = |run: &str| std::fs::read(context.path(run).join("adapter/adapter_model.safetensors")).unwrap();
    assert!(weights("run") == weights("whole"), "a stopped run ends as an undisturbed one");
}

#[test]
fn predictions_use_the_stored_temperature() {
    let (Some(context), Some(adapter)) = (context(), adapter()) else { return };
    let copy = context.path("copy");
    std::fs::create_dir_all(&copy).unwrap();
    for entry in std::fs::read_dir(&adapter).unwrap().flatten() {
        std::fs::copy(entry.path(), copy.join(entry.file_name())).unwrap();
    }
    let mut classifier: Value = serde_json::from_str(&read(&copy.join("cashtag.json"))).unwrap();
    let temperature = classifier["temperature"].as_f64().unwrap();
    assert!(temperature > 0.0 && temperature != 1.0);
    classifier["temperature"] = 1.into();
    std::fs::write(copy.join("cashtag.json"), classifier.to_string()).unwrap();
    let answer = |adapter: &str| -> Value {
        let args = ["predict", "--json", "Upgraded to buy", "--adapter", adapter];
        let output = context.command(&args).output().unwrap();
        assert!(output.stderr.is_empty(), "{}", context.shown(&output));
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let (scaled, plain) = (probabilities(&answer(&adapter)), probabilities(&answer("copy")));
    let powers = plain.map(|p| p.powf(1.0 / temperature));
    for (scaled, power) in scaled.iter().zip(powers) {
        assert!((scaled - power / powers.iter().sum::<f64>()).abs() < 1e-4, "{scaled:?} {plain:?} {temperature}");
    }
    // Whose adapter it is.
    classifier["base_model"] = "no/where".into();
    std::fs::write(copy.join("cashtag.json"), classifier.to_string()).unwrap();
    assert_snapshot!(context.run(&["predict", "-q", "text", "--adapter", "copy"]), @"
        exit code 1
        --- stderr
        error: the adapter copy was trained on no/where
          caused by: no/where is not on this machine
        hint: if that model lies elsewhere, name it with --model
        hint: cashtag pull no/where
        ");
    let config = read(&copy.join("adapter_config.json")).replace("\"r\": 4", "\"r\": 2");
    std::fs::write(copy.join("adapter_config.json"), config).unwrap();
    assert_snapshot!(context.run(&["predict", "-q", "text", "--adapter", "copy", "--model", "smollm2-135m"]), @"
        exit code 1
        --- stderr
        error: copy/adapter_model.safetensors: tensor base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight: expected shape [2, 576], found [4, 576]
        hint: is this adapter for another model?
        ");
}

#[test]
fn one_model_is_judged() {
    let Some(context) = context() else { return };
    context.write("tweets.jsonl", judged_tweets());
    let shown = context.run(&["eval", "-q", "--data", "tweets.jsonl", "--by", "kind", "--out", "judged"]);
    assert_snapshot!(masked(&shown), @"
    exit code 0
    --- stdout
    smollm2-135m
    tweets.jsonl: 5 texts

    accuracy #% [#, #]
    macro F1 #% [#, #]
    weighted F1 #% [#, #]
    log-loss # [#, #]
    calibration error #%
    majority baseline #%

    class texts precision recall F1 → Positive → Neutral → Negative
    Positive 2 #% #% #% 2 0 0
    Neutral 1 #% #% #% 1 0 0
    Negative 2 #% #% #% 2 0 0

    kind texts accuracy macro F1
    plain 3 #% [#, #] #% [#, #]
    contextual 1 #% [#, #] #% [#, #]
    sarcastic 1 #% [#, #] #% [#, #]

    In brackets: 95% intervals, bootstrap over the texts.
    ");
    assert_snapshot!(files(&context.path("judged")).join("\n"), @"
        metrics.json
        predictions.csv
        report.html
        ");
    assert_snapshot!(masked(read(&context.path("judged/predictions.csv")).lines().take(2).collect::<Vec<_>>().join("\n").as_str()), @r#"
    text,label,kind,predicted_label,confidence,p_positive,p_neutral,p_negative
    "Shares jump 12% after a blowout quarter, raising guidance",Positive,plain,Positive,#,#,#,#
    "#);
    let page = read(&context.path("judged/report.html"));
    assert!(page.contains("cashtag eval: tweets.jsonl") && !page.contains("After fine-tuning"));
    let printed: Value =
        serde_json::from_str(&stdout(&context, &["eval", "-q", "--data", "tweets.jsonl", "--json"])).unwrap();
    let written: Value = serde_json::from_str(&read(&context.path("judged/metrics.json"))).unwrap();
    for figures in [&printed, &written] {
        assert_eq!(figures["examples"], 5);
        assert_eq!(figures["models"][0]["by_kind"]["plain"]["examples"], 3);
    }
    assert_eq!(printed["models"][0]["metrics"], written["models"][0]["metrics"]);
}

/// [`TWEETS`] with a text each, as JSON lines.
fn judged_tweets() -> String {
    let rows = [
        ("Shares jump 12% after a blowout quarter, raising guidance", "Positive", "plain"),
        ("Company files for bankruptcy protection", "Negative", "plain"),
        ("The board meets on Tuesday, as planned", "Neutral", "contextual"),
        ("Great, my stop got hit at the low. Again.", "Negative", "sarcastic"),
        ("Upgraded to buy with a higher target", "Positive", "plain"),
    ];
    let row =
        |(text, label, kind): (&str, &str, &str)| serde_json::json!({ "text": text, "label": label, "kind": kind });
    rows.map(|r| row(r).to_string() + "\n").concat()
}

#[test]
fn several_models_stand_side_by_side() {
    let (Some(context), Some(adapter)) = (context(), adapter()) else { return };
    context.write("tweets.jsonl", judged_tweets());
    let context = context.filter(adapter.clone(), "[ADAPTER]");
    let run = context.command(&[
        "eval",
        "-q",
        "--data",
        "tweets.jsonl",
        "--adapter",
        "none",
        "--adapter",
        &adapter,
        "--out",
        "two",
    ]);
    let shown = { run }.output().unwrap();
    let shown = masked(&context.shown(&shown)).replace("+#", "±#").replace("-#", "±#");
    let digits = |line: &str| line.replace(|c: char| c.is_ascii_digit(), "#");
    let shown = shown.lines().map(|l| if l.contains(" where A is ") { digits(l) } else { l.to_string() });
    assert_snapshot!(shown.collect::<Vec<_>>().join("\n"), @"
        exit code 0
        --- stdout
        tweets.jsonl: 5 texts
        A smollm2-135m
        B smollm2-135m + [ADAPTER], temperature #

        A B
        accuracy #% [#, #] #% [#, #]
        macro F1 #% [#, #] #% [#, #]
        weighted F1 #% [#, #] #% [#, #]
        log-loss # [#, #] # [#, #]
        calibration error #% #%
        majority baseline #% #%
        F1 Positive #% #%
        F1 Neutral #% #%
        F1 Negative #% #%

        against A B
        accuracy, points ±# [±#, ±#]
        macro F1, points ±# [±#, ±#]
        log-loss ±# [±#, ±#]
        right where A is wrong #
        wrong where A is right #
        McNemar p #

        In brackets: 95% intervals, bootstrap over the texts.
        ");
    let page = read(&context.path("two/report.html"));
    assert!(page.contains("After fine-tuning") && !page.contains("Two models side by side"));
    let figures: Value = serde_json::from_str(&read(&context.path("two/metrics.json"))).unwrap();
    let (base, tuned) = (&figures["models"][0], &figures["models"][1]);
    assert_eq!((&base["adapter"], base["temperature"].as_f64()), (&Value::Null, Some(1.0)));
    let difference = tuned["metrics"]["log_loss"]["value"].as_f64().unwrap()
        - base["metrics"]["log_loss"]["value"].as_f64().unwrap();
    assert!((tuned["against_first"]["log_loss"]["value"].as_f64().unwrap() - difference).abs() < 1e-9);
    // Three: a page for each that is compared with the first. The same model twice differs in nothing.
    stdout(
        &context,
        &[
            "eval",
            "-q",
            "--data",
            "tweets.jsonl",
            "--adapter",
            &adapter,
            "--adapter",
            &adapter,
            "--adapter",
            "none",
            "--out",
            "three",
        ],
    );
    assert_snapshot!(files(&context.path("three")).join(" "), @"metrics.json predictions.csv report-B.html report-C.html");
    let figures: Value = serde_json::from_str(&read(&context.path("three/metrics.json"))).unwrap();
    assert_eq!(figures["models"][1]["against_first"]["accuracy"]["value"], 0.0);
    assert_eq!(figures["models"][1]["metrics"], figures["models"][0]["metrics"]);
    assert!(read(&context.path("three/report-B.html")).contains("Two models side by side"));
}

#[test]
fn an_interrupted_file_goes_on() {
    let Some(context) = context() else { return };
    let rows: String = (0..90).map(|i| format!("{i},Shares rise {i} %\n")).collect();
    context.write("in.csv", format!("id,text\n{rows}"));
    let args = ["predict", "--in", "in.csv", "--out", "out.csv", "--max-seq-length", "160"];
    let mut first = context.command(&args).stderr(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
    let journal = context.path("out.csv.answers");
    // Killed without a word as soon as the first answers are kept, if it does not end before.
    while std::fs::metadata(&journal).map_or(0, |m| m.len()) <= 40 && first.try_wait().unwrap().is_none() {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    let _ = first.kill();
    let killed = !first.wait().unwrap().success();
    assert_eq!(killed, journal.exists());
    let again = context.command(&args).output().unwrap();
    let said = String::from_utf8_lossy(&again.stderr).into_owned();
    assert!(again.status.success() && (!killed || said.contains("going on after")), "{said}");
    assert!(!journal.exists());
    let whole = std::fs::read_to_string(context.path("out.csv")).unwrap();
    let ids: Vec<&str> = whole.lines().skip(1).map(|l| l.split(',').next().unwrap()).collect();
    assert_eq!(ids, (0..90).map(|i| i.to_string()).collect::<Vec<_>>());
    // The same as in one go.
    assert!(context.command(&args).output().unwrap().status.success());
    assert_eq!(std::fs::read_to_string(context.path("out.csv")).unwrap(), whole);
}
