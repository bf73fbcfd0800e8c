//! Dynamic loss scaling for fp16, as `torch.amp.GradScaler` with its defaults: gradients below 6·10⁻⁸ would be lost in fp16, so the
//! loss is multiplied by a scale that grows while nothing overflows and is halved when something does.

use serde::{Deserialize, Serialize};

/// The scale that fp16 begins with.
pub(crate) const FIRST: f32 = 65536.0;
/// Steps without an overflow after which the scale is doubled.
const GROWTH_INTERVAL: usize = 2000;

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LossScale {
    pub scale: f32,
    pub steps_since_overflow: usize,
    /// Off: the scale stays 1 (bf16 and f32 reach as far as gradients do).
    pub dynamic: bool,
}

impl LossScale {
    pub fn new(first: Option<f32>) -> Self {
        Self { scale: first.unwrap_or(1.0), steps_since_overflow: 0, dynamic: first.is_some() }
    }

    /// After a step whose gradients were finite.
    pub fn stepped(&mut self) {
        if !self.dynamic {
            return;
        }
        self.steps_since_overflow += 1;
        if self.steps_since_overflow >= GROWTH_INTERVAL {
            self.scale *= 2.0;
            self.steps_since_overflow = 0;
        }
    }

    /// After a step whose gradients overflowed; whether a smaller scale is left to try.
    pub fn overflowed(&mut self) -> bool {
        self.steps_since_overflow = 0;
        if !self.dynamic || self.scale <= 1.0 {
            return false;
        }
        self.scale /= 2.0;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_grad_scaler() {
        let mut s = LossScale::new(Some(FIRST));
        for _ in 0..1999 {
            s.stepped();
        }
        assert_eq!(s.scale, 65536.0);
        s.stepped();
        assert_eq!((s.scale, s.steps_since_overflow), (131_072.0, 0));
        s.stepped();
        assert!(s.overflowed());
        assert_eq!((s.scale, s.steps_since_overflow), (65536.0, 0));
        for _ in 0..16 {
            assert!(s.overflowed());
        }
        assert_eq!(s.scale, 1.0);
        assert!(!s.overflowed(), "there is no smaller scale");
        assert_eq!(s.scale, 1.0);

        let mut off = LossScale::new(None);
        for _ in 0..5000 {
            off.stepped();
        }
        assert!(!off.overflowed());
        assert_eq!(off.scale, 1.0);
    }
}
