//! An extra term for the first error of each block (arXiv 2606.11552), which decides how much of it is accepted.
//!
//! The paper adds a constant to the weight of that slot and does not say what its loss is divided by; the form here is that
//! of a public fork of speculators, a mean of its own over the blocks that have an error.

use serde::{Deserialize, Serialize};
use tch::Kind;

use super::weighting::Weighting;
use super::{Labels, Rows, credit};
use crate::draft::block::chunk::{Chunk, Denominator, Term};
use crate::error::{Error, Result};

/// `alpha * sum w ce / sum w` over the first errors of all blocks.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FirstErrorFocal {
    /// Factor of the term.
    pub alpha: f64,
    /// A slot's `w` is `exp(-slot / gamma)`; 1 where this is not given.
    #[serde(default)]
    pub gamma: Option<f64>,
    /// What a draft must be not to be an error; the objective's own labels where this is not given. The fork takes the
    /// target's choice.
    #[serde(default)]
    pub labels: Option<Labels>,
}

impl FirstErrorFocal {
    /// Refuses numbers that make no term; `key` names it in the configuration.
    pub fn check(&self, key: &str) -> Result<()> {
        if !(self.alpha.is_finite() && self.alpha >= 0.0) {
            let problem = format!("expected 0 or a positive number, got {}", self.alpha);
            return Err(Error::config(format!("{key}.alpha"), problem));
        }
        self.weighting().check(key)
    }

    fn weighting(&self) -> Weighting {
        self.gamma.map_or(Weighting::Even, |gamma| Weighting::Fixed { gamma })
    }

    /// The term of a chunk whose supervised slots have these rows. Measured, since only the device knows the errors.
    pub(super) fn term(&self, chunk: &Chunk<'_>, rows: &Rows) -> Result<Term> {
        let weights = self.weighting().weights(chunk, rows)?; // [n, S]
        let hits = chunk.spread(&rows.hits().to_kind(weights.kind()), 1.0).gt(0.5);
        let weights = weights * credit::first_error(&hits, &chunk.supervised);
        let losses = rows.values(super::RowLoss::Ce, None)?; // [C]
        let denominator = Denominator::Measured(weights.sum(Kind::Double));
        Ok(Term { factor: self.alpha, sum: (losses * chunk.pick(&weights)).sum(Kind::Double), denominator })
    }
}
