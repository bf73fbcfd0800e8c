//! `cashtag predict --in FILE --out FILE`, killed at any moment: the next run goes on, and what comes out has all rows, all
//! columns and the order of the input, in each format.

use std::fmt::Write as _;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::context::{Context, files};
use super::serving::{PATIENCE, ended};
use super::tiny;

const ROWS: usize = 1000;
const KILLS: u64 = 3;
/// Bytes of the journal for a row: three probabilities and a tag.
const RECORD: u64 = 13;

fn arguments<'a>(model: &'a [String], input: &'a str, out: &'a str) -> Vec<&'a str> {
    ["predict", "-q", "--in", input, "--out", out].into_iter().chain(model.iter().map(String::as_str)).collect()
}

fn whole(context: &Context, model: &[String], input: &str, out: &str) -> String {
    let mut command = context.command(&arguments(model, input, out));
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let status = ended(&mut child);
    let _ = child.kill();
    let said = String::from_utf8_lossy(&child.wait_with_output().unwrap().stderr).into_owned();
    assert!(status.is_some_and(|s| s.success()), "{said}");
    said
}

#[test]
fn killed_and_gone_on_with() {
    let Some((context, model)) = tiny::context() else { return };
    let mut csv = String::from("id,user,text,likes,note\n");
    for i in 0..ROWS {
        // Some have no text, some have quotes, line ends and commas in it.
        match i % 50 {
            7 => writeln!(csv, "{i},u{},,{},\"a, b\"", i % 9, i * 3),
            8 => writeln!(csv, "{i},u{},\"{}\n\"\"quoted\"\", 日本\",{},", i % 9, tiny::words(i), i * 3),
            _ => writeln!(csv, "{i},u{},{},{},x{i}", i % 9, tiny::words(i), i * 3),
        }
        .unwrap();
    }
    context.write("tweets.csv", csv);
    // The other formats, made by the program itself, have the columns of an answer already.
    whole(&context, &model, "tweets.csv", "tweets.jsonl");
    whole(&context, &model, "tweets.csv", "tweets.parquet");
    for format in ["csv", "jsonl", "parquet"] {
        let (input, undisturbed, out) =
            (format!("tweets.{format}"), format!("whole.{format}"), format!("out.{format}"));
        whole(&context, &model, &input, &undisturbed);
        let journal = context.path(&format!("{out}.answers"));
        for kill in 1..=KILLS {
            let mut command = context.command(&arguments(&model, &input, &out));
            let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
            let wanted = kill * ROWS as u64 / (KILLS + 2) * RECORD;
            let began = Instant::now();
            while std::fs::metadata(&journal).map_or(0, |m| m.len()) < wanted {
                assert!(began.elapsed() < PATIENCE && child.try_wait().unwrap().is_none(), "{format}: ended too early");
                std::thread::sleep(Duration::from_millis(2));
            }
            child.kill().unwrap();
            child.wait().unwrap();
            assert!(!context.path(&out).exists(), "half an output has the name of a whole one");
        }
        let known = (std::fs::metadata(&journal).unwrap().len() - 40) / RECORD;
        // Without -q it says so.
        let said = context.run(&arguments(&model, &input, &out).into_iter().filter(|a| *a != "-q").collect::<Vec<_>>());
        assert!(said.contains(&format!("going on after {known} of {ROWS} rows")), "{format}: {said}");
        assert!(known as usize >= ROWS / 2, "{known}");
        let (a, b) = (std::fs::read(context.path(&out)).unwrap(), std::fs::read(context.path(&undisturbed)).unwrap());
        assert!(a == b, "{format}: a run that was killed ends otherwise than one that was not");
        assert!(!journal.exists());
    }
    let left: Vec<String> = files(&context.path("")).into_iter().filter(|f| f.starts_with("out.")).collect();
    assert_eq!(left, ["out.csv", "out.jsonl", "out.parquet"]);

    // Order, columns, values, and rows without a text.
    let text = std::fs::read_to_string(context.path("out.jsonl")).unwrap();
    let rows: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(rows.len(), ROWS);
    for (i, row) in rows.iter().enumerate() {
        let number = |name: &str| row[name].as_f64().or_else(|| row[name].as_str()?.parse().ok());
        assert_eq!((number("id"), number("likes")), (Some(i as f64), Some(3.0 * i as f64)), "{row}");
        assert_eq!(row["label"].is_null(), i % 50 == 7, "{row}");
        assert_eq!(row["label"], row["predicted_label"]);
        if i % 50 == 8 {
            assert!(row["text"].as_str().unwrap().ends_with("\n\"quoted\", 日本"), "{row}");
        }
    }
    readers(&context);
}

/// What the tools of data scientists make of it, where they are there.
fn readers(context: &Context) {
    const SCRIPT: &str = r#"
import sys
rows, answers = int(sys.argv[1]), ["label", "confidence", "p_positive", "p_neutral", "p_negative"]
names = ["id", "user", "text", "likes", "note"] + answers + ["predicted_label", "predicted_confidence"] + ["predicted_" + a for a in answers[2:]]
import duckdb, pandas, polars
for read in (pandas.read_parquet, polars.read_parquet, lambda f: duckdb.sql(f"select * from '{f}'").pl()):
    table = read("out.parquet")
    assert list(table.columns)[:10] == names[:10] and set(names) >= set(table.columns), table.columns
    assert [int(i) for i in table["id"]] == list(range(rows))
    assert sum(1 for label in table["label"] if label is None or label != label) == rows // 50
    with_text = [sum(p) for p in zip(*(table[a] for a in answers[2:])) if p[0] is not None and p[0] == p[0]]
    assert len(with_text) == rows - rows // 50 and all(abs(s - 1) < 1e-4 for s in with_text)
assert len(pandas.read_csv("out.csv")) == len(pandas.read_json("out.jsonl", lines=True)) == rows
"#;
    let python = std::env::var("CASHTAG_TEST_PYTHON").unwrap_or_else(|_| "python3".into());
    let has = Command::new(&python).args(["-c", "import duckdb, pandas, polars, pyarrow"]).output();
    if !has.is_ok_and(|o| o.status.success()) {
        println!("skipped: {python} has no duckdb, pandas, polars, pyarrow (CASHTAG_TEST_PYTHON names another)");
        return;
    }
    let mut command = Command::new(python);
    command.args(["-c", SCRIPT, &ROWS.to_string()]).current_dir(context.path("")).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let status = ended(&mut child);
    let _ = child.kill();
    let said = String::from_utf8_lossy(&child.wait_with_output().unwrap().stderr).into_owned();
    assert!(status.is_some_and(|s| s.success()), "{said}");
}
