//! What image models are built on: pictures as tensors, and the training of the tokenizer that turns them into codes.
//!
//! The training loop of drafts (`train`) knows documents of tokens and hidden states of a target, which pictures have
//! neither of. Optimizer, schedules, checkpoints, metrics and progress are the same here; only the loop is another.

pub mod pixels;
pub mod tokenizer;

pub use pixels::pixels;
pub use tokenizer::{TokenizerReport, TokenizerRun, TokenizerTraining, read_configuration};
