//! Text from a model, token by token, for many prompts at once.
//!
//! A [`Generator`] holds the keys and values of its sequences. [`add`](Generator::add) gives it a prompt,
//! [`step`](Generator::step) runs the model once and yields at most one token for each sequence, [`remove`](Generator::remove)
//! takes a sequence away whenever its reader has left. Between two steps nothing is pending, so a service can classify,
//! add and remove there, and a step never computes more than `max_tokens` rows: long prompts are read in pieces, beside
//! the sequences that are already being written.
//!
//! ```text
//! keys     0 … p-1 │ prompt and answer 1 … │ prompt and answer 2 … │ free
//!          prefix  └ one run of rows for each sequence ┘
//! a step   last token of 1 │ last token of 2 │ a piece of prompt 3       (one row each, and what is left of max_tokens)
//! ```
//!
//! It is exact: a sequence's logits are those that the model gives it alone, up to the rounding of products with another
//! number of rows.

mod rows;
mod sampling;
mod text;

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use cashtag_backend::{AttentionLayout, Backend, Mat, Segment, Span};

pub use self::sampling::{Sampling, TokenLogprob, top_logprobs};

use self::rows::Rows;
use self::text::TextStream;
use crate::error::{Error, Result};
use crate::kv::KvStore;
use crate::lora::Lora;
use crate::model::{Llama, Purpose, Workspace};
use crate::tokenizer::Tokenizer;

/// What a [`Generator`] has room for.
#[derive(Clone, Debug)]
pub struct GeneratorOptions {
    /// Tokens that prompts begin with; they are run once. A prompt shares as much of them as it agrees with.
    pub prefix: Vec<u32>,
    /// Rows of keys and values for all sequences together, the prefix not counted.
    pub kv_rows: usize,
    /// Most rows that one step computes.
    pub max_tokens: usize,
    /// Most sequences that are written at a time; further ones wait. At most `max_tokens`.
    pub max_sequences: usize,
}

/// A prompt and what is wanted of it.
#[derive(Clone, Debug)]
pub struct Request {
    pub prompt: Vec<u32>,
    /// Most tokens that are generated; fewer where the model's positions end.
    pub max_new_tokens: usize,
    pub sampling: Sampling,
    /// The text ends before the first of these; it is cut off.
    pub stop: Vec<String>,
    /// Also give this many of the likeliest tokens at each position.
    pub top_logprobs: usize,
    /// The answer goes on with the prompt's text instead of being a turn of its own: a space that it begins with stays.
    pub continues: bool,
    /// Keep this many rows for the sequence, also when it has finished, so that [`Generator::again`] can go on from
    /// them; `None` frees them at the end.
    pub keep: Option<usize>,
}

impl Request {
    /// Greedy, without stop strings.
    pub fn new(prompt: Vec<u32>, max_new_tokens: usize) -> Self {
        Self {
            prompt,
            max_new_tokens,
            sampling: Sampling::default(),
            stop: Vec::new(),
            top_logprobs: 0,
            continues: false,
            keep: None,
        }
    }
}

/// Names a sequence of one generator; never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SequenceId(u64);

/// Why a sequence ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// The model ended its turn, or a stop string came.
    Stop,
    /// `max_new_tokens`, or the model's last position.
    Length,
}

impl FinishReason {
    /// "stop" or "length", as OpenAI's API calls it.
    pub fn name(self) -> &'static str {
        match self {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
        }
    }
}

/// What a step did for one sequence.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    pub id: SequenceId,
    /// The new token; the one that ends a turn too.
    pub token: TokenLogprob,
    /// The text that it makes visible; often a word, empty while a character or a stop string is open.
    pub text: String,
    pub top_logprobs: Vec<TokenLogprob>,
    /// Set with the last token of a sequence.
    pub finish: Option<FinishReason>,
}

struct Sequence {
    id: SequenceId,
    /// Rows of the store, for the tokens behind the shared ones.
    rows: Range<usize>,
    /// Prefix rows that it attends to.
    shared: usize,
    /// Its tokens behind the shared ones: prompt and answer.
    tokens: Vec<u32>,
    /// How many of them have keys and values.
    cached: usize,
    generated: usize,
    max_new_tokens: usize,
    sampling: Sampling,
    top_logprobs: usize,
    text: TextStream,
    keep: bool,
    finished: bool,
}

impl Sequence {
    fn pending(&self) -> usize {
        if self.finished { 0 } else { self.tokens.len() - self.cached }
    }
}

/// Sequences that are written together, with one model and adapter.
pub struct Generator<B: Backend> {
    tokenizer: Arc<Tokenizer>,
    prefix: Vec<u32>,
    end_tokens: Vec<u32>,
    positions: usize,
    max_tokens: usize,
    max_sequences: usize,
    kv: KvStore<B>,
    ws: Workspace<B>,
    rows: Rows,
    /// In the order in which they were added.
    sequences: Vec<Sequence>,
    waiting: VecDeque<(SequenceId, Request)>,
    next: u64,
}

impl<B: Backend> Generator<B> {
    /// Makes room and runs the prefix.
    ///
    /// # Errors
    /// A prefix that the model cannot take, or a device without memory.
    pub fn new(
        backend: &B,
        model: &Llama<B>,
        lora: Option<&Lora<B>>,
        tokenizer: Arc<Tokenizer>,
        options: GeneratorOptions,
    ) -> Result<Self> {
        let GeneratorOptions { prefix, kv_rows, max_tokens, max_sequences } = options;
        let max_tokens = max_tokens.max(1);
        let mut kv = model.kv_store(backend, prefix.len() + kv_rows)?;
        let mut ws = model.workspace(backend, max_tokens, Purpose::Inference, lora)?;
        for start in (0..prefix.len()).step_by(max_tokens) {
            let part = &prefix[start..prefix.len().min(start + max_tokens)];
            let before = Span { start: 0, len: start };
            let segment = Segment { q_start: 0, len: part.len(), kv_start: start, context: [before, Span::default()] };
            let layout = layout(vec![segment], kv.capacity())?;
            model.forward_inference(backend, part, &layout, &[], lora, &mut kv, &mut ws)?;
        }
        let mut end_tokens = model.config().eos_token_ids.clone();
        end_tokens.extend(tokenizer.eos_token_id());
        Ok(Self {
            tokenizer,
            end_tokens,
            positions: model.max_positions(),
            max_tokens,
            max_sequences: max_sequences.clamp(1, max_tokens),
            rows: Rows::new(prefix.len()..prefix.len() + kv_rows),
            prefix,
            kv,
            ws,
            sequences: Vec::new(),
            waiting: VecDeque::new(),
            next: 0,
        })
    }

    /// Tokens that end a sequence: what the model's files say.
    pub fn end_tokens(&self) -> &[u32] {
        &self.end_tokens
    }

    /// Sequences that are being written.
    pub fn running(&self) -> usize {
        self.sequences.iter().filter(|s| !s.finished).count()
    }

    /// Sequences that wait for room.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Nothing to do: every sequence has finished.
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.running() == 0
    }

    /// Takes a request. Its first token comes out of a later step; while there is no room it waits, first come, first served.
    ///
    /// # Errors
    /// A request that could never be met: an empty prompt, one that leaves the model no position, more rows than there are.
    pub fn add(&mut self, request: Request) -> Result<SequenceId> {
        self.check(&request)?;
        let id = SequenceId(self.next);
        self.next += 1;
        self.waiting.push_back((id, request));
        Ok(id)
    }

    fn check(&self, request: &Request) -> Result<()> {
        request.sampling.validate()?;
        let length = request.prompt.len();
        if length == 0 {
            return Err(Error::Invalid("a prompt has no tokens".into()));
        }
        if request.max_new_tokens == 0 {
            return Err(Error::Invalid("max_new_tokens is 0, expected at least 1".into()));
        }
        if length >= self.positions {
            return Err(Error::Invalid(format!(
                "a prompt of {length} tokens leaves no room for an answer: the model has {} positions\n  hint: shorten it",
                self.positions
            )));
        }
        let (needed, there) = (self.rows_of(request), self.rows.len());
        if needed > there {
            return Err(Error::Invalid(format!(
                "prompt and answer take {needed} rows of keys and values, there are {there}\n  hint: ask for fewer new tokens, or make more room"
            )));
        }
        Ok(())
    }

    fn shared(&self, prompt: &[u32]) -> usize {
        let shared = prompt.iter().zip(&self.prefix).take_while(|(a, b)| a == b).count();
        // The last prompt token is always its own: its row gives the first logits.
        shared.min(prompt.len().saturating_sub(1))
    }

    fn max_new_tokens(&self, request: &Request) -> usize {
        request.max_new_tokens.min(self.positions - request.prompt.len())
    }

    /// Rows that a request takes from its start to its end. The last token's keys are never needed.
    pub fn rows_of(&self, request: &Request) -> usize {
        let own = request.prompt.len() - self.shared(&request.prompt);
        let new = request.max_new_tokens.min(self.positions.saturating_sub(request.prompt.len()));
        (own + new).saturating_sub(1).max(request.keep.unwrap_or(0))
    }

    /// Goes on with a sequence that has finished and was [kept](Request::keep): what the new prompt has in common with what
    /// was computed for the old one is not computed again. The sequence keeps its rows and its id.
    ///
    /// # Errors
    /// No such sequence, one that is not finished, a prompt that does not fit its rows.
    pub fn again(&mut self, id: SequenceId, request: Request) -> Result<()> {
        self.check(&request)?;
        let (shared, max_new_tokens) = (self.shared(&request.prompt), self.max_new_tokens(&request));
        let needed = request.prompt.len() - shared + max_new_tokens - 1;
        let Some(s) = self.sequences.iter_mut().find(|s| s.id == id && s.finished) else {
            return Err(Error::Invalid("there is no finished sequence of this id".into()));
        };
        if needed > s.rows.len() {
            return Err(Error::Invalid(format!(
                "prompt and answer take {needed} rows of keys and values, the sequence has {}\n  hint: begin a new one",
                s.rows.len()
            )));
        }
        let own = &request.prompt[shared..];
        let common = s.tokens[..s.cached].iter().zip(own).take_while(|(a, b)| a == b).count();
        s.cached = if shared == s.shared { common.min(own.len() - 1) } else { 0 };
        s.shared = shared;
        s.tokens = own.to_vec();
        s.generated = 0;
        s.max_new_tokens = max_new_tokens;
        s.sampling = request.sampling;
        s.top_logprobs = request.top_logprobs;
        s.text = TextStream::new(request.stop, request.continues);
        s.keep = request.keep.is_some();
        s.finished = false;
        Ok(())
    }

    /// Takes a sequence away, in whatever state it is; whether there was one.
    pub fn remove(&mut self, id: SequenceId) -> bool {
        let before = self.waiting.len() + self.sequences.len();
        self.waiting.retain(|(waiting, _)| *waiting != id);
        if let Some(at) = self.sequences.iter().position(|s| s.id == id) {
            self.rows.give_back(&self.sequences.remove(at).rows);
        }
        before != self.waiting.len() + self.sequences.len()
    }

    /// Starts what waits, as far as there is room.
    fn start(&mut self) {
        while self.running() < self.max_sequences
            && let Some((_, request)) = self.waiting.front()
        {
            let Some(rows) = self.rows.take(self.rows_of(request)) else { return };
            let Some((id, request)) = self.waiting.pop_front() else { return };
            let shared = self.shared(&request.prompt);
            self.sequences.push(Sequence {
                id,
                rows,
                shared,
                tokens: request.prompt[shared..].to_vec(),
                cached: 0,
                generated: 0,
                max_new_tokens: self.max_new_tokens(&request),
                sampling: request.sampling,
                top_logprobs: request.top_logprobs,
                text: TextStream::new(request.stop, request.continues),
                keep: request.keep.is_some(),
                finished: false,
            });
        }
    }

    /// Runs the model once: one event for each sequence that got a token. Empty while prompts are read, and when idle.
    ///
    /// # Errors
    /// Ids that the model does not have, logits that are no numbers, a device that fails. The state is as before the step.
    pub fn step(&mut self, backend: &B, model: &Llama<B>, lora: Option<&Lora<B>>) -> Result<Vec<Event>> {
        self.start();
        // Those that are being written first: one row each, and there are at most max_tokens of them.
        let mut order: Vec<usize> = (0..self.sequences.len()).filter(|&i| self.sequences[i].pending() > 0).collect();
        order.sort_by_key(|&i| (self.sequences[i].pending() > 1, i));
        let (mut ids, mut segments, mut parts, mut last_rows) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for i in order {
            let s = &self.sequences[i];
            let len = s.pending().min(self.max_tokens - ids.len());
            if len == 0 {
                break;
            }
            let past = Span { start: s.rows.start, len: s.cached };
            let context = [Span { start: 0, len: s.shared }, past];
            segments.push(Segment { q_start: ids.len(), len, kv_start: s.rows.start + s.cached, context });
            ids.extend_from_slice(&s.tokens[s.cached..s.cached + len]);
            let complete = s.cached + len == s.tokens.len();
            if complete {
                last_rows.push(ids.len() as u32 - 1);
            }
            parts.push((i, len, complete));
        }
        if ids.is_empty() {
            return Ok(Vec::new());
        }
        let layout = layout(segments, self.kv.capacity())?;
        model.forward_inference(backend, &ids, &layout, &last_rows, lora, &mut self.kv, &mut self.ws)?;
        let writing: Vec<usize> = parts.iter().filter(|p| p.2).map(|p| p.0).collect();
        let mut chosen = Vec::with_capacity(writing.len());
        let (sequences, mut row) = (&self.sequences, vec![0f32; model.config().vocab_size]);
        model.head(backend, &mut self.ws, |first, logits: Mat<'_, B::Buffer>| {
            for (r, &i) in writing[first..first + logits.rows].iter().enumerate() {
                backend.download(logits.buffer, logits.offset + r * logits.stride, &mut row)?;
                let s = &sequences[i];
                let token = s.sampling.choose(&row, s.generated as u32)?;
                let top = if s.top_logprobs > 0 { top_logprobs(&row, s.top_logprobs) } else { Vec::new() };
                chosen.push((token, top));
            }
            Ok(())
        })?;
        // Nothing can fail from here on.
        for &(i, len, _) in &parts {
            self.sequences[i].cached += len;
        }
        let events = writing.iter().zip(chosen).map(|(&i, (token, top))| self.take(i, token, top)).collect();
        let rows = &mut self.rows;
        self.sequences.retain(|s| {
            let stays = !s.finished || s.keep;
            if !stays {
                rows.give_back(&s.rows);
            }
            stays
        });
        Ok(events)
    }

    /// Appends a token to sequence `i`.
    fn take(&mut self, i: usize, token: TokenLogprob, top_logprobs: Vec<TokenLogprob>) -> Event {
        let s = &mut self.sequences[i];
        s.generated += 1;
        s.tokens.push(token.token);
        let ended = self.end_tokens.contains(&token.token);
        let (mut text, stopped) = if ended { Default::default() } else { s.text.push(&self.tokenizer, token.token) };
        let mut finish = if ended || stopped {
            Some(FinishReason::Stop)
        } else {
            (s.generated == s.max_new_tokens).then_some(FinishReason::Length)
        };
        if finish.is_some() && !stopped {
            let (rest, stopped) = s.text.finish(&self.tokenizer);
            text += &rest;
            if stopped {
                finish = Some(FinishReason::Stop);
            }
        }
        s.finished = finish.is_some();
        Event { id: s.id, token, text, top_logprobs, finish }
    }
}

fn layout(segments: Vec<Segment>, kv_rows: usize) -> Result<AttentionLayout> {
    AttentionLayout::new(segments, kv_rows).map_err(|e| Error::Invalid(format!("attention layout: {e}")))
}
