//! Measures one draft: what it guesses behind every token of the target's answers, what rounds cost, and how trees decode.

use super::candidates::{self, Candidate, GrownAnswers, RankedAnswers};
use super::costs::{Costs, Table, Timing};
use super::decoded::{self, Tested};
use super::probe::{self, Answer, Noted, Prompt};
use super::{Open, Progress, TuneOptions, replay};
use crate::decode::drafter::{Opened, Trees};
use crate::decode::{Drafter, EngineOptions};
use crate::error::{Error, Result};
use crate::models::TargetModel;

/// What is known of a draft before anything is measured. The draft itself is opened again where it is needed.
pub(super) struct Draft {
    pub(super) method: String,
    pub(super) trees: Trees,
    pub(super) tree: String,
    pub(super) notes: Vec<String>,
}

impl Draft {
    pub(super) fn of(opened: Opened<'_>) -> Self {
        let Opened { method, trees, tree, notes, .. } = opened;
        Self { method, trees, tree, notes }
    }
}

/// What a draft guessed.
pub(super) struct Guessed {
    pub(super) answers: Vec<Answer>,
    pub(super) candidates: Vec<Candidate>,
    pub(super) capture: Vec<usize>,
    pub(super) notes: Vec<String>,
}

/// One draft under measurement.
pub(super) struct Measuring<'m, 'a> {
    pub(super) target: &'a dyn TargetModel,
    pub(super) prompts: &'m [Prompt],
    pub(super) options: &'m TuneOptions,
    pub(super) timing: Timing<'m>,
    pub(super) open: Open<'m, 'a>,
    pub(super) progress: Progress<'m>,
    /// What drafting costs, in the order of [`Candidate::drafted_by`].
    pub(super) draft: Vec<Table>,
}

impl Measuring<'_, '_> {
    /// Guesses behind every token, and what drafting costs, by the kind of trees that the draft has.
    pub(super) fn guesses(&mut self, default: &Draft) -> Result<Guessed> {
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
    pub(super) fn costs(&mut self, guessed: &Guessed) -> Result<Costs> {
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
    pub(super) fn test(
        &mut self,
        trees: &[String],
        rows: usize,
        (done, all): (usize, usize),
    ) -> Result<Vec<(String, Tested)>> {
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
