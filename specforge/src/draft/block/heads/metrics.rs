//! Averages that every head reports, slot by slot.
//!
//! Shape legend: `n` blocks, `S` slots, `C` supervised slots.

use tch::{Kind, Tensor};

use crate::draft::block::chunk::Chunk;
use crate::draft::block::config::{BlockShape, Layout};

/// Averages of a slot: loss, how often its likeliest token is right, and how often those of all slots up to it are.
const METRICS: [&str; 3] = ["loss", "accuracy", "chain"];

/// Names of all slots' averages.
pub fn names(layout: Layout, block_size: i64) -> Vec<String> {
    (1..=layout.slots(block_size)).flat_map(|slot| METRICS.map(|metric| format!("slot{slot}/{metric}"))).collect()
}

/// What they are averages over: supervised slots.
pub fn counts(shape: &BlockShape, supervised: &[Vec<bool>]) -> Vec<f64> {
    let count = |slot: usize| supervised.iter().filter(|block| block[slot]).count() as f64;
    (0..shape.slots() as usize).flat_map(|slot| [count(slot); METRICS.len()]).collect()
}

/// Sums over a chunk, a float64 scalar each, of losses and of whether tokens are right, `[C]` each.
pub fn sums(chunk: &Chunk<'_>, losses: &Tensor, hits: &Tensor) -> Vec<Tensor> {
    let losses = chunk.spread(&losses.detach().to_kind(Kind::Double), 0.0); // [n, S]
    let hits = chunk.spread(&hits.to_kind(Kind::Double), 0.0); // [n, S]
    let chain = hits.cumprod(1, Kind::Double);
    let sums = Tensor::stack(&[losses, hits, chain], 2).sum_dim_intlist([0i64].as_slice(), false, Kind::Double); // [S, 3]
    sums.flatten(0, 1).unbind(0)
}

/// Tokens that a round would give if every slot were as good behind a real text as it is here: one, and each slot as often
/// as all up to it are right. The averages are those of [`names`], first of all others.
pub fn simulated_acceptance_length(shape: &BlockShape, averages: &[f64]) -> f64 {
    let slots = averages.chunks(METRICS.len()).take(shape.slots() as usize);
    1.0 + slots.map(|slot| slot[2]).filter(|chain| chain.is_finite()).sum::<f64>()
}
