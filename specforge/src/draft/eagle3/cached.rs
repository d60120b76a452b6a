//! The network while decoding: the same rows as in the training-time test, on keys that a cache keeps.
//!
//! Row `t` reads the feature of token `t` and the embedding of token `t + 1` and stands at position `t`. Rows behind known
//! tokens take the target's features; a guess takes what its parent's row became, and sees the rows of known tokens, its
//! ancestors and itself: exactly a chain of steps of the training-time test.
//!
//! Shape legend: `B` rows of a batch, `T` new rows of each, `H` hidden size, `DV` draft vocabulary.

use tch::Tensor;

use super::layers::Network;
use crate::error::Result;
use crate::nn::{AttentionMask, KvCache, LayerCache};

impl Network {
    /// An empty cache for `rows` sequences with room for `capacity` tokens each.
    pub fn new_cache(&self, rows: i64, capacity: i64) -> KvCache {
        let layer = self.shape.layer;
        let options = (self.kind(), self.head().device());
        let layer = LayerCache::full(layer.num_key_value_heads, layer.head_dim);
        KvCache::new(&vec![layer; self.layers.len()], rows, capacity, options)
    }

    /// One pass from `features [B, T, H]` (projected ones of the target, or [`Network::fed_back`]), the ids of the tokens
    /// behind them and positions, `[B, T]` each. Returns what the rows become before any norm, `[B, T, H]`. The cache's
    /// lengths stay: the caller moves them.
    pub fn forward_cached(
        &self,
        features: &Tensor,
        ids: &Tensor,
        positions: &Tensor,
        mask: &AttentionMask,
        cache: &mut KvCache,
    ) -> Result<Tensor> {
        let (rows, tokens) = ids.size2()?;
        let embedded = self.embed_input_ids(&ids.flatten(0, 1))?; // [B * T, H]
        let rope = self.tables(&positions.flatten(0, 1));
        let mut masks = cache.masks(mask, positions);
        let mask = masks.of(None);
        let mut hidden = features.flatten(0, 1); // [B * T, H]
        for (index, layer) in self.layers.iter().enumerate() {
            let (input, residual) = layer.read(&embedded, &hidden);
            hidden = layer.mix_cached((&input, &residual), &rope, mask, (index, cache));
        }
        Ok(hidden.view([rows, tokens, -1])) // [B, T, H]
    }

    /// What the row of a guess reads of its parent's output.
    pub fn fed_back(&self, hidden: &Tensor) -> Tensor {
        self.feature(hidden)
    }

    /// Logits of rows `[.., H]` without gradients: `[.., DV]`.
    pub fn logits(&self, hidden: &Tensor) -> Tensor {
        self.head().logits(&self.normed(hidden))
    }
}

#[cfg(test)]
pub(super) mod tests;
