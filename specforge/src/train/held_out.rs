//! Evaluation on held-out documents. They are packed and counted once; the ranks take the micro-batches in turn.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::ahead::Ahead;
use super::metrics::Window;
use super::order::DataOrder;
use super::parts::Split;
use crate::data::PackedBatch;
use crate::dist::ProcessGroup;
use crate::draft::{DraftModel, RowPlan, StepKey, add_counts};
use crate::error::Result;
use crate::features::FeatureSource;

/// The held-out documents of a rank.
pub(super) struct HeldOut {
    /// Micro-batches of this rank, planned alike for every evaluation.
    own: Vec<(Arc<PackedBatch>, RowPlan)>,
    /// Micro-batches of the rank that has most.
    rounds: usize,
    /// Trained rows of each loss term, over the micro-batches of all ranks.
    counts: Vec<f64>,
}

impl HeldOut {
    pub(super) fn new(
        documents: &Split<'_>,
        micro_batch_tokens: usize,
        draft: &dyn DraftModel,
        group: &ProcessGroup,
    ) -> Result<Self> {
        let order = DataOrder::new(documents.lengths(), micro_batch_tokens, micro_batch_tokens, 0)?;
        let parts = order.in_order();
        let (mut own, mut counts) = (Vec::new(), Vec::new());
        for (index, part) in parts.iter().enumerate() {
            let batch = documents.batch(part);
            if index % group.world_size() == group.rank() {
                let plan = draft.plan(&batch, StepKey::EVALUATION)?;
                add_counts(&mut counts, &plan.counts);
                own.push((batch, plan));
            } else {
                add_counts(&mut counts, &draft.count(&batch, StepKey::EVALUATION)?);
            }
        }
        Ok(Self { own, rounds: parts.len().div_ceil(group.world_size()), counts })
    }

    pub(super) fn is_empty(&self) -> bool {
        self.rounds == 0
    }

    /// The draft's metrics on all documents; `None` where `stopped` said so before they were through. Every rank must call
    /// this, and `stopped` must say the same on all. Features of `prefetch` micro-batches are on their way meanwhile.
    pub(super) fn evaluate(
        &self,
        draft: &dyn DraftModel,
        (source, prefetch): (&dyn FeatureSource, usize),
        group: &ProcessGroup,
        mut stopped: impl FnMut() -> Result<bool>,
    ) -> Result<Option<BTreeMap<String, f64>>> {
        if self.is_empty() {
            return Ok(Some(BTreeMap::new()));
        }
        let mut window = Window::default();
        let mut ahead = Ahead::new(source, draft.capture(), prefetch);
        for round in 0..self.rounds {
            if stopped()? {
                return Ok(None);
            }
            if let Some(features) = ahead.take(round..self.own.len(), |&part| Arc::clone(&self.own[part].0)) {
                window.add(&draft.evaluate(&features.wait()?, &self.own[round].1, &self.counts)?);
            }
        }
        Ok(Some(window.take(draft, group)?.into_iter().collect()))
    }
}
