//! Masked diffusion: a whole language model that fills masked tokens in, trained with the losses of LLaDA
//! (<https://arxiv.org/abs/2502.09992>; see `losses::masked_diffusion`).
//!
//! It is no draft of its target but what becomes of it: it has the target's layers without their causal mask, and begins with the
//! target's own tensors, or from nothing with any sizes. The target is not run: no hidden state is asked for. What is masked in a
//! document is drawn by the step's key and the document alone.
//!
//! With `shift`, the row before a token says what the token is, as in a causal model and in Dream
//! (<https://arxiv.org/abs/2508.15487>); without it a token's own row, as in LLaDA. A run that begins with a causal model loses
//! least with `shift`.
//!
//! Shape legend: `B` documents, `T` tokens of the longest, `R` masked rows, `H` hidden size, `V` vocabulary.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

use super::lift::lift;
use super::loss::{self, Hard, Projection, RowLosses, Rows, Scale};
use super::losses::masked_diffusion::{Corrupted, Divisor};
use super::samples::{Documents, Footprint, Samples, Work};
use super::{Algorithm, DraftContext, DraftModel, DraftSize, Gradients, Parameter, RowPlan, StepKey, Tally};
use crate::data::PackedBatch;
use crate::device;
use crate::error::{Error, Result};
use crate::features::FeatureBatch;
use crate::models::infilling::InfillingTensor;
use crate::models::{
    Infilling, LayerKind, LayerShape, MaskedDiffusion, TargetConfig, TargetInfo, TargetModel, infilling_config,
    infilling_name,
};
use crate::nn::{AttentionMask, noise};
use crate::strict;

/// Row of the table of algorithms.
pub const ALGORITHM: Algorithm = Algorithm {
    name: "masked_diffusion",
    summary: "no draft: the target itself becomes a masked diffusion model (Nie et al. 2025)",
    selection_metric: "log_likelihood",
    figures: |section| {
        MaskedDiffusionConfig::read(section)?;
        Ok(ALGORITHM.figures_with(METRICS.map(str::to_owned).to_vec()))
    },
    free_on_resume: &[],
    pictures: false,
    follows_length: |_| false,
    resolve: |section| Ok(json!(MaskedDiffusionConfig::read(section)?)),
    size: |section, target| {
        let model = MaskedDiffusionConfig::read(section)?.planned(target)?;
        let trainable = model.parameters();
        Ok(DraftSize { trainable, frozen: 0, captured: 0, row_multiply_adds: 3 * trainable })
    },
    capture: |_, _| Ok(Vec::new()),
    footprint,
    samples: |_| Samples::default(),
    work,
    build: |section, context| Ok(Box::new(MaskedDiffusionModel::new(MaskedDiffusionConfig::read(section)?, context)?)),
};

/// What a model begins with.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Start {
    /// The target's tensors.
    #[default]
    Target,
    /// Random ones.
    Nothing,
}

/// The `draft` section of a masked diffusion model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MaskedDiffusionConfig {
    /// "masked_diffusion"
    pub algorithm: String,
    /// A token of the target's that no document has: it becomes the mask.
    pub mask_token_id: Option<i64>,
    /// Whether a row says what stands one position behind it.
    pub shift: bool,
    /// What is masked, and what the loss is divided by.
    pub objective: Divisor,
    /// What the model begins with.
    pub start: Start,
    /// Number of layers; the target's without it. Fewer are taken evenly from the target's.
    pub num_layers: Option<usize>,
    /// `H`; the target's without it.
    pub hidden_size: Option<i64>,
    /// Width of the MLPs; the target's without it.
    pub intermediate_size: Option<i64>,
    /// Heads; the target's without it.
    pub num_attention_heads: Option<i64>,
    /// Keys and values; the target's without it.
    pub num_key_value_heads: Option<i64>,
    /// Refused, as is the next: the model has the target's whole vocabulary.
    pub vocab_map: Option<PathBuf>,
    /// See `vocab_map`.
    pub draft_vocab_size: Option<i64>,
}

impl Default for MaskedDiffusionConfig {
    fn default() -> Self {
        Self {
            algorithm: ALGORITHM.name.to_owned(),
            mask_token_id: None,
            shift: true,
            objective: Divisor::default(),
            start: Start::Target,
            num_layers: None,
            hidden_size: None,
            intermediate_size: None,
            num_attention_heads: None,
            num_key_value_heads: None,
            vocab_map: None,
            draft_vocab_size: None,
        }
    }
}

impl MaskedDiffusionConfig {
    /// Reads and checks a `draft` section.
    pub fn read(section: &Value) -> Result<Self> {
        let config: Self = strict::from_value(section, "draft")?;
        if config.vocab_map.is_some() || config.draft_vocab_size.is_some() {
            let problem = "a masked diffusion model has the target's whole vocabulary: leave draft.vocab_map and \
                           draft.draft_vocab_size out";
            return Err(Error::config("draft.vocab_map", problem));
        }
        let sizes = [
            ("hidden_size", config.hidden_size),
            ("intermediate_size", config.intermediate_size),
            ("num_attention_heads", config.num_attention_heads),
            ("num_key_value_heads", config.num_key_value_heads),
        ];
        let given = sizes.into_iter().find(|(_, size)| size.is_some());
        if let (Start::Target, Some((key, _))) = (config.start, given) {
            let problem =
                "the target's tensors have the target's sizes: leave the key out, or set `draft.start` to nothing";
            return Err(Error::config(format!("draft.{key}"), problem));
        }
        if config.num_layers == Some(0) {
            return Err(Error::config("draft.num_layers", "expected at least 1, got 0"));
        }
        Ok(config)
    }

    /// The model on a target.
    pub fn model(&self, target: &TargetInfo) -> Result<Infilling> {
        let mask = self.mask_token_id.ok_or_else(|| {
            Error::config("draft.mask_token_id", "expected a token of the target's that no document has, got nothing")
                .with_hint("a special token that the chat template does not use, such as one of source code files")
        })?;
        self.with_mask(target, mask)
    }

    /// Its sizes, before anybody asks what the mask is.
    fn planned(&self, target: &TargetInfo) -> Result<Infilling> {
        self.with_mask(target, self.mask_token_id.unwrap_or(0))
    }

    fn with_mask(&self, target: &TargetInfo, mask: i64) -> Result<Infilling> {
        let like = Infilling::of(target, MaskedDiffusion { mask, shift: self.shift });
        let hidden_size = self.hidden_size.unwrap_or(like.hidden_size);
        let heads = self.num_attention_heads.unwrap_or(like.layer.num_attention_heads);
        if heads < 1 || hidden_size % heads != 0 {
            let problem = format!("expected a divisor of the width, {hidden_size}, got {heads}");
            return Err(Error::config("draft.num_attention_heads", problem));
        }
        let own_heads = self.num_attention_heads.is_some() || self.hidden_size.is_some();
        let head_dim = if own_heads { hidden_size / heads } else { like.layer.head_dim };
        let rope = crate::nn::RopeConfig { head_dim, ..like.layer.rope };
        let layer = LayerShape {
            intermediate_size: self.intermediate_size.unwrap_or(like.layer.intermediate_size),
            num_attention_heads: heads,
            num_key_value_heads: self.num_key_value_heads.unwrap_or(like.layer.num_key_value_heads.min(heads)),
            head_dim,
            rope,
            ..like.layer
        };
        let num_layers = self.num_layers.unwrap_or(like.num_layers);
        if self.start == Start::Target {
            self.fits(target, num_layers)?;
        }
        let model = Infilling { hidden_size, num_layers, layer, ..like };
        model
            .check()
            .map_err(|problem| Error::config("draft", format!("such a model cannot be written down: {problem}")))?;
        Ok(model)
    }

    /// Refuses targets whose layers are not plain, as far as their sizes show it.
    fn fits(&self, target: &TargetInfo, num_layers: usize) -> Result<()> {
        let refuse = |problem: String| {
            let hint = "set `draft.start` to nothing to train a model of plain layers with random weights";
            Err(Error::config("draft.start", problem).with_hint(hint))
        };
        if num_layers > target.num_layers() {
            return refuse(format!("the target has {} layers, {num_layers} were asked for", target.num_layers()));
        }
        if target.layers.iter().any(|kind| *kind != LayerKind::Full) {
            return refuse("the target has layers with windows or states, which no text is whole for".to_owned());
        }
        if target.embedding_scale != 1.0 || target.head != crate::nn::HeadForm::PLAIN {
            return refuse("the target's embedding or head does more than look up and multiply".to_owned());
        }
        Ok(())
    }
}

/// The target's layer that each of fewer layers begins as: the first, the last, and others evenly between them.
fn origin_of(layer: usize, layers: usize, of: usize) -> usize {
    match layers {
        1 => 0,
        _ => (layer * (of - 1) + (layers - 1) / 2) / (layers - 1),
    }
}

/// A masked diffusion model in training.
pub struct MaskedDiffusionModel {
    config: MaskedDiffusionConfig,
    shape: Infilling,
    /// config.json of the model.
    values: Value,
    /// The network, on the parameters' own tensors.
    network: Box<dyn TargetModel>,
    parameters: Vec<Parameter>,
    /// Parameter that is the head.
    head: usize,
    rows_per_chunk: i64,
}

/// A document as it is trained: what is masked, and what each masked token counts.
struct Planned {
    text: Corrupted,
    weight: f64,
}

impl MaskedDiffusionModel {
    /// The model at its start.
    pub fn new(config: MaskedDiffusionConfig, context: &DraftContext<'_>) -> Result<Self> {
        let shape = config.model(&context.target)?;
        let values = infilling_config(&shape);
        let tensors = shape.tensors();
        let mut parameters = Vec::with_capacity(tensors.len());
        for (stream, tensor) in tensors.iter().enumerate() {
            let value = match config.start {
                Start::Target => of_target(tensor, &shape, context)?,
                Start::Nothing => random(tensor, &shape, (context.seed, stream as u64)),
            };
            let value = value.f_to_kind(context.kind)?.f_to_device(context.device)?.copy();
            parameters.push(Parameter::new(infilling_name(&shape, &tensor.usual), value));
        }
        let of_name = |name: &str| parameters.iter().find(|parameter| parameter.name == name);
        let network =
            TargetConfig::from_value(&values).map_err(Error::Failed)?.build(context.device, &mut |name, _| {
                let missing = || Error::Failed(format!("a masked diffusion model wants `{name}`, which it has not"));
                Ok(of_name(name).ok_or_else(missing)?.value.shallow_clone())
            })?;
        // A tied head is the first tensor, an own one the last.
        let head = if shape.tied { 0 } else { parameters.len() - 1 };
        let rows_per_chunk = loss::chunk_rows(context.chunk_bytes, shape.vocab_size);
        Ok(Self { config, shape, values, network, parameters, head, rows_per_chunk })
    }

    /// What the last norm gives for the rows that decide masked tokens, `[R, H]`, with a graph; and the tokens, `[R]`.
    fn rows(&self, batch: &PackedBatch, planned: &[Planned]) -> Result<(Tensor, Tensor, Tensor)> {
        let device = self.network.device();
        let (mut states, mut labels, mut weights) = (Vec::new(), Vec::new(), Vec::new());
        // On the CPU each document passes alone, so that what it gives is its own to the last bit and nothing is padded.
        let together = if device == Device::Cpu { 1 } else { planned.len().max(1) };
        let documents: Vec<PackedBatch> = batch.each().collect();
        for (documents, planned) in documents.chunks(together).zip(planned.chunks(together)) {
            let longest = documents.iter().map(|document| document.ids.len()).max().unwrap_or(0);
            let (mut ids, mut places) = (Vec::new(), Vec::new());
            for (row, (document, Planned { text, weight })) in documents.iter().zip(planned).enumerate() {
                let first = row * longest;
                for (place, _) in text.masked.iter().enumerate().filter(|(_, masked)| **masked) {
                    places.push((first + place) as i64 - i64::from(self.shape.diffusion.shift));
                    labels.push(document.ids[place]);
                    weights.push(*weight);
                }
                ids.extend(&text.ids);
                ids.resize(first + longest, self.shape.diffusion.mask);
            }
            if places.is_empty() {
                continue;
            }
            let shape = [documents.len() as i64, longest as i64];
            let ids = device::upload(&ids, device)?.view(shape); // [B, T]
            let positions = Tensor::arange(longest as i64, (Kind::Int64, device)).expand(shape, false);
            let mask = AttentionMask::Whole(documents.iter().map(|document| document.ids.len() as i64).collect());
            let layers = self.network.in_stretches();
            let layers = layers.ok_or_else(|| Error::Failed("the model cannot be run in training".to_owned()))?;
            let normed = layers.normed(&ids, &positions, &mask)?; // [B, T, H]
            let places = device::upload(&places, device)?;
            states.push(normed.flatten(0, 1).f_index_select(0, &places)?); // [r, H]
        }
        let states = match states.is_empty() {
            true => Tensor::f_zeros([0, self.shape.hidden_size], (self.network.kind(), device))?,
            false => Tensor::f_cat(&states, 0)?,
        };
        let weights = Tensor::from_slice(&weights).f_to_device(device)?;
        Ok((states, device::upload(&labels, device)?, weights))
    }

    fn run(
        &self,
        features: &FeatureBatch,
        plan: &RowPlan,
        global_counts: &[f64],
        mut gradients: Option<&mut Gradients<'_>>,
    ) -> Result<Tally> {
        let planned: &Vec<Planned> = plan.own()?;
        let factor = 1.0 / global_counts[0].max(1.0);
        let (states, labels, weights) = self.rows(&features.batch, planned)?;
        let lift = lift(states.kind(), [(factor, labels.size()[0] as usize)].into_iter());
        let scale = gradients.is_some().then_some(Scale { factor, lift });
        let gradient = gradients.as_deref_mut().map(|gradients| gradients.total(self.head));
        let mut projection = Projection { head: self.network.head(), gradient };
        let rows = Rows { input: &states.detach(), targets: Hard(&labels), weights: Some(&weights) };
        let losses = loss::cross_entropy(rows, &mut projection, scale, self.rows_per_chunk)?;
        if let Some(gradients) = gradients {
            self.backward(&states, &losses, lift, gradients)?;
        }
        // Of the bound, each token that may be masked has its share, whatever the objective is divided by.
        let bounds: Vec<f64> =
            planned.iter().flat_map(|planned| vec![1.0 / planned.text.probability; planned.masked()]).collect();
        let bound = (&losses.losses.to_kind(Kind::Double) * Tensor::from_slice(&bounds).to_device(states.device()))
            .sum(Kind::Double);
        let hits = losses.top1.sum(Kind::Double);
        let sums = [bound, losses.sum.shallow_clone(), hits];
        let (masked, may) = (plan.counts[1], plan.counts[2]);
        Ok(Tally {
            objective: &losses.objective * factor,
            sums: Tensor::f_stack(&sums, 0)?,
            counts: vec![may, masked, masked],
        })
    }

    /// Adds the gradients of everything that stands before the head's product.
    fn backward(&self, states: &Tensor, losses: &RowLosses, lift: f64, gradients: &mut Gradients<'_>) -> Result<()> {
        let slope = losses.input_gradient.as_ref().filter(|slope| slope.numel() > 0);
        // An own head has its gradient from the product alone.
        let last = if self.shape.tied { self.parameters.len() } else { self.head };
        if let Some(slope) = slope {
            // The chunked gradient enters the graph of the layers through this product.
            let surrogate =
                (states * slope).sum(if states.kind() == Kind::Double { Kind::Double } else { Kind::Float });
            let inputs: Vec<&Tensor> = self.parameters[..last].iter().map(|parameter| &parameter.value).collect();
            let fresh = Tensor::f_run_backward(&[surrogate], &inputs, false, false)?;
            (0..).zip(fresh).try_for_each(|(index, gradient)| gradients.add(index, &gradient, lift))?;
        }
        (0..self.parameters.len()).try_for_each(|index| gradients.complete(index))
    }

    /// Which tokens of a document may be masked. With a shift, nothing says what the first one is.
    fn may(&self, document: &PackedBatch) -> Vec<bool> {
        let all = self.config.objective == Divisor::Tokens;
        let first = usize::from(self.shape.diffusion.shift);
        document
            .supervised
            .iter()
            .enumerate()
            .map(|(place, supervised)| (all || *supervised) && place >= first)
            .collect()
    }
}

impl Planned {
    fn masked(&self) -> usize {
        self.text.masked.iter().filter(|masked| **masked).count()
    }
}

/// What a tensor is in the target. Biases that the target has not begin at 0.
fn of_target(tensor: &InfillingTensor, shape: &Infilling, context: &DraftContext<'_>) -> Result<Tensor> {
    let InfillingTensor { usual, shape: size } = tensor;
    let weights = context.weights.ok_or_else(|| {
        Error::Failed(
            "a masked diffusion model begins with the target's tensors, and the target is in no folder".to_owned(),
        )
    })?;
    const LAYERS: &str = "model.layers.";
    let name = match usual.strip_prefix(LAYERS).and_then(|rest| rest.split_once('.')) {
        None => usual.clone(),
        Some((layer, part)) => {
            let layer: usize = layer.parse().unwrap_or(0);
            let origin = origin_of(layer, shape.num_layers, context.target.num_layers());
            format!("{LAYERS}{origin}.{part}")
        }
    };
    if name.ends_with("_proj.bias") && weights.shape(&name).is_none() {
        return Ok(Tensor::f_zeros(size, (context.kind, context.device))?);
    }
    weights.check(&[(name.clone(), size.clone())], |_| true)?;
    weights.load(&name, context.kind, context.device)
}

/// What a tensor is at random: norms are 1, biases 0, matrices normal; what is added to the residual stream is smaller by the
/// number of additions, as in GPT-2.
fn random(tensor: &InfillingTensor, shape: &Infilling, (seed, stream): (u64, u64)) -> Tensor {
    const DEVIATION: f64 = 0.02;
    let InfillingTensor { usual, shape: size } = tensor;
    let options = (Kind::Float, Device::Cpu);
    if usual.ends_with("bias") {
        return Tensor::zeros(size.as_slice(), options);
    }
    if usual.ends_with("norm.weight") {
        return Tensor::ones(size.as_slice(), options);
    }
    let is_added = usual.ends_with("o_proj.weight") || usual.ends_with("down_proj.weight");
    let deviation = if is_added { DEVIATION / (2.0 * shape.num_layers as f64).sqrt() } else { DEVIATION };
    noise::normal(size, deviation, seed, stream)
}

/// Averages that are kept: the bound of a token's likelihood, and of masked tokens the loss and how often the likeliest is right.
const METRICS: [&str; 3] = ["bound", "masked/loss", "masked/top1"];

/// Numbers that are kept for the backward pass: of each layer what its norms, projections and attention read and give.
fn footprint(section: &Value, target: &TargetInfo, documents: Documents) -> Result<Footprint> {
    let model = MaskedDiffusionConfig::read(section)?.planned(target)?;
    let LayerShape { intermediate_size, num_attention_heads, num_key_value_heads, head_dim, .. } = model.layer;
    let heads = (num_attention_heads + 2 * num_key_value_heads) * head_dim;
    let of_token = (8 * model.hidden_size + 2 * heads + 5 * intermediate_size) as u64;
    let tokens = documents.count * documents.tokens;
    let lines = vec![("model", format!("{} layers of width {}, whole", model.num_layers, model.hidden_size))];
    Ok(Footprint { rows: None, numbers: tokens * of_token * model.num_layers as u64, lines })
}

/// A step on documents: every token passes the layers, half of those that may be masked pass the head.
fn work(section: &Value, target: &TargetInfo, batch: &PackedBatch, chunk_bytes: usize) -> Result<Work> {
    let config = MaskedDiffusionConfig::read(section)?;
    let model = config.planned(target)?;
    let may = batch.supervised.iter().filter(|supervised| **supervised || config.objective == Divisor::Tokens).count();
    let rows = may as u64 / 2;
    let table = (model.vocab_size * model.hidden_size) as u64;
    let layers = model.parameters() - table * if model.tied { 1 } else { 2 };
    let pairs: u64 = batch.lengths.iter().map(|&length| (length * length) as u64).sum();
    let attention = 2 * model.num_layers as u64 * pairs * model.hidden_size as u64;
    let operations = 6 * (batch.ids.len() as u64 * layers + rows * table + attention);
    Ok(Work { rows, chunk_rows: loss::chunk_rows(chunk_bytes, model.vocab_size), operations, remembered: 0 })
}

impl DraftModel for MaskedDiffusionModel {
    fn algorithm(&self) -> &'static Algorithm {
        &ALGORITHM
    }

    fn capture(&self) -> Vec<usize> {
        Vec::new()
    }

    fn parameters(&self) -> &[Parameter] {
        &self.parameters
    }

    fn metrics(&self) -> Vec<String> {
        METRICS.map(str::to_owned).to_vec()
    }

    fn summary(&self, averages: &[f64]) -> Vec<(String, f64)> {
        vec![(ALGORITHM.selection_metric.to_owned(), -averages[0])]
    }

    fn plan(&self, batch: &PackedBatch, key: StepKey) -> Result<RowPlan> {
        /// Tells these draws from others of a document.
        const MASKS: u64 = 1;
        let (mask, divisor) = (self.shape.diffusion.mask, self.config.objective);
        let mut counts = [0.0; 3];
        let mut planned = Vec::with_capacity(batch.lengths.len());
        for document in batch.each() {
            let reference =
                document.documents.first().ok_or_else(|| Error::Failed("a document has no name".to_owned()))?;
            if document.ids.contains(&mask) {
                let problem = format!("document {reference} holds token {mask}: expected a token that no document has");
                return Err(Error::config("draft.mask_token_id", problem));
            }
            let may = self.may(&document);
            let draws = key.draws(reference, MASKS);
            let text = Corrupted::of(&document.ids, &may, mask, (draws.bits(0, 0), 0))?;
            let count = may.iter().filter(|may| **may).count();
            let weight = divisor.within(&text, count);
            let document = Planned { weight, text };
            let own = [divisor.of(&document.text, count), document.masked() as f64, count as f64];
            counts.iter_mut().zip(own).for_each(|(sum, own)| *sum += own);
            planned.push(document);
        }
        Ok(RowPlan::new(counts.to_vec(), planned))
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
        json!({ "draft": self.config, "model": self.values })
    }

    fn check_length(&self, longest: i64) -> Result<()> {
        let most = self.shape.layer.rope.max_position_embeddings;
        match longest <= most {
            true => Ok(()),
            false => Err(Error::config(
                "data.max_length",
                format!("expected at most {most}, the model's context, got {longest}"),
            )),
        }
    }

    fn contract(&self) -> Vec<String> {
        let MaskedDiffusion { mask, shift } = self.shape.diffusion;
        let row = if shift { "the row before a token" } else { "a token's own row" };
        vec![format!("mask token {mask}, which no document has; {row} says what it is")]
    }
}
