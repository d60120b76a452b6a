//! What a target hands to a draft: hidden states of packed documents.
//!
//! Whether the target runs in the loop (`online`), its states are kept from an earlier epoch (`remembered`) or were
//! written to disk before (`store`, `stored`) is invisible behind [`FeatureSource`]: the trainer and the drafts see
//! [`FeatureBatch`] alone.

use tch::Tensor;

use crate::data::PackedBatch;
use crate::error::Result;

pub mod online;
pub mod remembered;
pub mod store;
pub mod stored;

pub use online::OnlineFeatures;
pub use remembered::RememberedFeatures;
pub use stored::StoredFeatures;

/// One packed batch with the target's hidden states. `T` counts the tokens of all its documents.
#[derive(Debug)]
pub struct FeatureBatch<'a> {
    /// Tokens, supervision and document boundaries, on the host.
    pub batch: &'a PackedBatch,
    /// One `[T, H]` for each captured index, in the order the draft asked for.
    pub hidden: Vec<Tensor>,
}

/// Where features come from.
pub trait FeatureSource {
    /// The hidden states of a batch, by Hugging Face's `hidden_states` index.
    fn features<'a>(&self, batch: &'a PackedBatch, capture: &[usize]) -> Result<FeatureBatch<'a>>;
    /// Whether a document costs less the second time, so that it should always come to the same rank.
    fn remembers(&self) -> bool {
        false
    }
}
