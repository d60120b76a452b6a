//! An optimizer step before anything is computed: this rank's micro-batches with the draft's plans, and what the losses of
//! the whole step are divided by.
//!
//! A micro-batch is planned once. Of the documents that other ranks train, only the counts are needed.

use std::collections::HashSet;

use super::order::{DataOrder, GlobalBatch};
use super::parts::Split;
use crate::dist::ProcessGroup;
use crate::draft::{DraftModel, RowPlan, StepKey, add_counts};
use crate::error::Result;

/// What this rank does in a step.
pub(super) struct PlannedStep {
    /// The documents of its micro-batches, in order.
    pub(super) own: Vec<Vec<usize>>,
    /// A plan for each of them.
    pub(super) plans: Vec<RowPlan>,
    /// Counts of each loss term over the documents of all ranks.
    pub(super) counts: Vec<f64>,
}

impl PlannedStep {
    /// Plans the documents of a global batch. No rank waits for another.
    pub(super) fn new(
        batch: &GlobalBatch,
        (order, split): (&DataOrder, &Split<'_>),
        (draft, key): (&dyn DraftModel, StepKey),
        group: &ProcessGroup,
    ) -> Result<Self> {
        let own = order.micro_batches(batch, group.rank(), group.world_size());
        let taken: HashSet<usize> = own.iter().flatten().copied().collect();
        let others: Vec<usize> = batch.iter().copied().filter(|document| !taken.contains(document)).collect();
        let plans = own.iter().map(|documents| draft.plan(&split.batch(documents), key)).collect::<Result<Vec<_>>>()?;
        let mut counts = Vec::new();
        plans.iter().for_each(|plan| add_counts(&mut counts, &plan.counts));
        if !others.is_empty() {
            add_counts(&mut counts, &draft.count(&split.batch(&others), key)?);
        }
        Ok(Self { own, plans, counts })
    }
}
