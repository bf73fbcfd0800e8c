//! Texts that are written, in the two ways in which they are answered: whole, and as server-sent events.

use std::convert::Infallible;
use std::sync::Arc;

use axum::body::Body;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::Response;
use bytes::Bytes;
use cashtag_http::Problem;
use cashtag_http::problem::json_response;
use cashtag_llama::generate::{Request, Sampling};
use futures_util::stream;
use serde_json::{Value, json};

use super::fields::{Fields, invalid, wrong};
use super::{Service, now};
use crate::engine::{Failure, GenerateRequest, Generation, Served};

/// Which of OpenAI's two shapes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shape {
    Chat,
    Completion,
}

/// What both routes ask for.
pub(super) struct Options {
    pub(super) max_tokens: Option<usize>,
    pub(super) sampling: Sampling,
    stop: Vec<String>,
    pub(super) stream: bool,
    include_usage: bool,
}

impl Options {
    pub(super) fn read(fields: &Fields, shape: Shape) -> Result<Self, Problem> {
        for (name, allowed) in [
            ("n", json!(1)),
            ("best_of", json!(1)),
            ("frequency_penalty", json!(0)),
            ("presence_penalty", json!(0)),
            ("logit_bias", json!({})),
            ("tools", json!([])),
            ("functions", json!([])),
            ("logprobs", json!(false)),
            ("top_logprobs", json!(0)),
            ("echo", json!(false)),
            ("suffix", json!("")),
        ] {
            fields.only(name, &[allowed])?;
        }
        let stop = match fields.get("stop") {
            None => Vec::new(),
            Some(Value::String(one)) => vec![one.clone()],
            Some(Value::Array(list)) if list.len() <= 4 => list
                .iter()
                .map(|s| s.as_str().map(str::to_owned).ok_or_else(|| wrong("stop", "texts", s)))
                .collect::<Result<_, _>>()?,
            Some(other) => return Err(wrong("stop", "a text or up to four", other)),
        };
        if stop.iter().any(|s| s.len() > 256) {
            return Err(invalid("stop", "stop: expected texts of at most 256 bytes"));
        }
        let limit = match fields.whole("max_completion_tokens", 1)? {
            Some(n) => Some(n),
            None => fields.whole("max_tokens", 1)?,
        };
        // OpenAI's default for completions.
        let limit = limit.or((shape == Shape::Completion).then_some(16));
        let include_usage = match fields.get("stream_options") {
            None => false,
            Some(o) if o.is_object() => o.get("include_usage").and_then(Value::as_bool).unwrap_or(false),
            Some(other) => return Err(wrong("stream_options", "an object", other)),
        };
        Ok(Self {
            max_tokens: limit.map(|n| usize::try_from(n).unwrap_or(usize::MAX)),
            sampling: Sampling {
                temperature: fields.number("temperature", 0.0, 2.0)?.unwrap_or(1.0) as f32,
                top_k: fields.whole("top_k", 0)?.unwrap_or(0).min(u64::from(u32::MAX)) as usize,
                top_p: fields.number("top_p", 1e-6, 1.0)?.unwrap_or(1.0) as f32,
                seed: match fields.get("seed") {
                    Some(v) => v.as_i64().ok_or_else(|| wrong("seed", "a whole number", v))? as u64,
                    None => random_seed(),
                },
            },
            stop,
            stream: fields.boolean("stream")?.unwrap_or(false),
            include_usage,
        })
    }
}

fn random_seed() -> u64 {
    use std::hash::{BuildHasher as _, Hasher as _};
    // Keyed at random by the standard library.
    std::collections::hash_map::RandomState::new().build_hasher().finish()
}

/// A text to be answered with.
pub(super) struct Writing {
    pub(super) shape: Shape,
    pub(super) id: String,
    pub(super) served: Arc<Served>,
    pub(super) prompt: Vec<u32>,
}

impl Writing {
    fn object(&self, is_chunk: bool) -> &'static str {
        match (self.shape, is_chunk) {
            (Shape::Chat, false) => "chat.completion",
            (Shape::Chat, true) => "chat.completion.chunk",
            (Shape::Completion, _) => "text_completion",
        }
    }

    fn envelope(&self, is_chunk: bool, choices: Value, usage: Option<Value>) -> Value {
        let mut answer = json!({
            "id": self.id, "object": self.object(is_chunk), "created": now(), "model": self.served.name, "choices": choices,
        });
        if let Some(usage) = usage {
            answer["usage"] = usage;
        }
        answer
    }

    fn usage(&self, written: usize) -> Value {
        let prompt = self.prompt.len();
        json!({"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written})
    }

    /// The whole text.
    pub(super) fn whole(&self, text: &str, finish: &str, written: usize) -> Response {
        let choice = match self.shape {
            Shape::Chat => json!({
                "index": 0,
                "message": {"role": "assistant", "content": text, "refusal": null},
                "logprobs": null,
                "finish_reason": finish,
            }),
            Shape::Completion => json!({"index": 0, "text": text, "logprobs": null, "finish_reason": finish}),
        };
        json_response(StatusCode::OK, &self.envelope(false, json!([choice]), Some(self.usage(written))))
    }

    fn chunk(&self, text: &str, finish: Option<&str>, is_first: bool) -> Value {
        let choice = match self.shape {
            Shape::Chat => {
                let mut delta = json!({});
                if is_first {
                    delta["role"] = json!("assistant");
                }
                if !text.is_empty() || is_first {
                    delta["content"] = json!(text);
                }
                json!({"index": 0, "delta": delta, "logprobs": null, "finish_reason": finish})
            }
            Shape::Completion => json!({"index": 0, "text": text, "logprobs": null, "finish_reason": finish}),
        };
        self.envelope(true, json!([choice]), None)
    }

    /// Writes it, or begins to.
    pub(super) async fn answer(self, service: &Service, options: Options) -> Result<Response, Problem> {
        let room = service.engine.max_model_len().saturating_sub(self.prompt.len());
        let max_new_tokens = options.max_tokens.unwrap_or(room.clamp(1, 512));
        let request = Request {
            sampling: options.sampling,
            stop: options.stop.clone(),
            continues: self.shape == Shape::Completion,
            ..Request::new(self.prompt.clone(), max_new_tokens)
        };
        let mut generation =
            service.engine.generate(GenerateRequest { served: self.served.clone(), request, timeout: None })?;
        if options.stream {
            return Ok(self.stream(generation, &options));
        }
        let (mut text, mut written) = (String::new(), 0);
        while let Some(event) = generation.next().await {
            let event = event?;
            text += &event.text;
            written += 1;
            if let Some(finish) = event.finish {
                return Ok(self.whole(&text, finish.name(), written));
            }
        }
        Err(Failure::Ended.into())
    }

    fn stream(self, generation: Generation, options: &Options) -> Response {
        let state =
            Streaming { writing: self, generation, include_usage: options.include_usage, written: 0, over: false };
        events(stream::unfold(state, Streaming::next))
    }

    /// A text that is known at once, as a stream.
    pub(super) fn stream_known(self, text: &str, written: usize, options: &Options) -> Response {
        let mut out = sse(&self.chunk(text, None, true)) + &sse(&self.chunk("", Some("stop"), false));
        if options.include_usage {
            out += &sse(&self.envelope(true, json!([]), Some(self.usage(written))));
        }
        out += DONE;
        events(stream::once(async { Ok(Bytes::from(out)) }))
    }
}

const DONE: &str = "data: [DONE]\n\n";

fn sse(value: &Value) -> String {
    format!("data: {value}\n\n")
}

fn events(stream: impl futures_util::Stream<Item = Result<Bytes, Infallible>> + Send + 'static) -> Response {
    let mut response = Response::new(Body::from_stream(stream));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    response
}

/// A text on its way out. Dropped with the connection, which ends the writing.
struct Streaming {
    writing: Writing,
    generation: Generation,
    include_usage: bool,
    written: usize,
    over: bool,
}

impl Streaming {
    async fn next(mut self) -> Option<(Result<Bytes, Infallible>, Self)> {
        if self.over {
            return None;
        }
        let event = match self.generation.next().await {
            Some(Ok(event)) => event,
            // The status has been sent; the error is the last event.
            failed => {
                self.over = true;
                let failure = failed.and_then(Result::err).unwrap_or(Failure::Ended);
                return Some((Ok(Bytes::from(sse(&Problem::from(failure).openai()))), self));
            }
        };
        let mut out = sse(&self.writing.chunk(&event.text, None, self.written == 0));
        self.written += 1;
        if let Some(finish) = event.finish {
            self.over = true;
            out += &sse(&self.writing.chunk("", Some(finish.name()), false));
            if self.include_usage {
                out += &sse(&self.writing.envelope(true, json!([]), Some(self.writing.usage(self.written))));
            }
            out += DONE;
        }
        Some((Ok(Bytes::from(out)), self))
    }
}
