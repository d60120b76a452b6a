//! The engine's part of `fault`: where a mistake changes what the engine computes, keeps or tells.

use super::*;
use crate::decode::drafter::last;
use crate::decode::event::Source;
use crate::decode::fault::{Fault, active};
use crate::decode::policy::Rows;
use crate::nn::TreeMask;
use crate::tree::TokenTree;
use tch::Kind;

/// Cache lengths that the pass believes in.
pub(super) fn lengths(lengths: Vec<i64>) -> Vec<i64> {
    let longest = lengths.iter().copied().max().unwrap_or(0);
    if active(Fault::RaggedLength) { vec![longest; lengths.len()] } else { lengths }
}

pub(super) fn positions(mut positions: Vec<i64>, nodes: usize, lengths: &[i64]) -> Vec<i64> {
    for (line, &length) in positions.chunks_exact_mut(nodes).zip(lengths) {
        if active(Fault::PositionsWithoutDepth) {
            line.fill(length);
        }
        if active(Fault::PositionsShifted) {
            line.iter_mut().for_each(|position| *position += 1);
        }
    }
    positions
}

pub(super) fn mask(mask: AttentionMask, proposals: &[Proposal]) -> AttentionMask {
    let AttentionMask::Tree(TreeMask { seen, .. }) = &mask else { return mask };
    for (row, proposal) in proposals.iter().enumerate() {
        let parents = proposal.tree.topology().parents();
        for node in 1..proposal.tree.len() {
            let set = |other: usize, value: i64| {
                let _ = seen.get(row as i64).get(node as i64).get(other as i64).fill_(value);
            };
            if active(Fault::DroppedParent) {
                set(parents[node], 0);
            }
            if active(Fault::SeesSiblings) {
                (1..proposal.tree.len())
                    .filter(|&other| parents[other] == parents[node])
                    .for_each(|other| set(other, 1));
            }
        }
    }
    mask
}

pub(super) fn places(mut places: Vec<Vec<i64>>, proposals: &[Proposal]) -> Vec<Vec<i64>> {
    for (row, proposal) in places.iter_mut().zip(proposals) {
        if active(Fault::NoRollback) {
            *row = (0..proposal.tree.len() as i64).collect();
        }
        if active(Fault::CompactionByDepth) {
            *row = (0..row.len() as i64).collect();
        }
        if active(Fault::PendingOmitted) {
            row.remove(0);
        }
    }
    places
}

pub(super) fn limits(limits: Limits<'_>) -> Limits<'_> {
    if active(Fault::StopIgnored) { Limits { stop: &[], ..limits } } else { limits }
}

pub(super) fn verdict(
    mut verdict: Verdict,
    tree: &TokenTree,
    limits: Limits<'_>,
    rows: &mut TargetRows<'_>,
) -> Result<Verdict> {
    let (node, end) = (verdict.path[verdict.path.len() - 1], verdict.tokens.len() - 1);
    let child = tree.topology().children(node).next();
    if let Some(child) = child.filter(|_| {
        let wrong = active(Fault::OneTooMany) && verdict.sources[end] == Source::Correction;
        wrong && limits.tokens > end + 1 && !limits.stop.contains(&verdict.tokens[end])
    }) {
        verdict.tokens[end] = tree.tokens()[child];
        verdict.sources[end] = Source::Accepted;
        verdict.path.push(child);
        verdict.tokens.push(rows.greedy(&verdict.path)?);
        let guessed = tree.topology().children(child).next().is_some();
        verdict.sources.push(if guessed { Source::Correction } else { Source::Bonus });
    }
    Ok(verdict)
}

/// What is told of a committed token.
pub(super) fn told(raw: Option<Tensor>, source: Source, by_depth: impl Fn() -> Tensor) -> (Option<Tensor>, Source) {
    let raw = raw.map(|raw| match () {
        () if active(Fault::RowByDepth) => by_depth(),
        () if active(Fault::RecordedHalf) => raw.to_kind(Kind::Half),
        () => raw,
    });
    let wrong = active(Fault::SourceLabel) && source == Source::Correction;
    (raw, if wrong { Source::Accepted } else { source })
}

pub(super) fn untold(offset: usize) -> bool {
    active(Fault::Untold) && offset == 1
}

impl Engine<'_> {
    /// Runs one more token of each row.
    fn seeded_run(&self, tokens: &[u32], cache: &mut KvCache) -> Result<()> {
        let ids: Vec<i64> = tokens.iter().map(|&token| i64::from(token)).collect();
        let positions = cache.lengths().to_vec();
        let shape = (tokens.len(), 1);
        self.forward((&ids, &positions), shape, &AttentionMask::Causal, LogitRows::None, cache)?;
        cache.advance(&vec![1; tokens.len()]);
        Ok(())
    }

    pub(super) fn seeded_prefill(&self, rows: &[Row], cache: &mut KvCache) -> Result<()> {
        match active(Fault::PromptTokenTwice) {
            true => self.seeded_run(&rows.iter().map(|row| last(&row.tokens)).collect::<Vec<_>>(), cache),
            false => Ok(()),
        }
    }

    /// Behind the cache's own `keep`.
    pub(super) fn seeded_keep(&mut self, places: &[Vec<i64>], verdicts: &[Result<Verdict>]) -> Result<()> {
        let Some(mut cache) = self.cache.take() else { return Ok(()) };
        let ends = cache.lengths().to_vec();
        for (row, (kept, &end)) in places.iter().zip(&ends).enumerate() {
            let count = kept.len() as i64;
            let slot = |index: i64| end - count + index;
            if active(Fault::CompactionOrder) {
                let (from, to): (Vec<i64>, Vec<i64>) =
                    (0..count).map(|index| (slot(count - 1 - index), slot(index))).unzip();
                cache.rearrange_values(row, &from, &to);
            }
            if active(Fault::CompactionOverlaps) {
                // A place that is already some later node's new slot holds that node by then.
                for index in (0..count).rev() {
                    if kept[index as usize] > index && kept[index as usize] < count {
                        cache.rearrange(row, &[slot(kept[index as usize])], &[slot(index)]);
                    }
                }
            }
        }
        if active(Fault::DoubleAdvance) {
            cache.pretend(&ends.iter().map(|end| end + 1).collect::<Vec<_>>());
        }
        if let [Ok(verdict)] = verdicts {
            let correction = verdict.sources.last() == Some(&Source::Correction);
            if active(Fault::CorrectionTwice) && correction {
                self.seeded_run(&verdict.tokens[verdict.tokens.len() - 1..], &mut cache)?;
            }
        }
        self.cache = Some(cache);
        Ok(())
    }
}
