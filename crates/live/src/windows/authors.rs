//! How many different authors: counted exactly up to a thousand, estimated beyond (HyperLogLog, about 1.6 %).
//!
//! Flajolet, Fusy, Gandouet, Meunier: HyperLogLog (2007); the correction for small counts is linear counting.

/// Exactly counted authors.
pub(super) const EXACT: usize = 1_024;
const BITS: u32 = 12;
const REGISTERS: usize = 1 << BITS;

#[derive(Clone, Debug)]
pub(super) enum Authors {
    /// In their order.
    Exact(Vec<u64>),
    Estimated(Box<[u8; REGISTERS]>),
    /// Counted by another process, which says how many.
    Told(u64),
}

impl Default for Authors {
    fn default() -> Self {
        Self::Exact(Vec::new())
    }
}

impl Authors {
    /// `author` is a hash: its bits are as good as random.
    pub(super) fn add(&mut self, author: u64) {
        match self {
            Self::Exact(seen) => {
                let Err(at) = seen.binary_search(&author) else { return };
                if seen.len() == seen.capacity() {
                    // A quarter more, not twice as much: thousands of windows are open.
                    seen.reserve_exact(seen.len() / 4 + 2);
                }
                seen.insert(at, author);
                if seen.len() > EXACT {
                    let mut registers = Box::new([0; REGISTERS]);
                    seen.iter().for_each(|a| note(&mut registers, *a));
                    *self = Self::Estimated(registers);
                }
            }
            Self::Estimated(registers) => note(registers, author),
            // Who counts them will say so again.
            Self::Told(_) => {}
        }
    }

    pub(super) fn count(&self) -> u64 {
        match self {
            Self::Exact(seen) => seen.len() as u64,
            Self::Estimated(registers) => estimate(registers),
            Self::Told(count) => *count,
        }
    }
}

fn note(registers: &mut [u8; REGISTERS], author: u64) {
    let rank = ((author << BITS) | (1 << (BITS - 1))).leading_zeros() as u8 + 1;
    let register = &mut registers[(author >> (64 - BITS)) as usize];
    *register = (*register).max(rank);
}

fn estimate(registers: &[u8; REGISTERS]) -> u64 {
    let m = REGISTERS as f64;
    let sum: f64 = registers.iter().map(|r| 0.5f64.powi(i32::from(*r))).sum();
    let raw = 0.7213 / (1.0 + 1.079 / m) * m * m / sum;
    let empty = registers.iter().filter(|r| **r == 0).count();
    let value = if raw <= 2.5 * m && empty > 0 { m * (m / empty as f64).ln() } else { raw };
    value.round() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exact_then_close() {
        let mut authors = Authors::default();
        let hash = |i: u64| u64::from_le_bytes(crate::post::digest(&[&i.to_le_bytes()])[..8].try_into().unwrap());
        for i in 1..=200_000u64 {
            authors.add(hash(i));
            authors.add(hash(i / 2 + 1));
            match i {
                1..1_024 => assert!(authors.count() == i || authors.count() == i + 1, "{i}"),
                1_100 | 5_000 | 12_000 | 200_000 => {
                    let error = authors.count() as f64 / i as f64 - 1.0;
                    assert!(error.abs() < 0.05, "{i}: {error}");
                }
                _ => {}
            }
        }
    }
}
