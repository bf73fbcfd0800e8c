//! The threads that ask. An answer is in the journal before anybody else hears of it.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, mpsc};

use super::{Event, FormatChoice, GenerateOptions, Progress, messages};
use crate::budget::{Budget, Reserve};
use crate::chat_api::{CallError, ChatClient, ChatRequest};
use crate::error::{ApiError, Error};
use crate::example::Example;
use crate::journal::{Entry, Journal, Reply};
use crate::recipe::{AnswerFormat, Wish, response_format};

/// One request for one tweet.
#[derive(Clone, Debug)]
pub(super) struct Job {
    pub(super) slot: u64,
    pub(super) ask: u32,
    pub(super) wish: Option<Wish>,
    /// Earlier examples, in the order in which they are shown.
    pub(super) shown: Vec<Example>,
    pub(super) rejected_because: Option<String>,
    pub(super) reserve: Reserve,
}

pub(super) enum Outcome {
    Answered(Reply),
    /// No answer this time.
    Unanswered(ApiError),
    /// There is no point in going on.
    Broke(Error),
    Cancelled,
}

/// What all threads of a run share.
pub(super) struct Shared<'a> {
    pub(super) client: &'a ChatClient,
    pub(super) options: &'a GenerateOptions,
    pub(super) progress: &'a dyn Progress,
    pub(super) journal: Mutex<Journal>,
    pub(super) budget: Mutex<Budget>,
    /// Ask for JSON under a schema; cleared when the server turns out not to take that.
    pub(super) structured: AtomicBool,
    /// Examples shown, at most; halved when the model's context turns out to be too short.
    pub(super) shown_limit: AtomicUsize,
}

impl Shared<'_> {
    pub(super) fn budget(&self) -> MutexGuard<'_, Budget> {
        self.budget.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn journal(&self) -> MutexGuard<'_, Journal> {
        self.journal.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The request for a job as it would be sent now.
    pub(super) fn request(&self, job: &Job) -> ChatRequest {
        let structured = self.structured.load(Ordering::Relaxed);
        let format = if structured { AnswerFormat::Json } else { AnswerFormat::Text };
        ChatRequest {
            model: self.options.model.clone(),
            messages: messages(self.options, job, format, self.shown_limit.load(Ordering::Relaxed)),
            temperature: self.options.temperature,
            max_tokens: self.options.max_answer_tokens,
            response_format: structured.then(|| response_format(job.wish.as_ref())),
        }
    }

    /// One call; failed attempts that may be charged for are counted and journalled at their upper bound.
    pub(super) fn ask(&self, request: &ChatRequest, slot: Option<u64>, reserve: Reserve) -> Result<Reply, CallError> {
        let number = slot.map_or(u64::MAX, |slot| slot);
        self.client.complete(request, number, &|failure| {
            let mut go_on = true;
            if failure.costly {
                let Reserve { prompt_tokens, completion_tokens } = reserve;
                let problem = failure.problem.clone();
                let entry = Entry::Failed { slot, problem, prompt_tokens, completion_tokens };
                go_on = self.journal().append(&entry).is_ok();
                let mut budget = self.budget();
                budget.spend(prompt_tokens, completion_tokens);
                // This request's own share is still set aside for the attempt that follows.
                go_on &= budget.fits(Reserve::default());
            }
            self.progress.event(&Event::Failed { problem: &failure.problem, pause: failure.pause });
            go_on
        })
    }

    fn perform(&self, job: &Job) -> Outcome {
        loop {
            let request = self.request(job);
            match self.ask(&request, Some(job.slot), job.reserve) {
                Ok(reply) => {
                    let entry = Entry::Answer { slot: job.slot, ask: job.ask, reply: reply.clone() };
                    if let Err(error) = self.journal().append(&entry) {
                        return Outcome::Broke(error);
                    }
                    self.budget().spend(reply.prompt_tokens, reply.completion_tokens);
                    return Outcome::Answered(reply);
                }
                Err(CallError::NoResponseFormat) => {
                    if self.options.format == FormatChoice::Json {
                        let message = "the server takes no response_format\n  hint: use --format auto or text";
                        return Outcome::Broke(ApiError::Setup(format!("{}: {message}", self.client.url())).into());
                    }
                    if self.structured.swap(false, Ordering::Relaxed) {
                        let note = "the server offers no structured output: asking for text";
                        self.progress.event(&Event::Note(note));
                    }
                }
                Err(CallError::ContextTooLong(error)) => {
                    let shown = job.shown.len().min(self.shown_limit.load(Ordering::Relaxed));
                    if shown == 0 {
                        return Outcome::Broke(error.into());
                    }
                    self.shown_limit.fetch_min(shown / 2, Ordering::Relaxed);
                    let note = format!("the model's context is short: showing at most {} earlier examples", shown / 2);
                    self.progress.event(&Event::Note(&note));
                }
                Err(CallError::GaveUp(error)) => return Outcome::Unanswered(error),
                Err(CallError::Fatal(error)) => return Outcome::Broke(error.into()),
                Err(CallError::Cancelled) => return Outcome::Cancelled,
            }
        }
    }
}

/// Works until the queue is closed.
pub(super) fn work(
    shared: &Shared<'_>,
    jobs: &Mutex<mpsc::Receiver<Job>>,
    outcomes: &mpsc::Sender<(u64, u32, Outcome)>,
) {
    loop {
        let next = jobs.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(job) = next else { return };
        let outcome = shared.perform(&job);
        shared.budget().release(job.reserve);
        if outcomes.send((job.slot, job.ask, outcome)).is_err() {
            return;
        }
    }
}
