//! The rules of X's filtered stream, kept in step with a watch list.
//!
//! Tickers are put together in as few rules as their lengths allow: `($AAPL OR $MSFT) lang:en -is:retweet`. Ours carry a tag
//! of ours; rules of others in the same account are left alone. New rules are added before old ones go, so no ticker is
//! without a rule in between.

use std::path::Path;

use hyper::Method;
use serde_json::{Value, json};

use super::backoff::Failure;
use super::x_api::{ApiError, XOptions, problem};

const TAG: &str = "cashtag-live";
const PATH: &str = "/2/tweets/search/stream/rules";

/// The tickers of a watch list: one a line, `#` begins a comment, a `$` may stand before it, columns behind a comma are not
/// looked at.
///
/// # Errors
/// The file cannot be read, or has no ticker.
pub fn watch_list(path: &Path) -> Result<Vec<String>, String> {
    let text =
        std::fs::read_to_string(path).map_err(|e| format!("cannot read the watch list {}: {e}", path.display()))?;
    let mut tickers: Vec<String> = Vec::new();
    for line in text.lines() {
        let line = line.split(['#', ',', ';']).next().unwrap_or("").trim().trim_start_matches('$').to_uppercase();
        let sound = !line.is_empty()
            && line.len() <= 12
            && line.starts_with(|c: char| c.is_ascii_alphabetic())
            && line.bytes().all(|b| b.is_ascii_alphanumeric() || b"._".contains(&b))
            && line != "SYMBOL"
            && line != "TICKER";
        if sound && !tickers.contains(&line) {
            tickers.push(line);
        }
    }
    if tickers.is_empty() {
        return Err(format!("the watch list {} has no ticker\n  hint: one a line, such as AAPL", path.display()));
    }
    Ok(tickers)
}

/// The rules for these tickers, each at most `longest` bytes.
///
/// # Errors
/// More rules than the account may have, or a filter that leaves no room.
pub fn rules(tickers: &[String], filter: &str, longest: usize, most: usize) -> Result<Vec<String>, String> {
    let finish = |names: &[&str]| match names {
        [one] => format!("${one} {filter}").trim_end().to_owned(),
        _ => {
            let all: Vec<String> = names.iter().map(|n| format!("${n}")).collect();
            format!("({}) {filter}", all.join(" OR ")).trim_end().to_owned()
        }
    };
    let (mut rules, mut names): (Vec<String>, Vec<&str>) = (Vec::new(), Vec::new());
    for ticker in tickers {
        names.push(ticker);
        if finish(&names).len() > longest {
            names.pop();
            if names.is_empty() {
                return Err(format!(
                    "a rule may have {longest} characters; the filter {filter:?} leaves no room for ${ticker}"
                ));
            }
            rules.push(finish(&names));
            names = vec![ticker];
        }
    }
    if !names.is_empty() {
        rules.push(finish(&names));
    }
    if rules.iter().any(|r| r.len() > longest) {
        return Err(format!("a rule may have {longest} characters; the filter {filter:?} leaves no room"));
    }
    if rules.len() > most {
        return Err(format!("{} tickers need {} rules, the account has {most}", tickers.len(), rules.len()));
    }
    Ok(rules)
}

/// What a synchronisation did.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Synced {
    pub added: usize,
    pub deleted: usize,
    pub foreign: usize,
}

/// Makes the account's rules of ours be `wanted`.
pub(super) async fn sync(options: &XOptions, wanted: &[String]) -> Result<Synced, ApiError> {
    let listed = ask(options, Method::GET, None).await?;
    let there: Vec<&Value> = listed["data"].as_array().map(|d| d.iter().collect()).unwrap_or_default();
    let (ours, foreign): (Vec<&Value>, Vec<&Value>) =
        there.into_iter().partition(|r| r["tag"].as_str().is_some_and(|t| t.starts_with(TAG)));
    let missing: Vec<&String> = wanted.iter().filter(|w| !ours.iter().any(|r| r["value"] == **w)).collect();
    let old: Vec<&str> =
        ours.iter().filter(|r| !wanted.iter().any(|w| r["value"] == *w)).filter_map(|r| r["id"].as_str()).collect();
    for part in missing.chunks(100) {
        let add: Vec<Value> = part.iter().map(|value| json!({"value": value, "tag": TAG})).collect();
        let answer = ask(options, Method::POST, Some(json!({"add": add}))).await?;
        let not_created = answer["meta"]["summary"]["not_created"].as_u64().unwrap_or(0);
        // A rule that is there already, under another tag, is as good.
        let errors = answer["errors"].as_array().map(Vec::as_slice).unwrap_or_default();
        let refused = errors.iter().find(|e| !e["type"].as_str().is_some_and(|t| t.ends_with("duplicate-rules")));
        if let (Some(error), true) = (refused, not_created > 0) {
            let said = problem(error.to_string().as_bytes());
            return Err(ApiError {
                failure: Failure::Http,
                status: Some(400),
                text: format!("a rule was refused: {said}"),
            });
        }
    }
    for part in old.chunks(100) {
        ask(options, Method::POST, Some(json!({"delete": {"ids": part}}))).await?;
    }
    Ok(Synced { added: missing.len(), deleted: old.len(), foreign: foreign.len() })
}

async fn ask(options: &XOptions, method: Method, json: Option<Value>) -> Result<Value, ApiError> {
    let answer = options.request(method, PATH, json.map(|j| j.to_string().into_bytes())).await?;
    let body = answer.body.all().await?;
    serde_json::from_slice(&body).map_err(|e| ApiError {
        failure: Failure::Http,
        status: None,
        text: format!("the rules are no JSON: {e}"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(list: &str) -> Vec<String> {
        list.split(' ').map(str::to_owned).collect()
    }

    #[test]
    fn as_few_rules_as_fit() {
        let all = names("AAPL MSFT NVDA");
        assert_eq!(rules(&all, "lang:en", 99, 9).unwrap(), ["($AAPL OR $MSFT OR $NVDA) lang:en"]);
        assert_eq!(rules(&all, "lang:en", 24, 9).unwrap(), ["($AAPL OR $MSFT) lang:en", "$NVDA lang:en"]);
        assert!(rules(&all, "lang:en", 24, 1).unwrap_err().contains("3 tickers need 2 rules"));
        assert!(rules(&all, "lang:en", 8, 9).unwrap_err().contains("no room for $AAPL"));
        let many: Vec<String> = (0..500).map(|i| format!("T{i}")).collect();
        let made = rules(&many, "lang:en -is:retweet", 1_024, 1_000).unwrap();
        assert!(made.len() <= 6 && made.iter().all(|r| r.len() <= 1_024));
        assert!(
            many.iter().all(|t| made.iter().any(|r| r.contains(&format!("${t} ")) || r.contains(&format!("${t})"))))
        );
    }

    #[test]
    fn watch_lists() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("list");
        std::fs::write(&path, "symbol,name\n$aapl # Apple\n\nBRK.B,Berkshire\nAAPL\n(evil OR $x)\n").unwrap();
        assert_eq!(watch_list(&path).unwrap(), ["AAPL", "BRK.B"]);
        std::fs::write(&path, "# nothing\n").unwrap();
        assert!(watch_list(&path).unwrap_err().contains("hint:"));
    }
}
