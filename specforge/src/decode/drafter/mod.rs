//! What guesses: a draft's side of speculative decoding. One file each.
//!
//! A drafter keeps what it needs of every running row, in the order of the engine's batch. Between rounds it has seen
//! everything committed but the last token, which is the root of its next tree.
//!
//! Features are the target's hidden states at the layers a drafter asks for. The feature of a token is known once the
//! target has run on it: of `n` committed tokens, the first `n - 1`.

use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use super::policy::{Policy, Proposal};
use crate::draft::block::heads::HEADS;
use crate::error::{Error, Result};
use crate::table::Table;

pub mod block;
mod branches;
pub mod choices;
pub mod dynamic_tree;
pub mod eagle3;
pub mod kind;
pub mod medusa;
pub mod model;
pub mod open;
pub mod path_rates;
pub mod peagle;
pub mod prompt_lookup;
pub mod tree_file;
pub mod tree_text;
pub mod with_lookup;

pub use branches::Branch;
pub use dynamic_tree::DynamicTree;
pub use eagle3::{Eagle3Drafter, Eagle3Parts};
pub use kind::{Asked, DrafterKind, Guesser, Trained, Trees};
pub use medusa::{MedusaDrafter, MedusaHeads};
pub use model::ModelDrafter;
pub use open::{Opened, of_training, open};
pub use peagle::{PeagleDrafter, PeagleParts};
pub use prompt_lookup::PromptLookup;
pub use with_lookup::WithLookup;

/// The drafters that this program is built with; see [`drafters`].
pub const DRAFTERS: &[DrafterKind] = &BUILT_IN;

const BUILT_IN: [DrafterKind; OTHERS.len() + HEADS.len()] = {
    let mut rows = [medusa::KIND; OTHERS.len() + HEADS.len()];
    let mut place = 0;
    while place < rows.len() {
        rows[place] = match place.checked_sub(OTHERS.len()) {
            Some(head) => block::kind(HEADS[head].name),
            None => OTHERS[place],
        };
        place += 1;
    }
    rows
};

/// Those that draft no blocks.
const OTHERS: &[DrafterKind] = &[medusa::KIND, eagle3::KIND, peagle::KIND];

static TABLE: Table<DrafterKind> = Table::new("the drafter of", |row| row.algorithm, DRAFTERS);

/// Every drafter of a trained draft: those of [`DRAFTERS`], and those that were added.
pub fn drafters() -> Vec<&'static DrafterKind> {
    TABLE.rows()
}

/// Adds a drafter of a program around this library, before anything else is done. Refuses an algorithm that has one.
pub fn add_drafter(row: &'static DrafterKind) -> Result<()> {
    TABLE.add(row)
}

/// What drafts with the drafts of an algorithm.
fn of_algorithm(name: &str) -> Option<&'static DrafterKind> {
    TABLE.find(name)
}

/// What drafts with the exports of a format.
fn of_format(name: &str) -> Option<&'static DrafterKind> {
    drafters().into_iter().find(|kind| kind.formats.contains(&name))
}

/// How a draft picks its guesses from its own distribution.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(tag = "name", rename_all = "snake_case", deny_unknown_fields)]
pub enum DraftSampling {
    /// The most likely tokens.
    #[default]
    Greedy,
    /// The largest `logit / temperature + noise`, with the noise that [`Policy::Keyed`] will choose by: a guess is likely
    /// what the target chooses where both distributions agree.
    Keyed {
        /// Divides the logits.
        temperature: f64,
        /// Key of the noise, the target's own.
        seed: u64,
    },
    /// As [`DraftSampling::Keyed`] with each row's own temperature, for requests of different ones; rows that are greedy get
    /// the most likely tokens.
    KeyedByRow {
        /// Key of the noise, the target's own.
        seed: u64,
    },
    /// Drawn without putting back, as [`Policy::Maximal`] likes it best.
    Drawn {
        /// Divides the logits.
        temperature: f64,
        /// Key of the draws.
        seed: u64,
    },
    /// The most likely tokens, and how sure the draft is of each; see [`Policy::Entropy`].
    Sure,
}

impl DraftSampling {
    /// What suits a policy and a temperature of the target.
    pub fn for_policy(policy: Policy, temperature: f64) -> Self {
        match policy {
            Policy::Entropy { .. } => Self::Sure,
            _ if temperature == 0.0 => Self::Greedy,
            Policy::Keyed { seed } | Policy::Rank { seed, .. } => Self::Keyed { temperature, seed },
            Policy::Maximal { seed } => Self::Drawn { temperature, seed },
            Policy::Typical { .. } => Self::Greedy,
        }
    }

    /// What suits a policy where every request has a temperature of its own; `temperature` is that of draws, which have one.
    pub fn for_any_request(policy: Policy, temperature: f64) -> Self {
        match policy {
            Policy::Keyed { seed } => Self::KeyedByRow { seed },
            _ => Self::for_policy(policy, temperature),
        }
    }

    /// What is wrong with the options, if anything.
    pub fn check(&self) -> Result<()> {
        match *self {
            Self::Keyed { temperature, .. } | Self::Drawn { temperature, .. }
                if !(temperature.is_finite() && temperature > 0.0) =>
            {
                let problem = format!("draft sampling: `temperature`: expected a positive number, got {temperature}");
                Err(Error::Usage(problem))
            }
            _ => Ok(()),
        }
    }
}

/// A row that joins the batch.
#[derive(Debug)]
pub struct Joining<'a> {
    /// The prompt and the first token behind it.
    pub tokens: &'a [u32],
    /// For each captured layer, the features of the prompt, `[P, H]`.
    pub features: Vec<Tensor>,
}

/// A row that wants guesses.
#[derive(Debug, Clone, Copy)]
pub struct Context<'a> {
    /// Everything committed.
    pub tokens: &'a [u32],
    /// Deepest guess that can be of use; deeper ones are cut off. Where it is 0, nothing need be guessed.
    pub depth: usize,
    /// The request's own part of every seed.
    pub key: u64,
    /// Temperature of the target's choices; 0 is greedy.
    pub temperature: f64,
}

/// What a round committed to a row.
#[derive(Debug)]
pub struct Progress<'a> {
    /// Everything committed.
    pub tokens: &'a [u32],
    /// How many of them are new.
    pub new: usize,
    /// For each captured layer, the features of as many tokens, `[new, H]`: of the last committed before the round, and
    /// of the new ones but the last.
    pub features: Vec<Tensor>,
}

/// Guesses what the target will choose.
pub trait Drafter {
    /// Hidden states of the target it reads, by Hugging Face's index.
    fn capture(&self) -> Vec<usize> {
        Vec::new()
    }

    /// Takes rows in, behind those that run.
    fn join(&mut self, rows: &[Joining<'_>]) -> Result<()>;

    /// Guesses for every row, in order.
    fn propose(&mut self, rows: &[Context<'_>]) -> Result<Vec<Proposal>>;

    /// Hears what became of the last guesses of every row, in order.
    fn commit(&mut self, rows: &[Progress<'_>]) -> Result<()>;

    /// Keeps the rows named, in that order.
    fn retain(&mut self, rows: &[usize]);

    /// Whether [`Drafter::rewind`] takes back what it was told: where nothing it keeps of a row depends on more than tokens.
    fn can_rewind(&self) -> bool {
        false
    }

    /// Forgets what was committed to each row behind its first `lengths` tokens, and every guess: what it hears next of a row
    /// goes on from there. Only where [`Drafter::can_rewind`] says so.
    fn rewind(&mut self, _lengths: &[usize]) -> Result<()> {
        Err(Error::Failed("this draft cannot be taken back to fewer tokens".to_owned()))
    }

    /// Drafted tokens of a row that it gives a confidence for, where it guesses chains and does so; else 0. Every proposal
    /// then has them, a shorter one fewer.
    fn confident_drafts(&self) -> usize {
        0
    }

    /// Tokens in its cache for each row; nothing where it has none.
    fn cache_lengths(&self) -> Vec<i64> {
        Vec::new()
    }
}

/// Guesses nothing: plain decoding.
#[derive(Debug, Default)]
pub struct Plain;

impl Drafter for Plain {
    fn join(&mut self, _rows: &[Joining<'_>]) -> Result<()> {
        Ok(())
    }

    fn propose(&mut self, rows: &[Context<'_>]) -> Result<Vec<Proposal>> {
        Ok(rows.iter().map(|row| Proposal::nothing(last(row.tokens))).collect())
    }

    fn commit(&mut self, _rows: &[Progress<'_>]) -> Result<()> {
        Ok(())
    }

    fn retain(&mut self, _rows: &[usize]) {}

    fn can_rewind(&self) -> bool {
        true
    }

    fn rewind(&mut self, _lengths: &[usize]) -> Result<()> {
        Ok(())
    }
}

/// The last committed token, the root of the next tree.
pub(crate) fn last(tokens: &[u32]) -> u32 {
    tokens.last().copied().unwrap_or_default()
}

/// Scores and ids of equal shape, flat and on the host: one copy from the device, which is waited for once. An id below
/// 2^53 is exact as a float64.
fn to_host(scores: &Tensor, ids: &Tensor) -> Result<(Vec<f64>, Vec<i64>)> {
    let both = Tensor::f_stack(&[scores, ids].map(|tensor| tensor.to_kind(Kind::Double)), 0)?; // [2, ..]
    let mut scores = Vec::<f64>::try_from(both.reshape([-1]))?;
    let ids = scores.split_off(scores.len() / 2).into_iter().map(|id| id as i64).collect();
    Ok((scores, ids))
}

#[cfg(test)]
pub(crate) mod lossless;
