//! Device memory: buffers, the count of what is held, and pinned host memory through which everything passes.

use std::ffi::c_void;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use cashtag_backend::{Dtype, Error, Mat, MatMut, Result};
use cudarc::driver::{result, sys};

use crate::driver::{Device, Event};

/// Bytes held now and at most by one backend.
#[derive(Debug, Default)]
pub(crate) struct Count {
    now: AtomicU64,
    peak: AtomicU64,
}

impl Count {
    pub(crate) fn read(&self) -> (u64, u64) {
        (self.now.load(Ordering::Relaxed), self.peak.load(Ordering::Relaxed))
    }
}

/// Allocates on one device.
#[derive(Clone)]
pub(crate) struct Allocator {
    pub(crate) device: Arc<Device>,
    pub(crate) count: Arc<Count>,
}

/// Bytes of device memory, freed in stream order when dropped: work that was queued before still sees them.
pub(crate) struct Block {
    allocator: Allocator,
    ptr: sys::CUdeviceptr,
    bytes: usize,
}

impl Allocator {
    pub(crate) fn block(&self, bytes: usize) -> Result<Block> {
        let ptr = if bytes == 0 { 0 } else { self.allocate(bytes)? };
        let now = self.count.now.fetch_add(bytes as u64, Ordering::Relaxed) + bytes as u64;
        self.count.peak.fetch_max(now, Ordering::Relaxed);
        Ok(Block { allocator: self.clone(), ptr, bytes })
    }

    fn allocate(&self, bytes: usize) -> Result<sys::CUdeviceptr> {
        let device = &self.device;
        device.bind()?;
        // SAFETY: the stream is alive.
        let attempt = || unsafe {
            match device.pool {
                Some(_) => result::malloc_async(device.stream, bytes),
                None => result::malloc_sync(bytes),
            }
        };
        let out_of_memory = |e: &result::DriverError| e.0 == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY;
        match attempt() {
            Err(e) if out_of_memory(&e) => {
                // What the pool keeps of freed memory may be in pieces of the wrong size: give it back and try again.
                device.synchronize()?;
                if let Some(pool) = device.pool {
                    // SAFETY: the device's own pool.
                    device.check(unsafe { sys::cuMemPoolTrimTo(pool, 0) }.result())?;
                }
                match attempt() {
                    Err(e) if out_of_memory(&e) => Err(Error::OutOfMemory {
                        device: device.name(),
                        needed: bytes,
                        free: device.memory().map_or(0, |m| m.0 as usize),
                    }),
                    other => device.check(other),
                }
            }
            other => device.check(other),
        }
    }

    pub(crate) fn buffer(&self, dtype: Dtype, len: usize) -> Result<CudaBuffer> {
        let bytes = len.checked_mul(dtype.size()).ok_or_else(|| Error::OutOfMemory {
            device: self.device.name(),
            needed: usize::MAX,
            free: 0,
        })?;
        Ok(CudaBuffer { block: self.block(bytes)?, dtype, len })
    }
}

impl Block {
    pub(crate) fn ptr(&self) -> u64 {
        self.ptr
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(crate) fn fill_zero(&self) -> Result<()> {
        let device = &self.allocator.device;
        device.bind()?;
        if self.bytes == 0 {
            return Ok(());
        }
        // SAFETY: the block is `bytes` long and alive in stream order.
        device.check(unsafe { result::memset_d8_async(self.ptr, 0, self.bytes, device.stream) })
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        self.allocator.count.now.fetch_sub(self.bytes as u64, Ordering::Relaxed);
        let device = &self.allocator.device;
        if self.ptr == 0 || device.bind().is_err() {
            return;
        }
        // SAFETY: allocated the same way; freed once. A failure here means that the context is broken, which the next call reports.
        unsafe {
            let _ = match device.pool {
                Some(_) => result::free_async(self.ptr, device.stream),
                None => result::free_sync(self.ptr),
            };
        }
    }
}

/// Memory of the CUDA backend.
pub struct CudaBuffer {
    pub(crate) block: Block,
    pub(crate) dtype: Dtype,
    pub(crate) len: usize,
}

impl CudaBuffer {
    pub(crate) fn ptr(&self) -> u64 {
        self.block.ptr()
    }
}

/// A checked view: device address of the first element, and its geometry.
#[derive(Clone, Copy, Debug)]
pub(crate) struct View {
    pub(crate) ptr: u64,
    pub(crate) dtype: Dtype,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) stride: usize,
}

impl View {
    pub(crate) fn new(m: Mat<'_, CudaBuffer>) -> Self {
        assert!(m.end() <= m.buffer.len, "view up to {} of {} elements", m.end(), m.buffer.len);
        assert!(m.stride >= m.cols || m.rows <= 1, "rows of {} columns are only {} apart", m.cols, m.stride);
        let dtype = m.buffer.dtype;
        Self {
            ptr: m.buffer.ptr() + (m.offset * dtype.size()) as u64,
            dtype,
            rows: m.rows,
            cols: m.cols,
            stride: m.stride,
        }
    }

    pub(crate) fn of_mut(m: &MatMut<'_, CudaBuffer>) -> Self {
        Self::new(m.as_ref())
    }

    /// Columns `start .. start + cols`.
    pub(crate) fn columns(self, start: usize, cols: usize) -> Self {
        assert!(start + cols <= self.cols);
        Self { ptr: self.ptr + (start * self.dtype.size()) as u64, cols, ..self }
    }

    /// Whether rows can be read eight elements at a time.
    pub(crate) fn wide(&self) -> bool {
        self.ptr.is_multiple_of(16) && self.cols.is_multiple_of(8) && (self.stride.is_multiple_of(8) || self.rows <= 1)
    }

    /// One long row, if the rows follow one another without gaps.
    pub(crate) fn flat(self) -> Option<Self> {
        let len = self.rows * self.cols;
        (self.stride == self.cols || self.rows <= 1).then_some(Self { rows: 1, cols: len, stride: len, ..self })
    }
}

/// Device memory that operations borrow for the time of their launches, one after the other: all of them queue on one stream.
#[derive(Default)]
pub(crate) struct Scratch(Mutex<Option<Block>>);

impl Scratch {
    /// Runs `queue` with the address of at least `bytes` bytes. Contents are unspecified.
    pub(crate) fn with<R>(
        &self,
        allocator: &Allocator,
        bytes: usize,
        queue: impl FnOnce(u64) -> Result<R>,
    ) -> Result<R> {
        let mut guard = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if guard.as_ref().is_none_or(|b| b.bytes() < bytes) {
            // The old one goes first, so that the two never stand side by side.
            *guard = None;
            *guard = Some(allocator.block(bytes.next_multiple_of(1 << 20))?);
        }
        queue(guard.as_ref().map_or(0, Block::ptr))
    }
}

/// Page-locked host memory.
pub(crate) struct Pinned {
    device: Arc<Device>,
    ptr: *mut c_void,
    bytes: usize,
}

// SAFETY: plain memory with one owner.
unsafe impl Send for Pinned {}

impl Pinned {
    pub(crate) fn new(device: &Arc<Device>, bytes: usize) -> Result<Self> {
        device.bind()?;
        // SAFETY: freed in `drop`.
        let ptr = device.check(unsafe { result::malloc_host(bytes.max(1), 0) })?;
        Ok(Self { device: Arc::clone(device), ptr, bytes })
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: `bytes` bytes, page-aligned, owned; initialised by the driver or by earlier writes, and any byte is a valid u8.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.cast(), self.bytes) }
    }

    pub(crate) fn f32s_mut(&mut self) -> &mut [f32] {
        // SAFETY: as above; page alignment suits f32 and every bit pattern is one.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.cast(), self.bytes / 4) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: allocated by malloc_host, freed once.
            let _ = unsafe { result::free_host(self.ptr) };
        }
    }
}

/// Two pinned slots in turn: one is filled while the other is copied.
pub(crate) struct Staging {
    slots: Vec<(Pinned, Event)>,
    next: usize,
}

/// Bytes of a slot for uploads and downloads.
const SLOT: usize = 4 << 20;

impl Staging {
    pub(crate) fn new(device: &Arc<Device>, bytes: usize) -> Result<Self> {
        let slots = (0..2).map(|_| Ok((Pinned::new(device, bytes)?, device.event()?))).collect::<Result<_>>()?;
        Ok(Self { slots, next: 0 })
    }

    /// The next slot, once the copy that used it last is done; `f` fills it and queues its use.
    pub(crate) fn with<R>(&mut self, f: impl FnOnce(&mut Pinned, usize) -> Result<R>) -> Result<R> {
        let index = self.next % 2;
        let (slot, event) = &mut self.slots[index];
        self.next += 1;
        event.wait()?;
        let result = f(slot, index)?;
        event.record()?;
        Ok(result)
    }
}

/// Copies between host and device for a backend, through one staging area.
pub(crate) struct Transfers {
    device: Arc<Device>,
    staging: Mutex<Option<Staging>>,
}

impl Transfers {
    pub(crate) fn new(device: &Arc<Device>) -> Self {
        Self { device: Arc::clone(device), staging: Mutex::new(None) }
    }

    fn staging<R>(&self, f: impl FnOnce(&mut Staging) -> Result<R>) -> Result<R> {
        let mut guard = self.staging.lock().unwrap_or_else(PoisonError::into_inner);
        let staging = match guard.take() {
            Some(s) => s,
            None => Staging::new(&self.device, SLOT)?,
        };
        f(guard.insert(staging))
    }

    /// Copies `bytes` bytes to device address `to`; `fill` writes a part of them, starting at the byte it is given.
    pub(crate) fn upload(&self, to: u64, bytes: usize, mut fill: impl FnMut(usize, &mut [u8])) -> Result<()> {
        self.device.bind()?;
        self.staging(|staging| {
            let mut done = 0;
            while done < bytes {
                done += staging.with(|slot, _| {
                    let part = &mut slot.bytes_mut()[..SLOT.min(bytes - done)];
                    fill(done, part);
                    // SAFETY: the destination is the caller's buffer; the slot is not touched before its event has passed.
                    self.device
                        .check(unsafe { result::memcpy_htod_async(to + done as u64, part, self.device.stream) })?;
                    Ok(part.len())
                })?;
            }
            Ok(())
        })
    }

    /// Copies `bytes` bytes from device address `from`, waiting for everything queued; `take` reads a part of them.
    pub(crate) fn download(&self, from: u64, bytes: usize, mut take: impl FnMut(usize, &[u8])) -> Result<()> {
        self.device.bind()?;
        self.staging(|staging| {
            let mut done = 0;
            while done < bytes {
                done += staging.with(|slot, _| {
                    let part = &mut slot.bytes_mut()[..SLOT.min(bytes - done)];
                    // SAFETY: the source is the caller's buffer; the stream is waited for before the slot is read.
                    self.device
                        .check(unsafe { result::memcpy_dtoh_async(part, from + done as u64, self.device.stream) })?;
                    self.device.synchronize()?;
                    take(done, part);
                    Ok(part.len())
                })?;
            }
            Ok(())
        })
    }
}
