//! What belongs to no single command: help, version, colour, wrong usage, a reader that leaves, `doctor`.

use std::process::Stdio;

use insta::assert_snapshot;

use super::context::Context;

#[test]
fn version() {
    assert_snapshot!(Context::new().run(&["--version"]), @"
        exit code 0
        --- stdout
        cashtag [VERSION]
        ");
}

#[test]
fn wrong_usage() {
    let context = Context::new();
    assert_snapshot!(context.run(&["pul"]), @"
    exit code 2
    --- stderr
    error: unrecognized subcommand 'pul'

      tip: some similar subcommands exist: 'plan', 'pull'

    Usage: cashtag [OPTIONS] <COMMAND>

    For more information, try '--help'.
    ");
    assert_snapshot!(context.run(&["config", "--learning-rat", "1"]), @"
        exit code 2
        --- stderr
        error: unexpected argument '--learning-rat' found

          tip: a similar argument exists: '--learning-rate'

        Usage: cashtag config --learning-rate <NUMBER>

        For more information, try '--help'.
        ");
    assert_snapshot!(context.run(&["-v", "-q", "doctor"]), @"
        exit code 2
        --- stderr
        error: the argument '--verbose...' cannot be used with '--quiet...'

        Usage: cashtag --verbose... <COMMAND>

        For more information, try '--help'.
        ");
}

#[test]
fn no_command_is_a_question_for_help() {
    let output = Context::new().command(&[]).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(output.stdout.is_empty());
    let help = Context::new().command(&["--help"]).output().unwrap();
    assert_eq!(help.status.code(), Some(0));
    assert!(String::from_utf8(help.stdout).unwrap().contains("Usage: cashtag [OPTIONS] <COMMAND>"));
}

#[test]
fn help_of_a_command() {
    assert_snapshot!(Context::new().run(&["pull", "--help"]), @"
        exit code 0
        --- stdout
        Fetch a model or a data set, once

        Usage: cashtag pull [OPTIONS] <MODEL> [DATASET]

        Arguments:
          <MODEL>    `smollm2-135m`, OWNER/NAME[@REVISION] of the Hugging Face hub, or the word `dataset`
          [DATASET]  With `dataset`: OWNER/NAME[@REVISION] of a data set

        Options:
          -h, --help  Print help

        Output:
          -v, --verbose...    Say more about what is done
          -q, --quiet...      Say nothing but results and errors
              --color <WHEN>  When to use colour [default: on a terminal, unless NO_COLOR is set]

        Variables: CASHTAG_CACHE (where smollm2-135m is kept), HF_HOME, HF_TOKEN, HF_ENDPOINT

        Examples:
          cashtag pull smollm2-135m
          cashtag pull NousResearch/Llama-2-7b-chat-hf
          cashtag pull dataset zeroshot/twitter-financial-news-sentiment
        ");
}

#[test]
fn flags_are_grouped_by_section() {
    assert_snapshot!(Context::new().run(&["config", "-h"]), @r#"
        exit code 0
        --- stdout
        Show the configuration in force, and where each value came from

        Usage: cashtag config [OPTIONS]

        Options:
              --show                     Print every value and where it came from; the output is a recipe
                                         (this is the default)
              --reference                Print what there is to configure, as Markdown
              --config <RECIPE>          TOML file with settings, or the name of a recipe that ships with
                                         cashtag; flags override it
              --set <SECTION.KEY=VALUE>  Set any key of the configuration
          -h, --help                     Print help (see more with '--help')

        [model]:
              --model <TEXT>                   Base model: `smollm2-135m`, OWNER/NAME of the Hugging Face
                                               hub, a checkpoint directory, or a .gguf file. [default:
                                               smollm2-135m]
              --device <auto|cpu|cuda|cuda:N>  Where the model runs; `auto` is a GPU if there is one.
                                               [default: auto]
              --adapter <PATH>                 LoRA adapter to load: a directory that cashtag or PEFT wrote.
                                               [default: none]

        [data]:
              --data <builtin|PATH>      Examples: `builtin`, or a .csv, .jsonl, .parquet or .txt file, or a
                                         directory of them. [default: builtin]
              --labels <A,B,…|A=word,…>  The classes, and the word that the model answers with for each if
                                         it is not the label itself. [default: ["Positive", "Neutral",
                                         "Negative"]]

        [training]:
              --output-dir <PATH>          Where the run is kept; `<date-time>` is replaced by the time of
                                           the start. [default: runs/<date-time>]
              --num-train-epochs <NUMBER>  Passes over the training examples. [default: 3.0]
              --learning-rate <NUMBER>     Peak learning rate. [default: 2e-4]

        Output:
          -v, --verbose...    Say more about what is done
          -q, --quiet...      Say nothing but results and errors
              --color <WHEN>  When to use colour [default: on a terminal, unless NO_COLOR is set]
        "#);
}

#[test]
fn colour_only_where_it_is_asked_for() {
    let escapes = |context: Context, args: &[&str]| {
        let output = context.command(args).output().unwrap();
        output.stderr.iter().filter(|b| **b == 0x1b).count()
    };
    let wrong = ["config", "--set", "x"];
    assert_eq!(escapes(Context::new(), &wrong), 0);
    assert!(escapes(Context::new(), &[&wrong[..], &["--color", "always"]].concat()) > 0);
    assert_eq!(escapes(Context::new().env("NO_COLOR", "1"), &wrong), 0);
    assert_eq!(escapes(Context::new(), &["--color=never", "pul"]), 0);
    assert!(escapes(Context::new(), &["--color=always", "pul"]) > 0);
}

#[test]
fn a_reader_that_leaves_is_no_error() {
    let context = Context::new();
    let mut child = context.command(&["config"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), output.stderr.len()), (Some(0), 0), "{output:?}");
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_an_error() {
    let context = Context::new();
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let output = context.command(&["config"]).stdout(full).output().unwrap();
    assert_snapshot!(context.shown(&output), @"
        exit code 1
        --- stderr
        error: cannot write to stdout: No space left on device (os error 28)
        ");
}

#[test]
fn doctor_looks_at_everything() {
    let output = Context::new().command(&["doctor"]).output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    let text = String::from_utf8(output.stdout).unwrap();
    for word in ["cashtag ", "cpu ", "precision: ", "threads ", "memory ", "cache ", "models    none yet", "pip "] {
        assert!(text.contains(word), "{word} is missing:\n{text}");
    }
    let without_python = Context::new().env("PATH", "/nowhere").command(&["doctor"]).output().unwrap();
    assert!(String::from_utf8(without_python.stdout).unwrap().contains("pip       no python3; "));
}
