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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Result;
    use crate::features::FeatureBatch;

    /// Gives what it is asked for.
    struct Echo;

    impl FeatureSource for Echo {
        fn begin(&self, batch: Arc<PackedBatch>, _: &[usize]) -> Pending<'_> {
            Pending::later(move || Ok(FeatureBatch::new(batch, Vec::new())))
        }
    }

    fn named(name: &i64) -> Arc<PackedBatch> {
        Arc::new(PackedBatch {
            ids: vec![*name],
            positions: vec![0],
            supervised: vec![false],
            lengths: vec![1],
            documents: Vec::new(),
        })
    }

    #[test]
    fn what_was_asked_for_and_does_not_come_is_dropped() -> Result<()> {
        let mut ahead = Ahead::new(&Echo, Vec::new(), 2);
        for coming in [vec![1, 2, 3], vec![2, 3], vec![7, 3, 8], vec![8], vec![9, 8]] {
            let pending = ahead.take(coming.iter().copied(), named).expect("something comes");
            assert_eq!(pending.wait()?.batch.ids, [coming[0]], "{coming:?}");
        }
        assert!(ahead.take(std::iter::empty(), named).is_none());
        Ok(())
    }
}
