//! A model beside its cache, while some images are decoded.

use tch::Tensor;

use super::committed::{Committed, inputs_of};
#[cfg(test)]
use super::fault::{self, ScaleFault};
use super::sampling::ScaleSampling;
use crate::error::{Error, Result};
use crate::models::var::{Conditions, ScaleCache, Var};

/// A model that reads some images scale by scale: what follows from their labels, and keys and values of what it has read.
#[derive(Debug)]
pub(super) struct Reader<'a> {
    /// "target" or "draft", for messages.
    name: &'static str,
    model: &'a Var,
    conditions: Conditions,
    cache: ScaleCache,
    sampling: ScaleSampling,
}

impl<'a> Reader<'a> {
    /// A reader of images with these labels `[B]`. With guidance each image has a second row, which knows no label.
    pub(super) fn new(name: &'static str, model: &'a Var, labels: &[i64], sampling: ScaleSampling) -> Result<Self> {
        let null = model.config().null_label();
        let mut rows = labels.to_vec();
        if sampling.is_guided() {
            rows.extend(labels.iter().map(|_| null));
        }
        let conditions = model.conditions(&Tensor::from_slice(&rows))?;
        Ok(Self { name, model, conditions, cache: ScaleCache::new(), sampling })
    }

    /// Reads what it has not read of the scales before `end`, in one pass, and gives the images' logits of these scales,
    /// `[B, p * p, V]` each, guidance mixed in, with the weight that it had.
    pub(super) fn read(&mut self, state: &Committed, end: usize) -> Result<Vec<(Tensor, f64)>> {
        let begin = self.cache.scales();
        let doubled: Vec<Tensor>;
        let maps = match self.sampling.is_guided() {
            false => state.inputs(),
            true => {
                doubled = state.inputs().iter().map(|map| Tensor::cat(&[map, map], 0)).collect(); // [2 B, Z, p, p]
                &doubled
            }
        };
        let inputs = inputs_of(maps, begin, end);
        let (logits, cache) = self.model.step(&self.conditions, &self.cache, &inputs)?;
        #[cfg(test)]
        let (logits, cache) = self.with_fault(&inputs, logits, cache)?;
        self.cache = cache;
        let scales = self.model.config().scales();
        let mixed = |(place, logits): (usize, &Tensor)| {
            // The weight is that of the scale in the image, not in this pass.
            let scale = begin + place;
            #[cfg(test)]
            let scale = if fault::active(ScaleFault::RelativeWeight) { place } else { scale };
            let weight = self.sampling.weight(scale, scales);
            let mixed = self.sampling.mixed(logits, weight);
            match bool::try_from(mixed.f_isnan()?.f_any()?)? {
                false => Ok((mixed, weight)),
                true => Err(Error::Failed(format!(
                    "{}: logits of scale {} are not numbers: the weights are damaged, or of another model",
                    self.name,
                    begin + place
                ))),
            }
        };
        logits.iter().enumerate().map(mixed).collect()
    }

    /// Forgets what it read behind the first `scales`.
    pub(super) fn forget_behind(&mut self, scales: usize) {
        self.cache = self.cache.truncated(scales);
    }

    /// What it has read.
    pub(super) fn cache(&self) -> &ScaleCache {
        &self.cache
    }

    /// Tokens of an image that reading up to `end` takes.
    pub(super) fn tokens_to(&self, end: usize) -> i64 {
        self.model.config().begin(end) - self.model.config().begin(self.cache.scales())
    }

    /// Holds what it has read against a fresh pass over the committed scales, where nobody seeded a mistake: length and content.
    #[cfg(test)]
    pub(super) fn assert_fresh(&self, state: &Committed) {
        assert!(self.cache.scales() <= state.scales());
        if !fault::is_sound() || self.model.kind() != tch::Kind::Double || self.cache.scales() == 0 {
            return;
        }
        let double = |map: &Tensor| match self.sampling.is_guided() {
            true => Tensor::cat(&[map, map], 0),
            false => map.shallow_clone(),
        };
        let maps: Vec<Tensor> = state.inputs().iter().map(double).collect();
        let inputs = inputs_of(&maps, 0, self.cache.scales());
        let (_, fresh) = self.model.step(&self.conditions, &ScaleCache::new(), &inputs).unwrap();
        assert_eq!(self.cache.tokens(), self.model.config().begin(self.cache.scales()));
        for block in 0..self.model.config().depth as usize {
            let (got, want) = (self.cache.layer(block).unwrap(), fresh.layer(block).unwrap());
            assert!(got.0.allclose(want.0, 0.0, 1e-9, false) && got.1.allclose(want.1, 0.0, 1e-9, false));
        }
        fault::count_fresh();
    }

    /// A pass of the target as a seeded mistake makes it.
    #[cfg(test)]
    fn with_fault(
        &self,
        inputs: &[crate::models::var::ScaleInput<'_>],
        logits: Vec<Tensor>,
        cache: ScaleCache,
    ) -> Result<(Vec<Tensor>, ScaleCache)> {
        let blind = || self.model.step(&self.conditions, &self.cache.forgotten(), inputs);
        if self.name != "target" {
            return Ok((logits, cache));
        }
        if fault::active(ScaleFault::CacheReset) {
            return blind();
        }
        if fault::active(ScaleFault::MaskWithoutPrefix) {
            let (logits, new) = blind()?;
            return Ok((logits, self.cache.joined(&new)));
        }
        if fault::active(ScaleFault::PrefixOffset) {
            let sizes: Vec<i64> = logits.iter().map(|logits| logits.size()[1]).collect();
            let moved = Tensor::cat(&logits, 1).roll(-self.cache.tokens(), 1i64);
            return Ok((moved.split_with_sizes(&sizes, 1), cache));
        }
        Ok((logits, cache))
    }
}
