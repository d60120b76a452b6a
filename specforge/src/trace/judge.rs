//! The third opinion: the target once more, over the whole text at once and without a cache.
//!
//! Where a recorded row is not the target's, the pass it came from is repeated with the mistakes that trees invite, one
//! after the other: a node that sees too little or too much, a position that does not count depth. The one that gives the
//! recorded row to the last digit is named.

use tch::{Device, Kind, Tensor};

use super::file::RoundRecord;
use super::finding::Kind as Name;
use crate::decode::drafter::{Context, Drafter, Joining};
use crate::decode::policy::Proposal;
use crate::error::{Error, Result};
use crate::models::{ForwardInput, ForwardOutput, LogitRows, TargetModel};
use crate::nn::AttentionMask;

/// Makes a drafter that has seen nothing yet.
pub type NewDrafter<'a> = &'a dyn Fn() -> Result<Box<dyn Drafter + 'a>>;

/// A target to ask, and a draft where one is there.
pub struct Judge<'a> {
    /// The target of both traces.
    pub target: &'a dyn TargetModel,
    /// Makes the drafter of both traces; without it, draft findings stay undecided.
    pub drafter: Option<NewDrafter<'a>>,
}

/// A way to run a tree wrongly.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Mistake {
    None,
    Shifted(i64),
    Flat,
    ByNode,
    Orphaned,
    Siblings,
    EverythingBefore,
}

const MISTAKES: [(Mistake, Name, &str); 7] = [
    (Mistake::Shifted(1), Name::Positions, "of a tree that stands one position further"),
    (Mistake::Shifted(-1), Name::Positions, "of a tree that stands one position before its own"),
    (Mistake::Flat, Name::Positions, "of a tree whose nodes all stand at the root's position"),
    (Mistake::ByNode, Name::Positions, "of a tree whose positions count nodes, not depth"),
    (Mistake::Orphaned, Name::Mask, "of a tree whose nodes do not see their parents"),
    (Mistake::Siblings, Name::Mask, "of a tree whose nodes see their siblings"),
    (Mistake::EverythingBefore, Name::Mask, "of a tree whose nodes see every node before them"),
];

impl Judge<'_> {
    /// Rows behind the tokens from `first` on, each `[V]`.
    pub(super) fn rows(&self, tokens: &[u32], first: usize) -> Result<Vec<Vec<f64>>> {
        let ids: Vec<i64> = tokens.iter().map(|&token| i64::from(token)).collect();
        let positions: Vec<i64> = (0..ids.len() as i64).collect();
        let wanted: Vec<i64> = (first as i64..ids.len() as i64).collect();
        split(&self.forward(&ids, &positions, &AttentionMask::Causal, &wanted, &[])?)
    }

    /// Why a recorded row is not the target's row at its node; nothing where it is, in a pass of the tree's own shape.
    pub(super) fn explain(
        &self,
        committed: &[u32],
        round: &RoundRecord,
        slot: usize,
        recorded: &[f64],
        tolerance: f64,
    ) -> Result<Option<(Name, String)>> {
        let is_it = |row: &[f64]| row.iter().zip(recorded).all(|(a, b)| a == b || (a - b).abs() <= tolerance);
        let right = self.tree(committed, round, Mistake::None)?;
        if right.get(slot).is_some_and(|row| is_it(row)) {
            return Ok(None);
        }
        if let Some(other) = right.iter().position(|row| is_it(row)) {
            return Ok(Some((
                Name::WrongSlot,
                format!("the recorded row is that of slot {other}, not of slot {slot}"),
            )));
        }
        for (mistake, name, text) in MISTAKES {
            let rows = self.tree(committed, round, mistake)?;
            if rows.get(slot).is_some_and(|row| is_it(row)) {
                return Ok(Some((name, format!("the recorded row is that of slot {slot} {text}"))));
            }
        }
        Ok(Some(match slot {
            0 => (
                Name::CacheContents,
                "the root's row is wrong: what it sees of the cache is not the committed text".to_owned(),
            ),
            _ => (Name::TreePass, format!("the row of slot {slot} fits no mask and no positions that were tried")),
        }))
    }

    /// The slot whose row chooses as the record says, by `chooses`.
    pub(super) fn slot_that(
        &self,
        committed: &[u32],
        round: &RoundRecord,
        chooses: &dyn Fn(&[f64]) -> bool,
    ) -> Result<Option<usize>> {
        Ok(self.tree(committed, round, Mistake::None)?.iter().position(|row| chooses(row)))
    }

    /// Rows of all nodes of a tree behind `committed` tokens, whose last one is the root.
    fn tree(&self, committed: &[u32], round: &RoundRecord, mistake: Mistake) -> Result<Vec<Vec<f64>>> {
        let Some(depths) = round.depths() else { return Ok(Vec::new()) };
        let (past, nodes) = (committed.len() - 1, depths.len());
        let all = past + nodes;
        let mut ids: Vec<i64> = committed[..past].iter().map(|&token| i64::from(token)).collect();
        ids.extend(round.tokens.iter().map(|&token| i64::from(token)));
        let mut positions: Vec<i64> = (0..past as i64).collect();
        positions.extend(depths.iter().enumerate().map(|(node, &depth)| {
            let offset = match mistake {
                Mistake::Flat => 0,
                Mistake::ByNode => node as i64,
                Mistake::Shifted(by) => depth as i64 + by,
                _ => depth as i64,
            };
            (past as i64 + offset).max(0)
        }));
        let mut mask = vec![false; all * all];
        for token in 0..past {
            mask[token * all..=token * all + token].fill(true);
        }
        for node in 0..nodes {
            let parent = round.parents[node];
            let row = &mut mask[(past + node) * all..][..all];
            row[..past].fill(true);
            if node > 0 {
                let ancestors = std::iter::successors(Some(parent), |&at| (at != 0).then(|| round.parents[at]));
                ancestors.for_each(|ancestor| row[past + ancestor] = true);
                match mistake {
                    Mistake::Orphaned => row[past + parent] = false,
                    Mistake::Siblings => round.children(parent).for_each(|other| row[past + other] = true),
                    Mistake::EverythingBefore => row[past..past + node].fill(true),
                    _ => {}
                }
            }
            row[past + node] = true;
        }
        let device = self.target.device();
        let mask = Tensor::from_slice(&mask).view([1, all as i64, all as i64]).to_device(device); // [1, T, T]
        let wanted: Vec<i64> = (past as i64..all as i64).collect();
        split(&self.forward(&ids, &positions, &AttentionMask::Visible(mask), &wanted, &[])?)
    }

    /// What a drafter that has seen nothing but these tokens proposes.
    pub(super) fn proposal(&self, tokens: &[u32], depth: usize, key: u64) -> Result<Option<Proposal>> {
        let Some(new) = self.drafter else { return Ok(None) };
        let _guard = tch::no_grad_guard();
        let mut drafter = new()?;
        let ids: Vec<i64> = tokens[..tokens.len() - 1].iter().map(|&token| i64::from(token)).collect();
        let positions: Vec<i64> = (0..ids.len() as i64).collect();
        let output = self.forward(&ids, &positions, &AttentionMask::Causal, &[], &drafter.capture())?;
        let features = output.hidden.iter().map(|layer| layer.get(0)).collect(); // [P, H]
        drafter.join(&[Joining { tokens, features }])?;
        // A draft that was recorded has the temperature that it was opened with.
        let mut proposals = drafter.propose(&[Context { tokens, depth, key, temperature: 0.0 }])?;
        Ok(proposals.pop().map(|proposal| proposal.cut(depth)))
    }

    fn forward(
        &self,
        ids: &[i64],
        positions: &[i64],
        mask: &AttentionMask,
        wanted: &[i64],
        capture: &[usize],
    ) -> Result<ForwardOutput> {
        let vocabulary = self.target.info().vocab_size;
        if let Some(id) = ids.iter().find(|&&id| id >= vocabulary) {
            let problem = format!("a trace has token {id}; the target's vocabulary has {vocabulary}");
            return Err(Error::Usage(problem));
        }
        let _guard = tch::no_grad_guard();
        let device = self.target.device();
        let shaped = |values: &[i64]| Tensor::from_slice(values).unsqueeze(0).to_device(device); // [1, T]
        let (ids, positions) = (shaped(ids), shaped(positions));
        let wanted = Tensor::from_slice(wanted).to_device(device);
        let logits = if wanted.numel() == 0 { LogitRows::None } else { LogitRows::Rows(&wanted) };
        self.target.forward(&ForwardInput { ids: &ids, positions: &positions, mask, capture, logits }, None)
    }
}

fn split(output: &ForwardOutput) -> Result<Vec<Vec<f64>>> {
    let missing = || Error::Failed("the target returned no logits although they were asked for".to_owned());
    let logits = output.logits.as_ref().ok_or_else(missing)?.to_device(Device::Cpu).to_kind(Kind::Double);
    (0..logits.size()[0]).map(|row| Ok(Vec::try_from(logits.get(row))?)).collect()
}
