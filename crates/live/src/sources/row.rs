//! A post out of a JSON object or a row of a table, whatever the fields are called.

use serde_json::{Map, Value};

use crate::post::Incoming;
use crate::time;

const TEXT: &[&str] = &["text", "tweet", "fulltext", "body", "content", "message", "headline", "title"];
const ID: &[&str] = &["id", "idstr", "tweetid", "postid"];
const AUTHOR: &[&str] = &["author", "authorid", "user", "username", "userid", "screenname", "handle"];
const TIME: &[&str] = &["eventtime", "createdat", "time", "timestamp", "date", "datetime", "publishedat", "postedat"];
const URL: &[&str] = &["url", "link", "permalink"];
const COPY: &[&str] = &["copyof", "iscopyof", "retweetof", "retweetedid", "retweetedstatusid"];

/// # Errors
/// Which field is missing or not understood.
pub fn incoming(row: &Map<String, Value>) -> Result<Incoming, String> {
    let folded: Vec<(String, &Value)> = row.iter().map(|(name, value)| (fold(name), value)).collect();
    let find =
        |names: &[&str]| names.iter().find_map(|name| Some(folded.iter().find(|(n, v)| n == name && !v.is_null())?.1));
    let text = match find(TEXT) {
        Some(Value::String(text)) => text.clone(),
        Some(_) => return Err("the text is no string".into()),
        None => {
            let names: Vec<&str> = row.keys().take(10).map(String::as_str).collect();
            return Err(format!(
                "there is no text; the fields are {}",
                if names.is_empty() { "none".into() } else { names.join(", ") }
            ));
        }
    };
    let event_time = match find(TIME) {
        None => None,
        Some(Value::String(text)) if text.trim().is_empty() => None,
        Some(Value::String(text)) => Some(time::parse(text).ok_or_else(|| format!("{text:?} is no time"))?),
        Some(Value::Number(n)) => {
            Some(n.as_f64().and_then(time::from_number).ok_or_else(|| format!("{n} is no time"))?)
        }
        Some(_) => return Err("the time is neither text nor number".into()),
    };
    Ok(Incoming {
        id: find(ID).and_then(word).unwrap_or_default(),
        author: find(AUTHOR).and_then(word).unwrap_or_default(),
        text,
        event_time,
        url: find(URL).and_then(word),
        copy_of: find(COPY).and_then(word),
        cursor: None,
    })
}

/// Strings and numbers as text; of an object (`"user": {"id": 1}`) its id.
fn word(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.trim().to_owned()).filter(|t| !t.is_empty()),
        Value::Number(number) => Some(number.to_string()),
        Value::Object(fields) => {
            ["id_str", "id", "username", "screen_name"].iter().find_map(|n| match fields.get(*n)? {
                Value::String(text) => Some(text.clone()),
                Value::Number(number) => Some(number.to_string()),
                _ => None,
            })
        }
        _ => None,
    }
}

fn fold(name: &str) -> String {
    name.chars().filter(|c| c.is_alphanumeric()).flat_map(char::to_lowercase).take(64).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(value: Value) -> Result<Incoming, String> {
        incoming(value.as_object().unwrap())
    }

    #[test]
    fn fields_under_their_many_names() {
        let want = Incoming {
            id: "7".into(),
            author: "ann".into(),
            text: "up".into(),
            event_time: Some(1_705_314_900_000),
            ..Incoming::default()
        };
        for row in [
            json!({"id": 7, "author": "ann", "created_at": "2024-01-15T10:35:00Z", "text": "up"}),
            json!({"Tweet ID": "7", "User": {"screen_name": "ann"}, "timestamp": 1_705_314_900, "Full_Text": "up"}),
            json!({"id_str": "7", "username": "ann", "date": "2024-01-15 10:35:00", "tweet": "up", "author": null}),
        ] {
            assert_eq!(read(row).unwrap(), want);
        }
        let bare = read(json!({"text": "up", "retweet_of": 5, "time": ""})).unwrap();
        assert_eq!((bare.event_time, bare.copy_of.as_deref(), &*bare.id), (None, Some("5"), ""));
    }

    #[test]
    fn what_is_wrong_is_said() {
        for (row, what) in [
            (json!({}), "the fields are none"),
            (json!({"label": 1}), "the fields are label"),
            (json!({"text": 1}), "no string"),
            (json!({"text": "x", "time": "soon"}), "\"soon\" is no time"),
            (json!({"text": "x", "time": [1]}), "neither"),
        ] {
            assert!(read(row).unwrap_err().contains(what));
        }
    }
}
