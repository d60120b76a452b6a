//! What a target hands to a draft: hidden states of packed documents.
//!
//! Whether the target runs in the loop (`online`), its states are kept from an earlier epoch (`remembered`) or were
//! written to disk before (`store`, `stored`) is invisible behind [`FeatureSource`]: the trainer and the drafts see
//! [`FeatureBatch`] alone.
//!
//! A capture fills a store from such a source, too: the target that runs here (`online`), one that a serving engine runs
//! (`served`), or files that other trainers wrote (`imported`). What comes from elsewhere is made what the target would give,
//! and believed only where the target's own head agrees (`recognition`).
//!
//! Features are asked for with [`FeatureSource::begin`] and awaited with [`Pending::wait`]. What lies between the two is
//! the source's business: a thread that reads (`worker`), or nothing at all where whoever waits computes them.

use std::sync::Arc;

use tch::Tensor;

use crate::data::PackedBatch;
use crate::error::Result;

pub mod imported;
pub mod online;
mod page_locked;
pub mod pending;
pub mod recognition;
pub mod remembered;
pub mod scales;
pub mod served;
mod states_file;
pub mod store;
pub mod stored;
mod worker;

pub use imported::ImportedFeatures;
pub use online::OnlineFeatures;
pub use pending::Pending;
pub use recognition::Recognition;
pub use remembered::RememberedFeatures;
pub use scales::{PackedPictures, ScaleFeatures};
pub use served::ServedFeatures;
pub use stored::StoredFeatures;

/// One packed batch with the target's hidden states. `T` counts the tokens of all its documents.
#[derive(Debug)]
pub struct FeatureBatch {
    /// Tokens, supervision and document boundaries, on the host.
    pub batch: Arc<PackedBatch>,
    /// One `[T, H]` for each captured index, in the order the draft asked for.
    pub hidden: Vec<Tensor>,
    /// What a store noted of the target's predictions, where it did.
    pub whole_vocabulary: Option<WholeVocabulary>,
}

/// What a target says of all its tokens behind each token of a batch, on the host. A draft with a vocabulary of its own needs
/// no more of the others.
#[derive(Debug, Default)]
pub struct WholeVocabulary {
    /// The likeliest token, `[T]`.
    pub likeliest: Vec<i64>,
    /// Logarithm of the sum of exponentials of all logits, `[T]`.
    pub log_sum_exp: Vec<f32>,
}

impl FeatureBatch {
    /// A batch with hidden states alone.
    pub fn new(batch: Arc<PackedBatch>, hidden: Vec<Tensor>) -> Self {
        Self { batch, hidden, whole_vocabulary: None }
    }
}

/// Where features come from.
pub trait FeatureSource {
    /// Asks for the hidden states of a batch, by Hugging Face's `hidden_states` index. What goes wrong is an error of
    /// [`Pending::wait`]. What was asked for first is made first; what nobody awaits is dropped with its [`Pending`].
    fn begin(&self, batch: Arc<PackedBatch>, capture: &[usize]) -> Pending<'_>;
    /// The hidden states of a batch, at once.
    fn features(&self, batch: Arc<PackedBatch>, capture: &[usize]) -> Result<FeatureBatch> {
        self.begin(batch, capture).wait()
    }
    /// How many batches should be asked for before the first is awaited: as many as are made at once.
    fn ahead(&self) -> usize {
        1
    }
    /// Whether a document costs less the second time, so that it should always come to the same rank.
    fn remembers(&self) -> bool {
        false
    }
}

impl FeatureSource for Box<dyn FeatureSource> {
    fn begin(&self, batch: Arc<PackedBatch>, capture: &[usize]) -> Pending<'_> {
        self.as_ref().begin(batch, capture)
    }

    fn ahead(&self) -> usize {
        self.as_ref().ahead()
    }

    fn remembers(&self) -> bool {
        self.as_ref().remembers()
    }
}
