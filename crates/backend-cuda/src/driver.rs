//! One GPU: its context, its stream, and launches on it. Everything of a backend runs on one stream, in the order of the calls.

use std::ffi::c_void;
use std::sync::Arc;

use cashtag_backend::{Error, Result};
use cudarc::driver::{DriverError, result, sys};

use crate::libraries::{self, describe};
use crate::profile::Profile;

/// Facts about a card that kernels and planning need.
#[derive(Clone, Debug)]
pub(crate) struct Facts {
    pub(crate) name: String,
    /// Compute capability, 90 for 9.0.
    pub(crate) sm: u32,
    pub(crate) memory_total: u64,
    pub(crate) multiprocessors: u32,
    /// Bytes of shared memory that a block may ask for.
    pub(crate) shared_memory: u32,
}

pub(crate) struct Device {
    pub(crate) ordinal: u32,
    pub(crate) facts: Facts,
    pub(crate) context: sys::CUcontext,
    pub(crate) stream: sys::CUstream,
    device: sys::CUdevice,
    /// Stream-ordered allocation; without it (some virtual GPUs) plain allocations.
    pub(crate) pool: Option<sys::CUmemoryPool>,
    pub(crate) profile: Profile,
}

// SAFETY: the driver's API may be called from any thread once the context is current there (see `bind`), and handles are plain
// identifiers.
unsafe impl Send for Device {}
unsafe impl Sync for Device {}

fn start() -> Result<(), String> {
    libraries::cuda()?;
    result::init().map_err(|e| format!("the driver does not start: {}", describe(e)))
}

/// The devices that the driver shows.
pub(crate) fn devices() -> Result<Vec<Facts>, String> {
    start()?;
    let count = result::device::get_count().map_err(describe)?;
    (0..count).map(|i| result::device::get(i).and_then(facts).map_err(describe)).collect()
}

fn facts(device: sys::CUdevice) -> Result<Facts, DriverError> {
    use sys::CUdevice_attribute as A;
    // SAFETY: `device` came from the driver.
    unsafe {
        let get = |a| result::device::get_attribute(device, a).map(|v| v as u32);
        Ok(Facts {
            name: result::device::get_name(device)?,
            sm: get(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)? * 10
                + get(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
            memory_total: result::device::total_mem(device)? as u64,
            multiprocessors: get(A::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
            shared_memory: get(A::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
        })
    }
}

impl Device {
    pub(crate) fn open(ordinal: u32) -> Result<Arc<Self>> {
        let name = format!("cuda:{ordinal}");
        let fail = |what: String| Error::Device { device: name.clone(), what };
        start().map_err(fail)?;
        let make = || -> Result<Self, DriverError> {
            let device = result::device::get(ordinal as i32)?;
            let facts = facts(device)?;
            // SAFETY: the device is valid; the context is released in `drop`.
            let context = unsafe { result::primary_ctx::retain(device)? };
            // SAFETY: the context was just made.
            unsafe { result::ctx::set_current(context)? };
            let stream = result::stream::create(result::stream::StreamKind::NonBlocking)?;
            // SAFETY: plain queries of a valid device; the pool belongs to the device.
            let pool = unsafe {
                let pools = result::device::get_attribute(
                    device,
                    sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED,
                )?;
                if pools != 0 {
                    let pool = result::device::get_default_mem_pool(device)?;
                    // Keep what is freed: a step frees and asks for the same sizes again and again.
                    let mut keep = u64::MAX;
                    let threshold = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
                    sys::cuMemPoolSetAttribute(pool, threshold, (&raw mut keep).cast()).result()?;
                    Some(pool)
                } else {
                    None
                }
            };
            Ok(Self { ordinal, facts, context, stream, device, pool, profile: Profile::default() })
        };
        make().map(Arc::new).map_err(|e| fail(describe(e)))
    }

    pub(crate) fn name(&self) -> String {
        format!("cuda:{}", self.ordinal)
    }

    pub(crate) fn error(&self, what: impl Into<String>) -> Error {
        Error::Device { device: self.name(), what: what.into() }
    }

    pub(crate) fn check<T>(&self, result: Result<T, DriverError>) -> Result<T> {
        result.map_err(|e| self.error(describe(e)))
    }

    /// Makes the context current on the calling thread; every call into the driver needs it.
    pub(crate) fn bind(&self) -> Result<()> {
        // SAFETY: the context lives as long as `self`.
        self.check(unsafe { result::ctx::set_current(self.context) })
    }

    pub(crate) fn synchronize(&self) -> Result<()> {
        self.bind()?;
        // SAFETY: the stream lives as long as `self`.
        self.check(unsafe { result::stream::synchronize(self.stream) })
    }

    /// (free, total) bytes of the card.
    pub(crate) fn memory(&self) -> Result<(u64, u64)> {
        self.bind()?;
        self.check(result::mem_get_info()).map(|(free, total)| (free as u64, total as u64))
    }

    pub(crate) fn event(self: &Arc<Self>) -> Result<Event> {
        self.bind()?;
        let raw = self.check(result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT))?;
        Ok(Event { device: Arc::clone(self), raw })
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // SAFETY: nothing holds the device any more; errors at the end of a process are of no use to anyone.
        unsafe {
            let _ = result::ctx::set_current(self.context);
            self.profile.release();
            let _ = result::stream::synchronize(self.stream);
            let _ = result::stream::destroy(self.stream);
            let _ = result::primary_ctx::release(self.device);
        }
    }
}

/// A point in the stream.
pub(crate) struct Event {
    device: Arc<Device>,
    raw: sys::CUevent,
}

// SAFETY: as for Device.
unsafe impl Send for Event {}
unsafe impl Sync for Event {}

impl Event {
    pub(crate) fn record(&self) -> Result<()> {
        self.device.bind()?;
        // SAFETY: event and stream are alive.
        self.device.check(unsafe { result::event::record(self.raw, self.device.stream) })
    }

    /// Waits until the stream has passed the point that was recorded last; at once if none was.
    pub(crate) fn wait(&self) -> Result<()> {
        self.device.bind()?;
        // SAFETY: the event is alive.
        self.device.check(unsafe { result::event::synchronize(self.raw) })
    }

    /// Milliseconds from `earlier` to this point; both must have been recorded and passed.
    pub(crate) fn since(&self, earlier: &Event) -> Result<f32> {
        self.device.bind()?;
        // SAFETY: both events are alive and of one device.
        self.device.check(unsafe { result::event::elapsed(earlier.raw, self.raw) })
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: the event is alive and not used again.
            let _ = unsafe { result::event::destroy(self.raw) };
        }
    }
}

/// A kernel of a loaded module.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Function {
    pub(crate) raw: sys::CUfunction,
    pub(crate) name: &'static str,
}

// SAFETY: a handle of the driver; modules are never unloaded while their device lives.
unsafe impl Send for Function {}
unsafe impl Sync for Function {}

/// What may be passed to a kernel by value: at most 96 bytes.
pub(crate) trait Argument: Copy {}
impl Argument for u32 {}
impl Argument for u64 {}
impl Argument for i64 {}
impl Argument for f32 {}
impl Argument for f64 {}

const MAX_ARGUMENTS: usize = 18;
type Slot = [u64; 12];

/// One launch under construction: arguments are copied into slots, in the order of the kernel's parameters.
pub(crate) struct Launch<'a> {
    device: &'a Device,
    function: Function,
    slots: [Slot; MAX_ARGUMENTS],
    count: usize,
}

impl<'a> Launch<'a> {
    pub(crate) fn new(device: &'a Device, function: Function) -> Self {
        Self { device, function, slots: [[0; 12]; MAX_ARGUMENTS], count: 0 }
    }

    pub(crate) fn arg<A: Argument>(mut self, value: A) -> Self {
        assert!(size_of::<A>() <= size_of::<Slot>());
        // SAFETY: the slot is large enough (asserted) and aligned to eight bytes, as much as any argument needs.
        unsafe { self.slots[self.count].as_mut_ptr().cast::<A>().write(value) };
        self.count += 1;
        self
    }

    /// # Safety
    /// The arguments are those that the kernel declares, its pointers stay valid until the stream has passed the launch, and the
    /// kernel stays inside what they point to.
    pub(crate) unsafe fn go(mut self, grid: (u32, u32, u32), block: u32, shared: u32) -> Result<()> {
        if grid.0 == 0 || grid.1 == 0 || grid.2 == 0 {
            return Ok(());
        }
        self.device.bind()?;
        let mut pointers: [*mut c_void; MAX_ARGUMENTS] = [std::ptr::null_mut(); MAX_ARGUMENTS];
        for (pointer, slot) in pointers.iter_mut().zip(&mut self.slots) {
            *pointer = slot.as_mut_ptr().cast();
        }
        let (device, function) = (self.device, self.function);
        let queue = || {
            // SAFETY: by the caller's contract.
            let launched = unsafe {
                result::launch_kernel(
                    function.raw,
                    grid,
                    (block, 1, 1),
                    shared,
                    device.stream,
                    &mut pointers[..self.count],
                )
            };
            device.check(launched)
        };
        device.profile.around(device, || function.name.into(), queue)
    }
}
