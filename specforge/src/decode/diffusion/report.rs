//! What decodes tell: after each pass what became known, and in the end what it took.

use serde::Serialize;

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
}

/// Who is told of every pass.
pub trait Watcher {
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
