//! Accepted prefixes: how many tokens of a block are right before the first that is not.
//!
//! A run begins with the first slot and ends with the first token that is wrong or not supervised. Its mean is over the
//! blocks whose first slot is supervised.

use tch::{Kind, Tensor};

use crate::draft::block::chunk::Chunk;

/// Sum of the runs of a chunk's blocks; `right [C]` says which supervised slots hold the right token. A float64 scalar.
pub(super) fn runs(chunk: &Chunk<'_>, right: &Tensor) -> Tensor {
    let right = chunk.spread(&right.to_kind(Kind::Double), 0.0); // [n, S]
    right.cumprod(1, Kind::Double).sum(Kind::Double)
}

/// Number of blocks whose first slot is supervised, of slots `[blocks][S]`.
pub(super) fn begun(supervised: &[Vec<bool>]) -> f64 {
    supervised.iter().filter(|block| block.first() == Some(&true)).count() as f64
}

/// Number of supervised slots.
pub(super) fn slots(supervised: &[Vec<bool>]) -> f64 {
    supervised.iter().flatten().filter(|&&on| on).count() as f64
}

/// Booleans or numbers `[..]` summed: a float64 scalar.
pub(super) fn total(values: &Tensor) -> Tensor {
    values.detach().to_kind(Kind::Double).sum(Kind::Double)
}
