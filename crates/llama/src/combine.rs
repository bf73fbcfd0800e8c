//! One adapter out of several on the same model: the weighted sum of their changes to the weights, as PEFT's
//! `add_weighted_adapter` makes it.
//!
//! Adapters that were trained with different seeds err in different places; the mean of their changes errs less than each of them,
//! and as one adapter it costs no more than one (Wortsman et al. 2022, "Model soups"). Adding factors entry by entry would not do it:
//! `(B₁+B₂)(A₁+A₂)` is not `B₁A₁+B₂A₂`. Two ways are exact about that:
//!
//! - `cat`: the factors stand side by side, the rank is the sum of the ranks, nothing is lost;
//! - `svd`: of that sum the best approximation of a given rank, from a singular value decomposition of the small product that is left
//!   after a QR decomposition of both factors.

use std::ops::Range;

use nalgebra::DMatrix;
use rayon::prelude::*;

use crate::adapter::Adapter;
use crate::config::LlamaConfig;
use crate::error::{Error, Result};
use crate::lora::{LoraConfig, LoraTensors, Slot, slots};

/// The sum, and what it cost.
#[derive(Clone, Debug)]
pub struct Combined {
    pub adapter: Adapter,
    /// Share of the squared norm of all changes that a lower rank left out; 0 for `cat`.
    pub lost: f64,
}

/// Sums the changes of `adapters`, each times its weight. With a rank the sum is brought down to it (`svd`), without one the factors
/// stand side by side (`cat`). The prompt and the labels are those of the first; its temperature is 1, since that of a part says nothing
/// about the sum. `watch` is told how many modules of how many are done; `false` from it stops the work.
///
/// # Errors
/// Adapters that do not fit together (the message names the first that does not), a rank above the model's hidden size, a stop.
pub fn combine(
    adapters: &[Adapter],
    weights: &[f32],
    rank: Option<usize>,
    model: &LlamaConfig,
    watch: &mut dyn FnMut(u64, u64) -> bool,
) -> Result<Combined> {
    let bad = |what: String| Err(Error::Adapter(what));
    let [first, ..] = adapters else { return bad("nothing to combine".into()) };
    if weights.len() != adapters.len() || weights.iter().any(|w| !w.is_finite()) {
        return bad(format!("{} adapters need as many finite weights, found {weights:?}", adapters.len()));
    }
    for (i, a) in adapters.iter().enumerate() {
        if let Some(what) = difference(first, a) {
            return bad(format!("adapter {} cannot be added to the first: {what}", i + 1));
        }
    }
    let side_by_side: usize = adapters.iter().map(|a| a.lora.r).sum();
    if rank.is_none() && side_by_side > model.hidden_size {
        return bad(format!(
            "side by side the factors have rank {side_by_side}, more than the model's hidden size {}\n  hint: --rank 64 brings the sum down",
            model.hidden_size
        ));
    }
    let r = rank.unwrap_or(side_by_side);
    // Alpha is the rank, so that the scale is 1: each part's own scale goes into its B.
    let lora = LoraConfig { r, lora_alpha: r as f32, use_rslora: false, ..first.lora.clone() };
    lora.validate(model)?;
    let layout = slots(&lora, model);
    let parts: Vec<(Vec<Slot>, &Adapter, f32)> =
        adapters.iter().zip(weights).map(|(a, w)| (slots(&a.lora, model), a, w * a.lora.scale())).collect();
    let mut sum = LoraTensors { a: Vec::new(), b: Vec::new(), magnitude: Vec::new() };
    let (mut whole, mut lost) = (0f64, 0f64);
    // A few modules at a time, so that a stop is heard soon and little is held beside the sum.
    const GROUP: usize = 8;
    for first in (0..layout.len()).step_by(GROUP) {
        if !watch(first as u64, layout.len() as u64) {
            return bad("stopped".into());
        }
        let group: Vec<(usize, &Slot)> = layout.iter().enumerate().skip(first).take(GROUP).collect();
        let made: Vec<Option<Reduced>> = group
            .par_iter()
            .map(|&(i, slot)| {
                let modules: Vec<Part<'_>> = parts.iter().map(|(s, a, scale)| Part::of(a, &s[i], *scale)).collect();
                let (a, b) = (stack_a(&modules), side_by_side_b(&modules, slot.out_features, side_by_side));
                match rank {
                    None => Some(Reduced { a, b, whole: 0.0, lost: 0.0 }),
                    Some(r) => reduce(&a, &b, (slot.in_features, slot.out_features), r),
                }
            })
            .collect();
        for ((_, slot), made) in group.iter().zip(made) {
            let what = || Error::Adapter(format!("the singular values of layer {} are not found", slot.layer));
            let Reduced { a, b, whole: all, lost: out } = made.ok_or_else(what)?;
            sum.a.extend(a);
            sum.b.extend(b);
            whole += all;
            lost += out;
        }
    }
    watch(layout.len() as u64, layout.len() as u64);
    let mut classifier = first.classifier.clone();
    if let Some(c) = &mut classifier {
        c.temperature = 1.0;
    }
    let adapter = Adapter { lora, tensors: sum, base_model: first.base_model.clone(), classifier };
    Ok(Combined { adapter, lost: if whole > 0.0 { lost / whole } else { 0.0 } })
}

/// Why `b` cannot be added to `a`.
fn difference(a: &Adapter, b: &Adapter) -> Option<String> {
    let modules = |x: &Adapter| {
        let mut m: Vec<&str> = x.lora.target_modules.iter().map(|m| m.name()).collect();
        m.sort_unstable();
        m.join(", ")
    };
    let asked = |x: &Adapter| x.classifier.as_ref().map(|c| (c.labels.clone(), c.system_message.clone()));
    if a.lora.use_dora || b.lora.use_dora {
        return Some("changes of DoRA adapters are no sums\n  hint: export each with --to merged".into());
    }
    if modules(a) != modules(b) {
        return Some(format!("it changes {}, the first {}", modules(b), modules(a)));
    }
    if a.lora.layers_to_transform != b.lora.layers_to_transform {
        return Some("it changes other layers (layers_to_transform)".into());
    }
    // PEFT's own adapters do not say.
    let (asked_a, asked_b) = (asked(a), asked(b));
    (asked_a.is_some() && asked_b.is_some() && asked_a != asked_b)
        .then(|| "it was trained with other labels or another system message".into())
}

/// The factors of one module of one adapter.
struct Part<'a> {
    a: &'a [f32],
    b: &'a [f32],
    r: usize,
    scale: f32,
}

impl<'a> Part<'a> {
    fn of(adapter: &'a Adapter, slot: &Slot, scale: f32) -> Self {
        let (r, t) = (adapter.lora.r, &adapter.tensors);
        Part { a: t.a_of(slot, r), b: t.b_of(slot, r), r, scale }
    }
}

/// A `[r, in]` of all parts, one below the other.
fn stack_a(parts: &[Part<'_>]) -> Vec<f32> {
    parts.iter().flat_map(|p| p.a).copied().collect()
}

/// B `[out, r]` of all parts, scaled, side by side.
fn side_by_side_b(parts: &[Part<'_>], out_features: usize, r: usize) -> Vec<f32> {
    let mut b = Vec::with_capacity(out_features * r);
    for row in 0..out_features {
        for p in parts {
            b.extend(p.b[row * p.r..(row + 1) * p.r].iter().map(|v| v * p.scale));
        }
    }
    b
}

/// The factors of one module of the sum.
struct Reduced {
    a: Vec<f32>,
    b: Vec<f32>,
    /// Squared norm of the product, and of what the lower rank leaves out.
    whole: f64,
    lost: f64,
}

/// The best approximation of rank `r` of `b·a`, its singular values shared by both factors. `None` if the iteration does not end.
///
/// With `B = Q₁R₁` and `Aᵀ = Q₂R₂` the product is `Q₁(R₁R₂ᵀ)Q₂ᵀ`, and only the small matrix between has to be decomposed.
fn reduce(a: &[f32], b: &[f32], (inputs, outputs): (usize, usize), r: usize) -> Option<Reduced> {
    let of = a.len() / inputs;
    let at = DMatrix::from_fn(inputs, of, |i, j| f64::from(a[j * inputs + i]));
    let b = DMatrix::from_fn(outputs, of, |i, j| f64::from(b[i * of + j]));
    let (left, right) = (b.qr(), at.qr());
    let core = left.r() * right.r().transpose();
    const MOST_STEPS: usize = 100_000;
    let svd = core.try_svd(true, true, f64::EPSILON, MOST_STEPS)?;
    let (u, vt) = (svd.u?, svd.v_t?);
    let values = &svd.singular_values;
    let (u, v) = (left.q() * u, right.q() * vt.transpose());
    let square = |range: Range<usize>| range.map(|i| values[i] * values[i]).sum::<f64>();
    let kept = r.min(values.len());
    let mut reduced = Reduced {
        a: vec![0.0; r * inputs],
        b: vec![0.0; outputs * r],
        whole: square(0..values.len()),
        lost: square(kept..values.len()),
    };
    for k in 0..kept {
        let root = values[k].max(0.0).sqrt();
        for i in 0..inputs {
            reduced.a[k * inputs + i] = (root * v[(i, k)]) as f32;
        }
        for i in 0..outputs {
            reduced.b[i * r + k] = (root * u[(i, k)]) as f32;
        }
    }
    Some(reduced)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lora::Module;

    fn config() -> LlamaConfig {
        LlamaConfig {
            hidden_size: 16,
            intermediate_size: 24,
            num_hidden_layers: 2,
            num_attention_heads: 4,
            num_key_value_heads: 2,
            head_dim: 4,
            ..LlamaConfig::preset("smollm2-135m").unwrap()
        }
    }

    /// An adapter of noise.
    fn noise(r: usize, alpha: f32, rslora: bool, seed: u64) -> Adapter {
        let lora = LoraConfig {
            r,
            lora_alpha: alpha,
            use_rslora: rslora,
            target_modules: vec![Module::KProj, Module::DownProj],
            ..LoraConfig::default()
        };
        let mut tensors = LoraTensors::init(&lora, &config(), seed);
        let mut more = LoraTensors::init(&lora, &config(), seed + 100).a.into_iter().cycle();
        tensors.b.iter_mut().zip(&mut more).for_each(|(b, n)| *b = n);
        Adapter { lora, tensors, base_model: Some("m".into()), classifier: None }
    }

    /// `scale·B·A` of a module, row by row.
    fn change(a: &Adapter, index: usize) -> Vec<f32> {
        let (slot, r, scale) = (slots(&a.lora, &config())[index], a.lora.r, a.lora.scale());
        let mut product = vec![0f32; slot.out_features * slot.in_features];
        for o in 0..slot.out_features {
            for i in 0..slot.in_features {
                product[o * slot.in_features + i] = (0..r)
                    .map(|k| {
                        scale
                            * a.tensors.b[slot.b_offset + o * r + k]
                            * a.tensors.a[slot.a_offset + k * slot.in_features + i]
                    })
                    .sum();
            }
        }
        product
    }

    fn norm(x: impl Iterator<Item = f32>) -> f32 {
        x.map(|v| v * v).sum::<f32>().sqrt()
    }

    #[test]
    fn side_by_side_is_the_weighted_sum_of_the_changes() {
        let parts = [noise(4, 8.0, false, 1), noise(2, 8.0, true, 2), noise(3, 3.0, false, 3)];
        let weights = [0.5, 0.2, -0.3];
        let sum = combine(&parts, &weights, None, &config(), &mut |_, _| true).unwrap();
        assert_eq!((sum.adapter.lora.r, sum.adapter.lora.scale(), sum.lost), (9, 1.0, 0.0));
        for index in 0..4 {
            let found = change(&sum.adapter, index);
            let mut expected = vec![0f32; found.len()];
            for (part, w) in parts.iter().zip(weights) {
                expected.iter_mut().zip(change(part, index)).for_each(|(e, c)| *e += w * c);
            }
            let off = norm(found.iter().zip(&expected).map(|(a, b)| a - b)) / norm(expected.iter().copied());
            assert!(off < 1e-5, "module {index}: {off}");
        }
    }

    #[test]
    fn a_lower_rank_loses_what_it_says_and_full_rank_nothing() {
        let parts = [noise(4, 8.0, false, 1), noise(4, 8.0, false, 2)];
        let whole = combine(&parts, &[0.5, 0.5], None, &config(), &mut |_, _| true).unwrap().adapter;
        let mut before = 1.1;
        for r in [1, 3, 6, 8, 12] {
            let made = combine(&parts, &[0.5, 0.5], Some(r), &config(), &mut |_, _| true).unwrap();
            assert_eq!(made.adapter.lora.r, r);
            let (mut off, mut all) = (0f64, 0f64);
            for index in 0..4 {
                let (a, b) = (change(&made.adapter, index), change(&whole, index));
                off += a.iter().zip(&b).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>();
                all += b.iter().map(|b| f64::from(*b).powi(2)).sum::<f64>();
            }
            assert!((off / all - made.lost).abs() < 1e-6, "rank {r}: {} said, {} found", made.lost, off / all);
            assert!(made.lost < before, "rank {r} loses {}, a lower one {before}", made.lost);
            before = made.lost.max(1e-12);
        }
        assert!(before <= 1e-12, "the full rank loses {before}");
    }

    #[test]
    fn what_does_not_fit_together_is_refused() {
        let (a, mut b) = (noise(4, 8.0, false, 1), noise(4, 8.0, false, 2));
        let refuse = |parts: &[Adapter], weights: &[f32], rank| {
            combine(parts, weights, rank, &config(), &mut |_, _| true).unwrap_err().to_string()
        };
        assert!(refuse(&[], &[], None).contains("nothing to combine"));
        assert!(refuse(std::slice::from_ref(&a), &[f32::NAN], None).contains("finite weights"));
        assert!(refuse(&[a.clone(), b.clone()], &[1.0], None).contains("2 adapters need as many"));
        assert!(refuse(&[a.clone(), b.clone()], &[1.0, 1.0], Some(17)).contains("hidden size"));
        assert!(
            refuse(&vec![a.clone(); 5], &[1.0; 5], None).contains("have rank 20, more than the model's hidden size 16")
        );
        let stopped = combine(std::slice::from_ref(&a), &[1.0], None, &config(), &mut |_, _| false).unwrap_err();
        assert!(stopped.to_string().contains("stopped"));
        b.lora.use_dora = true;
        assert!(refuse(&[a.clone(), b.clone()], &[1.0, 1.0], None).contains("DoRA"));
        b.lora = LoraConfig { target_modules: vec![Module::QProj], ..a.lora.clone() };
        let said = refuse(&[a, b], &[1.0, 1.0], None);
        assert!(
            said.contains("adapter 2 cannot be added to the first: it changes q_proj, the first down_proj, k_proj"),
            "{said}"
        );
    }
}
