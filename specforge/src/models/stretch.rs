//! A model that is run some layers at a time, with everything between them in the caller's hands: which tokens go on, where
//! they stand, and what is done with their states. Decoders of masked diffusion models work so.

use std::ops::Range;

use tch::Tensor;

use crate::error::{Error, Result};
use crate::nn::{AttentionMask, KvCache};

/// Hidden states on their way through some layers.
#[derive(Debug)]
pub struct Stretch<'a> {
    /// Which layers.
    pub layers: Range<usize>,
    /// What the first of them reads, `[B, T, H]`.
    pub hidden: &'a Tensor,
    /// Absolute positions, `[B, T]` int64.
    pub positions: &'a Tensor,
    /// What each token sees.
    pub mask: &'a AttentionMask,
}

impl Stretch<'_> {
    /// Refuses what a caller can get wrong, for a model of so many layers.
    pub(super) fn check(&self, layers: usize, cache: Option<&KvCache>) -> Result<()> {
        let (rows, tokens, _) = self.hidden.size3()?;
        let Range { start, end } = self.layers;
        if start >= end || end > layers {
            return Err(Error::Failed(format!("layers {start} to {end} were asked for; this model has {layers}")));
        }
        if self.positions.size() != [rows, tokens] {
            let got = self.positions.size();
            return Err(Error::Failed(format!(
                "positions: expected [{rows}, {tokens}], as hidden states, got {got:?}"
            )));
        }
        if let Some(cached) = cache.map(KvCache::rows).filter(|&cached| cached != rows) {
            return Err(Error::Failed(format!("the cache holds {cached} rows, the hidden states {rows}")));
        }
        self.mask.check((rows, tokens), cache.map(KvCache::lengths)).map_err(Error::Failed)
    }
}

/// A model whose layers can be run some at a time.
pub trait InStretches {
    /// Embeddings of ids `[B, T]`: `[B, T, H]`.
    fn embed(&self, ids: &Tensor) -> Result<Tensor>;
    /// Takes hidden states through some layers, `[B, T, H]` to `[B, T, H]`. `see` is told what each layer reads, by the
    /// layer's number, and at last what comes out of the last one, by the number behind it; all before the model's last norm.
    fn run(
        &self,
        stretch: &Stretch<'_>,
        cache: Option<&mut KvCache>,
        see: &mut dyn FnMut(usize, &Tensor),
    ) -> Result<Tensor>;
    /// What the last norm makes of texts `[B, T]` at absolute positions `[B, T]`, `[B, T, H]`: all that stands before the head,
    /// with a graph where the weights ask for gradients.
    fn normed(&self, ids: &Tensor, positions: &Tensor, mask: &AttentionMask) -> Result<Tensor>;
    /// Logits of what the last layer gives, `[.., H]` to `[.., V]`: its norm and the head.
    fn logits(&self, hidden: &Tensor) -> Tensor;
}
