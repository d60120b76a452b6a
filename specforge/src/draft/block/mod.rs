//! Block drafters: a few layers that read the target's features and draft a whole block of tokens in one pass.
//!
//! One backbone (`backbone`) for all of them, a head between its rows and the tokens (`heads`, one file each), and one
//! registry of losses (`losses`): whatever fits together may be combined. Sources stand in the files of the parts.
//!
//! A step computes the context keys of each document once, all blocks of the batch in one pass behind them, and losses in
//! chunks of whole blocks (`chunk`), so that no logits outlive their chunk. Which blocks are trained is decided before
//! anything is computed (`blocks`).
//!
//! Shape legend: `T` tokens of a packed batch, `P` context rows, `n` blocks, `B` rows of a block, `S` slots, `R = n * B`
//! block rows, `C` supervised slots of a chunk, `H` hidden size, `V` vocabulary of the target, `DV` of the draft.

use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

use super::lift::lift;
use super::objective::DraftVocabulary;
use super::{
    Algorithm, DraftContext, DraftModel, DraftSize, Gradients, Parameter, RowPlan, StepKey, Tally, vocabulary,
};
use crate::data::PackedBatch;
use crate::error::{Error, Result};
use crate::features::FeatureBatch;
use crate::models::TargetInfo;
use crate::nn::{Head, noise};
use crate::vocab::VocabMap;

pub mod backbone;
pub mod blocks;
pub mod chunk;
pub mod config;
pub mod heads;
pub mod losses;
mod samples;

use backbone::Backbone;
use blocks::{BlockPlan, Blocks};
use chunk::{Chunk, Denominator, Whole};
pub use config::{BlockConfig, BlockShape};
use heads::{BlockHead, HeadKind, Start, TensorSpec};

/// The row of the table of algorithms for a head.
pub const fn algorithm(kind: &HeadKind) -> Algorithm {
    Algorithm {
        name: kind.name,
        summary: kind.summary,
        selection_metric: SELECTION_METRIC,
        figures,
        free_on_resume: &[],
        follows_length: |section| {
            BlockConfig::read(section).is_ok_and(|config| (config.kind().follows_length)(&config))
        },
        pictures: false,
        resolve: |section| Ok(json!(BlockConfig::read(section)?)),
        size: |section, target| size(&BlockConfig::read(section)?, target),
        capture: |section, target| {
            let config = BlockConfig::read(section)?;
            Ok(capture(&config, &config.shape(target)?))
        },
        footprint: samples::footprint,
        samples: kind.samples,
        work: samples::work,
        build: |section, context| Ok(Box::new(BlockDraft::new(BlockConfig::read(section)?, context)?)),
    }
}

/// Rows that a chunk has on a processor, whatever memory it may take.
const ROWS_ON_CPU: i64 = 96;

const SELECTION_METRIC: &str = "simulated_acceptance_length";

fn figures(section: &Value) -> Result<Vec<String>> {
    let config = BlockConfig::read(section)?;
    let metrics = (config.kind().metrics)(&config)?;
    Ok([vec!["loss".to_owned(), SELECTION_METRIC.to_owned()], metrics].concat())
}

/// Hidden states a draft reads: those of its context, and the last where the target's predictions are wanted.
fn capture(config: &BlockConfig, shape: &BlockShape) -> Vec<usize> {
    let teacher = config.wants_teacher().then_some(shape.num_target_layers);
    shape.capture().into_iter().chain(teacher).collect()
}

/// All tensors of a draft in creation order: the backbone's, then the head's.
pub fn tensors(config: &BlockConfig, shape: &BlockShape) -> Result<Vec<TensorSpec>> {
    Ok([backbone::tensors(shape), (config.kind().tensors)(config, shape)?].concat())
}

fn size(config: &BlockConfig, target: &TargetInfo) -> Result<DraftSize> {
    let shape = config.shape(target)?;
    let numbers = |spec: &TensorSpec| spec.shape.iter().product::<i64>() as u64;
    let trainable: u64 = tensors(config, &shape)?.iter().map(numbers).sum();
    let head = (shape.draft_vocab_size * shape.hidden_size) as u64;
    // Forward, gradient of the input and of the weights in every row; of the target's head no weights; its own prediction.
    let row_multiply_adds = 3 * trainable + 2 * head + u64::from(config.wants_teacher()) * head;
    let frozen = if shape.draft_vocab_size < shape.vocab_size { head } else { 0 };
    Ok(DraftSize { trainable, frozen, captured: capture(config, &shape).len() as u64, row_multiply_adds })
}

/// A block drafter in training.
pub struct BlockDraft {
    config: BlockConfig,
    shape: BlockShape,
    kind: &'static HeadKind,
    parameters: Vec<Parameter>,
    backbone: Backbone,
    head: Box<dyn BlockHead>,
    metrics: Vec<String>,
    embedding: Tensor,
    /// The target's vocabulary projection, `[V, H]`.
    target_head: Head,
    /// Its rows of the draft's own vocabulary, `[DV, H]`, where that is smaller.
    own_head: Option<Head>,
    map: Option<VocabMap>,
    vocabulary: Option<DraftVocabulary>,
    blocks_per_chunk: i64,
}

impl BlockDraft {
    /// A fresh draft.
    pub fn new(config: BlockConfig, context: &DraftContext<'_>) -> Result<Self> {
        let shape = config.shape(&context.target)?;
        let map = context.vocabulary;
        let mapped = map.map_or(shape.vocab_size, VocabMap::draft_size);
        if mapped != shape.draft_vocab_size || map.is_some_and(|map| map.target_size() != shape.vocab_size) {
            let problem = format!("expected a map of {} tokens, got {mapped}", shape.draft_vocab_size);
            return Err(Error::config("draft.vocab_map", problem));
        }
        let (kind, device) = (context.kind, context.device);
        let embedding = context.embedding.table.f_to_device(device)?.detach();
        let parameters = (0..).zip(tensors(&config, &shape)?).map(|(index, spec)| {
            let value = match spec.name.as_str() {
                // It begins as the target's own row of the mask token.
                backbone::MASK_EMBEDDING => embedding.get(shape.mask_token_id).copy(),
                _ => start(&spec, context.seed, index)?,
            };
            Ok(Parameter::new(spec.name, value.f_to_kind(kind)?.f_to_device(device)?))
        });
        let parameters: Vec<Parameter> = parameters.collect::<Result<_>>()?;
        let find = |name: &str| {
            let found = parameters.iter().find(|parameter| parameter.name == name);
            let value = found.map(|parameter| parameter.value.shallow_clone());
            value.ok_or_else(|| Error::Failed(format!("{}: there is no parameter `{name}`", config.algorithm)))
        };
        let backbone = Backbone::new(&shape, &find, device)?;
        let head = (config.kind().build)(&config, &shape, &find)?;
        let target_head = context.head.to(context.head.kind(), device)?;
        let vocabulary = map.map(|map| DraftVocabulary::new(map, device)).transpose()?;
        let own_head = vocabulary.as_ref().map(|own| target_head.rows(&own.target_ids)).transpose()?;
        let of_block = shape.slots() * slot_bytes(&config, &shape);
        // On a processor a product with the vocabulary of fewer rows reads its matrix for little.
        let least = if device == Device::Cpu { ROWS_ON_CPU / shape.slots() } else { 1 };
        let blocks_per_chunk = (context.chunk_bytes as i64 / of_block).max(least).max(1);
        Ok(Self {
            kind: config.kind(),
            metrics: (config.kind().metrics)(&config)?,
            map: map.cloned(),
            config,
            shape,
            parameters,
            backbone,
            head,
            embedding,
            target_head,
            own_head,
            vocabulary,
            blocks_per_chunk,
        })
    }

    /// What the draft looks like.
    pub fn shape(&self) -> &BlockShape {
        &self.shape
    }

    /// The same draft with so many blocks in a chunk.
    #[must_use]
    pub fn with_blocks_per_chunk(self, blocks_per_chunk: i64) -> Self {
        Self { blocks_per_chunk, ..self }
    }

    /// A plan of these blocks.
    pub fn plan_of(&self, plan: BlockPlan, key: StepKey) -> RowPlan {
        let counts = self.head.counts(&plan.supervised());
        RowPlan::new(counts, Planned { blocks: plan, progress: key.progress() })
    }

    /// Context rows `[P, H]` and block rows `[R, H]` of a batch.
    fn rows(&self, features: &FeatureBatch, blocks: &Blocks) -> Result<(Tensor, Tensor)> {
        let captured = self.shape.target_layer_ids.len();
        let seen: Vec<Tensor> =
            features.hidden[..captured].iter().map(|layer| layer.index_select(0, &blocks.context)).collect(); // [P, H]
        let context = self.backbone.project_features(&seen)?;
        let keys = self.backbone.context_keys(&context, &blocks.context_positions)?;
        let rows = self.backbone.forward(&self.embedding, &blocks.rows, &keys)?;
        Ok((context, rows))
    }

    /// One pass; gradients are added where there is a place for them.
    fn run(
        &self,
        features: &FeatureBatch,
        plan: &RowPlan,
        global_counts: &[f64],
        gradients: Option<&mut Gradients<'_>>,
    ) -> Result<Tally> {
        let planned = plan.own::<Planned>()?;
        let device = features.hidden[0].device();
        let counts = self.head.metric_counts(&planned.blocks.supervised());
        if planned.blocks.blocks.is_empty() {
            let objective = Tensor::zeros([], (Kind::Double, device));
            let sums = Tensor::zeros([counts.len() as i64], (Kind::Double, device));
            return Ok(Tally { objective, sums, counts });
        }
        let blocks = planned.blocks.upload(&self.shape, device)?;
        let (context, rows) = self.rows(features, &blocks)?;
        let last_seen = match self.kind.reads_context {
            true => Some(row_before(&context, &blocks.last_seen)), // [n, H]
            false => None,
        };
        let batch = Batch {
            features,
            blocks: &blocks,
            hidden: rows.detach(),
            context: last_seen.as_ref(),
            planned,
            whole: Whole::default(),
        };
        let denominators = self.denominators(&batch, global_counts)?;
        let lift = match &gradients {
            Some(_) => self.lift(plan, global_counts),
            None => 1.0,
        };
        let mut sums = Sums::new(counts.len(), device);
        match gradients {
            None => {
                let _guard = tch::no_grad_guard();
                self.chunks(&batch, |chunk| sums.add(self.head.loss(chunk)?, &denominators).map(|_| ()))?;
            }
            Some(gradients) => {
                let mut slopes = Slopes::default();
                self.chunks(&batch, |chunk| {
                    let objective = sums.add(self.head.loss(chunk)?, &denominators)?;
                    self.chunk_backward(chunk, &(objective * lift), (lift, gradients), &mut slopes)
                })?;
                self.backward(&rows, last_seen.as_ref(), &slopes, (lift, gradients))?;
                (0..self.parameters.len()).try_for_each(|index| gradients.complete(index))?;
            }
        }
        Ok(Tally { objective: sums.objective, sums: Tensor::stack(&sums.metrics, 0), counts })
    }

    /// What each term is divided by. What only the device knows is summed in a pass of its own.
    fn denominators(&self, batch: &Batch<'_>, global_counts: &[f64]) -> Result<Denominators> {
        let mut measured: Vec<Option<Tensor>> = Vec::new();
        if self.head.measures() {
            let _guard = tch::no_grad_guard();
            batch.whole.measure(true);
            self.chunks(batch, |chunk| {
                let terms = self.head.loss(chunk)?.terms;
                measured.resize_with(terms.len(), || None);
                for (term, total) in terms.into_iter().zip(&mut measured) {
                    if let Denominator::Measured(own) = term.denominator {
                        let own = own.to_kind(Kind::Double);
                        *total = Some(total.take().map_or_else(|| own.shallow_clone(), |total| total + &own));
                    }
                }
                Ok(())
            })?;
            batch.whole.measure(false);
        }
        Ok(Denominators { planned: global_counts.to_vec(), measured })
    }

    /// Calls `with` for one chunk of blocks after the other.
    fn chunks(&self, batch: &Batch<'_>, mut with: impl FnMut(&Chunk<'_>) -> Result<()>) -> Result<()> {
        let Blocks { tokens, before, supervised, teachers, document_shares, .. } = batch.blocks;
        let all = tokens.size()[0];
        let hidden = batch.hidden.view([all, self.shape.block_size, -1]); // [n, B, H]
        let marks = batch.planned.blocks.supervised();
        let mut start = 0;
        while start < all {
            let count = self.blocks_per_chunk.min(all - start);
            let part = |tensor: &Tensor| tensor.narrow(0, start, count);
            // Known on the host: no wait for the device.
            let slots = marks[start as usize..(start + count) as usize].iter().flatten();
            let places: Vec<i64> = (0..).zip(slots).filter(|(_, mark)| **mark).map(|(place, _)| place).collect();
            let places = crate::device::upload(&places, tokens.device())?; // [C]
            let leaf = |tensor: Tensor| tensor.detach().set_requires_grad(true);
            let teacher = match self.config.wants_teacher() {
                true => Some(self.teacher(batch, &part(teachers).flatten(0, 1).index_select(0, &places))?),
                false => None,
            };
            let chunk = Chunk {
                shape: &self.shape,
                hidden: leaf(part(&hidden)),
                context: batch.context.map(|context| leaf(part(context))),
                tokens: part(tokens),
                before: part(before),
                supervised: part(supervised),
                places,
                teacher,
                head: self.own_head.as_ref().unwrap_or(&self.target_head),
                embedding: &self.embedding,
                vocabulary: self.vocabulary.as_ref(),
                document_shares: part(document_shares),
                progress: batch.planned.progress,
                whole: Some(&batch.whole),
            };
            batch.whole.next_chunk();
            with(&chunk)?;
            start += count;
        }
        Ok(())
    }

    /// The target's own logits at rows of the batch, `[C]`, on the draft's vocabulary: `[C, DV]`.
    fn teacher(&self, batch: &Batch<'_>, rows: &Tensor) -> Result<Tensor> {
        let _guard = tch::no_grad_guard();
        let head = self.own_head.as_ref().unwrap_or(&self.target_head);
        let last = batch.features.hidden.last().ok_or_else(|| Error::Failed("no features".to_owned()))?;
        let logits = head.logits(&last.index_select(0, rows).to_kind(head.kind()));
        Ok(if logits.kind() == Kind::Double { logits } else { logits.to_kind(Kind::Float) })
    }

    /// Gradients of a chunk's objective: the head's own are added, those of the backbone's output are kept for its pass.
    fn chunk_backward(
        &self,
        chunk: &Chunk<'_>,
        objective: &Tensor,
        (lift, gradients): (f64, &mut Gradients<'_>),
        slopes: &mut Slopes,
    ) -> Result<()> {
        let first = self.parameters.len() - (self.kind.tensors)(&self.config, &self.shape)?.len();
        let mut inputs: Vec<&Tensor> = vec![&chunk.hidden];
        inputs.extend(&chunk.context);
        let leaves = inputs.len();
        inputs.extend(self.parameters[first..].iter().map(|parameter| &parameter.value));
        if !objective.requires_grad() {
            slopes.hidden.push(chunk.hidden.zeros_like());
            slopes.context.extend(chunk.context.as_ref().map(Tensor::zeros_like));
            return Ok(());
        }
        let mut fresh = Tensor::f_run_backward(&[objective], &inputs, false, false)?;
        for (index, gradient) in (first..).zip(fresh.split_off(leaves)).filter(|(_, gradient)| gradient.defined()) {
            gradients.add(index, &gradient, lift)?;
        }
        let mut fresh = fresh.into_iter();
        let defined = |gradient: Option<Tensor>, leaf: &Tensor| {
            gradient.filter(Tensor::defined).unwrap_or_else(|| leaf.zeros_like())
        };
        slopes.hidden.push(defined(fresh.next(), &chunk.hidden));
        if let Some(context) = &chunk.context {
            slopes.context.push(defined(fresh.next(), context));
        }
        Ok(())
    }

    /// Gradients of the backbone, from those of its output, which are `lift` times as large as they should be.
    fn backward(
        &self,
        rows: &Tensor,
        last_seen: Option<&Tensor>,
        slopes: &Slopes,
        (lift, gradients): (f64, &mut Gradients<'_>),
    ) -> Result<()> {
        let inputs: Vec<&Tensor> = self.parameters.iter().map(|parameter| &parameter.value).collect();
        // The chunks' gradients enter the graph of the backbone through these products.
        let product = |rows: &Tensor, slopes: &[Tensor]| {
            let slopes = Tensor::cat(slopes, 0).view_as(rows);
            (rows * &slopes).sum(rows.kind())
        };
        let mut surrogate = product(rows, &slopes.hidden);
        if let Some(last_seen) = last_seen {
            surrogate += product(last_seen, &slopes.context);
        }
        let fresh = Tensor::f_run_backward(&[surrogate], &inputs, false, false)?;
        for (index, gradient) in fresh.into_iter().enumerate().filter(|(_, gradient)| gradient.defined()) {
            gradients.add(index, &gradient, lift)?;
        }
        Ok(())
    }

    /// See `draft::lift`.
    fn lift(&self, plan: &RowPlan, global_counts: &[f64]) -> f64 {
        let factors = global_counts.iter().map(|count| 1.0 / count.max(f64::MIN_POSITIVE));
        let terms = factors.zip(&plan.counts).map(|(factor, own)| (factor, own.ceil() as usize));
        lift(self.parameters[0].value.kind(), terms)
    }
}

/// Memory of a slot's losses: logits, of target and draft, and a few more of their size for losses and gradients, which are
/// fewer where one token is all that a row learns.
fn slot_bytes(config: &BlockConfig, shape: &BlockShape) -> i64 {
    4 * match config.wants_teacher() {
        true => shape.vocab_size + 6 * shape.draft_vocab_size,
        false => 4 * shape.draft_vocab_size,
    }
}

/// What a plan holds.
struct Planned {
    blocks: BlockPlan,
    /// How much of the run is over.
    progress: f64,
}

/// A batch behind its backbone.
struct Batch<'a> {
    features: &'a FeatureBatch,
    blocks: &'a Blocks,
    /// `[R, H]` without a graph.
    hidden: Tensor,
    /// `[n, H]`
    context: Option<&'a Tensor>,
    planned: &'a Planned,
    whole: Whole,
}

/// What terms are divided by.
struct Denominators {
    planned: Vec<f64>,
    measured: Vec<Option<Tensor>>,
}

/// Gradients of what chunks read, in their order.
#[derive(Default)]
struct Slopes {
    hidden: Vec<Tensor>,
    context: Vec<Tensor>,
}

/// Sums over the chunks of a batch.
struct Sums {
    objective: Tensor,
    metrics: Vec<Tensor>,
}

impl Sums {
    fn new(metrics: usize, device: Device) -> Self {
        let zero = || Tensor::zeros([], (Kind::Double, device));
        Self { objective: zero(), metrics: (0..metrics).map(|_| zero()).collect() }
    }

    /// Adds a chunk's, and returns its share of the objective, with its graph.
    fn add(&mut self, loss: chunk::ChunkLoss, denominators: &Denominators) -> Result<Tensor> {
        let mut objective: Option<Tensor> = None;
        for (index, term) in loss.terms.into_iter().enumerate() {
            let share = match term.denominator {
                Denominator::Planned(count) => {
                    let count = denominators.planned.get(count).copied().unwrap_or_default();
                    term.sum * (term.factor / count.max(f64::MIN_POSITIVE))
                }
                Denominator::Measured(own) => {
                    let total = denominators.measured.get(index).and_then(Option::as_ref).unwrap_or(&own);
                    let inverse = total.to_kind(term.sum.kind()).clamp_min(f64::from(f32::MIN_POSITIVE)).reciprocal();
                    term.sum * inverse * term.factor
                }
            };
            objective = Some(objective.map_or_else(|| share.shallow_clone(), |sum| sum + &share));
        }
        let objective = objective.ok_or_else(|| Error::Failed("a head without a loss".to_owned()))?;
        self.objective += objective.detach().to_kind(Kind::Double);
        for (total, own) in self.metrics.iter_mut().zip(&loss.metrics) {
            *total += own;
        }
        Ok(objective)
    }
}

/// Rows `[P, H]` at `places [n]`, zero where a place is `P`.
fn row_before(context: &Tensor, places: &Tensor) -> Tensor {
    let nothing = Tensor::zeros([1, context.size()[1]], (context.kind(), context.device()));
    Tensor::cat(&[context, &nothing], 0).index_select(0, places)
}

/// What a tensor begins as, in float32.
fn start(spec: &TensorSpec, seed: u64, index: u64) -> Result<Tensor> {
    let options = (Kind::Float, Device::Cpu);
    Ok(match spec.start {
        Start::Ones => Tensor::f_ones(&spec.shape, options)?,
        Start::Zeros => Tensor::f_zeros(&spec.shape, options)?,
        Start::Normal(deviation) => noise::normal(&spec.shape, deviation, seed, index),
        Start::Xavier => {
            let deviation = (2.0 / (spec.shape[0] + spec.shape[1]) as f64).sqrt();
            noise::normal(&spec.shape, deviation, seed, index)
        }
        Start::FirstTap => {
            let kernel = Tensor::f_zeros(&spec.shape, options)?;
            let _ = kernel.select(1, 0).f_fill_(1.0)?;
            kernel
        }
    })
}

impl DraftModel for BlockDraft {
    fn algorithm(&self) -> &'static Algorithm {
        super::TABLE.find(self.kind.name).expect("every head has a row in the table of algorithms")
    }

    fn capture(&self) -> Vec<usize> {
        capture(&self.config, &self.shape)
    }

    fn parameters(&self) -> &[Parameter] {
        &self.parameters
    }

    fn metrics(&self) -> Vec<String> {
        self.metrics.clone()
    }

    fn summary(&self, averages: &[f64]) -> Vec<(String, f64)> {
        let length = heads::metrics::simulated_acceptance_length(&self.shape, averages);
        vec![(SELECTION_METRIC.to_owned(), length)]
    }

    fn plan(&self, batch: &PackedBatch, key: StepKey) -> Result<RowPlan> {
        let mut plan = BlockPlan::pick(batch, &self.shape, self.config.mask, self.config.num_anchors, key);
        if let Some(map) = self.map.as_ref().filter(|_| self.config.labels == losses::Labels::Data) {
            plan.keep_nameable(map, self.config.mask);
        }
        Ok(self.plan_of(plan, key))
    }

    fn accumulate(
        &self,
        features: &FeatureBatch,
        plan: &RowPlan,
        global_counts: &[f64],
        gradients: &mut Gradients<'_>,
    ) -> Result<Tally> {
        self.run(features, plan, global_counts, Some(gradients))
    }

    fn evaluate(&self, features: &FeatureBatch, plan: &RowPlan, global_counts: &[f64]) -> Result<Tally> {
        let _guard = tch::no_grad_guard();
        self.run(features, plan, global_counts, None)
    }

    fn description(&self) -> Value {
        json!({"draft": self.config, "shape": self.shape})
    }

    fn buffers(&self) -> Vec<(String, Tensor)> {
        self.map.as_ref().map_or_else(Vec::new, vocabulary::buffers)
    }

    fn check_length(&self, longest: i64) -> Result<()> {
        let limit = self.shape.layer.rope.max_position_embeddings;
        match longest <= limit {
            true => Ok(()),
            false => Err(Error::config(
                "data.max_length",
                format!("a document has {longest} tokens, the target's `max_position_embeddings` is {limit}"),
            )),
        }
    }

    fn contract(&self) -> Vec<String> {
        config::contract(&self.config, &self.shape)
    }
}
