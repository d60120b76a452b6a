//! Features of the micro-batches to come, asked for while the one before is trained on.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::data::PackedBatch;
use crate::features::{FeatureSource, Pending};

/// Micro-batches whose features were asked for and are not awaited yet, by what names them.
pub(super) struct Ahead<'a, Name> {
    source: &'a dyn FeatureSource,
    capture: Vec<usize>,
    /// How many are on their way beside the one that is waited for.
    most: usize,
    asked: VecDeque<(Name, Pending<'a>)>,
}

impl<'a, Name: PartialEq> Ahead<'a, Name> {
    pub(super) fn new(source: &'a dyn FeatureSource, capture: Vec<usize>, most: usize) -> Self {
        Self { source, capture, most, asked: VecDeque::new() }
    }

    /// The features of the first of those that are coming. The next ones are asked for too, in their order; `batch` packs
    /// one. What was asked for and does not come is dropped.
    pub(super) fn take(
        &mut self,
        coming: impl Iterator<Item = Name>,
        mut batch: impl FnMut(&Name) -> Arc<PackedBatch>,
    ) -> Option<Pending<'a>> {
        let source: &'a dyn FeatureSource = self.source;
        let mut still_wanted = 0;
        for (place, name) in coming.take(1 + self.most).enumerate() {
            still_wanted = place + 1;
            if self.asked.get(place).is_some_and(|(asked, _)| *asked == name) {
                continue;
            }
            self.asked.truncate(place);
            let pending = source.begin(batch(&name), &self.capture);
            self.asked.push_back((name, pending));
        }
        self.asked.truncate(still_wanted);
        self.asked.pop_front().map(|(_, pending)| pending)
    }
}
