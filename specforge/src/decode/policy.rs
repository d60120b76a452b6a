//! How the target decides which guesses stay: pure walks over a tree, given the target's processed rows.
//!
//! - [`Policy::Keyed`] lets the target choose its own next token from each row, greedily or with noise keyed by the
//!   absolute position, and follows the child that carries it. Output is the same for every draft and tree.
//! - [`Policy::Maximal`] is classic rejection (Leviathan et al. 2023, <https://arxiv.org/abs/2211.17192>; several
//!   children: SpecInfer, <https://arxiv.org/abs/2305.09781>; children that are no samples: SafeAILab/EAGLE `cb7e084`,
//!   `eagle/model/utils.py`). Output has the target's distribution, and depends on the draft.
//! - [`Policy::Typical`] is Medusa's (<https://arxiv.org/abs/2401.10774>, FasterDecoding/Medusa `e2a5d20`): it keeps
//!   what is plausible enough, and is lossy.
//! - [`Policy::Rank`] and [`Policy::Entropy`] are the gates of systems with the draft on another machine: a guess stays that
//!   is among the target's likeliest, or that the draft was sure of. Both are lossy, and say which tokens the target would
//!   not have chosen.

use std::rc::Rc;

use serde::{Deserialize, Serialize};
use specforge_hot::rows;
use tch::Tensor;

use super::event::Source;
use crate::error::{Error, Result};
use crate::nn::noise;
use crate::nn::processors::{argmax, softmax};
use crate::tree::TokenTree;

pub mod many_rows;

#[cfg(test)]
use super::fault;

/// How guesses are accepted.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(tag = "name", rename_all = "snake_case", deny_unknown_fields)]
pub enum Policy {
    /// The target's own choice; lossless token for token.
    Keyed {
        /// Key of the noise.
        seed: u64,
    },
    /// Classic rejection; lossless in distribution.
    Maximal {
        /// Key of the chances taken.
        seed: u64,
    },
    /// Keeps tokens whose probability is above `min(epsilon, alpha * exp(-entropy))`; lossy.
    Typical {
        /// Hard threshold.
        epsilon: f64,
        /// Factor of the threshold that depends on the entropy.
        alpha: f64,
    },
    /// Keeps guesses among the target's likeliest tokens where it chooses none of them itself; lossy.
    Rank {
        /// How many of the likeliest.
        k: usize,
        /// Key of the noise.
        seed: u64,
    },
    /// Keeps guesses that the draft was sure of, whatever the target chooses; lossy.
    Entropy {
        /// Most entropy of the draft's distribution, in nats.
        most: f64,
        /// Key of the noise.
        seed: u64,
    },
}

impl Policy {
    /// Whether the output is the target's own.
    pub fn is_lossless(self) -> bool {
        matches!(self, Policy::Keyed { .. } | Policy::Maximal { .. })
    }
}

impl std::fmt::Display for Policy {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Policy::Keyed { .. } => write!(formatter, "keyed"),
            Policy::Maximal { .. } => write!(formatter, "maximal"),
            Policy::Typical { epsilon, alpha } => write!(formatter, "typical:{epsilon},{alpha}"),
            Policy::Rank { k, .. } => write!(formatter, "rank:{k}"),
            Policy::Entropy { most, .. } => write!(formatter, "entropy:{most}"),
        }
    }
}

/// A distribution that the children of a node were drawn from, one after the other without putting back: `[V]` float64, on
/// the device of the draft that drew.
pub type DrawnFrom = Rc<Tensor>;

/// What a draft proposes for one row.
#[derive(Debug, Clone)]
pub struct Proposal {
    /// The guesses behind the last committed token.
    pub tree: TokenTree,
    /// The draft's score of each node, the higher the surer; for reports and traces.
    pub scores: Vec<f64>,
    /// For each node, what its children were drawn from; `None` where they were not drawn but picked.
    pub drawn_from: Vec<Option<DrawnFrom>>,
    /// How sure the draft is that the target accepts each guess if it accepts those before it: raw logits, one for every
    /// node but the root, in order. It may look at the guesses before its own, not at its own: see `verify_budget`.
    pub confidence: Option<Vec<f32>>,
    /// For each node, the entropy in nats of the distribution that its guess is from; asked for by [`Policy::Entropy`].
    pub entropies: Option<Vec<f64>>,
}

impl Proposal {
    /// Picked guesses.
    pub fn picked(tree: TokenTree, scores: Vec<f64>) -> Self {
        let drawn_from = vec![None; tree.len()];
        Self { tree, scores, drawn_from, confidence: None, entropies: None }
    }

    /// The same with the entropy that each guess is from.
    pub fn with_entropies(self, entropies: Option<Vec<f64>>) -> Self {
        Self { entropies, ..self }
    }

    /// The nodes whose guesses the draft was sure of; none where it does not say.
    pub fn sure(&self, most: f64) -> impl Iterator<Item = usize> {
        let entropies = self.entropies.as_deref().unwrap_or_default().iter();
        entropies.enumerate().skip(1).filter(move |(_, entropy)| **entropy <= most).map(|(node, _)| node)
    }

    /// The same with a raw confidence for every guess.
    pub fn with_confidence(self, confidence: Vec<f32>) -> Self {
        Self { confidence: Some(confidence), ..self }
    }

    /// Nothing guessed.
    pub fn nothing(token: u32) -> Self {
        Self::picked(TokenTree::root(token), vec![0.0])
    }

    /// Without what is deeper than `depth`.
    pub fn cut(self, depth: usize) -> Self {
        if self.tree.topology().depth() <= depth {
            return self;
        }
        let kept = self.tree.topology().within(depth);
        self.only(&kept)
    }

    /// These nodes alone: ascending, the root the first of them, and with every node its parent.
    pub fn only(self, kept: &[usize]) -> Self {
        let tree = self.tree.only(kept);
        let scores = kept.iter().map(|&node| self.scores[node]).collect();
        let mut drawn_from = self.drawn_from;
        let drawn_from = kept.iter().map(|&node| drawn_from[node].take()).collect();
        let own =
            |confidence: Vec<f32>| kept[1..].iter().filter_map(|&node| confidence.get(node - 1).copied()).collect();
        let entropies = self.entropies.map(|entropies| kept.iter().map(|&node| entropies[node]).collect());
        Self { tree, scores, drawn_from, confidence: self.confidence.map(own), entropies }
    }
}

/// What the target made of a proposal: token `i` was chosen from the row of node `path[i]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    /// Nodes from the root down, one for each token.
    pub path: Vec<usize>,
    /// What is committed.
    pub tokens: Vec<u32>,
    /// Where each comes from.
    pub sources: Vec<Source>,
    /// Places of tokens that a lossy gate kept though the target chose others.
    pub unverified: Vec<usize>,
}

/// The target's rows over a tree.
pub trait Rows {
    /// The processed row behind the last node of a path from the root, `[V]`.
    fn row(&mut self, path: &[usize]) -> Result<Vec<f64>>;
    /// The first of the most likely tokens of that row.
    fn greedy(&mut self, path: &[usize]) -> Result<u32>;
}

/// Where a walk ends beside a guess that fails.
#[derive(Debug, Clone, Copy)]
pub struct Limits<'a> {
    /// Most tokens to commit; at least 1.
    pub tokens: usize,
    /// Tokens that end a sequence, also inside an accepted run.
    pub stop: &'a [u32],
}

/// Decides a proposal behind `committed` tokens; `key` is the request's own part of every seed.
pub fn verify(
    policy: Policy,
    greedy: bool,
    proposal: &Proposal,
    (committed, key): (usize, u64),
    limits: Limits<'_>,
    rows: &mut dyn Rows,
) -> Result<Verdict> {
    let tree = &proposal.tree;
    match policy {
        Policy::Typical { epsilon, alpha } => {
            let mut verdict = typical(tree, (epsilon, alpha), rows)?;
            verdict.end_at(limits);
            Ok(verdict)
        }
        Policy::Rank { k, seed } => {
            let mut rule = |row: &[f64], child: usize| is_likely(row, tree.tokens()[child], k);
            gated(tree, limits, (greedy, seed.wrapping_add(key), committed), rows, &mut rule)
        }
        Policy::Entropy { most, seed } => {
            if proposal.entropies.is_none() && tree.len() > 1 {
                return Err(Error::Usage(
                    "--policy entropy: this draft does not say how sure it is; drafts with a tree of `depth`, `top-k` and \
                     `nodes` do (EAGLE-3, P-EAGLE, block drafters, a model of its own)"
                        .to_owned(),
                ));
            }
            let sure: Vec<usize> = proposal.sure(most).collect();
            let mut rule = |_: &[f64], child: usize| sure.contains(&child);
            gated(tree, limits, (greedy, seed.wrapping_add(key), committed), rows, &mut rule)
        }
        _ if greedy => walk(tree, limits, &mut |path| rows.greedy(path)),
        Policy::Keyed { seed } => walk(tree, limits, &mut |path| {
            let position = committed + path.len() - 1;
            #[cfg(test)]
            let position = fault::noise_position(position, committed, path);
            Ok(keyed_choice(seed.wrapping_add(key), position, &rows.row(path)?))
        }),
        Policy::Maximal { seed } => walk(tree, limits, &mut |path| {
            let position = (committed + path.len() - 1) as u64;
            let mut chance = KeyedChance { seed: seed.wrapping_add(key), position, taken: 0 };
            let node = path[path.len() - 1];
            let guesses: Vec<u32> = tree.topology().children(node).map(|child| tree.tokens()[child]).collect();
            let drawn_from = proposal.drawn_from[node].as_ref().map(|row| Vec::<f64>::try_from(&**row)).transpose()?;
            couple(softmax(&rows.row(path)?), &guesses, drawn_from.as_deref(), &mut chance)
        }),
    }
}

/// What the target chooses for a position from a processed row, `[V]`, under [`Policy::Keyed`].
pub fn keyed_choice(seed: u64, position: usize, row: &[f64]) -> u32 {
    noise::gumbel_argmax(seed, noise::TEXT, position as u64, row, 1.0) as u32
}

/// Lets `choose` choose behind each node and follows the child that guessed it.
pub fn walk(tree: &TokenTree, limits: Limits<'_>, choose: &mut dyn FnMut(&[usize]) -> Result<u32>) -> Result<Verdict> {
    let mut verdict = Verdict { path: vec![0], tokens: Vec::new(), sources: Vec::new(), unverified: Vec::new() };
    loop {
        let node = verdict.path[verdict.path.len() - 1];
        let chosen_from = verdict.path.as_slice();
        #[cfg(test)]
        let chosen_from = fault::chosen_from(tree, chosen_from);
        let token = choose(chosen_from)?;
        let child = tree.child(node, token);
        #[cfg(test)]
        let child = fault::child(tree, node, token, child);
        let guessed = tree.topology().children(node).next().is_some();
        verdict.tokens.push(token);
        verdict.sources.push(match (child, guessed) {
            (Some(_), _) => Source::Accepted,
            (None, true) => Source::Correction,
            (None, false) => Source::Bonus,
        });
        let ended = verdict.tokens.len() >= limits.tokens || limits.stop.contains(&token);
        match child {
            Some(child) if !ended => verdict.path.push(child),
            _ => return Ok(verdict),
        }
    }
}

impl Verdict {
    /// Drops what is behind a limit.
    fn end_at(&mut self, limits: Limits<'_>) {
        let stop = self.tokens.iter().position(|token| limits.stop.contains(token)).map_or(usize::MAX, |at| at + 1);
        let keep = self.tokens.len().min(limits.tokens).min(stop);
        self.path.truncate(keep);
        self.tokens.truncate(keep);
        self.sources.truncate(keep);
        self.unverified.retain(|&place| place < keep);
    }
}

/// Whether a token is among the `k` likeliest of a row.
fn is_likely(row: &[f64], token: u32, k: usize) -> bool {
    let own = row.get(token as usize).copied().unwrap_or(f64::NEG_INFINITY);
    own > f64::NEG_INFINITY && row.iter().filter(|&&other| other > own).count() < k
}

/// The target's own choice behind each node where somebody guessed it, else the first guess that `keeps` lets pass.
fn gated(
    tree: &TokenTree,
    limits: Limits<'_>,
    (greedy, seed, committed): (bool, u64, usize),
    rows: &mut dyn Rows,
    keeps: &mut dyn FnMut(&[f64], usize) -> bool,
) -> Result<Verdict> {
    let mut verdict = Verdict { path: vec![0], tokens: Vec::new(), sources: Vec::new(), unverified: Vec::new() };
    loop {
        let node = verdict.path[verdict.path.len() - 1];
        let row = rows.row(&verdict.path)?;
        let position = committed + verdict.path.len() - 1;
        let own = if greedy { argmax(&row) as u32 } else { keyed_choice(seed, position, &row) };
        let children: Vec<usize> = tree.topology().children(node).collect();
        let chosen = tree.child(node, own);
        let kept = if chosen.is_none() { children.iter().copied().find(|&child| keeps(&row, child)) } else { None };
        if kept.is_some() {
            verdict.unverified.push(verdict.tokens.len());
        }
        let token = kept.map_or(own, |child| tree.tokens()[child]);
        let child = chosen.or(kept);
        verdict.tokens.push(token);
        verdict.sources.push(match (child, !children.is_empty()) {
            (Some(_), _) => Source::Accepted,
            (None, true) => Source::Correction,
            (None, false) => Source::Bonus,
        });
        let ended = verdict.tokens.len() >= limits.tokens || limits.stop.contains(&token);
        match child {
            Some(child) if !ended => verdict.path.push(child),
            _ => return Ok(verdict),
        }
    }
}

/// Where a coupling's chances come from.
pub trait Chance {
    /// True with this probability.
    fn happens(&mut self, probability: f64) -> bool;
    /// An index, with these probabilities.
    fn draw(&mut self, probabilities: &[f64]) -> usize;
}

/// Noise domain of the chances of [`Policy::Maximal`].
const COUPLING: u64 = 32;

struct KeyedChance {
    seed: u64,
    position: u64,
    taken: u64,
}

impl KeyedChance {
    fn uniform(&mut self) -> f64 {
        self.taken += 1;
        noise::uniform_of(noise::keyed_bits(self.seed, COUPLING, self.position, self.taken))
    }
}

impl Chance for KeyedChance {
    fn happens(&mut self, probability: f64) -> bool {
        self.uniform() < probability
    }

    fn draw(&mut self, probabilities: &[f64]) -> usize {
        rows::pass_at(probabilities, self.uniform())
    }
}

/// Chooses a token with probabilities `target`, and one of `guesses` as often as their order and origin allow: each is
/// tried with what is left of both distributions after those before it failed.
///
/// `drawn_from` is what the guesses were drawn from, one after the other without putting back; guesses that were picked
/// count as certain.
pub fn couple(
    mut target: Vec<f64>,
    guesses: &[u32],
    drawn_from: Option<&[f64]>,
    chance: &mut dyn Chance,
) -> Result<u32> {
    let mut draft = drawn_from.map(<[f64]>::to_vec);
    if draft.as_ref().is_some_and(|draft| draft.len() != target.len()) {
        return Err(Error::Failed("a draft's distribution has another length than the target's row".to_owned()));
    }
    for &guess in guesses {
        let guess = guess as usize;
        let Some(&wanted) = target.get(guess) else { continue };
        match &mut draft {
            None => {
                if chance.happens(wanted) {
                    return Ok(guess as u32);
                }
                target[guess] = 0.0;
            }
            Some(draft) => {
                let offered = draft[guess];
                if offered > 0.0 && chance.happens((wanted / offered).min(1.0)) {
                    return Ok(guess as u32);
                }
                // Nothing is left only where both agree up to rounding, and then a guess does not fail but by rounding.
                rows::subtract(&mut target, draft);
                draft[guess] = 0.0;
                rows::normalise(draft);
            }
        }
        rows::normalise(&mut target);
    }
    Ok(chance.draw(&target) as u32)
}

/// The longest path whose tokens are all plausible, the likeliest of equally long ones, and the most likely token
/// behind it.
fn typical(tree: &TokenTree, (epsilon, alpha): (f64, f64), rows: &mut dyn Rows) -> Result<Verdict> {
    let topology = tree.topology();
    // Of each node that is reached: its log-probability along the path.
    let mut reached: Vec<Option<f64>> = vec![None; tree.len()];
    reached[0] = Some(0.0);
    let mut best = 0;
    for node in 0..tree.len() {
        let Some(so_far) = reached[node] else { continue };
        let deeper = topology.depths()[node].cmp(&topology.depths()[best]);
        if deeper.then(so_far.total_cmp(&reached[best].unwrap_or(f64::NEG_INFINITY))).is_gt() {
            best = node;
        }
        if topology.children(node).next().is_none() {
            continue;
        }
        let probabilities = softmax(&rows.row(&topology.path(node))?);
        // The reference adds 1e-5 before the logarithm.
        let entropy: f64 = -probabilities.iter().map(|p| p * (p + 1e-5).ln()).sum::<f64>();
        let threshold = epsilon.min(alpha * (-entropy).exp());
        for child in topology.children(node) {
            let probability = probabilities.get(tree.tokens()[child] as usize).copied().unwrap_or(0.0);
            if probability > threshold {
                reached[child] = Some(so_far + probability.ln());
            }
        }
    }
    let path = topology.path(best);
    let mut tokens: Vec<u32> = path[1..].iter().map(|&node| tree.tokens()[node]).collect();
    let mut sources = vec![Source::Accepted; tokens.len()];
    tokens.push(argmax(&rows.row(&path)?) as u32);
    let guessed = topology.children(best).next().is_some();
    sources.push(if guessed { Source::Correction } else { Source::Bonus });
    Ok(Verdict { path, tokens, sources, unverified: Vec::new() })
}

#[cfg(test)]
mod tests;
