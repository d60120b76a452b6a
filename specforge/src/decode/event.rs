//! What a decode tells whoever listens: every token it commits, where it came from, and every tree it tried.

use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::data::Finish;
use crate::error::Result;
use crate::tree::TokenTree;

/// A request whose prompt has been run.
#[derive(Debug)]
pub struct Started<'a> {
    /// Tag of the request.
    pub tag: u64,
    /// The request's own part of every seed.
    pub key: u64,
    /// Its prompt.
    pub prompt: &'a [u32],
    /// How many of its first tokens an earlier request had left, so that they were not run.
    pub known: usize,
    /// New tokens it may have, the context's end considered.
    pub limit: usize,
}

/// Where a committed token comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// The first token, chosen behind the prompt.
    Prefill,
    /// Guessed by the draft and chosen by the target.
    Accepted,
    /// Chosen by the target where the draft guessed otherwise.
    Correction,
    /// Chosen by the target behind the last guess of an accepted path, or where nothing was guessed.
    Bonus,
}

/// One committed token.
#[derive(Debug)]
pub struct Committed<'a> {
    /// Tag of the request.
    pub tag: u64,
    /// Absolute position of the token.
    pub position: usize,
    /// The token.
    pub token: u32,
    /// Where it comes from.
    pub source: Source,
    /// Verification it belongs to, from 1; 0 is the prefill.
    pub round: u64,
    /// Place, among the tokens of that pass, of the one whose row it was chosen from: a node of the tree, or the last
    /// token of the prompt.
    pub slot: usize,
    /// Place of that token's parent; its own where it has none.
    pub parent_slot: usize,
    /// Depth of that token in the tree.
    pub depth: usize,
    /// Tokens in the target's cache before the pass.
    pub cache_length: i64,
    /// The row it was chosen from, `[V]`, unprocessed; only for listeners that want rows.
    pub row: Option<&'a Tensor>,
}

/// One verification of one request, before its outcome.
#[derive(Debug)]
pub struct Round<'a> {
    /// Tag of the request.
    pub tag: u64,
    /// Number of the verification, from 1.
    pub round: u64,
    /// Committed tokens before it, the prompt included.
    pub committed: usize,
    /// Tokens in the target's cache before it.
    pub target_cache: i64,
    /// Tokens in the draft's cache while it drafted; 0 where it has none.
    pub draft_cache: i64,
    /// What is verified.
    pub tree: &'a TokenTree,
    /// The draft's score of each node.
    pub scores: &'a [f64],
    /// Its raw confidence in each guess, where it has any.
    pub confidence: Option<&'a [f32]>,
}

/// Hears of everything a decode does, in order for each request.
pub trait Listener {
    /// Whether [`Committed::row`] is wanted: rows are copied for it.
    fn wants_rows(&self) -> bool {
        false
    }

    /// A request's first token is about to be chosen.
    fn started(&mut self, _event: &Started<'_>) -> Result<()> {
        Ok(())
    }

    /// A request is done, or has failed where there is no reason for its end.
    fn ended(&mut self, _tag: u64, _finish: Option<Finish>) -> Result<()> {
        Ok(())
    }

    /// A tree is about to be verified.
    fn round(&mut self, _round: &Round<'_>) -> Result<()> {
        Ok(())
    }

    /// A token was committed.
    fn committed(&mut self, event: &Committed<'_>) -> Result<()>;
}

/// Hears nothing.
#[derive(Debug, Default)]
pub struct Silent;

impl Listener for Silent {
    fn committed(&mut self, _event: &Committed<'_>) -> Result<()> {
        Ok(())
    }
}
