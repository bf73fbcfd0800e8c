//! A real nats-server with a directory of its own, which can be killed and started again.

use std::io::Read;
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

pub(crate) struct Nats {
    child: Option<Child>,
    pub(crate) port: u16,
    directory: tempfile::TempDir,
    jetstream: bool,
}

impl Nats {
    /// `None`, and a line that says so, where there is none.
    pub(crate) fn start() -> Option<Self> {
        Self::with(true)
    }

    pub(crate) fn without_jetstream() -> Option<Self> {
        Self::with(false)
    }

    fn with(jetstream: bool) -> Option<Self> {
        if Command::new("nats-server").arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_err() {
            println!("skipped: no nats-server (apt install nats-server)");
            return None;
        }
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let mut nats = Self { child: None, port, directory: tempfile::tempdir().unwrap(), jetstream };
        nats.begin();
        Some(nats)
    }

    pub(crate) fn url(&self) -> String {
        format!("nats://127.0.0.1:{}", self.port)
    }

    fn store(&self) -> PathBuf {
        self.directory.path().join("store")
    }

    /// Starts it, and waits until it answers.
    pub(crate) fn begin(&mut self) {
        let mut command = Command::new("nats-server");
        command.args(["-a", "127.0.0.1", "-p", &self.port.to_string(), "-l"]).arg(self.directory.path().join("log"));
        if self.jetstream {
            command.arg("-js").arg("-sd").arg(self.store());
        }
        self.child = Some(command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap());
        let began = Instant::now();
        loop {
            if let Ok(mut stream) = TcpStream::connect(("127.0.0.1", self.port)) {
                stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
                let mut hello = [0; 4];
                if stream.read_exact(&mut hello).is_ok() && &hello == b"INFO" {
                    return;
                }
            }
            let log = std::fs::read_to_string(self.directory.path().join("log")).unwrap_or_default();
            assert!(began.elapsed() < Duration::from_secs(20), "nats-server does not start: {log}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// SIGKILL; whether that is what ended it.
    pub(crate) fn kill(&mut self) -> bool {
        use std::os::unix::process::ExitStatusExt;
        let Some(mut child) = self.child.take() else { return false };
        child.kill().unwrap();
        child.wait().unwrap().signal() == Some(9)
    }

    /// All that it had on its disk is gone.
    pub(crate) fn lose_everything(&mut self) {
        self.kill();
        std::fs::remove_dir_all(self.store()).unwrap();
        self.begin();
    }
}

impl Drop for Nats {
    fn drop(&mut self) {
        self.kill();
    }
}
