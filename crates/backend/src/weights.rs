//! Where frozen weights come from. A backend pulls rows out of a [`WeightSource`] and stores them as suits the device
//! (packed panels, NF4 codes, 16-bit); the readers in `llama` implement the source for GGUF, safetensors and random weights.

use std::ops::Range;

use crate::Result;

/// One frozen matrix `[rows = out_features, cols = in_features]`, as `torch.nn.Linear.weight`.
pub trait WeightSource: Send + Sync {
    /// The tensor's name, for messages.
    fn name(&self) -> &str;
    fn rows(&self) -> usize;
    fn cols(&self) -> usize;
    /// Writes rows `rows` as f32 into `out`, which holds exactly `rows.len() * cols` elements.
    fn read_rows(&self, rows: Range<usize>, out: &mut [f32]) -> Result<()>;
    /// The stored bytes, when they are a form that a device can take without conversion on the host.
    fn raw(&self) -> Option<RawWeight<'_>> {
        None
    }
}

/// Stored forms that a device may take as they are. All are row-major and little-endian, and cover the whole matrix.
#[derive(Clone, Copy, Debug)]
pub enum RawWeight<'a> {
    F32(&'a [u8]),
    F16(&'a [u8]),
    Bf16(&'a [u8]),
    /// bitsandbytes' NF4: blocks of 64 consecutive elements of the flattened matrix, two codes a byte, the first element in
    /// the high nibble; one absmax a block (double quantisation is undone by the reader).
    Nf4 {
        codes: &'a [u8],
        absmax: &'a [f32],
    },
}
