//! Draft on one machine, target on another, and one text: speculative decoding over a network that may do what it likes.
//!
//! The edge holds tokenizer and draft, the cloud the target. A session is one request: the edge sends a tree of guesses, the
//! cloud answers with what its target made of it. Three rules keep both sides from ever disagreeing:
//!
//! - The cloud's list of committed tokens is the truth, and the edge's is a beginning of it: every message says how many
//!   tokens it builds on and their running [`Digest`]. What builds on anything else is refused with what was missed, and
//!   never guessed at.
//! - A round is verified once, however often it arrives: a repeat is given the verdict that is kept.
//! - What is rolled back is a value. The target's cache holds what its list of tokens says ([`crate::decode::Sequence`]), the
//!   draft is taken back to the longest common beginning of what it was told and of what came true.
//!
//! The target chooses with noise keyed by the absolute position, so what it chooses depends on the tokens before it alone: a
//! session that is lost is opened anew with what the edge has, which the new one checks as it checks any guess.
//!
//! `protocol` has the messages, `check` what is refused of a tree, `features` how hidden states travel, [`Cloud`] and [`Edge`]
//! the two sides. Neither knows a network or a clock: messages and times are handed in, which is how every fault is tested.

mod absent_target;
pub mod check;
mod digest;
mod drafting;
mod edge;
pub mod features;
pub mod grpc;
mod pace;
pub mod protocol;
mod session;
pub mod transport;
mod verifier;

pub use absent_target::AbsentTarget;
pub use digest::Digest;
pub use drafting::Ahead;
pub use edge::{Edge, EdgeRequest, State};
pub use pace::Pace;
pub use session::LinkId;
pub use verifier::{Cloud, CloudSettings};

#[cfg(test)]
mod tests;
