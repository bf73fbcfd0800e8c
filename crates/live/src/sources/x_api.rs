//! What the filtered stream and recent search of X have in common: settings, fields, posts, errors.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use hyper::Method;
use serde_json::Value;

use super::backoff::Failure;
use super::net::{self, Answer, NetError};
use super::x_budget::Budget;
use crate::post::Incoming;
use crate::time;

pub const BASE: &str = "https://api.x.com";
pub(super) const FIELDS: &str =
    "tweet.fields=created_at,lang,author_id,entities,referenced_tweets,edit_history_tweet_ids";
/// The price of a post by the pay-per-use list of 2026, in dollars.
pub const PRICE: f64 = 0.005;

/// A key that does not show itself.
#[derive(Clone)]
pub struct Bearer(pub String);

impl std::fmt::Debug for Bearer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Bearer(…)")
    }
}

#[derive(Clone, Debug)]
pub struct XOptions {
    pub base: String,
    pub bearer: Bearer,
    /// One ticker a line; the rules follow the file while it changes.
    pub watch_list: PathBuf,
    /// What stands behind the tickers of each rule.
    pub filter: String,
    /// Longest rule and most rules of the account.
    pub max_rule: usize,
    pub max_rules: usize,
    /// Posts a UTC day, at most.
    pub daily_posts: Option<u64>,
    /// Where the posts of today are counted across restarts.
    pub budget_file: PathBuf,
    /// The count itself: clones of the options, for a stream and a search, share it.
    pub(super) budget: Arc<OnceLock<Mutex<Budget>>>,
    /// Minutes that the server sends again after a connection was lost (enterprise only).
    pub backfill_minutes: u8,
    /// Nothing for so long is a dead connection; keep-alives come each 20 s or a little later.
    pub silence: Duration,
    /// Between two searches.
    pub poll_every: Duration,
    /// How often the watch list is looked at.
    pub look_every: Duration,
    /// 1; tests wait less.
    pub time_scale: f64,
}

impl XOptions {
    pub fn new(bearer: String, watch_list: PathBuf, budget_file: PathBuf) -> Self {
        Self {
            base: BASE.into(),
            bearer: Bearer(bearer),
            watch_list,
            filter: "lang:en -is:retweet".into(),
            max_rule: 1_024,
            max_rules: 1_000,
            daily_posts: None,
            budget_file,
            budget: Arc::default(),
            backfill_minutes: 0,
            silence: Duration::from_secs(22),
            poll_every: Duration::from_secs(30),
            look_every: Duration::from_secs(10),
            time_scale: 1.0,
        }
    }

    pub(super) fn budget(&self) -> MutexGuard<'_, Budget> {
        let budget = self.budget.get_or_init(|| Mutex::new(Budget::open(&self.budget_file, self.daily_posts)));
        budget.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn scaled(&self, time: Duration) -> Duration {
        time.mul_f64(self.time_scale)
    }

    /// # Errors
    /// How the request failed, and what to wait for.
    pub(super) async fn request(&self, method: Method, path: &str, json: Option<Vec<u8>>) -> Result<Answer, ApiError> {
        let answer = net::request(method, &format!("{}{path}", self.base), Some(&self.bearer.0), json).await?;
        if answer.status.is_success() {
            return Ok(answer);
        }
        let status = answer.status.as_u16();
        let reset = answer.header("x-rate-limit-reset").and_then(|r| r.parse::<i64>().ok());
        let seconds = reset.map(|at| u64::try_from(at - time::now() / 1_000).unwrap_or(0));
        let failure = if status == 429 { Failure::RateLimit(seconds) } else { Failure::Http };
        let body = answer.body.all().await.unwrap_or_default();
        Err(ApiError { failure, status: Some(status), text: format!("HTTP {status}: {}", problem(&body)) })
    }
}

#[derive(Debug)]
pub(super) struct ApiError {
    pub(super) failure: Failure,
    pub(super) status: Option<u16>,
    pub(super) text: String,
}

impl From<NetError> for ApiError {
    fn from(e: NetError) -> Self {
        let text = e.to_string().lines().next().unwrap_or_default().to_owned();
        Self { failure: Failure::Network, status: None, text }
    }
}

/// What an error body says, in a line.
pub(super) fn problem(body: &[u8]) -> String {
    let value: Value = serde_json::from_slice(body).unwrap_or_default();
    let first = value["errors"].get(0).unwrap_or(&value);
    let said = ["detail", "message", "title"].iter().find_map(|n| first[*n].as_str().or(value[*n].as_str()));
    let raw = String::from_utf8_lossy(&body[..body.len().min(120)]).into_owned();
    said.map_or(raw, |s| s.chars().take(200).collect())
}

/// A post of the API's version 2.
pub(super) fn post(data: &Value) -> Result<Incoming, String> {
    let text = |name: &str| data[name].as_str().map(str::to_owned);
    let id = text("id").filter(|id| !id.is_empty()).ok_or("a post without id")?;
    let referenced = data["referenced_tweets"].as_array();
    let retweeted = referenced
        .and_then(|all| all.iter().find(|r| r["type"] == "retweeted"))
        .and_then(|r| r["id"].as_str().map(str::to_owned));
    // An edit comes as a new post that names all its versions, the first one first.
    let first = data["edit_history_tweet_ids"].get(0).and_then(Value::as_str).filter(|first| *first != id);
    let event_time = match text("created_at") {
        Some(said) => Some(time::parse(&said).ok_or_else(|| format!("{said:?} is no time"))?),
        None => None,
    };
    Ok(Incoming {
        author: text("author_id").unwrap_or_default(),
        text: text("text").ok_or("a post without text")?,
        event_time,
        url: id.bytes().all(|b| b.is_ascii_digit()).then(|| format!("https://x.com/i/status/{id}")),
        copy_of: retweeted.or(first.map(str::to_owned)),
        cursor: None,
        id,
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn posts_edits_and_retweets() {
        let plain = json!({"id": "12", "text": "$XYZ up", "author_id": "98", "created_at": "2024-01-15T10:35:00.000Z",
                           "edit_history_tweet_ids": ["12"]});
        let read = post(&plain).unwrap();
        assert_eq!((read.copy_of, read.url.as_deref()), (None, Some("https://x.com/i/status/12")));
        let edit = json!({"id": "13", "text": "$XYZ up!", "edit_history_tweet_ids": ["12", "13"]});
        assert_eq!(post(&edit).unwrap().copy_of.as_deref(), Some("12"));
        let retweet = json!({"id": "14", "text": "RT", "referenced_tweets": [{"type": "quoted", "id": "1"}, {"type": "retweeted", "id": "2"}]});
        assert_eq!(post(&retweet).unwrap().copy_of.as_deref(), Some("2"));
        assert!(post(&json!({"text": "x"})).is_err() && post(&json!({"id": "1"})).is_err());
    }

    #[test]
    fn errors_in_a_line_and_keys_that_stay_secret() {
        assert_eq!(problem(br#"{"errors":[{"title":"T","detail":"too many rules"}]}"#), "too many rules");
        assert_eq!(problem(br#"{"title":"Unauthorized"}"#), "Unauthorized");
        assert_eq!(problem(b"<html>"), "<html>");
        assert_eq!(format!("{:?}", Bearer("secret".into())), "Bearer(…)");
    }
}
