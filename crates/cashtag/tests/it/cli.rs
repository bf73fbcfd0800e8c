//! What belongs to no single command: help, version, colour, wrong usage, a reader that leaves, `doctor`.

use std::process::Stdio;

use insta::assert_snapshot;

use super::context::Context;

#[test]
fn version() {
    assert_snapshot!(Context::new().run(&["--version"]), @"");
}

#[test]
fn wrong_usage() {
    let context = Context::new();
    assert_snapshot!(context.run(&["pul"]), @"");
    assert_snapshot!(context.run(&["config", "--learning-rat", "1"]), @"");
    assert_snapshot!(context.run(&["-v", "-q", "doctor"]), @"");
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
    assert_snapshot!(Context::new().run(&["pull", "--help"]), @"");
}

#[test]
fn flags_are_grouped_by_section() {
    assert_snapshot!(Context::new().run(&["config", "-h"]), @"");
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
    assert_snapshot!(context.shown(&output), @"");
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
