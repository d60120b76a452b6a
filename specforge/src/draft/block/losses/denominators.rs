//! What sums of losses are divided by.

use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use super::weighting::Weighting;
use crate::draft::block::chunk::{Chunk, Denominator};

/// What a weighted sum over rows is divided by.
///
/// A denominator is *planned* where the host knows it before anything is computed: counts of batches and ranks then add up,
/// and an optimizer step divides once. It is *measured* where only the device knows it; every batch is then divided by its
/// own, as the references do, and a step of several batches is not what one batch of all their documents would be. That
/// is why measured ones are for parity.
///
/// | name | divides by | known | who |
/// | --- | --- | --- | --- |
/// | `auto` | see [`Denominators::resolve`] | | ours |
/// | `weights` | sum of the weights | planned for `even` and `fixed`, else measured | SpecForge, DeepSpec, ModelOpt, NeMo |
/// | `rows` | supervised rows | planned | speculators |
/// | `blocks` | blocks with a supervised row | planned | D-PARD in speculators' DSpark |
/// | `documents` | documents of the batch | measured, parity | D-PACE and D-PARD in SpecForge |
/// | `sequence_anchor` | blocks of each document, then documents | measured, parity | D-PACE and D-PARD in SpecForge, later |
///
/// The epsilons that references add are left out; where nothing is supervised, sum and denominator are both 0.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Denominators {
    /// What suits the weights.
    #[default]
    Auto,
    /// The sum of the rows' weights.
    Weights,
    /// The number of supervised rows.
    Rows,
    /// The number of blocks that have one.
    Blocks,
    /// The number of documents that have blocks.
    Documents,
    /// The mean over the blocks of each document that have a supervised row, and then over the documents.
    SequenceAnchor,
}

impl Denominators {
    /// What `auto` stands for.
    ///
    /// Weights that are given beforehand are divided by their sum: a weighted mean, whose size does not follow gamma, and
    /// which adds up exactly over batches and ranks. D-PACE's and D-PARD's weights are the slopes of an expected acceptance
    /// length, so a block that is nearly accepted is meant to pull more than one that fails at once. Dividing by their
    /// sum would take that away again, and could not be planned; the number of rows does neither. Accept-until-fail is
    /// defined by the sum over its support, which only the device knows.
    pub fn resolve(self, weighting: Weighting) -> Self {
        match (self, weighting) {
            (Self::Auto, Weighting::DPace { .. } | Weighting::DPard { .. }) => Self::Rows,
            (Self::Auto, _) => Self::Weights,
            (given, _) => given,
        }
    }

    /// The planned count of blocks whose supervised slots are given, `[blocks][S]`, such that counts of several batches add
    /// up. Where the denominator is measured, the number of supervised rows, which divides nothing.
    pub fn count(self, weighting: Weighting, supervised: &[Vec<bool>]) -> f64 {
        let sum = |of: &dyn Fn(usize) -> f64| -> f64 {
            let slots = |block: &Vec<bool>| {
                block.iter().enumerate().filter(|(_, on)| **on).map(|(slot, _)| of(slot)).sum::<f64>()
            };
            supervised.iter().map(slots).sum()
        };
        match self.resolve(weighting) {
            Self::Weights => sum(&|slot| weighting.planned(slot).unwrap_or(1.0)),
            Self::Blocks => supervised.iter().filter(|block| block.contains(&true)).count() as f64,
            _ => sum(&|_| 1.0),
        }
    }

    /// Whether only the device knows it.
    pub fn is_measured(self, weighting: Weighting) -> bool {
        match self.resolve(weighting) {
            Self::Weights => weighting.planned(0).is_none(),
            Self::Documents | Self::SequenceAnchor => true,
            _ => false,
        }
    }

    /// The denominator of a chunk with these weights, `[n, S]`; `place` is that of its count among the head's.
    pub(super) fn of(self, weighting: Weighting, chunk: &Chunk<'_>, weights: &Tensor, place: usize) -> Denominator {
        match self.resolve(weighting) {
            Self::Weights if weighting.planned(0).is_none() => {
                Denominator::Measured(weights.detach().sum(Kind::Double))
            }
            Self::Documents | Self::SequenceAnchor => {
                Denominator::Measured(chunk.document_shares.detach().sum(Kind::Double))
            }
            _ => Denominator::Planned(place),
        }
    }

    /// `[n, S]` weights with what blocks of a document share, where they do.
    pub(super) fn shared(self, chunk: &Chunk<'_>, weights: Tensor) -> Tensor {
        match self {
            Self::SequenceAnchor => {
                let shares = chunk.document_shares.to_kind(weights.kind()).unsqueeze(1); // [n, 1]
                weights * shares
            }
            _ => weights,
        }
    }
}

/// The share of each block in its document, for [`Chunk::document_shares`], from the document of each block of a batch and
/// its supervised slots. The blocks that have any share alike, and others have nothing; where a document has no such block,
/// all of its blocks share, so that the shares of a batch always sum to the number of its documents that have blocks.
pub fn document_shares(documents: &[usize], supervised: &[Vec<bool>]) -> Vec<f64> {
    let size = documents.iter().max().map_or(0, |last| last + 1);
    let (mut valid, mut all) = (vec![0usize; size], vec![0usize; size]);
    for (&document, block) in documents.iter().zip(supervised) {
        valid[document] += usize::from(block.contains(&true));
        all[document] += 1;
    }
    let share = |(&document, block): (&usize, &Vec<bool>)| match (valid[document], block.contains(&true)) {
        (0, _) => 1.0 / all[document] as f64,
        (count, true) => 1.0 / count as f64,
        (_, false) => 0.0,
    };
    documents.iter().zip(supervised).map(share).collect()
}
