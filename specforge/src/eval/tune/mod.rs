//! The tree, the depth and the number of requests together that decode fastest, for one target, one draft and one machine.
//!
//! 1. The target answers prompts by itself while the draft guesses behind every token (`probe`).
//! 2. Rounds are timed in the engine, by size of the tree, by depth of the draft, by requests that run together (`costs`).
//! 3. Every tree is tried on paper: the rounds it would have made of the same answers, and what they cost (`candidates`,
//!    `replay`).
//! 4. The fastest one decodes in earnest, in turns with plain decoding, and shows what the prediction is worth (`decoded`);
//!    and once more with a lookup beside the draft.
//!
//! Answers are the target's own choices ([`Policy::Keyed`](crate::decode::Policy)), so that they are the same for every tree.

use serde::Serialize;

use crate::data::{ChatTokenizer, Message};
use crate::decode::EngineOptions;
use crate::decode::drafter::{Opened, Trees};
use crate::error::{Error, Result};
use crate::models::TargetModel;

use super::acceptance::{self, Question};

mod candidates;
mod costs;
mod decoded;
mod measuring;
mod probe;
mod replay;
pub mod report;

pub use candidates::Candidate;
pub use costs::{Costs, Table};
pub use decoded::Tested;
pub use probe::Prompt;
pub use replay::{Outcome, Outcomes, Replayed};

use costs::Timing;
use measuring::{Draft, Guessed, Measuring};

/// Tokens that a pass on a CPU takes at nearly the price of one: what fills a vector, or two halves of one.
const VECTOR: usize = 8;

/// What is tried.
#[derive(Debug, Clone)]
pub struct TuneOptions {
    /// How the engine decodes, whatever runs together.
    pub engine: EngineOptions,
    /// Longest answer.
    pub max_new_tokens: usize,
    /// Requests that run together, ascending.
    pub batches: Vec<usize>,
    /// Deepest guess.
    pub max_depth: usize,
    /// Most guesses of a tree.
    pub max_nodes: usize,
    /// Children tried behind a guess, beside chains, for trees of the draft's own probabilities.
    pub top_k: Vec<usize>,
    /// Timed rounds of each size.
    pub repeat: usize,
}

/// Opens the draft with a tree; with its default where none is given.
pub type Open<'o, 'a> = &'o dyn Fn(Option<&str>) -> Result<Opened<'a>>;

/// Hears what is being done, how much of it is done, and of how much.
pub type Progress<'p> = &'p mut dyn FnMut(&'static str, u64, u64);

/// A tree, and what it is expected to give.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Choice {
    /// As `--tree` takes it.
    pub tree: String,
    /// Children tried behind a guess; 1 is a chain.
    pub top_k: usize,
    /// Deepest guess.
    pub depth: usize,
    /// Most guesses.
    pub guesses: usize,
    /// Tokens for each verification.
    pub tokens_per_round: f64,
    /// Tokens a second.
    pub tokens_per_second: f64,
    /// Times those of plain decoding.
    pub speedup: f64,
}

/// A tree with a lookup beside the draft, and what decoding with it gave.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct WithLookup {
    /// As `--tree` takes it.
    pub tree: String,
    /// What decoding gave.
    pub tested: Tested,
}

impl Batch {
    /// The tree that decoded fastest, and how it did.
    pub fn fastest(&self) -> (&str, &Tested) {
        let own = (self.best.tree.as_str(), &self.tested);
        let beside = self.with_lookup.iter().map(|one| (one.tree.as_str(), &one.tested));
        beside.fold(own, |best, one| if one.1.speedup > best.1.speedup { one } else { best })
    }

    /// Every decode of it.
    pub fn decodes(&self) -> impl Iterator<Item = &Tested> {
        std::iter::once(&self.tested).chain(self.with_lookup.iter().map(|one| &one.tested))
    }

    /// The fastest chain.
    pub fn best_chain(&self) -> Option<&Choice> {
        self.chains.iter().max_by(|a, b| a.tokens_per_second.total_cmp(&b.tokens_per_second))
    }
}

/// What was found for one number of requests together.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Batch {
    /// Requests that run together.
    pub rows: usize,
    /// Expected tokens a second of plain decoding.
    pub plain_tokens_per_second: f64,
    /// The tree that is expected to be the fastest.
    pub best: Choice,
    /// Chains, by their length.
    pub chains: Vec<Choice>,
    /// The fastest tree that is no chain.
    pub best_branched: Option<Choice>,
    /// What decoding with the best tree gave.
    pub tested: Tested,
    /// The same with guesses that stood in the text before, which no paper foresees: the faster of two ways to join them.
    /// Nothing where the draft is such a lookup.
    pub with_lookup: Option<WithLookup>,
}

/// What was found of one draft.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Tuned {
    /// `none`, `prompt-lookup`, `model`, or the algorithm of a trained draft.
    pub method: String,
    /// Its tree where none is asked for.
    pub default_tree: String,
    /// Answers that the trees were tried on.
    pub answers: usize,
    /// Their tokens.
    pub tokens: usize,
    /// By depth from 1, of a chain: the share of all places where as many guesses or more come true.
    pub acceptance: Vec<f64>,
    /// What rounds cost.
    pub costs: Costs,
    /// Trees that were tried.
    pub candidates: usize,
    /// By requests that run together.
    pub batches: Vec<Batch>,
    /// What the user should know.
    pub notes: Vec<String>,
}

/// The first turn of every question as a prompt. Those that leave no room for an answer are named and left out.
pub fn prompts(
    target: &dyn TargetModel,
    tokenizer: &ChatTokenizer,
    questions: &[Question],
    max_new_tokens: usize,
) -> Result<(Vec<Prompt>, Vec<String>)> {
    let (mut prompts, mut left_out) = (Vec::new(), Vec::new());
    for question in questions {
        let turn = question.turns.iter().take(1).map(|turn| Message::new("user", turn.as_str()));
        let messages: Vec<Message> = question.before.iter().cloned().chain(turn).collect();
        let tokens = acceptance::encode(tokenizer, question, &messages)?;
        let context = target.info().max_position_embeddings as usize;
        if tokens.len() + max_new_tokens > context {
            let problem =
                format!("{} tokens and {max_new_tokens} more do not fit the context of {context}", tokens.len());
            left_out.push(format!("prompt {} is left out: {problem}", question.id));
            continue;
        }
        prompts.push(Prompt { id: question.id.clone(), tokens, key: acceptance::key(prompts.len(), 0) });
    }
    if prompts.is_empty() {
        let reason = left_out.first().map_or("there are none", String::as_str);
        return Err(Error::Usage(format!("no prompt to answer: {reason}")));
    }
    Ok((prompts, left_out))
}

/// Measures one draft.
pub fn tune<'a>(
    target: &'a dyn TargetModel,
    prompts: &[Prompt],
    options: &TuneOptions,
    open: Open<'_, 'a>,
    progress: Progress<'_>,
) -> Result<Tuned> {
    let rows = timed_rows(&options.batches);
    let timing = Timing { target, prompts, options: &options.engine, rows: &rows, repeat: options.repeat };
    let mut measuring = Measuring { target, prompts, options, timing, open, progress, draft: Vec::new() };
    let default = Draft::of(open(None)?);
    let mut guessed = measuring.guesses(&default)?;
    let costs = measuring.costs(&guessed)?;
    if guessed.candidates.is_empty() {
        let problem = "no guess of the draft was ever right, or it guesses nothing: there is no tree to choose";
        return Err(Error::Failed(problem.to_owned()));
    }
    let found = options.batches.iter().map(|&rows| predict(&guessed, &costs, rows, prompts.len())).collect::<Vec<_>>();
    let mut batches = Vec::new();
    let beside = default.trees != Trees::Lookup;
    let groups = |rows: usize| replay::groups(prompts.len(), rows).len();
    let (mut done, all) = (0, options.batches.iter().map(|&rows| groups(rows)).sum());
    for mut batch in found {
        let own = batch.best.tree.clone();
        let lookups = if beside { with_lookup(&batch.best) } else { Vec::new() };
        let trees = std::iter::once(own).chain(lookups).collect::<Vec<_>>();
        let mut tested = measuring.test(&trees, batch.rows, (done, all))?.into_iter();
        batch.tested = tested.next().map(|(_, tested)| tested).unwrap_or_default();
        let beside = tested.map(|(tree, tested)| WithLookup { tree, tested });
        batch.with_lookup = beside.max_by(|one, other| one.tested.speedup.total_cmp(&other.tested.speedup));
        done += groups(batch.rows);
        batches.push(batch);
    }
    let deepest = guessed.candidates.iter().filter(|candidate| candidate.is_chain()).max_by_key(|one| one.depth);
    let deepest = deepest.or(guessed.candidates.first());
    guessed.notes.splice(0..0, default.notes);
    Ok(Tuned {
        method: default.method,
        default_tree: default.tree,
        answers: guessed.answers.len(),
        tokens: guessed.answers.iter().map(|answer| answer.tokens.len()).sum(),
        acceptance: deepest.map(Candidate::acceptance).unwrap_or_default(),
        costs,
        candidates: guessed.candidates.len(),
        batches,
        notes: guessed.notes,
    })
}

/// A tree with a lookup beside the draft, as it is tried: with as many guesses as both have, and with no more than fill the
/// vectors of the draft's alone, which on a CPU are verified at nearly the same price.
fn with_lookup(best: &Choice) -> Vec<String> {
    let (own, full) = (&best.tree, (best.guesses + 1).next_multiple_of(VECTOR) - 1);
    vec![format!("{own}+lookup"), format!("{own}+lookup:most={full}")]
}

/// Rows to time: those asked for, and one alone, to which every batch comes down at its end.
fn timed_rows(batches: &[usize]) -> Vec<usize> {
    let mut rows = vec![1];
    rows.extend(batches);
    rows.sort_unstable();
    rows.dedup();
    rows
}

/// Tries every tree on paper for so many requests together.
fn predict(guessed: &Guessed, costs: &Costs, rows: usize, prompts: usize) -> Batch {
    let groups = replay::groups(prompts, rows);
    let decode = |answers: &[Outcomes], cost: &dyn Fn(usize, usize, usize) -> f64| {
        groups.iter().map(|group| replay::replay(answers, group, rows, cost)).fold(Replayed::default(), |sum, one| {
            Replayed {
                rounds: sum.rounds + one.rounds,
                passes: sum.passes + one.passes,
                tokens: sum.tokens + one.tokens,
                seconds: sum.seconds + one.seconds,
            }
        })
    };
    let plain: Vec<Outcomes> = guessed.answers.iter().map(|answer| replay::plain(answer.tokens.len())).collect();
    let plain = decode(&plain, &|rows, _, _| costs.plain.at(rows, 1)).tokens_per_second();
    let choice = |candidate: &Candidate| {
        let cost = |rows: usize, levels: usize, nodes: usize| costs.round(candidate.drafted_by, rows, levels, nodes);
        let replayed = decode(&candidate.outcomes, &cost);
        let Candidate { tree, top_k, depth, guesses, .. } = candidate;
        let tokens_per_second = replayed.tokens_per_second();
        Choice {
            tree: tree.clone(),
            top_k: *top_k,
            depth: *depth,
            guesses: *guesses,
            tokens_per_round: replayed.tokens_per_round(),
            tokens_per_second,
            speedup: tokens_per_second / plain.max(f64::MIN_POSITIVE),
        }
    };
    let mut choices: Vec<Choice> = guessed.candidates.iter().map(choice).collect();
    // Of equally fast trees the smaller one.
    choices.sort_by(|a, b| b.tokens_per_second.total_cmp(&a.tokens_per_second).then(a.guesses.cmp(&b.guesses)));
    let best = choices[0].clone();
    let best_branched = choices.iter().find(|choice| choice.top_k > 1).cloned();
    let mut chains: Vec<Choice> = choices.into_iter().filter(|choice| choice.top_k == 1).collect();
    chains.sort_by_key(|choice| choice.depth);
    let tested = Tested::default();
    Batch { rows, plain_tokens_per_second: plain, best, chains, best_branched, tested, with_lookup: None }
}

#[cfg(test)]
mod tests;
