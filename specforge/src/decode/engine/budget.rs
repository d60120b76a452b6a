//! Chains cut to what is worth verifying, where there is a budget.

use super::Engine;
use crate::decode::policy::Proposal;
use crate::decode::verify_budget::{Stop, VerifyBudget};
use crate::error::{Error, Result};

impl Engine<'_> {
    /// Lets every round verify no more than its budget. Refuses a draft that does not say how sure it is, and temperatures
    /// for another number of drafted tokens.
    pub fn with_budget(mut self, budget: VerifyBudget) -> Result<Self> {
        let (want, got) = (self.drafter.confident_drafts(), budget.slots());
        if want == 0 {
            return Err(Error::Usage(
                "verify budget: this draft gives no confidence for its guesses; only a draft with a confidence head does, \
                 with a chain"
                    .to_owned(),
            ));
        }
        if got != want {
            return Err(Error::Usage(format!(
                "verify budget: expected {want} temperatures, as many as tokens are drafted, got {got}; fit them with \
                 `specforge eval --calibrate` and the same --tree"
            )));
        }
        self.budget = Some(budget);
        Ok(self)
    }

    /// Proposals without the guesses that are not worth a place in the target's pass. What is left of a chain is its
    /// beginning, so the target chooses what it would have chosen.
    pub(super) fn within_budget(&self, proposals: Vec<Proposal>) -> Result<Vec<Proposal>> {
        let Some(budget) = &self.budget else { return Ok(proposals) };
        let chains = proposals.iter().map(chain).collect::<Result<Vec<_>>>()?;
        let drawn = proposals.iter().any(|proposal| proposal.drawn_from.iter().any(Option::is_some));
        let lengths = budget.lengths(&chains, if drawn { Stop::FirstDescent } else { Stop::Best })?;
        // The root is verified in any case.
        Ok(proposals.into_iter().zip(lengths).map(|(proposal, length)| proposal.cut(length - 1)).collect())
    }
}

/// Confidences of a chain, from the first guess on.
fn chain(proposal: &Proposal) -> Result<&[f32]> {
    let guesses = proposal.tree.len() - 1;
    if proposal.tree.topology().depth() != guesses {
        let depth = proposal.tree.topology().depth();
        return Err(Error::Failed(format!(
            "verify budget: expected a chain, got a tree of {guesses} guesses and depth {depth}"
        )));
    }
    match proposal.confidence.as_deref() {
        None if guesses == 0 => Ok(&[]),
        Some(confidence) if confidence.len() == guesses => Ok(confidence),
        other => {
            let got = other.map_or(0, <[f32]>::len);
            Err(Error::Failed(format!("verify budget: expected a confidence for each of {guesses} guesses, got {got}")))
        }
    }
}
