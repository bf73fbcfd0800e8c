//! Which column is the text, which is the label: asked for by name, or guessed from the names that datasets use.

use std::fmt;

/// Names in the order of preference, lower case, letters and digits only.
const TEXT_NAMES: [&str; 22] = [
    "text",
    "tweet",
    "tweettext",
    "fulltext",
    "sentence",
    "headline",
    "newsheadline",
    "content",
    "body",
    "message",
    "post",
    "title",
    "news",
    "cleantext",
    "comment",
    "document",
    "statement",
    "prompt",
    "input",
    "question",
    "instruction",
    "tweets",
];
const LABEL_NAMES: [&str; 20] = [
    "labeltext",
    "labelname",
    "sentimentlabel",
    "label",
    "sentiment",
    "labels",
    "sentiments",
    "polarity",
    "class",
    "target",
    "category",
    "gold",
    "goldlabel",
    "annotation",
    "answer",
    "output",
    "completion",
    "response",
    "tag",
    "decision",
];
const CHAT_NAMES: [&str; 2] = ["messages", "conversations"];
const TIME_NAMES: [&str; 8] =
    ["time", "createdat", "date", "datetime", "timestamp", "postedat", "publishedat", "tweetcreatedat"];
const ID_NAMES: [&str; 4] = ["id", "tweetid", "idstr", "postid"];

/// The columns that a reader uses, by their names in the file.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Columns {
    /// Column of the text; for a chat file, of the messages.
    pub text: String,
    /// `None`: the file has no labels (or, for a chat file, they stand in the messages).
    pub label: Option<String>,
    /// The text column holds chat messages.
    pub chat: bool,
    /// Further columns that fill fields of an example: (field, column).
    pub fields: Vec<(&'static str, String)>,
    /// Whether `text` and `label` were guessed.
    pub guessed: bool,
}

impl fmt::Display for Columns {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.chat {
            write!(f, "chat messages from {:?}", self.text)?;
        } else {
            write!(f, "text from {:?}", self.text)?;
            match &self.label {
                Some(label) => write!(f, ", label from {label:?}")?,
                None => write!(f, ", no label")?,
            }
        }
        for (field, column) in &self.fields {
            write!(f, ", {field} from {column:?}")?;
        }
        if self.guessed { write!(f, " (guessed)") } else { Ok(()) }
    }
}

/// Chooses the columns among `names`.
///
/// # Errors
///
/// A message with the names that there are, if a named column is missing or none can be guessed.
pub(crate) fn choose(
    names: &[String],
    text: Option<&str>,
    label: Option<&str>,
    want_label: bool,
) -> Result<Columns, String> {
    let listed = || {
        let shown: Vec<String> = names.iter().take(20).map(|name| format!("{name:?}")).collect();
        if shown.is_empty() { "none".to_owned() } else { shown.join(", ") }
    };
    let named = |wanted: &str, flag: &str| match names.iter().find(|name| *name == wanted) {
        Some(name) => Ok(name.clone()),
        None => Err(format!("no column {wanted:?}; the columns are {}\n  hint: give one of them to {flag}", listed())),
    };
    let guess = |known: &[&str], taken: &[&str]| {
        known
            .iter()
            .find_map(|known| names.iter().find(|name| fold(name) == *known && !taken.contains(&name.as_str())))
            .cloned()
    };
    let mut columns = Columns { guessed: text.is_none() || (label.is_none() && want_label), ..Columns::default() };
    match text {
        Some(text) => columns.text = named(text, "--text-column")?,
        None => {
            if label.is_none()
                && let Some(chat) = guess(&CHAT_NAMES, &[])
            {
                columns.text = chat;
                columns.chat = true;
            } else {
                columns.text = guess(&TEXT_NAMES, &label.into_iter().collect::<Vec<_>>()).ok_or_else(|| {
                    format!(
                        "cannot tell which column is the text; the columns are {}\n  hint: name it with --text-column",
                        listed()
                    )
                })?;
            }
        }
    }
    if !columns.chat {
        columns.label = match label {
            Some(label) => Some(named(label, "--label-column")?),
            None => guess(&LABEL_NAMES, &[&columns.text]),
        };
        if columns.label.is_none() && want_label {
            return Err(format!(
                "cannot tell which column is the label; the columns are {}\n  hint: name it with --label-column",
                listed()
            ));
        }
    }
    for field in ["kind", "register", "sector", "event", "pair", "source"] {
        if let Some(name) = guess(&[field], &[]) {
            columns.fields.push((field, name));
        }
    }
    for (field, known) in [("id", &ID_NAMES[..]), ("time", &TIME_NAMES[..])] {
        if let Some(name) = guess(known, &[&columns.text]) {
            columns.fields.push((field, name));
        }
    }
    let taken = |name: &String| *name == columns.text || Some(name) == columns.label.as_ref();
    columns.fields.retain(|(_, name)| !taken(name));
    Ok(columns)
}

/// Whether a column of this name would be taken for the text.
pub(crate) fn is_text_name(name: &str) -> bool {
    TEXT_NAMES.contains(&fold(name).as_str())
}

fn fold(name: &str) -> String {
    name.chars().filter(|character| character.is_alphanumeric()).flat_map(char::to_lowercase).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(list: &str) -> Vec<String> {
        list.split(',').map(str::to_owned).collect()
    }

    #[test]
    fn guesses() {
        let columns = choose(&names("Id,Created_At,Full Text,label,label_text"), None, None, true).unwrap();
        assert_eq!(
            columns.to_string(),
            "text from \"Full Text\", label from \"label_text\", id from \"Id\", time from \"Created_At\" (guessed)"
        );
        let columns = choose(&names("messages"), None, None, true).unwrap();
        assert!(columns.chat);
        let columns = choose(&names("prompt,completion"), None, None, true).unwrap();
        assert_eq!((columns.text.as_str(), columns.label.as_deref()), ("prompt", Some("completion")));
        let columns = choose(&names("a,b"), Some("b"), Some("a"), true).unwrap();
        assert!(!columns.guessed);
        assert_eq!(choose(&names("x,text"), None, None, false).unwrap().label, None);
    }

    #[test]
    fn complaints_list_the_columns() {
        let error = choose(&names("x,y"), None, None, true).unwrap_err();
        assert!(error.contains("\"x\", \"y\"") && error.contains("--text-column"), "{error}");
        assert!(choose(&names("text,y"), None, None, true).unwrap_err().contains("--label-column"));
        assert!(choose(&names("text,y"), Some("txt"), None, true).unwrap_err().contains("no column \"txt\""));
    }
}
