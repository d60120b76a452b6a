//! The loss of a selector, which picks one of the backbone's best tokens: cross-entropy over `K` candidates.
//!
//! What DFlash2's authors train with is not published, and four trainers differ:
//!
//! | | right token | not among the candidates | weights | divided by |
//! | --- | --- | --- | --- | --- |
//! | `speculators` 0.9.0 | the target's choice | replaces the last of them | those of the rows | what the base term is (rows) |
//! | `modelopt` 0.48 | the text's | the row is left out | even | rows that are in |
//! | `automodel` (NeMo 0.7) | the text's | the row is left out | those of the rows | weights of rows that are in |
//! | `specforge` main | the text's | the row is left out | those of the rows | what the base term is (all weights) |

use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use super::Labels;
use super::objective::{Objective, right_tokens};
use crate::draft::block::chunk::{Chunk, Denominator, Term};
use crate::error::Result;

/// Whose definition of the loss; see the table of this module.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SelectorObjective {
    /// vllm-project/speculators.
    Speculators,
    /// NVIDIA ModelOpt.
    Modelopt,
    /// NVIDIA NeMo Automodel.
    Automodel,
    /// sgl-project/SpecForge: what rows count and are divided by is that of the base term, whose denominator is planned.
    #[default]
    Specforge,
}

/// Where the right tokens are among the candidates.
#[derive(Debug)]
pub struct Gold {
    /// `[C, K]` the candidates, the right token put in the last place where it has to replace it.
    pub candidates: Tensor,
    /// `[C]` place of the right token, of no meaning where it is not among them.
    pub places: Tensor,
    /// `[C]` booleans: it is among the candidates.
    pub among: Tensor,
}

impl SelectorObjective {
    /// What it takes for the right token.
    pub fn labels(self) -> Labels {
        match self {
            Self::Speculators => Labels::Teacher,
            Self::Modelopt | Self::Automodel | Self::Specforge => Labels::Data,
        }
    }

    /// Finds the right tokens of the supervised slots among their candidates, `[C, K]`. Scores are for the candidates that
    /// this gives.
    pub fn gold(self, chunk: &Chunk<'_>, candidates: &Tensor) -> Result<Gold> {
        let labels = right_tokens(chunk, self.labels())?.unsqueeze(1); // [C, 1]
        let last = candidates.size()[1] - 1;
        let same = candidates.eq_tensor(&labels); // [C, K]
        let found = same.any_dim(1, false); // [C]
        let places = same.to_kind(Kind::Int64).argmax(1, false); // [C]
        if self != Self::Speculators {
            return Ok(Gold { candidates: candidates.shallow_clone(), places, among: found });
        }
        let tail = candidates.narrow(1, last, 1).where_self(&found.unsqueeze(1), &labels);
        let candidates = Tensor::cat(&[candidates.narrow(1, 0, last), tail], 1);
        let places = places.where_self(&found, &places.full_like(last));
        Ok(Gold { candidates, places, among: found.ones_like() })
    }

    /// The term of scores `[C, K]`, of factor 1; `weights`, `[n, S]`, is what slots count, and `base` the objective of the
    /// term that the selector's is added to.
    pub fn term(self, base: &Objective, chunk: &Chunk<'_>, scores: &Tensor, gold: &Gold, weights: &Tensor) -> Term {
        let log_scores = scores.log_softmax(-1, scores.kind());
        let losses = -log_scores.gather(1, &gold.places.unsqueeze(1), false).squeeze_dim(1); // [C]
        let losses = losses.where_self(&gold.among, &losses.zeros_like());
        let among = gold.among.to_kind(scores.kind());
        let over = |weights: Tensor| Term {
            factor: 1.0,
            sum: (&losses * &weights).sum(Kind::Double),
            denominator: Denominator::Measured(weights.sum(Kind::Double)),
        };
        match self {
            Self::Modelopt => over(among),
            Self::Automodel => over(among * chunk.pick(&weights.detach())),
            Self::Speculators | Self::Specforge => base.weigh(chunk, &losses, weights),
        }
    }
}
