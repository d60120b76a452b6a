//! Medusa: several heads that each predict one further token from the target's last hidden state.
//!
//! Cai et al. 2024, <https://arxiv.org/abs/2401.10774>; reference FasterDecoding/Medusa `e2a5d20`
//! (`medusa/model/medusa_model.py`, `medusa/train/train_legacy.py`). Head `k` (from 0) is `L` residual blocks
//! `x + SiLU(W x + b)` and a vocabulary projection, and predicts token `t + 2 + k` from the normed hidden state of
//! token `t`; the target's own head predicts `t + 1`.
//!
//! Different from the reference: blocks start as the exact identity (`b` = 0 too), blocks of a head are separate
//! parameters unless `share_layers` asks for the reference's tied ones, and only supervised rows are computed.
//!
//! Heads may have a smaller vocabulary than the target. Projections are then the target's rows of its tokens (own ones
//! start there, the shared one stays there), rows whose label is outside carry no loss, and count as misses: all averages
//! are still over all trained rows.
//!
//! Shape legend: `T` tokens of a packed batch, `R` trained rows of a head, `H` hidden size, `V` vocabulary of the target,
//! `DV` of the heads, which is `V` without a map.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tch::{Kind, Tensor};

use super::lift::lift;
use super::loss::{self, Hard, Projection, RowLosses, Rows, Scale};
use super::supervision::{MaskAlignment, TrainedRows, rows, trained_rows};
use super::{
    Algorithm, DraftContext, DraftModel, DraftSize, Footprint, Gradients, Parameter, RowPlan, StepKey, Tally,
    vocabulary,
};
use crate::data::PackedBatch;
use crate::device;
use crate::error::{Error, Result};
use crate::features::FeatureBatch;
use crate::models::TargetInfo;
use crate::nn::{Head, linear};
use crate::strict;
use crate::vocab::VocabMap;

mod samples;

/// Row of the table of algorithms.
pub const ALGORITHM: Algorithm = Algorithm {
    name: "medusa",
    summary: "several heads on the target's last hidden state (Cai et al. 2024)",
    selection_metric: "simulated_acceptance_length",
    figures,
    free_on_resume: &[],
    follows_length: |_| false,
    pictures: false,
    resolve: |section| Ok(json!(MedusaConfig::read(section)?)),
    size: |section, target| {
        let draft_vocabulary = vocabulary::draft_size(section, target.vocab_size)?;
        Ok(MedusaConfig::read(section)?.size(target, draft_vocabulary))
    },
    capture: |_, target| Ok(vec![target.num_layers()]),
    footprint: |_, _, _| Ok(Footprint::default()),
    samples: samples::samples,
    work: samples::work,
    build: |section, context| Ok(Box::new(Medusa::new(MedusaConfig::read(section)?, context)?)),
};

/// Where a head's vocabulary projection comes from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HeadProjection {
    /// A trained matrix of its own, started from the target's head ("v1" of the reference): from its matrix times its
    /// scale. What else the target's head does is not its own.
    ///
    #[default]
    Own,
    /// The target's head, frozen ("version 2" of the reference).
    Shared,
}

/// The `draft` section of a Medusa configuration.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MedusaConfig {
    /// "medusa"
    pub algorithm: String,
    /// `K`, number of heads.
    pub num_heads: usize,
    /// `L`, residual blocks of a head.
    pub num_layers: usize,
    /// Own or shared vocabulary projections.
    pub projection: HeadProjection,
    /// One set of block weights used `L` times, as the reference does it.
    pub share_layers: bool,
    /// Weight of head `k` is `loss_decay^k`, unless `loss_weights` lists them.
    pub loss_decay: f64,
    /// One weight for each head. All ones is the reference's plain sum.
    pub loss_weights: Option<Vec<f64>>,
    /// Which rows are trained.
    pub mask: MaskAlignment,
    /// Folder of published heads to start from.
    pub init_from: Option<PathBuf>,
    /// File of the heads' own vocabulary.
    pub vocab_map: Option<PathBuf>,
    /// `DV`
    pub draft_vocab_size: Option<i64>,
}

impl Default for MedusaConfig {
    fn default() -> Self {
        Self {
            algorithm: ALGORITHM.name.to_owned(),
            num_heads: 3,
            num_layers: 1,
            projection: HeadProjection::Own,
            share_layers: false,
            loss_decay: 0.8,
            loss_weights: None,
            mask: MaskAlignment::Exact,
            init_from: None,
            vocab_map: None,
            draft_vocab_size: None,
        }
    }
}

impl MedusaConfig {
    /// Reads and checks a `draft` section.
    pub fn read(section: &Value) -> Result<Self> {
        let config: Self = strict::from_value(section, "draft")?;
        let range = |key: &str, value: usize| match value {
            1..=32 => Ok(()),
            _ => Err(Error::config(format!("draft.{key}"), format!("expected 1 to 32, got {value}"))),
        };
        range("num_heads", config.num_heads)?;
        range("num_layers", config.num_layers)?;
        if !matches!(config.mask, MaskAlignment::Exact | MaskAlignment::Label) {
            return Err(Error::config("draft.mask", "expected exact or label"));
        }
        if !config.loss_decay.is_finite() || config.loss_decay <= 0.0 {
            let problem = format!("expected a positive number, got {}", config.loss_decay);
            return Err(Error::config("draft.loss_decay", problem));
        }
        if let Some(weights) = &config.loss_weights {
            let sound =
                weights.len() == config.num_heads && weights.iter().all(|weight| weight.is_finite() && *weight >= 0.0);
            if !sound {
                let problem = format!("expected {} numbers, none negative, got {weights:?}", config.num_heads);
                return Err(Error::config("draft.loss_weights", problem));
            }
        }
        Ok(config)
    }

    /// Weight of each head in the objective.
    pub fn weights(&self) -> Vec<f64> {
        let decayed = || (0..self.num_heads as i32).map(|head| self.loss_decay.powi(head)).collect();
        self.loss_weights.clone().unwrap_or_else(decayed)
    }

    /// Parameters of one head in creation order, with shapes: blocks, then the projection if it is the head's own.
    /// Names are those of the reference's `medusa_lm_head` files.
    pub fn head_tensors(&self, head: usize, hidden: i64, vocabulary: i64) -> Vec<(String, Vec<i64>)> {
        let distinct = if self.share_layers { 1 } else { self.num_layers };
        let mut tensors = Vec::new();
        for layer in 0..distinct {
            tensors.push((format!("{head}.{layer}.linear.weight"), vec![hidden, hidden]));
            tensors.push((format!("{head}.{layer}.linear.bias"), vec![hidden]));
        }
        if self.projection == HeadProjection::Own {
            tensors.push((format!("{head}.{}.weight", self.num_layers), vec![vocabulary, hidden]));
        }
        tensors
    }

    fn size(&self, target: &TargetInfo, vocabulary: i64) -> DraftSize {
        let hidden = target.hidden_size;
        let shapes = (0..self.num_heads).flat_map(|head| self.head_tensors(head, hidden, vocabulary));
        let trainable = shapes.map(|(_, shape)| shape.iter().product::<i64>() as u64).sum();
        let is_shared = self.projection == HeadProjection::Shared;
        // The target's rows of a smaller vocabulary are a copy.
        let frozen = if is_shared && vocabulary < target.vocab_size { (vocabulary * hidden) as u64 } else { 0 };
        // Forward, gradient of the input, gradient of the weight; a frozen projection skips the last.
        let passes = if is_shared { 2 } else { 3 };
        let one_head = 3 * self.num_layers as i64 * hidden * hidden + passes * vocabulary * hidden;
        let row_multiply_adds = self.num_heads as u64 * one_head as u64;
        DraftSize { trainable, frozen, captured: 1, row_multiply_adds }
    }
}

/// Medusa heads in training.
pub struct Medusa {
    config: MedusaConfig,
    target: TargetInfo,
    vocabulary: Option<VocabMap>,
    /// The target's projection onto the heads' vocabulary.
    head: Head,
    parameters: Vec<Parameter>,
    rows_per_chunk: i64,
}

impl Medusa {
    /// Fresh heads: blocks are the identity, projections copies of the target's head.
    pub fn new(config: MedusaConfig, context: &DraftContext<'_>) -> Result<Self> {
        let hidden_size = context.target.hidden_size;
        let options = (context.kind, context.device);
        let head = context.head.to(context.kind, context.device)?;
        let head = match context.vocabulary {
            Some(map) => vocabulary::gather_rows(&head, map)?,
            None => head,
        };
        let vocab_size = head.vocab_size();
        let mut parameters = Vec::new();
        for number in 0..config.num_heads {
            for (name, shape) in config.head_tensors(number, hidden_size, vocab_size) {
                let value = if shape == [vocab_size, hidden_size] && !name.contains("linear") {
                    head.start()
                } else {
                    Tensor::f_zeros(&shape, options)?
                };
                parameters.push(Parameter::new(name, value));
            }
        }
        let (target, vocabulary) = (context.target.clone(), context.vocabulary.cloned());
        let rows_per_chunk = loss::chunk_rows(context.chunk_bytes, vocab_size);
        Ok(Self { config, target, vocabulary, head, parameters, rows_per_chunk })
    }

    fn parameters_per_head(&self) -> usize {
        self.parameters.len() / self.config.num_heads
    }

    /// The trained values of one head: its blocks as (weight, bias), and its own projection if it has one.
    fn head_parameters(&self, head: usize) -> (Vec<(&Tensor, &Tensor)>, Option<&Tensor>) {
        let count = self.parameters_per_head();
        let values = &self.parameters[head * count..(head + 1) * count];
        let (blocks, projection) = values.split_at(count / 2 * 2);
        let distinct: Vec<_> = blocks.chunks(2).map(|pair| (&pair[0].value, &pair[1].value)).collect();
        let layers = (0..self.config.num_layers).map(|layer| distinct[layer.min(distinct.len() - 1)]).collect();
        (layers, projection.first().map(|parameter| &parameter.value))
    }

    /// Residual blocks of one head on rows `[R, H]`.
    pub fn backbone(&self, head: usize, rows: &Tensor) -> Tensor {
        let (blocks, _) = self.head_parameters(head);
        blocks.iter().fold(rows.shallow_clone(), |x, (weight, bias)| &x + linear(&x, weight, Some(*bias)).silu()) // [R, H]
    }

    /// Logits of one head on rows `[R, H]`: `[R, DV]`, by draft id.
    pub fn compute_logits(&self, head: usize, rows: &Tensor) -> Tensor {
        self.projection(head).logits(&self.backbone(head, rows))
    }

    /// The vocabulary projection of one head: its own matrix and nothing else, or the target's with all it does.
    fn projection(&self, head: usize) -> Head {
        let (_, own) = self.head_parameters(head);
        own.map_or_else(|| self.head.share(), |own| Head::plain(own.shallow_clone()))
    }

    /// Rows whose label the heads can name, with draft ids as labels.
    fn named(&self, trained: TrainedRows) -> TrainedRows {
        let Some(map) = &self.vocabulary else {
            return trained;
        };
        let pairs = trained.rows.into_iter().zip(trained.labels);
        let (rows, labels) = pairs.filter_map(|(row, label)| Some((row, map.draft_id(label)?))).unzip();
        TrainedRows { rows, labels }
    }

    /// One pass over all heads; gradients are added where a buffer is given.
    fn run(
        &self,
        features: &FeatureBatch,
        plan: &RowPlan,
        global_counts: &[f64],
        mut gradients: Option<&mut Gradients<'_>>,
    ) -> Result<Tally> {
        let hidden = &features.hidden[0]; // [T, H]
        let device = hidden.device();
        let mut objective = Tensor::zeros([], (Kind::Double, device));
        let mut sums: Vec<Tensor> = Vec::new();
        let mut counts = Vec::new();
        // Whether heads 0 ..= k were all right, for each row of the batch.
        let mut chain = Tensor::ones([hidden.size()[0]], (Kind::Bool, device));
        let planned: &Vec<TrainedRows> = plan.own()?;
        for (head, (weight, named)) in self.config.weights().into_iter().zip(planned).enumerate() {
            counts.extend([plan.counts[head]; METRICS.len()]);
            let rows = device::upload(&named.rows, device)?;
            let labels = device::upload(&named.labels, device)?;
            let input = hidden.index_select(0, &rows).to_kind(self.parameters[0].value.kind()); // [R, H]
            let scale = weight / global_counts[head].max(1.0);
            let losses = match gradients.as_deref_mut() {
                Some(gradients) => self.backward_head(head, &input, &labels, scale, gradients)?,
                None => {
                    let _guard = tch::no_grad_guard();
                    let own = self.projection(head);
                    let mut projection = Projection { head: &own, gradient: None };
                    let output = self.backbone(head, &input);
                    let rows = Rows { input: &output, targets: Hard(&labels), weights: None };
                    loss::cross_entropy(rows, &mut projection, None, self.rows_per_chunk)?
                }
            };
            objective += &losses.sum * scale;
            // A row that is not among these ends its chain.
            let hits = chain.index_select(0, &rows).logical_and(&losses.top1); // [R]
            chain = Tensor::zeros_like(&chain).index_copy(0, &rows, &hits);
            let count = |hits: &Tensor| hits.sum(Kind::Double);
            sums.extend([losses.sum.shallow_clone(), count(&losses.top1), count(&losses.top5), count(&hits)]);
        }
        Ok(Tally { objective, sums: Tensor::stack(&sums, 0), counts })
    }

    /// Loss and gradients of one head.
    fn backward_head(
        &self,
        head: usize,
        input: &Tensor,
        labels: &Tensor,
        scale: f64,
        gradients: &mut Gradients<'_>,
    ) -> Result<RowLosses> {
        let count = self.parameters_per_head();
        let first = head * count;
        let (projection, last) = (first + count / 2 * 2, first + count);
        let output = self.backbone(head, input); // [R, H], with a graph
        let is_own = self.config.projection == HeadProjection::Own;
        let own = self.projection(head);
        let mut scored = Projection { head: &own, gradient: is_own.then(|| gradients.total(projection)) };
        let lift = lift(output.kind(), [(scale, labels.size()[0] as usize)].into_iter());
        let scale = Some(Scale { factor: scale, lift });
        let rows = Rows { input: &output.detach(), targets: Hard(labels), weights: None };
        let losses = loss::cross_entropy(rows, &mut scored, scale, self.rows_per_chunk)?;
        (projection..last).try_for_each(|index| gradients.complete(index))?;
        if let Some(slope) = losses.input_gradient.as_ref().filter(|slope| slope.numel() > 0) {
            // The chunked gradient enters the graph of the blocks through this product.
            let surrogate = (&output * slope).sum(Kind::Float);
            let inputs: Vec<&Tensor> = self.parameters[first..projection].iter().map(|p| &p.value).collect();
            let fresh = Tensor::f_run_backward(&[surrogate], &inputs, false, false)?;
            (first..).zip(fresh).try_for_each(|(index, gradient)| gradients.add(index, &gradient, lift))?;
        }
        (first..projection).try_for_each(|index| gradients.complete(index))?;
        Ok(losses)
    }
}

/// Averages kept for every head.
const METRICS: [&str; 4] = ["loss", "top1", "top5", "chain"];

fn figures(section: &Value) -> Result<Vec<String>> {
    Ok(ALGORITHM.figures_with(metric_names(&MedusaConfig::read(section)?)))
}

fn metric_names(config: &MedusaConfig) -> Vec<String> {
    let heads = 1..=config.num_heads;
    heads.flat_map(|head| METRICS.map(|metric| format!("head{head}/{metric}"))).collect()
}

impl DraftModel for Medusa {
    fn algorithm(&self) -> &'static Algorithm {
        &ALGORITHM
    }

    fn capture(&self) -> Vec<usize> {
        vec![self.target.num_layers()]
    }

    fn parameters(&self) -> &[Parameter] {
        &self.parameters
    }

    fn metrics(&self) -> Vec<String> {
        metric_names(&self.config)
    }

    fn summary(&self, averages: &[f64]) -> Vec<(String, f64)> {
        let chains = averages.chunks(METRICS.len()).map(|head| head[3]);
        vec![(ALGORITHM.selection_metric.to_owned(), 1.0 + chains.sum::<f64>())]
    }

    fn plan(&self, batch: &PackedBatch, _key: StepKey) -> Result<RowPlan> {
        let heads = (0..self.config.num_heads).map(|head| trained_rows(batch, head, self.config.mask));
        // A row whose label no head can name is a trained one all the same.
        let (counts, named) = heads.map(|trained| (trained.rows.len() as f64, self.named(trained))).unzip();
        let named: Vec<TrainedRows> = named;
        Ok(RowPlan::new(counts, named))
    }

    fn count(&self, batch: &PackedBatch, _key: StepKey) -> Result<Vec<f64>> {
        Ok((0..self.config.num_heads).map(|head| rows(batch, head, self.config.mask).len() as f64).collect())
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
        self.run(features, plan, global_counts, None)
    }

    fn description(&self) -> Value {
        let mut description = json!({
            "draft": self.config,
            "hidden_size": self.target.hidden_size,
            "vocab_size": self.target.vocab_size,
            "draft_vocab_size": self.head.vocab_size(),
            "num_target_layers": self.target.num_layers(),
        });
        // Heads that share the target's projection are not whole without what it does beside the product.
        if self.config.projection == HeadProjection::Shared && !self.head.is_plain() {
            description["target_head"] = json!(self.head.form());
        }
        description
    }

    fn buffers(&self) -> Vec<(String, Tensor)> {
        self.vocabulary.as_ref().map(vocabulary::buffers).unwrap_or_default()
    }

    fn contract(&self) -> Vec<String> {
        let size =
            |map: &VocabMap| format!("vocabulary: {} of the target's {} tokens", map.draft_size(), map.target_size());
        self.vocabulary.as_ref().map(size).into_iter().collect()
    }
}
