//! Two processes train one adapter, as torchrun would start them.

use std::fmt::Write as _;
use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::context::Context;
use super::tiny;

const LIMIT: Duration = Duration::from_secs(120);

struct Rank(Child);

impl Drop for Rank {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Rank {
    /// Waits for the end; exit code and what was said.
    fn end(mut self) -> (Option<i32>, String) {
        let begun = Instant::now();
        while self.0.try_wait().unwrap().is_none() {
            assert!(begun.elapsed() < LIMIT, "a rank does not end");
            std::thread::sleep(Duration::from_millis(20));
        }
        let mut said = String::new();
        let pipes: [Option<Box<dyn std::io::Read>>; 2] =
            [self.0.stdout.take().map(|p| Box::new(p) as _), self.0.stderr.take().map(|p| Box::new(p) as _)];
        for mut pipe in pipes.into_iter().flatten() {
            std::io::Read::read_to_string(&mut pipe, &mut said).unwrap();
        }
        (self.0.wait().unwrap().code(), said)
    }
}

fn start(context: &Context, size: usize, arguments: &[&str]) -> Vec<Rank> {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port().to_string();
    let one = |rank: usize| {
        let mut command = context.command(arguments);
        command.env("WORLD_SIZE", size.to_string()).env("RANK", rank.to_string()).env("LOCAL_RANK", rank.to_string());
        command.env("MASTER_ADDR", "127.0.0.1").env("MASTER_PORT", &port).env("CASHTAG_DISTRIBUTED_TIMEOUT", "60");
        Rank(command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap())
    };
    (0..size).map(one).collect()
}

fn prepare() -> Option<(Context, Vec<String>)> {
    let (context, model) = tiny::context()?;
    let mut tweets = String::from("text,label\n");
    for i in 0..60 {
        let (text, label) = [("up", "Positive"), ("flat", "Neutral"), ("down", "Negative")][i % 3];
        let _ = writeln!(tweets, "{} closes {text},{label}", tiny::words(i));
    }
    context.write("tweets.csv", tweets);
    let rest = "--data tweets.csv --eval-strategy no --gradient-accumulation-steps 1 --lora-r 4 --lora-dropout 0 --learning-rate 1e-3";
    let words = ["train".to_string()].into_iter().chain(model);
    Some((context, words.chain(rest.split_whitespace().map(String::from)).collect()))
}

fn with<'a>(arguments: &'a [String], more: &'a str) -> Vec<&'a str> {
    arguments.iter().map(String::as_str).chain(more.split_whitespace()).collect()
}

fn factors(context: &Context, run: &str) -> Vec<f32> {
    let bytes = std::fs::read(context.path(run).join("adapter/adapter_model.safetensors")).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    bytes[8 + header..].as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

#[test]
fn two_processes_are_one_with_twice_the_batch() {
    let Some((context, arguments)) = prepare() else { return };
    let output = context
        .command(&with(&arguments, "--max-steps 8 --per-device-train-batch-size 8 --output-dir alone"))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", context.shown(&output));
    let both = start(&context, 2, &with(&arguments, "--max-steps 8 --per-device-train-batch-size 4 --output-dir both"));
    let ended: Vec<_> = both.into_iter().map(Rank::end).collect();
    assert_eq!(ended.iter().map(|e| e.0).collect::<Vec<_>>(), [Some(0), Some(0)], "{ended:?}");
    assert!(ended[0].1.contains("step 8 of 8"), "{}", ended[0].1);
    assert_eq!(ended[1].1, "", "one of them talks");
    let (alone, both) = (factors(&context, "alone"), factors(&context, "both"));
    let largest = alone.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    let difference = alone.iter().zip(&both).fold(0.0f32, |m, (a, b)| m.max((a - b).abs()));
    assert!(largest > 0.0 && difference < 1e-3 * largest, "differs by {difference} of {largest}");
}

#[test]
fn a_killed_rank_ends_the_others_and_the_last_checkpoint_is_whole() {
    let Some((context, arguments)) = prepare() else { return };
    let flags = "--max-steps 100000 --num-train-epochs 100000 --per-device-train-batch-size 2 --save-strategy steps --save-steps 5 --save-total-limit 2 --resume auto --output-dir cut";
    let steps = || -> Vec<usize> {
        let entries = std::fs::read_dir(context.path("cut")).into_iter().flatten().flatten();
        entries.filter_map(|e| e.file_name().to_str()?.strip_prefix("checkpoint-")?.parse().ok()).collect()
    };
    for (victim, other) in [(1, 0), (0, 1)] {
        let before = steps().into_iter().max().unwrap_or(0);
        let mut ranks = start(&context, 2, &with(&arguments, flags));
        let begun = Instant::now();
        while steps().into_iter().max().unwrap_or(0) < before + 10 {
            assert!(begun.elapsed() < LIMIT, "no checkpoint");
            for rank in &mut ranks {
                assert!(rank.0.try_wait().unwrap().is_none(), "a rank ended by itself");
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        ranks[victim].0.kill().unwrap();
        let begun = Instant::now();
        let (code, said) = ranks.remove(other).end();
        assert_eq!(code, Some(1), "{said}");
        assert!(said.contains(&format!("rank {victim} ended before the training did")), "{said}");
        assert!(begun.elapsed() < Duration::from_secs(20), "the other rank took {:?} to notice", begun.elapsed());
    }
    // What is there goes on, and a Ctrl-C of one stops both in good order.
    let last = steps().into_iter().max().unwrap();
    let mut ranks = start(&context, 2, &with(&arguments, flags));
    let begun = Instant::now();
    while steps().into_iter().max().unwrap() <= last {
        assert!(begun.elapsed() < LIMIT, "it does not go on");
        std::thread::sleep(Duration::from_millis(10));
    }
    let interrupted = Command::new("kill").args(["-INT", &ranks[1].0.id().to_string()]).status().unwrap();
    assert!(interrupted.success());
    let (code, said) = ranks.remove(0).end();
    assert!(code == Some(130) && said.contains("stopped; a checkpoint is saved"), "{code:?} {said}");
    assert_eq!(ranks.remove(0).end().0, Some(130));
}

#[test]
fn what_a_launcher_forgot() {
    let Some((context, arguments)) = prepare() else { return };
    let context = context.env("WORLD_SIZE", "2");
    let said = context.run(&with(&arguments, "--output-dir none"));
    assert!(said.contains("exit code 2") && said.contains("WORLD_SIZE is set, but RANK is not"), "{said}");
    let context = Context::new().env("CUDA_VISIBLE_DEVICES", "");
    let said = context.run(&["train", "--gpus", "2"]);
    assert!(said.contains("exit code 2") && said.contains("--gpus 2: this machine has 0 that can be used"), "{said}");
}
