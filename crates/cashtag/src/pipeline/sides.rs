//! Models side by side: each judged on the same texts, and every further one compared with the first, text by text. As
//! tables, as JSON, as the report, as a table of predictions.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use cashtag_corpus::formats::{neutralise, write_atomically};
use cashtag_eval::report::{DataSummary, Description, FileEntry, Mistake, Report, Split, Timing};
use cashtag_eval::{Comparison, Interval, Judged, Metrics};
use serde_json::{Value, json};

use super::answers::{AnswerColumns, shortest};
use super::injections::Injected;
use super::report;
use crate::output;
use crate::settings::Settings;

/// One model, with an adapter or without, and what it thinks of the texts.
pub(crate) struct Side {
    pub(crate) settings: Settings,
    /// Architecture and size.
    pub(crate) description: String,
    pub(crate) adapter: Option<Description>,
    pub(crate) temperature: f32,
    pub(crate) judged: Vec<Judged>,
    pub(crate) seconds: f64,
    /// What appended instructions did to the answers, if that was asked.
    pub(crate) injected: Option<Injected>,
}

impl Side {
    fn model(&self) -> &str {
        &self.settings.model.name
    }

    fn adapter_path(&self) -> Option<&PathBuf> {
        self.settings.model.adapter.as_ref()
    }

    /// As it was named on the command line.
    fn name(&self) -> String {
        let adapter = self.adapter_path().map(|a| format!(" + {}", a.display())).unwrap_or_default();
        output::printable(&format!("{}{adapter}", self.model()))
    }
}

/// A side with its figures.
struct Measured {
    side: Side,
    metrics: Metrics,
    slices: BTreeMap<String, Metrics>,
    /// Against the first side.
    against: Option<Comparison>,
}

pub(crate) struct Sides {
    labels: Vec<String>,
    source: String,
    device: String,
    /// What the texts are sliced by: `kind`.
    by: &'static str,
    all: Vec<Measured>,
}

/// `A`, `B`, …
pub(crate) fn letter(side: usize) -> char {
    char::from(b'A' + (side % 26) as u8)
}

/// Sides that letters can tell apart.
pub(crate) const MOST_SIDES: usize = 26;

impl Sides {
    /// `sides` judged the same texts, sliced by what stands in their `kind`.
    ///
    /// # Errors
    /// Probabilities that are not numbers.
    pub(crate) fn measure(
        sides: Vec<Side>,
        labels: &[String],
        source: String,
        device: String,
        by: &'static str,
        seed: u64,
    ) -> anyhow::Result<Self> {
        let mut all: Vec<Measured> = Vec::with_capacity(sides.len());
        for side in sides {
            let against = match all.first() {
                Some(first) => Some(cashtag_eval::compare(&first.side.judged, &side.judged, labels, seed)?),
                None => None,
            };
            let metrics = cashtag_eval::evaluate(&side.judged, labels, seed)?;
            let slices = cashtag_eval::by_kind(&side.judged, labels, seed)?;
            all.push(Measured { side, metrics, slices, against });
        }
        Ok(Self { labels: labels.to_vec(), source, device, by, all })
    }

    /// Whether the texts say anything about what they are sliced by.
    pub(crate) fn has_slices(&self) -> bool {
        self.all.iter().any(|m| !m.slices.is_empty())
    }

    fn names(&self) -> Vec<String> {
        (0..self.all.len()).map(|i| letter(i).to_string()).collect()
    }

    /// For the terminal.
    pub(crate) fn text(&self, with_slices: bool) -> String {
        let Some(first) = self.all.first() else { return String::new() };
        let texts = first.metrics.examples;
        let mut text = String::new();
        let told = |m: &Measured| match m.side.adapter_path() {
            Some(_) => format!("{}, temperature {:.2}", m.side.name(), m.side.temperature),
            None => m.side.name(),
        };
        let mut heads = vec![String::new()];
        if self.all.len() == 1 {
            let _ = writeln!(text, "{}\n{}: {texts} texts\n", told(first), self.source);
        } else {
            let _ = writeln!(text, "{}: {texts} texts", self.source);
            for (name, m) in self.names().iter().zip(&self.all) {
                let _ = writeln!(text, "{name}  {}", told(m));
            }
            text.push('\n');
            heads.extend(self.names());
        }
        let mut rows = if heads.len() > 1 { vec![heads] } else { Vec::new() };
        let mut row = |name: String, show: &dyn Fn(&Metrics) -> String| {
            rows.push(std::iter::once(name).chain(self.all.iter().map(|m| show(&m.metrics))).collect());
        };
        row("accuracy".into(), &|m| share(m.accuracy));
        row("macro F1".into(), &|m| share(m.macro_f1));
        row("weighted F1".into(), &|m| share(m.weighted_f1));
        row("log-loss".into(), &|m| nats(m.log_loss));
        row("calibration error".into(), &|m| percent(m.expected_calibration_error));
        row("majority baseline".into(), &|m| percent(m.majority_baseline));
        if self.all.len() > 1 {
            for (i, label) in self.labels.iter().enumerate() {
                let f1 = |m: &Metrics| m.per_class.get(i).map_or("–".into(), |c| percent(c.f1));
                row(format!("F1 {}", shown(label)), &f1);
            }
        }
        text += &table(&rows);
        if self.all.len() == 1 {
            text += &format!("\n{}", self.classes(&first.metrics));
        } else {
            text += &format!("\n{}", self.differences());
        }
        if with_slices {
            text += &format!("\n{}", self.slices());
        }
        if self.all.iter().any(|m| m.side.injected.is_some()) {
            text += &format!("\n{}", self.injections());
        }
        text + "\nIn brackets: 95% intervals, bootstrap over the texts.\n"
    }

    /// Each class, with what its texts were taken for.
    fn classes(&self, m: &Metrics) -> String {
        let mut head: Vec<String> = ["class", "texts", "precision", "recall", "F1"].map(String::from).to_vec();
        head.extend(self.labels.iter().map(|l| format!("→ {}", shown(l))));
        let mut rows = vec![head];
        for (class, taken_for) in m.per_class.iter().zip(&m.confusion) {
            let mut row = vec![shown(&class.label), class.support.to_string()];
            row.extend([class.precision, class.recall, class.f1].map(percent));
            row.extend(taken_for.iter().map(u64::to_string));
            rows.push(row);
        }
        table(&rows)
    }

    fn differences(&self) -> String {
        let compared: Vec<(String, &Comparison)> =
            self.names().into_iter().zip(&self.all).filter_map(|(name, m)| Some((name, m.against.as_ref()?))).collect();
        let mut rows = vec![vec!["against A".to_string()]];
        rows[0].extend(compared.iter().map(|(name, _)| name.clone()));
        let mut row = |name: &str, show: &dyn Fn(&Comparison) -> String| {
            rows.push(std::iter::once(name.to_string()).chain(compared.iter().map(|(_, c)| show(c))).collect());
        };
        row("accuracy, points", &|c| change(c.accuracy, 100.0, 1));
        row("macro F1, points", &|c| change(c.macro_f1, 100.0, 1));
        row("log-loss", &|c| change(c.log_loss, 1.0, 3));
        row("right where A is wrong", &|c| c.mcnemar.only_b_right.to_string());
        row("wrong where A is right", &|c| c.mcnemar.only_a_right.to_string());
        row("McNemar p", &|c| match c.mcnemar.p_value {
            p if p < 0.001 => "< 0.001".into(),
            p => format!("{p:.3}"),
        });
        table(&rows)
    }

    fn slices(&self) -> String {
        let mut counts: BTreeMap<&String, u64> = BTreeMap::new();
        for m in &self.all {
            counts.extend(m.slices.iter().map(|(name, metrics)| (name, metrics.examples)));
        }
        let mut order: Vec<(&String, u64)> = counts.into_iter().collect();
        order.sort_by_key(|(name, texts)| (std::cmp::Reverse(*texts), *name));
        let mut rows = vec![vec![self.by.to_string(), "texts".to_string()]];
        match self.all.len() {
            1 => rows[0].extend(["accuracy", "macro F1"].map(String::from)),
            _ => rows[0].extend(self.names().iter().map(|name| format!("accuracy of {name}"))),
        }
        for (name, texts) in order {
            let mut row = vec![shown(name), texts.to_string()];
            let metrics = || self.all.iter().map(|m| m.slices.get(name));
            row.extend(metrics().map(|m| m.map_or("–".into(), |m| share(m.accuracy))));
            if self.all.len() == 1 {
                row.extend(metrics().map(|m| m.map_or("–".into(), |m| share(m.macro_f1))));
            }
            rows.push(row);
        }
        table(&rows)
    }

    /// How many texts took the label that appended words asked for, kind by kind.
    fn injections(&self) -> String {
        let mut head = vec!["label turned by".to_string()];
        match self.all.len() {
            1 => head.extend(["as asked", "at all"].map(String::from)),
            _ => head.extend(self.names().iter().map(|name| format!("as asked, {name}"))),
        }
        let mut rows = vec![head];
        let injected: Vec<&Injected> = self.all.iter().filter_map(|m| m.side.injected.as_ref()).collect();
        let Some(first) = injected.first() else { return String::new() };
        for (i, kind) in first.rows().enumerate() {
            let mut row = vec![kind.kind.to_string()];
            let of_side = injected.iter().filter_map(|side| side.rows().nth(i));
            row.extend(of_side.map(|turned| turned.obeyed.to_string()));
            if self.all.len() == 1 {
                row.push(kind.changed.to_string());
            }
            rows.push(row);
        }
        table(&rows)
    }

    /// Every figure.
    pub(crate) fn json(&self) -> anyhow::Result<Value> {
        let mut models = Vec::new();
        for m in &self.all {
            let mut model = json!({
                "model": m.side.model(),
                "adapter": m.side.adapter_path().map(|a| a.display().to_string()),
                "description": m.side.description,
                "temperature": shortest(m.side.temperature),
                "seconds": m.side.seconds,
                "metrics": serde_json::to_value(&m.metrics)?,
            });
            model[format!("by_{}", self.by)] = serde_json::to_value(&m.slices)?;
            if let Some(injected) = &m.side.injected {
                model["injected"] = serde_json::to_value(injected)?;
            }
            if let Some(comparison) = &m.against {
                model["against_first"] = serde_json::to_value(comparison)?;
            }
            models.push(model);
        }
        Ok(json!({
            "data": self.source,
            "examples": self.all.first().map_or(0, |m| m.metrics.examples),
            "labels": self.labels,
            "device": self.device,
            "models": models,
        }))
    }

    /// Writes `metrics.json`, `predictions.csv` and `report.html` (with three sides or more, `report-B.html`, …: the first
    /// against each other one), and says which pages it wrote.
    ///
    /// # Errors
    /// The file system refuses.
    pub(crate) fn write(&self, dir: &Path) -> anyhow::Result<Vec<PathBuf>> {
        let metrics = serde_json::to_string_pretty(&self.json()?)? + "\n";
        write_atomically(&dir.join("metrics.json"), metrics.as_bytes())?;
        write_atomically(&dir.join("predictions.csv"), self.predictions().as_bytes())?;
        let mut pages = Vec::new();
        for side in (1..self.all.len()).chain((self.all.len() == 1).then_some(0)) {
            let name =
                if self.all.len() > 2 { format!("report-{}.html", letter(side)) } else { "report.html".to_string() };
            let page = dir.join(name);
            write_atomically(&page, self.report(dir, side).html().as_bytes())?;
            pages.push(page);
        }
        Ok(pages)
    }

    /// The first side and another one as a page; the page knows a before and an after.
    fn report(&self, dir: &Path, other: usize) -> Report {
        let (first, m) = (&self.all[0], &self.all[other]);
        let is_fine_tuning =
            first.side.adapter.is_none() && m.side.adapter.is_some() && first.side.model() == m.side.model();
        let mut report = Report {
            title: format!("cashtag eval: {}", self.source),
            created: report::now(),
            command: Some(report::command_line()),
            device: self.device.clone(),
            model: Description::new(m.side.description.clone()),
            adapter: m.side.adapter.clone(),
            labels: self.labels.clone(),
            configuration: report::configuration(&m.side.settings),
            data: DataSummary { source: self.source.clone(), splits: vec![self.split()] },
            mistakes: Mistake::hardest(&m.side.judged, 20),
            timings: vec![Timing { name: "judge".into(), seconds: m.side.seconds }],
            files: [("metrics.json", "every figure of this page"), ("predictions.csv", "every text with its answers")]
                .map(|(path, note)| FileEntry {
                    path: path.into(),
                    bytes: std::fs::metadata(dir.join(path)).ok().map(|m| m.len()),
                    note: note.into(),
                })
                .to_vec(),
            ..Report::default()
        };
        let both = |m: &Measured| (Some(m.metrics.clone()), m.slices.clone());
        match (other, m.side.adapter.is_some()) {
            (0, false) => (report.before, report.by_kind_before) = both(m),
            (0, true) => (report.after, report.by_kind_after) = both(m),
            _ => {
                (report.before, report.by_kind_before) = both(first);
                (report.after, report.by_kind_after) = both(m);
                report.comparison.clone_from(&m.against);
                if !is_fine_tuning {
                    let (a, b) = (first.side.name(), m.side.name());
                    report.notice = Some(format!("Two models side by side. Before: {a}. After: {b}."));
                }
            }
        }
        report
    }

    fn split(&self) -> Split {
        let judged = self.all.first().map_or(&[][..], |m| &m.side.judged);
        Split::count("judged", self.labels.len(), judged.iter().map(|j| (j.truth, j.kind.as_deref())))
    }

    /// One row a text, as CSV; the columns of several sides begin with their letters.
    fn predictions(&self) -> String {
        let Some(first) = self.all.first() else { return String::new() };
        let mut head: Vec<String> = ["text", "label"].map(String::from).to_vec();
        if self.has_slices() {
            head.push(self.by.to_string());
        }
        let columns = AnswerColumns::new(&self.labels, &head);
        for name in self.names() {
            let prefix = if self.all.len() > 1 { format!("{name}_") } else { String::new() };
            head.extend(columns.names().iter().map(|column| format!("{prefix}{column}")));
        }
        let mut text = csv_row(head.iter().map(String::as_str));
        for (i, judged) in first.side.judged.iter().enumerate() {
            let mut row = vec![judged.text.clone(), self.labels.get(judged.truth).cloned().unwrap_or_default()];
            if self.has_slices() {
                row.push(judged.kind.clone().unwrap_or_default());
            }
            for m in &self.all {
                let probabilities = m.side.judged.get(i).map(|j| &j.probabilities[..]);
                row.extend(columns.values(probabilities).into_iter().map(|value| match value {
                    Value::String(text) => text,
                    Value::Null => String::new(),
                    other => other.to_string(),
                }));
            }
            text += &csv_row(row.iter().map(String::as_str));
        }
        text
    }
}

/// RFC 4180, and nothing that a spreadsheet would run.
fn csv_row<'a>(cells: impl Iterator<Item = &'a str>) -> String {
    let cell = |cell: &str| {
        let cell = neutralise(cell);
        if cell.contains([',', '"', '\n', '\r']) { format!("\"{}\"", cell.replace('"', "\"\"")) } else { cell.into() }
    };
    cells.map(cell).collect::<Vec<_>>().join(",") + "\n"
}

fn percent(share: f64) -> String {
    format!("{:.1}%", share * 100.0)
}

fn share(i: Interval) -> String {
    format!("{} [{:.1}, {:.1}]", percent(i.value), i.low * 100.0, i.high * 100.0)
}

fn nats(i: Interval) -> String {
    format!("{:.3} [{:.3}, {:.3}]", i.value, i.low, i.high)
}

fn change(i: Interval, scale: f64, decimals: usize) -> String {
    // Adding 0.0 turns -0.0 into 0.0.
    let number = |v: f64| format!("{:+.decimals$}", v * scale + 0.0);
    format!("{} [{}, {}]", number(i.value), number(i.low), number(i.high))
}

/// A name from a data file, as far as a column has room for it.
fn shown(name: &str) -> String {
    output::printable(name).replace(['\n', '\t'], " ").chars().take(24).collect()
}

/// Rows in columns of equal width, two blanks between them.
fn table(rows: &[Vec<String>]) -> String {
    let width = |c: usize| rows.iter().filter_map(|r| r.get(c)).map(|cell| cell.chars().count()).max().unwrap_or(0);
    let mut text = String::new();
    for row in rows {
        let cells: Vec<String> =
            row.iter().enumerate().map(|(c, cell)| format!("{cell:<width$}", width = width(c))).collect();
        text += cells.join("  ").trim_end();
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use insta::assert_snapshot;

    use super::*;

    /// 40 texts of two kinds, of which every `wrong`th is taken for the next label.
    fn side(adapter: Option<&str>, wrong: usize) -> Side {
        let mut settings = Settings::default();
        settings.model.adapter = adapter.map(PathBuf::from);
        let judged = (0..40).map(|i| {
            let truth = i % 3;
            let mut probabilities = vec![0.1; 3];
            probabilities[if i % wrong == 0 { (truth + 1) % 3 } else { truth }] = 0.8;
            let kind = Some(if i < 25 { "plain" } else { "mixed" }.to_string());
            Judged { text: format!("=text, \"{i}\""), truth, probabilities, kind }
        });
        Side {
            settings,
            description: "a small model".into(),
            adapter: adapter.map(|a| Description::new(a).fact("rank", 8)),
            temperature: if adapter.is_some() { 1.25 } else { 1.0 },
            judged: judged.collect(),
            seconds: 2.0,
            injected: None,
        }
    }

    fn sides(all: Vec<Side>) -> Sides {
        let labels = ["Up", "Flat", "Down"].map(String::from);
        Sides::measure(all, &labels, "tweets.csv".into(), "a CPU".into(), "kind", 42).unwrap()
    }

    #[test]
    fn one_side() {
        assert_snapshot!(sides(vec![side(None, 4)]).text(true), @"
        smollm2-135m
        tweets.csv: 40 texts

        accuracy           75.0% [62.5, 87.5]
        macro F1           75.0% [60.1, 87.5]
        weighted F1        75.0% [61.4, 87.6]
        log-loss           0.743 [0.483, 1.003]
        calibration error  5.0%
        majority baseline  35.0%

        class  texts  precision  recall  F1     → Up  → Flat  → Down
        Up     14     76.9%      71.4%   74.1%  10    4       0
        Flat   13     71.4%      76.9%   74.1%  0     10      3
        Down   13     76.9%      76.9%   76.9%  3     0       10

        kind   texts  accuracy             macro F1
        plain  25     72.0% [52.0, 88.0]   72.1% [51.0, 88.2]
        mixed  15     80.0% [60.0, 100.0]  80.0% [52.8, 100.0]

        In brackets: 95% intervals, bootstrap over the texts.
        ");
    }

    #[test]
    fn two_sides() {
        let both = sides(vec![side(None, 2), side(Some("runs/mine"), 5)]);
        assert_snapshot!(both.text(true), @"
        tweets.csv: 40 texts
        A  smollm2-135m
        B  smollm2-135m + runs/mine, temperature 1.25

                           A                     B
        accuracy           50.0% [35.0, 65.0]    80.0% [67.5, 92.5]
        macro F1           50.0% [34.6, 65.0]    80.0% [65.9, 91.3]
        weighted F1        50.0% [35.0, 65.3]    80.0% [67.1, 92.4]
        log-loss           1.263 [0.951, 1.575]  0.639 [0.379, 0.899]
        calibration error  30.0%                 0.0%
        majority baseline  35.0%                 35.0%
        F1 Up              50.0%                 78.6%
        F1 Flat            51.9%                 81.5%
        F1 Down            48.0%                 80.0%

        against A               B
        accuracy, points        +30.0 [+10.0, +47.5]
        macro F1, points        +30.1 [+9.7, +49.5]
        log-loss                -0.624 [-0.988, -0.208]
        right where A is wrong  16
        wrong where A is right  4
        McNemar p               0.012

        kind   texts  accuracy of A       accuracy of B
        plain  25     48.0% [28.0, 68.0]  80.0% [64.0, 96.0]
        mixed  15     53.3% [26.7, 80.0]  80.0% [60.0, 100.0]

        In brackets: 95% intervals, bootstrap over the texts.
        ");
        assert_snapshot!(both.predictions().lines().take(2).collect::<Vec<_>>().join("\n"), @r#"
        text,label,kind,A_predicted_label,A_confidence,A_p_up,A_p_flat,A_p_down,B_predicted_label,B_confidence,B_p_up,B_p_flat,B_p_down
        "'=text, ""0""",Up,plain,Flat,0.8,0.1,0.8,0.1,Flat,0.8,0.1,0.8,0.1
        "#);
        let report = both.report(Path::new("nowhere"), 1);
        assert_eq!((report.notice.as_deref(), report.before.is_some(), report.after.is_some()), (None, true, true));
        assert_eq!(both.json().unwrap()["models"][1]["adapter"], "runs/mine");
    }

    #[test]
    fn a_page_says_who_is_who() {
        let others = sides(vec![side(Some("a"), 2), side(Some("b"), 5)]);
        let notice = others.report(Path::new("nowhere"), 1).notice.unwrap();
        assert_eq!(notice, "Two models side by side. Before: smollm2-135m + a. After: smollm2-135m + b.");
        let alone = sides(vec![side(Some("a"), 2)]).report(Path::new("nowhere"), 0);
        assert!(alone.before.is_none() && alone.after.is_some() && alone.comparison.is_none());
        let base = sides(vec![side(None, 2)]).report(Path::new("nowhere"), 0);
        assert!(base.before.is_some() && base.after.is_none());
    }
}
