//! DSpark's heads: a low-rank bias by the token before a slot, and how likely the slot is accepted.
//!
//! Reference deepseek-ai/DeepSpec `afdfa7c` (`deepspec/modeling/dspark`); also speculators 0.9.0 and SpecForge 0.2.0, whose
//! settings are options here. The block's logits are the target's head on the backbone's rows; the Markov head adds
//! `W2 f(W1[previous token], row)` to each slot's, so that a block is drafted in one pass of the backbone and a short walk.
//! The confidence head predicts the overlap of draft and target in a slot, given the tokens before it: what a verifier may
//! cut blocks by.
//!
//! Different from SpecForge: its generator reads the row behind the one it trained; here both read the same. Different from
//! speculators: supervision is that of the token a slot predicts, and a block ends where it ends (`mask` of the section).
//!
//! Shape legend: `n` blocks, `B` rows of a block, `S` slots, `C` supervised slots, `H` hidden size, `r` rank, `V` vocabulary of
//! the target, `DV` of the draft.

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

pub use network::{Markov, MarkovKind};
pub use training::DSpark;

/// Row of the table of heads.
pub const KIND: HeadKind = HeadKind {
    name: "dspark",
    summary: "a block whose slots read the token before them, with confidence (DeepSpec)",
    layout: Layout::Shift,
    defaults: || json!({"loss": {"ce": 0.1, "l1": 0.9}, "weights": {"name": "fixed", "gamma": 4.0}}),
    check: |config| MarkovConfig::read(config).map(|_| ()),
    metrics: |config| training::metrics(config, &MarkovConfig::read(config)?),
    wants_teacher: |config| MarkovConfig::read(config).is_ok_and(|own| own.confidence_head),
    follows_length: |_| false,
    tensors: |config, shape| Ok(MarkovConfig::read(config)?.tensors(shape)),
    build: |config, shape, tensors| Ok(Box::new(DSpark::new(config, shape, tensors)?)),
    reads_context: false,
    samples: |_| Samples::default(),
};

/// `draft.head` of a DSpark configuration.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MarkovConfig {
    /// `r`
    pub markov_rank: i64,
    /// How the tokens before a slot shift its logits.
    pub markov_head_type: MarkovKind,
    /// Whether acceptance is predicted.
    pub confidence_head: bool,
    /// Whether the prediction reads the embedding of the token before the slot too.
    pub confidence_head_with_markov: bool,
    /// Factor of the confidence's loss.
    pub confidence_weight: f64,
    /// Slots after which a row counts a third in the confidence's loss. Where this is not given it is that of `weights` if
    /// those are fixed, and all rows count alike if they are not.
    pub confidence_gamma: Option<f64>,
    /// Whether a row counts in the confidence's loss by how likely the block gets to it, besides.
    pub confidence_reach: bool,
    /// Whether the confidence's loss leaves the backbone alone.
    pub detach_confidence: bool,
    /// Whether the anchor's row, which predicts nothing where rows fill in their own place, writes the state of an rnn head
    /// before the first slot does. speculators trains this; engines begin with the first slot.
    pub anchor_row_writes_state: bool,
}

impl Default for MarkovConfig {
    fn default() -> Self {
        Self {
            markov_rank: 256,
            markov_head_type: MarkovKind::Vanilla,
            confidence_head: true,
            confidence_head_with_markov: true,
            confidence_weight: 1.0,
            confidence_gamma: None,
            confidence_reach: false,
            detach_confidence: false,
            anchor_row_writes_state: false,
        }
    }
}

impl MarkovConfig {
    /// Reads and checks `draft.head`.
    pub fn read(config: &BlockConfig) -> Result<Self> {
        let own: Self = strict::from_value(&Value::Object(config.head.clone()), "draft.head")?;
        // Without a rank there is a confidence alone.
        let none = own.markov_rank == 0 && own.confidence_head && own.markov_head_type == MarkovKind::Vanilla;
        if own.markov_rank < 1 && !none {
            let problem = format!("expected a rank of at least 1, got {}", own.markov_rank);
            return Err(Error::config("draft.head.markov_rank", problem)
                .with_hint("a block without a Markov head is the algorithm `dflash`"));
        }
        if !own.confidence_weight.is_finite() || own.confidence_weight < 0.0 {
            let problem = format!("expected a number that is not negative, got {}", own.confidence_weight);
            return Err(Error::config("draft.head.confidence_weight", problem));
        }
        if let Some(gamma) = own.confidence_gamma.filter(|gamma| !gamma.is_finite() || *gamma <= 0.0) {
            let problem = format!("expected a positive number, got {gamma}");
            return Err(Error::config("draft.head.confidence_gamma", problem));
        }
        if own.anchor_row_writes_state && own.markov_head_type != MarkovKind::Rnn {
            let problem = "only a head of type rnn has a state";
            return Err(Error::config("draft.head.anchor_row_writes_state", problem));
        }
        Ok(own)
    }

    /// Tensors in creation order, by the engines' names.
    pub fn tensors(&self, shape: &BlockShape) -> Vec<TensorSpec> {
        let (hidden, rank) = (shape.hidden_size, self.markov_rank);
        let noise = Start::Normal(0.02);
        let mut tensors = Vec::new();
        if rank > 0 {
            let first = TensorSpec::new("markov_head.markov_w1.weight", &[shape.vocab_size, rank], Start::Normal(0.01));
            tensors.extend([
                first,
                TensorSpec::new("markov_head.markov_w2.weight", &[shape.draft_vocab_size, rank], noise),
            ]);
        }
        let mut layer = |name: &str, out: i64, width: i64| {
            tensors.push(TensorSpec::new(format!("{name}.weight"), &[out, width], noise));
            tensors.push(TensorSpec::new(format!("{name}.bias"), &[out], Start::Zeros));
        };
        match self.markov_head_type {
            MarkovKind::Vanilla => {}
            MarkovKind::Gated => layer("markov_head.gate_proj", rank, hidden + rank),
            MarkovKind::Rnn => layer("markov_head.joint_proj", 3 * rank, 2 * rank + hidden),
        }
        if self.confidence_head {
            layer("confidence_head.proj", 1, hidden + if self.confidence_head_with_markov { rank } else { 0 });
        }
        tensors
    }
}
