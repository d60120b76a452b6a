//! What the supervised slots of a block count.

use serde::{Deserialize, Serialize};
use tch::Tensor;

use super::{Rows, credit};
use crate::draft::block::chunk::Chunk;
use crate::error::{Error, Result};
use crate::strict;

/// What the slots of a block count; slots that are not supervised count nothing. Slots count from 0, so that `exp(-slot /
/// gamma)` is 1 for the first token that a block drafts in every layout. Published: gamma 7 for blocks of 16, 5 for 10 and
/// 4 for 8 (DFlash, arXiv 2602.06036).
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(tag = "name", rename_all = "snake_case", deny_unknown_fields)]
pub enum Weighting {
    /// All alike.
    #[default]
    #[serde(deserialize_with = "strict::nothing")]
    Even,
    /// `exp(-slot / gamma)`.
    Fixed {
        /// Slots after which a row counts a third.
        gamma: f64,
    },
    /// D-PACE (arXiv 2605.18810): tokens that are expected to be accepted from the slot on, by the draft's probability of
    /// the right token.
    DPace {
        /// Least chance of a slot.
        #[serde(default = "half")]
        alpha: f64,
        /// Which factor of the credit.
        #[serde(default)]
        part: CreditPart,
    },
    /// D-PARD (and DPALA, with the loss `log_overlap`): the same by the probability that a sampled token is accepted.
    DPard {
        /// Least chance of a slot.
        #[serde(default = "half")]
        alpha: f64,
    },
    /// Accept until fail (arXiv 2607.01893): slots up to and including the draft's first error.
    Auf {
        /// They count `exp(-slot / gamma)` where this is given.
        #[serde(default)]
        gamma: Option<f64>,
    },
}

/// Factors of D-PACE's credit, for ablation.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CreditPart {
    /// Both.
    #[default]
    Whole,
    /// The chance to survive up to the slot.
    Confidence,
    /// What is then expected from it on.
    Continuation,
}

fn half() -> f64 {
    0.5
}

impl Weighting {
    /// Refuses numbers that make no weights; `key` names the weighting in the configuration.
    pub fn check(self, key: &str) -> Result<()> {
        let problem = |name: &str, expected: &str, got: f64| {
            Err(Error::config(format!("{key}.{name}"), format!("expected {expected}, got {got}")))
        };
        match self {
            Self::Fixed { gamma } | Self::Auf { gamma: Some(gamma) } if !(gamma.is_finite() && gamma > 0.0) => {
                problem("gamma", "a positive number", gamma)
            }
            Self::DPace { alpha, .. } if !(0.0..=1.0).contains(&alpha) => problem("alpha", "0 to 1", alpha),
            Self::DPard { alpha } if !(alpha > 0.0 && alpha < 1.0) => {
                problem("alpha", "a number between 0 and 1", alpha)
            }
            _ => Ok(()),
        }
    }

    /// Whether it reads the target's distribution.
    pub fn wants_teacher(self) -> bool {
        matches!(self, Self::DPard { .. })
    }

    /// What a slot counts where that is known before anything is computed.
    pub fn planned(self, slot: usize) -> Option<f64> {
        match self {
            Self::Even => Some(1.0),
            Self::Fixed { gamma } => Some((-(slot as f64) / gamma).exp()),
            Self::DPace { .. } | Self::DPard { .. } | Self::Auf { .. } => None,
        }
    }

    /// The same without what depends on the draft's errors: what another branch counts where only one learns until the
    /// first error.
    pub fn without_support(self) -> Self {
        match self {
            Self::Auf { gamma: Some(gamma) } => Self::Fixed { gamma },
            Self::Auf { gamma: None } => Self::Even,
            other => other,
        }
    }

    /// `[n, S]` weights of a chunk whose supervised slots have these rows, without a graph.
    pub fn weights(self, chunk: &Chunk<'_>, rows: &Rows) -> Result<Tensor> {
        let supervised = &chunk.supervised;
        let like = rows.truth(); // [C]
        let decayed = |marks: &Tensor, gamma: Option<f64>| {
            let marks = marks.to_kind(like.kind());
            match gamma {
                Some(gamma) => marks * credit::decay(chunk.shape.slots(), gamma, &like),
                None => marks,
            }
        };
        Ok(match self {
            Self::Even => decayed(supervised, None),
            Self::Fixed { gamma } => decayed(supervised, Some(gamma)),
            Self::DPace { alpha, part } => {
                let chances = chunk.spread(&like, 1.0);
                match part {
                    CreditPart::Whole => credit::credit(&chances, supervised, alpha),
                    CreditPart::Confidence => credit::survival(&chances, supervised, alpha) * supervised,
                    CreditPart::Continuation => credit::continuation(&chances, supervised, alpha),
                }
            }
            Self::DPard { alpha } => {
                let acceptance = rows.acceptance().ok_or_else(|| {
                    Error::Failed("`d_pard` weighs rows by the target's distribution, and it is not here".to_owned())
                })?;
                credit::credit(&chunk.spread(&acceptance, 1.0), supervised, alpha)
            }
            Self::Auf { gamma } => {
                // Spread as numbers: booleans have no fill of their own.
                let hits = chunk.spread(&rows.hits().to_kind(like.kind()), 1.0).gt(0.5);
                decayed(&credit::accepted_and_first_error(&hits, supervised), gamma)
            }
        })
    }
}
