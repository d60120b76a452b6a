//! DFlash2: among the likeliest tokens of each slot, the one that fits behind the token before it.
//!
//! Paper: none; z-lab's `dflash` 0.1.0 runs it, and speculators 0.9.0, ModelOpt 0.48 and NeMo AutoModel 0.7 train it, each with
//! an objective of its own ([`SelectorObjective`]; SpecForge's is the default). The convolutions of a DFlash2 draft belong to its backbone
//! (`draft.conv`).

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use tch::{Kind, Tensor};

use super::lattice::{Candidates, pick};
use super::prefix::{begun, runs, slots, total};
use super::{BlockHead, HeadKind, Start, TensorSpec, Tensors, metrics};
use crate::draft::Samples;
use crate::draft::block::chunk::{Chunk, ChunkLoss};
use crate::draft::block::config::{BlockConfig, BlockShape, Layout};
use crate::draft::block::losses::{FirstErrorFocal, Labels, Objective, RowValues, Rows, SelectorObjective, Weighting};
use crate::error::{Error, Result};
use crate::strict;

mod network;

pub use network::{PREDECESSOR, PROJECTION, SUCCESSOR, Selector};

/// Row of the table of heads.
pub const KIND: HeadKind = HeadKind {
    name: "dflash2",
    summary: "DFlash with convolutions in the block, and a selector among the likeliest tokens of each slot",
    layout: Layout::FillIn,
    defaults: || json!({"conv": {"kernel_size": 2, "group_size": 16}, "weights": {"name": "fixed", "gamma": 7.0}}),
    check: |config| SelectorConfig::read(config).and_then(|_| super::whole_vocabulary(config)),
    metrics: |config| {
        let recall = format!("recall_at_{}", SelectorConfig::read(config)?.selector_top_k);
        let own = ["base_accuracy", "selector_loss", &recall, "base_prefix", "oracle_prefix"].map(str::to_owned);
        Ok([metrics::names(config.layout(), config.block_size), own.into()].concat())
    },
    wants_teacher: |config| SelectorConfig::read(config).is_ok_and(|own| own.objective.labels() == Labels::Teacher),
    follows_length: |config| SelectorConfig::read(config).is_ok_and(|own| own.selector_from + own.selector_ramp > 0.0),
    tensors,
    build,
    reads_context: false,
    samples: |_| Samples::default(),
};

/// Deviation of predecessor codebook and projection at the beginning.
const START: f64 = 0.02;

/// Keys of `draft.head`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SelectorConfig {
    /// `r`
    pub selector_rank: i64,
    /// `K`, candidates of a slot.
    pub selector_top_k: i64,
    /// What the selector learns from.
    pub objective: SelectorObjective,
    /// Factor of the selector's term.
    pub selector_weight: f64,
    /// Share of the run that goes by before the selector's term counts: its candidates are nothing but noise at first.
    pub selector_from: f64,
    /// Share of the run over which the factor then grows to its whole; 0 for at once.
    pub selector_ramp: f64,
    /// Whether the selector's term trains the selector alone, and leaves logits and hidden states as they are.
    pub detach_backbone: bool,
    /// Multiplies the embeddings of the block's tokens. For the backbone.
    pub input_embedding_scale: f64,
    /// Multiplies the logits of the vocabulary projection.
    pub output_multiplier: f64,
    /// `c` of `c tanh(x / c)`, which bends multiplied logits; nothing is bent where this is not given.
    pub final_logit_softcapping: Option<f64>,
}

impl Default for SelectorConfig {
    fn default() -> Self {
        Self {
            selector_rank: 256,
            selector_top_k: 16,
            objective: SelectorObjective::default(),
            selector_weight: 1.0,
            selector_from: 0.0,
            selector_ramp: 0.0,
            detach_backbone: false,
            input_embedding_scale: 1.0,
            output_multiplier: 1.0,
            final_logit_softcapping: None,
        }
    }
}

impl SelectorConfig {
    /// Reads and checks `draft.head`.
    pub fn read(config: &BlockConfig) -> Result<Self> {
        let own: Self = strict::from_value(&Value::Object(config.head.clone()), "draft.head")?;
        let refuse = |key: &str, problem: String| Err(Error::config(format!("draft.head.{key}"), problem));
        if own.selector_rank < 1 {
            return refuse("selector_rank", format!("expected 1 or more, got {}", own.selector_rank));
        }
        if own.selector_top_k < 1 {
            return refuse("selector_top_k", format!("expected 1 or more, got {}", own.selector_top_k));
        }
        if !(own.selector_weight.is_finite() && own.selector_weight >= 0.0) {
            return refuse("selector_weight", format!("expected 0 or more, got {}", own.selector_weight));
        }
        if !(0.0..1.0).contains(&own.selector_from) {
            return refuse(
                "selector_from",
                format!("expected a share of the run from 0 to below 1, got {}", own.selector_from),
            );
        }
        if !(0.0..=1.0).contains(&own.selector_ramp) {
            return refuse(
                "selector_ramp",
                format!("expected a share of the run from 0 to 1, got {}", own.selector_ramp),
            );
        }
        let positive = |number: f64| number.is_finite() && number > 0.0;
        for (key, number) in [
            ("input_embedding_scale", Some(own.input_embedding_scale)),
            ("output_multiplier", Some(own.output_multiplier)),
            ("final_logit_softcapping", own.final_logit_softcapping),
        ] {
            if let Some(number) = number.filter(|&number| !positive(number)) {
                return refuse(key, format!("expected a number above 0, got {number}"));
            }
        }
        Ok(own)
    }

    /// Factor of the selector's term when this share of the run is over. SpecForge's trainer has such a schedule, too.
    pub fn weight(&self, progress: f64) -> f64 {
        let begun = progress - self.selector_from;
        match begun < 0.0 {
            true => 0.0,
            false if begun >= self.selector_ramp => self.selector_weight,
            false => self.selector_weight * begun / self.selector_ramp,
        }
    }

    /// The same, with what only a draft's shape can refuse.
    pub fn of(config: &BlockConfig, shape: &BlockShape) -> Result<Self> {
        let own = Self::read(config)?;
        if own.selector_top_k > shape.vocab_size {
            let problem = format!("expected {} or less, the vocabulary, got {}", shape.vocab_size, own.selector_top_k);
            return Err(Error::config("draft.head.selector_top_k", problem));
        }
        Ok(own)
    }
}

fn tensors(config: &BlockConfig, shape: &BlockShape) -> Result<Vec<TensorSpec>> {
    let own = SelectorConfig::of(config, shape)?;
    let codebook = [shape.vocab_size, own.selector_rank];
    Ok(vec![
        TensorSpec::new(PREDECESSOR, &codebook, Start::Normal(START)),
        TensorSpec::new(SUCCESSOR, &codebook, Start::Zeros),
        TensorSpec::new(PROJECTION, &[own.selector_rank, shape.hidden_size], Start::Normal(START)),
    ])
}

fn build(config: &BlockConfig, shape: &BlockShape, tensors: Tensors<'_>) -> Result<Box<dyn BlockHead>> {
    let own = SelectorConfig::of(config, shape)?;
    let selector = Selector::new(&own, tensors)?;
    let (base, focal) = (Objective::of(config)?, config.first_error_focal);
    Ok(Box::new(SelectorHead { selector, own, base, focal, shape: shape.clone() }))
}

/// The selector in training.
struct SelectorHead {
    selector: Selector,
    own: SelectorConfig,
    /// The term of the backbone's logits.
    base: Objective,
    focal: Option<FirstErrorFocal>,
    shape: BlockShape,
}

impl SelectorHead {
    /// What slots count in the selector's term, `[n, S]`: what they count in the base term. speculators' D-PACE weighs the
    /// selector by its own chances.
    fn weights(&self, chunk: &Chunk<'_>, base: &RowValues, scores: &Tensor, places: &Tensor) -> Result<Tensor> {
        match (self.own.objective, self.base.weights) {
            (SelectorObjective::Speculators, Weighting::DPace { .. }) => {
                self.base.weights(chunk, &Rows::new(&scores.detach(), None, places)?)
            }
            _ => Ok(base.weights.shallow_clone()),
        }
    }
}

impl BlockHead for SelectorHead {
    fn metric_counts(&self, supervised: &[Vec<bool>]) -> Vec<f64> {
        let (slots, begun) = (slots(supervised), begun(supervised));
        [metrics::counts(&self.shape, supervised), vec![slots, slots, slots, begun, begun]].concat()
    }

    fn counts(&self, supervised: &[Vec<bool>]) -> Vec<f64> {
        vec![self.base.count(supervised)]
    }

    fn measures(&self) -> bool {
        let own = matches!(self.own.objective, SelectorObjective::Modelopt | SelectorObjective::Automodel);
        own || self.base.measures() || self.focal.is_some()
    }

    fn loss(&self, chunk: &Chunk<'_>) -> Result<ChunkLoss> {
        let rows = chunk.pick(&chunk.slots()); // [C, H]
        let logits = self.selector.finish(chunk.logits(&rows)?); // [C, DV]
        let (base, values) = self.base.term(chunk, &logits)?;
        let focal = self.focal.as_ref().map(|focal| self.base.focal(focal, chunk, &logits)).transpose()?;

        let (rows, logits) = match self.own.detach_backbone {
            true => (rows.detach(), logits.detach()),
            false => (rows, logits),
        };
        let serving = self.selector.candidates(&logits); // [C, K]
        let gold = self.own.objective.gold(chunk, &serving.ids)?;
        let candidates =
            Candidates { logits: logits.gather(1, &gold.candidates, false), ids: gold.candidates.shallow_clone() };
        let previous = chunk.pick(&chunk.previous()); // [C]
        let scores = self.selector.scores(&candidates, &self.selector.project(&rows), &previous); // [C, K]
        let weights = self.weights(chunk, &values, &scores, &gold.places)?;
        let mut term = self.own.objective.term(&self.base, chunk, &scores, &gold, &weights);
        term.factor *= self.own.weight(chunk.progress);

        // Metrics are of what decoding would do: with its candidates, right where the objective's token is. Behind true tokens
        // that is decoding itself, as long as it has been right.
        let found = serving.ids.gather(1, &gold.places.unsqueeze(1), false).squeeze_dim(1);
        let right = pick(&gold.candidates, &gold.places); // [C]
        let among = found.eq_tensor(&right).logical_and(&gold.among); // [C]
        let chosen = scores.detach().argmax(-1, false).eq_tensor(&gold.places).logical_and(&among); // [C]
        let log_scores = pick(&scores.detach().log_softmax(-1, scores.kind()), &gold.places);
        let own = vec![
            total(&values.hits),
            total(&(-log_scores * among.to_kind(Kind::Float))),
            total(&among),
            runs(chunk, &values.hits),
            runs(chunk, &among),
        ];
        let mut metrics = metrics::sums(chunk, &values.losses, &chosen);
        metrics.extend(own);
        Ok(ChunkLoss { terms: [base, term].into_iter().chain(focal).collect(), metrics })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::models::TargetInfo;

    #[test]
    fn a_successor_codebook_of_zeros_begins() {
        let config = BlockConfig { mask_token_id: Some(1), target_layer_ids: Some(vec![1]), ..BlockConfig::default() };
        let shape = config.shape(&TargetInfo::of(6, 40, 4, 64)).unwrap();
        let starts: Vec<Start> = tensors(&config, &shape).unwrap().iter().map(|spec| spec.start).collect();
        assert_eq!(starts, [Start::Normal(0.02), Start::Zeros, Start::Normal(0.02)]);
    }

    #[test]
    fn the_selectors_term_comes_later_and_grows() {
        let at = |own: &SelectorConfig| [0.0, 0.1, 0.25, 0.375, 0.5, 1.0].map(|progress| own.weight(progress));
        let own =
            SelectorConfig { selector_weight: 2.0, selector_from: 0.25, selector_ramp: 0.25, ..Default::default() };
        assert_eq!(at(&own), [0.0, 0.0, 0.0, 1.0, 2.0, 2.0]);
        assert_eq!(at(&SelectorConfig { selector_ramp: 0.0, ..own }), [0.0, 0.0, 2.0, 2.0, 2.0, 2.0]);
        assert_eq!(at(&SelectorConfig::default()), [1.0; 6]);
    }

    #[test]
    fn keys_are_checked() {
        for (key, value) in [
            ("selector_rank", json!(0)),
            ("selector_top_k", json!(41)),
            ("selector_weight", json!(-1)),
            ("selector_from", json!(1)),
            ("selector_ramp", json!(1.5)),
            ("output_multiplier", json!(0)),
            ("final_logit_softcapping", json!(-2)),
            ("objective", json!("z_lab")),
            ("top_k", json!(4)),
        ] {
            let head = [(key.to_owned(), value)].into_iter().collect();
            let whole =
                BlockConfig { mask_token_id: Some(1), target_layer_ids: Some(vec![1]), ..BlockConfig::default() };
            let config = BlockConfig { head, ..whole };
            let shape = config.shape(&TargetInfo::of(6, 40, 4, 64)).unwrap();
            let error = SelectorConfig::of(&config, &shape).unwrap_err();
            assert!(error.to_string().contains(&format!("draft.head.{key}")), "{error}");
        }
    }
}
