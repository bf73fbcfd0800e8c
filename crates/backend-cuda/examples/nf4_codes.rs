//! Quantises a file of little-endian bf16 numbers to NF4 on the GPU and writes the codes and absmax values, to be compared with
//! bitsandbytes' on the same numbers: they must be equal byte for byte.
//!
//!     cargo run --release -p cashtag-backend-cuda --example nf4_codes -- WEIGHT.bf16 COLUMNS CODES ABSMAX

use std::error::Error;
use std::ops::Range;

use cashtag_backend::{Backend, RawWeight, WeightSource};
use cashtag_backend_cuda::{CudaBackend, Options, Resident};

struct Bf16File {
    bytes: Vec<u8>,
    cols: usize,
}

impl WeightSource for Bf16File {
    fn name(&self) -> &str {
        "file"
    }
    fn rows(&self) -> usize {
        self.bytes.len() / 2 / self.cols
    }
    fn cols(&self) -> usize {
        self.cols
    }
    fn read_rows(&self, _: Range<usize>, _: &mut [f32]) -> cashtag_backend::Result<()> {
        unreachable!("the stored bytes are taken")
    }
    fn raw(&self) -> Option<RawWeight<'_>> {
        Some(RawWeight::Bf16(&self.bytes))
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [weight, cols, codes_file, absmax_file] = arguments.as_slice() else {
        return Err("usage: nf4_codes WEIGHT.bf16 COLUMNS CODES ABSMAX".into());
    };
    let source = Bf16File { bytes: std::fs::read(weight)?, cols: cols.parse()? };
    let gpu = CudaBackend::new(0, Options { resident: Resident::Nf4, ..Options::default() })?;
    let started = std::time::Instant::now();
    let loaded = gpu.weight(&[&source])?;
    gpu.synchronize()?;
    println!("{} bytes quantised in {:.3} s", source.bytes.len(), started.elapsed().as_secs_f64());
    let (codes, absmax) = gpu.read_nf4(&loaded)?.ok_or("the weight is not held as NF4")?;
    std::fs::write(codes_file, codes)?;
    std::fs::write(absmax_file, absmax.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<_>>())?;
    Ok(())
}
