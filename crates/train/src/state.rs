//! `trainer_state.json`, key for key as `transformers.TrainerState` writes it, so that plotters and converters read it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::arguments::TrainingArguments;

/// One entry of `log_history`: keys and numbers, sorted by key.
pub type LogEntry = BTreeMap<String, f64>;

/// What the loop knows about the run so far.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct TrainerState {
    pub global_step: usize,
    pub epoch: f64,
    pub max_steps: usize,
    pub best_metric: Option<f64>,
    pub best_global_step: Option<usize>,
    pub best_model_checkpoint: Option<String>,
    pub evaluations_without_gain: usize,
    pub num_input_tokens_seen: u64,
    pub total_flos: f64,
    pub log_history: Vec<LogEntry>,
}

impl TrainerState {
    /// The file's text: two-space indent, sorted keys, as `json.dumps(…, indent=2, sort_keys=True)`.
    pub fn to_json(&self, a: &TrainingArguments) -> Value {
        let mut callbacks = json!({
            "TrainerControl": {
                "args": {
                    "should_epoch_stop": false,
                    "should_evaluate": false,
                    "should_log": false,
                    "should_save": true,
                    "should_training_stop": self.global_step >= self.max_steps
                },
                "attributes": {}
            }
        });
        if let Some(patience) = a.early_stopping_patience {
            callbacks["EarlyStoppingCallback"] = json!({
                "args": {"early_stopping_patience": patience, "early_stopping_threshold": a.early_stopping_threshold},
                "attributes": {"early_stopping_patience_counter": self.evaluations_without_gain}
            });
        }
        let history: Vec<Value> = self
            .log_history
            .iter()
            .map(|e| {
                e.iter().map(|(k, v)| (k.clone(), if k == "step" { json!(*v as u64) } else { json!(v) })).collect()
            })
            .collect();
        sorted(json!({
            "best_global_step": self.best_global_step,
            "best_metric": self.best_metric,
            "best_model_checkpoint": self.best_model_checkpoint,
            "epoch": self.epoch,
            "eval_steps": a.eval_steps,
            "global_step": self.global_step,
            "is_hyper_param_search": false,
            "is_local_process_zero": true,
            "is_world_process_zero": true,
            "log_history": history,
            "logging_steps": a.logging_steps,
            "max_steps": self.max_steps,
            "num_input_tokens_seen": self.num_input_tokens_seen,
            "num_train_epochs": a.num_train_epochs.ceil() as u64,
            "save_steps": a.save_steps,
            "stateful_callbacks": callbacks,
            "total_flos": self.total_flos,
            "train_batch_size": a.per_device_train_batch_size,
            "trial_name": null,
            "trial_params": null
        }))
    }
}

fn sorted(value: Value) -> Value {
    match value {
        Value::Object(map) => {
            let mut entries: Vec<(String, Value)> = map.into_iter().map(|(k, v)| (k, sorted(v))).collect();
            entries.sort_by(|a, b| a.0.cmp(&b.0));
            Value::Object(entries.into_iter().collect())
        }
        Value::Array(items) => Value::Array(items.into_iter().map(sorted).collect()),
        other => other,
    }
}
