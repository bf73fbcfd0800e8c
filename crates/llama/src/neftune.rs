//! NEFTune (Jain et al. 2023): uniform noise on the embeddings while training, `x ← x + α/√(L·d)·u` with u in [-1, 1).
//!
//! L is the length of an example and d the hidden size. Transformers takes the padded length of the batch for L, which changes
//! with an example's neighbours; here it is the example's own. The shared prefix gets one noise for each batch, with the length of
//! the batch's longest example. Like a dropout mask the noise is a function of seed, micro-batch, row and column.

use cashtag_backend::{AttentionLayout, Backend, Dtype, Mat, MatMut, philox};

use crate::error::Result;

/// The counter word where dropout has its site: no layer has it.
const SITE: u32 = u32::MAX;

/// `L` for each row: tokens of the row's example, with the last one, which has no row.
fn lengths(layout: &AttentionLayout) -> Vec<usize> {
    let longest = layout.segments().iter().map(|s| s.keys() + 1).max().unwrap_or(1);
    let mut lengths = Vec::with_capacity(layout.q_rows());
    for s in layout.segments() {
        let length = if is_context(layout, s.kv_start) { longest } else { s.keys() + 1 };
        lengths.extend(std::iter::repeat_n(length, s.len));
    }
    lengths
}

/// Whether other segments read the keys that begin at `start`.
fn is_context(layout: &AttentionLayout, start: usize) -> bool {
    layout.segments().iter().any(|s| s.context.iter().any(|c| c.len > 0 && c.start == start))
}

/// Adds the noise of (seed, micro-batch) to embeddings f32 `[n, d]`.
///
/// # Errors
/// The device fails.
pub(crate) fn add_noise<B: Backend>(
    backend: &B,
    layout: &AttentionLayout,
    alpha: f32,
    random: (u64, u32),
    x: MatMut<'_, B::Buffer>,
) -> Result<()> {
    let (seed, step) = random;
    let (rows, cols) = (x.rows, x.cols);
    let mut noise = Vec::with_capacity(rows * cols);
    for (row, length) in lengths(layout).into_iter().enumerate() {
        let bound = alpha / ((length * cols) as f32).sqrt();
        for block in 0..cols.div_ceil(4) {
            let counter = [block as u32, row as u32, SITE, step];
            let words = philox::philox4x32(counter, [seed as u32, (seed >> 32) as u32]);
            let left = cols - block * 4;
            noise.extend(words.iter().take(left).map(|w| ((w >> 8) as f32 / (1u32 << 23) as f32 - 1.0) * bound));
        }
    }
    let mut buffer = backend.uninit(Dtype::F32, noise.len())?;
    backend.upload(&noise, &mut buffer, 0)?;
    backend.add(Mat::new(&buffer, rows, cols), x)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_are_the_examples_own() {
        // Prefix of 3, examples of 3+2 and 1+4 rows; each has one token more than rows.
        let layout = AttentionLayout::packed(3, &[3, 1], &[2, 4]);
        assert_eq!(lengths(&layout), [6, 6, 6, 6, 6, 6, 6, 6, 6]);
        let layout = AttentionLayout::packed(3, &[3, 1], &[2, 1]);
        assert_eq!(lengths(&layout), [6, 6, 6, 6, 6, 3]);
        let layout = AttentionLayout::packed(0, &[0, 0], &[2, 4]);
        assert_eq!(lengths(&layout), [3, 3, 5, 5, 5, 5]);
    }
}
