//! The next token out of the model's logits: the largest, or one drawn at random from those that are likely.
//!
//! Random numbers are a function of (seed, position), so a sequence is the same whatever is generated beside it (as far as
//! the device gives the same logits), and the same again on another day.

use cashtag_backend::philox::philox4x32;

use crate::error::{Error, Result};

/// How tokens are chosen, under Transformers' names and in its order: temperature, then top_k, then top_p.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// Logits are divided by it; 0 takes the largest (greedy), and then nothing else matters.
    pub temperature: f32,
    /// Only this many of the likeliest tokens; 0 is all.
    pub top_k: usize,
    /// Only the likeliest tokens whose probabilities together reach this; 1 is all.
    pub top_p: f32,
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self { temperature: 0.0, top_k: 0, top_p: 1.0, seed: 0 }
    }
}

/// A token and what the model itself (at temperature 1) thinks of it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TokenLogprob {
    pub token: u32,
    /// Natural logarithm of its probability.
    pub logprob: f32,
}

/// The counter's last word: no other use of Philox in this project has it.
const DOMAIN: u32 = 0x7361_6d70;

impl Sampling {
    /// # Errors
    /// Values that mean nothing.
    pub fn validate(&self) -> Result<()> {
        if !(self.temperature.is_finite() && self.temperature >= 0.0) {
            return Err(Error::Invalid(format!("temperature is {}, expected a number from 0", self.temperature)));
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return Err(Error::Invalid(format!("top_p is {}, expected a number above 0 and at most 1", self.top_p)));
        }
        Ok(())
    }

    /// The token at `position` (counted from the first generated one) and its log-probability.
    ///
    /// # Errors
    /// Logits that are NaN or infinite: the model or the adapter is damaged.
    pub fn choose(&self, logits: &[f32], position: u32) -> Result<TokenLogprob> {
        let largest = argmax(logits)?;
        let max = logits[largest];
        let total: f64 = logits.iter().map(|&l| f64::from(l - max).exp()).sum();
        let token = if self.temperature == 0.0 { largest } else { self.draw(logits, max, position) };
        let logprob = (f64::from(logits[token] - max) - total.ln()) as f32;
        Ok(TokenLogprob { token: token as u32, logprob })
    }

    fn draw(&self, logits: &[f32], max: f32, position: u32) -> usize {
        let weight = |i: usize| (f64::from(logits[i] - max) / f64::from(self.temperature)).exp();
        let before = |a: &(f64, usize), b: &(f64, usize)| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1));
        // (weight, token), the likeliest first, as far as the order matters.
        let mut kept: Vec<(f64, usize)> = (0..logits.len()).map(|i| (weight(i), i)).collect();
        if self.top_k > 0 && self.top_k < kept.len() {
            // Transformers keeps what is as likely as the last of the k.
            let (_, &mut (last, _), _) = kept.select_nth_unstable_by(self.top_k - 1, before);
            kept.retain(|&(w, _)| w >= last);
        }
        if self.top_p < 1.0 {
            let total: f64 = kept.iter().map(|k| k.0).sum();
            let p = f64::from(self.top_p);
            // All tokens below this share together stay below 1 - p, so the others reach p without them.
            let floor = total * (1.0 - p) / kept.len() as f64;
            kept.retain(|&(w, _)| w >= floor);
            kept.sort_unstable_by(before);
            let mut sum = 0.0;
            let enough = kept.iter().position(|&(w, _)| {
                sum += w;
                sum >= p * total
            });
            kept.truncate(enough.map_or(kept.len(), |i| i + 1));
        } else {
            // An order that does not depend on how the selection went.
            kept.sort_unstable_by_key(|&(_, i)| i);
        }
        let total: f64 = kept.iter().map(|k| k.0).sum();
        let key = [self.seed as u32, (self.seed >> 32) as u32];
        let words = philox4x32([position, 0, 0, DOMAIN], key);
        let unit = (u64::from(words[0]) << 21 | u64::from(words[1]) >> 11) as f64 / (1u64 << 53) as f64;
        let mut left = unit * total;
        for &(w, i) in &kept {
            left -= w;
            if left < 0.0 {
                return i;
            }
        }
        // Rounding: the last that can be drawn at all.
        kept.iter().rev().find(|k| k.0 > 0.0).map_or(0, |k| k.1)
    }
}

/// The first of the largest, as `torch.argmax`.
fn argmax(logits: &[f32]) -> Result<usize> {
    let mut best = 0;
    for (i, &l) in logits.iter().enumerate() {
        if !l.is_finite() {
            let what = format!(
                "the model gives a logit of {l} for token {i}\n  hint: model or adapter is damaged, or a precision overflows: try --precision f32"
            );
            return Err(Error::Invalid(what));
        }
        if l > logits[best] {
            best = i;
        }
    }
    if logits.is_empty() { Err(Error::Invalid("no logits to choose from".into())) } else { Ok(best) }
}

/// The `count` likeliest tokens, the likeliest first.
pub fn top_logprobs(logits: &[f32], count: usize) -> Vec<TokenLogprob> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let total: f64 = logits.iter().map(|&l| f64::from(l - max).exp()).sum();
    let mut order: Vec<u32> = (0..logits.len() as u32).collect();
    let before = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
    if count < order.len() {
        order.select_nth_unstable_by(count, before);
        order.truncate(count);
    }
    order.sort_unstable_by(before);
    let logprob = |token: u32| (f64::from(logits[token as usize] - max) - total.ln()) as f32;
    order.into_iter().map(|token| TokenLogprob { token, logprob: logprob(token) }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Probabilities 0.5, 0.25, 0.15, 0.1 at temperature 1, not in order.
    const P: [f64; 4] = [0.15, 0.5, 0.1, 0.25];

    fn logits() -> Vec<f32> {
        P.iter().map(|p| p.ln() as f32 + 3.0).collect()
    }

    fn frequencies(sampling: Sampling) -> [f64; 4] {
        const N: u32 = 20_000;
        let mut counts = [0u32; 4];
        for position in 0..N {
            counts[sampling.choose(&logits(), position).unwrap().token as usize] += 1;
        }
        counts.map(|c| f64::from(c) / f64::from(N))
    }

    fn near(found: [f64; 4], expected: [f64; 4]) {
        for (f, e) in found.iter().zip(expected) {
            // Five standard errors of a share of 20,000 draws are at most 0.018.
            assert!((f - e).abs() < 0.018 && (e > 0.0 || *f == 0.0), "{found:?} for {expected:?}");
        }
    }

    #[test]
    fn greedy_takes_the_first_of_the_largest() {
        let found = Sampling::default().choose(&[1.0, 3.0, 3.0, -1.0], 0).unwrap();
        assert_eq!(found.token, 1);
        let total = 2.0 * 3f64.exp() + 1f64.exp() + (-1f64).exp();
        assert!((f64::from(found.logprob) - (3.0 - total.ln())).abs() < 1e-6);
    }

    #[test]
    fn draws_have_the_model_s_probabilities() {
        let sampling = Sampling { temperature: 1.0, seed: 7, ..Default::default() };
        near(frequencies(sampling), P);
        // Squared and normalised at temperature 1/2.
        let total: f64 = P.iter().map(|p| p * p).sum();
        near(frequencies(Sampling { temperature: 0.5, ..sampling }), P.map(|p| p * p / total));
    }

    #[test]
    fn top_k_and_top_p_cut_the_tail() {
        let sampling = Sampling { temperature: 1.0, seed: 7, ..Default::default() };
        near(frequencies(Sampling { top_k: 2, ..sampling }), [0.0, 2.0 / 3.0, 0.0, 1.0 / 3.0]);
        // 0.5 + 0.25 do not reach 0.8; with 0.15 they do.
        near(frequencies(Sampling { top_p: 0.8, ..sampling }), [0.15 / 0.9, 0.5 / 0.9, 0.0, 0.25 / 0.9]);
        near(frequencies(Sampling { top_p: 0.3, ..sampling }), [0.0, 1.0, 0.0, 0.0]);
        // top_p counts among what top_k left: 2/3 reaches 0.6.
        near(frequencies(Sampling { top_k: 2, top_p: 0.6, ..sampling }), [0.0, 1.0, 0.0, 0.0]);
        assert_eq!(Sampling { top_k: 1, ..sampling }.choose(&logits(), 3).unwrap().token, 1);
    }

    #[test]
    fn the_seed_decides() {
        let run = |seed| {
            let s = Sampling { temperature: 1.0, seed, ..Default::default() };
            (0..64).map(|i| s.choose(&logits(), i).unwrap().token).collect::<Vec<_>>()
        };
        assert_eq!(run(1), run(1));
        assert_ne!(run(1), run(2));
        assert_ne!(run(1), run(1 << 32));
    }

    #[test]
    fn what_means_nothing_is_refused() {
        let bad = |s: Sampling| s.validate().unwrap_err().to_string();
        assert!(bad(Sampling { temperature: -1.0, ..Default::default() }).starts_with("temperature is -1"));
        assert!(bad(Sampling { temperature: f32::NAN, ..Default::default() }).starts_with("temperature is NaN"));
        assert!(bad(Sampling { top_p: 0.0, ..Default::default() }).starts_with("top_p is 0"));
        let error = Sampling::default().choose(&[0.0, f32::NAN], 0).unwrap_err().to_string();
        assert!(error.starts_with("the model gives a logit of NaN for token 1"), "{error}");
        assert!(Sampling::default().choose(&[], 0).is_err());
    }

    #[test]
    fn the_likeliest_in_order() {
        let found = top_logprobs(&logits(), 2);
        assert_eq!(found.iter().map(|t| t.token).collect::<Vec<_>>(), [1, 3]);
        assert!((f64::from(found[1].logprob) - 0.25f64.ln()).abs() < 1e-5);
        assert_eq!(top_logprobs(&logits(), 9).len(), 4);
    }
}
