//! XPress: a causal refiner that is run a few times over a whole block, each time on the tokens that it chose before.
//!
//! Paper: arXiv 2608.02438. Reference: speculators 0.9.0 (training), vLLM 0.33 (decoding; the tensors' names are its own).
//! In training the refiner reads true tokens once, and a few times its own, as it will when it drafts.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{HeadKind, TensorSpec, metrics};
use crate::draft::Samples;
use crate::draft::block::config::{BlockConfig, BlockShape, Layout};
use crate::error::{Error, Result};
use crate::strict;

mod network;
mod training;

pub use network::{Before, Refined, Xpress};

/// Row of the table of heads.
pub const KIND: HeadKind = HeadKind {
    name: "xpress",
    summary: "DFlash with a causal refiner that is run a few times over a whole block",
    layout: Layout::FillIn,
    defaults: || json!({"loss": {"ce": 0.1, "tv": 0.9}, "weights": {"name": "fixed", "gamma": 4.0}}),
    check: |config| XpressConfig::read(config).map(|_| ()),
    metrics: |config| {
        let own = ["base_loss", "base_accuracy", "base_prefix"].map(str::to_owned);
        Ok([metrics::names(config.layout(), config.block_size), own.into()].concat())
    },
    wants_teacher: |_| false,
    follows_length: |_| false,
    tensors,
    build: training::build,
    reads_context: false,
    samples: |_| Samples::default(),
};

/// Keys of `draft.head`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct XpressConfig {
    /// `r`
    pub xpress_rank: i64,
    /// Width of the MLP, in ranks.
    pub xpress_mlp_ratio: i64,
    /// Passes of decoding.
    pub xpress_num_passes: usize,
    /// Likeliest tokens of a slot's base logits that decoding chooses from; 0 for all. Training never looks at it.
    pub xpress_topc: i64,
    /// Passes over the refiner's own tokens in training.
    pub consistency_passes: usize,
    /// Factor of their mean loss.
    pub consistency_weight: f64,
    /// Factor of the loss of the base logits, which are what the first pass begins with.
    pub base_weight: f64,
    /// Whether rows count alike in the loss of the base logits, whatever `draft.weights` says.
    pub base_unweighted: bool,
}

impl Default for XpressConfig {
    fn default() -> Self {
        Self {
            xpress_rank: 256,
            xpress_mlp_ratio: 2,
            xpress_num_passes: 6,
            xpress_topc: 512,
            consistency_passes: 3,
            consistency_weight: 0.3,
            base_weight: 0.6,
            base_unweighted: false,
        }
    }
}

impl XpressConfig {
    /// Reads and checks `draft.head`.
    pub fn read(config: &BlockConfig) -> Result<Self> {
        let own: Self = strict::from_value(&Value::Object(config.head.clone()), "draft.head")?;
        let refuse = |key: &str, problem: String| Err(Error::config(format!("draft.head.{key}"), problem));
        for (key, number) in [("xpress_rank", own.xpress_rank), ("xpress_mlp_ratio", own.xpress_mlp_ratio)] {
            if number < 1 {
                return refuse(key, format!("expected 1 or more, got {number}"));
            }
        }
        if own.xpress_topc < 0 {
            return refuse("xpress_topc", format!("expected 0 for all tokens or more, got {}", own.xpress_topc));
        }
        for (key, weight) in [("consistency_weight", own.consistency_weight), ("base_weight", own.base_weight)] {
            if !(weight.is_finite() && weight >= 0.0) {
                return refuse(key, format!("expected 0 or more, got {weight}"));
            }
        }
        Ok(own)
    }

    /// Passes over the refiner's own tokens that have a loss.
    fn free_passes(&self) -> usize {
        if self.consistency_weight > 0.0 { self.consistency_passes } else { 0 }
    }
}

fn tensors(config: &BlockConfig, shape: &BlockShape) -> Result<Vec<TensorSpec>> {
    Ok(network::tensors(&XpressConfig::read(config)?, shape))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::TargetInfo;

    /// The shape of a draft for a target of width 6 with 13 tokens, in blocks of 5.
    pub(super) fn shape(layout: Layout) -> BlockShape {
        let whole = BlockConfig { mask_token_id: Some(1), target_layer_ids: Some(vec![1]), ..BlockConfig::default() };
        let config = BlockConfig { block_size: 5, layout: Some(layout), ..whole };
        config.shape(&TargetInfo::of(6, 13, 4, 64)).unwrap()
    }

    #[test]
    fn a_mixer_of_zeros_begins() {
        let config = BlockConfig { block_size: 5, ..BlockConfig::default() };
        let specs = tensors(&config, &shape(Layout::FillIn)).unwrap();
        let mix = specs.iter().find(|spec| spec.name == "xpress_head.mix.L").unwrap();
        assert_eq!((mix.shape.as_slice(), mix.start), ([256, 5, 5].as_slice(), super::super::Start::Zeros));
        let zeros = specs.iter().filter(|spec| spec.start == super::super::Start::Zeros).count();
        assert_eq!((specs.len(), zeros), (9, 1));
    }

    #[test]
    fn keys_are_checked() {
        for (key, value) in [
            ("xpress_rank", serde_json::json!(0)),
            ("xpress_topc", serde_json::json!(-1)),
            ("base_weight", serde_json::json!(-0.5)),
            ("rank", serde_json::json!(4)),
        ] {
            let head = [(key.to_owned(), value)].into_iter().collect();
            let error = XpressConfig::read(&BlockConfig { head, ..BlockConfig::default() }).unwrap_err();
            assert!(error.to_string().contains(&format!("draft.head.{key}")), "{error}");
        }
    }
}
