//! Single texts to look at: chosen examples before and after, and the hardest mistakes.

use super::html::Html;
use super::svg::{bars, label_class, short};
use super::{ExampleTweet, Mistake, Report};
use crate::numbers::percent;

/// Cards shown of each sort at most.
pub(super) const MOST_CARDS: usize = 60;

/// Characters of a text shown at most; a tweet has 280, other texts may have megabytes.
const LONGEST_TEXT: usize = 1000;

fn shares(probabilities: &[f32]) -> Vec<f64> {
    probabilities.iter().map(|&p| f64::from(p)).collect()
}

fn best(shares: &[f64]) -> Option<usize> {
    let mut best: Option<usize> = None;
    for (i, share) in shares.iter().enumerate() {
        if share.is_finite() && best.is_none_or(|b| *share > shares[b]) {
            best = Some(i);
        }
    }
    best
}

fn name_of(best: Option<usize>, labels: &[String]) -> &str {
    best.and_then(|b| labels.get(b)).map_or("nothing", String::as_str)
}

/// A label's name on its colour, so that the eye can go from the word to the bars.
fn chip(html: &mut Html, labels: &[String], at: usize) {
    let name = labels.get(at).map_or("–", String::as_str);
    html.open("span", &[("class", "chip")]);
    html.open("span", &[("class", &format!("swatch {}", label_class(name, at))), ("aria-hidden", "true")]);
    html.close("span").text(&short(name, 24)).close("span");
}

fn text(html: &mut Html, text: &str) {
    html.open("p", &[("class", "tweet")]);
    // Isolated, so that marks for writing from right to left cannot turn the rest of the page around.
    html.leaf("bdi", &[], &short(text, LONGEST_TEXT)).close("p");
}

/// One answer: a name, the bar, and whether it is right.
fn answer(html: &mut Html, when: &str, probabilities: &[f32], expected: Option<usize>, labels: &[String]) {
    let shares = shares(probabilities);
    let best = best(&shares);
    let name = name_of(best, labels);
    let verdict = match (best, expected) {
        (Some(best), Some(expected)) if best == expected => Some(("right", "\u{2713} right")),
        (_, Some(_)) => Some(("wrong", "\u{2717} wrong")),
        (_, None) => None,
    };
    let spoken = format!(
        "{when}: answers {name}{}. {}",
        verdict.map_or("", |v| if v.0 == "right" { ", right" } else { ", wrong" }),
        bars::spoken(&shares, labels)
    );
    html.open("div", &[("class", "answer")]);
    html.leaf("span", &[("class", "when")], when);
    html.append(&bars::stacked(&shares, labels, best, &spoken));
    html.leaf(
        "span",
        &[("class", verdict.map_or("mark", |v| if v.0 == "right" { "mark right" } else { "mark wrong" }))],
        verdict.map_or("", |v| v.1),
    );
    html.close("div");
}

/// The colours of the labels, in words.
pub(super) fn legend(labels: &[String]) -> Html {
    let mut html = Html::new();
    html.open("p", &[("class", "legend-row")]);
    for at in 0..labels.len() {
        chip(&mut html, labels, at);
    }
    html.close("p");
    html
}

pub(super) fn examples(report: &Report) -> Html {
    let mut html = Html::new();
    html.append(&legend(&report.labels));
    html.open("ul", &[("class", "cards")]);
    for example in report.examples.iter().take(MOST_CARDS) {
        card(&mut html, example, &report.labels);
    }
    html.close("ul");
    left_out(&mut html, report.examples.len());
    html
}

fn card(html: &mut Html, example: &ExampleTweet, labels: &[String]) {
    html.open("li", &[("class", "card")]);
    html.open("div", &[("class", "said")]);
    text(html, &example.text);
    html.open("p", &[("class", "tags")]);
    if let Some(expected) = example.expected {
        html.text("expected ");
        chip(html, labels, expected);
    } else {
        html.text("no agreed answer");
    }
    if let Some(note) = &example.note {
        html.leaf("span", &[("class", "note")], &short(note, 60));
    }
    html.close("p").close("div");
    html.open("div", &[("class", "answers")]);
    for (when, probabilities) in [("before", &example.before), ("after", &example.after)] {
        if let Some(probabilities) = probabilities {
            answer(html, when, probabilities, example.expected, labels);
        }
    }
    html.close("div").close("li");
}

pub(super) fn mistakes(report: &Report) -> Html {
    let mut html = Html::new();
    html.open("ul", &[("class", "cards")]);
    for mistake in report.mistakes.iter().take(MOST_CARDS) {
        missed(&mut html, mistake, &report.labels);
    }
    html.close("ul");
    left_out(&mut html, report.mistakes.len());
    html
}

fn missed(html: &mut Html, mistake: &Mistake, labels: &[String]) {
    let shares = shares(&mistake.probabilities);
    html.open("li", &[("class", "card")]);
    html.open("div", &[("class", "said")]);
    text(html, &mistake.text);
    html.open("p", &[("class", "tags")]);
    html.text("truth ");
    chip(html, labels, mistake.truth);
    html.text(&format!("given {}", percent(shares.get(mistake.truth).copied().unwrap_or(0.0))));
    if let Some(kind) = &mistake.kind {
        html.leaf("span", &[("class", "note")], &short(kind, 60));
    }
    html.close("p").close("div");
    html.open("div", &[("class", "answers")]);
    let spoken = format!("answers {}. {}", name_of(best(&shares), labels), bars::spoken(&shares, labels));
    html.open("div", &[("class", "answer alone")]);
    html.append(&bars::stacked(&shares, labels, best(&shares), &spoken)).close("div");
    html.close("div").close("li");
}

fn left_out(html: &mut Html, number: usize) {
    if number > MOST_CARDS {
        let more = format!("{} more are not shown.", number - MOST_CARDS);
        html.leaf("p", &[("class", "caption")], &more);
    }
}
