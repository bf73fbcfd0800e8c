//! A load generator for `cashtag serve`: sends texts at a rate, or as fast as answers come, and says how long they took.
//!
//! ```sh
//! cargo run --release -p cashtag-serve --example load -- 127.0.0.1:8000 --seconds 20 --connections 64     # saturation
//! cargo run --release -p cashtag-serve --example load -- 127.0.0.1:8000 --seconds 20 --connections 64 --rate 25
//! ```
//!
//! With `--rate` it is an open loop: a request that is due is sent by the next free connection, and its latency counts from
//! when it was due, so that a slow server cannot hide behind a client that waits for it. `--texts FILE` sends the texts of a
//! file, one a line, or the field `text` of JSON lines. `--pid PID` watches the server's resident memory (Linux).
//! `CASHTAG_API_KEY` is sent if set. Requests are made before the time runs, so that the generator costs little of a machine
//! that it shares with the server.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

const TEXTS: [&str; 6] = [
    "Shares jump 12% after a blowout quarter, raising guidance for the full year",
    "Company files for bankruptcy protection, trading halted until further notice",
    "The board meets on Tuesday, as planned",
    "$TSLA beats on revenue, misses on margins, guides lower, and closes green anyway",
    "Great, another dilution. Just what my portfolio needed this morning",
    "Fed keeps rates unchanged; markets flat into the close",
];
const USAGE: &str =
    "usage: load HOST:PORT [--seconds S] [--connections N] [--rate PER_SECOND] [--texts FILE] [--pid PID]";

struct Options {
    address: String,
    seconds: f64,
    connections: usize,
    rate: Option<f64>,
    texts: Vec<String>,
    pid: Option<u32>,
}

fn options() -> Option<Options> {
    let mut arguments = std::env::args().skip(1);
    let mut options = Options {
        address: arguments.next()?,
        seconds: 10.0,
        connections: 8,
        rate: None,
        texts: TEXTS.map(String::from).to_vec(),
        pid: None,
    };
    while let Some(flag) = arguments.next() {
        let value = arguments.next()?;
        match flag.as_str() {
            "--seconds" => options.seconds = value.parse().ok()?,
            "--connections" => options.connections = value.parse().ok()?,
            "--rate" => options.rate = Some(value.parse().ok().filter(|r| *r > 0.0)?),
            "--texts" => options.texts = texts(&value)?,
            "--pid" => options.pid = Some(value.parse().ok()?),
            _ => return None,
        }
    }
    Some(options)
}

/// The texts of a file; `None`, with a word on stderr, if there are none.
fn texts(path: &str) -> Option<Vec<String>> {
    let read = std::fs::read_to_string(path).inspect_err(|e| eprintln!("{path}: {e}")).ok()?;
    let lines = read.lines().filter(|line| !line.trim().is_empty());
    let text = |line: &str| match serde_json::from_str::<serde_json::Value>(line) {
        Ok(row) => row["text"].as_str().map(String::from),
        Err(_) => Some(line.to_owned()),
    };
    let texts: Vec<String> = lines.filter_map(text).collect();
    if texts.is_empty() {
        eprintln!("{path}: there are no texts in it");
        return None;
    }
    Some(texts)
}

type Connection = Option<BufReader<TcpStream>>;

/// Sends one request; the status, 0 where the connection broke.
fn ask(connection: &mut Connection, address: &str, request: &[u8], line: &mut String, body: &mut Vec<u8>) -> u16 {
    let mut attempt = |connection: &mut Connection| -> std::io::Result<u16> {
        let stream = match &mut *connection {
            Some(stream) => stream,
            none => none.insert(BufReader::with_capacity(4096, connect(address)?)),
        };
        stream.get_mut().write_all(request)?;
        let (mut status, mut length, mut closes) = (0, 0, false);
        for number in 0.. {
            line.clear();
            if stream.read_line(line)? == 0 {
                return Err(std::io::ErrorKind::UnexpectedEof.into());
            }
            if number == 0 {
                status = line.get(9..12).and_then(|s| s.parse().ok()).unwrap_or(0);
            } else if let Some(n) = line.strip_prefix("content-length:") {
                length = n.trim().parse().unwrap_or(0);
            } else if line.starts_with("connection: close") {
                closes = true;
            } else if line.trim().is_empty() {
                break;
            }
        }
        body.resize(length, 0);
        stream.read_exact(body)?;
        if closes {
            *connection = None;
        }
        Ok(status)
    };
    attempt(connection).unwrap_or_else(|_| {
        *connection = None;
        0
    })
}

fn connect(address: &str) -> std::io::Result<TcpStream> {
    let stream = TcpStream::connect(address)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(Duration::from_secs(120)))?;
    Ok(stream)
}

/// Resident bytes of a process.
fn resident(pid: u32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let kib: u64 = status.lines().find_map(|l| l.strip_prefix("VmRSS:"))?.trim().strip_suffix(" kB")?.parse().ok()?;
    Some(kib << 10)
}

fn main() {
    let Some(options) = options() else {
        eprintln!("{USAGE}");
        std::process::exit(2);
    };
    let key = std::env::var("CASHTAG_API_KEY").map(|k| format!("authorization: Bearer {k}\r\n")).unwrap_or_default();
    let request = |text: &String| {
        let body = serde_json::json!({"input": text}).to_string();
        let (host, length) = (&options.address, body.len());
        format!("POST /v1/classify HTTP/1.1\r\nhost: {host}\r\n{key}content-length: {length}\r\n\r\n{body}")
    };
    let requests: Vec<String> = options.texts.iter().map(request).collect();
    let (sent, outcomes) = (AtomicU64::new(0), Mutex::new(BTreeMap::<u16, Vec<Duration>>::new()));
    let start = Instant::now();
    let mut memory = Vec::new();
    let send = &|| {
        let (mut connection, mut line, mut body) = (None, String::new(), Vec::new());
        let mut times = Vec::new();
        loop {
            let n = sent.fetch_add(1, Ordering::Relaxed);
            let due = match options.rate {
                Some(rate) => start + Duration::from_secs_f64(n as f64 / rate),
                None => Instant::now(),
            };
            if due.duration_since(start).as_secs_f64() >= options.seconds {
                break;
            }
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
            let request = requests[n as usize % requests.len()].as_bytes();
            let status = ask(&mut connection, &options.address, request, &mut line, &mut body);
            times.push((status, due.elapsed()));
        }
        let mut outcomes = outcomes.lock().expect("no thread panics");
        for (status, time) in times {
            outcomes.entry(status).or_default().push(time);
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..options.connections {
            let small = std::thread::Builder::new().stack_size(128 << 10);
            small.spawn_scoped(scope, send).expect("a thread for each connection");
        }
        let Some(pid) = options.pid else { return };
        while start.elapsed().as_secs_f64() < options.seconds {
            memory.extend(resident(pid));
            std::thread::sleep(Duration::from_secs(1));
        }
    });
    let elapsed = start.elapsed().as_secs_f64();
    for (status, mut times) in outcomes.into_inner().expect("no thread panics") {
        times.sort();
        let at = |share: f64| times[((times.len() - 1) as f64 * share) as usize].as_secs_f64() * 1e3;
        println!(
            "status {status}: {} ({:.2}/s), ms: p50 {:.1}, p90 {:.1}, p99 {:.1}, p99.9 {:.1}, max {:.1}",
            times.len(),
            times.len() as f64 / elapsed,
            at(0.5),
            at(0.9),
            at(0.99),
            at(0.999),
            at(1.0)
        );
    }
    if !memory.is_empty() {
        // The same part at the beginning and at the end: what a leak would add lies between them.
        let part = (memory.len() / 5).max(1);
        let most = |values: &[u64]| values.iter().max().map_or(0.0, |b| *b as f64 / f64::from(1 << 20));
        println!(
            "resident: at most {:.1} MiB in the second fifth of the time, {:.1} MiB in the last",
            most(&memory[part.min(memory.len() - 1)..(2 * part).min(memory.len())]),
            most(&memory[memory.len() - part..])
        );
    }
}
