//! Puts everything together: one process on one machine.
//!
//! The caller's thread runs the pipeline (a model may be bound to its thread); sources and the API are tasks of a runtime
//! beside it. The data directory holds `log/`, `author.key` and, unless the store is a server, `live.sqlite`.

use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Mutex, RwLock};

use cashtag_http::{Config, Server};
use serde_json::Value;

use crate::alerts::{Alerts, Rule};
use crate::api;
use crate::board::{Board, SourceStatus};
use crate::bus::BusOptions;
use crate::bus::front::Front;
use crate::error::{Error, Result};
use crate::hub::Hub;
use crate::inlet::Inlet;
use crate::log::{Log, LogOptions};
use crate::pipeline::{Parts, Pipeline, PipelineOptions};
use crate::post::AuthorKey;
use crate::scorer::Scorer;
use crate::sources::{self, Source};
use crate::state::{Counters, Shared, StoreHealth};
use crate::store::location::Opening;
use crate::store::{Location, Readers, StoreOptions};
use crate::tickers::Tickers;
use crate::webhook;
use crate::windows::WindowOptions;

/// Questions of the API that wait for the model.
const QUESTIONS: usize = 64;

pub struct LiveOptions {
    pub data: PathBuf,
    pub log: LogOptions,
    /// Where posts and windows go.
    pub location: Location,
    pub store: StoreOptions,
    pub windows: WindowOptions,
    pub pipeline: PipelineOptions,
    pub rules: Vec<Rule>,
    /// Where alerts are sent.
    pub webhook: Option<String>,
    /// Where the API listens; `None`: nowhere.
    pub http: Option<Config>,
    /// What `/v1/quality` shows.
    pub quality: Value,
    pub tickers: Arc<dyn Tickers>,
    /// Is told what a start waits for.
    pub waiting: Box<dyn Fn(&str) + Send>,
    /// Workers score and sum; `None`: everything happens here.
    pub bus: Option<BusOptions>,
}

impl LiveOptions {
    pub fn new(data: PathBuf, tickers: Arc<dyn Tickers>) -> Self {
        Self {
            location: Location::Sqlite(data.clone()),
            data,
            log: LogOptions::default(),
            store: StoreOptions::default(),
            windows: WindowOptions::default(),
            pipeline: PipelineOptions::default(),
            rules: Vec::new(),
            webhook: None,
            http: None,
            quality: Value::Object(serde_json::Map::new()),
            tickers,
            waiting: Box::new(|_| {}),
            bus: None,
        }
    }
}

/// Said once everything runs.
pub struct Started<'a> {
    /// `http://127.0.0.1:8000`
    pub url: Option<&'a str>,
    pub warnings: &'a [String],
    pub shared: &'a Arc<Shared>,
}

/// How it ended.
pub struct Summary {
    pub sources: std::collections::BTreeMap<String, SourceStatus>,
    pub shared: Arc<Shared>,
}

/// Runs until `stop` is set, or everything is done and that was asked for.
///
/// # Errors
/// A data directory that cannot be used, an address that cannot be listened on, a damaged log.
pub fn run(
    options: LiveOptions,
    sources: Vec<Box<dyn Source>>,
    scorer: &mut dyn Scorer,
    stop: Arc<AtomicBool>,
    started: impl FnOnce(Started<'_>),
) -> Result<Summary> {
    let data = &options.data;
    std::fs::create_dir_all(data).map_err(Error::io("create", data))?;
    let log = Log::open(&data.join("log"), options.log.clone())?;
    let model = scorer.info();
    let names = AuthorKey::open(data)?;
    let store = options.location.open(&Opening {
        model: &model,
        options: StoreOptions { webhook: options.webhook.is_some(), ..options.store },
        log: names.fingerprint(),
        stop: &stop,
        waiting: &*options.waiting,
    })?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("live")
        .enable_all()
        .build()
        .map_err(Error::io("start threads for", data))?;
    let bus = match options.bus {
        None => None,
        Some(bus) => Some(Front::open(bus, model.version(), names.fingerprint(), runtime.handle().clone())?),
    };
    let (hub, readers) = (Hub::default(), Readers::new(options.location.clone()));
    let dead_letters_before = readers.with(|r| r.dead_letter_count())?;
    let board = Board::new(hub.clone());
    let inlet = Inlet::new(log.clone(), readers.clone(), names, model.version(), board, stop.clone());
    let (questions, asked) = sync_channel(QUESTIONS);
    let shared = Arc::new(Shared {
        hub,
        store: StoreHealth::new(options.location.kind()),
        dead_letters_before,
        inlet: inlet.clone(),
        readers,
        model,
        snapshot: RwLock::default(),
        delays: Mutex::default(),
        counters: Counters::default(),
        questions,
        quality: options.quality,
        tickers: options.tickers,
        bus: Mutex::default(),
        delivered: Mutex::default(),
    });
    let mut pipeline = Pipeline::resume(Parts {
        shared: shared.clone(),
        log,
        store,
        scorer,
        questions: asked,
        alerts: Alerts::new(options.rules),
        windows: options.windows,
        options: options.pipeline,
        bus,
        stop: stop.clone(),
    })?;
    let server = match options.http {
        None => None,
        Some(mut config) => {
            config.guard.open.extend(api::page::open_paths());
            let bound = runtime.block_on(Server::bind(config));
            Some(bound.map_err(|e| Error::Invalid(e.to_string()))?)
        }
    };
    let url = server.as_ref().map(Server::url);
    let warnings = server.as_ref().map(|s| s.warnings().to_vec()).unwrap_or_default();
    started(Started { url: url.as_deref(), warnings: &warnings, shared: &shared });
    let serving = server.map(|server| {
        let shutdown = server.shutdown();
        let router = api::router(shared.clone(), shutdown.clone());
        (shutdown, runtime.spawn(server.run(router, std::future::pending())))
    });
    if let Some(address) = options.webhook {
        runtime.spawn(webhook::deliver(shared.clone(), address));
    }
    for source in sources {
        sources::start(source, inlet.clone(), runtime.handle());
    }
    let outcome = pipeline.run();
    // Sources stop before the next checkpoint would be needed; requests that have begun are answered.
    stop.store(true, std::sync::atomic::Ordering::SeqCst);
    if let Some((shutdown, task)) = serving {
        shutdown.begin();
        let _ = runtime.block_on(async { tokio::time::timeout(std::time::Duration::from_secs(5), task).await });
    }
    runtime.shutdown_timeout(std::time::Duration::from_secs(2));
    outcome?;
    Ok(Summary { sources: shared.inlet.board().all(), shared })
}
