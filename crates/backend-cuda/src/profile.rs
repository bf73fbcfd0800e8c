//! What the time of a step goes to: two events around each launch, added up by name. For `cashtag bench --profile`; while it is off a
//! launch costs one load of a flag more.
//!
//! An event is a point on the stream that takes a microsecond or so by itself, so many short kernels look a little longer here than they
//! are. Work that is replayed from a [`Graph`](crate::Graph) has no launches and is not seen.

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use cashtag_backend::{KernelTime, Result};
use cudarc::driver::{result, sys};

use crate::driver::Device;

type Name = Cow<'static, str>;

#[derive(Default)]
pub(crate) struct Profile {
    on: AtomicBool,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Launches whose events were not read yet.
    open: Vec<(Name, [sys::CUevent; 2])>,
    /// Events to use again.
    idle: Vec<sys::CUevent>,
    /// Launches and milliseconds.
    totals: HashMap<Name, (u64, f64)>,
}

// SAFETY: events are handles of the driver, used with the context current.
unsafe impl Send for State {}

/// Launches in flight before their events are read, which waits for the card.
const MOST_OPEN: usize = 8192;

impl Profile {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets what was measured, and begins.
    pub(crate) fn start(&self) {
        self.state().totals.clear();
        self.on.store(true, Ordering::Relaxed);
    }

    /// Runs `queue`, and measures what it puts on the stream if that is asked for.
    pub(crate) fn around(
        &self,
        device: &Device,
        name: impl FnOnce() -> Name,
        queue: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        if !self.on.load(Ordering::Relaxed) {
            return queue();
        }
        let mut state = self.state();
        if state.open.len() >= MOST_OPEN {
            state.read(device)?;
        }
        let [before, after] = [state.event(device)?, state.event(device)?];
        // SAFETY: events and stream are alive, the context is current on a thread that launches.
        device.check(unsafe { result::event::record(before, device.stream) })?;
        queue()?;
        // SAFETY: as above.
        device.check(unsafe { result::event::record(after, device.stream) })?;
        state.open.push((name(), [before, after]));
        Ok(())
    }

    /// What was measured since the start, the longest first, and the end of it.
    pub(crate) fn stop(&self, device: &Device) -> Result<Vec<KernelTime>> {
        self.on.store(false, Ordering::Relaxed);
        let mut state = self.state();
        state.read(device)?;
        let mut times: Vec<KernelTime> = state
            .totals
            .drain()
            .map(|(name, (launches, milliseconds))| KernelTime { name: name.into_owned(), launches, milliseconds })
            .collect();
        times.sort_by(|a, b| b.milliseconds.total_cmp(&a.milliseconds).then_with(|| a.name.cmp(&b.name)));
        Ok(times)
    }

    /// Gives the events back; the context must still be there.
    pub(crate) fn release(&self) {
        let mut state = self.state();
        let open = std::mem::take(&mut state.open);
        for event in state.idle.drain(..).chain(open.into_iter().flat_map(|(_, pair)| pair)) {
            // SAFETY: made in `event`, destroyed once.
            let _ = unsafe { result::event::destroy(event) };
        }
    }
}

impl State {
    fn event(&mut self, device: &Device) -> Result<sys::CUevent> {
        match self.idle.pop() {
            Some(event) => Ok(event),
            None => device.check(result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT)),
        }
    }

    /// Waits for the card and adds up.
    fn read(&mut self, device: &Device) -> Result<()> {
        device.synchronize()?;
        for (name, [before, after]) in self.open.drain(..) {
            // SAFETY: both events are alive, were recorded, and the stream has passed them.
            let milliseconds = device.check(unsafe { result::event::elapsed(before, after) })?;
            let total = self.totals.entry(name).or_default();
            *total = (total.0 + 1, total.1 + f64::from(milliseconds));
            self.idle.extend([before, after]);
        }
        Ok(())
    }
}
