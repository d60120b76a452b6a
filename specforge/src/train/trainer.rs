//! The loop: order, step, log, evaluate, save, stop.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::Instant;

use serde::Serialize;
use serde_json::Value;
use tch::{Kind, Tensor};

use super::metrics::Window;
use super::order::GlobalBatch;
use super::{DataOrder, TrainConfig};
use crate::checkpoint::{Checkpoint, CheckpointStore, Manifest, Versions};
use crate::data::{self, PackedBatch, TokenCache};
use crate::dist::ProcessGroup;
use crate::draft::DraftModel;
use crate::error::{Error, Result};
use crate::features::FeatureSource;
use crate::optim::{AdamW, Group, OptimConfig, ParameterSlot};
use crate::progress::Progress;
use crate::tracking::Tracker;

/// Documents of one split.
pub struct Split<'a> {
    /// The tokens.
    pub cache: &'a TokenCache,
    /// Which documents of the cache belong to the split.
    pub documents: Vec<usize>,
}

impl Split<'_> {
    fn lengths(&self) -> Vec<usize> {
        self.documents.iter().map(|&document| self.cache.document(document).tokens.len()).collect()
    }

    fn batch(&self, indices: &[usize]) -> PackedBatch {
        let documents: Vec<usize> = indices.iter().map(|&index| self.documents[index]).collect();
        data::assemble(self.cache, &documents)
    }
}

/// What a checkpoint records about the run beside its numbers.
#[derive(Debug, Clone)]
pub struct Provenance {
    /// The resolved configuration.
    pub configuration: Value,
    /// Versions of program and libraries.
    pub versions: Versions,
    /// Content hashes of the data.
    pub data_hashes: BTreeMap<String, String>,
}

/// Everything the loop works with.
pub struct TrainerParts<'a> {
    /// `train` section.
    pub config: &'a TrainConfig,
    /// `optim` section.
    pub optim: &'a OptimConfig,
    /// The draft to train.
    pub draft: &'a dyn DraftModel,
    /// Where hidden states come from.
    pub source: &'a dyn FeatureSource,
    /// Training documents.
    pub train: Split<'a>,
    /// Held-out documents.
    pub eval: Split<'a>,
    /// Where checkpoints go.
    pub store: CheckpointStore,
    /// Where metrics go.
    pub tracker: Tracker,
    /// What checkpoints record about the run.
    pub provenance: Provenance,
    /// Decodes with the draft as it is now, every so many steps; not at all at 0.
    pub decoding: (u64, Decoding<'a>),
    /// Number of the signal that asked the run to stop; 0 for none.
    pub stop: &'a AtomicI32,
}

/// Measures the draft by decoding with it.
pub type Decoding<'a> = &'a dyn Fn(&dyn DraftModel) -> Result<BTreeMap<String, f64>>;

/// What a run did.
#[derive(Debug, Clone, Serialize)]
pub struct TrainReport {
    /// Optimizer steps finished, earlier parts of a resumed run included.
    pub steps: u64,
    /// Steps the configuration asks for.
    pub total_steps: u64,
    /// Tokens that passed through the draft in this part.
    pub tokens: u64,
    /// Wall time of this part.
    pub seconds: f64,
    /// Held-out metrics before the first step; empty in a resumed run.
    pub start: BTreeMap<String, f64>,
    /// Held-out metrics after the last step.
    pub end: BTreeMap<String, f64>,
    /// Share of held-out supervised tokens that are the commonest supervised token of the training split.
    pub commonest_token_share: f64,
    /// Newest checkpoint.
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
    gradients: Vec<Tensor>,
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
    /// Prepares a run, from a checkpoint or from the draft's initial values.
    pub fn new(parts: TrainerParts<'a>, resume: Option<&Checkpoint>) -> Result<Self> {
        let config = parts.config;
        config.validate()?;
        parts.optim.validate()?;
        let order = config.order(parts.train.lengths())?;
        let total_steps = config.total_steps(&order)?;
        if total_steps == 0 {
            return Err(Error::Usage("there is nothing to train on: the training split is empty".to_owned()));
        }
        parts.optim.schedule.check_length(total_steps)?;
        let horizon = parts.optim.schedule.horizon(total_steps);
        let parameters = parts.draft.parameters();
        let mut position = Position::default();
        if let Some(checkpoint) = resume {
            for parameter in parameters {
                let _guard = tch::no_grad_guard();
                // As float64, so that nothing stays mapped; the way there and back loses nothing.
                let saved = checkpoint.model.load(&parameter.name, Kind::Double, parameter.value.device())?;
                parameter.value.shallow_clone().f_copy_(&saved)?;
            }
            let Manifest { step, epoch, position: batch, tokens_seen: tokens, .. } = checkpoint.manifest;
            position = Position { step, epoch, batch, tokens };
        }
        let slots = parameters.iter().map(|parameter| {
            let group = if parameter.decay { Group::Decay } else { Group::NoDecay };
            ParameterSlot { group, ..ParameterSlot::new(&parameter.name, parameter.value.shallow_clone()) }
        });
        let mut optimizer = AdamW::new(slots.collect(), parts.optim, ProcessGroup::SINGLE, false)?;
        if let Some(checkpoint) = resume {
            optimizer.load_state(Some(&checkpoint.optimizer))?;
        }
        let zeros = |value: &Tensor| value.f_zeros_like().and_then(|zeros| zeros.f_detach()?.f_to_kind(Kind::Float));
        let gradients = parameters.iter().map(|parameter| Ok(zeros(&parameter.value)?)).collect::<Result<Vec<_>>>()?;
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
        let progress = Progress::resumed("train", self.total_steps, "steps", first_step);
        let mut window = Window::default();
        let mut saved_at = (first_step > 0).then_some(first_step);
        'run: while self.position.step < self.total_steps {
            let batches = self.order.epoch(self.position.epoch)?;
            for batch in batches.iter().skip(self.position.batch as usize) {
                self.step(batch, &mut window)?;
                let step = self.position.step;
                let tokens_per_second = (self.position.tokens - first_tokens) as f64 / started.elapsed().as_secs_f64();
                progress.set(step, &format!("{tokens_per_second:.0} tokens/s"));
                let due = |every: u64| every > 0 && step.is_multiple_of(every);
                let last = step == self.total_steps;
                report.stopped_by = Some(self.parts.stop.load(Ordering::Relaxed)).filter(|&signal| signal != 0);
                let ends = last || report.stopped_by.is_some();
                if due(config.log_every) || ends {
                    self.check_finite()?;
                    self.log(&mut window, tokens_per_second, &progress)?;
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
                    progress.println(&eval_line(step, &measured));
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
        if let Some(step) = saved_at.filter(|_| report.checkpoint.as_os_str().is_empty()) {
            report.checkpoint = self.parts.store.folder_of(step);
        }
        let left = report.stopped_by.map_or("done", |_| "stopped, everything is saved");
        progress.finish(left);
        report.steps = self.position.step;
        report.tokens = self.position.tokens - first_tokens;
        report.seconds = started.elapsed().as_secs_f64();
        Ok(report)
    }

    /// One optimizer step on one global batch.
    fn step(&mut self, batch: &GlobalBatch, window: &mut Window) -> Result<()> {
        let draft = self.parts.draft;
        let step = self.position.step + 1;
        let micro: Vec<PackedBatch> = batch.iter().map(|documents| self.parts.train.batch(documents)).collect();
        // Counts of the whole global batch first: every micro-batch then contributes its exact share.
        let counts = total_counts(draft, &micro);
        self.gradients.iter_mut().for_each(|gradient| drop(gradient.zero_()));
        let device = self.gradients[0].device();
        let mut objective = Tensor::zeros([], (Kind::Float, device));
        for part in &micro {
            let features = self.parts.source.features(part, &draft.capture())?;
            let tally = draft.accumulate(&features, &counts, &mut self.gradients)?;
            objective += &tally.objective;
            window.add(&tally);
            self.position.tokens += part.ids.len() as u64;
        }
        window.end_step();
        let optim = self.parts.optim;
        // The schedule counts finished steps: the first update uses its value at 0.
        let rate = optim.schedule.learning_rate(optim.learning_rate, self.position.step, self.horizon);
        let report = self.optimizer.step(&self.gradients, rate, optim.max_gradient_norm, &objective)?;
        self.gradient_norm = report.gradient_norm;
        self.unchecked.push((step, micro.into_iter().flat_map(|part| part.documents).collect()));
        self.position.step = step;
        self.position.batch += 1;
        // Reading the flag costs a wait for a GPU and nothing on a CPU.
        if device.is_cuda() { Ok(()) } else { self.check_finite() }
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

    fn log(&mut self, window: &mut Window, tokens_per_second: f64, progress: &Progress) -> Result<()> {
        let step = self.position.step;
        let optim = self.parts.optim;
        let mut values = window.take(self.parts.draft);
        values.push(("gradient_norm".to_owned(), self.gradient_norm.double_value(&[])));
        let rate = optim.schedule.learning_rate(optim.learning_rate, step - 1, self.horizon);
        values.push(("learning_rate".to_owned(), rate));
        values.push(("tokens_per_second".to_owned(), tokens_per_second));
        values.push(("tokens".to_owned(), self.position.tokens as f64));
        let find = |name: &str| values.iter().find(|(key, _)| key == name).map_or(f64::NAN, |(_, value)| *value);
        let chosen = self.parts.draft.algorithm().selection_metric;
        progress.println(&format!("step {step}: loss {:.4}, {chosen} {:.3}", find("loss"), find(chosen)));
        let prefixed: Vec<(String, f64)> =
            values.into_iter().map(|(name, value)| (format!("train/{name}"), value)).collect();
        self.parts.tracker.log(step, &prefixed)
    }

    /// Metrics on the held-out documents.
    fn evaluate(&self) -> Result<BTreeMap<String, f64>> {
        let (draft, eval) = (self.parts.draft, &self.parts.eval);
        if eval.documents.is_empty() {
            return Ok(BTreeMap::new());
        }
        let tokens = self.parts.config.micro_batch_tokens;
        let order = DataOrder::new(eval.lengths(), tokens, tokens, 0)?;
        let parts: Vec<PackedBatch> = order.in_order().iter().map(|documents| eval.batch(documents)).collect();
        let counts = total_counts(draft, &parts);
        let mut window = Window::default();
        for part in &parts {
            let features = self.parts.source.features(part, &draft.capture())?;
            window.add(&draft.evaluate(&features, &counts)?);
        }
        Ok(window.take(draft).into_iter().collect())
    }

    fn log_evaluation(&mut self, values: &BTreeMap<String, f64>) -> Result<()> {
        if values.is_empty() {
            return Ok(()); // nothing is held out
        }
        let prefixed: Vec<(String, f64)> =
            values.iter().map(|(name, value)| (format!("eval/{name}"), *value)).collect();
        self.parts.tracker.log(self.position.step, &prefixed)
    }

    fn save(&mut self, metrics: BTreeMap<String, f64>) -> Result<PathBuf> {
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
        self.parts.tracker.flush()?;
        Ok(self.parts.store.save(manifest, &model, &self.optimizer.state()?)?.path)
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

/// How often a guesser is right that always says the training split's commonest supervised token.
fn commonest_token_share(train: &Split<'_>, eval: &Split<'_>) -> f64 {
    let counts = |split: &Split<'_>| {
        let mut counts: HashMap<u32, u64> = HashMap::new();
        for &index in &split.documents {
            let document = split.cache.document(index);
            let supervised = document.tokens.iter().zip(document.supervised).filter(|(_, mark)| **mark != 0);
            supervised.for_each(|(&token, _)| *counts.entry(token).or_default() += 1);
        }
        counts
    };
    let (train, eval) = (counts(train), counts(eval));
    // Equal counts: the lower id, so that the figure never depends on hashing.
    let commonest = train.iter().max_by_key(|(token, count)| (**count, std::cmp::Reverse(**token)));
    let seen = commonest.and_then(|(token, _)| eval.get(token)).copied().unwrap_or(0);
    seen as f64 / eval.values().sum::<u64>().max(1) as f64
}

/// One line for people: the loss and the derived figures. Those of single parts are in the log.
fn eval_line(step: u64, metrics: &BTreeMap<String, f64>) -> String {
    let shown = metrics.iter().filter(|(name, _)| !name.contains('/'));
    let figures: Vec<String> = shown.map(|(name, value)| format!("{name} {value:.3}")).collect();
    format!("held-out at step {step}: {}", figures.join(", "))
}
