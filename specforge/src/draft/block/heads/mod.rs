//! What stands between the backbone and the tokens of a block: one file a head.
//!
//! A head has parameters, a loss in training and a walk in decoding. `decode::drafter::block` runs the walks.

use serde_json::Value;
use tch::Tensor;

use super::chunk::{Chunk, ChunkLoss};
use super::config::{BlockConfig, BlockShape, Layout};
use crate::draft::{SampleSize, Samples};
use crate::error::{Error, Result};

pub mod domino;
mod every_slot;
pub mod grid;
pub mod lattice;
pub mod lilicorr;
pub mod markov;
pub mod metrics;
pub mod plain;
mod prefix;
pub mod selector;
pub mod sequential;
#[cfg(test)]
mod test_blocks;
#[cfg(test)]
mod tests;
pub mod xpress;

/// Every head.
pub const HEADS: &[HeadKind] = &[plain::KIND, selector::KIND, markov::KIND, lilicorr::KIND, domino::KIND, xpress::KIND];

/// The head of this name.
pub fn find(name: &str) -> Option<&'static HeadKind> {
    HEADS.iter().find(|kind| kind.name == name)
}

/// One row of the table of heads.
pub struct HeadKind {
    /// Value of `draft.algorithm`.
    pub name: &'static str,
    /// One line for help texts.
    pub summary: &'static str,
    /// Its layout, where a configuration names none.
    pub layout: Layout,
    /// Keys of a `draft` section that are not as for plain DFlash, where a configuration is silent.
    pub defaults: fn() -> Value,
    /// Checks the keys of the head's own, and everything of the section that the head cannot do.
    pub check: fn(&BlockConfig) -> Result<()>,
    /// Names of the averages that it reports, of [`metrics::names`] the first.
    pub metrics: fn(&BlockConfig) -> Result<Vec<String>>,
    /// Whether the head wants the target's own predictions, whatever the loss.
    pub wants_teacher: fn(&BlockConfig) -> bool,
    /// Whether its loss depends on how much of the run is over.
    pub follows_length: fn(&BlockConfig) -> bool,
    /// Tensors of the head in creation order, none for plain DFlash.
    pub tensors: fn(&BlockConfig, &BlockShape) -> Result<Vec<TensorSpec>>,
    /// Builds the head for training on tensors that are found by name.
    pub build: fn(&BlockConfig, &BlockShape, Tensors<'_>) -> Result<Box<dyn BlockHead>>,
    /// Whether it reads [`Chunk::context`].
    pub reads_context: bool,
    /// What is checked and timed of it on a device; plain DFlash stands for the backbone that all share.
    pub samples: fn(SampleSize) -> Samples,
}

/// Finds a tensor by name.
pub type Tensors<'a> = &'a dyn Fn(&str) -> Result<Tensor>;

/// A tensor of a head or backbone.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorSpec {
    /// Its name in checkpoints, the engines' own.
    pub name: String,
    /// Its shape.
    pub shape: Vec<i64>,
    /// What it begins as.
    pub start: Start,
}

/// What a tensor begins as.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Start {
    /// Ones.
    Ones,
    /// Zeros.
    Zeros,
    /// Normal noise of this deviation.
    Normal(f64),
    /// Uniform noise within `sqrt(6 / (rows + columns))` of zero (Glorot and Bengio 2010).
    Xavier,
    /// `[2, taps, H]`: the first tap 1, the others 0.
    FirstTap,
}

impl TensorSpec {
    /// A tensor.
    pub fn new(name: impl Into<String>, shape: &[i64], start: Start) -> Self {
        Self { name: name.into(), shape: shape.to_vec(), start }
    }
}

/// A head in training.
pub trait BlockHead {
    /// What the metrics of a plan ([`HeadKind::metrics`]) are averages over, from the supervised slots of its blocks,
    /// `[blocks][S]`.
    fn metric_counts(&self, supervised: &[Vec<bool>]) -> Vec<f64>;
    /// What [`super::chunk::Denominator::Planned`] terms of a plan are divided by, from the same. Sums over blocks.
    fn counts(&self, supervised: &[Vec<bool>]) -> Vec<f64>;
    /// Whether a term is divided by what only the device knows, so that a batch is looked at twice.
    fn measures(&self) -> bool {
        false
    }
    /// Loss of a chunk.
    fn loss(&self, chunk: &Chunk<'_>) -> Result<ChunkLoss>;
}

/// For heads without keys of their own.
fn no_own_keys(config: &BlockConfig) -> Result<()> {
    match config.head.keys().next() {
        None => Ok(()),
        Some(key) => {
            let problem = format!("{} has no keys of a head", config.algorithm);
            Err(Error::config(format!("draft.head.{key}"), problem))
        }
    }
}

/// For heads that choose among tokens of the target's vocabulary: refuses one of the draft's own.
fn whole_vocabulary(config: &BlockConfig) -> Result<()> {
    let keys = [("vocab_map", config.vocab_map.is_some()), ("draft_vocab_size", config.draft_vocab_size.is_some())];
    match keys.into_iter().find(|(_, given)| *given) {
        None => Ok(()),
        Some((key, _)) => {
            let problem =
                format!("{} drafts from the target's whole vocabulary, as every engine has it", config.algorithm);
            Err(Error::config(format!("draft.{key}"), problem))
        }
    }
}
