//! `POST /v1/chat/completions` and `POST /v1/completions`: OpenAI's shapes.
//!
//! A message's content is text: markup in it is tokenized as characters, as everywhere in cashtag.

use axum::Extension;
use axum::body::Bytes;
use axum::extract::State as Shared;
use axum::response::Response;
use cashtag_http::{Problem, RequestId};
use cashtag_llama::chat::Message;
use serde_json::Value;

use super::Service;
use super::constraint::choices;
use super::fields::{Fields, invalid, wrong};
use super::write::{Options, Shape, Writing};
use crate::engine::Failure;

/// Most messages of a conversation.
const MAX_MESSAGES: usize = 256;

fn gone<E>(_: E) -> Problem {
    Failure::Ended.into()
}

pub(super) async fn chat(
    Shared(service): Shared<Service>,
    Extension(id): Extension<RequestId>,
    body: Bytes,
) -> Result<Response, Problem> {
    let fields = Fields::parse(&body)?;
    let messages = messages(&fields)?;
    let options = Options::read(&fields, Shape::Chat)?;
    let choices = choices(&fields)?;
    let served = service.engine.find(fields.string("model")?)?;
    let longest = service.engine.max_model_len();
    if messages.iter().map(|m| m.content.len()).sum::<usize>() > longest.saturating_mul(64) {
        return Err(too_long(longest));
    }
    let tokenized = {
        let (served, choices) = (served.clone(), choices.clone());
        // Milliseconds of work, which the threads of connections have no time for.
        tokio::task::spawn_blocking(move || {
            let prompt = served.conversation(&messages)?;
            let answers = choices.unwrap_or_default();
            let answers: Result<Vec<_>, _> = answers.iter().map(|c| served.answer(&messages, &prompt, c)).collect();
            Ok::<_, cashtag_llama::Error>((prompt, answers?))
        })
        .await
        .map_err(gone)?
    };
    let (prompt, answers) = tokenized.map_err(|e| invalid("messages", e.to_string()))?;
    if prompt.len() >= longest {
        return Err(too_long(longest));
    }
    let writing = Writing { shape: Shape::Chat, id: format!("chatcmpl-{}", id.0), served, prompt };
    match choices {
        None => writing.answer(&service, options).await,
        Some(texts) => choose(&service, writing, options, &texts, answers).await,
    }
}

pub(super) async fn complete(
    Shared(service): Shared<Service>,
    Extension(id): Extension<RequestId>,
    body: Bytes,
) -> Result<Response, Problem> {
    let fields = Fields::parse(&body)?;
    let text = match fields.get("prompt") {
        Some(Value::String(text)) => text.clone(),
        Some(Value::Array(list)) => match list.as_slice() {
            [Value::String(text)] => text.clone(),
            _ => return Err(invalid("prompt", "prompt: expected one text; send several in requests of their own")),
        },
        Some(other) => return Err(wrong("prompt", "a text", other)),
        None => return Err(invalid("prompt", "prompt is missing, expected a text")),
    };
    let options = Options::read(&fields, Shape::Completion)?;
    let choices = choices(&fields)?;
    let served = service.engine.find(fields.string("model")?)?;
    let longest = service.engine.max_model_len();
    if text.len() > longest.saturating_mul(64) {
        return Err(too_long(longest));
    }
    let (prompt, answers) = {
        let (served, choices) = (served.clone(), choices.clone().unwrap_or_default());
        tokio::task::spawn_blocking(move || {
            (served.plain(&text), choices.iter().map(|c| served.tokenizer().encode(c)).collect::<Vec<_>>())
        })
        .await
        .map_err(gone)?
    };
    if prompt.is_empty() {
        return Err(invalid("prompt", "prompt: expected a text that is not empty"));
    }
    if prompt.len() >= longest {
        return Err(too_long(longest));
    }
    let writing = Writing { shape: Shape::Completion, id: format!("cmpl-{}", id.0), served, prompt };
    match choices {
        None => writing.answer(&service, options).await,
        Some(texts) => choose(&service, writing, options, &texts, answers).await,
    }
}

fn too_long(longest: usize) -> Problem {
    invalid("messages", format!("the prompt has too many tokens: prompt and answer may have {longest} together"))
}

/// Answers with one of the given texts: the likeliest at temperature 0, else drawn by their probabilities.
async fn choose(
    service: &Service,
    writing: Writing,
    options: Options,
    texts: &[String],
    answers: Vec<Vec<u32>>,
) -> Result<Response, Problem> {
    if answers.iter().any(Vec::is_empty) {
        return Err(invalid("structured_outputs", "structured_outputs: an answer has no tokens"));
    }
    let lengths: Vec<usize> = answers.iter().map(Vec::len).collect();
    let scores = service.engine.choose(writing.served.clone(), writing.prompt.clone(), answers).await?;
    let chosen = options.sampling.choose(&scores, 0).map_err(|e| Problem::from(Failure::Device(e.to_string())))?;
    let at = chosen.token as usize;
    let (text, written) = (texts.get(at).map_or("", String::as_str), lengths.get(at).copied().unwrap_or(0));
    if options.stream {
        return Ok(writing.stream_known(text, written, &options));
    }
    Ok(writing.whole(text, "stop", written))
}

fn messages(fields: &Fields) -> Result<Vec<Message>, Problem> {
    const EXPECTED: &str = "a list of {\"role\", \"content\"}";
    let list = match fields.get("messages") {
        Some(Value::Array(list)) if !list.is_empty() && list.len() <= MAX_MESSAGES => list,
        Some(Value::Array(list)) => {
            let n = list.len();
            return Err(invalid("messages", format!("messages: expected 1 to {MAX_MESSAGES} messages, found {n}")));
        }
        Some(other) => return Err(wrong("messages", EXPECTED, other)),
        None => return Err(invalid("messages", format!("messages is missing, expected {EXPECTED}"))),
    };
    list.iter().map(message).collect()
}

fn message(value: &Value) -> Result<Message, Problem> {
    let role = match value.get("role").and_then(Value::as_str) {
        Some("developer") => "system",
        Some(role @ ("system" | "user" | "assistant")) => role,
        _ => return Err(invalid("messages", "messages: expected the role system, user or assistant")),
    };
    let content = match value.get("content") {
        Some(Value::String(text)) => text.clone(),
        // Parts of a text; pictures and sounds are none.
        Some(Value::Array(parts)) => parts
            .iter()
            .map(|part| match (part.get("type").and_then(Value::as_str), part.get("text").and_then(Value::as_str)) {
                (Some("text"), Some(text)) => Ok(text),
                _ => Err(invalid("messages", "messages: only parts of the type text are supported")),
            })
            .collect::<Result<String, _>>()?,
        _ => return Err(invalid("messages", "messages: content is no text")),
    };
    Ok(Message::new(role, content))
}
