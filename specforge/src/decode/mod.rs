//! From logits to text.
//!
//! - `engine` is the one loop: propose, verify, keep, with requests that come and go, with any draft and without one.
//!   `drafter` has the drafts, `policy` the pure decision, `prefill` how prompts are cut into passes, `event` what a decode
//!   tells. `verify_budget` says how many drafted tokens are worth a pass, where the draft knows how sure it is.
//! - `diffusion` decodes masked diffusion models, which fill in blocks of masks.
//! - `regenerate` makes training data with it, `own_prompts` what there is to answer.
//! - `scales` decodes images, whose unit is a scale instead of a token.

pub mod diffusion;
pub mod drafter;
pub mod engine;
pub mod event;
pub mod own_prompts;
pub mod policy;
mod prefill;
pub mod regenerate;
pub mod scales;
pub mod tolerance;
pub mod verify_budget;

pub use crate::data::Finish;
pub use drafter::Drafter;
pub use engine::{Decoded, Engine, EngineOptions, Left, Request, Sequence, SequenceRows, Step, Throughput};
pub use policy::{Policy, Proposal};
pub use regenerate::{Progress, RegenOptions, RegenReport};
pub use tolerance::Tolerance;
pub use verify_budget::VerifyBudget;

#[cfg(test)]
pub(crate) mod confident;
#[cfg(test)]
pub(crate) mod fault;
#[cfg(test)]
pub(crate) mod tiny;
