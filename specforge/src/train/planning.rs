//! An optimizer step before anything is computed: this rank's micro-batches with the draft's plans, and what the losses of
//! the whole step are divided by.
//!
//! A micro-batch is planned once. Of the documents that other ranks train, only the counts are needed.

use std::collections::HashSet;

use super::order::GlobalBatch;
use super::parts::Split;
use crate::draft::{DraftModel, RowPlan, StepKey, add_counts};
use crate::error::Result;

/// What this rank does in a step.
pub(super) struct PlannedStep {
    /// The plan of each of its micro-batches.
    pub(super) plans: Vec<RowPlan>,
    /// Counts of each loss term over the documents of all ranks.
    pub(super) counts: Vec<f64>,
}

impl PlannedStep {
    /// Plans this rank's micro-batches `own` of a global batch. No rank waits for another.
    pub(super) fn new(
        batch: &GlobalBatch,
        own: &[Vec<usize>],
        split: &Split<'_>,
        (draft, key): (&dyn DraftModel, StepKey),
    ) -> Result<Self> {
        let taken: HashSet<usize> = own.iter().flatten().copied().collect();
        let others: Vec<usize> = batch.iter().copied().filter(|document| !taken.contains(document)).collect();
        let (mut plans, mut counts) = (Vec::with_capacity(own.len()), Vec::new());
        for documents in own {
            let plan = draft.plan(&split.batch(documents), key)?;
            add_counts(&mut counts, &plan.counts);
            plans.push(plan);
        }
        if !others.is_empty() {
            add_counts(&mut counts, &draft.count(&split.batch(&others), key)?);
        }
        Ok(Self { plans, counts })
    }
}
