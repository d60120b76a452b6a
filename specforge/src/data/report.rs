//! What a token cache was made of; stored with it.

use serde::{Deserialize, Serialize};

/// What was read, what was left out and why.
#[derive(Serialize, Deserialize, Debug, Clone, Default, PartialEq)]
pub struct BuildReport {
    /// Records read.
    pub conversations: usize,
    /// Documents made of them.
    pub documents: usize,
    /// Tokens of all documents.
    pub tokens: u64,
    /// Trained tokens of all documents.
    pub supervised_tokens: u64,
    /// Records that could not be used.
    pub rejected_count: usize,
    /// The first hundred of them, with file, line and reason.
    pub rejected: Vec<String>,
    /// Conversations and documents left out because nothing in them is trained.
    pub without_supervision: usize,
    /// Documents cut to `max_length`.
    pub truncated: usize,
    /// Documents left out because they are longer than `max_length`.
    pub too_long: usize,
    /// Conversations that became one document per turn, because the template rewrites history.
    pub fanned_out: usize,
    /// Conversations whose template rewrites history and marks itself what is generated.
    pub by_generation_blocks: usize,
    /// Conversations trained from the token ids their answers were generated as.
    pub from_token_ids: usize,
    /// Conversations whose token ids are another tokenizer's: their text is trained.
    pub foreign_token_ids: usize,
    /// Answers that were cut off: no end of turn is trained behind them.
    pub cut_answers: usize,
    /// Keys that look as if they decided about training or rendering and are not understood, by file.
    pub warnings: Vec<String>,
    /// Whether nothing had to be tokenised.
    pub from_cache: bool,
    /// Why a cache that was there could not be used.
    pub note: Option<String>,
}
