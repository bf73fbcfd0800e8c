//! `generate` against a chat server on a real socket: what is seen, what is left, what a Ctrl-C and a wrong key do.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::context::Context;

const KEY: &str = "sk-a-secret-that-nobody-sees";

/// Answers every chat request: a new tweet with the label that was asked for, or what `error` says.
struct Chat {
    base: String,
    requests: Arc<AtomicUsize>,
}

impl Chat {
    fn start(pause: Duration, error: Option<(u16, Value)>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let base = format!("http://{}/v1", listener.local_addr().unwrap());
        let requests = Arc::new(AtomicUsize::new(0));
        let counter = requests.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (counter, error) = (counter.clone(), error.clone());
                std::thread::spawn(move || answer(stream, &counter, pause, error));
            }
        });
        Self { base, requests }
    }

    fn requests(&self) -> usize {
        self.requests.load(Ordering::SeqCst)
    }
}

fn answer(stream: TcpStream, counter: &AtomicUsize, pause: Duration, error: Option<(u16, Value)>) -> Option<()> {
    let mut reader = BufReader::new(stream.try_clone().ok()?);
    let (mut length, mut line) = (0, String::new());
    loop {
        line.clear();
        reader.read_line(&mut line).ok()?;
        match line.trim().to_lowercase().split_once(':') {
            Some(("content-length", value)) => length = value.trim().parse().ok()?,
            None if line.trim().is_empty() => break,
            _ => {}
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    let request: Value = serde_json::from_slice(&body).ok()?;
    let number = counter.fetch_add(1, Ordering::SeqCst);
    std::thread::sleep(pause);
    let asked = request["messages"].as_array()?.last()?["content"].as_str()?;
    let label = asked.split("Label: ").nth(1).and_then(|rest| rest.split('.').next()).unwrap_or("Neutral");
    // Words without a pattern, so that no two tweets are alike.
    let mut state = number as u64 * 2 + 1;
    let mut word = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (0..6).map(|i| char::from(b'a' + (state >> (33 + 5 * i)) as u8 % 26)).collect::<String>()
    };
    let tweet: Vec<String> = (0..10).map(|_| word()).collect();
    let content = json!({"tweet": tweet.join(" "), "label": label}).to_string();
    let (status, body) = error.unwrap_or_else(|| {
        let choice = json!({"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}});
        (200, json!({"choices": [choice], "usage": {"prompt_tokens": 1000, "completion_tokens": 100}}))
    });
    let body = body.to_string();
    let head = format!("HTTP/1.1 {status} X\r\ncontent-length: {}\r\nconnection: close\r\n\r\n", body.len());
    (&stream).write_all((head + &body).as_bytes()).ok()
}

fn context() -> Context {
    Context::new().env("OPENAI_API_KEY", KEY)
}

/// Every file of the directory, as text.
fn contents(context: &Context, dir: &str) -> Vec<(String, String)> {
    let entries = std::fs::read_dir(context.path(dir)).unwrap();
    let read = |entry: std::fs::DirEntry| {
        (
            entry.file_name().into_string().unwrap(),
            String::from_utf8_lossy(&std::fs::read(entry.path()).unwrap()).into_owned(),
        )
    };
    entries.map(|entry| read(entry.unwrap())).collect()
}

#[test]
fn a_data_set_and_the_same_again_for_nothing() {
    let chat = Chat::start(Duration::ZERO, None);
    let context = context();
    let args = ["generate", "--api-base", &chat.base, "-n", "40", "--price", "2.5/10", "--max-cost", "1"];
    let said = context.run(&args);
    assert!(said.contains("exit code 0") && said.contains("40 of 40 tweets, $0.1435"), "{said}");
    assert!(said.contains("36 rows to train on, 4 held out"), "{said}");
    let asked = chat.requests();
    assert_eq!(asked, 41, "40 tweets and a system message");
    let files = contents(&context, "generated");
    let lines = |name: &str| files.iter().find(|(n, _)| n == name).map_or(0, |(_, text)| text.lines().count());
    assert_eq!(
        (lines("dataset.csv"), lines("fine_tune_dataset.jsonl"), lines("evaluation_dataset.jsonl")),
        (41, 36, 4)
    );
    for (name, text) in &files {
        assert!(!text.contains(KEY), "the key is in {name}");
    }
    let again = context.run(&args);
    assert!(again.contains("going on: the journal holds 40 answers") && !again.contains(KEY), "{again}");
    assert_eq!(chat.requests(), asked, "nothing is asked twice");
    assert!(!said.contains(KEY));
}

/// What OpenAI's fine-tuning and TRL take: nothing but `messages`, in this order, with nothing but role and content.
#[test]
fn chat_lines_have_the_shape_that_others_take() {
    let context = context();
    context.write("a.csv", "text,label\nup 5%,Positive\ndown 5%,Negative\n\"a \"\"b\"\"\nc 🚀\",Neutral\n");
    let said = context.run(&["prepare", "a.csv", "--held-out", "0", "--system-message", "Classify."]);
    assert!(said.contains("exit code 0"), "{said}");
    let text = std::fs::read_to_string(context.path("dataset/fine_tune_dataset.jsonl")).unwrap();
    assert!(text.ends_with('\n') && !text.contains('\r'));
    for line in text.lines() {
        let value: Value = serde_json::from_str(line).unwrap();
        assert_eq!(value.as_object().unwrap().keys().collect::<Vec<_>>(), ["messages"]);
        let messages = value["messages"].as_array().unwrap();
        let roles: Vec<&str> = messages.iter().map(|m| m["role"].as_str().unwrap()).collect();
        assert_eq!(roles, ["system", "user", "assistant"]);
        for message in messages {
            assert_eq!(message.as_object().unwrap().keys().collect::<Vec<_>>(), ["role", "content"]);
            assert!(!message["content"].as_str().unwrap().is_empty());
        }
        assert!(["Positive", "Neutral", "Negative"].contains(&messages[2]["content"].as_str().unwrap()));
    }
    assert_eq!(text.lines().count(), 3);
}

#[test]
fn ctrl_c_waits_for_what_is_paid_for() {
    let chat = Chat::start(Duration::from_millis(80), None);
    let context = context();
    let args = ["generate", "--api-base", &chat.base, "-n", "100", "--no-system-message"];
    let child = context.command(&args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let started = Instant::now();
    while chat.requests() < 9 {
        assert!(started.elapsed() < Duration::from_secs(60), "nothing is asked");
        std::thread::sleep(Duration::from_millis(5));
    }
    let killed = std::process::Command::new("kill").args(["-INT", &child.id().to_string()]).status();
    assert!(killed.unwrap().success());
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(130), "{said}");
    assert!(said.contains("still to be written") && said.contains("the same command goes on"), "{said}");
    let asked = chat.requests();
    assert!(asked < 40, "{asked} requests");
    let journal = std::fs::read_to_string(context.path("generated/journal.jsonl")).unwrap();
    assert_eq!(journal.lines().filter(|line| line.starts_with("{\"type\":\"answer\"")).count(), asked, "{said}");
    let said = context.run(&args);
    assert!(said.contains("100 of 100 tweets"), "{said}");
    assert_eq!(chat.requests(), 100);
}

#[test]
fn a_wrong_key_is_said_once() {
    let body = json!({"error": {"message": format!("Incorrect API key provided: {KEY}."), "code": "invalid_api_key"}});
    let chat = Chat::start(Duration::ZERO, Some((401, body)));
    let said = context().run(&["generate", "--api-base", &chat.base, "--no-system-message"]);
    assert!(said.contains("exit code 1") && said.matches("refused the API key (401)").count() == 1, "{said}");
    assert!(said.contains("hint: set OPENAI_API_KEY") && !said.contains(KEY), "{said}");
    assert!(chat.requests() <= 4, "one for each of those under way: {}", chat.requests());
}
