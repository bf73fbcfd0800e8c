//! Recorded sequences of work: one launch instead of hundreds, for shapes that come again and again (one tweet, one new token) and for
//! benchmarks that must not measure the host.

use std::sync::Arc;

use cashtag_backend::Result;
use cudarc::driver::{result, sys};

use crate::driver::Device;

/// Work that was captured from the stream.
pub struct Graph {
    device: Arc<Device>,
    executable: sys::CUgraphExec,
}

// SAFETY: a handle of the driver, used with the context current.
unsafe impl Send for Graph {}
unsafe impl Sync for Graph {}

impl Graph {
    pub(crate) fn capture(device: &Arc<Device>, work: impl FnOnce() -> Result<()>) -> Result<Self> {
        device.bind()?;
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is alive and nothing else captures it; the graph is destroyed once it is instantiated.
        unsafe {
            device.check(result::stream::begin_capture(device.stream, mode))?;
            let done = work();
            let graph = device.check(result::stream::end_capture(device.stream));
            done?;
            let graph = graph?;
            let executable = result::graph::instantiate(graph, sys::CUgraphInstantiate_flags(0));
            let _ = result::graph::destroy(graph);
            Ok(Self { device: Arc::clone(device), executable: device.check(executable)? })
        }
    }

    /// Queues the recorded work.
    ///
    /// # Errors
    /// The device fails.
    ///
    /// # Safety
    /// Every buffer and weight that the work read or wrote still lives.
    pub unsafe fn launch(&self) -> Result<()> {
        self.device.bind()?;
        // SAFETY: the executable is alive; its pointers are by the caller's contract.
        self.device.check(unsafe { result::graph::launch(self.executable, self.device.stream) })
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        if self.device.synchronize().is_ok() {
            // SAFETY: made in `capture`, destroyed once, no longer running.
            let _ = unsafe { result::graph::exec_destroy(self.executable) };
        }
    }
}
