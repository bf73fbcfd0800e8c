//! Row-major views of buffers: how operations name the part of device memory that they read or write.

/// A matrix to read: `rows × cols` elements, row `i` starting at element `offset + i * stride` of `buffer`.
#[derive(Debug)]
pub struct Mat<'a, B> {
    pub buffer: &'a B,
    pub offset: usize,
    pub rows: usize,
    pub cols: usize,
    pub stride: usize,
}

impl<B> Clone for Mat<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<B> Copy for Mat<'_, B> {}

/// A matrix to write (or to accumulate into); the same geometry as [`Mat`].
#[derive(Debug)]
pub struct MatMut<'a, B> {
    pub buffer: &'a mut B,
    pub offset: usize,
    pub rows: usize,
    pub cols: usize,
    pub stride: usize,
}

impl<'a, B> Mat<'a, B> {
    /// A dense matrix that starts at element 0.
    pub fn new(buffer: &'a B, rows: usize, cols: usize) -> Self {
        Self { buffer, offset: 0, rows, cols, stride: cols }
    }

    /// Columns `start .. start + cols` of this matrix.
    pub fn columns(self, start: usize, cols: usize) -> Self {
        assert!(start + cols <= self.cols, "columns {start}..{} of {}", start + cols, self.cols);
        Self { offset: self.offset + start, cols, ..self }
    }

    /// Rows `start .. start + rows` of this matrix.
    pub fn rows(self, start: usize, rows: usize) -> Self {
        assert!(start + rows <= self.rows, "rows {start}..{} of {}", start + rows, self.rows);
        Self { offset: self.offset + start * self.stride, rows, ..self }
    }

    /// One past the last element that the view touches.
    pub fn end(&self) -> usize {
        if self.rows == 0 { self.offset } else { self.offset + (self.rows - 1) * self.stride + self.cols }
    }
}

impl<'a, B> MatMut<'a, B> {
    /// A dense matrix that starts at element 0.
    pub fn new(buffer: &'a mut B, rows: usize, cols: usize) -> Self {
        Self { buffer, offset: 0, rows, cols, stride: cols }
    }

    /// Columns `start .. start + cols` of this matrix.
    pub fn columns(self, start: usize, cols: usize) -> Self {
        assert!(start + cols <= self.cols, "columns {start}..{} of {}", start + cols, self.cols);
        Self { offset: self.offset + start, cols, ..self }
    }

    /// Rows `start .. start + rows` of this matrix.
    pub fn rows(self, start: usize, rows: usize) -> Self {
        assert!(start + rows <= self.rows, "rows {start}..{} of {}", start + rows, self.rows);
        Self { offset: self.offset + start * self.stride, rows, ..self }
    }

    /// The same view for reading.
    pub fn as_ref(&self) -> Mat<'_, B> {
        Mat { buffer: self.buffer, offset: self.offset, rows: self.rows, cols: self.cols, stride: self.stride }
    }

    /// The same view, borrowed for a shorter time.
    pub fn reborrow(&mut self) -> MatMut<'_, B> {
        MatMut { buffer: self.buffer, offset: self.offset, rows: self.rows, cols: self.cols, stride: self.stride }
    }

    /// One past the last element that the view touches.
    pub fn end(&self) -> usize {
        self.as_ref().end()
    }
}
