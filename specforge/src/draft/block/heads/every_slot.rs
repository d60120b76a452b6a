//! Values of all slots of a chunk, supervised or not.
//!
//! Losses want the supervised slots alone. A walk in training goes through the others too: what they would draft is read by
//! the slots behind them. There are few of them, and nothing flows back through them.
//!
//! Shape legend: `n` blocks, `S` slots, `C` supervised ones, `R` others, `C + R = n S`.

use tch::{Kind, Tensor};

use crate::draft::block::chunk::Chunk;
use crate::error::Result;

/// The slots that are not supervised, and how they stand among the others.
pub(super) struct EverySlot {
    /// `[R]` places among all `n * S`, ascending.
    rest: Tensor,
    /// `[n S]` place of each slot among the supervised ones and, behind those, the others.
    order: Tensor,
    shape: [i64; 2],
}

impl EverySlot {
    /// Those of a chunk.
    pub(super) fn of(chunk: &Chunk<'_>) -> Self {
        let own = chunk.places.size()[0];
        // Supervised slots first, each kind in its order: how many there are is known, so nothing waits for the device.
        let kinds = chunk.supervised.logical_not().flatten(0, 1).to_kind(Kind::Int64);
        let sorted = kinds.argsort_stable(true, 0, false); // [n S]
        let rest = sorted.narrow(0, own, sorted.size()[0] - own); // [R]
        Self { rest, order: sorted.argsort(0, false), shape: [chunk.len(), chunk.shape.slots()] }
    }

    /// Values `[n, S, ..]` of the others, `[R, ..]`.
    pub(super) fn pick(&self, values: &Tensor) -> Tensor {
        values.flatten(0, 1).index_select(0, &self.rest)
    }

    /// Logits of the others, `[R, DV]`, without a graph.
    pub(super) fn logits(&self, chunk: &Chunk<'_>) -> Result<Tensor> {
        tch::no_grad(|| chunk.logits(&self.pick(&chunk.slots())))
    }

    /// Values of supervised slots, `[C, ..]`, and of the others, `[R, ..]`, in their places: `[n, S, ..]`.
    pub(super) fn join(&self, supervised: &Tensor, others: &Tensor) -> Tensor {
        Tensor::cat(&[supervised, others], 0).index_select(0, &self.order).unflatten(0, self.shape)
    }
}
