//! Models and adapters as the files of other programs: a Hugging Face checkpoint, a GGUF model, llama.cpp's adapter.
//!
//! A base model with an adapter is a [`Merged`] model: its weights are W + s·B·A, computed a block of rows at a time, so
//! that memory does not grow with the model. Functions write into the place that they are given; whoever calls them gives
//! a temporary one and renames it when all is there.

mod calibrate;
mod gguf;
mod gguf_lora;
mod hf;
mod merge;
mod quantize;
mod rounding;

pub use self::calibrate::{Calibration, Rounding};
pub use self::gguf::{GgufType, write_gguf};
pub use self::gguf_lora::write_gguf_lora;
pub use self::hf::{Dtype16, HfOptions, write_hf};
pub use self::merge::Merged;

use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// Called with the bytes written so far and in all; `false` stops with [`Error::Stopped`].
pub type Watch<'a> = &'a mut dyn FnMut(u64, u64) -> bool;

/// A file that is being written, with errors that name it.
struct Output {
    path: PathBuf,
    file: BufWriter<File>,
    written: u64,
}

impl Output {
    fn create(path: &Path) -> Result<Self> {
        let file = File::create(path).map_err(Error::write(path))?;
        Ok(Self { path: path.to_owned(), file: BufWriter::with_capacity(1 << 20, file), written: 0 })
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(Error::write(&self.path))?;
        self.written += bytes.len() as u64;
        Ok(())
    }

    /// Zeros up to a multiple of `alignment`.
    fn align(&mut self, alignment: u64) -> Result<()> {
        let zeros = self.written.next_multiple_of(alignment) - self.written;
        self.write(&vec![0; zeros as usize])
    }

    fn finish(mut self) -> Result<()> {
        self.file.flush().and_then(|()| self.file.get_ref().sync_all()).map_err(Error::write(&self.path))
    }
}

/// Rows that are merged, converted and written at a time: some 16 MB.
fn block_rows(cols: usize) -> usize {
    ((4 << 20) / cols.max(1)).max(1)
}
