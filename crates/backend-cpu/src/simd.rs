//! One body, compiled three times: for the baseline of the target, for AVX2 and for AVX-512, chosen once at run time.
//!
//! Element-wise kernels are written as plain loops over slices that the compiler vectorises; [`simd!`] gives each twins with
//! wider registers. All do the same f32 operations in the same order (no fused multiply-add is written), so the choice does
//! not change a bit of the result. Explicit intrinsics are only in `gemm/avx512.rs`, `gemm/avx2.rs` and
//! `gemm/fixed/kernel.rs`.

use std::sync::OnceLock;

/// What the kernels of this process run on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Isa {
    /// AVX-512 F, BW, VL, DQ and BF16: Zen 4, Cooper Lake, Sapphire Rapids.
    Avx512,
    /// AVX2 and FMA: Haswell, Zen and later.
    Avx2,
    Plain,
}

/// The widest instructions that the processor has.
pub(crate) fn isa() -> Isa {
    static ISA: OnceLock<Isa> = OnceLock::new();
    *ISA.get_or_init(|| {
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512bf16")
            {
                return Isa::Avx512;
            }
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                return Isa::Avx2;
            }
        }
        Isa::Plain
    })
}

/// `simd! { fn name(a: A, …) -> R { body } }`: `name` runs the body, in the twin for what the processor has.
macro_rules! simd {
    ($(#[$meta:meta])* $vis:vis fn $name:ident $(<$($g:ident : $bound:path),*>)? ($($arg:ident : $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$meta])*
        #[inline]
        $vis fn $name $(<$($g: $bound),*>)? ($($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            fn plain $(<$($g: $bound),*>)? ($($arg: $ty),*) $(-> $ret)? $body
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
                fn wide $(<$($g: $bound),*>)? ($($arg: $ty),*) $(-> $ret)? {
                    plain($($arg),*)
                }
                #[target_feature(enable = "avx2,fma")]
                fn narrow $(<$($g: $bound),*>)? ($($arg: $ty),*) $(-> $ret)? {
                    plain($($arg),*)
                }
                // SAFETY: isa() checked every feature that the twin enables.
                match $crate::simd::isa() {
                    $crate::simd::Isa::Avx512 => return unsafe { wide($($arg),*) },
                    $crate::simd::Isa::Avx2 => return unsafe { narrow($($arg),*) },
                    $crate::simd::Isa::Plain => {}
                }
            }
            plain($($arg),*)
        }
    };
}
pub(crate) use simd;

/// Element types that activations can have on this device.
pub(crate) trait Element: Copy + Send + Sync + Default + 'static {
    fn to_f32(self) -> f32;
    fn from_f32(x: f32) -> Self;
}

impl Element for f32 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        x
    }
}

/// bfloat16 as its bits: conversions are branch-free integer code that vectorises.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(transparent)]
pub(crate) struct Bf16(pub(crate) u16);

impl Element for Bf16 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f32::from_bits(u32::from(self.0) << 16)
    }
    /// Round to nearest even; NaN stays NaN.
    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        let bits = x.to_bits();
        let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
        let nan = (bits >> 16) | 0x40;
        let is_nan = (bits & 0x7fff_ffff) > 0x7f80_0000;
        Self(if is_nan { nan as u16 } else { rounded as u16 })
    }
}

/// eˣ to within 2 ulp for x ≤ 88, 0 below -87.3; Cody–Waite reduction and a degree-6 polynomial, branch-free so that it vectorises.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    let x = x.clamp(-87.3, 88.0);
    const MAGIC: f32 = 12_582_912.0; // 1.5 · 2²³: adding it rounds to the nearest integer
    let shifted = x * std::f32::consts::LOG2_E + MAGIC;
    let n = shifted - MAGIC;
    let r = x - n * 0.693_359_4 - n * -2.121_944_4e-4;
    let p = 1.987_569_1e-4;
    let p = p * r + 1.398_199_9e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 1.666_666_6e-1;
    let p = p * r + 5e-1;
    let p = p * r * r + r + 1.0;
    let scale = f32::from_bits(((shifted.to_bits() << 23) as i32).wrapping_add(0x3f80_0000) as u32);
    p * scale
}

/// 1 / (1 + e⁻ˣ).
#[inline(always)]
pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// Sum in sixteen lanes, so that it vectorises and the order does not depend on the instruction set.
#[inline(always)]
pub(crate) fn lane_sum(values: impl Fn(usize) -> f32, len: usize) -> f32 {
    let mut lanes = [0f32; 16];
    let whole = len / 16 * 16;
    for i in (0..whole).step_by(16) {
        for (j, lane) in lanes.iter_mut().enumerate() {
            *lane += values(i + j);
        }
    }
    let mut sum = 0.0;
    for i in whole..len {
        sum += values(i);
    }
    for width in [8, 4, 2, 1] {
        for j in 0..width {
            lanes[j] += lanes[j + width];
        }
    }
    sum + lanes[0]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bf16_rounds_as_half_does() {
        for i in 0..200_000u32 {
            let x = f32::from_bits(i.wrapping_mul(0x9E37_79B9));
            let ours = Bf16::from_f32(x);
            let theirs = half::bf16::from_f32(x);
            assert_eq!(ours.to_f32().is_nan(), theirs.to_f32().is_nan());
            if !x.is_nan() {
                assert_eq!(ours.0, theirs.to_bits(), "{x:e}");
            }
        }
    }

    #[test]
    fn exp_is_close() {
        let mut worst = 0f64;
        for i in 0..1_000_000 {
            let x = -87.0 + 175.0 * (i as f32 / 1e6);
            let truth = f64::from(x).exp();
            worst = worst.max((f64::from(exp(x)) - truth).abs() / truth);
        }
        assert!(worst < 3e-7, "{worst:e}");
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(-1000.0) < 2e-38);
    }
}
