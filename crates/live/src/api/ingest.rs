//! `POST /v1/ingest`: one post as JSON, an array of posts, or one a line. What is answered is on the disk.

use axum::body::Bytes;
use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::response::Response;
use cashtag_http::Problem;
use cashtag_http::problem::json_response;
use serde_json::{Map, Value, json};

use super::{Api, Parameters, bad};
use crate::board::{Pace, State as SourceState};
use crate::post::Incoming;
use crate::sources::row;
use crate::store::DeadLetter;

/// Posts in one request.
const MAX_POSTS: usize = 10_000;
/// Sources that requests may name.
const MAX_SOURCES: usize = 64;
/// Posts that wait for the model, at which senders are asked to come later.
const MAX_BACKLOG: u64 = 1_000_000;

pub(super) async fn ingest(State(api): State<Api>, Query(q): Parameters, body: Bytes) -> Result<Response, Problem> {
    let shared = api.shared.clone();
    if shared.inlet.backlog() > MAX_BACKLOG {
        let message = "too many posts wait for the model";
        return Err(Problem::new(StatusCode::TOO_MANY_REQUESTS, "overloaded", message).retry_after(5));
    }
    let source = source(q.get("source").map_or("http", String::as_str), &api)?;
    let text = std::str::from_utf8(&body).map_err(|_| bad("bad_json", "the body is no UTF-8"))?;
    let (posts, lines, mut rejected) = parse(text)?;
    let board = shared.inlet.board().clone();
    board.register(&source, "http", Pace::Live);
    for (line, reason, raw) in &rejected {
        shared.inlet.dead_letter(DeadLetter::new(&source, format!("line {line}: {reason}"), raw));
    }
    let (inlet, name) = (shared.inlet.clone(), source.clone());
    let outcome = tokio::task::spawn_blocking(move || inlet.take(&name, posts)).await;
    let unavailable = || {
        let message = "posts cannot be written at the moment; none of these was taken";
        Problem::new(StatusCode::SERVICE_UNAVAILABLE, "log_unavailable", message).retry_after(2)
    };
    let delivered = match outcome {
        Ok(Ok(delivered)) => delivered,
        Ok(Err(e)) => {
            board.set(&source, SourceState::Connected, crate::inlet::first_line(&e));
            return Err(unavailable());
        }
        Err(_) => return Err(unavailable()),
    };
    board.set(&source, SourceState::Connected, "");
    rejected.extend(
        delivered.rejected.into_iter().map(|(i, reason)| (lines.get(i).copied().unwrap_or(0), reason, String::new())),
    );
    rejected.sort();
    let rejected: Vec<Value> =
        rejected.into_iter().map(|(line, reason, _)| json!({"line": line, "reason": reason})).collect();
    let answer = json!({"accepted": delivered.accepted, "duplicates": delivered.duplicates, "rejected": rejected});
    Ok(json_response(StatusCode::ACCEPTED, &answer))
}

/// The name of a source that posts over HTTP: of few, and none that another source has.
fn source(name: &str, api: &Api) -> Result<String, Problem> {
    let sound =
        !name.is_empty() && name.len() <= 32 && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
    if !sound {
        return Err(bad("bad_source", "source has 1 to 32 letters, digits, dots, dashes").param("source"));
    }
    let sources = api.shared.inlet.board().all();
    match sources.get(name) {
        Some(other) if other.kind != "http" => {
            Err(Problem::new(StatusCode::CONFLICT, "source_taken", format!("{name} is a source of another kind"))
                .param("source"))
        }
        None if sources.len() >= MAX_SOURCES => {
            Err(bad("too_many_sources", format!("there are {MAX_SOURCES} sources already")))
        }
        _ => Ok(name.to_owned()),
    }
}

type Parsed = (Vec<Incoming>, Vec<usize>, Vec<(usize, String, String)>);

/// Posts with their lines, and the lines that are none. A body that is one JSON value is that; else each line is one.
fn parse(text: &str) -> Result<Parsed, Problem> {
    let (mut posts, mut lines, mut rejected) = (Vec::new(), Vec::new(), Vec::new());
    let mut take = |line: usize, value: Result<Value, String>, raw: &str| {
        let read = value.and_then(|v| match v {
            Value::Object(map) => row::incoming(&map),
            _ => Err("a post is a JSON object".into()),
        });
        match read {
            Ok(post) => {
                posts.push(post);
                lines.push(line);
            }
            Err(reason) => rejected.push((line, reason, raw.chars().take(crate::store::MAX_RAW).collect::<String>())),
        }
    };
    if text.trim().is_empty() {
        return Err(bad("empty_body", "the body has no post; send {\"text\": …} or one such object a line"));
    }
    let too_many = || {
        Problem::new(StatusCode::PAYLOAD_TOO_LARGE, "too_many_posts", format!("at most {MAX_POSTS} posts at a time"))
    };
    match serde_json::from_str::<Value>(text) {
        Ok(Value::Array(all)) => {
            if all.len() > MAX_POSTS {
                return Err(too_many());
            }
            for (i, value) in all.into_iter().enumerate() {
                let raw = value.to_string();
                take(i + 1, Ok(value), &raw);
            }
        }
        Ok(one) => take(1, Ok(one), text),
        Err(_) => {
            for (i, line) in text.lines().enumerate().filter(|(_, l)| !l.trim().is_empty()) {
                if i >= MAX_POSTS {
                    return Err(too_many());
                }
                let parsed = serde_json::from_str::<Map<String, Value>>(line).map(Value::Object);
                take(i + 1, parsed.map_err(|e| format!("no JSON object: {e}")), line);
            }
        }
    }
    Ok((posts, lines, rejected))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(text: &str) -> (usize, Vec<usize>) {
        let (posts, _, rejected) = parse(text).unwrap();
        (posts.len(), rejected.into_iter().map(|r| r.0).collect())
    }

    #[test]
    fn one_post_an_array_or_lines() {
        assert_eq!(counts(r#"{"text": "a"}"#), (1, vec![]));
        assert_eq!(counts("{\n\"text\": \"a\"\n}"), (1, vec![]));
        assert_eq!(counts(r#"[{"text": "a"}, 3, {"text": "b"}]"#), (2, vec![2]));
        assert_eq!(counts("{\"text\": \"a\"}\n\n{\"text\": \n{\"text\": \"b\"}\r\n[]"), (2, vec![3, 5]));
        assert_eq!(counts("nonsense"), (0, vec![1]));
        assert!(parse(" \n").is_err());
        assert!(parse(&format!("[{}0]", "0,".repeat(MAX_POSTS))).is_err());
    }
}
