//! From logits to text: plain decoding with continuous batching, and the regeneration of training data with it.

pub mod autoregressive;
pub mod regenerate;

pub use autoregressive::{Answer, Finish, Finished, Generator, Request, Throughput};
pub use regenerate::{Progress, RegenOptions, RegenReport};

#[cfg(test)]
pub(crate) mod tiny;
