//! A draft that is a small model with its own cache, and reads the target's features: what a seeded fault of a draft
//! needs.

use tch::{Kind, Tensor};

use crate::decode::drafter::{Context, Drafter, Joining, Progress, last};
use crate::decode::fault::{Fault, active};
use crate::decode::policy::Proposal;
use crate::error::Result;
use crate::models::llama::LlamaTarget;
use crate::models::{ForwardInput, LogitRows, TargetModel};
use crate::nn::{AttentionMask, KvCache};
use crate::tree::TokenTree;

/// Parent and rank of each guess.
pub(super) type Shape = &'static [(usize, usize)];

/// A tree whose second guess goes on before its first does: accepted slots lie close together and far apart.
pub(super) const FORKED: Shape = &[(0, 0), (0, 1), (2, 0), (1, 0), (1, 1), (4, 0), (3, 0), (6, 0)];

struct Row {
    cache: KvCache,
    /// Of the last token before the root, and of the one before it, `[2, H]`.
    features: Tensor,
}

pub(super) struct Small<'a> {
    model: &'a LlamaTarget,
    target: &'a LlamaTarget,
    shape: Shape,
    rows: Vec<Row>,
}

impl<'a> Small<'a> {
    pub(super) fn new(model: &'a LlamaTarget, target: &'a LlamaTarget, shape: Shape) -> Self {
        Self { model, target, shape, rows: Vec::new() }
    }

    /// Logits behind the last of some tokens that follow the cache; lengths stay. `[V]`
    fn run(&self, cache: &mut KvCache, tokens: &[u32]) -> Result<Tensor> {
        let ids: Vec<i64> = tokens.iter().map(|&token| i64::from(token)).collect();
        // A shift of everything would not show: rotary positions are relative. The prompt stands where it should.
        let shifted = active(Fault::DraftPositionsShifted) && !cache.is_empty();
        let first = cache.len() + i64::from(shifted);
        let ids = Tensor::from_slice(&ids).unsqueeze(0); // [1, T]
        let positions = Tensor::arange_start(first, first + tokens.len() as i64, (Kind::Int64, tch::Device::Cpu));
        let end = Tensor::from_slice(&[tokens.len() as i64 - 1]);
        let (mask, logits) = (&AttentionMask::Causal, LogitRows::Rows(&end));
        let input = ForwardInput { ids: &ids, positions: &positions.unsqueeze(0), mask, capture: &[], logits };
        Ok(self.model.forward(&input, Some(cache))?.logits.unwrap().get(0))
    }

    fn guess(&self, row: &mut Row, context: &Context<'_>) -> Result<Proposal> {
        // What the target's last feature says beside the draft's own logits.
        let feature = row.features.get(if active(Fault::DraftFeaturesShifted) { 0 } else { 1 });
        let hint = self.target.head().weight.matmul(&feature) * 0.05; // [V]
        let mut tree = TokenTree::root(last(context.tokens));
        let mut scores = vec![0.0];
        let mut best: Vec<Option<Vec<(u32, f64)>>> = vec![None];
        for &(parent, rank) in self.shape {
            if best[parent].is_none() {
                let path: Vec<u32> = tree.topology().path(parent).into_iter().map(|node| tree.tokens()[node]).collect();
                let logits = (self.run(&mut row.cache, &path)? + &hint).log_softmax(-1, Kind::Double);
                let (values, tokens) = logits.topk(2, -1, true, true);
                let (values, tokens) = (Vec::<f64>::try_from(values)?, Vec::<i64>::try_from(tokens)?);
                best[parent] = Some(tokens.into_iter().map(|token| token as u32).zip(values).collect());
            }
            let (token, score) = best[parent].as_ref().unwrap()[rank];
            tree.push(parent, token);
            scores.push(scores[parent] + score);
            best.push(None);
        }
        if active(Fault::DraftNotRolledBack) {
            row.cache.advance(&[1]);
        }
        Ok(Proposal::picked(tree, scores))
    }
}

impl Drafter for Small<'_> {
    fn capture(&self) -> Vec<usize> {
        vec![2]
    }

    fn join(&mut self, rows: &[Joining<'_>]) -> Result<()> {
        for row in rows {
            let seen = &row.tokens[..row.tokens.len() - 1];
            let mut cache = self.model.new_cache(1, 32);
            let _ = self.run(&mut cache, seen)?;
            cache.advance(&[seen.len() as i64]);
            let features = &row.features[0];
            let end = features.size()[0];
            let features = Tensor::stack(&[features.get((end - 2).max(0)), features.get(end - 1)], 0); // [2, H]
            self.rows.push(Row { cache, features });
        }
        Ok(())
    }

    fn propose(&mut self, rows: &[Context<'_>]) -> Result<Vec<Proposal>> {
        let mut own = std::mem::take(&mut self.rows);
        let proposals = own.iter_mut().zip(rows).map(|(row, context)| self.guess(row, context)).collect();
        self.rows = own;
        proposals
    }

    fn commit(&mut self, rows: &[Progress<'_>]) -> Result<()> {
        let mut own = std::mem::take(&mut self.rows);
        for (row, progress) in own.iter_mut().zip(rows) {
            let end = progress.tokens.len() - 1;
            let mut new = progress.tokens[end - progress.new..end].to_vec();
            if active(Fault::DraftStale) {
                // Whatever was chosen, the cache keeps what was guessed first.
                new.iter_mut().skip(1).for_each(|token| *token = (*token + 1) % 64);
            }
            let _ = self.run(&mut row.cache, &new)?;
            row.cache.advance(&[new.len() as i64]);
            let all = Tensor::cat(&[&row.features, &progress.features[0]], 0);
            row.features = all.narrow(0, all.size()[0] - 2, 2);
        }
        self.rows = own;
        Ok(())
    }

    fn retain(&mut self, rows: &[usize]) {
        let mut old: Vec<Option<Row>> = std::mem::take(&mut self.rows).into_iter().map(Some).collect();
        self.rows = rows.iter().filter_map(|&row| old[row].take()).collect();
        if active(Fault::DraftRowsMixed) {
            self.rows.reverse();
        }
    }

    fn cache_lengths(&self) -> Vec<i64> {
        self.rows.iter().map(|row| row.cache.len()).collect()
    }
}
