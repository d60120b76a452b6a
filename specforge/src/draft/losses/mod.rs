//! The losses of a row that predicts a token, by name, and sums of them: one list for all drafts. Their values are tensors
//! with a graph; who asks for them makes logits in chunks and forgets both.
//!
//! | part | file |
//! | --- | --- |
//! | a loss, [`RowLoss`], and what those of a chunk have in common, [`Rows`] | `elementwise.rs` |
//! | a sum of losses as a configuration writes it, [`Compound`] | `compound.rs` |
//! | the right token, [`Labels`] | here |
//! | the objective of masked diffusion models | `masked_diffusion.rs` |
//!
//! Block drafters add weights and denominators ([`super::block::losses`]), P-EAGLE has the chunks of
//! [`super::distillation::compound`].
//!
//! Nothing flows into the target's distribution, nor into the share of [`RowLoss::LkLambda`] and [`RowLoss::LkHybrid`].
//!
//! Shape legend: `C` rows of a chunk, `DV` vocabulary of the draft.

use serde::{Deserialize, Serialize};

mod compound;
mod elementwise;
pub mod masked_diffusion;

pub use compound::Compound;
pub use elementwise::{LkLambda, RowLoss, Rows};

/// What a loss takes for the right token.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Labels {
    /// The token of the text.
    #[default]
    Data,
    /// What the target would have chosen.
    Teacher,
}
