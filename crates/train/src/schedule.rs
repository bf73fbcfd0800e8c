//! Learning-rate schedules, as `transformers.optimization` defines them.

use crate::arguments::{SchedulerType, TrainingArguments};

/// Learning rate of optimizer step `step` (counted from 0) of `total`.
pub fn learning_rate(arguments: &TrainingArguments, step: usize, total: usize) -> f64 {
    let warmup = arguments.warmup(total);
    let factor = match arguments.lr_scheduler_type {
        SchedulerType::Constant => 1.0,
        _ if step < warmup => step as f64 / warmup.max(1) as f64,
        SchedulerType::ConstantWithWarmup => 1.0,
        SchedulerType::Linear => (total.saturating_sub(step)) as f64 / (total.saturating_sub(warmup)).max(1) as f64,
        SchedulerType::Cosine => {
            let progress = (step - warmup) as f64 / (total.saturating_sub(warmup)).max(1) as f64;
            (0.5 * (1.0 + (std::f64::consts::PI * progress).cos())).max(0.0)
        }
    };
    arguments.learning_rate * factor
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rates(kind: SchedulerType) -> Vec<f64> {
        let arguments =
            TrainingArguments { lr_scheduler_type: kind, learning_rate: 1.0, warmup_steps: 2, ..Default::default() };
        (0..6).map(|s| (learning_rate(&arguments, s, 6) * 1e4).round() / 1e4).collect()
    }

    // The values of get_linear_schedule_with_warmup and get_cosine_schedule_with_warmup for 2 warm-up steps of 6.
    #[test]
    fn as_transformers() {
        assert_eq!(rates(SchedulerType::Linear), [0.0, 0.5, 1.0, 0.75, 0.5, 0.25]);
        assert_eq!(rates(SchedulerType::Cosine), [0.0, 0.5, 1.0, 0.8536, 0.5, 0.1464]);
        assert_eq!(rates(SchedulerType::ConstantWithWarmup), [0.0, 0.5, 1.0, 1.0, 1.0, 1.0]);
        assert_eq!(rates(SchedulerType::Constant), [1.0; 6]);
    }
}
