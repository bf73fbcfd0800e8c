//! The data-set card: what is in the set, where it came from, what was done to it. Markdown with the front matter that the
//! Hugging Face hub reads.

use std::fmt::Write as _;

use crate::example::LABELS;
use crate::prepare::{Report, SplitBy};
use crate::stats::Stats;

/// The card of a prepared data set.
pub(crate) fn card(report: &Report) -> String {
    let mut out = String::new();
    let size = match report.kept {
        0..1_000 => "n<1K",
        1_000..10_000 => "1K<n<10K",
        10_000..100_000 => "10K<n<100K",
        100_000..1_000_000 => "100K<n<1M",
        _ => "1M<n<10M",
    };
    // Writing to a string cannot fail.
    let _ = write!(
        out,
        "---\ntask_categories:\n- text-classification\nlanguage:\n- en\ntags:\n- finance\n- sentiment\nsize_categories:\n- \
         {size}\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: train.parquet\n  - split: \
         test\n    path: test.parquet\n---\n\n# Stock-market sentiment\n\n{} labelled texts: {} to train on, {} held out. \
         The labels are {}.\n\n",
        report.kept,
        report.train,
        report.held_out,
        LABELS.join(", ")
    );
    let _ = writeln!(out, "## Files\n");
    for (file, what) in [
        ("dataset.csv", "all rows with their split; cells that a spreadsheet would run begin with an apostrophe"),
        ("fine_tune_dataset.jsonl", "the training rows as chat messages"),
        ("evaluation_dataset.jsonl", "the held-out rows as chat messages"),
        ("train.parquet, test.parquet", "the same rows as tables"),
        ("rejected.jsonl", "the rows that were dropped, each with its reason"),
        ("prepare.json", "this card for programs"),
    ] {
        let _ = writeln!(out, "- `{file}`: {what}");
    }
    let _ = writeln!(out, "\nSystem message of the chat files:\n\n> {}\n", report.system_message.replace('\n', "\n> "));
    let _ = writeln!(out, "## Counts\n");
    counts(&mut out, &report.train_stats, &report.held_out_stats);
    let _ = writeln!(out, "\n## Lengths\n\n| | train | held out |\n| --- | --- | --- |");
    let _ = writeln!(out, "| characters | {} | {} |", report.train_stats.characters, report.held_out_stats.characters);
    let _ = writeln!(out, "| words | {} | {} |", report.train_stats.words, report.held_out_stats.words);
    let _ = writeln!(
        out,
        "\n## Sources\n\n| input | columns | rows | kept | duplicates of earlier inputs |\n| --- | --- | --- | --- | --- |"
    );
    for input in &report.inputs {
        let cell = |text: &str| text.replace('|', "\\|").replace('\n', " ");
        let _ = writeln!(
            out,
            "| {} | {} | {} | {} | {} |",
            cell(&input.name),
            cell(&input.columns),
            input.rows,
            input.kept,
            input.duplicates_of_earlier_inputs
        );
    }
    let _ = writeln!(out, "\n## What was dropped\n");
    if report.dropped.is_empty() {
        let _ = writeln!(out, "Nothing.");
    } else {
        let _ = writeln!(out, "| reason | rows |\n| --- | --- |");
        let mut reasons: Vec<_> = report.dropped.iter().collect();
        reasons.sort_by(|a, b| b.1.cmp(a.1).then(a.0.cmp(b.0)));
        for (reason, rows) in reasons {
            let _ = writeln!(out, "| {} | {rows} |", reason.replace('|', "\\|"));
        }
    }
    let how = match report.split_by {
        SplitBy::Seed => {
            format!("by a hash of the texts and the seed {}, the same share of every kind and label", report.seed)
        }
        SplitBy::Time => "by time: the latest rows are held out".to_owned(),
    };
    let _ = writeln!(
        out,
        "\n## Overlaps\n\nSplit {how} ({:.0} % held out). No text of one part is in the other, and related texts (near \
         copies, flip pairs) are on one side: {} rows stand in {} such groups. {} pairs of near copies carry different \
         labels.{}",
        100.0 * report.held_out_share,
        report.rows_in_groups,
        report.groups,
        report.near_conflicts,
        if report.balanced { " The training rows were balanced by label, the held-out rows were not." } else { "" }
    );
    if !report.warnings.is_empty() {
        let _ = writeln!(out, "\n## To look at\n");
        for warning in &report.warnings {
            let _ = writeln!(out, "- {warning}");
        }
    }
    out
}

fn counts(out: &mut String, train: &Stats, held_out: &Stats) {
    let _ = writeln!(out, "| kind | {} | all | held out |", LABELS.join(" | "));
    let _ = writeln!(out, "| --- |{}", " --- |".repeat(LABELS.len() + 2));
    let mut kinds: Vec<&String> = train.kinds.keys().chain(held_out.kinds.keys()).collect();
    kinds.sort();
    kinds.dedup();
    let count = |stats: &Stats, kind: &str, label: &str| {
        stats.kinds.get(kind).and_then(|labels| labels.get(label)).copied().unwrap_or(0)
    };
    for kind in kinds {
        let _ = write!(out, "| {} |", kind.replace('|', "\\|").replace('\n', " "));
        let held: u64 = LABELS.iter().map(|label| count(held_out, kind, label)).sum();
        let mut all = 0;
        for label in LABELS {
            let both = count(train, kind, label) + count(held_out, kind, label);
            all += both;
            let _ = write!(out, " {both} |");
        }
        let _ = writeln!(out, " {all} | {held} |");
    }
    let total =
        |label: &str| train.labels.get(label).copied().unwrap_or(0) + held_out.labels.get(label).copied().unwrap_or(0);
    let _ = write!(out, "| **all** |");
    for label in LABELS {
        let _ = write!(out, " {} |", total(label));
    }
    let _ = writeln!(out, " {} | {} |", train.rows + held_out.rows, held_out.rows);
}
