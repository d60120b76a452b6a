//! Parts of a target that is run one of them at a time, see [`super::layerwise`].

use tch::Tensor;

use crate::error::{Error, Result};
use crate::nn::{AttentionMask, Embedding};

/// A part of a target, in the order in which documents pass through them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// Token ids to hidden state 0.
    Embedding,
    /// One layer, from 0.
    Layer(usize),
    /// The norm behind the last layer.
    Norm,
}

impl Part {
    /// All parts of a target with so many layers.
    pub fn all(layers: usize) -> impl Iterator<Item = Self> {
        [Part::Embedding].into_iter().chain((0..layers).map(Part::Layer)).chain([Part::Norm])
    }

    /// Which of Hugging Face's `hidden_states` comes out of this part of a target with so many layers. What the last layer
    /// gives has no number: the norm stands between it and the last one.
    pub fn state(self, layers: usize) -> Option<usize> {
        match self {
            Part::Embedding => Some(0),
            Part::Layer(index) => Some(index + 1).filter(|&state| state < layers),
            Part::Norm => Some(layers),
        }
    }
}

/// What passes through a part: one row of packed documents.
#[derive(Debug)]
pub struct Passing<'a> {
    /// `[1, T]` int64
    pub ids: &'a Tensor,
    /// `[1, T]` int64
    pub positions: &'a Tensor,
    /// What each token sees.
    pub mask: &'a AttentionMask,
    /// What came out of the part before, `[1, T, H]`; nothing for the embedding.
    pub hidden: Option<&'a Tensor>,
}

impl<'a> Passing<'a> {
    /// What came out of the part before, for those that need it.
    pub fn hidden(&self) -> Result<&'a Tensor> {
        self.hidden.ok_or_else(|| Error::Failed("a layer was given no hidden states".to_owned()))
    }
}

/// A part that is loaded.
pub trait LoadedPart {
    /// What comes out of it, `[1, T, H]`.
    fn forward(&self, passing: &Passing<'_>) -> Result<Tensor>;
}

impl LoadedPart for Embedding {
    fn forward(&self, passing: &Passing<'_>) -> Result<Tensor> {
        let _guard = tch::no_grad_guard();
        self.look_up(passing.ids)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_come_in_order_with_the_states_behind_them() {
        let parts: Vec<(Part, Option<usize>)> = Part::all(2).map(|part| (part, part.state(2))).collect();
        let want =
            [(Part::Embedding, Some(0)), (Part::Layer(0), Some(1)), (Part::Layer(1), None), (Part::Norm, Some(2))];
        assert_eq!(parts, want);
    }
}
