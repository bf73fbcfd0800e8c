//! The loop.

use std::path::{Path, PathBuf};
use std::time::Instant;

use cashtag_backend::{AdamW, Backend, Dtype};
use cashtag_llama::adapter::{Adapter, ClassifierConfig};
use cashtag_llama::lora::Lora;
use cashtag_llama::model::{Checkpointing, Llama, Purpose, TrainPass, Workspace};
use cashtag_llama::packing::{TokenizedExample, bins, pack, shared_tokens};

use crate::arguments::{Optimizer, SaveStrategy, TrainingArguments};
use crate::checkpoint::{self, Position};
use crate::distributed::Group;
use crate::error::{Error, Result};
use crate::loss_scale::{self, LossScale};
use crate::optimizer_state::OptimizerState;
use crate::order::step_examples;
use crate::schedule::learning_rate;
use crate::state::{LogEntry, TrainerState};

/// What one optimizer step did.
#[derive(Clone, Debug)]
pub struct StepReport {
    /// Counted from 1.
    pub step: usize,
    pub total_steps: usize,
    pub epoch: f64,
    /// Mean loss of a label token in this step.
    pub loss: f64,
    pub grad_norm: f64,
    pub learning_rate: f64,
    pub examples: usize,
    /// Rows that were computed (the shared prefix once each micro-batch).
    pub rows: usize,
    pub seconds: f64,
}

/// Who watches a run. All methods have a default that does nothing.
pub trait Observer<B: Backend> {
    fn step(&mut self, _report: &StepReport) {}
    /// The loop begins behind this step.
    fn begin(&mut self, _step: usize) {}
    /// A new entry of `log_history`.
    fn log(&mut self, _entry: &LogEntry) {}
    /// More metrics of an evaluation, by names that begin with `eval_`.
    ///
    /// # Errors
    /// The device fails.
    fn evaluate(&mut self, _lora: &Lora<B>) -> Result<LogEntry> {
        Ok(LogEntry::new())
    }
    fn saved(&mut self, _path: &Path) {}
    /// How a person finds a training example again, in messages about it.
    fn name_example(&self, index: usize) -> String {
        index.to_string()
    }
    fn warn(&mut self, _message: &str) {}
    /// Asked after each step; `true` saves a checkpoint and ends the run.
    fn should_stop(&mut self) -> bool {
        false
    }
}

/// Why the loop ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EndReason {
    Finished,
    EarlyStopped,
    Interrupted,
}

#[derive(Clone, Debug)]
pub struct TrainOutcome {
    pub reason: EndReason,
    pub state: TrainerState,
    pub seconds: f64,
    /// Step whose parameters the adapter holds now (the best one if that was asked for).
    pub step: usize,
    /// Steps that were not finite and changed nothing.
    pub skipped_steps: usize,
    /// Seconds of this process that the trainer itself took: packing, logging, checkpoints; all but the model's passes, the
    /// optimizer and evaluations.
    pub own_seconds: f64,
}

/// Steps in a row that may overflow or be NaN before the run gives up.
const MAX_BAD_STEPS: usize = 8;
/// Examples that a message names.
const NAMED: usize = 8;

/// A run: a frozen model, an adapter in training, the data, and where the files go.
pub struct Trainer<'a, B: Backend> {
    pub backend: &'a B,
    pub model: &'a Llama<B>,
    pub lora: Lora<B>,
    pub train: Vec<TokenizedExample>,
    pub eval: Vec<TokenizedExample>,
    /// Tokens that the examples start with.
    pub prefix: Vec<u32>,
    pub arguments: TrainingArguments,
    pub checkpointing: Checkpointing,
    pub run_dir: PathBuf,
    pub base_model: Option<String>,
    pub classifier: Option<ClassifierConfig>,
    /// Identifies model, data and arguments: a checkpoint of anything else is refused.
    pub fingerprint: String,
    /// Go on from the newest checkpoint in `run_dir` if there is one.
    pub resume: bool,
    /// What dynamic loss scaling begins with; `None` is 65536 where fp16 is computed in, and none elsewhere.
    pub loss_scale: Option<f32>,
    /// The other processes of this run. All of them have the same model, data and arguments.
    pub group: Option<Group>,
}

struct Loop {
    position: Position,
    order: Option<(usize, Vec<usize>)>,
    started: Instant,
    /// Seconds on the device, and of evaluations.
    device: f64,
    early_stop: bool,
}

/// Seconds of `work`, added to `total`.
fn timed<T>(total: &mut f64, work: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let result = work();
    *total += start.elapsed().as_secs_f64();
    result
}

impl<B: Backend> Trainer<'_, B> {
    /// Rows of the largest micro-batch: what the workspace must hold. A step is never more than its examples, whatever the
    /// token budget would allow.
    pub fn capacity(&self) -> usize {
        let a = &self.arguments;
        let shared = |e: &TokenizedExample| shared_tokens(e, &self.prefix, a.train_on);
        let longest = self.train.iter().chain(&self.eval).map(|e| e.tokens.len()).max().unwrap_or(1);
        let (budget, together) = if a.packing {
            (a.max_tokens_per_batch, a.examples_per_rank())
        } else {
            (usize::MAX, a.per_device_train_batch_size)
        };
        let mut own: Vec<usize> = self.train.iter().map(|e| e.tokens.len() - shared(e)).collect();
        own.sort_unstable_by(|a, b| b.cmp(a));
        let largest: usize = own.iter().take(together).sum();
        (largest + self.prefix.len()).min(budget).max(longest)
    }

    /// How the examples of a step are cut.
    pub fn micro_batches(&self, examples: &[&TokenizedExample]) -> Vec<std::ops::Range<usize>> {
        let a = &self.arguments;
        let (tokens, count) =
            if a.packing { (a.max_tokens_per_batch, usize::MAX) } else { (usize::MAX, a.per_device_train_batch_size) };
        bins(examples, &self.prefix, a.train_on, tokens, count)
    }

    /// Runs to the end, to an early stop or until the observer asks to stop.
    ///
    /// # Errors
    /// No training data, a device that fails, a file system that refuses, too many non-finite steps in a row.
    pub fn run(&mut self, observer: &mut dyn Observer<B>) -> Result<TrainOutcome> {
        let n = self.train.len();
        if n == 0 {
            return Err(Error::Invalid(
                "there are no training examples\n  hint: check --data, or raise train_examples".into(),
            ));
        }
        if self.is_main() {
            std::fs::create_dir_all(&self.run_dir)
                .map_err(|source| Error::Write { path: self.run_dir.clone(), source })?;
        }
        let total = self.arguments.total_steps(n);
        if self.arguments.optim == Optimizer::AdamW8bit {
            self.lora.use_8bit_moments(self.backend)?;
        }
        let mut ws = self.model.workspace(
            self.backend,
            self.capacity(),
            Purpose::Training(self.checkpointing),
            Some(&self.lora),
        )?;
        let fp16 = self.backend.compute_dtype() == Dtype::F16;
        let first_scale = self.loss_scale.or(fp16.then_some(loss_scale::FIRST));
        let mut l = Loop {
            position: Position {
                state: TrainerState { max_steps: total, ..Default::default() },
                micro_step: 0,
                optimizer_step: 0,
                loss_scale: LossScale::new(first_scale),
                total_loss: 0.0,
                bad_steps: 0,
                skipped_steps: 0,
                window: (0.0, 0),
                fingerprint: self.fingerprint.clone(),
            },
            order: None,
            started: Instant::now(),
            device: 0.0,
            early_stop: false,
        };
        if self.resume
            && let Some((position, optimizer)) = self.newest(observer)?
        {
            optimizer.upload(self.backend, &mut self.lora)?;
            l.position = position;
            l.early_stop = self.is_out_of_patience(&l.position.state);
        }
        self.model.prepare(self.backend, &mut self.lora)?;
        self.meet(observer)?;
        let begun = l.position.state.global_step;
        observer.begin(begun);
        let mut reason = EndReason::Finished;
        while l.position.state.global_step < total {
            if l.early_stop {
                reason = EndReason::EarlyStopped;
                break;
            }
            let report = self.step(&mut l, total, &mut ws, observer)?;
            observer.step(&report);
            let step = l.position.state.global_step;
            let a = &self.arguments;
            let epoch_end = step.is_multiple_of(a.steps_per_epoch(n)) || step == total;
            let due = |strategy: SaveStrategy, steps: usize| match strategy {
                SaveStrategy::No => false,
                SaveStrategy::Steps => step.is_multiple_of(steps.max(1)),
                SaveStrategy::Epoch => epoch_end,
            };
            let (evaluate, save) = (due(a.eval_strategy, a.eval_steps), due(a.save_strategy, a.save_steps));
            if step.is_multiple_of(a.logging_steps.max(1)) || step == total {
                self.log_window(&mut l, &report, observer);
            }
            // The best model can only be loaded at the end if each evaluated state is kept.
            let keep_best = a.load_best_model_at_end && a.eval_strategy != SaveStrategy::No;
            let mut better = false;
            if (evaluate || (step == total && keep_best)) && !self.eval.is_empty() {
                let start = Instant::now();
                better = self.evaluate(&mut l, &mut ws, observer)?;
                l.device += start.elapsed().as_secs_f64();
                l.early_stop = self.is_out_of_patience(&l.position.state);
            }
            let stop = self.anybody(observer.should_stop())?;
            let last = step == total || l.early_stop;
            if save || stop || (keep_best && better) || (last && self.arguments.save_strategy != SaveStrategy::No) {
                self.save(&l.position, observer)?;
            }
            if stop && !last {
                reason = EndReason::Interrupted;
                break;
            }
        }
        if l.early_stop && reason == EndReason::Finished {
            reason = EndReason::EarlyStopped;
        }
        let mut step = l.position.state.global_step;
        if reason != EndReason::Interrupted && step > begun {
            self.log_end(&mut l, step - begun, observer);
        }
        if reason != EndReason::Interrupted
            && self.is_main()
            && self.arguments.load_best_model_at_end
            && let Some(best) = l.position.state.best_global_step
            && best != step
        {
            let dir = self.run_dir.join(format!("checkpoint-{best}"));
            match checkpoint::load(&dir, &OptimizerState::expected(&self.lora)?) {
                Ok(found) => {
                    found.optimizer.upload(self.backend, &mut self.lora)?;
                    self.model.prepare(self.backend, &mut self.lora)?;
                    step = best;
                }
                // The last step is better than nothing after hours of training.
                Err(e) => observer.warn(&format!("{e}; the adapter stays at step {step}, not the best step {best}")),
            }
        }
        let seconds = l.started.elapsed().as_secs_f64();
        let own_seconds = (seconds - l.device).max(0.0);
        let skipped_steps = l.position.skipped_steps;
        Ok(TrainOutcome { reason, state: l.position.state, seconds, step, skipped_steps, own_seconds })
    }

    fn is_out_of_patience(&self, state: &TrainerState) -> bool {
        self.arguments.early_stopping_patience.is_some_and(|p| state.evaluations_without_gain >= p)
    }

    /// One optimizer step.
    fn step(
        &mut self,
        l: &mut Loop,
        total: usize,
        ws: &mut Workspace<B>,
        observer: &mut dyn Observer<B>,
    ) -> Result<StepReport> {
        let start = Instant::now();
        let a = self.arguments.clone();
        let n = self.train.len();
        let step = l.position.state.global_step;
        let all = step_examples(n, a.examples_per_step(), a.seed, step, &mut l.order);
        let chosen = match &self.group {
            Some(group) => all[group.share(all.len())].to_vec(),
            None => all.clone(),
        };
        // Dropout differs between ranks, and does not between runs.
        let seed = a.seed ^ self.group.as_ref().map_or(0, |g| (g.rank() as u64) << 48);
        timed(&mut l.device, || self.lora.zero_grad(self.backend))?;
        let (mut loss, mut tokens, mut rows) = (0.0, 0.0, 0);
        // Those whose own loss is not finite.
        let mut culprits: Vec<usize> = Vec::new();
        {
            let examples: Vec<&TokenizedExample> = chosen.iter().map(|&i| &self.train[i]).collect();
            for range in self.micro_batches(&examples) {
                let batch = pack(&examples[range.clone()], &self.prefix, a.train_on);
                let pass = TrainPass {
                    random: Some((seed, l.position.micro_step)),
                    label_smoothing: a.label_smoothing_factor,
                    loss_scale: l.position.loss_scale.scale,
                    neftune_alpha: a.neftune_noise_alpha,
                };
                let (model, lora) = (self.model, &mut self.lora);
                let losses = timed(&mut l.device, || model.forward_backward(self.backend, &batch, lora, pass, ws))?;
                l.position.micro_step += 1;
                loss += losses.sum();
                tokens += batch.weights.iter().map(|&w| f64::from(w)).sum::<f64>();
                rows += batch.rows();
                for (row, _) in batch.label_rows.iter().zip(&losses.rows).filter(|(_, loss)| !loss.is_finite()) {
                    culprits.extend(batch.example_of(*row as usize).map(|i| chosen[range.start + i]));
                }
            }
        }
        let mut micro_step = l.position.micro_step;
        if let Some(group) = &mut self.group {
            let bad = culprits.first().map_or(-1.0, |&i| i as f64);
            let mine = [loss, tokens, rows as f64, f64::from(micro_step), bad];
            let everybody = group.gather_numbers(&mine)?;
            let sum = |i: usize| everybody.iter().map(|of| of[i]).sum::<f64>();
            (loss, tokens, rows) = (sum(0), sum(1), sum(2) as usize);
            // The counter that is saved must be past that of every rank.
            micro_step = everybody.iter().map(|of| of[3] as u32).max().unwrap_or(micro_step);
            culprits.extend(everybody.iter().map(|of| of[4]).filter(|&bad| bad >= 0.0).map(|bad| bad as usize));
            timed(&mut l.device, || reduce_gradients(self.backend, &mut self.lora, group))?;
        }
        l.position.micro_step = micro_step;
        let tokens = if tokens > 0.0 { tokens } else { 1.0 };
        let loss = loss / tokens;
        let unscale = 1.0 / (tokens * f64::from(l.position.loss_scale.scale));
        let grad_norm = timed(&mut l.device, || self.lora.grad_norm(self.backend))? * unscale;
        let rate = learning_rate(&a, step, total);
        if loss.is_finite() && grad_norm.is_finite() {
            let clip = if a.max_grad_norm > 0.0 && grad_norm > a.max_grad_norm {
                a.max_grad_norm / (grad_norm + 1e-6)
            } else {
                1.0
            };
            l.position.optimizer_step += 1;
            let hyper = AdamW {
                learning_rate: rate as f32,
                beta1: a.adam_beta1 as f32,
                beta2: a.adam_beta2 as f32,
                epsilon: a.adam_epsilon as f32,
                weight_decay: a.weight_decay as f32,
                step: l.position.optimizer_step,
                gradient_scale: (unscale * clip) as f32,
            };
            let (backend, model, lora) = (self.backend, self.model, &mut self.lora);
            timed(&mut l.device, || -> Result<()> {
                lora.step(backend, hyper, a.loraplus_lr_ratio)?;
                Ok(model.prepare(backend, lora)?)
            })?;
            l.position.bad_steps = 0;
            l.position.loss_scale.stepped();
            l.position.total_loss += loss;
            l.position.window.0 += loss;
            l.position.window.1 += 1;
        } else {
            culprits.sort_unstable();
            culprits.dedup();
            self.skip(l, step, (loss, grad_norm), if culprits.is_empty() { &all } else { &culprits }, observer)?;
        }
        let state = &mut l.position.state;
        state.global_step += 1;
        state.epoch = epoch_of(state.global_step, n, a.examples_per_step());
        state.num_input_tokens_seen += rows as u64;
        // As Transformers estimates it: six operations a token and parameter, embeddings left out.
        let c = self.model.config();
        let tables = if c.tie_word_embeddings { 1 } else { 2 };
        let parameters = c.parameters() - (tables * c.vocab_size * c.hidden_size) as u64;
        state.total_flos += 6.0 * rows as f64 * parameters as f64;
        Ok(StepReport {
            step: state.global_step,
            total_steps: total,
            epoch: state.epoch,
            loss,
            grad_norm,
            learning_rate: rate,
            examples: all.len(),
            rows,
            seconds: start.elapsed().as_secs_f64(),
        })
    }

    /// A step that changes nothing, because its loss or gradient is not finite.
    ///
    /// # Errors
    /// Too many of them in a row.
    fn skip(
        &self,
        l: &mut Loop,
        step: usize,
        found: (f64, f64),
        examples: &[usize],
        observer: &mut dyn Observer<B>,
    ) -> Result<()> {
        let (loss, grad_norm) = found;
        l.position.skipped_steps += 1;
        // An overflow that a smaller scale mends is no sign of trouble: fp16 begins with a scale that is too large.
        if loss.is_finite() && l.position.loss_scale.overflowed() {
            let scale = l.position.loss_scale.scale;
            observer.warn(&format!("step {}: gradients overflowed; skipped, the loss scale is now {scale}", step + 1));
            return Ok(());
        }
        l.position.bad_steps += 1;
        let mut named: Vec<String> = examples.iter().take(NAMED).map(|&i| observer.name_example(i)).collect();
        if examples.len() > NAMED {
            named.push(format!("and {} more", examples.len() - NAMED));
        }
        let (named, times) = (named.join(", "), l.position.bad_steps);
        if times > MAX_BAD_STEPS {
            let last_good = checkpoint::list(&self.run_dir).pop().map(|(_, path)| path);
            return Err(Error::NotFinite { step: step + 1, times, examples: named, last_good });
        }
        observer.warn(&format!(
            "step {}: loss {loss}, gradient norm {grad_norm}: not finite, skipped (examples {named})",
            step + 1
        ));
        Ok(())
    }

    fn log_window(&self, l: &mut Loop, report: &StepReport, observer: &mut dyn Observer<B>) {
        let (sum, count) = std::mem::take(&mut l.position.window);
        if count == 0 {
            return;
        }
        let entry = LogEntry::from([
            ("epoch".into(), report.epoch),
            ("grad_norm".into(), report.grad_norm),
            ("learning_rate".into(), report.learning_rate),
            ("loss".into(), sum / count as f64),
            ("step".into(), report.step as f64),
        ]);
        observer.log(&entry);
        l.position.state.log_history.push(entry);
    }

    /// The last entry, as Transformers writes it: how long `steps` steps of this process took, and the mean loss of all.
    fn log_end(&self, l: &mut Loop, steps: usize, observer: &mut dyn Observer<B>) {
        let seconds = l.started.elapsed().as_secs_f64().max(1e-9);
        let good = (l.position.state.global_step - l.position.skipped_steps).max(1);
        let examples = steps * self.arguments.examples_per_step().min(self.train.len());
        let state = &mut l.position.state;
        let entry = LogEntry::from([
            ("epoch".into(), state.epoch),
            ("step".into(), state.global_step as f64),
            ("total_flos".into(), state.total_flos),
            ("train_loss".into(), l.position.total_loss / good as f64),
            ("train_runtime".into(), seconds),
            ("train_samples_per_second".into(), examples as f64 / seconds),
            ("train_steps_per_second".into(), steps as f64 / seconds),
        ]);
        observer.log(&entry);
        state.log_history.push(entry);
    }

    /// Mean loss of a label token over the evaluation part, without dropout.
    ///
    /// # Errors
    /// The device fails.
    pub fn eval_loss(&mut self, ws: &mut Workspace<B>) -> Result<f64> {
        Ok(self.eval_batches(ws)?.0)
    }

    /// As [`eval_loss`](Self::eval_loss), with the number of batches; each rank takes a part.
    fn eval_batches(&mut self, ws: &mut Workspace<B>) -> Result<(f64, usize)> {
        let part = self.group.as_ref().map_or(0..self.eval.len(), |g| g.share(self.eval.len()));
        let examples: Vec<&TokenizedExample> = self.eval[part].iter().collect();
        let a = &self.arguments;
        let most = if a.packing { usize::MAX } else { a.per_device_eval_batch_size };
        let (mut loss, mut tokens, mut batches) = (0.0, 0.0, 0);
        for range in bins(&examples, &self.prefix, a.train_on, self.capacity(), most) {
            batches += 1;
            let batch = pack(&examples[range], &self.prefix, a.train_on);
            loss += self.model.loss(self.backend, &batch, Some(&self.lora), 0.0, ws)?.sum();
            tokens += batch.weights.iter().map(|&w| f64::from(w)).sum::<f64>();
        }
        if let Some(group) = &mut self.group {
            let everybody = group.gather_numbers(&[loss, tokens, batches as f64])?;
            let sum = |i: usize| everybody.iter().map(|of| of[i]).sum::<f64>();
            (loss, tokens, batches) = (sum(0), sum(1), sum(2) as usize);
        }
        Ok((loss / f64::max(tokens, 1.0), batches))
    }

    /// Evaluates, logs, keeps score; whether this is the best so far.
    fn evaluate(&mut self, l: &mut Loop, ws: &mut Workspace<B>, observer: &mut dyn Observer<B>) -> Result<bool> {
        let start = Instant::now();
        let (loss, batches) = self.eval_batches(ws)?;
        let mut entry = if self.is_main() { observer.evaluate(&self.lora)? } else { LogEntry::new() };
        let seconds = start.elapsed().as_secs_f64();
        let state = &mut l.position.state;
        entry.insert("eval_loss".into(), loss);
        entry.insert("eval_runtime".into(), seconds);
        entry.insert("eval_samples_per_second".into(), self.eval.len() as f64 / seconds.max(1e-9));
        entry.insert("eval_steps_per_second".into(), batches as f64 / seconds.max(1e-9));
        entry.insert("epoch".into(), state.epoch);
        entry.insert("step".into(), state.global_step as f64);
        // Whoever decides by these figures must have the same.
        if let Some(group) = &mut self.group {
            entry = group.share_entry(entry)?;
        }
        observer.log(&entry);
        let metric = self.arguments.metric_for_best_model.clone();
        let metric = if metric.starts_with("eval_") { metric } else { format!("eval_{metric}") };
        let Some(&value) = entry.get(&metric) else {
            return Err(Error::Invalid(format!(
                "metric_for_best_model is {metric:?}, but an evaluation gives {}\n  hint: choose one of these",
                entry.keys().filter(|k| k.starts_with("eval_")).cloned().collect::<Vec<_>>().join(", ")
            )));
        };
        state.log_history.push(entry);
        let better = |new: f64, old: f64, threshold: f64| {
            if self.arguments.is_greater_better() { new > old + threshold } else { new < old - threshold }
        };
        // As Transformers: the best is any gain, patience counts gains above the threshold.
        let old = state.best_metric;
        if old.is_none_or(|old| better(value, old, self.arguments.early_stopping_threshold)) {
            state.evaluations_without_gain = 0;
        } else {
            state.evaluations_without_gain += 1;
        }
        let best = old.is_none_or(|old| better(value, old, 0.0));
        if best {
            state.best_metric = Some(value);
            state.best_global_step = Some(state.global_step);
            let dir = self.run_dir.join(format!("checkpoint-{}", state.global_step));
            state.best_model_checkpoint = Some(dir.display().to_string());
        }
        Ok(best)
    }

    /// The adapter as it is now, with what a classifier needs.
    pub fn adapter(&self) -> Result<Adapter> {
        Ok(Adapter {
            lora: self.lora.config.clone(),
            tensors: self.lora.tensors(self.backend)?,
            base_model: self.base_model.clone(),
            classifier: self.classifier.clone(),
        })
    }

    fn is_main(&self) -> bool {
        self.group.as_ref().is_none_or(Group::is_main)
    }

    /// Whether it is so on any rank.
    fn anybody(&mut self, here: bool) -> Result<bool> {
        match &mut self.group {
            Some(group) => Ok(group.gather(&[u8::from(here)])?.iter().any(|said| said == &[1])),
            None => Ok(here),
        }
    }

    /// The newest checkpoint, as rank 0 finds it.
    fn newest(&mut self, observer: &mut dyn Observer<B>) -> Result<Option<(Position, OptimizerState)>> {
        let expected = OptimizerState::expected(&self.lora)?;
        let mut found = None;
        if self.is_main() {
            let newest = checkpoint::newest(&self.run_dir, &expected, &self.fingerprint, |w| observer.warn(&w))?;
            found = newest.map(|l| (l.position, l.optimizer));
        }
        let Some(group) = &mut self.group else { return Ok(found) };
        let bytes = match &found {
            Some((position, optimizer)) => checkpoint::to_bytes(position, optimizer)?,
            None => Vec::new(),
        };
        let bytes = group.broadcast(bytes)?;
        if group.is_main() || bytes.is_empty() {
            return Ok(found);
        }
        let bad = |what| Error::Invalid(format!("the checkpoint that rank 0 sent: {what}"));
        checkpoint::from_bytes(&bytes, &expected).map(Some).map_err(bad)
    }

    /// Finds out whether all begin with the same factors, and joins the devices if they can be.
    fn meet(&mut self, observer: &mut dyn Observer<B>) -> Result<()> {
        let Some(group) = &mut self.group else { return Ok(()) };
        let mut squares = Vec::new();
        for (_, of) in self.lora.groups() {
            squares.push(self.backend.sum_of_squares(&of.parameter)?);
        }
        let everybody = group.gather_numbers(&squares)?;
        let differs = |of: &Vec<f64>| of.iter().zip(&everybody[0]).any(|(a, b)| (a - b).abs() > 1e-6 * b.abs());
        if let Some(rank) = everybody.iter().position(differs) {
            let hint = "start all ranks with the same command and the same files";
            return Err(Error::Invalid(format!("rank {rank} begins with another adapter than rank 0\n  hint: {hint}")));
        }
        let id = self.backend.collective_id()?;
        let all_can = group.gather(&[u8::from(id.is_some())])?.iter().all(|said| said == &[1]);
        let id = group.broadcast(id.unwrap_or_default())?;
        if all_can {
            self.backend.join_collective(&id, group.rank(), group.size())?;
        } else if group.is_main() && self.backend.capabilities().device != "cpu" {
            observer.warn(
                "gradients are summed on the host: libnccl.so.2 is missing on a rank (pip install nvidia-nccl-cu13)",
            );
        }
        group.on_device = all_can;
        Ok(())
    }

    fn save(&self, position: &Position, observer: &mut dyn Observer<B>) -> Result<()> {
        if !self.is_main() {
            return Ok(());
        }
        let optimizer = OptimizerState::download(self.backend, &self.lora)?;
        let config = self.model.config();
        let path = checkpoint::save(&self.run_dir, &self.adapter()?, config, &optimizer, position, &self.arguments)?;
        observer.saved(&path);
        let Some(limit) = self.arguments.save_total_limit else { return Ok(()) };
        // The newest and, if it is to be loaded at the end, the best are kept whatever the limit.
        let best = position.state.best_global_step.filter(|_| self.arguments.load_best_model_at_end);
        let newest = position.state.global_step;
        let mut others: Vec<(usize, PathBuf)> =
            checkpoint::list(&self.run_dir).into_iter().filter(|(s, _)| *s != newest && Some(*s) != best).collect();
        let kept = 1 + usize::from(best.is_some_and(|b| b != newest));
        while others.len() + kept > limit.max(1) && !others.is_empty() {
            let (_, old) = others.remove(0);
            if let Err(e) = std::fs::remove_dir_all(&old) {
                observer.warn(&format!("cannot remove the old checkpoint {}: {e}", old.display()));
            }
        }
        Ok(())
    }
}

/// Sums the gradients of all ranks.
fn reduce_gradients<B: Backend>(backend: &B, lora: &mut Lora<B>, group: &mut Group) -> Result<()> {
    if group.on_device {
        // Whoever waits for the device waits without end for a rank that is gone: so all say first that they are here.
        group.gather(&[])?;
    }
    for (_, of) in lora.groups_mut() {
        let len = of.len;
        let Some(training) = &mut of.training else { continue };
        if group.on_device {
            backend.all_reduce(&mut training.gradient)?;
            continue;
        }
        let mut host = vec![0.0; len];
        backend.download(&training.gradient, 0, &mut host)?;
        group.sum(&mut host)?;
        backend.upload(&host, &mut training.gradient, 0)?;
    }
    Ok(())
}

fn epoch_of(step: usize, examples: usize, per_step: usize) -> f64 {
    let per_epoch = examples.div_ceil(per_step);
    step as f64 / per_epoch as f64
}
