//! What heads measure of blocks beside the averages of [`super::metrics`]: sums on the device, and what they are divided by,
//! known to the plan.

use tch::{Kind, Tensor};

use crate::draft::block::chunk::Chunk;
use crate::draft::block::losses::RowValues;

/// Averages that there are where the target's predictions are: over supervised slots, the overlap of draft and target, which
/// is how likely a sampled token is accepted; and over blocks, what that comes to as a length, which DeepSpec calls tau.
pub const ACCEPTANCE: [&str; 2] = ["acceptance", "expected_length"];

/// What [`ACCEPTANCE`] are averages over.
pub fn acceptance_counts(supervised: &[Vec<bool>]) -> [f64; 2] {
    [count_rows(supervised), count_blocks(supervised)]
}

/// Their sums over a chunk.
pub fn acceptance_sums(chunk: &Chunk<'_>, values: &RowValues) -> Option<[Tensor; 2]> {
    let acceptance = values.acceptance.as_ref()?;
    Some([total(acceptance), lengths(chunk, acceptance)])
}

/// Sum over supervised slots of `values [C]`: a float64 scalar.
pub fn total(values: &Tensor) -> Tensor {
    values.detach().sum(Kind::Double)
}

/// Product of `values [C]` from the first slot of a block to each: `[n, S]` float64. A slot that is not supervised ends it,
/// as nothing behind it is drafted.
pub fn chains(chunk: &Chunk<'_>, values: &Tensor) -> Tensor {
    chunk.spread(&values.detach().to_kind(Kind::Double), 0.0).cumprod(1, Kind::Double)
}

/// Sum over blocks of the tokens that a verification gives them, where each slot is right with probability `values [C]` (or
/// is, 1, or is not, 0) after those before it: the target's own token and the chain. Blocks without supervision give none.
pub fn lengths(chunk: &Chunk<'_>, values: &Tensor) -> Tensor {
    let blocks = chunk.supervised.any_dim(1, false).to_kind(Kind::Double); // [n]
    ((chains(chunk, values).sum_dim_intlist(1, false, Kind::Double) + 1.0) * blocks).sum(Kind::Double)
}

/// Supervised slots.
pub fn count_rows(supervised: &[Vec<bool>]) -> f64 {
    supervised.iter().flatten().filter(|slot| **slot).count() as f64
}

/// Blocks with a supervised slot.
pub fn count_blocks(supervised: &[Vec<bool>]) -> f64 {
    supervised.iter().filter(|block| block.contains(&true)).count() as f64
}
