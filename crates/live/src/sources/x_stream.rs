//! X's filtered stream: one connection that stays open, lines of JSON, an empty line at least each 20 seconds.
//!
//! X cuts off readers that are slow, so reading never waits for scoring: posts go through a queue into the log. A connection
//! that is lost leaves a gap that this interface fills only for enterprise accounts (`backfill_minutes`); run a recent search
//! beside it to have those posts, too: both deliver under the name `x`, and a post counts once.

use std::time::{Duration, Instant, SystemTime};

use hyper::Method;
use serde_json::Value;

use super::backoff::{Backoff, Failure};
use super::feeder::Feeder;
use super::x_api::{self, ApiError, FIELDS, XOptions};
use super::x_rules::{self, Synced};
use super::{Running, Source};
use crate::board::{Pace, State};
use crate::error::{Error, Result};
use crate::inlet::Inlet;
use crate::store::DeadLetter;
use crate::time;

/// Posts carry this name, whichever of the two ways they came.
pub(super) const SOURCE: &str = "x";
const MAX_LINE: usize = 1 << 20;

pub struct XStream(pub XOptions);

impl Source for XStream {
    fn name(&self) -> String {
        SOURCE.into()
    }

    fn kind(&self) -> &'static str {
        "x-stream"
    }

    fn pace(&self) -> Pace {
        Pace::Live
    }

    fn run(self: Box<Self>, inlet: Inlet) -> Running {
        Box::pin(async move {
            let options = &self.0;
            let mut backoff = Backoff::new(options.time_scale);
            let mut rules = Rules::default();
            while !inlet.stopping() {
                let (wait, spent) = {
                    let mut budget = options.budget();
                    (budget.wait(time::now()), budget.spent())
                };
                if let Some(wait) = wait {
                    let said = format!("the daily budget of {spent} posts is spent; goes on at 00:00 UTC");
                    inlet.board().set(SOURCE, State::Stopped, said);
                    nap(&inlet, wait.min(Duration::from_secs(60))).await;
                    continue;
                }
                let feeder = Feeder::start(inlet.clone(), SOURCE.into());
                let mut lines = 0;
                let ended = connection(options, &inlet, &feeder, &mut rules, &mut lines).await;
                feeder.finish().await?;
                options.budget().save();
                let error = match ended {
                    Ok(End::Stopped) => return Err(Error::Stopped),
                    // The budget: the loop says so.
                    Ok(End::Spent) => continue,
                    Err(error) => error,
                };
                if matches!(error.status, Some(401 | 403)) {
                    let hint = "hint: the bearer token must be of an app with access to the filtered stream";
                    return Err(Error::Invalid(format!("X refuses the key: {}\n  {hint}", error.text)));
                }
                let failure = match error.failure {
                    Failure::Network if lines > 0 => Failure::Lost,
                    other => other,
                };
                if lines > 0 {
                    backoff.reset();
                }
                inlet.board().set(SOURCE, State::Reconnecting, error.text);
                nap(&inlet, backoff.after(failure)).await;
            }
            Err(Error::Stopped)
        })
    }
}

enum End {
    Stopped,
    Spent,
}

/// What the rules were made from, to see a change.
#[derive(Default)]
struct Rules {
    modified: Option<SystemTime>,
    wanted: Vec<String>,
    synced: Synced,
}

impl Rules {
    /// Brings the account's rules in step if the watch list is another than last time.
    async fn follow(&mut self, options: &XOptions) -> Result<(), ApiError> {
        let modified = std::fs::metadata(&options.watch_list).and_then(|m| m.modified()).ok();
        if modified.is_some() && modified == self.modified {
            return Ok(());
        }
        let wrong = |text| ApiError { failure: Failure::Http, status: None, text };
        let tickers = x_rules::watch_list(&options.watch_list).map_err(wrong)?;
        let wanted = x_rules::rules(&tickers, &options.filter, options.max_rule, options.max_rules).map_err(wrong)?;
        if wanted != self.wanted {
            self.synced = x_rules::sync(options, &wanted).await?;
            self.wanted = wanted;
        }
        self.modified = modified;
        Ok(())
    }
}

async fn connection(
    options: &XOptions,
    inlet: &Inlet,
    feeder: &Feeder,
    rules: &mut Rules,
    lines: &mut u64,
) -> Result<End, ApiError> {
    rules.follow(options).await?;
    let mut path = format!("/2/tweets/search/stream?{FIELDS}");
    if options.backfill_minutes > 0 {
        path += &format!("&backfill_minutes={}", options.backfill_minutes);
    }
    let answer = options.request(Method::GET, &path, None).await;
    if let Err(error) = &answer
        && error.status == Some(409)
    {
        // No rules: somebody has removed them.
        *rules = Rules::default();
    }
    let mut body = answer?.body;
    let said = |r: &Synced| match r.foreign {
        0 => String::new(),
        n => format!("{n} rules of the account are not ours and bring posts, too"),
    };
    inlet.board().set(SOURCE, State::Connected, said(&rules.synced));
    let mut pending: Vec<u8> = Vec::new();
    let mut looked = Instant::now();
    let silence = options.scaled(options.silence);
    loop {
        if inlet.stopping() {
            return Ok(End::Stopped);
        }
        if looked.elapsed() >= options.scaled(options.look_every) {
            looked = Instant::now();
            match rules.follow(options).await {
                Ok(()) => inlet.board().set(SOURCE, State::Connected, said(&rules.synced)),
                // The stream goes on with the old rules.
                Err(e) => {
                    inlet.board().set(SOURCE, State::Connected, format!("the rules stay as they are: {}", e.text))
                }
            }
        }
        let Some(piece) = body.next(silence).await? else {
            return Err(ApiError { failure: Failure::Network, status: None, text: "X closed the stream".into() });
        };
        *lines += 1;
        pending.extend_from_slice(&piece);
        let mut rest = pending.as_slice();
        while let Some(at) = rest.iter().position(|b| *b == b'\n') {
            let line = rest[..at].trim_ascii();
            rest = &rest[at + 1..];
            if !line.is_empty() && !take_line(line, options, inlet, feeder).await? {
                return Ok(End::Stopped);
            }
            if options.budget().left() == Some(0) {
                return Ok(End::Spent);
            }
        }
        let used = pending.len() - rest.len();
        pending.drain(..used);
        if pending.len() > MAX_LINE {
            let text = format!("a line of more than {MAX_LINE} bytes");
            inlet.dead_letter(DeadLetter::new(SOURCE, text.clone(), &String::from_utf8_lossy(&pending[..1_000])));
            return Err(ApiError { failure: Failure::Network, status: None, text });
        }
    }
}

/// One line of the stream: a post, or an error. False: the process stops.
async fn take_line(line: &[u8], options: &XOptions, inlet: &Inlet, feeder: &Feeder) -> Result<bool, ApiError> {
    let raw = || String::from_utf8_lossy(line).into_owned();
    let value: Value = match serde_json::from_slice(line) {
        Ok(value) => value,
        Err(e) => {
            inlet.dead_letter(DeadLetter::new(SOURCE, format!("no JSON: {e}"), &raw()));
            return Ok(true);
        }
    };
    // With both, the errors are about parts of the post that were not available.
    if value["data"].is_object() {
        options.budget().spend(1);
        match x_api::post(&value["data"]) {
            Ok(post) => return Ok(feeder.feed(post).await.is_ok()),
            Err(reason) => inlet.dead_letter(DeadLetter::new(SOURCE, reason, &raw())),
        }
        return Ok(true);
    }
    let text = x_api::problem(line);
    let first = value["errors"].get(0).unwrap_or(&value);
    let kind = first["type"].as_str().or(value["type"].as_str()).unwrap_or("");
    if kind.ends_with("operational-disconnect") || kind.ends_with("streaming-connection") {
        return Err(ApiError { failure: Failure::Network, status: None, text: format!("X ends the stream: {text}") });
    }
    if kind.ends_with("usage-capped") || kind.ends_with("rate-limit-exceeded") {
        return Err(ApiError { failure: Failure::RateLimit(None), status: Some(429), text });
    }
    inlet.dead_letter(DeadLetter::new(SOURCE, format!("not understood: {text}"), &raw()));
    Ok(true)
}

/// Sleeps, but not through the end of the process.
pub(super) async fn nap(inlet: &Inlet, time: Duration) {
    let began = Instant::now();
    while !inlet.stopping() {
        let Some(rest) = time.checked_sub(began.elapsed()) else { return };
        tokio::time::sleep(rest.min(Duration::from_millis(200))).await;
    }
}
