//! A stop watch on the device's stream, for benchmarks: it counts the card's time, not the host's.

use std::sync::Arc;

use cashtag_backend::Result;

use crate::driver::{Device, Event};

/// Two events: work that is queued between [`start`](Timer::start) and [`stop`](Timer::stop) is timed.
pub struct Timer {
    start: Event,
    stop: Event,
}

impl Timer {
    pub(crate) fn new(device: &Arc<Device>) -> Result<Self> {
        Ok(Self { start: device.event()?, stop: device.event()? })
    }

    /// # Errors
    /// The device fails.
    pub fn start(&self) -> Result<()> {
        self.start.record()
    }

    /// # Errors
    /// The device fails.
    pub fn stop(&self) -> Result<()> {
        self.stop.record()
    }

    /// Milliseconds between the two; waits for the second.
    ///
    /// # Errors
    /// The device fails, or one of the two was never reached.
    pub fn milliseconds(&self) -> Result<f32> {
        self.stop.wait()?;
        self.stop.since(&self.start)
    }
}
