//! P-EAGLE: EAGLE-3's layers, which draft all tokens of a round in one pass.
//!
//! 2026, <https://arxiv.org/abs/2602.01469>; references vllm-project/speculators 0.9.0 (`models/peagle`) and
//! sgl-project/SpecForge 0.2.0 (`algorithms/peagle`). Behind the row of the last known token stand rows that read a mask
//! token and a learned feature (`mask_hidden`) in place of what is not known yet; row `d` of them predicts `d` tokens
//! further. In training every token may be such an anchor, and rows are sampled ([`rows`]).
//!
//! Different from the references by default: a batch packs any number of documents; rows are trained exactly where decoding
//! uses them (`supervision`), so that all tokens of a chain are supervised and none is beyond its document; the loss is
//! divided by the trained rows of the whole optimizer step; the vocabulary projection is trained, and begins as the
//! target's. Padding is not computed, and no logits outlive their chunk (`draft::distillation`).
//!
//! Shape legend: `T` tokens of a packed batch, `M` trained rows, `H` hidden size, `TH` the target's, `V` vocabulary, `DV`
//! draft vocabulary.

use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

use super::distillation::{self, DraftVocabulary, Order, RowOutcomes, Soft, Teacher, TeacherMemory};
use super::eagle3::HeadStart;
use super::lift::lift;
use super::loss::{Projection, Rows};
use super::losses::Labels;
use super::{
    Algorithm, DraftContext, DraftModel, DraftSize, Footprint, Gradients, Parameter, RowPlan, StepKey, Tally,
    vocabulary,
};
use crate::data::PackedBatch;
use crate::error::{Error, Result};
use crate::features::FeatureBatch;
use crate::models::TargetInfo;
use crate::nn::{Head, noise};

pub mod config;
mod loss;
pub mod network;
pub mod rows;
mod samples;

use config::{EMBEDDING, MASK_HIDDEN};
pub use config::{PeagleConfig, PeagleShape, RowCount};
pub use loss::PeagleLoss;
use network::PeagleNetwork;
use rows::{ChainPlan, Chains, Layout, Row, Shape};

/// Row of the table of algorithms.
pub const ALGORITHM: Algorithm = Algorithm {
    name: "peagle",
    summary: "EAGLE-3's layers that draft all tokens of a round in one pass (P-EAGLE, 2026)",
    selection_metric: "simulated_acceptance_length",
    figures,
    free_on_resume: &[],
    follows_length: |_| false,
    pictures: false,
    resolve: |section| Ok(json!(PeagleConfig::read(section)?)),
    size: |section, target| size(&PeagleConfig::read(section)?, target),
    capture: |section, target| Ok(capture(&PeagleConfig::read(section)?.shape(target)?)),
    footprint: |_, _, _| Ok(Footprint::default()),
    samples: samples::samples,
    work: samples::work,
    build: |section, context| Ok(Box::new(Peagle::new(PeagleConfig::read(section)?, context)?)),
};

/// Deviation of random initial values, as Hugging Face's `initializer_range`.
const DEVIATION: f64 = 0.02;
/// That of the mask's features, as in the references: about a feature's own size.
const MASK_DEVIATION: f64 = 1.0;

/// Averages kept for every depth.
const METRICS: [&str; 5] = ["loss", "accuracy", "acceptance", "coverage", "chain"];

fn figures(section: &Value) -> Result<Vec<String>> {
    Ok(ALGORITHM.figures_with(metric_names(&PeagleConfig::read(section)?)))
}

fn metric_names(config: &PeagleConfig) -> Vec<String> {
    (0..config.num_depths).flat_map(|depth| METRICS.map(|metric| format!("depth{depth}/{metric}"))).collect()
}

/// A P-EAGLE draft in training.
pub struct Peagle {
    config: PeagleConfig,
    shape: PeagleShape,
    parameters: Vec<Parameter>,
    network: PeagleNetwork,
    target: TargetInfo,
    /// The target's head, whose matrix is `[V, TH]`.
    target_head: Head,
    vocabulary: Option<DraftVocabulary>,
    /// What the target's whole vocabulary says of documents that were met.
    memory: Option<TeacherMemory>,
    buffers: Vec<(String, Tensor)>,
    positions_per_chunk: i64,
    layout: Layout,
}

impl Peagle {
    /// A fresh draft.
    pub fn new(config: PeagleConfig, context: &DraftContext<'_>) -> Result<Self> {
        let shape = config.shape(&context.target)?;
        let size = &shape.network;
        let map = context.vocabulary;
        let mapped = map.map_or(size.vocab_size, |map| map.draft_size());
        if mapped != size.draft_vocab_size || map.is_some_and(|map| map.target_size() != size.vocab_size) {
            let problem = format!("expected a map of {} tokens, got {mapped}", size.draft_vocab_size);
            return Err(Error::config("draft.vocab_map", problem));
        }
        let (kind, device) = (context.kind, context.device);
        let same_width = size.hidden_size == size.target_hidden_size;
        let mut parameters = Vec::new();
        for (index, (name, tensor_shape)) in shape.tensors().into_iter().enumerate() {
            let from_target = config.lm_head == HeadStart::Target && same_width;
            let random = |deviation: f64| noise::normal(&tensor_shape, deviation, context.seed, index as u64);
            let value = match name.as_str() {
                "lm_head.weight" if from_target => {
                    let rows =
                        map.map_or_else(|| Ok(context.head.share()), |map| vocabulary::gather_rows(context.head, map))?;
                    rows.start()
                }
                EMBEDDING if same_width => context.embedding.table.detach().copy(),
                MASK_HIDDEN => random(MASK_DEVIATION),
                _ if tensor_shape.len() == 1 => Tensor::f_ones(&tensor_shape, (kind, device))?,
                _ => random(DEVIATION),
            };
            parameters.push(Parameter::new(name, value.f_to_device(device)?.f_to_kind(kind)?));
        }
        let network = PeagleNetwork::new(&shape, &parameters, device)?;
        let buffers = map.map_or_else(Vec::new, vocabulary::buffers);
        let vocabulary = map.map(|map| DraftVocabulary::new(map, device)).transpose()?;
        let target_head = context.head.to(context.head.kind(), device)?;
        let of_whole = distillation::positions_per_chunk(context.chunk_bytes, 0, size.vocab_size, 0);
        let memory = match config.loss.compiled(vocabulary.is_some()) {
            Some(_) => TeacherMemory::new(&target_head, vocabulary.as_ref(), kind, of_whole)?,
            None => None,
        };
        let (bytes, depths) = (context.chunk_bytes, config.num_depths);
        let positions_per_chunk = config.loss.positions_per_chunk(bytes, depths, size, memory.is_some());
        let target = context.target.clone();
        let layout = Layout::of(device);
        Ok(Self {
            config,
            shape,
            parameters,
            network,
            target,
            target_head,
            vocabulary,
            memory,
            buffers,
            positions_per_chunk,
            layout,
        })
    }

    /// The network, for looking at single rows.
    pub fn network(&self) -> &PeagleNetwork {
        &self.network
    }

    /// The same draft with rows in another order: for tests, which have no device that asks for it.
    #[must_use]
    pub fn with_layout(mut self, layout: Layout) -> Self {
        self.layout = layout;
        self
    }

    /// A plan of given rows, in place of drawn ones.
    pub fn plan_of_rows(&self, batch: &PackedBatch, rows: &[Row]) -> Result<RowPlan> {
        Ok(Self::counted(ChainPlan::of_rows(batch, rows, self.config.num_depths, self.rows_shape())?))
    }

    fn rows_shape(&self) -> Shape<'_> {
        Shape { windows: &self.shape.windows, layout: self.layout }
    }

    fn counted(plan: ChainPlan) -> RowPlan {
        RowPlan::new(vec![plan.trained.iter().sum::<usize>() as f64], plan)
    }

    /// Outputs of the trained rows of a plan, `[M, H]`, by depth and anchor; for looking at single rows.
    pub fn outputs(&self, features: &FeatureBatch, plan: &RowPlan) -> Result<Tensor> {
        let _guard = tch::no_grad_guard();
        let (last, captured) = split(features)?;
        self.network.backbone(&plan.own::<ChainPlan>()?.upload(last.device())?, captured)
    }

    /// One pass; gradients are added where there is a buffer for them.
    fn run(
        &self,
        features: &FeatureBatch,
        plan: &RowPlan,
        global_counts: &[f64],
        gradients: Option<&mut Gradients<'_>>,
    ) -> Result<Tally> {
        let (last, captured) = split(features)?;
        let plan = plan.own::<ChainPlan>()?.upload(last.device())?;
        let output = self.network.normed(&self.network.backbone(&plan, captured)?); // [M, H]
        let rows = output.detach();
        // Where a document ends, a row is compared with the prediction from nothing: logits of zero.
        let past_the_end = Tensor::zeros([1, last.size()[1]], (last.kind(), last.device()));
        let states = Tensor::cat(&[last, &past_the_end], 0).to_kind(self.target_head.kind()); // [T + 1, TH]
        let teacher = Teacher { hidden: &states, head: &self.target_head, vocabulary: self.vocabulary.as_ref() };
        let order = Order::new(&plan.teachers, last.device())?;
        let factor = global_counts.first().map_or(1.0, |count| count.max(1.0).recip());
        let remembered = match &self.memory {
            Some(memory) => Some(memory.recall(features, &order, &teacher)?),
            None => None,
        };
        let targets = Soft { order: &order, teacher: &teacher, remembered: remembered.as_ref() };
        let tokens = self.tokens(&features.batch, &plan, last.device())?;
        let tokens = tokens.as_ref();
        let weights = self.row_weights(&rows, targets, tokens, factor)?; // [M]
        let scored = Rows { input: &rows, targets, weights: Some(&weights) };
        let outcomes = match gradients {
            Some(gradients) => {
                let most = match self.config.normalisation {
                    RowCount::TrainedRows => factor,
                    RowCount::CoveredRows => 1.0 / plan.teachers.len().max(1) as f64,
                };
                let kind = self.parameters[0].value.kind();
                let lift = lift(kind, std::iter::once((most, plan.teachers.len())));
                // The head is the last parameter; its gradient is made with the loss.
                let head = self.parameters.len() - 1;
                let mut projection = Projection { head: self.network.head(), gradient: Some(gradients.total(head)) };
                let outcomes = self.score(scored, tokens, &mut projection, Some(lift))?;
                gradients.complete(head)?;
                drop(rows);
                if let Some(slopes) = outcomes.input_gradient.as_ref().filter(|slopes| slopes.numel() > 0) {
                    let body = &self.parameters[..head];
                    let inputs: Vec<&Tensor> = body.iter().map(|parameter| &parameter.value).collect();
                    // The chunked gradient enters the graph of the network through this product.
                    let surrogate = (output * slopes).sum(slopes.kind());
                    let fresh = Tensor::f_run_backward(&[surrogate], &inputs, false, false)?;
                    // Without rows behind an anchor the mask has no gradient.
                    for (index, gradient) in fresh.into_iter().enumerate().filter(|(_, fresh)| fresh.defined()) {
                        gradients.add(index, &gradient, lift)?;
                    }
                }
                (0..head).try_for_each(|index| gradients.complete(index))?;
                outcomes
            }
            None => self.values(scored, tokens)?,
        };
        Ok(self.tally(&plan, &outcomes, last))
    }

    /// Outcomes of all rows without gradients.
    fn values(&self, rows: Rows<'_, Soft<'_>>, tokens: Option<&Tensor>) -> Result<RowOutcomes> {
        self.score(rows, tokens, &mut Projection { head: self.network.head(), gradient: None }, None)
    }

    fn score(
        &self,
        rows: Rows<'_, Soft<'_>>,
        tokens: Option<&Tensor>,
        projection: &mut Projection<'_>,
        lift: Option<f64>,
    ) -> Result<RowOutcomes> {
        loss::score(
            (&self.config.loss, (self.config.lk_scale, self.config.lk_decay)),
            self.positions_per_chunk,
            rows,
            tokens,
            projection,
            lift,
        )
    }

    /// `[M]` the text's own tokens, where the loss asks for them: those behind the positions that rows learn from.
    fn tokens(&self, batch: &PackedBatch, plan: &Chains, device: Device) -> Result<Option<Tensor>> {
        let behind = |position: &i64| batch.ids.get(*position as usize + 1).copied().unwrap_or_default();
        let tokens = || plan.teachers.iter().map(behind).collect::<Vec<_>>();
        (self.config.labels == Labels::Data).then(|| crate::device::upload(&tokens(), device)).transpose()
    }

    /// Factor of each row's loss, `[M]`. How many rows have a loss is known after a pass over all of them.
    fn row_weights(&self, rows: &Tensor, targets: Soft<'_>, tokens: Option<&Tensor>, factor: f64) -> Result<Tensor> {
        let kind = if rows.kind() == Kind::Double { Kind::Double } else { Kind::Float };
        let count = rows.size()[0];
        Ok(match self.config.normalisation {
            RowCount::TrainedRows => Tensor::f_full([count], factor, (kind, rows.device()))?,
            RowCount::CoveredRows => {
                let outcomes = self.values(Rows { input: rows, targets, weights: None }, tokens)?;
                let covered = outcomes.covered.to_kind(kind).sum(kind).clamp_min(1.0);
                covered.reciprocal().f_expand([count], false)?.f_contiguous()?
            }
        })
    }

    /// Sums of every depth's metrics.
    fn tally(&self, plan: &Chains, outcomes: &RowOutcomes, last: &Tensor) -> Tally {
        let (mut sums, mut counts) = (Vec::new(), Vec::new());
        // Whether the rows of an anchor were right so far.
        let mut chain = Tensor::ones([last.size()[0]], (Kind::Bool, last.device()));
        let mut start = 0;
        for &trained in &plan.trained {
            let length = trained as i64;
            let part = |values: &Tensor| values.narrow(0, start, length);
            let (hits, anchors) = (part(&outcomes.hits), part(&plan.anchors));
            let chained = chain.index_select(0, &anchors).logical_and(&hits);
            chain = chain.zeros_like().index_copy(0, &anchors, &chained);
            let values = [part(&outcomes.losses), hits, part(&outcomes.acceptance), part(&outcomes.covered), chained];
            sums.extend(values.map(|values| values.sum(Kind::Double)));
            counts.extend([length as f64; METRICS.len()]);
            start += length;
        }
        let objective = outcomes.objective.shallow_clone();
        Tally { objective, sums: Tensor::stack(&sums, 0), counts }
    }
}

/// The target's last states, and those that were captured before.
fn split(features: &FeatureBatch) -> Result<(&Tensor, &[Tensor])> {
    features.hidden.split_last().ok_or_else(|| Error::Failed("no features".to_owned()))
}

impl DraftModel for Peagle {
    fn algorithm(&self) -> &'static Algorithm {
        &ALGORITHM
    }

    fn capture(&self) -> Vec<usize> {
        capture(&self.shape)
    }

    fn parameters(&self) -> &[Parameter] {
        &self.parameters
    }

    fn metrics(&self) -> Vec<String> {
        metric_names(&self.config)
    }

    fn summary(&self, averages: &[f64]) -> Vec<(String, f64)> {
        let chains = averages.chunks(METRICS.len()).map(|depth| depth[4]);
        vec![(ALGORITHM.selection_metric.to_owned(), 1.0 + chains.sum::<f64>())]
    }

    fn plan(&self, batch: &PackedBatch, key: StepKey) -> Result<RowPlan> {
        Ok(Self::counted(ChainPlan::sampled(batch, key, &self.config, self.rows_shape())?))
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
        self.buffers.iter().map(|(name, value)| (name.clone(), value.shallow_clone())).collect()
    }

    fn check_length(&self, longest: i64) -> Result<()> {
        let limit = self.shape.network.max_position_embeddings;
        if longest <= limit {
            return Ok(());
        }
        let problem = format!("a document has {longest} tokens, `max_position_embeddings` of the draft is {limit}");
        Err(Error::config("draft.config", problem)
            .with_hint(format!("raise it (engines size their rotary tables by it), or set data.max_length to {limit}")))
    }

    fn contract(&self) -> Vec<String> {
        config::contract(&self.config, &self.shape, &self.target)
    }
}

/// Hidden states a draft of this shape reads: its captured layers, and the last for the teacher.
fn capture(shape: &PeagleShape) -> Vec<usize> {
    shape.network.capture.iter().copied().chain([shape.network.num_target_layers]).collect()
}

fn size(config: &PeagleConfig, target: &TargetInfo) -> Result<DraftSize> {
    let shape = config.shape(target)?;
    let parameters = |(_, shape): &(String, Vec<i64>)| shape.iter().product::<i64>() as u64;
    let tensors = shape.tensors();
    let trainable = tensors.iter().map(parameters).sum::<u64>();
    let embedding = tensors.iter().filter(|(name, _)| name == EMBEDDING).map(parameters).sum::<u64>();
    // Forward, gradient of the input, gradient of the weight, for every sampled depth; and the teacher's head once.
    let depths: f64 = (0..config.num_depths).map(|depth| config.ratio(depth)).sum();
    let teacher = (shape.network.vocab_size * shape.network.target_hidden_size) as u64;
    let row_multiply_adds = (3.0 * depths * (trainable - embedding) as f64) as u64 + teacher;
    Ok(DraftSize { trainable, frozen: 0, captured: capture(&shape).len() as u64, row_multiply_adds })
}
