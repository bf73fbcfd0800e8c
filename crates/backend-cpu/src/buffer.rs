//! Host memory with a dtype, counted while it lives.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use cashtag_backend::{Dtype, Mat, MatMut};

use crate::simd::Bf16;

/// Bytes held now and at most by the buffers and weights of one backend.
#[derive(Debug, Default)]
pub(crate) struct Memory {
    now: AtomicU64,
    peak: AtomicU64,
}

impl Memory {
    pub(crate) fn read(&self) -> (u64, u64) {
        (self.now.load(Ordering::Relaxed), self.peak.load(Ordering::Relaxed))
    }
}

/// A share of [`Memory`] that is given back when it is dropped.
#[derive(Debug)]
pub(crate) struct Held {
    memory: Arc<Memory>,
    bytes: u64,
}

impl Held {
    pub(crate) fn new(memory: &Arc<Memory>, bytes: usize) -> Self {
        let bytes = bytes as u64;
        let now = memory.now.fetch_add(bytes, Ordering::Relaxed) + bytes;
        memory.peak.fetch_max(now, Ordering::Relaxed);
        Self { memory: Arc::clone(memory), bytes }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.memory.now.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

#[derive(Debug)]
pub(crate) enum Data {
    F32(Vec<f32>),
    Bf16(Vec<Bf16>),
    U32(Vec<u32>),
}

/// Memory of the CPU backend.
#[derive(Debug)]
pub struct CpuBuffer {
    pub(crate) data: Data,
    _held: Held,
}

impl CpuBuffer {
    pub(crate) fn new(memory: &Arc<Memory>, dtype: Dtype, len: usize) -> Self {
        let data = match dtype {
            Dtype::F32 => Data::F32(vec![0.0; len]),
            // Zeroed u16s come from the allocator as untouched pages; a `vec!` of a struct would be written.
            Dtype::Bf16 => Data::Bf16(bytemuck::allocation::cast_vec(vec![0u16; len])),
            Dtype::U32 => Data::U32(vec![0; len]),
            Dtype::F16 => panic!("the CPU backend has no float16"),
        };
        Self { data, _held: Held::new(memory, len * dtype.size()) }
    }

    pub(crate) fn dtype(&self) -> Dtype {
        match self.data {
            Data::F32(_) => Dtype::F32,
            Data::Bf16(_) => Dtype::Bf16,
            Data::U32(_) => Dtype::U32,
        }
    }

    pub(crate) fn len(&self) -> usize {
        match &self.data {
            Data::F32(d) => d.len(),
            Data::Bf16(d) => d.len(),
            Data::U32(d) => d.len(),
        }
    }

    pub(crate) fn u32s(&self) -> &[u32] {
        match &self.data {
            Data::U32(d) => d,
            _ => panic!("expected uint32, found {}", self.dtype().name()),
        }
    }

    pub(crate) fn f32s(&self) -> &[f32] {
        match &self.data {
            Data::F32(d) => d,
            _ => panic!("expected float32, found {}", self.dtype().name()),
        }
    }

    pub(crate) fn f32s_mut(&mut self) -> &mut [f32] {
        match &mut self.data {
            Data::F32(d) => d,
            _ => panic!("expected float32"),
        }
    }
}

/// A typed view: `rows` rows of `cols` elements, `stride` apart, from the start of `data`.
#[derive(Clone, Copy)]
pub(crate) struct View<'a, T> {
    pub(crate) data: &'a [T],
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) stride: usize,
}

impl<'a, T> View<'a, T> {
    #[inline(always)]
    pub(crate) fn row(&self, i: usize) -> &'a [T] {
        &self.data[i * self.stride..][..self.cols]
    }

    /// Rows `start .. start + rows`, columns `first .. first + cols`.
    pub(crate) fn part(&self, start: usize, rows: usize, first: usize, cols: usize) -> Self {
        debug_assert!(start + rows <= self.rows && first + cols <= self.cols);
        let data = if rows == 0 { &[] } else { &self.data[start * self.stride + first..] };
        Self { data, rows, cols, stride: self.stride }
    }
}

pub(crate) struct ViewMut<'a, T> {
    pub(crate) data: &'a mut [T],
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) stride: usize,
}

/// A bf16 copy of an f32 view.
pub(crate) struct Rounded {
    data: Vec<Bf16>,
    rows: usize,
    cols: usize,
}

impl Rounded {
    pub(crate) fn of(src: View<'_, f32>) -> Self {
        let View { rows, cols, .. } = src;
        let mut data = vec![Bf16::default(); rows * cols];
        crate::rows::copy(src, ViewMut { data: &mut data, rows, cols, stride: cols });
        Self { data, rows, cols }
    }

    pub(crate) fn view(&self) -> View<'_, Bf16> {
        View { data: &self.data, rows: self.rows, cols: self.cols, stride: self.cols }
    }
}

/// A view of either float type.
#[derive(Clone, Copy)]
pub(crate) enum AnyView<'a> {
    F32(View<'a, f32>),
    Bf16(View<'a, Bf16>),
}

impl AnyView<'_> {
    pub(crate) fn rows(&self) -> usize {
        typed!(Self, self, v => v.rows)
    }

    pub(crate) fn cols(&self) -> usize {
        typed!(Self, self, v => v.cols)
    }
}

pub(crate) enum AnyViewMut<'a> {
    F32(ViewMut<'a, f32>),
    Bf16(ViewMut<'a, Bf16>),
}

pub(crate) fn view<'a>(m: Mat<'a, CpuBuffer>) -> AnyView<'a> {
    assert!(m.end() <= m.buffer.len(), "view up to {} of {} elements", m.end(), m.buffer.len());
    let Mat { rows, cols, stride, .. } = m;
    match &m.buffer.data {
        Data::F32(d) => AnyView::F32(View { data: &d[m.offset..m.end()], rows, cols, stride }),
        Data::Bf16(d) => AnyView::Bf16(View { data: &d[m.offset..m.end()], rows, cols, stride }),
        Data::U32(_) => panic!("expected floats, found uint32"),
    }
}

pub(crate) fn view_mut<'a>(m: MatMut<'a, CpuBuffer>) -> AnyViewMut<'a> {
    let end = m.end();
    assert!(end <= m.buffer.len(), "view up to {end} of {} elements", m.buffer.len());
    let MatMut { rows, cols, stride, offset, .. } = m;
    match &mut m.buffer.data {
        Data::F32(d) => AnyViewMut::F32(ViewMut { data: &mut d[offset..end], rows, cols, stride }),
        Data::Bf16(d) => AnyViewMut::Bf16(ViewMut { data: &mut d[offset..end], rows, cols, stride }),
        Data::U32(_) => panic!("expected floats, found uint32"),
    }
}

/// Runs `$body` with `$v` bound to the typed view inside.
macro_rules! typed {
    ($any:ident, $value:expr, $v:ident => $body:expr) => {
        match $value {
            $any::F32($v) => $body,
            $any::Bf16($v) => $body,
        }
    };
}
pub(crate) use typed;
