//! Runs the target on every batch.
//!
//! On the CPU each document passes through the target alone, never in a pack: the last bits of a matrix product depend on
//! its number of rows, so a document's states would otherwise depend on its neighbours. Alone they are a function of
//! the document, and a source that keeps or stores them hands out the same bits. A GPU needs the packs for its speed.

use std::rc::Rc;

use tch::{Device, Tensor};

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

impl OnlineFeatures {
    /// One pass over the whole batch: `[T, H]` for each captured index.
    fn forward(&self, batch: &PackedBatch, capture: &[usize]) -> Result<Vec<Tensor>> {
        let device = self.target.device();
        let row = |values: &[i64]| Ok::<_, Error>(device::upload(values, device)?.unsqueeze(0)); // [1, T]
        let (ids, positions) = (row(&batch.ids)?, row(&batch.positions)?);
        let mask = AttentionMask::Documents(batch.lengths.clone());
        let logits = LogitRows::None; // the head is the draft's business
        let input = ForwardInput { ids: &ids, positions: &positions, mask: &mask, capture, logits };
        let output = self.target.forward(&input, None)?;
        Ok(output.hidden.into_iter().map(|states| states.squeeze_dim(0)).collect()) // [T, H]
    }
}

impl FeatureSource for OnlineFeatures {
    fn features<'a>(&self, batch: &'a PackedBatch, capture: &[usize]) -> Result<FeatureBatch<'a>> {
        if self.target.device() != Device::Cpu || batch.lengths.len() < 2 {
            return Ok(FeatureBatch { batch, hidden: self.forward(batch, capture)? });
        }
        let mut parts: Vec<Vec<Tensor>> = capture.iter().map(|_| Vec::new()).collect();
        for document in batch.each() {
            let states = self.forward(&document, capture)?;
            parts.iter_mut().zip(states).for_each(|(part, states)| part.push(states));
        }
        let hidden = parts.iter().map(|part| Ok(Tensor::f_cat(part, 0)?)).collect::<Result<_>>()?; // [T, H]
        Ok(FeatureBatch { batch, hidden })
    }
}
