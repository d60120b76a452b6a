//! Some blocks whose losses are computed together: everything a head may look at, and what it answers.
//!
//! Blocks do not depend on each other behind the backbone, so a batch is cut into chunks of whole blocks, as many as a
//! piece of memory holds the logits of. Within a chunk everything is libtorch's autograd, from leaves: what the backbone
//! gave (`hidden`, `context`) and the head's own parameters. When a chunk is done its graph and its logits are forgotten;
//! what stays is the gradient of the leaves. Only supervised slots get logits.
//!
//! Shape legend: `n` blocks of the chunk, `B` rows of a block, `S` slots (rows that predict a token), `C` supervised slots
//! of the chunk, `H` hidden size, `V` vocabulary of the target, `DV` of the draft.

use std::cell::{Cell, RefCell};

use tch::{Kind, Tensor};

use super::config::BlockShape;
use crate::draft::objective::DraftVocabulary;
use crate::error::Result;
use crate::nn::Head;

/// The blocks of a chunk.
#[derive(Debug)]
pub struct Chunk<'a> {
    /// What the draft looks like.
    pub shape: &'a BlockShape,
    /// `[n, B, H]` output of the backbone behind its last norm; a leaf.
    pub hidden: Tensor,
    /// `[n, H]` what the backbone reads of the token before the anchor, `RMS(fc(features))`; zero where there is none. A
    /// leaf, there only for heads that ask for it ([`super::heads::HeadKind::reads_context`]).
    pub context: Option<Tensor>,
    /// `[n, B + 1]` tokens of the document from the anchor on, 0 past its end.
    pub tokens: Tensor,
    /// `[n]` token before the anchor; the anchor itself where the document begins with it.
    pub before: Tensor,
    /// `[n, S]` booleans: the slot's token is supervised.
    pub supervised: Tensor,
    /// `[C]` places of the supervised slots among all `n * S`, ascending.
    pub places: Tensor,
    /// `[C]` logits of what the target predicts in each supervised slot, `[C, V]`, where a loss or head asks for it.
    pub teacher: Option<Tensor>,
    /// The target's vocabulary projection, or the draft's own.
    pub head: &'a Head,
    /// `[V, H]` the target's embedding.
    pub embedding: &'a Tensor,
    /// The draft's own vocabulary, where it is smaller than the target's.
    pub vocabulary: Option<&'a DraftVocabulary>,
    /// `[n]` each block's share in its document, [`super::losses::document_shares`] of the whole batch, for denominators that
    /// count documents.
    pub document_shares: Tensor,
    /// How much of the run is over, from 0 to 1.
    pub progress: f64,
    /// What is known of the whole batch, and what this chunk adds to it; nothing where a chunk stands alone.
    pub whole: Option<&'a Whole>,
}

/// Means over the supervised slots of a batch that a loss asks for (`lk_lambda`): measured in a pass of their own before the
/// one that learns, one for each term in order.
#[derive(Debug, Default)]
pub struct Whole {
    /// Sum and number of each term's probabilities of the right token.
    sums: RefCell<Vec<(Tensor, f64)>>,
    /// How many terms of the current chunk have asked.
    asked: Cell<usize>,
    /// Whether sums are being made.
    measuring: Cell<bool>,
}

impl Whole {
    /// Begins the pass that measures, or ends it.
    pub(super) fn measure(&self, now: bool) {
        self.measuring.set(now);
    }

    /// Begins a chunk.
    pub(super) fn next_chunk(&self) {
        self.asked.set(0);
    }

    /// The mean of a term whose supervised slots in this chunk have these values, `[C]`: a scalar. Nothing where nothing was
    /// measured.
    pub(super) fn mean(&self, values: &Tensor) -> Option<Tensor> {
        let term = self.asked.replace(self.asked.get() + 1);
        let mut sums = self.sums.borrow_mut();
        if self.measuring.get() {
            let (sum, count) = (values.detach().sum(Kind::Double), values.numel() as f64);
            match sums.get_mut(term) {
                Some((all, number)) => (*all, *number) = (&*all + sum, *number + count),
                None => sums.push((sum, count)),
            }
            return None;
        }
        sums.get(term).map(|(sum, count)| sum / count.max(1.0))
    }
}

impl Chunk<'_> {
    /// Number of blocks, `n`.
    pub fn len(&self) -> i64 {
        self.hidden.size()[0]
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// `[n, S, H]` the rows of the slots.
    pub fn slots(&self) -> Tensor {
        let shape = self.shape;
        self.hidden.narrow(1, shape.first_row(), shape.slots())
    }

    /// `[n, S]` the tokens that slots predict, as the draft counts its vocabulary. What it cannot name is never supervised,
    /// and 0 here.
    pub fn labels(&self) -> Tensor {
        let tokens = self.tokens.narrow(1, 1, self.shape.slots());
        match self.vocabulary {
            None => tokens,
            Some(own) => own.draft_ids.index_select(0, &tokens.flatten(0, 1)).clamp_min(0).view_as(&tokens),
        }
    }

    /// `[n, S]` the true token before each slot's label: the anchor first.
    pub fn previous(&self) -> Tensor {
        self.tokens.narrow(1, 0, self.shape.slots())
    }

    /// Values of all slots, `[n, S, ..]`, of the supervised ones: `[C, ..]`.
    pub fn pick(&self, values: &Tensor) -> Tensor {
        values.flatten(0, 1).index_select(0, &self.places)
    }

    /// Values of supervised slots, `[C]`, among all, `[n, S]`, with `fill` elsewhere.
    pub fn spread(&self, values: &Tensor, fill: f64) -> Tensor {
        let shape = [self.len() * self.shape.slots()];
        let all = Tensor::full(shape, fill, (values.kind(), values.device()));
        all.index_copy(0, &self.places, values).view([self.len(), self.shape.slots()])
    }

    /// Logits in float32 at least of rows `[.., H]`: `[.., DV]`, with a graph to the rows.
    pub fn logits(&self, rows: &Tensor) -> Result<Tensor> {
        let logits = self.head.logits(rows);
        let kind = if logits.kind() == Kind::Double { Kind::Double } else { Kind::Float };
        Ok(logits.to_kind(kind))
    }
}

/// What a term of the objective is divided by.
#[derive(Debug)]
pub enum Denominator {
    /// A count of the whole optimizer step that the plan knows: its index in [`super::heads::BlockHead::counts`].
    Planned(usize),
    /// A count that only the device knows, of this chunk: a scalar without a graph. It is summed over the chunks of a batch,
    /// and the batches of a step are divided each by its own. For parity with references. Where the sum is 0, so is the
    /// term.
    Measured(Tensor),
}

/// A part of the objective.
#[derive(Debug)]
pub struct Term {
    /// Its factor in the objective.
    pub factor: f64,
    /// Sum over the chunk, a scalar with a graph.
    pub sum: Tensor,
    /// What the sum over all chunks is divided by.
    pub denominator: Denominator,
}

/// What a head makes of a chunk.
#[derive(Debug)]
pub struct ChunkLoss {
    /// The objective is the sum of `factor * sum / denominator`.
    pub terms: Vec<Term>,
    /// A float64 scalar without a graph for each of [`super::heads::BlockHead::metrics`].
    pub metrics: Vec<Tensor>,
}
