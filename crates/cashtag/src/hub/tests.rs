//! Pulls from a hub on localhost that keeps to the rules, and from ones that do not.

#[allow(dead_code, unreachable_pub, reason = "shared with the tests of the whole program")]
#[path = "../../tests/it/server.rs"]
mod server;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::client::{Client, Patience};
use super::layout::Layout;
use super::name::{ModelName, Repository};
use server::{Answer, COMMIT, Request, Server, sha256, weights};

const PATIENCE: Patience = Patience { tries: 3, pause: Duration::from_millis(20), silence: Duration::from_millis(400) };
const WEIGHTS: &str = "/resolve/0123456789abcdef0123456789abcdef01234567/model.safetensors";

struct Here {
    dir: tempfile::TempDir,
}

impl Here {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    fn layout(&self) -> Layout {
        Layout::at(&self.dir.path().join("hub"))
    }

    fn pull(&self, server: &Server, name: &str, token: Option<&str>) -> anyhow::Result<PathBuf> {
        let repository = match ModelName::parse(name)? {
            ModelName::Repository(repository) => repository,
            other => panic!("{other:?}"),
        };
        super::pull_repository(&Client::new(&server.url, token, PATIENCE)?, &self.layout(), &repository)
    }

    /// The message of the failure of a pull, with its causes.
    fn error(&self, server: &Server, name: &str) -> String {
        format!("{:#}", self.pull(server, name, None).unwrap_err())
    }

    /// All files and links below the cache, sorted.
    fn files(&self) -> Vec<String> {
        let mut found = Vec::new();
        let mut folders = vec![self.dir.path().to_owned()];
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(folder).unwrap().flatten() {
                let metadata = std::fs::symlink_metadata(entry.path()).unwrap();
                if metadata.is_dir() {
                    folders.push(entry.path());
                } else {
                    found.push(entry.path().strip_prefix(self.dir.path()).unwrap().display().to_string());
                }
            }
        }
        found.sort();
        found
    }

    fn blob(&self, name: &str) -> PathBuf {
        self.dir.path().join("hub/models--test--tiny/blobs").join(name)
    }
}

/// A hub with the tiny repository that misbehaves where `twist` says so.
fn hub(twist: impl Fn(&Request, usize) -> Option<Answer> + Send + Sync + 'static) -> Server {
    let tiny = server::Repository::tiny();
    Server::start(move |request, before| twist(request, before).unwrap_or_else(|| tiny.answer(request)))
}

fn is_weights(request: &Request) -> bool {
    request.path.ends_with(WEIGHTS)
}

#[test]
fn a_checkpoint_lies_as_transformers_has_it() {
    let (here, hub) = (Here::new(), hub(|_, _| None));
    let path = here.pull(&hub, "test/tiny", None).unwrap();
    let folder = here.dir.path().join("hub/models--test--tiny");
    assert_eq!(path, folder.join("snapshots").join(COMMIT));
    assert_eq!(std::fs::read_to_string(folder.join("refs/main")).unwrap(), COMMIT);
    assert_eq!(std::fs::read(path.join("model.safetensors")).unwrap(), weights());
    let link = std::fs::read_link(path.join("model.safetensors")).unwrap();
    assert_eq!(link, Path::new("../../blobs").join(sha256(&weights())));
    let mut names: Vec<_> = std::fs::read_dir(&path).unwrap().flatten().map(|e| e.file_name()).collect();
    names.sort();
    assert_eq!(names, ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]);
    assert_eq!(here.files().len(), 4 + 4 + 1, "{:?}", here.files());

    // Once is enough: the second time only the listing is asked for, and offline nothing is.
    let before = hub.requests().len();
    assert_eq!(here.pull(&hub, "test/tiny", None).unwrap(), path);
    assert_eq!(hub.requests().len(), before + 1);
    let repository = |name: &str| match ModelName::parse(name).unwrap() {
        ModelName::Repository(r) => r,
        other => panic!("{other:?}"),
    };
    assert_eq!(super::cached(&here.layout(), &repository("test/tiny")), Some(path.clone()));
    assert_eq!(super::cached(&here.layout(), &repository(&format!("test/tiny@{COMMIT}"))), Some(path.clone()));
    assert_eq!(super::cached(&here.layout(), &repository("test/tiny@v2")), None);
    std::fs::remove_file(path.join("model.safetensors")).unwrap();
    assert_eq!(super::cached(&here.layout(), &repository("test/tiny")), None);
}

#[test]
fn a_dropped_connection_is_taken_up_where_it_broke() {
    let cuts = [100_000usize, 150_000, 50_000];
    let hub = hub(move |request, before| {
        let mut answer = server::Repository::tiny().answer(request);
        answer.cut = cuts.get(before).copied();
        is_weights(request).then_some(answer)
    });
    let here = Here::new();
    // Three breaks are as many as there are tries, but each brought something.
    let path = here.pull(&hub, "test/tiny", None).unwrap();
    assert_eq!(std::fs::read(path.join("model.safetensors")).unwrap(), weights());
    let ranges: Vec<_> = hub.requests_for(WEIGHTS).iter().map(|r| r.header("range").map(str::to_string)).collect();
    assert_eq!(ranges, [None, Some("bytes=100000-".into()), Some("bytes=250000-".into())]);
}

#[test]
fn a_later_pull_continues_what_an_earlier_one_left() {
    let (here, hub) = (Here::new(), hub(|_, _| None));
    let part = here.blob(&(sha256(&weights()) + ".incomplete"));
    std::fs::create_dir_all(part.parent().unwrap()).unwrap();
    std::fs::write(&part, &weights()[..123_456]).unwrap();
    here.pull(&hub, "test/tiny", None).unwrap();
    assert_eq!(hub.requests_for(WEIGHTS)[0].header("range"), Some("bytes=123456-"));
    assert!(!part.exists());
}

#[test]
fn a_complete_part_is_only_checked() {
    let (here, hub) = (Here::new(), hub(|_, _| None));
    let part = here.blob(&(sha256(&weights()) + ".incomplete"));
    std::fs::create_dir_all(part.parent().unwrap()).unwrap();
    std::fs::write(&part, weights()).unwrap();
    here.pull(&hub, "test/tiny", None).unwrap();
    assert!(hub.requests_for(WEIGHTS).is_empty());
}

#[test]
fn a_server_that_cannot_continue_begins_anew() {
    let hub = hub(|request, before| {
        let mut answer = Answer::ok(weights());
        answer.cut = (before == 0).then_some(70_000);
        is_weights(request).then_some(answer)
    });
    let here = Here::new();
    let path = here.pull(&hub, "test/tiny", None).unwrap();
    assert_eq!(std::fs::read(path.join("model.safetensors")).unwrap(), weights());
    assert_eq!(hub.requests_for(WEIGHTS)[1].header("range"), Some("bytes=70000-"));
}

#[test]
fn a_wrong_hash_leaves_nothing_behind() {
    let hub = hub(|request, before| {
        let mut bytes = weights();
        bytes[5] ^= u8::from(before == 0);
        is_weights(request).then(|| Answer::ok(bytes))
    });
    let here = Here::new();
    let error = here.error(&hub, "test/tiny");
    assert!(
        error.starts_with("cannot fetch model.safetensors of test/tiny: model.safetensors is damaged: its sha256 is "),
        "{error}"
    );
    assert!(error.contains(&sha256(&weights())));
    assert!(!here.files().iter().any(|f| f.contains("incomplete") || f.contains("snapshots")), "{:?}", here.files());
    here.pull(&hub, "test/tiny", None).unwrap();
}

#[test]
fn refusals_come_with_their_mend() {
    let refused = |status: u16, code: &'static str, name: &str, token: Option<&str>| {
        let hub = hub(move |_, _| Some(Answer::status(status).header("X-Error-Code", code)));
        let here = Here::new();
        let error = here.pull(&hub, name, token).unwrap_err().to_string();
        assert_eq!(hub.requests().len(), 1, "trying again does not help: {error}");
        error.replace(&hub.url, "HUB")
    };
    let licence = "accept its licence at HUB/a/b, then set HF_TOKEN to a token that may read it";
    assert_eq!(
        refused(401, "", "a/b", None),
        format!("a/b does not exist, or is private or gated (401)\n  hint: check the name; if it is gated, {licence}")
    );
    assert_eq!(refused(401, "GatedRepo", "a/b", None), format!("a/b is gated (401)\n  hint: {licence}"));
    assert_eq!(refused(403, "GatedRepo", "a/b", Some("hf_x")), format!("a/b is gated (403)\n  hint: {licence}"));
    assert_eq!(
        refused(401, "", "a/b", Some("hf_secret")),
        "the hub does not accept the token, or a/b does not exist (401)\n  hint: check the name, and HF_TOKEN: it may have expired"
    );
    assert_eq!(
        refused(404, "RepoNotFound", "a/b", None),
        "a/b does not exist (404)\n  hint: check the name and the revision at HUB/a/b"
    );
    assert_eq!(
        refused(404, "RevisionNotFound", "a/b@v9", None),
        "a/b has no revision v9 (404)\n  hint: HUB/a/b/tree/main lists its branches and tags"
    );
    assert_eq!(refused(418, "", "a/b", None), "HUB/api/models/a/b/revision/main answered with status 418");
}

#[test]
fn a_busy_hub_is_asked_again() {
    let hub = hub(|request, before| match (is_weights(request), before) {
        (true, 0) => Some(Answer::status(429).header("Retry-After", "0")),
        (true, 1) => Some(Answer::status(503)),
        _ => None,
    });
    Here::new().pull(&hub, "test/tiny", None).unwrap();
    assert_eq!(hub.requests_for(WEIGHTS).len(), 3);
}

#[test]
fn a_hub_that_stays_busy_is_given_up() {
    let busy = hub(|_, _| Some(Answer::status(503)));
    let error = Here::new().error(&busy, "test/tiny");
    assert_eq!(
        error,
        "127.0.0.1 is not able to answer (503) (3 tries)\n  hint: try again later: what was fetched stays"
    );
    assert_eq!(busy.requests().len(), 3);
    let strict = hub(|_, _| Some(Answer::status(429)));
    assert!(
        Here::new()
            .error(&strict, "test/tiny")
            .ends_with("(429) (3 tries)\n  hint: with HF_TOKEN set more requests are allowed; or try again later")
    );
}

#[test]
fn nobody_there() {
    let here = Here::new();
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let client = Client::new(&format!("http://127.0.0.1:{port}"), None, PATIENCE).unwrap();
    let repository = Repository::dataset("test/tiny").unwrap();
    let error = super::pull_repository(&client, &here.layout(), &repository).unwrap_err().to_string();
    assert!(
        error.starts_with("no connection to 127.0.0.1: connection refused (3 tries)\n  hint: check the connection"),
        "{error}"
    );
}

#[test]
fn the_token_stays_at_the_hub() {
    let elsewhere = Server::start(|request, _| server::part(request, &weights()));
    let target = format!("{}/signed?signature=s", elsewhere.url);
    // 127.0.0.1 and localhost are two hosts, and so are two ports of one.
    let target_by_name = target.replace("127.0.0.1", "localhost");
    for target in [target, target_by_name] {
        let hub = hub(move |request, _| match request.path.as_str() {
            path if path.ends_with(WEIGHTS) => Some(Answer::redirect("/moved/model.safetensors")),
            "/moved/model.safetensors" => Some(Answer::redirect(target.clone())),
            _ => None,
        });
        Here::new().pull(&hub, "test/tiny", Some("hf_secret")).unwrap();
        for request in hub.requests() {
            assert_eq!(request.header("authorization"), Some("Bearer hf_secret"), "{request:?}");
        }
    }
    assert_eq!(elsewhere.requests().len(), 2);
    for request in elsewhere.requests() {
        assert_eq!(request.header("authorization"), None);
        assert!(!format!("{request:?}").contains("hf_secret"));
    }
}

#[test]
fn a_redirected_download_continues_too() {
    let elsewhere = Server::start(|request, before| {
        let mut answer = server::part(request, &weights());
        answer.cut = (before == 0).then_some(200_000);
        answer
    });
    let target = format!("{}/x", elsewhere.url);
    let hub = hub(move |request, _| is_weights(request).then(|| Answer::redirect(target.clone())));
    Here::new().pull(&hub, "test/tiny", None).unwrap();
    assert_eq!(elsewhere.requests()[1].header("range"), Some("bytes=200000-"));
}

#[test]
fn redirects_end() {
    let hub = hub(|request, _| is_weights(request).then(|| Answer::redirect(request.path.clone())));
    assert!(Here::new().error(&hub, "test/tiny").ends_with("redirects more than 10 times"));
    assert_eq!(hub.requests_for(WEIGHTS).len(), 11);
}

#[test]
fn names_and_checksums_that_would_leave_the_cache() {
    for name in ["../../evil.safetensors", "/etc/evil.safetensors", "a/../../b", "tokenizer\n.json", "..", "C:\\evil"] {
        let mut evil = server::Repository::tiny();
        evil.files.push((name.into(), b"evil".to_vec()));
        let hub = Server::start(move |request, _| evil.answer(request));
        let here = Here::new();
        let error = here.error(&hub, "test/tiny");
        assert!(error.contains("would lie outside of the cache: nothing was fetched"), "{error}");
        assert_eq!(here.files(), [] as [&str; 0]);
        assert_eq!(hub.requests().len(), 1);
    }
    let hub = hub(|request, _| {
        let file = r#"{"rfilename": "model.safetensors", "size": 4, "blobId": "../../../evil"}, {"rfilename": "config.json", "blobId": "a"}"#;
        let listing = format!("{{\"sha\": \"{COMMIT}\", \"siblings\": [{file}]}}");
        request.path.starts_with("/api").then(|| Answer::ok(listing))
    });
    let here = Here::new();
    assert_eq!(
        here.error(&hub, "test/tiny").lines().next().unwrap(),
        "the hub gives model.safetensors a checksum that is none"
    );
    assert_eq!(here.files(), [] as [&str; 0]);
}

#[test]
fn answers_that_are_none() {
    let huge = format!(
        "{{\"sha\": \"{COMMIT}\", \"siblings\": [{{\"rfilename\": \"model.safetensors\", \"blobId\": \"a\", \"size\": 99999999999999999}}, {{\"rfilename\": \"config.json\"}}]}}"
    );
    let deep = "[".repeat(200_000);
    for listing in ["<html>Sign in to the airport's network</html>", "{}", "{\"sha\": \"../..\"}", "", &deep, &huge] {
        let listing = listing.to_string();
        let hub = hub(move |request, _| request.path.starts_with("/api").then(|| Answer::ok(listing.clone())));
        let error = Here::new().error(&hub, "test/tiny");
        assert!(error.contains("is not what a hub says") || error.contains("that cannot be"), "{error}");
    }
}

#[test]
fn a_slow_server_is_waited_for_and_a_silent_one_is_not() {
    // 300 kB in 15 pieces with pauses: longer than the patience in all, but never in one.
    let hub = hub(|request, before| {
        let mut answer = server::Repository::tiny().answer(request);
        match before {
            0 => answer.stall = Some((20_000, Duration::from_secs(30))),
            _ => answer.slow = Some((20_000, Duration::from_millis(60))),
        }
        is_weights(request).then_some(answer)
    });
    let (here, started) = (Here::new(), Instant::now());
    let path = here.pull(&hub, "test/tiny", None).unwrap();
    assert_eq!(std::fs::read(path.join("model.safetensors")).unwrap(), weights());
    let ranges: Vec<_> = hub.requests_for(WEIGHTS).iter().map(|r| r.header("range").map(str::to_string)).collect();
    assert_eq!(ranges, [None, Some("bytes=20000-".into())]);
    assert!(
        started.elapsed() > PATIENCE.silence && started.elapsed() < Duration::from_secs(20),
        "{:?}",
        started.elapsed()
    );
}

#[test]
fn more_than_announced_is_refused() {
    let hub = hub(|request, _| is_weights(request).then(|| Answer::ok([weights(), vec![0; 10]].concat())));
    let error = Here::new().error(&hub, "test/tiny");
    assert!(
        error.ends_with("the server sends more than the 300000 bytes that model.safetensors should have"),
        "{error}"
    );
}

#[test]
fn less_than_announced_is_given_up() {
    let hub = hub(|request, _| is_weights(request).then(|| server::part(request, &weights()[..9])));
    let error = Here::new().error(&hub, "test/tiny");
    let said = "the server sends 9 bytes of model.safetensors, which should have 300000";
    assert!(error.contains(said) || error.contains("does not continue model.safetensors at byte 9"), "{error}");
    assert!(hub.requests_for(WEIGHTS).len() <= 6);
}

#[test]
fn a_hub_that_says_etags_only_in_headers() {
    let tiny = server::Repository::tiny();
    let names: Vec<String> = tiny.files.iter().map(|(n, _)| format!("{{\"rfilename\": {n:?}}}")).collect();
    let listing = format!("{{\"sha\": \"{COMMIT}\", \"siblings\": [{}]}}", names.join(","));
    let cdn = Server::start(|request, _| server::part(request, &weights()));
    let target = cdn.url.clone();
    let hub = hub(move |request, _| match &request.path {
        path if path.starts_with("/api") => Some(Answer::ok(listing.clone())),
        path if path.ends_with(WEIGHTS) => Some(
            Answer::redirect(target.clone())
                .header("X-Linked-ETag", format!("\"{}\"", sha256(&weights())))
                .header("X-Linked-Size", "300000"),
        ),
        _ => None,
    });
    let here = Here::new();
    let path = here.pull(&hub, "test/tiny", None).unwrap();
    assert_eq!(std::fs::read(path.join("model.safetensors")).unwrap(), weights());
    assert!(here.blob(&sha256(&weights())).exists());
    assert_eq!(std::fs::read_to_string(path.join("config.json")).unwrap(), "{\"model_type\": \"llama\"}");
}

#[test]
fn a_data_set() {
    let files = [
        ("README.md", "x"),
        ("data/train.parquet", "PAR1"),
        ("dev.csv", "text,label\n"),
        ("a.jsonl", "{}"),
        ("x.py", ""),
    ];
    let files = files.map(|(n, b)| (n.to_string(), b.as_bytes().to_vec())).to_vec();
    let tweets = server::Repository { id: "test/tweets".into(), files };
    let hub = Server::start(move |request, _| tweets.answer(request));
    let here = Here::new();
    let client = Client::new(&hub.url, None, PATIENCE).unwrap();
    let repository = Repository::dataset("test/tweets").unwrap();
    let path = super::pull_repository(&client, &here.layout(), &repository).unwrap();
    assert_eq!(std::fs::read_to_string(path.join("data/train.parquet")).unwrap(), "PAR1");
    let links = here.files().into_iter().filter(|f| f.contains("snapshots")).count();
    assert_eq!(links, 3);
    assert!(hub.requests()[0].path.starts_with("/api/datasets/test/tweets/revision/main"));
    assert!(hub.requests_for("/datasets/test/tweets/resolve/").len() == 3);
    assert_eq!(super::cached(&here.layout(), &repository), Some(path));
}

#[test]
fn two_pulls_at_once_fetch_once() {
    let hub = hub(|request, _| {
        let mut answer = server::Repository::tiny().answer(request);
        answer.slow = Some((30_000, Duration::from_millis(20)));
        is_weights(request).then_some(answer)
    });
    let here = Here::new();
    std::thread::scope(|scope| {
        let pulls = [0, 1].map(|_| scope.spawn(|| here.pull(&hub, "test/tiny", None).unwrap()));
        let [a, b] = pulls.map(|p| p.join().unwrap());
        assert_eq!(a, b);
        assert_eq!(std::fs::read(a.join("model.safetensors")).unwrap(), weights());
    });
    assert_eq!(hub.requests_for(WEIGHTS).len(), 1);
}
