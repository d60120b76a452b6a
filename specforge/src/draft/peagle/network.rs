//! The network: EAGLE-3's layers, a mask for what is not known yet, and several predictions of an anchor in one pass.
//!
//! Rows behind an anchor read nothing but the mask, so that one row stands for all of them until attention tells them
//! apart: the first layer's projections see it once, whatever the number of rows.
//!
//! Shape legend: `T` tokens of a packed batch, `R` rows of chains, `M` trained rows, `A` chains of a group, `L` rows of each,
//! `n` rows of a depth, `H` hidden size, `N` heads, `G` key/value heads, `D` head size, `B` rows of a batch, `DV` draft
//! vocabulary.

use tch::{Device, Tensor};

use super::config::{MASK_HIDDEN, PeagleShape};
use super::rows::{Chains, Group, Kept};
use crate::draft::Parameter;
use crate::draft::eagle3::layers::Network;
use crate::error::{Error, Result};
use crate::nn::merged_attention::{self, Own, Runs};
use crate::nn::{AttentionMask, Head, KvCache, LayerCache};

/// The draft's weights, by what they do. They share their memory with the trained parameters.
#[derive(Debug)]
pub struct PeagleNetwork {
    network: Network,
    /// `[1, 1, nf TH]`
    mask_hidden: Tensor,
    /// `[1]`
    mask_token: Tensor,
    windows: Vec<Option<i64>>,
}

impl PeagleNetwork {
    /// The network over the trained parameters.
    pub fn new(shape: &PeagleShape, parameters: &[Parameter], device: Device) -> Result<Self> {
        let mask_hidden = parameters.iter().find(|parameter| parameter.name == MASK_HIDDEN);
        let mask_hidden =
            mask_hidden.ok_or_else(|| Error::Failed(format!("P-EAGLE: there is no parameter `{MASK_HIDDEN}`")))?;
        let mask_hidden = mask_hidden.value.shallow_clone();
        // The embedding is one of the parameters: nothing else is looked at.
        let network = Network::new(&shape.network, parameters, &mask_hidden, device)?;
        let mask_token = Tensor::f_from_slice(&[shape.mask_token_id])?.f_to_device(device)?;
        Ok(Self { network, mask_hidden, mask_token, windows: shape.windows.clone() })
    }

    /// The vocabulary projection.
    pub fn head(&self) -> &Head {
        self.network.head()
    }

    /// What the vocabulary projection reads of rows `[.., H]`.
    pub fn normed(&self, hidden: &Tensor) -> Tensor {
        self.network.normed(hidden)
    }

    /// Logits of rows `[.., H]` without gradients: `[.., DV]`.
    pub fn logits(&self, hidden: &Tensor) -> Tensor {
        self.network.logits(hidden)
    }

    /// Captured features, `[n, TH]` each, to the draft's width: `[n, H]`.
    pub fn project_hidden_states(&self, captured: &[Tensor]) -> Result<Tensor> {
        self.network.project_hidden_states(captured)
    }

    /// What stands for the feature of a token that is not known yet, `[1, H]`.
    fn mask_feature(&self) -> Result<Tensor> {
        let parts = self.network.shape.capture.len() as i64;
        self.network.project_hidden_states(&self.mask_hidden.view([1, -1]).f_chunk(parts, 1)?)
    }

    /// Runs the rows of a batch from its captured features. Returns the trained rows by depth, before any norm: `[M, H]`.
    pub fn backbone(&self, plan: &Chains, captured: &[Tensor]) -> Result<Tensor> {
        let network = &self.network;
        if plan.teachers.is_empty() {
            let head = self.head();
            return Ok(Tensor::f_zeros([0, network.shape.hidden_size], (head.kind(), head.device()))?);
        }
        let mut hidden = network.project_hidden_states(captured)?; // [T, H]
        let embedded = network.embed_input_ids(&plan.tokens)?; // [T, H]
        let (rope, first_rope) = (network.tables(&plan.positions), network.tables(&plan.first_positions));
        let mut chains = self.mask_feature()?; // [1, H], [R, H] behind the first layer
        let mask_embedded = network.embed_input_ids(&self.mask_token)?; // [1, H]
        let chain_rope = network.tables(&plan.chain_positions);
        for (index, layer) in network.layers.iter().enumerate() {
            let window = plan.window(self.windows[index]);
            let (input, residual) = layer.read(&embedded, &hidden);
            let shared = layer.keys(&input, &rope)?; // [T, G, D] each
            // Keys are needed of every token; what comes behind them in the last layer, of the trained rows alone.
            let rows = if index + 1 == network.layers.len() { plan.first.size()[0] } else { embedded.size()[0] };
            let none = merged_attention::no_own_keys(rows, &shared[0])?;
            let own = [&none, &none];
            hidden = if index + 1 == network.layers.len() {
                let select = |tensor: Tensor| tensor.index_select(0, &plan.first);
                layer.mix(&select(input), &select(residual), &first_rope, &shared, own, &plan.first_runs[window])?
            } else {
                layer.mix(&input, &residual, &rope, &shared, own, &plan.context[window])?
            };
            if plan.rows() == 0 {
                continue;
            }
            let (input, residual) = layer.read(&mask_embedded, &chains);
            let query = layer.query(&input, &chain_rope)?; // [R, N, D]
            let own = layer.keys(&input, &chain_rope)?; // [R, G, D] each
            let attended = attend(plan, window, &query, &shared, &own)?; // [R, N, D]
            chains = layer.finish(&residual, &attended)?; // [R, H]
        }
        if plan.rows() == 0 {
            return Ok(hidden);
        }
        Ok(Tensor::cat(&[hidden, chains.index_select(0, &plan.chain_trained)], 0))
    }

    /// An empty cache for `rows` sequences with room for `capacity` tokens each.
    pub fn new_cache(&self, rows: i64, capacity: i64) -> KvCache {
        let layer = self.network.shape.layer;
        let options = (self.network.kind(), self.head().device());
        let layers = self.windows.iter().map(|&window| LayerCache::Attention {
            groups: layer.num_key_value_heads,
            key_dim: layer.head_dim,
            value_dim: layer.head_dim,
            window,
        });
        KvCache::new(&layers.collect::<Vec<_>>(), rows, capacity, options)
    }

    /// One pass of decoding, behind what `cache` holds: in each of `B` rows the features of its new tokens, `[c, H]` projected
    /// ones of the target, with the ids of the tokens behind them, and then `masks` rows of the mask. Returns the outputs of
    /// the last known token's row and of the mask's, before any norm: `[B, 1 + masks, H]`. The cache keeps the rows of known
    /// tokens alone.
    pub fn draft(&self, features: &[Tensor], ids: &[Vec<i64>], masks: i64, cache: &mut KvCache) -> Result<Tensor> {
        let device = self.head().device();
        let mask = self.mask_feature()?.f_expand([masks, -1], false)?; // [masks, H]
        let counts: Vec<i64> = ids.iter().map(|ids| ids.len() as i64).collect();
        let width = counts.iter().max().unwrap_or(&0) + masks;
        let rows: Vec<Tensor> = features.iter().map(|known| Tensor::cat(&[known, &mask], 0)).collect();
        let features = Tensor::pad_sequence(&rows, true, 0.0, "right"); // [B, width, H]
        let mask_token = i64::try_from(&self.mask_token)?;
        let (mut all, mut positions, mut wanted) = (Vec::new(), Vec::new(), Vec::new());
        for (row, (ids, &length)) in (0i64..).zip(ids.iter().zip(cache.lengths())) {
            // What pads a row stands behind everything else, so that causal order hides it.
            all.extend(ids.iter().copied().chain(std::iter::repeat(mask_token)).take(width as usize));
            positions.extend(length..length + width);
            let last = row * width + ids.len() as i64 - 1;
            wanted.extend(last..=last + masks);
        }
        let shaped = |values: &[i64]| crate::device::send(&Tensor::from_slice(values).view([-1, width]), device);
        let (ids, positions) = (shaped(&all), shaped(&positions));
        let hidden = self.pass(&features, &ids, &positions, cache)?; // [B, width, H]
        cache.advance(&counts);
        let wanted = crate::device::upload(&wanted, device)?;
        Ok(hidden.flatten(0, 1).index_select(0, &wanted).unflatten(0, [-1, masks + 1])) // [B, 1 + masks, H]
    }

    /// Causal rows `[B, T, H]` through all layers.
    fn pass(&self, features: &Tensor, ids: &Tensor, positions: &Tensor, cache: &mut KvCache) -> Result<Tensor> {
        let (rows, tokens) = ids.size2()?;
        let embedded = self.network.embed_input_ids(&ids.flatten(0, 1))?; // [B * T, H]
        let rope = self.network.tables(&positions.flatten(0, 1));
        let mut masks = cache.masks(&AttentionMask::Causal, positions);
        let mut hidden = features.flatten(0, 1); // [B * T, H]
        for (index, layer) in self.network.layers.iter().enumerate() {
            let (input, residual) = layer.read(&embedded, &hidden);
            let mask = masks.of(self.windows[index]);
            hidden = layer.mix_cached((&input, &residual), &rope, mask, (index, cache));
        }
        Ok(hidden.view([rows, tokens, -1]))
    }
}

/// Attention of the rows of chains, `[R, N, D]`: each sees the shared keys of its document up to its anchor, and the keys of
/// its own chain, `[R, G, D]`, up to itself.
fn attend(plan: &Chains, window: usize, query: &Tensor, shared: &[Tensor; 2], own: &[Tensor; 2]) -> Result<Tensor> {
    let mut attended = Vec::new();
    // Keys of each chain up to the depth before, [n, d, G, D]; for rows by depth.
    let mut before: Option<[Tensor; 2]> = None;
    let mut start = 0;
    for (rows, group) in &plan.groups {
        let part = |tensor: &Tensor| tensor.narrow(0, start, *rows);
        let query = part(query);
        let call = |[key, value]: [&Tensor; 2], queries_per_own: i64, runs: &Runs| {
            // Within its chain a row sees those before it.
            let hidden = (queries_per_own > 1).then(|| merged_attention::causal(queries_per_own, query.device()));
            let hidden = hidden.transpose()?;
            let own = Own { key, value, queries_per_own, hidden: hidden.as_ref() };
            merged_attention::merged_attention(&query, [&shared[0], &shared[1]], own, runs)
        };
        attended.push(match group {
            Group::Chains { length, runs } => {
                let own = own.each_ref().map(|keys| part(keys).unflatten(0, [-1, *length])); // [A, L, G, D]
                call(own.each_ref(), *length, &runs[window])?
            }
            Group::Depth { kept, runs } => {
                let fresh = own.each_ref().map(|keys| part(keys).unsqueeze(1)); // [n, 1, G, D]
                let own = match (before.take(), kept) {
                    (Some(before), Kept::Rows(kept)) => [0, 1].map(|at: usize| {
                        Tensor::cat(&[&before[at].index_select(0, kept), &fresh[at]], 1) // [n, d, G, D]
                    }),
                    _ => fresh,
                };
                let output = call(own.each_ref(), 1, &runs[window])?;
                before = Some(own);
                output
            }
        });
        start += rows;
    }
    Ok(Tensor::cat(&attended, 0))
}

#[cfg(test)]
mod tests;
