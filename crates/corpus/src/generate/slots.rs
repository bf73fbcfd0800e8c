//! The row of slots: a state machine that is fed answers and says what to ask next. No threads, no clock, no network, so
//! that the same answers always lead to the same result.

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};

use super::worker::Job;
use super::{GenerateOptions, Outcome, Past};
use crate::budget::Reserve;
use crate::clean::{CleanOptions, clean_text};
use crate::example::Example;
use crate::journal::Reply;
use crate::judged::judged_near;
use crate::minhash::Sketch;
use crate::near::NearIndex;
use crate::parse::parse_answer;
use crate::recipe::Wish;
use crate::rng::Rng;

/// The longest text that is taken for a tweet.
const MAX_CHARACTERS: usize = 500;

enum State {
    /// A request is wanted or under way; the reason is why the answer before was not used.
    Asking {
        because: Option<String>,
    },
    /// An answer that is good in itself.
    Ready {
        ask: u32,
        example: Box<Example>,
    },
    GivenUp,
    Unanswered,
}

/// What became of an answer. `fresh`: the journal does not say so yet.
pub(super) enum Verdict {
    Accepted { slot: u64, ask: u32, example: Box<Example>, fresh: bool },
    Rejected { slot: u64, ask: u32, reason: String, fresh: bool },
}

pub(super) struct Slots<'a> {
    options: &'a GenerateOptions,
    window: u64,
    wishes: Vec<Wish>,
    states: HashMap<u64, State>,
    /// Slots below are settled.
    settled: u64,
    /// Slots from here on have not been opened.
    opened: u64,
    /// Accepted examples with their slots, in order.
    accepted: Vec<(u64, Example)>,
    index: NearIndex,
    /// Answers that wait to be looked at.
    arrived: VecDeque<(u64, u32, Reply)>,
    /// Asks that wait to be sent.
    wanted: BTreeSet<(u64, u32)>,
    replies: HashMap<(u64, u32), Reply>,
    known_rejected: HashSet<(u64, u32)>,
    known_accepted: HashSet<u64>,
    rejected: std::collections::BTreeMap<String, u64>,
    given_up: usize,
    unanswered: usize,
}

impl<'a> Slots<'a> {
    pub(super) fn new(options: &'a GenerateOptions, window: u64, past: Past) -> Self {
        let wishes = options.quotas.as_ref().map(|quotas| quotas.wishes(options.count, options.seed));
        Self {
            options,
            window,
            wishes: wishes.unwrap_or_default(),
            states: HashMap::new(),
            settled: 0,
            opened: 0,
            accepted: Vec::new(),
            index: NearIndex::default(),
            arrived: VecDeque::new(),
            wanted: BTreeSet::new(),
            replies: past.replies,
            known_rejected: past.rejected,
            known_accepted: past.accepted,
            rejected: Default::default(),
            given_up: 0,
            unanswered: 0,
        }
    }

    pub(super) fn accepted(&self) -> &[(u64, Example)] {
        &self.accepted
    }

    pub(super) fn answered(&mut self, slot: u64, ask: u32, reply: Reply) {
        self.arrived.push_back((slot, ask, reply));
    }

    pub(super) fn unanswered(&mut self, slot: u64) {
        self.states.insert(slot, State::Unanswered);
    }

    /// Draws all conclusions that can be drawn now.
    pub(super) fn advance(&mut self) -> Vec<Verdict> {
        let mut verdicts = Vec::new();
        loop {
            while let Some((slot, ask, reply)) = self.arrived.pop_front() {
                self.look_at(slot, ask, &reply, &mut verdicts);
            }
            self.settle(&mut verdicts);
            let window_end = (self.settled + self.window).min(self.options.count as u64);
            if self.arrived.is_empty() {
                while self.opened < window_end {
                    let slot = self.opened;
                    self.opened += 1;
                    self.want(slot, 0, None);
                }
            }
            if self.arrived.is_empty() {
                return verdicts;
            }
        }
    }

    fn want(&mut self, slot: u64, ask: u32, because: Option<String>) {
        self.states.insert(slot, State::Asking { because });
        match self.replies.remove(&(slot, ask)) {
            Some(reply) => self.arrived.push_back((slot, ask, reply)),
            None => drop(self.wanted.insert((slot, ask))),
        }
    }

    /// What can be said of an answer without knowing the other slots.
    fn look_at(&mut self, slot: u64, ask: u32, reply: &Reply, verdicts: &mut Vec<Verdict>) {
        match self.example_of(slot, reply) {
            Ok(example) => drop(self.states.insert(slot, State::Ready { ask, example: Box::new(example) })),
            Err(reason) => self.reject(slot, ask, reason, verdicts),
        }
    }

    fn example_of(&self, slot: u64, reply: &Reply) -> Result<Example, String> {
        if reply.refusal.is_some() || reply.finish_reason.as_deref() == Some("content_filter") {
            return Err("the model refused".into());
        }
        let content = reply.content.as_deref().ok_or("the answer is empty")?;
        let parsed = parse_answer(content).map_err(|problem| {
            let cut = reply.finish_reason.as_deref() == Some("length");
            // The first line only: hints about flags are for people.
            let mut problem = problem.lines().next().unwrap_or_default().to_owned();
            if problem.starts_with("expected `label") {
                // What a text file would need; the model was asked for another form.
                problem = "the answer is not in the form that was asked for".into();
            }
            if cut { format!("the answer was cut off ({problem})") } else { problem }
        })?;
        let mut example = Example::new(clean_text(&parsed.text, &CleanOptions::default()), parsed.label);
        let length = example.text.chars().count();
        if length > MAX_CHARACTERS {
            return Err(format!("the text has {length} characters, a tweet has at most 280"));
        }
        if crate::clean::normalised_key(&example.text).is_empty() {
            return Err("the text holds no words".into());
        }
        if judged_near(&example.text).is_some() {
            return Err("the text copies one of the sentences that models are judged by".into());
        }
        if let Some(wish) = self.wishes.get(slot as usize) {
            if example.label != wish.label {
                return Err(format!("the label is {}, asked for was {}", example.label, wish.label));
            }
            for (field, value) in
                [("kind", wish.kind), ("register", wish.register), ("sector", wish.sector), ("event", wish.event)]
            {
                example.set_optional_field(field, value.to_owned());
            }
        }
        Ok(example)
    }

    fn reject(&mut self, slot: u64, ask: u32, reason: String, verdicts: &mut Vec<Verdict>) {
        *self.rejected.entry(reason.clone()).or_default() += 1;
        if ask + 1 < self.options.max_asks {
            self.want(slot, ask + 1, Some(reason.clone()));
        } else {
            self.states.insert(slot, State::GivenUp);
        }
        let fresh = !self.known_rejected.contains(&(slot, ask));
        verdicts.push(Verdict::Rejected { slot, ask, reason, fresh });
    }

    /// Settles slots in order, as far as they are ready.
    fn settle(&mut self, verdicts: &mut Vec<Verdict>) {
        while self.settled < self.opened {
            let slot = self.settled;
            match self.states.remove(&slot) {
                Some(State::Ready { ask, example }) => {
                    let sketch = Sketch::of(&example.text);
                    if self.index.nearest(&sketch, self.options.near).is_some() {
                        self.reject(slot, ask, "the text nearly repeats an earlier one".into(), verdicts);
                        continue;
                    }
                    self.index.insert(sketch);
                    self.accepted.push((slot, Example::clone(&example)));
                    let fresh = !self.known_accepted.contains(&slot);
                    verdicts.push(Verdict::Accepted { slot, ask, example, fresh });
                }
                Some(State::GivenUp) => self.given_up += 1,
                Some(State::Unanswered) => self.unanswered += 1,
                Some(asking @ State::Asking { .. }) => {
                    self.states.insert(slot, asking);
                    return;
                }
                None => return,
            }
            self.settled += 1;
        }
    }

    /// The next request to send, lowest slot first.
    pub(super) fn next_job(&mut self) -> Option<Job> {
        let (slot, ask) = self.wanted.pop_first()?;
        let rejected_because = match self.states.get(&slot) {
            Some(State::Asking { because }) => because.clone(),
            _ => None,
        };
        Some(Job {
            slot,
            ask,
            wish: self.wishes.get(slot as usize).cloned(),
            shown: self.shown(slot, ask),
            rejected_because,
            reserve: Reserve::default(),
        })
    }

    pub(super) fn put_back(&mut self, job: &Job) {
        self.wanted.insert((job.slot, job.ask));
    }

    /// Earlier examples to show: a random choice among the slots that are certainly settled when this one is asked.
    fn shown(&self, slot: u64, ask: u32) -> Vec<Example> {
        let Some(before) = (slot + 1).checked_sub(self.window) else { return Vec::new() };
        let mut earlier: Vec<&Example> =
            self.accepted.iter().take_while(|(other, _)| *other < before).map(|(_, example)| example).collect();
        let mut rng = Rng::keyed(self.options.seed, &[0x73_68_6F_77, slot, u64::from(ask)]);
        rng.shuffle(&mut earlier);
        earlier.into_iter().take(self.options.examples_shown).cloned().collect()
    }

    pub(super) fn into_outcome(self) -> Outcome {
        // Slots that were never settled count as unanswered too: the same command goes on with them.
        let open = self.options.count as u64 - self.settled;
        Outcome {
            examples: self.accepted.into_iter().map(|(_, example)| example).collect(),
            rejected: self.rejected,
            given_up: self.given_up,
            unanswered: self.unanswered + open as usize,
            ..Outcome::default()
        }
    }
}
