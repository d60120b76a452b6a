//! Domino's head: a recurrence over the tokens of a block corrects the logits of its slots.
//!
//! Reference SpecForge `a6b6b02` (`specforge/algorithms/common/dflash_family_model.py`, `modeling/draft/domino.py`), decoding
//! as SGLang 0.5.23 does it. The block's logits are the target's head on the backbone's rows; a GRU reads the target's
//! embeddings of the anchor and the tokens before a slot, and `P2 silu(P1 [row; state])` is added to the slot's logits. The
//! first slots ([`DominoConfig::pure_draft_prefix_len`]) are left alone. A block gives `B - 1` tokens in both layouts.
//!
//! The loss is `(1 - w)` times that of the corrected logits and `w` times that of the backbone's own, where `w` falls to 0
//! while the run goes on.
//!
//! Shape legend: `n` blocks, `B` rows of a block, `S` slots, `C` supervised slots, `H` hidden size, `g` size of the state, `m`
//! of the bottleneck, `V` vocabulary.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{HeadKind, Start, TensorSpec};
use crate::draft::Samples;
use crate::draft::block::config::{BlockConfig, BlockShape, Layout};
use crate::error::{Error, Result};
use crate::strict;

mod network;
#[cfg(test)]
mod tests;
mod training;

pub use network::Domino;
pub use training::{DominoHead, Support};

/// Row of the table of heads.
pub const KIND: HeadKind = HeadKind {
    name: "domino",
    summary: "a block whose slots are corrected by a recurrence over the tokens before them (SpecForge)",
    layout: Layout::Shift,
    defaults: || json!({"weights": {"name": "fixed", "gamma": 7.0}}),
    check: |config| DominoConfig::read(config).and_then(|_| super::whole_vocabulary(config)),
    metrics: |config| Ok(training::metrics(config)),
    wants_teacher: |_| false,
    follows_length: |_| true,
    tensors: |config, shape| DominoConfig::read(config)?.tensors(shape),
    build: |config, shape, tensors| Ok(Box::new(DominoHead::new(config, shape, tensors)?)),
    reads_context: false,
    samples: |_| Samples::default(),
};

/// `draft.head` of a Domino configuration.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DominoConfig {
    /// `g`
    pub gru_hidden_dim: i64,
    /// `m`
    pub emb_dim: i64,
    /// Slots at the beginning of a block that are not corrected. SGLang wants 1.
    pub pure_draft_prefix_len: i64,
    /// Share of the objective that the backbone's own logits have at the beginning of the run.
    pub base_weight: f64,
    /// Share of the run over which that falls to 0, in a line.
    pub base_weight_until: f64,
    /// Which losses learn until the first error only, where `weights` are `auf`.
    pub support: Support,
}

impl Default for DominoConfig {
    fn default() -> Self {
        Self {
            gru_hidden_dim: 1024,
            emb_dim: 256,
            pure_draft_prefix_len: 1,
            base_weight: 1.0,
            base_weight_until: 0.5,
            support: Support::Shared,
        }
    }
}

impl DominoConfig {
    /// Reads and checks `draft.head`.
    pub fn read(config: &BlockConfig) -> Result<Self> {
        let own: Self = strict::from_value(&Value::Object(config.head.clone()), "draft.head")?;
        let refuse = |key: &str, problem: String| Err(Error::config(format!("draft.head.{key}"), problem));
        for (key, size) in [("gru_hidden_dim", own.gru_hidden_dim), ("emb_dim", own.emb_dim)] {
            if size < 1 {
                return refuse(key, format!("expected a size of at least 1, got {size}"));
            }
        }
        if !(0..config.block_size).contains(&own.pure_draft_prefix_len) {
            let most = config.block_size - 1;
            return refuse(
                "pure_draft_prefix_len",
                format!("expected 0 to {most} slots of a block of {}, got {}", most + 1, own.pure_draft_prefix_len),
            );
        }
        if !(0.0..=1.0).contains(&own.base_weight) {
            return refuse("base_weight", format!("expected a share from 0 to 1, got {}", own.base_weight));
        }
        if !(own.base_weight_until > 0.0 && own.base_weight_until <= 1.0) {
            let problem = format!("expected a share of the run above 0 and up to 1, got {}", own.base_weight_until);
            return refuse("base_weight_until", problem);
        }
        Ok(own)
    }

    /// Share of the objective that the backbone's own logits have when this share of the run is over.
    pub fn base_share(&self, progress: f64) -> f64 {
        (self.base_weight * (1.0 - progress / self.base_weight_until)).max(0.0)
    }

    /// Tensors in creation order, by the engine's names.
    pub fn tensors(&self, shape: &BlockShape) -> Result<Vec<TensorSpec>> {
        if shape.draft_vocab_size != shape.vocab_size {
            let problem = format!(
                "domino corrects the target's whole vocabulary of {}, got a draft's own of {}",
                shape.vocab_size, shape.draft_vocab_size
            );
            return Err(Error::config("draft.vocab_map", problem).with_hint("leave `draft.vocab_map` out"));
        }
        let (hidden, state, narrow) = (shape.hidden_size, self.gru_hidden_dim, self.emb_dim);
        // As wide as PyTorch's uniform start of a recurrence.
        let recurrence = Start::Normal((3.0 * state as f64).sqrt().recip());
        let noise = Start::Normal(0.02);
        Ok(vec![
            TensorSpec::new("prefix_gru.weight_ih_l0", &[3 * state, hidden], recurrence),
            TensorSpec::new("prefix_gru.weight_hh_l0", &[3 * state, state], recurrence),
            TensorSpec::new("embed_proj.0.weight", &[narrow, hidden + state], noise),
            TensorSpec::new("embed_proj.2.weight", &[shape.vocab_size, narrow], noise),
        ])
    }
}
