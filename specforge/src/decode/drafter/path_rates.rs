//! How often each path of ranks is right, and the static tree that follows from it.
//!
//! At every position of answers that the target decoded itself, the true continuation is a path: the rank of its first
//! token among the first head's guesses, of its second among the second head's, and so on until a head does not have it.
//! A path of a tree is right where it begins that one. Its hits are counted as a whole, so that heads that are right
//! together are seen to be (Medusa's own search multiplies the heads' separate rates as if they were independent). A
//! path is right at least as often as a longer one that begins with it, so the `N` paths with the most hits are a tree,
//! and no other tree of `N` guesses is right as often.
//!
//! What decoding with a tree gives on the same answers is not an average over positions: a round begins where the one
//! before it ended. [`PathRates::replay`] walks through the answers as decoding does.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashSet};
use std::rc::Rc;

use serde::Serialize;
use tch::Tensor;

use super::medusa::{Guesses, MedusaHeads, Place, last_state};
use super::{Context, DraftSampling, Drafter, Joining, Progress, last};
use crate::decode::engine::{Engine, EngineOptions};
use crate::decode::event::Silent;
use crate::decode::policy::Proposal;
use crate::decode::{Finish, Request};
use crate::error::{Error, Result};
use crate::models::TargetModel;

/// Guesses of a head that are looked at.
pub const RANKS: usize = 10;

/// Best guesses at one root: for each head, best first.
pub type Best = Vec<Vec<u32>>;

/// One answer: at each of its tokens as a root, for each head the rank of the token it should have guessed, as far as
/// the answer goes.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Ranked {
    ranks: Vec<Vec<Option<usize>>>,
    ended: bool,
}

/// Hits of paths, and the answers they were counted in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PathRates {
    heads: usize,
    hits: BTreeMap<Vec<usize>, u64>,
    positions: u64,
    answers: Vec<Ranked>,
}

/// What one head is worth by itself.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct HeadRates {
    /// Share of positions where its best guess is right.
    pub best: f64,
    /// Share of positions where one of its [`RANKS`] best is.
    pub within: f64,
}

/// Decoding with a tree, walked through without a model.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Replay {
    /// Verifications.
    pub rounds: u64,
    /// Tokens they commit.
    pub tokens: u64,
}

impl Replay {
    /// Tokens a round.
    pub fn tokens_per_round(self) -> f64 {
        if self.rounds == 0 { 0.0 } else { self.tokens as f64 / self.rounds as f64 }
    }
}

impl PathRates {
    /// Nothing counted yet.
    pub fn new(heads: usize) -> Self {
        Self { heads, hits: BTreeMap::new(), positions: 0, answers: Vec::new() }
    }

    /// Counts an answer: its tokens, the heads' best guesses with each token but the last as a root, and whether it ended
    /// by itself. Guesses behind the end of an answer that did so are wrong; where an answer was cut off, positions whose
    /// continuation is not known as far as the heads guess are not counted.
    pub fn add(&mut self, answer: &[u32], best: &[Best], ended: bool) {
        let rank = |root: usize, head: usize, guesses: &Vec<u32>| {
            let truth = *answer.get(root + 1 + head)?;
            Some(guesses.iter().take(RANKS).position(|&guess| guess == truth))
        };
        let ranks_at = |(root, best): (usize, &Best)| -> Vec<Option<usize>> {
            best.iter().take(self.heads).enumerate().map_while(|(head, guesses)| rank(root, head, guesses)).collect()
        };
        let roots = answer.len().saturating_sub(1);
        let ranks: Vec<Vec<Option<usize>>> = best.iter().take(roots).enumerate().map(ranks_at).collect();
        self.count(Ranked { ranks, ended });
    }

    fn count(&mut self, answer: Ranked) {
        for ranks in answer.ranks.iter().filter(|ranks| answer.ended || ranks.len() == self.heads) {
            self.positions += 1;
            let path: Vec<usize> = ranks.iter().map_while(|rank| *rank).collect();
            for length in 1..=path.len() {
                *self.hits.entry(path[..length].to_vec()).or_insert(0) += 1;
            }
        }
        self.answers.push(answer);
    }

    /// Positions that were counted.
    pub fn positions(&self) -> u64 {
        self.positions
    }

    /// Answers that were added.
    pub fn answers(&self) -> usize {
        self.answers.len()
    }

    /// Paths that were right at least once.
    pub fn paths(&self) -> usize {
        self.hits.len()
    }

    /// What each head is worth by itself.
    pub fn head_rates(&self) -> Vec<HeadRates> {
        let counted = || {
            let full = |answer: &Ranked, ranks: &[Option<usize>]| answer.ended || ranks.len() == self.heads;
            self.answers.iter().flat_map(move |answer| answer.ranks.iter().filter(move |ranks| full(answer, ranks)))
        };
        let share = |head: usize, below: usize| {
            let hits = counted().filter(|ranks| matches!(ranks.get(head), Some(Some(rank)) if *rank < below)).count();
            hits as f64 / (self.positions as f64).max(1.0)
        };
        (0..self.heads).map(|head| HeadRates { best: share(head, 1), within: share(head, RANKS) }).collect()
    }

    /// The paths of the best tree of `nodes` guesses; fewer where fewer paths were ever right. Of paths with equally many
    /// hits the shorter one goes first, then the one with the better ranks.
    pub fn choose(&self, nodes: usize) -> Vec<Vec<usize>> {
        let mut paths: Vec<(&Vec<usize>, u64)> = self.hits.iter().map(|(path, hits)| (path, *hits)).collect();
        paths.sort_by(|(a, hits), (b, others)| others.cmp(hits).then(a.len().cmp(&b.len())).then_with(|| a.cmp(b)));
        paths.into_iter().take(nodes).map(|(path, _)| path.clone()).collect()
    }

    /// Tokens of a round that begins at any of the positions alike, the target's own one included.
    pub fn expected_tokens(&self, choices: &[Vec<usize>]) -> f64 {
        let hits: u64 = choices.iter().filter_map(|path| self.hits.get(path)).sum();
        1.0 + hits as f64 / (self.positions as f64).max(1.0)
    }

    /// Decodes the answers once more with a tree, on paper.
    pub fn replay(&self, choices: &[Vec<usize>]) -> Replay {
        let choices: HashSet<&[usize]> = choices.iter().map(Vec::as_slice).collect();
        let mut replay = Replay::default();
        for answer in &self.answers {
            let mut root = 0;
            while let Some(ranks) = answer.ranks.get(root) {
                let path: Vec<usize> = ranks.iter().map_while(|rank| *rank).collect();
                let accepted = (1..=path.len()).take_while(|&length| choices.contains(&path[..length])).count();
                // The target's own token comes behind them, unless the answer is at its end.
                let tokens = (accepted + 1).min(answer.ranks.len() - root);
                replay.rounds += 1;
                replay.tokens += tokens as u64;
                root += tokens;
            }
        }
        replay
    }
}

impl PathRates {
    /// The same with trees that were not chosen by the answers they are tried on: those of even place are decoded with
    /// the tree of the others, and the other way round.
    pub fn replay_held_out(&self, nodes: usize) -> Replay {
        let mut halves = [Self::new(self.heads), Self::new(self.heads)];
        self.answers.iter().enumerate().for_each(|(index, answer)| halves[index % 2].count(answer.clone()));
        let [even, odd] = &halves;
        let (first, second) = (even.replay(&odd.choose(nodes)), odd.replay(&even.choose(nodes)));
        Replay { rounds: first.rounds + second.rounds, tokens: first.tokens + second.tokens }
    }
}

/// Guesses nothing, and notes what heads would have guessed at every root of every request, by its key.
struct Recorder<'a> {
    heads: &'a MedusaHeads,
    sampling: DraftSampling,
    states: Vec<Tensor>,
    notes: Rc<RefCell<BTreeMap<u64, Vec<Best>>>>,
}

impl Drafter for Recorder<'_> {
    fn capture(&self) -> Vec<usize> {
        vec![self.heads.layer()]
    }

    fn join(&mut self, rows: &[Joining<'_>]) -> Result<()> {
        let states = rows.iter().map(|row| last_state(&row.features)).collect::<Result<Vec<_>>>()?;
        self.states.extend(states);
        Ok(())
    }

    fn propose(&mut self, rows: &[Context<'_>]) -> Result<Vec<Proposal>> {
        let states = Tensor::f_stack(&self.states, 0)?; // [B, H]
        let places: Vec<Place> = rows.iter().map(Place::behind).collect();
        let guesses = self.heads.guess(&states, self.heads.len(), RANKS, self.sampling, &places)?;
        let mut notes = self.notes.borrow_mut();
        for (row, guesses) in rows.iter().zip(guesses) {
            let best = guesses.into_iter().map(|Guesses { tokens, .. }| tokens).collect();
            notes.entry(row.key).or_default().push(best);
        }
        Ok(rows.iter().map(|row| Proposal::nothing(last(row.tokens))).collect())
    }

    fn commit(&mut self, rows: &[Progress<'_>]) -> Result<()> {
        self.states = rows.iter().map(|row| last_state(&row.features)).collect::<Result<Vec<_>>>()?;
        Ok(())
    }

    fn retain(&mut self, rows: &[usize]) {
        self.states = rows.iter().map(|&row| self.states[row].shallow_clone()).collect();
    }
}

/// Rates, and the prompts that could not be answered, by their place.
#[derive(Debug)]
pub struct Measured {
    /// What was counted.
    pub rates: PathRates,
    /// Prompts without answer, and why.
    pub failed: Vec<(usize, Error)>,
}

/// Lets the target answer prompts plainly and counts what heads would have guessed on the way. `progress` hears of
/// answers done.
pub fn measure(
    target: &dyn TargetModel,
    heads: &MedusaHeads,
    prompts: &[Vec<u32>],
    max_new_tokens: usize,
    options: EngineOptions,
    progress: &mut dyn FnMut(usize),
) -> Result<Measured> {
    let sampling = match DraftSampling::for_policy(options.policy, options.processors.temperature) {
        // Draws have no ranks.
        DraftSampling::Drawn { .. } => DraftSampling::Greedy,
        sampling => sampling,
    };
    let notes = Rc::new(RefCell::new(BTreeMap::new()));
    let recorder = Recorder { heads, sampling, states: Vec::new(), notes: Rc::clone(&notes) };
    let mut engine = Engine::new(target, Box::new(recorder), options)?;
    let mut measured = Measured { rates: PathRates::new(heads.len()), failed: Vec::new() };
    for (index, prompt) in prompts.iter().enumerate() {
        let (tag, key) = (index as u64, index as u64);
        if let Err(error) = engine.submit(Request { tag, prompt: prompt.clone(), max_new_tokens, key }) {
            measured.failed.push((index, error));
        }
    }
    // In the order of the prompts, whichever ends first.
    let mut answers = BTreeMap::new();
    while engine.pending() > 0 {
        for left in engine.step(&mut Silent)? {
            let best = notes.borrow_mut().remove(&left.tag).unwrap_or_default();
            match left.decoded {
                Ok(decoded) => drop(answers.insert(left.tag, (decoded, best))),
                Err(error) => measured.failed.push((left.tag as usize, error)),
            }
            progress(answers.len() + measured.failed.len());
        }
    }
    for (decoded, best) in answers.into_values() {
        measured.rates.add(&decoded.tokens, &best, decoded.finish == Finish::Stop);
    }
    measured.failed.sort_by_key(|(index, _)| *index);
    Ok(measured)
}

#[cfg(test)]
mod tests;
