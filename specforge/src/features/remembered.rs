//! Keeps every document's hidden states in memory, so that later epochs do not run the target again.
//!
//! Each document passes through the target alone, never in a pack: its states then depend on nothing but itself, and a
//! resumed run, which computes some of them anew, trains on the same bits.

use std::cell::RefCell;
use std::collections::HashMap;

use tch::Tensor;

use super::{FeatureBatch, FeatureSource};
use crate::data::PackedBatch;
use crate::error::Result;

/// A feature source with a memory. Holds `tokens x captured states x hidden size` numbers for the life of the run.
pub struct RememberedFeatures<Source> {
    source: Source,
    /// Captured states of each document, `[T, H]`, by its tokens.
    documents: RefCell<HashMap<Vec<i64>, Vec<Tensor>>>,
}

impl<Source: FeatureSource> RememberedFeatures<Source> {
    /// Remembers what `source` gives.
    pub fn new(source: Source) -> Self {
        Self { source, documents: RefCell::default() }
    }
}

impl<Source: FeatureSource> FeatureSource for RememberedFeatures<Source> {
    fn features<'a>(&self, batch: &'a PackedBatch, capture: &[usize]) -> Result<FeatureBatch<'a>> {
        let mut parts: Vec<Vec<Tensor>> = capture.iter().map(|_| Vec::new()).collect();
        for alone in batch.each() {
            let ids = &alone.ids;
            if !self.documents.borrow().contains_key(ids) {
                let states = self.source.features(&alone, capture)?.hidden;
                self.documents.borrow_mut().insert(ids.clone(), states);
            }
            let documents = self.documents.borrow();
            let states = documents.get(ids).map_or(&[][..], Vec::as_slice);
            parts.iter_mut().zip(states).for_each(|(part, states)| part.push(states.shallow_clone()));
        }
        let hidden = parts.iter().map(|part| Tensor::cat(part, 0)).collect(); // [T, H]
        Ok(FeatureBatch { batch, hidden })
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use tch::{Device, Kind};

    use super::*;

    /// States that say which token they belong to and in which call they were made.
    struct Numbered(Cell<i64>);

    impl FeatureSource for Numbered {
        fn features<'a>(&self, batch: &'a PackedBatch, capture: &[usize]) -> Result<FeatureBatch<'a>> {
            self.0.set(self.0.get() + 1);
            let rows = batch.ids.len() as i64;
            let states = |&index: &usize| {
                let column = |value: f64| Tensor::full([rows, 1], value, (Kind::Float, Device::Cpu));
                let ids = Tensor::from_slice(&batch.ids).to_kind(Kind::Float).unsqueeze(1);
                Tensor::cat(&[ids, column(index as f64), column(self.0.get() as f64)], 1)
            };
            Ok(FeatureBatch { batch, hidden: capture.iter().map(states).collect() })
        }
    }

    fn pack(documents: &[&[i64]]) -> PackedBatch {
        let ids = documents.concat();
        PackedBatch {
            positions: documents.iter().flat_map(|document| 0..document.len() as i64).collect(),
            supervised: vec![true; ids.len()],
            lengths: documents.iter().map(|document| document.len() as i64).collect(),
            documents: documents.iter().map(|document| format!("{document:?}")).collect(),
            ids,
        }
    }

    #[test]
    fn each_document_is_computed_once_and_alone() {
        let source = RememberedFeatures::new(Numbered(Cell::new(0)));
        let (a, b, c): (&[i64], &[i64], &[i64]) = (&[1, 2], &[3], &[4, 5, 6]);
        let rows = |batch: &PackedBatch| {
            let features = source.features(batch, &[7, 9]).unwrap();
            features
                .hidden
                .iter()
                .map(|states| Vec::<f32>::try_from(states.flatten(0, -1)).unwrap())
                .collect::<Vec<_>>()
        };
        assert_eq!(rows(&pack(&[a, b]))[0], [1., 7., 1., 2., 7., 1., 3., 7., 2.]);
        let later = rows(&pack(&[b, c, a]));
        assert_eq!(later[0], [3., 7., 2., 4., 7., 3., 5., 7., 3., 6., 7., 3., 1., 7., 1., 2., 7., 1.]);
        assert_eq!(later[1][..3], [3., 9., 2.]);
        assert_eq!(source.source.0.get(), 3);
    }
}
