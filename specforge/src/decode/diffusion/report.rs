//! What decodes tell: after each pass what became known, and in the end what it took.

use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

#[cfg(test)]
use super::fault::{self, DiffusionFault};
use crate::device;
use crate::error::Result;

/// One pass over the block of one text, and what became of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Step {
    /// Number of the text among those of the decode.
    pub text: usize,
    /// Block of the answer, from 0.
    pub block: usize,
    /// Pass over the block, from 0.
    pub step: usize,
    /// Absolute position of the block's first token.
    pub start: usize,
    /// Absolute positions that the pass ran on: the first, and how many.
    pub view: (usize, usize),
    /// Absolute positions that were masked in the block, ascending.
    pub candidates: Vec<usize>,
    /// The token that the model has for each.
    pub tokens: Vec<i64>,
    /// By what the rule chose among them: their probabilities, or the draws of a random order.
    pub confidence: Vec<f64>,
    /// Absolute positions that became known.
    pub transferred: Vec<usize>,
    /// How many a quota asked for.
    pub quota: Option<usize>,
    /// Where later layers may be left out: whether each row of the view ran all of them.
    pub active: Option<Vec<bool>>,
    /// The same: cosines of each row, by layer.
    pub cosines: Option<Vec<Vec<f64>>>,
    /// The same: at which absolute positions the states begin that were compared, those of the pass before and those of this.
    pub compared: Option<(usize, usize)>,
    /// The same: absolute positions of the rows that ran the later layers, as their heads were turned.
    pub turned: Option<Vec<i64>>,
    /// Shape of the block's logits, `[L, V]`.
    pub logits: (usize, usize),
    /// What the logits of each candidate were, where somebody asks for it.
    pub rows: Option<RowDigests>,
    /// The keys and values that the pass left; nothing without a cache.
    pub cache: Option<CacheSeen>,
}

/// Of rows of logits, whole.
#[derive(Debug, Clone, PartialEq)]
pub struct RowDigests {
    /// Logit of the token that was chosen.
    pub logit: Vec<f64>,
    /// Logarithms of the sums of their exponentials.
    pub logsumexp: Vec<f64>,
}

impl RowDigests {
    /// Of `logits [n, V]` and a token of each, in float64.
    pub fn of(logits: &Tensor, tokens: &[i64]) -> Result<Self> {
        let wide = logits.to_kind(Kind::Double);
        let tokens = device::send(&Tensor::from_slice(tokens), wide.device()).unsqueeze(1); // [n, 1]
        let logit = wide.gather(1, &tokens, false).squeeze_dim(1);
        #[cfg(test)]
        let wide = fault::seen(DiffusionFault::FirstLogitsOnly, wide, |wide| wide.narrow(-1, 0, wide.size()[1] / 4));
        let list = |numbers: Tensor| Vec::<f64>::try_from(numbers.to_device(Device::Cpu));
        Ok(Self { logit: list(logit)?, logsumexp: list(wide.logsumexp([-1i64].as_slice(), false))? })
    }
}

/// Which keys and values a pass left.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CacheSeen {
    /// Number of the cache among those of the decode: each block has its own.
    pub number: u64,
    /// Passes that have written to it, this one included.
    pub passes: u64,
}

/// Who is told of every pass.
pub trait Watcher {
    /// Whether [`Step::rows`] are wanted.
    fn wants_rows(&self) -> bool {
        false
    }
    /// A pass over one text, which is now `ids`.
    fn step(&mut self, step: &Step, ids: &[i64]) -> Result<()>;
}

/// Nobody.
#[derive(Debug, Clone, Copy)]
pub struct Unwatched;

impl Watcher for Unwatched {
    fn step(&mut self, _: &Step, _: &[i64]) -> Result<()> {
        Ok(())
    }
}

/// What one text took. A pass that several texts share counts for each of them.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Work {
    /// Passes that something of the text was in.
    pub evaluations: usize,
    /// Those of them over the whole text.
    pub whole_passes: usize,
    /// Steps of the decoder: passes after which tokens became known. Fewer than passes, or with several states side by side
    /// more.
    pub steps: usize,
    /// Positions that each layer computed.
    pub rows_computed: Vec<u64>,
    /// Positions of views that each layer left out.
    pub rows_skipped: Vec<u64>,
}

impl Work {
    /// None, of a model of so many layers.
    pub fn none(layers: usize) -> Self {
        Self { rows_computed: vec![0; layers], rows_skipped: vec![0; layers], ..Self::default() }
    }

    /// A pass over so many positions of each layer.
    pub fn pass(&mut self, rows: usize) {
        self.evaluations += 1;
        self.rows_computed.iter_mut().for_each(|count| *count += rows as u64);
    }

    /// A pass over a view whose rows all ran the first `layer` layers, and so many of them the others.
    pub fn skipping(&mut self, (rows, active): (usize, usize), layer: usize) {
        self.evaluations += 1;
        for (index, (computed, skipped)) in self.rows_computed.iter_mut().zip(&mut self.rows_skipped).enumerate() {
            let ran = if index < layer { rows } else { active };
            *computed += ran as u64;
            *skipped += (rows - ran) as u64;
        }
    }
}
