//! What a run has cost, and whether the next request still fits.
//!
//! Before a request is sent, the most it can cost is set aside; when it is answered, what it did cost takes that place. So
//! with any number of requests under way the limits hold.

use serde::Serialize;

use crate::error::{Error, Result};

/// US dollars for a million tokens.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Price {
    pub prompt: f64,
    pub completion: f64,
}

/// List prices by model name, as published in 2025; the longest name that the model's begins with counts.
const LIST_PRICES: [(&str, Price); 10] = [
    ("gpt-4", Price { prompt: 30.0, completion: 60.0 }),
    ("gpt-4-32k", Price { prompt: 60.0, completion: 120.0 }),
    ("gpt-4-turbo", Price { prompt: 10.0, completion: 30.0 }),
    ("gpt-4o", Price { prompt: 2.5, completion: 10.0 }),
    ("gpt-4o-mini", Price { prompt: 0.15, completion: 0.6 }),
    ("gpt-4.1", Price { prompt: 2.0, completion: 8.0 }),
    ("gpt-4.1-mini", Price { prompt: 0.4, completion: 1.6 }),
    ("gpt-4.1-nano", Price { prompt: 0.1, completion: 0.4 }),
    ("gpt-3.5-turbo", Price { prompt: 0.5, completion: 1.5 }),
    ("gpt-5", Price { prompt: 1.25, completion: 10.0 }),
];

impl Price {
    /// The list price of a model, where it is known: on OpenAI's own server only, elsewhere the name says nothing.
    pub fn listed(model: &str, url: &str) -> Option<Self> {
        if !url.starts_with("https://api.openai.com/") {
            return None;
        }
        let fits = |name: &str| model.strip_prefix(name).is_some_and(|rest| rest.is_empty() || rest.starts_with('-'));
        LIST_PRICES.iter().filter(|(name, _)| fits(name)).max_by_key(|(name, _)| name.len()).map(|(_, price)| *price)
    }

    /// Reads `PROMPT/COMPLETION`, in dollars for a million tokens.
    ///
    /// # Errors
    ///
    /// If it is not two non-negative numbers.
    pub fn parse(text: &str) -> Result<Self> {
        let number = |text: &str| text.trim().parse::<f64>().ok().filter(|price| price.is_finite() && *price >= 0.0);
        let price = text
            .split_once('/')
            .and_then(|(prompt, completion)| Some(Self { prompt: number(prompt)?, completion: number(completion)? }));
        price.ok_or_else(|| {
            Error::usage(format!(
                "price {text:?}: expected dollars for a million tokens, prompt/completion, as in 2.5/10"
            ))
        })
    }

    fn of(self, prompt_tokens: u64, completion_tokens: u64) -> f64 {
        (prompt_tokens as f64 * self.prompt + completion_tokens as f64 * self.completion) / 1e6
    }
}

/// The running totals of a run.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Totals {
    /// Requests that were answered or may have been charged for.
    pub requests: u64,
    pub prompt_tokens: u64,
    pub completion_tokens: u64,
    /// `None` where the price is not known.
    pub cost: Option<f64>,
}

/// What a request may cost at most.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Reserve {
    pub(crate) prompt_tokens: u64,
    pub(crate) completion_tokens: u64,
}

#[derive(Debug)]
pub(crate) struct Budget {
    max_cost: Option<f64>,
    max_tokens: Option<u64>,
    price: Option<Price>,
    totals: Totals,
    reserved: Reserve,
}

impl Budget {
    pub(crate) fn new(max_cost: Option<f64>, max_tokens: Option<u64>, price: Option<Price>) -> Result<Self> {
        if max_cost.is_some() && price.is_none() {
            return Err(Error::usage(
                "a limit on the cost needs a price, and that of this model is not known\n  hint: --price 2.5/10 (dollars for \
                 a million prompt and completion tokens), or limit --max-tokens",
            ));
        }
        if max_cost.is_some_and(|limit| !limit.is_finite() || limit < 0.0) {
            return Err(Error::usage("the limit on the cost must be a number of dollars, 0 or more"));
        }
        let totals = Totals { cost: price.map(|_| 0.0), ..Totals::default() };
        Ok(Self { max_cost, max_tokens, price, totals, reserved: Reserve::default() })
    }

    pub(crate) fn totals(&self) -> &Totals {
        &self.totals
    }

    /// Counts what has been spent.
    pub(crate) fn spend(&mut self, prompt_tokens: u64, completion_tokens: u64) {
        self.totals.requests += 1;
        self.totals.prompt_tokens = self.totals.prompt_tokens.saturating_add(prompt_tokens);
        self.totals.completion_tokens = self.totals.completion_tokens.saturating_add(completion_tokens);
        self.totals.cost = self.price.map(|price| price.of(self.totals.prompt_tokens, self.totals.completion_tokens));
    }

    /// Sets aside what a request may cost; `false`, and nothing set aside, if that no longer fits.
    pub(crate) fn reserve(&mut self, request: Reserve) -> bool {
        if !self.fits(request) {
            return false;
        }
        self.reserved.prompt_tokens += request.prompt_tokens;
        self.reserved.completion_tokens += request.completion_tokens;
        true
    }

    pub(crate) fn release(&mut self, request: Reserve) {
        self.reserved.prompt_tokens -= request.prompt_tokens;
        self.reserved.completion_tokens -= request.completion_tokens;
    }

    /// Whether what is spent, what is set aside and `request` stay within the limits.
    pub(crate) fn fits(&self, request: Reserve) -> bool {
        let prompt = self.totals.prompt_tokens + self.reserved.prompt_tokens + request.prompt_tokens;
        let completion = self.totals.completion_tokens + self.reserved.completion_tokens + request.completion_tokens;
        let tokens_fit = self.max_tokens.is_none_or(|limit| prompt.saturating_add(completion) <= limit);
        let cost_fits = match (self.max_cost, self.price) {
            (Some(limit), Some(price)) => price.of(prompt, completion) <= limit,
            _ => true,
        };
        tokens_fit && cost_fits
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_hold_with_requests_under_way() {
        let price = Price { prompt: 10.0, completion: 100.0 };
        let mut budget = Budget::new(Some(0.01), None, Some(price)).unwrap();
        let request = Reserve { prompt_tokens: 100, completion_tokens: 40 }; // 0.005 dollars
        assert!(budget.reserve(request) && budget.reserve(request));
        assert!(!budget.reserve(request), "a third does not fit beside two under way");
        budget.release(request);
        budget.spend(100, 10); // 0.002 dollars
        assert!(!budget.reserve(request), "0.002 + 0.005 + 0.005");
        budget.release(request);
        assert!(budget.reserve(request));
        assert_eq!(budget.totals().cost, Some(0.002));
    }

    #[test]
    fn prices() {
        let listed = |model: &str| Price::listed(model, "https://api.openai.com/v1/chat/completions");
        assert_eq!(listed("gpt-4"), Some(Price { prompt: 30.0, completion: 60.0 }));
        assert_eq!(listed("gpt-4o-mini-2024-07-18"), Some(Price { prompt: 0.15, completion: 0.6 }));
        assert_eq!(listed("llama3"), None);
        assert_eq!(listed("gpt-4x"), None);
        assert_eq!(Price::listed("gpt-4", "http://localhost:8000/v1/chat/completions"), None);
        assert_eq!(Price::parse("2.5/10").unwrap(), Price { prompt: 2.5, completion: 10.0 });
        assert!(Price::parse("2.5").is_err() && Price::parse("-1/2").is_err());
        assert!(Budget::new(Some(1.0), None, None).unwrap_err().to_string().contains("--price"));
    }
}
