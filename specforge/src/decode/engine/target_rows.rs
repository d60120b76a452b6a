//! The target's rows of one request in a pass, as a policy asks for them: processed only where a token is really chosen.

use tch::{Device, Kind, Tensor};

use super::super::policy::Rows;
use crate::error::{Error, Result};
use crate::models::ForwardOutput;
use crate::nn::Processors;
use crate::nn::processors::argmax;
use crate::tree::TokenTree;

/// In place of a token, where a row holds NaN.
const NO_NUMBERS: i64 = -1;

/// The most likely token of every row, where that is what is chosen: `[R]`, one copy from the device.
pub(super) fn greedy_choices(processors: &Processors, output: &ForwardOutput) -> Result<Option<Vec<i64>>> {
    let logits = output.logits.as_ref().filter(|_| processors.leaves_the_greedy_choice());
    let choose = |logits: &Tensor| {
        let (best, tokens) = logits.max_dim(-1, false); // [R] each
        // NaN counts as the largest.
        Ok(Vec::try_from(tokens.masked_fill(&best.isnan(), NO_NUMBERS))?)
    };
    logits.map(choose).transpose()
}

fn no_numbers() -> Error {
    Error::Failed("the target's logits for this prompt are not numbers".to_owned())
}

/// Rows of one request in a pass.
pub(super) struct TargetRows<'a> {
    logits: &'a Tensor,
    first: usize,
    committed: &'a [u32],
    /// What is guessed, where the pass was over a tree.
    pub(super) tree: Option<&'a TokenTree>,
    greedy: Option<&'a [i64]>,
    processors: &'a Processors,
}

impl<'a> TargetRows<'a> {
    /// `count` rows of the pass from `first` on, behind everything `committed`.
    pub(super) fn new(
        output: &'a ForwardOutput,
        first: usize,
        count: usize,
        committed: &'a [u32],
        greedy: Option<&'a [i64]>,
        processors: &'a Processors,
    ) -> Result<Self> {
        let missing = || Error::Failed("the target returned no logits although they were asked for".to_owned());
        let logits = output.logits.as_ref().ok_or_else(missing)?;
        debug_assert!(logits.size()[0] >= (first + count) as i64);
        Ok(Self { logits, first, committed, tree: None, greedy, processors })
    }

    /// The row of a node as the target gave it, `[V]`.
    pub(super) fn raw(&self, node: usize) -> Tensor {
        self.logits.get((self.first + node) as i64)
    }
}

impl Rows for TargetRows<'_> {
    fn row(&mut self, path: &[usize]) -> Result<Vec<f64>> {
        let node = path.last().copied().unwrap_or(0);
        let mut row: Vec<f64> = Vec::try_from(self.raw(node).to_device(Device::Cpu).to_kind(Kind::Double))?;
        // Minus infinity rules a token out; NaN says that the target is broken, and so does a row of nothing else.
        if row.iter().any(|logit| logit.is_nan()) {
            return Err(no_numbers());
        }
        let guessed = self.tree.map_or(&[][..], TokenTree::tokens);
        let first = 1;
        #[cfg(test)]
        let first = if crate::decode::fault::active(crate::decode::fault::Fault::ContextWithoutPath) {
            path.len()
        } else {
            first
        };
        let along = path.iter().skip(first).map(|&node| guessed[node]);
        self.processors.apply(&mut row, self.committed.iter().copied().chain(along));
        Ok(row)
    }

    fn greedy(&mut self, path: &[usize]) -> Result<u32> {
        let node = path.last().copied().unwrap_or(0);
        match self.greedy {
            Some(choices) if choices[node] == NO_NUMBERS => Err(no_numbers()),
            Some(choices) => Ok(choices[node] as u32),
            None => Ok(argmax(&self.row(path)?) as u32),
        }
    }
}
