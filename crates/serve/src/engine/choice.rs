//! One of several answers, chosen by its whole probability: what a grammar that masks token by token does not give.
//!
//! The prompt is read in pieces, so that classification goes on between them; in the last step every answer is a branch
//! behind it:
//!
//! ```text
//! keys   0 … n-1 │ answer 1 │ answer 2 │ …      each attends to the prompt and itself
//! ```

use cashtag_backend::{AttentionLayout, Backend, Segment, Span};
use cashtag_llama::kv::KvStore;
use cashtag_llama::lora::Lora;
use cashtag_llama::model::{Llama, Purpose, Workspace};
use cashtag_llama::{Error, Result};

pub(super) struct Choice<B: Backend> {
    prompt: Vec<u32>,
    choices: Vec<Vec<u32>>,
    kv: KvStore<B>,
    ws: Workspace<B>,
    piece: usize,
    cached: usize,
}

impl<B: Backend> Choice<B> {
    /// `prompt` and each of `choices` have at least one token; a step computes at most `piece` rows, the last one more.
    pub(super) fn new(
        backend: &B,
        model: &Llama<B>,
        lora: Option<&Lora<B>>,
        prompt: Vec<u32>,
        choices: Vec<Vec<u32>>,
        piece: usize,
    ) -> Result<Self> {
        if prompt.is_empty() || choices.iter().any(Vec::is_empty) {
            return Err(Error::Invalid("a prompt or a choice has no tokens".into()));
        }
        let branches: usize = choices.iter().map(|c| c.len() - 1).sum();
        let kv = model.kv_store(backend, prompt.len() + branches)?;
        let ws = model.workspace(backend, piece.max(1 + branches), Purpose::Inference, lora)?;
        Ok(Self { prompt, choices, kv, ws, piece: piece.max(1), cached: 0 })
    }

    /// Runs the model once; log-probabilities of the choices when the prompt has been read.
    pub(super) fn step(&mut self, backend: &B, model: &Llama<B>, lora: Option<&Lora<B>>) -> Result<Option<Vec<f32>>> {
        let last = self.prompt.len() - 1;
        let none = Span::default();
        if self.cached < last {
            let len = self.piece.min(last - self.cached);
            let context = [Span { start: 0, len: self.cached }, none];
            let segment = Segment { q_start: 0, len, kv_start: self.cached, context };
            let layout = layout(vec![segment], self.kv.capacity())?;
            let ids = &self.prompt[self.cached..self.cached + len];
            model.forward_inference(backend, ids, &layout, &[], lora, &mut self.kv, &mut self.ws)?;
            self.cached += len;
            return Ok(None);
        }
        let mut ids = vec![self.prompt[last]];
        let mut segments =
            vec![Segment { q_start: 0, len: 1, kv_start: last, context: [Span { start: 0, len: last }, none] }];
        // (row, token that it predicts, choice), in the order of rows.
        let mut wanted: Vec<(u32, u32, usize)> = self.choices.iter().enumerate().map(|(i, c)| (0, c[0], i)).collect();
        for (i, choice) in self.choices.iter().enumerate().filter(|(_, c)| c.len() > 1) {
            let at = ids.len();
            let branch = &choice[..choice.len() - 1];
            ids.extend_from_slice(branch);
            let context = [Span { start: 0, len: last + 1 }, none];
            segments.push(Segment { q_start: at, len: branch.len(), kv_start: last + at, context });
            wanted.extend(choice[1..].iter().enumerate().map(|(j, &token)| ((at + j) as u32, token, i)));
        }
        let layout = layout(segments, self.kv.capacity())?;
        let rows: Vec<u32> = (0..ids.len() as u32).collect();
        model.forward_inference(backend, &ids, &layout, &rows, lora, &mut self.kv, &mut self.ws)?;
        let (mut sums, mut logits) = (vec![0f32; self.choices.len()], vec![0f32; model.config().vocab_size]);
        model.head(backend, &mut self.ws, |first, block| {
            for r in 0..block.rows {
                backend.download(block.buffer, block.offset + r * block.stride, &mut logits)?;
                let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let total: f64 = logits.iter().map(|&l| f64::from(l - max).exp()).sum();
                let row = (first + r) as u32;
                for &(_, token, choice) in wanted.iter().filter(|w| w.0 == row) {
                    let logit = logits.get(token as usize).copied().unwrap_or(f32::NEG_INFINITY);
                    sums[choice] += (f64::from(logit - max) - total.ln()) as f32;
                }
            }
            Ok(())
        })?;
        if sums.iter().any(|s| s.is_nan()) {
            return Err(Error::Invalid("the model gives no numbers: it, or its adapter, is damaged".into()));
        }
        Ok(Some(sums))
    }
}

fn layout(segments: Vec<Segment>, kv_rows: usize) -> Result<AttentionLayout> {
    AttentionLayout::new(segments, kv_rows).map_err(|e| Error::Invalid(format!("attention layout: {e}")))
}
