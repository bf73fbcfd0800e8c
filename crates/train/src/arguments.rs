//! The knobs of a run, under the names that `transformers.TrainingArguments` gives them.

use serde::{Deserialize, Serialize};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SchedulerType {
    Linear,
    Cosine,
    Constant,
    ConstantWithWarmup,
}

/// The optimizer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Optimizer {
    #[default]
    #[serde(rename = "adamw")]
    AdamW,
    /// Moments in 8 bits, as bitsandbytes keeps them.
    #[serde(rename = "adamw_8bit")]
    AdamW8bit,
}

/// When to evaluate or to save.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SaveStrategy {
    No,
    Steps,
    Epoch,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrainingArguments {
    pub num_train_epochs: f64,
    /// Overrides `num_train_epochs` when set.
    pub max_steps: Option<usize>,
    pub per_device_train_batch_size: usize,
    /// Examples of an evaluation batch when nothing is packed.
    pub per_device_eval_batch_size: usize,
    pub gradient_accumulation_steps: usize,
    pub optim: Optimizer,
    pub learning_rate: f64,
    pub lr_scheduler_type: SchedulerType,
    pub warmup_ratio: f64,
    /// Overrides `warmup_ratio` when not 0.
    pub warmup_steps: usize,
    pub weight_decay: f64,
    pub max_grad_norm: f64,
    pub adam_beta1: f64,
    pub adam_beta2: f64,
    pub adam_epsilon: f64,
    pub eval_strategy: SaveStrategy,
    pub eval_steps: usize,
    pub save_strategy: SaveStrategy,
    pub save_steps: usize,
    pub save_total_limit: Option<usize>,
    pub load_best_model_at_end: bool,
    /// `eval_loss`, or a metric that the [observer](crate::Observer) computes.
    pub metric_for_best_model: String,
    /// `None`: greater is better unless the metric's name ends in `loss`.
    pub greater_is_better: Option<bool>,
    /// Stop after this many evaluations without an improvement of more than the threshold.
    pub early_stopping_patience: Option<usize>,
    pub early_stopping_threshold: f64,
    pub logging_steps: usize,
    /// Fill micro-batches up to `max_tokens_per_batch`; otherwise each holds `per_device_train_batch_size` examples.
    pub packing: bool,
    pub max_tokens_per_batch: usize,
    pub train_on: cashtag_llama::packing::TrainOn,
    pub label_smoothing_factor: f32,
    pub neftune_noise_alpha: f32,
    pub loraplus_lr_ratio: f32,
    pub seed: u64,
    /// Processes that train together, each on a device of its own.
    pub world_size: usize,
}

impl Default for TrainingArguments {
    fn default() -> Self {
        Self {
            num_train_epochs: 3.0,
            max_steps: None,
            per_device_train_batch_size: 4,
            per_device_eval_batch_size: 16,
            gradient_accumulation_steps: 8,
            optim: Optimizer::AdamW,
            learning_rate: 2e-4,
            lr_scheduler_type: SchedulerType::Cosine,
            warmup_ratio: 0.03,
            warmup_steps: 0,
            weight_decay: 0.01,
            max_grad_norm: 1.0,
            adam_beta1: 0.9,
            adam_beta2: 0.999,
            adam_epsilon: 1e-8,
            eval_strategy: SaveStrategy::Steps,
            eval_steps: 500,
            save_strategy: SaveStrategy::Steps,
            save_steps: 500,
            save_total_limit: Some(2),
            load_best_model_at_end: true,
            metric_for_best_model: "eval_loss".into(),
            greater_is_better: None,
            early_stopping_patience: Some(3),
            early_stopping_threshold: 0.0,
            logging_steps: 25,
            packing: true,
            max_tokens_per_batch: 1024,
            train_on: Default::default(),
            label_smoothing_factor: 0.0,
            neftune_noise_alpha: 0.0,
            loraplus_lr_ratio: 1.0,
            seed: 42,
            world_size: 1,
        }
    }
}

impl TrainingArguments {
    /// Examples of one optimizer step, of all ranks together.
    pub fn examples_per_step(&self) -> usize {
        self.examples_per_rank() * self.world_size
    }

    /// Examples of one optimizer step on one device.
    pub fn examples_per_rank(&self) -> usize {
        self.per_device_train_batch_size * self.gradient_accumulation_steps
    }

    /// Optimizer steps of one pass over `examples`; the last may be smaller.
    pub fn steps_per_epoch(&self, examples: usize) -> usize {
        examples.div_ceil(self.examples_per_step())
    }

    /// Optimizer steps of the whole run.
    pub fn total_steps(&self, examples: usize) -> usize {
        self.max_steps
            .unwrap_or_else(|| (self.num_train_epochs * self.steps_per_epoch(examples) as f64).ceil() as usize)
    }

    pub fn warmup(&self, total_steps: usize) -> usize {
        if self.warmup_steps > 0 { self.warmup_steps } else { (self.warmup_ratio * total_steps as f64).ceil() as usize }
    }

    pub fn is_greater_better(&self) -> bool {
        self.greater_is_better.unwrap_or(!self.metric_for_best_model.ends_with("loss"))
    }
}
