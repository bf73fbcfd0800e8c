//! `cashtag serve`: a model and its adapters behind HTTP; `cashtag serve keys` makes API keys for it.
//!
//! Flags have the names that text-embeddings-inference and vLLM give them. The service listens before the model is loaded
//! (`/health` says 503 until then), prints its address on stdout, and logs to stderr.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use cashtag_backend::Backend;
use cashtag_http::keys::{append, generate};
use cashtag_http::log::{Format, Level};
use cashtag_http::metrics::Registry;
use cashtag_http::{Config, Guard, Keys, Limits, Listen, Log, Role, Server, TlsFiles};
use cashtag_llama::adapter::{Adapter, ClassifierConfig};
use cashtag_llama::checkpoint::Checkpoint;
use cashtag_llama::prompt::Label;
use cashtag_serve::routes::{Service, Tickers, error_shape};
use cashtag_serve::{Engine, EngineConfig, Parts, Prompting, Worker};
use cashtag_tickers::{Finder, Source, Symbols};
use serde_json::json;

use crate::exit::{self, Usage};
use crate::output;
use crate::pipeline::device::{self, Job};
use crate::pipeline::engine::{self, OpenedModel};
use crate::settings::{Flags, Inference, Settings};

#[derive(clap::Args)]
#[command(
    args_conflicts_with_subcommands = true,
    after_help = "Examples:\n  cashtag serve --adapter runs/mine\n  \
cashtag serve keys ci --api-key-file keys\n  \
cashtag serve --adapter runs/mine --host 0.0.0.0 --api-key-file keys --tls-cert cert.pem --tls-key key.pem\n\n\
docs/serving.md has the routes."
)]
pub(crate) struct Args {
    #[command(subcommand)]
    action: Option<Action>,
    #[command(flatten)]
    listen: ListenFlags,
    #[command(flatten)]
    engine: EngineFlags,
    /// Name of what answers where a request names no model [default: the adapter's directory, else the model]
    #[arg(long, value_name = "NAME", help_heading = "Models")]
    served_model_name: Option<String>,
    /// A further adapter; may be given several times
    #[arg(long, value_name = "NAME=DIR", help_heading = "Models")]
    lora_modules: Vec<String>,
    /// Where keys of the role admin may load adapters from while the service runs
    #[arg(long, value_name = "DIR", help_heading = "Models")]
    lora_dir: Option<PathBuf>,
    /// Companies for the tickers of answers: CSV or JSON lines of symbol, name, aliases, sector; they go before the built-in
    /// list, and names are found too, not only cashtags
    #[arg(long, value_name = "FILE", help_heading = "Models")]
    symbols: Option<PathBuf>,
    #[command(flatten)]
    settings: Flags<Inference>,
}

#[derive(clap::Subcommand)]
enum Action {
    /// Make an API key: print it once, and append its hash to a file
    Keys(KeyArgs),
}

#[derive(clap::Args)]
struct KeyArgs {
    /// Who it is for; it stands in the log
    name: String,
    /// The file that `cashtag serve --api-key-file` reads
    #[arg(long, value_name = "FILE")]
    api_key_file: PathBuf,
    /// user: ask; admin: also load and unload adapters
    #[arg(long, default_value = "user")]
    role: Role,
}

#[derive(clap::Args)]
struct ListenFlags {
    /// Address to listen on; one beyond this machine needs a key
    #[arg(long, alias = "hostname", default_value = "127.0.0.1", help_heading = "HTTP")]
    host: String,
    /// 0 takes a free port
    #[arg(long, default_value_t = 8000, help_heading = "HTTP")]
    port: u16,
    /// A key that may ask; may be given several times. Others on this machine see flags: prefer the variable or a file
    #[arg(
        long,
        value_name = "KEY",
        env = "CASHTAG_API_KEY",
        hide_env_values = true,
        value_delimiter = ',',
        help_heading = "HTTP"
    )]
    api_key: Vec<String>,
    /// A key that may load and unload adapters too
    #[arg(
        long,
        value_name = "KEY",
        env = "CASHTAG_ADMIN_API_KEY",
        hide_env_values = true,
        value_delimiter = ',',
        help_heading = "HTTP"
    )]
    admin_api_key: Vec<String>,
    /// Hashes of keys, as `cashtag serve keys` writes them
    #[arg(long, value_name = "FILE", help_heading = "HTTP")]
    api_key_file: Option<PathBuf>,
    /// Listen beyond this machine without a key
    #[arg(long, help_heading = "HTTP")]
    allow_no_key: bool,
    /// A name, besides localhost, by which a service without keys may be called
    #[arg(long, value_name = "NAME", help_heading = "HTTP")]
    allowed_host: Vec<String>,
    /// An origin whose pages may call the service (https://app.example), or *
    #[arg(long, value_name = "ORIGIN", help_heading = "HTTP")]
    cors_allow_origin: Vec<String>,
    /// Certificate chain, PEM
    #[arg(long, alias = "ssl-certfile", value_name = "FILE", requires = "tls_key", help_heading = "HTTP")]
    tls_cert: Option<PathBuf>,
    /// Private key, PEM
    #[arg(long, alias = "ssl-keyfile", value_name = "FILE", requires = "tls_cert", help_heading = "HTTP")]
    tls_key: Option<PathBuf>,
    /// Bytes of a request's body
    #[arg(long, default_value_t = 2_000_000, value_name = "BYTES", help_heading = "HTTP")]
    payload_limit: usize,
    /// Connections at a time
    #[arg(long, default_value_t = 1024, value_name = "N", value_parser = at_least_one, help_heading = "HTTP")]
    max_connections: usize,
    /// Seconds for a head or a body to come, and for a client to take the next bytes of its answer
    #[arg(long, default_value_t = 30.0, value_name = "SECONDS", value_parser = seconds, help_heading = "HTTP")]
    io_timeout: f64,
    /// Seconds that requests have to end after SIGTERM
    #[arg(long, default_value_t = 30.0, value_name = "SECONDS", value_parser = seconds, help_heading = "HTTP")]
    drain_timeout: f64,
    /// Log as JSON, one object a line
    #[arg(long, help_heading = "HTTP")]
    json_output: bool,
}

#[derive(clap::Args)]
struct EngineFlags {
    /// Texts that may wait or be computed; more are refused with 429
    #[arg(long, default_value_t = 512, value_name = "N", value_parser = at_least_one, help_heading = "Engine")]
    max_concurrent_requests: usize,
    /// Texts of one request
    #[arg(long, default_value_t = 32, value_name = "N", value_parser = at_least_one, help_heading = "Engine")]
    max_client_batch_size: usize,
    /// Token rows of a batch [default: 512 on a CPU, 8192 on a GPU]
    #[arg(long, value_name = "N", value_parser = at_least_one, help_heading = "Engine")]
    max_batch_tokens: Option<usize>,
    /// Seconds from a request to its answer; what would take longer is refused with 429
    #[arg(long, default_value_t = 30.0, value_name = "SECONDS", value_parser = seconds, help_heading = "Engine")]
    timeout: f64,
    /// The same for a text that is written
    #[arg(long, default_value_t = 300.0, value_name = "SECONDS", value_parser = seconds, help_heading = "Engine")]
    generation_timeout: f64,
    /// Texts that are written at a time, for each adapter
    #[arg(long, default_value_t = 4, value_name = "N", value_parser = at_least_one, help_heading = "Engine")]
    max_num_seqs: usize,
    /// Tokens of a prompt and its answer, where text is written
    #[arg(long, default_value_t = 2048, value_name = "N", value_parser = at_least_one, help_heading = "Engine")]
    max_model_len: usize,
    /// Adapters at a time
    #[arg(long, default_value_t = 16, value_name = "N", help_heading = "Engine")]
    max_loras: usize,
    /// Cut texts that are too long, unless a request says otherwise
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set, value_name = "BOOL", help_heading = "Engine")]
    auto_truncate: bool,
}

fn at_least_one(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(n) if n > 0 => Ok(n),
        _ => Err("expected a whole number from 1".into()),
    }
}

fn seconds(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(s) if (0.001..=86_400.0).contains(&s) => Ok(s),
        _ => Err("expected seconds, from 0.001 to 86400".into()),
    }
}

impl ListenFlags {
    fn keys(&self) -> anyhow::Result<Keys> {
        let mut keys = Keys::default();
        for (place, name, role, given) in [
            ("--api-key", "key", Role::User, &self.api_key),
            ("--admin-api-key", "admin", Role::Admin, &self.admin_api_key),
        ] {
            for (i, key) in given.iter().enumerate() {
                keys.add(place, &format!("{name}-{}", i + 1), role, key).map_err(|e| Usage(e.to_string()))?;
            }
        }
        if let Some(path) = &self.api_key_file {
            keys.add_file(path)?;
        }
        Ok(keys)
    }

    fn config(self, log: Log, metrics: Registry) -> anyhow::Result<Config> {
        let keys = self.keys()?;
        let patience = Duration::from_secs_f64(self.io_timeout);
        Ok(Config {
            listen: Listen { host: self.host, port: self.port, allow_no_key: self.allow_no_key },
            tls: self.tls_cert.zip(self.tls_key).map(|(certificate, key)| TlsFiles { certificate, key }),
            guard: Guard {
                keys,
                cors_origins: self.cors_allow_origin,
                allowed_hosts: self.allowed_host,
                shape: error_shape,
                ..Guard::default()
            },
            limits: Limits {
                connections: self.max_connections,
                body_bytes: self.payload_limit,
                head: patience,
                body: patience,
                write: patience,
                drain: Duration::from_secs_f64(self.drain_timeout),
                ..Limits::default()
            },
            log,
            metrics,
        })
    }
}

impl EngineFlags {
    fn config(&self) -> EngineConfig {
        EngineConfig {
            max_batch_tokens: self.max_batch_tokens,
            max_concurrent_requests: self.max_concurrent_requests.max(self.max_client_batch_size),
            max_client_batch_size: self.max_client_batch_size,
            timeout: Duration::from_secs_f64(self.timeout),
            generation_timeout: Duration::from_secs_f64(self.generation_timeout),
            max_num_seqs: self.max_num_seqs,
            max_model_len: self.max_model_len,
            max_loras: self.max_loras,
            auto_truncate: self.auto_truncate,
            ..EngineConfig::default()
        }
    }
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let Args { action, listen, engine: limits, served_model_name, lora_modules, lora_dir, symbols, settings } = args;
    if let Some(Action::Keys(keys)) = action {
        let (key, line) = generate(&keys.name, keys.role).map_err(|e| Usage(e.to_string()))?;
        append(&keys.api_key_file, &line)?;
        output::note(format!("{}: {} added; the key is shown this once:", keys.api_key_file.display(), keys.name));
        return output::data(&format!("{key}\n"));
    }
    let tickers = Some(tickers(symbols.as_deref())?);
    let mut settings = settings.resolve()?;
    let named = settings.is_set("model.name");
    engine::follow_base_model(&mut settings, named);
    let OpenedModel { checkpoint, adapter, trained } = engine::open_model(&settings)?;
    // An adapter's own is with the adapter; the base model beside it is asked as the settings say.
    let trained = trained.filter(|_| adapter.is_none());
    let (name, adapters) = names(&settings, served_model_name, adapter, &lora_modules, &checkpoint)?;
    let level = match (output::is_quiet(), output::is_verbose()) {
        (true, _) => Level::Error,
        (_, true) => Level::Debug,
        _ => Level::Info,
    };
    let log = Log::stderr(Some(level), if listen.json_output { Format::Json } else { Format::Text });
    let metrics = Registry::default();
    let config = listen.config(log.clone(), metrics.clone())?;
    let (engine, worker) = Engine::new(limits.config(), metrics);

    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        // Conversations that are rendered, and adapters that are read, at a time.
        .max_blocking_threads(4)
        .enable_all()
        .build()
        .context("no threads for the service")?;
    let server = runtime.block_on(Server::bind(config))?;
    for warning in server.warnings() {
        output::warn(warning);
    }
    // The first signal drains; the second ends at once.
    let _stop = exit::clean_stop();
    output::data(&format!("{}\n", server.url()))?;
    let (shutdown, started) = (server.shutdown(), std::time::Instant::now());
    let service = Service { engine: engine.clone(), log: log.clone(), lora_dir, tickers, shutdown: shutdown.clone() };
    let computing = std::thread::Builder::new()
        .name("engine".into())
        .spawn(move || {
            let settings_of_device = settings.clone();
            device::run(&settings_of_device, Serve { settings, worker, checkpoint, trained, name, adapters })
        })
        .context("no thread for the engine")?;
    let (watched, watching) = (engine.clone(), log.clone());
    runtime.spawn(async move {
        if watched.ready().await {
            let models: Vec<String> = watched.models().iter().map(|m| m.name.clone()).collect();
            let seconds = started.elapsed().as_secs_f64();
            watching.info("ready", &[("models", models.join(",").into()), ("seconds", seconds.into())]);
        }
        watched.ended().await;
        shutdown.begin();
    });
    let is_drained = runtime.block_on(server.run(service.router(), asked_to_stop()));
    engine.stop();
    let outcome = computing.join();
    log.info("ended", &[("drained", is_drained.into())]);
    log.flush();
    runtime.shutdown_timeout(Duration::from_secs(1));
    match outcome {
        Ok(outcome) => outcome,
        Err(_) => bail!("the engine stopped on a bug, which was reported above"),
    }
}

/// Finds what a text is about, as X says it: offsets in code points.
fn tickers(symbols: Option<&Path>) -> anyhow::Result<Tickers> {
    let known = match symbols {
        Some(path) => Symbols::embedded().overlaid(Symbols::load(path)?),
        None => Symbols::embedded(),
    };
    let finder = Finder::new(known).with_names(symbols.is_some());
    Ok(Arc::new(move |text| {
        let found = finder.find(text).into_iter().map(|mention| {
            let company = finder.symbols().get(&mention.symbol);
            json!({
                "symbol": mention.symbol,
                "start": mention.start,
                "end": mention.end,
                "source": if mention.source == Source::Cashtag { "cashtag" } else { "name" },
                "name": company.map(|c| &c.name),
                "sector": company.map(|c| &c.sector),
            })
        });
        found.collect()
    }))
}

/// Waits for the first Ctrl-C or SIGTERM, for which the whole program listens.
async fn asked_to_stop() {
    while !exit::stop_requested() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// An adapter with its name and where it was read from.
type Named = (String, PathBuf, Adapter);

/// The name of the base model, and the adapters with theirs.
fn names(
    settings: &Settings,
    first: Option<String>,
    adapter: Option<Adapter>,
    modules: &[String],
    checkpoint: &Checkpoint,
) -> anyhow::Result<(String, Vec<Named>)> {
    let mut base = settings.model.name.clone();
    let mut adapters = Vec::new();
    if let (Some(adapter), Some(dir)) = (adapter, &settings.model.adapter) {
        let of_run = dir.canonicalize().ok().and_then(|d| {
            let d = if d.ends_with("adapter") { d.parent()?.to_owned() } else { d };
            Some(d.file_name()?.to_string_lossy().into_owned())
        });
        adapters.push((first.or(of_run).unwrap_or_else(|| "adapter".into()), dir.clone(), adapter));
    } else if let Some(first) = first {
        base = first;
    }
    for module in modules {
        let Some((name, dir)) = module.split_once('=').filter(|(name, dir)| !name.is_empty() && !dir.is_empty()) else {
            bail!(Usage(format!("--lora-modules {module}: expected NAME=DIR")));
        };
        let dir = engine::adapter_directory(dir.as_ref());
        let adapter = Adapter::load(&dir, checkpoint.config())?;
        adapters.push((name.to_owned(), dir, adapter));
    }
    let mut seen = vec![base.as_str()];
    for (name, ..) in &adapters {
        if seen.contains(&name.as_str()) {
            bail!(Usage(format!(
                "two models would be named {name}\n  hint: --served-model-name, --lora-modules NAME=DIR"
            )));
        }
        seen.push(name);
    }
    Ok((base, adapters))
}

struct Serve {
    settings: Settings,
    worker: Worker,
    checkpoint: Checkpoint,
    trained: Option<ClassifierConfig>,
    name: String,
    adapters: Vec<Named>,
}

impl Job for Serve {
    type Output = ();

    fn run<B: Backend>(self, backend: B) -> anyhow::Result<()> {
        let Serve { settings, worker, checkpoint, trained, name, adapters } = self;
        let model = engine::load(&backend, &checkpoint)?;
        let d = &settings.data;
        let prompting = Prompting {
            system_message: d.system_message.clone(),
            labels: d.labels.0.iter().map(|l| Label { name: l.name.clone(), word: l.word.clone() }).collect(),
            max_seq_length: d.max_seq_length,
            overrides: ["data.system_message", "data.labels", "data.max_seq_length"].map(|id| settings.is_set(id)),
        };
        Ok(worker.run(backend, Parts { model, checkpoint, trained, name, prompting, adapters })?)
    }
}
