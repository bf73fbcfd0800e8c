//! Parquet that DuckDB, polars and pandas read in one line.

use std::process::Command;

use cashtag_live::export::export;
use cashtag_live::sources::file::{Replay, Speed};

use crate::oracle::{expect, lines, stream};
use crate::place::{Place, on_both};
use crate::rig::{run_to_end, write};

/// Each reads the same numbers its own way and prints them.
const READERS: [(&str, &str); 3] = [
    (
        "duckdb",
        "import duckdb, sys
b = sys.argv[1] + '/bars/**/*.parquet'
q = lambda s: duckdb.sql(s).fetchall()[0]
print(q(f\"select count(*), sum(mentions) from read_parquet('{b}', hive_partitioning=true) where ticker='AAA' and interval='1m'\"))
print(q(f\"select count(*), count(distinct date) from '{sys.argv[1]}/scores/**/*.parquet'\"))
print(q(f\"select count(*) from '{sys.argv[1]}/scores/**/*.parquet' where list_contains(tickers, 'AAA') and available_at >= received_at and p_positive > 0.5\"))",
    ),
    (
        "polars",
        "import polars as pl, sys
b = pl.scan_parquet(sys.argv[1] + '/bars/**/*.parquet', hive_partitioning=True).filter((pl.col('ticker') == 'AAA') & (pl.col('interval') == '1m')).collect()
print((b.height, b['mentions'].sum()))
s = pl.scan_parquet(sys.argv[1] + '/scores/**/*.parquet', hive_partitioning=True).collect()
print((s.height, s['date'].n_unique()))
print((s.filter(pl.col('tickers').list.contains('AAA') & (pl.col('available_at') >= pl.col('received_at')) & (pl.col('p_positive') > 0.5)).height,))",
    ),
    (
        "pandas",
        "import pandas as pd, sys
b = pd.read_parquet(sys.argv[1] + '/bars')
b = b[(b.ticker == 'AAA') & (b.interval == '1m')]
print((len(b), int(b.mentions.sum())))
s = pd.read_parquet(sys.argv[1] + '/scores')
print((len(s), s.date.nunique()))
print((int((s.tickers.apply(lambda t: 'AAA' in t) & (s.available_at >= s.received_at) & (s.p_positive > 0.5)).sum()),))",
    ),
];

on_both!(the_usual_tools_read_the_export, long_texts_make_small_row_groups);

fn the_usual_tools_read_the_export(place: &Place) {
    let dir = &place.dir;
    let mut posts = stream(600, 41);
    // Over midnight.
    let midnight = posts[300].time / 86_400_000 * 86_400_000 + 86_400_000;
    let shift = midnight - posts[300].time;
    posts.iter_mut().for_each(|p| p.time += shift);
    let path = write(dir.path(), "day.jsonl", &lines(&posts));
    run_to_end(place.options(), vec![Box::new(Replay::file(path, Speed::Fastest))]).unwrap();
    let out = dir.path().join("out");
    let first = export(&place.location, &out, None).unwrap();
    assert_eq!((first.posts, first.files.len()), (600, 2 + 4 * 2));
    assert!(out.join("bars/interval=1m").is_dir());
    assert_eq!(export(&place.location, &out, None).unwrap(), first, "again");
    // Of revisions, a reader takes the last: here each window has one.
    let windows: Vec<u64> = expect(&posts)
        .into_iter()
        .filter(|(k, _)| k.0 == "1m" && k.2 == "AAA")
        .map(|(_, want)| want.mentions())
        .collect();
    let bullish = posts.iter().filter(|p| p.text.contains("$AAA") && p.text.contains("up")).count();
    let want = format!("({}, {})\n(600, 2)\n({bullish},)\n", windows.len(), windows.iter().sum::<u64>());
    let python = std::env::var("CASHTAG_TEST_PYTHON").unwrap_or_else(|_| "python3".into());
    for (module, script) in READERS {
        let there = Command::new(&python).args(["-c", &format!("import {module}")]).output();
        if !there.is_ok_and(|o| o.status.success()) {
            println!("skipped: no {module} for {python} (CASHTAG_TEST_PYTHON names another)");
            continue;
        }
        let output = Command::new(&python).args(["-c", script]).arg(&out).output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        assert_eq!(said, want, "{module}: {}", String::from_utf8_lossy(&output.stderr));
    }
}

/// Some noon.
const NOON: i64 = 1_764_331_200_000;

/// 27 MB of texts that do not compress well, on one day.
fn long_texts_make_small_row_groups(place: &Place) {
    use parquet::file::reader::{FileReader, SerializedFileReader};
    let mut posts = stream(300, 42);
    let mut state = 42u64;
    for post in &mut posts {
        post.time = NOON;
        post.text.extend((0..90_000).map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            char::from(b'0' + (state >> 58) as u8)
        }));
    }
    let path = write(place.dir.path(), "day.jsonl", &lines(&posts));
    run_to_end(place.options(), vec![Box::new(Replay::file(path, Speed::Fastest))]).unwrap();
    let day = NOON / 86_400_000 * 86_400_000;
    let (reader, mut after, mut most) = (place.location.reader().unwrap(), -1, 0);
    loop {
        let read = reader.posts_of_day(day, after, 1_000).unwrap();
        let Some(last) = read.last() else { break };
        after = last.post.seq as i64;
        most = most.max(read.iter().map(|p| p.post.post.text.len()).sum::<usize>());
    }
    assert!(most > 7_000_000 && most < 8_600_000, "{most} bytes of texts at a time");
    let out = place.dir.path().join("out");
    let exported = export(&place.location, &out, None).unwrap();
    assert_eq!(exported.posts, 300);
    let file = std::fs::File::open(&exported.files[0]).unwrap();
    let file = SerializedFileReader::new(file).unwrap();
    let groups: Vec<(i64, i64)> =
        file.metadata().row_groups().iter().map(|g| (g.num_rows(), g.compressed_size())).collect();
    assert_eq!(groups.iter().map(|g| g.0).sum::<i64>(), 300);
    assert!(groups.len() > 1 && groups.iter().all(|g| g.1 < 20 << 20), "{groups:?}");
}
