//! How fast a draft trains: whole steps and their parts, peak memory, and the share of the matrix rate that is reached.
//!
//! The steps are the trainer's own: features, gradients, optimizer, on packed random documents.

use std::panic::{self, AssertUnwindSafe};
use std::sync::Arc;
use std::time::Instant;

use serde::Serialize;
use serde_json::Value;
use tch::{Device, Kind, Tensor};

use super::ceilings::{Ceilings, median};
use super::operations::{self, Operations};
use super::programs;
use crate::data::PackedBatch;
use crate::device;
use crate::dist::ProcessGroup;
use crate::draft::{self, DraftContext, DraftModel, Gradients, SampleSize, Timed, Work};
use crate::error::{Error, Result};
use crate::eval::bench_train::spread_vocabulary;
use crate::features::{FeatureSource, OnlineFeatures};
use crate::models::{SharedTarget, TargetConfig, TargetModel};
use crate::optim::{OptimConfig, Optimizer, ParameterSlot};
use crate::shim;

/// What libtorch's message holds where memory does not suffice.
const OUT_OF_MEMORY: &str = "out of memory";

/// What is trained, and for how long.
#[derive(Debug, Clone)]
pub struct TrainingSetup {
    /// Shape of the target.
    pub target: TargetConfig,
    /// Element type of target and draft.
    pub kind: Kind,
    /// Tokens of each document of a step.
    pub lengths: Vec<i64>,
    /// Most bytes of one chunk of float32 logits.
    pub chunk_bytes: usize,
    /// Steps before the clock runs.
    pub warm_up: u32,
    /// Timed steps; the parts are timed in as many again.
    pub steps: u32,
    /// Which drafts.
    pub samples: SampleSize,
}

impl TrainingSetup {
    /// Shapes of a target of eight billion parameters; batches and drafts like those of the recipes of that size.
    pub fn full() -> Result<Self> {
        Ok(Self {
            target: programs::large_target()?,
            kind: Kind::BFloat16,
            lengths: vec![2048; 4],
            chunk_bytes: 1 << 30,
            warm_up: 3,
            steps: 10,
            samples: SampleSize::Full,
        })
    }

    /// The same program at sizes that take no time.
    pub fn quick() -> Result<Self> {
        let (_, target) = programs::targets()?.swap_remove(0);
        let (lengths, chunk_bytes) = (vec![24, 9, 17, 14], 307 * 4 * 16);
        let (kind, samples) = (Kind::Float, SampleSize::Small);
        Ok(Self { target, kind, lengths, chunk_bytes, warm_up: 1, steps: 2, samples })
    }
}

/// One configuration that was trained.
#[derive(Debug, Clone, Serialize)]
pub struct TrainingRun {
    /// What is trained, in short.
    pub name: String,
    /// The `draft` section.
    pub draft: Value,
    /// Element type.
    pub kind: String,
    /// Trained parameters.
    pub trainable: u64,
    /// Tokens of a step.
    pub tokens: usize,
    /// Trained rows of a step, of all loss terms.
    pub rows: u64,
    /// Rows of a chunk of logits, or target positions with the rows that learn from each.
    pub chunk_rows: i64,
    /// Operations of a step.
    pub operations: Operations,
    /// Measurements; absent where it did not run.
    pub result: Option<Measured>,
    /// Why there are none: out of memory.
    pub problem: Option<String>,
}

/// What the clock said, in milliseconds for one step.
#[derive(Debug, Clone, Serialize)]
pub struct Measured {
    /// A whole step: median.
    pub step_ms: f64,
    /// Fastest and slowest step.
    pub step_ms_range: [f64; 2],
    /// Until the host had asked for everything. Near `step_ms`, the device may be waiting for the host.
    pub asked_ms: f64,
    /// Features of the target: median, with a wait on either side like the other parts.
    pub target_ms: f64,
    /// Loss and gradients of the draft: median.
    pub draft_ms: f64,
    /// Optimizer: median.
    pub optimizer_ms: f64,
    /// Tokens a second.
    pub tokens_per_second: f64,
    /// Operations a token.
    pub operations_per_token: f64,
    /// Operations a second.
    pub operations_per_second: f64,
    /// That rate as a share of the measured rate of matrix products in this element type.
    pub share_of_matrix_rate: f64,
    /// Most memory in use, target included; unknown on the CPU.
    pub peak_bytes: Option<i64>,
    /// Objective of the last step.
    pub loss: f64,
}

/// Trains the samples of every algorithm. Memory that does not suffice is a row of the result.
pub fn run(setup: &TrainingSetup, device: Device, ceilings: &Ceilings, say: &dyn Fn(&str)) -> Result<Vec<TrainingRun>> {
    say(&format!("training: a random target of {} parameters", setup.target.info().parameters.all));
    let target = SharedTarget::from(random_target(&setup.target, setup.kind, device)?);
    let batch = |seed| Arc::new(programs::documents(&setup.lengths, setup.target.info().vocab_size, seed));
    let batches: Vec<Arc<PackedBatch>> = (0..2).map(batch).collect();
    let mut runs = Vec::new();
    for algorithm in draft::algorithms() {
        for alternatives in (algorithm.samples)(setup.samples).timed {
            // The large one first: nothing that another left behind is in its way.
            for sample in alternatives {
                let work = (algorithm.work)(&sample.section, setup.target.info(), &batches[0], setup.chunk_bytes)?;
                runs.push(one(setup, (sample, work), &target, &batches, ceilings, say)?);
                if runs.last().is_some_and(|run| run.result.is_some()) {
                    break;
                }
            }
        }
    }
    Ok(runs)
}

/// A target with random values, made on the device.
fn random_target(config: &TargetConfig, kind: Kind, device: Device) -> Result<Box<dyn TargetModel>> {
    tch::manual_seed(1);
    config.build(device, &mut |name, shape| {
        let mut values = Tensor::f_ones(shape, (kind, device))?;
        if !name.ends_with("norm.weight") {
            let _ = values.f_normal_(0.0, 0.02)?;
        }
        Ok(values)
    })
}

fn one(
    setup: &TrainingSetup,
    (sample, work): (Timed, Work),
    target: &SharedTarget,
    batches: &[Arc<PackedBatch>],
    ceilings: &Ceilings,
    say: &dyn Fn(&str),
) -> Result<TrainingRun> {
    let (Timed { name, section }, Work { rows, chunk_rows, operations, .. }) = (sample, work);
    say(&format!("training: {name}"));
    let trainable = (draft::algorithm(&section)?.size)(&section, setup.target.info())?.trainable;
    let operations = Operations { target: operations::of_target(&setup.target, &setup.lengths)?, draft: operations };
    let measured = guarded(|| {
        let mut session = Session::new(setup, &section, target, batches)?;
        session.measure(setup, operations, ceilings)
    });
    let (result, problem) = match measured {
        Ok(measured) => (Some(measured), None),
        Err(error) if error.to_string().contains(OUT_OF_MEMORY) => (None, Some(OUT_OF_MEMORY.to_owned())),
        Err(error) => return Err(error),
    };
    Ok(TrainingRun {
        name,
        draft: section,
        kind: if setup.kind == Kind::Float { "float32" } else { "bfloat16" }.to_owned(),
        trainable,
        tokens: batches[0].ids.len(),
        rows,
        chunk_rows,
        operations,
        result,
        problem,
    })
}

/// libtorch's operators panic where they fail: for want of memory, that is an error like any other here.
fn guarded<T>(body: impl FnOnce() -> Result<T>) -> Result<T> {
    panic::catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|payload| {
        let text = payload.downcast_ref::<String>().map(String::as_str);
        match text.or_else(|| payload.downcast_ref::<&str>().copied()) {
            Some(text) if text.contains(OUT_OF_MEMORY) => Err(Error::Torch(OUT_OF_MEMORY.to_owned())),
            _ => panic::resume_unwind(payload),
        }
    })
}

/// Everything a step works with.
struct Session<'a> {
    source: OnlineFeatures,
    draft: Box<dyn DraftModel>,
    optimizer: Optimizer<'static>,
    gradients: Vec<Tensor>,
    batches: &'a [Arc<PackedBatch>],
    device: Device,
    taken: usize,
}

/// When the parts of a step were over, if anybody wants to know.
type Clock<'a> = Option<&'a mut Vec<Instant>>;

impl<'a> Session<'a> {
    fn new(
        setup: &TrainingSetup,
        section: &Value,
        target: &SharedTarget,
        batches: &'a [Arc<PackedBatch>],
    ) -> Result<Self> {
        let in_use = target.in_use();
        let device = in_use.device();
        if let Device::Cuda(index) = device {
            shim::reset_cuda_peak(index)?;
        }
        let vocabulary = spread_vocabulary(section, setup.target.info().vocab_size)?;
        let context = DraftContext {
            target: in_use.info().clone(),
            embedding: in_use.embedding(),
            head: in_use.head(),
            vocabulary: vocabulary.as_ref(),
            weights: None,
            kind: setup.kind,
            device,
            seed: 1,
            chunk_bytes: setup.chunk_bytes,
        };
        let draft = (draft::algorithm(section)?.build)(section, &context)?;
        let slots = draft.parameters().iter().map(ParameterSlot::from);
        let optimizer = Optimizer::new(slots.collect(), &OptimConfig::default(), ProcessGroup::SINGLE, false)?;
        let gradients = Gradients::zeros(draft.parameters())?;
        drop(in_use);
        let source = OnlineFeatures::new(target.clone());
        Ok(Self { source, draft, optimizer, gradients, batches, device, taken: 0 })
    }

    /// One optimizer step; with a clock, the device is waited for after every part.
    fn step(&mut self, mut clock: Clock<'_>) -> Result<Tensor> {
        let device = self.device;
        let mut lap = || {
            if let Some(laps) = clock.as_deref_mut() {
                device::synchronize(device);
                laps.push(Instant::now());
            }
        };
        let batch = &self.batches[self.taken % self.batches.len()];
        self.taken += 1;
        lap();
        let features = self.source.features(Arc::clone(batch), &self.draft.capture())?;
        lap();
        self.gradients.iter_mut().for_each(|gradient| drop(gradient.zero_()));
        let plan = self.draft.plan(batch, programs::KEY)?;
        let tally = self.draft.accumulate(&features, &plan, &plan.counts, &mut Gradients::new(&mut self.gradients))?;
        lap();
        self.optimizer.step(&self.gradients, 1e-4, Some(1.0), &tally.objective)?;
        lap();
        Ok(tally.objective)
    }

    fn measure(&mut self, setup: &TrainingSetup, operations: Operations, ceilings: &Ceilings) -> Result<Measured> {
        for _ in 0..setup.warm_up {
            drop(self.step(None)?);
        }
        let (mut whole, mut asked) = (Vec::new(), Vec::new());
        let mut objective = Tensor::from(f32::NAN);
        for _ in 0..setup.steps {
            device::synchronize(self.device);
            let started = Instant::now();
            objective = self.step(None)?;
            asked.push(started.elapsed().as_secs_f64() * 1e3);
            device::synchronize(self.device);
            whole.push(started.elapsed().as_secs_f64() * 1e3);
        }
        let peak_bytes = match self.device {
            Device::Cuda(index) => Some(shim::cuda_memory(index)?.peak),
            _ => None,
        };
        let mut parts = [const { Vec::new() }; 3];
        for _ in 0..setup.steps {
            let mut laps = Vec::new();
            drop(self.step(Some(&mut laps))?);
            for (part, pair) in parts.iter_mut().zip(laps.windows(2)) {
                part.push((pair[1] - pair[0]).as_secs_f64() * 1e3);
            }
        }
        if let Some(bad) = self.optimizer.non_finite()?.fatal {
            return Err(Error::Failed(format!("training: {} is not finite at step {}", bad.what, bad.step)));
        }
        let step_ms = median(&mut whole); // sorts them
        let tokens = self.batches[0].ids.len() as f64;
        let total = (operations.target + operations.draft) as f64;
        let operations_per_second = total / step_ms * 1e3;
        let [target_ms, draft_ms, optimizer_ms] = parts.map(|mut part| median(&mut part));
        Ok(Measured {
            step_ms,
            step_ms_range: [whole.first(), whole.last()].map(|time| time.copied().unwrap_or(f64::NAN)),
            asked_ms: median(&mut asked),
            target_ms,
            draft_ms,
            optimizer_ms,
            tokens_per_second: tokens / step_ms * 1e3,
            operations_per_token: total / tokens,
            operations_per_second,
            share_of_matrix_rate: operations_per_second / ceilings.rate(setup.kind),
            peak_bytes,
            loss: objective.double_value(&[]),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::gpu_check::ceilings::{self, CeilingSizes};

    #[test]
    fn tiny_shapes_train_on_the_cpu() {
        let sizes = CeilingSizes { bfloat16: 64, float32: 64, ..CeilingSizes::QUICK };
        let ceilings = ceilings::measure(Device::Cpu, sizes).unwrap();
        for kind in [Kind::Float, Kind::BFloat16] {
            let setup = TrainingSetup { kind, ..TrainingSetup::quick().unwrap() };
            let runs = run(&setup, Device::Cpu, &ceilings, &|_| {}).unwrap();
            let names = runs.iter().map(|run| run.name.as_str()).collect::<Vec<_>>();
            let eagle3 = ["eagle3 3 recomputed", "eagle3 3 one graph"];
            let others = ["peagle 4", "dflash"];
            assert_eq!(names, [&["medusa 5x1 own", "medusa 5x1 shared"][..], &eagle3, &others].concat());
            assert_eq!(runs[0].trainable - runs[1].trainable, 5 * 307 * 96);
            // Projections and target are small random matrices: nothing is known yet, and nothing was learned.
            let learnt = |run: &TrainingRun, terms: i32, tokens: f64| {
                run.result.as_ref().unwrap().loss / f64::ln(tokens) / ((1.0 - 0.8f64.powi(terms)) / 0.2)
            };
            for run in &runs {
                check(run, ceilings.rate(kind));
                if others.contains(&run.name.as_str()) {
                    continue; // what they begin with is their own tests' business
                }
                let medusa = run.name.starts_with("medusa");
                assert_eq!((run.tokens, run.chunk_rows), (64, if medusa { 16 } else { 5 }));
                match medusa {
                    true => assert!((learnt(run, 5, 307.0) - 1.0).abs() < 0.03, "{run:?}"),
                    // A third of the tokens is in the draft's vocabulary; the other rows have no loss.
                    false => assert!((0.1..0.7).contains(&learnt(run, 3, 100.0)), "{run:?}"),
                }
            }
            // Both ways are the same step, up to rounding.
            let losses = [2, 3].map(|index| runs[index].result.as_ref().unwrap().loss);
            assert!((losses[0] / losses[1] - 1.0).abs() < 1e-2, "{losses:?}");
        }
    }

    fn check(run: &TrainingRun, rate: f64) {
        let measured = run.result.as_ref().unwrap();
        let total = (run.operations.target + run.operations.draft) as f64;
        assert!((measured.operations_per_token * 64.0 / total - 1.0).abs() < 1e-9);
        assert!((measured.tokens_per_second * measured.step_ms / 64e3 - 1.0).abs() < 1e-9);
        let share = total / measured.step_ms * 1e3 / rate;
        assert!((measured.share_of_matrix_rate / share - 1.0).abs() < 1e-9);
        assert!(measured.step_ms_range[0] <= measured.step_ms && measured.step_ms <= measured.step_ms_range[1]);
        assert!(measured.asked_ms <= measured.step_ms_range[1] && measured.peak_bytes.is_none());
    }

    #[test]
    fn only_a_want_of_memory_is_caught() {
        let error = guarded::<()>(|| panic!("CUDA out of memory. Tried to allocate 2.00 GiB.")).unwrap_err();
        assert!(error.to_string().contains(OUT_OF_MEMORY), "{error}");
        assert!(panic::catch_unwind(|| guarded::<()>(|| panic!("a mistake"))).is_err());
        assert_eq!(guarded(|| Ok(1)).unwrap(), 1);
    }
}
