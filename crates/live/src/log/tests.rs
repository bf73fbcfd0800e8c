use std::os::unix::fs::FileExt;

use super::*;

fn options(segment_bytes: u64) -> LogOptions {
    LogOptions { fsync: Fsync::Always, segment_bytes }
}

fn all(log: &Log, from: u64) -> Vec<(u64, Vec<u8>)> {
    let mut reader = log.reader(from);
    std::iter::from_fn(|| reader.next_record().unwrap()).collect()
}

fn record(i: u64) -> Vec<u8> {
    format!("record {i} {}", "x".repeat((i % 40) as usize)).into_bytes()
}

/// The writer thread lets go of the files after the last handle; the lock goes with the handle itself.
fn reopen(log: Log, dir: &Path, bytes: u64) -> Log {
    drop(log);
    Log::open(dir, options(bytes)).unwrap()
}

#[test]
fn what_was_appended_is_read_across_segments_and_restarts() {
    let dir = tempfile::tempdir().unwrap();
    let mut log = Log::open(dir.path(), options(256)).unwrap();
    for i in 0..50 {
        assert_eq!(log.append(vec![record(2 * i), record(2 * i + 1)]).unwrap(), 2 * i);
        if i % 20 == 7 {
            log = reopen(log, dir.path(), 256);
        }
    }
    let want: Vec<_> = (0..100).map(|i| (i, record(i))).collect();
    assert_eq!(all(&log, 0), want);
    assert_eq!(all(&log, 63), want[63..]);
    assert!(log.shared.state().segments.len() > 5);
    assert!(!log.wait(100, Duration::from_millis(1)));
    assert!(log.wait(99, Duration::ZERO));
}

#[test]
fn a_tail_cut_anywhere_loses_only_the_record_that_was_cut() {
    let dir = tempfile::tempdir().unwrap();
    let log = Log::open(dir.path(), options(1 << 20)).unwrap();
    log.append((0..3).map(record).collect()).unwrap();
    let path = log.shared.state().segments[0].path.clone();
    let before = log.bytes();
    log.append(vec![record(3)]).unwrap();
    let after = log.bytes();
    drop(log);
    let whole = std::fs::read(&path).unwrap();
    for cut in before..after {
        std::fs::write(&path, &whole[..cut as usize]).unwrap();
        let log = Log::open(dir.path(), options(1 << 20)).unwrap();
        assert_eq!((log.end(), log.bytes()), (3, before), "cut at {cut}");
        // What comes next takes the place of what was cut.
        assert_eq!(log.append(vec![b"new".to_vec()]).unwrap(), 3);
        assert_eq!(all(&log, 2), [(2, record(2)), (3, b"new".to_vec())]);
        drop(log);
        for entry in std::fs::read_dir(dir.path()).unwrap().flatten() {
            std::fs::remove_file(entry.path()).unwrap();
        }
    }
}

#[test]
fn damage_in_the_middle_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let log = Log::open(dir.path(), options(64)).unwrap();
    for i in 0..6 {
        log.append(vec![record(i)]).unwrap();
    }
    let segments: Vec<_> = log.shared.state().segments.clone();
    assert!(segments.len() >= 2);
    drop(log);
    let file = File::options().write(true).open(&segments[0].path).unwrap();
    file.write_at(b"?", segment::HEADER + segment::RECORD_HEADER).unwrap();
    let message = Log::open(dir.path(), options(64)).map(|_| ()).unwrap_err().to_string();
    assert!(message.contains("checksum at byte 16") && message.contains("hint:"), "{message}");
    // A segment that is missing is noticed as well.
    std::fs::remove_file(&segments[0].path).unwrap();
    assert!(Log::open(dir.path(), options(64)).is_ok(), "old segments may be removed");
    std::fs::remove_file(&segments[1].path).unwrap();
    if segments.len() > 3 {
        std::fs::write(&segments[0].path, [&segment::MAGIC[..], &0u64.to_le_bytes()].concat()).unwrap();
        assert!(Log::open(dir.path(), options(64)).is_err());
    }
}

#[test]
fn one_process_at_a_time_and_no_endless_record() {
    let dir = tempfile::tempdir().unwrap();
    let log = Log::open(dir.path(), LogOptions::default()).unwrap();
    assert!(matches!(Log::open(dir.path(), LogOptions::default()), Err(Error::InUse { .. })));
    assert!(log.append(vec![vec![0; MAX_RECORD + 1]]).is_err());
    assert_eq!(log.append(vec![vec![0; MAX_RECORD]]).unwrap(), 0);
    assert_eq!(all(&log, 0)[0].1.len(), MAX_RECORD);
}

#[test]
fn many_callers_share_a_sync_and_keep_their_order() {
    let dir = tempfile::tempdir().unwrap();
    let log = Log::open(dir.path(), options(4096)).unwrap();
    std::thread::scope(|scope| {
        for caller in 0..8u8 {
            let log = &log;
            scope.spawn(move || {
                let mut last = None;
                for i in 0..50u8 {
                    let seq = log.append(vec![vec![caller, i]]).unwrap();
                    assert!(last < Some(seq));
                    last = Some(seq);
                }
            });
        }
    });
    let read = all(&log, 0);
    assert_eq!(read.len(), 400);
    for caller in 0..8 {
        let own: Vec<u8> = read.iter().filter(|(_, r)| r[0] == caller).map(|(_, r)| r[1]).collect();
        assert_eq!(own, (0..50).collect::<Vec<u8>>());
    }
}

#[test]
fn old_segments_go_and_readers_go_on() {
    let dir = tempfile::tempdir().unwrap();
    let log = Log::open(dir.path(), options(64)).unwrap();
    for i in 0..20 {
        log.append(vec![record(i)]).unwrap();
    }
    assert_eq!(log.remove(20, SystemTime::UNIX_EPOCH).unwrap(), 0, "too young");
    let later = SystemTime::now() + Duration::from_secs(60);
    assert!(log.remove(10, later).unwrap() > 0);
    assert!(log.start() > 0 && log.start() <= 10);
    assert_eq!(all(&log, 0)[0].0, log.start());
    log.remove(u64::MAX, later).unwrap();
    assert_eq!(log.end(), 20);
    let log = reopen(log, dir.path(), 64);
    assert_eq!(log.append(vec![record(20)]).unwrap(), 20);
}
