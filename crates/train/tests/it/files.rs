//! What others read: `trainer_state.json` by Transformers, event files by TensorBoard. Python programs are run where they are there.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use cashtag_backend_cpu::Precision;
use cashtag_train::tensorboard::EventWriter;
use cashtag_train::{LogEntry, SaveStrategy, TrainingArguments};
use serde_json::Value;

use crate::support::{self, Tiny, Watch, quiet};

/// `$CASHTAG_TEST_PYTHON`, else `python3`; `None`, and a word about it, if it has not got `module`.
fn python(module: &str) -> Option<String> {
    let python = std::env::var("CASHTAG_TEST_PYTHON").unwrap_or_else(|_| "python3".into());
    let found = Command::new(&python).args(["-c", &format!("import {module}")]).output();
    if !found.is_ok_and(|o| o.status.success()) {
        eprintln!("skipped: {python} has no {module} (CASHTAG_TEST_PYTHON names another)");
        return None;
    }
    Some(python)
}

fn printed(python: &str, script: &str, path: &Path) -> String {
    let output = Command::new(python).args(["-c", script]).arg(path).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn trained(dir: &Path) -> Watch {
    let tiny = Tiny::new(Precision::F32);
    let a = TrainingArguments {
        eval_strategy: SaveStrategy::Epoch,
        save_strategy: SaveStrategy::Epoch,
        save_total_limit: None,
        load_best_model_at_end: true,
        early_stopping_patience: Some(3),
        early_stopping_threshold: 0.001,
        logging_steps: 2,
        ..quiet()
    };
    support::run(&mut tiny.trainer(dir, a), Watch::default()).1
}

#[test]
fn the_state_has_the_keys_of_transformers() {
    let dir = tempfile::tempdir().unwrap();
    let watch = trained(dir.path());
    let path = dir.path().join("checkpoint-6/trainer_state.json");
    let text = std::fs::read_to_string(&path).unwrap();
    let state: Value = serde_json::from_str(&text).unwrap();
    // dataclasses.fields(transformers.TrainerState), sorted as `json.dumps(…, sort_keys=True)` sorts them.
    let keys: Vec<&String> = state.as_object().unwrap().keys().collect();
    assert_eq!(
        keys,
        [
            "best_global_step",
            "best_metric",
            "best_model_checkpoint",
            "epoch",
            "eval_steps",
            "global_step",
            "is_hyper_param_search",
            "is_local_process_zero",
            "is_world_process_zero",
            "log_history",
            "logging_steps",
            "max_steps",
            "num_input_tokens_seen",
            "num_train_epochs",
            "save_steps",
            "stateful_callbacks",
            "total_flos",
            "train_batch_size",
            "trial_name",
            "trial_params"
        ]
    );
    assert!(text.starts_with("{\n  \"best_global_step\": 6,\n") && text.ends_with("\n}\n"), "{text}");
    let history = state["log_history"].as_array().unwrap();
    // As with Transformers the summary of the run comes behind the last checkpoint.
    assert_eq!(history.len() + 1, watch.logs.len());
    let last: Vec<&str> = watch.logs.last().unwrap().keys().map(String::as_str).collect();
    assert_eq!(
        last,
        [
            "epoch",
            "step",
            "total_flos",
            "train_loss",
            "train_runtime",
            "train_samples_per_second",
            "train_steps_per_second"
        ]
    );
    let keys = |entry: &Value| entry.as_object().unwrap().keys().cloned().collect::<Vec<_>>().join(" ");
    assert_eq!(keys(&history[0]), "epoch grad_norm learning_rate loss step");
    let evaluation = history.iter().find(|e| e.get("eval_loss").is_some()).unwrap();
    assert_eq!(keys(evaluation), "epoch eval_loss eval_runtime eval_samples_per_second eval_steps_per_second step");
    assert_eq!(evaluation["step"].to_string(), "3");
    let early = &state["stateful_callbacks"]["EarlyStoppingCallback"];
    assert_eq!(early["args"].to_string(), r#"{"early_stopping_patience":3,"early_stopping_threshold":0.001}"#);
    assert_eq!(early["attributes"]["early_stopping_patience_counter"], 0);
    assert!(state["stateful_callbacks"]["TrainerControl"]["args"]["should_training_stop"].as_bool().unwrap());

    let Some(python) = python("transformers") else { return };
    // Transformers reads it, and writes the same text again.
    let script = "import sys, dataclasses
from transformers import TrainerState
state = TrainerState.load_from_json(sys.argv[1])
names = {f.name for f in dataclasses.fields(TrainerState)}
import json
keys = set(json.load(open(sys.argv[1])))
print(state.global_step, state.best_global_step, len(state.log_history), sorted(keys ^ names))
state.save_to_json(sys.argv[1] + '.again')";
    assert_eq!(printed(&python, script, &path), format!("6 6 {} []\n", history.len()));
    let again: Value = serde_json::from_slice(&std::fs::read(path.with_extension("json.again")).unwrap()).unwrap();
    for (key, value) in state.as_object().unwrap() {
        assert_eq!(&again[key], value, "{key}");
    }
}

#[test]
fn tensorboard_opens_the_event_files() {
    let Some(python) = python("tensorboard") else { return };
    let dir = tempfile::tempdir().unwrap();
    let entry = |step: usize, loss: f64| -> LogEntry {
        [("step", step as f64), ("epoch", step as f64 / 4.0), ("loss", loss), ("learning_rate", 1e-4)]
            .map(|(k, v)| (k.to_string(), v))
            .into()
    };
    let mut writer = EventWriter::create(dir.path(), 0).unwrap();
    for step in 1..=6 {
        writer.log(&entry(step, 1.0 / step as f64)).unwrap();
    }
    writer.log(&[("step", 6.0), ("epoch", 1.5), ("eval_loss", 0.125)].map(|(k, v)| (k.to_string(), v)).into()).unwrap();
    // Killed while it wrote a record, and continued behind step 4.
    let path = writer.path().to_owned();
    drop(writer);
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&path, &bytes[..bytes.len() - 3]).unwrap();
    let mut writer = EventWriter::create(dir.path(), 4).unwrap();
    for step in 5..=300 {
        writer.log(&entry(step, 100.0 + step as f64)).unwrap();
    }
    drop(writer);
    let script = "import sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
events = EventAccumulator(sys.argv[1], size_guidance={'scalars': 0})
events.Reload()
print(sorted(events.Tags()['scalars']))
loss = events.Scalars('train/loss')
print([e.step for e in loss] == list(range(1, 301)))
print([round(e.value, 4) for e in loss[:6]], round(events.Scalars('train/learning_rate')[-1].value, 8))
print(loss[0].wall_time > 1e9)";
    assert_eq!(
        printed(&python, script, dir.path()),
        "['train/epoch', 'train/learning_rate', 'train/loss']\nTrue\n[1.0, 0.5, 0.3333, 0.25, 105.0, 106.0] 0.0001\nTrue\n"
    );
    // And what the program itself shows in a browser.
    let loss = served(&python, dir.path(), "/data/plugin/scalars/scalars?run=.&tag=train%2Floss");
    let points: Vec<(f64, u64, f64)> = serde_json::from_str(&loss).unwrap_or_else(|e| panic!("{e}: {loss}"));
    let last = points.last().unwrap();
    assert!(points.len() > 100 && (last.1, last.2) == (300, 400.0), "{last:?} of {}", points.len());
}

/// What `tensorboard --logdir DIR` answers.
fn served(python: &str, dir: &Path, path: &str) -> String {
    const PATIENCE: Duration = Duration::from_secs(120);
    struct Ended(Child);
    impl Drop for Ended {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }
    let mut command = Command::new(python);
    command.args(["-m", "tensorboard.main", "--host", "127.0.0.1", "--port", "0", "--load_fast=false", "--logdir"]);
    let mut program = Ended(command.arg(dir).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap());
    let said = BufReader::new(program.0.stderr.take().unwrap());
    let (sender, address) = channel();
    std::thread::spawn(move || {
        for line in said.lines().map_while(Result::ok) {
            if let Some((_, rest)) = line.split_once("http://") {
                let _ = sender.send(rest.split('/').next().unwrap_or_default().to_owned());
            }
        }
    });
    let address = address.recv_timeout(PATIENCE).expect("TensorBoard says where it listens");
    let began = Instant::now();
    // It reads the files after it has begun to listen.
    loop {
        let mut stream = TcpStream::connect(&address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        write!(stream, "GET {path} HTTP/1.0\r\nHost: {address}\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
        if head.contains(" 200 ") {
            return body.to_owned();
        }
        assert!(began.elapsed() < PATIENCE, "{answer}");
        std::thread::sleep(Duration::from_millis(200));
    }
}
