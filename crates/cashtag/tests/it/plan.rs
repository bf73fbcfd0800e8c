//! What `plan` says of memory, against what runs of the real small model take.

use serde_json::Value;

use super::model_commands::context;

/// How far an estimate may be from the truth.
const WITHIN: f64 = 0.10;

/// Both figures in GiB, from `peak memory 1.66 GiB (planned 1.60)`.
fn taken_and_planned(printed: &str) -> (f64, f64) {
    let rest = printed.split_once("peak memory ").unwrap_or_else(|| panic!("{printed}")).1;
    let (taken, rest) = rest.split_once(" GiB (planned ").unwrap();
    (taken.parse().unwrap(), rest.split_once(')').unwrap().0.parse().unwrap())
}

#[test]
fn training_takes_what_was_planned() {
    let Some(context) = context() else { return };
    for (name, flags) in [
        ("recipe", ""),
        ("f32-block", "--precision f32 --gradient-checkpointing block --per-device-train-batch-size 8"),
        ("dora-8bit", "--use-dora --lora-r 16 --optim adamw_8bit --no-packing"),
    ] {
        let dir = format!("--train-examples 60 --max-steps 2 --eval-strategy no --output-dir {name}");
        let words: Vec<&str> = dir.split(' ').chain(flags.split_whitespace()).collect();
        let output = context.command(&[&["train", "-q"], &words[..]].concat()).output().unwrap();
        assert!(output.status.success(), "{name}: {}", context.shown(&output));
        let (taken, planned) = taken_and_planned(&String::from_utf8(output.stdout).unwrap());
        println!("{name}: took {taken:.2} GiB, planned {planned:.2}");
        assert!((planned / taken - 1.0).abs() < WITHIN, "{name}: planned {planned} GiB, took {taken}");

        // `plan` says the same before, without running it.
        let args = [&["plan", "-q", "--json", "--no-time", "--train-only"], &words[..]].concat();
        let output = context.command(&args).output().unwrap();
        assert!(output.status.success(), "{name}: {}", context.shown(&output));
        let plan: Value = serde_json::from_slice(&output.stdout).unwrap();
        let needed = plan["needed_bytes"].as_f64().unwrap() / f64::from(1 << 30);
        assert!((needed / planned - 1.0).abs() < 0.02, "{name}: plan says {needed} GiB, the run planned {planned}");
        assert_eq!(plan["steps"], 2, "{name}");
        let parts: f64 = plan["memory"].as_object().unwrap().values().map(|v| v.as_f64().unwrap()).sum();
        assert_eq!(parts, plan["device_bytes"].as_f64().unwrap(), "{name}: components add up");
    }
}

/// After `run` the estimate stands beside the truth: on the terminal, in `metrics.json` and in the report.
#[test]
fn a_run_keeps_its_plan() {
    let Some(context) = context() else { return };
    context.write("held_out.csv", "text,label\nUpgraded to buy,Positive\nFiles for bankruptcy,Negative\n");
    let args = "run -q --train-examples 40 --eval-data held_out.csv --max-steps 1 --eval-strategy no --output-dir run";
    let output = context.command(&args.split(' ').collect::<Vec<_>>()).output().unwrap();
    assert!(output.status.success(), "{}", context.shown(&output));
    let (taken, planned) = taken_and_planned(&String::from_utf8(output.stdout).unwrap());
    let text = std::fs::read_to_string(context.path("run/metrics.json")).unwrap();
    let metrics: Value = serde_json::from_str(&text).unwrap();
    let gib = |v: &Value| v.as_f64().unwrap() / f64::from(1 << 30);
    assert!((gib(&metrics["peak_memory_bytes"]) - taken).abs() < 0.02, "{taken}");
    assert!((gib(&metrics["plan"]["needed_bytes"]) - planned).abs() < 0.02, "{planned}");
    assert!((planned / taken - 1.0).abs() < WITHIN, "planned {planned} GiB, took {taken}");
    let report = std::fs::read_to_string(context.path("run/report.html")).unwrap();
    assert!(report.contains("peak memory ") && report.contains(&format!("(planned {planned:.2})")));
}
