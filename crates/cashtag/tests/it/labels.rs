//! Labels of the user's: data files, training, `eval` and `predict` with any list of them, and the adapters of every kind.

use serde_json::Value;

use super::context::Context;
use super::serving;
use super::tiny;

fn run(context: &Context, model: &[String], words: &str) -> String {
    let args: Vec<&str> = words.split(' ').take(1).chain(model.iter().map(String::as_str)).collect();
    let args: Vec<&str> = args.into_iter().chain(words.split(' ').skip(1)).collect();
    let output = context.command(&args).output().unwrap();
    assert!(output.status.success(), "{words}: {}", context.shown(&output));
    String::from_utf8(output.stdout).unwrap()
}

/// 24 texts a label, whose wording gives it away; labels are written in the file as `spelling` says.
fn data(labels: &[&str], spelling: impl Fn(&str) -> String) -> String {
    let mut text = String::from("text,label\n");
    for i in 0..24 * labels.len() {
        let label = i % labels.len();
        let word = ["soars", "sinks", "rests", "turns", "waits"][label];
        text += &format!("{} {word},{}\n", tiny::words(i), spelling(labels[label]));
    }
    text
}

const SHORT: &str =
    "--lora-r 4 --max-steps 30 --learning-rate 1e-2 --logging-steps 1 --eval-strategy no --save-strategy no -q";

#[test]
fn any_list_of_labels_from_end_to_end() {
    let Some((context, model)) = tiny::context() else { return };
    let five = ["Very negative", "Negative", "Neutral", "Positive", "Very positive"];
    let cases: [(&str, &[&str], &str, &str); 3] = [
        ("four", &["Positive", "Neutral", "Negative", "Mixed"], "Positive,Neutral,Negative,Mixed", ""),
        ("five", &five, "Very negative=awful,Negative=bad,Neutral=flat,Positive=good,Very positive=great", ""),
        ("two", &["Bullish", "Bearish"], "Bullish,Bearish", "--label-map 1=Bullish,0=Bearish"),
    ];
    for (name, labels, given, map) in cases {
        let spelling = |label: &str| match (name, label) {
            ("two", label) => u8::from(label == "Bullish").to_string(),
            (_, label) => label.to_lowercase().replace(' ', "_"),
        };
        context.write("data.csv", data(labels, spelling));
        let arguments = |head: &str| -> Vec<String> {
            let words = head.split(' ').map(String::from);
            words.chain(map.split_whitespace().map(String::from)).collect()
        };
        let mut train = arguments(&format!("train --data data.csv --output-dir {name} {SHORT}"));
        train.extend(model.iter().cloned());
        train.extend(["--labels".to_string(), given.to_string()]);
        let output = context.command(&train.iter().map(String::as_str).collect::<Vec<_>>()).output().unwrap();
        assert!(output.status.success(), "{name}: {}", context.shown(&output));
        let stored: Value =
            serde_json::from_slice(&std::fs::read(context.path(name).join("adapter/cashtag.json")).unwrap()).unwrap();
        let names: Vec<&str> =
            stored["labels"].as_array().unwrap().iter().map(|l| l["name"].as_str().unwrap()).collect();
        assert_eq!(names, labels);

        // The adapter knows its labels: eval and predict need not be told.
        let words = arguments(&format!("eval --json -q --data data.csv --adapter {name}")).join(" ");
        let judged: Value = serde_json::from_str(&run(&context, &model, &words)).unwrap();
        assert_eq!(judged["labels"], serde_json::json!(labels));
        assert_eq!(judged["examples"], 24 * labels.len());
        let metrics = &judged["models"][0]["metrics"];
        assert_eq!(metrics["per_class"].as_array().unwrap().len(), labels.len());
        // The file's spellings were understood, each as its own label.
        for (class, label) in metrics["per_class"].as_array().unwrap().iter().zip(labels) {
            assert_eq!((class["label"].as_str(), class["support"].as_u64()), (Some(*label), Some(24)), "{name}");
        }
        let words = format!("predict --json -q soars --adapter {name}");
        let answer: Value = serde_json::from_str(run(&context, &model, &words).lines().next().unwrap()).unwrap();
        assert!(labels.contains(&answer["label"].as_str().unwrap()), "{answer}");
        let sum: f64 = labels
            .iter()
            .map(|l| answer[format!("p_{}", l.to_lowercase().replace(' ', "_"))].as_f64().unwrap_or(f64::NAN))
            .sum();
        assert!((sum - 1.0).abs() < 1e-4, "{answer}");
        if name == "four" {
            let flags: Vec<&str> = model.iter().map(String::as_str).chain(["--adapter", name]).collect();
            let mut s = serving::start(&context, &flags);
            let served = s.post("/v1/classify", &serde_json::json!({"input": "soars"})).json();
            let datum = &served["data"][0];
            assert_eq!((&datum["label"], &datum["num_classes"]), (&answer["label"], &serde_json::json!(4)), "{served}");
            for label in labels {
                let far = datum["probabilities"][label].as_f64().unwrap()
                    - answer[format!("p_{}", label.to_lowercase())].as_f64().unwrap();
                assert!(far.abs() < 1e-3, "{served} for {answer}");
            }
            s.terminate();
            assert_eq!(s.exit_code(), Some(0));
        }
    }
    // A label that the run has not got.
    context.write("data.csv", "text,label\n$A soars,Bullish\n$B rests,Sideways\n");
    let args = ["train", "--data", "data.csv", "--labels", "Bullish,Bearish", "--output-dir", "x", "-q"];
    let args: Vec<&str> = args.into_iter().chain(model.iter().map(String::as_str)).collect();
    let shown = context.run(&args);
    assert!(shown.contains("data.csv:3: unknown label \"Sideways\", expected Bullish or Bearish"), "{shown}");
}

/// DoRA with 8-bit moments, noise, smoothing and class weights: trained, saved, and read again.
#[test]
fn every_kind_of_adapter_is_trained_and_used() {
    let Some((context, model)) = tiny::context() else { return };
    context.write("data.csv", data(&["Positive", "Neutral", "Negative"], str::to_string));
    for (name, flags) in [
        ("plain", ""),
        ("dora", "--use-dora --optim adamw_8bit --neftune-noise-alpha 5 --label-smoothing-factor 0.05"),
        ("rs", "--use-rslora --loraplus-lr-ratio 4 --class-weights 1,2,1 --layers-to-transform 1"),
    ] {
        let words = format!("train --data data.csv --output-dir {name} {SHORT} {flags}");
        run(&context, &model, words.trim_end());
        let config: Value =
            serde_json::from_slice(&std::fs::read(context.path(name).join("adapter/adapter_config.json")).unwrap())
                .unwrap();
        assert_eq!(config["use_dora"], name == "dora");
        assert_eq!(config["use_rslora"], name == "rs");
        let words = format!("eval --json -q --data data.csv --adapter {name}");
        let judged: Value = serde_json::from_str(&run(&context, &model, &words)).unwrap();
        assert_eq!(judged["examples"], 72);
        let log = std::fs::read_to_string(context.path(name).join("trainer_log.jsonl")).unwrap();
        let losses: Vec<f64> =
            log.lines().filter_map(|l| serde_json::from_str::<Value>(l).unwrap()["loss"].as_f64()).collect();
        println!("{name}: loss {:.3} → {:.3}", losses[0], losses[29]);
        assert!(losses.len() == 30 && losses[29] < losses[0] - 0.1, "{name}: {losses:?}");
        assert!(std::fs::read_dir(context.path(name).join("tensorboard")).unwrap().count() == 1);
    }
}
