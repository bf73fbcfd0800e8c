//! Generation with a server that behaves: the recipe on the wire, and results that do not depend on timing.

use std::sync::Mutex;
use std::time::Duration;

use cashtag_corpus::generate::{Event, FormatChoice, GenerateOptions, Outcome, Progress, Stop, generate};
use cashtag_corpus::recipe::TASK_PROMPT;
use cashtag_corpus::{JUDGED, LABELS, Price, journal};
use serde_json::json;

use crate::server::{Request, Server, fingerprint, good_answer, say, tweet};

/// Keeps what was said.
#[derive(Default)]
pub(crate) struct Heard(pub(crate) Mutex<Vec<String>>);

impl Progress for Heard {
    fn event(&self, event: &Event<'_>) {
        let line = match event {
            Event::Accepted { slot, done, .. } => format!("accepted {slot} {done}"),
            Event::Rejected { slot, reason, .. } => format!("rejected {slot}: {reason}"),
            Event::Failed { problem, pause } => format!("failed {pause:?}: {problem}"),
            Event::Note(note) => format!("note: {note}"),
            Event::Started { count, answers } => format!("started {count} {answers}"),
        };
        self.0.lock().unwrap().push(line);
    }
}

impl Heard {
    pub(crate) fn lines(&self) -> Vec<String> {
        self.0.lock().unwrap().clone()
    }
}

pub(crate) fn options(count: usize) -> GenerateOptions {
    GenerateOptions { count, seed: 7, ..GenerateOptions::default() }
}

fn run(server: &Server, options: &GenerateOptions) -> Outcome {
    let folder = tempfile::tempdir().unwrap();
    generate(&server.client(), options, &folder.path().join("journal.jsonl"), &()).unwrap()
}

#[test]
fn the_recipe_on_the_wire() {
    let server = Server::start(good_answer);
    let outcome = run(&server, &GenerateOptions { concurrency: 1, ..options(40) });
    assert_eq!(outcome.examples.len(), 40);
    assert_eq!(outcome.system_message.as_deref(), Some("Given a tweet, answer Positive, Neutral or Negative."));
    assert_eq!((outcome.given_up, outcome.unanswered, &outcome.stop), (0, 0, &None));
    assert_eq!((outcome.totals.requests, outcome.totals.prompt_tokens, outcome.totals.cost), (41, 4100, None));

    let requests = server.requests();
    assert_eq!(requests.len(), 41, "one call a tweet, and one for the system message");
    let second = &requests[0];
    assert_eq!((&second["max_tokens"], &second["messages"][1]["content"]), (&json!(500), &json!(TASK_PROMPT)));
    let shown = |request: &serde_json::Value| {
        request["messages"].as_array().unwrap().iter().filter(|message| message["role"] == "assistant").count()
    };
    for request in &requests[1..] {
        assert_eq!((&request["model"], &request["temperature"]), (&json!("gpt-4"), &json!(0.5)));
        assert_eq!(request["max_tokens"], 1000);
        assert!(request["messages"][0]["content"].as_str().unwrap().contains(TASK_PROMPT), "the task is sent");
        assert_eq!(request["response_format"]["type"], "json_schema");
        assert!(shown(request) <= 8);
    }
    assert_eq!((shown(&requests[1]), shown(&requests[40])), (0, 8));

    for label in LABELS {
        let count = outcome.examples.iter().filter(|example| example.label == label).count();
        assert!((12..=15).contains(&count), "{label}: {count} of 40");
    }
    for kind in ["plain", "mixed", "sarcastic", "contextual", "targeted"] {
        assert!(outcome.examples.iter().any(|example| example.kind.as_deref() == Some(kind)), "{kind}");
    }
}

/// The write-up's own loop: no wishes, answers as text.
#[test]
fn without_quotas_the_model_chooses() {
    let server = Server::start(|request: &Request| match request.wants_system_message() {
        true => good_answer(request),
        false => say(&format!("{}\n---\n{}", tweet(request.number as u64), LABELS[request.number % 3])),
    });
    let plain = GenerateOptions { quotas: None, format: FormatChoice::Text, ..options(30) };
    let outcome = run(&server, &GenerateOptions { concurrency: 1, ..plain });
    assert_eq!(outcome.examples.len(), 30);
    assert_eq!(outcome.examples[0].kind, None);
    let requests = server.requests();
    assert!(requests.iter().all(|request| request["response_format"].is_null()));
    assert_eq!(requests[1]["messages"][1]["content"], "Write the next example.");
}

/// Answers depend on the request alone, arrive in a different order each time, and hold every kind of bad answer. The
/// results must be the same for every concurrency.
#[test]
fn the_order_of_arrival_does_not_matter() {
    let fickle = |request: &Request| {
        let print = fingerprint(request);
        if request.wants_system_message() {
            return good_answer(request);
        }
        // A delay that has nothing to do with the content.
        let nanos = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().subsec_nanos();
        std::thread::sleep(Duration::from_micros(u64::from(nanos / 1000 % 5000)));
        match print % 10 {
            0 => say(&format!("{}\n---\n{}", tweet(print % 70), request.label())), // often one that was there before
            1 => say(&format!("{}\n---\nPositive", tweet(print))),                 // often the wrong label
            2 => say("I'm sorry, but I cannot do that."),
            3 => say(&format!("{}\n---\n{}", JUDGED[(print / 10 % 7) as usize].0, request.label())),
            _ => good_answer(request),
        }
    };
    let mut results = Vec::new();
    for concurrency in [1, 3, 16, 8] {
        let server = Server::start(fickle);
        let outcome = run(&server, &GenerateOptions { concurrency, ..options(120) });
        assert!(outcome.examples.len() > 110 && outcome.rejected.values().sum::<u64>() > 20, "{outcome:?}");
        assert!(outcome.examples.iter().all(|example| JUDGED.iter().all(|(judged, _)| example.text != *judged)));
        let mut texts: Vec<&str> = outcome.examples.iter().map(|example| example.text.as_str()).collect();
        texts.sort_unstable();
        texts.dedup();
        assert_eq!(texts.len(), outcome.examples.len(), "no tweet twice");
        results.push(outcome);
    }
    assert!(
        results.windows(2).all(|pair| pair[0] == pair[1]),
        "{:?}",
        results.iter().map(|r| &r.rejected).collect::<Vec<_>>()
    );
}

#[test]
fn a_finished_run_asks_nothing_and_a_longer_one_only_the_rest() {
    let server = Server::start(good_answer);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("journal.jsonl");
    let go = |count| generate(&server.client(), &options(count), &path, &()).unwrap();
    let first = go(20);
    let asked = server.requests().len();
    let size = std::fs::metadata(&path).unwrap().len();
    assert_eq!(go(20), first);
    assert_eq!((server.requests().len(), std::fs::metadata(&path).unwrap().len()), (asked, size));
    let longer = go(30);
    assert_eq!(longer.examples[..20], first.examples);
    assert_eq!(server.requests().len(), asked + 10);
    let harvest = journal::harvest(&path).unwrap();
    assert_eq!((harvest.examples, harvest.system_message), (longer.examples, longer.system_message));
    let content = std::fs::read_to_string(&path).unwrap();
    assert!(!content.contains("sk-secret"), "the key is not in the journal");
}

/// Another concurrency than the journal was begun with is no other run, and leads to the same tweets.
#[test]
fn the_concurrency_may_change_on_the_way() {
    let folder = tempfile::tempdir().unwrap();
    let server = Server::start(good_answer);
    let go = |name: &str, concurrency, count| {
        let options = GenerateOptions { concurrency, ..options(count) };
        generate(&server.client(), &options, &folder.path().join(name), &()).unwrap()
    };
    let steady = go("steady.jsonl", 4, 90);
    go("changed.jsonl", 4, 20);
    go("changed.jsonl", 100, 50);
    assert_eq!(go("changed.jsonl", 1, 90), steady);
    let wide = go("wide.jsonl", 40, 90);
    assert_eq!(go("wide.jsonl", 2, 90), wide);
}

/// Nothing is asked any more, and every answer that was under way is in the journal.
#[test]
fn stopped_when_asked() {
    struct StopAfter(usize, std::sync::atomic::AtomicUsize);
    impl Progress for StopAfter {
        fn event(&self, event: &Event<'_>) {
            if matches!(event, Event::Accepted { .. }) {
                self.1.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            }
        }
        fn stop_asked(&self) -> bool {
            self.1.load(std::sync::atomic::Ordering::Relaxed) >= self.0
        }
    }
    let server = Server::start(good_answer);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("journal.jsonl");
    let outcome = generate(&server.client(), &options(60), &path, &StopAfter(10, Default::default())).unwrap();
    assert_eq!(outcome.stop, Some(Stop::Asked));
    let asked = server.requests().len();
    assert!((11..60).contains(&asked), "{asked} requests");
    let answers = std::fs::read_to_string(&path).unwrap().lines().filter(|line| line.contains("\"answer\"")).count();
    assert_eq!(answers, asked - 1, "all but the one for the system message are answers to a slot");
    let outcome = generate(&server.client(), &options(60), &path, &()).unwrap();
    assert_eq!((outcome.examples.len(), server.requests().len()), (60, 61), "nothing is asked twice");
}

#[test]
fn the_budget_holds() {
    // 100 and 20 tokens an answer: at most 1,000 tokens are eight answers, and fewer with what must be set aside.
    for concurrency in [1, 8] {
        let server = Server::start(good_answer);
        let limited = GenerateOptions {
            concurrency,
            max_tokens: Some(3_000),
            max_answer_tokens: 200,
            price: Some(Price { prompt: 10.0, completion: 30.0 }),
            ..options(100)
        };
        let outcome = run(&server, &limited);
        assert_eq!(outcome.stop, Some(Stop::Budget));
        let tokens = outcome.totals.prompt_tokens + outcome.totals.completion_tokens;
        assert!(tokens <= 3_000 && outcome.examples.len() >= 10, "{tokens} tokens, {} tweets", outcome.examples.len());
        assert_eq!(tokens, 120 * server.requests().len() as u64);
        assert_eq!(outcome.unanswered, 100 - outcome.examples.len());
        let cost = outcome.totals.cost.unwrap();
        assert!((cost - tokens as f64 / 120.0 * (100.0 * 10.0 + 20.0 * 30.0) / 1e6).abs() < 1e-9, "{cost}");
    }
    let server = Server::start(good_answer);
    let cheap = GenerateOptions {
        max_cost: Some(0.03),
        max_answer_tokens: 200,
        price: Some(Price { prompt: 10.0, completion: 30.0 }),
        ..options(100)
    };
    let outcome = run(&server, &cheap);
    assert_eq!(outcome.stop, Some(Stop::Budget));
    assert!(outcome.totals.cost.unwrap() <= 0.03 && outcome.totals.cost.unwrap() > 0.01, "{:?}", outcome.totals);
    let unpriced = GenerateOptions { max_cost: Some(1.0), ..options(1) };
    let folder = tempfile::tempdir().unwrap();
    let error = generate(&server.client(), &unpriced, &folder.path().join("j"), &()).unwrap_err().to_string();
    assert!(error.contains("--price"), "{error}");
}
