//! What image models are built on: pictures as tensors, and the training of the tokenizer that turns them into codes.
//!
//! The training loop of drafts (`train`) knows documents of tokens and hidden states of a target. Pictures become such
//! documents by the image tokenizer (`documents`), so that next-scale transformers are trained there like any draft. The
//! tokenizer itself has neither: its optimizer, schedules, checkpoints, metrics and progress are the same, and its loop is
//! another (`tokenizer`).

pub mod documents;
pub mod pixels;
pub mod tokenizer;

pub use documents::{Codes, Pictures};
pub use pixels::pixels;
pub use tokenizer::{TokenizerReport, TokenizerRun, TokenizerTraining, read_configuration};
