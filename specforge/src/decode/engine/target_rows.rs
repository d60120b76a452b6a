//! The target's rows of one request in a pass, as a policy asks for them: processed only where a token is really chosen.

use tch::{Device, Kind, Tensor};

use super::super::policy::many_rows::{self, Node};
use super::super::policy::{Policy, Rows};
use crate::error::{Error, Result};
use crate::nn::Processors;
use crate::nn::noise::Place;
use crate::nn::processors::argmax;
use crate::nn::sampling::{self, NO_NUMBERS, Sampling};
use crate::tree::TokenTree;

/// How the target chooses behind every node of a pass where all can be chosen at once: where nothing but its own row
/// decides, and the processors ask for no token on a path.
pub(super) fn at_once(policy: Policy, processors: Processors, nodes: usize) -> Option<Sampling> {
    let chosen_with = |seed| Some(Sampling { processors, seed });
    match policy {
        Policy::Typical { .. } | Policy::Rank { .. } | Policy::Entropy { .. } => None,
        _ if processors.leaves_the_greedy_choice() => chosen_with(0),
        _ if nodes > 1 => None,
        _ if processors.is_greedy() => chosen_with(0),
        Policy::Keyed { seed } => chosen_with(seed),
        Policy::Maximal { .. } => None,
    }
}

/// What a policy that samples chooses behind every node of a pass over trees, where rows are on a GPU and processors look at
/// nothing else: `[R]`, one copy from the device in place of rows of a vocabulary.
pub(super) fn sampled<'a>(
    policy: Policy,
    processors: &Processors,
    logits: &Tensor,
    nodes: impl FnOnce(u64) -> Vec<Node<'a>>,
) -> Result<Option<Vec<i64>>> {
    if logits.device() == Device::Cpu || processors.is_greedy() || !processors.depend_on_rows_alone() {
        return Ok(None);
    }
    let chosen = match policy {
        Policy::Keyed { seed } => {
            let places: Vec<Place> = nodes(seed).iter().map(|node| node.place).collect();
            sampling::keyed_choices(processors, logits, &places)
        }
        Policy::Maximal { seed } => {
            let (nodes, piece) = (nodes(seed), sampling::rows_of_a_piece(logits.size()[1]));
            let couple = |(index, nodes): (usize, &[Node<'_>])| {
                let rows = logits.f_narrow(0, (index * piece) as i64, nodes.len() as i64)?;
                many_rows::couple(&processors.apply_rows(&rows), nodes)
            };
            Tensor::f_cat(&nodes.chunks(piece).enumerate().map(couple).collect::<Result<Vec<_>>>()?, 0)?
        }
        Policy::Typical { .. } | Policy::Rank { .. } | Policy::Entropy { .. } => return Ok(None),
    };
    Ok(Some(Vec::try_from(chosen)?))
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
    chosen: Option<&'a [i64]>,
    processors: &'a Processors,
}

impl<'a> TargetRows<'a> {
    /// Rows of a pass, `[R, V]`, from `first` on, behind everything `committed`; what is chosen behind each, where that is
    /// known.
    pub(super) fn new(
        logits: &'a Tensor,
        first: usize,
        committed: &'a [u32],
        chosen: Option<&'a [i64]>,
        processors: &'a Processors,
    ) -> Self {
        Self { logits, first, committed, tree: None, chosen, processors }
    }

    /// The row of a node as the target gave it, `[V]`.
    pub(super) fn raw(&self, node: usize) -> Tensor {
        self.logits.get((self.first + node) as i64)
    }

    /// Whether the target's choices are known.
    pub(super) fn chosen_at_once(&self) -> bool {
        self.chosen.is_some()
    }

    /// The target's own choice behind the last node of a path.
    pub(super) fn chosen(&mut self, path: &[usize]) -> Result<u32> {
        let node = path.last().copied().unwrap_or(0);
        match self.chosen {
            Some(choices) if choices[node] == NO_NUMBERS => Err(no_numbers()),
            Some(choices) => Ok(choices[node] as u32),
            None => self.greedy(path),
        }
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
        match self.chosen {
            Some(_) if self.processors.leaves_the_greedy_choice() => self.chosen(path),
            _ => Ok(argmax(&self.row(path)?) as u32),
        }
    }
}
