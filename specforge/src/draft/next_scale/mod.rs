//! A next-scale transformer: all codes of a picture's next scale at once, from those before.
//!
//! Tian et al. 2024, <https://arxiv.org/abs/2404.02905>; the network is `models/var`. A target is trained like this from the
//! codes of real pictures, and a draft from those or from the target's distribution at every position, with its label and
//! without. Pictures that the target made itself are documents like any other.
//!
//! A document is a picture's label and the codes of all its scales. What the transformer reads for a scale is what the
//! scales before it add up to, which the image tokenizer's quantiser says, so that all positions of a picture are trained in
//! one pass.
//!
//! While decoding, a drafted scale is kept as a whole: what counts is that all its positions agree. Metrics say so by scale:
//! the loss of a code, its `acceptance` (the sum of the smaller probability, teacher's or draft's, which is how often draws
//! from both can be made to agree), the share of scales that agree as a `whole` (the product over positions), and the
//! `chain`, the same for a scale with all before it. Where codes are the teacher, its probability is 1 for the code that is
//! there.
//!
//! Shape legend: `B` pictures, `L` codes of a picture, `T` tokens `B * (1 + L)`, `V` codes of the codebook, `C` width of the
//! target, `Z` channels of a code, `F` codes of the first scale.

use serde_json::{Value, json};
use tch::{Kind, Tensor};

use super::{Algorithm, DraftContext, DraftModel, Gradients, Parameter, RowPlan, Samples, StepKey, Tally, Work};
use crate::data::PackedBatch;
use crate::device;
use crate::error::{Error, Result};
use crate::features::{FeatureBatch, PackedPictures};
use crate::models::var::{Var, VarConfig, training};
use crate::models::vqvae::{self, Quantizer};
use crate::nn::Head;

pub mod config;

pub use config::{NextScaleConfig, Teacher};

/// Row of the table of algorithms.
pub const ALGORITHM: Algorithm = Algorithm {
    name: "next_scale",
    summary: "a next-scale transformer on an image tokenizer's codes (Tian et al. 2024)",
    selection_metric: "expected_scales",
    figures: |section| {
        // How many scales there are, the target says.
        NextScaleConfig::read(section)?;
        Ok(["loss", ALGORITHM.selection_metric, ACCEPTANCE].map(str::to_owned).to_vec())
    },
    free_on_resume: &[],
    follows_length: |_| false,
    pictures: true,
    resolve: |section| Ok(json!(NextScaleConfig::read(section)?)),
    size: |section, target| NextScaleConfig::read(section)?.size(target),
    capture: |section, _| Ok(NextScaleConfig::read(section)?.capture()),
    footprint: |section, target, documents| {
        NextScaleConfig::read(section)?.footprint(target, documents.count * documents.tokens)
    },
    // It is built on an image model, not on a model of text in memory.
    samples: |_| Samples::default(),
    work: |section, target, batch, _| {
        let transformer = NextScaleConfig::read(section)?.transformer(target)?;
        let rows = batch.lengths.len() as u64 * transformer.length() as u64;
        let operations = 6 * rows * config::row_multiply_adds(&transformer);
        Ok(Work { rows, chunk_rows: rows as i64, operations, remembered: 0 })
    },
    build: |section, context| Ok(Box::new(NextScale::new(NextScaleConfig::read(section)?, context)?)),
};

/// Name of the figure over all scales.
const ACCEPTANCE: &str = "acceptance";
/// Averages kept for every scale.
const METRICS: [&str; 4] = ["loss", ACCEPTANCE, "whole", "chain"];
/// Tells draws of lost labels from others.
const LOST_LABELS: u64 = 1;
/// Parameters that do not decay beside those of one axis: places, levels and temperatures, as the reference has it
/// (FoundationVision/VAR @78b9539, `utils/lr_control.py`).
const NO_DECAY: [&str; 5] = ["pos_start", "pos_1LC", "lvl_embed", "ada_gss", "scale_mul"];

/// A next-scale transformer in training.
pub struct NextScale {
    config: NextScaleConfig,
    model: Var,
    quantizer: Quantizer,
    /// The target's projection, where the target is the teacher.
    teacher: Option<Head>,
    /// Weight of each code's loss, `[L]` float64.
    weights: Tensor,
    parameters: Vec<Parameter>,
}

impl NextScale {
    /// A transformer that was never trained.
    pub fn new(config: NextScaleConfig, context: &DraftContext<'_>) -> Result<Self> {
        let transformer = config.transformer(&context.target)?;
        if !matches!(context.kind, Kind::Float | Kind::Double) {
            let problem = "next-scale transformers are trained in float32";
            return Err(Error::config("target.dtype", problem));
        }
        let parameters: Vec<Parameter> = training::fresh(&transformer, context.seed)
            .into_iter()
            .map(|(name, value)| Ok(parameter(&name, value.f_to_kind(context.kind)?.f_to_device(context.device)?)))
            .collect::<Result<_>>()?;
        let model = Var::build(transformer.clone(), &mut |name, _| {
            let found = parameters.iter().find(|parameter| parameter.name == name);
            let found = found.ok_or_else(|| Error::Failed(format!("`{name}` has no value")))?;
            Ok(found.value.shallow_clone())
        })?;
        let teacher = match config.teacher {
            Teacher::Codes => None,
            Teacher::Target => Some(context.head.to(context.kind, context.device)?),
        };
        let weights = config.weights(&transformer)?.to_device(context.device);
        let quantizer = quantizer(context, &transformer)?;
        Ok(Self { config, model, quantizer, teacher, weights, parameters })
    }

    fn transformer(&self) -> &VarConfig {
        self.model.config()
    }

    /// Logits `[B, L, V]` of pictures with these labels `[B]`.
    fn logits(&self, pictures: &PackedPictures, labels: &Tensor) -> Result<Tensor> {
        let maps = pictures.maps(&self.transformer().patch_nums)?;
        let inputs = tch::no_grad(|| self.quantizer.idx_to_var_input(&maps))?; // [B, L - F, Z]
        self.model.forward(labels, &inputs)
    }

    /// The teacher's logits `[B, L, V]`, of each picture with its label or without it.
    fn taught(&self, head: &Head, features: &FeatureBatch, lost: &[bool]) -> Result<Tensor> {
        let _no_grad = tch::no_grad_guard();
        let codes = self.transformer().length();
        let states = |index: usize| {
            let missing = || Error::Failed(format!("the target handed over no state {index}"));
            let states = features.hidden.get(index).ok_or_else(missing)?;
            let states = states.f_view([lost.len() as i64, codes + 1, -1])?.f_narrow(1, 0, codes)?; // [B, L, C]
            Ok::<_, Error>(states.f_to_kind(self.weights_kind())?)
        };
        let labelled = states(0)?;
        if !lost.contains(&true) {
            return Ok(head.logits(&labelled));
        }
        let marks: Vec<i64> = lost.iter().map(|&lost| i64::from(lost)).collect();
        let marks = device::upload(&marks, labelled.device())?.f_to_kind(Kind::Bool)?.f_view([-1, 1, 1])?;
        Ok(head.logits(&states(1)?.f_where_self(&marks, &labelled)?))
    }

    /// Element type of parameters and losses.
    fn weights_kind(&self) -> Kind {
        self.model.kind()
    }

    /// One pass; gradients are added where a buffer is given.
    fn run(
        &self,
        features: &FeatureBatch,
        plan: &RowPlan,
        global_counts: &[f64],
        gradients: Option<&mut Gradients<'_>>,
    ) -> Result<Tally> {
        let _guard = gradients.is_none().then(tch::no_grad_guard);
        let lost: &Vec<bool> = plan.own()?;
        let device = self.model.device();
        let pictures = PackedPictures::of(&features.batch, self.transformer().length(), device)?;
        let labels = self.labels(&pictures, lost)?;
        let logits = self.logits(&pictures, &labels)?; // [B, L, V]
        let taught = self.teacher.as_ref().map(|head| self.taught(head, features, lost)).transpose()?;
        let each = match &taught {
            Some(taught) => training::divergences(&logits, taught)?,
            None => training::cross_entropies(&logits, &pictures.codes)?,
        }; // [B, L]
        let count = global_counts.first().copied().unwrap_or(0.0).max(1.0);
        let objective = (&each * self.weights.f_to_kind(each.kind())?).f_sum(each.kind())? / count;
        let tally = {
            let _no_grad = tch::no_grad_guard();
            let accepted = acceptance(&logits.detach(), taught.as_ref(), &pictures.codes)?; // [B, L]
            let (sums, counts) = self.sums(&each.detach(), &accepted)?;
            Tally { objective: objective.detach().f_to_kind(Kind::Double)?, sums, counts }
        };
        if let Some(gradients) = gradients {
            let values: Vec<&Tensor> = self.parameters.iter().map(|parameter| &parameter.value).collect();
            let fresh = Tensor::f_run_backward(&[&objective], &values, false, false)?;
            for (index, gradient) in fresh.iter().enumerate() {
                if gradient.defined() {
                    gradients.add(index, gradient, 1.0)?;
                }
                gradients.complete(index)?;
            }
        }
        Ok(tally)
    }

    /// Labels `[B]` with the one that stands for none where a picture lost its own.
    fn labels(&self, pictures: &PackedPictures, lost: &[bool]) -> Result<Tensor> {
        let marks: Vec<i64> = lost.iter().map(|&lost| i64::from(lost)).collect();
        let marks = device::upload(&marks, pictures.labels.device())?.f_to_kind(Kind::Bool)?;
        Ok(pictures.labels.f_masked_fill(&marks, self.transformer().null_label())?)
    }

    /// Sums and counts of the metrics of every scale, from losses and acceptance `[B, L]`.
    fn sums(&self, losses: &Tensor, accepted: &Tensor) -> Result<(Tensor, Vec<f64>)> {
        let pictures = losses.size()[0];
        let mut chain = Tensor::ones([pictures], (Kind::Double, losses.device()));
        let (mut sums, mut counts) = (Vec::new(), Vec::new());
        for scale in 0..self.transformer().scales() {
            let (begin, codes) = (self.transformer().begin(scale), self.transformer().tokens(scale));
            let accepted = accepted.f_narrow(1, begin, codes)?;
            let whole = accepted.f_prod_dim_int(1, false, Kind::Double)?; // [B]
            chain *= &whole;
            sums.extend([
                losses.f_narrow(1, begin, codes)?.f_sum(Kind::Double)?,
                accepted.f_sum(Kind::Double)?,
                whole.f_sum(Kind::Double)?,
                chain.f_sum(Kind::Double)?,
            ]);
            let (pictures, codes) = (pictures as f64, codes as f64);
            counts.extend([pictures * codes, pictures * codes, pictures, pictures]);
        }
        Ok((Tensor::f_stack(&sums, 0)?, counts))
    }
}

/// A parameter, updated as the reference updates it.
fn parameter(name: &str, value: Tensor) -> Parameter {
    let mut parameter = Parameter::new(name, value);
    parameter.group.decay &= !NO_DECAY.iter().any(|part| name.contains(part));
    parameter
}

/// The quantiser of the target's image tokenizer.
fn quantizer(context: &DraftContext<'_>, transformer: &VarConfig) -> Result<Quantizer> {
    let weights =
        context.weights.ok_or_else(|| Error::Failed("the target's image tokenizer is in no folder".to_owned()))?;
    vqvae::load_quantizer(weights, &transformer.patch_nums, context.kind, context.device)
}

/// How often draws from two distributions can be made to agree, position by position: `[B, L]` float64, from logits
/// `[B, L, V]`. Without a teacher's logits its distribution is the codes `[B, L]`.
fn acceptance(draft: &Tensor, teacher: Option<&Tensor>, codes: &Tensor) -> Result<Tensor> {
    let draft = draft.f_softmax(-1, draft.kind())?;
    let shared = match teacher {
        Some(teacher) => {
            let teacher = teacher.f_softmax(-1, teacher.kind())?;
            draft.f_minimum(&teacher)?.f_sum_dim_intlist([-1i64].as_slice(), false, draft.kind())?
        }
        None => draft.f_gather(-1, &codes.f_unsqueeze(-1)?, false)?.f_squeeze_dim(-1)?,
    };
    // Rounding of a sum of probabilities.
    Ok(shared.f_to_kind(Kind::Double)?.f_clamp_max(1.0)?)
}

impl DraftModel for NextScale {
    fn algorithm(&self) -> &'static Algorithm {
        &ALGORITHM
    }

    fn capture(&self) -> Vec<usize> {
        self.config.capture()
    }

    fn parameters(&self) -> &[Parameter] {
        &self.parameters
    }

    fn metrics(&self) -> Vec<String> {
        let scales = 1..=self.transformer().scales();
        scales.flat_map(|scale| METRICS.map(|metric| format!("scale{scale}/{metric}"))).collect()
    }

    fn summary(&self, averages: &[f64]) -> Vec<(String, f64)> {
        let scales: Vec<&[f64]> = averages.chunks(METRICS.len()).collect();
        let chains = scales.iter().map(|scale| scale[3]).sum();
        let codes = |scale: usize| self.transformer().tokens(scale) as f64;
        let accepted: f64 = scales.iter().enumerate().map(|(number, scale)| scale[1] * codes(number)).sum();
        let accepted = accepted / self.transformer().length() as f64;
        vec![(ALGORITHM.selection_metric.to_owned(), chains), (ACCEPTANCE.to_owned(), accepted)]
    }

    fn plan(&self, batch: &PackedBatch, key: StepKey) -> Result<RowPlan> {
        // What is measured has its label.
        let dropout = if key == StepKey::EVALUATION { 0.0 } else { self.config.label_dropout };
        let lost: Vec<bool> =
            batch.documents.iter().map(|document| key.draws(document, LOST_LABELS).uniform(0, 0) < dropout).collect();
        Ok(RowPlan::new(vec![lost.len() as f64], lost))
    }

    fn count(&self, batch: &PackedBatch, _key: StepKey) -> Result<Vec<f64>> {
        Ok(vec![batch.documents.len() as f64])
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
        json!({ "draft": self.config, "transformer": self.transformer().values() })
    }

    fn contract(&self) -> Vec<String> {
        let VarConfig { patch_nums, vocab_size, num_classes, .. } = self.transformer();
        let teacher = match self.config.teacher {
            Teacher::Codes => "codes of pictures",
            Teacher::Target => "the target's distributions",
        };
        vec![format!("scales {patch_nums:?} of {vocab_size} codes, {num_classes} labels; learns from {teacher}")]
    }
}

#[cfg(test)]
mod tests;
