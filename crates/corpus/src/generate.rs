//! Labelled tweets from a chat model: quotas, concurrency, duplicates, budget, and a journal of every answer.
//!
//! The run is a row of numbered slots, one tweet each. What slot *i* asks for depends on the seed and on what became of
//! the slots up to *i − window*; what becomes of it depends on its answers and on the slots before it, because a tweet
//! that nearly repeats an earlier one is asked for again. Slots are settled in order, answers arrive in any order, so the
//! result is a function of the seed and the answers alone, whatever the concurrency:
//!
//! ```text
//! slot      0 1 2 3 4 5 6 7 8 9 …
//!           settled   | answered or under way, at most `window` of them | not yet asked
//! ```
//!
//! The journal keeps every answer under (slot, ask) before it is looked at. A run that is started again with the same
//! options finds its answers there, comes to the same results without asking, and goes on where it was.

mod slots;
mod worker;

use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize};
use std::sync::{Mutex, mpsc};
use std::time::Duration;

use serde_json::{Map, Value, json};

use crate::budget::{Budget, Price, Reserve, Totals};
use crate::chat_api::{CallError, ChatClient, ChatRequest, Message};
use crate::error::{ApiError, Error, Result};
use crate::example::Example;
use crate::journal::{Entry, Journal, Reply};
use crate::recipe::{self, AnswerFormat, Quotas};
use slots::Slots;
use worker::{Job, Outcome as JobOutcome, Shared};

/// Answers in a row that could not be used, after which a run stops by itself.
const STUCK_AFTER: u32 = 20;
/// Slots in a row that got no answer, after which the server counts as down.
const DOWN_AFTER: u32 = 3;

/// Whether answers are asked for as JSON under a schema.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FormatChoice {
    /// As JSON, and where the server does not take that, as text.
    #[default]
    Auto,
    Json,
    Text,
}

#[derive(Clone, Debug)]
pub struct GenerateOptions {
    pub count: usize,
    pub seed: u64,
    /// What the model to be trained is for.
    pub task: String,
    pub model: String,
    pub temperature: f64,
    /// Earlier examples that are shown, at most.
    pub examples_shown: usize,
    /// Tokens of one answer, at most.
    pub max_answer_tokens: u32,
    /// `None`: the model chooses label and kind.
    pub quotas: Option<Quotas>,
    pub format: FormatChoice,
    /// Requests under way at a time.
    pub concurrency: usize,
    /// Similarity from which a tweet repeats an earlier one.
    pub near: f64,
    /// Answers that are asked for one tweet, at most.
    pub max_asks: u32,
    /// Limits of the whole run, earlier starts included.
    pub max_cost: Option<f64>,
    pub max_tokens: Option<u64>,
    pub price: Option<Price>,
    /// Whether to have a system message written, and with how many tokens.
    pub system_message_tokens: Option<u32>,
}

impl Default for GenerateOptions {
    fn default() -> Self {
        Self {
            count: 100,
            seed: 0,
            task: recipe::TASK_PROMPT.into(),
            model: "gpt-4".into(),
            temperature: 0.5,
            examples_shown: 8,
            max_answer_tokens: 1000,
            quotas: Some(Quotas::default()),
            format: FormatChoice::Auto,
            concurrency: 4,
            near: 0.6,
            max_asks: 5,
            max_cost: None,
            max_tokens: None,
            price: None,
            system_message_tokens: Some(500),
        }
    }
}

/// How far a run may be ahead of the slots that are settled, at most.
const LONGEST_WINDOW: u64 = 256;

impl GenerateOptions {
    /// How far a request may run ahead of the slots that are settled. A power of two of at least 16, so that small changes
    /// of the concurrency ask for the same things; a journal that was begun keeps its own, so that the concurrency may be
    /// changed on the way without asking for other things.
    fn window(&self, journal: &Path) -> u64 {
        let recorded = crate::journal::recorded_setting(journal, "window").and_then(|window| window.as_u64());
        recorded
            .filter(|window| (1..=LONGEST_WINDOW).contains(window))
            .unwrap_or(self.concurrency.max(16).next_power_of_two() as u64)
    }

    /// What decides the requests and their evaluation: what a journal belongs to. Neither the number of tweets nor the
    /// limits are in it, so a run can be extended.
    fn settings(&self, window: u64) -> Map<String, Value> {
        let quotas = self.quotas.as_ref().map(|quotas| {
            let kinds: Map<String, Value> =
                quotas.kinds.iter().map(|(kind, weight)| ((*kind).to_owned(), json!(weight))).collect();
            json!({"labels": quotas.labels, "kinds": kinds})
        });
        let settings = json!({
            "seed": self.seed, "model": self.model, "task": self.task, "temperature": self.temperature,
            "examples_shown": self.examples_shown, "max_answer_tokens": self.max_answer_tokens, "quotas": quotas,
            "near": self.near, "window": window,
        });
        match settings {
            Value::Object(settings) => settings,
            _ => Map::new(),
        }
    }

    fn check(&self) -> Result<()> {
        let in_range = |name: &str, ok: bool, expected: &str, found: String| {
            if ok { Ok(()) } else { Err(Error::usage(format!("{name}: expected {expected}, found {found}"))) }
        };
        in_range("count", self.count >= 1, "at least 1", self.count.to_string())?;
        in_range(
            "concurrency",
            (1..=LONGEST_WINDOW as usize).contains(&self.concurrency),
            "1 to 256",
            self.concurrency.to_string(),
        )?;
        in_range("temperature", (0.0..=2.0).contains(&self.temperature), "0 to 2", self.temperature.to_string())?;
        in_range("max_answer_tokens", self.max_answer_tokens >= 1, "at least 1", self.max_answer_tokens.to_string())?;
        in_range("near", self.near > 0.0 && self.near <= 1.0, "above 0, at most 1", self.near.to_string())?;
        in_range("max_asks", self.max_asks >= 1, "at least 1", self.max_asks.to_string())
    }
}

/// What happens in a run, as it happens. Called from several threads.
pub trait Progress: Sync {
    fn event(&self, event: &Event<'_>);

    /// Whether to end now: nothing more is asked, and what is under way is waited for, because it is paid for.
    fn stop_asked(&self) -> bool {
        false
    }
}

/// For those who do not want to know.
impl Progress for () {
    fn event(&self, _: &Event<'_>) {}
}

#[derive(Debug)]
pub enum Event<'a> {
    /// The journal has been read: so many answers were already there.
    Started { count: usize, answers: usize },
    /// Tweet number `slot` is settled; `done` of `count` are.
    Accepted { slot: u64, done: usize, example: &'a Example, totals: &'a Totals },
    /// An answer is not used.
    Rejected { slot: u64, reason: &'a str, totals: &'a Totals },
    /// An attempt failed; the next one comes after `pause`, if there is one.
    Failed { problem: &'a str, pause: Option<Duration> },
    /// Something that the user should read.
    Note(&'a str),
}

/// Why a run ended before all tweets were written.
#[derive(Clone, Debug, PartialEq)]
pub enum Stop {
    /// The next request would not have fitted into the limits.
    Budget,
    /// The model keeps giving answers that cannot be used; the last reason.
    Stuck(String),
    /// The server does not answer; the last problem.
    Down(ApiError),
    /// [`Progress::stop_asked`].
    Asked,
}

#[derive(Clone, Debug, Default, PartialEq)]
pub struct Outcome {
    /// The accepted tweets in the order of their slots.
    pub examples: Vec<Example>,
    pub system_message: Option<String>,
    pub totals: Totals,
    /// Reasons of rejection, with how often each occurred.
    pub rejected: std::collections::BTreeMap<String, u64>,
    /// Slots for which all permitted answers were rejected.
    pub given_up: usize,
    /// Slots that got no answer this time; the same command asks again.
    pub unanswered: usize,
    pub stop: Option<Stop>,
}

/// Runs to the end, or as far as it can; see the module.
///
/// # Errors
///
/// If the options make no sense, the journal cannot be used or written, or the server refuses the requests (a wrong key:
/// at once). Everything that was answered until then is in the journal.
pub fn generate(
    client: &ChatClient,
    options: &GenerateOptions,
    journal_path: &Path,
    progress: &dyn Progress,
) -> Result<Outcome> {
    options.check()?;
    let mut budget = Budget::new(options.max_cost, options.max_tokens, options.price)?;
    let window = options.window(journal_path);
    let (journal, entries) = Journal::open(journal_path, &options.settings(window))?;
    let past = Past::of(entries, &mut budget);
    progress.event(&Event::Started { count: options.count, answers: past.replies.len() });
    let shared = Shared {
        client,
        options,
        progress,
        journal: Mutex::new(journal),
        budget: Mutex::new(budget),
        structured: AtomicBool::new(options.format != FormatChoice::Text),
        shown_limit: AtomicUsize::new(options.examples_shown),
    };
    let system_message = match (past.system_message.clone(), options.system_message_tokens) {
        (Some(reply), _) => usable_system_message(&reply),
        (None, Some(max_tokens)) => ask_for_system_message(&shared, max_tokens)?,
        (None, None) => None,
    };
    let mut run = Run {
        slots: Slots::new(options, window, past),
        shared: &shared,
        under_way: 0,
        unanswered_in_a_row: 0,
        rejected_in_a_row: 0,
        stop: None,
        fatal: None,
    };
    run.go()?;
    let Run { slots, stop, fatal, .. } = run;
    if let Some(error) = fatal {
        return Err(error);
    }
    if let (Some(Stop::Down(error)), true) = (&stop, slots.accepted().is_empty()) {
        return Err(error.clone().into());
    }
    let totals = shared.budget().totals().clone();
    Ok(Outcome { system_message, totals, stop, ..slots.into_outcome() })
}

/// What the journal already holds.
struct Past {
    replies: HashMap<(u64, u32), Reply>,
    rejected: std::collections::HashSet<(u64, u32)>,
    accepted: std::collections::HashSet<u64>,
    system_message: Option<Reply>,
}

impl Past {
    fn of(entries: Vec<Entry>, budget: &mut Budget) -> Self {
        let mut past = Self {
            replies: HashMap::new(),
            rejected: Default::default(),
            accepted: Default::default(),
            system_message: None,
        };
        for entry in entries {
            match entry {
                Entry::Run { .. } => {}
                Entry::Answer { slot, ask, reply } => {
                    budget.spend(reply.prompt_tokens, reply.completion_tokens);
                    past.replies.entry((slot, ask)).or_insert(reply);
                }
                Entry::Rejected { slot, ask, .. } => drop(past.rejected.insert((slot, ask))),
                Entry::Accepted { slot, .. } => drop(past.accepted.insert(slot)),
                Entry::Failed { prompt_tokens, completion_tokens, .. } => {
                    budget.spend(prompt_tokens, completion_tokens)
                }
                Entry::SystemMessage { reply } => {
                    budget.spend(reply.prompt_tokens, reply.completion_tokens);
                    past.system_message.get_or_insert(reply);
                }
            }
        }
        past
    }
}

/// The coordinating thread's view of a run.
struct Run<'a> {
    slots: Slots<'a>,
    shared: &'a Shared<'a>,
    under_way: usize,
    unanswered_in_a_row: u32,
    rejected_in_a_row: u32,
    stop: Option<Stop>,
    fatal: Option<Error>,
}

impl Run<'_> {
    fn go(&mut self) -> Result<()> {
        let (jobs, job_queue) = mpsc::channel::<Job>();
        let (outcomes, outcome_queue) = mpsc::channel::<(u64, u32, JobOutcome)>();
        let job_queue = Mutex::new(job_queue);
        let shared = self.shared;
        std::thread::scope(|scope| {
            for _ in 0..shared.options.concurrency.min(shared.options.count) {
                let (outcomes, job_queue) = (outcomes.clone(), &job_queue);
                scope.spawn(move || worker::work(shared, job_queue, &outcomes));
            }
            drop(outcomes);
            let result = self.coordinate(&jobs, &outcome_queue);
            // Closing the queue ends the threads; those that are waiting to try again are told.
            drop(jobs);
            if result.is_err() || self.fatal.is_some() {
                shared.client.cancel();
            }
            result
        })
    }

    fn coordinate(
        &mut self,
        jobs: &mpsc::Sender<Job>,
        outcomes: &mpsc::Receiver<(u64, u32, JobOutcome)>,
    ) -> Result<()> {
        loop {
            for verdict in self.slots.advance() {
                self.record(verdict)?;
            }
            if self.stop.is_none() && self.fatal.is_none() {
                self.send(jobs);
            }
            if self.under_way == 0 {
                return Ok(());
            }
            let (slot, ask, outcome) = match outcomes.recv_timeout(Duration::from_millis(100)) {
                Ok(outcome) => outcome,
                Err(mpsc::RecvTimeoutError::Timeout) => {
                    self.stop_if_asked();
                    continue;
                }
                Err(mpsc::RecvTimeoutError::Disconnected) => return Ok(()),
            };
            self.stop_if_asked();
            self.under_way -= 1;
            match outcome {
                JobOutcome::Answered(reply) => {
                    self.unanswered_in_a_row = 0;
                    self.slots.answered(slot, ask, reply);
                }
                JobOutcome::Unanswered(error) => {
                    self.unanswered_in_a_row += 1;
                    self.slots.unanswered(slot);
                    if self.unanswered_in_a_row >= DOWN_AFTER {
                        self.stop.get_or_insert(Stop::Down(error));
                    }
                }
                JobOutcome::Broke(error) => {
                    // Said once: the others under way will run into the same.
                    self.fatal.get_or_insert(error);
                    self.shared.client.cancel();
                }
                JobOutcome::Cancelled => self.slots.unanswered(slot),
            }
        }
    }

    fn stop_if_asked(&mut self) {
        if self.stop.is_none() && self.shared.progress.stop_asked() {
            self.stop = Some(Stop::Asked);
            // Those that wait to try again need not.
            self.shared.client.cancel();
        }
    }

    /// Sends what is wanted, lowest slot first, as far as concurrency and budget allow.
    fn send(&mut self, jobs: &mpsc::Sender<Job>) {
        while self.under_way < self.shared.options.concurrency {
            let Some(mut job) = self.slots.next_job() else { return };
            job.reserve = Reserve {
                prompt_tokens: self.shared.request(&job).estimated_prompt_tokens(),
                completion_tokens: self.shared.options.max_answer_tokens.into(),
            };
            if !self.shared.budget().reserve(job.reserve) {
                self.slots.put_back(&job);
                if self.under_way == 0 {
                    self.stop = Some(Stop::Budget);
                }
                return;
            }
            if jobs.send(job).is_err() {
                return;
            }
            self.under_way += 1;
        }
    }

    fn record(&mut self, verdict: slots::Verdict) -> Result<()> {
        let totals = self.shared.budget().totals().clone();
        match verdict {
            slots::Verdict::Accepted { slot, ask, example, fresh } => {
                self.rejected_in_a_row = 0;
                if fresh {
                    self.shared.journal().append(&Entry::Accepted { slot, ask, example: Example::clone(&example) })?;
                }
                let done = self.slots.accepted().len();
                self.shared.progress.event(&Event::Accepted { slot, done, example: &example, totals: &totals });
            }
            slots::Verdict::Rejected { slot, ask, reason, fresh } => {
                if fresh {
                    self.shared.journal().append(&Entry::Rejected { slot, ask, reason: reason.clone() })?;
                    self.rejected_in_a_row += 1;
                    if self.rejected_in_a_row >= STUCK_AFTER {
                        self.stop.get_or_insert(Stop::Stuck(reason.clone()));
                    }
                }
                self.shared.progress.event(&Event::Rejected { slot, reason: &reason, totals: &totals });
            }
        }
        Ok(())
    }
}

/// The second call of the recipe. Whatever comes back is journalled; what is no system message is not used.
fn ask_for_system_message(shared: &Shared<'_>, max_tokens: u32) -> Result<Option<String>> {
    let request = ChatRequest {
        model: shared.options.model.clone(),
        messages: vec![
            Message { role: "system", content: recipe::system_message_request().into() },
            Message { role: "user", content: shared.options.task.clone() },
        ],
        temperature: shared.options.temperature,
        max_tokens,
        response_format: None,
    };
    let reserve =
        Reserve { prompt_tokens: request.estimated_prompt_tokens(), completion_tokens: u64::from(max_tokens) };
    if !shared.budget().reserve(reserve) {
        shared.progress.event(&Event::Note("the budget does not allow for a system message: the usual one is used"));
        return Ok(None);
    }
    let answer = shared.ask(&request, None, reserve);
    shared.budget().release(reserve);
    let reply = match answer {
        Ok(reply) => reply,
        Err(CallError::GaveUp(error) | CallError::Fatal(error) | CallError::ContextTooLong(error)) => {
            return Err(error.into());
        }
        Err(CallError::NoResponseFormat | CallError::Cancelled) => return Ok(None),
    };
    shared.budget().spend(reply.prompt_tokens, reply.completion_tokens);
    shared.journal().append(&Entry::SystemMessage { reply: reply.clone() })?;
    let message = usable_system_message(&reply);
    if message.is_none() {
        shared.progress.event(&Event::Note("the model wrote no usable system message: the usual one is used"));
    }
    Ok(message)
}

/// The system message of a reply: not empty, not cut off, no longer than a page.
pub(crate) fn usable_system_message(reply: &Reply) -> Option<String> {
    let message = reply.content.as_deref()?.trim().trim_matches(['"', '`', '“', '”']).trim();
    let cut = reply.finish_reason.as_deref() == Some("length");
    let usable = !message.is_empty() && message.len() <= 4_000 && !cut && reply.refusal.is_none();
    usable.then(|| message.to_owned())
}

/// The messages of the request for one tweet.
fn messages(options: &GenerateOptions, job: &Job, format: AnswerFormat, shown: usize) -> Vec<Message> {
    let mut messages = vec![Message { role: "system", content: recipe::generation_system(&options.task, format) }];
    for example in job.shown.iter().take(shown) {
        messages.push(Message { role: "assistant", content: recipe::shown_example(example, format) });
    }
    let request = recipe::generation_request(job.wish.as_ref(), job.rejected_because.as_deref());
    messages.push(Message { role: "user", content: request });
    messages
}
