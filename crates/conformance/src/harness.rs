//! Operands on two devices at once, random geometry, poison, and the measure of error.

use std::fmt;

use cashtag_backend::{Backend, Dtype, Mat, MatMut, Result};
use half::{bf16, f16};

/// Largest relative errors that pass.
#[derive(Clone, Copy, Debug)]
pub struct Tolerance {
    /// One rounding of a result to the compute dtype.
    pub rounding: f64,
    /// Products and attention: rounded operands inside, f32 sums.
    pub product: f64,
    /// f32 results of f32 arithmetic in another order.
    pub single: f64,
}

impl Tolerance {
    /// What a dtype allows: half a unit in the last place, root mean square, with room for a second rounding.
    pub fn of(dtype: Dtype) -> Self {
        let single = 1e-5;
        match dtype {
            Dtype::Bf16 => Self { rounding: 3e-3, product: 8e-3, single },
            Dtype::F16 => Self { rounding: 4e-4, product: 1e-3, single },
            _ => Self { rounding: single, product: 2e-5, single },
        }
    }
}

/// The worst error of each operation, and everything that failed.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// (operation, checks, worst error, tolerance)
    pub checks: Vec<(String, usize, f64, f64)>,
    pub failures: Vec<String>,
}

impl Report {
    pub fn passed(&self) -> bool {
        self.failures.is_empty()
    }

    pub(crate) fn join(&mut self, other: Report) {
        self.checks.extend(other.checks);
        self.failures.extend(other.failures);
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, checks, worst, tolerance) in &self.checks {
            writeln!(f, "{name:<34} {checks:>4} checks   worst {worst:.1e}   allowed {tolerance:.0e}")?;
        }
        for failure in self.failures.iter().take(20) {
            writeln!(f, "FAILED {failure}")?;
        }
        write!(f, "{} failures", self.failures.len())
    }
}

/// xorshift64*: the suite draws the same cases everywhere.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    /// 0 ..= most
    pub(crate) fn up_to(&mut self, most: usize) -> usize {
        ((self.next() >> 33) % (most as u64 + 1)) as usize
    }

    /// low ..= high
    pub(crate) fn between(&mut self, low: usize, high: usize) -> usize {
        low + self.up_to(high - low)
    }

    pub(crate) fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.up_to(choices.len() - 1)]
    }

    /// About normal, standard deviation 1: a sum of four uniform numbers.
    pub(crate) fn normal(&mut self) -> f32 {
        let sum: f32 = (0..4).map(|_| (self.next() >> 40) as f32 / (1 << 24) as f32).sum();
        (sum - 2.0) * 1.732
    }
}

/// Dtype of an operand: the compute dtype of whichever backend holds it, or f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    T,
    F32,
}

/// How a matrix lies in its buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lie {
    /// From element 0, without gaps.
    Dense,
    /// Offset and row gaps that keep rows on multiples of eight elements.
    Strided,
    /// Any offset and stride.
    Odd,
}

impl Lie {
    pub(crate) const ALL: [Lie; 3] = [Lie::Dense, Lie::Strided, Lie::Odd];
}

/// One matrix on both devices.
pub(crate) struct Pair<A: Backend, B: Backend> {
    pub(crate) a: A::Buffer,
    pub(crate) b: B::Buffer,
    offset: usize,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    stride: usize,
}

impl<A: Backend, B: Backend> Pair<A, B> {
    pub(crate) fn in_a(&self) -> Mat<'_, A::Buffer> {
        Mat { buffer: &self.a, offset: self.offset, rows: self.rows, cols: self.cols, stride: self.stride }
    }
    pub(crate) fn in_b(&self) -> Mat<'_, B::Buffer> {
        Mat { buffer: &self.b, offset: self.offset, rows: self.rows, cols: self.cols, stride: self.stride }
    }
    pub(crate) fn out_a(&mut self) -> MatMut<'_, A::Buffer> {
        MatMut { offset: self.offset, rows: self.rows, cols: self.cols, stride: self.stride, buffer: &mut self.a }
    }
    pub(crate) fn out_b(&mut self) -> MatMut<'_, B::Buffer> {
        MatMut { offset: self.offset, rows: self.rows, cols: self.cols, stride: self.stride, buffer: &mut self.b }
    }
}

pub(crate) struct Harness<'a, A: Backend, B: Backend> {
    pub(crate) a: &'a A,
    pub(crate) b: &'a B,
    pub(crate) tolerance: Tolerance,
    pub(crate) random: Random,
    report: Report,
}

impl<'a, A: Backend, B: Backend> Harness<'a, A, B> {
    pub(crate) fn new(a: &'a A, b: &'a B, tolerance: Tolerance) -> Self {
        Self { a, b, tolerance, random: Random::new(0x5EED), report: Report::default() }
    }

    pub(crate) fn report(self) -> Report {
        self.report
    }

    pub(crate) fn fail(&mut self, what: String) {
        self.report.failures.push(what);
    }

    /// Rounds to the candidate's compute dtype.
    pub(crate) fn round(&self, x: f32) -> f32 {
        match self.b.compute_dtype() {
            Dtype::Bf16 => bf16::from_f32(x).to_f32(),
            Dtype::F16 => f16::from_f32(x).to_f32(),
            _ => x,
        }
    }

    fn place(&mut self, lie: Lie, cols: usize) -> (usize, usize) {
        match lie {
            Lie::Dense => (0, cols),
            Lie::Strided => (8 * self.random.up_to(3), cols.next_multiple_of(8) + 8 * self.random.up_to(2)),
            Lie::Odd => (self.random.up_to(9), cols + self.random.up_to(9)),
        }
    }

    /// A matrix of the given values with NaN around it.
    pub(crate) fn matrix(
        &mut self,
        kind: Kind,
        rows: usize,
        cols: usize,
        lie: Lie,
        values: &[f32],
    ) -> Result<Pair<A, B>> {
        let (offset, stride) = self.place(lie, cols);
        let len = offset + rows * stride + self.random.up_to(20);
        self.placed(kind, rows, cols, values, (offset, stride, len))
    }

    fn placed(
        &mut self,
        kind: Kind,
        rows: usize,
        cols: usize,
        values: &[f32],
        (offset, stride, len): (usize, usize, usize),
    ) -> Result<Pair<A, B>> {
        assert_eq!(values.len(), rows * cols);
        let mut all = vec![f32::NAN; len];
        for (i, row) in values.chunks(cols.max(1)).enumerate() {
            all[offset + i * stride..][..cols].copy_from_slice(row);
        }
        let (mut a, mut b) = match kind {
            Kind::T => (self.a.uninit(self.a.compute_dtype(), len)?, self.b.uninit(self.b.compute_dtype(), len)?),
            Kind::F32 => (self.a.uninit(Dtype::F32, len)?, self.b.uninit(Dtype::F32, len)?),
        };
        self.a.upload(&all, &mut a, 0)?;
        self.b.upload(&all, &mut b, 0)?;
        Ok(Pair { a, b, offset, rows, cols, stride })
    }

    /// Random values of standard deviation `scale`, the same on both sides.
    pub(crate) fn input(&mut self, kind: Kind, rows: usize, cols: usize, lie: Lie, scale: f32) -> Result<Pair<A, B>> {
        let values: Vec<f32> = (0..rows * cols)
            .map(|_| {
                let x = self.random.normal() * scale;
                self.round(x)
            })
            .collect();
        self.matrix(kind, rows, cols, lie, &values)
    }

    /// NaN everywhere.
    pub(crate) fn output(&mut self, kind: Kind, rows: usize, cols: usize, lie: Lie) -> Result<Pair<A, B>> {
        self.matrix(kind, rows, cols, lie, &vec![f32::NAN; rows * cols])
    }

    /// A f32 buffer of exactly these values, for arguments whose length means something.
    pub(crate) fn vector(&mut self, values: &[f32]) -> Result<Pair<A, B>> {
        let n = values.len();
        self.placed(Kind::F32, 1, n, values, (0, n, n))
    }

    /// A u32 buffer on each side.
    pub(crate) fn words(&mut self, values: &[u32]) -> Result<(A::Buffer, B::Buffer)> {
        let mut a = self.a.uninit(Dtype::U32, values.len())?;
        let mut b = self.b.uninit(Dtype::U32, values.len())?;
        self.a.upload_u32(values, &mut a)?;
        self.b.upload_u32(values, &mut b)?;
        Ok((a, b))
    }

    pub(crate) fn read_b(&self, pair: &Pair<A, B>) -> Result<Vec<f32>> {
        let mut all = vec![0.0; self.b.len(&pair.b)];
        self.b.download(&pair.b, 0, &mut all)?;
        Ok(all)
    }

    /// Compares an output: poison outside, everything written inside, error within `allowed`.
    pub(crate) fn check(&mut self, name: &str, what: &str, pair: &Pair<A, B>, allowed: f64) -> Result<()> {
        let mut reference = vec![0.0; self.a.len(&pair.a)];
        self.a.download(&pair.a, 0, &mut reference)?;
        let candidate = self.read_b(pair)?;
        let case = format!("{name} ({what}, {} × {}, stride {})", pair.rows, pair.cols, pair.stride);
        let inside = |i: usize| {
            i >= pair.offset && {
                let (row, column) = ((i - pair.offset) / pair.stride.max(1), (i - pair.offset) % pair.stride.max(1));
                row < pair.rows && column < pair.cols
            }
        };
        let (mut error, mut norm, mut unwritten, mut outside) = (0f64, 0f64, 0usize, 0usize);
        for (i, (&r, &c)) in reference.iter().zip(&candidate).enumerate() {
            if inside(i) {
                if !r.is_finite() {
                    self.fail(format!("{case}: the reference itself is {r} at element {i}"));
                    return Ok(());
                }
                unwritten += usize::from(!c.is_finite());
                error += (f64::from(c) - f64::from(r)).powi(2);
                norm += f64::from(r).powi(2);
            } else {
                outside += usize::from(!c.is_nan());
            }
        }
        if unwritten > 0 {
            self.fail(format!("{case}: {unwritten} elements are not finite"));
            return Ok(());
        }
        if outside > 0 {
            self.fail(format!("{case}: {outside} elements outside the view were written"));
        }
        let error = if norm > 0.0 { (error / norm).sqrt() } else { error.sqrt() };
        self.record(name, case, error, allowed);
        Ok(())
    }

    /// Notes an error, and fails if it is more than `allowed`.
    pub(crate) fn record(&mut self, name: &str, case: String, error: f64, allowed: f64) {
        match self.report.checks.iter_mut().find(|c| c.0 == name) {
            Some(c) => {
                c.1 += 1;
                c.2 = c.2.max(error);
            }
            None => self.report.checks.push((name.into(), 1, error, allowed)),
        }
        if error.is_nan() || error > allowed {
            self.fail(format!("{case}: error {error:.2e}, allowed {allowed:.0e}"));
        }
    }

    /// Fails unless the candidate's buffers hold the same bits.
    pub(crate) fn same_bits(&mut self, name: &str, first: &[f32], second: &[f32]) {
        let different = first.iter().zip(second).filter(|(x, y)| x.to_bits() != y.to_bits()).count();
        if different > 0 {
            self.fail(format!("{name}: {different} of {} elements differ between two runs", first.len()));
        }
    }
}
