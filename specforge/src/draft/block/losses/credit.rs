//! What slots of a block count, as functions of a grid of blocks and slots, `[n, S]`. None of them has a graph.
//!
//! A draft is accepted up to its first error, so a slot is worth what can still be accepted from it on. Slots that are not
//! supervised are passed: they take nothing from the chance of those behind them, and count nothing themselves.

use tch::{Kind, Tensor};

/// `[S]` weights `exp(-slot / gamma)`, of the type and on the device of `like`.
pub fn decay(slots: i64, gamma: f64, like: &Tensor) -> Tensor {
    let places = Tensor::arange(slots, (Kind::Double, like.device()));
    (places * (-1.0 / gamma)).exp().to_kind(like.kind())
}

/// `[n, S]` steps `alpha + (1 - alpha) * chance` of supervised slots, and 1 elsewhere.
fn steps(chances: &Tensor, supervised: &Tensor, alpha: f64) -> Tensor {
    let steps = chances.detach() * (1.0 - alpha) + alpha;
    steps.where_self(supervised, &chances.ones_like())
}

/// `[n, S]` the chance that a block survives up to and including each slot, from the chance of every slot.
pub fn survival(chances: &Tensor, supervised: &Tensor, alpha: f64) -> Tensor {
    steps(chances, supervised, alpha).cumprod(1, None)
}

/// `[n, S]` the chance that a block gets as far as each slot: the first slot's is 1. For a confidence head, which is asked
/// about a slot only then.
pub fn reach(chances: &Tensor, supervised: &Tensor) -> Tensor {
    let survival = survival(chances, supervised, 0.0);
    let slots = survival.size()[1];
    let first = survival.narrow(1, 0, 1).ones_like();
    Tensor::cat(&[first, survival.narrow(1, 0, slots - 1)], 1) * supervised
}

/// `[n, S]` tokens that are expected to be accepted from each slot on, a smoothed one: the sum over supervised slots behind
/// and at it of their survival. D-PACE's weights with `chances` q(y), D-PARD's with `sum min(p, q)`.
pub fn credit(chances: &Tensor, supervised: &Tensor, alpha: f64) -> Tensor {
    let survival = survival(chances, supervised, alpha) * supervised;
    survival.flip([1]).cumsum(1, None).flip([1]) * supervised
}

/// `[n, S]` the same given that the block has survived up to and including each slot: [`credit`] divided by [`survival`],
/// without a division by what underflows.
pub fn continuation(chances: &Tensor, supervised: &Tensor, alpha: f64) -> Tensor {
    let steps = steps(chances, supervised, alpha);
    let marks = supervised.to_kind(steps.kind());
    let slots = steps.size()[1];
    let mut columns: Vec<Tensor> = Vec::new();
    for slot in (0..slots).rev() {
        let own = marks.select(1, slot);
        columns.push(match columns.last() {
            Some(next) => own + steps.select(1, slot + 1) * next,
            None => own,
        });
    }
    columns.reverse();
    Tensor::stack(&columns, 1) * supervised
}

/// `[n, S]` booleans: supervised slots up to and including the first whose draft is wrong; `hits` says which are right.
pub fn accepted_and_first_error(hits: &Tensor, supervised: &Tensor) -> Tensor {
    errors_before(hits, supervised).eq(0).logical_and(supervised)
}

/// `[n, S]` booleans: the first supervised slot whose draft is wrong, at most one of a block.
pub fn first_error(hits: &Tensor, supervised: &Tensor) -> Tensor {
    accepted_and_first_error(hits, supervised).logical_and(&hits.logical_not())
}

/// `[n, S]` number of wrong drafts before each slot.
fn errors_before(hits: &Tensor, supervised: &Tensor) -> Tensor {
    let errors = hits.logical_not().logical_and(supervised).to_kind(Kind::Int64);
    errors.cumsum(1, Kind::Int64) - errors
}
