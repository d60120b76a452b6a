//! The messages of a session. Every one names the session and its epoch; the counts are of all committed tokens, the prompt
//! included.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::features::{Encoding, Features};
use crate::data::Finish;
use crate::decode::Policy;
use crate::nn::Processors;

/// Version of this protocol. Both sides have the same one, or there is no session.
pub const VERSION: u32 = 2;

/// A session's name, which nobody guesses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct SessionId(pub u128);

/// Where a message belongs. An edge that opens a session has neither yet: zeros.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Address {
    /// The session.
    pub session: SessionId,
    /// Which of its holders: it grows whenever a session is opened or resumed, over restarts of the cloud too, and who has an
    /// older one is not heard any more.
    pub epoch: u64,
}

/// What the edge says.
#[derive(Debug, Clone, PartialEq)]
pub enum EdgeMessage {
    /// Begins a session.
    Open(Box<Open>),
    /// Guesses to verify.
    Draft(Draft),
    /// Takes a session up again after the connection was lost.
    Resume(Resume),
    /// The answer is not wanted any more.
    Cancel(Address),
    /// The answer has arrived.
    Close(Address),
}

/// What the cloud says.
#[derive(Debug, Clone, PartialEq)]
pub enum CloudMessage {
    /// A session has begun.
    Opened(Box<Opened>),
    /// What the target made of a draft.
    Verdict(Verdict),
    /// A session goes on.
    Synced(Synced),
    /// Something is refused.
    Error(Refusal),
}

/// A request.
#[derive(Debug, Clone, PartialEq)]
pub struct Open {
    /// See [`VERSION`].
    pub version: u32,
    /// Comes back with the answer, so that a late one is told from the one that is waited for.
    pub attempt: u64,
    /// Names the edge, as long as it runs: it may take up its own session with an epoch that it does not know yet.
    pub edge: u64,
    /// The tokenizer's `vocabulary_hash`: what ids stand for.
    pub tokenizer_hash: String,
    /// Tokens that the draft can name.
    pub vocab_size: u32,
    /// The prompt.
    pub prompt: Vec<u32>,
    /// What an earlier session had committed behind it. The target checks it as guesses are checked.
    pub tail: Vec<u32>,
    /// How the target chooses.
    pub choice: Choice,
    /// Most tokens of the answer, the tail included.
    pub max_new_tokens: u32,
    /// What the draft reads of the target, where it reads anything.
    pub features: Option<Wanted>,
}

/// How the target chooses its tokens.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Choice {
    /// What is done to its rows.
    pub processors: Processors,
    /// How guesses are accepted; holds the seed.
    pub policy: Policy,
    /// The request's own part of the seed.
    pub key: u64,
}

/// Hidden states that a draft reads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// Hugging Face's indices, in the draft's order.
    pub layers: Vec<u32>,
    /// How they travel.
    pub encoding: Encoding,
}

/// What a cloud allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Most nodes of a tree, its root not counted.
    pub max_nodes: u32,
    /// Most tokens of a session, the prompt included.
    pub max_tokens: u32,
    /// How long a session is kept for an edge that is not heard of.
    pub lease: Duration,
}

/// A session that has begun, with everything committed behind the prompt.
#[derive(Debug, Clone, PartialEq)]
pub struct Opened {
    /// Where it is.
    pub address: Address,
    /// Of which [`Open`].
    pub attempt: u64,
    /// Everything committed behind the prompt: at least one token, and what the tail had first.
    pub tokens: Vec<u32>,
    /// Of everything committed.
    pub digest: u64,
    /// Why it has ended already, if it has.
    pub finish: Option<Finish>,
    /// What is allowed.
    pub limits: Limits,
    /// Whether the output is the target's own.
    pub lossless: bool,
    /// Of all tokens that were run: everything committed but the last token.
    pub features: Option<Features>,
}

/// A node of a tree on its way. Node 0 is the last committed token and does not travel; these are numbered from 1 on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Node {
    /// The node it stands behind, which comes before it.
    pub parent: u32,
    /// The guess.
    pub token: u32,
}

/// Guesses behind everything committed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Draft {
    /// Where it belongs.
    pub address: Address,
    /// Number of the verification, from 1, larger for each; a number that was there means the same draft again.
    pub round: u64,
    /// How many tokens it builds on.
    pub base_length: u64,
    /// Their digest.
    pub base_digest: u64,
    /// The guesses; none is a wish for the next token.
    pub nodes: Vec<Node>,
    /// Numbers of nodes that the draft is sure of; see [`Policy::Entropy`].
    pub sure: Vec<u32>,
}

/// What the target made of a draft.
#[derive(Debug, Clone, PartialEq)]
pub struct Verdict {
    /// Where it belongs.
    pub address: Address,
    /// Of which draft; 0 where the cloud went on without one.
    pub round: u64,
    /// How many tokens it builds on.
    pub base_length: u64,
    /// What is committed behind them.
    pub tokens: Vec<u32>,
    /// The node that each was chosen behind.
    pub path: Vec<u32>,
    /// Places among the tokens of those that a lossy gate kept though the target chose others.
    pub unverified: Vec<u32>,
    /// Digest of everything committed, these tokens included.
    pub digest: u64,
    /// Why the answer ends here, if it does.
    pub finish: Option<Finish>,
    /// Of the last token before and the new ones but the last.
    pub features: Option<Features>,
}

impl Verdict {
    /// How many tokens are committed with it.
    pub fn end(&self) -> u64 {
        self.base_length + self.tokens.len() as u64
    }
}

/// A wish to go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Resume {
    /// Where, with the newest epoch that the edge knows.
    pub address: Address,
    /// See [`Open::edge`].
    pub edge: u64,
    /// How many tokens the edge has.
    pub committed_length: u64,
    /// Their digest.
    pub digest: u64,
}

/// A session that goes on.
#[derive(Debug, Clone, PartialEq)]
pub struct Synced {
    /// Where it is now.
    pub address: Address,
    /// Number of the last draft that was verified.
    pub round: u64,
    /// How many tokens are committed.
    pub committed_length: u64,
    /// Their digest.
    pub digest: u64,
    /// What the edge has missed, in order.
    pub missed: Vec<Verdict>,
}

/// Why something is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Code {
    /// Another version of the protocol.
    Version,
    /// Another tokenizer, or more tokens than the target has.
    Tokenizer,
    /// A request that no target of these sizes can answer, or values that mean nothing.
    Request,
    /// A way of accepting guesses that needs what does not travel.
    Policy,
    /// There is no room at the moment.
    Busy,
    /// There is no such session: it ended, was let go of, or the cloud was started anew.
    UnknownSession,
    /// Another edge has taken the session over.
    TakenOver,
    /// The draft builds on tokens that are not the newest; what was missed comes along.
    StaleBase,
    /// What was missed is not kept any more: the session has to be opened anew.
    TooFarBehind,
    /// The draft builds on tokens that were never committed.
    Diverged,
    /// A number of a round that was there, with other guesses.
    RoundReused,
    /// A draft is being verified already.
    InFlight,
    /// A tree that is none.
    BadTree,
    /// The target failed.
    Target,
}

impl Code {
    /// Whether the edge can go on by itself: by waiting, by taking in what it missed, or with a session that is opened anew.
    pub fn is_retryable(self) -> bool {
        use Code::{Busy, InFlight, StaleBase, TooFarBehind, UnknownSession};
        matches!(self, Busy | InFlight | StaleBase | TooFarBehind | UnknownSession)
    }
}

/// Something that is refused. The session is as it was.
#[derive(Debug, Clone, PartialEq)]
pub struct Refusal {
    /// Where it belongs, as the refused message said it.
    pub address: Address,
    /// Why.
    pub code: Code,
    /// The same in words.
    pub message: String,
    /// The attempt or round that is refused; 0 where it is neither.
    pub of: u64,
    /// How many tokens are committed, where that is the point.
    pub committed_length: u64,
    /// What the edge has missed, in order.
    pub missed: Vec<Verdict>,
}
