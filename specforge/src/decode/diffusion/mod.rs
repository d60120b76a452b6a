//! Decoding of masked diffusion models (LLaDA, <https://arxiv.org/abs/2502.09992>), block by block: an answer begins as masks,
//! and after each pass the tokens of the current block that the model is surest of become known. A token that is known never
//! changes; a block is complete before the next begins; no mask is left in the end.
//!
//! Reading order: `rule` says which tokens become known, `choice` which tokens they are, `network` has the passes over whole
//! texts and over views, `state` the rows that leave later layers out, `decoder` the loop, `exact` the one that verifies
//! several states in one pass. `report` is what they tell.
//!
//! Caches: a block's first pass is over the whole text and fills a cache; later passes run a view of the text at its absolute
//! positions and write its keys and values over those that were there (Fast-dLLM, <https://arxiv.org/abs/2505.22618>, commit
//! 24cc59e75f20a6384bae8c905965bb090b96388e of NVlabs/Fast-dLLM). Its program makes one more pass where a block's first pass
//! left no mask; this one does not.

pub mod choice;
pub mod decoder;
pub mod exact;
#[cfg(test)]
pub(crate) mod fault;
pub mod network;
pub mod options;
pub mod report;
pub mod rule;
pub mod state;
mod steps;

pub use choice::{Draw, Draws, Keyed};
pub use decoder::{Answer, Decoder, Prompt};
pub use exact::step_from;
pub use network::{Network, Rows, Text, View};
pub use options::{Cache, Guess, Options, Parallel, Remasking};
pub use report::{CacheSeen, RowDigests, Step, Unwatched, Watcher, Work};
pub use rule::Rule;
pub use state::{BlockState, TokenSkip};

#[cfg(test)]
mod tests;
#[cfg(test)]
pub(crate) mod tiny;
