//! LiLiCorr: candidates of all slots look at each other, and each step from one to the next is scored.
//!
//! Paper: "LiLiCorr: Lightweight Likelihood Correlation of Parallel Drafts for Speculative Decoding", arXiv 2608.20530.
//! Reference: ModelOpt 0.48 (training), vLLM 0.33 and SGLang 0.5 (decoding; the tensors' names are theirs). What differs: the
//! terms are divided by a count that is known before anything is computed ([`LilicorrDenominator`]).

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{HeadKind, TensorSpec, metrics};
use crate::draft::Samples;
use crate::draft::block::config::{BlockConfig, BlockShape, Layout};
use crate::error::{Error, Result};
use crate::strict;

mod network;
mod training;

pub use network::Lilicorr;

/// Row of the table of heads.
pub const KIND: HeadKind = HeadKind {
    name: "lilicorr",
    summary: "DFlash with a network over the candidates of all slots, which scores each step from one to the next",
    layout: Layout::FillIn,
    defaults: || json!({"weights": {"name": "fixed", "gamma": 7.0}}),
    check: |config| {
        LilicorrConfig::read(config)?;
        if config.layout() != Layout::FillIn {
            let problem = "expected fill_in: LiLiCorr's slots are the rows behind the anchor's, in every engine";
            return Err(Error::config("draft.layout", problem));
        }
        super::whole_vocabulary(config)
    },
    metrics: |config| {
        let own = ["base_accuracy", "lilicorr_ce", "reached", "selected_prefix", "base_prefix", "oracle_prefix"];
        Ok([metrics::names(config.layout(), config.block_size), own.map(str::to_owned).into()].concat())
    },
    wants_teacher: |config| LilicorrConfig::read(config).is_ok_and(|own| own.reads_teacher()),
    follows_length: |_| false,
    tensors,
    build: training::build,
    reads_context: true,
    samples: |_| Samples::default(),
};

/// Keys of `draft.head`. Those of the network have the names that engines read.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LilicorrConfig {
    /// `K`, candidates of a slot. Engines want a power of two, 16 at most.
    pub lilicorr_candidate_topk: i64,
    /// `h`, the head's width; 0 for the draft's.
    pub lilicorr_hidden_size: i64,
    /// Layers over the candidates.
    pub lilicorr_num_layers: i64,
    /// Attention heads of a layer.
    pub lilicorr_num_heads: i64,
    /// Width of a layer's MLP, in widths of the head.
    pub lilicorr_mlp_ratio: f64,
    /// `D`, size of the vectors whose cosines are the scores.
    pub lilicorr_factor_dim: i64,
    /// Vectors shorter than this are divided by it.
    pub lilicorr_vector_eps: f64,
    /// Multiplies the cosines.
    pub lilicorr_logit_scale: f64,
    /// Factor of the cross-entropy over the candidates.
    pub ce_weight: f64,
    /// Factor of the hinge loss: the true candidate is to lead by `margin`.
    pub margin_weight: f64,
    /// Factor of the penalty: probability of candidates that the target thinks less of than of the true one, by how much less.
    pub penalty_weight: f64,
    /// Factor of the divergence from the target's distribution over the candidates.
    pub calibration_weight: f64,
    /// See `margin_weight`.
    pub margin: f64,
    /// What the four terms are divided by.
    pub denominator: LilicorrDenominator,
}

/// What LiLiCorr's terms are divided by.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LilicorrDenominator {
    /// All slots of the blocks that are supervised throughout: known before anything is computed, so that gradients of batches
    /// and ranks add up to those of the whole.
    #[default]
    Slots,
    /// Those of them whose token and all tokens before it are among the candidates: the slots that have a loss. ModelOpt's.
    Reached,
}

impl Default for LilicorrConfig {
    fn default() -> Self {
        Self {
            lilicorr_candidate_topk: 8,
            lilicorr_hidden_size: 1024,
            lilicorr_num_layers: 2,
            lilicorr_num_heads: 8,
            lilicorr_mlp_ratio: 2.0,
            lilicorr_factor_dim: 1024,
            lilicorr_vector_eps: 1e-4,
            lilicorr_logit_scale: 8.0,
            ce_weight: 0.25,
            margin_weight: 0.0,
            penalty_weight: 0.25,
            calibration_weight: 0.0,
            margin: 2.0,
            denominator: LilicorrDenominator::default(),
        }
    }
}

impl LilicorrConfig {
    /// Reads and checks `draft.head`.
    pub fn read(config: &BlockConfig) -> Result<Self> {
        let own: Self = strict::from_value(&Value::Object(config.head.clone()), "draft.head")?;
        own.check().map_err(refused)?;
        Ok(own)
    }

    /// The same, with what only a draft's shape can refuse.
    pub fn of(config: &BlockConfig, shape: &BlockShape) -> Result<Self> {
        let own = Self::read(config)?;
        own.fits(shape).map_err(refused)?;
        Ok(own)
    }

    fn fits(&self, shape: &BlockShape) -> Result<(), (&'static str, String)> {
        if self.lilicorr_candidate_topk > shape.vocab_size {
            let (most, got) = (shape.vocab_size, self.lilicorr_candidate_topk);
            return Err(("lilicorr_candidate_topk", format!("expected {most} or less, the vocabulary, got {got}")));
        }
        if self.width(shape) % self.lilicorr_num_heads != 0 {
            let (width, heads) = (self.width(shape), self.lilicorr_num_heads);
            return Err(("lilicorr_num_heads", format!("expected a divisor of the width {width}, got {heads}")));
        }
        if self.mlp_width(shape) < 1 {
            return Err(("lilicorr_mlp_ratio", format!("gives an MLP of no width, got {}", self.lilicorr_mlp_ratio)));
        }
        Ok(())
    }

    fn check(&self) -> Result<(), (&'static str, String)> {
        if self.lilicorr_hidden_size < 0 {
            let got = self.lilicorr_hidden_size;
            return Err(("lilicorr_hidden_size", format!("expected 0 for the draft's or more, got {got}")));
        }
        for (key, number) in [
            ("lilicorr_candidate_topk", self.lilicorr_candidate_topk),
            ("lilicorr_num_layers", self.lilicorr_num_layers),
            ("lilicorr_num_heads", self.lilicorr_num_heads),
            ("lilicorr_factor_dim", self.lilicorr_factor_dim),
        ] {
            if number < 1 {
                return Err((key, format!("expected 1 or more, got {number}")));
            }
        }
        if !(self.lilicorr_vector_eps > 0.0 && self.lilicorr_vector_eps < 0.5) {
            let got = self.lilicorr_vector_eps;
            return Err(("lilicorr_vector_eps", format!("expected a number between 0 and 0.5, got {got}")));
        }
        for (key, number) in [("lilicorr_logit_scale", self.lilicorr_logit_scale), ("margin", self.margin)] {
            if !(number.is_finite() && number > 0.0) {
                return Err((key, format!("expected a number above 0, got {number}")));
            }
        }
        let weights = [
            ("ce_weight", self.ce_weight),
            ("margin_weight", self.margin_weight),
            ("penalty_weight", self.penalty_weight),
            ("calibration_weight", self.calibration_weight),
        ];
        for (key, weight) in weights {
            if !(weight.is_finite() && weight >= 0.0) {
                return Err((key, format!("expected 0 or more, got {weight}")));
            }
        }
        if weights.iter().all(|(_, weight)| *weight == 0.0) {
            let problem =
                "is 0, and so are margin_weight, penalty_weight and calibration_weight: the head would not learn";
            return Err(("ce_weight", problem.to_owned()));
        }
        Ok(())
    }

    /// `h`
    pub fn width(&self, shape: &BlockShape) -> i64 {
        if self.lilicorr_hidden_size == 0 { shape.hidden_size } else { self.lilicorr_hidden_size }
    }

    /// Width of a layer's MLP.
    pub fn mlp_width(&self, shape: &BlockShape) -> i64 {
        (self.width(shape) as f64 * self.lilicorr_mlp_ratio) as i64
    }

    /// Whether a term reads the target's own predictions.
    fn reads_teacher(&self) -> bool {
        self.penalty_weight > 0.0 || self.calibration_weight > 0.0
    }
}

fn tensors(config: &BlockConfig, shape: &BlockShape) -> Result<Vec<TensorSpec>> {
    Ok(network::tensors(&LilicorrConfig::of(config, shape)?, shape))
}

fn refused((key, problem): (&str, String)) -> Error {
    Error::config(format!("draft.head.{key}"), problem)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::TargetInfo;

    fn refused_by(head: Value) -> String {
        let section = json!({"algorithm": "lilicorr", "num_layers": 1, "mask_token_id": 1, "target_layer_ids": [1]});
        let Value::Object(head) = head else { unreachable!("an object") };
        let config = BlockConfig { head, ..BlockConfig::read(&section).unwrap() };
        let shape = config.shape(&TargetInfo::of(12, 40, 6, 64)).unwrap();
        LilicorrConfig::of(&config, &shape).map_or_else(|error| error.to_string(), |_| String::new())
    }

    #[test]
    fn keys_are_checked() {
        for (key, value) in [
            ("lilicorr_candidate_topk", json!(41)),
            ("lilicorr_candidate_topk", json!(0)),
            ("lilicorr_hidden_size", json!(-1)),
            ("lilicorr_num_layers", json!(0)),
            ("lilicorr_num_heads", json!(7)),
            ("lilicorr_mlp_ratio", json!(0)),
            ("lilicorr_vector_eps", json!(0.5)),
            ("lilicorr_logit_scale", json!(0)),
            ("penalty_weight", json!(-1)),
            ("margin", json!(0)),
            ("denominator", json!("rows")),
            ("topk", json!(4)),
        ] {
            let problem = refused_by(json!({key: value}));
            assert!(problem.contains(&format!("draft.head.{key}")), "{key}: {problem}");
        }
        assert!(refused_by(json!({"ce_weight": 0, "penalty_weight": 0})).contains("would not learn"));
        assert_eq!(refused_by(json!({"lilicorr_hidden_size": 0, "lilicorr_num_heads": 4})), "");
    }
}
