//! Losses of rows that predict a token: what a row loses, what it counts, and what sums are divided by.
//!
//! A head has one or more [`Objective`]s and asks them for the terms of a chunk. An objective has four parts:
//!
//! | part | choices | file |
//! | --- | --- | --- |
//! | loss of a row | [`Compound`] of [`RowLoss`]es | `draft/losses` |
//! | the right token | [`Labels`] | `draft/losses` |
//! | what a row counts | [`Weighting`] | `weighting.rs`, from the functions of `credit.rs` |
//! | what the sum is divided by | [`Denominators`] | `denominators.rs` |
//!
//! Terms of other forms are [`FirstErrorFocal`], the binary cross-entropy of a confidence head ([`confidence`]), and the
//! cross-entropy of a selector among candidates ([`SelectorObjective`]).
//!
//! Nothing flows into the target's distribution, into weights, into the share of [`RowLoss::LkLambda`] and
//! [`RowLoss::LkHybrid`], nor into the acceptance that a confidence head learns.
//!
//! Shape legend: `n` blocks of a chunk, `S` slots of a block (rows that predict a token, counted from 0 in every layout),
//! `C` supervised slots of the chunk, `DV` vocabulary of the draft, `K` candidates of a slot.

mod confidence;
pub mod credit;
mod denominators;
mod focal;
mod objective;
mod selector;
#[cfg(test)]
mod tests;
mod weighting;

pub use confidence::confidence;
pub use denominators::{Denominators, document_shares};
pub use focal::FirstErrorFocal;
pub use objective::{Objective, RowValues};
pub use selector::{Gold, SelectorObjective};
pub use weighting::{CreditPart, Weighting};

pub use crate::draft::losses::{Compound, Labels, LkLambda, RowLoss, Rows};
