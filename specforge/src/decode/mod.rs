//! From logits to text.
//!
//! - `engine` decodes with any draft: propose, verify, keep. `drafter` has the drafts, `policy` the pure decision, `event`
//!   what a decode tells.
//! - `autoregressive` is plain decoding for throughput, one token a row and pass, and `regenerate` the making of training
//!   data with it.

pub mod autoregressive;
pub mod drafter;
pub mod engine;
pub mod event;
pub mod policy;
pub mod regenerate;
pub mod tolerance;

pub use autoregressive::{Answer, Finish, Finished, Generator, Request, Throughput};
pub use drafter::Drafter;
pub use engine::{Decoded, Engine, EngineOptions};
pub use policy::{Policy, Proposal};
pub use regenerate::{Progress, RegenOptions, RegenReport};
pub use tolerance::Tolerance;

#[cfg(test)]
pub(crate) mod fault;
#[cfg(test)]
pub(crate) mod tiny;
