//! `cashtag config`: defaults, a recipe and flags put together, and what is wrong with them.

use insta::assert_snapshot;

use super::context::Context;

#[test]
fn every_value_with_its_source() {
    let context = Context::new();
    context.write(
        "my.toml",
        "# mine\n[training]\nlearning_rate = 1e-4\neval_strategy = \"epoch\"\n\n[lora]\nr = 8\ntarget_modules = [\"q_proj\", \"v_proj\"]\n",
    );
    assert_snapshot!(context.run(&["config", "--show", "--config", "my.toml", "--seed", "7", "--set", "lora.lora_alpha=32"]), @r#"
    exit code 0
    --- stdout
    [model]
    name = "smollm2-135m"                         # default
    device = "auto"                               # default
    precision = "auto"                            # default
    threads = 0                                   # default
    resident = "auto"                             # default
    bnb_4bit_use_double_quant = false             # default
    random_weights = "none"                       # default
    tokenizer = "none"                            # default
    adapter = "none"                              # default

    [data]
    source = "builtin"                            # default
    eval_source = "none"                          # default
    full = false                                  # default
    train_examples = "none"                       # default
    eval_examples = "none"                        # default
    eval_fraction = 0.1                           # default
    system_message = "Is this tweet Positive, Neutral or Negative for the stock or the market?"  # default
    labels = ["Positive", "Neutral", "Negative"]  # default
    max_seq_length = 512                          # default
    too_long = "truncate"                         # default

    [training]
    output_dir = "runs/<date-time>"               # default
    num_train_epochs = 3.0                        # default
    max_steps = -1                                # default
    per_device_train_batch_size = 4               # default
    per_device_eval_batch_size = 16               # default
    gradient_accumulation_steps = 8               # default
    gradient_checkpointing = "auto"               # default
    learning_rate = 1e-4                          # my.toml:3
    lr_scheduler_type = "cosine"                  # default
    warmup_ratio = 0.03                           # default
    warmup_steps = 0                              # default
    weight_decay = 0.01                           # default
    max_grad_norm = 1.0                           # default
    adam_beta1 = 0.9                              # default
    adam_beta2 = 0.999                            # default
    adam_epsilon = 1e-8                           # default
    optim = "adamw"                               # default
    eval_strategy = "epoch"                       # my.toml:4
    eval_steps = 500                              # default
    save_strategy = "epoch"                       # follows training.eval_strategy
    save_steps = 500                              # default
    save_total_limit = 2                          # default
    load_best_model_at_end = true                 # default
    metric_for_best_model = "eval_loss"           # default
    greater_is_better = "none"                    # default
    early_stopping_patience = 3                   # default
    early_stopping_threshold = 0.0                # default
    logging_steps = 25                            # default
    packing = true                                # default
    max_tokens_per_batch = 1024                   # default
    train_on = "answer"                           # default
    seed = 7                                      # --seed
    data_seed = "none"                            # default
    neftune_noise_alpha = 0.0                     # default
    label_smoothing_factor = 0.0                  # default
    class_weights = "none"                        # default
    resume = "never"                              # default

    [lora]
    r = 8                                         # my.toml:7
    lora_alpha = 32.0                             # --set
    lora_dropout = 0.1                            # default
    target_modules = ["q_proj", "v_proj"]         # my.toml:8
    layers_to_transform = "none"                  # default
    use_rslora = false                            # default
    use_dora = false                              # default
    loraplus_lr_ratio = 1.0                       # default
    "#);
}

#[test]
fn what_is_shown_is_a_recipe_for_the_same() {
    let context = Context::new();
    let words =
        ["config", "--labels", "Up=bullish,Down=bearish", "--max-steps", "30", "--system-message", "a \"b\"\nc"];
    let shown = context.command(&words).output().unwrap().stdout;
    context.write("shown.toml", &shown);
    let again = context.command(&["config", "--config", "shown.toml"]).output().unwrap().stdout;
    let values = |text: &[u8]| -> Vec<String> {
        let text = String::from_utf8(text.to_vec()).unwrap();
        text.lines().map(|l| l.rsplit_once("  # ").map_or(l, |(value, _)| value).trim_end().to_string()).collect()
    };
    assert_eq!(values(&shown), values(&again));
    assert!(values(&shown).contains(&"labels = { Up = \"bullish\", Down = \"bearish\" }".to_string()));
}

#[test]
fn mistakes_are_named_with_their_place_and_mend() {
    let context = Context::new();
    context.write("a.toml", "[training]\nlearning_rte = 1e-4\n");
    assert_snapshot!(context.run(&["config", "--config", "a.toml"]), @r#"
        exit code 2
        --- stderr
        error: a.toml:2: unknown key "learning_rte" in [training]
        hint: did you mean "learning_rate"?
        "#);
    context.write("b.toml", "[model]\ndevice = \"gpu\"\n");
    assert_snapshot!(context.run(&["config", "--config", "b.toml"]), @r#"
        exit code 2
        --- stderr
        error: b.toml:2: model.device is "gpu"; expected "auto", "cpu", "cuda" or "cuda:N"
        "#);
    context.write("c.toml", "[training\n");
    assert_snapshot!(context.run(&["config", "--config", "c.toml"]), @"
        exit code 2
        --- stderr
        error: c.toml:1: not valid TOML: unclosed table, expected `]`
        ");
    assert_snapshot!(context.run(&["config", "--config", "smollm-cpu"]), @"
        exit code 2
        --- stderr
        error: smollm-cpu: no such file
        hint: did you mean the recipe smollm2-cpu?
        ");
    assert_snapshot!(context.run(&["config", "--warmup-ratio", "3"]), @"
        exit code 2
        --- stderr
        error: --warmup-ratio: training.warmup_ratio is 3; expected a number from 0 to 1
        ");
    assert_snapshot!(context.run(&["config", "--eval-steps", "30", "--save-steps", "100"]), @"
        exit code 2
        --- stderr
        error: --save-steps: training.save_steps is 100, no multiple of training.eval_steps (30)
        hint: the best model can only be kept if a checkpoint falls on an evaluation; or set load_best_model_at_end to false
        ");
}

#[test]
fn variables_change_nothing() {
    let plain = Context::new().run(&["config"]);
    let with =
        Context::new().env("CASHTAG_SEED", "7").env("LEARNING_RATE", "1").env("HF_TOKEN", "hf_secret").run(&["config"]);
    assert_eq!(plain, with);
}

#[test]
fn the_recipes_of_the_repository_say_how_they_are_run() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../recipes");
    let mut count = 0;
    for entry in std::fs::read_dir(folder).unwrap().flatten() {
        let path = entry.path();
        let text = std::fs::read_to_string(&path).unwrap();
        let name = path.file_name().unwrap().to_str().unwrap();
        let first = text.lines().next().unwrap();
        assert!(
            first.starts_with("# cargo run --release -- ") && first.contains(&format!("recipes/{name}")),
            "{first}"
        );
        let output = Context::new().command(&["config", "--config", path.to_str().unwrap()]).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        count += 1;
    }
    assert!(count >= 2);
}

#[test]
fn the_reference_in_the_documentation_is_current() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/configuration.md");
    let Ok(docs) = std::fs::read_to_string(path) else {
        println!("skipped: there is no docs/configuration.md");
        return;
    };
    let output = Context::new().command(&["config", "--reference"]).output().unwrap();
    let reference = String::from_utf8(output.stdout).unwrap();
    assert!(
        docs.contains(reference.trim_end()),
        "write the output of `cashtag config --reference` into docs/configuration.md"
    );
}
