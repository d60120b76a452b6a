//! Configurations by which an algorithm is checked and timed on a device, and what a step of it has to compute.

use serde::Serialize;
use serde_json::Value;
use tch::Kind;

/// What a sample is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SampleSize {
    /// A target of three layers and some three hundred tokens: a step takes no time.
    Small,
    /// A target of Llama-3-8B's shape: what a GPU is worth.
    Full,
}

/// The samples of an algorithm.
#[derive(Debug, Default)]
pub struct Samples {
    /// Drafts whose losses and gradients are compared with the CPU's, on a small target. The first one stands for the
    /// algorithm where one is enough.
    pub compared: Vec<Compared>,
    /// Drafts that are timed. Each is a list: where memory does not suffice for one, the next is tried.
    pub timed: Vec<Vec<Timed>>,
}

/// A draft that is compared between devices.
#[derive(Debug)]
pub struct Compared {
    /// What it is, in short.
    pub label: &'static str,
    /// Element types in which it can be: where the target's most likely token decides whether a row has a loss at all,
    /// rounding may not.
    pub kinds: &'static [Kind],
    /// The `draft` section.
    pub section: Value,
}

/// A draft that is timed.
#[derive(Debug)]
pub struct Timed {
    /// What it is, in short.
    pub name: String,
    /// The `draft` section.
    pub section: Value,
}

/// The documents of a micro-batch, as far as a plan knows them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Documents {
    /// How many.
    pub count: u64,
    /// Tokens of each.
    pub tokens: u64,
    /// Share of them that is supervised.
    pub supervised: f64,
}

/// What a draft takes for a micro-batch beside the target's states and logits, and what a plan says of it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Footprint {
    /// Rows that pass through the draft; nothing where it is one for each token.
    pub rows: Option<u64>,
    /// Numbers that are kept for the backward pass, estimated.
    pub numbers: u64,
    /// Lines of `--plan`: a word and what is to be known.
    pub lines: Vec<(&'static str, String)>,
}

/// What a draft computes in a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Work {
    /// Trained rows of all loss terms.
    pub rows: u64,
    /// Rows of a chunk of logits, or target positions where rows that learn from one are computed together.
    pub chunk_rows: i64,
    /// Floating-point operations of forward and backward pass, as the mathematics has them: nothing that is merely computed
    /// again. A multiply-add counts as two.
    pub operations: u64,
    /// Of these, what a CPU does once for a document and not in every step.
    pub remembered: u64,
}
