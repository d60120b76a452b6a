//! What of some images is decided.

use tch::Tensor;

use crate::error::Result;
use crate::models::var::ScaleInput;
use crate::models::vqvae::quantizer::Quantizer;

/// The scales of some images that are decided, and what follows from them. A value: one more scale makes another one, so a
/// draft that goes on from here leaves it as it is.
#[derive(Debug)]
pub struct Committed {
    /// The map of each scale, `[B, p * p]` int64.
    maps: Vec<Tensor>,
    /// What they add up to, `[B, Z, P, P]`.
    f_hat: Tensor,
    /// What a model reads for each scale but the first, `[B, Z, p, p]`: as far as it is known.
    inputs: Vec<Tensor>,
}

impl Clone for Committed {
    /// Tensors are shared: nothing here writes to one.
    fn clone(&self) -> Self {
        let share = |tensors: &[Tensor]| tensors.iter().map(Tensor::shallow_clone).collect();
        Self { maps: share(&self.maps), f_hat: self.f_hat.shallow_clone(), inputs: share(&self.inputs) }
    }
}

impl Committed {
    /// Images of which nothing is decided.
    pub fn nothing(quantizer: &Quantizer, images: i64) -> Self {
        Self { maps: Vec::new(), f_hat: quantizer.empty(images), inputs: Vec::new() }
    }

    /// Scales that are decided.
    pub fn scales(&self) -> usize {
        self.maps.len()
    }

    /// The maps, `[B, p * p]` int64 each.
    pub fn maps(&self) -> &[Tensor] {
        &self.maps
    }

    /// What the maps add up to, `[B, Z, P, P]`.
    pub fn f_hat(&self) -> &Tensor {
        &self.f_hat
    }

    /// What models read for the scales from 1 on, `[B, Z, p, p]` each, as far as it is known.
    pub fn inputs(&self) -> &[Tensor] {
        &self.inputs
    }

    /// The same with the map of one more scale, `[B, p * p]` int64.
    pub fn with(&self, quantizer: &Quantizer, map: Tensor) -> Result<Self> {
        let scale = self.scales();
        let mut next = self.clone();
        next.f_hat = quantizer.add_scale(&self.f_hat, scale, &map)?;
        next.maps.push(map);
        if scale + 1 < quantizer.config().scales() {
            next.inputs.push(quantizer.next_input(&next.f_hat, scale)?);
        }
        Ok(next)
    }

    /// The same where the last scale is added a second time: a seeded mistake.
    #[cfg(test)]
    pub(super) fn added_again(&self, quantizer: &Quantizer) -> Result<Self> {
        let mut wrong = self.clone();
        let Some(last) = self.maps.last() else { return Ok(wrong) };
        let scale = self.scales() - 1;
        wrong.f_hat = quantizer.add_scale(&self.f_hat, scale, last)?;
        if let Some(input) = wrong.inputs.get_mut(scale) {
            *input = quantizer.next_input(&wrong.f_hat, scale)?;
        }
        Ok(wrong)
    }

    /// The same where models read each scale's own tokens from `begin` on: a seeded mistake.
    #[cfg(test)]
    pub(super) fn of_own_tokens(&self, quantizer: &Quantizer, begin: usize) -> Self {
        let mut wrong = self.clone();
        for (scale, map) in self.maps.iter().enumerate().skip(begin.max(1)) {
            let codes = Tensor::embedding(quantizer.embedding(), map, -1, false, false).transpose(1, 2); // [B, Z, T]
            wrong.inputs[scale - 1] = codes.reshape(self.inputs[scale - 1].size());
        }
        wrong
    }
}

/// What a model reads for the scales from `begin` up to `end`, from the maps of the scales from 1 on.
pub(super) fn inputs_of(maps: &[Tensor], begin: usize, end: usize) -> Vec<ScaleInput<'_>> {
    let input = |scale: usize| match scale.checked_sub(1) {
        None => Some(ScaleInput::Start),
        Some(place) => maps.get(place).map(ScaleInput::Map),
    };
    (begin..end).map_while(input).collect()
}
