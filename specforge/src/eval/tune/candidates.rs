//! Trees that are tried on paper, and what each of them makes of every round.
//!
//! - Trees of the draft's own probabilities: with everything that was tried noted, a tree of fewer guesses is the best of
//!   them, and one of a smaller depth is what of them is not deeper (`dynamic_tree`). Both are exact.
//! - Static trees: the paths that are right most often. What a tree is worth is counted on answers that it was not chosen
//!   by: those of even place with the tree of the others, and the other way round.
//! - Prompt lookup is asked again: it needs nothing but the text.

use std::collections::HashSet;

use super::probe::{Answer, Noted, Prompt, accepted, best_of_levels};
use super::replay::{Outcome, Outcomes};
use crate::decode::drafter::path_rates::{PathRates, RANKS};
use crate::decode::drafter::{Context, Drafter, PromptLookup};
use crate::error::Result;

/// Guesses of a tree, besides chains: those up to the most that is asked for.
const SIZES: [usize; 16] = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256];

/// Sizes of trees up to `most` guesses, itself included.
pub fn sizes(most: usize) -> Vec<usize> {
    let mut sizes: Vec<usize> = SIZES.into_iter().filter(|&size| size < most).collect();
    sizes.push(most);
    sizes
}

/// A tree on trial.
#[derive(Debug, Clone)]
pub struct Candidate {
    /// As `--tree` takes it.
    pub tree: String,
    /// Children that are tried behind a guess; 1 is a chain.
    pub top_k: usize,
    /// Deepest guess.
    pub depth: usize,
    /// Most guesses.
    pub guesses: usize,
    /// Which table of drafting costs is its own.
    pub drafted_by: usize,
    /// By answer: what every round would be.
    pub outcomes: Vec<Outcomes>,
}

impl Candidate {
    /// Whether it is one guess behind the other.
    pub fn is_chain(&self) -> bool {
        self.top_k == 1
    }

    /// By depth from 1: the share of all places, as deep as there is room, where as many guesses or more come true.
    pub fn acceptance(&self) -> Vec<f64> {
        let all = || self.outcomes.iter().flatten();
        let share = |depth: usize| {
            let tried = all().filter(|outcome| usize::from(outcome.depth) >= depth).count();
            let right = all().filter(|outcome| usize::from(outcome.accepted) >= depth).count();
            right as f64 / tried.max(1) as f64
        };
        (1..=self.depth).map(share).collect()
    }
}

/// One place of an answer where everything that a draft tried was noted.
#[derive(Debug, Clone)]
struct Grown {
    /// Depth of every guess and whether it comes true, in the order in which a smaller tree keeps them.
    guesses: Vec<(u16, bool)>,
}

impl Grown {
    fn new(noted: &Noted, continuation: &[u32]) -> Self {
        let Noted { tree, scores, .. } = noted;
        let topology = tree.topology();
        let mut right = vec![false; tree.len()];
        let mut node = Some(0);
        for &token in continuation {
            node = node.and_then(|node| tree.child(node, token));
            let Some(node) = node else { break };
            right[node] = true;
        }
        let mut order: Vec<usize> = (1..tree.len()).collect();
        let depth = |node: usize| topology.depths()[node];
        order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]).then(depth(a).cmp(&depth(b))).then(a.cmp(&b)));
        Self { guesses: order.into_iter().map(|node| (depth(node) as u16, right[node])).collect() }
    }

    fn outcome(&self, depth: usize, guesses: usize) -> Outcome {
        let within = || self.guesses.iter().filter(|(at, _)| *at as usize <= depth);
        // A guess that comes true is kept with all before it: none of them is less likely.
        let accepted = within().take(guesses).filter(|(_, right)| *right).count();
        let nodes = 1 + within().take(guesses).count();
        let deepest = within().take(guesses).map(|(at, _)| *at).max().unwrap_or(0);
        let levels = self.levels(depth, guesses) as u16;
        Outcome { levels, depth: deepest, nodes: nodes as u16, accepted: accepted as u16 }
    }

    /// Levels that are drafted: a level is left out where none of its guesses could be kept.
    fn levels(&self, depth: usize, guesses: usize) -> usize {
        let mut levels = 0;
        while levels < depth {
            let level = levels + 1;
            if !self.guesses.iter().any(|(at, _)| *at as usize == level) {
                break;
            }
            levels = level;
            let tried = || self.guesses.iter().filter(|(at, _)| *at as usize <= level);
            let best = tried().position(|(at, _)| *at as usize == level).unwrap_or(usize::MAX);
            if tried().count() >= guesses && best + 1 >= guesses {
                break;
            }
        }
        levels
    }
}

/// Places of answers where a draft that goes by its own probabilities was noted.
#[derive(Debug, Default)]
pub struct GrownAnswers {
    answers: Vec<Vec<Grown>>,
}

impl GrownAnswers {
    /// For so many answers.
    pub fn new(count: usize) -> Self {
        Self { answers: vec![Vec::new(); count] }
    }

    /// Takes the notes of an answer.
    pub fn take(&mut self, place: usize, answer: &Answer, noted: &[Noted]) {
        self.answers[place] =
            noted.iter().zip(answer.continuations()).map(|(noted, rest)| Grown::new(noted, rest)).collect();
    }

    /// Trees of up to these sizes, where `top_k` children were tried behind each guess.
    pub fn candidates(&self, (top_k, drafted_by): (usize, usize), most_depth: usize, most: usize) -> Vec<Candidate> {
        let mut candidates = Vec::new();
        for depth in 1..=most_depth {
            let largest = (top_k + top_k * top_k * (depth - 1)).min(most);
            let sizes = if top_k == 1 { vec![depth] } else { sizes(largest) };
            for guesses in sizes.into_iter().filter(|&guesses| guesses >= depth && guesses <= most) {
                let tree = match top_k {
                    1 => format!("chain:{depth}"),
                    _ => format!("dynamic:depth={depth},top_k={top_k},nodes={guesses}"),
                };
                let of_answer =
                    |answer: &Vec<Grown>| answer.iter().map(|place| place.outcome(depth, guesses)).collect();
                let outcomes = self.answers.iter().map(of_answer).collect();
                candidates.push(Candidate { tree, top_k, depth, guesses, drafted_by, outcomes });
            }
        }
        candidates
    }
}

/// Places of answers where levels were guessed without regard of each other.
#[derive(Debug)]
pub struct RankedAnswers {
    levels: usize,
    /// By answer and place: ranks of the true continuation as far as there is room, and that room.
    answers: Vec<Vec<(Vec<usize>, usize)>>,
    /// All answers, those of even place, those of odd place.
    rates: [PathRates; 3],
}

impl RankedAnswers {
    /// For so many answers of a draft that guesses `levels` tokens behind each other.
    pub fn new(count: usize, levels: usize) -> Self {
        let rates = || PathRates::new(levels);
        Self { levels, answers: vec![Vec::new(); count], rates: [rates(), rates(), rates()] }
    }

    /// Paths of the tree that shows every level's best guesses.
    pub fn shown(levels: usize) -> Vec<Vec<usize>> {
        let path = |depth: usize, rank: usize| (0..depth).map(|_| 0).chain([rank]).collect();
        (0..levels).flat_map(|depth| (0..RANKS).map(move |rank| path(depth, rank))).collect()
    }

    /// Takes the notes of an answer.
    pub fn take(&mut self, place: usize, answer: &Answer, noted: &[Noted]) {
        let best: Vec<Vec<Vec<u32>>> = noted.iter().map(|noted| best_of_levels(&noted.tree)).collect();
        let ranks = |(best, rest): (&Vec<Vec<u32>>, &[u32])| -> Vec<usize> {
            let rank = |(guesses, token): (&Vec<u32>, &u32)| guesses.iter().position(|guess| guess == token);
            best.iter().zip(rest).map_while(rank).collect()
        };
        let room = noted.iter().map(|noted| noted.room.min(self.levels));
        self.answers[place] = best.iter().zip(answer.continuations()).map(ranks).zip(room).collect();
        let [all, even, odd] = &mut self.rates;
        let half = if place.is_multiple_of(2) { even } else { odd };
        [all, half].into_iter().for_each(|rates| rates.add(&answer.tokens, &best, answer.ended));
    }

    /// Chains, and trees of the paths that are right most often.
    pub fn candidates(&self, most_depth: usize, most: usize) -> Vec<Candidate> {
        let most_depth = most_depth.min(self.levels);
        let mut candidates = Vec::new();
        for depth in 1..=most_depth {
            let chain: Vec<Vec<usize>> = (1..=depth).map(|length| vec![0; length]).collect();
            candidates.push(self.candidate(format!("chain:{depth}"), 1, [&chain, &chain, &chain]));
            let trees = self.rates.each_ref().map(|rates| paths(rates, depth));
            let largest = trees[0].len().min(most);
            for guesses in sizes(largest).into_iter().filter(|&guesses| guesses > depth && guesses <= largest) {
                let trees = trees.each_ref().map(|paths| &paths[..guesses.min(paths.len())]);
                let is_deep = trees[0].iter().any(|path| path.len() == depth);
                let children = trees[0].iter().filter_map(|path| path.last()).max().map_or(1, |rank| rank + 1);
                // A smaller depth has the same tree.
                if is_deep && children > 1 {
                    candidates.push(self.candidate(written(trees[0]), children, trees));
                }
            }
        }
        candidates
    }

    /// `paths`: of all answers, and of those of even and odd place, on which the others are tried.
    fn candidate(&self, tree: String, top_k: usize, paths: [&[Vec<usize>]; 3]) -> Candidate {
        let sets = paths.map(|paths| paths.iter().map(Vec::as_slice).collect::<HashSet<_>>());
        let outcome = |place: usize, (ranks, room): &(Vec<usize>, usize)| {
            let other = &sets[1 + (place + 1) % 2];
            // With a single answer there is no other.
            let set = if self.answers.len() > 1 { other } else { &sets[0] };
            let accepted = (1..=ranks.len()).take_while(|&length| set.contains(&ranks[..length])).count();
            let kept = paths[0].iter().filter(|path| path.len() <= *room);
            let levels = kept.clone().map(Vec::len).max().unwrap_or(0) as u16;
            let (nodes, accepted) = (1 + kept.count() as u16, accepted.min(*room) as u16);
            Outcome { levels, depth: levels, nodes, accepted }
        };
        let outcomes = (self.answers.iter().enumerate())
            .map(|(place, answer)| answer.iter().map(|one| outcome(place, one)).collect())
            .collect();
        let depth = paths[0].iter().map(Vec::len).max().unwrap_or(0);
        Candidate { tree, top_k, depth, guesses: paths[0].len(), drafted_by: 0, outcomes }
    }
}

/// Paths of at most `depth` ranks, those that are right most often first.
fn paths(rates: &PathRates, depth: usize) -> Vec<Vec<usize>> {
    rates.choose(rates.paths()).into_iter().filter(|path| path.len() <= depth).collect()
}

/// As `--tree` takes it, by depth and rank.
pub fn written(paths: &[Vec<usize>]) -> String {
    let mut sorted: Vec<&Vec<usize>> = paths.iter().collect();
    sorted.sort_by(|a, b| a.len().cmp(&b.len()).then_with(|| a.cmp(b)));
    let path = |path: &Vec<usize>| format!("[{}]", path.iter().map(usize::to_string).collect::<Vec<_>>().join(","));
    format!("[{}]", sorted.into_iter().map(path).collect::<Vec<_>>().join(","))
}

/// The one tree that a draft has.
pub fn only(tree: &str, outcomes: Vec<Outcomes>) -> Candidate {
    let all = || outcomes.iter().flatten();
    let guesses = all().map(|outcome| usize::from(outcome.nodes)).max().unwrap_or(1) - 1;
    let depth = all().map(|outcome| usize::from(outcome.depth)).max().unwrap_or(0);
    let top_k = if guesses <= depth { 1 } else { guesses };
    Candidate { tree: tree.to_owned(), top_k, depth, guesses, drafted_by: 0, outcomes }
}

/// Outcomes of trees as they were noted.
pub fn as_noted(answer: &Answer, noted: &[Noted]) -> Outcomes {
    let outcome = |(noted, rest): (&Noted, &[u32])| {
        let tree = &noted.tree;
        let depth = tree.topology().depth() as u16;
        // What a draft of its own kind does for a tree is not known: it costs the same whatever it finds.
        Outcome { levels: 1, depth, nodes: tree.len() as u16, accepted: accepted(tree, rest) as u16 }
    };
    noted.iter().zip(answer.continuations()).map(outcome).collect()
}

/// Prompt lookup with several reaches, on answers whose rooms were noted.
pub fn lookups(
    prompts: &[Prompt],
    answers: &[Answer],
    rooms: &[Vec<usize>],
    most_depth: usize,
    most: usize,
) -> Result<Vec<Candidate>> {
    const MATCHES: [usize; 2] = [2, 3];
    let mut candidates = Vec::new();
    for longest_match in MATCHES {
        for depth in 1..=most_depth.min(most) {
            let mut sizes = vec![depth, 2 * depth, most];
            sizes.retain(|&size| size <= most);
            sizes.dedup();
            for nodes in sizes {
                let mut lookup = PromptLookup { longest_match, shortest_match: 1, depth, nodes };
                let texts = prompts.iter().zip(answers).zip(rooms);
                let outcomes = texts.map(|((prompt, answer), rooms)| looked_up(&mut lookup, prompt, answer, rooms));
                let outcomes = outcomes.collect::<Result<Vec<_>>>()?;
                let tree = format!("depth={depth},nodes={nodes},match={longest_match}");
                let top_k = if nodes == depth { 1 } else { nodes };
                candidates.push(Candidate { tree, top_k, depth, guesses: nodes, drafted_by: 0, outcomes });
            }
        }
    }
    Ok(candidates)
}

fn looked_up(lookup: &mut PromptLookup, prompt: &Prompt, answer: &Answer, rooms: &[usize]) -> Result<Outcomes> {
    let text: Vec<u32> = prompt.tokens.iter().chain(&answer.tokens).copied().collect();
    let mut noted = Vec::with_capacity(rooms.len());
    for (place, &room) in rooms.iter().enumerate() {
        let tokens = &text[..prompt.tokens.len() + place + 1];
        let context = Context { tokens, depth: room, key: prompt.key, temperature: 0.0 };
        for proposal in lookup.propose(&[context])? {
            noted.push(Noted { room, tree: proposal.tree, scores: proposal.scores });
        }
    }
    Ok(as_noted(answer, &noted))
}
