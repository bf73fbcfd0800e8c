//! Keys and values of an inference pass: the cached prefix in front, tweets or sequences behind it.

use cashtag_backend::{AttentionLayout, Backend, Mat, MatMut};

use crate::error::{Error, Result};

/// Per layer, `capacity` rows of keys and values side by side, in the compute dtype.
pub struct KvStore<B: Backend> {
    layers: Vec<B::Buffer>,
    kv_dim: usize,
    capacity: usize,
}

impl<B: Backend> KvStore<B> {
    pub(crate) fn new(backend: &B, layers: usize, kv_dim: usize, capacity: usize) -> Result<Self> {
        let t = backend.compute_dtype();
        let layers = (0..layers).map(|_| backend.zeros(t, capacity * 2 * kv_dim)).collect::<Result<_, _>>()?;
        Ok(Self { layers, kv_dim, capacity })
    }

    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Writes the new rows of a pass (`[q_rows, 2·kv_dim]`) where the layout's segments have their own keys.
    pub(crate) fn write(
        &mut self,
        backend: &B,
        layer: usize,
        layout: &AttentionLayout,
        rows: Mat<'_, B::Buffer>,
    ) -> Result<()> {
        if layout.kv_rows() > self.capacity {
            let what = format!("{} key rows do not fit a store of {}", layout.kv_rows(), self.capacity);
            return Err(Error::Invalid(what));
        }
        let width = 2 * self.kv_dim;
        let mut segments = layout.segments().iter().peekable();
        while let Some(s) = segments.next() {
            // Neighbouring segments are written in one go: a classification batch is one copy.
            let mut len = s.len;
            while let Some(next) = segments.next_if(|x| x.kv_start == s.kv_start + len) {
                len += next.len;
            }
            let target = MatMut::new(&mut self.layers[layer], self.capacity, width).rows(s.kv_start, len);
            backend.copy(rows.rows(s.q_start, len), target)?;
        }
        Ok(())
    }

    /// Keys and values of a layer.
    pub(crate) fn views(&self, layer: usize) -> (Mat<'_, B::Buffer>, Mat<'_, B::Buffer>) {
        let all = Mat::new(&self.layers[layer], self.capacity, 2 * self.kv_dim);
        (all.columns(0, self.kv_dim), all.columns(self.kv_dim, self.kv_dim))
    }
}
