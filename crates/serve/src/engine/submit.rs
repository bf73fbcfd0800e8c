//! Giving the engine something to do, and getting the answer, with or without an async runtime.

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::thread::Thread;
use std::time::{Duration, Instant};

use cashtag_llama::generate::{Event, Request};
use tokio::sync::{mpsc, oneshot};

use super::batch::{TextItem, Wanted, WriteItem, WriteTicket};
use super::{Engine, Failure, Served, State};

/// Who is served how when there is much to do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Lane {
    /// Refused at once when there is no room, and when the answer would be late.
    #[default]
    Interactive,
    /// Waits for room, takes only a bounded part of the queue, and has no deadline: streams and files.
    Background,
}

/// Texts to classify.
#[derive(Clone, Debug, Default)]
pub struct ClassifyRequest {
    /// The name of what is served; `None` is the default model.
    pub model: Option<String>,
    pub texts: Vec<String>,
    /// Whether a text that is too long is cut; `None` is the engine's setting.
    pub truncate: Option<bool>,
    /// `None` is the engine's setting.
    pub timeout: Option<Duration>,
    pub lane: Lane,
}

/// The answer to one text.
#[derive(Clone, Debug, PartialEq)]
pub struct Scored {
    /// The text itself, given back.
    pub text: String,
    /// log p(label | prompt) as the model gives it, in the order of [`Served::labels`].
    pub log_probabilities: Vec<f32>,
    /// The same over the labels only, with the adapter's temperature.
    pub probabilities: Vec<f32>,
    pub prompt_tokens: usize,
    /// Of these, how many the prefix cache had.
    pub cached_tokens: usize,
    pub tokenization: Duration,
    pub queue: Duration,
    /// The batch that the text was in.
    pub inference: Duration,
}

/// A text to be written: [`Engine::generate`].
pub struct GenerateRequest {
    pub served: Arc<Served>,
    pub request: Request,
    pub timeout: Option<Duration>,
}

/// The pieces of a text that is being written. Dropping it ends the writing.
pub struct Generation {
    events: mpsc::UnboundedReceiver<Result<Event, Failure>>,
}

impl Generation {
    /// The next token; `None` behind the last.
    ///
    /// # Errors
    /// The deadline, or a device that fails. It is the last thing that comes.
    pub async fn next(&mut self) -> Option<Result<Event, Failure>> {
        self.events.recv().await
    }
}

/// Rows that a text will take, from its bytes: some four bytes a token, and a little for branches.
fn estimate(text: &str, longest: usize) -> u64 {
    (text.len() / 4 + 8).min(longest) as u64
}

impl Engine {
    pub(crate) fn check_ready(&self) -> Result<(), Failure> {
        match self.state() {
            State::Ready => Ok(()),
            State::Loading => Err(Failure::Loading),
            State::Ended => Err(Failure::Ended),
        }
    }

    /// Classifies texts: answers in their order, and what was served. There is no timer here: a caller that wants its answer
    /// by a certain time stops waiting then, and texts whose deadline has passed are not computed.
    ///
    /// # Errors
    /// One text that has no answer is one for all: see [`Failure`].
    pub async fn classify(&self, request: ClassifyRequest) -> Result<(Arc<Served>, Vec<Scored>), Failure> {
        let served = self.find(request.model.as_deref())?;
        let config = self.config();
        let strict = !request.truncate.unwrap_or(config.auto_truncate);
        let longest = served.max_seq_length();
        let mut answers = Vec::with_capacity(request.texts.len().min(1 << 16));
        match request.lane {
            Lane::Interactive => {
                let (n, most) = (request.texts.len(), config.max_client_batch_size);
                if n > most {
                    return Err(Failure::TooManyTexts(n, most));
                }
                let timeout = request.timeout.unwrap_or(config.timeout);
                let rows: Vec<u64> = request.texts.iter().map(|t| estimate(t, longest)).collect();
                let tickets = self.inner.admission.enter(&rows, timeout).inspect_err(|_| {
                    self.inner.measures.texts.with(&[&served.name, "overloaded"]).add(n as u64);
                })?;
                for (text, ticket) in request.texts.into_iter().zip(tickets) {
                    answers.push(self.send(text, &served, strict, Some(timeout), ticket)?);
                }
            }
            Lane::Background => {
                for text in request.texts {
                    let rows = estimate(&text, longest);
                    let ticket = self.inner.admission.enter_background(rows).await?;
                    answers.push(self.send(text, &served, strict, request.timeout, ticket)?);
                }
            }
        }
        let mut scored = Vec::with_capacity(answers.len());
        for answer in answers {
            scored.push(answer.await.map_err(|_| Failure::Ended)??);
        }
        Ok((served, scored))
    }

    fn send(
        &self,
        text: String,
        served: &Arc<Served>,
        strict: bool,
        timeout: Option<Duration>,
        ticket: super::admission::Ticket,
    ) -> Result<oneshot::Receiver<Result<Scored, Failure>>, Failure> {
        let (reply, answer) = oneshot::channel();
        let now = Instant::now();
        let item = TextItem {
            text,
            prompt: Vec::new(),
            served: served.clone(),
            strict,
            timeout,
            came: now,
            tokenized: now,
            tokenization: Duration::ZERO,
            reply,
            _ticket: ticket,
        };
        let tokenizer = self.inner.tokenizer.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let sender = tokenizer.as_ref().ok_or(Failure::Ended)?;
        sender.send(item).map_err(|_| Failure::Ended)?;
        Ok(answer)
    }

    /// [`classify`](Self::classify) for threads without an async runtime.
    ///
    /// # Errors
    /// As there.
    pub fn classify_blocking(&self, request: ClassifyRequest) -> Result<(Arc<Served>, Vec<Scored>), Failure> {
        block_on(self.classify(request))
    }

    /// Tokens that a prompt and its answer may have together.
    pub fn max_model_len(&self) -> usize {
        self.inner.base.get().map_or(0, |b| b.max_model_len)
    }

    /// Begins to write a text.
    ///
    /// # Errors
    /// No room, or a prompt that leaves none for an answer.
    pub fn generate(&self, request: GenerateRequest) -> Result<Generation, Failure> {
        let GenerateRequest { served, request, timeout } = request;
        self.check_length(request.prompt.len(), request.max_new_tokens)?;
        let (reply, events) = mpsc::unbounded_channel();
        self.write(served, timeout, Wanted::Text { request, reply })?;
        Ok(Generation { events })
    }

    /// How likely each of some answers is: log p(answer | prompt), exactly, whatever tokens they have in common.
    ///
    /// # Errors
    /// No room, a prompt that is too long, a deadline, a device that fails.
    pub async fn choose(
        &self,
        served: Arc<Served>,
        prompt: Vec<u32>,
        choices: Vec<Vec<u32>>,
    ) -> Result<Vec<f32>, Failure> {
        self.check_length(prompt.len(), choices.iter().map(Vec::len).sum())?;
        let (reply, answer) = oneshot::channel();
        self.write(served, None, Wanted::Choice { prompt, choices, reply })?;
        answer.await.map_err(|_| Failure::Ended)?
    }

    fn check_length(&self, prompt: usize, new: usize) -> Result<(), Failure> {
        let most = self.max_model_len();
        if prompt == 0 || new == 0 {
            return Err(Failure::Invalid("a prompt and room for an answer are needed".into()));
        }
        if prompt.saturating_add(new) > most {
            return Err(Failure::Invalid(format!(
                "the prompt has {prompt} tokens and {new} are to be written, {most} are taken together; shorten one of them"
            )));
        }
        Ok(())
    }

    fn write(&self, served: Arc<Served>, timeout: Option<Duration>, wanted: Wanted) -> Result<(), Failure> {
        self.check_ready()?;
        let permit =
            self.inner.admission.enter_write().inspect_err(|_| self.inner.measures.generation("overloaded"))?;
        let ticket = WriteTicket::new(&self.inner.measures.running, permit);
        let timeout = timeout.unwrap_or(self.config().generation_timeout);
        self.inner.queue().writes.push_back(WriteItem {
            served,
            came: Instant::now(),
            timeout,
            wanted,
            _ticket: ticket,
        });
        self.inner.wake();
        Ok(())
    }
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// Runs a future that needs no runtime on this thread.
fn block_on<F: Future>(future: F) -> F::Output {
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    let mut context = Context::from_waker(&waker);
    let mut future = pin!(future);
    loop {
        match future.as_mut().poll(&mut context) {
            Poll::Ready(output) => return output,
            Poll::Pending => std::thread::park(),
        }
    }
}
