//! EAGLE-2's dynamic tree: the draft's own probabilities decide where guesses go, whatever model is behind them.
//!
//! Li et al. 2024, <https://arxiv.org/abs/2406.16858>; SafeAILab/EAGLE `cb7e084`, `eagle/model/cnets.py`. The best guesses
//! behind the root are the first frontier; each guess of a frontier is expanded, and the best of all their children are
//! the next one. In the end the best of everything tried are kept by their probability along the path. Different from
//! the reference: equals are ordered by depth and then by when they were tried, so that no child is kept without its
//! parent; a guess of probability zero is none; what cannot be kept any more is not run.
//!
//! Noise that the target's choice depends on ([`DraftSampling::Keyed`]) is known to the draft too. It ranks its guesses with the
//! same noise, and so guesses what the target will choose and not what is likely before the dice are thrown.
//!
//! Shape legend: `B` rows, `T` guesses of a level, `V` vocabulary, `DV` the draft's own.

use std::cell::OnceCell;
use std::rc::Rc;

use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use super::{Branch, Context, DraftSampling, last, to_host};
use crate::decode::policy::{DrawnFrom, Proposal};
use crate::device;
use crate::error::{Error, Result};
use crate::nn::noise::{self, Place};
use crate::tree::TokenTree;

/// Size and shape of a tree. A chain has `top_k` 1 and as many nodes as its depth.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DynamicTree {
    /// Levels of guesses behind the root.
    pub depth: usize,
    /// Children tried behind a guess, and guesses expanded in a level.
    pub top_k: usize,
    /// Guesses kept, the root not counted.
    pub nodes: usize,
    /// Adaptive size: a guess whose probability along its path is below this is neither expanded nor kept. 0 is off.
    pub min_probability: f64,
}

impl Default for DynamicTree {
    /// SafeAILab's.
    fn default() -> Self {
        Self { depth: 8, top_k: 10, nodes: 59, min_probability: 0.0 }
    }
}

impl DynamicTree {
    /// One guess behind the other.
    pub fn chain(depth: usize) -> Self {
        Self { depth, top_k: 1, nodes: depth, min_probability: 0.0 }
    }

    /// What is wrong with the options, if anything.
    pub fn check(&self) -> Result<()> {
        let refuse = |key: &str, want: &str, got: f64| {
            Err(Error::Usage(format!("draft tree: `{key}`: expected {want}, got {got}")))
        };
        for (key, value, most) in [("depth", self.depth, 64), ("top_k", self.top_k, 256), ("nodes", self.nodes, 4096)] {
            if !(1..=most).contains(&value) {
                return refuse(key, &format!("1 to {most}"), value as f64);
            }
        }
        if !(0.0..1.0).contains(&self.min_probability) {
            return refuse("min_probability", "0 or a probability below 1", self.min_probability);
        }
        Ok(())
    }
}

/// Noise domain of drawn guesses.
const DRAWING: u64 = 33;

/// The target's name of each token of the draft.
#[derive(Debug, Clone)]
pub struct Names {
    /// `V`
    target_size: i64,
    /// `[DV]`, where the draft names fewer tokens than the target.
    target_ids: Option<Vec<i64>>,
    /// The same on a device that asked for them.
    on_device: Rc<OnceCell<Tensor>>,
}

impl Names {
    /// Names in a vocabulary of `target_size` tokens: `target_ids [DV]`, or all of them.
    pub fn new(target_size: i64, target_ids: Option<Vec<i64>>) -> Self {
        Self { target_size, target_ids, on_device: Rc::default() }
    }

    fn of(&self, draft: i64) -> u32 {
        self.target_ids.as_ref().map_or(draft, |ids| ids[draft as usize]) as u32
    }

    fn draft_size(&self) -> i64 {
        self.target_ids.as_ref().map_or(self.target_size, |ids| ids.len() as i64)
    }

    /// Noise of every token of the draft at the places of some rows, `[B, DV]` float64, made on the device.
    fn noise(&self, domain: u64, places: &[Place], device: Device) -> Result<Tensor> {
        if device == Device::Cpu {
            let row = |&(seed, position): &Place| match &self.target_ids {
                Some(ids) => noise::gumbel_of_tokens(seed, domain, position, ids),
                None => noise::gumbel_row(seed, domain, position, self.target_size),
            };
            return Ok(Tensor::stack(&places.iter().map(row).collect::<Vec<_>>(), 0));
        }
        Ok(noise::gumbel_rows(domain, places, &self.tokens(device)?))
    }

    /// Probabilities over the target's vocabulary, `[n, V]`, from logits `[n, DV]` in float64.
    fn spread(&self, logits: &Tensor) -> Result<Tensor> {
        let probabilities = logits.softmax(-1, Kind::Double);
        if self.target_ids.is_none() {
            return Ok(probabilities);
        }
        let all = Tensor::f_zeros([logits.size()[0], self.target_size], (Kind::Double, logits.device()))?;
        Ok(all.f_index_copy(1, &self.tokens(logits.device())?, &probabilities)?)
    }

    /// The target's name of each token, `[DV]` on a device. They travel once: a draft stays on its device.
    fn tokens(&self, device: Device) -> Result<Tensor> {
        if let Some(tokens) = self.on_device.get().filter(|tokens| tokens.device() == device) {
            return Ok(tokens.shallow_clone());
        }
        let tokens = match &self.target_ids {
            Some(ids) => device::upload(ids, device)?,
            None => Tensor::f_arange(self.target_size, (Kind::Int64, device))?,
        };
        let _ = self.on_device.set(tokens.shallow_clone());
        Ok(tokens)
    }
}

/// A draft, as far as its tree needs it: logits, or logarithms of probabilities, over its own vocabulary.
pub trait Expand {
    /// Behind the root of every row: `[B, DV]`.
    fn start(&mut self) -> Result<Tensor>;

    /// Runs guesses, and gives what comes behind each: `[B, T, DV]`, where `T` is the number of guesses of the longest
    /// row. What stands behind a shorter row's own is not looked at.
    fn expand(&mut self, frontier: &[Vec<Branch>]) -> Result<Tensor>;
}

/// A guess that was tried.
#[derive(Debug, Clone)]
struct Candidate {
    token: u32,
    /// Candidate it stands behind; `None` behind the root.
    parent: Option<usize>,
    /// Place of that one among the guesses that were expanded together.
    place: usize,
    depth: usize,
    /// Logarithm of the probability along the path; never above the parent's.
    score: f64,
    /// Of the distribution it is from, where that is asked for.
    entropy: Option<f64>,
}

/// One row's tree while it grows.
struct Growth {
    root: u32,
    depth: usize,
    candidates: Vec<Candidate>,
    /// Candidates that are expanded next.
    frontier: Vec<usize>,
    /// What the children of a candidate, or of the root, were drawn from.
    drawn_from: Vec<(Option<usize>, DrawnFrom)>,
}

/// Grows a tree for every row.
pub fn grow(
    tree: &DynamicTree,
    sampling: DraftSampling,
    names: &Names,
    rows: &[Context<'_>],
    draft: &mut dyn Expand,
) -> Result<Vec<Proposal>> {
    let begin = |row: &Context<'_>| {
        let (root, depth) = (last(row.tokens), tree.depth.min(row.depth));
        Growth { root, depth, candidates: Vec::new(), frontier: Vec::new(), drawn_from: Vec::new() }
    };
    let mut growths: Vec<Growth> = rows.iter().map(begin).collect();
    let deepest = growths.iter().map(|growth| growth.depth).max().unwrap_or(0);
    for depth in 1..=deepest {
        let logits = if depth == 1 {
            draft.start()?.unsqueeze(1) // [B, 1, DV]
        } else {
            let frontier: Vec<Vec<Branch>> = growths.iter().map(Growth::branches).collect();
            if frontier.iter().all(Vec::is_empty) {
                break;
            }
            draft.expand(&frontier)? // [B, T, DV]
        };
        let (_, width, size) = logits.size3()?;
        if size != names.draft_size() {
            let problem = format!("the draft's rows have {size} logits, its vocabulary {} tokens", names.draft_size());
            return Err(Error::Failed(problem));
        }
        let level = Level::choose(&logits, depth, tree.top_k, sampling, names, rows)?;
        for (row, growth) in growths.iter_mut().enumerate().filter(|(_, growth)| growth.depth >= depth) {
            growth.take(&level, row * width as usize, depth, tree, names);
            growth.frontier = match sampling {
                _ if growth.depth == depth => Vec::new(),
                DraftSampling::Drawn { .. } => growth.next_to_draw(depth, tree),
                _ => growth.best(depth, tree),
            };
        }
    }
    Ok(growths.into_iter().map(|growth| growth.finish(tree.nodes)).collect())
}

/// The best children behind every guess of a level. `n` counts over all rows, padding included.
struct Level {
    /// Scores behind the parent, `[n][k]`, best first, or in drawing order.
    scores: Vec<f64>,
    /// Ids of the draft, `[n][k]`.
    ids: Vec<i64>,
    /// `k`
    count: usize,
    /// What was drawn from, `[n, V]` probabilities on the draft's device.
    drawn_from: Option<Tensor>,
    /// Nats, `[n]`, where they are asked for.
    entropies: Vec<f64>,
}

impl Level {
    fn choose(
        logits: &Tensor,
        depth: usize,
        top_k: usize,
        sampling: DraftSampling,
        names: &Names,
        rows: &[Context<'_>],
    ) -> Result<Self> {
        let kind = if logits.kind() == Kind::Double { Kind::Double } else { Kind::Float };
        let logits = logits.to_kind(kind);
        let noisy = |seed: u64, domain: u64| {
            // The guess at depth d behind n tokens stands at position n + d - 1.
            let place = |row: &Context<'_>| (seed.wrapping_add(row.key), (row.tokens.len() + depth - 1) as u64);
            let places: Vec<Place> = rows.iter().map(place).collect();
            Ok::<_, Error>(names.noise(domain, &places, logits.device())?.unsqueeze(1)) // [B, 1, DV]
        };
        let (ranked, scored) = match sampling {
            DraftSampling::Greedy | DraftSampling::Sure => (logits.shallow_clone(), logits),
            DraftSampling::Keyed { temperature, seed } => {
                let ranked = logits.to_kind(Kind::Double) / temperature + noisy(seed, noise::TEXT)?;
                (ranked.shallow_clone(), ranked)
            }
            DraftSampling::KeyedByRow { .. } if rows.iter().all(|row| row.temperature == 0.0) => {
                (logits.shallow_clone(), logits)
            }
            DraftSampling::KeyedByRow { seed } => {
                let column = |of: fn(f64) -> f64| {
                    let values: Vec<f64> = rows.iter().map(|row| of(row.temperature)).collect();
                    device::send(&Tensor::from_slice(&values).view([-1, 1, 1]), logits.device()) // [B, 1, 1]
                };
                // A greedy row is divided by 1 and has no noise.
                let divisor = column(|temperature| if temperature > 0.0 { temperature } else { 1.0 });
                let gain = column(|temperature| if temperature > 0.0 { 1.0 } else { 0.0 });
                let ranked = logits.to_kind(Kind::Double) / divisor + noisy(seed, noise::TEXT)? * gain;
                (ranked.shallow_clone(), ranked)
            }
            DraftSampling::Drawn { temperature, seed } => {
                let scaled = logits.to_kind(Kind::Double) / temperature;
                (&scaled + noisy(seed, DRAWING)?, scaled)
            }
        };
        let count = (top_k as i64).min(names.draft_size());
        let (_, ids) = ranked.topk(count, -1, true, true); // [B, T, k]
        let total = scored.logsumexp([-1i64].as_slice(), true); // [B, T, 1]
        let scores = scored.gather(-1, &ids, false) - &total;
        let drawn = matches!(sampling, DraftSampling::Drawn { .. });
        let drawn_from = drawn.then(|| names.spread(&scored.flatten(0, 1))).transpose()?;
        let entropies = match sampling {
            DraftSampling::Sure => {
                let logs = (&scored - &total).to_kind(Kind::Double);
                // A token of probability zero adds nothing: 0 times minus infinity is NaN.
                let each = (logs.exp() * &logs).nan_to_num(0.0, None::<f64>, None::<f64>);
                Vec::try_from(-each.sum_dim_intlist([-1i64].as_slice(), false, Kind::Double).flatten(0, 1))? // [n]
            }
            _ => Vec::new(),
        };
        let (scores, ids) = to_host(&scores, &ids)?;
        Ok(Self { scores, ids, count: count as usize, drawn_from, entropies })
    }

    /// Children behind guess `place`: token and score behind it. None has probability zero, and where a draft's logits are
    /// no numbers there are none.
    fn children(&self, place: usize, names: &Names) -> impl Iterator<Item = (u32, f64)> {
        let span = place * self.count..(place + 1) * self.count;
        let pairs = self.ids[span.clone()].iter().zip(&self.scores[span]);
        // Rounding must not make a child likelier than its parent, and zero has one sign.
        pairs.filter(|(_, score)| **score > f64::NEG_INFINITY).map(|(&id, &score)| (names.of(id), score.min(0.0) + 0.0))
    }
}

impl Growth {
    fn branches(&self) -> Vec<Branch> {
        let candidates = self.frontier.iter().map(|&index| &self.candidates[index]);
        candidates.map(|candidate| Branch { token: candidate.token, parent: candidate.place }).collect()
    }

    /// Adds the children of what was expanded, whose rows in the level begin at `first`.
    fn take(&mut self, level: &Level, first: usize, depth: usize, tree: &DynamicTree, names: &Names) {
        let expanded: Vec<Option<usize>> = match depth {
            1 => vec![None],
            _ => std::mem::take(&mut self.frontier).into_iter().map(Some).collect(),
        };
        let least = tree.min_probability.ln();
        for (place, parent) in expanded.into_iter().enumerate() {
            let above = parent.map_or(0.0, |parent| self.candidates[parent].score);
            let children = level.children(first + place, names);
            let entropy = level.entropies.get(first + place).copied();
            let child =
                |(token, score): (u32, f64)| Candidate { token, parent, place, depth, score: above + score, entropy };
            match &level.drawn_from {
                None => self.candidates.extend(children.map(child).filter(|child| child.score >= least)),
                Some(probabilities) => {
                    let room = tree.nodes - self.candidates.len();
                    let before = self.candidates.len();
                    self.candidates.extend(children.take(room).map(child));
                    if self.candidates.len() > before {
                        self.drawn_from.push((parent, Rc::new(probabilities.get((first + place) as i64))));
                    }
                }
            }
        }
    }

    /// Guesses of a depth, in the order in which they were tried.
    fn tried(&self, depth: usize) -> Vec<usize> {
        (0..self.candidates.len()).filter(|&index| self.candidates[index].depth == depth).collect()
    }

    /// The best guesses of a depth, without those whose children could not be kept any more.
    fn best(&self, depth: usize, tree: &DynamicTree) -> Vec<usize> {
        let mut best = self.tried(depth);
        best.sort_by(|&a, &b| self.candidates[b].score.total_cmp(&self.candidates[a].score));
        best.truncate(tree.top_k);
        // A child is no likelier than its parent, and comes behind its equals.
        let mut scores: Vec<f64> = self.candidates.iter().map(|candidate| candidate.score).collect();
        if scores.len() >= tree.nodes {
            let (_, &mut least, _) = scores.select_nth_unstable_by(tree.nodes - 1, |a, b| b.total_cmp(a));
            best.retain(|&index| self.candidates[index].score > least);
        }
        best
    }

    /// The guesses of a depth behind which others are drawn: as many, from the first on, as the nodes left allow. Nothing
    /// here depends on what will be drawn.
    fn next_to_draw(&self, depth: usize, tree: &DynamicTree) -> Vec<usize> {
        let mut next = self.tried(depth);
        next.retain(|&index| self.candidates[index].score >= tree.min_probability.ln());
        next.truncate((tree.nodes - self.candidates.len()).div_ceil(tree.top_k));
        next
    }

    /// The best `nodes` guesses as a tree, in the order in which they were tried.
    fn finish(self, nodes: usize) -> Proposal {
        let mut kept: Vec<usize> = (0..self.candidates.len()).collect();
        let rank = |&index: &usize| (&self.candidates[index], index);
        kept.sort_by(|a, b| {
            let ((a, at), (b, bt)) = (rank(a), rank(b));
            b.score.total_cmp(&a.score).then(a.depth.cmp(&b.depth)).then(at.cmp(&bt))
        });
        kept.truncate(nodes);
        kept.sort_unstable();
        let mut tree = TokenTree::root(self.root);
        let (mut scores, mut entropies) = (vec![0.0], vec![Some(0.0)]);
        // Node of each candidate.
        let mut node_of: Vec<Option<usize>> = vec![None; self.candidates.len()];
        for &index in &kept {
            let Candidate { token, parent, score, entropy, .. } = self.candidates[index];
            let parent = match parent {
                None => 0,
                Some(parent) => node_of[parent].expect("no guess is kept without its parent"),
            };
            node_of[index] = Some(tree.push(parent, token));
            scores.push(score);
            entropies.push(entropy);
        }
        assert_eq!(tree.len(), scores.len(), "siblings guess different tokens");
        let known: Option<Vec<f64>> = entropies.into_iter().collect();
        let mut proposal = Proposal::picked(tree, scores).with_entropies(known);
        for (parent, probabilities) in self.drawn_from {
            if let Some(node) = parent.map_or(Some(0), |parent| node_of[parent]) {
                proposal.drawn_from[node] = Some(probabilities);
            }
        }
        proposal
    }
}

#[cfg(test)]
mod tests;
