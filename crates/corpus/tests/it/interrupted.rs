//! kill -9 in mid-run, two runs on one journal, a full disk.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use cashtag_corpus::chat_api::{ChatClient, ClientOptions};
use cashtag_corpus::generate::{GenerateOptions, generate};
use cashtag_corpus::prepare::{PrepareOptions, prepare};
use cashtag_corpus::{Error, write_dataset_csv};

use crate::generation::options;
use crate::server::{Answer, Request, Server, fingerprint, good_answer};

const BASE: &str = "CASHTAG_TEST_API_BASE";
const JOURNAL: &str = "CASHTAG_TEST_JOURNAL";

fn eighty() -> GenerateOptions {
    GenerateOptions { concurrency: 4, ..options(80) }
}

/// Not a test by itself: the process that the others kill. Does nothing unless it is started by them.
#[test]
fn child_process() {
    let (Ok(base), Ok(journal)) = (std::env::var(BASE), std::env::var(JOURNAL)) else { return };
    let client = ChatClient::new(ClientOptions { api_base: base, ..ClientOptions::default() }).unwrap();
    generate(&client, &eighty(), Path::new(&journal), &()).unwrap();
}

fn spawn(server: &Server, journal: &Path) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["interrupted::child_process", "--exact", "--test-threads=1"])
        .env(BASE, &server.base)
        .env(JOURNAL, journal)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(60), "waited a minute until {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// An answer that depends on the request alone, after a few milliseconds.
fn unhurried(request: &Request) -> Answer {
    std::thread::sleep(Duration::from_millis(2 + fingerprint(request) % 8));
    good_answer(request)
}

#[test]
fn killed_again_and_again() {
    let folder = tempfile::tempdir().unwrap();
    let undisturbed = {
        let server = Server::start(unhurried);
        generate(&server.client(), &eighty(), &folder.path().join("undisturbed.jsonl"), &()).unwrap()
    };
    let server = Server::start(unhurried);
    let journal = folder.path().join("journal.jsonl");
    let mut under_way = 0;
    for served in [1, 7, 20, 33, 34, 60] {
        let mut child = spawn(&server, &journal);
        wait_until("the server has answered", || server.served() >= served);
        child.kill().unwrap();
        child.wait().unwrap();
        // Up to four answers were under way, and one may have been torn.
        under_way += 5;
    }
    let outcome = generate(&server.client(), &eighty(), &journal, &()).unwrap();
    assert_eq!((outcome.examples.len(), outcome.stop.is_none()), (80, true));
    assert_eq!(outcome.examples, undisturbed.examples, "as if nothing had happened");
    let requests = server.requests().len();
    assert!(requests <= 81 + under_way, "{requests} requests for 81 answers: what was answered is not asked again");
    // Every line of the journal is whole.
    let content = std::fs::read_to_string(&journal).unwrap();
    assert!(content.lines().all(|line| serde_json::from_str::<serde_json::Value>(line).is_ok()));
}

#[test]
fn two_runs_on_one_journal() {
    let server = Server::start(|_: &Request| Answer::Silence(Duration::from_secs(30)));
    let folder = tempfile::tempdir().unwrap();
    let journal = folder.path().join("journal.jsonl");
    let mut child = spawn(&server, &journal);
    wait_until("the child asks", || !server.requests().is_empty());
    let error = generate(&server.client(), &eighty(), &journal, &()).unwrap_err();
    assert!(matches!(error, Error::Locked { .. }), "{error}");
    assert!(error.to_string().contains("in use by another run"), "{error}");
    child.kill().unwrap();
    child.wait().unwrap();
    let server = Server::start(good_answer);
    assert_eq!(
        generate(&server.client(), &eighty(), &journal, &()).unwrap().examples.len(),
        80,
        "the lock died with it"
    );
}

/// A file system of so many kilobytes, unmounted when dropped. `None` where one cannot be mounted.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn new(kilobytes: u32) -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let size = format!("size={kilobytes}k");
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &size, "tmpfs"])
            .arg(folder.path())
            .stderr(Stdio::null())
            .status();
        if mounted.is_ok_and(|status| status.success()) {
            return Some(Self(folder));
        }
        println!("skipped: no small file system can be mounted here (this needs root)");
        None
    }

    fn grow(&self, kilobytes: u32) {
        let size = format!("remount,size={kilobytes}k");
        let status = Command::new("mount").args(["-o", &size]).arg(self.0.path()).status().unwrap();
        assert!(status.success());
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0.path()).status();
    }
}

#[test]
fn a_full_disk_then_more_room() {
    let Some(disk) = SmallDisk::new(16) else { return };
    let server = Server::start(good_answer);
    let journal = disk.0.path().join("journal.jsonl");
    let error = generate(&server.client(), &eighty(), &journal, &()).unwrap_err().to_string();
    assert!(error.contains("journal.jsonl") && error.contains("hint: free some space"), "{error}");
    let asked = server.requests().len();
    assert!(asked < 60, "the run stops when nothing can be kept: {asked} requests");
    let content = std::fs::read_to_string(&journal).unwrap();
    assert!(content.ends_with('\n'), "nothing half is left");
    disk.grow(1024);
    assert_eq!(generate(&server.client(), &eighty(), &journal, &()).unwrap().examples.len(), 80);
}

#[test]
fn a_full_disk_leaves_the_old_files() {
    let Some(disk) = SmallDisk::new(64) else { return };
    let examples = cashtag_corpus::builtin().unwrap();
    let path = disk.0.path().join("dataset.csv");
    write_dataset_csv(&path, &examples[..20]).unwrap();
    let old = std::fs::read(&path).unwrap();
    let many: Vec<_> = std::iter::repeat_n(&examples[..200], 10).flatten().cloned().collect();
    let error = write_dataset_csv(&path, &many).unwrap_err().to_string();
    assert!(error.contains("dataset.csv") && error.contains("hint: free some space"), "{error}");
    assert_eq!(std::fs::read(&path).unwrap(), old);

    let elsewhere = tempfile::tempdir().unwrap();
    let input = elsewhere.path().join("many.csv");
    write_dataset_csv(&input, &examples).unwrap();
    let out_dir = disk.0.path().join("out");
    let error = prepare(
        &PrepareOptions { inputs: vec![input], out_dir: out_dir.clone(), ..PrepareOptions::default() },
        &mut |_, _| true,
    )
    .unwrap_err()
    .to_string();
    assert!(error.contains("hint: free some space"), "{error}");
    assert_eq!(std::fs::read_dir(out_dir).unwrap().count(), 0, "nothing half is left");
}
