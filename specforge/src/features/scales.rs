//! What a next-scale transformer hands to a draft: what its head reads for every code of a picture.
//!
//! A document is a picture's label and then the codes of all its scales. Row `t` is what the head reads to predict token
//! `t + 1`; the last row predicts nothing and is zeros. State 0 is of the picture with its label, state 1 of the same codes
//! without one, which is the other half of guidance.
//!
//! As `online` has it, on the CPU every document passes through the target alone, so that its states are a function of the
//! document. Where the target is an image tokenizer alone there is nothing to compute, and a draft that asks for nothing gets
//! the documents.
//!
//! Shape legend: `B` pictures, `L` codes of a picture, `T` tokens `B * (1 + L)`, `C` width of the target.

use std::sync::Arc;

use tch::{Device, Kind, Tensor};

use super::{FeatureBatch, FeatureSource, Pending};
use crate::data::PackedBatch;
use crate::device;
use crate::error::{Error, Result};
use crate::models::var::Var;
use crate::models::vqvae::Quantizer;

/// States that can be asked for.
const STATES: usize = 2;

/// Labels and codes of packed pictures.
#[derive(Debug)]
pub struct PackedPictures {
    /// `[B]` int64
    pub labels: Tensor,
    /// `[B, L]` int64
    pub codes: Tensor,
}

impl PackedPictures {
    /// Those of a batch of documents, each of `1 + codes` tokens.
    pub fn of(batch: &PackedBatch, codes: i64, device: Device) -> Result<Self> {
        if let Some((length, document)) =
            batch.lengths.iter().zip(&batch.documents).find(|(length, _)| **length != codes + 1)
        {
            let problem = format!("`{document}` has {length} tokens, a picture has a label and {codes} codes");
            return Err(Error::Failed(problem));
        }
        let all = device::upload(&batch.ids, device)?.f_view([batch.lengths.len() as i64, codes + 1])?; // [B, 1 + L]
        Ok(Self { labels: all.f_select(1, 0)?, codes: all.f_narrow(1, 1, codes)? })
    }

    /// The codes of each scale, `[B, p * p]` each.
    pub fn maps(&self, patch_nums: &[i64]) -> Result<Vec<Tensor>> {
        let sizes: Vec<i64> = patch_nums.iter().map(|side| side * side).collect();
        Ok(self.codes.f_split_with_sizes(&sizes, 1)?.iter().map(Tensor::contiguous).collect())
    }
}

/// Features of a target that runs in the training loop.
#[derive(Debug)]
pub struct ScaleFeatures {
    /// Nothing where the target is an image tokenizer alone.
    target: Option<(Var, Quantizer)>,
}

impl ScaleFeatures {
    /// Features of a transformer, which reads codes through a quantiser; or none.
    pub fn new(target: Option<(Var, Quantizer)>) -> Self {
        Self { target }
    }

    fn compute(&self, batch: Arc<PackedBatch>, capture: &[usize]) -> Result<FeatureBatch> {
        if capture.is_empty() {
            return Ok(FeatureBatch::new(batch, Vec::new()));
        }
        let Some((target, quantizer)) = &self.target else {
            let problem = "the draft learns from a transformer's states, and the target is an image tokenizer alone";
            return Err(Error::config("target.path", problem));
        };
        let _no_grad = tch::no_grad_guard();
        let pass = |batch: &PackedBatch| states(target, quantizer, batch, capture);
        let hidden = match target.device() {
            Device::Cpu => {
                let each = batch.each().map(|document| pass(&document)).collect::<Result<Vec<_>>>()?;
                let joined = |index: usize| {
                    let parts: Vec<&Tensor> = each.iter().filter_map(|states| states.get(index)).collect();
                    Ok(Tensor::f_cat(&parts, 0)?) // [T, C]
                };
                (0..capture.len()).map(joined).collect::<Result<_>>()?
            }
            _ => pass(&batch)?,
        };
        Ok(FeatureBatch::new(batch, hidden))
    }
}

/// One pass for each state: `[T, C]` each.
fn states(target: &Var, quantizer: &Quantizer, batch: &PackedBatch, capture: &[usize]) -> Result<Vec<Tensor>> {
    let config = target.config();
    let pictures = PackedPictures::of(batch, config.length(), target.device())?;
    let inputs = quantizer.idx_to_var_input(&pictures.maps(&config.patch_nums)?)?.f_to_kind(target.kind())?;
    let none = Tensor::full([1], config.null_label(), (Kind::Int64, target.device()));
    let state = |&index: &usize| {
        let labels = match index {
            0 => pictures.labels.shallow_clone(),
            1 => none.f_expand_as(&pictures.labels)?,
            _ => {
                return Err(Error::Failed(format!("state {index} was asked for; a picture has 0 to {}", STATES - 1)));
            }
        };
        let states = target.states(&labels, &inputs)?; // [B, L, C]
        let last = Tensor::zeros([labels.size()[0], 1, config.embed_dim], (states.kind(), states.device()));
        Ok(Tensor::f_cat(&[states, last], 1)?.f_flatten(0, 1)?) // [T, C]
    };
    capture.iter().map(state).collect()
}

impl FeatureSource for ScaleFeatures {
    fn begin(&self, batch: Arc<PackedBatch>, capture: &[usize]) -> Pending<'_> {
        let capture = capture.to_vec();
        Pending::later(move || self.compute(batch, &capture))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::DocumentRef;
    use crate::models::var::{VarConfig, tiny};
    use crate::models::vqvae;

    fn source() -> (ScaleFeatures, VarConfig) {
        let config = VarConfig { patch_nums: vec![1, 2, 4], vocab_size: 16, z_channels: 4, ..tiny::config() };
        let build = |name: &str, shape: &[i64]| {
            let stream = shape.iter().sum::<i64>() as u64 + name.len() as u64;
            Ok(crate::nn::noise::normal(shape, 0.4, 5, stream))
        };
        let quantizer = vqvae::tiny().config().quantizer.clone();
        let quantizer = Quantizer::build(quantizer, "", &mut |name, shape| build(name, shape)).unwrap();
        let target = Var::build(config.clone(), &mut |name, shape| build(name, shape)).unwrap();
        (ScaleFeatures::new(Some((target, quantizer))), config)
    }

    fn batch(pictures: i64) -> PackedBatch {
        let document =
            |picture: i64| std::iter::once(picture % 10).chain((0..21).map(move |place| (place * 7 + picture) % 16));
        PackedBatch {
            ids: (0..pictures).flat_map(document).collect(),
            positions: (0..pictures).flat_map(|_| 0..22).collect(),
            supervised: (0..pictures).flat_map(|_| (0..22).map(|place| place > 0)).collect(),
            lengths: vec![22; pictures as usize],
            documents: (0..pictures).map(|number| DocumentRef::new("picture", number as u64)).collect(),
        }
    }

    #[test]
    fn a_state_is_what_the_head_reads_and_neighbours_change_nothing() {
        let (source, config) = source();
        let both = source.features(Arc::new(batch(2)), &[0, 1]).unwrap();
        assert_eq!((both.hidden.len(), both.hidden[0].size()), (2, vec![44, 16]));
        assert!(!both.hidden[0].equal(&both.hidden[1]));
        let alone = source.features(Arc::new(batch(1)), &[0]).unwrap();
        assert!(alone.hidden[0].equal(&both.hidden[0].narrow(0, 0, 22)));
        let (target, quantizer) = source.target.as_ref().unwrap();
        let pictures = PackedPictures::of(&batch(1), 21, Device::Cpu).unwrap();
        let inputs = quantizer.idx_to_var_input(&pictures.maps(&config.patch_nums).unwrap()).unwrap();
        let want = target.forward(&pictures.labels, &inputs).unwrap();
        let got = target.head().logits(&alone.hidden[0].narrow(0, 0, 21));
        assert!(got.allclose(&want.squeeze_dim(0), 0.0, 1e-5, false));
    }

    #[test]
    fn what_cannot_be_computed_is_named() {
        let (source, _) = source();
        let said = |result: Result<FeatureBatch>| result.unwrap_err().to_string();
        assert!(said(source.features(Arc::new(batch(1)), &[2])).contains("state 2"));
        let short = PackedBatch { ids: vec![1, 2], lengths: vec![2], ..batch(1) };
        assert!(said(source.features(Arc::new(short), &[0])).contains("has 2 tokens"));
        let alone = ScaleFeatures::new(None);
        assert!(said(alone.features(Arc::new(batch(1)), &[0])).contains("target.path"));
        assert!(alone.features(Arc::new(batch(1)), &[]).unwrap().hidden.is_empty());
    }
}
