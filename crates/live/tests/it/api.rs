//! The contract of docs/live-api.md over a real socket.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use cashtag_http::{Config, Guard, Keys, Listen, Role};
use cashtag_live::LiveOptions;
use cashtag_live::alerts::Rule;
use cashtag_live::sources::file::{Replay, Speed};
use serde_json::{Value, json};

use crate::oracle::{lines, stream};
use crate::place::{Place, on_both};
use crate::rig::{Rig, listening, options, write};

on_both!(
    every_route_answers_as_the_contract_says,
    ingested_posts_are_durable_known_and_counted,
    alerts_are_shown_stored_once_and_sent_until_they_are_taken,
);

fn replayed(place: &Place, count: usize) -> Rig {
    let path = write(place.dir.path(), "day.jsonl", &lines(&stream(count, 11)));
    let rig = Rig::start(place.listening(), vec![Box::new(Replay::file(path, Speed::Fastest))]);
    rig.until("all is counted", |r| {
        r.scored() == count as u64 && r.get("/v1/overview?window=1d")["market"].is_object()
    });
    rig.until("the source is done", |r| r.get("/v1/overview")["sources"][0]["state"] == "done");
    rig
}

fn keys(value: &Value) -> Vec<&str> {
    let mut keys: Vec<&str> = value.as_object().unwrap().keys().map(String::as_str).collect();
    keys.sort_unstable();
    keys
}

fn every_route_answers_as_the_contract_says(place: &Place) {
    let rig = replayed(place, 500);
    let overview = rig.get("/v1/overview?window=1h");
    assert_eq!(
        keys(&overview),
        ["as_of", "bus", "dead_letters", "lag", "market", "model", "movers", "sectors", "sources", "store", "window"]
    );
    assert_eq!(keys(&overview["model"]), ["adapter", "labels", "name", "temperature"]);
    assert_eq!(
        keys(&overview["sources"][0]),
        [
            "detail",
            "kind",
            "lag_ms",
            "last_post_at",
            "name",
            "posts_per_s",
            "posts_total",
            "reconnects",
            "since",
            "state"
        ]
    );
    let signals = rig.get("/v1/signals?window=1d&scope=ticker&limit=2&offset=1");
    assert_eq!((&signals["count"], signals["signals"].as_array().unwrap().len()), (&json!(5), 2));
    let signal = &signals["signals"][0];
    for name in [
        "key",
        "scope",
        "name",
        "window",
        "start",
        "end",
        "final",
        "revision",
        "mentions",
        "unique_authors",
        "positive_count",
        "neutral_count",
        "negative_count",
        "sentiment_score",
        "ci_low",
        "ci_high",
        "bullish_pct",
        "bearish_pct",
        "buzz_score",
        "attention",
        "attention_z",
        "momentum",
        "trend",
        "copies",
        "damped",
        "top_posts",
        "sparkline",
    ] {
        assert!(signal.get(name).is_some(), "{name} in {signal}");
    }
    assert_eq!((signal["window"].as_str(), signal["scope"].as_str()), (Some("1d"), Some("ticker")));
    assert_eq!(signal["sparkline"].as_array().unwrap().len(), 24);
    let (low, score, high) = (&signal["ci_low"], &signal["sentiment_score"], &signal["ci_high"]);
    assert!(low.as_f64() <= score.as_f64() && score.as_f64() <= high.as_f64());

    let history = rig.get("/v1/signals/aaa?window=1m");
    let starts: Vec<&str> =
        history["signals"].as_array().unwrap().iter().map(|s| s["start"].as_str().unwrap()).collect();
    assert!(starts.len() >= 5 && starts.is_sorted() && history["key"] == "AAA");
    let from = format!("/v1/signals/AAA?window=1m&from={}&to={}", starts[2], starts[3]);
    assert_eq!(rig.get(&from)["signals"].as_array().unwrap().len(), 2);
    assert_eq!(rig.get("/v1/signals/technology?window=1d&scope=sector")["signals"].as_array().unwrap().len(), 1);

    let posts = rig.get("/v1/posts?ticker=$aaa&limit=3");
    let first: Vec<u64> = posts["posts"].as_array().unwrap().iter().map(|p| p["seq"].as_u64().unwrap()).collect();
    assert!(first.len() == 3 && first.is_sorted_by(|a, b| a > b));
    let next = rig.get(&format!("/v1/posts?ticker=AAA&limit=3&before={}", posts["next_before"]));
    assert!(next["posts"][0]["seq"].as_u64().unwrap() < first[2]);
    let post = &posts["posts"][0];
    assert_eq!(keys(&post["probabilities"]), ["Negative", "Neutral", "Positive"]);
    assert_eq!(keys(&post["tickers"][0]), ["end", "start", "symbol"]);
    assert!(post["author"].as_str().unwrap().len() == 16 && post["text"].as_str().unwrap().contains("$AAA"));
    let all = rig.get("/v1/posts?limit=500");
    assert_eq!(
        (all["posts"].as_array().unwrap().len(), &rig.get("/v1/posts?sector=energy&limit=1")["posts"][0]["sectors"]),
        (500, &rig.get("/v1/posts?sector=energy&limit=1")["posts"][0]["sectors"])
    );

    assert_eq!(rig.get("/v1/alerts")["items"], json!([]));
    assert_eq!(rig.get("/v1/dead-letters")["items"], json!([]));
    assert_eq!(rig.get("/v1/quality"), json!({}));
    let health = rig.get("/health");
    assert_eq!((&health["status"], &health["store"]), (&json!("ok"), &json!("connected")));
    assert_eq!(overview["store"]["kind"], place.location.kind());
    assert!(rig.get("/metrics").as_str().unwrap().contains("\ncashtag_live_posts_scored_total 500\n"));
    let widgets = rig.get("/widgets.json");
    for (_, widget) in widgets.as_object().unwrap() {
        let rows = rig.get(&format!("/{}", widget["endpoint"].as_str().unwrap()));
        for column in widget["data"]["table"]["columnsDefs"].as_array().unwrap() {
            assert!(rows[0].get(column["field"].as_str().unwrap()).is_some(), "{column}");
        }
    }
    for item in rig.get("/apps.json")[0]["tabs"]["overview"]["layout"].as_array().unwrap() {
        assert!(widgets.get(item["i"].as_str().unwrap()).is_some());
    }
    let (status, answer) = rig.post("/v1/classify", r#"{"input": ["$AAA goes up", "down"]}"#);
    assert_eq!(
        (status, &answer["data"][0]["label"], &answer["data"][1]["probabilities"]["Negative"]),
        (200, &json!("Positive"), &json!(0.75))
    );
    assert_eq!(answer["data"][0]["tickers"], json!([{"symbol": "AAA", "start": 0, "end": 4}]));
}

#[test]
fn what_is_asked_wrongly_is_said() {
    let dir = tempfile::tempdir().unwrap();
    let rig = Rig::start(listening(&dir.path().join("data")), Vec::new());
    for (method, path, body, status, code) in [
        ("GET", "/v1/overview?window=2m", "", 400, "bad_window"),
        ("GET", "/v1/signals?scope=galaxy", "", 400, "bad_scope"),
        ("GET", "/v1/signals?limit=-1", "", 400, "bad_number"),
        ("GET", "/v1/signals/NOPE", "", 404, "unknown_key"),
        ("GET", "/v1/signals/A?from=soon", "", 400, "bad_time"),
        ("GET", "/v1/posts?before=x", "", 400, "bad_number"),
        ("POST", "/v1/classify", "{", 400, "bad_json"),
        ("POST", "/v1/classify", r#"{"input": []}"#, 400, "bad_input"),
        ("POST", "/v1/classify", r#"{"input": [1]}"#, 400, "bad_input"),
        ("POST", "/v1/classify", r#"{"input": "poison"}"#, 422, "not_classified"),
        ("POST", "/v1/ingest", "", 400, "empty_body"),
        ("POST", "/v1/ingest?source=a/b", "{}", 400, "bad_source"),
        ("GET", "/nothing", "", 404, ""),
        ("GET", "/v1/ingest", "", 405, ""),
    ] {
        let (found, answer) = rig.ask(method, path, Some(body));
        assert_eq!(found, status, "{path}: {answer}");
        assert!(answer["error"]["message"].is_string(), "{path}: {answer}");
        assert!(code.is_empty() || answer["error"]["code"] == code, "{path}: {answer}");
    }
    // Nothing is there yet, and that is no error.
    assert_eq!(rig.get("/v1/overview")["market"], Value::Null);
    assert_eq!(rig.get("/v1/signals")["signals"], json!([]));
}

fn ingested_posts_are_durable_known_and_counted(place: &Place) {
    let rig = Rig::start(place.listening(), Vec::new());
    let body = "{\"id\": \"1\", \"author\": \"ann\", \"text\": \"$AAA up\"}\n{\"id\": \"2\", \"text\": \"\"}\nnonsense\n{\"id\": \"3\", \"text\": \"$BBB down\"}\n";
    let (status, answer) = rig.post("/v1/ingest", body);
    assert_eq!((status, &answer["accepted"], &answer["duplicates"]), (202, &json!(2), &json!(0)), "{answer}");
    let lines: Vec<u64> = answer["rejected"].as_array().unwrap().iter().map(|r| r["line"].as_u64().unwrap()).collect();
    assert_eq!(lines, [2, 3]);
    assert_eq!(rig.post("/v1/ingest", body).1["duplicates"], 2);
    assert_eq!(rig.post("/v1/ingest?source=other", body).1["accepted"], 2, "another source, other posts");
    rig.until("they are counted", |r| r.scored() == 4);
    rig.until("they are shown", |r| r.get("/v1/posts")["posts"].as_array().unwrap().len() == 4);
    rig.until("dead letters", |r| r.get("/v1/dead-letters")["items"].as_array().unwrap().len() == 6);
    rig.stop();
    // Known across a restart, and so are the dead letters.
    let rig = Rig::start(place.listening(), Vec::new());
    assert_eq!(rig.get("/v1/overview")["dead_letters"], 6);
    assert_eq!(rig.post("/v1/ingest", body).1["duplicates"], 2);
    let (status, answer) = rig.post("/v1/ingest", &"x".repeat(3 << 20));
    assert_eq!(status, 413, "{answer}");
}

/// Reads events until enough have come.
fn events(
    url: &str,
    path: &str,
    last: Option<&str>,
    enough: impl Fn(&[(String, String, String)]) -> bool,
) -> Vec<(String, String, String)> {
    let mut socket = TcpStream::connect(url.trim_start_matches("http://")).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(15))).unwrap();
    let last = last.map_or(String::new(), |id| format!("Last-Event-ID: {id}\r\n"));
    write!(socket, "GET {path} HTTP/1.1\r\nHost: localhost\r\n{last}\r\n").unwrap();
    let mut reader = BufReader::new(socket);
    let (mut events, mut id, mut kind) = (Vec::new(), String::new(), String::new());
    let mut line = String::new();
    while !enough(&events) {
        line.clear();
        if reader.read_line(&mut line).expect("an event in time") == 0 {
            break;
        }
        let text = line.trim_end();
        if let Some(v) = text.strip_prefix("id: ") {
            id = v.into();
        } else if let Some(v) = text.strip_prefix("event: ") {
            kind = v.into();
        } else if let Some(v) = text.strip_prefix("data: ") {
            events.push((id.clone(), kind.clone(), v.into()));
        }
    }
    events
}

#[test]
fn a_stream_goes_on_where_it_was_cut_off() {
    let dir = tempfile::tempdir().unwrap();
    let rig = Rig::start(listening(&dir.path().join("data")), Vec::new());
    let send = |id: &str| rig.post("/v1/ingest", &json!({"id": id, "author": id, "text": "$AAA up"}).to_string());
    let posts = |e: &[(String, String, String)]| e.iter().filter(|e| e.1 == "post").count();
    let (url, reader) = (rig.url.clone(), std::thread::Builder::new());
    let first = reader.spawn(move || events(&url, "/v1/stream?window=1m", None, |e| posts(e) == 1)).unwrap();
    // Whoever listens before hears it; so send until the listener is there.
    let mut n = 0;
    while !first.is_finished() {
        send(&n.to_string());
        n += 1;
        std::thread::sleep(Duration::from_millis(200));
    }
    let first = first.join().unwrap();
    let (id, _, data) = first.last().unwrap();
    let seen = serde_json::from_str::<Value>(data).unwrap()["seq"].as_u64().unwrap();
    send("later");
    let rest = events(&rig.url, "/v1/stream?window=1m", Some(id), |e| e.iter().any(|e| e.2.contains("\"later\"")));
    let seqs: Vec<u64> = rest
        .iter()
        .filter(|e| e.1 == "post")
        .map(|e| serde_json::from_str::<Value>(&e.2).unwrap()["seq"].as_u64().unwrap())
        .collect();
    assert_eq!(seqs, (seen + 1..=seen + seqs.len() as u64).collect::<Vec<_>>(), "none twice, none missing");
    assert!(rest.iter().filter(|e| e.1 == "signal").all(|e| e.2.contains("\"window\":\"1m\"")));
    // A number from another life.
    let anew = events(&rig.url, "/v1/stream", Some("17"), |e| !e.is_empty());
    assert_eq!(anew[0].1, "resync");
}

#[test]
fn keys_stand_before_everything_but_the_page() {
    let dir = tempfile::tempdir().unwrap();
    let mut keys = Keys::default();
    keys.add("test", "test", Role::User, "a-key-of-sixteen-or-more").unwrap();
    let http = Config {
        listen: Listen { port: 0, ..Listen::default() },
        guard: Guard { keys, ..Guard::default() },
        ..Config::default()
    };
    let rig = Rig::start(LiveOptions { http: Some(http), ..options(&dir.path().join("data")) }, Vec::new());
    for path in [
        "/v1/overview",
        "/v1/signals",
        "/v1/posts",
        "/v1/stream",
        "/v1/quality",
        "/metrics",
        "/widgets.json",
        "/v1/dead-letters",
    ] {
        assert_eq!(rig.ask("GET", path, None).0, 401, "{path}");
    }
    assert_eq!(rig.post("/v1/ingest", "{}").0, 401);
    assert_eq!(rig.post("/v1/classify", "{}").0, 401);
    assert_eq!((rig.ask("GET", "/", None).0, rig.ask("GET", "/health", None).0), (200, 200));
    let mut answer = ureq::get(&format!("{}/v1/overview", rig.url))
        .header("authorization", "Bearer a-key-of-sixteen-or-more")
        .call()
        .unwrap();
    assert!(answer.body_mut().read_to_string().unwrap().contains("movers"));
    // The page comes with a policy under which nothing of a post can run.
    let mut socket = TcpStream::connect(rig.url.trim_start_matches("http://")).unwrap();
    write!(socket, "GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").unwrap();
    let mut page = String::new();
    socket.read_to_string(&mut page).unwrap();
    assert!(page.to_lowercase().contains("content-security-policy: default-src 'none'"), "{page}");
    assert!(!page.contains("unsafe-inline"));
}

fn alerts_are_shown_stored_once_and_sent_until_they_are_taken(place: &Place) {
    // The first attempt is refused, the second lost, then all are taken.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let hook = format!("http://{}/alerts", listener.local_addr().unwrap());
    let (sender, taken) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        for (attempt, socket) in listener.incoming().flatten().enumerate() {
            let mut reader = BufReader::new(socket.try_clone().unwrap());
            let (mut line, mut length) = (String::new(), 0);
            while reader.read_line(&mut line).unwrap() > 2 {
                if let Some(n) = line.to_lowercase().strip_prefix("content-length:") {
                    length = n.trim().parse().unwrap();
                }
                line.clear();
            }
            let mut body = vec![0; length];
            reader.read_exact(&mut body).unwrap();
            match attempt {
                0 => (&socket).write_all(b"HTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n").unwrap(),
                1 => {}
                _ => {
                    (&socket).write_all(b"HTTP/1.1 204 Yes\r\n\r\n").unwrap();
                    sender.send(serde_json::from_slice::<Value>(&body).unwrap()).unwrap();
                }
            }
        }
    });
    let start = |rule: &str| {
        let options =
            LiveOptions { rules: vec![Rule::parse(rule).unwrap()], webhook: Some(hook.clone()), ..place.listening() };
        Rig::start(options, Vec::new())
    };
    let rule = "mentions >= 3 in 1d for AAA";
    let rig = start(rule);
    for i in 0..4 {
        rig.post("/v1/ingest", &json!({"id": i.to_string(), "author": i.to_string(), "text": "$AAA up"}).to_string());
    }
    let alert = taken.recv_timeout(Duration::from_secs(20)).unwrap();
    assert_eq!((&alert["key"], &alert["rule"], &alert["window"]), (&json!("AAA"), &json!(rule), &json!("1d")));
    assert_eq!(rig.get("/v1/alerts")["items"].as_array().unwrap().len(), 1);
    rig.stop();
    let rig = start(rule);
    rig.post("/v1/ingest", &json!({"id": "more", "author": "x", "text": "$AAA up"}).to_string());
    rig.until("it is counted", |r| r.get("/v1/posts")["posts"].as_array().unwrap().len() == 5);
    assert_eq!(rig.get("/v1/alerts")["items"].as_array().unwrap().len(), 1, "once, across restarts");
    // At least once: a process that ends before it has noted the delivery repeats it, and nothing else comes.
    while let Ok(again) = taken.recv_timeout(Duration::from_secs(2)) {
        assert_eq!(again, alert);
    }
}
