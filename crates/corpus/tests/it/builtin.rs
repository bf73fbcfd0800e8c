//! The rules of the built-in corpus (`corpus/GUIDELINES.md`), checked against the real files.

use std::collections::{BTreeMap, HashMap, HashSet};

use cashtag_corpus::{
    DedupOptions, EVENTS, Example, Fate, HELD_OUT_SHARE, KINDS, LABELS, REGISTERS, SECTORS, balanced_sample, builtin,
    builtin_split, find_duplicates, give_away_words, judged_near,
};

fn corpus() -> Vec<Example> {
    builtin().unwrap_or_else(|error| panic!("{error}"))
}

/// Fails with all complaints at once, so that they can be mended in one go.
fn none(what: &str, complaints: &[String]) {
    assert!(complaints.is_empty(), "{}: {what}\n{}", complaints.len(), complaints.join("\n"));
}

#[test]
fn large_enough_and_of_every_kind() {
    let corpus = corpus();
    let count = |kind: &str| corpus.iter().filter(|example| example.kind.as_deref() == Some(kind)).count();
    let complaints: Vec<String> = [("mixed", 250), ("sarcastic", 250), ("contextual", 250), ("targeted", 200)]
        .into_iter()
        .filter(|(kind, least)| count(kind) < *least)
        .map(|(kind, least)| format!("{} {kind} texts, at least {least} are wanted", count(kind)))
        .chain((corpus.len() < 3_000).then(|| format!("{} texts, at least 3000 are wanted", corpus.len())))
        .collect();
    none("too few texts", &complaints);
    let pairs = corpus.iter().filter(|example| example.pair.is_some()).count();
    assert!(pairs >= 40, "{pairs} halves of flip pairs");
}

#[test]
fn fields_have_the_values_of_the_guidelines() {
    let mut complaints = Vec::new();
    for example in corpus() {
        let mut complain = |what: String| complaints.push(format!("{what}: {:?}", example.text));
        for (field, value, known) in [
            ("label", Some(&example.label), &LABELS[..]),
            ("kind", example.kind.as_ref(), &KINDS[..]),
            ("register", example.register.as_ref(), &REGISTERS[..]),
            ("sector", example.sector.as_ref(), &SECTORS[..]),
            ("event", example.event.as_ref(), &EVENTS[..]),
        ] {
            match value {
                Some(value) if known.contains(&value.as_str()) => {}
                other => complain(format!("{field} is {other:?}")),
            }
        }
        if example.kind.as_deref() == Some("mixed") && example.label != "Neutral" {
            complain(format!("mixed and {}", example.label));
        }
        let length = example.text.chars().count();
        if !(1..=280).contains(&length) || example.text.trim() != example.text {
            complain(format!("{length} characters, or space around it"));
        }
    }
    none("fields that break the guidelines", &complaints);
}

#[test]
fn flip_pairs_are_two_or_three_with_different_labels() {
    let corpus = corpus();
    let mut pairs: BTreeMap<&str, Vec<&Example>> = BTreeMap::new();
    for example in &corpus {
        if let Some(pair) = &example.pair {
            pairs.entry(pair).or_default().push(example);
        }
    }
    let complaints: Vec<String> = pairs
        .iter()
        .filter(|(_, texts)| {
            let different = |of: fn(&Example) -> &str| texts.iter().map(|e| of(e)).collect::<HashSet<_>>().len();
            let (labels, words) = (different(|e| &e.label), different(|e| &e.text));
            !(2..=3).contains(&texts.len()) || labels != texts.len() || words != texts.len()
        })
        .map(|(pair, halves)| {
            let shown: Vec<String> = halves.iter().map(|half| format!("{}: {:?}", half.label, half.text)).collect();
            format!("pair {pair}: {}", shown.join(" / "))
        })
        .collect();
    none("pairs that are not two or three texts with different labels", &complaints);
}

/// No text twice, and no near copies outside flip pairs, whatever their labels.
#[test]
fn no_near_duplicates() {
    let corpus = corpus();
    let dedup = find_duplicates(&corpus, &DedupOptions::default());
    let text = |row: u32| &corpus[row as usize].text;
    let mut complaints: Vec<String> = dedup
        .fates
        .iter()
        .enumerate()
        .filter_map(|(row, fate)| match fate {
            Fate::Keep => None,
            Fate::Exact { of } | Fate::Near { of } | Fate::Conflict { of } => {
                Some(format!("{:?}\n    {:?}", corpus[row].text, text(*of)))
            }
        })
        .collect();
    complaints.extend(dedup.near_conflicts.iter().map(|(a, b)| format!("{:?}\n    {:?}", text(*a), text(*b))));
    none("near duplicates", &complaints);
}

/// A word that occurs in 40 texts or more stands under one label in at most 80 % of them.
#[test]
fn no_word_gives_a_label_away() {
    let found = give_away_words(&corpus(), 40, 0.8);
    let complaints: Vec<String> = found
        .iter()
        .map(|word| format!("{:?} in {} texts, {:.0} % {}", word.word, word.texts, 100.0 * word.share, word.label))
        .collect();
    none("words that give a label away", &complaints);
}

#[test]
fn no_judged_sentence_and_no_near_copy_of_one() {
    let complaints: Vec<String> = corpus()
        .iter()
        .filter_map(|example| Some(format!("{:?}\n    {:?}", example.text, judged_near(&example.text)?)))
        .collect();
    none("copies of judged sentences", &complaints);
}

#[test]
fn the_split_is_fixed_stratified_and_whole() {
    let corpus = corpus();
    let split = builtin_split().unwrap();
    assert_eq!(split.train.len() + split.held_out.len(), corpus.len());
    for kind in KINDS {
        let of_kind = |examples: &[Example]| examples.iter().filter(|e| e.kind_or_plain() == kind).count() as f64;
        let share = of_kind(&split.held_out) / of_kind(&corpus);
        assert!((share - HELD_OUT_SHARE).abs() < 0.02, "{kind}: {share:.3} held out");
    }
    let mut sides: HashMap<&str, Vec<bool>> = HashMap::new();
    for (examples, held_out) in [(&split.train, false), (&split.held_out, true)] {
        for example in examples {
            sides.entry(example.pair.as_deref().unwrap_or("")).or_default().push(held_out);
        }
    }
    sides.remove("");
    assert!(sides.values().all(|sides| sides.iter().all(|side| *side == sides[0])), "a pair is torn");
}

#[test]
fn samples_are_balanced_and_show_every_kind() {
    let split = builtin_split().unwrap();
    for n in [60, 300, 600] {
        let sample = balanced_sample(&split.train, n, 1);
        for label in LABELS {
            assert_eq!(sample.iter().filter(|example| example.label == label).count(), n / 3, "{label} of {n}");
        }
        for kind in KINDS {
            assert!(sample.iter().any(|example| example.kind_or_plain() == kind), "{kind} of {n}");
        }
    }
}
