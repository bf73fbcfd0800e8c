//! Measures `prepare` on a generated file: `cargo run --release -p cashtag-corpus --example million_rows -- [ROWS]
//! [csv|jsonl]`.
//!
//! The texts are drawn from a vocabulary with the frequencies of natural language; one in ten is an exact copy of an
//! earlier one behind another link, one in ten a near copy.

use std::io::Write as _;
use std::time::Instant;

use cashtag_corpus::prepare::{PrepareOptions, prepare};
use cashtag_corpus::{LABELS, Rng};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let rows: usize = arguments.next().map_or(Ok(1_000_000), |rows| rows.parse())?;
    let json = arguments.next().as_deref() == Some("jsonl");
    let folder = tempfile::tempdir()?;
    let input = folder.path().join(if json { "rows.jsonl" } else { "rows.csv" });
    write_rows(&input, rows, json)?;
    let bytes = std::fs::metadata(&input)?.len();
    println!("{rows} rows, {:.0} MB", bytes as f64 / 1e6);
    let options =
        PrepareOptions { inputs: vec![input], out_dir: folder.path().join("out"), ..PrepareOptions::default() };
    let start = Instant::now();
    let (mut stage, mut since, mut cpu) = ("", Instant::now(), cpu_seconds());
    let report = prepare(&options, &mut |now, _| {
        if now != stage {
            if !stage.is_empty() {
                println!(
                    "{stage}: {:.1} s, {:.1} s of processor time",
                    since.elapsed().as_secs_f64(),
                    cpu_seconds() - cpu
                );
            }
            (stage, since, cpu) = (now, Instant::now(), cpu_seconds());
        }
        true
    })?;
    println!("{stage}: {:.1} s, {:.1} s of processor time", since.elapsed().as_secs_f64(), cpu_seconds() - cpu);
    println!("all: {:.1} s; kept {}, dropped {:?}", start.elapsed().as_secs_f64(), report.kept, report.dropped);
    if let Ok(status) = std::fs::read_to_string("/proc/self/status")
        && let Some(line) = status.lines().find(|line| line.starts_with("VmHWM"))
    {
        println!("peak memory {}", line.trim_start_matches("VmHWM:").trim());
    }
    Ok(())
}

/// Processor time of all threads so far, from Linux's clock ticks of 10 ms (0 elsewhere).
fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let after_name = stat.rsplit(')').next().unwrap_or_default();
    let ticks: f64 = after_name.split_whitespace().skip(11).take(2).filter_map(|ticks| ticks.parse::<f64>().ok()).sum();
    ticks / 100.0
}

fn write_rows(path: &std::path::Path, rows: usize, json: bool) -> std::io::Result<()> {
    let mut rng = Rng::new(1);
    let vocabulary: Vec<String> =
        (0..30_000).map(|_| (0..2 + rng.below(8)).map(|_| (b'a' + rng.below(26) as u8) as char).collect()).collect();
    let mut out = std::io::BufWriter::new(std::fs::File::create(path)?);
    if !json {
        writeln!(out, "id,text,label")?;
    }
    let mut recent: Vec<(Vec<usize>, usize)> = Vec::new();
    for row in 0..rows {
        let (words, label) = match rng.below(10) {
            0 if !recent.is_empty() => recent[rng.below(recent.len())].clone(),
            1 if !recent.is_empty() => {
                let (mut words, label) = recent[rng.below(recent.len())].clone();
                let at = rng.below(words.len());
                words[at] = rng.below(vocabulary.len());
                (words, label)
            }
            _ => {
                // Zipf: word number n with a probability of about 1/n.
                let word =
                    |rng: &mut Rng| ((vocabulary.len() as f64).powf(rng.unit()) as usize).min(vocabulary.len() - 1);
                ((0..8 + rng.below(20)).map(|_| word(&mut rng)).collect(), rng.below(3))
            }
        };
        let text: Vec<&str> = words.iter().map(|word| vocabulary[*word].as_str()).collect();
        let text = format!("${} {} https://t.co/{row:x}", vocabulary[words[0] % 500].to_uppercase(), text.join(" "));
        if json {
            writeln!(out, "{{\"id\": {row}, \"text\": \"{text}\", \"label\": \"{}\"}}", LABELS[label])?;
        } else {
            writeln!(out, "{row},\"{text}\",{}", LABELS[label])?;
        }
        if recent.len() < 50_000 {
            recent.push((words, label));
        } else {
            let at = rng.below(recent.len());
            recent[at] = (words, label);
        }
    }
    out.flush()
}
