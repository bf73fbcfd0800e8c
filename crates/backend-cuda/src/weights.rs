//! Frozen weights on the card: NF4 codes or values of the compute dtype, quantised on the card while the host reads on.
//!
//! ```text
//! reader ──► pinned slot ──► device chunk ──► nf4_quantize ──► codes + absmax ──► (resident = bf16) dequantised values
//!            two in turn                                        └─► double quantisation
//! ```
//!
//! Whether a weight stays as NF4 or as the dequantised values changes speed and memory, not a bit of any result: both ways the values
//! that are multiplied are level · absmax rounded to the compute dtype.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError};

use cashtag_backend::dry::Product;
use cashtag_backend::dynamic_map::{SIGNED, UNSIGNED};
use cashtag_backend::{Dtype, Error, RawWeight, Result, WeightSource};
use cudarc::driver::result;

use crate::driver::{Argument, Launch};
use crate::kernels::{Family, Variant};
use crate::linear::part;
use crate::memory::{Block, CudaBuffer, Staging, View};
use crate::rows::Walk;
use crate::{Core, Options, Resident};

/// Elements that share one absmax.
const BLOCK: usize = 64;
/// Absmax values that share one scale in double quantisation.
const NESTED_BLOCK: usize = 256;
/// Bytes that travel to the card at a time.
const CHUNK: usize = 16 << 20;
/// Threads that read a source; more than a few only wait for memory.
const READERS: usize = 8;

/// A frozen matrix `[out, in]`.
pub struct CudaWeight {
    pub(crate) out: usize,
    pub(crate) inner: usize,
    /// Columns of room behind each row for LoRA's s·B; 0 if the values are not held.
    pub(crate) room: usize,
    pub(crate) data: Data,
}

pub(crate) enum Data {
    /// Row-major, of the compute dtype; rows are `inner + room` apart.
    Wide(CudaBuffer),
    Nf4(Nf4),
}

pub(crate) struct Nf4 {
    pub(crate) codes: Block,
    pub(crate) absmax: Absmax,
}

pub(crate) enum Absmax {
    Single(Block),
    Double { codes: Block, nested: Block, offsets: Block, map: Arc<Block> },
}

/// `Scales` of the kernels.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Scales {
    absmax: u64,
    codes: u64,
    map: u64,
    nested: u64,
    offset: u64,
}
impl Argument for Scales {}

impl Absmax {
    pub(crate) fn scales(&self) -> Scales {
        match self {
            Absmax::Single(absmax) => Scales { absmax: absmax.ptr(), codes: 0, map: 0, nested: 0, offset: 0 },
            Absmax::Double { codes, nested, offsets, map } => {
                Scales { absmax: 0, codes: codes.ptr(), map: map.ptr(), nested: nested.ptr(), offset: offsets.ptr() }
            }
        }
    }
}

impl CudaWeight {
    /// The values and `room` of the columns behind them.
    pub(crate) fn values(&self, buffer: &CudaBuffer, room: usize) -> View {
        let stride = self.inner + self.room;
        View { ptr: buffer.ptr(), dtype: buffer.dtype, rows: self.out, cols: self.inner + room, stride }
    }

    /// Whether the weight is held as NF4 codes.
    pub fn is_nf4(&self) -> bool {
        matches!(self.data, Data::Nf4(_))
    }

    /// Bytes of device memory that the weight holds.
    pub fn bytes(&self) -> usize {
        match &self.data {
            Data::Wide(buffer) => buffer.block.bytes(),
            Data::Nf4(Nf4 { codes, absmax }) => {
                codes.bytes()
                    + match absmax {
                        Absmax::Single(b) => b.bytes(),
                        Absmax::Double { codes, nested, offsets, .. } => {
                            codes.bytes() + nested.bytes() + offsets.bytes()
                        }
                    }
            }
        }
    }
}

/// What weights take on a card that is not there: the choices of [`Core::load`] without the loading. Sources are taken to be no NF4
/// already.
pub(crate) struct Budget {
    options: Options,
    wide: u64,
    held: AtomicU64,
    any_nf4: AtomicBool,
}

impl Budget {
    pub(crate) fn new(options: &Options, wide: u64) -> Arc<Self> {
        let (held, any_nf4) = (AtomicU64::new(0), AtomicBool::new(false));
        Arc::new(Self { options: options.clone(), wide, held, any_nf4 })
    }

    /// Bytes of the next weight.
    pub(crate) fn hold(&self, out: usize, inner: usize, embedding: bool) -> u64 {
        let total = out * inner;
        let wide = (total * self.options.compute.size()) as u64;
        let stays_wide = match self.options.resident {
            Resident::Nf4 => false,
            Resident::Bf16 => true,
            Resident::Auto => self.held.load(Ordering::Relaxed) + wide <= self.wide,
        };
        let bytes = if self.options.quantize && !embedding && !stays_wide {
            self.any_nf4.store(true, Ordering::Relaxed);
            let blocks = total.div_ceil(BLOCK);
            let absmax =
                if self.options.double_quant { blocks + 4 * blocks.div_ceil(NESTED_BLOCK) } else { 4 * blocks };
            (total.div_ceil(2).next_multiple_of(16) + absmax) as u64
        } else {
            wide
        };
        self.held.fetch_add(bytes, Ordering::Relaxed);
        bytes
    }

    /// The products' own workspace, and the dequantised part of a weight.
    pub(crate) fn scratch(&self, product: Product) -> u64 {
        let nf4 = self.any_nf4.load(Ordering::Relaxed);
        let part = match product {
            Product::Linear { out, inner, .. } if nf4 => part(out, inner, self.options.compute).1,
            Product::LinearBackward { out, inner, .. } if nf4 => part(inner, out, self.options.compute).1,
            Product::RowNorms { rows, inner } => crate::dora::workspace(rows, inner, self.options.compute, nf4),
            _ => 0,
        };
        (crate::gemm::WORKSPACE + part) as u64
    }
}

fn wrong(source: &dyn WeightSource, what: String) -> Error {
    Error::Weight { name: source.name().into(), what }
}

fn elements(source: &dyn WeightSource) -> Result<usize> {
    let (rows, cols) = (source.rows(), source.cols());
    rows.checked_mul(cols)
        .filter(|n| n.checked_mul(8).is_some())
        .ok_or_else(|| wrong(source, format!("{rows} × {cols} elements are too many")))
}

/// The stored bytes and their dtype, if they are plain numbers.
fn plain_bytes(source: &dyn WeightSource) -> Result<Option<(&[u8], Dtype)>> {
    let (bytes, dtype) = match source.raw() {
        Some(RawWeight::F32(b)) => (b, Dtype::F32),
        Some(RawWeight::F16(b)) => (b, Dtype::F16),
        Some(RawWeight::Bf16(b)) => (b, Dtype::Bf16),
        Some(RawWeight::Nf4 { .. }) | None => return Ok(None),
    };
    let expected = elements(source)? * dtype.size();
    if bytes.len() != expected {
        return Err(wrong(source, format!("{} bytes are stored, its shape needs {expected}", bytes.len())));
    }
    Ok(Some((bytes, dtype)))
}

/// Runs `read` over `out` in `parts` of `part` elements each, on a few threads.
fn in_parallel<E: Send>(out: &mut [E], part: usize, read: impl Fn(usize, &mut [E]) -> Result<()> + Sync) -> Result<()> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(READERS);
    let parts = out.len().div_ceil(part.max(1));
    let share = parts.div_ceil(threads).max(1) * part.max(1);
    if out.len() <= share {
        return read(0, out);
    }
    std::thread::scope(|scope| {
        let workers: Vec<_> = out
            .chunks_mut(share)
            .enumerate()
            .map(|(i, chunk)| {
                scope.spawn({
                    let read = &read;
                    move || read(i * share, chunk)
                })
            })
            .collect();
        let mut result = Ok(());
        for w in workers {
            let one = w.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            result = result.and(one);
        }
        result
    })
}

impl Core {
    /// Stacks `sources` along their rows. `quantize`: to NF4; sources that are NF4 already stay so either way. `room`: columns behind
    /// each row, if the values are held.
    pub(crate) fn load(&self, sources: &[&dyn WeightSource], quantize: bool, room: usize) -> Result<CudaWeight> {
        let inner = sources.first().map_or(0, |s| s.cols());
        let mut counts = Vec::with_capacity(sources.len());
        for s in sources {
            if s.cols() != inner {
                return Err(wrong(*s, format!("has {} columns, the weights beside it have {inner}", s.cols())));
            }
            counts.push(elements(*s)?);
        }
        let out: usize = sources.iter().map(|s| s.rows()).sum();
        let total: usize = counts.iter().sum();
        let stored_nf4 = |s: &&dyn WeightSource| matches!(s.raw(), Some(RawWeight::Nf4 { .. }));
        let room = if inner.is_multiple_of(8) { room.next_multiple_of(8) } else { 0 };
        let stride = inner + room;
        let wide_bytes = out * stride * self.compute.size();
        // Sources that end inside a block cannot follow one another in one list of codes: keep their values instead.
        let whole_blocks = counts[..counts.len().saturating_sub(1)].iter().all(|n| n.is_multiple_of(BLOCK));
        let nf4_values = quantize || sources.iter().all(stored_nf4);
        let as_nf4 = nf4_values && whole_blocks && total > 0 && !self.keep_wide(wide_bytes);
        let weight = if as_nf4 {
            CudaWeight { out, inner, room: 0, data: Data::Nf4(self.quantized(sources, &counts, true)?) }
        } else {
            let wide = self.allocator.buffer(self.compute, out * stride)?;
            if room > 0 {
                wide.block.fill_zero()?;
            }
            let rows_of = |first: usize, rows: usize| {
                let ptr = wide.ptr() + (first * stride * self.compute.size()) as u64;
                View { ptr, dtype: self.compute, rows, cols: inner, stride }
            };
            let mut first = 0;
            for (s, &count) in sources.iter().zip(&counts) {
                if quantize || stored_nf4(s) {
                    let nf4 = self.quantized(std::slice::from_ref(s), &[count], quantize)?;
                    self.dequantize(&nf4, inner, 0, 0, rows_of(first, s.rows()))?;
                } else {
                    self.stream(*s, |start, len, dtype, chunk| {
                        let rows = len / inner;
                        let from = View { ptr: chunk, dtype, rows, cols: inner, stride: inner };
                        self.copy(from, rows_of(first + start / inner, rows))
                    })?;
                }
                first += s.rows();
            }
            CudaWeight { out, inner, room, data: Data::Wide(wide) }
        };
        self.weight_bytes.fetch_add(weight.bytes() as u64, Ordering::Relaxed);
        Ok(weight)
    }

    /// Whether a weight of `bytes` bytes in the compute dtype is kept that way.
    fn keep_wide(&self, bytes: usize) -> bool {
        match self.options.resident {
            Resident::Nf4 => false,
            Resident::Bf16 => true,
            Resident::Auto => self.weight_bytes.load(Ordering::Relaxed) + bytes as u64 <= self.wide_budget,
        }
    }

    /// NF4 codes of stacked sources. Double quantisation is left out for absmax values that come from a checkpoint: it would change them.
    fn quantized(&self, sources: &[&dyn WeightSource], counts: &[usize], quantize: bool) -> Result<Nf4> {
        let total: usize = counts.iter().sum();
        let codes = self.allocator.block(total.div_ceil(2).next_multiple_of(16))?;
        let absmax = self.allocator.block(total.div_ceil(BLOCK) * 4)?;
        let mut first = 0;
        let mut from_checkpoint = false;
        for (s, &count) in sources.iter().zip(counts) {
            let (codes, absmax) = (codes.ptr() + first as u64 / 2, absmax.ptr() + (first / BLOCK * 4) as u64);
            if let Some(RawWeight::Nf4 { codes: bytes, absmax: values }) = s.raw() {
                let expected = (count.div_ceil(2), count.div_ceil(BLOCK));
                if (bytes.len(), values.len()) != expected {
                    let what = format!(
                        "{} bytes of codes and {} absmax values are stored, its shape needs {} and {}",
                        bytes.len(),
                        values.len(),
                        expected.0,
                        expected.1
                    );
                    return Err(wrong(*s, what));
                }
                from_checkpoint = true;
                self.transfers.upload(codes, bytes.len(), |start, part| {
                    part.copy_from_slice(&bytes[start..start + part.len()])
                })?;
                self.transfers.upload(absmax, values.len() * 4, |start, part| {
                    for (b, v) in part.chunks_exact_mut(4).zip(&values[start / 4..]) {
                        b.copy_from_slice(&v.to_le_bytes());
                    }
                })?;
            } else {
                self.stream(*s, |start, len, dtype, chunk| {
                    let kernel =
                        self.kernels.get(Variant::from_to(Family::Nf4, dtype, self.compute), "nf4_quantize")?;
                    let launch = Launch::new(&self.device, kernel)
                        .arg(chunk)
                        .arg(len as u64)
                        .arg(codes + start as u64 / 2)
                        .arg(absmax + (start / BLOCK * 4) as u64);
                    // SAFETY: the chunk holds `len` elements and starts on a block; codes and absmax have room for all of the source.
                    unsafe { launch.go((len.div_ceil(2048) as u32, 1, 1), 256, 0) }
                })?;
            }
            first += count;
        }
        let blocks: Vec<usize> = counts.iter().map(|n| n.div_ceil(BLOCK)).collect();
        let whole = blocks[..blocks.len() - 1].iter().all(|n| n.is_multiple_of(NESTED_BLOCK));
        if quantize && self.options.double_quant && whole && !from_checkpoint && total > 0 {
            let absmax = self.double_quantized(&absmax, &blocks)?;
            return Ok(Nf4 { codes, absmax });
        }
        Ok(Nf4 { codes, absmax: Absmax::Single(absmax) })
    }

    /// Each source of a stack has its own mean, as it would have alone.
    fn double_quantized(&self, absmax: &Block, blocks: &[usize]) -> Result<Absmax> {
        let total: usize = blocks.iter().sum();
        let nested_blocks = total.div_ceil(NESTED_BLOCK);
        let codes = self.allocator.block(total)?;
        let nested = self.allocator.block(nested_blocks * 4)?;
        let offsets = self.allocator.block(nested_blocks * 4)?;
        let map = self.dynamic_map()?;
        let mean = self.allocator.block(4)?;
        let mut first = 0;
        for &n in blocks {
            let values = absmax.ptr() + first as u64 * 4;
            self.queue_mean(values, n, mean.ptr())?;
            let kernel =
                self.kernels.get(Variant::from_to(Family::Nf4, Dtype::F32, self.compute), "nf4_double_quantize")?;
            let launch = Launch::new(&self.device, kernel)
                .arg(values)
                .arg(n as u64)
                .arg(mean.ptr())
                .arg(map.ptr())
                .arg(codes.ptr() + first as u64)
                .arg(nested.ptr() + (first / NESTED_BLOCK * 4) as u64)
                .arg(offsets.ptr() + (first / NESTED_BLOCK * 4) as u64);
            // SAFETY: `first` is a multiple of the nested block for all but an only or last source; every list has room for `total`.
            unsafe { launch.go((n.div_ceil(NESTED_BLOCK) as u32, 1, 1), NESTED_BLOCK as u32, 0)? };
            first += n;
        }
        Ok(Absmax::Double { codes, nested, offsets, map })
    }

    /// The signed dynamic map, and the unsigned one behind it.
    pub(crate) fn dynamic_map(&self) -> Result<Arc<Block>> {
        let mut map = self.map.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(map) = map.as_ref() {
            return Ok(Arc::clone(map));
        }
        let maps = [SIGNED, UNSIGNED].concat();
        let block = self.allocator.block(maps.len() * 4)?;
        self.transfers.upload(block.ptr(), maps.len() * 4, |start, part| {
            for (b, v) in part.chunks_exact_mut(4).zip(&maps[start / 4..]) {
                b.copy_from_slice(&v.to_le_bytes());
            }
        })?;
        Ok(Arc::clone(map.insert(Arc::new(block))))
    }

    /// Brings a source to the card in chunks; `use_chunk` gets (first element, elements, dtype, device address) and queues its work.
    /// Chunks are whole rows and start on a multiple of [`BLOCK`].
    fn stream(
        &self,
        source: &dyn WeightSource,
        mut use_chunk: impl FnMut(usize, usize, Dtype, u64) -> Result<()>,
    ) -> Result<()> {
        let (count, cols) = (elements(source)?, source.cols());
        if count == 0 {
            return Ok(());
        }
        let plain = plain_bytes(source)?;
        let dtype = plain.map_or(Dtype::F32, |p| p.1);
        // Whole rows; as many as make whole blocks.
        let rows = CHUNK / dtype.size() / cols;
        let rows = if cols.is_multiple_of(BLOCK) { rows.max(1) } else { (rows / BLOCK).max(1) * BLOCK };
        let len = rows.min(source.rows()) * cols;
        let bytes = len.min(count) * dtype.size();
        let mut guard = self.load_staging.lock().unwrap_or_else(PoisonError::into_inner);
        let mut staging = match guard.take() {
            Some((s, size)) if size >= bytes => (s, size),
            _ => (Staging::new(&self.device, bytes.max(CHUNK))?, bytes.max(CHUNK)),
        };
        let chunks = [self.allocator.block(bytes)?, self.allocator.block(bytes)?];
        for start in (0..count).step_by(len) {
            let n = len.min(count - start);
            staging.0.with(|slot, index| {
                match plain {
                    Some((all, _)) => {
                        let part = &all[start * dtype.size()..(start + n) * dtype.size()];
                        in_parallel(&mut slot.bytes_mut()[..part.len()], 1 << 20, |at, out| {
                            out.copy_from_slice(&part[at..at + out.len()]);
                            Ok(())
                        })?;
                    }
                    None => {
                        let first = start / cols;
                        in_parallel(&mut slot.f32s_mut()[..n], cols, |at, out| {
                            let row = first + at / cols;
                            source.read_rows(row..row + out.len() / cols, out)
                        })?;
                    }
                }
                let from = &slot.bytes_mut()[..n * dtype.size()];
                self.device.bind()?;
                // SAFETY: the chunk has `bytes` bytes; the slot is not touched before its event has passed, and the chunk is used
                // again only behind this one's work in the stream.
                self.device
                    .check(unsafe { result::memcpy_htod_async(chunks[index].ptr(), from, self.device.stream) })?;
                use_chunk(start, n, dtype, chunks[index].ptr())
            })?;
        }
        *guard = Some(staging);
        Ok(())
    }

    /// Rows `row ..` and columns `column ..` of an NF4 matrix with `inner` columns, as many as `out` has.
    pub(crate) fn dequantize(&self, nf4: &Nf4, inner: usize, row: usize, column: usize, out: View) -> Result<()> {
        let wide = [inner, column, out.cols].iter().all(|n| n.is_multiple_of(16)) && out.wide();
        let walk = Walk::new(out.rows, out.cols, if wide { 16 } else { 1 }, wide);
        let name = if wide { "nf4_dequantize_16" } else { "nf4_dequantize_1" };
        // The levels do not depend on the dtype that was quantised; the compute dtype's module is as good as any.
        let kernel = self.kernels.get(Variant::from_to(Family::Nf4, Dtype::F32, self.compute), name)?;
        let launch = Launch::new(&self.device, kernel)
            .arg(nf4.codes.ptr())
            .arg(nf4.absmax.scales())
            .arg(inner as u64)
            .arg(row as u64)
            .arg(column as u32)
            .arg(out.cols as u32)
            .arg(walk.chunks)
            .arg(out.ptr)
            .arg(out.stride as i64);
        // SAFETY: the callers ask for rows and columns of the weight, and give an output that holds them.
        unsafe { launch.go((walk.blocks, 1, 1), walk.threads, 0) }
    }

    /// Codes (two a byte) and effective absmax of an NF4 weight, for tests and tools.
    pub(crate) fn read_nf4(&self, w: &CudaWeight) -> Result<Option<(Vec<u8>, Vec<f32>)>> {
        let Data::Nf4(nf4) = &w.data else { return Ok(None) };
        let read = |block: &Block, len: usize| -> Result<Vec<u8>> {
            let mut bytes = vec![0; len];
            self.transfers.download(block.ptr(), len, |at, part| bytes[at..at + part.len()].copy_from_slice(part))?;
            Ok(bytes)
        };
        let floats =
            |bytes: Vec<u8>| -> Vec<f32> { bytes.as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b)).collect() };
        let count = w.out * w.inner;
        let blocks = count.div_ceil(BLOCK);
        let absmax = match &nf4.absmax {
            Absmax::Single(b) => floats(read(b, blocks * 4)?),
            Absmax::Double { codes, nested, offsets, .. } => {
                let (nested, offsets) =
                    (floats(read(nested, nested.bytes())?), floats(read(offsets, offsets.bytes())?));
                let value = |(i, &code): (usize, &u8)| {
                    SIGNED[code as usize] * nested[i / NESTED_BLOCK] + offsets[i / NESTED_BLOCK]
                };
                read(codes, blocks)?.iter().enumerate().map(value).collect()
            }
        };
        Ok(Some((read(&nf4.codes, count.div_ceil(2))?, absmax)))
    }
}
