//! Runs the target on every batch.
//!
//! On the CPU each document passes through the target alone, never in a pack: the last bits of a matrix product depend on
//! its number of rows, so a document's states would otherwise depend on its neighbours. Alone they are a function of
//! the document, and a source that keeps or stores them hands out the same bits. A GPU needs the packs for its speed.
//!
//! A GPU's passes are begun on a thread of their own, so that the next batch is under way while the draft trains on the
//! one before. A CPU has nothing to do them with meanwhile: they are computed when they are awaited.

use std::sync::Arc;

use tch::{Device, Tensor};

use super::worker::Worker;
use super::{FeatureBatch, FeatureSource, Pending};
use crate::data::PackedBatch;
use crate::device;
use crate::error::{Error, Result};
use crate::models::{ForwardInput, LogitRows, SharedTarget, TargetModel};
use crate::nn::AttentionMask;

/// Features of a target that runs in the training loop.
pub struct OnlineFeatures {
    target: SharedTarget,
    /// None on a CPU.
    worker: Option<Worker>,
}

impl OnlineFeatures {
    /// Features of this target.
    pub fn new(target: impl Into<SharedTarget>) -> Self {
        let target = target.into();
        let device = target.in_use().device();
        let worker = (device != Device::Cpu).then(|| Worker::new("target", device));
        Self { target, worker }
    }
}

/// One pass over the whole batch: `[T, H]` for each captured index.
fn forward(target: &dyn TargetModel, batch: &PackedBatch, capture: &[usize]) -> Result<Vec<Tensor>> {
    let device = target.device();
    let row = |values: &[i64]| Ok::<_, Error>(device::upload(values, device)?.unsqueeze(0)); // [1, T]
    let (ids, positions) = (row(&batch.ids)?, row(&batch.positions)?);
    let mask = AttentionMask::Documents(batch.lengths.clone());
    let logits = LogitRows::None; // the head is the draft's business
    let input = ForwardInput { ids: &ids, positions: &positions, mask: &mask, capture, logits };
    let output = target.forward(&input, None)?;
    Ok(output.hidden.into_iter().map(|states| states.squeeze_dim(0)).collect()) // [T, H]
}

/// The features of a batch, document by document where that decides about bits.
fn compute(target: &dyn TargetModel, batch: Arc<PackedBatch>, capture: &[usize]) -> Result<FeatureBatch> {
    if capture.is_empty() {
        return Ok(FeatureBatch::new(batch, Vec::new()));
    }
    if target.device() != Device::Cpu || batch.lengths.len() < 2 {
        let hidden = forward(target, &batch, capture)?;
        return Ok(FeatureBatch::new(batch, hidden));
    }
    let mut parts: Vec<Vec<Tensor>> = capture.iter().map(|_| Vec::new()).collect();
    for document in batch.each() {
        let states = forward(target, &document, capture)?;
        parts.iter_mut().zip(states).for_each(|(part, states)| part.push(states));
    }
    let hidden = parts.iter().map(|part| Ok(Tensor::f_cat(part, 0)?)).collect::<Result<_>>()?; // [T, H]
    Ok(FeatureBatch::new(batch, hidden))
}

impl FeatureSource for OnlineFeatures {
    fn begin(&self, batch: Arc<PackedBatch>, capture: &[usize]) -> Pending<'_> {
        let (target, capture) = (self.target.clone(), capture.to_vec());
        let make = move || compute(&*target.in_use(), batch, &capture);
        match &self.worker {
            Some(worker) => worker.begin(make),
            None => Pending::later(make),
        }
    }
}
