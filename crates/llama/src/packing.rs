//! Packed batches: many examples as one matrix of token rows, the shared prefix once, no padding.
//!
//! ```text
//! rows      0 … p-1        p … p+n₁-1      p+n₁ …          …
//!           shared prefix  example 1       example 2       …
//! position  0 … p-1        p …             p …             …
//! attends   prefix, causal prefix + itself prefix + itself …
//! ```
//!
//! An example joins with as much of the prefix as its own tokens agree with, so the result is exact whatever it starts with.

use cashtag_backend::AttentionLayout;

/// Which tokens carry a loss.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TrainOn {
    /// The answer: the label's tokens and the end token.
    #[default]
    Answer,
    /// Every token but the first.
    All,
}

/// A tokenized prompt with its answer.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenizedExample {
    /// Prompt and answer.
    pub tokens: Vec<u32>,
    /// Index of the answer's first token; at least 1.
    pub answer_start: usize,
    /// Weight of its loss (class weights); 1 for none.
    pub weight: f32,
}

/// One micro-batch, ready for the forward and the backward.
#[derive(Clone, Debug)]
pub struct PackedBatch {
    pub ids: Vec<u32>,
    pub layout: AttentionLayout,
    /// Rows that predict a token with a loss; a row may stand for several examples (its weight says how many).
    pub label_rows: Vec<u32>,
    pub targets: Vec<u32>,
    pub weights: Vec<f32>,
    pub examples: usize,
    /// Tokens that carry a loss, counted once for each example that has them.
    pub loss_tokens: usize,
}

impl PackedBatch {
    pub fn rows(&self) -> usize {
        self.ids.len()
    }

    /// The example that a row belongs to; `None` for a row of the shared prefix.
    pub fn example_of(&self, row: usize) -> Option<usize> {
        let shared = self.layout.segments().len() - self.examples;
        let segment = self.layout.segments().partition_point(|s| s.q_start + s.len <= row);
        segment.checked_sub(shared)
    }
}

fn common(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

/// How many tokens of `prefix` an example can take from the shared rows. The row that predicts the first answer token is always the
/// example's own, and with a loss on every token so is the row whose successor differs between examples.
pub fn shared_tokens(example: &TokenizedExample, prefix: &[u32], train_on: TrainOn) -> usize {
    let shared = common(&example.tokens, prefix).min(example.answer_start - 1);
    match train_on {
        TrainOn::Answer => shared,
        TrainOn::All => shared.saturating_sub(1),
    }
}

/// Packs `examples`, which share the beginning `prefix` as far as each of them does.
pub fn pack(examples: &[&TokenizedExample], prefix: &[u32], train_on: TrainOn) -> PackedBatch {
    let shared: Vec<usize> = examples.iter().map(|e| shared_tokens(e, prefix, train_on)).collect();
    let p = shared.iter().copied().max().unwrap_or(0);
    let lens: Vec<usize> = examples.iter().zip(&shared).map(|(e, s)| e.tokens.len() - 1 - s).collect();
    let mut ids = prefix[..p].to_vec();
    let (mut label_rows, mut targets, mut weights) = (Vec::new(), Vec::new(), Vec::new());
    let mut loss_tokens = 0;
    if train_on == TrainOn::All {
        // Prefix row i predicts prefix[i + 1] for every example that shares it: an example shares one token less than it
        // agrees with, so the successor of its last shared row is still a prefix token.
        for row in 0..p {
            let sharing = || examples.iter().zip(&shared).filter(|&(_, &s)| s > row).map(|(e, _)| e);
            loss_tokens += sharing().count();
            label_rows.push(row as u32);
            targets.push(prefix[row + 1]);
            weights.push(sharing().map(|e| e.weight).sum());
        }
    }
    for (example, &shared) in examples.iter().zip(&shared) {
        let first_row = ids.len();
        // The last token predicts nothing, so it needs no row.
        let own = &example.tokens[shared..example.tokens.len() - 1];
        ids.extend_from_slice(own);
        let first_loss = match train_on {
            TrainOn::Answer => example.answer_start - 1,
            TrainOn::All => shared,
        };
        for position in first_loss..example.tokens.len() - 1 {
            label_rows.push((first_row + position - shared) as u32);
            targets.push(example.tokens[position + 1]);
            weights.push(example.weight);
            loss_tokens += 1;
        }
    }
    let layout = AttentionLayout::packed(p, &shared, &lens);
    PackedBatch { ids, layout, label_rows, targets, weights, examples: examples.len(), loss_tokens }
}

/// Cuts `examples` (in order) into micro-batches of at most `max_tokens` rows (the prefix counted once each) and at most
/// `max_examples` examples; an example that is longer than the budget gets a batch of its own.
pub fn bins(
    examples: &[&TokenizedExample],
    prefix: &[u32],
    train_on: TrainOn,
    max_tokens: usize,
    max_examples: usize,
) -> Vec<std::ops::Range<usize>> {
    let mut bins: Vec<std::ops::Range<usize>> = Vec::new();
    let (mut own, mut p) = (0, 0);
    for (i, example) in examples.iter().enumerate() {
        let shared = shared_tokens(example, prefix, train_on);
        let rows = example.tokens.len() - 1 - shared;
        match bins.last_mut() {
            Some(bin) if bin.len() < max_examples && own + rows + p.max(shared) <= max_tokens => {
                bin.end = i + 1;
                own += rows;
                p = p.max(shared);
            }
            _ => {
                bins.push(i..i + 1);
                (own, p) = (rows, shared);
            }
        }
    }
    bins
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example(tokens: &[u32], answer_start: usize) -> TokenizedExample {
        TokenizedExample { tokens: tokens.to_vec(), answer_start, weight: 1.0 }
    }

    #[test]
    fn answers_only() {
        let (a, b) = (example(&[1, 2, 3, 10, 20, 90], 4), example(&[1, 2, 9, 11, 21, 91], 4));
        let batch = pack(&[&a, &b], &[1, 2, 3], TrainOn::Answer);
        assert_eq!(batch.ids, [1, 2, 3, 10, 20, 9, 11, 21]);
        assert_eq!(batch.layout.positions(), [0, 1, 2, 3, 4, 2, 3, 4]);
        let owners: Vec<_> = (0..8).map(|row| batch.example_of(row)).collect();
        assert_eq!(owners, [None, None, None, Some(0), Some(0), Some(1), Some(1), Some(1)]);
        assert_eq!((batch.label_rows, batch.targets), (vec![3, 4, 6, 7], vec![20, 90, 21, 91]));
        assert_eq!((batch.examples, batch.loss_tokens), (2, 4));
    }

    /// With a loss on every token, the packed batch has the same (context, target, weight) triples as the examples alone.
    #[test]
    fn all_tokens_are_counted_once_for_each_example() {
        let examples = [
            example(&[1, 2, 3, 10, 20, 90], 4),
            example(&[1, 2, 3, 11, 21, 91], 4),
            example(&[1, 2, 9, 12, 22], 3),
            example(&[7, 2, 9, 12, 22], 3),
        ];
        let mut expected: Vec<(Vec<u32>, u32)> = Vec::new();
        for e in &examples {
            for i in 1..e.tokens.len() {
                expected.push((e.tokens[..i].to_vec(), e.tokens[i]));
            }
        }
        let batch = pack(&examples.iter().collect::<Vec<_>>(), &[1, 2, 3], TrainOn::All);
        let mut found = Vec::new();
        for ((&row, &target), &weight) in batch.label_rows.iter().zip(&batch.targets).zip(&batch.weights) {
            let row = row as usize;
            let segment =
                batch.layout.segments().iter().find(|s| (s.q_start..s.q_start + s.len).contains(&row)).unwrap();
            let mut context = batch.ids[..segment.context[0].len].to_vec();
            context.extend(&batch.ids[segment.q_start..=row]);
            for _ in 0..weight as usize {
                found.push((context.clone(), target));
            }
        }
        expected.sort();
        found.sort();
        assert_eq!(found, expected);
        assert_eq!(batch.loss_tokens, found.len());
    }

    #[test]
    fn bins_keep_order_and_budget() {
        let e: Vec<TokenizedExample> = [5usize, 5, 9, 30, 5].iter().map(|&n| example(&vec![1u32; n], n - 1)).collect();
        let refs: Vec<&TokenizedExample> = e.iter().collect();
        // Prefix [1, 1]: own rows are 2, 2, 6, 27, 2.
        assert_eq!(bins(&refs, &[1, 1], TrainOn::Answer, 12, 100), [0..3, 3..4, 4..5]);
        assert_eq!(bins(&refs, &[1, 1], TrainOn::Answer, 100, 2), [0..2, 2..4, 4..5]);
    }
}
