//! X's recent search, asked again and again: for accounts without a stream, and for what a stream has missed.
//!
//! A round asks for everything after the newest post that is in the log (`since_id`), page by page, for all queries, and
//! delivers the oldest first. So the cursor never passes a post that is not in the log, whenever the process dies.

use std::collections::BTreeMap;
use std::time::Duration;

use hyper::Method;
use serde_json::Value;

use super::backoff::Backoff;
use super::net::encode;
use super::x_api::{self, ApiError, FIELDS, XOptions};
use super::x_rules;
use super::x_stream::{SOURCE, nap};
use super::{Running, Source};
use crate::board::{Pace, State};
use crate::error::{Error, Result};
use crate::inlet::Inlet;
use crate::post::Incoming;
use crate::store::DeadLetter;
use crate::time;

/// The longest query.
const MAX_QUERY: usize = 512;
/// Pages of one query in one round: 100 posts each.
const MAX_PAGES: usize = 100;

pub struct XSearch(pub XOptions);

impl Source for XSearch {
    fn name(&self) -> String {
        "x-search".into()
    }

    fn kind(&self) -> &'static str {
        "x-search"
    }

    fn pace(&self) -> Pace {
        Pace::Live
    }

    fn run(self: Box<Self>, inlet: Inlet) -> Running {
        Box::pin(async move {
            let options = &self.0;
            let name = self.name();
            // Posts are delivered under the stream's name, which the board must know.
            let beside_stream = inlet.board().all().contains_key(SOURCE);
            inlet.board().register(SOURCE, "x-search", Pace::Live);
            let mut backoff = Backoff::new(options.time_scale);
            while !inlet.stopping() {
                let (wait, spent) = {
                    let mut budget = options.budget();
                    (budget.wait(time::now()), budget.spent())
                };
                if wait.is_some() {
                    let said = format!("the daily budget of {spent} posts is spent; goes on at 00:00 UTC");
                    inlet.board().set(&name, State::Stopped, said);
                    nap(&inlet, Duration::from_secs(60)).await;
                    continue;
                }
                match round(options, &inlet).await {
                    Ok(found) => {
                        backoff.reset();
                        let said = format!("{found} posts in the last round");
                        inlet.board().set(&name, State::Connected, said.clone());
                        if !beside_stream {
                            inlet.board().set(SOURCE, State::Connected, "by recent search");
                        }
                        options.budget().save();
                        nap(&inlet, options.scaled(options.poll_every)).await;
                    }
                    Err(error) if matches!(error.status, Some(401 | 403)) => {
                        return Err(Error::Invalid(format!("X refuses the key: {}", error.text)));
                    }
                    Err(error) => {
                        inlet.board().set(&name, State::Reconnecting, error.text);
                        nap(&inlet, backoff.after(error.failure)).await;
                    }
                }
            }
            Err(Error::Stopped)
        })
    }
}

/// All that is new, oldest first, into the log.
async fn round(options: &XOptions, inlet: &Inlet) -> Result<usize, ApiError> {
    let wrong = |text| ApiError { failure: super::backoff::Failure::Http, status: None, text };
    let tickers = x_rules::watch_list(&options.watch_list).map_err(wrong)?;
    let queries = x_rules::rules(&tickers, &options.filter, MAX_QUERY, usize::MAX).map_err(wrong)?;
    let since = inlet.cursor(SOURCE).filter(|c| !c.is_empty() && c.bytes().all(|b| b.is_ascii_digit()));
    let mut found: BTreeMap<(usize, String), Incoming> = BTreeMap::new();
    for query in &queries {
        pages(options, inlet, query, since.as_deref(), &mut found).await?;
    }
    let count = found.len();
    let posts: Vec<Incoming> =
        found.into_values().map(|post| Incoming { cursor: Some(post.id.clone()), ..post }).collect();
    let stopped = |_| wrong("the process stops".to_owned());
    for part in posts.chunks(500) {
        inlet.deliver(SOURCE, part.to_vec()).await.map_err(stopped)?;
    }
    Ok(count)
}

/// The pages of one query. Ids are numbers of growing length: sorted by length, then digits.
async fn pages(
    options: &XOptions,
    inlet: &Inlet,
    query: &str,
    since: Option<&str>,
    found: &mut BTreeMap<(usize, String), Incoming>,
) -> Result<(), ApiError> {
    let mut since = since.map(str::to_owned);
    let mut next: Option<String> = None;
    for _ in 0..MAX_PAGES {
        let mut path = format!("/2/tweets/search/recent?query={}&max_results=100&{FIELDS}", encode(query));
        if let Some(since) = &since {
            path += &format!("&since_id={}", encode(since));
        }
        if let Some(token) = &next {
            path += &format!("&next_token={}", encode(token));
        }
        let answer = match options.request(Method::GET, &path, None).await {
            // An id that is older than what can be searched.
            Err(e) if e.status == Some(400) && since.is_some() && e.text.contains("since_id") => {
                since = None;
                continue;
            }
            other => other?,
        };
        let body = answer.body.all().await?;
        let page: Value = serde_json::from_slice(&body).map_err(|e| ApiError {
            failure: super::backoff::Failure::Http,
            status: None,
            text: format!("the answer is no JSON: {e}"),
        })?;
        let data = page["data"].as_array().map(Vec::as_slice).unwrap_or_default();
        options.budget().spend(data.len() as u64);
        for item in data {
            match x_api::post(item) {
                Ok(post) => {
                    found.insert((post.id.len(), post.id.clone()), post);
                }
                Err(reason) => inlet.dead_letter(DeadLetter::new(SOURCE, reason, &item.to_string())),
            }
        }
        next = page["meta"]["next_token"].as_str().map(str::to_owned);
        // At the very first start one page is enough to begin with.
        if next.is_none() || since.is_none() || options.budget().left() == Some(0) {
            return Ok(());
        }
    }
    Ok(())
}
