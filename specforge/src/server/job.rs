//! What goes from those who take requests to the one who decodes, and back.

use std::time::Instant;

use tokio::sync::mpsc::UnboundedSender;

use super::refusal::Refusal;
use crate::nn::Processors;

/// One answer to be made: a request with several choices is several of them.
#[derive(Debug)]
pub struct Job {
    /// Which of its request's choices it is.
    pub choice: usize,
    /// The prompt.
    pub prompt: Vec<u32>,
    /// Most tokens of the answer; prompt and answer together fit into the context.
    pub max_tokens: usize,
    /// What is done to the target's rows.
    pub processors: Processors,
    /// Key of the sampling noise, as `specforge generate --seed` takes it.
    pub seed: u64,
    /// Strings that end the answer.
    pub stop: Vec<String>,
    /// Likeliest tokens whose probability is told beside each token's own; `None` where no probability is told.
    pub logprobs: Option<usize>,
    /// When the request came.
    pub arrived: Instant,
    /// Where the answer goes. An answer is at most `max_tokens` long, so nobody has to wait for a slow reader. Where it is
    /// closed, nobody wants the answer any more.
    pub events: UnboundedSender<Event>,
}

/// Part of an answer.
#[derive(Debug)]
pub struct Event {
    /// Which of the request's choices it belongs to.
    pub choice: usize,
    /// What happened.
    pub what: What,
}

/// What happened to an answer.
#[derive(Debug)]
pub enum What {
    /// It goes on.
    Piece(Piece),
    /// It is complete.
    End(End),
    /// It will not be complete.
    Failed(Refusal),
}

/// Text that is certain, and the tokens that begin in it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Piece {
    /// The text.
    pub text: String,
    /// The tokens, in order. Those of one character may come before it.
    pub tokens: Vec<Told>,
}

impl Piece {
    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.text.is_empty() && self.tokens.is_empty()
    }
}

/// A token of an answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Told {
    /// Its id.
    pub id: u32,
    /// Characters of the answer before it.
    pub offset: usize,
    /// Its probability and that of others, where that was asked for.
    pub chances: Option<Chances>,
}

/// What the target's distribution says about a token's place, before temperature and whatever else a request wants.
#[derive(Debug, Clone, PartialEq)]
pub struct Chances {
    /// The token itself.
    pub own: Chance,
    /// The likeliest tokens, the likeliest first.
    pub top: Vec<Chance>,
}

/// A token and how likely it is.
#[derive(Debug, Clone, PartialEq)]
pub struct Chance {
    /// The token's text; special tokens spelled out.
    pub text: String,
    /// Natural logarithm of its probability.
    pub logprob: f64,
}

/// How an answer ended, and what it took.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct End {
    /// `stop` or `length`.
    pub reason: &'static str,
    /// The token that ended it, where one did.
    pub token: Option<u32>,
    /// Numbers.
    pub counts: Counts,
}

/// Tokens of an answer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Tokens generated, the one that ended the answer included.
    pub tokens: u64,
    /// Tokens that the draft guessed and the target looked at.
    pub drafted: u64,
    /// Those of them that are in the answer.
    pub accepted: u64,
    /// Verifications.
    pub rounds: u64,
    /// Tokens of the prompt that an earlier answer had left.
    pub known: u64,
}

impl std::ops::AddAssign for Counts {
    fn add_assign(&mut self, other: Self) {
        self.tokens += other.tokens;
        self.drafted += other.drafted;
        self.accepted += other.accepted;
        self.rounds += other.rounds;
        self.known += other.known;
    }
}
