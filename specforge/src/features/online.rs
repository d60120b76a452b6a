//! Runs the target on every batch.

use std::rc::Rc;

use super::{FeatureBatch, FeatureSource};
use crate::data::PackedBatch;
use crate::device;
use crate::error::{Error, Result};
use crate::models::{ForwardInput, LogitRows, TargetModel};
use crate::nn::AttentionMask;

/// Features of a target that runs in the training loop.
pub struct OnlineFeatures {
    target: Rc<dyn TargetModel>,
}

impl OnlineFeatures {
    /// Features of this target.
    pub fn new(target: Rc<dyn TargetModel>) -> Self {
        Self { target }
    }
}

impl FeatureSource for OnlineFeatures {
    fn features<'a>(&self, batch: &'a PackedBatch, capture: &[usize]) -> Result<FeatureBatch<'a>> {
        let device = self.target.device();
        let row = |values: &[i64]| Ok::<_, Error>(device::upload(values, device)?.unsqueeze(0)); // [1, T]
        let (ids, positions) = (row(&batch.ids)?, row(&batch.positions)?);
        let mask = AttentionMask::Documents(batch.lengths.clone());
        let logits = LogitRows::None; // the head is the draft's business
        let input = ForwardInput { ids: &ids, positions: &positions, mask: &mask, capture, logits };
        let output = self.target.forward(&input, None)?;
        let hidden = output.hidden.into_iter().map(|states| states.squeeze_dim(0)).collect(); // [T, H]
        Ok(FeatureBatch { batch, hidden })
    }
}
