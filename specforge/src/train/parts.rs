//! What a run is made of: documents, draft, features, and where its results go.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::Value;

use super::TrainConfig;
use crate::checkpoint::{CheckpointStore, Inputs, Versions};
use crate::data::{self, PackedBatch, TokenCache};
use crate::dist::{ParallelConfig, ProcessGroup};
use crate::draft::DraftModel;
use crate::error::Result;
use crate::features::FeatureSource;
use crate::optim::OptimConfig;
use crate::stop::Stop;
use crate::tracking::Tracker;

/// Documents of one split.
pub struct Split<'a> {
    /// The tokens.
    pub cache: &'a TokenCache,
    /// Which documents of the cache belong to the split.
    pub documents: Vec<usize>,
}

impl Split<'_> {
    pub(super) fn lengths(&self) -> Vec<usize> {
        self.documents.iter().map(|&document| self.cache.document(document).tokens.len()).collect()
    }

    /// Tokens of some documents.
    pub(super) fn tokens(&self, indices: &[usize]) -> u64 {
        indices.iter().map(|&index| self.cache.length(self.documents[index]) as u64).sum()
    }

    /// Their names, for messages.
    pub(super) fn names(&self, indices: &[usize]) -> Vec<String> {
        indices.iter().map(|&index| self.cache.document(self.documents[index]).id.to_owned()).collect()
    }

    pub(super) fn batch(&self, indices: &[usize]) -> Arc<PackedBatch> {
        let documents: Vec<usize> = indices.iter().map(|&index| self.documents[index]).collect();
        Arc::new(data::assemble(self.cache, &documents))
    }
}

/// What a checkpoint records about the run beside its numbers.
#[derive(Debug, Clone)]
pub struct Provenance {
    /// The resolved configuration.
    pub configuration: Value,
    /// Versions of program and libraries.
    pub versions: Versions,
    /// Content hashes of the data.
    pub data_hashes: BTreeMap<String, String>,
    /// Everything the run reads, by content.
    pub inputs: Inputs,
}

/// Where a run leaves what it does.
#[derive(Debug)]
pub struct Writer {
    /// Where checkpoints go.
    pub store: CheckpointStore,
    /// Where metrics go.
    pub tracker: Tracker,
}

/// Everything the loop works with.
pub struct TrainerParts<'a> {
    /// `train` section.
    pub config: &'a TrainConfig,
    /// `optim` section.
    pub optim: &'a OptimConfig,
    /// The draft to train.
    pub draft: &'a dyn DraftModel,
    /// Where hidden states come from.
    pub source: &'a dyn FeatureSource,
    /// Training documents.
    pub train: Split<'a>,
    /// Held-out documents.
    pub eval: Split<'a>,
    /// The processes that train together.
    pub group: &'a ProcessGroup,
    /// `parallel` section.
    pub parallel: &'a ParallelConfig,
    /// What the first rank writes; the others write nothing.
    pub writer: Option<Writer>,
    /// What checkpoints record about the run.
    pub provenance: Provenance,
    /// Decodes with the draft as it is now, every so many steps; not at all at 0.
    pub decoding: (u64, Decoding<'a>),
    /// Whether the run is to stop.
    pub stop: &'a Stop,
}

/// Measures the draft by decoding with it. Every rank calls it and gets the same figures; none where a rank was asked to
/// stop meanwhile.
pub type Decoding<'a> = &'a dyn Fn(&dyn DraftModel) -> Result<Option<BTreeMap<String, f64>>>;

/// How often a guesser is right that always says the training split's commonest supervised token.
pub(super) fn commonest_token_share(train: &Split<'_>, eval: &Split<'_>) -> f64 {
    let counts = |split: &Split<'_>| data::all_supervised_counts(split.cache, &split.documents);
    let (train, eval) = (counts(train), counts(eval));
    // Equal counts: the lower id.
    let commonest = train.iter().enumerate().max_by_key(|(token, count)| (**count, std::cmp::Reverse(*token)));
    let seen = commonest.and_then(|(token, _)| eval.get(token)).copied().unwrap_or(0);
    seen as f64 / eval.iter().sum::<u64>().max(1) as f64
}
