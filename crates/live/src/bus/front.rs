//! The bus as the pipeline's thread sees it: texts go out, answers come back, posts go to the partitions, sums come back.
//!
//! All that waits for the network is in tasks of the runtime; this side only looks at what they have brought.

mod tasks;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use async_nats::Subject;
use serde_json::{Value, json};
use tokio::runtime::Handle;
use tokio::sync::mpsc;

use super::connection::{Bus, shown};
use super::members::Members;
use super::publish::Outgoing;
use super::wire::{Answer, Beat, Chunk, Counted, Sums, Task, decode, encode};
use super::{BusOptions, Kind, random};
use crate::error::{Error, Result};
use crate::post::Post;
use crate::time::Millis;

/// Posts that are out for scoring at a time.
const ROOM: usize = 4_096;
/// They take at most this part of a stream. A stream that is full of later texts, or of answers to them, would keep out the one
/// that all wait for.
const PART: u64 = 4;
/// Bytes that a short text or an answer takes, with its subject and headers.
const AROUND: usize = 512;
/// Bytes of posts in one message; the server takes a megabyte.
const CHUNK_BYTES: usize = 400_000;
/// A text that was not answered for so long is sent again, if no scorer has it.
const PATIENCE: Duration = Duration::from_secs(10);
const LOOK: Duration = Duration::from_secs(2);

/// What the tasks bring.
pub(crate) enum Event {
    /// An answer, and its place in the stream.
    Answer(u64, Answer),
    /// Texts that are in the stream now: place in the log, place in the stream.
    Asked(Vec<(u64, u64)>),
    Sums(Sums, Option<Subject>),
    /// No scorer has any task.
    Idle,
    Fatal(String),
}

/// A post whose text is out for scoring.
struct Pending {
    seq: u64,
    post: Post,
    asked: Instant,
    attempt: u32,
    /// Place of its task in the stream.
    at: Option<u64>,
    /// The answer, and its place in the stream.
    answer: Option<(u64, Outcome)>,
}

type Outcome = Result<Vec<f32>, String>;

/// A partition of keys.
#[derive(Default)]
struct Partition {
    /// Chunks that are not in the stream yet.
    waiting: VecDeque<(Outgoing, u64)>,
    /// What the next chunk takes.
    posts: Vec<Counted>,
    bytes: usize,
    /// Posts before this record are in the stream.
    published: u64,
    /// What its owner has told: up to this record, and the watermark there.
    applied: Option<(u64, Millis)>,
    /// Its last message in the stream.
    last: u64,
}

impl Partition {
    fn is_settled(&self) -> bool {
        self.posts.is_empty() && self.waiting.is_empty() && self.applied.is_some_and(|a| a.0 >= self.published)
    }
}

/// What the tasks of the runtime and the pipeline's thread share.
pub(crate) struct Common {
    members: Mutex<Members>,
    beat: Mutex<Beat>,
    /// What is wrong at the moment.
    complaint: Mutex<Option<String>>,
    /// Tasks that wait, and tasks that scorers have.
    lag: Mutex<(u64, u64)>,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(crate) struct Front {
    bus: Bus,
    handle: Handle,
    options: BusOptions,
    version: String,
    epoch: u64,
    inbox: Receiver<Event>,
    outbox: mpsc::UnboundedSender<(u64, Outgoing)>,
    common: Arc<Common>,
    pending: VecDeque<Pending>,
    /// What those take in the stream, about.
    pending_bytes: u64,
    partitions: Vec<Partition>,
    /// Answers from before a restart, to posts that are not asked for yet.
    early: BTreeMap<u64, (u64, Outcome)>,
    /// Records before this were asked for.
    asked: u64,
    /// The newest task and the newest answer in their streams.
    newest: (u64, u64),
    chunks: u64,
    replies: Vec<Subject>,
    looked: Instant,
    cleared: Instant,
    shown: Instant,
}

impl Front {
    /// Connects, makes the streams, finds out what the partitions have, and starts the tasks.
    ///
    /// # Errors
    /// No server, no JetStream, streams of somebody else.
    pub(crate) fn open(options: BusOptions, version: String, log: String, handle: Handle) -> Result<Self> {
        let epoch = random()?;
        let (bus, partitions) = handle.block_on(async {
            let bus = Bus::connect(&options, "cashtag live").await?;
            bus.ensure(&options, &log).await?;
            bus.forget_other_scorers(&version).await;
            let mut partitions = Vec::new();
            for partition in 0..options.partitions {
                let (published, last) = bus.last_chunk(partition).await?;
                partitions.push(Partition { published, last, ..Partition::default() });
            }
            Ok::<_, Error>((bus, partitions))
        })?;
        let beat = Beat { epoch, log, closed: Millis::MIN, allowed_lateness: 0, owners: Vec::new() };
        let common = Arc::new(Common {
            members: Mutex::default(),
            beat: Mutex::new(beat),
            complaint: Mutex::default(),
            lag: Mutex::default(),
        });
        let ((send, inbox), (outbox, asked)) = (channel(), mpsc::unbounded_channel());
        handle.spawn(tasks::ask(bus.clone(), asked, send.clone(), common.clone()));
        handle.spawn(tasks::hear_answers(bus.clone(), send.clone()));
        handle.spawn(tasks::hear_sums(bus.clone(), send.clone()));
        handle.spawn(tasks::hear_workers(bus.clone(), common.clone()));
        handle.spawn(tasks::beat(bus.clone(), options.partitions, common.clone()));
        handle.spawn(tasks::look(bus.clone(), version.clone(), send, common.clone()));
        Ok(Self {
            bus,
            handle,
            options,
            version,
            epoch,
            inbox,
            outbox,
            common,
            pending: VecDeque::new(),
            pending_bytes: 0,
            partitions,
            early: BTreeMap::new(),
            asked: 0,
            newest: (0, 0),
            chunks: 0,
            replies: Vec::new(),
            looked: Instant::now(),
            cleared: Instant::now(),
            shown: Instant::now() - LOOK,
        })
    }

    pub(crate) fn set_lateness(&self, allowed_lateness: Millis) {
        lock(&self.common.beat).allowed_lateness = allowed_lateness;
    }

    /// Records before this are in the store: answers to them are of no use.
    pub(crate) fn starts_at(&mut self, seq: u64) {
        self.asked = seq;
    }

    /// How many more texts may go out.
    pub(crate) fn room(&self) -> usize {
        let most = u64::try_from(self.options.max_bytes).unwrap_or(0) / PART;
        let bytes = most.saturating_sub(self.pending_bytes) / (2 * AROUND) as u64;
        // One can always go out.
        let bytes = usize::try_from(bytes).unwrap_or(usize::MAX).max(usize::from(self.pending.is_empty()));
        ROOM.saturating_sub(self.pending.len()).min(bytes)
    }

    pub(crate) fn pending(&self) -> impl Iterator<Item = &Post> {
        self.pending.iter().map(|p| &p.post)
    }

    /// The first record that was not counted, if one is out.
    pub(crate) fn first_pending(&self) -> Option<u64> {
        self.pending.front().map(|p| p.seq)
    }

    /// Sends a text out. Records come in order.
    pub(crate) fn ask(&mut self, seq: u64, post: Post) {
        self.asked = seq + 1;
        let answer = self.early.remove(&seq);
        self.early = self.early.split_off(&self.asked);
        self.pending_bytes += bytes_of(&post);
        let pending = Pending { seq, post, asked: Instant::now(), attempt: 0, at: None, answer };
        if pending.answer.is_none() {
            self.send(&pending);
        }
        self.pending.push_back(pending);
    }

    fn send(&self, pending: &Pending) {
        let identity = pending.post.identity();
        let partition = (identity % u128::from(self.options.partitions)) as u32;
        let task = Task { seq: pending.seq, text: pending.post.text.clone() };
        let outgoing = Outgoing {
            subject: self.bus.names.task(&self.version, partition),
            id: format!("{identity:032x}.{}.{}", self.version, pending.attempt),
            payload: encode(&task),
        };
        // It fails only when the runtime has ended, and with it everything.
        let _ = self.outbox.send((pending.seq, outgoing));
    }

    /// Takes what the tasks have brought; waits for the first at most so long. Sums are handed out.
    ///
    /// # Errors
    /// A stream was removed or replaced.
    pub(crate) fn hear(&mut self, wait: Duration) -> Result<Vec<Sums>> {
        let mut sums = Vec::new();
        let mut event = self.inbox.recv_timeout(wait).ok();
        while let Some(next) = event {
            match next {
                Event::Answer(at, answer) => self.take(at, answer),
                Event::Asked(places) => {
                    for (seq, at) in places {
                        self.newest.0 = self.newest.0.max(at);
                        if let Some(pending) = find(&mut self.pending, seq) {
                            pending.at = Some(at);
                        }
                    }
                }
                Event::Sums(told, reply) => {
                    self.replies.extend(reply);
                    sums.push(told);
                }
                Event::Idle => self.ask_again(),
                Event::Fatal(what) => return Err(Error::Invalid(what)),
            }
            event = self.inbox.try_recv().ok();
        }
        Ok(sums)
    }

    fn take(&mut self, at: u64, answer: Answer) {
        self.newest.1 = self.newest.1.max(at);
        if answer.version != self.version {
            return;
        }
        if answer.seq >= self.asked {
            if self.early.len() < 4 * ROOM {
                self.early.entry(answer.seq).or_insert((at, answer.outcome));
            }
        } else if let Some(pending) = find(&mut self.pending, answer.seq)
            && pending.answer.is_none()
        {
            pending.answer = Some((at, answer.outcome));
        }
    }

    fn ask_again(&mut self) {
        let mut again = Vec::new();
        for pending in self.pending.iter_mut().filter(|p| p.answer.is_none() && p.asked.elapsed() > PATIENCE) {
            // One that is on its way out still is not lost.
            if pending.at.is_some() {
                (pending.attempt, pending.asked) = (pending.attempt + 1, Instant::now());
                again.push(pending.seq);
            }
        }
        for seq in again {
            if let Ok(index) = self.pending.binary_search_by_key(&seq, |p| p.seq) {
                self.send(&self.pending[index]);
            }
        }
    }

    /// The next post in the order of the log, if it is answered.
    pub(crate) fn next_scored(&mut self) -> Option<(u64, Post, Outcome)> {
        let (_, answer) = self.pending.front_mut()?.answer.take()?;
        let pending = self.pending.pop_front()?;
        self.pending_bytes = self.pending_bytes.saturating_sub(bytes_of(&pending.post));
        Some((pending.seq, pending.post, answer))
    }

    /// Puts a counted post into the partitions of its keys, unless they have it.
    pub(crate) fn put(&mut self, post: Counted) {
        let count = self.options.partitions;
        let of = |(scope, key): &(crate::windows::Scope, String)| partition_of(*scope, key, count);
        let wanted: BTreeSet<u32> = post.keys.iter().map(of).collect();
        for index in wanted {
            let Some(partition) = self.partitions.get_mut(index as usize) else { continue };
            if post.seq < partition.published {
                continue;
            }
            let keys: Vec<_> = post.keys.iter().filter(|k| of(k) == index).cloned().collect();
            partition.bytes += 240 + post.id.len() * 6 + keys.iter().map(|k| 20 + k.1.len() * 6).sum::<usize>();
            partition.posts.push(Counted { keys, ..post.clone() });
        }
    }

    /// Makes messages of what was put: all records before `through` were.
    pub(crate) fn seal(&mut self, through: u64, watermark: Millis) {
        for index in 0..self.partitions.len() {
            self.seal_one(index, through, watermark);
        }
    }

    /// Makes messages of full partitions before they become too long. The last post's record is `seq`.
    pub(crate) fn seal_full(&mut self, seq: u64, watermark: Millis) {
        for index in 0..self.partitions.len() {
            if self.partitions[index].bytes > CHUNK_BYTES {
                self.seal_one(index, seq + 1, watermark);
            }
        }
    }

    fn seal_one(&mut self, index: usize, through: u64, watermark: Millis) {
        let partition = &mut self.partitions[index];
        if partition.posts.is_empty() {
            return;
        }
        self.chunks += 1;
        partition.bytes = 0;
        let chunk = Chunk { posts: std::mem::take(&mut partition.posts), through, watermark };
        let outgoing = Outgoing {
            subject: self.bus.names.counted(index as u32),
            id: format!("{:x}.{}", self.epoch, self.chunks),
            payload: encode(&chunk),
        };
        partition.waiting.push_back((outgoing, through));
    }

    /// Sends what was sealed, each message of a partition when the one before is there; false if that fails for now.
    ///
    /// # Errors
    /// The stream was replaced by another: sums could not be made from it.
    pub(crate) fn flush(&mut self) -> Result<bool> {
        loop {
            let busy: Vec<usize> =
                (0..self.partitions.len()).filter(|i| !self.partitions[*i].waiting.is_empty()).collect();
            if busy.is_empty() {
                return Ok(true);
            }
            let heads: Vec<Outgoing> =
                busy.iter().filter_map(|i| self.partitions[*i].waiting.front().map(|w| w.0.clone())).collect();
            let outcomes = self.handle.block_on(self.bus.publish(Kind::Counted, &heads));
            let mut complaint = None;
            for (index, outcome) in busy.into_iter().zip(outcomes) {
                let partition = &mut self.partitions[index];
                match outcome {
                    Ok(at) if at <= partition.last => return Err(replaced(&self.bus.names.stream(Kind::Counted))),
                    Ok(at) => {
                        partition.last = at;
                        if let Some((_, through)) = partition.waiting.pop_front() {
                            partition.published = through;
                        }
                    }
                    Err(what) => complaint = Some(what),
                }
            }
            let failed = complaint.is_some();
            *lock(&self.common.complaint) = complaint;
            if failed {
                return Ok(false);
            }
        }
    }

    /// Notes how far an owner's sums go.
    pub(crate) fn note(&mut self, sums: &Sums) {
        if sums.epoch != self.epoch {
            return;
        }
        if let (Some(told), Some(partition)) = (sums.through, self.partitions.get_mut(sums.partition as usize)) {
            partition.applied = partition.applied.max(Some(told));
        }
    }

    /// Whether something waits for the next transaction.
    pub(crate) fn has_news(&self) -> bool {
        !self.replies.is_empty() || self.partitions.iter().any(|p| !p.posts.is_empty() || !p.waiting.is_empty())
    }

    /// Whether the sums of everything that was counted are here.
    pub(crate) fn is_settled(&self) -> bool {
        self.partitions.iter().all(Partition::is_settled)
    }

    /// Up to which watermark windows may be closed, when posts were counted up to `watermark`.
    pub(crate) fn closing(&self, watermark: Millis) -> Millis {
        let of = |p: &Partition| match p.applied {
            _ if p.is_settled() => watermark,
            Some((_, applied)) => applied.min(watermark),
            None => Millis::MIN,
        };
        self.partitions.iter().map(of).min().unwrap_or(watermark)
    }

    /// Everything so far is in the store: owners are answered, and the streams may let go of it.
    pub(crate) fn committed(&mut self, closed: Millis) {
        let beat = {
            let mut beat = lock(&self.common.beat);
            beat.closed = closed;
            encode(&*beat)
        };
        let replies = std::mem::take(&mut self.replies);
        // What is still out is not in the store.
        let early = self.early.values().map(|e| e.0);
        let answers = self.pending.iter().filter_map(|p| p.answer.as_ref()).map(|a| a.0).chain(early).min();
        let answers = answers.unwrap_or(self.newest.1 + 1);
        let bus = self.bus.clone();
        let due = self.looked.elapsed() > LOOK / 2;
        if due {
            self.looked = Instant::now();
        }
        self.handle.spawn(async move {
            for reply in replies {
                // An owner that hears nothing tells it again.
                let _ = bus.client.publish(reply, beat.clone()).await;
            }
            if due {
                bus.purge(Kind::Scored, None, answers).await;
            }
        });
    }

    /// Texts that were answered may go from their stream: the answers are in theirs until they are in the store.
    pub(crate) fn clear_tasks(&mut self) {
        if self.cleared.elapsed() < LOOK / 2 {
            return;
        }
        self.cleared = Instant::now();
        let tasks = self.pending.iter().filter(|p| p.answer.is_none()).filter_map(|p| p.at).min();
        let (bus, below) = (self.bus.clone(), tasks.unwrap_or(self.newest.0 + 1));
        self.handle.spawn(async move { bus.purge(Kind::Tasks, None, below).await });
    }

    /// Sums that could not be taken are not answered: their owners tell them again.
    pub(crate) fn refuse(&mut self) {
        self.replies.clear();
    }

    /// For the overview, when it is time to say it again.
    pub(crate) fn status(&mut self) -> Option<Value> {
        let now = Instant::now();
        if now.duration_since(self.shown) < super::members::PRESENCE {
            return None;
        }
        self.shown = now;
        let (waiting, taken) = *lock(&self.common.lag);
        let owners = lock(&self.common.beat).owners.clone();
        let members = lock(&self.common.members);
        let (scorers, others) = members.scorers(&self.version);
        let mut detail = lock(&self.common.complaint).clone().unwrap_or_default();
        if detail.is_empty() && others > 0 {
            detail = format!("{others} workers score with another model than {}", self.version);
        }
        if detail.is_empty() && (scorers == 0 || owners.iter().any(Option::is_none)) {
            let what = if scorers == 0 { "scores" } else { "takes windows" };
            detail = format!("no worker {what}: cashtag live worker --bus {}", shown(&self.options.url));
        }
        let connected = self.bus.client.connection_state() == async_nats::connection::State::Connected;
        let partitions: Vec<Value> = (self.partitions.iter().enumerate())
            .map(|(i, p)| {
                let behind = p.published.saturating_sub(p.applied.map_or(0, |a| a.0));
                json!({"partition": i, "owner": owners.get(i).cloned().flatten(), "behind": behind,
                       "unsent": p.waiting.len()})
            })
            .collect();
        Some(json!({
            "url": shown(&self.options.url), "name": self.options.name, "model_version": self.version,
            "state": if connected { "connected" } else { "reconnecting" }, "detail": detail,
            "unanswered": self.pending.len(), "tasks_waiting": waiting, "tasks_taken": taken,
            "workers": members.to_json(now), "partitions": partitions,
        }))
    }
}

fn bytes_of(post: &Post) -> u64 {
    (post.text.len() + AROUND) as u64
}

fn find(pending: &mut VecDeque<Pending>, seq: u64) -> Option<&mut Pending> {
    let index = pending.binary_search_by_key(&seq, |p| p.seq).ok()?;
    pending.get_mut(index)
}

fn replaced(stream: &str) -> Error {
    Error::Invalid(format!(
        "the stream {stream} was removed or replaced while it was in use\n  \
         hint: start again; what its windows need is in the store and is sent again"
    ))
}

pub(super) fn partition_of(scope: crate::windows::Scope, key: &str, partitions: u32) -> u32 {
    crc32fast::hash(format!("{} {key}", scope.name()).as_bytes()) % partitions.max(1)
}

impl Bus {
    /// Up to which record a partition has posts, and its last message.
    async fn last_chunk(&self, partition: u32) -> Result<(u64, u64)> {
        use async_nats::jetstream::stream::LastRawMessageErrorKind;
        let failed = |what: String| Error::Invalid(format!("the NATS server does not say what it has: {what}"));
        let stream = self.stream(Kind::Counted).await.map_err(failed)?.ok_or_else(|| failed("no stream".into()))?;
        match stream.get_last_raw_message_by_subject(&self.names.counted(partition)).await {
            Ok(message) => Ok((decode::<Chunk>(&message.payload).map_or(0, |c| c.through), message.sequence)),
            Err(e) if e.kind() == LastRawMessageErrorKind::NoMessageFound => Ok((0, 0)),
            Err(e) => Err(failed(e.to_string())),
        }
    }
}
