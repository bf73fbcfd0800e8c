//! What is exported, read by the programs that it is for: Transformers, PEFT and llama.cpp (`interop.py`), on the real
//! small model. Skipped, with a line that says so, where they are not there.
//!
//! Adapters of the tests are not trained: their factors are noise of a size that changes the answers, which asks more of
//! agreement than a good adapter would.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use cashtag_llama::adapter::{Adapter, ClassifierConfig};
use cashtag_llama::checkpoint::Checkpoint;
use cashtag_llama::gguf::Gguf;
use cashtag_llama::lora::{LoraConfig, LoraTensors, Module, slots};
use cashtag_llama::prompt::Label;
use serde_json::{Value, json};

use super::context::{Context, files};
use super::model_commands::{MODEL_FILE, cache, context};

const SYSTEM: &str = "Judge the mood of a stock-market tweet: Positive, Neutral or Negative.";
const LABELS: [&str; 3] = ["Positive", "Neutral", "Negative"];
/// What two adapters count in their sum.
const SUM: [f32; 2] = [0.75, 0.5];
const TEXTS: [&str; 5] = [
    "Upgraded to buy with a higher target",
    "so the new CFO sold again 🙃 great sign",
    "The board meets on Tuesday, as planned",
    "$QLTX closes the gap and holds 41.5, adding here",
    "Company files for bankruptcy protection",
];

/// A Python that has the packages, or a line that says that there is none.
fn python() -> Option<String> {
    let python = std::env::var("CASHTAG_TEST_PYTHON").unwrap_or_else(|_| "python3".into());
    let found = Command::new(&python).args(["-c", "import torch, transformers, peft, gguf"]).output();
    if found.is_ok_and(|o| o.status.success()) {
        return Some(python);
    }
    eprintln!(
        "skipped: {python} has no torch, transformers, peft and gguf; CASHTAG_TEST_PYTHON names one that has, and llama-cpp-python for llama.cpp"
    );
    None
}

fn ask(python: &str, job: &Value) -> BTreeMap<String, Value> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/interop.py");
    let mut child = Command::new(python)
        .arg(script)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(job.to_string().as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {said}"))
}

/// An adapter of noise, saved in `dir`.
fn save_adapter(dir: &Path, model: &Path, lora: LoraConfig) {
    let checkpoint = Checkpoint::open(model).unwrap();
    let config = checkpoint.config();
    let mut tensors = LoraTensors::init(&lora, config, 7);
    // Another draw of the same generator, scaled, for the factors that begin as zeros.
    let mut noise = LoraTensors::init(&lora, config, 8).a.into_iter().cycle();
    tensors.b.iter_mut().zip(&mut noise).for_each(|(b, n)| *b = 0.7 * n);
    if lora.use_dora {
        // The norms of the weights, a little off.
        for slot in slots(&lora, config) {
            let weight =
                checkpoint.weight(&format!("model.layers.{}.{}.weight", slot.layer, slot.module.path())).unwrap();
            let mut values = vec![0f32; slot.in_features * slot.out_features];
            weight.read_rows(0..slot.out_features, &mut values).unwrap();
            let norms = values.chunks(slot.in_features).map(|r| r.iter().map(|w| w * w).sum::<f32>().sqrt());
            tensors.magnitude.extend(norms.enumerate().map(|(i, n)| n * (0.9 + 0.2 * (i % 7) as f32 / 6.0)));
        }
    }
    let classifier = ClassifierConfig {
        labels: LABELS.map(Label::new).to_vec(),
        system_message: Some(SYSTEM.into()),
        max_seq_length: 512,
        temperature: 1.0,
        base_model: model.display().to_string(),
    };
    let adapter = Adapter { lora, tensors, base_model: Some("base".into()), classifier: Some(classifier) };
    adapter.save(dir, config).unwrap();
}

fn all_linear() -> LoraConfig {
    LoraConfig { r: 8, lora_alpha: 16.0, ..Default::default() }
}

/// Our own probabilities, in f32.
fn ours(context: &Context, adapter: &Path, texts: &[&str]) -> Vec<Vec<f64>> {
    ours_of(context, "--adapter", adapter, SYSTEM, texts)
}

/// What `predict` with this adapter or this model says.
fn ours_of(context: &Context, flag: &str, path: &Path, system: &str, texts: &[&str]) -> Vec<Vec<f64>> {
    let path = path.display().to_string();
    let args = ["predict", "-", "--json", "-q", "--precision", "f32", "--system-message", system, flag, &path];
    let mut child =
        context.command(&args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all((texts.join("\n") + "\n").as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", context.shown(&output));
    let object = |line: &str| -> Value { serde_json::from_str(line).unwrap() };
    let row = |o: Value| ["p_positive", "p_neutral", "p_negative"].map(|k| o[k].as_f64().unwrap()).to_vec();
    String::from_utf8(output.stdout).unwrap().lines().map(|l| row(object(l))).collect()
}

fn rows(value: &Value) -> Vec<Vec<f64>> {
    serde_json::from_value(value.clone()).unwrap()
}

fn best(row: &[f64]) -> usize {
    (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap()
}

/// The probabilities before they were calibrated.
fn without_temperature(row: &[f64], temperature: f64) -> Vec<f64> {
    let mut row: Vec<f32> = row.iter().map(|&p| p as f32).collect();
    cashtag_eval::apply_temperature(&mut row, 1.0 / temperature);
    row.into_iter().map(f64::from).collect()
}

/// How far the best label is ahead of the next.
fn lead(row: &[f64]) -> f64 {
    let mut sorted = row.to_vec();
    sorted.sort_by(|a, b| b.total_cmp(a));
    sorted[0] - sorted[1]
}

/// Largest difference of a probability.
fn distance(a: &[Vec<f64>], b: &[Vec<f64>]) -> f64 {
    assert!(!a.is_empty() && a.len() == b.len(), "{} and {} texts", a.len(), b.len());
    a.iter().flatten().zip(b.iter().flatten()).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
}

fn model_file() -> Option<PathBuf> {
    Some(cache()?.join(MODEL_FILE))
}

fn export(context: &Context, args: &[&str]) -> String {
    let shown = context.run(&[&["export", "-q"], args].concat());
    assert!(shown.starts_with("exit code 0"), "{args:?}: {shown}");
    shown
}

/// Adapters go both ways with the same label probabilities in f32; exported models give the same labels.
#[test]
fn others_read_what_is_written() {
    let (Some(context), Some(model)) = (context(), model_file()) else { return };
    let Some(python) = python() else { return };
    let path = |name: &str| context.path(name).display().to_string();
    save_adapter(&context.path("lora"), &model, all_linear());
    let some = LoraConfig {
        r: 4,
        lora_alpha: 4.0,
        use_rslora: true,
        target_modules: vec![Module::QProj, Module::VProj, Module::UpProj],
        layers_to_transform: Some(vec![0, 1, 15, 29]),
        ..Default::default()
    };
    save_adapter(&context.path("rslora"), &model, some);
    let dora = LoraConfig { use_dora: true, layers_to_transform: Some(vec![0, 5, 10, 20, 29]), ..all_linear() };
    save_adapter(&context.path("dora"), &model, dora);
    let shards = ["--type", "f32", "--max-shard-size", "200"];
    export(&context, &[&["--to", "merged", "--adapter", "lora", "--out", "merged32"], &shards[..]].concat());
    export(&context, &["--to", "merged", "--type", "f32", "--adapter", "dora", "--out", "merged-dora"]);
    export(&context, &["--to", "merged", "--adapter", "lora", "--out", "merged16"]);
    export(&context, &["--to", "gguf", "--type", "f16", "--adapter", "lora", "--out", "f16.gguf"]);
    context.write("texts.jsonl", jsonl(&TEXTS));
    for kind in ["q8_0", "q4_0"] {
        let args = ["--to", "gguf", "--type", kind, "--adapter", "lora", "--calibrate", "texts.jsonl"];
        export(&context, &[&args[..], &["--out", &format!("{kind}.gguf")]].concat());
    }
    // The Hugging Face directory as a base: metadata and tokenizer are made anew.
    export(&context, &["--to", "gguf", "--model", "merged16", "--out", "again.gguf"]);
    export(&context, &["--to", "gguf-lora", "--adapter", "lora", "--out", "lora.gguf"]);
    export(&context, &["--to", "gguf-lora", "--adapter", "rslora", "--out", "rslora.gguf"]);
    // A checkpoint as training leaves it is an adapter too.
    let train = "train -q --train-examples 8 --max-steps 2 --learning-rate 2e-3 --save-strategy steps --save-steps 2 --eval-strategy no --output-dir run";
    let shown = context.run(&train.split(' ').collect::<Vec<_>>());
    assert!(shown.starts_with("exit code 0"), "{shown}");
    let state = context.path("run/checkpoint-2/trainer_state.json");

    let said = ask(
        &python,
        &json!({
            "model": model.display().to_string(), "work": path("."), "system": SYSTEM, "labels": LABELS, "texts": TEXTS,
            "adapters": {"lora": path("lora"), "rslora": path("rslora"), "dora": path("dora"), "run": path("run/checkpoint-2")},
            "state": state.display().to_string(),
            "sums": {"sum": SUM},
            "merged": {"merged32": path("merged32"), "merged-dora": path("merged-dora"), "merged16": path("merged16")},
            "gguf": {"f16": path("f16.gguf"), "q8_0": path("q8_0.gguf"), "q4_0": path("q4_0.gguf"), "again": path("again.gguf")},
            "lora": {"lora.gguf": path("lora.gguf"), "rslora.gguf": path("rslora.gguf")},
        }),
    );
    let here = ["lora", "rslora", "dora", "peft-lora", "peft-rslora", "peft-dora"].map(|name| (name, name));
    let own: BTreeMap<&str, Vec<Vec<f64>>> = here
        .into_iter()
        .chain([("run", "run/checkpoint-2"), ("checkpoint", "trainer/checkpoint-2")])
        .map(|(name, dir)| (name, ours(&context, &context.path(dir), &TEXTS)))
        .collect();
    // Transformers' checkpoint and ours have the same keys in their state, and it reads ours.
    let state: Value = serde_json::from_slice(&std::fs::read(state).unwrap()).unwrap();
    let keys: Vec<&String> = state.as_object().unwrap().keys().collect();
    assert_eq!(json!(keys), said["keys"]);
    let entries = state["log_history"].as_array().unwrap().len();
    assert_eq!(json!([2, 2, entries, state["train_batch_size"]]), said["state"]);
    let labels: Vec<usize> = own["lora"].iter().map(|r| best(r)).collect();
    println!("labels of the texts: {labels:?}");
    for (name, own) in &own {
        let far = distance(own, &rows(&said[*name]));
        println!("{name}: PEFT's probabilities differ by at most {far:.1e}");
        assert!(far < 1e-4, "{name}: {far}: {own:?} for {:?}", said[*name]);
    }
    // Our sum of an adapter of ours and one of PEFT's, and PEFT's own sum of the two.
    let weights = SUM.map(|w| w.to_string()).join(",");
    let args = ["combine", "-q", "lora", "peft-lora", "--weights", &weights, "--calibrate-on", "none", "--out", "sum"];
    let shown = context.run(&args);
    assert!(shown.starts_with("exit code 0"), "{shown}");
    let far = distance(&ours(&context, &context.path("sum"), &TEXTS), &rows(&said["sum"]));
    println!("sum: PEFT's probabilities differ by at most {far:.1e}");
    assert!(far < 1e-4, "sum: {far}");
    for (merged, adapter) in [("merged32", "lora"), ("merged-dora", "dora")] {
        let far = distance(&own[adapter], &rows(&said[merged]));
        println!("{merged}: probabilities differ by at most {far:.1e}");
        assert!(far < 1e-4, "{merged}: {far}");
    }
    // 16 bits round the weights; llama.cpp computes products of quantised weights in 8 bits.
    for (name, limit) in [("merged16", 0.01), ("f16", 0.01), ("again", 0.01), ("q8_0", 0.05), ("lora.gguf", 0.05)] {
        let Some(found) = said.get(name).map(rows) else { continue };
        let far = distance(&own["lora"], &found);
        println!("{name}: probabilities differ by at most {far:.1e}");
        assert!(far < limit, "{name}: {far}: {found:?} for {:?}", own["lora"]);
        // The adapter is noise, so some texts are close to a tie; the others have the same label.
        let clear: Vec<usize> = (0..labels.len()).filter(|&i| lead(&own["lora"][i]) > limit).collect();
        assert!(clear.len() >= 3, "only {clear:?} are clear: {:?}", own["lora"]);
        assert!(clear.iter().all(|&i| best(&found[i]) == labels[i]), "{name}: {found:?} for {:?}", own["lora"]);
    }
    if let Some(found) = said.get("rslora.gguf").map(rows) {
        let far = distance(&own["rslora"], &found);
        println!("rslora.gguf: probabilities differ by at most {far:.1e}");
        assert!(far < 0.05, "rslora.gguf: {far}: {found:?} for {:?}", own["rslora"]);
    }
    if let Some(found) = said.get("q4_0").map(rows) {
        // Four bits once more on weights that had been four bits: it loads and gives probabilities; how far they are is shown.
        println!("q4_0: probabilities differ by at most {:.1e}", distance(&own["lora"], &found));
        assert!(found.iter().all(|r| (r.iter().sum::<f64>() - 1.0).abs() < 1e-6));
    }
    if let Some(why) = said.get("skipped").and_then(Value::as_str) {
        eprintln!("skipped: llama.cpp: {why}");
    }
}

/// Texts of a part of the corpus, each another one.
fn texts_of(part: &str, count: usize) -> Vec<String> {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../corpus").join(part);
    let text = std::fs::read_to_string(file).unwrap();
    let of = |line: &str| serde_json::from_str::<Value>(line).unwrap()["text"].as_str().unwrap().to_owned();
    let texts: Vec<String> = text.lines().map(of).filter(|t| !t.contains('\n')).take(count).collect();
    assert_eq!(texts.len(), count);
    texts
}

/// Texts that are judged.
fn corpus_texts(count: usize) -> Vec<String> {
    texts_of("h-2.jsonl", count)
}

/// A file of texts without labels.
fn jsonl(texts: &[impl AsRef<str>]) -> String {
    texts.iter().map(|t| json!({"text": t.as_ref()}).to_string() + "\n").collect()
}

/// Rounded for a few texts, a file of four bits is closer to its adapter on others than rounded plainly.
#[test]
fn four_bits_are_rounded_for_what_is_asked() {
    const FEW: usize = 16;
    let (Some(context), Some(model)) = (context(), model_file()) else { return };
    save_adapter(&context.path("lora"), &model, all_linear());
    context.write("few.jsonl", jsonl(&texts_of("a-1.jsonl", FEW)));
    let with = |out: &str, calibrate: &str| {
        let args = ["--to", "gguf", "--type", "q4_0", "--adapter", "lora", "--calibrate", calibrate, "--out", out];
        export(&context, &args);
    };
    with("plain.gguf", "none");
    with("few.gguf", "few.jsonl");
    let texts = corpus_texts(24);
    let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
    let own = ours(&context, &context.path("lora"), &texts);
    let far = |name: &str| {
        let found = ours_of(&context, "--model", &context.path(name), SYSTEM, &texts);
        let of = |(a, b)| distance(std::slice::from_ref(a), std::slice::from_ref(b));
        own.iter().zip(&found).map(of).sum::<f64>() / texts.len() as f64
    };
    let (before, now) = (far("plain.gguf"), far("few.gguf"));
    println!("probabilities differ by {before:.4} on average, rounded for {FEW} texts by {now:.4}");
    assert!(now < 0.6 * before, "{now} for {before}");
}

/// An adapter that was trained, in every form of GGUF: llama.cpp gives the labels that we give with the same file, and with 16 and 8
/// bits those of the adapter (where a quantisation moves a text that is close to a tie, it may fall on the other side).
/// `CASHTAG_TEST_ADAPTER` names the adapter of a run; without it one is trained for 60 steps, which leaves many texts near a tie.
/// With the adapter of a quick run f16 and q4_0 hold; q8_0 and gguf-lora are below what is asked of them (docs/export.md).
#[test]
#[ignore = "minutes; it holds with an adapter that was trained for long; with a quick run's q8_0 and gguf-lora do not"]
fn llama_cpp_gives_the_labels_of_a_trained_adapter() {
    const COUNT: usize = 150;
    let (Some(context), Some(model)) = (context(), model_file()) else { return };
    let Some(python) = python() else { return };
    let path = |name: &str| context.path(name).display().to_string();
    let adapter = match std::env::var_os("CASHTAG_TEST_ADAPTER") {
        Some(adapter) => PathBuf::from(adapter),
        None => {
            let train =
                "train -q --max-steps 60 --eval-strategy no --save-strategy no --output-dir run --system-message";
            let shown = context.run(&train.split(' ').chain([SYSTEM]).collect::<Vec<_>>());
            assert!(shown.starts_with("exit code 0"), "{shown}");
            context.path("run/adapter")
        }
    };
    let classifier = std::fs::read(adapter.join("cashtag.json")).unwrap();
    let classifier: Value = serde_json::from_slice(&classifier).unwrap();
    let (system, temperature) =
        (classifier["system_message"].as_str().unwrap(), classifier["temperature"].as_f64().unwrap());
    let name = adapter.display().to_string();
    let texts = corpus_texts(COUNT);
    let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
    // None of the judged texts is among those that are rounded for.
    let parts = std::fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../corpus")).unwrap();
    let mut parts: Vec<String> = parts.map(|p| p.unwrap().file_name().into_string().unwrap()).collect();
    parts.retain(|p| p.ends_with(".jsonl") && p != "h-2.jsonl");
    parts.sort();
    let others: Vec<String> = parts.iter().flat_map(|p| texts_of(p, 60)).filter(|t| !texts.contains(&&**t)).collect();
    context.write("others.jsonl", jsonl(&others));
    let kinds = ["f16", "q8_0", "q4_0"];
    for kind in kinds {
        let out = format!("{kind}.gguf");
        let calibrate: &[&str] = if kind == "f16" { &[] } else { &["--calibrate", "others.jsonl"] };
        let args = ["--to", "gguf", "--type", kind, "--adapter", &name, "--out", &out];
        export(&context, &[&args[..], calibrate].concat());
    }
    export(&context, &["--to", "gguf-lora", "--adapter", &name, "--out", "lora.gguf"]);
    // llama.cpp knows nothing of the temperature.
    let own: Vec<Vec<f64>> = ours_of(&context, "--adapter", &adapter, system, &texts)
        .iter()
        .map(|row| without_temperature(row, temperature))
        .collect();
    let files: BTreeMap<&str, String> = kinds.into_iter().map(|k| (k, path(&format!("{k}.gguf")))).collect();
    let job = json!({
        "model": model.display().to_string(), "system": system, "labels": LABELS, "texts": texts,
        "gguf": files, "lora": {"gguf-lora": path("lora.gguf")},
    });
    let said = ask(&python, &job);
    if let Some(why) = said.get("skipped").and_then(Value::as_str) {
        return eprintln!("skipped: llama.cpp: {why}");
    }
    let counts = |rows: &[Vec<f64>]| -> Vec<usize> {
        (0..LABELS.len()).map(|label| rows.iter().filter(|r| best(r) == label).count()).collect()
    };
    println!("labels of {COUNT} texts: {:?}", counts(&own));
    // Shares of labels that must be the same: as the file's by us, as the adapter's.
    let mut wrong = Vec::new();
    for (name, of_file, of_adapter) in
        [("f16", 0.98, 0.98), ("q8_0", 0.94, 0.97), ("q4_0", 0.94, 0.85), ("gguf-lora", 0.94, 0.97)]
    {
        let found = rows(&said[name]);
        let by_us = match files.get(name) {
            Some(file) => ours_of(&context, "--model", Path::new(file), system, &texts),
            None => own.clone(),
        };
        for (whom, expected, least) in
            [("we with the file", &by_us, of_file), ("we with the adapter", &own, of_adapter)]
        {
            let differ = || expected.iter().zip(&found).filter(|(a, b)| best(a) != best(b)).map(|(a, _)| lead(a));
            let same = COUNT - differ().count();
            let mut far: Vec<f64> = expected
                .iter()
                .zip(&found)
                .map(|(a, b)| distance(std::slice::from_ref(a), std::slice::from_ref(b)))
                .collect();
            far.sort_by(f64::total_cmp);
            let widest = differ().fold(0.0, f64::max);
            println!(
                "{name}, as {whom}: {same} of {COUNT} labels; probabilities differ by {:.4} (median), {:.4} at most; the others led by {widest:.3} at most",
                far[COUNT / 2],
                far[COUNT - 1],
            );
            if (same as f64) < least * COUNT as f64 {
                wrong.push(format!("{name}, as {whom}: {same}, {:?} for {:?}", counts(&found), counts(expected)));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// Without other programs: our own reader finds the same weights again, whatever the form.
#[test]
fn written_files_read_back() {
    let (Some(context), Some(model)) = (context(), model_file()) else { return };
    save_adapter(&context.path("lora"), &model, all_linear());
    export(&context, &["--to", "gguf", "--type", "f32", "--adapter", "lora", "--out", "deep/f32.gguf"]);
    export(
        &context,
        &["--to", "merged", "--type", "f32", "--max-shard-size", "300", "--adapter", "lora", "--out", "hf"],
    );
    let (gguf, hf) =
        (Checkpoint::open(&context.path("deep/f32.gguf")).unwrap(), Checkpoint::open(&context.path("hf")).unwrap());
    let base = Checkpoint::open(&model).unwrap();
    assert_eq!(gguf.config(), base.config());
    assert_eq!(hf.config(), base.config());
    let mut changed = 0;
    for name in base.tensor_names() {
        if name.ends_with("norm.weight") {
            assert_eq!(gguf.vector(&name).unwrap(), base.vector(&name).unwrap());
            assert_eq!(hf.vector(&name).unwrap(), base.vector(&name).unwrap());
            continue;
        }
        let matrices = [&base, &gguf, &hf].map(|c| c.weight(&name).unwrap());
        let rows = [0, 1, matrices[0].rows() / 2 + 3, matrices[0].rows() - 1];
        for row in rows {
            let [b, g, h] = matrices.each_ref().map(|m| {
                let mut out = vec![0f32; m.cols()];
                m.read_rows(row..row + 1, &mut out).unwrap();
                out
            });
            assert_eq!(g, h, "{name}, row {row}");
            changed += usize::from(b != g);
        }
    }
    assert_eq!(changed, 30 * 7 * 4, "every adapted row differs from the base");
    // Prompts become the same tokens.
    let tokens = |c: &Checkpoint| {
        let messages = [("system", SYSTEM), ("user", TEXTS[1])].map(|(r, t)| cashtag_llama::chat::Message::new(r, t));
        c.tokenizer().unwrap().encode_rendered(&c.chat_template().unwrap().render(&messages, true).unwrap())
    };
    assert_eq!(tokens(&gguf), tokens(&base));
    assert_eq!(tokens(&hf), tokens(&base));
    let written = files(&context.path("hf"));
    for name in [
        "cashtag.json",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "model.safetensors.index.json",
    ] {
        assert!(written.iter().any(|f| f == name), "{name} of {written:?}");
    }
    assert!(written.iter().filter(|f| f.ends_with(".safetensors")).count() > 1, "{written:?}");
    assert!(written.iter().all(|f| !f.ends_with(".tmp")), "{written:?}");

    let plainly = ["--to", "ollama", "--type", "q4_0", "--calibrate", "none"];
    export(&context, &[&plainly[..], &["--adapter", "lora", "--out", "ollama"]].concat());
    assert_eq!(files(&context.path("ollama")), ["Modelfile", "model.gguf"]);
    let file = Gguf::open(&context.path("ollama/model.gguf")).unwrap();
    assert_eq!(file.tensor("token_embd.weight").unwrap().block_type.name(), "Q8_0");
    assert_eq!(file.tensor("blk.3.ffn_up.weight").unwrap().block_type.name(), "Q4_0");
    let modelfile = std::fs::read_to_string(context.path("ollama/Modelfile")).unwrap();
    assert!(
        modelfile.starts_with("FROM ./model.gguf\nTEMPLATE \"\"\"{{ if .System }}<|im_start|>system\n{{ .System }}"),
        "{modelfile}"
    );
    assert!(
        modelfile.contains("{{ .Prompt }}<|im_end|>\n<|im_start|>assistant\n{{ .Response }}\"\"\"\n"),
        "{modelfile}"
    );
    assert!(modelfile.contains(&format!("SYSTEM \"\"\"{SYSTEM}\"\"\"\nPARAMETER temperature 0\n")), "{modelfile}");
    assert!(modelfile.ends_with("PARAMETER stop \"<|im_end|>\"\n"), "{modelfile}");
}

/// Answers to [`TEXTS`] with nothing said but the model.
fn answers(context: &Context, flags: &[&str]) -> Vec<Value> {
    let args = [&["predict", "-", "--json", "--precision", "f32"], flags].concat();
    let mut child =
        context.command(&args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all((TEXTS.join("\n") + "\n").as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    // It is no base model that was not fine-tuned.
    assert!(output.status.success() && output.stderr.is_empty(), "{}", context.shown(&output));
    String::from_utf8(output.stdout).unwrap().lines().map(|l| serde_json::from_str(l).unwrap()).collect()
}

/// A merged model carries labels, system message and temperature: it answers as its adapter does, without being told, also
/// when it was exported once more, and training goes on from its prompt.
#[test]
fn a_merged_model_answers_as_its_adapter() {
    let (Some(context), Some(model)) = (context(), model_file()) else { return };
    save_adapter(&context.path("lora"), &model, all_linear());
    let path = context.path("lora/cashtag.json");
    let mut classifier: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    classifier["temperature"] = json!(2.5);
    classifier["labels"] = json!([{"name": "Down", "word": "Negative"}, {"name": "Up", "word": "Positive"}]);
    std::fs::write(&path, classifier.to_string()).unwrap();
    export(&context, &["--to", "merged", "--type", "f32", "--adapter", "lora", "--out", "merged"]);
    export(&context, &["--to", "merged", "--type", "f32", "--model", "merged", "--out", "again"]);
    let expected = answers(&context, &["--adapter", "lora"]);
    for name in ["merged", "again"] {
        let found = answers(&context, &["--model", name]);
        for (found, expected) in found.iter().zip(&expected) {
            assert_eq!(found["label"], expected["label"], "{found} for {expected}");
            for p in ["p_down", "p_up"] {
                let far = (found[p].as_f64().unwrap() - expected[p].as_f64().unwrap()).abs();
                assert!(far < 1e-4, "{name}: {found} for {expected}");
            }
        }
        assert_eq!(found.len(), TEXTS.len());
    }
    // Temperature 2.5 is not 1, and what the user says goes first.
    assert!(expected.iter().all(|e| e["confidence"].as_f64().unwrap() < 0.999), "{expected:?}");
    let three = answers(&context, &["--model", "merged", "--labels", "Positive,Neutral,Negative"]);
    assert!(three.iter().all(|o| o["p_neutral"].is_number()), "{three:?}");

    export(&context, &["--to", "ollama", "--model", "merged", "--out", "ollama"]);
    let modelfile = std::fs::read_to_string(context.path("ollama/Modelfile")).unwrap();
    assert!(modelfile.contains(&format!("SYSTEM \"\"\"{SYSTEM}\"\"\"\n")), "{modelfile}");

    let mut tweets = String::from("text,label\n");
    for i in 0..24 {
        tweets += &format!("{} {}\n", super::tiny::words(i), ["soars,Up", "sinks,Down"][i % 2]);
    }
    context.write("tweets.csv", tweets);
    let args =
        "train -q --model merged --data tweets.csv --max-steps 1 --lora-r 2 --eval-strategy no --output-dir more";
    let shown = context.run(&args.split(' ').collect::<Vec<_>>());
    assert!(shown.starts_with("exit code 0"), "{shown}");
    let config = std::fs::read_to_string(context.path("more/config.toml")).unwrap();
    let followed = config.lines().filter(|l| l.ends_with("# follows model.name")).count();
    assert!(followed == 3 && config.contains(SYSTEM), "{config}");
}

/// However large the model, an export holds little of it: less than the file that it reads, which is mapped, and a few pieces.
#[cfg(target_os = "linux")]
#[test]
fn an_export_does_not_hold_the_model() {
    let (Some(context), Some(model)) = (context(), model_file()) else { return };
    save_adapter(&context.path("lora"), &model, all_linear());
    let mapped = std::fs::metadata(&model).unwrap().len();
    for (form, kind, out) in [("merged", "f32", "merged"), ("gguf", "f16", "model.gguf")] {
        let args = ["export", "-q", "--to", form, "--type", kind, "--adapter", "lora", "--out", out];
        let mut child = context.command(&args).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let status = format!("/proc/{}/status", child.id());
        let mut most = 0;
        let ended = loop {
            let text = std::fs::read_to_string(&status).unwrap_or_default();
            let line = text.lines().find_map(|l| l.strip_prefix("VmHWM:"));
            let kib = line.and_then(|l| l.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0);
            most = most.max(kib << 10);
            match child.try_wait().unwrap() {
                Some(status) => break status,
                None => std::thread::sleep(std::time::Duration::from_millis(5)),
            }
        };
        assert!(ended.success(), "{form}");
        let written = match context.path(out) {
            path if path.is_dir() => std::fs::metadata(path.join("model.safetensors")).unwrap().len(),
            path => std::fs::metadata(path).unwrap().len(),
        };
        println!(
            "{form}: {} MB written, {} MB held at most, of which {} MB mapped",
            written >> 20,
            most >> 20,
            mapped >> 20
        );
        assert!(most > 0 && most < mapped + (160 << 20), "{form}: {most} bytes held");
    }
}

#[test]
fn what_cannot_be_exported() {
    let Some(context) = context() else { return };
    context.write("there.gguf", "something");
    context.write("empty.csv", "");
    for (args, code, expected) in [
        (&["--to", "gguf", "--out", "there.gguf"][..], 2, "there.gguf exists\nhint: --overwrite replaces it"),
        (&["--to", "gguf", "--type", "q5_k", "--out", "x.gguf"], 2, "--type q5_k is not written here"),
        (&["--to", "merged", "--type", "q8_0", "--out", "x"], 2, "expected auto, f16, bf16 or f32"),
        (
            &["--to", "gguf", "--calibrate", "builtin", "--out", "x.gguf"],
            2,
            "--calibrate is for --to gguf or ollama with --type q8_0 or q4_0",
        ),
        (&["--to", "gguf", "--type", "q4_0", "--calibrate", "nowhere.csv", "--out", "x.gguf"], 1, "nowhere.csv"),
        (&["--to", "gguf", "--type", "q4_0", "--calibrate", "empty.csv", "--out", "x.gguf"], 1, "empty.csv"),
        (
            &["--to", "gguf-lora", "--out", "x.gguf"],
            2,
            "--to gguf-lora writes an adapter\nhint: name it with --adapter",
        ),
    ] {
        let shown = context.run(&[&["export"], args].concat());
        assert!(shown.starts_with(&format!("exit code {code}\n")) && shown.contains(expected), "{args:?}: {shown}");
    }
    context.write("file", "");
    let shown = context.run(&["export", "--to", "gguf", "-q", "--out", "file/x.gguf"]);
    assert!(shown.starts_with("exit code 1\n") && shown.contains("cannot write file/x.gguf"), "{shown}");
    // Nothing is left behind.
    assert_eq!(files(&context.path("")), ["empty.csv", "file", "there.gguf"]);
}
