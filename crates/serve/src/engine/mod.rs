//! The engine: a handle that anyone may clone, and a thread that computes.
//!
//! [`Engine::new`] gives both ends. The [`Worker`] is moved to a thread, where a model is loaded and given to
//! [`Worker::run`]; until then the engine's state is [`State::Loading`], and requests are refused.

mod admission;
mod batch;
mod choice;
mod failure;
mod measures;
mod served;
mod slot;
mod submit;
mod worker;

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, RwLock};
use std::time::Duration;

use cashtag_http::metrics::Registry;
use cashtag_llama::adapter::{Adapter, ClassifierConfig};
use cashtag_llama::checkpoint::Checkpoint;
use cashtag_llama::config::LlamaConfig;
use cashtag_llama::model::Llama;
use tokio::sync::{oneshot, watch};

pub use self::failure::Failure;
pub use self::served::{Prompting, Served};
pub use self::submit::{ClassifyRequest, GenerateRequest, Generation, Lane, Scored};
pub use self::worker::Worker;

use self::admission::Admission;
use self::batch::{TextItem, WriteItem};
use self::measures::Measures;
use self::served::Models;

/// How much the engine takes on.
#[derive(Clone, Debug, PartialEq)]
pub struct EngineConfig {
    /// Rows of a classification batch; `None`: 512 on a CPU, 8192 on a GPU.
    pub max_batch_tokens: Option<usize>,
    /// Texts that may wait or be computed.
    pub max_concurrent_requests: usize,
    /// The same for [`Lane::Background`], which waits for room instead of being refused.
    pub max_background_texts: usize,
    /// Texts of one request.
    pub max_client_batch_size: usize,
    /// For a classification, from its arrival to its answer.
    pub timeout: Duration,
    /// The same for a generated text.
    pub generation_timeout: Duration,
    /// Texts that are written at a time, for each adapter.
    pub max_num_seqs: usize,
    /// Texts that may wait to be written.
    pub max_queued_generations: usize,
    /// Tokens of a prompt and its answer.
    pub max_model_len: usize,
    /// Adapters at a time.
    pub max_loras: usize,
    /// Cut texts that are too long, unless a request says otherwise.
    pub auto_truncate: bool,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            max_batch_tokens: None,
            max_concurrent_requests: 512,
            max_background_texts: 64,
            max_client_batch_size: 32,
            timeout: Duration::from_secs(30),
            generation_timeout: Duration::from_secs(300),
            max_num_seqs: 4,
            max_queued_generations: 16,
            max_model_len: 2048,
            max_loras: 16,
            auto_truncate: true,
        }
    }
}

/// Where the engine stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    Loading,
    Ready,
    /// It has ended, or could not begin.
    Ended,
}

/// Everything that a model is served from.
pub struct Parts<B: cashtag_backend::Backend> {
    pub model: Llama<B>,
    pub checkpoint: Checkpoint,
    /// How the model itself was trained to be asked, if it is a merged one.
    pub trained: Option<ClassifierConfig>,
    /// The name of the model without an adapter.
    pub name: String,
    pub prompting: Prompting,
    /// Names, directories and contents of the adapters that are there from the start; the first answers requests that name no
    /// model.
    pub adapters: Vec<(String, PathBuf, Adapter)>,
}

/// What is served, for making prompts for it.
pub(crate) struct Base {
    pub(crate) checkpoint: Checkpoint,
    pub(crate) config: LlamaConfig,
    pub(crate) prompting: Prompting,
    pub(crate) name: String,
    /// "cpu" or "cuda:0", and its dtype.
    pub(crate) device: String,
    pub(crate) dtype: &'static str,
    pub(crate) max_batch_tokens: usize,
    pub(crate) max_model_len: usize,
}

/// Changes to what is served, done between two batches.
pub(crate) enum Command {
    Add {
        served: Arc<Served>,
        adapter: Box<Adapter>,
        done: oneshot::Sender<Result<(), Failure>>,
    },
    /// Look for models that are no longer served.
    Retire,
}

#[derive(Default)]
pub(crate) struct Queue {
    pub(crate) texts: VecDeque<TextItem>,
    pub(crate) writes: VecDeque<WriteItem>,
    pub(crate) commands: VecDeque<Command>,
    pub(crate) stop: bool,
}

pub(crate) struct Inner {
    pub(crate) config: EngineConfig,
    pub(crate) admission: Admission,
    pub(crate) measures: Measures,
    pub(crate) registry: Registry,
    state: watch::Sender<State>,
    pub(crate) base: OnceLock<Base>,
    pub(crate) models: RwLock<Models>,
    /// Texts on their way to the tokenizer's thread.
    tokenizer: Mutex<Option<std::sync::mpsc::Sender<TextItem>>>,
    queue: Mutex<Queue>,
    wake: Condvar,
    /// One adapter is loaded at a time.
    loading: tokio::sync::Mutex<()>,
}

impl Inner {
    pub(crate) fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn wake(&self) {
        self.wake.notify_one();
    }

    /// Gives the queue back when there is something in it, or after `patience`.
    pub(crate) fn wait<'a>(&self, queue: MutexGuard<'a, Queue>, patience: Duration) -> MutexGuard<'a, Queue> {
        self.wake.wait_timeout(queue, patience).unwrap_or_else(PoisonError::into_inner).0
    }

    pub(crate) fn set_state(&self, state: State) {
        self.measures.ready.set(u64::from(state == State::Ready));
        self.state.send_replace(state);
    }
}

/// A handle to the engine; clones are the same engine.
#[derive(Clone)]
pub struct Engine {
    pub(crate) inner: Arc<Inner>,
}

impl Engine {
    /// An engine that is loading, and the worker that will run it. Metrics go into `registry`.
    pub fn new(config: EngineConfig, registry: Registry) -> (Self, Worker) {
        let inner = Arc::new(Inner {
            admission: Admission::new(&config),
            measures: Measures::new(&registry),
            config,
            registry,
            state: watch::Sender::new(State::Loading),
            base: OnceLock::new(),
            models: RwLock::default(),
            tokenizer: Mutex::new(None),
            queue: Mutex::default(),
            wake: Condvar::new(),
            loading: tokio::sync::Mutex::new(()),
        });
        (Self { inner: inner.clone() }, Worker::new(inner))
    }

    pub fn config(&self) -> &EngineConfig {
        &self.inner.config
    }

    pub fn state(&self) -> State {
        self.inner.state.borrow().clone()
    }

    /// Waits until the engine is ready; false if it has ended instead.
    pub async fn ready(&self) -> bool {
        let mut state = self.inner.state.subscribe();
        state.wait_for(|s| *s != State::Loading).await.is_ok_and(|s| *s == State::Ready)
    }

    /// Waits until the engine has ended.
    pub async fn ended(&self) {
        let _ = self.inner.state.subscribe().wait_for(|s| *s == State::Ended).await;
    }

    /// Asks the worker to end. What still waits is refused: stop taking requests, and wait for those that run, before.
    pub fn stop(&self) {
        self.inner.queue().stop = true;
        self.inner.wake();
    }
}
