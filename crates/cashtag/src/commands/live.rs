//! `cashtag live`: sources in, signals out, on a page and over HTTP.

mod worker;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use cashtag_backend::Backend;
use cashtag_http::{Config, Guard, Keys, Limits, Listen, Role, TlsFiles};
use cashtag_live::alerts::Rule;
use cashtag_live::board::State;
use cashtag_live::log::{Fsync, LogOptions};
use cashtag_live::pipeline::PipelineOptions;
use cashtag_live::sources::file::{Replay, Speed};
use cashtag_live::sources::jetstream::{Jetstream, JetstreamOptions};
use cashtag_live::sources::x_search::XSearch;
use cashtag_live::sources::x_stream::XStream;
use cashtag_live::sources::{Source, XOptions, x_api};
use cashtag_live::store::{Location, StoreOptions};
use cashtag_live::tickers::Tickers;
use cashtag_live::windows::{Thin, WindowOptions};
use cashtag_live::{LiveOptions, Started, export, time};
use cashtag_tickers::{Finder, Symbols};

use crate::exit::{self, Usage};
use crate::output;
use crate::pipeline::device::{self, Job};
use crate::pipeline::engine::{self, Classifier, Opened};
use crate::pipeline::stream::{Companies, StreamScorer, model_info};
use crate::settings::{Flags, Inference, Settings};

/// A day on an invented market, and its companies.
const DEMO_DAY: &[u8] = include_bytes!("../../../live/demo/day.jsonl");
const DEMO_SYMBOLS: &[u8] = include_bytes!("../../../live/demo/watchlist.csv");

#[derive(clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
#[command(
    after_help = "Examples:\n  cashtag live --demo --adapter runs/mine\n  cashtag live --bluesky --adapter runs/mine\n  \
cashtag live --replay day.jsonl --speed 60 --alert \"score_z > 3 and mentions > 20 in 5m\"\n  \
cashtag live --data live-data            # only what is posted to /v1/ingest\n  \
cashtag live export --out parquet\n\n\
Everything is kept in --data: the same command goes on where it was stopped, or killed.\n\
X: the bearer token is read from X_BEARER_TOKEN. docs/live.md has the rest."
)]
pub(crate) struct Args {
    #[command(subcommand)]
    action: Option<Action>,
    #[command(flatten)]
    sources: Sources,
    #[command(flatten)]
    signals: Signals,
    #[command(flatten)]
    serving: Serving,
    #[command(flatten)]
    bus: worker::Bus,
    #[command(flatten)]
    settings: Flags<Inference>,
}

#[derive(clap::Subcommand)]
enum Action {
    /// Score and sum for a `cashtag live --bus`
    Worker(worker::Worker),
    /// Write what was scored as Parquet, for DuckDB, polars and pandas
    Export(Export),
}

#[derive(clap::Args)]
struct Export {
    /// The data directory
    #[arg(long, value_name = "DIR", default_value = "live-data")]
    data: PathBuf,
    /// The PostgreSQL server that `cashtag live --store` was given
    #[arg(long, value_name = "URL", env = "CASHTAG_LIVE_STORE", hide_env = true)]
    store: Option<String>,
    /// Where scores/ and bars/ are written
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// From this day on [default: everything]
    #[arg(long, value_name = "DATE")]
    since: Option<String>,
}

#[derive(clap::Args)]
#[command(next_help_heading = "Sources")]
struct Sources {
    /// Replay the day that ships with the program, 120 times as fast
    #[arg(long, conflicts_with_all = ["replay", "stdin", "bluesky", "x_stream", "x_search"])]
    demo: bool,
    /// Replay a .jsonl, .csv or .parquet file; may be repeated
    #[arg(long, value_name = "FILE")]
    replay: Vec<PathBuf>,
    /// Read JSON lines from standard input
    #[arg(long)]
    stdin: bool,
    /// How fast files are replayed: 1 is real time, `max` as fast as it goes [default: max]
    #[arg(long, value_name = "TIMES")]
    speed: Option<String>,
    /// Bluesky's public posts with a cashtag (Jetstream; free, no key)
    #[arg(long)]
    bluesky: bool,
    /// Bluesky's posts without a cashtag, too
    #[arg(long, requires = "bluesky")]
    bluesky_all: bool,
    /// The Jetstream server
    #[arg(long, value_name = "URL", default_value = cashtag_live::sources::jetstream::URL, hide_default_value = true)]
    bluesky_url: String,
    /// X's filtered stream
    #[arg(long, requires = "watch_list")]
    x_stream: bool,
    /// X's recent search, asked again and again
    #[arg(long, requires = "watch_list")]
    x_search: bool,
    /// Tickers for X, one a line; the rules follow the file
    #[arg(long, value_name = "FILE")]
    watch_list: Option<PathBuf>,
    /// What every rule for X ends with
    #[arg(long, value_name = "RULE", default_value = "lang:en -is:retweet")]
    x_filter: String,
    /// Posts of X a day, at most
    #[arg(long, value_name = "N")]
    x_daily_posts: Option<u64>,
    /// Dollars for X a day, at most
    #[arg(long, value_name = "USD")]
    x_daily_dollars: Option<f64>,
    /// What X takes for a post
    #[arg(long, value_name = "USD", default_value_t = x_api::PRICE)]
    x_price: f64,
    /// Minutes that X sends again after a lost connection (enterprise accounts)
    #[arg(long, value_name = "MINUTES", default_value_t = 0, value_parser = clap::value_parser!(u8).range(0..=5))]
    x_backfill: u8,
    /// X's API
    #[arg(long, value_name = "URL", default_value = x_api::BASE, hide_default_value = true)]
    x_url: String,
    /// End when all files are replayed and everything is counted
    #[arg(long)]
    exit_when_done: bool,
}

#[derive(clap::Args)]
#[command(next_help_heading = "Signals and store")]
struct Signals {
    /// Log, store and keys of this pipeline [default: live-data; for --demo a temporary one]
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// Keep posts and windows on a PostgreSQL server (postgres://user@host/database; also CASHTAG_LIVE_STORE) [default:
    /// SQLite in --data]
    #[arg(long, value_name = "URL", env = "CASHTAG_LIVE_STORE", hide_env = true)]
    store: Option<String>,
    /// How long after its end a window takes posts
    #[arg(long, value_name = "TIME", default_value = "10m", value_parser = duration)]
    allowed_lateness: Duration,
    /// How far a source may be out of order
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = duration)]
    allowed_disorder: Duration,
    /// Posts (by weight) without which a window says nothing
    #[arg(long, value_name = "N", default_value_t = 5.0)]
    min_mentions: f64,
    /// Authors without whom a window says nothing
    #[arg(long, value_name = "N", default_value_t = 3)]
    min_authors: u64,
    /// Companies: a .csv or .jsonl of symbol, name, sector, aliases [default: the list inside]
    #[arg(long, value_name = "FILE")]
    symbols: Option<PathBuf>,
    /// Find companies by their names, too
    #[arg(long)]
    company_names: bool,
    /// Keep posts and windows for so long [default: for ever]
    #[arg(long, value_name = "TIME", value_parser = duration)]
    retention: Option<Duration>,
    /// Do not store texts, only their fingerprints
    #[arg(long)]
    no_text: bool,
    /// When posts are forced to the disk: always, never, or a time such as 200ms
    #[arg(long, value_name = "WHEN", default_value = "always")]
    fsync: String,
    /// Texts that copies are recognised by; 38 bytes of memory each
    #[arg(long, value_name = "N", default_value_t = 1_000_000, value_parser = clap::value_parser!(u32).range(..=100_000_000))]
    remember_texts: u32,
    /// SQLite's cache, in MB
    #[arg(long, value_name = "MB", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    store_cache_mb: u32,
    /// A rule: "score_z > 3 and mentions > 20 in 5m for ticker"; may be repeated
    #[arg(long, value_name = "RULE")]
    alert: Vec<String>,
    /// Where alerts are posted as JSON
    #[arg(long, value_name = "URL")]
    alert_webhook: Option<String>,
}

#[derive(clap::Args)]
#[command(next_help_heading = "Page and API")]
struct Serving {
    /// Listen here
    #[arg(long, value_name = "HOST", default_value = "127.0.0.1")]
    host: String,
    #[arg(long, value_name = "PORT", default_value_t = 8080)]
    port: u16,
    /// Neither page nor API
    #[arg(long, conflicts_with_all = ["host", "port"])]
    no_http: bool,
    /// Keys as `cashtag serve keys` writes them; CASHTAG_API_KEY holds one itself
    #[arg(long, value_name = "FILE")]
    api_keys: Option<PathBuf>,
    /// Listen beyond this machine without a key
    #[arg(long)]
    allow_no_key: bool,
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
    /// Origin whose pages may call the API (OpenBB Workspace: https://pro.openbb.co); may be repeated
    #[arg(long, value_name = "ORIGIN")]
    cors_allow_origin: Vec<String>,
    /// Another name that this service may be called by without keys; may be repeated
    #[arg(long, value_name = "HOST")]
    allowed_host: Vec<String>,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    match &args.action {
        Some(Action::Export(export)) => return write_export(export),
        Some(Action::Worker(worker)) => return worker.run(),
        None => {}
    }
    let mut settings = args.settings.resolve()?;
    let named = settings.is_set("model.name");
    engine::follow_base_model(&mut settings, named);
    let tickers = tickers(&args)?;
    // What was written wrongly is said before a model is loaded.
    let sources = sources(&args, tickers.clone())?;
    let (data, temporary) = data_directory(&args)?;
    let mut options = options(&args, data, tickers)?;
    options.quality = quality(settings.model.adapter.as_deref());
    let opened = engine::open(&settings)?;
    if opened.adapter.is_none() {
        let name = &settings.model.name;
        output::note(format!("no --adapter: the base model {name} answers, which was not fine-tuned for this"));
    }
    let outcome = device::run(&settings, Live { settings: &settings, opened, options, sources });
    drop(temporary);
    outcome
}

struct Live<'a> {
    settings: &'a Settings,
    opened: Opened,
    options: LiveOptions,
    sources: Vec<Box<dyn Source>>,
}

impl Job for Live<'_> {
    type Output = ();

    fn run<B: Backend>(self, backend: B) -> anyhow::Result<()> {
        let Live { settings, opened, options, sources } = self;
        let model = engine::load(&backend, &opened.checkpoint)?;
        let lora = engine::load_lora(&backend, &model, opened.adapter.as_ref())?;
        let budget = settings.training.max_tokens_per_batch;
        let classifier = Classifier::new(&backend, &model, lora.as_ref(), &opened.format, budget)?;
        let mut scorer = pipeline_scorer(settings, &opened, classifier)?;
        let _clean = exit::clean_stop();
        let stop = follow_signals();
        let summary = cashtag_live::run(options, sources, &mut scorer, stop, |started| announce(&started))?;
        let mut failed = Vec::new();
        for (name, source) in &summary.sources {
            output::note(format!("{name}: {} posts, {}", source.posts_total, source.state.name()));
            if source.state == State::Stopped && !source.detail.is_empty() && !exit::stop_requested() {
                failed.push(format!("{name}: {}", source.detail));
            }
        }
        if failed.is_empty() { Ok(()) } else { Err(anyhow!(failed.join("\n"))) }
    }
}

fn pipeline_scorer<'a, B: Backend>(
    settings: &Settings,
    opened: &Opened,
    mut classifier: Classifier<'a, B>,
) -> anyhow::Result<StreamScorer<'a, B>> {
    classifier.temperature = opened.temperature();
    Ok(StreamScorer { classifier, info: model_info(settings, opened)? })
}

fn announce(started: &Started<'_>) {
    started.warnings.iter().for_each(output::warn);
    if let Some(url) = started.url {
        output::note(format!("{url}  (Ctrl-C stops; nothing is lost)"));
    }
}

/// Ctrl-C and SIGTERM as a flag that the pipeline looks at.
fn follow_signals() -> Arc<AtomicBool> {
    let stop = Arc::new(AtomicBool::new(false));
    let flag = stop.clone();
    std::thread::spawn(move || {
        while !flag.load(Ordering::Relaxed) {
            if exit::stop_requested() {
                flag.store(true, Ordering::SeqCst);
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    });
    stop
}

fn tickers(args: &Args) -> anyhow::Result<Arc<dyn Tickers>> {
    let symbols = match &args.signals.symbols {
        Some(path) => Symbols::load(path)?,
        None if args.sources.demo => Symbols::from_csv(DEMO_SYMBOLS, Path::new("the companies of the demo"))?,
        None => Symbols::embedded(),
    };
    let names = args.signals.company_names || args.sources.demo;
    Ok(Arc::new(Companies(Finder::new(symbols).with_names(names))))
}

fn sources(args: &Args, tickers: Arc<dyn Tickers>) -> anyhow::Result<Vec<Box<dyn Source>>> {
    let s = &args.sources;
    let speed = match s.speed.as_deref() {
        None if s.demo => Speed::Times(120.0),
        None | Some("max") => Speed::Fastest,
        Some(text) => match text.trim_end_matches('x').parse::<f64>() {
            Ok(times) if times.is_finite() && times > 0.0 => Speed::Times(times),
            _ => bail!(Usage(format!("--speed takes a number above 0 or max, found {text:?}"))),
        },
    };
    let mut sources: Vec<Box<dyn Source>> = Vec::new();
    if s.demo {
        sources.push(Box::new(Replay::embedded("demo", DEMO_DAY, speed)));
    }
    for path in &s.replay {
        if !path.is_file() {
            bail!(Usage(format!("--replay: there is no file {}", path.display())));
        }
        sources.push(Box::new(Replay::file(path.clone(), speed)));
    }
    if s.stdin {
        sources.push(Box::new(Replay::stdin(speed)));
    }
    if s.bluesky {
        let options =
            JetstreamOptions { url: s.bluesky_url.clone(), all: s.bluesky_all, ..JetstreamOptions::default() };
        sources.push(Box::new(Jetstream::new(options, tickers)));
    }
    if s.x_stream || s.x_search {
        let options = x_options(args)?;
        if s.x_stream {
            sources.push(Box::new(XStream(options.clone())));
        }
        if s.x_search {
            sources.push(Box::new(XSearch(options)));
        }
    }
    let mut names: Vec<String> = sources.iter().map(|s| s.name()).collect();
    names.sort();
    if let Some(twice) = names.windows(2).find(|pair| pair[0] == pair[1]) {
        bail!(Usage(format!("two sources would be called {}\n  hint: give the files different names", twice[0])));
    }
    Ok(sources)
}

fn x_options(args: &Args) -> anyhow::Result<XOptions> {
    let s = &args.sources;
    let Some(bearer) = std::env::var("X_BEARER_TOKEN").ok().filter(|t| !t.trim().is_empty()) else {
        bail!(Usage(
            "X needs a bearer token in X_BEARER_TOKEN\n  hint: the developer portal shows it under Keys and tokens"
                .into()
        ))
    };
    let Some(watch_list) = s.watch_list.clone() else { bail!(Usage("X needs --watch-list".into())) };
    let budget = data_path(args).join("x-budget.json");
    let mut options = XOptions::new(bearer.trim().to_owned(), watch_list, budget);
    options.base = s.x_url.trim_end_matches('/').to_owned();
    options.filter.clone_from(&s.x_filter);
    options.daily_posts = daily_posts(s.x_daily_posts, s.x_daily_dollars, s.x_price);
    options.backfill_minutes = s.x_backfill;
    Ok(options)
}

/// The tighter one of two budgets.
fn daily_posts(posts: Option<u64>, dollars: Option<f64>, price: f64) -> Option<u64> {
    // A posts' price of nothing would buy any number of them.
    let bought = dollars.map(|usd| (usd / price.max(1e-9) + 1e-9).max(0.0) as u64);
    match (posts, bought) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    }
}

fn data_path(args: &Args) -> PathBuf {
    args.signals.data.clone().unwrap_or_else(|| "live-data".into())
}

/// A demo without --data leaves nothing behind.
fn data_directory(args: &Args) -> anyhow::Result<(PathBuf, Option<tempfile::TempDir>)> {
    if args.sources.demo && args.signals.data.is_none() {
        let dir = tempfile::Builder::new().prefix("cashtag-demo-").tempdir().context("no temporary directory")?;
        return Ok((dir.path().to_owned(), Some(dir)));
    }
    Ok((data_path(args), None))
}

fn options(args: &Args, data: PathBuf, tickers: Arc<dyn Tickers>) -> anyhow::Result<LiveOptions> {
    let s = &args.signals;
    let millis = |d: Duration| i64::try_from(d.as_millis()).unwrap_or(i64::MAX / 4);
    let rules = s.alert.iter().map(|rule| Rule::parse(rule)).collect::<Result<Vec<_>, _>>();
    let fsync = match s.fsync.as_str() {
        "always" => Fsync::Always,
        "never" => Fsync::Never,
        other => Fsync::Every(duration(other).map_err(|e| Usage(format!("--fsync: {e}")))?),
    };
    let location = Location::of(s.store.as_deref(), &data).map_err(|e| Usage(e.to_string()))?;
    let mut options = LiveOptions::new(data, tickers);
    options.location = location;
    options.waiting = Box::new(|why| output::note(format!("waiting: {why}")));
    options.log = LogOptions { fsync, ..LogOptions::default() };
    options.store =
        StoreOptions { with_text: !s.no_text, webhook: s.alert_webhook.is_some(), cache_mb: s.store_cache_mb };
    options.windows = WindowOptions {
        allowed_lateness: millis(s.allowed_lateness),
        allowed_disorder: millis(s.allowed_disorder),
        thin: Thin { min_mentions: s.min_mentions, min_authors: s.min_authors },
        ..WindowOptions::default()
    };
    options.pipeline = PipelineOptions {
        exit_when_done: args.sources.exit_when_done,
        retention: s.retention,
        remembered_texts: s.remember_texts as usize,
        ..PipelineOptions::default()
    };
    options.rules = rules.map_err(Usage)?;
    options.webhook.clone_from(&s.alert_webhook);
    options.bus = args.bus.options()?;
    options.http = if args.serving.no_http { None } else { Some(http(&args.serving)?) };
    Ok(options)
}

fn http(s: &Serving) -> anyhow::Result<Config> {
    let mut keys = Keys::default();
    if let Some(path) = &s.api_keys {
        keys.add_file(path)?;
    }
    if let Ok(key) = std::env::var("CASHTAG_API_KEY") {
        keys.add("CASHTAG_API_KEY", "environment", Role::User, &key)?;
    }
    let tls = match (&s.tls_cert, &s.tls_key) {
        (Some(certificate), Some(key)) => Some(TlsFiles { certificate: certificate.clone(), key: key.clone() }),
        _ => None,
    };
    Ok(Config {
        listen: Listen { host: s.host.clone(), port: s.port, allow_no_key: s.allow_no_key },
        tls,
        guard: Guard {
            keys,
            cors_origins: s.cors_allow_origin.clone(),
            allowed_hosts: s.allowed_host.clone(),
            ..Guard::default()
        },
        limits: Limits::default(),
        ..Config::default()
    })
}

/// The figures of the run that an adapter comes from: the page shows them. No run, no figures.
fn quality(adapter: Option<&Path>) -> serde_json::Value {
    let nothing = || serde_json::Value::Object(serde_json::Map::new());
    let Some(dir) = adapter else { return nothing() };
    let own = engine::adapter_directory(dir);
    let beside = own.parent().map(|run| run.join("metrics.json"));
    let paths = [Some(dir.join("metrics.json")), beside];
    let text = paths.into_iter().flatten().find_map(|path| std::fs::read_to_string(path).ok());
    text.and_then(|t| serde_json::from_str(&t).ok()).unwrap_or_else(nothing)
}

fn write_export(args: &Export) -> anyhow::Result<()> {
    let since = match &args.since {
        None => None,
        Some(text) => Some(
            time::parse(text)
                .ok_or_else(|| Usage(format!("--since takes a day such as 2026-11-28, found {text:?}")))?,
        ),
    };
    let written = export::export(
        &Location::of(args.store.as_deref(), &args.data).map_err(|e| Usage(e.to_string()))?,
        &args.out,
        since,
    )?;
    output::note(format!(
        "{} posts, {} windows, {} files in {}",
        written.posts,
        written.bars,
        written.files.len(),
        args.out.display()
    ));
    Ok(())
}

/// `90s`, `15m`, `1h`, `30d`, `200ms`.
fn duration(text: &str) -> Result<Duration, String> {
    let text = text.trim();
    let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let factor = match unit.trim() {
        "ms" => 0.001,
        "s" => 1.0,
        "m" => 60.0,
        "h" => 3_600.0,
        "d" => 86_400.0,
        _ => return Err(format!("expected a time such as 200ms, 90s, 15m, 1h or 30d, found {text:?}")),
    };
    let seconds = number.parse::<f64>().ok().filter(|n| n.is_finite()).map(|n| n * factor);
    seconds.filter(|s| *s < 1e10).map(Duration::from_secs_f64).ok_or_else(|| format!("{text:?} is no time"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn budgets() {
        assert_eq!(daily_posts(None, None, 0.005), None);
        assert_eq!(daily_posts(None, Some(20.0), 0.005), Some(4_000));
        assert_eq!(daily_posts(Some(100), Some(20.0), 0.005), Some(100));
        assert_eq!(daily_posts(Some(5_000), Some(20.0), 0.005), Some(4_000));
        assert_eq!(daily_posts(None, Some(0.3), 0.1), Some(3), "not two, because 0.1 is a little more than that");
        assert_eq!(daily_posts(None, Some(-1.0), 0.0), Some(0));
    }

    #[test]
    fn times() {
        let seconds = |text: &str| duration(text).map(|d| d.as_secs_f64());
        assert_eq!(seconds("200ms"), Ok(0.2));
        assert_eq!(seconds("1.5h"), Ok(5_400.0));
        assert_eq!(seconds("30d"), Ok(2_592_000.0));
        for wrong in ["", "5", "h", "5 weeks", "1e9d", "99999999999d", "-1s"] {
            assert!(duration(wrong).is_err(), "{wrong}");
        }
    }
}
