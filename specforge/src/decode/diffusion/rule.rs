//! Which masked tokens of a block become known after a pass: a pure decision from how sure the model is of each.
//!
//! Reference: `llada/generate.py` of NVlabs/Fast-dLLM, commit 24cc59e75f20a6384bae8c905965bb090b96388e, for quotas and the
//! threshold; Fast-dLLM's paper (<https://arxiv.org/abs/2505.22618>) for the factor.

use std::fmt;

use serde::{Deserialize, Serialize};

/// How many masked tokens become known after a pass: the surest ones, at least one.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Rule {
    /// So many passes for each block, which share its tokens evenly; the first ones take one more where that is not even.
    Quota {
        /// Passes of a block.
        steps: usize,
    },
    /// All that are at least so sure.
    Threshold(f64),
    /// The longest run of the surest ones whose `n`-th, from 2 on, is at least `1 - factor / (n + 1)` sure.
    ///
    /// Fast-dLLM's own program also takes the first token that fails where it is the last one of the block; this one does not.
    Factor(f64),
}

impl Rule {
    /// Refuses numbers that mean nothing, for blocks of so many tokens.
    pub fn check(&self, block: usize) -> Result<(), String> {
        match self {
            Self::Quota { steps } if (1..=block).contains(steps) => Ok(()),
            Self::Quota { steps } => {
                Err(format!("steps: expected 1 to {block} for each block of {block} tokens, got {steps}"))
            }
            Self::Threshold(least) if (0.0..=1.0).contains(least) => Ok(()),
            Self::Threshold(least) => Err(format!("threshold: expected a probability from 0 to 1, got {least}")),
            Self::Factor(factor) if factor.is_finite() && *factor > 0.0 => Ok(()),
            Self::Factor(factor) => Err(format!("factor: expected a number above 0, got {factor}")),
        }
    }

    /// How many tokens pass number `step` of a block takes that had so many masks at first; `None` where that depends on how
    /// sure the model is.
    pub fn quota(&self, masks: usize, step: usize) -> Option<usize> {
        match self {
            Self::Quota { steps } => Some(masks / steps + usize::from(step < masks % steps)),
            Self::Threshold(_) | Self::Factor(_) => None,
        }
    }

    /// Which of the candidates become known, as ascending places in `confidence`; never none. Of equally sure ones the first
    /// goes first.
    pub fn select(&self, confidence: &[f64], quota: Option<usize>) -> Vec<usize> {
        let mut order: Vec<usize> = (0..confidence.len()).collect();
        order.sort_by(|&one, &other| confidence[other].total_cmp(&confidence[one]));
        let passes = |&(rank, &place): &(usize, &usize)| match self {
            Self::Quota { .. } => rank < quota.unwrap_or(1),
            Self::Threshold(least) => confidence[place] >= *least,
            Self::Factor(factor) => confidence[place] >= 1.0 - factor / (rank as f64 + 2.0),
        };
        let count = order.iter().enumerate().take_while(passes).count().max(1);
        order.truncate(count);
        order.sort_unstable();
        order
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Quota { steps } => write!(f, "steps:{steps}"),
            Self::Threshold(least) => write!(f, "threshold:{least}"),
            Self::Factor(factor) => write!(f, "factor:{factor}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quotas_share_a_block_and_the_first_passes_take_the_rest() {
        let quotas = |steps, masks| (0..steps).map(|step| Rule::Quota { steps }.quota(masks, step)).collect::<Vec<_>>();
        assert_eq!(quotas(3, 8), [Some(3), Some(3), Some(2)]);
        assert_eq!(quotas(4, 8), [Some(2); 4]);
        assert_eq!(Rule::Threshold(0.5).quota(8, 0), None);
        assert_eq!(Rule::Quota { steps: 2 }.select(&[0.1, 0.9, 0.3, 0.9], Some(3)), [1, 2, 3]);
        // The first of equals.
        assert_eq!(Rule::Quota { steps: 2 }.select(&[0.3, 0.9, 0.9], Some(1)), [1]);
    }

    #[test]
    fn the_surest_token_always_becomes_known() {
        assert_eq!(Rule::Threshold(0.8).select(&[0.1, 0.4, 0.3], None), [1]);
        assert_eq!(Rule::Threshold(0.3).select(&[0.1, 0.4, 0.3], None), [1, 2]);
        assert_eq!(Rule::Factor(0.1).select(&[0.1, 0.4, 0.3], None), [1]);
        assert_eq!(Rule::Threshold(0.8).select(&[], None), Vec::<usize>::new());
    }

    /// With a factor of 1: the second needs 2/3, the third 3/4.
    #[test]
    fn a_factor_asks_more_of_every_further_token() {
        let select = |confidence: &[f64]| Rule::Factor(1.0).select(confidence, None);
        assert_eq!(select(&[0.5, 0.67, 0.9]), [1, 2]);
        assert_eq!(select(&[0.76, 0.67, 0.9]), [0, 2]);
        assert_eq!(select(&[0.76, 0.8, 0.9]), [0, 1, 2]);
        // A last one that fails is not taken along.
        assert_eq!(select(&[0.66, 0.9]), [1]);
    }

    #[test]
    fn numbers_that_mean_nothing_are_refused() {
        for (rule, word) in [
            (Rule::Quota { steps: 0 }, "steps"),
            (Rule::Quota { steps: 9 }, "1 to 8"),
            (Rule::Threshold(1.5), "threshold"),
            (Rule::Threshold(f64::NAN), "threshold"),
            (Rule::Factor(0.0), "factor"),
            (Rule::Factor(f64::INFINITY), "factor"),
        ] {
            assert!(rule.check(8).unwrap_err().contains(word), "{rule}");
        }
        assert!(Rule::Quota { steps: 8 }.check(8).is_ok() && Rule::Threshold(1.0).check(8).is_ok());
    }
}
