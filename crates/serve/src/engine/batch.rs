//! What waits: texts for a batch, and texts to be written. Dropping one gives its place back and tells its caller.

use std::sync::Arc;
use std::time::{Duration, Instant};

use cashtag_http::metrics::Number;
use cashtag_llama::generate::{Event, Request};
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};

use super::admission::Ticket;
use super::{Failure, Inner, Scored, Served};

/// A text on its way to an answer.
pub(crate) struct TextItem {
    /// Kept: the answer gives it back.
    pub(crate) text: String,
    /// Empty until the tokenizer's thread has seen it.
    pub(crate) prompt: Vec<u32>,
    pub(crate) served: Arc<Served>,
    pub(crate) strict: bool,
    pub(crate) timeout: Option<Duration>,
    pub(crate) came: Instant,
    /// When the prompt was made, and how long that took.
    pub(crate) tokenized: Instant,
    pub(crate) tokenization: Duration,
    pub(crate) reply: oneshot::Sender<Result<Scored, Failure>>,
    pub(crate) _ticket: Ticket,
}

impl TextItem {
    /// Nobody waits for it any more, or not for much longer; the item if it is still wanted.
    pub(crate) fn wanted(self, inner: &Inner) -> Option<Self> {
        if self.reply.is_closed() {
            inner.measures.text(&self.served.name, "dropped");
            return None;
        }
        if let Some(timeout) = self.timeout.filter(|t| self.came.elapsed() >= *t) {
            self.fail(inner, "expired", Failure::Deadline { seconds: timeout.as_secs_f64() });
            return None;
        }
        Some(self)
    }

    pub(crate) fn fail(self, inner: &Inner, outcome: &str, failure: Failure) {
        inner.measures.text(&self.served.name, outcome);
        // A caller that has left needs no answer.
        let _ = self.reply.send(Err(failure));
    }
}

/// Makes prompts of texts, one after the other, until the sender is gone.
pub(crate) fn tokenize(inner: &Inner, texts: std::sync::mpsc::Receiver<TextItem>) {
    for item in texts {
        let Some(mut item) = item.wanted(inner) else { continue };
        let started = Instant::now();
        let format = if item.strict { &item.served.strict } else { &item.served.cutting };
        match format.prompt(&item.text) {
            Ok(prompt) => {
                item.prompt = prompt;
                item.tokenization = started.elapsed();
                item.tokenized = Instant::now();
                inner.measures.tokenization.observe(item.tokenization.as_secs_f64());
                let mut queue = inner.queue();
                queue.texts.push_back(item);
                inner.measures.queued.set(queue.texts.len() as u64);
                drop(queue);
                inner.wake();
            }
            Err(e) => item.fail(inner, "invalid", Failure::Invalid(e.to_string())),
        }
    }
}

/// A place among the texts that are written.
pub(crate) struct WriteTicket {
    running: Arc<Number>,
    _permit: OwnedSemaphorePermit,
}

impl WriteTicket {
    pub(crate) fn new(running: &Arc<Number>, permit: OwnedSemaphorePermit) -> Self {
        running.inc();
        Self { running: running.clone(), _permit: permit }
    }
}

impl Drop for WriteTicket {
    fn drop(&mut self) {
        self.running.add(u64::MAX); // wraps: minus one
    }
}

/// What is to be written.
pub(crate) enum Wanted {
    Text {
        request: Request,
        reply: mpsc::UnboundedSender<Result<Event, Failure>>,
    },
    /// The log-probability of each of these answers.
    Choice {
        prompt: Vec<u32>,
        choices: Vec<Vec<u32>>,
        reply: oneshot::Sender<Result<Vec<f32>, Failure>>,
    },
}

pub(crate) struct WriteItem {
    pub(crate) served: Arc<Served>,
    pub(crate) came: Instant,
    pub(crate) timeout: Duration,
    pub(crate) wanted: Wanted,
    pub(crate) _ticket: WriteTicket,
}

impl WriteItem {
    pub(crate) fn is_late(&self) -> bool {
        self.came.elapsed() >= self.timeout
    }

    pub(crate) fn is_left(&self) -> bool {
        match &self.wanted {
            Wanted::Text { reply, .. } => reply.is_closed(),
            Wanted::Choice { reply, .. } => reply.is_closed(),
        }
    }

    pub(crate) fn fail(self, inner: &Inner, outcome: &str, failure: Failure) {
        inner.measures.generation(outcome);
        match self.wanted {
            Wanted::Text { reply, .. } => drop(reply.send(Err(failure))),
            Wanted::Choice { reply, .. } => drop(reply.send(Err(failure))),
        }
    }
}
