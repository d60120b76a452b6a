//! What a decode is asked for, and what came of it.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::data::Finish;
use crate::error::{Error, Result};
use crate::models::TargetModel;

/// A prompt that waits for its continuation.
#[derive(Debug, Clone)]
pub struct Request {
    /// Comes back with the answer; the engine does not look at it.
    pub tag: u64,
    /// The prompt.
    pub prompt: Vec<u32>,
    /// Most tokens to generate.
    pub max_new_tokens: usize,
    /// The request's own key of the sampling noise, added to the seed.
    pub key: u64,
}

impl Request {
    /// Refuses what no target of these dimensions can answer.
    pub(super) fn check(&self, target: &dyn TargetModel) -> Result<()> {
        let dimensions = target.info();
        let (length, context) = (self.prompt.len(), dimensions.max_position_embeddings);
        if length == 0 {
            return Err(Error::Failed("the prompt is empty".to_owned()));
        }
        if length as i64 >= context {
            let problem = format!("the prompt has {length} tokens; the context of {context} leaves no room to answer");
            return Err(Error::Failed(problem));
        }
        if let Some(id) = self.prompt.iter().find(|&&id| i64::from(id) >= dimensions.vocab_size) {
            let vocabulary = dimensions.vocab_size;
            return Err(Error::Failed(format!("token {id} is outside the target's vocabulary of {vocabulary}")));
        }
        if self.max_new_tokens == 0 {
            return Err(Error::Failed("max_new_tokens: expected at least 1, got 0".to_owned()));
        }
        Ok(())
    }
}

/// One verification of one request, in numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RoundOutcome {
    /// Guesses verified.
    pub guesses: usize,
    /// Depth of the tree.
    pub depth: usize,
    /// Tokens committed.
    pub tokens: usize,
    /// Guesses among them.
    pub accepted: usize,
}

/// A request that has been decoded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Decoded {
    /// The request's tag.
    pub tag: u64,
    /// New tokens, the stop token included; nothing behind it.
    pub tokens: Vec<u32>,
    /// Why it ended.
    pub finish: Finish,
    /// Its verifications. The first token comes from the prefill and belongs to none.
    pub rounds: Vec<RoundOutcome>,
}

impl Decoded {
    /// The tokens without the stop token.
    pub fn text_tokens(&self) -> &[u32] {
        match (self.finish, self.tokens.split_last()) {
            (Finish::Stop, Some((_, text))) => text,
            _ => &self.tokens,
        }
    }
}

/// A request that has left the engine, or why it could not be decoded.
#[derive(Debug)]
pub struct Left {
    /// The request's tag.
    pub tag: u64,
    /// What became of it.
    pub decoded: Result<Decoded>,
}

/// Where the time went.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Clock {
    /// Prompts, the draft's part included.
    pub prefill: Duration,
    /// Drafting.
    pub draft: Duration,
    /// The target's passes over trees, and its choices.
    pub verify: Duration,
    /// Everything else while decoding.
    pub overhead: Duration,
}

impl Clock {
    /// Time behind the prompts.
    pub fn decode(&self) -> Duration {
        self.draft + self.verify + self.overhead
    }
}

/// What was done in how much time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Throughput {
    /// Prompt tokens processed, without padding.
    pub prompt_tokens: u64,
    /// Prompt tokens that an earlier request had left.
    pub known_tokens: u64,
    /// Tokens generated.
    pub new_tokens: u64,
    /// Verifications, each request's counted: without a draft, tokens behind the first of each.
    pub rounds: u64,
    /// Passes of the target behind the prompts, over all running rows at once.
    pub passes: u64,
    /// Time spent on prompts.
    pub prefill_time: Duration,
    /// Time spent on generating.
    pub decode_time: Duration,
}

impl Throughput {
    /// Generated tokens a second, the time for the prompts included.
    pub fn tokens_per_second(&self) -> f64 {
        let seconds = (self.prefill_time + self.decode_time).as_secs_f64();
        if seconds > 0.0 { self.new_tokens as f64 / seconds } else { 0.0 }
    }
}
