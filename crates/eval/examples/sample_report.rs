//! Writes a report of invented figures, to look at the page without training anything:
//!
//! ```sh
//! cargo run --release -p cashtag-eval --example sample_report -- sample.html
//! ```
//!
//! Every number in it is drawn from a seeded generator. The page says so at its top.

use std::error::Error;

use cashtag_eval::report::{
    DataSummary, Description, ExampleTweet, FileEntry, HistoryRow, Mistake, Report, Setting, Split, Timing,
};
use cashtag_eval::{Judged, by_kind, compare, evaluate, terminal_kinds, terminal_table};

const LABELS: [&str; 3] = ["Positive", "Neutral", "Negative"];
const POSITIVE: usize = 0;
const NEUTRAL: usize = 1;
const NEGATIVE: usize = 2;

/// xorshift64*: enough for invented figures.
struct Dice(u64);

impl Dice {
    fn unit(&mut self) -> f64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 11) as f64 / (1u64 << 53) as f64
    }

    /// About normal: the sum of twelve uniforms.
    fn normal(&mut self) -> f64 {
        (0..12).map(|_| self.unit()).sum::<f64>() - 6.0
    }

    /// Probabilities that favour the truth by `skill`, lean to `lean` and are as sharp as `sharp` says.
    fn answer(&mut self, truth: usize, skill: f64, lean: usize, sharp: f64) -> Vec<f32> {
        let mut scores: Vec<f64> = (0..3).map(|_| self.normal()).collect();
        scores[truth] += skill;
        scores[lean] += 0.8;
        let weights: Vec<f64> = scores.iter().map(|s| (s * sharp).exp()).collect();
        let total: f64 = weights.iter().sum();
        weights.iter().map(|w| (w / total) as f32).collect()
    }
}

/// Text, expected label, note, and the probabilities before and after.
type Example = (&'static str, usize, &'static str, [f32; 3], [f32; 3]);

const EXAMPLES: [Example; 9] = [
    (
        "$NVDA guides Q3 revenue well above the Street, shares +6% after hours",
        POSITIVE,
        "plain",
        [0.71, 0.08, 0.21],
        [0.97, 0.02, 0.01],
    ),
    ("*FED LEAVES RATES UNCHANGED, AS EXPECTED", NEUTRAL, "plain", [0.48, 0.17, 0.35], [0.03, 0.95, 0.02]),
    (
        "$AMD beats on EPS, misses on revenue, stock does nothing",
        NEUTRAL,
        "mixed",
        [0.22, 0.06, 0.72],
        [0.09, 0.78, 0.13],
    ),
    (
        "Great, another record quarter for $F: record number of recalls. Love to own it 🙃",
        NEGATIVE,
        "sarcastic",
        [0.88, 0.03, 0.09],
        [0.21, 0.09, 0.70],
    ),
    ("Lost half of what was feared. $INTC pops 9%", POSITIVE, "contextual", [0.14, 0.05, 0.81], [0.83, 0.06, 0.11]),
    (
        "Record revenue at $WBD, all of it from selling the headquarters",
        NEGATIVE,
        "contextual",
        [0.91, 0.04, 0.05],
        [0.57, 0.11, 0.32],
    ),
    (
        "rotating out of $PFE into $LLY, should have done it a year ago",
        POSITIVE,
        "targeted: $LLY",
        [0.31, 0.10, 0.59],
        [0.52, 0.14, 0.34],
    ),
    ("$SPY puts printing 💰 told you the gap would fill", NEGATIVE, "plain", [0.83, 0.04, 0.13], [0.12, 0.05, 0.83]),
    (
        "</style><script>alert(\"a tweet is data\")</script> $GME to the moon?",
        NEUTRAL,
        "markup in a tweet is shown, never run",
        [0.64, 0.21, 0.15],
        [0.24, 0.69, 0.07],
    ),
];

const MISSED: [(&str, usize, &str); 8] = [
    ("Nothing says confidence like the CFO leaving the week before earnings $XYZ", NEGATIVE, "sarcastic"),
    ("$DAL cuts capacity into a strong summer, unit revenue seen higher", POSITIVE, "contextual"),
    ("Up 4% today, still down 40% since the split. $SMCI", NEUTRAL, "mixed"),
    ("Fell exactly as much as the dividend. $T ex-div", NEUTRAL, "contextual"),
    ("$SHOP: the bears were right about growth and wrong about everything else", POSITIVE, "contextual"),
    ("Good for $UBER, bad for $LYFT, so what do I do with a basket of both", NEUTRAL, "mixed"),
    ("congrats to everyone who bought $PTON at 160", NEGATIVE, "sarcastic"),
    ("$BA finds a new way to make Airbus holders happy", NEGATIVE, "targeted"),
];

fn held_out(dice: &mut Dice) -> (Vec<Judged>, Vec<Judged>) {
    // Kind, texts, shares of the labels, skill before and after.
    let kinds: [(&str, usize, [f64; 3], f64, f64); 5] = [
        ("plain", 320, [0.3, 0.42, 0.28], 1.1, 2.9),
        ("contextual", 58, [0.34, 0.3, 0.36], 0.4, 1.7),
        ("mixed", 44, [0.0, 1.0, 0.0], 0.1, 1.5),
        ("sarcastic", 42, [0.2, 0.0, 0.8], -0.9, 1.7),
        ("targeted", 36, [0.5, 0.0, 0.5], 0.7, 2.1),
    ];
    let (mut before, mut after) = (Vec::new(), Vec::new());
    for (kind, texts, shares, skill_before, skill_after) in kinds {
        for i in 0..texts {
            let roll = dice.unit();
            let truth = if roll < shares[0] {
                POSITIVE
            } else if roll < shares[0] + shares[1] {
                NEUTRAL
            } else {
                NEGATIVE
            };
            let judged = |probabilities| Judged {
                text: format!("invented {kind} text {i}"),
                truth,
                probabilities,
                kind: Some(kind.to_owned()),
            };
            before.push(judged(dice.answer(truth, skill_before, POSITIVE, 1.7)));
            after.push(judged(dice.answer(truth, skill_after, NEUTRAL, 1.35)));
        }
    }
    for (text, truth, kind) in MISSED {
        let wrong = (truth + 1 + usize::from(dice.unit() < 0.5)) % 3;
        let mut probabilities = vec![0.0; 3];
        let given = 0.01 + 0.08 * dice.unit() as f32;
        let sure = 0.8 + 0.1 * dice.unit() as f32;
        probabilities[truth] = given;
        probabilities[wrong] = sure;
        probabilities[3 - truth - wrong] = 1.0 - given - sure;
        let judged = |p: Vec<f32>| Judged { text: text.into(), truth, probabilities: p, kind: Some(kind.into()) };
        before.push(judged(dice.answer(truth, 0.0, POSITIVE, 1.7)));
        after.push(judged(probabilities));
    }
    (before, after)
}

fn history(dice: &mut Dice) -> Vec<HistoryRow> {
    const STEPS: u64 = 690;
    const PER_EPOCH: f64 = 230.0;
    (1..=STEPS)
        .map(|step| {
            let t = step as f64;
            let warm = (t / 35.0).min(1.0);
            let cosine = 0.5 * (1.0 + (std::f64::consts::PI * (t - 35.0).max(0.0) / (STEPS as f64 - 35.0)).cos());
            let mean = 0.16 + 1.25 * (-t / 38.0).exp() + 0.42 * (-t / 320.0).exp();
            HistoryRow {
                step,
                epoch: t / PER_EPOCH,
                loss: Some((mean * (0.23 * dice.normal()).exp()).max(0.01)),
                eval_loss: (step % 46 == 0)
                    .then(|| 0.33 + 0.9 * (-t / 60.0).exp() + 1.1e-4 * (t - 390.0).max(0.0) + 0.006 * dice.normal()),
                learning_rate: Some(2e-4 * warm * cosine),
                grad_norm: Some((0.9 + 2.2 * (-t / 50.0).exp()) * (0.3 * dice.normal()).exp()),
                examples_per_second: Some(61.0 + 3.0 * dice.normal()),
                tokens_per_second: Some(2690.0 + 120.0 * dice.normal()),
            }
        })
        .collect()
}

fn split(name: &str, dice: &mut Dice, texts: usize) -> Split {
    let drawn: Vec<(usize, &str)> = (0..texts)
        .map(|_| {
            let kind = ["plain", "plain", "plain", "plain", "contextual", "mixed", "sarcastic", "targeted"]
                [(dice.unit() * 8.0) as usize];
            let label = if kind == "mixed" {
                NEUTRAL
            } else {
                [POSITIVE, NEUTRAL, NEUTRAL, NEGATIVE, NEGATIVE][(dice.unit() * 5.0) as usize]
            };
            (label, kind)
        })
        .collect();
    Split::count(name, LABELS.len(), drawn.into_iter().map(|(label, kind)| (label, Some(kind))))
}

fn setting(key: &str, value: &str, source: &str) -> Setting {
    Setting { key: key.into(), value: value.into(), source: source.into() }
}

fn main() -> Result<(), Box<dyn Error>> {
    let path = std::env::args().nth(1).unwrap_or_else(|| "sample_report.html".into());
    let labels: Vec<String> = LABELS.map(String::from).to_vec();
    let mut dice = Dice(0x00CA_5117_A600_0001);
    let (judged_before, judged_after) = held_out(&mut dice);
    let before = evaluate(&judged_before, &labels, 42)?;
    let after = evaluate(&judged_after, &labels, 42)?;
    let report = Report {
        title: "Stock-tweet sentiment with SmolLM2-135M".into(),
        created: "1 January 2000, 12:00 UTC".into(),
        notice: Some(
            "Sample. Every figure and text on this page is invented, to show what a report looks like.".into(),
        ),
        command: Some("cashtag run --config recipes/sample.toml --seed 42".into()),
        device: "CPU, 8 cores (avx512_bf16)".into(),
        model: Description::new("SmolLM2-135M-Instruct")
            .fact("Parameters", "134.5 million")
            .fact("Weights", "Q4_1 (GGUF), computed in bf16")
            .fact("Layers, width", "30, 576")
            .fact("Chat template", "from the model file"),
        adapter: Some(
            Description::new("LoRA, r 16, alpha 32")
                .fact("Dropout", "0.05")
                .fact("Target modules", "q, k, v, o, gate, up, down")
                .fact("Trained parameters", "4.88 million (3.6 %)")
                .fact("Saved as", "PEFT, safetensors"),
        ),
        configuration: vec![
            setting("seed", "42", "--seed"),
            setting("num_train_epochs", "3", "recipes/sample.toml:12"),
            setting("learning_rate", "2e-4", "recipes/sample.toml:14"),
            setting("lr_scheduler_type", "cosine", "default"),
            setting("warmup_ratio", "0.05", "default"),
            setting("per_device_train_batch_size", "8", "recipes/sample.toml:15"),
            setting("gradient_accumulation_steps", "1", "default"),
            setting("max_grad_norm", "1.0", "default"),
            setting("lora_r", "16", "recipes/sample.toml:21"),
            setting("lora_alpha", "32", "recipes/sample.toml:22"),
            setting("lora_dropout", "0.05", "default"),
        ],
        data: DataSummary {
            source:
                "Invented texts. Near-duplicates are removed before the split, and flip pairs stay on one side of it."
                    .into(),
            splits: vec![split("Training", &mut dice, 1840), split("Held out", &mut dice, 508)],
        },
        history: history(&mut dice),
        comparison: Some(compare(&judged_before, &judged_after, &labels, 42)?),
        by_kind_before: by_kind(&judged_before, &labels, 42)?,
        by_kind_after: by_kind(&judged_after, &labels, 42)?,
        examples: EXAMPLES
            .iter()
            .map(|(text, expected, note, before, after)| ExampleTweet {
                text: (*text).into(),
                expected: Some(*expected),
                note: Some((*note).into()),
                before: Some(before.to_vec()),
                after: Some(after.to_vec()),
            })
            .collect(),
        mistakes: Mistake::hardest(&judged_after, 8),
        timings: [
            ("read the model", 1.9),
            ("evaluate before", 9.4),
            ("train", 92.3),
            ("evaluate after", 9.6),
            ("write the files", 0.4),
        ]
        .map(|(name, seconds)| Timing { name: name.into(), seconds })
        .to_vec(),
        files: [
            ("adapter_model.safetensors", 19_544_032, "the adapter, for PEFT and for cashtag"),
            ("adapter_config.json", 742, "its settings"),
            ("trainer_state.json", 121_400, "the training history"),
            ("metrics.json", 9_210, "every number of this page"),
        ]
        .map(|(path, bytes, note)| FileEntry { path: path.into(), bytes: Some(bytes), note: note.into() })
        .to_vec(),
        labels,
        before: Some(before),
        after: Some(after),
        untempered: None,
    };
    std::fs::write(&path, report.html())?;
    print!("{}", terminal_table(report.before.as_ref(), report.after.as_ref(), report.comparison.as_ref()));
    print!("{}", terminal_kinds(&report.by_kind_before, &report.by_kind_after));
    eprintln!("invented figures written to {path}");
    Ok(())
}
