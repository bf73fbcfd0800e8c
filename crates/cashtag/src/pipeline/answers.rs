//! What the model answers, as columns of a table and as fields of a JSON object: `label`, `confidence`, and one `p_…` for
//! each label. One place, so that the two forms cannot differ.

use cashtag_corpus::formats::NewColumn;
use serde_json::{Map, Value};

/// The names of the columns, none of which is taken by another.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct AnswerColumns {
    labels: Vec<String>,
    names: Vec<String>,
}

impl AnswerColumns {
    /// `taken` are the columns that stand beside them. Case does not tell columns apart: some readers of Parquet ignore it.
    pub(crate) fn new(labels: &[String], taken: &[String]) -> Self {
        let mut used: Vec<String> = taken.iter().map(|name| name.to_lowercase()).collect();
        let mut free = |name: String| {
            let candidates = [name.clone(), format!("predicted_{name}")].into_iter();
            let numbered = (2usize..).map(|n| format!("predicted_{name}_{n}"));
            // There is a free one among the first `used.len() + 1`.
            let name = candidates.chain(numbered).find(|c| !used.contains(c)).unwrap_or_default();
            used.push(name.clone());
            name
        };
        let mut names = vec![free("label".into()), free("confidence".into())];
        names.extend(labels.iter().map(|label| free(format!("p_{}", folded(label)))));
        Self { labels: labels.to_vec(), names }
    }

    pub(crate) fn names(&self) -> &[String] {
        &self.names
    }

    /// Whether a name had to be changed because another column has it.
    pub(crate) fn renamed(&self) -> bool {
        *self != Self::new(&self.labels, &[])
    }

    /// Text for the label, numbers for the rest.
    pub(crate) fn new_columns(&self) -> Vec<NewColumn> {
        let number = self.names.iter().skip(1).map(NewColumn::number);
        self.names.first().map(NewColumn::text).into_iter().chain(number).collect()
    }

    /// One value for each column; null for a row without a text.
    pub(crate) fn values(&self, probabilities: Option<&[f32]>) -> Vec<Value> {
        let Some(probabilities) = probabilities else { return vec![Value::Null; self.names.len()] };
        let best = best(probabilities);
        let label = self.labels.get(best).map_or(Value::Null, |label| Value::String(label.clone()));
        let confidence = probabilities.get(best).map_or(Value::Null, |p| shortest(*p));
        [label, confidence].into_iter().chain(probabilities.iter().map(|p| shortest(*p))).collect()
    }

    /// A text and the answer to it as one object.
    pub(crate) fn object(&self, text: &str, probabilities: Option<&[f32]>) -> Map<String, Value> {
        let answer = self.names.iter().cloned().zip(self.values(probabilities));
        std::iter::once(("text".to_string(), Value::from(text))).chain(answer).collect()
    }
}

/// Position of the most probable label; the first of equals.
pub(crate) fn best(probabilities: &[f32]) -> usize {
    let mut best = 0;
    for (i, p) in probabilities.iter().enumerate() {
        if *p > probabilities[best] {
            best = i;
        }
    }
    best
}

/// Lower case, and nothing in it that would have to be quoted in SQL or a formula.
fn folded(label: &str) -> String {
    label.to_lowercase().chars().map(|c| if c.is_alphanumeric() { c } else { '_' }).collect()
}

/// The shortest decimal number that is the same f32: 0.9, not 0.8999999761581421.
pub(crate) fn shortest(p: f32) -> Value {
    p.to_string().parse::<f64>().map_or(Value::Null, Value::from)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn strings(words: &[&str]) -> Vec<String> {
        words.iter().map(|w| w.to_string()).collect()
    }

    #[test]
    fn names_that_nothing_else_has() {
        let labels = strings(&["Positive", "Neutral"]);
        let names = |taken: &[&str]| AnswerColumns::new(&labels, &strings(taken)).names().join(" ");
        assert_eq!(names(&["text", "id"]), "label confidence p_positive p_neutral");
        assert_eq!(names(&["Label", "text"]), "predicted_label confidence p_positive p_neutral");
        assert_eq!(
            names(&["label", "predicted_label", "P_Neutral"]),
            "predicted_label_2 confidence p_positive predicted_p_neutral"
        );
        let columns = AnswerColumns::new(&strings(&["Very good", "A+", "A-"]), &[]);
        assert_eq!(columns.names().join(" "), "label confidence p_very_good p_a_ predicted_p_a_");
    }

    #[test]
    fn values_in_the_order_of_the_names() {
        let columns = AnswerColumns::new(&strings(&["Up", "Down"]), &[]);
        assert_eq!(columns.values(Some(&[0.1, 0.9])), [json!("Down"), json!(0.9), json!(0.1), json!(0.9)]);
        assert_eq!(columns.values(None), vec![Value::Null; 4]);
        let object = Value::from(columns.object("t", Some(&[0.5, 0.5])));
        assert_eq!(object.to_string(), r#"{"text":"t","label":"Up","confidence":0.5,"p_up":0.5,"p_down":0.5}"#);
    }
}
