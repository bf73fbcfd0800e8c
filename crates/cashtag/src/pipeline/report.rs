//! What a run leaves behind: `metrics.json`, `report.html`, and the table on the terminal.

use std::path::Path;

use cashtag_corpus::Example;
use cashtag_eval::report::{
    DataSummary, Description, ExampleTweet, FileEntry, HistoryRow, Mistake, Report, Setting, Split, Timing,
};
use cashtag_eval::{Comparison, Judged, Metrics};
use serde_json::json;

use super::data::Data;
use crate::settings::Settings;

/// Everything that is known at the end of a run.
pub(crate) struct Findings {
    pub(crate) labels: Vec<String>,
    pub(crate) device: String,
    pub(crate) model: Description,
    pub(crate) adapter: Description,
    pub(crate) before: Vec<Judged>,
    pub(crate) after: Vec<Judged>,
    pub(crate) examples_before: Vec<Judged>,
    pub(crate) examples_after: Vec<Judged>,
    pub(crate) history: Vec<HistoryRow>,
    pub(crate) timings: Vec<Timing>,
    pub(crate) temperature: f64,
}

/// The seven tweets by which a model is judged, with why they are hard.
pub(crate) const EXAMPLES: [(&str, &str, &str); 7] = [
    ("The stock market is recovering after a steep decline last week.", "Positive", "plain"),
    ("Major stock indices dropped significantly due to concerns about inflation.", "Negative", "plain"),
    ("The stock market is steady, with no major changes in performance today.", "Neutral", "plain"),
    ("Tech stocks are up, but there are concerns about the overall market's future.", "Neutral", "mixed"),
    ("Stock prices are rising today, but investors remain cautious about long-term growth.", "Neutral", "mixed"),
    ("Oh great, another stock market crash. Just what we needed!", "Negative", "sarcasm"),
    ("The market volatility today was exactly as expected, no surprises.", "Neutral", "contextual"),
];

/// Metrics of both sides, by kind too.
pub(crate) struct Measured {
    pub(crate) before: Metrics,
    pub(crate) after: Metrics,
    pub(crate) comparison: Comparison,
    report: Report,
}

/// Measures and draws.
///
/// # Errors
/// Probabilities that are not numbers.
pub(crate) fn measure(s: &Settings, data: &Data, f: Findings, files: Vec<FileEntry>) -> anyhow::Result<Measured> {
    let seed = s.training.seed;
    let labels = &f.labels;
    let before = cashtag_eval::evaluate(&f.before, labels, seed)?;
    let after = cashtag_eval::evaluate(&f.after, labels, seed)?;
    // Without the temperature, to see what it mends.
    let untempered = match f.temperature {
        1.0 => None,
        t => {
            let mut judged = f.after.clone();
            judged.iter_mut().for_each(|j| cashtag_eval::apply_temperature(&mut j.probabilities, 1.0 / t));
            Some(cashtag_eval::evaluate(&judged, labels, seed)?)
        }
    };
    let comparison = cashtag_eval::compare(&f.before, &f.after, labels, seed)?;
    let split = |name: &str, part: &[Example]| {
        let index = |e: &Example| labels.iter().position(|l| *l == e.label).unwrap_or(usize::MAX);
        Split::count(name, labels.len(), part.iter().map(|e| (index(e), e.kind.as_deref())))
    };
    let examples = f
        .examples_before
        .iter()
        .zip(&f.examples_after)
        .map(|(b, a)| ExampleTweet {
            text: b.text.clone(),
            expected: Some(b.truth),
            note: b.kind.clone(),
            before: Some(b.probabilities.clone()),
            after: Some(a.probabilities.clone()),
        })
        .collect();
    let report = Report {
        title: "cashtag: before and after fine-tuning".into(),
        created: now(),
        notice: None,
        command: Some(command_line()),
        device: f.device,
        model: f.model,
        adapter: Some(f.adapter.fact("temperature", format!("{:.2}", f.temperature))),
        labels: labels.clone(),
        configuration: configuration(s),
        data: DataSummary {
            source: data.source.clone(),
            splits: vec![
                split("training", &data.train),
                split("validation", &data.validation),
                split("held out", &data.held_out),
            ],
        },
        history: f.history,
        by_kind_before: cashtag_eval::by_kind(&f.before, labels, seed)?,
        by_kind_after: cashtag_eval::by_kind(&f.after, labels, seed)?,
        before: Some(before.clone()),
        after: Some(after.clone()),
        untempered,
        comparison: Some(comparison.clone()),
        examples,
        mistakes: Mistake::hardest(&f.after, 20),
        timings: f.timings,
        files,
    };
    Ok(Measured { before, after, comparison, report })
}

impl Measured {
    /// Writes `metrics.json` and `report.html`.
    ///
    /// # Errors
    /// The file system refuses.
    pub(crate) fn write(
        &self,
        run_dir: &Path,
        temperature: f64,
        peak_bytes: u64,
        plan: &serde_json::Value,
    ) -> anyhow::Result<()> {
        let r = &self.report;
        let metrics = json!({
            "before": self.before,
            "after": self.after,
            "comparison": self.comparison,
            "by_kind_before": r.by_kind_before,
            "by_kind_after": r.by_kind_after,
            "examples": r.examples,
            "temperature": temperature,
            "after_without_temperature": r.untempered,
            "timings": r.timings,
            "peak_memory_bytes": peak_bytes,
            "plan": plan,
        });
        let text = serde_json::to_string_pretty(&metrics)? + "\n";
        cashtag_corpus::formats::write_atomically(&run_dir.join("metrics.json"), text.as_bytes())?;
        cashtag_corpus::formats::write_atomically(&run_dir.join("report.html"), r.html().as_bytes())?;
        Ok(())
    }
}

/// The seven examples on the terminal: what was expected, and what the model says before and after.
pub(crate) fn example_table(labels: &[String], before: &[Judged], after: &[Judged]) -> String {
    let cell = |j: &Judged| {
        let p = j.predicted();
        let mark = if p == j.truth { '✓' } else { '✗' };
        format!("{mark} {:<8} {:>3.0} %", labels[p], 100.0 * j.probabilities[p])
    };
    let mut out = format!("{:<9} {:<17} {:<17} example\n", "expected", "before", "after");
    for (b, a) in before.iter().zip(after) {
        out += &format!("{:<9} {:<17} {:<17} {}\n", labels[a.truth], cell(b), cell(a), a.text);
    }
    out
}

pub(crate) fn configuration(s: &Settings) -> Vec<Setting> {
    // The recipe that the settings print is the one list of keys, values and sources.
    let mut section = String::new();
    let mut settings = Vec::new();
    for line in s.to_toml_with_sources().lines() {
        if let Some(name) = line.strip_prefix('[').and_then(|l| l.strip_suffix(']')) {
            section = name.to_string();
        } else if let Some((key, rest)) = line.split_once(" = ") {
            let (value, source) = rest.rsplit_once("  # ").or_else(|| rest.rsplit_once(" # ")).unwrap_or((rest, ""));
            settings.push(Setting {
                key: format!("{section}.{}", key.trim()),
                value: value.trim().to_string(),
                source: source.trim().to_string(),
            });
        }
    }
    settings
}

pub(crate) fn command_line() -> String {
    std::iter::once("cashtag".to_string()).chain(std::env::args().skip(1)).collect::<Vec<_>>().join(" ")
}

pub(crate) fn now() -> String {
    crate::settings::date_time(std::time::SystemTime::now()).replace('_', " ").replacen('-', "\u{2011}", 2) + " UTC"
}

/// Largest resident size of this process so far, in bytes.
pub(crate) fn peak_memory() -> u64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = text.lines().find(|l| l.starts_with("VmHWM:"));
    line.and_then(|l| l.split_whitespace().nth(1)?.parse::<u64>().ok()).map_or(0, |kib| kib * 1024)
}
