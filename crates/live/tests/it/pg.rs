//! A real PostgreSQL server for tests: from the binaries of the distribution, in a directory of its own, on a free port.
//!
//! A shell stands between the test and the server: it ends the server and removes the directory when its standard input
//! ends, so nothing is left behind by a test that panics or is killed.

#![allow(dead_code, reason = "the tests of two crates use it, each a part")]

use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// A server refuses to run as root.
const NOBODY: u32 = 65_534;
const PASSWORD: &str = "o pen/sesame";

pub(crate) struct Server {
    bin: PathBuf,
    dir: PathBuf,
    port: u16,
    shell: Option<(Child, ChildStdin)>,
    more: Vec<String>,
}

fn binaries() -> Option<PathBuf> {
    let mut all: Vec<PathBuf> = std::fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .flatten()
        .map(|e| e.path().join("bin"))
        .filter(|b| b.join("initdb").exists() && b.join("postgres").exists())
        .collect();
    all.sort();
    all.pop()
}

fn is_root() -> bool {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata("/proc/self").is_ok_and(|m| m.uid() == 0)
}

/// The command, as somebody who may run a server.
fn command(program: &Path) -> Command {
    let mut command = Command::new(program);
    if is_root() {
        command.uid(NOBODY).gid(NOBODY);
    }
    command.env("LC_ALL", "C").env_remove("PGPASSWORD").current_dir("/");
    command
}

impl Server {
    /// A new server with settings (`-c` of postgres) beyond the usual ones; `None`, and a line that says why, where there
    /// are no binaries.
    pub(crate) fn start(more: &[&str]) -> Option<Self> {
        let Some(bin) = binaries() else {
            println!("skipped: no PostgreSQL server (apt install postgresql)");
            return None;
        };
        let dir = tempfile::Builder::new().prefix("cashtag-pg-").tempdir_in("/tmp").unwrap().keep();
        std::fs::write(dir.join("password"), PASSWORD).unwrap();
        let data = dir.join("data");
        if is_root() {
            for path in [&dir, &dir.join("password")] {
                std::os::unix::fs::chown(path, Some(NOBODY), Some(NOBODY)).unwrap();
            }
        }
        let made = command(&bin.join("initdb"))
            .args(["-U", "cashtag", "-A", "scram-sha-256", "-E", "UTF8", "--locale=C", "--no-sync", "--pwfile"])
            .arg(dir.join("password"))
            .arg("-D")
            .arg(&data)
            .output()
            .unwrap();
        assert!(made.status.success(), "initdb: {}", String::from_utf8_lossy(&made.stderr));
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let more = more.iter().map(ToString::to_string).collect();
        let mut server = Self { bin, dir, port, shell: None, more };
        server.go_on();
        Some(server)
    }

    /// The one server of all tests that do not stop it.
    pub(crate) fn shared() -> Option<&'static Self> {
        static SHARED: OnceLock<Option<Server>> = OnceLock::new();
        SHARED.get_or_init(|| Self::start(&[])).as_ref()
    }

    /// Starts it again, on the same data and port.
    pub(crate) fn go_on(&mut self) {
        let script = "\"$1/postgres\" -D \"$2/data\" -p \"$3\" -k \"$2\" -h 127.0.0.1 -c fsync=off -c max_connections=60 $4 \
                      >>\"$2/log\" 2>&1 </dev/null & pid=$!; read line; kill -QUIT $pid; wait $pid; \
                      [ \"$line\" = keep ] || rm -rf \"$2\"";
        let mut child = command(Path::new("/bin/sh"))
            .args(["-c", script, "sh"])
            .arg(&self.bin)
            .arg(&self.dir)
            .args([self.port.to_string(), self.more.iter().map(|s| format!("-c {s} ")).collect()])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let stdin = child.stdin.take().unwrap();
        self.shell = Some((child, stdin));
        let began = Instant::now();
        while !self.try_sql("postgres", "SELECT 1") {
            let log = || std::fs::read_to_string(self.dir.join("log")).unwrap_or_default();
            assert!(began.elapsed() < Duration::from_secs(60), "the server does not start: {}", log());
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Ends it at once, as a crash does (SIGQUIT: no checkpoint, recovery at the next start).
    pub(crate) fn crash(&mut self) {
        if let Some((mut child, mut stdin)) = self.shell.take() {
            let _ = stdin.write_all(b"keep\n");
            drop(stdin);
            let _ = child.wait();
        }
    }

    fn psql(&self, database: &str, sql: &str) -> Command {
        let mut psql = Command::new(self.bin.join("psql"));
        psql.args(["-X", "-q", "-t", "-A", "-v", "ON_ERROR_STOP=1", "-h", "127.0.0.1", "-U", "cashtag"])
            .args(["-p", &self.port.to_string(), "-d", database, "-c", sql])
            .env("PGPASSWORD", PASSWORD)
            .env("PGCONNECT_TIMEOUT", "5");
        psql
    }

    fn try_sql(&self, database: &str, sql: &str) -> bool {
        TcpStream::connect(("127.0.0.1", self.port)).is_ok()
            && self.psql(database, sql).output().is_ok_and(|o| o.status.success())
    }

    pub(crate) fn sql(&self, database: &str, sql: &str) -> String {
        let output = self.psql(database, sql).output().unwrap();
        assert!(output.status.success(), "{sql}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }

    /// An empty database of its own, and its address.
    pub(crate) fn database(&self) -> (String, String) {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let name = format!("test{}", NUMBER.fetch_add(1, Ordering::Relaxed));
        self.sql("postgres", &format!("CREATE DATABASE {name}"));
        let url = self.url(&name);
        (name, url)
    }

    pub(crate) fn url(&self, database: &str) -> String {
        let password = PASSWORD.replace(' ', "%20").replace('/', "%2F");
        format!("postgres://cashtag:{password}@127.0.0.1:{}/{database}", self.port)
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    pub(crate) fn password() -> &'static str {
        PASSWORD
    }

    /// Puts a file where the server finds it.
    pub(crate) fn put(&self, name: &str, content: &[u8]) -> PathBuf {
        let path = self.dir.join("data").join(name);
        std::fs::write(&path, content).unwrap();
        use std::os::unix::fs::PermissionsExt;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        if is_root() {
            std::os::unix::fs::chown(&path, Some(NOBODY), Some(NOBODY)).unwrap();
        }
        path
    }

    /// Settings that are in force after the next start.
    pub(crate) fn set(&mut self, settings: &[&str]) {
        self.more.extend(settings.iter().map(ToString::to_string));
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if self.shell.is_none() {
            let _ = std::fs::remove_dir_all(&self.dir);
        }
        // Else the shell does it, when its input ends.
        if let Some((mut child, stdin)) = self.shell.take() {
            drop(stdin);
            let _ = child.wait();
        }
    }
}
