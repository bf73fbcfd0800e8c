//! `cashtag combine`: adapters of several seeds become one.

use serde_json::Value;

use super::context::Context;
use super::tiny;

fn run(context: &Context, model: &[String], words: &str) -> String {
    let args: Vec<&str> = words.split(' ').chain(model.iter().map(String::as_str)).collect();
    context.run(&args)
}

fn json(context: &Context, path: &str) -> Value {
    serde_json::from_slice(&std::fs::read(context.path(path)).unwrap()).unwrap()
}

/// The probabilities of some texts.
fn probabilities(context: &Context, model: &[String], adapter: &str) -> Vec<f64> {
    (0..6)
        .flat_map(|i| {
            let text = tiny::words(200 + i);
            let mut args = vec!["predict", &text, "--json", "-q", "--adapter", adapter];
            args.extend(model.iter().map(String::as_str));
            let output = context.command(&args).output().unwrap();
            assert!(output.status.success(), "{}", context.shown(&output));
            let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
            ["p_positive", "p_neutral", "p_negative"].map(|k| answer[k].as_f64().unwrap())
        })
        .collect()
}

fn far(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
}

#[test]
fn adapters_of_several_seeds_become_one() {
    let Some((context, model)) = tiny::context() else { return };
    context.write("data.csv", tiny::tweets(90));
    let train = |seed: usize, more: &str| {
        let words = format!(
            "train -q --data data.csv --seed {seed} --output-dir s{seed} --lora-r 4 --max-steps 12 --learning-rate 1e-2 --eval-strategy no --save-strategy no{more}"
        );
        let shown = run(&context, &model, &words);
        assert!(shown.starts_with("exit code 0"), "{shown}");
    };
    train(1, " --data-seed 5");
    train(2, " --data-seed 5");
    let read = |path: &str| std::fs::read(context.path(path)).unwrap();
    assert_eq!(read("s1/validation.csv"), read("s2/validation.csv"));
    assert_ne!(read("s1/adapter/adapter_model.safetensors"), read("s2/adapter/adapter_model.safetensors"));

    // An adapter with itself is itself: half of it twice, side by side and brought down to its own rank.
    let shown = run(&context, &model, "combine s1 s1/adapter --calibrate-on none --out twice");
    assert!(shown.contains("twice: 2 adapters, r 8, ") && shown.contains("temperature 1.00"), "{shown}");
    let shown = run(&context, &model, "combine s1 s1 --rank 4 --calibrate-on none --out again");
    assert!(shown.contains("r 4, ") && shown.contains("0.00 % of the sum's squared norm left out"), "{shown}");
    let shown = run(&context, &model, "combine s1 --calibrate-on none --out alone");
    assert!(shown.starts_with("exit code 0"), "{shown}");
    let own = probabilities(&context, &model, "alone");
    for name in ["twice", "again"] {
        let off = far(&own, &probabilities(&context, &model, name));
        assert!(off < 1e-4, "{name}: {off}");
    }
    // Weight 0 leaves an adapter out.
    let shown = run(&context, &model, "combine s2 s1 --weights 0,1 --calibrate-on none --out left-out");
    assert!(shown.starts_with("exit code 0"), "{shown}");
    assert!(far(&own, &probabilities(&context, &model, "left-out")) < 1e-4);

    // The mean: its temperature is fitted on what the runs have in common, and others can read it.
    let shown = run(&context, &model, "combine s1 s2 --rank 6 --out mean");
    assert!(
        shown.contains("mean: 2 adapters, r 6, ") && shown.contains("next: cashtag eval --adapter mean"),
        "{shown}"
    );
    let config = json(&context, "mean/adapter_config.json");
    assert_eq!((&config["r"], &config["lora_alpha"], &config["peft_type"]), (&6.into(), &6.into(), &"LORA".into()));
    let temperature = json(&context, "mean/cashtag.json")["temperature"].as_f64().unwrap();
    assert!(temperature > 0.0 && temperature != 1.0, "{temperature}");
    let mean = probabilities(&context, &model, "mean");
    assert!(far(&own, &mean) > 1e-4 && mean.iter().all(|p| p.is_finite()));

    // Refused, each with the mend.
    for (words, said) in [
        ("combine s1 s2 --out mean", "error: mean exists\nhint: --overwrite"),
        ("combine s1 s2 --weights 1 --out x", "1 weights for 2 adapters"),
        ("combine s1 s9 --out x", "no adapter_config.json in it"),
        ("combine s1 s2 --rank 4096 --out x", "hidden size"),
        ("combine s1 s2 --rank 0 --out x", "lora r must be 1 to 32"),
    ] {
        let shown = run(&context, &model, words);
        assert!(!shown.starts_with("exit code 0") && shown.contains(said), "{words}: {shown}");
    }
    train(3, " --target-modules q_proj");
    let shown = run(&context, &model, "combine s1 s3 --out x");
    assert!(shown.contains("adapter 2 cannot be added to the first: it changes q_proj"), "{shown}");
    // Other validation parts: the temperature is left alone, and that is said.
    train(4, "");
    let shown = run(&context, &model, "combine s1 s4 --out uncalibrated");
    assert!(shown.contains("temperature 1.00") && shown.contains("no validation part in common"), "{shown}");
    assert!(!context.path("x").exists());
}
