//! The loop: order, step, log, evaluate, save, stop.
//!
//! Nothing waits that need not: hidden states of the next micro-batch are asked for before this one is trained on, and
//! checkpoints are written behind the steps that follow them.
//!
//! A signal loses nothing, wherever it falls. It ends an evaluation at the next micro-batch, and the checkpoint says what
//! it owes; the next part makes that first. Sums since the last log line are in the checkpoint too, so that the log of a
//! run in parts is that of a run in one.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::time::Instant;

use tch::{Kind, Tensor};

use super::DataOrder;
use super::agreement;
use super::ahead::Ahead;
use super::finite::FiniteSteps;
use super::gradient_noise::FirstGradient;
use super::gradient_sums::GradientSums;
use super::held_out::HeldOut;
use super::metrics::Window;
use super::order::GlobalBatch;
use super::parts::{TrainerParts, Writer, commonest_token_share};
use super::planning::PlannedStep;
use super::report::TrainReport;
use super::seconds::{Activity, Clock};
use crate::checkpoint::{Checkpoint, Manifest, Measurements, Saver, Tensors};
use crate::dist::ReduceOp;
use crate::draft::{ParameterGroup, StepKey, Tally};
use crate::error::{Error, Result, TensorMismatch};
use crate::nn::MixedPrecision;
use crate::optim::{Optimizer, ParameterSlot};
use crate::progress::Progress;
use crate::stop::Answer;
use crate::tracking::Tracker;

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
    held_out: HeldOut,
    mixed_precision: bool,
    optimizer: Optimizer<'a>,
    gradients: GradientSums<'a>,
    /// Since the last log line.
    window: Window,
    clock: Clock,
    progress: Option<Progress>,
    /// On the rank that writes.
    saver: Option<Saver>,
    tracker: Option<Tracker>,
    position: Position,
    /// Steps done before this process began.
    first_step: u64,
    total_steps: u64,
    /// Steps that the learning rate's schedule is spread over.
    horizon: u64,
    /// What an earlier part left to be measured at the step it ended with.
    owed: Measurements,
    /// Step of the newest checkpoint.
    saved_at: Option<u64>,
    /// The signal that a rank was sent: the same on every rank.
    stopped_by: Cell<Option<i32>>,
    finite: FiniteSteps,
    ahead: Ahead<'a, Vec<usize>>,
}

impl<'a> Trainer<'a> {
    /// Prepares a run, from a checkpoint or from the draft's initial values. Every rank of the group must call this; the
    /// first alone reads a checkpoint, and what it starts with is what every rank starts with.
    pub fn new(mut parts: TrainerParts<'a>, resume: Option<&Checkpoint>) -> Result<Self> {
        let (config, group) = (parts.config, parts.group);
        config.validate()?;
        parts.optim.validate()?;
        parts.parallel.validate()?;
        let mut order = config.order(parts.train.lengths())?;
        if parts.source.remembers() && group.is_distributed() {
            order = order.with_owners(group.world_size())?;
        }
        let total_steps = config.total_steps(&order)?;
        if total_steps == 0 {
            return Err(Error::Usage("there is nothing to train on: the training split is empty".to_owned()));
        }
        parts.optim.schedule.check_length(total_steps)?;
        let horizon = parts.optim.schedule.horizon(total_steps);
        let parameters = parts.draft.parameters();
        agreement::same_run(group, &parts.provenance, parameters)?;
        let held_out = HeldOut::new(&parts.eval, config.micro_batch_tokens, parts.draft, group)?;
        let mut start = [0; 7];
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
            let Manifest { step, epoch, position: batch, tokens_seen: tokens, owed, .. } = checkpoint.manifest;
            let skipped = checkpoint.manifest.skipped_steps;
            start = [step, epoch, batch, tokens, u64::from(owed.evaluation), u64::from(owed.decoding), skipped];
        }
        let [step, epoch, batch, tokens, evaluation, decoding, skipped] = agreement::numbers(group, start)?;
        let owed = Measurements { evaluation: evaluation > 0, decoding: decoding > 0 && parts.decoding.0 > 0 };
        let position = Position { step, epoch, batch, tokens };
        agreement::parameters(group, parameters)?;
        let slots = parts.optim.slots(parameters)?;
        let groups = own_groups(&slots);
        if let Some(checkpoint) = resume {
            checkpoint.same_groups(&groups)?;
        }
        let mut optimizer = Optimizer::new(slots, parts.optim, group, parts.parallel.shard_optimizer)?;
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
        optimizer.skip_non_finite(config.skip_non_finite, skipped)?;
        let gradients = GradientSums::new(parameters, group, parts.parallel)?;
        let open = resume.map(|checkpoint| checkpoint.manifest.window.as_slice()).unwrap_or_default();
        let window = Window::restore(open, config.gradient_noise, parameters[0].value.device(), group)?;
        let mixed_precision =
            config.mixed_precision.is_some() && MixedPrecision::obstacle(&parameters[0].value).is_none();
        let first_step = position.step;
        let writer = parts.writer.take().map(|Writer { store, tracker }| (Saver::new(store), tracker));
        let (saver, tracker) = writer.unzip();
        let ahead = Ahead::new(parts.source, parts.draft.capture(), config.prefetch);
        Ok(Self {
            parts,
            order,
            held_out,
            mixed_precision,
            optimizer,
            gradients,
            window,
            clock: Clock::start(),
            progress: None,
            saver,
            tracker,
            position,
            owed,
            saved_at: (first_step > 0).then_some(first_step),
            stopped_by: Cell::new(None),
            first_step,
            total_steps,
            horizon,
            finite: FiniteSteps::new(config.skip_non_finite, skipped),
            ahead,
        })
    }

    /// Trains to the end, or to a signal.
    pub fn run(mut self) -> Result<TrainReport> {
        let started = Instant::now();
        self.clock = Clock::start();
        let (first_step, first_tokens) = (self.first_step, self.position.tokens);
        let mut report = TrainReport::of_no_steps(first_step, self.total_steps);
        let decodes = self.parts.decoding.0 > 0;
        let everything = Measurements { evaluation: true, decoding: decodes };
        self.parts.stop.set_answer(Answer::Finish("stopping: nothing to save yet"));
        if first_step == 0
            && let Some(start) = self.measure(everything)?
        {
            self.log_evaluation(&start)?;
            report.start = start;
        }
        self.is_stopped()?;
        if self.saver.is_some() {
            self.progress = Some(Progress::resumed("train", self.total_steps, "steps", first_step));
        }
        let mut owed = std::mem::take(&mut self.owed);
        if !owed.is_nothing() {
            owed = self.conclude(owed, &mut report)?;
        }
        let mut next_epoch = Vec::new();
        'run: while self.position.step < self.total_steps {
            let batches = match std::mem::take(&mut next_epoch) {
                none if none.is_empty() => self.order.epoch(self.position.epoch)?,
                batches => batches,
            };
            for place in self.position.batch as usize..batches.len() {
                if self.stopped_by.get().is_some() || self.position.step == self.total_steps {
                    break 'run;
                }
                if place + 1 == batches.len() && self.position.step + 1 < self.total_steps {
                    next_epoch = self.order.epoch(self.position.epoch + 1)?;
                }
                self.step(&batches[place], batches.get(place + 1).or(next_epoch.first()))?;
                owed = self.conclude(self.due(), &mut report)?;
            }
            self.position.epoch += 1;
            self.position.batch = 0;
        }
        self.finish_saving()?;
        let is_whole = self.position.step == self.total_steps && owed.is_nothing();
        if is_whole && self.position.step == first_step && report.end.is_empty() {
            // A resumed run that had nothing left to do. Its last evaluation is in the log already.
            self.parts.stop.set_answer(Answer::Finish("stopping: everything is saved"));
            report.end = self.measure(everything)?.unwrap_or_default();
        } else if is_whole {
            self.stopped_by.set(None); // it came after the last thing there was to do
        }
        report.stopped_by = self.stopped_by.get();
        if let (Some(step), Some(saver)) = (self.saved_at, &self.saver) {
            report.checkpoint = saver.store().folder_of(step);
        }
        if let Some(progress) = self.progress.take() {
            progress.finish(match report.stopped_by {
                None => "done",
                Some(_) if self.saved_at.is_none() => "stopped",
                Some(_) => "stopped, everything is saved",
            });
        }
        if self.saver.is_some() && !report.end.is_empty() {
            report.commonest_token_share = commonest_token_share(&self.parts.train, &self.parts.eval);
        }
        report.steps = self.position.step;
        report.skipped_steps = self.finite.skipped();
        report.tokens = self.position.tokens - first_tokens;
        report.tokens_per_second = self.clock.all().rate();
        report.time = self.clock.all().seconds;
        report.seconds = started.elapsed().as_secs_f64();
        Ok(report)
    }

    /// One optimizer step on one global batch, and its log line where one is due. Features of the `next` one are asked for
    /// before it ends.
    fn step(&mut self, batch: &GlobalBatch, next: Option<&GlobalBatch>) -> Result<()> {
        self.parts.stop.set_answer(Answer::Finish("stopping after this step; a checkpoint is written"));
        let (draft, group) = (self.parts.draft, self.parts.group);
        let step = self.position.step + 1;
        let key = StepKey { seed: self.parts.config.seed, step: self.position.step, total: self.horizon };
        // Counts of the whole global batch, on every rank: each micro-batch then contributes its exact share.
        let micro_batches = |batch: &GlobalBatch| self.order.micro_batches(batch, group.rank(), group.world_size());
        let own = micro_batches(batch);
        let PlannedStep { plans, counts } = PlannedStep::new(batch, &own, &self.parts.train, (draft, key))?;
        let next = next.filter(|_| step < self.total_steps).map(micro_batches).unwrap_or_default();
        self.gradients.start()?;
        let device = self.gradients.totals()[0].device();
        let (mut objective, mut tallies) =
            (Tensor::f_zeros([], (Kind::Double, device))?, Vec::with_capacity(own.len()));
        let mut first = None;
        for (index, plan) in plans.iter().enumerate() {
            let coming = own[index..].iter().chain(&next).cloned();
            let Some(pending) = self.ahead.take(coming, |documents| self.parts.train.batch(documents)) else { break };
            self.clock.was(Activity::Data);
            let features = pending.wait()?;
            self.clock.was(Activity::Target);
            let is_last = index + 1 == own.len();
            let tally = self.gradients.add(is_last, |gradients| {
                let _products = MixedPrecision::begin(self.mixed_precision);
                draft.accumulate(&features, plan, &counts, gradients)
            })?;
            if self.parts.config.gradient_noise && index == 0 && !is_last {
                let tokens = self.parts.train.tokens(&own[0]);
                first = FirstGradient::new(self.gradients.totals(), (&plan.counts, &counts), tokens)?;
            }
            objective += &tally.objective;
            tallies.push(tally);
            self.clock.was(Activity::Draft);
        }
        self.gradients.finish()?;
        group.all_reduce(&objective, ReduceOp::Sum)?;
        self.clock.was(if group.is_distributed() { Activity::Communication } else { Activity::Draft });
        let optim = self.parts.optim;
        // The schedule counts finished steps: the first update uses its value at 0.
        let rate = optim.schedule.learning_rate(optim.learning_rate, self.position.step, self.horizon);
        let report = self.optimizer.step(self.gradients.totals(), rate, optim.max_gradient_norm, &objective)?;
        self.window.end_step(&tallies, &report)?;
        let tokens = self.parts.train.tokens(batch);
        first.map_or(Ok(()), |first| self.window.add_noise(&first, tokens, &report))?;
        self.position.tokens += tokens;
        self.finite.note(step, self.parts.train.names(batch), total_counts(&tallies));
        self.position.step = step;
        self.position.batch += 1;
        // Reading the flag costs a wait for a GPU and nothing on a CPU.
        if !device.is_cuda() {
            self.check_finite()?;
        }
        self.clock.was(Activity::Draft);
        self.clock.trained(tokens);
        // A checkpoint that could not be written is no surprise for the end.
        let warnings = self.saver.as_mut().map_or(Ok(Vec::new()), Saver::look)?;
        self.warn(&warnings);
        if let Some(progress) = &self.progress {
            progress.set(step, &format!("{:.0} tokens/s", self.clock.rate()));
        }
        if step.is_multiple_of(self.parts.config.log_every) || step == self.total_steps {
            self.check_finite()?;
            self.log()?;
        }
        Ok(())
    }

    /// What is to be measured after the step at hand.
    fn due(&self) -> Measurements {
        let due = |every: u64| every > 0 && self.position.step.is_multiple_of(every);
        let last = self.position.step == self.total_steps;
        let decode_every = self.parts.decoding.0;
        Measurements {
            evaluation: last || due(self.parts.config.eval_every),
            decoding: decode_every > 0 && (last || due(decode_every)),
        }
    }

    /// Ends a step: measures what is due, and saves where a checkpoint is due, where the measurements beat all before them,
    /// and where a signal came. Returns what the signal kept from being measured.
    fn conclude(&mut self, due: Measurements, report: &mut TrainReport) -> Result<Measurements> {
        let step = self.position.step;
        let is_made_up = self.saved_at == Some(step);
        let mut measured = Some(BTreeMap::new());
        if !due.is_nothing() {
            self.check_finite()?;
            self.clock.was(self.waiting());
            let line = "stopping now; a checkpoint is written, and the next part of the run evaluates first";
            self.parts.stop.set_answer(Answer::Finish(line));
            measured = self.measure(due)?;
        }
        let owed = if measured.is_some() { Measurements::default() } else { due };
        // Metrics of an evaluation at an earlier step say nothing about these weights.
        let measured = measured.unwrap_or_default();
        if !measured.is_empty() {
            self.log_evaluation(&measured)?;
            if let Some(progress) = &self.progress {
                progress.println(&eval_line(step, &measured));
            }
            report.end.clone_from(&measured);
        }
        let save_every = self.parts.config.save_every;
        let is_due = save_every > 0 && step.is_multiple_of(save_every) || step == self.total_steps;
        let is_record = self.is_record(&measured)?;
        let is_stopped = self.is_stopped()?;
        let saves = match is_made_up {
            true => owed.is_nothing(),
            // What was decoded with is kept, so that the best can be found again.
            false => is_due || due.decoding || is_record || is_stopped,
        };
        if saves {
            self.check_finite()?;
            self.clock.was(self.waiting());
            self.save(measured, owed)?;
            self.saved_at = Some(step);
            self.clock.was(Activity::Saving);
            // Another step would be another checkpoint.
            self.is_stopped()?;
        }
        Ok(owed)
    }

    /// Measures what is asked for on held-out documents, with the averages where they are kept. `None` where a signal came
    /// before all of it was.
    fn measure(&mut self, asked: Measurements) -> Result<Option<BTreeMap<String, f64>>> {
        self.optimizer.show_averages()?;
        let measured = self.measure_untimed(asked);
        self.optimizer.hide_averages()?;
        let measured = measured?;
        self.clock.was(Activity::Evaluation);
        Ok(measured)
    }

    fn measure_untimed(&self, asked: Measurements) -> Result<Option<BTreeMap<String, f64>>> {
        let TrainerParts { draft, source, group, decoding: (_, decode), config, .. } = &self.parts;
        let mut values = BTreeMap::new();
        if asked.evaluation {
            match self.held_out.evaluate(*draft, (*source, config.prefetch), group, || self.is_stopped())? {
                Some(evaluated) => values = evaluated,
                None => return Ok(None),
            }
        }
        if asked.decoding {
            match decode(*draft)? {
                Some(decoded) => values.extend(decoded),
                None => {
                    self.is_stopped()?;
                    return Ok(None);
                }
            }
        }
        Ok(Some(values))
    }

    /// Whether a rank was asked to stop. Every rank must call this, and every rank gets the same answer.
    fn is_stopped(&self) -> Result<bool> {
        if self.stopped_by.get().is_none() {
            let signal = agreement::signal(self.parts.group, self.parts.stop.asked())?;
            if signal != 0 {
                self.parts.stop.announce(); // it may be that another rank heard it
                self.stopped_by.set(Some(signal));
            }
        }
        Ok(self.stopped_by.get().is_some())
    }

    /// Whether these are the best measurements of the run so far. Every rank must call this.
    fn is_record(&mut self, measured: &BTreeMap<String, f64>) -> Result<bool> {
        if measured.is_empty() {
            return Ok(false);
        }
        // The record may be on its way to the disk.
        self.finish_saving()?;
        let own = self.saver.as_ref().map_or(Ok(false), |saver| saver.store().is_record(measured))?;
        Ok(agreement::numbers(self.parts.group, [u64::from(own)])? == [1])
    }

    /// What the host does while it waits for the device: on a CPU the draft's work is done by then.
    fn waiting(&self) -> Activity {
        match self.gradients.totals()[0].device().is_cuda() {
            true => Activity::Waiting,
            false => Activity::Draft,
        }
    }

    /// Stops the run if a step since the last check met NaN or infinity and may not be passed over. Parameters are then
    /// those before that step.
    fn check_finite(&mut self) -> Result<()> {
        let Self { finite, window, progress, optimizer, .. } = self;
        finite.check(optimizer, |line, rows| {
            window.take_out(rows);
            if let Some(progress) = progress {
                progress.println(line);
            }
        })
    }

    fn log(&mut self) -> Result<()> {
        let step = self.position.step;
        let optim = self.parts.optim;
        let mut values = self.window.take(self.parts.draft, self.parts.group)?;
        let rate = optim.schedule.learning_rate(optim.learning_rate, step - 1, self.horizon);
        values.push(("learning_rate".to_owned(), rate));
        values.push(("tokens".to_owned(), self.position.tokens as f64));
        if self.parts.config.skip_non_finite > 0 {
            values.push(("skipped_steps".to_owned(), self.finite.skipped() as f64));
        }
        self.clock.was(self.waiting());
        let spent = self.clock.take_line();
        values.push(("tokens_per_second".to_owned(), spent.rate()));
        let (alone, on_gpu) = (!self.parts.group.is_distributed(), self.waiting() == Activity::Waiting);
        let absent = |name: &str| name == "communication" && alone || name == "waiting" && !on_gpu;
        let parts = spent.seconds.parts().into_iter().filter(|(name, _)| !absent(name));
        values.extend(parts.map(|(name, seconds)| (format!("{name}_seconds"), seconds)));
        let find = |name: &str| values.iter().find(|(key, _)| key == name).map_or(f64::NAN, |(_, value)| *value);
        let chosen = self.parts.draft.algorithm().selection_metric;
        if let Some(progress) = &self.progress {
            let (loss, figure, speed, time) = (find("loss"), find(chosen), spent.rate(), spent.seconds.listed());
            let time = if time.is_empty() { time } else { format!(" (seconds: {time})") };
            progress.println(&format!("step {step}: loss {loss:.4}, {chosen} {figure:.3}, {speed:.0} tokens/s{time}"));
        }
        self.write_metrics("train", values)
    }

    fn log_evaluation(&mut self, values: &BTreeMap<String, f64>) -> Result<()> {
        if values.is_empty() {
            return Ok(()); // nothing is held out
        }
        self.write_metrics("eval", values.clone())
    }

    /// Writes the metrics of this step under a prefix, on the rank that writes.
    fn write_metrics(&mut self, prefix: &str, values: impl IntoIterator<Item = (String, f64)>) -> Result<()> {
        let Some(tracker) = &mut self.tracker else {
            return Ok(());
        };
        let prefixed: Vec<(String, f64)> =
            values.into_iter().map(|(name, value)| (format!("{prefix}/{name}"), value)).collect();
        tracker.log(self.position.step, &prefixed)
    }

    /// Begins to write a checkpoint, on the rank that writes. Every rank must call this.
    fn save(&mut self, metrics: BTreeMap<String, f64>, owed: Measurements) -> Result<()> {
        let (mut model, optimizer) = (self.optimizer.saved_values()?, self.optimizer.state()?);
        let window = self.window.state(self.parts.group)?;
        let (Some(saver), Some(tracker)) = (&mut self.saver, &mut self.tracker) else {
            return Ok(());
        };
        let provenance = self.parts.provenance.clone();
        let manifest = Manifest {
            step: self.position.step,
            epoch: self.position.epoch,
            position: self.position.batch,
            tokens_seen: self.position.tokens,
            skipped_steps: self.finite.skipped(),
            configuration: provenance.configuration,
            draft: self.parts.draft.description(),
            versions: provenance.versions,
            data_hashes: provenance.data_hashes,
            inputs: provenance.inputs,
            metrics,
            owed,
            window,
            groups: own_groups(self.optimizer.slots()),
            ..Manifest::default()
        };
        // Tensors that are not trained follow; resuming looks parameters up by name.
        model.extend(self.parts.draft.buffers());
        tracker.flush()?;
        let optimizer = match self.optimizer.state_is_live() {
            true => Tensors::Live(optimizer),
            false => Tensors::Copies(optimizer),
        };
        let warnings = saver.begin(manifest, Tensors::Live(model), optimizer)?;
        self.warn(&warnings);
        Ok(())
    }

    /// Waits until the checkpoint on its way is on disk, on the rank that writes.
    fn finish_saving(&mut self) -> Result<()> {
        let before = self.waiting();
        self.clock.was(before);
        let warnings = self.saver.as_mut().map_or(Ok(Vec::new()), Saver::finish)?;
        self.clock.was(Activity::Saving);
        self.warn(&warnings);
        Ok(())
    }

    fn warn(&self, warnings: &[String]) {
        if let Some(progress) = &self.progress {
            warnings.iter().for_each(|warning| progress.println(&format!("warning: {warning}")));
        }
    }
}

/// How parameters are updated, of those that are not updated as their shape suggests.
fn own_groups<'s>(slots: impl IntoIterator<Item = &'s ParameterSlot>) -> BTreeMap<String, ParameterGroup> {
    let own = slots.into_iter().filter(|slot| slot.group != ParameterGroup::of_shape(&slot.value.size()));
    own.map(|slot| (slot.name.clone(), slot.group)).collect()
}

/// This rank's rows of each metric.
fn total_counts(tallies: &[Tally]) -> Vec<f64> {
    let mut total: Vec<f64> = Vec::new();
    for Tally { counts, .. } in tallies {
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
