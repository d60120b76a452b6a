//! What everybody who takes requests needs to know.

use std::sync::Arc;
use std::sync::mpsc::SyncSender;
use std::time::Duration;

use super::board::Board;
use super::job::Job;
use super::keys::Keys;
use super::memory::Cost;
use crate::data::ChatTokenizer;
use crate::nn::Processors;

/// Limits of what a client may ask for.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Bytes of a request's body.
    pub body: usize,
    /// Tokens of a prompt.
    pub prompt: usize,
    /// Tokens of an answer.
    pub answer: usize,
    /// Connections at once. More wait until one ends.
    pub connections: usize,
    /// How long answers may take to their end once the server was asked to stop.
    pub drain: Duration,
}

/// What a request gets that does not say it.
#[derive(Debug, Clone, Copy)]
pub struct Defaults {
    /// What is done to the target's rows.
    pub processors: Processors,
    /// Most tokens of an answer.
    pub max_tokens: usize,
    /// Seed of sampling; where there is none, every request has its own.
    pub seed: Option<u64>,
}

/// What everybody who takes requests needs to know.
pub struct House {
    /// The target's tokenizer.
    pub tokenizer: Arc<ChatTokenizer>,
    /// What the target is called here.
    pub model: String,
    /// Tokens of a prompt and its answer together.
    pub context: usize,
    /// Ids below this are tokens.
    pub vocabulary: usize,
    /// What a request gets that does not say it.
    pub defaults: Defaults,
    /// Limits of what a client may ask for.
    pub limits: Limits,
    /// What the target's cache takes.
    pub cost: Cost,
    /// Who is let in.
    pub keys: Keys,
    /// How things stand.
    pub board: Arc<Board>,
    /// The way to the desk. As many jobs fit in as may wait.
    pub jobs: SyncSender<Job>,
    /// When the server started, in seconds since 1970.
    pub created: u64,
}
