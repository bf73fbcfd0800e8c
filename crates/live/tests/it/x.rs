//! X's filtered stream and recent search, played by a small server that keeps rules and misbehaves.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use cashtag_live::sources::x_search::XSearch;
use cashtag_live::sources::x_stream::XStream;
use cashtag_live::sources::{Source, XOptions};
use serde_json::{Value, json};

use crate::rig::{Rig, listening, write};

#[derive(Default)]
struct Account {
    rules: Vec<Value>,
    next_rule: u64,
    /// Method and path of each request.
    asked: Vec<String>,
    streams: usize,
    searches: Vec<String>,
}

type Shared = Arc<Mutex<Account>>;

struct Server {
    base: String,
    account: Shared,
}

fn start(stream: fn(usize, &mut TcpStream), search: fn(usize, &str) -> (u16, Value)) -> Server {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let base = format!("http://{}", listener.local_addr().unwrap());
    let account: Shared = Arc::default();
    // A rule of somebody else's.
    account.lock().unwrap().rules.push(json!({"id": "900", "value": "cats", "tag": "pets"}));
    let shared = account.clone();
    std::thread::spawn(move || {
        for socket in listener.incoming().flatten() {
            let shared = shared.clone();
            std::thread::spawn(move || answer(socket, &shared, stream, search));
        }
    });
    Server { base, account }
}

fn answer(
    mut socket: TcpStream,
    account: &Shared,
    stream: fn(usize, &mut TcpStream),
    search: fn(usize, &str) -> (u16, Value),
) -> Option<()> {
    let mut reader = BufReader::new(socket.try_clone().ok()?);
    let (mut head, mut line) = (Vec::new(), String::new());
    while reader.read_line(&mut line).ok()? > 2 {
        head.push(line.trim_end().to_owned());
        line.clear();
    }
    let lower: Vec<String> = head.iter().map(|l| l.to_lowercase()).collect();
    let length = lower.iter().find_map(|l| l.strip_prefix("content-length:")?.trim().parse().ok()).unwrap_or(0);
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    let mut words = head[0].split(' ');
    let (method, path) = (words.next()?.to_owned(), words.next()?.to_owned());
    account.lock().unwrap().asked.push(format!("{method} {path}"));
    let reply = |socket: &mut TcpStream, status: u16, value: Value| {
        let text = value.to_string();
        let head = format!(
            "HTTP/1.1 {status} Said\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
            text.len()
        );
        socket.write_all((head + &text).as_bytes()).ok()
    };
    if !lower.iter().any(|l| l == "authorization: bearer secret") {
        return reply(&mut socket, 401, json!({"title": "Unauthorized", "detail": "Unauthorized", "status": 401}));
    }
    if path.starts_with("/2/tweets/search/stream/rules") {
        let answer =
            if method == "GET" { json!({"data": account.lock().unwrap().rules}) } else { change(account, &body) };
        return reply(&mut socket, 200, answer);
    }
    if path.starts_with("/2/tweets/search/recent") {
        let number = {
            let mut account = account.lock().unwrap();
            account.searches.push(path.clone());
            account.searches.len() - 1
        };
        let (status, answer) = search(number, &path);
        return reply(&mut socket, status, answer);
    }
    let number = {
        let mut account = account.lock().unwrap();
        account.streams += 1;
        account.streams - 1
    };
    stream(number, &mut socket);
    Some(())
}

fn change(account: &Shared, body: &[u8]) -> Value {
    let asked: Value = serde_json::from_slice(body).unwrap();
    let mut account = account.lock().unwrap();
    let added: Vec<Value> = asked["add"].as_array().into_iter().flatten().cloned().collect();
    for mut rule in added.clone() {
        account.next_rule += 1;
        rule["id"] = json!(account.next_rule.to_string());
        account.rules.push(rule);
    }
    if let Some(ids) = asked["delete"]["ids"].as_array() {
        account.rules.retain(|r| !ids.contains(&r["id"]));
    }
    json!({"meta": {"summary": {"created": added.len(), "not_created": 0}}})
}

fn line(n: u64, extra: Value) -> String {
    let mut data = json!({"id": (1_000 + n).to_string(), "text": format!("$AAA goes up, says number {n}"), "author_id": n.to_string(),
        "created_at": cashtag_live::time::rfc3339(cashtag_live::time::now()), "edit_history_tweet_ids": [(1_000 + n).to_string()]});
    for (name, value) in extra.as_object().into_iter().flatten() {
        data[name] = value.clone();
    }
    json!({"data": data, "matching_rules": [{"id": "1"}]}).to_string() + "\r\n"
}

fn chunk(socket: &mut TcpStream, text: &str) {
    let _ = write!(socket, "{:x}\r\n{text}\r\n", text.len());
}

const HEAD: &[u8] = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";

/// Connection by connection: everything the documentation warns of.
fn misbehave(number: usize, socket: &mut TcpStream) {
    let say = |socket: &mut TcpStream, status: u16, body: &str, headers: &str| {
        let _ = write!(socket, "HTTP/1.1 {status} No\r\n{headers}Content-Length: {}\r\n\r\n{body}", body.len());
    };
    match number {
        0 => say(socket, 503, "<html>over capacity</html>", ""),
        1 => {
            let reset = cashtag_live::time::now() / 1_000 + 2;
            say(
                socket,
                429,
                r#"{"title":"ConnectionException","detail":"This stream is currently at the maximum allowed connection limit.","connection_issue":"TooManyConnections"}"#,
                &format!("x-rate-limit-reset: {reset}\r\n"),
            );
        }
        // Ten posts with keep-alives, one line in two pieces, half a line, gone.
        2 => {
            let _ = socket.write_all(HEAD);
            (0..9).for_each(|n| {
                chunk(socket, &line(n, json!({})));
                chunk(socket, "\r\n");
            });
            let text = line(9, json!({}));
            chunk(socket, &text[..40]);
            std::thread::sleep(Duration::from_millis(100));
            chunk(socket, &text[40..]);
            chunk(socket, &line(99, json!({}))[..50]);
        }
        // Again five, out of order, an edit, a retweet, nonsense, partial errors, a message type nobody knows; then silence.
        3 => {
            let _ = socket.write_all(HEAD);
            (5..15).rev().for_each(|n| chunk(socket, &line(n, json!({}))));
            chunk(
                socket,
                &line(20, json!({"text": "$AAA goes up, he edits", "edit_history_tweet_ids": ["1014", "1020"]})),
            );
            chunk(
                socket,
                &line(
                    21,
                    json!({"text": "RT @x: $AAA goes up", "referenced_tweets": [{"type": "retweeted", "id": "1013"}]}),
                ),
            );
            chunk(socket, "<not json>\r\n");
            let partial = line(22, json!({})).trim_end().trim_end_matches('}').to_owned()
                + ",\"errors\":[{\"title\":\"Not Found Error\"}]}\r\n";
            chunk(socket, &partial);
            chunk(socket, "{\"novelty\":{\"id\":1}}\r\n");
            std::thread::sleep(Duration::from_secs(3_600));
        }
        // The server asks to go.
        4 => {
            let _ = socket.write_all(HEAD);
            chunk(socket, &line(23, json!({})));
            chunk(
                socket,
                "{\"errors\":[{\"title\":\"operational-disconnect\",\"disconnect_type\":\"UpstreamOperationalDisconnect\",\"detail\":\"This stream has been disconnected upstream for operational reasons.\",\"type\":\"https://api.x.com/2/problems/operational-disconnect\"}]}\r\n",
            );
            std::thread::sleep(Duration::from_secs(3_600));
        }
        // Nobody has removed the rules, but it says so.
        5 => say(socket, 409, r#"{"title":"ConnectionException","detail":"no rules"}"#, ""),
        6 => {
            let _ = socket.write_all(HEAD);
            (24..40).for_each(|n| chunk(socket, &line(n, json!({}))));
            loop {
                std::thread::sleep(Duration::from_millis(50));
                chunk(socket, "\r\n");
            }
        }
        _ => std::thread::sleep(Duration::from_secs(3_600)),
    }
}

/// First a line without an end, then more at once than anybody reads in time.
fn flood(number: usize, socket: &mut TcpStream) {
    let _ = socket.write_all(HEAD);
    match number {
        0 => (0..40).for_each(|_| chunk(socket, &"x".repeat(100_000))),
        1 => {
            (0..5_000).for_each(|n| chunk(socket, &line(n, json!({}))));
            std::thread::sleep(Duration::from_secs(3_600));
        }
        _ => std::thread::sleep(Duration::from_secs(3_600)),
    }
}

#[test]
fn floods_are_taken_whole_and_endless_lines_are_not_kept() {
    let server = start(flood, no_search);
    let dir = tempfile::tempdir().unwrap();
    let options = options(&server, dir.path(), "AAA\n");
    let rig = Rig::start(listening(&dir.path().join("data")), vec![Box::new(XStream(options))]);
    rig.until("every post once", |r| r.scored() == 5_000);
    let letters = rig.get("/v1/dead-letters")["items"].to_string();
    assert!(letters.contains("a line of more than") && letters.len() < 5_000, "{letters}");
}

fn no_search(_: usize, _: &str) -> (u16, Value) {
    (404, json!({}))
}

fn options(server: &Server, dir: &Path, list: &str) -> XOptions {
    let mut options = XOptions::new("secret".into(), write(dir, "list", list), dir.join("budget.json"));
    options.base.clone_from(&server.base);
    options.silence = Duration::from_secs(100);
    options.look_every = Duration::from_secs(20);
    options.poll_every = Duration::from_secs(20);
    // 100 s of silence are one here.
    options.time_scale = 0.01;
    options
}

#[test]
fn every_post_once_through_all_that_the_documentation_warns_of() {
    let server = start(misbehave, no_search);
    let dir = tempfile::tempdir().unwrap();
    let options = options(&server, dir.path(), "AAA\n");
    let source: Box<dyn Source> = Box::new(XStream(options.clone()));
    let rig = Rig::start(listening(&dir.path().join("data")), vec![source]);
    // 0 to 14, the edit, the retweet, and 22 to 39.
    rig.until("every post once", |r| r.scored() == 15 + 2 + 18);
    rig.until("they are shown", |r| r.get("/v1/posts?limit=100")["posts"].as_array().unwrap().len() == 35);
    let posts = rig.get("/v1/posts?limit=100");
    let copies: Vec<(&str, &str)> = posts["posts"]
        .as_array()
        .unwrap()
        .iter()
        .filter_map(|p| Some((p["id"].as_str()?, p["is_copy_of"].as_str()?)))
        .collect();
    assert_eq!(copies, [("1021", "1013"), ("1020", "1014")]);
    let letters = rig.get("/v1/dead-letters")["items"].to_string();
    assert!(letters.contains("<not json>") && letters.contains("novelty"), "{letters}");
    let source = &rig.get("/v1/overview")["sources"][0];
    assert_eq!((&source["state"], &source["kind"]), (&json!("connected"), &json!("x-stream")));
    assert!(source["detail"].as_str().unwrap().contains("1 rules of the account are not ours"), "{source}");
    // Rules: ours beside the other's; then the list changes while the stream is open.
    let rules = || -> Vec<String> {
        let account = server.account.lock().unwrap();
        account.rules.iter().map(|r| r["value"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(rules(), ["cats", "$AAA lang:en -is:retweet"]);
    std::thread::sleep(Duration::from_millis(20));
    std::fs::write(&options.watch_list, "AAA\nBBB\n").unwrap();
    rig.until("the rules follow", |_| rules() == ["cats", "($AAA OR $BBB) lang:en -is:retweet"]);
    let streams = server.account.lock().unwrap().streams;
    assert_eq!(streams, 7, "without a new connection");
    rig.until("what was read twice is counted twice", |r| {
        r.get("/v1/overview")["sources"][0]["posts_total"].as_u64().is_some_and(|n| n >= 35)
    });
    // The file is written each 20 posts.
    let saved: Value = serde_json::from_slice(&std::fs::read(&options.budget_file).unwrap()).unwrap();
    assert!(saved["posts"].as_u64().unwrap() > 35 - 20, "{saved}");
}

#[test]
fn a_wrong_key_is_said_once_and_a_spent_budget_stops() {
    let server = start(misbehave, no_search);
    let dir = tempfile::tempdir().unwrap();
    let mut wrong = options(&server, dir.path(), "AAA\n");
    wrong.bearer = cashtag_live::sources::x_api::Bearer("wrong".into());
    let rig = Rig::start(listening(&dir.path().join("data")), vec![Box::new(XStream(wrong))]);
    rig.until("it stops", |r| r.get("/v1/overview")["sources"][0]["state"] == "stopped");
    let detail = rig.get("/v1/overview")["sources"][0]["detail"].to_string();
    assert!(detail.contains("refuses the key") && !detail.contains("wrong"), "{detail}");
    assert_eq!(server.account.lock().unwrap().asked.len(), 1);
    rig.stop();

    let server = start(|_, socket| misbehave(6, socket), no_search);
    let dir = tempfile::tempdir().unwrap();
    let mut thrifty = options(&server, dir.path(), "AAA\n");
    thrifty.daily_posts = Some(7);
    let rig = Rig::start(listening(&dir.path().join("data")), vec![Box::new(XStream(thrifty))]);
    rig.until("the budget is spent", |r| {
        r.get("/v1/overview")["sources"][0]["detail"].to_string().contains("daily budget of 7 posts is spent")
    });
    rig.until("what was paid for is counted", |r| r.scored() == 7);
    rig.stop();
    // Also after a restart, which reads the count from its file.
    let mut again = options(&server, dir.path(), "AAA\n");
    again.daily_posts = Some(7);
    let rig = Rig::start(listening(&dir.path().join("data")), vec![Box::new(XStream(again))]);
    rig.until("it is still spent", |r| r.get("/v1/overview")["sources"][0]["state"] == "stopped");
    assert_eq!(server.account.lock().unwrap().streams, 1);
}

fn page(posts: std::ops::Range<u64>, next: Option<&str>) -> (u16, Value) {
    let data: Vec<Value> = posts
        .clone()
        .rev()
        .map(|n| serde_json::from_str::<Value>(&line(n, json!({}))).unwrap()["data"].clone())
        .collect();
    let mut meta = json!({"result_count": data.len()});
    if let Some(next) = next {
        meta["next_token"] = json!(next);
    }
    if data.is_empty() { (200, json!({"meta": meta})) } else { (200, json!({"data": data, "meta": meta})) }
}

/// The first round takes one page; the second has three, of which one fails first; then nothing is new.
fn search(number: usize, path: &str) -> (u16, Value) {
    match number {
        0 => (503, json!({"title": "Service Unavailable"})),
        1 => page(0..10, Some("more of the past")),
        2 => page(30..40, Some("p2")),
        3 => (429, json!({"title": "Too Many Requests"})),
        4 => page(30..40, Some("p2")),
        5 => page(20..30, Some("p3")),
        6 => page(10..20, None),
        _ if path.contains("since_id=1039") => page(0..0, None),
        _ => (400, json!({"errors": [{"message": "what?"}]})),
    }
}

#[test]
fn searches_go_on_from_the_newest_and_skip_nothing() {
    let server = start(|_, _| {}, search);
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    let rig = Rig::start(listening(&data), vec![Box::new(XSearch(options(&server, dir.path(), "AAA\n")))]);
    rig.until("all pages", |r| r.scored() == 40);
    rig.until("a round with nothing new", |_| server.account.lock().unwrap().searches.len() >= 9);
    rig.stop();
    let searches = server.account.lock().unwrap().searches.clone();
    assert!(
        searches[1].contains("query=%24AAA%20lang%3Aen%20-is%3Aretweet&max_results=100")
            && !searches[1].contains("since_id")
    );
    assert!(
        searches[2].contains("since_id=1009") && searches[5].contains("since_id=1009&next_token=p2"),
        "{searches:?}"
    );
    assert!(searches[7].contains("since_id=1039"), "{searches:?}");
    // A restart goes on there, too.
    let rig = Rig::start(listening(&data), vec![Box::new(XSearch(options(&server, dir.path(), "AAA\n")))]);
    rig.until("it asks again", |_| server.account.lock().unwrap().searches.len() > searches.len());
    assert!(server.account.lock().unwrap().searches[searches.len()].contains("since_id=1039"));
}
