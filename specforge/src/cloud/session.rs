//! One session of the cloud: its sequence, the verdicts an edge may still ask for, and who holds it.

use std::collections::VecDeque;
use std::time::Duration;

use super::digest::Digest;
use super::features::{Encoding, Features};
use super::protocol::{Address, CloudMessage, Code, Node, Refusal, SessionId, Verdict};
use crate::decode::{Proposal, Sequence, Step};
use crate::error::Result;

/// Names a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LinkId(pub u64);

/// A verdict that is kept, with the guesses it is of.
#[derive(Debug)]
pub(super) struct Kept {
    pub(super) verdict: Verdict,
    pub(super) nodes: Vec<Node>,
}

/// A tree that waits for a pass. Round 0 is the cloud's own wish to go on.
#[derive(Debug)]
pub(super) struct Queued {
    pub(super) round: u64,
    pub(super) guesses: Proposal,
    pub(super) nodes: Vec<Node>,
}

impl Queued {
    /// A wish for the next token.
    pub(super) fn nothing(last: u32) -> Self {
        Self { round: 0, guesses: Proposal::nothing(last), nodes: Vec::new() }
    }
}

/// A tree that is being verified.
#[derive(Debug)]
pub(super) struct Round {
    pub(super) round: u64,
    /// As deep as the answer may still grow.
    pub(super) guesses: Proposal,
    /// Which node of what was sent each of its nodes is.
    places: Vec<usize>,
    nodes: Vec<Node>,
    base_length: u64,
}

/// A request on its way.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) address: Address,
    /// The edge that holds it.
    pub(super) edge: u64,
    /// Its connection; `None` while there is none.
    pub(super) link: Option<LinkId>,
    pub(super) sequence: Sequence,
    pub(super) digest: Digest,
    pub(super) encoding: Option<Encoding>,
    /// When the edge was last heard of.
    pub(super) heard: Duration,
    /// When something last happened that the edge has to answer.
    pub(super) moved: Duration,
    /// Number of the last draft that was verified.
    pub(super) round: u64,
    /// Verdicts that the edge may not have yet, and the last one in any case; each begins where the one before ends.
    pub(super) kept: VecDeque<Kept>,
    pub(super) queued: Option<Queued>,
}

impl Session {
    pub(super) fn id(&self) -> SessionId {
        self.address.session
    }

    pub(super) fn length(&self) -> u64 {
        self.sequence.tokens().len() as u64
    }

    /// What is queued, to be verified now.
    pub(super) fn take_queued(&mut self) -> Option<Round> {
        let Queued { round, guesses, nodes } = self.queued.take()?;
        // What is deeper than the answer may grow is of no use, and has no place in the context.
        let depth = self.sequence.left().saturating_sub(1);
        let places = guesses.tree.topology().within(depth);
        Some(Round { round, guesses: guesses.cut(depth), places, nodes, base_length: self.length() })
    }

    /// Writes down what the target made of a round.
    pub(super) fn verified(&mut self, of: Round, step: Step, now: Duration) -> Result<Verdict> {
        let Round { round, places, nodes, base_length, .. } = of;
        let Step { verdict, features } = step;
        self.digest.extend(&verdict.tokens);
        let verdict = Verdict {
            address: self.address,
            round,
            base_length,
            path: verdict.path.iter().filter_map(|&node| places.get(node)).map(|&node| node as u32).collect(),
            tokens: verdict.tokens,
            unverified: verdict.unverified.iter().map(|&place| place as u32).collect(),
            digest: self.digest.bits(),
            finish: self.sequence.finish(),
            features: self.encoding.map(|encoding| Features::encode(&features, encoding)).transpose()?,
        };
        self.round = self.round.max(round);
        self.moved = now;
        self.kept.push_back(Kept { verdict: verdict.clone(), nodes });
        Ok(verdict)
    }

    /// The edge has so many tokens: verdicts of those are not asked for again. The last one is, if it was lost twice.
    pub(super) fn has(&mut self, length: u64) {
        while self.kept.len() > 1 && self.kept.front().is_some_and(|kept| kept.verdict.end() <= length) {
            self.kept.pop_front();
        }
    }

    /// Verdicts behind the first `length` tokens, as they are said to the holder; `None` where they are not kept.
    pub(super) fn missed(&self, length: u64) -> Option<Vec<Verdict>> {
        let behind = self.kept.iter().filter(|kept| kept.verdict.base_length >= length);
        let missed: Vec<Verdict> =
            behind.map(|kept| Verdict { address: self.address, ..kept.verdict.clone() }).collect();
        let first = missed.first().map_or(self.length(), |verdict| verdict.base_length);
        (first == length).then_some(missed)
    }

    /// Whether the first `length` tokens have this digest.
    pub(super) fn agrees(&self, length: u64, digest: u64) -> bool {
        let tokens = usize::try_from(length).ok().and_then(|length| self.sequence.tokens().get(..length));
        tokens.is_some_and(|tokens| Digest::of(tokens).bits() == digest)
    }

    /// A refusal of a message with this address that builds on the first `base` tokens, with what comes behind them.
    pub(super) fn stale(&self, address: Address, of: u64, base: u64) -> CloudMessage {
        let committed_length = self.length();
        let (code, message, missed) = match self.missed(base) {
            Some(missed) => {
                let message = format!("it builds on {base} tokens of {committed_length}");
                (Code::StaleBase, message, missed)
            }
            None => {
                let message =
                    format!("it builds on {base} tokens of {committed_length}, and what came then is not kept");
                (Code::TooFarBehind, message, Vec::new())
            }
        };
        CloudMessage::Error(Refusal { address, code, message, of, committed_length, missed })
    }
}
