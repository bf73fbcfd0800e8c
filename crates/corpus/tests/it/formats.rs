//! Files in and out.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow_array::builder::{ListBuilder, StringBuilder, StructBuilder};
use arrow_array::{ArrayRef, Int64Array, RecordBatch, StringArray, TimestampMillisecondArray};
use arrow_schema::{DataType, Field, Fields, Schema};
use cashtag_corpus::formats::{ColumnKind, Format, NewColumn, RowReader, RowWriter};
use cashtag_corpus::{
    Example, LabelMap, ReadOptions, read_examples, read_examples_reported, write_chat_jsonl, write_dataset_csv,
    write_parquet,
};
use parquet::arrow::ArrowWriter;
use proptest::prelude::*;
use serde_json::{Value, json};

fn folder() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

fn file(folder: &tempfile::TempDir, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
    let path = folder.path().join(name);
    std::fs::write(&path, content).unwrap();
    path
}

fn read(path: &Path) -> Vec<(String, String)> {
    let examples = read_examples(path, &ReadOptions::default()).unwrap_or_else(|error| panic!("{error}"));
    examples.into_iter().map(|example| (example.text, example.label)).collect()
}

fn complaint(path: &Path, options: &ReadOptions) -> String {
    read_examples(path, options).unwrap_err().to_string()
}

/// Texts that files like to break.
fn nasty() -> Vec<Example> {
    let texts = [
        "=cmd|' /C calc'!A0",
        "@jim $AAPL \"to the moon\", he said",
        "-5% today; +3% yesterday",
        "line one\nline two\r\nline three",
        "'=already quoted",
        "tab\there, comma, quote \" and 🚀\u{200D}💎",
        "   spaces around   ",
        "\u{202E}right to left",
    ];
    let mut examples: Vec<Example> = texts.iter().map(|text| Example::new(*text, "Neutral")).collect();
    examples[0].kind = Some("sarcastic".into());
    examples[1].source = Some("=1+1".into());
    examples[2].pair = Some("p1".into());
    examples
}

#[test]
fn csv_and_parquet_give_back_what_was_written() {
    let folder = folder();
    for name in ["dataset.csv", "dataset.parquet"] {
        let path = folder.path().join(name);
        match name {
            "dataset.csv" => write_dataset_csv(&path, &nasty()).unwrap(),
            _ => write_parquet(&path, &nasty()).unwrap(),
        }
        let (found, columns) = read_examples_reported(&path, &ReadOptions::default()).unwrap();
        assert_eq!(found, nasty(), "{name}");
        assert_eq!(
            columns.to_string(),
            "text from \"text\", label from \"label\", kind from \"kind\", pair from \"pair\", source from \"source\" (guessed)"
        );
    }
    let written = std::fs::read_to_string(folder.path().join("dataset.csv")).unwrap();
    assert!(written.starts_with("text,label,kind,pair,source\n'=cmd|' /C calc'!A0,Neutral,sarcastic,,\n"), "{written}");
    assert!(written.contains("'=1+1"));
    for cell in written.lines().flat_map(|line| line.split(',')) {
        assert!(!cell.trim_start_matches('"').starts_with(['=', '+', '-', '@']), "a spreadsheet would run {cell:?}");
    }
}

#[test]
fn chat_lines() {
    let folder = folder();
    let path = folder.path().join("fine_tune_dataset.jsonl");
    let examples = [Example::new("a \"b\"\nc", "Positive"), Example::new("d", "Negative")];
    write_chat_jsonl(&path, &examples, "Say it.").unwrap();
    let written = std::fs::read_to_string(&path).unwrap();
    assert_eq!(
        written.lines().next().unwrap(),
        r#"{"messages":[{"role":"system","content":"Say it."},{"role":"user","content":"a \"b\"\nc"},{"role":"assistant","content":"Positive"}]}"#
    );
    assert_eq!(read_examples(&path, &ReadOptions::default()).unwrap(), examples);
    let sharegpt = file(
        &folder,
        "sharegpt.jsonl",
        r#"{"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "bullish"}]}"#,
    );
    assert_eq!(read(&sharegpt), [("x".into(), "Positive".into())]);
}

#[test]
fn many_spellings_of_a_table() {
    let folder = folder();
    let expected = [("up, \"we\" go".to_owned(), "Positive".to_owned()), ("down".into(), "Negative".into())];
    for (name, content) in [
        ("a.csv", "Tweet,Sentiment\n\"up, \"\"we\"\" go\",bullish\ndown,bearish\n"),
        ("b.csv", "\u{FEFF}id;headline;label\r\n1;\"up, \"\"we\"\" go\";positive\r\n\r\n2;down;NEG\r\n"),
        ("c.tsv", "sentence\tpolarity\n\"up, \"\"we\"\" go\"\t1\ndown\t-1\n"),
        ("d.csv", "positive,\"up, \"\"we\"\" go\"\nnegative,down\n"), // no header
        ("e.jsonl", "{\"body\": \"up, \\\"we\\\" go\", \"label\": 1}\n\n{\"label\": -1, \"body\": \"down\"}"),
        (
            "f.ndjson",
            "{\"text\": \"up, \\\"we\\\" go\", \"label_text\": \"Positive\", \"label\": 7}\n{\"text\": \"down\", \"label_text\": \"Negative\", \"label\": 9}",
        ),
        (
            "f.json",
            "[\n {\"text\": \"up, \\\"we\\\" go\", \"label\": \"Positive\"},\n {\"text\": \"down\",\n \"label\": \"Negative\"}\n]\n",
        ),
        ("g.txt", "Positive: up, \"we\" go\nnegative: down\n"),
        ("h.txt", "up, \"we\" go\n---\nPositive\n\ndown\n---\nNegative\n"),
        (
            "noname",
            "{\"text\": \"up, \\\"we\\\" go\", \"label\": \"Positive\"}\n{\"text\": \"down\", \"label\": \"Negative\"}",
        ),
    ] {
        assert_eq!(read(&file(&folder, name, content)), expected, "{name}");
    }
}

#[test]
fn numbers_need_a_map() {
    let folder = folder();
    let path = file(&folder, "n.csv", "text,label\na,0\nb,1\nc,2\n");
    let error = complaint(&path, &ReadOptions::default());
    assert!(error.contains("n.csv:2: label \"0\" is a number") && error.contains("--label-map"), "{error}");
    let options =
        ReadOptions { label_map: LabelMap::parse("0=Bearish,1=Bullish,2=Neutral").unwrap(), ..Default::default() };
    let labels: Vec<String> = read_examples(&path, &options).unwrap().into_iter().map(|e| e.label).collect();
    assert_eq!(labels, ["Negative", "Positive", "Neutral"]);
}

#[test]
fn complaints_name_the_line_and_the_mend() {
    let folder = folder();
    for (name, content, expected) in [
        ("a.csv", "text,label\nx,Positive\ny,Up\n", "a.csv:3: unknown label \"Up\""),
        ("b.csv", "text,label\nx,Positive\ny\n", "b.csv:3: expected 2 cells as in the header, found 1"),
        ("c.csv", "a,b\n1,2\n", "the columns are \"a\", \"b\""),
        ("d.csv", "", "the file is empty"),
        ("e.csv", "text,label\n", "there are no rows"),
        ("f.csv", "text,text\nx,y\n", "two columns are called \"text\""),
        ("g.csv", "text,label\n  ,Positive\n", "g.csv:2: the text is empty"),
        ("h.jsonl", "{\"text\": \"x\", \"label\": \"Positive\"}\n{\"text\": \n", "h.jsonl:2: expected a JSON object"),
        ("i.json", "[{\"text\": \"x\", \"label\": \"Neutral\"}, 7]", "i.json:2: expected a JSON object"),
        (
            "j.jsonl",
            "{\"messages\": [{\"role\": \"system\", \"content\": \"x\"}]}",
            "j.jsonl:1: there is no user message",
        ),
        ("k.txt", "hello\nworld\n", "k.txt:1: expected `label: tweet`"),
        ("l.csv", "text,label\nx,\n", "l.csv:2: the label is empty"),
        ("m.jsonl", "\u{1f}\u{8b}", "m.jsonl:1"),
    ] {
        let error = complaint(&file(&folder, name, content), &ReadOptions::default());
        assert!(error.contains(expected), "{name}: {error}");
    }
    let error = complaint(&file(&folder, "latin.csv", b"text,label\ncaf\xe9,Positive\n"), &ReadOptions::default());
    assert!(error.contains("latin.csv:2: the text is not UTF-8") && error.contains("iconv"), "{error}");
    let error = complaint(&file(&folder, "x.csv", b"\x1f\x8b\x08\x00"), &ReadOptions::default());
    assert!(error.contains("compressed"), "{error}");
    let error = complaint(&folder.path().join("nowhere.csv"), &ReadOptions::default());
    assert!(error.contains("cannot read") && error.contains("nowhere.csv"), "{error}");
}

#[test]
fn without_labels() {
    let folder = folder();
    let options = ReadOptions { require_label: false, ..ReadOptions::default() };
    for (name, content) in
        [("a.csv", "id,text\n1,hello\n"), ("b.txt", "hello\n\n"), ("c.jsonl", "{\"text\": \"hello\"}")]
    {
        let examples = read_examples(&file(&folder, name, content), &options).unwrap();
        assert_eq!((examples[0].text.as_str(), examples[0].label.as_str()), ("hello", ""), "{name}");
    }
}

/// A Parquet file as the `datasets` library writes it: class names in the metadata, a timestamp, and a column of chat
/// messages.
fn hub_parquet(path: &Path) -> RecordBatch {
    let fields =
        Fields::from(vec![Field::new("role", DataType::Utf8, true), Field::new("content", DataType::Utf8, true)]);
    let mut messages = ListBuilder::new(StructBuilder::from_fields(fields.clone(), 4));
    for (user, answer) in [("up", "Positive"), ("flat", "Neutral"), ("down", "Negative")] {
        for (role, content) in [("user", user), ("assistant", answer)] {
            let message = messages.values();
            message.field_builder::<StringBuilder>(0).unwrap().append_value(role);
            message.field_builder::<StringBuilder>(1).unwrap().append_value(content);
            message.append(true);
        }
        messages.append(true);
    }
    let metadata =
        json!({"info": {"features": {"label": {"names": ["bearish", "bullish", "neutral"], "_type": "ClassLabel"}}}});
    let columns: Vec<(&str, ArrayRef)> = vec![
        ("text", Arc::new(StringArray::from(vec![Some("up"), Some("flat"), Some("down")]))),
        ("label", Arc::new(Int64Array::from(vec![1, 2, 0]))),
        (
            "at",
            Arc::new(
                TimestampMillisecondArray::from(vec![Some(0), None, Some(1_709_209_800_500)]).with_timezone("UTC"),
            ),
        ),
        ("turns", Arc::new(messages.finish())),
    ];
    let fields: Vec<Field> =
        columns.iter().map(|(name, array)| Field::new(*name, array.data_type().clone(), true)).collect();
    let schema = Arc::new(Schema::new(fields).with_metadata([("huggingface".to_owned(), metadata.to_string())]));
    let batch = RecordBatch::try_new(schema.clone(), columns.into_iter().map(|(_, array)| array).collect()).unwrap();
    let mut writer = ArrowWriter::try_new(std::fs::File::create(path).unwrap(), schema, None).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
    batch
}

#[test]
fn class_names_of_the_hub() {
    let folder = folder();
    let path = folder.path().join("train-00000-of-00001.parquet");
    hub_parquet(&path);
    let expected = [("up", "Positive"), ("flat", "Neutral"), ("down", "Negative")];
    assert_eq!(read(&path), expected.map(|(text, label)| (text.to_owned(), label.to_owned())));
    let chat = ReadOptions { text_column: Some("turns".into()), ..ReadOptions::default() };
    let (found, columns) = read_examples_reported(&path, &chat).unwrap();
    assert_eq!(columns.to_string(), "chat messages from \"turns\"");
    assert_eq!(found[2], Example::new("down", "Negative"));
}

/// Copies `input` to `output` with two new columns, as `predict` does.
fn annotate(input: &Path, output: &Path) -> u64 {
    let reader = RowReader::open(input).unwrap();
    let new = [NewColumn::text("prediction"), NewColumn { name: "p".into(), kind: ColumnKind::Number }];
    let mut writer = RowWriter::create(output, &reader, &new).unwrap();
    for chunk in reader {
        let chunk = chunk.unwrap();
        let texts = chunk.texts("text").unwrap();
        let lengths = texts.iter().map(|text| json!(text.as_deref().map_or(0, str::len) as f64 / 10.0)).collect();
        let labels = texts.iter().map(|text| text.as_deref().map_or(Value::Null, |text| text.to_uppercase().into()));
        writer.write(&chunk, &[labels.collect(), lengths]).unwrap();
    }
    writer.finish().unwrap()
}

#[test]
fn rows_keep_their_columns() {
    let folder = folder();
    let out = |name: &str| folder.path().join(name);
    let text = |name: &str| std::fs::read_to_string(out(name)).unwrap();

    let csv = file(&folder, "in.csv", "id,text,p,note\n007,\"a,b\",old,'=1+1\n8,,x,\"two\nlines\"\n");
    assert_eq!(annotate(&csv, &out("out.csv")), 2);
    let expected = "id,text,note,prediction,p\n007,\"a,b\",'=1+1,\"A,B\",0.3\n8,,\"two\nlines\",,0.0\n";
    assert_eq!(text("out.csv"), expected, "`p` is replaced, the rest as it was");
    annotate(&csv, &out("csv.jsonl"));
    assert_eq!(
        text("csv.jsonl").lines().next().unwrap(),
        r#"{"id":"007","text":"a,b","note":"=1+1","prediction":"A,B","p":0.3}"#
    );

    let lines = "{\"z\": 1, \"text\": \"x\", \"n\": {\"a\": [1, 2.50]}, \"big\": 12345678901234567}\n{\"text\": \"y\", \"late\": null}\n";
    let jsonl = file(&folder, "in.jsonl", lines);
    annotate(&jsonl, &out("out.jsonl"));
    assert_eq!(
        text("out.jsonl"),
        "{\"z\":1,\"text\":\"x\",\"n\":{\"a\":[1,2.5]},\"big\":12345678901234567,\"prediction\":\"X\",\"p\":0.1}\n\
         {\"text\":\"y\",\"late\":null,\"prediction\":\"Y\",\"p\":0.1}\n"
    );
    annotate(&jsonl, &out("jsonl.csv"));
    assert_eq!(
        text("jsonl.csv"),
        "z,text,n,big,late,prediction,p\n1,x,\"{\"\"a\"\":[1,2.5]}\",12345678901234567,,X,0.1\n,y,,,,Y,0.1\n"
    );
    annotate(&jsonl, &out("jsonl.parquet"));
    let mut reader = RowReader::open(&out("jsonl.parquet")).unwrap();
    assert_eq!(
        reader.next().unwrap().unwrap().rows().unwrap()[0],
        *json!({"z": 1, "text": "x", "n": "{\"a\":[1,2.5]}", "big": 12345678901234567i64, "late": null, "prediction": "X", "p": 0.1})
            .as_object()
            .unwrap()
    );

    let parquet = out("in.parquet");
    let batch = hub_parquet(&parquet);
    annotate(&parquet, &parquet); // onto itself
    let chunk = RowReader::open(&parquet).unwrap().next().unwrap().unwrap();
    let rows = chunk.rows().unwrap();
    assert_eq!(rows[2]["at"], "2024-02-29T12:30:00.5Z");
    assert_eq!(rows[0]["turns"][1], json!({"role": "assistant", "content": "Positive"}));
    assert_eq!((&rows[1]["prediction"], &rows[1]["p"]), (&json!("FLAT"), &json!(0.4)));
    let file = std::fs::File::open(&parquet).unwrap();
    let schema = parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder::try_new(file).unwrap().schema().clone();
    for field in batch.schema().fields() {
        assert_eq!(schema.field_with_name(field.name()).unwrap().data_type(), field.data_type(), "the type stays");
    }
    assert!(!schema.metadata().contains_key("huggingface"), "its list of columns would be wrong now");
    annotate(&parquet, &out("parquet.csv"));
    assert!(text("parquet.csv").starts_with("text,label,at,turns,prediction,p\nup,1,1970-01-01T00:00:00Z,"));
}

#[test]
fn streams_have_no_end_in_memory() {
    // 40 MB through chunks of at most 8 MiB, and a progress that grows.
    let folder = folder();
    let line = format!("{{\"text\": \"{}\"}}\n", "x".repeat(20_000));
    let path = file(&folder, "big.jsonl", line.repeat(2_000));
    let mut reader = RowReader::open(&path).unwrap();
    let (mut rows, mut last) = (0, 0.0);
    while let Some(chunk) = reader.next() {
        let chunk = chunk.unwrap();
        assert!(chunk.len() <= 500, "{} rows of 20 kB at a time", chunk.len());
        rows += chunk.len();
        let progress = reader.progress().unwrap();
        assert!(progress > last && progress <= 1.0);
        last = progress;
    }
    assert_eq!((rows, last), (2_000, 1.0));
}

/// A row group is held until it is complete: long texts end it before many rows do.
#[test]
fn row_groups_are_bounded_by_bytes() {
    let folder = folder();
    // Noise, so that compression does not make it small.
    let mut state = 1u64;
    let mut text = String::new();
    for i in 0..3_000 {
        let noise = (0..10_000).map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            char::from(b' ' + 1 + (state >> 33) as u8 % 90)
        });
        let noise: String = noise.map(|c| if matches!(c, '"' | '\\') { 'x' } else { c }).collect();
        text += &format!("{{\"id\": {i}, \"text\": \"{noise}\"}}\n");
    }
    let (input, out) = (file(&folder, "big.jsonl", text), folder.path().join("big.parquet"));
    let reader = RowReader::open(&input).unwrap();
    let mut writer = RowWriter::create(&out, &reader, &[NewColumn::number("p")]).unwrap();
    for chunk in reader {
        let chunk = chunk.unwrap();
        writer.write(&chunk, &[vec![json!(0.5); chunk.len()]]).unwrap();
    }
    assert_eq!(writer.finish().unwrap(), 3_000);
    let file = std::fs::File::open(&out).unwrap();
    let read = parquet::file::reader::SerializedFileReader::new(file).unwrap();
    let groups = parquet::file::reader::FileReader::metadata(&read).row_groups();
    let sizes: Vec<i64> = groups.iter().map(|g| g.compressed_size() >> 20).collect();
    // 30 MB of noise of 90 letters, that is some 24 MB compressed.
    assert!(groups.len() > 1 && sizes.iter().all(|mib| *mib <= 16), "{sizes:?} MiB");
    assert_eq!(groups.iter().map(|g| g.num_rows()).sum::<i64>(), 3_000);
}

#[test]
fn records_have_a_longest() {
    let folder = folder();
    let long = "x".repeat(17 << 20);
    let csv = file(&folder, "quote.csv", format!("text,label\na,Positive\n\"never closed {long}"));
    let error = complaint(&csv, &ReadOptions::default());
    assert!(error.contains("longer than 16 MiB") && error.contains("quote"), "{error}");
    let jsonl = file(&folder, "long.jsonl", format!("{{\"text\": \"{long}\"}}"));
    assert!(complaint(&jsonl, &ReadOptions::default()).contains("long.jsonl:1: a record is longer than 16 MiB"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever a row of a CSV file holds comes back from it.
    #[test]
    fn any_text_survives_csv(texts in proptest::collection::vec("['=+@-]{0,2}[\\PC\n\r\t\",]{1,40}", 1..8)) {
        let examples: Vec<Example> = texts
            .iter()
            .filter(|text| !text.trim().is_empty())
            .map(|text| Example::new(text.as_str(), "Negative"))
            .collect();
        prop_assume!(!examples.is_empty());
        let folder = folder();
        let path = folder.path().join("x.csv");
        write_dataset_csv(&path, &examples).unwrap();
        prop_assert_eq!(read_examples(&path, &ReadOptions::default()).unwrap(), examples);
    }
}

#[test]
fn formats_by_name_and_content() {
    let folder = folder();
    let detect = |name: &str, content: &[u8]| Format::detect(&file(&folder, name, content)).unwrap();
    assert_eq!(detect("a.csv", b"a|b\n"), Format::Csv { delimiter: b'|' });
    assert_eq!(detect("a.csv", b"a b\n"), Format::Csv { delimiter: b',' });
    assert_eq!(detect("b.dat", b"PAR1...."), Format::Parquet);
    assert_eq!(detect("c", b" {\"a\": 1}"), Format::Jsonl);
    assert_eq!(detect("d.txt", b"{hello}"), Format::Text);
}
