//! `prepare` from end to end.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use cashtag_corpus::generate::{GenerateOptions, generate};
use cashtag_corpus::prepare::{PrepareOptions, Report, SplitBy, prepare};
use cashtag_corpus::{
    Example, LABELS, ReadOptions, builtin, find_duplicates, normalised_key, read_examples, similarity,
    write_dataset_csv,
};
use serde_json::Value;

use crate::server::{Server, good_answer};

fn run(options: PrepareOptions) -> Report {
    prepare(&options, &mut |_, share| (0.0..=1.0).contains(&share)).unwrap_or_else(|error| panic!("{error}"))
}

fn rows(path: &Path) -> Vec<HashMap<String, String>> {
    let mut reader = csv::Reader::from_path(path).unwrap();
    reader.deserialize().collect::<Result<_, _>>().unwrap()
}

fn lines(path: &Path) -> Vec<Value> {
    std::fs::read_to_string(path).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn write(folder: &tempfile::TempDir, name: &str, content: &str) -> PathBuf {
    let path = folder.path().join(name);
    std::fs::write(&path, content).unwrap();
    path
}

#[test]
fn what_is_dropped_and_why() {
    let folder = tempfile::tempdir().unwrap();
    let first = write(
        &folder,
        "first.csv",
        "text,label\n\
         $ACME beats on revenue &amp; raises its outlook for the year https://t.co/a,Positive\n\
         RT @x: $ACME beats on revenue &amp; raises its outlook for the year https://t.co/b,Positive\n\
         \"$ACME beats on revenue, and it raises its outlook for the year\",Positive\n\
         $ACME beats on revenue & raises its outlook for the year,Negative\n\
         $ZZ to report on Thursday,Neutral\n\
         $ZZ to report on Thursday!,Negative\n\
         https://t.co/nothing @but links,Neutral\n\
         https://t.co/nothing @links,Neutral\n\
         no such label,Sideways\n\
         The stock market is recovering after a steep decline last week.,Positive\n\
         $QQ opens flat,Neutral\n",
    );
    let second = write(
        &folder,
        "second.jsonl",
        "{\"tweet\": \"$QQ opens flat\", \"sentiment\": \"neutral\"}\n{\"tweet\": \"$QQ sinks\", \"sentiment\": \"bearish\"}\n",
    );
    let out_dir = folder.path().join("out");
    let report =
        run(PrepareOptions { inputs: vec![first, second], out_dir: out_dir.clone(), ..PrepareOptions::default() });
    let dropped: Vec<(&str, u64)> = report.dropped.iter().map(|(reason, rows)| (reason.as_str(), *rows)).collect();
    assert_eq!(
        dropped,
        [
            ("copies one of the sentences that models are judged by", 1),
            ("exact duplicate", 2),
            ("near duplicate", 1),
            ("nothing is left of the text but links, names and punctuation", 1),
            ("the same text with another label", 3),
            ("unknown label \"Sideways\", expected Positive, Neutral or Negative", 1),
        ]
    );
    assert_eq!((report.rows, report.kept, report.train + report.held_out), (13, 4, 4));
    assert_eq!(report.inputs[1].duplicates_of_earlier_inputs, 1);
    assert_eq!(report.inputs[1].columns, "text from \"tweet\", label from \"sentiment\" (guessed)");
    assert!(report.warnings.iter().any(|warning| warning.contains("3 rows repeat a text with another label")));

    let table = rows(&out_dir.join("dataset.csv"));
    assert_eq!(table.len(), 4);
    assert_eq!(table[0]["text"], "$ACME beats on revenue & raises its outlook for the year https://t.co/a");
    let rejected = lines(&out_dir.join("rejected.jsonl"));
    assert_eq!(rejected.len(), 9);
    assert!(rejected.iter().any(|row| row["line"] == 10 && row["source"] == "first.csv"), "{rejected:?}");
    let card = std::fs::read_to_string(out_dir.join("README.md")).unwrap();
    for part in ["task_categories", "path: train.parquet", "| exact duplicate | 2 |", "first.csv", "## Overlaps"] {
        assert!(card.contains(part), "{part}:\n{card}");
    }
    let json: Value = serde_json::from_slice(&std::fs::read(out_dir.join("prepare.json")).unwrap()).unwrap();
    assert_eq!((&json["kept"], &json["dropped"]["exact duplicate"]), (&4.into(), &2.into()));
}

#[test]
fn the_built_in_corpus_through_prepare() {
    let folder = tempfile::tempdir().unwrap();
    let examples = builtin().unwrap();
    let input = folder.path().join("corpus.csv");
    write_dataset_csv(&input, &examples).unwrap();
    let out_dir = folder.path().join("out");
    let options = PrepareOptions {
        inputs: vec![input],
        out_dir: out_dir.clone(),
        system_message: Some("Say the label.".into()),
        ..PrepareOptions::default()
    };
    let report = run(options.clone());
    let read = |name: &str| read_examples(&out_dir.join(name), &ReadOptions::default()).unwrap();
    let (train, test) = (read("train.parquet"), read("test.parquet"));
    assert_eq!((train.len() as u64, test.len() as u64), (report.train, report.held_out));
    let share = test.len() as f64 / report.kept as f64;
    assert!((0.08..0.12).contains(&share), "{share} held out");
    // Every field that the corpus has is there, and the three forms agree.
    assert!(train.iter().all(|e| e.kind.is_some() && e.register.is_some() && e.sector.is_some() && e.event.is_some()));
    let texts = |examples: &[Example]| -> Vec<String> { examples.iter().map(|e| e.text.clone()).collect() };
    assert_eq!(texts(&read("fine_tune_dataset.jsonl")), texts(&train));
    assert_eq!(texts(&read("evaluation_dataset.jsonl")), texts(&test));
    assert_eq!(lines(&out_dir.join("fine_tune_dataset.jsonl"))[0]["messages"][0]["content"], "Say the label.");
    // No near copy across the border, checked the slow way.
    let sketch = |example: &Example| cashtag_corpus::Sketch::of(&example.text);
    let train_sketches: Vec<_> = train.iter().map(sketch).collect();
    for example in &test {
        let mine = sketch(example);
        let (nearest, close) = train_sketches
            .iter()
            .map(|theirs| similarity(&mine, theirs))
            .enumerate()
            .max_by(|a, b| a.1.total_cmp(&b.1))
            .unwrap();
        assert!(close < 0.6, "{close:.2}: {:?} is near {:?}", example.text, train[nearest].text);
        if let Some(pair) = &example.pair {
            assert!(train.iter().all(|other| other.pair.as_ref() != Some(pair)), "pair {pair} is torn");
        }
    }
    // The same again, from the rows in another order: the same held-out texts.
    let mut reversed = examples;
    reversed.reverse();
    let input = folder.path().join("reversed.csv");
    write_dataset_csv(&input, &reversed).unwrap();
    let again = folder.path().join("again");
    run(PrepareOptions { inputs: vec![input], out_dir: again.clone(), ..options });
    let sorted = |mut texts: Vec<String>| {
        texts.sort();
        texts
    };
    let again = read_examples(&again.join("test.parquet"), &ReadOptions::default()).unwrap();
    // Of near copies the first stays, so the order may decide which of them that is.
    let (a, b) = (sorted(texts(&test)), sorted(texts(&again)));
    let differing = a.iter().filter(|text| b.binary_search(text).is_err()).count();
    assert!(differing * 50 <= a.len(), "{differing} of {} held-out texts differ", a.len());
}

#[test]
fn a_journal_is_an_input() {
    let folder = tempfile::tempdir().unwrap();
    let server = Server::start(good_answer);
    let journal = folder.path().join("journal.jsonl");
    let options = GenerateOptions { count: 100, ..GenerateOptions::default() };
    let outcome = generate(&server.client(), &options, &journal, &()).unwrap();
    let out_dir = folder.path().join("out");
    let report = run(PrepareOptions { inputs: vec![journal], out_dir: out_dir.clone(), ..PrepareOptions::default() });
    assert_eq!((report.kept, report.train, report.held_out), (100, 90, 10), "about 90 to train on, 10 to evaluate");
    assert_eq!(Some(report.system_message), outcome.system_message);
    assert_eq!(rows(&out_dir.join("dataset.csv")).len(), 100);
}

#[test]
fn by_time_and_balanced() {
    let folder = tempfile::tempdir().unwrap();
    let mut content = String::from("created_at,text,label\n");
    for n in 0..200u64 {
        let label = LABELS[if n % 10 < 7 { 1 } else { (n % 2) as usize * 2 }];
        content.push_str(&format!(
            "2024-{:02}-{:02}T10:00:00Z,{},{label}\n",
            n / 28 + 1,
            n % 28 + 1,
            crate::server::tweet(n)
        ));
    }
    content.push_str("some day,hello there you,Neutral\n");
    let input = write(&folder, "timed.csv", &content);
    let out_dir = folder.path().join("out");
    let options = PrepareOptions {
        inputs: vec![input],
        out_dir: out_dir.clone(),
        split_by: SplitBy::Time,
        held_out: 0.2,
        balance: true,
        ..PrepareOptions::default()
    };
    let report = run(options);
    assert_eq!(report.held_out, 40);
    assert_eq!(report.dropped["no usable time, and the split is by time"], 1);
    let counts: Vec<u64> = LABELS.iter().map(|label| report.train_stats.labels[*label]).collect();
    assert!(counts.iter().all(|count| *count == counts[0]), "{counts:?}");
    let table = rows(&out_dir.join("dataset.csv"));
    let times = |split: &str| -> Vec<String> {
        table.iter().filter(|row| row["split"] == split).map(|row| row["time"].clone()).collect()
    };
    assert!(times("train").iter().max() < times("test").iter().min(), "all of the past is before all of the future");
}

#[test]
fn nothing_to_prepare() {
    let folder = tempfile::tempdir().unwrap();
    let fail = |inputs: Vec<PathBuf>| {
        let out_dir = folder.path().join("out");
        prepare(&PrepareOptions { inputs, out_dir, ..PrepareOptions::default() }, &mut |_, _| true)
            .unwrap_err()
            .to_string()
    };
    assert!(fail(vec![]).contains("no input"));
    let bad = write(&folder, "bad.csv", "text,label\nx,Sideways\n");
    let error = fail(vec![bad]);
    assert!(error.contains("bad.csv:2: unknown label \"Sideways\"") && error.contains("hint"), "{error}");
    let long = write(&folder, "long.csv", &format!("text,label\n{},Neutral\n", "word ".repeat(20_000)));
    assert!(fail(vec![long]).contains("longer than 1000 characters"));
}

#[test]
fn stopped_without_a_trace() {
    let folder = tempfile::tempdir().unwrap();
    let input = folder.path().join("corpus.csv");
    write_dataset_csv(&input, &builtin().unwrap()).unwrap();
    for stage in ["reading", "finding duplicates", "splitting", "writing"] {
        let out_dir = folder.path().join("out");
        let options =
            PrepareOptions { inputs: vec![input.clone()], out_dir: out_dir.clone(), ..PrepareOptions::default() };
        let error = prepare(&options, &mut |now, _| now != stage).unwrap_err();
        assert!(matches!(error, cashtag_corpus::Error::Stopped), "{error}");
        assert_eq!(std::fs::read_dir(out_dir).unwrap().count(), 0, "{stage}");
    }
}

/// A directory as the hub's data sets have it: the training files are meant, not the others.
#[test]
fn directories() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join("data")).unwrap();
    for name in ["data/sent_train.csv", "data/sent_valid.csv", ".hidden.csv", "README.md", "dataset_infos.json"] {
        write(&folder, name, "text,label\nhello there,Neutral\n");
    }
    let names = |path: &Path| -> Vec<String> {
        let files = cashtag_corpus::formats::data_files(path).unwrap();
        files.iter().map(|file| file.strip_prefix(folder.path()).unwrap().to_string_lossy().into_owned()).collect()
    };
    assert_eq!(names(folder.path()), ["data/sent_train.csv"]);
    assert_eq!(names(&folder.path().join("data/sent_valid.csv")), ["data/sent_valid.csv"]);
    std::fs::remove_file(folder.path().join("data/sent_train.csv")).unwrap();
    write(&folder, "b.jsonl", "");
    assert_eq!(names(folder.path()), ["b.jsonl", "data/sent_valid.csv"]);
    let empty = tempfile::tempdir().unwrap();
    let error = cashtag_corpus::formats::data_files(empty.path()).unwrap_err().to_string();
    assert!(error.contains("no data files"), "{error}");
}

#[test]
fn what_counts_as_the_same() {
    let examples = [
        Example::new("$F up 5%", "Positive"),
        Example::new("$F up 50%", "Positive"),
        Example::new("$F down 5%", "Negative"),
    ];
    let fates = find_duplicates(&examples, &Default::default()).fates;
    assert!(fates.iter().all(|fate| *fate == cashtag_corpus::Fate::Keep), "{fates:?}");
    assert_eq!(normalised_key("RT @a: $F up 5%!"), normalised_key("$F up 5% https://t.co/x"));
}
