//! Decoding of next-scale image models. The contract is that of text, with a scale in the place of a token: propose, verify,
//! keep, roll back.
//!
//! Positions of a scale are independent given the scales before it, so a scale stands or falls as a whole. With keyed noise
//! the target's choice does not depend on who proposed what: maps are those of the target alone for every draft, every number
//! of drafted scales, and every batch, up to the rounding of logits by shapes of passes.

mod committed;
mod engine;
mod fit;
mod pace;
mod plan;
mod reader;
mod record;
mod rule;
mod sampling;

pub use committed::Committed;
pub use engine::{ScaleDecoder, ScaleRequest, ScaleSeen, Seen};
pub use pace::{Gamma, Pace};
pub use plan::Plan;
pub use record::{Decoded, Round, ScaleRecord, Seconds, Source};
pub use rule::Rule;
pub use sampling::{ScaleSampling, choice_from, domain};

#[cfg(test)]
pub(crate) mod fault;
#[cfg(test)]
mod tests;
#[cfg(test)]
pub(crate) mod tiny;
