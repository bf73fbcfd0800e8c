//! Generation with a server that misbehaves.

use std::time::{Duration, Instant};

use cashtag_corpus::chat_api::{ChatClient, ClientOptions};
use cashtag_corpus::generate::{FormatChoice, GenerateOptions, Outcome, Stop, generate};
use cashtag_corpus::{Error, RetryPolicy, journal};
use serde_json::json;

use crate::generation::{Heard, options};
use crate::server::{Answer, Request, Server, completion, good_answer, say, status};

fn few(count: usize) -> GenerateOptions {
    GenerateOptions { concurrency: 1, system_message_tokens: None, ..options(count) }
}

/// Runs five tweets against a server whose second request goes wrong in the given way, then says what happened.
fn second_request(wrong: impl Fn(&Request) -> Answer + Send + Sync + 'static) -> (Outcome, Vec<String>, usize) {
    let server = Server::start(move |request: &Request| match request.number {
        1 => wrong(request),
        _ => good_answer(request),
    });
    let folder = tempfile::tempdir().unwrap();
    let heard = Heard::default();
    let client = ChatClient::new(ClientOptions { timeout: Duration::from_millis(1500), ..server.options() }).unwrap();
    let outcome = generate(&client, &few(5), &folder.path().join("journal.jsonl"), &heard).unwrap();
    let lines = heard.lines().into_iter().filter(|line| !line.starts_with("accepted") && !line.starts_with("started"));
    (outcome, lines.collect(), server.requests().len())
}

#[test]
fn what_passes_is_tried_again() {
    let json = |code: u16| move |_: &Request| status(code, json!({"error": {"message": "overloaded"}}));
    let raw = |body: &'static str| move |_: &Request| Answer::Full(200, vec![], body.as_bytes().to_vec());
    let half = |_: &Request| Answer::Half(completion("x\n---\nNeutral").to_string().into_bytes());
    type Handler = Box<dyn Fn(&Request) -> Answer + Send + Sync>;
    let cases: Vec<(Handler, &str)> = vec![
        (Box::new(json(500)), "500: overloaded"),
        (Box::new(json(503)), "503: overloaded"),
        (Box::new(json(408)), "408: overloaded"),
        (Box::new(json(409)), "409: overloaded"),
        (Box::new(json(429)), "429: overloaded"),
        (Box::new(raw("\u{1}\u{2}garbage")), "not JSON"),
        (Box::new(raw("<!DOCTYPE html><html><body>Bad gateway</body></html>")), "begins \"<!DOCTYPE html>"),
        (Box::new(raw("{\"error\": {\"message\": \"no worker\"}}")), "the server reports no worker"),
        (Box::new(raw("{\"hello\": 1}")), "no chat completion"),
        (Box::new(raw("")), "not JSON"),
        (Box::new(half), "broke off"),
        (Box::new(|_: &Request| Answer::HangUp), ""),
        (Box::new(|_: &Request| Answer::Silence(Duration::from_secs(4))), "timeout"),
    ];
    for (handler, expected) in cases {
        let (outcome, lines, requests) = second_request(handler);
        assert_eq!((outcome.examples.len(), requests), (5, 6), "{expected}: one request more");
        assert_eq!(lines.len(), 1, "{expected}: {lines:?}");
        assert!(lines[0].starts_with("failed Some(") && lines[0].contains(expected), "{expected}: {lines:?}");
    }
}

#[test]
fn retry_after_is_honoured() {
    for (value, date, least) in [
        ("1", None, 1000),
        ("0.3", None, 300),
        ("Sun, 06 Nov 1994 08:49:38 GMT", Some("Sun, 06 Nov 1994 08:49:37 GMT"), 1000),
    ] {
        let start = Instant::now();
        let (outcome, lines, requests) = second_request(move |_| {
            let mut headers = vec![("Retry-After".to_owned(), value.to_owned())];
            headers.extend(date.map(|date| ("Date".to_owned(), date.to_owned())));
            Answer::Full(429, headers, b"{\"error\": {\"message\": \"slow down\"}}".to_vec())
        });
        assert_eq!((outcome.examples.len(), requests), (5, 6));
        assert!(lines[0].contains(&format!("failed Some({:?})", Duration::from_millis(least))), "{lines:?}");
        assert!(start.elapsed() >= Duration::from_millis(least), "{value}");
    }
}

#[test]
fn a_server_that_asks_for_an_hour_is_not_waited_for() {
    let server = Server::start(|_: &Request| {
        Answer::Full(429, vec![("retry-after".into(), "3600".into())], b"{\"error\": \"come back later\"}".to_vec())
    });
    let folder = tempfile::tempdir().unwrap();
    let error = generate(&server.client(), &few(5), &folder.path().join("j"), &()).unwrap_err().to_string();
    assert!(error.contains("429: come back later") && error.contains("asks to wait 3600 s"), "{error}");
}

/// Three attempts, three tweets in a row without an answer, and the run says that the server is down.
#[test]
fn a_server_that_stays_down() {
    let server = Server::start(|_: &Request| status(500, json!({"error": {"message": "boom"}})));
    let folder = tempfile::tempdir().unwrap();
    let error = generate(&server.client(), &few(50), &folder.path().join("j"), &()).unwrap_err().to_string();
    assert!(error.contains("no usable answer in 3 attempts") && error.contains("500: boom"), "{error}");
    assert_eq!(server.requests().len(), 9);

    // Nobody listens at all.
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let client = ChatClient::new(ClientOptions { api_base: format!("http://{free}/v1"), ..server.options() }).unwrap();
    let error = generate(&client, &few(50), &folder.path().join("j2"), &()).unwrap_err().to_string();
    assert!(error.contains("3 attempts"), "{error}");
    let journal = std::fs::read_to_string(folder.path().join("j2")).unwrap();
    assert_eq!(journal.lines().count(), 1, "a refused connection costs nothing: {journal}");
}

/// It goes down in the middle: what was answered is kept, and the same command goes on.
#[test]
fn down_in_the_middle_then_up() {
    let server = Server::start(|request: &Request| match request.number {
        10..=40 => status(502, json!({})),
        _ => good_answer(request),
    });
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("journal.jsonl");
    let outcome = generate(&server.client(), &few(20), &path, &()).unwrap();
    assert_eq!((outcome.examples.len(), outcome.unanswered), (10, 10));
    assert!(matches!(outcome.stop, Some(Stop::Down(_))), "{:?}", outcome.stop);
    while server.requests().len() < 41 {
        let _ = generate(&server.client(), &few(20), &path, &());
    }
    let outcome = generate(&server.client(), &few(20), &path, &()).unwrap();
    assert_eq!((outcome.examples.len(), outcome.unanswered, outcome.stop), (20, 0, None));
}

#[test]
fn a_wrong_key_is_said_once() {
    for code in [401, 403] {
        let server = Server::start(move |_: &Request| {
            status(code, json!({"error": {"message": "Incorrect API key provided: sk-secret-of-the-test"}}))
        });
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal.jsonl");
        let heard = Heard::default();
        let start = Instant::now();
        let slow = ClientOptions { retry: RetryPolicy::default(), ..server.options() };
        let error = generate(&ChatClient::new(slow).unwrap(), &options(50), &path, &heard).unwrap_err().to_string();
        assert!(error.contains("refused the API key") && error.contains("hint: set OPENAI_API_KEY"), "{error}");
        assert!(error.contains("[key]") && !error.contains("sk-secret"), "{error}");
        assert_eq!(server.requests().len(), 1);
        assert!(start.elapsed() < Duration::from_secs(3), "at once");
        assert_eq!(heard.lines().len(), 1, "nothing but the start: {:?}", heard.lines());
    }
    // Found out by many at a time: still one error.
    let server = Server::start(|_: &Request| status(401, json!({"error": {"message": "no"}})));
    let folder = tempfile::tempdir().unwrap();
    let many = GenerateOptions { concurrency: 16, system_message_tokens: None, ..options(50) };
    let error = generate(&server.client(), &many, &folder.path().join("j"), &()).unwrap_err().to_string();
    assert_eq!(error.matches("refused").count(), 1);
    assert!(server.requests().len() <= 16);
}

/// A server may repeat what it was sent, in an answer or in an error.
#[test]
fn a_key_that_comes_back_is_not_kept() {
    let server = Server::start(|request| {
        let key = request.head.lines().find_map(|line| line.split_once("Bearer ")).map_or("", |(_, key)| key.trim());
        say(&format!("{} {key}\n---\n{}", crate::server::tweet(request.number as u64), request.label()))
    });
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("journal.jsonl");
    let outcome = generate(&server.client(), &few(3), &path, &()).unwrap();
    assert!(outcome.examples.iter().all(|example| example.text.contains("[key]")), "{outcome:?}");
    assert!(!std::fs::read_to_string(&path).unwrap().contains("sk-secret"));
}

#[test]
fn the_key_is_sent_in_the_header_only() {
    let server = Server::start(|request: &Request| {
        let good = request.head.to_lowercase().contains("authorization: bearer sk-secret-of-the-test");
        if good && !request.body.to_string().contains("sk-secret") {
            good_answer(request)
        } else {
            status(401, json!({}))
        }
    });
    let folder = tempfile::tempdir().unwrap();
    assert_eq!(generate(&server.client(), &few(2), &folder.path().join("j"), &()).unwrap().examples.len(), 2);
}

#[test]
fn refusals_of_the_request_are_not_repeated() {
    for (code, body, expected) in [
        (404, json!({"error": {"message": "The model `gpt-9` does not exist"}}), "`gpt-9` does not exist"),
        (301, json!({}), "has moved"),
        (405, json!("method not allowed"), "method not allowed"),
        (429, json!({"error": {"message": "You exceeded", "code": "insufficient_quota"}}), "no credit left"),
    ] {
        let server = Server::start(move |_: &Request| status(code, body.clone()));
        let folder = tempfile::tempdir().unwrap();
        let error = generate(&server.client(), &few(5), &folder.path().join("j"), &()).unwrap_err();
        assert!(matches!(error, Error::Api(_)) && error.to_string().contains(expected), "{error}");
        assert_eq!(server.requests().len(), 1, "{code}");
    }
    // A 400 is asked once more without response_format, then it is final.
    let server = Server::start(|_: &Request| status(400, json!({"error": {"message": "bad model"}})));
    let folder = tempfile::tempdir().unwrap();
    let error = generate(&server.client(), &few(5), &folder.path().join("j"), &()).unwrap_err().to_string();
    assert!(error.contains("400: bad model"), "{error}");
    assert_eq!(server.requests().len(), 2);
}

#[test]
fn no_structured_output_then_text() {
    let server = Server::start(|request: &Request| match request.body["response_format"].is_null() {
        false => {
            status(400, json!({"error": {"message": "Invalid parameter: 'response_format' of type 'json_schema'"}}))
        }
        true => good_answer(request),
    });
    let folder = tempfile::tempdir().unwrap();
    let heard = Heard::default();
    let outcome = generate(&server.client(), &few(20), &folder.path().join("j"), &heard).unwrap();
    assert_eq!((outcome.examples.len(), server.requests().len()), (20, 21), "found out once");
    assert_eq!(heard.lines().iter().filter(|line| line.starts_with("note")).count(), 1);
    let strict = GenerateOptions { format: FormatChoice::Json, ..few(5) };
    let error = generate(&server.client(), &strict, &folder.path().join("j2"), &()).unwrap_err().to_string();
    assert!(error.contains("takes no response_format"), "{error}");
}

#[test]
fn newer_models_name_things_differently() {
    let server = Server::start(|request: &Request| {
        if !request.body["max_tokens"].is_null() {
            let message = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead.";
            return status(400, json!({"error": {"message": message}}));
        }
        if !request.body["temperature"].is_null() {
            let message = "Unsupported value: 'temperature' does not support 0.5 with this model.";
            return status(400, json!({"error": {"message": message}}));
        }
        assert_eq!(request.body["max_completion_tokens"], 1000);
        good_answer(request)
    });
    let folder = tempfile::tempdir().unwrap();
    let outcome = generate(&server.client(), &few(5), &folder.path().join("j"), &()).unwrap();
    assert_eq!((outcome.examples.len(), server.requests().len()), (5, 7));
}

#[test]
fn a_short_context_shows_fewer_examples() {
    let server = Server::start(|request: &Request| match request.messages().len() {
        // System, user, and more than three examples.
        6.. => {
            let message = "This model's maximum context length is 2048 tokens.";
            status(400, json!({"error": {"message": message, "code": "context_length_exceeded"}}))
        }
        _ => good_answer(request),
    });
    let folder = tempfile::tempdir().unwrap();
    let heard = Heard::default();
    let outcome = generate(&server.client(), &few(40), &folder.path().join("j"), &heard).unwrap();
    assert_eq!(outcome.examples.len(), 40);
    let longest =
        server.requests().iter().filter_map(|r| r["messages"].as_array().map(Vec::len)).filter(|n| *n < 6).max();
    assert!(longest >= Some(4), "{longest:?}");
    assert!(
        heard.lines().iter().any(|line| line.contains("showing at most 2 earlier examples")),
        "{:?}",
        heard.lines()
    );

    let server = Server::start(|_: &Request| {
        status(400, json!({"error": {"message": "too long", "code": "context_length_exceeded"}}))
    });
    let error = generate(&server.client(), &few(5), &folder.path().join("j2"), &()).unwrap_err().to_string();
    assert!(error.contains("context is too short"), "{error}");
}

/// What was paid for and is of no use: kept with the reason, and asked for again.
#[test]
fn unusable_answers() {
    let cases: Vec<(serde_json::Value, &str)> = vec![
        (json!({"choices": []}), "the answer is empty"),
        (completion(""), "the answer is empty"),
        (completion("I'm sorry, but I can't assist with that."), "the model refused"),
        (json!({"choices": [{"message": {"content": null, "refusal": "no"}}]}), "the model refused"),
        (json!({"choices": [{"finish_reason": "length", "message": {"content": "{\"tweet\": \"ab"}}]}), "cut off"),
        (completion("a tweet without anything"), "not in the form that was asked for"),
        (completion("a tweet\n---\nVery good"), "unknown label"),
        (completion("{\"tweet\": \"a b c\", \"label\": \"Bullish?\"}"), "unknown label"),
        (completion(&format!("{}\n---\nNeutral", "long ".repeat(200))), "characters"),
        (completion("https://t.co/x\n---\nNeutral"), "no words"),
        (completion("The stock market is recovering after a steep decline last week\n---\nNeutral"), "judged by"),
    ];
    for (body, reason) in cases {
        let server = Server::start(move |request: &Request| match request.number {
            1 => status(200, body.clone()),
            _ => good_answer(request),
        });
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal.jsonl");
        let outcome = generate(&server.client(), &few(4), &path, &()).unwrap();
        assert_eq!((outcome.examples.len(), server.requests().len()), (4, 5), "{reason}");
        let rejected = journal::harvest(&path).unwrap().rejected;
        assert_eq!(rejected.len(), 1);
        assert!(rejected.keys().all(|found| found.contains(reason)), "{reason}: {rejected:?}");
        let again = server.requests();
        let again = again.iter().filter(|r| r["messages"].to_string().contains("could not be used")).count();
        assert_eq!(again, 1, "{reason}: the model is told why");
    }
}

#[test]
fn the_wrong_label_is_asked_for_again() {
    let server = Server::start(|request: &Request| {
        let text = crate::server::tweet(request.number as u64);
        let wrong = if request.label() == "Positive" { "Negative" } else { "Positive" };
        let label = if request.number.is_multiple_of(2) { wrong } else { request.label() };
        say(&format!("{text}\n---\n{label}"))
    });
    let folder = tempfile::tempdir().unwrap();
    let outcome = generate(&server.client(), &few(6), &folder.path().join("j"), &()).unwrap();
    assert_eq!((outcome.examples.len(), server.requests().len()), (6, 12));
    assert!(outcome.rejected.keys().all(|reason| reason.contains("asked for was")), "{:?}", outcome.rejected);
}

#[test]
fn the_same_tweet_for_ever() {
    let server = Server::start(|request: &Request| {
        say(&format!("Always the same tweet about $ACME and its numbers\n---\n{}", request.label()))
    });
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("journal.jsonl");
    let outcome = generate(&server.client(), &few(100), &path, &()).unwrap();
    assert_eq!(outcome.examples.len(), 1);
    assert_eq!(outcome.stop, Some(Stop::Stuck("the text nearly repeats an earlier one".into())));
    assert!(server.requests().len() <= 30, "{} requests", server.requests().len());
}
