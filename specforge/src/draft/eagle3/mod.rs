//! EAGLE-3: one small layer that drafts from the target's own features, trained by running its own drafts.
//!
//! Li et al. 2025, <https://arxiv.org/abs/2503.01840>; references SafeAILab/EAGLE `cb7e084` (`eagle/traineagle3`) and
//! sgl-project/SpecForge `a6b6b02` (`specforge/algorithms/eagle3`). Row `t` starts from the target's hidden states of
//! token `t` at a few layers and the embedding of token `t + 1`, and predicts token `t + 2`. In the training-time test
//! it then takes its own output for the next feature, `K` times, as it will while decoding.
//!
//! Different from the references by default, each with a parity mode: rows are trained exactly where decoding uses them
//! (`supervision`), the loss is divided by the trained rows of the whole optimizer step, and packed documents never see
//! each other. Only trained rows are computed (`steps`), and no logits outlive their chunk (`draft::distillation`).
//!
//! Shape legend: `T` tokens of a packed batch, `R` rows of a step, `M` trained rows of all steps, `H` hidden size, `V`
//! vocabulary, `DV` draft vocabulary.

use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

use super::distillation::{
    self, DistillationLoss, DraftVocabulary, Objective, Order, RowOutcomes, Soft, Teacher, TeacherMemory, Weighting,
};
use super::lift::lift;
use super::loss::{Projection, Rows};
use super::supervision::{self, MaskAlignment};
use super::{
    Algorithm, DraftContext, DraftModel, DraftSize, Footprint, Gradients, Parameter, RowPlan, StepKey, Tally,
    vocabulary,
};
use crate::data::PackedBatch;
use crate::error::{Error, Result};
use crate::features::FeatureBatch;
use crate::models::TargetInfo;
use crate::nn::{Head, noise};

mod cached;
pub mod config;
pub mod layers;
pub mod recompute;
mod samples;
mod start;
pub mod steps;

pub use config::{Eagle3Config, Eagle3Shape, HeadStart, Normalisation};
use layers::Network;
use recompute::Tape;
use steps::{StepPlan, Steps};

/// Row of the table of algorithms.
pub const ALGORITHM: Algorithm = Algorithm {
    name: "eagle3",
    summary: "one layer on three of the target's hidden states, trained on its own drafts (Li et al. 2025)",
    selection_metric: "simulated_acceptance_length",
    figures,
    free_on_resume: &["recompute"],
    follows_length: |section| Eagle3Config::read(section).is_ok_and(|config| config.grow_until > 0.0),
    pictures: false,
    resolve: |section| Ok(json!(Eagle3Config::read(section)?)),
    size: |section, target| size(&Eagle3Config::read(section)?, target),
    capture: |section, target| Ok(capture(&Eagle3Config::read(section)?.shape(target)?)),
    footprint: |_, _, _| Ok(Footprint::default()),
    samples: samples::samples,
    work: samples::work,
    build: |section, context| Ok(Box::new(Eagle3::new(Eagle3Config::read(section)?, context)?)),
};

/// Deviation of random initial values, as Hugging Face's `initializer_range`.
const DEVIATION: f64 = 0.02;

/// Averages kept for every step.
const METRICS: [&str; 5] = ["loss", "accuracy", "acceptance", "coverage", "chain"];

fn figures(section: &Value) -> Result<Vec<String>> {
    Ok(ALGORITHM.figures_with(metric_names(&Eagle3Config::read(section)?)))
}

fn metric_names(config: &Eagle3Config) -> Vec<String> {
    let steps = 1..=config.ttt_steps;
    steps.flat_map(|step| METRICS.map(|metric| format!("step{step}/{metric}"))).collect()
}

/// An EAGLE-3 draft in training.
pub struct Eagle3 {
    config: Eagle3Config,
    shape: Eagle3Shape,
    parameters: Vec<Parameter>,
    network: Network,
    target: TargetInfo,
    /// The target's head, whose matrix is `[V, TH]`.
    target_head: Head,
    vocabulary: Option<DraftVocabulary>,
    /// What the target's whole vocabulary says of documents that were met.
    memory: Option<TeacherMemory>,
    buffers: Vec<(String, Tensor)>,
    positions_per_chunk: i64,
}

/// A forward pass: trained rows of each step, `[M, H]`, and the way back where the rows have no graph themselves.
struct Pass {
    rows: Vec<Tensor>,
    tape: Option<Tape>,
}

impl Eagle3 {
    /// A fresh draft.
    pub fn new(config: Eagle3Config, context: &DraftContext<'_>) -> Result<Self> {
        let shape = config.shape(&context.target)?;
        let map = context.vocabulary;
        let mapped = map.map_or(shape.vocab_size, |map| map.draft_size());
        if mapped != shape.draft_vocab_size || map.is_some_and(|map| map.target_size() != shape.vocab_size) {
            let problem = format!("expected a map of {} tokens, got {mapped}", shape.draft_vocab_size);
            return Err(Error::config("draft.vocab_map", problem));
        }
        let (kind, device) = (context.kind, context.device);
        let mut parameters = Vec::new();
        for (index, (name, tensor_shape)) in shape.tensors().into_iter().enumerate() {
            let from_target = config.lm_head == HeadStart::Target && shape.hidden_size == shape.target_hidden_size;
            let usual = || {
                if name == "lm_head.weight" && from_target {
                    let rows =
                        map.map_or_else(|| Ok(context.head.share()), |map| vocabulary::gather_rows(context.head, map))?;
                    Ok(rows.start().f_to_device(device)?.f_to_kind(kind)?)
                } else if tensor_shape.len() == 1 {
                    Ok(Tensor::f_ones(&tensor_shape, (kind, device))?)
                } else {
                    let random = noise::normal(&tensor_shape, DEVIATION, context.seed, index as u64);
                    Ok(random.f_to_kind(kind)?.f_to_device(device)?)
                }
            };
            let value = match config.layer_from {
                Some(layer) => start::value(context, layer, (&name, &tensor_shape), usual)?,
                None => usual()?,
            };
            parameters.push(Parameter::new(name, value));
        }
        let embedding = context.embedding.table.f_to_device(device)?.detach();
        let network = Network::new(&shape, &parameters, &embedding, device)?;
        let buffers = map.map_or_else(Vec::new, vocabulary::buffers);
        let vocabulary = map.map(|map| DraftVocabulary::new(map, device)).transpose()?;
        let target_head = context.head.to(context.head.kind(), device)?;
        let of_whole = distillation::positions_per_chunk(context.chunk_bytes, 0, shape.vocab_size, 0);
        let memory = TeacherMemory::new(&target_head, vocabulary.as_ref(), kind, of_whole)?;
        let positions_per_chunk = distillation::positions_per_chunk(
            context.chunk_bytes,
            config.ttt_steps,
            if memory.is_some() { shape.draft_vocab_size } else { shape.vocab_size },
            shape.draft_vocab_size,
        );
        let target = context.target.clone();
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
        })
    }

    /// The network, for looking at single steps.
    pub fn network(&self) -> &Network {
        &self.network
    }

    /// The steps of a batch, for looking at single ones.
    pub fn steps(&self, batch: &PackedBatch, device: Device) -> Result<Steps> {
        Steps::new(batch, self.config.ttt_steps, self.config.mask, device)
    }

    /// What a batch counts for each step: all rows that could be trained there, times their chance. So the gradient of a step
    /// is on average that of all its rows, whoever was drawn.
    fn counts(&self, batch: &PackedBatch, key: StepKey) -> Vec<f64> {
        let share = if key == StepKey::EVALUATION { 1.0 } else { self.config.step_share };
        let rows = |k| match self.config.normalisation {
            Normalisation::TrainedRows => supervision::rows(batch, k, self.config.mask).len(),
            Normalisation::AllPositions => batch.ids.len(),
        };
        let steps = self.config.steps_at(key.progress());
        let count = |k: usize| if k < steps { rows(k) as f64 * share.powi(k as i32) } else { 0.0 };
        (0..self.config.ttt_steps).map(count).collect()
    }

    /// One pass; gradients are added where there is a buffer for them.
    fn run(
        &self,
        features: &FeatureBatch,
        plan: &RowPlan,
        global_counts: &[f64],
        gradients: Option<&mut Gradients<'_>>,
    ) -> Result<Tally> {
        let (last, captured) = features.hidden.split_last().ok_or_else(|| Error::Failed("no features".to_owned()))?;
        let plan = plan.own::<StepPlan>()?.upload(last.device())?;
        let pass = match gradients.is_some() && !self.config.recompute {
            true => self.graph(&plan, captured)?,
            false => {
                let (tape, rows) = Tape::record(&self.network, &plan, captured)?;
                Pass { rows, tape: Some(tape) }
            }
        };
        let rows = match pass.rows.is_empty() {
            true => Tensor::f_zeros([0, self.shape.hidden_size], (self.parameters[0].value.kind(), last.device()))?,
            false => Tensor::cat(&pass.rows, 0).detach(), // [M, H]
        };
        // Where a document ends, the references compare with the prediction from nothing: logits of zero.
        let past_the_end = Tensor::zeros([1, last.size()[1]], (last.kind(), last.device()));
        let states = Tensor::cat(&[last, &past_the_end], 0).to_kind(self.target_head.kind()); // [T + 1, TH]
        let teacher = Teacher { hidden: &states, head: &self.target_head, vocabulary: self.vocabulary.as_ref() };
        let positions: Vec<i64> = plan.steps.iter().flat_map(|step| step.teachers.iter().copied()).collect();
        let order = Order::new(&positions, last.device())?;
        let weights = self.row_weights(&plan, global_counts, &rows); // [M]
        let remembered = match &self.memory {
            Some(memory) => Some(memory.recall(features, &order, &teacher)?),
            None => None,
        };
        let targets = Soft { order: &order, teacher: &teacher, remembered: remembered.as_ref() };
        let scored = Rows { input: &rows, targets, weights: Some(&weights) };
        let outcomes = match gradients {
            Some(gradients) => {
                let parity = self.parity(scored, &plan)?;
                let lift = self.lift(&plan, global_counts, parity.is_some());
                let weighting = Weighting { parity, lift };
                // The head is the last parameter; its gradient is made with the loss.
                let head = self.parameters.len() - 1;
                let mut projection = Projection { head: self.network.head(), gradient: Some(gradients.total(head)) };
                let objective = self.objective();
                let outcomes = distillation::distill(scored, &mut projection, objective, Some(&weighting))?;
                gradients.complete(head)?;
                drop(rows);
                if let Some(slopes) = outcomes.input_gradient.as_ref().filter(|slopes| slopes.numel() > 0) {
                    self.backward(&plan, captured, pass, slopes, (lift, gradients))?;
                }
                (0..head).try_for_each(|index| gradients.complete(index))?;
                outcomes
            }
            None => self.values(scored)?,
        };
        Ok(self.tally(&plan, &outcomes, last))
    }

    /// Trained rows of all steps, with one graph over all of them.
    fn graph(&self, plan: &Steps, captured: &[Tensor]) -> Result<Pass> {
        let outputs = self.network.backbone(plan, &self.network.project_hidden_states(captured)?)?; // [R, H] each
        let rows = plan.steps.iter().zip(&outputs).map(|(step, hidden)| self.network.trained_rows(step, hidden));
        Ok(Pass { rows: rows.collect(), tape: None })
    }

    /// Adds the gradients of everything below the vocabulary projection, given those of the trained rows, `[M, H]`, which are
    /// `lift` times as large as they should be.
    fn backward(
        &self,
        plan: &Steps,
        captured: &[Tensor],
        pass: Pass,
        slopes: &Tensor,
        (lift, gradients): (f64, &mut Gradients<'_>),
    ) -> Result<()> {
        let counts: Vec<i64> = plan.steps.iter().map(|step| step.teachers.len() as i64).collect();
        let slopes = slopes.split_with_sizes(&counts, 0); // [M, H] each
        let body = &self.parameters[..self.parameters.len() - 1];
        let inputs: Vec<&Tensor> = body.iter().map(|parameter| &parameter.value).collect();
        if let Some(tape) = pass.tape {
            return tape.backward(&self.network, plan, captured, &slopes, &inputs, (lift, gradients));
        }
        // The chunked gradient enters the graph of the network through these products.
        let products = pass.rows.iter().zip(&slopes).map(|(rows, slope)| (rows * slope).sum(slope.kind()));
        let surrogate: Tensor = products.sum();
        let fresh = Tensor::f_run_backward(&[surrogate], &inputs, false, false)?;
        // A norm that no step reads has no gradient.
        for (index, gradient) in fresh.into_iter().enumerate().filter(|(_, fresh)| fresh.defined()) {
            gradients.add(index, &gradient, lift)?;
        }
        Ok(())
    }

    /// Outcomes of all rows without gradients.
    fn values(&self, rows: Rows<'_, Soft<'_>>) -> Result<RowOutcomes> {
        let mut projection = Projection { head: self.network.head(), gradient: None };
        distillation::distill(rows, &mut projection, self.objective(), None)
    }

    fn objective(&self) -> Objective {
        Objective {
            loss: self.config.loss,
            lambda: (self.config.lk_scale, self.config.lk_decay),
            positions_per_chunk: self.positions_per_chunk,
        }
    }

    /// The steps' weights over the global counts: what a row's loss counts in the objective.
    fn factors(&self, global_counts: &[f64]) -> Vec<f64> {
        self.config.weights().iter().zip(global_counts).map(|(weight, count)| weight / count.max(1.0)).collect()
    }

    /// See `draft::lift`. With SpecForge's division, some factors are known on the device alone: over the rows of this
    /// batch at most.
    fn lift(&self, plan: &Steps, global_counts: &[f64], parity: bool) -> f64 {
        let factors = self.factors(global_counts);
        let terms = plan.steps.iter().zip(factors).zip(self.config.weights()).map(|((step, factor), weight)| {
            let rows = step.teachers.len();
            (if parity { factor.max(weight / rows.max(1) as f64) } else { factor }, rows)
        });
        lift(self.parameters[0].value.kind(), terms)
    }

    /// Factor of each row's loss. `[M]`
    fn row_weights(&self, plan: &Steps, global_counts: &[f64], rows: &Tensor) -> Tensor {
        let kind = if rows.kind() == Kind::Double { Kind::Double } else { Kind::Float };
        let parts: Vec<Tensor> = plan
            .steps
            .iter()
            .zip(self.factors(global_counts))
            .map(|(step, factor)| Tensor::full([step.teachers.len() as i64], factor, (kind, rows.device())))
            .collect();
        match parts.is_empty() {
            true => Tensor::zeros([0], (kind, rows.device())),
            false => Tensor::cat(&parts, 0),
        }
    }

    /// SpecForge divides a step's LK loss by the rows of this batch that have one, and `lk_lambda` looks at their mean
    /// acceptance: both are known after a pass over all rows. `[M]` each, and on the device.
    fn parity(&self, rows: Rows<'_, Soft<'_>>, plan: &Steps) -> Result<Option<[Tensor; 2]>> {
        let lk = matches!(self.config.loss, DistillationLoss::LkAlpha | DistillationLoss::LkLambda);
        if !lk || self.config.normalisation != Normalisation::AllPositions || plan.steps.is_empty() {
            return Ok(None);
        }
        let outcomes = self.values(rows)?;
        let (mut factors, mut means) = (Vec::new(), Vec::new());
        let mut start = 0;
        for (step, weight) in plan.steps.iter().zip(self.config.weights()) {
            let length = step.teachers.len() as i64;
            let covered = outcomes.covered.narrow(0, start, length).to_kind(outcomes.acceptance.kind());
            let count = covered.sum(covered.kind()).clamp_min(1.0);
            let mean = (outcomes.acceptance.narrow(0, start, length) * covered).sum(count.kind()) / &count;
            factors.push((count.reciprocal() * weight).expand([length], false));
            means.push(mean.expand([length], false));
            start += length;
        }
        Ok(Some([Tensor::cat(&factors, 0), Tensor::cat(&means, 0)]))
    }

    /// Sums of every step's metrics.
    fn tally(&self, plan: &Steps, outcomes: &RowOutcomes, last: &Tensor) -> Tally {
        let (mut sums, mut counts) = (Vec::new(), Vec::new());
        // Whether a row was right at every step so far.
        let mut chain = Tensor::ones([last.size()[0]], (Kind::Bool, last.device()));
        let parity = matches!(self.config.mask, MaskAlignment::Specforge | MaskAlignment::Official);
        let mut start = 0;
        for step in &plan.steps {
            let length = step.teachers.len() as i64;
            let part = |values: &Tensor| values.narrow(0, start, length);
            let (hits, covered) = (part(&outcomes.hits), part(&outcomes.covered));
            let acceptance = part(&outcomes.acceptance);
            let acceptance = if parity { acceptance * &covered } else { acceptance };
            let chained = chain.index_select(0, &step.trained_rows).logical_and(&hits);
            chain = chain.zeros_like().index_copy(0, &step.trained_rows, &chained);
            let values = [part(&outcomes.losses), hits, acceptance, covered, chained];
            sums.extend(values.map(|values| values.sum(Kind::Double)));
            counts.extend([length as f64; METRICS.len()]);
            start += length;
        }
        let missing = METRICS.len() * self.config.ttt_steps - sums.len();
        sums.extend((0..missing).map(|_| Tensor::zeros([], (Kind::Double, last.device()))));
        counts.resize(sums.len(), 0.0);
        let objective = outcomes.objective.shallow_clone();
        Tally { objective, sums: Tensor::stack(&sums, 0), counts }
    }
}

impl DraftModel for Eagle3 {
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
        let chains = averages.chunks(METRICS.len()).map(|step| step[4]);
        vec![(ALGORITHM.selection_metric.to_owned(), 1.0 + chains.sum::<f64>())]
    }

    fn plan(&self, batch: &PackedBatch, key: StepKey) -> Result<RowPlan> {
        let steps = self.config.steps_at(key.progress());
        let trained = steps::trained(batch, steps, self.config.mask, (self.config.step_share, key));
        Ok(RowPlan::new(self.counts(batch, key), StepPlan::new(batch, &trained)))
    }

    fn count(&self, batch: &PackedBatch, key: StepKey) -> Result<Vec<f64>> {
        Ok(self.counts(batch, key))
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
        let limit = self.shape.max_position_embeddings;
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
fn capture(shape: &Eagle3Shape) -> Vec<usize> {
    shape.capture.iter().copied().chain([shape.num_target_layers]).collect()
}

fn size(config: &Eagle3Config, target: &TargetInfo) -> Result<DraftSize> {
    let shape = config.shape(target)?;
    let parameters = |(_, shape): &(String, Vec<i64>)| shape.iter().product::<i64>() as u64;
    let tensors = shape.tensors();
    let trainable = tensors.iter().map(parameters).sum::<u64>();
    let embedding = tensors.iter().filter(|(name, _)| name.starts_with("embed_tokens")).map(parameters).sum::<u64>();
    // Forward, gradient of the input, gradient of the weight, in every step; and the teacher's head once.
    let teacher = (shape.vocab_size * shape.target_hidden_size) as u64;
    let steps: f64 = (0..config.ttt_steps as i32).map(|step| config.step_share.powi(step)).sum();
    let row_multiply_adds = (3.0 * steps * (trainable - embedding) as f64) as u64 + teacher;
    Ok(DraftSize { trainable, frozen: 0, captured: capture(&shape).len() as u64, row_multiply_adds })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::data::DocumentRef;

    /// Documents, and what a draft reads of them.
    fn features(tokens: i64) -> FeatureBatch {
        let batch = PackedBatch {
            ids: (0..tokens).map(|token| (token * 7 + 3) % 23).collect(),
            positions: (0..tokens).collect(),
            supervised: vec![true; tokens as usize],
            lengths: vec![tokens],
            documents: vec![DocumentRef::new("one", 0)],
        };
        let hidden = (0..4).map(|layer| noise::normal(&[tokens, 12], 1.0, 31, layer).to_kind(Kind::Double)).collect();
        FeatureBatch::new(Arc::new(batch), hidden)
    }

    /// Gradients of all parameters in a row, when this many of nine steps were taken.
    fn gradient(draft: &Eagle3, features: &FeatureBatch, step: u64) -> Tensor {
        let plan = draft.plan(&features.batch, StepKey { seed: 2, step, total: 9 }).unwrap();
        let mut totals = Gradients::zeros(draft.parameters()).unwrap();
        draft.accumulate(features, &plan, &plan.counts, &mut Gradients::new(&mut totals)).unwrap();
        Tensor::cat(&totals.iter().map(|total| total.flatten(0, -1)).collect::<Vec<_>>(), 0)
    }

    #[test]
    fn steps_are_added_while_the_run_goes_on() {
        let features = features(12);
        let mut draft = cached::tests::draft(Kind::Double, &json!({}));
        let whole = draft.config.ttt_steps;
        assert!(whole > 2);
        let counts =
            |draft: &Eagle3, step| draft.plan(&features.batch, StepKey { seed: 2, step, total: 9 }).unwrap().counts;
        let (all, of_all) = (counts(&draft, 0), gradient(&draft, &features, 0));
        draft.config.grow_until = 0.5;
        assert_eq!(counts(&draft, 0), [&all[..1], &vec![0.0; whole - 1]].concat());
        // After a third of the run, two thirds of the steps.
        let third = 1 + whole * 2 / 3;
        assert_eq!(counts(&draft, 3), [&all[..third], &vec![0.0; whole - third]].concat());
        assert_eq!((counts(&draft, 5), gradient(&draft, &features, 5)), (all, of_all));
        // What is trained first is a draft of one step; its weights are those of the first step alike.
        let first = gradient(&draft, &features, 0);
        draft.config.grow_until = 0.0;
        draft.config.loss_weights = Some((0..whole).map(|step| if step == 0 { 1.0 } else { 0.0 }).collect());
        let alone = gradient(&draft, &features, 0);
        let apart = (first - alone).abs().max().double_value(&[]);
        assert!(apart < 1e-12, "a weight of zero trains nothing: {apart}");
        let evaluated = draft.plan(&features.batch, StepKey::EVALUATION).unwrap().counts;
        draft.config.grow_until = 1.0;
        assert_eq!(draft.plan(&features.batch, StepKey::EVALUATION).unwrap().counts, evaluated);
    }

    #[test]
    fn gradients_of_a_share_of_the_rows_are_on_average_those_of_all() {
        let mut draft = cached::tests::draft(Kind::Double, &json!({}));
        let features = features(40);
        let gradient = |draft: &Eagle3, step| gradient(draft, &features, step);
        let whole = gradient(&draft, 0);
        let apart = |some: &Tensor| (some - &whole).norm().double_value(&[]) / whole.norm().double_value(&[]);
        draft.config.step_share = 0.7;
        let sum = |steps: std::ops::Range<u64>| steps.map(|step| gradient(&draft, step)).sum::<Tensor>();
        let (few, more) = (sum(0..20), sum(20..320));
        let (one, few, all) = (apart(&gradient(&draft, 0)), apart(&(&few / 20.0)), apart(&((&few + more) / 320.0)));
        // The error of a mean falls with the root of what it is of.
        assert!(one > 0.2 && few < one / 2.0 && all < few / 2.0 && all < 0.1, "{one} {few} {all}");
    }
}
