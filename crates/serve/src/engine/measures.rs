//! What the engine counts.

use std::sync::Arc;

use cashtag_http::metrics::{Histogram, Number, Numbers, Registry, seconds};

pub(crate) struct Measures {
    pub(crate) ready: Arc<Number>,
    /// By model and outcome: ok, overloaded, expired, dropped, invalid, failed.
    pub(crate) texts: Numbers,
    pub(crate) queued: Arc<Number>,
    pub(crate) tokenization: Arc<Histogram>,
    pub(crate) waiting: Arc<Histogram>,
    pub(crate) inference: Arc<Histogram>,
    pub(crate) batch_texts: Arc<Histogram>,
    pub(crate) batch_rows: Arc<Histogram>,
    pub(crate) prompt_tokens: Arc<Number>,
    pub(crate) cached_tokens: Arc<Number>,
    /// By outcome: stop, length, choice, overloaded, expired, dropped, invalid, failed.
    pub(crate) generations: Numbers,
    pub(crate) running: Arc<Number>,
    pub(crate) generated_tokens: Arc<Number>,
    pub(crate) first_token: Arc<Histogram>,
    pub(crate) adapters: Arc<Number>,
}

impl Measures {
    pub(crate) fn new(r: &Registry) -> Self {
        let powers = |n: u32| (0..n).map(|i| f64::from(1u32 << i)).collect::<Vec<_>>();
        let histogram = |name, help, bounds| r.histograms(name, help, &[], bounds).one();
        let (counter, gauge) =
            (|name, help| r.counters(name, help, &[]).one(), |name, help| r.gauges(name, help, &[]).one());
        Self {
            ready: gauge("cashtag_ready", "1 while the model answers."),
            texts: r.counters(
                "cashtag_texts_total",
                "Texts to classify, by what became of them.",
                &["model", "outcome"],
            ),
            queued: gauge("cashtag_queue_texts", "Texts that wait for a batch."),
            tokenization: histogram("cashtag_tokenization_duration_seconds", "Making a prompt of a text.", seconds()),
            waiting: histogram("cashtag_queue_duration_seconds", "From the prompt to the batch.", seconds()),
            inference: histogram("cashtag_inference_duration_seconds", "A classification batch.", seconds()),
            batch_texts: histogram("cashtag_batch_texts", "Texts of a batch.", powers(11)),
            batch_rows: histogram("cashtag_batch_rows", "Token rows that a batch computes.", powers(15)),
            prompt_tokens: counter("cashtag_prompt_tokens_total", "Tokens of prompts."),
            cached_tokens: counter("cashtag_cached_tokens_total", "Tokens of prompts that the prefix cache had."),
            generations: r.counters("cashtag_generations_total", "Texts to write, by how they ended.", &["outcome"]),
            running: gauge("cashtag_generations_running", "Texts that are being written or wait for it."),
            generated_tokens: counter("cashtag_generated_tokens_total", "Tokens written."),
            first_token: histogram(
                "cashtag_time_to_first_token_seconds",
                "From the request to its first token.",
                seconds(),
            ),
            adapters: gauge("cashtag_adapters", "Adapters that are loaded."),
        }
    }

    pub(crate) fn text(&self, model: &str, outcome: &str) {
        self.texts.with(&[model, outcome]).inc();
    }

    pub(crate) fn generation(&self, outcome: &str) {
        self.generations.with(&[outcome]).inc();
    }
}
