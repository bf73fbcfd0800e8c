//! Ranks as threads, over real sockets: two with half of a step each are one with all of it, and what goes wrong is named.

use std::net::TcpListener;
use std::path::Path;
use std::time::Duration;

use cashtag_backend_cpu::Precision;
use cashtag_llama::lora::LoraConfig;
use cashtag_train::distributed::{Group, World};
use cashtag_train::{Error, Optimizer, OptimizerState, SaveStrategy, TrainOutcome, TrainingArguments, Values};

use crate::support::{Tiny, Watch, quiet};

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn world(rank: usize, size: usize, port: u16) -> World {
    World { rank, size, local_rank: rank, master: ("127.0.0.1".into(), port), timeout: Duration::from_secs(30) }
}

fn join(world: &World, job: &str) -> Result<Group, Error> {
    Group::join(world, job, |e| panic!("abandoned: {e}"))
}

/// What each rank makes of `work`, in order.
fn ranks<T: Send>(size: usize, work: impl Fn(World) -> T + Sync) -> Vec<T> {
    let port = free_port();
    std::thread::scope(|scope| {
        let all: Vec<_> = (0..size)
            .map(|rank| {
                scope.spawn({
                    let work = &work;
                    move || work(world(rank, size, port))
                })
            })
            .collect();
        all.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

struct Trained {
    outcome: TrainOutcome,
    state: OptimizerState,
    watch: Watch,
}

fn train(
    dir: &Path,
    arguments: &TrainingArguments,
    group: Option<Group>,
    config: LoraConfig,
    stop_after: Option<usize>,
) -> Trained {
    let tiny = Tiny::new(Precision::F32);
    let mut trainer = tiny.trainer_with(dir, arguments.clone(), config);
    trainer.group = group;
    let mut watch = Watch { stop_after, ..Default::default() };
    let outcome = trainer.run(&mut watch).unwrap();
    Trained { outcome, state: OptimizerState::download(&tiny.backend, &trainer.lora).unwrap(), watch }
}

fn without_dropout() -> LoraConfig {
    LoraConfig { lora_dropout: 0.0, ..Tiny::lora_config() }
}

fn in_parts(size: usize) -> TrainingArguments {
    let whole = quiet();
    TrainingArguments {
        per_device_train_batch_size: whole.per_device_train_batch_size / size,
        world_size: size,
        eval_strategy: SaveStrategy::Epoch,
        load_best_model_at_end: false,
        logging_steps: 1,
        ..whole
    }
}

/// The largest difference, relative to the largest value.
fn difference(a: &OptimizerState, b: &OptimizerState, of: &str) -> f32 {
    let floats = |s: &OptimizerState| match s.get(of) {
        Some(Values::F32(v)) => v.clone(),
        other => panic!("{of}: {other:?}"),
    };
    let (a, b) = (floats(a), floats(b));
    let largest = a.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    a.iter().zip(&b).fold(0.0f32, |m, (x, y)| m.max((x - y).abs())) / largest
}

#[test]
fn ranks_with_parts_of_a_step_are_one_with_all_of_it() {
    let dirs: Vec<_> = (0..3).map(|_| tempfile::tempdir().unwrap()).collect();
    let alone = train(dirs[0].path(), &in_parts(1), None, without_dropout(), None);
    for (dir, size) in [(&dirs[1], 2), (&dirs[2], 4)] {
        let all = ranks(size, |world| {
            let group = join(&world, "job").unwrap();
            train(dir.path(), &in_parts(size), Some(group), without_dropout(), None)
        });
        for of in &all {
            assert_eq!(of.outcome.state.global_step, 6);
            // All ranks hold the same bits, and have seen and decided the same.
            assert_eq!(of.state, all[0].state);
            assert_eq!(of.outcome.state.global_step, alone.outcome.state.global_step);
            for (one, whole) in of.watch.reports.iter().zip(&alone.watch.reports) {
                assert!((one.loss - whole.loss).abs() < 1e-5 * whole.loss, "{} instead of {}", one.loss, whole.loss);
                assert!((one.grad_norm - whole.grad_norm).abs() < 1e-4 * whole.grad_norm);
                assert_eq!(one.examples, whole.examples);
            }
        }
        for of in ["a.parameter", "b.parameter", "a.m", "b.v"] {
            let found = difference(&alone.state, &all[0].state, of);
            assert!(found < 1e-3, "{of} differs by {found}");
        }
        let losses =
            |t: &Trained| -> Vec<f64> { t.watch.logs.iter().filter_map(|e| e.get("eval_loss").copied()).collect() };
        assert_eq!(losses(&alone).len(), 2);
        for (one, whole) in losses(&all[size - 1]).iter().zip(losses(&alone)) {
            assert!((one - whole).abs() < 1e-5 * whole, "eval_loss {one} instead of {whole}");
        }
    }
}

#[test]
fn an_interrupted_run_of_two_goes_on_bit_for_bit() {
    for optim in [Optimizer::AdamW, Optimizer::AdamW8bit] {
        let arguments = TrainingArguments { optim, save_strategy: SaveStrategy::Steps, save_steps: 2, ..in_parts(2) };
        let [whole, cut] = std::array::from_fn(|_| tempfile::tempdir().unwrap());
        let run = |dir: &Path, stop: Option<usize>| {
            ranks(2, |world| {
                // Only rank 1 is asked to stop: both do.
                let stop = stop.filter(|_| world.rank == 1);
                // A rank without the files of the others gets them from rank 0.
                let own = tempfile::tempdir().unwrap();
                let dir = if world.rank == 0 { dir } else { own.path() };
                let trained = train(dir, &arguments, Some(join(&world, "job").unwrap()), Tiny::lora_config(), stop);
                if world.rank > 0 {
                    assert_eq!(
                        std::fs::read_dir(dir).unwrap().count(),
                        0,
                        "a rank that is not the main one writes nothing"
                    );
                }
                trained
            })
        };
        let undisturbed = run(whole.path(), None);
        let first = run(cut.path(), Some(3));
        assert_eq!(first[0].outcome.state.global_step, 3);
        let second = run(cut.path(), None);
        assert_eq!(second[0].watch.reports[0].step, 4);
        assert_eq!(second[1].state, undisturbed[0].state);
        assert_eq!(second[0].state, undisturbed[0].state);
    }
}

#[test]
fn sums_broadcasts_and_shares() {
    let all = ranks(3, |world| {
        let mut group = join(&world, "job").unwrap();
        let rank = group.rank();
        // More than one piece, and nothing at all.
        let mut values: Vec<f32> = (0..1_100_000).map(|i| (i % 7 + rank) as f32).collect();
        group.sum(&mut values).unwrap();
        group.sum(&mut []).unwrap();
        let sent = group.broadcast(if rank == 0 { vec![7; 9_000_000] } else { vec![] }).unwrap();
        let everybody = group.gather_numbers(&[rank as f64, f64::NAN]).unwrap();
        assert!(everybody.iter().all(|of| of[1].is_nan()));
        (values, sent, everybody.iter().map(|of| of[0]).collect::<Vec<_>>())
    });
    for (values, sent, everybody) in all {
        assert!(values.iter().enumerate().all(|(i, v)| *v == (3 * (i % 7) + 3) as f32));
        assert_eq!((sent.len(), sent.iter().all(|b| *b == 7)), (9_000_000, true));
        assert_eq!(everybody, [0.0, 1.0, 2.0]);
    }
}

#[test]
fn a_rank_that_goes_is_named_by_all_others() {
    let said = ranks(3, |world| {
        let mut group = join(&world, "job").unwrap();
        if world.rank == 2 {
            return "left".to_owned();
        }
        let begun = std::time::Instant::now();
        let said = (0..).find_map(|_| group.gather(b"still here").err()).unwrap().to_string();
        assert!(begun.elapsed() < Duration::from_secs(10));
        said
    });
    assert!(said[0].starts_with("rank 2 ended before the training did"), "{}", said[0]);
    assert!(said[1].starts_with("rank 2 ended before the training did"), "{}", said[1]);
}

#[test]
fn other_jobs_strangers_and_twins_are_refused() {
    let said = ranks(2, |world| join(&world, &format!("job of {}", world.rank)).unwrap_err().to_string());
    assert!(said[0].contains("rank 1 has other data, another model or other settings than rank 0"), "{}", said[0]);
    assert!(said[1].contains("rank 0 does not take this process as rank 1 of 2"), "{}", said[1]);

    let port = free_port();
    let short = |rank, size| World { timeout: Duration::from_secs(1), ..world(rank, size, port) };
    let said = join(&short(0, 3), "job").unwrap_err().to_string();
    assert!(said.contains("rank 1, 2 did not come") && said.contains("within 1 s"), "{said}");
    let said = join(&short(1, 2), "job").unwrap_err().to_string();
    assert!(said.contains("rank 1 cannot reach rank 0"), "{said}");

    // A scanner of ports does no harm.
    let port = free_port();
    std::thread::scope(|scope| {
        let main = scope.spawn(move || join(&world(0, 2, port), "job").unwrap().size());
        let stranger = || {
            use std::io::Write as _;
            let mut stream = std::net::TcpStream::connect(("127.0.0.1", port))?;
            stream.write_all(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: everything\r\n\r\n")
        };
        while stranger().is_err() {
            std::thread::sleep(Duration::from_millis(10));
        }
        let other = join(&world(1, 2, port), "job").unwrap();
        assert_eq!((main.join().unwrap(), other.size()), (2, 2));
    });
}

#[test]
fn another_adapter_is_noticed_before_the_first_step() {
    let said = ranks(2, |world| {
        let tiny = Tiny::new(Precision::F32);
        let dir = tempfile::tempdir().unwrap();
        let mut trainer = tiny.trainer(dir.path(), in_parts(2));
        if world.rank == 1 {
            let tensors = cashtag_llama::lora::LoraTensors::init(&Tiny::lora_config(), tiny.model.config(), 4);
            trainer.lora =
                cashtag_llama::lora::Lora::new(&tiny.backend, Tiny::lora_config(), tiny.model.config(), &tensors, true)
                    .unwrap();
        }
        trainer.group = Some(join(&world, "job").unwrap());
        trainer.run(&mut Watch::default()).unwrap_err().to_string()
    });
    assert!(said.iter().all(|s| s.contains("rank 1 begins with another adapter than rank 0")), "{said:?}");
}
