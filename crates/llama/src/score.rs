//! Exact label probabilities without generating: the log-probability of each label's word(s) at the end of the prompt.
//!
//! A label of one token needs only the last row of the prompt. A label of several tokens ("Ne|utral") is appended as a
//! branch that attends to prefix, text and itself:
//!
//! ```text
//! kv    0 … p-1 │ text 1 … │ Ne │ text 2 … │ Ne │      log p(Neutral) = log p(Ne | text) + log p(utral | text, Ne)
//!       cached  │          └ branch        └ branch
//! ```
//!
//! The shared prefix runs once, when the scorer is made.

use cashtag_backend::{AttentionLayout, Backend, Segment, Span};

use crate::error::{Error, Result};
use crate::kv::KvStore;
use crate::lora::Lora;
use crate::model::{Llama, Purpose, Workspace};
use crate::prompt::PromptFormat;

/// Scores prompts against the labels of one format with one model and adapter.
pub struct Scorer<B: Backend> {
    prefix: Vec<u32>,
    labels: Vec<Vec<u32>>,
    kv: KvStore<B>,
    ws: Workspace<B>,
    max_tokens: usize,
}

/// One (row, target) pair of a batch and where its log-probability goes.
struct Wanted {
    row: usize,
    target: u32,
    prompt: usize,
    label: usize,
}

impl<B: Backend> Scorer<B> {
    /// Makes room for batches of at most `max_tokens` rows and runs the shared prefix.
    ///
    /// # Errors
    /// A prefix that the model cannot take, or a device without memory.
    pub fn new(
        backend: &B,
        model: &Llama<B>,
        lora: Option<&Lora<B>>,
        format: &PromptFormat,
        max_tokens: usize,
    ) -> Result<Self> {
        let labels: Vec<Vec<u32>> = (0..format.labels().len()).map(|i| format.label_tokens(i).to_vec()).collect();
        let prefix = format.prefix().to_vec();
        let branches: usize = labels.iter().map(|l| l.len() - 1).sum();
        // One text must always fit.
        let max_tokens = max_tokens.max(format.max_seq_length() + branches).max(prefix.len());
        let mut kv = model.kv_store(backend, prefix.len() + max_tokens)?;
        let mut ws = model.workspace(backend, max_tokens, Purpose::Inference, lora)?;
        if !prefix.is_empty() {
            let segment = Segment { q_start: 0, len: prefix.len(), kv_start: 0, context: Default::default() };
            let layout = layout(vec![segment], prefix.len())?;
            model.forward_inference(backend, &prefix, &layout, &[], lora, &mut kv, &mut ws)?;
        }
        Ok(Self { prefix, labels, kv, ws, max_tokens })
    }

    fn shared(&self, prompt: &[u32]) -> usize {
        let shared = prompt.iter().zip(&self.prefix).take_while(|(a, b)| a == b).count();
        shared.min(prompt.len().saturating_sub(1))
    }

    /// Rows that a prompt takes in a batch.
    pub fn rows(&self, prompt: &[u32]) -> usize {
        prompt.len() - self.shared(prompt) + self.labels.iter().map(|l| l.len() - 1).sum::<usize>()
    }

    pub fn max_tokens(&self) -> usize {
        self.max_tokens
    }

    /// log p(label | prompt) for each prompt and label; any number of prompts.
    ///
    /// # Errors
    /// A prompt longer than the budget, ids that the model does not have, or a device that fails.
    pub fn log_probabilities(
        &mut self,
        backend: &B,
        model: &Llama<B>,
        lora: Option<&Lora<B>>,
        prompts: &[&[u32]],
    ) -> Result<Vec<Vec<f32>>> {
        let mut result = Vec::with_capacity(prompts.len());
        let mut rest = prompts;
        while !rest.is_empty() {
            let (mut rows, mut count) = (0, 0);
            while count < rest.len() && (count == 0 || rows + self.rows(rest[count]) <= self.max_tokens) {
                rows += self.rows(rest[count]);
                count += 1;
            }
            if rows > self.max_tokens {
                let what = format!("a prompt takes {rows} rows, the budget is {}", self.max_tokens);
                return Err(Error::Invalid(what));
            }
            self.batch(backend, model, lora, &rest[..count], &mut result)?;
            rest = &rest[count..];
        }
        Ok(result)
    }

    fn batch(
        &mut self,
        backend: &B,
        model: &Llama<B>,
        lora: Option<&Lora<B>>,
        prompts: &[&[u32]],
        result: &mut Vec<Vec<f32>>,
    ) -> Result<()> {
        let p = self.prefix.len();
        let (mut ids, mut segments, mut wanted) = (Vec::new(), Vec::new(), Vec::new());
        for (prompt, tokens) in prompts.iter().enumerate() {
            if tokens.is_empty() {
                return Err(Error::Invalid("a prompt has no tokens".into()));
            }
            let shared = Span { start: 0, len: self.shared(tokens) };
            let own = &tokens[shared.len..];
            let start = ids.len();
            ids.extend_from_slice(own);
            segments.push(Segment {
                q_start: start,
                len: own.len(),
                kv_start: p + start,
                context: [shared, Span::default()],
            });
            let text = Span { start: p + start, len: own.len() };
            let last = ids.len() - 1;
            for (label, word) in self.labels.iter().enumerate() {
                wanted.push(Wanted { row: last, target: word[0], prompt, label });
                if word.len() == 1 {
                    continue;
                }
                let at = ids.len();
                ids.extend_from_slice(&word[..word.len() - 1]);
                let context = [shared, text];
                segments.push(Segment { q_start: at, len: word.len() - 1, kv_start: p + at, context });
                wanted.extend(word[1..].iter().enumerate().map(|(i, &target)| Wanted {
                    row: at + i,
                    target,
                    prompt,
                    label,
                }));
            }
        }
        let layout = layout(segments, p + ids.len())?;
        wanted.sort_by_key(|w| w.row);
        let mut rows: Vec<u32> = wanted.iter().map(|w| w.row as u32).collect();
        rows.dedup();
        model.forward_inference(backend, &ids, &layout, &rows, lora, &mut self.kv, &mut self.ws)?;
        let first = result.len();
        result.resize(first + prompts.len(), vec![0.0; self.labels.len()]);
        model.head(backend, &mut self.ws, |start, logits| {
            let block = &rows[start..start + logits.rows];
            let mut by_row: Vec<Vec<&Wanted>> = vec![Vec::new(); block.len()];
            for w in &wanted {
                if let Ok(i) = block.binary_search(&(w.row as u32)) {
                    by_row[i].push(w);
                }
            }
            let targets: Vec<Vec<u32>> = by_row.iter().map(|row| row.iter().map(|w| w.target).collect()).collect();
            for (row, values) in by_row.iter().zip(backend.log_probabilities(logits, &targets)?) {
                for (w, value) in row.iter().zip(values) {
                    result[first + w.prompt][w.label] += value;
                }
            }
            Ok(())
        })
    }
}

fn layout(segments: Vec<Segment>, kv_rows: usize) -> Result<AttentionLayout> {
    AttentionLayout::new(segments, kv_rows).map_err(|e| Error::Invalid(format!("attention layout: {e}")))
}

/// Probabilities over the labels from their log-probabilities, softened by `temperature` (1 leaves them as they are).
pub fn normalise(log_probabilities: &[f32], temperature: f32) -> Vec<f32> {
    let max = log_probabilities.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let exps: Vec<f64> = log_probabilities.iter().map(|&l| f64::from((l - max) / temperature).exp()).collect();
    let sum: f64 = exps.iter().sum();
    exps.iter().map(|e| (e / sum) as f32).collect()
}
