//! A training process that is killed, again and again, at any moment.

use std::process::Stdio;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::context::Context;
use super::tiny;

const KILLS: usize = 50;

fn arguments(model: &[String], dir: &str) -> Vec<String> {
    let rest = "--data tweets.csv --max-steps 400 --save-steps 2 --save-strategy steps --eval-strategy no --save-total-limit 2 \
                --per-device-train-batch-size 4 --gradient-accumulation-steps 1 --lora-r 4 --lora-dropout 0.1 \
                --neftune-noise-alpha 5 --logging-steps 1 --learning-rate 1e-3 --resume auto -q --output-dir";
    let words = ["train"].into_iter().map(String::from).chain(model.iter().cloned());
    words.chain(rest.split_whitespace().map(String::from)).chain([dir.to_string()]).collect()
}

fn train(context: &Context, arguments: &[String]) -> Duration {
    let started = Instant::now();
    let output = context.command(&arguments.iter().map(String::as_str).collect::<Vec<_>>()).output().unwrap();
    assert!(output.status.success(), "{}", context.shown(&output));
    started.elapsed()
}

/// SIGKILL at 50 random moments: what comes out in the end has the bits of an undisturbed run, and so has its log.
#[test]
fn a_killed_process_goes_on_bit_for_bit() {
    let Some((context, model)) = tiny::context() else { return };
    context.write("tweets.csv", tiny::tweets(60));
    let whole = train(&context, &arguments(&model, "whole"));

    // How long a process needs until its first checkpoint: with one step there is nothing else.
    let mut short = arguments(&model, "short");
    let steps = short.iter().position(|a| a == "--max-steps").unwrap() + 1;
    short[steps] = "1".into();
    let start = train(&context, &short);
    // Lives of a random length up to start + window; with this window 50 of them do about half of the run.
    let (s, share) = (start.as_secs_f64(), 0.5 * (whole.saturating_sub(start)).as_secs_f64() / KILLS as f64);
    let window = share + (share * share + 2.0 * share * s).sqrt();
    let seed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64;
    println!("undisturbed {whole:.2?}, start {start:.2?}, lives up to {:.2} s, seed {seed}", s + window);
    let mut random = seed | 1;
    let (mut kills, mut moments) = (0, Vec::<usize>::new());
    let killed = arguments(&model, "killed");
    let killed: Vec<&str> = killed.iter().map(String::as_str).collect();
    while kills < KILLS {
        // xorshift64*
        random ^= random >> 12;
        random ^= random << 25;
        random ^= random >> 27;
        let unit = (random.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 11) as f64 / (1u64 << 53) as f64;
        let mut child = context.command(&killed).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        // The estimate is as good as the machine is steady: a run that is ahead of it lives shorter, until the kills have caught up.
        let ahead = moments.last().is_some_and(|step| step * KILLS > 300 * (kills + 1));
        std::thread::sleep(Duration::from_secs_f64(unit * if ahead { s } else { s + window }));
        if child.try_wait().unwrap().is_some() {
            println!("the run ended after {kills} kills");
            break;
        }
        child.kill().unwrap();
        child.wait().unwrap();
        kills += 1;
        moments.push(checkpoints(&context).last().copied().unwrap_or(0));
    }
    println!("newest checkpoint after each kill: {moments:?}");
    assert!(kills >= 40, "only {kills} kills");
    assert!(moments.iter().any(|m| *m > 0), "no life was long enough");
    train(&context, &arguments(&model, "killed"));
    for file in ["adapter/adapter_model.safetensors", "adapter/cashtag.json"] {
        let read = |run: &str| std::fs::read(context.path(run).join(file)).unwrap();
        assert!(read("killed") == read("whole"), "{file} differs");
    }
    // The last line of the log says how long it took.
    let log = |run: &str| {
        let text = std::fs::read_to_string(context.path(run).join("trainer_log.jsonl")).unwrap();
        text.lines().filter(|l| !l.contains("train_runtime")).map(String::from).collect::<Vec<_>>()
    };
    assert_eq!(log("killed"), log("whole"));
    assert_eq!(log("killed").len(), 400);
    assert_eq!(checkpoints(&context), [398, 400]);
}

fn checkpoints(context: &Context) -> Vec<usize> {
    let mut steps: Vec<usize> = std::fs::read_dir(context.path("killed"))
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|e| e.file_name().to_str()?.strip_prefix("checkpoint-")?.parse().ok())
        .collect();
    steps.sort_unstable();
    steps
}
