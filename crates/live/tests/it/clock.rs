//! A machine whose clock jumps: the process's own view of the time of day is moved by a library before libc.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::rig::{Pure, announced, listening};

/// `clock_gettime` of the time of day, moved by the seconds in a file; the steady clock is not touched, as on a real machine.
const SHIM: &str = r#"
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
static volatile long *offset;
int clock_gettime(clockid_t id, struct timespec *t) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    if (!offset) {
        int file = open(getenv("CLOCK_OFFSET"), O_RDONLY);
        offset = mmap(0, sizeof(long), PROT_READ, MAP_SHARED, file, 0);
    }
    int outcome = real(id, t);
    if (id == CLOCK_REALTIME) t->tv_sec += *offset;
    return outcome;
}
"#;

#[test]
#[ignore = "runs for ever: the test below starts it in a process of its own"]
fn the_process() {
    let Some(dir) = std::env::var_os("CASHTAG_LIVE_DIR").map(PathBuf::from) else { return };
    let ended = cashtag_live::run(
        listening(&dir.join("data")),
        Vec::new(),
        &mut Pure::default(),
        Default::default(),
        |started| println!("\nlistening {}", started.url.unwrap()),
    );
    ended.unwrap();
}

struct Moved {
    child: Child,
    url: String,
    offset: PathBuf,
}

impl Moved {
    fn start(dir: &Path, shim: &Path) -> Self {
        let offset = dir.join("offset");
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "clock::the_process", "--nocapture"])
            .env("CASHTAG_LIVE_DIR", dir)
            .env("LD_PRELOAD", shim)
            .env("CLOCK_OFFSET", &offset)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let url = announced(&mut child);
        Self { child, url, offset }
    }

    fn jump(&self, seconds: i64) {
        jump(&self.offset, seconds);
    }

    fn ask(&self, method: &str, path: &str, body: &str) -> Value {
        // What nobody has written about yet is a 404 of JSON.
        let config = ureq::Agent::config_builder().http_status_as_error(false).proxy(None).build();
        let agent = ureq::Agent::new_with_config(config);
        let url = format!("{}{path}", self.url);
        let answer = if method == "GET" { agent.get(&url).call() } else { agent.post(&url).send(body) };
        let text = answer.unwrap().body_mut().read_to_string().unwrap();
        serde_json::from_str(&text).unwrap_or_else(|_| json!(text))
    }

    /// Ten posts with the true time, from a source that knows it.
    fn post(&self, what: &str) {
        let now = cashtag_live::time::rfc3339(cashtag_live::time::now());
        let line = |n: u32| {
            let text = format!("$AAA goes up, says note {n} of {what}, which is long enough to be nobody's copy");
            json!({"id": format!("{what} {n}"), "author": format!("{what} {n}"), "created_at": now, "text": text})
                .to_string()
        };
        let body = (0..10).map(line).collect::<Vec<_>>().join("\n");
        assert_eq!(self.ask("POST", "/v1/ingest", &body)["accepted"], 10, "{what}");
    }

    fn mentions(&self) -> u64 {
        let found = self.ask("GET", "/v1/signals/market?scope=market&window=1d", "");
        found["signals"].as_array().map_or(0, |all| all.iter().map(|s| s["mentions"].as_u64().unwrap()).sum())
    }

    fn metric(&self, name: &str) -> u64 {
        let text = self.ask("GET", "/metrics", "");
        let line =
            text.as_str().unwrap().lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(' ').map(str::to_owned));
        line.unwrap().parse().unwrap()
    }

    #[track_caller]
    fn until(&self, what: &str, mut holds: impl FnMut() -> bool) {
        let began = Instant::now();
        while !holds() {
            assert!(began.elapsed() < Duration::from_secs(30), "never: {what}");
            std::thread::sleep(Duration::from_millis(30));
        }
    }
}

impl Drop for Moved {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn jump(file: &Path, seconds: i64) {
    let file = std::fs::File::options().create(true).truncate(false).write(true).open(file).unwrap();
    file.write_all_at(&seconds.to_le_bytes(), 0).unwrap();
}

#[test]
fn a_clock_that_jumps_closes_nothing_and_loses_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (source, shim) = (dir.path().join("shim.c"), dir.path().join("shim.so"));
    std::fs::write(&source, SHIM).unwrap();
    let built = Command::new("cc").args(["-shared", "-fPIC", "-O1", "-o"]).arg(&shim).arg(&source).arg("-ldl").output();
    if !built.is_ok_and(|o| o.status.success()) {
        println!("skipped: no C compiler (apt install gcc)");
        return;
    }
    jump(&dir.path().join("offset"), 0);
    let process = Moved::start(dir.path(), &shim);
    process.post("a");
    process.until("the first are counted", || process.metric("cashtag_live_posts_scored_total") == 10);
    process.until("and shown", || process.mentions() == 10);
    // Two hours forward: longer than windows wait for late posts.
    process.jump(2 * 3_600);
    let health = process.ask("GET", "/health", "");
    assert_eq!(health["status"], "ok");
    std::thread::sleep(Duration::from_secs(2));
    process.post("b");
    process.until("those after a jump forward count, too", || process.mentions() == 20);
    assert_eq!(process.metric("cashtag_live_posts_too_late_total"), 0);
    let newest = process.ask("GET", "/v1/signals/AAA?window=5m", "");
    assert!(newest["signals"].as_array().unwrap().iter().all(|s| s["final"] == false), "{newest}");
    // Two hours back: what comes now seems to be from the future.
    process.jump(-2 * 3_600);
    process.post("c");
    process.until("they are kept", || process.metric("cashtag_live_posts_scored_total") == 30);
    process.jump(0);
    process.post("d");
    process.until("with the right time all is as before", || process.mentions() >= 30);
    drop(process);
    // Killed, and started while the clock is wrong.
    jump(&dir.path().join("offset"), 2 * 3_600);
    let process = Moved::start(dir.path(), &shim);
    assert!(process.mentions() >= 30);
    process.post("e");
    process.until("every post is there", || {
        let posts = process.ask("GET", "/v1/posts?limit=100", "");
        posts["posts"].as_array().is_some_and(|all| all.len() == 50)
    });
}
