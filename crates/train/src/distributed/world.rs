//! Who a process is among the others.

use std::time::Duration;

use crate::error::{Error, Result};

/// Read from `RANK`, `WORLD_SIZE`, `LOCAL_RANK`, `MASTER_ADDR` and `MASTER_PORT`, as PyTorch's `env://` does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct World {
    pub rank: usize,
    pub size: usize,
    /// Number of this process on its host: the GPU that it takes.
    pub local_rank: usize,
    /// Host of rank 0, and the port on which it waits for the others.
    pub master: (String, u16),
    /// How long to wait for one another, at the beginning and in every step.
    pub timeout: Duration,
}

/// What PyTorch waits for with NCCL.
const TIMEOUT: Duration = Duration::from_secs(600);
/// More are a mistake.
const MOST: usize = 4096;

impl World {
    /// `None` if this process is alone: `WORLD_SIZE` is missing or 1.
    ///
    /// # Errors
    /// Variables that are missing or make no sense together.
    pub fn from_env() -> Result<Option<Self>> {
        Self::from(|name| std::env::var(name).ok())
    }

    fn from(variable: impl Fn(&str) -> Option<String>) -> Result<Option<Self>> {
        let number = |name: &str, most: usize, missing: Option<usize>| -> Result<usize> {
            let Some(text) = variable(name) else {
                let hint = "a launcher such as torchrun sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT together";
                return missing.ok_or_else(|| {
                    Error::Invalid(format!(
                        "WORLD_SIZE is set, but {name} is not\n  hint: {hint}; without one, unset WORLD_SIZE"
                    ))
                });
            };
            text.trim()
                .parse()
                .ok()
                .filter(|n| *n <= most)
                .ok_or_else(|| Error::Invalid(format!("{name}: expected a number from 0 to {most}, found {text:?}")))
        };
        let size = number("WORLD_SIZE", MOST, Some(1))?;
        if size <= 1 {
            return Ok(None);
        }
        let rank = number("RANK", size - 1, None)?;
        let local_rank = number("LOCAL_RANK", size - 1, Some(rank))?;
        let port = number("MASTER_PORT", usize::from(u16::MAX), None)? as u16;
        let address = variable("MASTER_ADDR").filter(|a| !a.trim().is_empty());
        let address = address.ok_or_else(|| {
            Error::Invalid("WORLD_SIZE is set, but MASTER_ADDR is not\n  hint: the host of rank 0".into())
        })?;
        let seconds = number("CASHTAG_DISTRIBUTED_TIMEOUT", 86_400, Some(TIMEOUT.as_secs() as usize))?;
        let timeout = Duration::from_secs(seconds.max(1) as u64);
        Ok(Some(Self { rank, size, local_rank, master: (address.trim().to_owned(), port), timeout }))
    }
}

/// Part `rank` of `0 .. n` in `size` parts that differ by one at most.
pub(crate) fn share(n: usize, rank: usize, size: usize) -> std::ops::Range<usize> {
    n * rank / size..n * (rank + 1) / size
}

#[cfg(test)]
mod tests {
    use super::*;

    fn world(variables: &[(&str, &str)]) -> Result<Option<World>> {
        World::from(|name| variables.iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).to_owned()))
    }

    #[test]
    fn as_torchrun_sets_them() {
        let all = [
            ("RANK", "3"),
            ("WORLD_SIZE", "4"),
            ("LOCAL_RANK", "1"),
            ("MASTER_ADDR", "10.0.0.1"),
            ("MASTER_PORT", "29500"),
        ];
        let found = world(&all).unwrap().unwrap();
        let master = ("10.0.0.1".to_owned(), 29500);
        assert_eq!(found, World { rank: 3, size: 4, local_rank: 1, master, timeout: TIMEOUT });
        assert_eq!(world(&[]).unwrap(), None);
        assert_eq!(world(&[("WORLD_SIZE", "1"), ("RANK", "0")]).unwrap(), None);
        for (missing, said) in
            [("RANK", "RANK is not"), ("MASTER_ADDR", "MASTER_ADDR is not"), ("MASTER_PORT", "MASTER_PORT is not")]
        {
            let some: Vec<_> = all.iter().filter(|(n, _)| *n != missing).copied().collect();
            let error = world(&some).unwrap_err().to_string();
            assert!(error.contains(said), "{error}");
        }
        let error = world(&[("WORLD_SIZE", "2"), ("RANK", "2")]).unwrap_err().to_string();
        assert!(error.contains("RANK: expected a number from 0 to 1, found \"2\""), "{error}");
        assert!(world(&[("WORLD_SIZE", "two")]).is_err());
    }

    #[test]
    fn shares_are_everything_once() {
        for n in 0..20 {
            for size in 1..6 {
                let mut all = Vec::new();
                for rank in 0..size {
                    let part = share(n, rank, size);
                    assert!(part.len() <= n.div_ceil(size));
                    all.extend(part);
                }
                assert_eq!(all, (0..n).collect::<Vec<_>>());
            }
        }
    }
}
