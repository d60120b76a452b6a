//! How many drafted tokens are worth verifying.
//!
//! DSpark (DeepSeek, <https://github.com/deepseek-ai/DeepSpec> `afdfa7c`) and its serving in SGLang 0.5.23
//! (`speculative/dspark_components`, `benchmark/dspark_sts_fit.py`). A draft with a confidence head says of each drafted
//! token how likely it is accepted if those before it are. Three steps make a plan of that:
//!
//! - `sts`: sequential temperature scaling turns raw logits into probabilities that come true, `sigmoid(raw / T)`; their
//!   running product is a token's *survival*, the chance that it is accepted at all.
//! - `sps`: how many decoding steps a second this machine makes, by the number of tokens it verifies in one.
//! - The budget is the number of drafted tokens of a whole batch that makes the most tokens a second: `(R + sum of the k
//!   largest survivals) x steps a second with R + k tokens`. Each request verifies those of its own that are among them.
//!
//! Survivals never rise along a chain, so what a request verifies is always the beginning of its chain, and cutting a
//! chain cannot change what the target chooses. Where guesses are *drawn* and kept by rejection, more is needed: whether a
//! guess is verified must not depend on the guess itself, or the output leaves the target's distribution. The best of all
//! budgets depends on all survivals, those behind the guess included; [`Stop::FirstDescent`] admits guesses from the surest
//! on and looks at nothing behind the one it decides on.
//!
//! Shape legend: `R` requests of a round, `g` drafted tokens of a request ("gamma"), `n` samples.

use std::path::Path;

use crate::error::{Error, Result};

pub mod sps;
pub mod sts;

pub use sps::{Additive, StepCosts, StepTable};
pub use sts::Calibration;

/// Name of the temperatures' file in a folder of both.
pub const STS_FILE: &str = "sts.json";
/// Name of the step costs' file in a folder of both.
pub const SPS_FILE: &str = "sps.json";

/// Bounds of what a request verifies, the token that the target has chosen already included.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Limits {
    /// Tokens every request verifies; what is less than 1 is 1.
    pub min_verify_length: usize,
    /// Most tokens of a request; `None` is its whole chain and one more.
    pub max_verify_length: Option<usize>,
    /// Drafted tokens that are less likely to survive are not verified.
    pub survival_eps: f32,
}

impl Default for Limits {
    fn default() -> Self {
        Self { min_verify_length: 1, max_verify_length: None, survival_eps: 1e-6 }
    }
}

impl Limits {
    fn check(&self) -> Result<()> {
        let Self { min_verify_length, max_verify_length, survival_eps } = *self;
        if max_verify_length.is_some_and(|most| most < min_verify_length.max(1)) {
            let got = max_verify_length.unwrap_or_default();
            let least = min_verify_length.max(1);
            return Err(Error::Usage(format!("verify length: expected a maximum of at least {least}, got {got}")));
        }
        if !(0.0..=1.0).contains(&survival_eps) {
            let problem = format!("survival: expected a least probability from 0 to 1, got {survival_eps}");
            return Err(Error::Usage(problem));
        }
        Ok(())
    }

    /// Slots of a chain that may be verified: the reference lets a maximum of `m` tokens consider `m` slots.
    fn slots(&self, drafted: usize) -> usize {
        self.max_verify_length.unwrap_or(drafted + 1).min(drafted)
    }
}

/// Which of the budgets is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// The one with the most tokens a second, the smallest of equal ones; the reference's.
    Best,
    /// The last one before tokens a second do not rise for the first time.
    FirstDescent,
}

/// Drafted tokens to verify in a round.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Budget {
    /// How many, in all requests together.
    pub tokens: usize,
    /// Tokens a second that they promise.
    pub tokens_per_second: f64,
}

/// `sigmoid(raw / T)` of a chain, from raw confidences and a temperature for each slot: float32 values, as the reference
/// has them, but each computed by itself. A vector's lanes and its rest may round differently, and equally sure guesses must
/// tie.
pub fn confidences(raw: &[f32], temperatures: &[f64]) -> Vec<f32> {
    let confidence = |(&raw, &temperature): (&f32, &f64)| {
        let scaled = raw / temperature as f32;
        (1.0 / (1.0 + (-f64::from(scaled)).exp())) as f32
    };
    raw.iter().zip(temperatures).map(confidence).collect()
}

/// Chance of each drafted token of a chain to be accepted: the running product of confidences, float32 values of a float64
/// product.
pub fn survivals(confidences: &[f32]) -> Vec<f32> {
    let product = |so_far: &mut f64, &confidence: &f32| {
        *so_far *= f64::from(confidence);
        Some(*so_far as f32)
    };
    confidences.iter().scan(1.0, product).collect()
}

/// A drafted token that may be verified.
#[derive(Debug, Clone, Copy)]
struct Candidate {
    survival: f64,
    slot: usize,
    request: usize,
}

/// Everything likely enough, the surest first; of equally sure ones the earlier slot, then the earlier request.
fn candidates(survivals: &[Vec<f32>], limits: Limits) -> Vec<Candidate> {
    let mut all = Vec::new();
    for (request, chain) in survivals.iter().enumerate() {
        let slots = chain.iter().take(limits.slots(chain.len())).enumerate();
        // A survival that is no number is not likely enough.
        let likely = slots.filter(|(_, survival)| **survival >= limits.survival_eps);
        all.extend(likely.map(|(slot, &survival)| Candidate { survival: f64::from(survival), slot, request }));
    }
    let rank = |a: &Candidate, b: &Candidate| {
        b.survival.total_cmp(&a.survival).then(a.slot.cmp(&b.slot)).then(a.request.cmp(&b.request))
    };
    all.sort_by(rank);
    all
}

/// How many drafted tokens of all requests to verify, from the survivals of each request's chain.
pub fn choose_budget(survivals: &[Vec<f32>], costs: &StepCosts, limits: Limits, stop: Stop) -> Budget {
    let requests = survivals.len();
    let mut expected = 0.0; // accepted guesses
    let promise =
        |guesses: usize, expected: f64| costs.tokens_per_second(requests, guesses, requests as f64 + expected);
    let mut best = Budget { tokens: 0, tokens_per_second: promise(0, expected) };
    for (index, candidate) in candidates(survivals, limits).into_iter().enumerate() {
        expected += candidate.survival;
        let tokens_per_second = promise(index + 1, expected);
        if tokens_per_second > best.tokens_per_second {
            best = Budget { tokens: index + 1, tokens_per_second };
        } else if stop == Stop::FirstDescent {
            break;
        }
    }
    best
}

/// Tokens that each request verifies of a budget, the one that the target has chosen already included.
pub fn verify_lengths(survivals: &[Vec<f32>], budget: usize, limits: Limits) -> Vec<usize> {
    let mut lengths = vec![limits.min_verify_length; survivals.len()];
    for candidate in candidates(survivals, limits).into_iter().take(budget) {
        lengths[candidate.request] += 1;
    }
    let least = limits.min_verify_length.max(1);
    let bounded = |(length, chain): (usize, &Vec<f32>)| {
        let most = limits.max_verify_length.unwrap_or(usize::MAX).min(chain.len() + 1);
        length.max(least).min(most)
    };
    lengths.into_iter().zip(survivals).map(bounded).collect()
}

/// What an engine needs to cut its drafts' chains.
#[derive(Debug, Clone)]
pub struct VerifyBudget {
    temperatures: Vec<f64>,
    costs: StepCosts,
    limits: Limits,
}

impl VerifyBudget {
    /// A budget from a temperature for each slot and what steps cost.
    pub fn new(temperatures: Vec<f64>, costs: StepCosts, limits: Limits) -> Result<Self> {
        sts::check_temperatures(&temperatures).map_err(Error::Usage)?;
        costs.check().map_err(Error::Usage)?;
        limits.check()?;
        Ok(Self { temperatures, costs, limits })
    }

    /// Reads [`STS_FILE`] and [`SPS_FILE`] of a folder.
    pub fn read(folder: &Path) -> Result<Self> {
        let calibration = Calibration::read(&folder.join(STS_FILE), None)?;
        Self::new(calibration.temperatures, StepCosts::read(&folder.join(SPS_FILE))?, Limits::default())
    }

    /// Drafted tokens of a request that it has temperatures for.
    pub fn slots(&self) -> usize {
        self.temperatures.len()
    }

    /// Tokens that each request verifies, from the raw confidences of its chain, which may be shorter than
    /// [`VerifyBudget::slots`]. `stop` is [`Stop::FirstDescent`] where guesses were drawn.
    pub fn lengths(&self, raw: &[&[f32]], stop: Stop) -> Result<Vec<usize>> {
        let slots = self.slots();
        if let Some(chain) = raw.iter().find(|chain| chain.len() > slots) {
            let got = chain.len();
            return Err(Error::Failed(format!("expected confidences of at most {slots} drafted tokens, got {got}")));
        }
        if self.costs.is_unmeasured() || raw.is_empty() {
            return Ok(raw.iter().map(|chain| chain.len() + 1).collect());
        }
        let chain = |raw: &&[f32]| survivals(&confidences(raw, &self.temperatures));
        let survivals: Vec<Vec<f32>> = raw.iter().map(chain).collect();
        let budget = choose_budget(&survivals, &self.costs, self.limits, stop);
        Ok(verify_lengths(&survivals, budget.tokens, self.limits))
    }
}

#[cfg(test)]
mod tests;
