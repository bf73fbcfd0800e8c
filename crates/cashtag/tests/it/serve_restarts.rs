//! Twenty restarts of `cashtag serve` under load, by SIGTERM: clients that ask again lose nothing and get nothing twice.

use std::collections::HashMap;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::context::Context;
use super::model_commands;
use super::serving::{Answer, KEY, PATIENCE, listen, start};
use super::tiny;

const RESTARTS: usize = 20;
const CLIENTS: usize = 6;
/// Answers between two restarts.
const ANSWERS: usize = 5 * CLIENTS;

/// Sends a request over a connection that is kept; `None` where there was no whole answer.
fn ask(connection: &mut Option<TcpStream>, address: &str, request: &str) -> Option<Answer> {
    let stream = match connection {
        Some(stream) => stream,
        none => {
            let stream = TcpStream::connect(address).ok()?;
            stream.set_read_timeout(Some(PATIENCE)).ok()?;
            none.insert(stream)
        }
    };
    stream.write_all(request.as_bytes()).ok()?;
    let mut all = Vec::new();
    let mut piece = [0; 4096];
    loop {
        let n = stream.read(&mut piece).ok().filter(|n| *n > 0)?;
        all.extend_from_slice(&piece[..n]);
        let answer = Answer::read(&all);
        let length: Option<usize> = answer.header("content-length").and_then(|n| n.parse().ok());
        if length == Some(answer.body.len()) {
            return Some(answer);
        }
    }
}

/// What one client was answered: its requests in order, each with the label probabilities of its text.
struct Answered {
    id: String,
    text: usize,
    probabilities: Value,
}

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    answers: AtomicUsize,
    retries: AtomicUsize,
}

/// Asks one thing after the other until told to stop, each again and again until it is answered.
fn client(number: usize, address: &str, shared: &Shared) -> Vec<Answered> {
    let Shared { stop, answers, retries } = shared;
    let (mut connection, mut answered) = (None, Vec::new());
    while !stop.load(Ordering::Relaxed) {
        let (id, text) = (format!("client-{number}-{}", answered.len()), (number + answered.len()) % 16);
        let body = json!({"input": tiny::words(text)}).to_string();
        let request = format!(
            "POST /v1/classify HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\nx-request-id: {id}\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        let began = Instant::now();
        let answer = loop {
            assert!(began.elapsed() < PATIENCE, "{id} has no answer");
            match ask(&mut connection, address, &request) {
                Some(answer) if answer.status == 200 => break answer,
                // Loading, ending or full: documented, and to be tried again.
                Some(answer) => {
                    assert!(matches!(answer.status, 429 | 503), "{} {}", answer.head, answer.body);
                    assert!(answer.header("retry-after").is_some(), "{}", answer.head);
                }
                None => connection = None,
            }
            retries.fetch_add(1, Ordering::Relaxed);
            std::thread::sleep(Duration::from_millis(30));
        };
        if answer.header("connection") == Some("close") {
            connection = None;
        }
        assert_eq!(answer.header("x-request-id"), Some(id.as_str()), "the answer to another request");
        let probabilities = answer.json()["data"][0]["probs"].clone();
        answered.push(Answered { id, text, probabilities });
        answers.fetch_add(1, Ordering::Relaxed);
    }
    answered
}

#[test]
fn nothing_is_lost_or_answered_twice_across_restarts() {
    let Some((context, model)) = tiny::context() else { return };
    restarts(&context, &model.iter().map(String::as_str).collect::<Vec<_>>());
}

/// The same with the real small model, whose batches take a hundred times as long.
#[test]
#[ignore = "minutes; docs/serving.md has its figures"]
fn nothing_is_lost_with_the_real_model() {
    let Some(context) = model_commands::context() else { return };
    restarts(&context, &[]);
}

fn restarts(context: &Context, model: &[&str]) {
    let mut s = start(context, model);
    let address = s.address.clone();
    let port = address.rsplit_once(':').unwrap().1.to_owned();
    let shared = Shared::default();
    let answered: Vec<Answered> = std::thread::scope(|scope| {
        let (address, shared) = (address.as_str(), &shared);
        let clients: Vec<_> = (0..CLIENTS).map(|number| scope.spawn(move || client(number, address, shared))).collect();
        // Whatever fails here, the clients are told to stop.
        let restarts = catch_unwind(AssertUnwindSafe(|| {
            let began = Instant::now();
            for round in 0..RESTARTS {
                assert!(began.elapsed() < Duration::from_secs(600), "only {round} restarts");
                let enough = shared.answers.load(Ordering::Relaxed) + ANSWERS;
                s.until("requests are answered", |_| shared.answers.load(Ordering::Relaxed) >= enough);
                // At another moment of a request each time.
                std::thread::sleep(Duration::from_millis(round as u64 * 3));
                s.terminate();
                assert_eq!(s.exit_code(), Some(0), "{}", s.logged());
                s = listen(context, &[model, &["--port", port.as_str()]].concat());
            }
            let enough = shared.answers.load(Ordering::Relaxed) + ANSWERS;
            s.until("requests are answered", |_| shared.answers.load(Ordering::Relaxed) >= enough);
        }));
        shared.stop.store(true, Ordering::Relaxed);
        restarts.unwrap_or_else(|panic| resume_unwind(panic));
        clients.into_iter().flat_map(|client| client.join().unwrap()).collect()
    });
    s.terminate();
    assert_eq!(s.exit_code(), Some(0));

    // As the service tells it: each request was answered with 200 once. One whose answer was lost on the way, and was asked
    // again, would be there twice.
    let mut told: HashMap<String, usize> = HashMap::new();
    let log = s.logged();
    for event in log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok()) {
        if event["event"] == "request" && event["status"] == 200 && event["path"] == "/v1/classify" {
            *told.entry(event["id"].as_str().unwrap().to_owned()).or_default() += 1;
        }
    }
    let mut first: HashMap<usize, &Value> = HashMap::new();
    for one in &answered {
        assert_eq!(told.remove(&one.id), Some(1), "{}", one.id);
        // And it was the answer to this text.
        let same = *first.entry(one.text).or_insert(&one.probabilities);
        let near = |a: &Value, b: &Value| (a.as_f64().unwrap() - b.as_f64().unwrap()).abs() < 1e-3;
        let pairs = same.as_array().unwrap().iter().zip(one.probabilities.as_array().unwrap());
        assert!(pairs.into_iter().all(|(a, b)| near(a, b)), "{}: {same} {}", one.id, one.probabilities);
    }
    assert!(told.is_empty(), "answered, but not to a client: {told:?}");
    assert_eq!(log.matches("\"drained\":true").count(), RESTARTS + 1, "{log}");
    let retries = shared.retries.into_inner();
    println!("{} requests answered across {RESTARTS} restarts, {retries} retries", answered.len());
    assert!(retries >= RESTARTS, "{retries} retries: there was no load when it was restarted");
}
