//! Runs the pipeline in a thread, with a model that is a function of the text.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use cashtag_http::{Config, Listen};
use cashtag_live::scorer::{ModelInfo, Scorer};
use cashtag_live::sources::Source;
use cashtag_live::state::Shared;
use cashtag_live::tickers::{TickerMention, Tickers};
use cashtag_live::{LiveOptions, Result, Summary};
use serde_json::{Value, json};

/// Positive where the text says "up", negative where it says "down"; fails on "poison".
pub(crate) struct Pure {
    /// What a batch takes.
    pub(crate) pause: Duration,
    pub(crate) batch: usize,
}

impl Default for Pure {
    fn default() -> Self {
        Self { pause: Duration::ZERO, batch: 256 }
    }
}

/// Probabilities of a text: the whole model.
pub(crate) fn probabilities(text: &str) -> [f32; 3] {
    match (text.contains("up"), text.contains("down")) {
        (true, false) => [0.75, 0.25, 0.0],
        (false, true) => [0.0, 0.25, 0.75],
        _ => [0.25, 0.5, 0.25],
    }
}

impl Scorer for Pure {
    fn info(&self) -> ModelInfo {
        ModelInfo {
            name: "pure".into(),
            adapter: None,
            labels: ["Positive", "Neutral", "Negative"].map(String::from).to_vec(),
            temperature: 1.0,
            model_hash: "pure".into(),
            adapter_hash: None,
            prompt_hash: "none".into(),
        }
    }

    fn batch(&self) -> usize {
        self.batch
    }

    fn score(&mut self, texts: &[&str]) -> Result<Vec<Vec<f32>>, String> {
        std::thread::sleep(self.pause);
        if texts.iter().any(|t| t.contains("poison")) {
            return Err("it tastes bad".into());
        }
        Ok(texts.iter().map(|t| probabilities(t).to_vec()).collect())
    }
}

/// `$ABC` of capital letters; A to M are technology, the others energy.
pub(crate) struct Letters;

pub(crate) fn symbols(text: &str) -> Vec<TickerMention> {
    let chars: Vec<char> = text.chars().collect();
    let mut found = Vec::new();
    for (i, _) in chars.iter().enumerate().filter(|(_, c)| **c == '$') {
        let symbol: String = chars[i + 1..].iter().take_while(|c| c.is_ascii_uppercase()).collect();
        if !symbol.is_empty() {
            found.push(TickerMention { start: i, end: i + 1 + symbol.len(), symbol });
        }
    }
    found
}

pub(crate) fn sector(symbol: &str) -> &'static str {
    if symbol < "N" { "technology" } else { "energy" }
}

impl Tickers for Letters {
    fn find(&self, text: &str) -> Vec<TickerMention> {
        symbols(text)
    }
    fn sector(&self, symbol: &str) -> Option<String> {
        Some(sector(symbol).into())
    }
    fn name(&self, symbol: &str) -> Option<String> {
        Some(format!("{symbol} Corporation"))
    }
}

pub(crate) fn options(data: &Path) -> LiveOptions {
    LiveOptions::new(data.to_owned(), Arc::new(Letters))
}

pub(crate) fn listening(data: &Path) -> LiveOptions {
    let listen = Listen { port: 0, ..Listen::default() };
    LiveOptions { http: Some(Config { listen, ..Config::default() }), ..options(data) }
}

/// What a process of a test says behind `listening`: its address, if it has one. Its output is read to the end.
pub(crate) fn announced(child: &mut Child) -> String {
    let mut reader = BufReader::new(child.stdout.take().unwrap());
    // A process that hangs is ended by its reader's end.
    let (tell, heard) = channel();
    std::thread::spawn(move || {
        let mut line = String::new();
        while reader.read_line(&mut line).is_ok_and(|n| n > 0) {
            if let Some(rest) = line.trim().strip_prefix("listening") {
                let _ = tell.send(rest.trim().to_owned());
            }
            line.clear();
        }
    });
    heard.recv_timeout(Duration::from_secs(30)).expect("it ended before it listened, or does not listen")
}

/// Runs to the end of its sources.
pub(crate) fn run_to_end(mut options: LiveOptions, sources: Vec<Box<dyn Source>>) -> Result<Summary> {
    options.pipeline.exit_when_done = true;
    cashtag_live::run(options, sources, &mut Pure::default(), Arc::default(), |_| {})
}

/// A pipeline that runs beside the test.
pub(crate) struct Rig {
    pub(crate) url: String,
    pub(crate) shared: Arc<Shared>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<Summary>>>,
}

impl Rig {
    pub(crate) fn start(options: LiveOptions, sources: Vec<Box<dyn Source>>) -> Self {
        Self::start_with(options, sources, Pure::default())
    }

    pub(crate) fn start_with(options: LiveOptions, sources: Vec<Box<dyn Source>>, mut model: Pure) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (tell, told) = channel();
        let flag = stop.clone();
        let sources = Mutex::new(sources);
        let thread = std::thread::spawn(move || {
            let sources = sources.into_inner().unwrap();
            cashtag_live::run(options, sources, &mut model, flag, |started| {
                tell.send((started.url.map(str::to_owned), started.shared.clone())).unwrap();
            })
        });
        let (url, shared) = match told.recv_timeout(Duration::from_secs(20)) {
            Ok(told) => told,
            Err(_) => panic!("it did not start: {}", thread.join().unwrap().err().unwrap()),
        };
        Self { url: url.unwrap_or_default(), shared, stop, thread: Some(thread) }
    }

    pub(crate) fn get(&self, path: &str) -> Value {
        let (status, value) = self.ask("GET", path, None);
        assert_eq!(status, 200, "{path}: {value}");
        value
    }

    pub(crate) fn post(&self, path: &str, body: &str) -> (u16, Value) {
        self.ask("POST", path, Some(body))
    }

    pub(crate) fn ask(&self, method: &str, path: &str, body: Option<&str>) -> (u16, Value) {
        let agent =
            ureq::Agent::new_with_config(ureq::Agent::config_builder().http_status_as_error(false).proxy(None).build());
        let url = format!("{}{path}", self.url);
        let answer = match method {
            "GET" => agent.get(&url).call(),
            _ => agent.post(&url).send(body.unwrap_or("")),
        };
        let mut answer = answer.unwrap();
        let status = answer.status().as_u16();
        let text = answer.body_mut().read_to_string().unwrap();
        (status, serde_json::from_str(&text).unwrap_or_else(|_| json!(text)))
    }

    /// Waits until something holds; says what if it never does.
    #[track_caller]
    pub(crate) fn until(&self, what: &str, mut holds: impl FnMut(&Self) -> bool) {
        let began = Instant::now();
        while !holds(self) {
            let board = self.shared.inlet.board().to_json();
            assert!(began.elapsed() < Duration::from_secs(30), "never: {what}; sources {board}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    pub(crate) fn scored(&self) -> u64 {
        self.shared.counters.scored.load(Ordering::Relaxed)
    }

    /// Stops it as a signal does.
    pub(crate) fn stop(mut self) -> Summary {
        self.stop.store(true, Ordering::SeqCst);
        self.thread.take().unwrap().join().unwrap().unwrap()
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

pub(crate) fn write(dir: &Path, name: &str, content: &str) -> PathBuf {
    let path = dir.join(name);
    std::fs::write(&path, content).unwrap();
    path
}
