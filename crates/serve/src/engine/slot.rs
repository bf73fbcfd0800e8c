//! One served model on the device: its LoRA factors, its prefix cache, and what is being written with it.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use cashtag_backend::Backend;
use cashtag_llama::generate::{Generator, GeneratorOptions, SequenceId};
use cashtag_llama::lora::Lora;
use cashtag_llama::model::Llama;
use cashtag_llama::score::{Scorer, normalise};

use super::batch::{TextItem, Wanted, WriteItem};
use super::choice::Choice;
use super::{Failure, Inner, Scored, Served};

pub(super) struct Slot<B: Backend> {
    pub(super) served: Arc<Served>,
    lora: Option<Lora<B>>,
    scorer: Option<Scorer<B>>,
    generator: Option<Generator<B>>,
    writing: HashMap<SequenceId, Writing>,
    choices: VecDeque<(Option<Choice<B>>, WriteItem)>,
}

struct Writing {
    item: WriteItem,
    first: bool,
}

/// What all slots share.
pub(super) struct Device<'a, B: Backend> {
    pub(super) backend: &'a B,
    pub(super) model: &'a Llama<B>,
    pub(super) inner: &'a Inner,
    /// Rows of a classification batch, and of a step of generation.
    pub(super) batch_rows: usize,
    pub(super) step_rows: usize,
    pub(super) max_model_len: usize,
}

impl<B: Backend> Slot<B> {
    pub(super) fn new(served: Arc<Served>, lora: Option<Lora<B>>) -> Self {
        Self { served, lora, scorer: None, generator: None, writing: HashMap::new(), choices: VecDeque::new() }
    }

    /// Makes the prefix cache, if it is not there yet.
    pub(super) fn prepare(&mut self, device: &Device<'_, B>) -> cashtag_llama::Result<()> {
        if self.scorer.is_none() {
            let lora = self.lora.as_ref();
            let format = &self.served.cutting;
            self.scorer = Some(Scorer::new(device.backend, device.model, lora, format, device.batch_rows)?);
        }
        Ok(())
    }

    /// Takes the texts of this slot that one batch has room for out of the queue, the oldest first.
    pub(super) fn fill(&self, queue: &mut VecDeque<TextItem>) -> Vec<TextItem> {
        let Some(scorer) = &self.scorer else { return Vec::new() };
        let (mut taken, mut rest, mut rows) = (Vec::new(), VecDeque::with_capacity(queue.len()), 0);
        let mut full = false;
        for item in queue.drain(..) {
            if full || !Arc::ptr_eq(&item.served, &self.served) {
                rest.push_back(item);
                continue;
            }
            let own = scorer.rows(&item.prompt);
            if !taken.is_empty() && rows + own > scorer.max_tokens() {
                full = true;
                rest.push_back(item);
                continue;
            }
            rows += own;
            taken.push(item);
        }
        *queue = rest;
        taken
    }

    /// Classifies a batch and answers it. An error is told to every text of it.
    pub(super) fn classify(&mut self, device: &Device<'_, B>, batch: Vec<TextItem>) -> cashtag_llama::Result<()> {
        let Some(scorer) = &mut self.scorer else { return Ok(()) };
        let (inner, name) = (device.inner, &self.served.name);
        let m = &inner.measures;
        let prompts: Vec<&[u32]> = batch.iter().map(|item| item.prompt.as_slice()).collect();
        let rows: Vec<usize> = prompts.iter().map(|p| scorer.rows(p)).collect();
        let prefix = self.served.cutting.prefix();
        let started = Instant::now();
        let outcome = scorer.log_probabilities(device.backend, device.model, self.lora.as_ref(), &prompts);
        let inference = started.elapsed();
        let scores = match outcome {
            Ok(scores) => scores,
            Err(e) => {
                for item in batch {
                    item.fail(inner, "failed", Failure::Device(e.to_string()));
                }
                return Err(e);
            }
        };
        let all = rows.iter().sum();
        inner.admission.learn(all, inference);
        m.inference.observe(inference.as_secs_f64());
        m.batch_texts.observe(batch.len() as f64);
        m.batch_rows.observe(all as f64);
        for (item, log_probabilities) in batch.into_iter().zip(scores) {
            if log_probabilities.iter().any(|l| l.is_nan()) {
                item.fail(inner, "failed", Failure::Device("its answer is no number".into()));
                continue;
            }
            let shared = item.prompt.iter().zip(prefix).take_while(|(a, b)| a == b).count();
            let cached_tokens = shared.min(item.prompt.len().saturating_sub(1));
            m.prompt_tokens.add(item.prompt.len() as u64);
            m.cached_tokens.add(cached_tokens as u64);
            let queue = started.saturating_duration_since(item.tokenized);
            m.waiting.observe(queue.as_secs_f64());
            m.text(name, "ok");
            let scored = Scored {
                text: item.text,
                probabilities: normalise(&log_probabilities, self.served.temperature),
                log_probabilities,
                prompt_tokens: item.prompt.len(),
                cached_tokens,
                tokenization: item.tokenization,
                queue,
                inference,
            };
            let _ = item.reply.send(Ok(scored));
        }
        Ok(())
    }

    /// Takes on something to write.
    pub(super) fn write(&mut self, device: &Device<'_, B>, mut item: WriteItem) {
        let Wanted::Text { request, .. } = &mut item.wanted else {
            return self.choices.push_back((None, item));
        };
        let request = request.clone();
        let generator = match &mut self.generator {
            Some(generator) => generator,
            none => {
                let seqs = device.inner.config.max_num_seqs.max(1);
                let options = GeneratorOptions {
                    prefix: Vec::new(),
                    kv_rows: seqs * device.max_model_len,
                    max_tokens: device.step_rows,
                    max_sequences: seqs,
                };
                let tokenizer = self.served.tokenizer().clone();
                match Generator::new(device.backend, device.model, self.lora.as_ref(), tokenizer, options) {
                    Ok(generator) => none.insert(generator),
                    Err(e) => return item.fail(device.inner, "failed", Failure::Device(e.to_string())),
                }
            }
        };
        match generator.add(request) {
            Ok(id) => {
                self.writing.insert(id, Writing { item, first: true });
            }
            Err(e) => item.fail(device.inner, "invalid", Failure::Invalid(e.to_string())),
        }
    }

    pub(super) fn is_writing(&self) -> bool {
        !self.writing.is_empty() || !self.choices.is_empty()
    }

    /// One step of everything that is being written.
    pub(super) fn step(&mut self, device: &Device<'_, B>) {
        self.drop_unwanted(device.inner);
        self.step_choice(device);
        let m = &device.inner.measures;
        let Some(generator) = self.generator.as_mut().filter(|_| !self.writing.is_empty()) else { return };
        let events = match generator.step(device.backend, device.model, self.lora.as_ref()) {
            Ok(events) => events,
            Err(e) => {
                // The same step would fail again.
                self.generator = None;
                for (_, writing) in self.writing.drain() {
                    writing.item.fail(device.inner, "failed", Failure::Device(e.to_string()));
                }
                return;
            }
        };
        for event in events {
            let (id, finish) = (event.id, event.finish);
            m.generated_tokens.inc();
            if let Some(writing) = self.writing.get_mut(&id) {
                if std::mem::take(&mut writing.first) {
                    m.first_token.observe(writing.item.came.elapsed().as_secs_f64());
                }
                if let Wanted::Text { reply, .. } = &writing.item.wanted {
                    let _ = reply.send(Ok(event));
                }
            }
            if let Some(finish) = finish {
                m.generation(finish.name());
                self.writing.remove(&id);
            }
        }
    }

    fn step_choice(&mut self, device: &Device<'_, B>) {
        let Some((mut choice, item)) = self.choices.pop_front() else { return };
        let Wanted::Choice { prompt, choices, .. } = &item.wanted else { return };
        let lora = self.lora.as_ref();
        let mut advance = || {
            let running = match &mut choice {
                Some(running) => running,
                none => none.insert(Choice::new(
                    device.backend,
                    device.model,
                    lora,
                    prompt.clone(),
                    choices.clone(),
                    device.step_rows,
                )?),
            };
            running.step(device.backend, device.model, lora)
        };
        match advance() {
            Ok(None) => self.choices.push_back((choice, item)),
            Ok(Some(log_probabilities)) => {
                device.inner.measures.generation("choice");
                if let Wanted::Choice { reply, .. } = item.wanted {
                    let _ = reply.send(Ok(log_probabilities));
                }
            }
            Err(e) => item.fail(device.inner, "failed", Failure::Device(e.to_string())),
        }
    }

    /// Ends what nobody waits for, and what has taken too long.
    fn drop_unwanted(&mut self, inner: &Inner) {
        let is_over = |item: &WriteItem| item.is_left() || item.is_late();
        let over: Vec<SequenceId> = self.writing.iter().filter(|(_, w)| is_over(&w.item)).map(|(id, _)| *id).collect();
        for id in over {
            if let Some(generator) = &mut self.generator {
                generator.remove(id);
            }
            if let Some(writing) = self.writing.remove(&id) {
                end(inner, writing.item);
            }
        }
        for (choice, item) in std::mem::take(&mut self.choices) {
            if is_over(&item) { end(inner, item) } else { self.choices.push_back((choice, item)) }
        }
    }
}

/// Says why it is over.
pub(super) fn end(inner: &Inner, item: WriteItem) {
    let seconds = if item.timeout == Duration::MAX { 0.0 } else { item.timeout.as_secs_f64() };
    let outcome = if item.is_left() { "dropped" } else { "expired" };
    item.fail(inner, outcome, Failure::Deadline { seconds });
}
