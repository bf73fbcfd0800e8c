//! The engine's thread: owns model and device, and decides what is computed next.
//!
//! A turn is one batch of classification, if a text waits, and then one step of writing, if something is being written. So
//! neither waits for more than one turn of the other, and what a batch holds is whatever came in while the last turn ran:
//! there is no timer that a text would have to wait for.

use std::collections::VecDeque;
use std::sync::mpsc::channel;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use cashtag_backend::{Backend, Dtype};
use cashtag_llama::lora::Lora;

use super::batch::{TextItem, tokenize};
use super::slot::{Device, Slot, end};
use super::{Base, Command, Failure, Inner, Parts, Served, State};

/// The end of the engine that computes. Dropped without [`run`](Self::run), it leaves an engine that has ended.
pub struct Worker {
    inner: Arc<Inner>,
}

/// How long a turn waits when there is nothing to do; only so that clients that left are noticed.
const PATIENCE: Duration = Duration::from_secs(1);

impl Drop for Worker {
    fn drop(&mut self) {
        self.inner.set_state(State::Ended);
        self.inner.tokenizer.lock().unwrap_or_else(PoisonError::into_inner).take();
        // Whoever waits for one of these is told by its end.
        let mut queue = self.inner.queue();
        queue.texts.clear();
        queue.writes.clear();
        queue.commands.clear();
    }
}

impl Worker {
    pub(super) fn new(inner: Arc<Inner>) -> Self {
        Self { inner }
    }

    /// Serves a model until [`super::Engine::stop`]. Returns earlier only with an error.
    ///
    /// # Errors
    /// Prompts, adapters or caches that cannot be made. Errors of a batch are told to its callers and do not end the engine.
    pub fn run<B: Backend>(self, backend: B, parts: Parts<B>) -> cashtag_llama::Result<()> {
        let inner = self.inner.clone();
        let Parts { model, checkpoint, trained, name, prompting, adapters } = parts;
        let capabilities = backend.capabilities();
        let is_cpu = capabilities.device == "cpu";
        let batch_rows = inner.config.max_batch_tokens.unwrap_or(if is_cpu { 512 } else { 8192 });
        let max_model_len = inner.config.max_model_len.min(model.max_positions());
        let device = Device {
            backend: &backend,
            model: &model,
            inner: &inner,
            batch_rows,
            step_rows: if is_cpu { 64 } else { 512 },
            max_model_len,
        };
        let base = Arc::new(Served::new(&checkpoint, &prompting, &name, None, None, trained.as_ref())?);
        let mut slots = vec![Slot::new(base.clone(), None)];
        let mut served = vec![base];
        for (adapter_name, dir, adapter) in adapters {
            let trained = adapter.classifier.as_ref();
            let one = Served::new(&checkpoint, &prompting, &adapter_name, Some(&name), Some(&dir), trained)?;
            let one = Arc::new(one);
            let mut lora = Lora::new(&backend, adapter.lora, model.config(), &adapter.tensors, false)?;
            model.prepare(&backend, &mut lora)?;
            slots.push(Slot::new(one.clone(), Some(lora)));
            served.push(one);
        }
        let default = served.get(1).or(served.first()).cloned();
        // Warm: caches are made, and how long a row takes is known before the first text comes.
        let first = slots.len().min(2) - 1;
        for slot in slots.iter_mut().skip(first) {
            slot.prepare(&device)?;
        }
        warm(&device, &mut slots[first])?;
        let dtype = match backend.compute_dtype() {
            Dtype::F32 => "float32",
            Dtype::Bf16 => "bfloat16",
            _ => "float16",
        };
        let config = model.config().clone();
        let _ = inner.base.set(Base {
            checkpoint,
            config,
            prompting,
            name,
            device: capabilities.description,
            dtype,
            max_batch_tokens: batch_rows,
            max_model_len,
        });
        inner.change_models(|models| {
            models.default = default;
            models.by_name = served.into_iter().map(|s| (s.name.clone(), s)).collect();
        });
        let (sender, texts) = channel();
        *inner.tokenizer.lock().unwrap_or_else(PoisonError::into_inner) = Some(sender);
        let for_tokenizer = inner.clone();
        std::thread::Builder::new()
            .name("tokenizer".into())
            .spawn(move || tokenize(&for_tokenizer, texts))
            .map_err(|e| cashtag_llama::Error::Invalid(format!("no thread can be started: {e}")))?;
        inner.set_state(State::Ready);
        while turn(&device, &mut slots) {}
        Ok(())
    }
}

/// Runs one text, whose place in the queue nobody sees.
fn warm<B: Backend>(device: &Device<'_, B>, slot: &mut Slot<B>) -> cashtag_llama::Result<()> {
    const TEXT: &str = "Tech stocks are rallying after strong earnings reports.";
    for _ in 0..2 {
        let Ok(mut tickets) = device.inner.admission.enter(&[1], Duration::MAX) else { return Ok(()) };
        let (Some(ticket), (reply, _answer)) = (tickets.pop(), tokio::sync::oneshot::channel()) else { return Ok(()) };
        let now = Instant::now();
        let item = TextItem {
            text: String::new(),
            prompt: slot.served.cutting.prompt(TEXT)?,
            served: slot.served.clone(),
            strict: false,
            timeout: None,
            came: now,
            tokenized: now,
            tokenization: Duration::ZERO,
            reply,
            _ticket: ticket,
        };
        slot.classify(device, vec![item])?;
    }
    Ok(())
}

/// One turn; false when asked to end.
fn turn<B: Backend>(device: &Device<'_, B>, slots: &mut Vec<Slot<B>>) -> bool {
    let inner = device.inner;
    let mut queue = inner.queue();
    let is_writing = slots.iter().any(Slot::is_writing);
    while queue.texts.is_empty() && queue.writes.is_empty() && queue.commands.is_empty() && !queue.stop && !is_writing {
        queue = inner.wait(queue, PATIENCE);
    }
    if queue.stop {
        return false;
    }
    let commands = std::mem::take(&mut queue.commands);
    let writes = std::mem::take(&mut queue.writes);
    let texts = std::mem::take(&mut queue.texts);
    queue.texts = texts.into_iter().filter_map(|item| item.wanted(inner)).collect();
    let oldest = queue.texts.front().map(|item| item.served.clone());
    drop(queue);

    for command in commands {
        match command {
            Command::Add { served, adapter, done } => {
                let _ = done.send(add(device, slots, served, *adapter));
            }
            Command::Retire => {}
        }
    }
    for item in writes {
        if item.is_left() || item.is_late() {
            end(inner, item);
            continue;
        }
        match slots.iter_mut().find(|s| Arc::ptr_eq(&s.served, &item.served)) {
            Some(slot) => slot.write(device, item),
            None => item.fail(inner, "failed", Failure::Ended),
        }
    }
    if let Some(served) = oldest
        && let Some(slot) = slots.iter_mut().find(|s| Arc::ptr_eq(&s.served, &served))
    {
        classify(device, slot);
    }
    for slot in slots.iter_mut().filter(|s| s.is_writing()) {
        slot.step(device);
    }
    // What is no longer served, and nobody holds a text for, is given back. The first is the base model.
    let mut at = 0;
    slots.retain(|slot| {
        at += 1;
        at == 1 || slot.is_writing() || Arc::strong_count(&slot.served) > 1
    });
    true
}

fn classify<B: Backend>(device: &Device<'_, B>, slot: &mut Slot<B>) {
    let inner = device.inner;
    if let Err(e) = slot.prepare(device) {
        let mut queue = inner.queue();
        let all = std::mem::take(&mut queue.texts);
        let (own, others) = all.into_iter().partition(|item| Arc::ptr_eq(&item.served, &slot.served));
        queue.texts = others;
        drop(queue);
        let own: VecDeque<TextItem> = own;
        for item in own {
            item.fail(inner, "failed", Failure::Device(e.to_string()));
        }
        return;
    }
    let mut queue = inner.queue();
    let batch = slot.fill(&mut queue.texts);
    inner.measures.queued.set(queue.texts.len() as u64);
    drop(queue);
    // Its texts have been told.
    let _ = slot.classify(device, batch);
}

fn add<B: Backend>(
    device: &Device<'_, B>,
    slots: &mut Vec<Slot<B>>,
    served: Arc<Served>,
    adapter: cashtag_llama::adapter::Adapter,
) -> Result<(), Failure> {
    let failed = |e: cashtag_llama::Error| Failure::Device(e.to_string());
    let mut lora =
        Lora::new(device.backend, adapter.lora, device.model.config(), &adapter.tensors, false).map_err(failed)?;
    device.model.prepare(device.backend, &mut lora).map_err(failed)?;
    let mut slot = Slot::new(served, Some(lora));
    slot.prepare(device).map_err(failed)?;
    slots.push(slot);
    Ok(())
}
