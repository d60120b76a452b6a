//! The draft's part of a comparison: behind the same text the same draft guesses the same.

use super::compare::Run;
use super::file::{RequestTrace, RoundRecord, Settings};
use super::finding::{Kind, Side};
use super::metrics::Real;
use crate::error::Result;

impl Run<'_, '_> {
    /// Trees behind the same text must be the same, where both drafted alike: faults that cost acceptance alone show here.
    pub(super) fn draft(&mut self) -> Result<()> {
        let (left, right) = (&self.a.header, &self.b.header);
        let alike = |x: &Settings, y: &Settings| (&x.drafter, &x.tree, x.policy) == (&y.drafter, &y.tree, y.policy);
        if left.draft != right.draft || left.dtype != right.dtype || !alike(&left.settings, &right.settings) {
            return Ok(());
        }
        for a in &self.a.requests {
            let Some(b) = self.b.request(a.prompt.tag) else { continue };
            if (a.prompt.limit, a.prompt.key) != (b.prompt.limit, b.prompt.key) {
                continue;
            }
            for round in &a.rounds {
                let Some(other) = b.rounds.iter().find(|other| other.committed == round.committed) else { continue };
                let before = a.before(round.committed);
                if before.len() != round.committed || before != b.before(round.committed) {
                    break;
                }
                let Some((kind, text)) = other_guesses(round, other) else { continue };
                let side = self.judge_draft(a, round, other, &before)?;
                self.find(kind, side, (a, round.committed), format!("round {} of A: {text}", round.round));
                break;
            }
        }
        Ok(())
    }

    fn judge_draft(
        &self,
        request: &RequestTrace,
        a: &RoundRecord,
        b: &RoundRecord,
        before: &[u32],
    ) -> Result<Option<Side>> {
        let Some(judge) = self.judge else { return Ok(None) };
        let done = before.len() - request.prompt.tokens.len();
        let depth = request.prompt.limit.saturating_sub(done + 1);
        let Some(fresh) = judge.proposal(before, depth, request.prompt.key)? else { return Ok(None) };
        let fresh = RoundRecord {
            tokens: fresh.tree.tokens().to_vec(),
            parents: fresh.tree.topology().parents().to_vec(),
            scores: fresh.scores.into_iter().map(Real).collect(),
            ..a.clone()
        };
        Ok(match (other_guesses(&fresh, a).is_some(), other_guesses(&fresh, b).is_some()) {
            (false, true) => Some(Side::B),
            (true, false) => Some(Side::A),
            // Neither is what a fresh draft guesses: the draft may remember more than the text.
            _ => None,
        })
    }
}

/// How far scores of one draft may be apart.
const SCORE_TOLERANCE: f64 = 1e-4;

/// How two trees behind the same text differ. Nodes are told apart by their path; a guess that only one has is no
/// difference where its score is the lowest of both up to rounding.
fn other_guesses(a: &RoundRecord, b: &RoundRecord) -> Option<(Kind, String)> {
    let guesses = |round: &RoundRecord| -> Option<std::collections::BTreeMap<Vec<u32>, f64>> {
        round.depths()?;
        let mut paths: Vec<Vec<u32>> = Vec::new();
        for (node, &token) in round.tokens.iter().enumerate() {
            let mut path = if node == 0 { Vec::new() } else { paths[round.parents[node]].clone() };
            path.push(token);
            paths.push(path);
        }
        Some(paths.into_iter().zip(round.scores.iter().map(|score| score.0)).collect())
    };
    let (left, right) = (guesses(a)?, guesses(b)?);
    let apart = |x: f64, y: f64| x != y && (x - y).abs() > SCORE_TOLERANCE * x.abs().max(1.0);
    let least =
        |guesses: &std::collections::BTreeMap<Vec<u32>, f64>| guesses.values().copied().fold(f64::INFINITY, f64::min);
    for (own, other, name) in [(&left, &right, "A"), (&right, &left, "B")] {
        for (path, &score) in own.iter() {
            match other.get(path) {
                Some(&theirs) if apart(score, theirs) => {
                    let text = format!("the draft scores {path:?} by {score:.6} in one and {theirs:.6} in the other");
                    return Some((Kind::DraftScores, text));
                }
                None if apart(score, least(other)) || own.len() != other.len() => {
                    return Some((
                        Kind::DraftTree,
                        format!("only {name} guesses {path:?}, with a score of {score:.6}"),
                    ));
                }
                _ => {}
            }
        }
    }
    None
}
