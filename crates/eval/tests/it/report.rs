//! The page: whatever the data, it is well-formed, closed to the outside, and nothing in it can run.

use std::collections::BTreeMap;

use cashtag_eval::report::{
    DataSummary, Description, ExampleTweet, FileEntry, HistoryRow, Mistake, Report, Setting, Split, Timing,
};
use cashtag_eval::{Judged, by_kind, compare, evaluate};
use proptest::prelude::*;

/// What a page is made of, read without leniency: every tag closed in order, every attribute in double quotes, no bare
/// `<`, `>` or `&` in text. Gives the tags with their attributes, and the text.
struct Parsed {
    tags: Vec<(String, Vec<(String, String)>)>,
    text: String,
}

fn parse(page: &str) -> Result<Parsed, String> {
    let mut rest = page.strip_prefix("<!DOCTYPE html>\n").ok_or("no doctype")?;
    let (mut open, mut tags, mut text) = (Vec::<String>::new(), Vec::new(), String::new());
    while let Some(at) = rest.find('<') {
        text += &unescape(&rest[..at])?;
        rest = &rest[at + 1..];
        if let Some(closing) = rest.strip_prefix('/') {
            let (name, after) = closing.split_once('>').ok_or("an unfinished closing tag")?;
            if open.pop().as_deref() != Some(name) {
                return Err(format!("</{name}> closes nothing"));
            }
            rest = after;
            continue;
        }
        let name: String = rest.chars().take_while(|c| c.is_ascii_alphanumeric()).collect();
        rest = &rest[name.len()..];
        let mut attributes = Vec::new();
        loop {
            if let Some(after) = rest.strip_prefix("/>") {
                rest = after;
                break;
            }
            if let Some(after) = rest.strip_prefix('>') {
                rest = after;
                if name == "style" {
                    rest = &rest[rest.find("</style>").ok_or("an unfinished style")?..];
                }
                open.push(name.clone());
                break;
            }
            let attribute = rest.strip_prefix(' ').ok_or_else(|| format!("<{name} goes wrong at {rest:.40}"))?;
            let (key, after) = attribute.split_once("=\"").ok_or("an attribute without a value")?;
            if !key.chars().all(|c| c.is_ascii_alphabetic() || "-:0123456789".contains(c)) {
                return Err(format!("the attribute name {key:.40}"));
            }
            let (value, after) = after.split_once('"').ok_or("an unfinished value")?;
            attributes.push((key.to_owned(), unescape(value)?));
            rest = after;
        }
        tags.push((name, attributes));
    }
    text += &unescape(rest)?;
    if open.is_empty() { Ok(Parsed { tags, text }) } else { Err(format!("left open: {open:?}")) }
}

fn unescape(text: &str) -> Result<String, String> {
    if text.contains(['<', '>']) {
        return Err(format!("a bare angle bracket in {text:.60}"));
    }
    let mut out = String::new();
    for (i, part) in text.split('&').enumerate() {
        if i == 0 {
            out += part;
            continue;
        }
        let (name, after) = part.split_once(';').ok_or_else(|| format!("a bare & before {part:.20}"))?;
        out += match name {
            "amp" => "&",
            "lt" => "<",
            "gt" => ">",
            "quot" => "\"",
            "#39" => "'",
            other => return Err(format!("&{other};")),
        };
        out += after;
    }
    Ok(out)
}

/// Everything that must hold for any page.
fn check(page: &str) -> Result<Parsed, String> {
    const ALLOWED: [&str; 44] = [
        "html",
        "head",
        "meta",
        "link",
        "title",
        "style",
        "body",
        "header",
        "main",
        "nav",
        "footer",
        "section",
        "h1",
        "h2",
        "h3",
        "p",
        "a",
        "ul",
        "li",
        "div",
        "span",
        "strong",
        "dl",
        "dt",
        "dd",
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
        "details",
        "summary",
        "figure",
        "figcaption",
        "pre",
        "code",
        "bdi",
        "svg",
        "line",
        "rect",
        "circle",
        "path",
        "text",
    ];
    let parsed = parse(page)?;
    let mut ids = Vec::new();
    for (name, attributes) in &parsed.tags {
        if !ALLOWED.contains(&name.as_str()) {
            return Err(format!("<{name}>"));
        }
        for (key, value) in attributes {
            let local = value.starts_with('#') || value == "data:,";
            if key.starts_with("on")
                || (["src", "action", "style", "srcset"].contains(&key.as_str()))
                || (key == "href" && !local)
            {
                return Err(format!("<{name} {key}=\"{value}\">"));
            }
            let geometry = ["x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "r", "d", "width", "height", "viewBox"];
            if geometry.contains(&key.as_str()) && (value.contains("NaN") || value.contains("inf")) {
                return Err(format!("{key}=\"{value}\""));
            }
            if key == "id" {
                ids.push(value.clone());
            }
        }
        let has = |key: &str| attributes.iter().any(|(k, _)| k == key);
        if name == "svg" && !(has("aria-label") || has("aria-hidden")) {
            return Err("a picture without words".into());
        }
    }
    let all = ids.len();
    ids.sort();
    ids.dedup();
    if ids.len() < all { Err("an id stands twice".into()) } else { Ok(parsed) }
}

fn labels() -> Vec<String> {
    ["Positive", "Neutral", "Negative"].map(String::from).to_vec()
}

fn judged(answers: &[(usize, usize)]) -> Vec<Judged> {
    answers
        .iter()
        .enumerate()
        .map(|(i, &(truth, answer))| {
            let mut probabilities = vec![0.15; 3];
            probabilities[answer] = 0.7;
            let kind = Some(["plain", "mixed"][i % 2].to_owned());
            Judged { text: format!("text {i}"), truth, probabilities, kind }
        })
        .collect()
}

/// A report in which every field is filled, with `text` in every place that takes one.
fn full(text: &str) -> Report {
    let t = || text.to_owned();
    let a = judged(&[(0, 0), (1, 0), (2, 0), (0, 2), (1, 1), (2, 1)]);
    let b = judged(&[(0, 0), (1, 1), (2, 2), (0, 2), (1, 1), (2, 2)]);
    let kinds = |j: &[Judged]| {
        let mut map = by_kind(j, &labels(), 1).expect("valid");
        let one = map["plain"].clone();
        map.insert(t(), one);
        map
    };
    Report {
        title: t(),
        created: t(),
        notice: Some(t()),
        command: Some(t()),
        device: t(),
        model: Description::new(text).fact(text, text),
        adapter: Some(Description::new(text).fact(text, text)),
        labels: vec![t(), "Neutral".into(), "Negative".into()],
        configuration: vec![Setting { key: t(), value: t(), source: t() }],
        data: DataSummary { source: t(), splits: vec![Split::count(text, 3, [(0, Some(text)), (2, None)])] },
        history: (1..30u32)
            .map(|i| HistoryRow {
                step: u64::from(i),
                epoch: f64::from(i) / 10.0,
                loss: Some(1.0 / f64::from(i)),
                eval_loss: (i % 5 == 0).then_some(0.5),
                learning_rate: Some(1e-4),
                grad_norm: Some(1.0),
                examples_per_second: Some(10.0),
                tokens_per_second: Some(400.0),
            })
            .collect(),
        before: evaluate(&a, &labels(), 1).ok(),
        after: evaluate(&b, &labels(), 1).ok(),
        untempered: None,
        comparison: compare(&a, &b, &labels(), 1).ok(),
        by_kind_before: kinds(&a),
        by_kind_after: kinds(&b),
        examples: vec![ExampleTweet {
            text: t(),
            expected: Some(0),
            note: Some(t()),
            before: Some(vec![0.2, 0.5, 0.3]),
            after: Some(vec![0.6, 0.3, 0.1]),
        }],
        mistakes: vec![Mistake { text: t(), truth: 2, kind: Some(t()), probabilities: vec![0.6, 0.3, 0.1] }],
        timings: vec![Timing { name: t(), seconds: 3.5 }],
        files: vec![FileEntry { path: t(), bytes: Some(1234), note: t() }],
    }
}

const ATTACK: &str =
    "</style></title></text><script>alert(1)</script><img src=x onerror='alert(2)'>\" onload=\"alert(3)&lt;";

#[test]
fn a_tweet_cannot_run() {
    let page = full(ATTACK).html();
    let parsed = check(&page).expect("a sound page");
    for marker in ["<script", "</script", "<img", "onload=\"", "onerror='"] {
        assert!(!page.contains(marker), "{marker}");
    }
    // What it says is still there to read, in each of the places that show it whole.
    assert!(parsed.text.matches(ATTACK).count() >= 12, "{}", parsed.text.matches(ATTACK).count());
    assert_eq!(page.matches("</style>").count(), 1);
    assert!(page.contains("default-src &#39;none&#39;"));
}

#[test]
fn the_page_asks_the_network_for_nothing() {
    let page = full("see https://t.co/abc or //example.com or javascript:alert(1)").html();
    let parsed = check(&page).expect("a sound page");
    for (name, attributes) in parsed.tags {
        for (key, value) in attributes {
            let shown = key == "aria-label" || key == "class" || (name == "meta" && key == "content");
            assert!(shown || !(value.contains("//") || value.contains("javascript:")), "<{name} {key}=\"{value}\">");
        }
    }
}

#[test]
fn every_section_is_there_when_its_data_are() {
    let page = full("words").html();
    let ids = [
        "results",
        "kinds",
        "confusion",
        "calibration",
        "training",
        "examples",
        "mistakes",
        "data",
        "setup",
        "reading",
    ];
    let mut tempered = full("words");
    tempered.untempered.clone_from(&tempered.before);
    let text = check(&tempered.html()).expect("a sound page").text;
    assert!(text.contains("After, without temperature") && !page.contains("without temperature"));
    for id in ids {
        assert!(page.contains(&format!("<section id=\"{id}\"")) && page.contains(&format!("href=\"#{id}\"")), "{id}");
    }
    let parsed = check(&page).expect("a sound page");
    assert!(parsed.text.contains("labels 83.3\u{a0}% of 6 held-out texts correctly; before, it was 33.3\u{a0}%."));
    assert!(parsed.text.contains("3 went from wrong to right and 0 from right to wrong"));
    assert!(parsed.text.contains("\u{2713} right") && parsed.text.contains("\u{2717} wrong"));
}

#[test]
fn half_a_report_is_a_report() {
    for drop in 0..6 {
        let mut report = full("words");
        match drop {
            0 => report.before = None,
            1 => report.after = None,
            2 => (report.before, report.after) = (None, None),
            3 => report.comparison = None,
            4 => report.labels.clear(),
            _ => report.history.truncate(1),
        }
        if let Err(problem) = check(&report.html()) {
            panic!("{drop}: {problem}");
        }
    }
    let empty = check(&Report::default().html()).expect("a sound page");
    assert!(empty.text.contains("No evaluation was made in this run."));
}

#[test]
fn a_difference_within_noise_is_called_that() {
    let a = judged(&[(0, 0), (1, 0), (2, 2), (0, 0)]);
    let b = judged(&[(0, 0), (1, 1), (2, 2), (0, 2)]);
    let mut report = full("words");
    report.before = evaluate(&a, &labels(), 1).ok();
    report.after = evaluate(&b, &labels(), 1).ok();
    report.comparison = compare(&a, &b, &labels(), 1).ok();
    let text = check(&report.html()).expect("a sound page").text;
    assert!(text.contains("is within the noise of this evaluation set"), "{text}");
    assert!(!text.contains("That is a gain"));
}

#[test]
fn a_report_survives_json_and_older_json() {
    let report = full("words");
    let json = serde_json::to_string(&report).expect("serialises");
    assert_eq!(serde_json::from_str::<Report>(&json).expect("parses"), report);
    let sparse: Report = serde_json::from_str(r#"{"title": "t", "history": [{"step": 1}]}"#).expect("parses");
    assert_eq!((sparse.title.as_str(), sparse.history[0].loss), ("t", None));
}

#[test]
fn inconsistent_data_are_drawn_as_far_as_they_go() {
    let mut report = full("words");
    let after = report.after.as_mut().expect("filled");
    after.confusion = vec![vec![1, 2], vec![], vec![3; 50]];
    after.per_class.truncate(1);
    after.reliability.truncate(2);
    after.accuracy.low = f64::NAN;
    after.log_loss.high = f64::INFINITY;
    report.by_kind_before = BTreeMap::new();
    report.data.splits[0].by_kind.insert("odd".into(), vec![1; 9]);
    report.examples[0].expected = Some(99);
    report.examples[0].before = Some(vec![f32::NAN, f32::INFINITY, -1.0, 2.0]);
    report.examples[0].after = Some(vec![]);
    report.mistakes[0].truth = usize::MAX;
    report.timings[0].seconds = f64::NAN;
    report.history[3] =
        HistoryRow { step: u64::MAX, epoch: f64::NAN, loss: Some(f64::INFINITY), ..HistoryRow::default() };
    report.history[4].learning_rate = Some(f64::NAN);
    report.history[5].grad_norm = Some(1e300);
    if let Err(problem) = check(&report.html()) {
        panic!("{problem}");
    }
}

#[test]
fn a_long_run_makes_no_long_page() {
    let mut report = full("words");
    report.history = (0..200_000u64)
        .map(|step| HistoryRow {
            step,
            loss: Some((step as f64).sin() + 2.0),
            eval_loss: Some(1.0),
            learning_rate: Some(1e-4),
            ..HistoryRow::default()
        })
        .collect();
    report.mistakes = vec![report.mistakes[0].clone(); 10_000];
    report.examples[0].text = "long ".repeat(1_000_000);
    report.configuration = vec![Setting { key: "k".into(), value: "v".repeat(50_000), source: "s".into() }; 3000];
    report.labels = (0..200).map(|i| format!("label {i}")).collect();
    let page = report.html();
    assert!(page.len() < 4_000_000, "{}", page.len());
    assert!(page.contains("9940 more are not shown."));
}

#[test]
fn the_hardest_mistakes_come_first() {
    let mut texts = judged(&[(0, 1), (0, 0), (2, 1), (1, 0)]);
    texts[2].probabilities = vec![0.0, 0.99, 0.01];
    let hardest = Mistake::hardest(&texts, 2);
    assert_eq!(hardest.iter().map(|m| m.text.as_str()).collect::<Vec<_>>(), ["text 2", "text 0"]);
    assert_eq!(Mistake::hardest(&texts, 99).len(), 3);
}

/// Every bit pattern, NaN and the infinities too.
const F64: prop::num::f64::Any = prop::num::f64::ANY;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn any_text_is_safe_everywhere(text in "(?s)[<>&\"'/=; a-zé\\u{0}-\\u{1f}\\u{200e}-\\u{202e}]{0,60}") {
        let problem = check(&full(&text).html()).err();
        prop_assert_eq!(problem, None);
    }

    #[test]
    fn any_numbers_make_a_sound_page(
        rows in prop::collection::vec((any::<u64>(), F64, prop::option::of(F64), F64), 0..40),
        shares in prop::collection::vec(prop::num::f32::ANY, 0..6),
        interval in (F64, F64, F64),
    ) {
        let mut report = full("words");
        report.history = rows
            .into_iter()
            .map(|(step, epoch, loss, other)| HistoryRow {
                step,
                epoch,
                loss,
                eval_loss: Some(other),
                learning_rate: Some(other),
                grad_norm: loss,
                examples_per_second: Some(other),
                tokens_per_second: Some(epoch),
            })
            .collect();
        report.examples[0].before = Some(shares.clone());
        report.mistakes[0].probabilities = shares;
        let after = report.after.as_mut().expect("filled");
        (after.accuracy.value, after.accuracy.low, after.accuracy.high) = interval;
        (after.log_loss.value, after.log_loss.low, after.log_loss.high) = interval;
        after.expected_calibration_error = interval.0;
        after.reliability[3].confidence = interval.1;
        after.reliability[3].count = 7;
        after.reliability[3].accuracy = interval.2;
        let comparison = report.comparison.as_mut().expect("filled");
        (comparison.accuracy.value, comparison.accuracy.low, comparison.accuracy.high) = interval;
        let problem = check(&report.html()).err();
        prop_assert_eq!(problem, None);
    }
}
