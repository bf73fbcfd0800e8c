#!/usr/bin/env python3
"""The floor to stand clear of: a bag of words trained on the built-in corpus.

TF-IDF over words and pairs of words, and a logistic regression. The strength of the regularisation is chosen by
cross-validation on the training part alone. Judged on the part of the corpus that is never trained on, in all and by kind,
and on any labelled files (`text` and `label`, JSON lines or CSV) given by --data.

    pip install scikit-learn
    python3 scripts/bag_of_words.py --data headlines=headlines.jsonl --data chatter=chatter.jsonl

In brackets: 95 % percentile bootstrap over the texts, 2,000 resamples, seeded.
"""

import argparse
import csv
import json
import re
import subprocess
import sys
import warnings

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import make_pipeline

LABELS = ["Positive", "Neutral", "Negative"]
# Words with their apostrophes, tags, numbers with sign and percent, and every other visible sign (emoji, "?") alone.
TOKEN = re.compile(r"[$#@]?[^\W_]+(?:['’][^\W_]+)*|[+-]?\d[\d.,]*%?|[^\w\s]")


def tokens(text):
    return TOKEN.findall(text.lower())


def corpus(program, part):
    """All examples of a part of the built-in corpus, as the program splits it."""
    command = [program, "corpus", "sample", f"--{part}", "--json", "-n", "1000000"]
    lines = subprocess.run(command, check=True, stdout=subprocess.PIPE, encoding="utf-8").stdout.splitlines()
    return sorted((json.loads(line) for line in lines), key=lambda example: example["text"])


def read(path):
    with open(path, encoding="utf-8", newline="") as file:
        if path.endswith(".csv"):
            return list(csv.DictReader(file))
        return [json.loads(line) for line in file if line.strip()]


def with_interval(truth, answers, measure, seed=42):
    truth, answers = np.asarray(truth), np.asarray(answers)
    rng = np.random.default_rng(seed)
    draws = [rng.integers(0, len(truth), len(truth)) for _ in range(2000)]
    low, high = np.percentile([measure(truth[draw], answers[draw]) for draw in draws], [2.5, 97.5])
    return f"{measure(truth, answers):.3f} [{low:.3f}, {high:.3f}]"


def accuracy(truth, answers):
    return float(np.mean(truth == answers))


def macro_f1(truth, answers):
    # By hand: scikit-learn's own takes a minute for the resamples.
    scores = []
    for label in range(len(LABELS)):
        hits = np.sum((truth == label) & (answers == label))
        total = np.sum(truth == label) + np.sum(answers == label)
        scores.append(2 * hits / total if total else 0.0)
    return float(np.mean(scores))


def judge(model, name, examples):
    truth = np.array([LABELS.index(example["label"]) for example in examples])
    answers = np.array([LABELS.index(label) for label in model.predict([example["text"] for example in examples])])
    assert abs(macro_f1(truth, answers) - f1_score(truth, answers, labels=range(3), average="macro", zero_division=0)) < 1e-9
    print(f"{name}: {len(examples)} texts")
    print(f"  accuracy  {with_interval(truth, answers, accuracy)}")
    print(f"  macro F1  {with_interval(truth, answers, macro_f1)}")
    majority = max(np.bincount(truth, minlength=len(LABELS))) / len(truth)
    print(f"  majority  {majority:.3f}")
    kinds = sorted({example.get("kind") or "plain" for example in examples})
    for kind in kinds if len(kinds) > 1 else []:
        chosen = np.array([(example.get("kind") or "plain") == kind for example in examples])
        print(f"  {kind:<11} {chosen.sum():>4} texts, accuracy {with_interval(truth[chosen], answers[chosen], accuracy)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cashtag", default="target/release/cashtag", help="the program [default: %(default)s]")
    parser.add_argument("--data", action="append", default=[], metavar="NAME=FILE", help="another labelled file to judge on")
    arguments = parser.parse_args()
    files = [item.partition("=") for item in arguments.data]
    if any(not path for _, _, path in files):
        parser.error("--data takes NAME=FILE")
    try:
        train, held_out = corpus(arguments.cashtag, "train"), corpus(arguments.cashtag, "held-out")
    except FileNotFoundError:
        sys.exit(f"{arguments.cashtag} is not there\nhint: cargo build --release, or name the program with --cashtag")

    words = TfidfVectorizer(tokenizer=tokens, token_pattern=None, lowercase=False, ngram_range=(1, 2), sublinear_tf=True)
    model = make_pipeline(words, LogisticRegression(class_weight="balanced", max_iter=2000))
    search = GridSearchCV(
        model,
        {"logisticregression__C": [0.3, 1, 3, 10, 30]},
        scoring="f1_macro",
        cv=StratifiedKFold(5, shuffle=True, random_state=42),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        search.fit([example["text"] for example in train], [example["label"] for example in train])
    strength = search.best_params_["logisticregression__C"]
    print(f"trained on {len(train)} texts of the built-in corpus; C {strength:g} by cross-validation, macro F1 {search.best_score_:.3f}")
    judge(search.best_estimator_, "built-in corpus, held-out part", held_out)
    for name, _, path in files:
        judge(search.best_estimator_, name, read(path))


if __name__ == "__main__":
    main()
