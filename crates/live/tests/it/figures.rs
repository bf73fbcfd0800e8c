//! How fast the pipeline is without a model: from a file to closed windows. `docs/live.md` has the command.

use std::time::Instant;

use cashtag_live::sources::file::{Replay, Speed};

use crate::oracle::{assert_same, lines, stream};
use crate::rig::{options, run_to_end, write};

/// Reading, checking, the log (synced), recognising copies, windows, the store: all but the model, on a day of posts.
#[test]
#[ignore = "a measurement: it wants the machine for itself"]
fn posts_per_second_without_a_model() {
    let count: usize = std::env::var("CASHTAG_LIVE_POSTS").ok().and_then(|n| n.parse().ok()).unwrap_or(200_000);
    let dir = tempfile::tempdir().unwrap();
    let posts = stream(count, 41);
    let path = write(dir.path(), "day.jsonl", &lines(&posts));
    let data = dir.path().join("data");
    let began = Instant::now();
    run_to_end(options(&data), vec![Box::new(Replay::file(path, Speed::Fastest))]).unwrap();
    let seconds = began.elapsed().as_secs_f64();
    println!("{count} posts in {seconds:.2} s: {:.0} posts/s from the file to closed windows", count as f64 / seconds);
    assert_same(&data, &posts);
}
