//! Sums over several cards, by NCCL, on the backend's stream.
//!
//! NCCL is opened when it is asked for; a machine without it trains on one card, or sums on the host.

use std::sync::{Arc, Mutex, PoisonError};

use cashtag_backend::{Dtype, Result};
use cudarc::nccl::sys;

use crate::driver::Device;
use crate::libraries;
use crate::memory::CudaBuffer;

/// The card's place among others, once it has joined them.
#[derive(Default)]
pub(crate) struct Collective {
    joined: Mutex<Option<Communicator>>,
}

struct Communicator {
    raw: sys::ncclComm_t,
    device: Arc<Device>,
}

// SAFETY: a communicator may be used from any thread, by one at a time: it lies behind a mutex.
unsafe impl Send for Communicator {}

impl Drop for Communicator {
    fn drop(&mut self) {
        // Not ncclCommDestroy, which waits for ranks that may be gone.
        if self.device.bind().is_ok() {
            // SAFETY: the communicator is used no more.
            unsafe { sys::ncclCommAbort(self.raw) };
        }
    }
}

fn check(device: &Device, what: &str, result: sys::ncclResult_t) -> Result<()> {
    if result == sys::ncclResult_t::ncclSuccess {
        return Ok(());
    }
    // SAFETY: NCCL gives a constant text for every result.
    let text = unsafe { std::ffi::CStr::from_ptr(sys::ncclGetErrorString(result)) };
    Err(device.error(format!("{what}: {}\n  hint: NCCL_DEBUG=WARN says more", text.to_string_lossy())))
}

impl Collective {
    /// A new id, if NCCL is here.
    pub(crate) fn id(&self, device: &Device) -> Result<Option<Vec<u8>>> {
        if libraries::nccl().is_err() {
            return Ok(None);
        }
        let mut id = sys::ncclUniqueId { internal: [0; 128] };
        // SAFETY: the library is open; the pointer is to a local.
        check(device, "ncclGetUniqueId", unsafe { sys::ncclGetUniqueId(&mut id) })?;
        Ok(Some(id.internal.iter().map(|&c| c as u8).collect()))
    }

    /// Waits until `size` cards have joined.
    pub(crate) fn join(&self, device: &Arc<Device>, id: &[u8], rank: usize, size: usize) -> Result<()> {
        libraries::nccl().map_err(|e| device.error(e))?;
        let mut unique = sys::ncclUniqueId { internal: [0; 128] };
        if id.len() != unique.internal.len() {
            return Err(device.error(format!("an id of {} bytes is none of NCCL's", id.len())));
        }
        unique.internal.iter_mut().zip(id).for_each(|(to, from)| *to = *from as _);
        device.bind()?;
        let mut raw = std::ptr::null_mut();
        // SAFETY: the context of the card is current, the pointer is to a local.
        let result = unsafe { sys::ncclCommInitRank(&mut raw, size as i32, unique, rank as i32) };
        check(device, "the cards cannot join (ncclCommInitRank)", result)?;
        *self.joined.lock().unwrap_or_else(PoisonError::into_inner) =
            Some(Communicator { raw, device: Arc::clone(device) });
        Ok(())
    }

    /// `x ← Σ x` over the joined cards, queued on the stream.
    pub(crate) fn all_reduce(&self, device: &Device, x: &mut CudaBuffer) -> Result<()> {
        assert_eq!(x.dtype, Dtype::F32, "gradients are summed in float32");
        let joined = self.joined.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(communicator) = &*joined else { return Err(device.error("this card has joined no others")) };
        device.bind()?;
        let at = x.ptr();
        // SAFETY: the buffer holds x.len values of f32 and is in use on this stream alone.
        let result = unsafe {
            sys::ncclAllReduce(
                at as *const std::ffi::c_void,
                at as *mut std::ffi::c_void,
                x.len,
                sys::ncclDataType_t::ncclFloat32,
                sys::ncclRedOp_t::ncclSum,
                communicator.raw,
                device.stream.cast(),
            )
        };
        check(device, "ncclAllReduce", result)
    }
}
