//! A load generator for `cashtag serve`: sends texts at a rate, or as fast as answers come, and says how long they took.
//!
//! ```sh
//! cargo run --release -p cashtag-serve --example load -- 127.0.0.1:8000 --seconds 20 --connections 16
//! cargo run --release -p cashtag-serve --example load -- 127.0.0.1:8000 --seconds 20 --connections 64 --rate 50
//! ```
//!
//! With `--rate` it is an open loop: a request that is due is sent by the next free connection, and its latency counts from
//! when it was due, so that a slow server cannot hide behind a client that waits for it. `CASHTAG_API_KEY` is sent if set.

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

struct Options {
    address: String,
    seconds: f64,
    connections: usize,
    rate: Option<f64>,
}

fn options() -> Option<Options> {
    let mut arguments = std::env::args().skip(1);
    let mut options = Options { address: arguments.next()?, seconds: 10.0, connections: 8, rate: None };
    while let Some(flag) = arguments.next() {
        let value = arguments.next()?;
        match flag.as_str() {
            "--seconds" => options.seconds = value.parse().ok()?,
            "--connections" => options.connections = value.parse().ok()?,
            "--rate" => options.rate = Some(value.parse().ok().filter(|r| *r > 0.0)?),
            _ => return None,
        }
    }
    Some(options)
}

/// Sends one text; the status, 0 where the connection broke.
fn ask(connection: &mut Option<BufReader<TcpStream>>, address: &str, key: &str, text: &str) -> u16 {
    let attempt = |connection: &mut Option<BufReader<TcpStream>>| -> std::io::Result<u16> {
        let stream = match connection {
            Some(stream) => stream,
            none => {
                let stream = TcpStream::connect(address)?;
                stream.set_nodelay(true)?;
                stream.set_read_timeout(Some(Duration::from_secs(120)))?;
                none.insert(BufReader::new(stream))
            }
        };
        let body = format!("{{\"input\":\"{text}\"}}");
        let head =
            format!("POST /v1/classify HTTP/1.1\r\nhost: {address}\r\n{key}content-length: {}\r\n\r\n", body.len());
        stream.get_mut().write_all((head + &body).as_bytes())?;
        let (mut status, mut length) = (0, 0);
        for number in 0.. {
            let mut line = String::new();
            if stream.read_line(&mut line)? == 0 {
                return Err(std::io::ErrorKind::UnexpectedEof.into());
            }
            if number == 0 {
                status = line.get(9..12).and_then(|s| s.parse().ok()).unwrap_or(0);
            }
            if let Some(n) = line.to_lowercase().strip_prefix("content-length:") {
                length = n.trim().parse().unwrap_or(0);
            }
            if line.trim().is_empty() {
                break;
            }
        }
        stream.read_exact(&mut vec![0; length])?;
        Ok(status)
    };
    attempt(connection).unwrap_or_else(|_| {
        *connection = None;
        0
    })
}

fn main() {
    let Some(options) = options() else {
        eprintln!("usage: load HOST:PORT [--seconds S] [--connections N] [--rate PER_SECOND]");
        std::process::exit(2);
    };
    let key = std::env::var("CASHTAG_API_KEY").map(|k| format!("authorization: Bearer {k}\r\n")).unwrap_or_default();
    let (sent, outcomes) = (AtomicU64::new(0), Mutex::new(BTreeMap::<u16, Vec<Duration>>::new()));
    let start = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..options.connections {
            scope.spawn(|| {
                let mut connection = None;
                loop {
                    let n = sent.fetch_add(1, Ordering::Relaxed);
                    let due = match options.rate {
                        Some(rate) => start + Duration::from_secs_f64(n as f64 / rate),
                        None => Instant::now(),
                    };
                    if due.duration_since(start).as_secs_f64() >= options.seconds {
                        return;
                    }
                    std::thread::sleep(due.saturating_duration_since(Instant::now()));
                    let text = TEXTS[n as usize % TEXTS.len()];
                    let status = ask(&mut connection, &options.address, &key, text);
                    outcomes.lock().expect("no thread panics").entry(status).or_default().push(due.elapsed());
                }
            });
        }
    });
    let elapsed = start.elapsed().as_secs_f64();
    for (status, mut times) in outcomes.into_inner().expect("no thread panics") {
        times.sort();
        let at = |share: f64| times[((times.len() - 1) as f64 * share) as usize].as_secs_f64() * 1e3;
        println!(
            "status {status}: {} ({:.2}/s), ms: p50 {:.1}, p90 {:.1}, p99 {:.1}, max {:.1}",
            times.len(),
            times.len() as f64 / elapsed,
            at(0.5),
            at(0.9),
            at(0.99),
            at(1.0)
        );
    }
}
