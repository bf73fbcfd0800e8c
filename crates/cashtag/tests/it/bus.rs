//! `cashtag live --bus` and its workers with the real model, over a real nats-server.

use std::io::{BufRead, BufReader, Read};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use crate::context::Context;
use crate::model_commands::context;

/// A process that is killed when the test is over.
struct Process {
    child: Child,
    said: Receiver<String>,
}

impl Process {
    fn start(mut command: Command) -> Self {
        let mut child = command.stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
        let reader = BufReader::new(child.stderr.take().unwrap());
        let (tell, said) = channel();
        std::thread::spawn(move || reader.lines().map_while(Result::ok).for_each(|line| drop(tell.send(line))));
        Self { child, said }
    }

    #[track_caller]
    fn until_it_says(&self, what: &str) {
        let (began, mut all) = (Instant::now(), String::new());
        while began.elapsed() < Duration::from_secs(60) {
            if let Ok(line) = self.said.recv_timeout(Duration::from_secs(1)) {
                all = all + &line + "\n";
                if line.contains(what) {
                    return;
                }
            }
        }
        panic!("it never said {what}: {all}");
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn nats(context: &Context) -> Option<(Process, String)> {
    if Command::new("nats-server").arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_err() {
        println!("skipped: no nats-server (apt install nats-server)");
        return None;
    }
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let mut command = Command::new("nats-server");
    command.args(["-a", "127.0.0.1", "-p", &port.to_string(), "-js", "-sd"]).arg(context.path("nats"));
    let server = Process::start(command);
    let began = Instant::now();
    loop {
        if let Ok(mut stream) = TcpStream::connect(("127.0.0.1", port)) {
            stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
            if stream.read(&mut [0; 8]).is_ok_and(|n| n > 0) {
                return Some((server, format!("nats://127.0.0.1:{port}")));
            }
        }
        assert!(began.elapsed() < Duration::from_secs(20), "nats-server does not start");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_day_is_scored_by_workers_one_of_which_is_killed() {
    let Some(context) = context() else { return };
    let Some((_server, url)) = nats(&context) else { return };
    const POSTS: usize = 120;
    context.write("day.jsonl", crate::live::day(POSTS));
    let worker = |more: &[&str]| {
        let worker = Process::start(
            context.command(&[&["live", "worker", "--bus", &url, "--bus-ack-wait", "2s"], more].concat()),
        );
        worker.until_it_says("worker ");
        worker
    };
    let (_windows, first, _second) = (worker(&["--only", "windows"]), worker(&["--only", "scoring"]), worker(&[]));
    let args = ["live", "--bus", &url, "--replay", "day.jsonl", "--exit-when-done", "--port", "0"];
    let mut front = Process::start(context.command(&args));
    front.until_it_says("http://");
    drop(first);
    let began = Instant::now();
    let status = loop {
        if let Some(status) = front.child.try_wait().unwrap() {
            break status;
        }
        assert!(began.elapsed() < Duration::from_secs(120), "it does not come to an end");
        std::thread::sleep(Duration::from_millis(50));
    };
    assert!(status.success(), "{status}");
    let said = context.run(&["live", "export", "--data", "live-data", "--out", "parquet"]);
    assert!(said.contains("exit code 0") && said.contains(&format!("{POSTS} posts")), "{said}");
    // The same windows as one process counts alone.
    let alone = context.run(&["live", "--replay", "day.jsonl", "--exit-when-done", "--no-http", "--data", "alone"]);
    assert!(alone.contains("exit code 0"), "{alone}");
    let windows = |data: &str| -> Vec<(i64, i64, String, i64, i64)> {
        let reader = cashtag_live::store::Location::Sqlite(context.path(data)).reader().unwrap();
        let mut all = Vec::new();
        for (scope, key) in reader.series().unwrap() {
            for window in cashtag_live::windows::Window::ALL {
                for s in reader.history(scope, &key, window, (i64::MIN, i64::MAX), 100_000).unwrap() {
                    assert!(s.revision > 0, "{key} is not closed");
                    all.push((window as i64, scope as i64, key.clone(), s.start, s.values.mentions as i64));
                }
            }
        }
        all.sort();
        all
    };
    assert_eq!(windows("live-data"), windows("alone"));
}

#[test]
fn a_bus_that_is_not_there_is_said_in_a_line() {
    let context = Context::new();
    let gone = format!("nats://127.0.0.1:{}", TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port());
    let said = context.run(&["live", "worker", "--only", "windows", "--bus", &gone]);
    assert!(said.contains("exit code 1") && said.contains(&format!("no NATS server at {gone}")), "{said}");
    assert!(said.contains("hint: nats-server --jetstream"), "{said}");
    let said = context.run(&["live", "--bus", &gone, "--bus-name", "a.b"]);
    assert!(!said.starts_with("exit code 0") && said.contains("letters, digits"), "{said}");
}
