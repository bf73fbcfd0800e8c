//! Processes that found one another.
//!
//! ```text
//!   rank 0 ◄── work ──► rank r    frames, one operation after the other, in the same order on every rank
//!          ◄── life ──► rank r    silent; its end tells of a death also to a rank that waits for a device
//! ```

use std::collections::BTreeMap;
use std::io::{self, Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream, ToSocketAddrs as _};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::wire::{self, Hello, PIECE, Purpose};
use super::world::{World, share};
use crate::checkpoint::bytes_of;
use crate::error::{Error, Result};
use crate::state::LogEntry;

/// How long a rank that learnt of a death may go on by itself: a device that waits for the dead one never comes back.
const GRACE: Duration = Duration::from_secs(10);
/// A connection has to say who it is.
const HELLO: Duration = Duration::from_secs(5);
/// Bytes that a rank gives to [`Group::gather`], at most.
const GATHERED: usize = 1 << 16;
const BYE: u8 = b'b';
const LOST: u8 = b'l';
/// Rank 0's answers to a greeting.
const YES: &[u8; 2] = b"ok";
const NO: &[u8; 2] = b"no";
const NOBODY: usize = usize::MAX;

/// What the threads that watch over lives share with the rest.
struct Shared {
    /// The rank that died, or [`NOBODY`].
    lost: AtomicUsize,
    /// This process leaves in good order.
    leaving: AtomicBool,
    /// Every connection of this process, to end all waiting at once: those for work, those of life.
    connections: Mutex<[Vec<TcpStream>; 2]>,
}

impl Shared {
    fn end_connections(&self) {
        for stream in self.connections.lock().unwrap_or_else(PoisonError::into_inner).iter().flatten() {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    /// Remembers who died, tells the others the name and ends all waiting; `false` if a death was known already.
    fn lose(&self, rank: usize) -> bool {
        if self.lost.compare_exchange(NOBODY, rank, Ordering::SeqCst, Ordering::SeqCst).is_err() {
            return false;
        }
        let message: Vec<u8> = std::iter::once(LOST).chain(rank.to_le_bytes()).collect();
        for mut stream in &self.connections.lock().unwrap_or_else(PoisonError::into_inner)[1] {
            // Nothing else was ever written there, so this does not wait.
            let _ = stream.write_all(&message);
        }
        self.end_connections();
        true
    }
}

/// The ranks of a run, connected through rank 0. All ranks call the same operations in the same order.
pub struct Group {
    rank: usize,
    size: usize,
    /// On rank 0 the others in order, elsewhere rank 0.
    work: Vec<TcpStream>,
    life: Vec<TcpStream>,
    shared: Arc<Shared>,
    op: u64,
    timeout: Duration,
    /// Whether devices sum gradients among themselves; decided when all are there.
    pub(crate) on_device: bool,
}

impl std::fmt::Debug for Group {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "rank {} of {}", self.rank, self.size)
    }
}

impl Group {
    /// Waits until all ranks of `world` are there. `job` is the same on all of them and on nobody else. `abandon` is called when
    /// another rank died and this one did not notice by itself, because it waits for a device: it should end the process.
    ///
    /// # Errors
    /// Ranks that do not come in time, that belong to another job, or that come twice.
    pub fn join(world: &World, job: &str, abandon: fn(&Error)) -> Result<Self> {
        use sha2::{Digest as _, Sha256};
        let job = <[u8; 32]>::from(Sha256::digest(job.as_bytes()));
        let deadline = Instant::now() + world.timeout;
        let (work, life) = if world.rank == 0 { accept(world, job, deadline)? } else { connect(world, job, deadline)? };
        let clones = |streams: &[TcpStream]| -> io::Result<Vec<TcpStream>> {
            streams.iter().map(|s| s.set_nodelay(true).and_then(|()| s.try_clone())).collect()
        };
        let connections = [clones(&work).map_err(broken)?, clones(&life).map_err(broken)?];
        for stream in &work {
            stream.set_read_timeout(Some(world.timeout)).map_err(broken)?;
            stream.set_write_timeout(Some(world.timeout)).map_err(broken)?;
        }
        let shared = Arc::new(Shared {
            lost: AtomicUsize::new(NOBODY),
            leaving: AtomicBool::new(false),
            connections: Mutex::new(connections),
        });
        for (i, stream) in life.iter().enumerate() {
            stream.set_read_timeout(None).map_err(broken)?;
            let other = if world.rank == 0 { i + 1 } else { 0 };
            let (stream, shared) = (stream.try_clone().map_err(broken)?, shared.clone());
            std::thread::Builder::new()
                .name(format!("rank {other}"))
                .spawn(move || watch(stream, other, &shared, abandon))
                .map_err(broken)?;
        }
        Ok(Self {
            rank: world.rank,
            size: world.size,
            work,
            life,
            shared,
            op: 0,
            timeout: world.timeout,
            on_device: false,
        })
    }

    pub fn rank(&self) -> usize {
        self.rank
    }

    pub fn size(&self) -> usize {
        self.size
    }

    /// Whether this is the rank that writes files and talks to people.
    pub fn is_main(&self) -> bool {
        self.rank == 0
    }

    /// The part of `n` neighbouring things that is this rank's; all ranks' parts together are `0 .. n`.
    pub fn share(&self, n: usize) -> std::ops::Range<usize> {
        share(n, self.rank, self.size)
    }

    /// Rank 0's figures, bit for bit.
    pub(crate) fn share_entry(&mut self, entry: LogEntry) -> Result<LogEntry> {
        let bits: BTreeMap<&String, u64> = entry.iter().map(|(name, value)| (name, value.to_bits())).collect();
        let text = serde_json::to_vec(&bits).map_err(|e| Error::Invalid(e.to_string()))?;
        let bits: BTreeMap<String, u64> = serde_json::from_slice(&self.broadcast(text)?)
            .map_err(|e| Error::Invalid(format!("the figures that rank 0 sent: {e}")))?;
        Ok(bits.into_iter().map(|(name, bits)| (name, f64::from_bits(bits))).collect())
    }

    /// What every rank gave, in the order of the ranks; 64 kB each at most.
    ///
    /// # Errors
    /// A rank that died, or does something else.
    pub fn gather(&mut self, mine: &[u8]) -> Result<Vec<Vec<u8>>> {
        assert!(mine.len() <= GATHERED, "{} bytes are too many to gather", mine.len());
        let op = self.next();
        let mut all = vec![mine.to_vec()];
        if self.is_main() {
            for i in 0..self.work.len() {
                let bytes = wire::receive(&mut self.work[i], op, GATHERED).map_err(|e| self.failed(i + 1, e))?;
                all.push(bytes);
            }
            for i in 0..self.work.len() {
                for bytes in &all {
                    wire::send(&mut self.work[i], op, bytes).map_err(|e| self.failed(i + 1, e))?;
                }
            }
            return Ok(all);
        }
        wire::send(&mut self.work[0], op, mine).map_err(|e| self.failed(0, e))?;
        (0..self.size).map(|_| wire::receive(&mut self.work[0], op, GATHERED).map_err(|e| self.failed(0, e))).collect()
    }

    /// As [`gather`](Self::gather), for as many numbers from every rank.
    ///
    /// # Errors
    /// As [`gather`](Self::gather).
    pub fn gather_numbers(&mut self, mine: &[f64]) -> Result<Vec<Vec<f64>>> {
        let bytes: Vec<u8> = mine.iter().flat_map(|v| v.to_le_bytes()).collect();
        let all = self.gather(&bytes)?;
        if let Some(rank) = all.iter().position(|b| b.len() != bytes.len()) {
            let found = all[rank].len();
            return Err(Error::Invalid(format!("rank {rank} gave {found} bytes, this rank {}", bytes.len())));
        }
        let numbers = |b: &Vec<u8>| b.as_chunks::<8>().0.iter().map(|c| f64::from_le_bytes(*c)).collect();
        Ok(all.iter().map(numbers).collect())
    }

    /// What rank 0 has, to all; `bytes` is not looked at elsewhere. Of any size.
    ///
    /// # Errors
    /// As [`gather`](Self::gather).
    pub fn broadcast(&mut self, bytes: Vec<u8>) -> Result<Vec<u8>> {
        let op = self.next();
        if self.is_main() {
            for i in 0..self.work.len() {
                let head = (bytes.len() as u64).to_le_bytes();
                wire::send(&mut self.work[i], op, &head).map_err(|e| self.failed(i + 1, e))?;
                for piece in bytes.chunks(PIECE) {
                    wire::send(&mut self.work[i], op, piece).map_err(|e| self.failed(i + 1, e))?;
                }
            }
            return Ok(bytes);
        }
        let head = wire::receive(&mut self.work[0], op, 8).map_err(|e| self.failed(0, e))?;
        let len = head.try_into().map(u64::from_le_bytes).unwrap_or_default();
        // Grows with what really comes.
        let mut all = Vec::new();
        while (all.len() as u64) < len {
            all.extend(wire::receive(&mut self.work[0], op, PIECE).map_err(|e| self.failed(0, e))?);
        }
        Ok(all)
    }

    /// `values ← Σ over ranks`, added in the order of the ranks, so every rank has the same bits.
    ///
    /// # Errors
    /// As [`gather`](Self::gather); ranks with different numbers of values.
    pub fn sum(&mut self, values: &mut [f32]) -> Result<()> {
        let op = self.next();
        for piece in values.chunks_mut(PIECE / 4) {
            let len = size_of_val(piece);
            if self.is_main() {
                for i in 0..self.work.len() {
                    let theirs = wire::receive(&mut self.work[i], op, len).map_err(|e| self.failed(i + 1, e))?;
                    if theirs.len() != len {
                        let what = format!("sent {} bytes where {len} are expected", theirs.len());
                        return Err(self.failed(i + 1, io::Error::new(io::ErrorKind::InvalidData, what)));
                    }
                    piece.iter_mut().zip(floats(&theirs)).for_each(|(v, of)| *v += of);
                }
                for i in 0..self.work.len() {
                    wire::send(&mut self.work[i], op, bytes_of(piece)).map_err(|e| self.failed(i + 1, e))?;
                }
            } else {
                wire::send(&mut self.work[0], op, bytes_of(piece)).map_err(|e| self.failed(0, e))?;
                let sum = wire::receive(&mut self.work[0], op, len).map_err(|e| self.failed(0, e))?;
                piece.iter_mut().zip(floats(&sum)).for_each(|(v, of)| *v = of);
            }
        }
        Ok(())
    }

    fn next(&mut self) -> u64 {
        self.op += 1;
        self.op
    }

    /// Why an exchange with `other` failed: a death that was noticed elsewhere comes first.
    fn failed(&self, other: usize, e: io::Error) -> Error {
        // A connection may end a moment before the thread that watches over the life hears of it.
        let begun = Instant::now();
        let ended =
            !matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::InvalidData);
        while ended && self.shared.lost.load(Ordering::SeqCst) == NOBODY && begun.elapsed() < Duration::from_secs(1) {
            std::thread::sleep(Duration::from_millis(10));
        }
        if ended {
            self.shared.lose(other);
        }
        match self.shared.lost.load(Ordering::SeqCst) {
            NOBODY if e.kind() == io::ErrorKind::InvalidData => Error::Invalid(format!(
                "rank {other} {e}\n  hint: all ranks need the same program, settings, model and data"
            )),
            NOBODY => Error::Invalid(format!(
                "rank {other} did not answer within {} s\n  hint: look at what it says; CASHTAG_DISTRIBUTED_TIMEOUT is the number of seconds to wait",
                self.timeout.as_secs()
            )),
            rank => Error::RankLost { rank },
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.shared.leaving.store(true, Ordering::SeqCst);
        // A rank that ends because another died says so by ending without good-bye.
        if self.shared.lost.load(Ordering::SeqCst) == NOBODY && !std::thread::panicking() {
            for life in &mut self.life {
                let _ = life.write_all(&[BYE]);
            }
        }
        self.shared.end_connections();
    }
}

fn floats(bytes: &[u8]) -> impl Iterator<Item = f32> + '_ {
    bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b))
}

fn broken(e: io::Error) -> Error {
    Error::Invalid(format!("cannot talk to the other ranks: {e}"))
}

/// Waits for the end of `other`.
fn watch(mut stream: TcpStream, other: usize, shared: &Shared, abandon: fn(&Error)) {
    let mut said = [0; 9];
    let lost = match stream.read(&mut said) {
        // Good-bye: it needs nothing any more.
        Ok(n) if n > 0 && said[0] == BYE => return,
        // Rank 0 tells who it was.
        Ok(9) if said[0] == LOST => usize::from_le_bytes(said[1..].try_into().unwrap_or_default()),
        _ => other,
    };
    if shared.leaving.load(Ordering::SeqCst) || !shared.lose(lost) {
        return;
    }
    std::thread::sleep(GRACE);
    if !shared.leaving.load(Ordering::SeqCst) {
        abandon(&Error::RankLost { rank: lost });
    }
}

/// Rank 0: both connections of every other rank.
fn accept(world: &World, job: [u8; 32], deadline: Instant) -> Result<(Vec<TcpStream>, Vec<TcpStream>)> {
    let (host, port) = (&world.master.0[..], world.master.1);
    let cannot = |e: io::Error| {
        Error::Invalid(format!(
            "cannot wait for the other ranks on {host}:{port}: {e}\n  hint: choose another MASTER_PORT"
        ))
    };
    let listener = TcpListener::bind((host, port)).map_err(cannot)?;
    listener.set_nonblocking(true).map_err(cannot)?;
    let mut found: [Vec<Option<TcpStream>>; 2] = std::array::from_fn(|_| (1..world.size).map(|_| None).collect());
    loop {
        let missing: Vec<String> =
            (1..world.size).filter(|r| found.iter().any(|f| f[r - 1].is_none())).map(|r| r.to_string()).collect();
        if missing.is_empty() {
            let [work, life] = found.map(|f| f.into_iter().flatten().collect());
            return Ok((work, life));
        }
        match listener.accept() {
            Ok((mut stream, from)) => {
                let ready = stream.set_nonblocking(false).and_then(|()| stream.set_read_timeout(Some(HELLO)));
                let Some(hello) = ready.ok().and_then(|()| Hello::receive(&mut stream)) else { continue };
                let mut place = |found: &mut [Vec<Option<TcpStream>>; 2]| -> Result<(), String> {
                    if hello.size != world.size || !(1..world.size).contains(&hello.rank) {
                        return Err(format!(
                            "{from} says that it is rank {} of {}, this is rank 0 of {}\n  hint: start all ranks with the same WORLD_SIZE",
                            hello.rank, hello.size, world.size
                        ));
                    }
                    if hello.job != job {
                        return Err(format!(
                            "rank {} has other data, another model or other settings than rank 0\n  hint: start all ranks with the same command",
                            hello.rank
                        ));
                    }
                    let place = &mut found[usize::from(hello.purpose == Purpose::Life)][hello.rank - 1];
                    if place.is_some() {
                        return Err(format!(
                            "there are two processes of rank {}\n  hint: every process needs a RANK of its own",
                            hello.rank
                        ));
                    }
                    stream.write_all(YES).map_err(|e| format!("rank {}: {e}", hello.rank))?;
                    *place = stream.try_clone().ok();
                    Ok(())
                };
                if let Err(what) = place(&mut found) {
                    let _ = stream.write_all(NO);
                    return Err(Error::Invalid(what));
                }
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                if Instant::now() > deadline {
                    return Err(Error::Invalid(format!(
                        "rank {} did not come to {host}:{port} within {} s\n  hint: look at what it says; CASHTAG_DISTRIBUTED_TIMEOUT is the number of seconds to wait",
                        missing.join(", "),
                        world.timeout.as_secs()
                    )));
                }
                std::thread::sleep(Duration::from_millis(20));
            }
            Err(e) => return Err(cannot(e)),
        }
    }
}

/// The others: both connections to rank 0, which may begin later.
fn connect(world: &World, job: [u8; 32], deadline: Instant) -> Result<(Vec<TcpStream>, Vec<TcpStream>)> {
    let one = |purpose: Purpose| -> Result<TcpStream> {
        loop {
            let attempt = || -> io::Result<TcpStream> {
                let mut last = io::Error::new(io::ErrorKind::NotFound, "no address");
                for address in (&world.master.0[..], world.master.1).to_socket_addrs()? {
                    match TcpStream::connect_timeout(&address, HELLO) {
                        Ok(mut stream) => {
                            Hello { purpose, rank: world.rank, size: world.size, job }.send(&mut stream)?;
                            stream.set_read_timeout(Some(HELLO))?;
                            let mut ok = [0; 2];
                            stream.read_exact(&mut ok)?;
                            return if ok == *YES { Ok(stream) } else { Err(io::ErrorKind::PermissionDenied.into()) };
                        }
                        Err(e) => last = e,
                    }
                }
                Err(last)
            };
            match attempt() {
                Ok(stream) => return Ok(stream),
                Err(e) if e.kind() == io::ErrorKind::PermissionDenied => {
                    return Err(Error::Invalid(format!(
                        "rank 0 does not take this process as rank {} of {}\n  hint: it says why; start all ranks with the same command",
                        world.rank, world.size
                    )));
                }
                Err(e) if Instant::now() > deadline => {
                    let (host, port) = &world.master;
                    return Err(Error::Invalid(format!(
                        "rank {} cannot reach rank 0 at {host}:{port}: {e}\n  hint: look at what rank 0 says; MASTER_ADDR and MASTER_PORT say where it is",
                        world.rank
                    )));
                }
                Err(_) => std::thread::sleep(Duration::from_millis(100)),
            }
        }
    };
    Ok((vec![one(Purpose::Work)?], vec![one(Purpose::Life)?]))
}
