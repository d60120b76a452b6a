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
use crate::decode::drafter::{Opened, Trees};
use crate::decode::{Drafter, EngineOptions};
use crate::error::{Error, Result};
use crate::models::TargetModel;

use super::acceptance::{self, Question};

mod candidates;
mod costs;
mod decoded;
mod probe;
mod replay;
pub mod report;

pub use candidates::Candidate;
pub use costs::{Costs, Table};
pub use decoded::Tested;
pub use probe::Prompt;
pub use replay::{Outcome, Outcomes, Replayed};

use candidates::{GrownAnswers, RankedAnswers};
use costs::Timing;
use probe::{Answer, Noted};

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
    /// The same with guesses that stood in the text before, which no paper foresees; nothing where the draft is such a lookup.
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
        let trees = std::iter::once(own.clone()).chain(beside.then(|| format!("{own}+lookup"))).collect::<Vec<_>>();
        let mut tested = measuring.test(&trees, batch.rows, (done, all))?.into_iter();
        batch.tested = tested.next().map(|(_, tested)| tested).unwrap_or_default();
        batch.with_lookup = tested.next().map(|(tree, tested)| WithLookup { tree, tested });
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

/// What is known of a draft before anything is measured. The draft itself is opened again where it is needed.
struct Draft {
    method: String,
    trees: Trees,
    tree: String,
    notes: Vec<String>,
}

impl Draft {
    fn of(opened: Opened<'_>) -> Self {
        let Opened { method, trees, tree, notes, .. } = opened;
        Self { method, trees, tree, notes }
    }
}

/// Rows to time: those asked for, and one alone, to which every batch comes down at its end.
fn timed_rows(batches: &[usize]) -> Vec<usize> {
    let mut rows = vec![1];
    rows.extend(batches);
    rows.sort_unstable();
    rows.dedup();
    rows
}

/// What a draft guessed.
struct Guessed {
    answers: Vec<Answer>,
    candidates: Vec<Candidate>,
    capture: Vec<usize>,
    notes: Vec<String>,
}

/// One draft under measurement.
struct Measuring<'m, 'a> {
    target: &'a dyn TargetModel,
    prompts: &'m [Prompt],
    options: &'m TuneOptions,
    timing: Timing<'m>,
    open: Open<'m, 'a>,
    progress: Progress<'m>,
    /// What drafting costs, in the order of [`Candidate::drafted_by`].
    draft: Vec<Table>,
}

impl Measuring<'_, '_> {
    /// Guesses behind every token, and what drafting costs, by the kind of trees that the draft has.
    fn guesses(&mut self, default: &Draft) -> Result<Guessed> {
        match default.trees {
            Trees::None => Err(Error::Usage("there is nothing to tune without a draft".to_owned())),
            Trees::Dynamic => self.dynamic(),
            Trees::Static => self.static_trees(default),
            Trees::Lookup => self.lookup(),
            Trees::Own => self.own(default),
        }
    }

    fn dynamic(&mut self) -> Result<Guessed> {
        let TuneOptions { max_depth, max_nodes, top_k, .. } = self.options;
        let wanted = (*max_depth).min(*max_nodes);
        let chain = (self.open)(Some(&format!("chain:{wanted}")))?;
        // A draft that guesses fewer says so in the tree it has understood.
        let understood = chain.tree.strip_prefix("chain:").and_then(|length| length.parse().ok());
        let depth = understood.unwrap_or(wanted).min(wanted);
        let mut guessed = Guessed {
            answers: Vec::new(),
            candidates: Vec::new(),
            capture: chain.drafter.capture(),
            notes: Vec::new(),
        };
        let mut opened = Some(chain);
        let others = top_k.iter().copied().filter(|&children| children > 1);
        for (drafted_by, children) in std::iter::once(1).chain(others).enumerate() {
            let mut draft = match opened.take() {
                Some(chain) => chain,
                None => (self.open)(Some(&everything(children, depth)))?,
            };
            let mut grown = GrownAnswers::new(self.prompts.len());
            let answers = self.record(draft.drafter.as_mut(), &mut |place, answer, noted| {
                grown.take(place, answer, &noted);
                Ok(())
            })?;
            guessed.candidates.extend(grown.candidates((children, drafted_by), depth, *max_nodes));
            guessed.answers = answers;
            self.time_draft(draft.drafter.as_mut(), &(1..=depth).collect::<Vec<_>>())?;
        }
        Ok(guessed)
    }

    fn static_trees(&mut self, default: &Draft) -> Result<Guessed> {
        let levels = default.tree.strip_prefix("chain:").and_then(|length| length.parse().ok());
        let levels: usize = levels.ok_or_else(|| {
            Error::Failed(format!("the draft's own tree is `{}`, which does not say how deep it guesses", default.tree))
        })?;
        let depth = levels.min(self.options.max_depth).min(self.options.max_nodes);
        let mut draft = (self.open)(Some(&candidates::written(&RankedAnswers::shown(depth))))?;
        let mut ranked = RankedAnswers::new(self.prompts.len(), depth);
        let answers = self.record(draft.drafter.as_mut(), &mut |place, answer, noted| {
            ranked.take(place, answer, &noted);
            Ok(())
        })?;
        self.time_draft(draft.drafter.as_mut(), &(1..=depth).collect::<Vec<_>>())?;
        let candidates = ranked.candidates(depth, self.options.max_nodes);
        Ok(Guessed { answers, candidates, capture: draft.drafter.capture(), notes: Vec::new() })
    }

    fn lookup(&mut self) -> Result<Guessed> {
        let mut draft = (self.open)(None)?;
        let mut rooms = vec![Vec::new(); self.prompts.len()];
        let answers = self.record(draft.drafter.as_mut(), &mut |place, _, noted: Vec<Noted>| {
            rooms[place] = noted.iter().map(|noted| noted.room).collect();
            Ok(())
        })?;
        self.time_draft(draft.drafter.as_mut(), &[1])?;
        let TuneOptions { max_depth, max_nodes, .. } = self.options;
        let candidates = candidates::lookups(self.prompts, &answers, &rooms, *max_depth, *max_nodes)?;
        Ok(Guessed { answers, candidates, capture: Vec::new(), notes: Vec::new() })
    }

    fn own(&mut self, default: &Draft) -> Result<Guessed> {
        let mut draft = (self.open)(None)?;
        let mut outcomes = vec![Vec::new(); self.prompts.len()];
        let answers = self.record(draft.drafter.as_mut(), &mut |place, answer, noted| {
            outcomes[place] = candidates::as_noted(answer, &noted);
            Ok(())
        })?;
        self.time_draft(draft.drafter.as_mut(), &[1])?;
        let note = format!("the draft has trees of its own: `{}` alone is tried", default.tree);
        let candidates = vec![candidates::only(&default.tree, outcomes)];
        Ok(Guessed { answers, candidates, capture: draft.drafter.capture(), notes: vec![note] })
    }

    /// Lets the target answer beside the draft.
    fn record(&mut self, drafter: &mut dyn Drafter, take: probe::Take<'_>) -> Result<Vec<Answer>> {
        let rows = self.options.batches.iter().copied().max().unwrap_or(1);
        let options = EngineOptions { max_rows: rows, ..self.options.engine.clone() };
        let (total, progress) = (self.prompts.len() as u64, &mut self.progress);
        progress("answers", 0, total);
        probe::record(self.target, drafter, self.prompts, (&options, self.options.max_new_tokens), take, &mut |done| {
            progress("answers", done as u64, total);
        })
    }

    fn time_draft(&mut self, drafter: &mut dyn Drafter, depths: &[usize]) -> Result<()> {
        let total = (self.timing.rows.len() * depths.len() * (self.options.repeat + 1)) as u64;
        let (mut done, progress) = (0, &mut self.progress);
        progress("drafting rounds", 0, total);
        let table = self.timing.draft(drafter, depths, &mut || {
            done = (done + 1).min(total);
            progress("drafting rounds", done, total);
        })?;
        self.draft.push(table);
        Ok(())
    }

    /// What rounds cost.
    fn costs(&mut self, guessed: &Guessed) -> Result<Costs> {
        let largest = guessed.candidates.iter().map(|candidate| candidate.guesses).max().unwrap_or(0);
        let mut sizes: Vec<usize> = std::iter::once(0).chain(candidates::sizes(largest)).map(|size| size + 1).collect();
        sizes.dedup();
        let total = (self.timing.rows.len() * sizes.len() * (self.options.repeat + 1)) as u64;
        let (mut done, progress) = (0, &mut self.progress);
        progress("verifying rounds", 0, total);
        let mut tick = || {
            done = (done + 1).min(total);
            progress("verifying rounds", done, total);
        };
        let [verify, overhead] = self.timing.verify(&sizes, &guessed.capture, &mut tick)?;
        // A plain round is one of the root alone, timed in the same turns: who comes between comes between all of them.
        let seconds =
            verify.seconds.iter().zip(&overhead.seconds).map(|(pass, rest)| vec![pass[0] + rest[0]]).collect();
        let plain = Table { rows: verify.rows.clone(), sizes: vec![1], seconds };
        Ok(Costs { plain, verify, overhead, draft: std::mem::take(&mut self.draft) })
    }

    /// Decodes with each of some trees and so many requests together: the trees as they were understood, and how they did. `done`
    /// groups of prompts of `all` were decoded before.
    fn test(&mut self, trees: &[String], rows: usize, (done, all): (usize, usize)) -> Result<Vec<(String, Tested)>> {
        let opened = trees.iter().map(|tree| (self.open)(Some(tree))).collect::<Result<Vec<_>>>()?;
        let (trees, drafters): (Vec<_>, Vec<_>) = opened.into_iter().map(|one| (one.tree, one.drafter)).unzip();
        let groups = replay::groups(self.prompts.len(), rows);
        let options = EngineOptions { max_rows: rows, ..self.options.engine.clone() };
        let progress = &mut self.progress;
        progress("groups of decoding", done as u64, all as u64);
        let options = (&options, self.options.max_new_tokens);
        let tested = decoded::decode(self.target, drafters, self.prompts, options, &groups, &mut |group| {
            progress("groups of decoding", (done + group) as u64, all as u64);
        })?;
        Ok(trees.into_iter().zip(tested).collect())
    }
}

/// A tree that keeps everything that is tried.
fn everything(children: usize, depth: usize) -> String {
    /// As many as a tree may have.
    const MOST: usize = 4096;
    let tried = children + children * children * (depth - 1);
    format!("dynamic:depth={depth},top_k={children},nodes={}", tried.min(MOST))
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
mod tests {
    use super::*;
    use crate::decode::drafter::medusa::heads_for_tests as test_heads;
    use crate::decode::drafter::{self, DraftSampling, MedusaDrafter, ModelDrafter, choices, open, tree_text};
    use crate::decode::event::Silent;
    use crate::decode::{Decoded, Engine, Policy, Request, tiny};
    use crate::models::llama::LlamaTarget;
    use crate::nn::Processors;

    fn options(temperature: f64) -> TuneOptions {
        let engine = EngineOptions {
            processors: Processors::at_temperature(temperature),
            policy: Policy::Keyed { seed: 5 },
            stop_tokens: vec![7],
            max_rows: 1,
        };
        let (batches, top_k) = (vec![1, 3], vec![1, 3]);
        TuneOptions { engine, max_new_tokens: 24, batches, max_depth: 3, max_nodes: 12, top_k, repeat: 1 }
    }

    fn some_prompts(count: u64) -> Vec<Prompt> {
        let prompt = |key: u64| Prompt { id: key.to_string(), tokens: vec![key as u32 + 9, 3, key as u32], key };
        (0..count).map(prompt).collect()
    }

    /// Everything that is tried on paper.
    fn guessed<'a>(target: &'a LlamaTarget, prompts: &[Prompt], options: &TuneOptions, open: Open<'_, 'a>) -> Guessed {
        let timing = Timing { target, prompts, options: &options.engine, rows: &[1], repeat: 1 };
        let mut silent = |_: &'static str, _: u64, _: u64| {};
        let draft = Vec::new();
        let default = Draft::of(open(None).unwrap());
        // The draft may borrow the target for longer than the measurement.
        Measuring { target, prompts, options, timing, open, progress: &mut silent, draft }.guesses(&default).unwrap()
    }

    fn decode(
        target: &LlamaTarget,
        drafter: Box<dyn Drafter + '_>,
        prompts: &[Prompt],
        options: &TuneOptions,
    ) -> Vec<Decoded> {
        let mut engine = Engine::new(target, drafter, options.engine.clone()).unwrap();
        for (tag, Prompt { tokens, key, .. }) in (0..).zip(prompts) {
            let max_new_tokens = options.max_new_tokens;
            engine.submit(Request { tag, prompt: tokens.clone(), max_new_tokens, key: *key }).unwrap();
        }
        engine.run(&mut Silent).unwrap().into_iter().map(|left| left.decoded.unwrap()).collect()
    }

    /// The rounds on paper are those of decoding with the tree, one by one.
    fn assert_as_decoded(candidate: &Candidate, decoded: &[Decoded]) {
        for (outcomes, decoded) in candidate.outcomes.iter().zip(decoded) {
            let mut place = 0;
            for (number, round) in decoded.rounds.iter().enumerate() {
                let Outcome { depth, nodes, accepted, .. } = outcomes[place];
                let expected = (usize::from(nodes) - 1, usize::from(depth), usize::from(accepted));
                let got = (round.guesses, round.depth, round.accepted);
                assert_eq!(got, expected, "{}, round {number} at {place}", candidate.tree);
                place += round.tokens;
            }
            assert_eq!(place, outcomes.len(), "{}", candidate.tree);
        }
    }

    fn opened<'a>(drafter: impl Drafter + 'a, tree: String, trees: Trees) -> Opened<'a> {
        Opened { drafter: Box::new(drafter), method: "model".to_owned(), tree, trees, folder: None, notes: Vec::new() }
    }

    #[test]
    fn trees_of_a_draft_s_probabilities_are_foreseen_round_by_round() {
        let target = tiny::target(1);
        let prompts = some_prompts(2);
        for temperature in [0.0, 1.0] {
            let options = options(temperature);
            let sampling = DraftSampling::for_policy(options.engine.policy, temperature);
            let open = |tree: Option<&str>| {
                let (tree, text) = tree_text::dynamic(tree.unwrap_or(tree_text::DEFAULT))?;
                let draft = tiny::target_with(1, &|_, tensor| &tensor + (&tensor * 30.0).sin() * 0.05);
                Ok(opened(ModelDrafter::new(Box::new(draft), target.info(), tree, sampling)?, text, Trees::Dynamic))
            };
            let guessed = guessed(&target, &prompts, &options, &open);
            assert!(guessed.candidates.iter().any(Candidate::is_chain), "{}", guessed.candidates.len());
            assert!(guessed.candidates.len() > 12, "{}", guessed.candidates.len());
            let mut accepted = 0;
            for candidate in &guessed.candidates {
                let drafter = open(Some(&candidate.tree)).unwrap().drafter;
                let decoded = decode(&target, drafter, &prompts, &options);
                accepted +=
                    decoded.iter().flat_map(|decoded| &decoded.rounds).map(|round| round.accepted).sum::<usize>();
                assert_as_decoded(candidate, &decoded);
            }
            assert!(accepted > 5, "the draft is never right: nothing was tried");
        }
    }

    #[test]
    fn static_trees_are_foreseen_round_by_round_on_answers_that_chose_them() {
        let target = test_heads::target();
        let heads = || test_heads::good(&target, 3, 0.4);
        let options = options(0.0);
        let open = |tree: Option<&str>| {
            let tree = tree.unwrap_or("chain:3");
            let drafter = MedusaDrafter::new(heads(), &choices::parse(tree)?, DraftSampling::Greedy);
            Ok(opened(drafter, tree.to_owned(), Trees::Static))
        };
        // Chains of several answers; trees of a single one, which has no other half.
        for count in [3, 1] {
            let prompts = some_prompts(count);
            let guessed = guessed(&target, &prompts, &options, &open);
            let own = guessed.candidates.iter().filter(|candidate| candidate.is_chain() || count == 1);
            let mut tried = 0;
            for candidate in own {
                let drafter = open(Some(&candidate.tree)).unwrap().drafter;
                assert_as_decoded(candidate, &decode(&target, drafter, &prompts, &options));
                tried += 1;
            }
            assert!(tried >= 3, "{tried}");
        }
    }

    #[test]
    fn prompt_lookup_is_foreseen_round_by_round() {
        let target = tiny::target(2);
        let (prompts, options) = (some_prompts(3), options(0.0));
        let open = |tree: Option<&str>| {
            open(Some("prompt-lookup"), tree, (&target, std::path::Path::new("")), DraftSampling::Greedy)
        };
        let guessed = guessed(&target, &prompts, &options, &open);
        for candidate in &guessed.candidates {
            let drafter = open(Some(&candidate.tree)).unwrap().drafter;
            assert_as_decoded(candidate, &decode(&target, drafter, &prompts, &options));
        }
    }

    /// A candidate that accepts `accepted` guesses at every round, of `guesses`.
    fn candidate(tree: &str, (top_k, depth, guesses): (usize, usize, usize), accepted: u16) -> Candidate {
        let (nodes, levels) = (guesses as u16 + 1, depth as u16);
        let outcomes = vec![vec![Outcome { levels, depth: levels, nodes, accepted }; 120]; 2];
        Candidate { tree: tree.to_owned(), top_k, depth, guesses, drafted_by: 0, outcomes }
    }

    fn table(sizes: Vec<usize>, seconds: Vec<f64>) -> Table {
        Table { rows: vec![1], sizes, seconds: vec![seconds] }
    }

    /// The best of a chain of 1, a chain of 3 and a tree where one more token costs `token` passes and a level `level`.
    fn best(token: f64, level: f64) -> Choice {
        let candidates = vec![
            candidate("chain:1", (1, 1, 1), 1),
            candidate("chain:3", (1, 3, 3), 2),
            candidate("dynamic", (4, 3, 12), 3),
        ];
        let answer = Answer { tokens: vec![1; 121], ended: false };
        let guessed =
            Guessed { answers: vec![answer.clone(), answer], candidates, capture: Vec::new(), notes: Vec::new() };
        let costs = Costs {
            plain: table(vec![1], vec![1.0]),
            verify: table(vec![1, 11], vec![1.0, 1.0 + 10.0 * token]),
            overhead: Table::free(),
            draft: vec![table(vec![1, 2], vec![level, 2.0 * level])],
        };
        predict(&guessed, &costs, 1, 2).best
    }

    #[test]
    fn costs_decide_which_tree_is_the_best() {
        let free = best(0.0, 0.0);
        assert!(free.tree == "dynamic" && (free.speedup - 4.0).abs() < 1e-9, "{free:?}");
        // Tokens cost a quarter of a pass, drafting nothing: 2 / 1.25, 3 / 1.75, 4 / 4.
        let dear = best(0.25, 0.0);
        assert!(dear.tree == "chain:3" && (dear.speedup - 3.0 / 1.75).abs() < 1e-9, "{dear:?}");
        // Levels cost half a pass: 2 / 1.5, 3 / 2.5, 4 / 2.5.
        assert_eq!(best(0.0, 0.5).tree, "dynamic");
        // Both: 2 / 1.75, 3 / 3.25, 4 / 5.5.
        let both = best(0.25, 0.5);
        assert!(both.tree == "chain:1" && (both.speedup - 2.0 / 1.75).abs() < 1e-9, "{both:?}");
        // Nothing pays where a token costs what a pass does and a level too.
        let none = best(1.0, 1.0);
        assert!(none.tree == "chain:1" && none.speedup < 1.0, "{none:?}");
    }

    #[test]
    fn a_draft_is_measured_chosen_and_put_to_the_test() {
        let target = tiny::target(1);
        let prompts = some_prompts(3);
        let options = options(0.0);
        let open = |tree: Option<&str>| {
            let (tree, beside) = tree_text::split_lookup(tree.unwrap_or(tree_text::DEFAULT));
            let (tree, text) = tree_text::dynamic(tree)?;
            let draft = ModelDrafter::new(Box::new(tiny::target(1)), target.info(), tree, DraftSampling::Greedy)?;
            let Some(keys) = beside else { return Ok(opened(draft, text, Trees::Dynamic)) };
            let (lookup, alone) = tree_text::lookup_beside(keys)?;
            let both = drafter::WithLookup { draft: Box::new(draft), lookup, alone };
            Ok(opened(both, format!("{text}+lookup"), Trees::Dynamic))
        };
        let mut stages = Vec::new();
        let mut progress = |stage: &'static str, done: u64, total: u64| {
            assert!(done <= total, "{stage}: {done} of {total}");
            stages.push(stage);
        };
        let tuned = tune(&target, &prompts, &options, &open, &mut progress).unwrap();
        stages.dedup();
        assert_eq!(
            stages,
            ["answers", "drafting rounds", "answers", "drafting rounds", "verifying rounds", "groups of decoding"]
        );
        // The draft is the target: every guess comes true, and answers are those of plain decoding.
        assert_eq!(tuned.acceptance, [1.0, 1.0, 1.0]);
        assert_eq!(tuned.batches.iter().map(|batch| batch.rows).collect::<Vec<_>>(), [1, 3]);
        for batch in &tuned.batches {
            let beside = batch.with_lookup.as_ref().unwrap();
            assert_eq!(beside.tree, format!("{}+lookup", batch.best.tree));
            assert_eq!((beside.tested.answers, beside.tested.faults), (batch.tested.answers, 0));
            let (tree, tested) = batch.fastest();
            let speeds = batch.decodes().map(|one| one.speedup).fold(0.0, f64::max);
            assert_eq!((tree == beside.tree, tested.speedup), (beside.tested.speedup > batch.tested.speedup, speeds));
            let Batch { best, tested, .. } = batch;
            assert_eq!((tested.faults, tested.near_ties), (0, 0));
            // Rounds at the end of an answer are shorter, on paper too.
            let (foreseen, got) = (best.tokens_per_round, tested.tokens_per_round);
            assert!((foreseen - got).abs() < 1e-9 && got > 1.5, "{foreseen} and {got}");
            assert!(tested.tokens_per_second > 0.0 && batch.plain_tokens_per_second > 0.0);
            assert_eq!(batch.chains.iter().map(|chain| chain.depth).collect::<Vec<_>>(), [1, 2, 3]);
        }
        let text = report::text("the draft", &tuned);
        assert!(text.contains("verification, ms by tokens") && text.contains("3 requests together: "), "{text}");
    }

    #[test]
    fn what_cannot_be_tuned_is_refused() {
        let target = tiny::target(1);
        let none = |_: Option<&str>| open(None, None, (&target, std::path::Path::new("")), DraftSampling::Greedy);
        let mut silent = |_: &'static str, _: u64, _: u64| {};
        let error = tune(&target, &some_prompts(1), &options(0.0), &none, &mut silent).unwrap_err();
        assert!(error.to_string().contains("without a draft") && error.exit_code() == 2, "{error}");
        let wide = TuneOptions { max_depth: 200, ..options(0.0) };
        let lookup = |tree: Option<&str>| {
            open(Some("prompt-lookup"), tree, (&target, std::path::Path::new("")), DraftSampling::Greedy)
        };
        let long = [Prompt { tokens: vec![1; tiny::CONTEXT - 2], ..some_prompts(1).remove(0) }];
        let error = tune(&target, &long, &wide, &lookup, &mut silent).unwrap_err();
        assert!(error.to_string().contains("no room behind the prompts"), "{error}");
    }
}
