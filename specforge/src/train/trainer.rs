//! The loop: order, step, log, evaluate, save, stop.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::time::Instant;

use serde::Serialize;
use tch::{Kind, Tensor};

use super::DataOrder;
use super::agreement;
use super::gradient_sums::GradientSums;
use super::metrics::Window;
use super::order::GlobalBatch;
use super::parts::{TrainerParts, Writer, commonest_token_share};
use crate::checkpoint::{Checkpoint, Manifest};
use crate::data::PackedBatch;
use crate::dist::ReduceOp;
use crate::draft::DraftModel;
use crate::error::{Error, Result, TensorMismatch};
use crate::optim::{AdamW, Group, ParameterSlot};
use crate::progress::Progress;

/// What a run did.
#[derive(Debug, Clone, Serialize)]
pub struct TrainReport {
    /// Optimizer steps finished, earlier parts of a resumed run included.
    pub steps: u64,
    /// Steps the configuration asks for.
    pub total_steps: u64,
    /// Tokens that passed through the draft in this part, on all ranks.
    pub tokens: u64,
    /// Wall time of this part.
    pub seconds: f64,
    /// Held-out metrics before the first step; empty in a resumed run.
    pub start: BTreeMap<String, f64>,
    /// Held-out metrics after the last step.
    pub end: BTreeMap<String, f64>,
    /// Share of held-out supervised tokens that are the commonest supervised token of the training split.
    pub commonest_token_share: f64,
    /// Newest checkpoint; empty on a rank that writes none.
    pub checkpoint: PathBuf,
    /// Signal that ended the run early.
    pub stopped_by: Option<i32>,
}

/// Progress that a resumed run needs beside the weights.
#[derive(Debug, Clone, Copy, Default)]
struct Position {
    step: u64,
    epoch: u64,
    /// Global batches of the epoch already used.
    batch: u64,
    tokens: u64,
}

/// A training run.
pub struct Trainer<'a> {
    parts: TrainerParts<'a>,
    order: DataOrder,
    optimizer: AdamW<'a>,
    gradients: GradientSums<'a>,
    /// Of the last step, on the device.
    gradient_norm: Tensor,
    position: Position,
    /// Steps done before this process began.
    first_step: u64,
    total_steps: u64,
    /// Steps that the learning rate's schedule is spread over.
    horizon: u64,
    /// Documents of the steps whose finiteness has not been read from the device yet.
    unchecked: Vec<(u64, Vec<String>)>,
}

/// Document names quoted in an error.
const NAMES_SHOWN: usize = 6;

impl<'a> Trainer<'a> {
    /// Prepares a run, from a checkpoint or from the draft's initial values. Every rank of the group must call this; the
    /// first alone reads a checkpoint, and what it starts with is what every rank starts with.
    pub fn new(parts: TrainerParts<'a>, resume: Option<&Checkpoint>) -> Result<Self> {
        let (config, group) = (parts.config, parts.group);
        config.validate()?;
        parts.optim.validate()?;
        parts.parallel.validate()?;
        let order = config.order(parts.train.lengths())?;
        let total_steps = config.total_steps(&order)?;
        if total_steps == 0 {
            return Err(Error::Usage("there is nothing to train on: the training split is empty".to_owned()));
        }
        parts.optim.schedule.check_length(total_steps)?;
        let horizon = parts.optim.schedule.horizon(total_steps);
        let parameters = parts.draft.parameters();
        agreement::same_run(group, &parts.provenance, parameters)?;
        let mut start = [0; 4];
        if let Some(checkpoint) = resume {
            for parameter in parameters {
                let _guard = tch::no_grad_guard();
                // As float64, so that nothing stays mapped; the way there and back loses nothing.
                let saved = checkpoint.model.load(&parameter.name, Kind::Double, parameter.value.device())?;
                let (want, got) = (parameter.value.size(), saved.size());
                if want != got {
                    let mismatch = TensorMismatch {
                        misshaped: vec![(parameter.name.clone(), want, got)],
                        ..TensorMismatch::default()
                    };
                    return Err(Error::Tensors { path: checkpoint.model.path().to_path_buf(), mismatch });
                }
                parameter.value.shallow_clone().f_copy_(&saved)?;
            }
            let Manifest { step, epoch, position: batch, tokens_seen: tokens, .. } = checkpoint.manifest;
            start = [step, epoch, batch, tokens];
        }
        let [step, epoch, batch, tokens] = agreement::numbers(group, start)?;
        let position = Position { step, epoch, batch, tokens };
        agreement::parameters(group, parameters)?;
        let slots = parameters.iter().map(|parameter| {
            let group = if parameter.decay { Group::Decay } else { Group::NoDecay };
            ParameterSlot { group, ..ParameterSlot::new(&parameter.name, parameter.value.shallow_clone()) }
        });
        let mut optimizer = AdamW::new(slots.collect(), parts.optim, group, parts.parallel.shard_optimizer)?;
        if step > 0 {
            optimizer.load_state(resume.map(|checkpoint| &checkpoint.optimizer))?;
            let taken = optimizer.steps_taken()?;
            if taken > step {
                let problem = format!("the optimizer's state is of step {taken}, the checkpoint of step {step}");
                return Err(match resume {
                    Some(checkpoint) => Error::bad_file(&checkpoint.path, problem),
                    None => Error::Failed(problem),
                });
            }
        }
        let gradients = GradientSums::new(parameters, group, parts.parallel)?;
        let gradient_norm = Tensor::from(0f32);
        let first_step = position.step;
        Ok(Self {
            parts,
            order,
            optimizer,
            gradients,
            gradient_norm,
            position,
            first_step,
            total_steps,
            horizon,
            unchecked: Vec::new(),
        })
    }

    /// Trains to the end, or to the next step after a signal.
    pub fn run(mut self) -> Result<TrainReport> {
        let config = self.parts.config;
        let started = Instant::now();
        let (first_step, first_tokens) = (self.first_step, self.position.tokens);
        let mut report = self.empty_report();
        let (decode_every, decoding) = self.parts.decoding;
        if first_step == 0 {
            report.start = self.evaluate()?;
            if decode_every > 0 {
                report.start.extend(decoding(self.parts.draft)?);
            }
            self.log_evaluation(&report.start)?;
        }
        let progress =
            self.parts.writer.is_some().then(|| Progress::resumed("train", self.total_steps, "steps", first_step));
        let mut window = Window::default();
        let mut saved_at = (first_step > 0).then_some(first_step);
        'run: while self.position.step < self.total_steps {
            let batches = self.order.epoch(self.position.epoch)?;
            for batch in batches.iter().skip(self.position.batch as usize) {
                report.stopped_by = self.step(batch, &mut window)?;
                let step = self.position.step;
                let tokens_per_second = (self.position.tokens - first_tokens) as f64 / started.elapsed().as_secs_f64();
                if let Some(progress) = &progress {
                    progress.set(step, &format!("{tokens_per_second:.0} tokens/s"));
                }
                let due = |every: u64| every > 0 && step.is_multiple_of(every);
                let last = step == self.total_steps;
                let ends = last || report.stopped_by.is_some();
                if due(config.log_every) || ends {
                    self.check_finite()?;
                    self.log(&mut window, tokens_per_second, progress.as_ref())?;
                }
                // Metrics of an evaluation at an earlier step say nothing about these weights.
                let mut measured = BTreeMap::new();
                let decode = decode_every > 0 && (last || (due(decode_every) && !ends));
                if last || (due(config.eval_every) && !ends) {
                    self.check_finite()?;
                    measured = self.evaluate()?;
                }
                if decode {
                    self.check_finite()?;
                    measured.extend(decoding(self.parts.draft)?);
                }
                if !measured.is_empty() {
                    self.log_evaluation(&measured)?;
                    if let Some(progress) = &progress {
                        progress.println(&eval_line(step, &measured));
                    }
                    report.end.clone_from(&measured);
                }
                // What was decoded with is kept, so that the best can be found again.
                if due(config.save_every) || decode || ends {
                    self.check_finite()?;
                    report.checkpoint = self.save(measured)?;
                    saved_at = Some(step);
                }
                if ends {
                    break 'run;
                }
            }
            self.position.epoch += 1;
            self.position.batch = 0;
        }
        if report.end.is_empty() && report.stopped_by.is_none() {
            // A resumed run that had nothing left to do. Its last evaluation is in the log already.
            report.end = self.evaluate()?;
            if decode_every > 0 {
                report.end.extend(decoding(self.parts.draft)?);
            }
        }
        if let (Some(step), Some(Writer { store, .. }), true) =
            (saved_at, &self.parts.writer, report.checkpoint.as_os_str().is_empty())
        {
            report.checkpoint = store.folder_of(step);
        }
        if let Some(progress) = progress {
            progress.finish(report.stopped_by.map_or("done", |_| "stopped, everything is saved"));
        }
        report.steps = self.position.step;
        report.tokens = self.position.tokens - first_tokens;
        report.seconds = started.elapsed().as_secs_f64();
        Ok(report)
    }

    /// One optimizer step on one global batch. Returns the signal that asked a rank to stop, the same on every rank.
    fn step(&mut self, batch: &GlobalBatch, window: &mut Window) -> Result<Option<i32>> {
        let (draft, group) = (self.parts.draft, self.parts.group);
        let step = self.position.step + 1;
        // Counts of the whole global batch, on every rank: each micro-batch then contributes its exact share.
        let whole = self.parts.train.batch(batch);
        let counts = draft.count_rows(&whole);
        let own = self.order.micro_batches(batch, group.rank(), group.world_size());
        self.gradients.start()?;
        let device = self.gradients.totals()[0].device();
        let mut objective = Tensor::f_zeros([], (Kind::Double, device))?;
        for (index, documents) in own.iter().enumerate() {
            let part = self.parts.train.batch(documents);
            let features = self.parts.source.features(&part, &draft.capture())?;
            let is_last = index + 1 == own.len();
            let tally = self.gradients.add(is_last, |gradients| draft.accumulate(&features, &counts, gradients))?;
            objective += &tally.objective;
            window.add(&tally);
        }
        self.gradients.finish()?;
        group.all_reduce(&objective, ReduceOp::Sum)?;
        window.end_step();
        let optim = self.parts.optim;
        // The schedule counts finished steps: the first update uses its value at 0.
        let rate = optim.schedule.learning_rate(optim.learning_rate, self.position.step, self.horizon);
        let report = self.optimizer.step(self.gradients.totals(), rate, optim.max_gradient_norm, &objective)?;
        self.gradient_norm = report.gradient_norm;
        self.position.tokens += whole.ids.len() as u64;
        self.unchecked.push((step, whole.documents));
        self.position.step = step;
        self.position.batch += 1;
        let signal = agreement::signal(group, self.parts.stop.load(Ordering::Relaxed))?;
        // Reading the flag costs a wait for a GPU and nothing on a CPU.
        if !device.is_cuda() {
            self.check_finite()?;
        }
        Ok(Some(signal).filter(|&signal| signal != 0))
    }

    /// Stops the run if a step since the last check met NaN or infinity. Parameters are then those before that step.
    fn check_finite(&mut self) -> Result<()> {
        let Some(bad) = self.optimizer.first_non_finite()? else {
            self.unchecked.clear();
            return Ok(());
        };
        let step = bad.step;
        let names = self.unchecked.iter().find(|(at, _)| *at == step).map(|(_, names)| names.as_slice());
        let names = names.unwrap_or_default();
        let mut batch = names.iter().take(NAMES_SHOWN).cloned().collect::<Vec<_>>().join(", ");
        if names.len() > NAMES_SHOWN {
            batch.push_str(&format!(" and {} more documents", names.len() - NAMES_SHOWN));
        }
        Err(Error::NonFinite { step, what: bad.what.to_owned(), batch })
    }

    fn log(&mut self, window: &mut Window, tokens_per_second: f64, progress: Option<&Progress>) -> Result<()> {
        let step = self.position.step;
        let optim = self.parts.optim;
        let steps = window.steps();
        let mut values = window.take(self.parts.draft, self.parts.group)?;
        values.push(("gradient_norm".to_owned(), self.gradient_norm.double_value(&[])));
        let rate = optim.schedule.learning_rate(optim.learning_rate, step - 1, self.horizon);
        values.push(("learning_rate".to_owned(), rate));
        values.push(("tokens_per_second".to_owned(), tokens_per_second));
        values.push(("tokens".to_owned(), self.position.tokens as f64));
        if let Some(waited) = self.gradients.take_waited() {
            values.push(("communication_seconds".to_owned(), waited.as_secs_f64() / steps.max(1) as f64));
        }
        let find = |name: &str| values.iter().find(|(key, _)| key == name).map_or(f64::NAN, |(_, value)| *value);
        let chosen = self.parts.draft.algorithm().selection_metric;
        if let Some(progress) = progress {
            progress.println(&format!("step {step}: loss {:.4}, {chosen} {:.3}", find("loss"), find(chosen)));
        }
        self.write_metrics("train", values)
    }

    /// Metrics on the held-out documents, whose micro-batches the ranks take in turn.
    fn evaluate(&self) -> Result<BTreeMap<String, f64>> {
        let (draft, eval, group) = (self.parts.draft, &self.parts.eval, self.parts.group);
        if eval.documents.is_empty() {
            return Ok(BTreeMap::new());
        }
        let tokens = self.parts.config.micro_batch_tokens;
        let order = DataOrder::new(eval.lengths(), tokens, tokens, 0)?;
        let parts: Vec<PackedBatch> = order.in_order().iter().map(|documents| eval.batch(documents)).collect();
        let counts = total_counts(draft, &parts);
        let mut window = Window::default();
        for part in parts.iter().skip(group.rank()).step_by(group.world_size()) {
            let features = self.parts.source.features(part, &draft.capture())?;
            window.add(&draft.evaluate(&features, &counts)?);
        }
        Ok(window.take(draft, group)?.into_iter().collect())
    }

    fn log_evaluation(&mut self, values: &BTreeMap<String, f64>) -> Result<()> {
        if values.is_empty() {
            return Ok(()); // nothing is held out
        }
        self.write_metrics("eval", values.clone())
    }

    /// Writes the metrics of this step under a prefix, on the rank that writes.
    fn write_metrics(&mut self, prefix: &str, values: impl IntoIterator<Item = (String, f64)>) -> Result<()> {
        let Some(Writer { tracker, .. }) = &mut self.parts.writer else {
            return Ok(());
        };
        let prefixed: Vec<(String, f64)> =
            values.into_iter().map(|(name, value)| (format!("{prefix}/{name}"), value)).collect();
        tracker.log(self.position.step, &prefixed)
    }

    /// Writes a checkpoint, on the rank that writes. Every rank must call this.
    fn save(&mut self, metrics: BTreeMap<String, f64>) -> Result<PathBuf> {
        let optimizer = self.optimizer.state()?;
        let Some(Writer { store, tracker }) = &mut self.parts.writer else {
            return Ok(PathBuf::new());
        };
        let provenance = self.parts.provenance.clone();
        let manifest = Manifest {
            step: self.position.step,
            epoch: self.position.epoch,
            position: self.position.batch,
            tokens_seen: self.position.tokens,
            configuration: provenance.configuration,
            draft: self.parts.draft.description(),
            versions: provenance.versions,
            data_hashes: provenance.data_hashes,
            metrics,
            ..Manifest::default()
        };
        let parameters = self.parts.draft.parameters().iter();
        let parameters = parameters.map(|parameter| (parameter.name.clone(), parameter.value.detach()));
        // Tensors that are not trained follow; resuming looks parameters up by name.
        let model: Vec<(String, Tensor)> = parameters.chain(self.parts.draft.buffers()).collect();
        tracker.flush()?;
        Ok(store.save(manifest, &model, &optimizer)?.path)
    }

    fn empty_report(&self) -> TrainReport {
        TrainReport {
            steps: self.position.step,
            total_steps: self.total_steps,
            tokens: 0,
            seconds: 0.0,
            start: BTreeMap::new(),
            end: BTreeMap::new(),
            commonest_token_share: commonest_token_share(&self.parts.train, &self.parts.eval),
            checkpoint: PathBuf::new(),
            stopped_by: None,
        }
    }
}

fn total_counts(draft: &dyn DraftModel, parts: &[PackedBatch]) -> Vec<f64> {
    let mut total: Vec<f64> = Vec::new();
    for part in parts {
        let counts = draft.count_rows(part);
        total.resize(counts.len(), 0.0);
        total.iter_mut().zip(counts).for_each(|(sum, count)| *sum += count);
    }
    total
}

/// One line for people: the loss and the derived figures. Those of single parts are in the log.
fn eval_line(step: u64, metrics: &BTreeMap<String, f64>) -> String {
    let shown = metrics.iter().filter(|(name, _)| !name.contains('/'));
    let figures: Vec<String> = shown.map(|(name, value)| format!("{name} {value:.3}")).collect();
    format!("held-out at step {step}: {}", figures.join(", "))
}
