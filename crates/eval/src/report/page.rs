//! The page as a whole: the order of the sections, and the caption that says what each picture shows.

use super::html::Html;
use super::svg::{axis, bars, confusion, curves, reliability};
use super::{Description, Report, examples, headline, style, tables};
use crate::metrics::Metrics;
use crate::numbers::{count, decimal, duration, p_value, percent};

/// Nothing may be fetched and nothing may run, even if a text should find a hole in the escaping.
const POLICY: &str =
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'";

/// Kinds drawn, the most frequent first; the rest stand in the table only.
const MOST_KINDS: usize = 40;

/// With more labels than this, a confusion matrix is too fine to draw.
const MOST_DRAWN_LABELS: usize = 30;

struct Section {
    id: &'static str,
    /// As the list of sections has it.
    short: &'static str,
    name: &'static str,
    body: Html,
}

pub(super) fn page(report: &Report) -> String {
    let sections: Vec<Section> = [
        ("results", "Results", "Results", results(report)),
        ("kinds", "Kinds", "By kind of text", kinds(report)),
        ("confusion", "Confusion", "What is taken for what", confusions(report)),
        ("calibration", "Calibration", "Calibration", calibration(report)),
        ("training", "Training", "Training", training(report)),
        ("examples", "Examples", "Examples", example_tweets(report)),
        ("mistakes", "Mistakes", "Hardest mistakes", mistakes(report)),
        ("data", "Data", "Data", data(report)),
        ("setup", "Set-up", "How it was made", setup(report)),
        ("reading", "Reading", "How to read the numbers", reading(report)),
    ]
    .into_iter()
    .filter(|(_, _, _, body)| !body.is_empty())
    .map(|(id, short, name, body)| Section { id, short, name, body })
    .collect();

    let title = if report.title.trim().is_empty() { "Report" } else { report.title.trim() };
    let mut html = Html::new();
    html.raw("<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\"/>\n");
    html.void("meta", &[("http-equiv", "Content-Security-Policy"), ("content", POLICY)]);
    html.raw("\n<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/>\n");
    html.raw(
        "<meta name=\"color-scheme\" content=\"light dark\"/>\n<meta name=\"referrer\" content=\"no-referrer\"/>\n",
    );
    html.raw("<link rel=\"icon\" href=\"data:,\"/>\n");
    html.leaf("title", &[], title);
    html.raw("<style>\n").raw(style::STYLE).raw("</style>\n</head>\n<body>\n");
    html.raw("<a class=\"skip\" href=\"#main\">Skip to the results</a>\n");
    header(&mut html, report, title);
    html.raw("<nav aria-label=\"Sections\"><ul>\n");
    for section in &sections {
        html.open("li", &[]).leaf("a", &[("href", &format!("#{}", section.id))], section.short).close("li");
    }
    html.raw("</ul></nav>\n<main id=\"main\">\n");
    for section in &sections {
        let heading = format!("{}-heading", section.id);
        html.open("section", &[("id", section.id), ("aria-labelledby", &heading)]);
        html.leaf("h2", &[("id", &heading)], section.name).append(&section.body).close("section");
    }
    html.raw("</main>\n<footer><p>Made by cashtag. This file holds everything it shows and asks the network for nothing.</p></footer>\n");
    html.raw("</body>\n</html>\n");
    html.into_string()
}

fn header(html: &mut Html, report: &Report, title: &str) {
    html.raw("<header>\n");
    if let Some(notice) = &report.notice {
        html.leaf("p", &[("class", "notice"), ("role", "note")], notice);
    }
    html.leaf("h1", &[], title);
    html.leaf("p", &[("class", "summary")], &headline::summary(report));
    html.raw("<dl class=\"facts\">\n");
    let adapter = report.adapter.as_ref().map_or("", |a| &a.name);
    let facts = [
        ("Model", &*report.model.name),
        ("Adapter", adapter),
        ("Device", &report.device),
        ("Created", &report.created),
    ];
    for (name, value) in facts.into_iter().filter(|(_, v)| !v.is_empty()) {
        html.open("div", &[]).leaf("dt", &[], name).leaf("dd", &[], value).close("div");
    }
    html.raw("</dl>\n</header>\n");
}

fn caption(html: &mut Html, text: &str) {
    html.leaf("p", &[("class", "caption")], text);
}

/// The key to "before" and "after", where both are drawn.
fn key(html: &mut Html, report: &Report, shape: &str) {
    if report.before.is_some() && report.after.is_some() {
        html.open("p", &[("class", "legend-row")]);
        for (class, name) in [("before", "before"), ("after", "after fine-tuning")] {
            let class = format!("sign {shape} {class}");
            html.open("span", &[("class", "chip")]);
            html.open("span", &[("class", &class), ("aria-hidden", "true")]).close("span");
            html.text(name).close("span");
        }
        html.close("p");
    }
}

fn sides(report: &Report) -> Vec<(&'static str, &'static str, &Metrics)> {
    [("Before", "before", &report.before), ("After", "after", &report.after)]
        .into_iter()
        .filter_map(|(name, class, metrics)| Some((name, class, metrics.as_ref()?)))
        .collect()
}

fn results(report: &Report) -> Html {
    let mut html = Html::new();
    if sides(report).is_empty() {
        return html;
    }
    key(&mut html, report, "round");
    html.append(&headline::headline(report));
    let change = "Below each picture is the change, with its own interval, measured text by text.";
    let spans = "The shaded spans are 95\u{a0}% intervals.";
    caption(&mut html, &if report.comparison.is_some() { format!("{spans} {change}") } else { spans.to_owned() });
    if let Some(c) = &report.comparison {
        let m = &c.mcnemar;
        let changed = format!(
            "Of {} texts, {} went from wrong to right and {} from right to wrong (McNemar\u{2019}s exact p {}); {} were right \
             both times, {} wrong both times.",
            count(c.examples),
            count(m.only_b_right),
            count(m.only_a_right),
            p_value(m.p_value),
            count(m.both_right),
            count(m.neither_right)
        );
        html.leaf("p", &[], &changed);
    }
    html.append(&tables::behind("All measures", &headline::table(report)));
    html.append(&tables::behind("Precision, recall and F1 of each label", &tables::per_class(report)));
    html
}

fn kinds(report: &Report) -> Html {
    let mut html = Html::new();
    let names = tables::kind_names(report);
    if names.is_empty() {
        return html;
    }
    caption(
        &mut html,
        "Accuracy on each kind of text, with 95\u{a0}% intervals. The fewer the texts, the wider the interval, and the less \
         the difference between two kinds means.",
    );
    key(&mut html, report, "square");
    html.open("div", &[("class", "kinds")]);
    for name in names.into_iter().take(MOST_KINDS) {
        let (before, after) = (report.by_kind_before.get(name), report.by_kind_after.get(name));
        let examples = after.or(before).map_or(0, |m| m.examples);
        let numbers: Vec<String> = [before, after].into_iter().flatten().map(|m| percent(m.accuracy.value)).collect();
        let numbers = numbers.join(" \u{2192} ");
        html.open("div", &[("class", "kind")]);
        html.open("p", &[("class", "kind-name")]).leaf("strong", &[], name);
        html.leaf("span", &[("class", "soft")], &format!("{} texts", count(examples))).close("p");
        let spoken = format!("Accuracy on {name} texts: {numbers}");
        html.append(&bars::with_intervals(before.map(|m| m.accuracy), after.map(|m| m.accuracy), &spoken));
        html.leaf("p", &[("class", "kind-value")], &numbers).close("div");
    }
    html.raw("<div class=\"kind\"><span></span>").append(&bars::share_axis()).raw("<span></span></div>\n");
    html.close("div");
    html.append(&tables::behind("Numbers by kind", &tables::kinds(report)));
    html
}

fn confusions(report: &Report) -> Html {
    let mut html = Html::new();
    let sides = sides(report);
    if sides.is_empty() || report.labels.is_empty() || report.labels.len() > MOST_DRAWN_LABELS {
        return html;
    }
    caption(
        &mut html,
        "Each row holds the texts of one true label, each column an answer. Percentages and shades are shares of the row; \
         a good model is dark along the framed diagonal and pale elsewhere.",
    );
    html.open("div", &[("class", "pair")]);
    for (name, _, metrics) in &sides {
        let right: u64 = (0..report.labels.len()).filter_map(|i| metrics.confusion.get(i)?.get(i)).sum();
        let spoken = format!(
            "Confusion matrix {}: {} of {} texts on the diagonal",
            name.to_lowercase(),
            count(right),
            count(metrics.examples)
        );
        html.open("figure", &[]).leaf("figcaption", &[], name);
        html.append(&confusion::draw(&metrics.confusion, &report.labels, &spoken)).close("figure");
    }
    html.close("div");
    let mut numbers = Html::new();
    for (name, _, metrics) in &sides {
        numbers.leaf("h3", &[], name).append(&tables::confusion(metrics, &report.labels, name));
    }
    html.append(&tables::behind("Counts", &numbers));
    html
}

fn calibration(report: &Report) -> Html {
    let mut html = Html::new();
    let mut sides = sides(report);
    if let Some(metrics) = &report.untempered {
        let place = sides.len() - usize::from(report.after.is_some());
        sides.insert(place, (tables::UNTEMPERED, "after", metrics));
    }
    sides.retain(|(_, _, m)| m.reliability.iter().any(|b| b.count > 0));
    if sides.is_empty() {
        return html;
    }
    caption(
        &mut html,
        "Texts are gathered by how sure the model is of its answer. On the dashed line it is right as often as it says, \
         above it more often, below it less often. The strokes through the points are 95\u{a0}% intervals; the columns count \
         the texts behind each point.",
    );
    let most = sides.iter().flat_map(|(_, _, m)| &m.reliability).map(|b| b.count).max().unwrap_or(1);
    html.open("div", &[("class", "pair")]);
    for (name, class, metrics) in &sides {
        let gap = metrics.mean_confidence - metrics.accuracy.value;
        let verdict = if gap.abs() < 0.005 {
            "as sure as it should be".to_owned()
        } else {
            let points = decimal(gap.abs() * 100.0, 1);
            format!("on average {points} points too {}", if gap > 0.0 { "sure" } else { "unsure" })
        };
        let spoken = format!(
            "Reliability {}: calibration error {}, {verdict}",
            name.to_lowercase(),
            percent(metrics.expected_calibration_error)
        );
        html.open("figure", &[]);
        html.open("figcaption", &[]).text(name);
        let error = format!("calibration error {}, {verdict}", percent(metrics.expected_calibration_error));
        html.leaf("span", &[("class", "soft")], &error).close("figcaption");
        html.append(&reliability::draw(&metrics.reliability, most, class, &spoken)).close("figure");
    }
    html.close("div");
    html.append(&tables::behind("Numbers by confidence", &tables::reliability(report)));
    html
}

fn training(report: &Report) -> Html {
    let mut html = Html::new();
    if report.history.is_empty() {
        return html;
    }
    if let Some(loss) = curves::Loss::new(&report.history) {
        let (first, last) = loss.ends();
        let mut text = format!(
            "Loss on the answer\u{2019}s tokens, smoothed over about {} logged steps, went from {} to {}. ",
            loss.window,
            decimal(first, 3),
            decimal(last, 3)
        );
        if let Some((step, value)) = loss.best_eval() {
            text += &format!(
                "Evaluation loss is lowest at step {} ({}); if it rises after that while the training loss falls, the model \
                 has begun to learn its texts by heart. ",
                count(step as u64),
                decimal(value, 3)
            );
        }
        if loss.above > 0 {
            let steps = if loss.above == 1 { "step lies" } else { "steps lie" };
            text += &format!(
                "{} {steps} above the picture and {} drawn at its top edge. ",
                loss.above,
                if loss.above == 1 { "is" } else { "are" }
            );
        }
        caption(&mut html, text.trim_end());
        let spoken = format!("Training curves. {text}");
        html.append(&curves::draw(&report.history, &loss, 940.0, "chart wide", &spoken));
        html.append(&curves::draw(&report.history, &loss, 358.0, "chart narrow", &spoken));
    }
    let middle = |pick: fn(&super::HistoryRow) -> Option<f64>| {
        let mut values: Vec<f64> =
            report.history.iter().filter_map(pick).filter(|v| v.is_finite() && *v > 0.0).collect();
        values.sort_unstable_by(f64::total_cmp);
        values.get(values.len() / 2).copied()
    };
    if let Some(examples) = middle(|r| r.examples_per_second) {
        let tokens = middle(|r| r.tokens_per_second)
            .map_or(String::new(), |t| format!(" and {} tokens", count(t.round() as u64)));
        html.leaf(
            "p",
            &[],
            &format!("Median speed: {} texts{tokens} per second.", axis::label(round_to(examples), 0.1)),
        );
    }
    html.append(&tables::behind_on_screen("Training history", &tables::history(&report.history)));
    html
}

/// Three figures are enough for a speed.
fn round_to(value: f64) -> f64 {
    if value >= 100.0 { value.round() } else { (value * 10.0).round() / 10.0 }
}

fn example_tweets(report: &Report) -> Html {
    let mut html = Html::new();
    if report.examples.is_empty() || report.labels.is_empty() {
        return html;
    }
    caption(
        &mut html,
        "Texts chosen to be looked at. Each bar is one answer: its pieces are the probabilities of the labels, always in the \
         same order, and the answer is the longest piece.",
    );
    html.append(&examples::examples(report));
    html.append(&tables::behind("Probabilities of the examples", &tables::examples(report)));
    html
}

fn mistakes(report: &Report) -> Html {
    let mut html = Html::new();
    if report.mistakes.is_empty() || report.labels.is_empty() {
        return html;
    }
    caption(
        &mut html,
        "Held-out texts that the trained model gets wrong, those it was surest about first. Some are the model\u{2019}s fault, \
         some the label\u{2019}s: read them before trusting either.",
    );
    html.append(&examples::legend(&report.labels));
    html.append(&examples::mistakes(report));
    html.append(&tables::behind("Probabilities of the mistakes", &tables::mistakes(report)));
    html
}

fn data(report: &Report) -> Html {
    let mut html = Html::new();
    if report.data.splits.is_empty() && report.data.source.is_empty() {
        return html;
    }
    if !report.data.source.is_empty() {
        html.leaf("p", &[], &report.data.source);
    }
    html.append(&examples::legend(&report.labels));
    html.open("div", &[("class", "pair")]);
    for split in &report.data.splits {
        html.append(&tables::split(split, &report.labels));
    }
    html.close("div");
    html
}

fn description(html: &mut Html, name: &str, description: &Description) {
    if description.name.is_empty() && description.facts.is_empty() {
        return;
    }
    html.open("div", &[]).leaf("h3", &[("class", "kicker")], name).leaf("p", &[("class", "strong")], &description.name);
    html.raw("<dl class=\"list\">\n");
    for (name, value) in &description.facts {
        html.open("div", &[]).leaf("dt", &[], name).leaf("dd", &[], value).close("div");
    }
    html.raw("</dl>\n").close("div");
}

fn setup(report: &Report) -> Html {
    let mut html = Html::new();
    let mut parts = Html::new();
    description(&mut parts, "Model", &report.model);
    if let Some(adapter) = &report.adapter {
        description(&mut parts, "Adapter", adapter);
    }
    if !report.timings.is_empty() {
        let total: f64 = report.timings.iter().map(|t| t.seconds).filter(|s| s.is_finite()).sum();
        parts.open("div", &[]).leaf("h3", &[("class", "kicker")], "Time");
        parts.leaf("p", &[("class", "strong")], &duration(total));
        parts.append(&tables::timings(report)).close("div");
    }
    if !report.files.is_empty() {
        parts.open("div", &[]).leaf("h3", &[("class", "kicker")], "Files");
        parts.append(&tables::files(report)).close("div");
    }
    if !parts.is_empty() {
        html.open("div", &[("class", "pair")]).append(&parts).close("div");
    }
    if let Some(command) = &report.command {
        html.leaf("h3", &[("class", "kicker")], "Command")
            .open("pre", &[("tabindex", "0")])
            .leaf("code", &[], command)
            .close("pre");
    }
    if !report.configuration.is_empty() {
        let settings = format!("Configuration in force ({} settings)", report.configuration.len());
        html.append(&tables::behind(&settings, &tables::configuration(report)));
    }
    html
}

fn reading(report: &Report) -> Html {
    let mut html = Html::new();
    if sides(report).is_empty() {
        return html;
    }
    html.raw(
        "<ul class=\"prose\">\n\
         <li><strong>Intervals</strong> are 95\u{a0}% percentile bootstraps with 2,000 resamples of the held-out texts. They speak of \
         the luck of this set of texts, not of the luck of one training seed, and not of texts of another sort.</li>\n\
         <li><strong>Before and after</strong> are compared on the same texts (paired resamples; McNemar\u{2019}s exact test on the \
         texts that only one of the two gets right).</li>\n\
         <li><strong>Probabilities</strong> are read from the model\u{2019}s own scores of the label words; no text is generated. \
         <strong>Log-loss</strong> is the mean of \u{2212}ln\u{a0}p of the true label; the <strong>Brier score</strong> sums \
         (p\u{a0}\u{2212}\u{a0}truth)\u{b2} over the labels.</li>\n\
         <li><strong>Calibration error</strong> is the mean gap between confidence and accuracy over 15 equally wide bins of the \
         confidence. It is a little above zero even for a perfect model on few texts.</li>\n\
         <li><strong>Macro F1</strong> averages over the labels that occur among the truths or the answers, as scikit-learn does.</li>\n\
         </ul>\n",
    );
    html
}
