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
    assert_snapshot!(context.run(&["config", "--show", "--config", "my.toml", "--seed", "7", "--set", "lora.lora_alpha=32"]), @"");
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
    assert_snapshot!(context.run(&["config", "--config", "a.toml"]), @"");
    context.write("b.toml", "[model]\ndevice = \"gpu\"\n");
    assert_snapshot!(context.run(&["config", "--config", "b.toml"]), @"");
    context.write("c.toml", "[training\n");
    assert_snapshot!(context.run(&["config", "--config", "c.toml"]), @"");
    assert_snapshot!(context.run(&["config", "--config", "smollm-cpu"]), @"");
    assert_snapshot!(context.run(&["config", "--warmup-ratio", "3"]), @"");
    assert_snapshot!(context.run(&["config", "--eval-steps", "30", "--save-steps", "100"]), @"");
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
