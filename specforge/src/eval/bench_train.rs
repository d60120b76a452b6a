//! Speed and memory of a training step of a draft: forward, backward and optimizer on random features, without a target.
//!
//! The target's part is timed by `bench`; here every algorithm of the table meets the same made-up documents, so that
//! another program can time the same work (`benchmarks/eagle3_step_vs_specforge`).

use std::str::FromStr;
use std::sync::Arc;
use std::time::Instant;

use serde::Serialize;
use serde_json::Value;
use tch::{Device, Kind, Tensor};

use super::bench::{parse_sizes, peak_memory_bytes};
use crate::data::{DocumentRef, PackedBatch};
use crate::device;
use crate::dist::ProcessGroup;
use crate::draft::{self, DraftContext, DraftModel, Gradients, StepKey};
use crate::error::{Error, Result};
use crate::features::FeatureBatch;
use crate::models::TargetInfo;
use crate::nn::{self, Embedding, Head, MixedPrecision, noise};
use crate::optim::{OptimConfig, Optimizer, ParameterSlot};
use crate::shim;
use crate::vocab::VocabMap;

/// What to time.
#[derive(Debug, Clone)]
pub struct BenchTrainOptions {
    /// The `draft` section.
    pub draft: Value,
    /// What the target is.
    pub target: TargetInfo,
    /// Documents.
    pub batch: BatchShape,
    /// Share of each document, at its end, that is supervised.
    pub supervised: f64,
    /// Timed steps, after two that are not timed.
    pub repeat: u32,
    /// Threads of libtorch; all cores where it is not given.
    pub threads: Option<i32>,
    /// Element type.
    pub kind: Kind,
    /// Where to run.
    pub device: Device,
    /// Most bytes of a chunk of logits.
    pub chunk_bytes: usize,
    /// Whether to train in mixed precision, where that is of use.
    pub mixed_precision: bool,
}

/// Tokens of each document: `DxT` where they are equal, `T,T,...` where they are not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct BatchShape {
    /// Tokens of each document.
    pub lengths: Vec<i64>,
}

impl FromStr for BatchShape {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let expected = "DOCUMENTSxTOKENS, such as 2x512";
        if text.contains(',') {
            let length = |part: &str| part.parse().ok().filter(|&length: &i64| length >= 1);
            let lengths = text.split(',').map(|part| length(part.trim())).collect::<Option<Vec<i64>>>();
            let problem = || format!("expected {expected}, or tokens of each, such as 128,256,512, got `{text}`");
            return lengths
                .filter(|lengths| lengths.iter().sum::<i64>() < i64::from(i32::MAX))
                .map(|lengths| Self { lengths })
                .ok_or_else(problem);
        }
        let [documents, tokens] = parse_sizes(text, expected)?;
        Ok(Self::equal(documents, tokens))
    }
}

impl BatchShape {
    /// So many documents of so many tokens.
    pub fn equal(documents: i64, tokens: i64) -> Self {
        Self { lengths: vec![tokens; documents as usize] }
    }

    /// Tokens of all of them.
    pub fn tokens(&self) -> i64 {
        self.lengths.iter().sum()
    }
}

/// What was measured.
#[derive(Debug, Serialize)]
pub struct BenchTrainReport {
    /// Name of the algorithm.
    pub algorithm: String,
    /// Trainable parameters.
    pub trainable_parameters: u64,
    /// Tokens of a step.
    pub tokens: i64,
    /// Trained rows of a step, of all loss terms together.
    pub rows: f64,
    /// Threads of libtorch.
    pub threads: i32,
    /// Seconds of every timed step.
    pub seconds: Vec<f64>,
    /// Processor seconds of every timed step, of all threads together: what a shared machine disturbs least.
    pub cpu_seconds: Vec<f64>,
    /// Seconds of the median step.
    pub median_seconds: f64,
    /// Of the median step: forward and backward pass, and the optimizer.
    pub parts: [f64; 2],
    /// Tokens per second of the median step.
    pub tokens_per_second: f64,
    /// Floating-point operations that a step needs, whatever is computed again; a multiply-add counts as two. What is
    /// computed once for a document is not among them.
    pub operations: u64,
    /// Of them, in a second of the median step.
    pub operations_per_second: f64,
    /// What this machine reaches in a large product of square matrices of the same type, timed between the steps.
    pub ceiling_per_second: f64,
    /// Objective of the last step.
    pub loss: f64,
    /// Memory of the process before the first step, where the system tells it.
    pub memory_before_bytes: Option<u64>,
    /// Most memory that was in use: of the process on a CPU, of the allocator on a GPU.
    pub peak_memory_bytes: Option<u64>,
}

/// Steps that are not timed.
const WARM_UP: u32 = 2;

/// Times steps.
pub fn run(options: &BenchTrainOptions) -> Result<BenchTrainReport> {
    if let Some(threads) = options.threads {
        tch::set_num_threads(threads);
    }
    let (device, target) = (options.device, &options.target);
    let random = |shape: &[i64], stream: u64| {
        let values = noise::normal(shape, 1.0, 7, stream).f_to_device(device)?.f_to_kind(options.kind)?;
        Ok::<_, Error>(values)
    };
    let table = |stream| Ok::<_, Error>(random(&[target.vocab_size, target.hidden_size], stream)? * 0.02);
    let (embedding, head) = (Embedding::plain(table(0)?), Head::plain(table(1)?));
    let vocabulary = spread_vocabulary(&options.draft, target.vocab_size)?;
    let context = DraftContext {
        target: target.clone(),
        embedding: &embedding,
        head: &head,
        vocabulary: vocabulary.as_ref(),
        weights: None,
        kind: options.kind,
        device,
        seed: 1,
        chunk_bytes: options.chunk_bytes,
    };
    let algorithm = draft::algorithm(&options.draft)?;
    let draft = (algorithm.build)(&options.draft, &context)?;
    let batch = made_up(&options.batch, options.supervised, target.vocab_size);
    let capture = draft.capture();
    let rows = options.batch.tokens();
    let hidden = (0..capture.len() as u64).map(|index| random(&[rows, target.hidden_size], 10 + index));
    let features = FeatureBatch::new(Arc::new(batch), hidden.collect::<Result<_>>()?);
    let mut session = Session::new(draft.as_ref(), &features, options.mixed_precision)?;
    if let Device::Cuda(index) = device {
        shim::reset_cuda_peak(index)?;
    }
    let memory_before_bytes = peak_memory(device);
    for _ in 0..WARM_UP {
        session.step()?;
    }
    let (mut laps, mut cpu_seconds) = (Vec::new(), Vec::new());
    let ceiling = Ceiling::new(options.kind, device);
    ceiling.seconds(); // warms up
    let mut products = Vec::new();
    for _ in 0..options.repeat {
        let before = processor_seconds();
        laps.push(session.step()?);
        cpu_seconds.push(processor_seconds() - before);
        products.push(ceiling.seconds());
    }
    products.sort_by(f64::total_cmp);
    let work = (algorithm.work)(&options.draft, target, &features.batch, options.chunk_bytes)?;
    let operations = work.operations - if device == Device::Cpu { work.remembered } else { 0 };
    let seconds: Vec<f64> = laps.iter().map(|[work, optimizer]| work + optimizer).collect();
    laps.sort_by(|left, right| left.iter().sum::<f64>().total_cmp(&right.iter().sum()));
    let parts = laps[laps.len() / 2];
    let median_seconds = parts[0] + parts[1];
    let parameters = draft.parameters().iter();
    Ok(BenchTrainReport {
        algorithm: algorithm.name.to_owned(),
        trainable_parameters: parameters.map(|parameter| parameter.value.numel() as u64).sum(),
        tokens: rows,
        rows: session.rows,
        threads: tch::get_num_threads(),
        seconds,
        cpu_seconds,
        median_seconds,
        parts,
        tokens_per_second: rows as f64 / median_seconds,
        operations,
        operations_per_second: operations as f64 / median_seconds,
        ceiling_per_second: ceiling.operations() / products[products.len() / 2],
        loss: session.loss,
        memory_before_bytes,
        peak_memory_bytes: peak_memory(device),
    })
}

/// A vocabulary of the asked size, spread evenly over the target's.
pub fn spread_vocabulary(section: &Value, vocab_size: i64) -> Result<Option<VocabMap>> {
    let size = section.get("draft_vocab_size").and_then(Value::as_i64).filter(|&size| size != vocab_size);
    size.map(|size| VocabMap::new((0..size).map(|id| id * vocab_size / size).collect(), vocab_size)).transpose()
}

/// Documents of random tokens, supervised at their end but for the last token.
fn made_up(shape: &BatchShape, supervised: f64, vocab_size: i64) -> PackedBatch {
    let lengths = || shape.lengths.iter().copied();
    let mut random = noise::keyed_stream(3, 0);
    let marks = |tokens: i64| {
        let prompt = tokens - 1 - (tokens as f64 * supervised) as i64;
        (0..tokens).map(move |at| at >= prompt && at + 1 < tokens)
    };
    PackedBatch {
        ids: (0..shape.tokens()).map(|_| (random() % vocab_size as u64) as i64).collect(),
        positions: lengths().flat_map(|tokens| 0..tokens).collect(),
        supervised: lengths().flat_map(marks).collect(),
        lengths: lengths().collect(),
        documents: (0..)
            .zip(lengths())
            .map(|(index, _)| DocumentRef::new(format!("document {index}"), index))
            .collect(),
    }
}

struct Session<'a> {
    draft: &'a dyn DraftModel,
    features: &'a FeatureBatch,
    optimizer: Optimizer<'static>,
    gradients: Vec<Tensor>,
    mixed_precision: bool,
    /// Trained rows of the last step, of all loss terms together.
    rows: f64,
    taken: u64,
    loss: f64,
}

impl<'a> Session<'a> {
    fn new(draft: &'a dyn DraftModel, features: &'a FeatureBatch, mixed_precision: bool) -> Result<Self> {
        let slots = draft.parameters().iter().map(ParameterSlot::from);
        let optimizer = Optimizer::new(slots.collect(), &OptimConfig::default(), ProcessGroup::SINGLE, false)?;
        let gradients = Gradients::zeros(draft.parameters())?;
        let mixed_precision = mixed_precision
            && draft.parameters().first().is_some_and(|first| MixedPrecision::obstacle(&first.value).is_none());
        Ok(Self { draft, features, optimizer, gradients, mixed_precision, rows: 0.0, taken: 0, loss: f64::NAN })
    }

    /// Seconds of forward and backward, and of the optimizer.
    fn step(&mut self) -> Result<[f64; 2]> {
        let device = self.gradients[0].device();
        let start = Instant::now();
        self.gradients.iter_mut().for_each(|gradient| drop(gradient.zero_()));
        let plan = self.draft.plan(&self.features.batch, StepKey { seed: 1, step: self.taken, total: u64::MAX })?;
        let mut gradients = Gradients::new(&mut self.gradients);
        let tally = {
            let _products = MixedPrecision::begin(self.mixed_precision);
            self.draft.accumulate(self.features, &plan, &plan.counts, &mut gradients)?
        };
        self.taken += 1;
        self.rows = plan.counts.iter().sum();
        device::synchronize(device);
        let worked = start.elapsed().as_secs_f64();
        self.optimizer.step(&self.gradients, 1e-4, Some(1.0), &tally.objective)?;
        device::synchronize(device);
        let all = start.elapsed().as_secs_f64();
        self.loss = tally.objective.double_value(&[]);
        Ok([worked, all - worked])
    }
}

/// A product of square matrices that is bound by nothing but arithmetic.
struct Ceiling {
    matrix: Tensor,
}

impl Ceiling {
    fn new(kind: Kind, device: Device) -> Self {
        let size = if device.is_cuda() { 4096 } else { 1024 };
        Self { matrix: Tensor::ones([size, size], (kind, device)) }
    }

    /// Of one product.
    fn operations(&self) -> f64 {
        2.0 * (self.matrix.size()[0] as f64).powi(3)
    }

    /// Of one product.
    fn seconds(&self) -> f64 {
        let start = Instant::now();
        let product = tch::no_grad(|| nn::linear(&self.matrix, &self.matrix, None));
        device::synchronize(product.device());
        start.elapsed().as_secs_f64()
    }
}

/// Time that processors have spent on this process.
fn processor_seconds() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

fn peak_memory(device: Device) -> Option<u64> {
    match device {
        Device::Cuda(index) => shim::cuda_memory(index).ok().map(|memory| memory.peak as u64),
        _ => peak_memory_bytes(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_step_of_every_algorithm_is_timed() {
        for (draft, terms) in [
            (json!({"algorithm": "medusa", "num_heads": 2}), 2),
            (json!({"algorithm": "eagle3", "ttt_steps": 2, "draft_vocab_size": 13, "capture": [1, 2]}), 2),
        ] {
            let options = BenchTrainOptions {
                draft: (draft::algorithm(&draft).unwrap().resolve)(&draft).unwrap(),
                target: TargetInfo::of(16, 40, 4, 64),
                batch: BatchShape::equal(2, 10),
                supervised: 0.5,
                repeat: 3,
                threads: None,
                kind: Kind::Float,
                device: Device::Cpu,
                chunk_bytes: 4 * 40 * 8,
                mixed_precision: true,
            };
            let report = run(&options).unwrap();
            // Five supervised tokens end at the last but one: 4 and 3 rows of a document.
            assert_eq!((report.rows, report.tokens), (2.0 * (4.0 + 3.0), 20), "{terms} terms of {draft}");
            assert!(report.cpu_seconds.len() == 3 && report.cpu_seconds.iter().all(|seconds| *seconds > 0.0));
            assert!(report.operations > 0 && report.operations_per_second > 0.0 && report.ceiling_per_second > 0.0);
            assert!(report.seconds.len() == 3 && report.loss.is_finite() && report.loss > 0.0, "{report:?}");
        }
    }
}
