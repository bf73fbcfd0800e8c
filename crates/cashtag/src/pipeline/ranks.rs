//! One run on several devices: who this process is, and starting the others.
//!
//! `--gpus N` starts the program N times with the variables that torchrun would set; under torchrun, Slurm or Kubernetes they are
//! there already. Rank 0 does everything that is not training alone, and writes all files.

use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use cashtag_backend_cuda::probe;
use cashtag_train::distributed::{Group, World};

use crate::exit::{self, Interrupted, Usage};
use crate::output;

/// How long the other ranks may take to end by themselves after one failed.
const GRACE: Duration = Duration::from_secs(20);

#[derive(clap::Args)]
pub(crate) struct Gpus {
    /// Train on this many GPUs of this machine, with a process for each: a step has so many times more examples
    #[arg(long, value_name = "N", help_heading = "Devices")]
    gpus: Option<usize>,
}

/// This process among the others; `None` if it is alone.
///
/// # Errors
/// Variables of a launcher that make no sense.
pub(crate) fn world() -> anyhow::Result<Option<&'static World>> {
    static WORLD: OnceLock<Result<Option<World>, String>> = OnceLock::new();
    match WORLD.get_or_init(|| World::from_env().map_err(|e| e.to_string())) {
        Ok(world) => Ok(world.as_ref()),
        Err(what) => Err(Usage(what.clone()).into()),
    }
}

/// The rank, if this is not the one that writes files and talks to people.
pub(crate) fn other_rank() -> Option<usize> {
    world().ok().flatten().map(|w| w.rank).filter(|rank| *rank > 0)
}

/// Waits for the other ranks. `job` says what is trained: it must be the same everywhere.
///
/// # Errors
/// Ranks that do not come, or are of another job.
pub(crate) fn join(job: &str) -> anyhow::Result<Option<Group>> {
    let Some(world) = world()? else { return Ok(None) };
    let abandon = |error: &cashtag_train::Error| {
        exit::report(&anyhow::anyhow!("{error}"));
        std::process::exit(1);
    };
    Ok(Some(Group::join(world, job, abandon)?))
}

/// CPU threads of this process, if it shares the machine with others.
pub(crate) fn threads(asked: usize) -> anyhow::Result<usize> {
    let Some(world) = world()?.filter(|_| asked == 0) else { return Ok(asked) };
    let here = std::env::var("LOCAL_WORLD_SIZE").ok().and_then(|v| v.parse().ok()).unwrap_or(world.size);
    Ok((std::thread::available_parallelism().map_or(1, usize::from) / here.max(1)).max(1))
}

/// Starts the ranks that `--gpus` asks for, as this command once more, and waits for them; `false` if there is nothing to start,
/// because one device was asked for or this process is such a rank.
///
/// # Errors
/// Fewer GPUs than asked for; a rank that failed.
pub(crate) fn launch(gpus: &Gpus) -> anyhow::Result<bool> {
    let Some(n) = gpus.gpus.filter(|n| *n != 1) else { return Ok(false) };
    if std::env::var_os("RANK").is_some() {
        return Ok(false);
    }
    let found = probe();
    if n == 0 || n > found.gpus.len() {
        let missing = found.missing().unwrap_or_default();
        let (what, hint) = missing.split_once("\n  hint: ").unwrap_or((&missing, ""));
        let what = if what.is_empty() { String::new() } else { format!(": {what}") };
        let hint = if hint.is_empty() { String::new() } else { format!("{hint}; or ") };
        anyhow::bail!(Usage(format!(
            "--gpus {n}: this machine has {} that can be used{what}\n  hint: {hint}leave it out to train on one device",
            found.gpus.len()
        )));
    }
    let port =
        std::net::TcpListener::bind(("127.0.0.1", 0)).and_then(|l| l.local_addr()).context("no free port")?.port();
    let program = std::env::current_exe().context("cannot find this program")?;
    let mut ranks = Ranks(Vec::new());
    // A Ctrl-C reaches all of them; each stops by itself.
    let _clean = exit::clean_stop();
    for rank in 0..n {
        let mut command = Command::new(&program);
        command.args(std::env::args_os().skip(1)).stdin(Stdio::null());
        command.env("RANK", rank.to_string()).env("LOCAL_RANK", rank.to_string());
        command.env("WORLD_SIZE", n.to_string()).env("LOCAL_WORLD_SIZE", n.to_string());
        command.env("MASTER_ADDR", "127.0.0.1").env("MASTER_PORT", port.to_string());
        if rank > 0 {
            command.stdout(Stdio::null());
        }
        ranks.0.push(command.spawn().with_context(|| format!("cannot start rank {rank}"))?);
    }
    ranks.wait()?;
    Ok(true)
}

/// The processes that were started; none outlives this one.
struct Ranks(Vec<Child>);

impl Ranks {
    fn wait(&mut self) -> anyhow::Result<()> {
        let mut failed: Option<(usize, Instant)> = None;
        loop {
            let mut running = 0;
            for (rank, child) in self.0.iter_mut().enumerate() {
                match child.try_wait().with_context(|| format!("rank {rank}"))? {
                    None => running += 1,
                    Some(status) if !status.success() && failed.is_none() => {
                        failed = Some((rank, Instant::now()));
                        if !exit::stop_requested() {
                            output::warn(format!("rank {rank} failed ({status}); waiting for the others to end"));
                        }
                    }
                    Some(_) => {}
                }
            }
            match failed {
                Some(_) if running == 0 && exit::stop_requested() => return Err(Interrupted.into()),
                Some((rank, _)) if running == 0 => {
                    anyhow::bail!(
                        "rank {rank} failed\n  hint: its own message is above; --resume auto goes on from the last checkpoint"
                    )
                }
                Some((_, since)) if since.elapsed() > GRACE && !exit::stop_requested() => {
                    for child in &mut self.0 {
                        let _ = child.kill();
                    }
                }
                None if running == 0 => return Ok(()),
                _ => {}
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Ranks {
    fn drop(&mut self) {
        for child in &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
