//! `cashtag serve` as a process for tests: started, asked over raw sockets, ended. Every wait has an end.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use cashtag_llama::adapter::Adapter;
use cashtag_llama::config::LlamaConfig;
use cashtag_llama::lora::{LoraConfig, LoraTensors, Module};
use serde_json::Value;

use super::context::Context;

pub(crate) const KEY: &str = "ctk_user_0123456789abcdef";
pub(crate) const ADMIN: &str = "ctk_admin_0123456789abcdef";
pub(crate) const TEXT: &str = "$AAPL beats expectations and raises guidance";
/// For anything that happens in a moment; the tests of a workspace share their cores.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

pub(crate) struct Serving {
    pub(crate) child: Child,
    pub(crate) address: String,
    log: PathBuf,
}

pub(crate) struct Answer {
    /// 0 if there was none.
    pub(crate) status: u16,
    pub(crate) head: String,
    pub(crate) body: String,
}

impl Answer {
    pub(crate) fn read(bytes: &[u8]) -> Self {
        let all = String::from_utf8_lossy(bytes).into_owned();
        let (head, body) = all.split_once("\r\n\r\n").unwrap_or((&all, ""));
        let status = head.get(9..12).and_then(|s| s.parse().ok()).unwrap_or(0);
        Self { status, head: head.replace("\r\n", "\n"), body: body.to_owned() }
    }

    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {} {}", self.head, self.body))
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(": "))
    }
}

/// Starts it on a free port, and waits until it is ready.
pub(crate) fn start(context: &Context, args: &[&str]) -> Serving {
    let serving = listen(context, &[&["--port", "0"], args].concat());
    serving.until("it is ready", |s| s.send("GET", "/health", "", b"").status == 200);
    serving
}

/// Starts it, and waits until it listens.
pub(crate) fn listen(context: &Context, args: &[&str]) -> Serving {
    let log = context.path("log");
    let mut command = context.command(&[&["serve", "--json-output"], args].concat());
    command.env("CASHTAG_API_KEY", KEY).env("CASHTAG_ADMIN_API_KEY", ADMIN);
    let file = std::fs::OpenOptions::new().create(true).append(true).open(&log).unwrap();
    let mut child = command.stdout(Stdio::piped()).stderr(file).spawn().unwrap();
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    let (sender, url) = channel();
    std::thread::spawn(move || {
        let mut line = String::new();
        let _ = stdout.read_line(&mut line);
        let _ = sender.send(line);
    });
    let mut serving = Serving { child, address: String::new(), log };
    let url = url.recv_timeout(PATIENCE).unwrap_or_default();
    let address = url.trim().strip_prefix("http").and_then(|u| u.trim_start_matches('s').strip_prefix("://"));
    serving.address = address.unwrap_or_else(|| panic!("{url:?}: {}", serving.logged())).to_owned();
    serving
}

impl Serving {
    pub(crate) fn logged(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    pub(crate) fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(&self.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    /// Sends bytes and reads until the server closes.
    pub(crate) fn raw(&self, bytes: &[u8]) -> Answer {
        let mut stream = self.connect();
        // A server that has refused already may have closed.
        let _ = stream.write_all(bytes);
        let mut all = Vec::new();
        let _ = stream.read_to_end(&mut all);
        Answer::read(&all)
    }

    /// A request as it goes over the wire; the connection is closed behind its answer.
    pub(crate) fn request(&self, method: &str, path: &str, key: &str, body: &[u8]) -> Vec<u8> {
        let head = format!(
            "{method} {path} HTTP/1.1\r\nhost: {}\r\nauthorization: Bearer {key}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
            self.address,
            body.len()
        );
        [head.as_bytes(), body].concat()
    }

    pub(crate) fn send(&self, method: &str, path: &str, key: &str, body: &[u8]) -> Answer {
        self.raw(&self.request(method, path, key, body))
    }

    pub(crate) fn get(&self, path: &str) -> Answer {
        self.send("GET", path, KEY, b"")
    }

    pub(crate) fn post(&self, path: &str, body: &Value) -> Answer {
        self.send("POST", path, KEY, body.to_string().as_bytes())
    }

    /// The sum of a metric over the labels that contain all of these.
    pub(crate) fn metric(&self, name: &str, labels: &[&str]) -> u64 {
        let text = self.get("/metrics").body;
        let is_meant = |line: &&str| {
            let rest = line.strip_prefix(name);
            rest.is_some_and(|r| r.starts_with(['{', ' '])) && labels.iter().all(|l| line.contains(l))
        };
        text.lines().filter(is_meant).filter_map(|l| l.rsplit_once(' ')?.1.parse::<f64>().ok()).sum::<f64>() as u64
    }

    #[track_caller]
    pub(crate) fn until(&self, what: &str, mut holds: impl FnMut(&Self) -> bool) {
        let began = Instant::now();
        while !holds(self) {
            assert!(began.elapsed() < PATIENCE, "never: {what}\n{}", self.logged());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    pub(crate) fn terminate(&self) {
        assert!(Command::new("kill").arg(self.child.id().to_string()).status().unwrap().success());
    }

    /// The exit code of a process that has been asked to end.
    #[track_caller]
    pub(crate) fn exit_code(&mut self) -> Option<i32> {
        let status = ended(&mut self.child);
        status.unwrap_or_else(|| panic!("it does not end\n{}", self.logged())).code()
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Waits for a process; `None` if it does not end.
pub(crate) fn ended(child: &mut Child) -> Option<ExitStatus> {
    let began = Instant::now();
    while began.elapsed() < PATIENCE {
        if let Some(status) = child.try_wait().unwrap() {
            return Some(status);
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    None
}

/// An adapter that has learnt nothing but differs from the base model.
pub(crate) fn adapter(dir: &Path) {
    let model = LlamaConfig::preset("smollm2-135m").unwrap();
    let lora = LoraConfig {
        r: 2,
        lora_alpha: 4.0,
        lora_dropout: 0.0,
        target_modules: vec![Module::ALL[0]],
        use_rslora: false,
        layers_to_transform: None,
        use_dora: false,
    };
    let mut tensors = LoraTensors::init(&lora, &model, 1);
    tensors.b.iter_mut().enumerate().for_each(|(i, b)| *b = ((i % 7) as f32 - 3.0) * 0.05);
    Adapter { lora, tensors, base_model: None, classifier: None }.save(dir, &model).unwrap();
}
