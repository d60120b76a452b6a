//! One round of every running row: guess, verify, decide, keep, and leave where the end is reached.

use std::time::{Duration, Instant};

use tch::Tensor;

use super::request::{Left, RoundOutcome};
use super::rows::{self, Row};
use super::target_rows::TargetRows;
use super::{Engine, logits, trees};
use crate::decode::drafter::{Context, Progress, last};
use crate::decode::event::{Committed, Listener, Round, Source};
use crate::decode::policy::many_rows::Node;
use crate::decode::policy::{Proposal, Verdict};
use crate::device;
use crate::error::{Error, Result};
use crate::models::{ForwardOutput, LogitRows};
use crate::tree::TokenTree;

#[cfg(test)]
use super::seeded;

impl Engine<'_> {
    /// One round of every row. Returns the time of drafting and of the target's pass and choices.
    pub(super) fn round(&mut self, listener: &mut dyn Listener, left: &mut Vec<Left>) -> Result<(Duration, Duration)> {
        // 1. Guess.
        let start = Instant::now();
        let proposals = self.propose()?;
        let proposals = self.within_budget(proposals)?;
        let mut draft = start.elapsed();
        self.tell_of_trees(&proposals, listener)?;
        // 2. One pass of the target over all trees, and what it chooses.
        let start = Instant::now();
        let nodes = proposals.iter().map(|proposal| proposal.tree.len()).max().unwrap_or(1);
        let output = self.run_trees(&proposals, nodes)?;
        let choices = self.choices(&output, nodes, (&self.rows, Some(&proposals)))?;
        if choices.contains(&None) {
            // The first look at a row would wait as long, and its time would not be the pass's.
            device::synchronize(self.target.device());
        }
        let verify = start.elapsed();
        (self.done.passes, self.done.rounds) = (self.done.passes + 1, self.done.rounds + proposals.len() as u64);
        // 3. Decide, and tell.
        let verdicts = self.decide(&proposals, nodes, &output, &choices, listener)?;
        // 4. Keep the paths, forget the rest.
        let paths = self.keep(&proposals, &verdicts)?;
        // 5. Who has reached the end leaves; the draft hears of what goes on.
        let (staying, new) = self.commit(&proposals, verdicts, listener, left)?;
        if !self.rows.is_empty() {
            let start = Instant::now();
            let features = kept_features(&output.hidden, nodes, &staying, &paths, self.target.device());
            if self.prefixes.is_some() {
                self.rows.iter_mut().zip(&features).for_each(|(row, features)| row.features.push(share(features)));
            }
            let progress: Vec<Progress<'_>> = (self.rows.iter().zip(staying).zip(features))
                .map(|((row, place), features)| Progress { tokens: &row.tokens, new: new[place], features })
                .collect();
            self.drafter.commit(&progress)?;
            draft += start.elapsed();
        }
        Ok((draft, verify))
    }

    fn propose(&mut self) -> Result<Vec<Proposal>> {
        let contexts: Vec<Context<'_>> = (self.rows.iter())
            .map(|row| Context {
                tokens: &row.tokens,
                depth: row.left() - 1,
                key: row.key,
                temperature: row.processors.temperature,
            })
            .collect();
        let proposals = self.drafter.propose(&contexts)?;
        if proposals.len() != contexts.len() {
            let (got, want) = (proposals.len(), contexts.len());
            return Err(Error::Failed(format!("the draft made {got} proposals for {want} rows")));
        }
        let fitted: Vec<Proposal> =
            proposals.into_iter().zip(&contexts).map(|(proposal, context)| proposal.cut(context.depth)).collect();
        let vocabulary = self.target.info().vocab_size;
        for (proposal, context) in fitted.iter().zip(&contexts) {
            let tokens = proposal.tree.tokens();
            if tokens[0] != last(context.tokens) {
                return Err(Error::Failed("a draft tree does not begin with the last committed token".to_owned()));
            }
            if let Some(token) = tokens.iter().find(|&&token| i64::from(token) >= vocabulary) {
                let problem = format!("the draft guessed token {token}; the target's vocabulary has {vocabulary}");
                return Err(Error::Failed(problem));
            }
        }
        Ok(fitted)
    }

    fn tell_of_trees(&self, proposals: &[Proposal], listener: &mut dyn Listener) -> Result<()> {
        let (lengths, draft_lengths) = (self.cache_lengths(), self.drafter.cache_lengths());
        for (index, (row, proposal)) in self.rows.iter().zip(proposals).enumerate() {
            listener.round(&Round {
                tag: row.tag,
                round: row.rounds.len() as u64 + 1,
                committed: row.tokens.len(),
                target_cache: lengths[index],
                draft_cache: draft_lengths.get(index).copied().unwrap_or(0),
                tree: &proposal.tree,
                scores: &proposal.scores,
                confidence: proposal.confidence.as_deref(),
            })?;
        }
        Ok(())
    }

    /// The target over the trees of all rows, padded to `nodes` each. Logits are `[B * T, V]`.
    fn run_trees(&mut self, proposals: &[Proposal], nodes: usize) -> Result<ForwardOutput> {
        let lengths = self.cache_lengths();
        #[cfg(test)]
        let lengths = seeded::lengths(lengths);
        let (ids, positions) = trees::inputs(proposals, nodes, &lengths);
        #[cfg(test)]
        let positions = seeded::positions(positions, nodes, &lengths);
        let mask = trees::mask(proposals, nodes, &lengths, self.target.device());
        #[cfg(test)]
        let mask = seeded::mask(mask, proposals);
        let mut cache =
            self.cache.take().ok_or_else(|| Error::Failed("there is no cache to decode with".to_owned()))?;
        let output = self.forward((&ids, &positions), (proposals.len(), nodes), &mask, LogitRows::All, &mut cache);
        self.cache = Some(cache);
        output
    }

    /// What is committed to each row, or why it cannot go on.
    fn decide(
        &self,
        proposals: &[Proposal],
        nodes: usize,
        output: &ForwardOutput,
        choices: &[Option<Vec<i64>>],
        listener: &mut dyn Listener,
    ) -> Result<Vec<Result<Verdict>>> {
        let (lengths, logits) = (self.cache_lengths(), logits(output)?);
        let mut verdicts = Vec::with_capacity(proposals.len());
        for (index, (row, proposal)) in self.rows.iter().zip(proposals).enumerate() {
            let first = index * nodes;
            let chosen = choices.get(index).and_then(Option::as_deref);
            let mut rows = TargetRows::new(logits, first, &row.tokens, chosen, &row.processors);
            rows.tree = Some(&proposal.tree);
            let verdict = self.verdict(proposal, row, &mut rows);
            if let Ok(verdict) = &verdict {
                tell_of_tokens(verdict, row, &proposal.tree, lengths[index], &rows, listener)?;
            }
            verdicts.push(verdict);
        }
        Ok(verdicts)
    }

    /// Keeps of every tree what was accepted; returns the nodes kept, from the root down.
    fn keep(&mut self, proposals: &[Proposal], verdicts: &[Result<Verdict>]) -> Result<Vec<Vec<i64>>> {
        let path = |verdict: &Result<Verdict>| match verdict {
            Ok(verdict) => verdict.path.iter().map(|&node| node as i64).collect(),
            Err(_) => vec![0],
        };
        let paths: Vec<Vec<i64>> = verdicts.iter().map(path).collect();
        #[cfg(test)]
        let (honest, paths) = (paths.clone(), seeded::places(paths, proposals));
        debug_assert_eq!(paths.len(), proposals.len());
        if let Some(cache) = &mut self.cache {
            cache.keep(&paths);
        }
        #[cfg(test)]
        self.seeded_keep(&paths, verdicts)?;
        #[cfg(test)]
        let paths = honest;
        Ok(paths)
    }

    /// Writes down what was decided, and lets go of the rows that have ended or failed. Returns where the rows that stay
    /// were before, in their new order, and how many tokens each of the old rows was given.
    fn commit(
        &mut self,
        proposals: &[Proposal],
        verdicts: Vec<Result<Verdict>>,
        listener: &mut dyn Listener,
        left: &mut Vec<Left>,
    ) -> Result<(Vec<usize>, Vec<usize>)> {
        let (mut gone, mut new, mut ended) = (vec![false; verdicts.len()], vec![0; verdicts.len()], Vec::new());
        for (index, (row, verdict)) in self.rows.iter_mut().zip(verdicts).enumerate() {
            let verdict = match verdict {
                Ok(verdict) => verdict,
                Err(error) => {
                    listener.ended(row.tag, None)?;
                    left.push(Left { tag: row.tag, decoded: Err(error) });
                    gone[index] = true;
                    continue;
                }
            };
            new[index] = verdict.tokens.len();
            self.done.new_tokens += verdict.tokens.len() as u64;
            row.tokens.extend(&verdict.tokens);
            row.rounds.push(outcome(&proposals[index].tree, &verdict));
            if let Some(finish) = row.ended(&self.options.stop_tokens) {
                listener.ended(row.tag, Some(finish))?;
                left.push(row.finish(finish));
                gone[index] = true;
                ended.push(index);
            }
        }
        ended.into_iter().try_for_each(|index| self.keep_prefix(index))?;
        let staying = rows::staying(&gone);
        if staying.len() < gone.len() {
            self.keep_rows(&staying);
        }
        Ok((staying, new))
    }

    /// Keeps what a row that goes holds, for prompts that begin with it. Of its last round the draft has heard nothing: where it
    /// reads the target's states, that part is not kept.
    pub(super) fn keep_prefix(&mut self, index: usize) -> Result<()> {
        let (Some(prefixes), Some(cache)) = (&mut self.prefixes, &self.cache) else { return Ok(()) };
        let row = &mut self.rows[index];
        let pieces = std::mem::take(&mut row.features);
        let layers = pieces.first().map_or(0, Vec::len);
        let whole = |layer: usize| Tensor::f_cat(&pieces.iter().map(|piece| &piece[layer]).collect::<Vec<_>>(), 0);
        let features = (0..layers).map(whole).collect::<Result<Vec<_>, _>>()?; // [T, H] each
        let held = cache.lengths()[index];
        let tokens = features.first().map_or(held, |layer| layer.size()[0].min(held));
        let kept = self.target.new_cache(1, tokens).with_row_of(cache, index as i64, tokens);
        prefixes.keep(&row.tokens[..tokens as usize], kept, features);
        Ok(())
    }

    /// Keeps the rows named, in that order, here and in both caches.
    pub(super) fn keep_rows(&mut self, staying: &[usize]) {
        self.rows = rows::select(std::mem::take(&mut self.rows), staying);
        self.drafter.retain(staying);
        match &mut self.cache {
            Some(cache) if !staying.is_empty() => {
                cache.select_rows(&staying.iter().map(|&row| row as i64).collect::<Vec<_>>());
            }
            cache => *cache = None,
        }
    }
}

/// Every node of the trees of some rows, padded to `nodes` each, as policies that sample many at once are asked. Nodes that
/// pad a row are asked for too, and not looked at.
pub(super) fn tree_nodes<'a>(
    seed: u64,
    nodes: usize,
    trees: impl Iterator<Item = (&'a Row, &'a Proposal)>,
) -> Vec<Node<'a>> {
    let mut all = Vec::new();
    for (row, proposal) in trees {
        let (tree, topology) = (&proposal.tree, proposal.tree.topology());
        all.extend((0..nodes).map(|node| {
            let depth = topology.depths().get(node).copied().unwrap_or(0);
            let children = (node < tree.len()).then(|| topology.children(node).map(|child| tree.tokens()[child]));
            Node {
                place: (seed.wrapping_add(row.key), (row.tokens.len() + depth) as u64),
                guesses: children.into_iter().flatten().collect(),
                drawn_from: proposal.drawn_from.get(node).and_then(Option::as_ref),
            }
        }));
    }
    all
}

fn tell_of_tokens(
    verdict: &Verdict,
    row: &Row,
    tree: &TokenTree,
    cache_length: i64,
    rows: &TargetRows<'_>,
    listener: &mut dyn Listener,
) -> Result<()> {
    let choices = verdict.path.iter().zip(&verdict.tokens).zip(&verdict.sources);
    for (offset, ((&node, &token), &source)) in choices.enumerate() {
        let raw = listener.wants_rows().then(|| rows.raw(node));
        #[cfg(test)]
        let (raw, source) = seeded::told(raw, source, || rows.raw(offset));
        #[cfg(test)]
        if seeded::untold(offset) {
            continue;
        }
        let topology = tree.topology();
        listener.committed(&Committed {
            tag: row.tag,
            position: row.tokens.len() + offset,
            token,
            source,
            round: row.rounds.len() as u64 + 1,
            slot: node,
            parent_slot: topology.parents()[node],
            depth: topology.depths()[node],
            cache_length,
            row: raw.as_ref(),
        })?;
    }
    Ok(())
}

/// Of every row that stays, the captured states `[B, T, H]` of the nodes kept: `[new, H]` each. The states of all rows are
/// gathered at once.
fn kept_features(
    hidden: &[Tensor],
    nodes: usize,
    staying: &[usize],
    paths: &[Vec<i64>],
    device: tch::Device,
) -> Vec<Vec<Tensor>> {
    if hidden.is_empty() {
        return staying.iter().map(|_| Vec::new()).collect();
    }
    let node = |&row: &usize| paths[row].iter().map(move |&node| (row * nodes) as i64 + node);
    let index: Vec<i64> = staying.iter().flat_map(node).collect();
    let index = device::send(&Tensor::from_slice(&index), device);
    let kept: Vec<Tensor> = hidden.iter().map(|layer| layer.flatten(0, 1).index_select(0, &index)).collect(); // [R, H]
    let mut first = 0;
    let rows = staying.iter().map(|&row| {
        let count = paths[row].len() as i64;
        first += count;
        kept.iter().map(|layer| layer.narrow(0, first - count, count)).collect()
    });
    rows.collect()
}

fn share(features: &[Tensor]) -> Vec<Tensor> {
    features.iter().map(Tensor::shallow_clone).collect()
}

fn outcome(tree: &TokenTree, verdict: &Verdict) -> RoundOutcome {
    RoundOutcome {
        guesses: tree.len() - 1,
        depth: tree.topology().depth(),
        tokens: verdict.tokens.len(),
        accepted: verdict.sources.iter().filter(|source| **source == Source::Accepted).count(),
    }
}
